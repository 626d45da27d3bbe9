"""What a forward costs at each scale, counted on the meta device: no weights and no GPU are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddit.adapter import PatchAdapter
from ddit.config import ScheduleConfig
from ddit.known import meta_transformer
from ddit.models import architecture_for
from ddit.models.base import to_meta

PIXELS, GROUP = 8, 4
"""Pixels of a picture, and frames of a clip, to one of its latents; the first frame has a latent of its own."""


def count(
    model: str, *, height: int, width: int, frames: int = 1, scales: Sequence[int] = (1, 2, 4), rank: int | None = None
) -> dict[str, Any]:
    """Tokens and floating-point operations of one forward of one sample.

    Args:
        model: See `ddit.known.meta_transformer`.
        height, width, frames: Of the picture or clip.
        rank: Count an adapter of this rank along.

    Raises:
        ValueError: For an unknown model, or sizes that it does not take.
    """
    transformer = meta_transformer(model)
    architecture, config = architecture_for(transformer), ScheduleConfig(scales=tuple(scales))
    multiple = PIXELS * architecture.patch_size
    for name, size in (("height", height), ("width", width)):
        if size < multiple or size % multiple:
            raise ValueError(f"{name} is {size}; it must be a multiple of {multiple}")
    if frames % GROUP != 1:
        raise ValueError(f"frames is {frames}; it must be one more than a multiple of {GROUP}")
    inputs = architecture.example((frames - 1) // GROUP + 1, height // PIXELS, width // PIXELS)
    adapter = (
        None if rank is None else PatchAdapter.for_model(transformer, scales=[s for s in scales if s > 1], rank=rank)
    )
    rows = {}
    for scale in scales:
        call = inputs if scale == 1 else architecture.coarse_inputs(inputs, scale, config)[0]
        flops = architecture.count_flops(to_meta(call), scale, adapter)
        rows[scale] = {"tokens": architecture.tokens(call), "flops": flops}
    return {
        "model": model,
        "class": type(transformer).__name__,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "height": height,
        "width": width,
        "frames": frames,
        "adapter_rank": rank,
        "scales": {s: {**row, "ratio": rows[1]["flops"] / row["flops"]} for s, row in rows.items()},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results of `count` as Markdown: a line each, TFLOPs at every scale and how many times fewer."""
    scales = list(results[0]["scales"])
    lines = [
        "Floating-point operations of one forward of one sample, counted on the meta device.",
        "",
        "| model | size | " + " | ".join(f"tokens at {s}p, TFLOPs" for s in scales) + " | times fewer |",
        "|---" * (len(scales) + 3) + "|",
    ]
    for r in results:
        size = f"{r['height']} x {r['width']}" + (f" x {r['frames']}" if r["frames"] > 1 else "")
        cells = [f"{row['tokens']:,}, {row['flops'] / 1e12:.1f}" for row in r["scales"].values()]
        fewer = ", ".join(f"{row['ratio']:.2f}" for s, row in r["scales"].items() if int(s) > 1)
        lines.append(f"| {r['model']} | {size} | " + " | ".join(cells) + f" | {fewer} |")
    return "\n".join(lines) + "\n"
