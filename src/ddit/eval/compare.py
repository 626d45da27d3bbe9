"""``ddit compare``: every way to be faster that a user could pick, in one run, grouped by what speed it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPEEDS = (1.5, 2, 3, 4, 5)
FAMILIES = {
    "fewer steps": "plain:run_steps",
    "cache": "cache alone",
    "progressive resolution": "progressive",
    "large patches": "dynamic",
    "adapter": "dynamic with an adapter",
    "forecasts": "dynamic without asking the model (gain=0)",
    "stacked": "dynamic with a cache",
}
"""Name -> what it is."""


def family(method: str) -> str:
    """Which of `FAMILIES` a method belongs to."""
    policy, _, rest = method.partition(":")
    cached = "cache=" in rest
    if policy == "plain":
        return "cache" if cached else "fewer steps"
    if policy == "progressive":
        return "progressive resolution"
    if cached:
        return "stacked"
    if "gain=0" in rest.split(","):
        return "forecasts"
    return "adapter" if "adapter=" in rest and "adapter=none" not in rest else "large patches"


def methods(run_steps: Sequence[int], *, video: bool, teacache: bool, adapter: str | None) -> list[str]:
    """The methods to compare at each of several numbers of steps.

    Args:
        run_steps: The first is what all is compared with.
        video: Leaves out what is written for pictures alone.
        teacache: Whether the model has coefficients.
        adapter: Name of the model's adapter, if it has one.
    """
    first = run_steps[0]
    chosen = ["plain", *(f"plain:run_steps={round(first / speed)}" for speed in SPEEDS)]
    for n in run_steps:
        at = f",run_steps={n}" if n != first else ""
        caches = [f"first-block:{t}" for t in (0.1, 0.2)] + [f"taylorseer:{k}" for k in (2, 4, 6)]
        if teacache:
            caches += [f"teacache:{t}" for t in (0.1, 0.2)]
        chosen += [f"plain:cache={cache}{at}" for cache in caches]
        if not video:
            chosen.append(f"progressive:fraction=0.3{at}")
        chosen += [f"dynamic:threshold={t}{at}" for t in (0.003, 0.006)]
        if adapter is not None:
            chosen += [f"dynamic:threshold=0.003,adapter={adapter}{at}"]
        chosen += [f"dynamic:threshold={t},gain=0{at}" for t in (0.0015, 0.003, 0.006)]
        stack = "teacache:0.1" if teacache else "first-block:0.1"
        chosen += [f"dynamic:threshold=0.003,cache={stack}{at}", f"dynamic:threshold=0.003,gain=0,cache={stack}{at}"]
    return list(dict.fromkeys(chosen))


def winners(rows: Sequence[dict[str, Any]], measure: str) -> dict[float, list[dict[str, Any]]]:
    """Speed -> the best method of each family among those at least as fast, best first.

    Args:
        measure: ``adherence``, of which more is better, or ``frechet``, of which less is.
    """
    best = {}
    for speed in SPEEDS:
        fast = [row for row in rows if row["speedup"] >= speed]
        of_family = {name: [row for row in fast if family(row["method"]) == name] for name in FAMILIES}
        sign = -1 if measure == "adherence" else 1
        chosen = [min(group, key=lambda row: sign * row[measure]) for group in of_family.values() if group]
        best[speed] = sorted(chosen, key=lambda row: sign * row[measure])
    return best


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """For each speed the best of each family by Fréchet distance."""
    lines = []
    for speed, best in winners(rows, "frechet").items():
        lines += [f"\n### {speed:g}x or faster\n", "| family | method | speed | Fréchet | change | adherence, points |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in best:
            low, high = row["frechet_change_interval"]
            worse, better = row["adherence_change_interval"]
            lines.append(
                f"| {family(row['method'])} | {row['method']} | {row['speedup']:.2f}x | {row['frechet']:.2f} "
                f"| {low:+.2f} to {high:+.2f} "
                f"| {100 * row['adherence_change']:+.1f} ({100 * worse:+.1f} to {100 * better:+.1f}) |"
            )
    return "\n".join(lines).lstrip() + "\n"


def plot(stem: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """PNG and SVG: Fréchet distance and adherence against speed, a colour per family, what is best joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, measure, sign in zip(figure.subplots(1, 2), ("frechet", "adherence"), (1, -1), strict=True):
        for name in FAMILIES:
            group = sorted((r["speedup"], r[measure]) for r in rows if family(r["method"]) == name)
            if not group:
                continue
            (points,) = axis.plot(*zip(*group, strict=True), "o", markersize=4, label=name)
            front = [p for p in group if all(sign * p[1] < sign * q[1] for q in group if q[0] > p[0])]
            axis.plot(*zip(*front, strict=True), color=points.get_color(), linewidth=1)
        axis.axhline(rows[0][measure], color="black", linestyle=":", linewidth=1)
        axis.set(xlabel="speed, relative to plain", xscale="log")
        ticks = [1, 1.5, 2, 3, 4, 5, 7, 10]
        axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axis.minorticks_off()
    left, right = figure.axes
    left.set(ylabel="Fréchet distance to drawings (less is better)", yscale="log")
    right.set(ylabel="adherence (more is better)")
    left.legend(fontsize=8)
    paths = [stem.with_name(f"{stem.name}-pareto{ending}") for ending in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths
