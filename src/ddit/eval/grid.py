"""What methods drew, side by side in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from ddit.eval.quality import Entry, Results, stacked


def fewest_and_most(result: Results, asked: Sequence[Any], count: int = 4) -> dict[int, str]:
    """Prompts of a method with the fewest and the most full steps: number -> prompt and steps."""
    fine = [int((sample == 1).sum()) for part in result for sample in part.scales]
    order = sorted(range(len(fine)), key=fine.__getitem__)
    chosen = [*order[:count], *order[count:][-count:]]
    return {i: "\n".join([*wrap(asked[i].prompt, 28), f"{fine[i]} full steps"]) for i in chosen}


def save_grid(path: Path, methods: Sequence[Entry], results: Sequence[Results], shown: Mapping[int, str]) -> None:
    """PNG: a row of pictures per method, a column per prompt; of clips the middle frame.

    Args:
        shown: Number of a prompt -> title of its column.
    """
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(1.4 * len(shown) + 2.4, 1.4 * len(methods) + 0.4 * any(shown.values())), layout="constrained"
    )
    axes = figure.subplots(len(methods), len(shown), squeeze=False)
    for row, method, result in zip(axes, methods, results, strict=True):
        for axis, picture in zip(row, stacked(result)[list(shown)], strict=True):
            axis.imshow(picture if picture.ndim == 3 else picture[len(picture) // 2])
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(method.name.replace(":", "\n").replace(",", "\n"), fontsize=6, rotation=0, ha="right")
    for axis, title in zip(axes[0], shown.values(), strict=True):
        axis.set_title(title, fontsize=5)
    # A few rows are shown in full, many in less than a screen's worth of pixels each.
    figure.savefig(path, dpi=min(80 if len(methods) > 2 else 110, 2200 // len(methods)))
