"""Draw a ComfyUI workflow as a picture: its nodes, what is set on them, and their links.

python scripts/draw_workflow.py comfyui/example_workflows/flux_patches_and_skip.json comfyui/workflow.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

MARGIN, TITLE, ROW = 20, 30, 20
GROUND, BOX, HEAD, OURS, TEXT, DIM = "#202124", "#35363a", "#45474d", "#2c5f4a", "#f1f3f4", "#bdc1c6"
COLOURS = {"MODEL": "#b39ddb", "CLIP": "#fdd663", "CONDITIONING": "#fbbc9a", "LATENT": "#f28bd8", "VAE": "#ff8a80"}


def slot(node: dict[str, Any], side: str, index: int) -> tuple[int, int]:
    """Where an input or an output sits."""
    x, y = node["pos"]
    return x + (node["size"][0] if side == "outputs" else 0), y + TITLE + ROW // 2 + ROW * index


def curve(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[float, float]]:
    """Points of a link, a cubic Bézier curve that leaves and arrives level."""
    across, down = end[0] - start[0], end[1] - start[1]
    reach = max(abs(across) / 2, 25)
    points = []
    for t in (i / 24 for i in range(25)):
        share = t * t * (3 - 2 * t)
        bend = 3 * reach * t * (1 - t) * (1 - 2 * t)
        points.append((start[0] + across * share + bend, start[1] + down * share))
    return points


def draw_node(canvas: ImageDraw.ImageDraw, node: dict[str, Any], font: Any, small: Any) -> None:
    """A box with a title, its slots, and the values set on it."""
    (x, y), (width, height) = node["pos"], node["size"]
    canvas.rounded_rectangle((x, y, x + width, y + height), 6, fill=BOX)
    canvas.rounded_rectangle((x, y, x + width, y + TITLE - 4), 6, fill=OURS if "DDiT" in node["type"] else HEAD)
    canvas.text((x + 10, y + 4), node.get("title", node["type"]), fill=TEXT, font=font)
    sockets = {"inputs": [one for one in node["inputs"] if "widget" not in one], "outputs": node["outputs"]}
    for side, dx, anchor in (("inputs", 12, "lm"), ("outputs", -12, "rm")):
        for index, one in enumerate(sockets[side]):
            at = slot(node, side, index)
            canvas.circle(at, 5, fill=COLOURS.get(one["type"], DIM))
            canvas.text((at[0] + dx, at[1]), one["name"], fill=DIM, font=small, anchor=anchor)
    names = [one["name"] for one in node["inputs"] if "widget" in one]
    top = y + TITLE + ROW * max(map(len, sockets.values())) + 4
    for index, value in enumerate(node["widgets_values"]):
        canvas.text((x + 14, top + ROW * index), f"{value}", fill=TEXT, font=small)
        if names:
            canvas.text((x + width - 14, top + ROW * index), names[index], fill=DIM, font=small, anchor="ra")


def draw(flow: dict[str, Any]) -> Image.Image:
    """The whole workflow."""
    nodes = {node["id"]: node for node in flow["nodes"]}
    size = [max(n["pos"][i] + n["size"][i] for n in nodes.values()) + MARGIN for i in (0, 1)]
    image = Image.new("RGB", tuple(size), GROUND)
    canvas, font, small = ImageDraw.Draw(image), ImageFont.load_default(15), ImageFont.load_default(13)
    for node in nodes.values():
        draw_node(canvas, node, font, small)
    for _, source, output, target, index, kind in flow["links"]:
        line = curve(slot(nodes[source], "outputs", output), slot(nodes[target], "inputs", index))
        canvas.line(line, fill=COLOURS.get(kind, DIM), width=3, joint="curve")
    return image


if __name__ == "__main__":
    workflow, picture = map(Path, sys.argv[1:])
    draw(json.loads(workflow.read_text())).quantize(64).save(picture, optimize=True)
