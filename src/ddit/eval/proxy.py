"""The proxy card: how far a small model behaves like FLUX.1-dev and Wan 2.1, row by row beside what is published.

A claim about acceleration that was measured on a small model means as much as the rows it rests on. Rows on patches
(room in a token, half resolution, fewer steps) must pass; rows on likeness (PSNR, SSIM) say how a race is to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ddit.models.base import Architecture
from ddit.util.tables import table

STEPS = 50
"""Of the plain run, as in the publications."""
FEWER = (30, 17, 11, 7)
"""60, 34, 22 and 14 % of these."""
TEACACHE = (0.1, 0.15, 0.2, 0.3, 0.4)
"""Thresholds among which the one nearest to three times less work is taken."""
ROOM = {False: (16.0, 4.0, 1.0), True: (12.0, 3.0, 0.75)}
"""Of videos or not -> wanted width of a token for each number in a patch of p, 2p and 4p."""
EASIER = 8.0
"""dB beyond which likeness to plain decides nothing."""


@dataclass(frozen=True)
class Row:
    """One property."""

    name: str
    real: str
    """Of FLUX.1-dev or Wan 2.1, as published."""
    wanted: str
    proxy: str
    """What was measured."""
    passed: bool
    must: bool = False
    """Whether patches can't be judged without it."""


def entries(*, teacache: bool) -> list[str]:
    """What has to be drawn, in the words of `ddit.eval.quality.parse_entry`; the first is plain."""
    rest = [f"plain:run_steps={n}" for n in (25, *FEWER)]
    caches = [f"plain:cache=teacache:{t:g}" for t in TEACACHE] if teacache else ["plain:cache=first-block:0.2"]
    taylor = ["plain:cache=taylorseer:4", "plain:run_steps=25,cache=taylorseer:4"]
    return ["plain", "progressive:fraction=0.5", *rest, *taylor, *caches]


def card(rows: Sequence[Mapping[str, Any]], architecture: Architecture, *, video: bool) -> list[Row]:
    """The card from rows of `ddit.eval.quality.summarise` of `entries`.

    Args:
        architecture: Of the transformer.
    """
    by_name = {row["method"]: row for row in rows}
    plain, half = by_name["plain"], by_name["progressive:fraction=0.5"]
    fewer = {n: by_name[f"plain:run_steps={n}"] for n in FEWER}
    caches = [row for name, row in by_name.items() if "teacache" in name or "first-block" in name]
    third = min(caches, key=lambda row: abs(1 / row["flops_fraction"] - 3))
    named = third["method"].partition("cache=")[2]
    taylor, shorter = by_name["plain:cache=taylorseer:4"], by_name["plain:run_steps=25,cache=taylorseer:4"]
    return [
        _room(architecture, video),
        _half(plain, half),
        _knee(fewer, plain),
        _likeness("TaylorSeer one in 4", 19.5 if video else 22.3, 35.0, taylor),
        _likeness(f"{named} at {1 / third['flops_fraction']:.1f}x", 17.2, 30.0, third),
        _degrades(by_name["plain:run_steps=25"], shorter),
        _similarity(by_name["plain:run_steps=25"]),
    ]


def _room(architecture: Architecture, video: bool) -> Row:
    has = [architecture.width / (architecture.features * s * s) for s in (1, 2, 4)]
    wanted = ROOM[video]
    return Row(
        "width of a token for each number in a patch of p, 2p, 4p",
        "24 to 48, 6 to 12, 1.5 to 3",
        "at least " + ", ".join(f"{x:g}" for x in wanted),
        ", ".join(f"{x:.3g}" for x in has),
        all(a >= b for a, b in zip(has, wanted, strict=True)),
        must=True,
    )


def _half(plain: Mapping[str, Any], half: Mapping[str, Any]) -> Row:
    nearer = half["frechet_change_interval"][0]
    return Row(
        "half resolution for half of the steps",
        "near-lossless (SPEED: 28 of 50 steps)",
        "adherence within 1 point, Fréchet distance within noise + 5 %",
        f"{100 * half['adherence_change']:+.1f} points, {plain['frechet']:.2f} -> {half['frechet']:.2f}",
        half["adherence_change"] >= -0.01 and nearer <= 0.05 * plain["frechet"],
        must=True,
    )


def worse(row: Mapping[str, Any]) -> bool:
    """Whether a method is measurably worse than plain: an interval of its change that leaves out zero."""
    return row["adherence_change_interval"][1] < 0 or row["frechet_change_interval"][0] > 0


def _knee(fewer: Mapping[int, Mapping[str, Any]], plain: Mapping[str, Any]) -> Row:
    lost = [n for n, row in fewer.items() if worse(row)]
    told = [f"{n}: {100 * row['adherence_change']:+.1f}, {row['frechet']:.2f}" for n, row in fewer.items()]
    return Row(
        "fewer steps: change of quality at 60, 34, 22, 14 %",
        "-2, -2 to -5, -17, -16 % (ImageReward)",
        "measurable from 17 steps down, none at 30",
        f"points, Fréchet distance (plain {plain['frechet']:.2f}) at " + "; ".join(told),
        {17, 11, 7} <= set(lost) and 30 not in lost,
        must=True,
    )


def _likeness(name: str, real: float, wanted: float, row: Mapping[str, Any]) -> Row:
    easier = row["psnr"] - real
    reading = ": likeness decides nothing" if easier > EASIER else ""
    told = f"{row['psnr']:.1f} dB, {easier:.1f} dB easier{reading}"
    return Row(f"{name}: median PSNR to plain", f"{real:g} dB", f"below {wanted:g} dB", told, row["psnr"] < wanted)


def _degrades(steps: Mapping[str, Any], taylor: Mapping[str, Any]) -> Row:
    lost = worse(taylor) and taylor["frechet"] > steps["frechet"]
    told = f"Fréchet distance {steps['frechet']:.2f} -> {taylor['frechet']:.2f}"
    return Row("TaylorSeer one in 4 on 25 steps", "degrades sharply", "does", told, lost)


def _similarity(row: Mapping[str, Any]) -> Row:
    told = f"SSIM {row['ssim']:.3f}"
    return Row("likeness of half the steps to plain", "SSIM .75 to .80", "below .90", told, row["ssim"] < 0.9)


def markdown(rows: Sequence[Row]) -> str:
    """The card as a table."""
    missed = {False: "miss", True: "**miss**, patches can't be judged"}
    cells = ([r.name, r.real, r.wanted, r.proxy, "pass" if r.passed else missed[r.must]] for r in rows)
    return table(["property", "real models", "wanted", "this model", ""], cells)


def to_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [asdict(row) for row in rows]
