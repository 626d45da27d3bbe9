"""Methods side by side on held-out prompts: adherence, likeness to drawings and to plain, work and time."""

from __future__ import annotations

import json
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit.embedded.scenes import Split
from ddit.eval.metrics import (
    FrechetTo,
    bootstrap_difference,
    bootstrap_interval,
    corrected_difference,
    decibels,
    psnr,
    ssim,
)
from ddit.eval.parts import Part, Parts
from ddit.eval.prices import Prices
from ddit.eval.subjects import Subject, Verdict
from ddit.pipelines.generate import Method, Run, run
from ddit.pipelines.outputs import frames
from ddit.preset import Preset
from ddit.util.memory import with_peak
from ddit.util.progress import progress
from ddit.util.tables import table


@dataclass(frozen=True)
class Entry:
    """A way to draw a prompt in a race, as named on the command line."""

    name: str
    run_steps: int
    method: Method | None = None
    """``None`` is the untouched pipeline."""

    def priced(self, outcome: Run, costs: Prices | None) -> Run:
        """What it drew, with its work told at the costs of another model where they are given."""
        if costs is None or outcome.report is None:
            return outcome
        return replace(outcome, report=costs.price(outcome.report, self.method and self.method.cache))


MakeMethod = Callable[[dict[str, Any]], Method]
"""From words (`ddit.pipelines.methods.WORDS`) to a method."""


def parse_entry(text: str, run_steps: int, make: MakeMethod) -> Entry:
    """Read ``plain``, ``progressive:fraction=0.5`` or ``ddit:word=value,...``; each also takes ``run_steps``.

    Words are those of `ddit.pipelines.methods`: ``ddit:speedup=3,patches=full``. ``plain`` takes ``cache`` too. Lists
    are joined by ``/``: ``ddit:schedule=1/1/2``.
    """
    kind, _, rest = text.partition(":")
    if kind not in ("plain", "progressive", "ddit"):
        raise ValueError(
            f"method {text!r} is none; it must begin with plain, progressive or ddit "
            "(a cache alone is plain:cache=taylorseer:4)"
        )
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} in method {text!r} is not word=value; lists are joined by /, as in scales=1/2")
        values[key] = value if key in ("adapter", "cache", "patches") else _value(value)
    run_steps = values.pop("run_steps", run_steps)
    if not isinstance(run_steps, int) or run_steps < 1:
        raise ValueError(f"run_steps is {run_steps!r} in method {text!r}; it must be a whole number above 0")
    if kind == "plain":
        if set(values) - {"cache"}:
            raise ValueError(f"method {text!r}: plain takes run_steps and cache only")
        return Entry(text, run_steps, make({**values, "patches": "full"}) if values else None)
    if kind == "progressive":
        fraction = values.pop("fraction", 0.5)
        if values or not isinstance(fraction, float) or not 0 < fraction < 1:
            raise ValueError(f"method {text!r}: progressive takes fraction, between 0 and 1, and run_steps only")
        return Entry(text, run_steps, progressive(fraction, run_steps, make))
    try:
        lists = {k: [v] if k in ("scales", "schedule") and isinstance(v, int) else v for k, v in values.items()}
        return Entry(text, run_steps, make(lists))
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from error


def progressive(fraction: float, run_steps: int, make: MakeMethod) -> Method:
    """The first fraction of the steps on a picture half as high and wide, the rest on the whole one.

    As SPEED (arXiv 2605.18736) does it, noise-consistent in both directions: a coarse step is a step of a run on the
    small picture, if what it drops is left to be noise, of which the step back to full size finds as much as belongs to
    its level.
    """
    early = round(fraction * run_steps)
    method = make({"schedule": [2] * early + [1], "adapter": "none"})
    preset = replace(method.preset or Preset(), detail_variance={})
    return replace(method, preset=preset)


def _value(text: str) -> Any:
    if "/" in text:
        return [_value(part) for part in text.split("/")]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


Results = list[Part]
"""Everything one method drew, a part per batch."""


def draw_all(
    pipe: Any,
    methods: Sequence[Entry],
    asked: Sequence[Any],
    settings: dict[str, Any],
    *,
    batch: int,
    seed: int,
    parts: Parts | None = None,
    costs: Prices | None = None,
) -> list[Results]:
    """Run every method on every prompt; for each batch of prompts the methods take turns in rotating order.

    Args:
        asked: Each has a ``prompt``.
        parts: Finished batches are taken from here, and kept here.
        costs: At which work is told; by default the model's own.
    """
    prompts = [scene.prompt for scene in asked]
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))]
    device = torch.device(pipe.device)
    starts = range(0, len(prompts), batch)
    turns: list[list[Part]] = []
    warm = False

    def call(entry: Entry, part: slice, steps: int) -> Part:
        chosen = {**settings, "num_inference_steps": steps}
        asked = (pipe, prompts[part], seeds[part], chosen)
        outcome, memory = with_peak(partial(run, *asked, method=entry.method), device)
        return Part.of(entry.priced(outcome, costs), memory)

    with progress("evaluate", len(starts) * len(methods)) as advance:
        for turn, start in enumerate(starts):
            drawn = parts.load(turn) if parts else None
            if drawn is None:
                if not warm:
                    _warm_up(call, methods, batch)
                warm, new = True, {}
                for k in range(len(methods)):
                    i = (k + turn) % len(methods)
                    new[i] = call(methods[i], slice(start, start + batch), methods[i].run_steps)
                    advance()
                drawn = [new[i] for i in range(len(methods))]
                if parts:
                    parts.save(turn, drawn)
            else:
                for _ in drawn:
                    advance()
            turns.append(drawn)
    return [list(results) for results in zip(*turns, strict=True)] if turns else [[] for _ in methods]


def _warm_up(call: Callable[[Entry, slice, int], Part], methods: Sequence[Entry], batch: int) -> None:
    """Call every method for a few steps, of which nothing is kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps are not what anyone asked for
        for method in methods:
            call(method, slice(0, batch), 5)


def stacked(results: Results) -> np.ndarray:
    """Everything drawn, uint8 ``[N, H, W, 3]`` or ``[N, F, H, W, 3]``."""
    return np.concatenate([part.pictures for part in results])


def summarise(
    methods: Sequence[Entry], results: Sequence[Results], asked: Sequence[Any], subject: Subject, split: Split
) -> list[dict[str, Any]]:
    """One row of figures per method; the first method is the one others are compared with.

    Adherence is the mean over a prompt's attributes of what the judge finds right, then over prompts, with bootstrap
    intervals over prompts. The Fréchet distance is to ten drawings per prompt, from the judge's features. Clips are
    compared frame by frame. Where nobody judges, both are left out.
    """
    reference = stacked(results[0])
    judge = _judge(reference, asked, subject, split) if subject.judged else lambda _: {}
    sizes = [len(part.pictures) for part in results[0]]
    rows = []
    for method, result in zip(methods, results, strict=True):
        pictures = stacked(result)
        ratios = [float(a.seconds / b.seconds) for a, b in zip(results[0], result, strict=True)]
        ours, theirs = _frames(pictures), _frames(reference)
        likeness = decibels(pictures, reference)
        memory = max(int(part.memory) for part in result)
        row: dict[str, Any] = {
            "method": method.name,
            "run_steps": method.run_steps,
            "adapter": method.method is not None and method.method.adapter is not None,
            "speedup": statistics.median(ratios),
            "speedup_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None,
            "seconds_per_picture": sum(float(part.seconds) for part in result) / len(asked),
            "peak_memory": None if memory < 0 else memory,
            **judge(pictures),
            "psnr": statistics.median(psnr(ours, theirs).tolist()),
            "psnr_mean_interval": bootstrap_interval(torch.tensor(likeness)),
            "psnr_of_each": [round(x, 2) for x in likeness],
            "ssim": float(ssim(ours, theirs).mean()),
            "tokens_fraction": float(np.average([part.work[0] for part in result], weights=sizes)),
            "flops_fraction": float(np.average([part.work[1] for part in result], weights=sizes)),
        }
        row["times_less_work"] = methods[0].run_steps / (method.run_steps * row["flops_fraction"])
        scales = [sample.tolist() for part in result for sample in part.scales]
        skip = method.method.skip if method.method is not None else None
        if skip is not None and skip.speedup is not None:
            row["realised"] = _realised(result, skip.speedup)
        if method.method is not None and scales[0]:
            row["steps_per_scale"] = _steps_per_scale(scales)
            row["full_steps"] = _full_steps(scales, asked, subject)
        rows.append(row)
    _add_regret(rows)
    return rows


def _judge(
    reference: np.ndarray, asked: Sequence[Any], subject: Subject, split: Split
) -> Callable[[np.ndarray], dict[str, Any]]:
    """Gives what the judge says of pictures, beside what it says of the first method's."""
    distance = FrechetTo(subject.reference(10 * len(asked), split))
    plain, base_features = _adherence(subject.verdicts(reference, asked), subject), subject.features(reference)

    def figures(pictures: np.ndarray) -> dict[str, Any]:
        verdicts, features = subject.verdicts(pictures, asked), subject.features(pictures)
        overall = _adherence(verdicts, subject)
        change, interval = corrected_difference(features, base_features, distance)
        return {
            "adherence": float(overall.mean()),
            "adherence_interval": bootstrap_interval(overall),
            "adherence_of_each": [round(x, 3) for x in overall.tolist()],
            "adherence_change": float((overall - plain).mean()),
            "adherence_change_interval": bootstrap_difference(overall, plain),
            "attributes": _by_attribute(verdicts),
            "frechet": float(distance(features)),
            "perceptual": float(subject.distance(pictures, reference).mean()),
            "frechet_change": change,
            "frechet_change_interval": interval,
        }

    return figures


def _add_regret(rows: Sequence[dict[str, Any]]) -> None:
    """``regret``: how much nearer to plain, in dB, another method of no more work is that is chosen in hindsight for
    each prompt, mean over prompts; with its interval. Half a step of plain is no more.
    """
    work = [row["flops_fraction"] * row["run_steps"] for row in rows]
    for row, own in zip(rows, work, strict=True):
        rivals = [r["psnr_of_each"] for r, w in zip(rows, work, strict=True) if w <= own + 0.5]
        missed = torch.tensor(rivals).max(0).values - torch.tensor(row["psnr_of_each"])
        row["regret"] = float(missed.mean())
        row["regret_interval"] = bootstrap_interval(missed)


def _realised(result: Results, asked: float) -> dict[str, float]:
    """How much less work every sample took, relative to what was asked for: 1 is exact."""
    got = np.concatenate([1 / part.flops for part in result]) / asked
    within = float((abs(got - 1) <= 0.05).mean())
    return {"mean": float(got.mean()), "least": float(got.min()), "most": float(got.max()), "within_5_percent": within}


def _adherence(verdicts: Sequence[Verdict], subject: Subject) -> Tensor:
    """Of each prompt, ``[N]``."""
    return torch.tensor([statistics.fmean(x for k, x in v.items() if k not in subject.beside) for v in verdicts])


def _frames(drawn: np.ndarray) -> Tensor:
    """Pictures, or the frames of all clips, ``[N, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(frames(drawn)).permute(0, 3, 1, 2).float() / 255


def _by_attribute(verdicts: Sequence[dict[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for name, value in verdict.items():
            values[name].append(value)
    return {name: statistics.fmean(v) for name, v in values.items()}


def _steps_per_scale(samples: Sequence[Sequence[int]]) -> dict[int, float]:
    """Scale -> mean number of steps of a picture; 0 is skipped."""
    scales = sorted({s for sample in samples for s in sample})
    return {s: statistics.fmean(sample.count(s) for sample in samples) for s in scales}


def _full_steps(samples: Sequence[Sequence[int]], asked: Sequence[Any], subject: Subject) -> dict[str, dict[str, Any]]:
    """What a prompt names -> number of full steps of such prompts, with its interval."""
    counts: dict[str, list[float]] = defaultdict(list)
    for scene, sample in zip(asked, samples, strict=True):
        for name in subject.kinds(scene):
            counts[name].append(float(sample.count(1)))
    return {
        name: {
            "prompts": len(v),
            "mean": statistics.fmean(v),
            "interval": bootstrap_interval(torch.tensor(v)),
        }
        for name, v in sorted(counts.items())
        if len(v) > 1
    }


def markdown(rows: Sequence[dict[str, Any]], prompts: int, costs: str | None = None) -> str:
    """The rows as a table; ``costs`` is the model at whose costs work is told."""
    judged = ["adherence (95 %)", "change, points", "Fréchet (change)"] if "adherence" in rows[0] else []
    cells = []
    for row in rows:
        steps, memory = row["run_steps"] / rows[0]["run_steps"], row["peak_memory"]
        cells.append(
            [
                *(row["method"], row["run_steps"], f"{row['speedup']:.2f}x", f"{row['flops_fraction'] * steps:.0%}"),
                *(_judgement(row) if judged else ()),
                *(f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", "" if memory is None else round(memory / 1e6)),
            ]
        )
    text = (
        f"{prompts} prompts. Speed is wall-clock, relative to the first row, in the same run; memory is what a call "
        "takes beyond what lay there before."
    )
    if judged:
        text += " Fréchet distances of few prompts are too large: compare them within this table alone."
    text += f" Work is that of {costs} in as many steps of each kind.\n\n" if costs else "\n\n"
    return text + table(
        ["method", "steps", "speed", "work" if costs else "FLOPs", *judged, "median PSNR, dB", "SSIM", "memory, MB"],
        cells,
    )


def adherence_change(row: Mapping[str, Any]) -> str:
    """By how many points adherence differs from that of the first row, with the interval."""
    worse, better = row["adherence_change_interval"]
    return f"{100 * row['adherence_change']:+.1f} ({100 * worse:+.1f} to {100 * better:+.1f})"


def _judgement(row: dict[str, Any]) -> tuple[str, str, str]:
    """Cells of a table."""
    low, high = row["adherence_interval"]
    nearer, farther = row["frechet_change_interval"]
    adherence = f"{row['adherence']:.1%} ({low:.1%} to {high:.1%})"
    return adherence, adherence_change(row), f"{row['frechet']:.2f} ({nearer:+.2f} to {farther:+.2f})"
