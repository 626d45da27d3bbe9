"""``ddit compare``: every way to be faster that a user could pick, in one run, grouped by what speed it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddit.eval.quality import adherence_change
from ddit.pipelines.methods import SKIP
from ddit.util.files import ended
from ddit.util.tables import table

SPEEDS = (1.5, 2, 3, 4, 5)
THRESHOLDS = (0.002, 0.008)
CACHES = ("first-block:0.1", "taylorseer:4", "taylorseer:6", "teacache:0.2", "cache-dit:0.1")
BELOW = ("teacache:0.1", "first-block:0.1")
"""The first of these that suits is put below patches and skipping."""
FAMILIES = {
    "fewer steps": "plain:run_steps",
    "cache": "a cache alone",
    "progressive resolution": "progressive",
    "patches": "large patches without training",
    "patches, adapter": "large patches with an adapter",
    "skipping": "skipping alone",
    "patches and skipping": "both",
    "with a cache": "patches or skipping over a cache",
}
"""Name -> what it is."""


def family(method: str, adapter: bool | None = None) -> str:
    """Which of `FAMILIES` a method belongs to.

    Args:
        adapter: Whether it had one, which may be the preset's; by default whether it names one.
    """
    kind, _, rest = method.partition(":")
    values = dict(item.split("=", 1) for item in rest.split(",") if item)
    if kind == "plain":
        return "cache" if "cache" in values else "fewer steps"
    if kind == "progressive":
        return "progressive resolution"
    if "cache" in values:
        return "with a cache"
    skips = bool(set(values) & set(SKIP))
    if values.get("patches") == "full":
        return "skipping"
    if skips:
        return "patches and skipping"
    learnt = values.get("adapter", "none") != "none" if adapter is None else adapter
    return "patches, adapter" if learnt else "patches"


def _family(row: Mapping[str, Any]) -> str:
    return family(row["method"], row.get("adapter"))


def methods(
    run_steps: Sequence[int], *, suits: Callable[[str], bool], adapter: str | None, planned: bool = False
) -> list[str]:
    """The methods to compare at each of several numbers of steps: about 25 for one.

    Args:
        run_steps: The first is what all is compared with.
        suits: Whether the model can have a cache of this name.
        adapter: Name of an adapter for large patches.
        planned: Whether a speedup is planned over patches and skipping (`ddit.pipelines.methods.planned_jointly`).
    """
    first = run_steps[0]
    chosen = ["plain", *(f"plain:run_steps={max(round(first / speed), 2)}" for speed in SPEEDS)]
    caches = [name for name in CACHES if suits(name)]
    below = next(filter(suits, BELOW), None)
    adapters = [f"adapter={name}" for name in ("none", adapter)] if adapter else [""]
    for n in run_steps:
        at = f"run_steps={n}" if n != first else ""
        chosen += [_named("plain", f"cache={cache}", at) for cache in caches]
        chosen += [_named("ddit", learnt, at) for learnt in adapters]
        chosen += [_named("ddit", f"speedup={speed},patches=full", at) for speed in SPEEDS]
    learnt = f",adapter={adapter}" if adapter else ""
    chosen += [f"ddit:threshold={t:g}{learnt}" for t in THRESHOLDS] + ["ddit:patches=paper"]
    chosen += [f"ddit:patch_speedup={speed}{learnt}" for speed in SPEEDS[:2]]
    rule = "" if planned else f"threshold={THRESHOLDS[1]:g},"
    chosen += [f"ddit:{rule}speedup={s}{learnt}" for s in (SPEEDS[1:] if planned else (2, 3))]
    if below is not None:
        chosen += [f"ddit:threshold={THRESHOLDS[1]:g},cache={below}{learnt}"]
        chosen += [f"ddit:speedup=3,patches=full,cache={below}"]
    chosen.append("progressive:fraction=0.5")
    return list(dict.fromkeys(chosen))


def _named(policy: str, *fields: str) -> str:
    """A method's name; empty fields don't count."""
    return ":".join(filter(None, (policy, ",".join(filter(None, fields)))))


def measures(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What methods can be ranked by, the best first; without a judge there is likeness to plain alone."""
    return ("frechet", "adherence", "psnr") if "frechet" in rows[0] else ("psnr",)


def winners(rows: Sequence[dict[str, Any]], measure: str, by: str = "speedup") -> dict[float, list[dict[str, Any]]]:
    """Speed -> the best method of each family among those at least as fast, best first.

    Args:
        measure: ``adherence`` or ``psnr``, of which more is better, or ``frechet``, of which less is.
        by: What speed is: ``speedup`` on the clock, or ``times_less_work``.
    """
    best = {}
    for speed in SPEEDS:
        fast = [row for row in rows if row[by] >= speed]
        of_family = {name: [row for row in fast if _family(row) == name] for name in FAMILIES}
        sign = 1 if measure == "frechet" else -1
        chosen = [min(group, key=lambda row: sign * row[measure]) for group in of_family.values() if group]
        best[speed] = sorted(chosen, key=lambda row: sign * row[measure])
    return best


def markdown(rows: Sequence[dict[str, Any]], by: str = "speedup") -> str:
    """For each speed the best of each family by the first of `measures`."""
    measure, *others = measures(rows)
    told = ["Fréchet", "change", "adherence, points"] if others else []
    sections = []
    for speed, best in winners(rows, measure, by).items():
        head = ["family", "method", NAMES[by], *told, "PSNR dB"]
        cells = (
            [
                *(_family(row), row["method"], f"{row[by]:.2f}x"),
                *(_judgement(row) if told else ()),
                f"{row['psnr']:.1f}",
            ]
            for row in best
        )
        at_least = "or faster" if by == "speedup" else "less work"
        sections.append(f"### {speed:g}x {at_least}\n\n" + (table(head, cells) if best else "No method was.\n"))
    return "\n".join(sections)


def _judgement(row: dict[str, Any]) -> tuple[str, str, str]:
    low, high = row["frechet_change_interval"]
    return f"{row['frechet']:.2f}", f"{low:+.2f} to {high:+.2f}", adherence_change(row)


NAMES = {"speedup": "speed", "times_less_work": "times less work"}
LABELS = {
    "frechet": "Fréchet distance to drawings (less is better)",
    "adherence": "adherence (more is better)",
    "psnr": "likeness to plain, PSNR in dB (more is better)",
}


def plot(stem: Path, rows: Sequence[dict[str, Any]], by: str = "speedup") -> list[Path]:
    """PNG and SVG: each of `measures` against speed, a colour per family, what is best joined."""
    from matplotlib.figure import Figure

    shown = measures(rows)
    figure = Figure(figsize=(5.5 * len(shown), 4.6), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, measure in zip(axes, shown, strict=True):
        sign = 1 if measure == "frechet" else -1
        for name in FAMILIES:
            points = [(r[by], r[measure]) for r in rows if _family(r) == name]
            group = sorted(point for point in points if math.isfinite(point[1]))
            if not group:
                continue
            (drawn,) = axis.plot(*zip(*group, strict=True), "o", markersize=4, label=name)
            front = [p for p in group if all(sign * p[1] < sign * q[1] for q in group if q[0] > p[0])]
            axis.plot(*zip(*front, strict=True), color=drawn.get_color(), linewidth=1)
        if math.isfinite(rows[0][measure]):
            axis.axhline(rows[0][measure], color="black", linestyle=":", linewidth=1)
        axis.set(xlabel=f"{NAMES[by]}, relative to plain", xscale="log", ylabel=LABELS[measure])
        ticks = [1, 1.5, 2, 3, 4, 5, 7, 10]
        axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axis.minorticks_off()
        if measure == "frechet":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    axes[0].legend(fontsize=8)
    paths = [ended(stem, f"-pareto{ending}") for ending in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths
