"""Measure on a model's own runs what its preset holds: plain ones, and one for each of several speedups."""

from __future__ import annotations

import inspect
import json
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddit.adapter import PatchAdapter
from ddit.caches import suits
from ddit.config import SkipSchedule
from ddit.eval.metrics import decibels
from ddit.eval.parts import digest
from ddit.eval.step_errors import Errors, measured_errors, profile_of
from ddit.models import architecture_for
from ddit.models.base import Architecture, Inputs, first
from ddit.patches import detail_variance
from ddit.pipelines.generate import Method, guidance_scale, recorded, run, run_steps
from ddit.preset import FILE, Preset, QualityCurve
from ddit.pretrained import config_hash, fingerprint
from ddit.skip.joint import expected_error
from ddit.teacache import TeaCacheConfig, relative_change
from ddit.util.files import write_json
from ddit.util.progress import progress

DEGREE = 4
"""Of TeaCache's polynomial, as its authors fit it."""
SPEEDUPS = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""For which likeness to plain is measured, beside the error that is expected of their plans."""
SCALES = (2, 4)
"""For which the variance of the detail is measured."""


@dataclass(frozen=True)
class Plain:
    """What plain runs of some prompts showed."""

    pictures: np.ndarray
    changes: list[tuple[float, float]] | None
    """From step to step of a guidance pass: by how much TeaCache's signal changed, and by how much the answer did;
    ``None`` where the model can't have TeaCache."""
    detail: dict[int, list[float]]
    """Scale -> variance per channel of what pooling loses (`ddit.patches.detail_variance`)."""
    errors: Errors
    """What coarse steps and forecasts would have been off by."""


@dataclass(frozen=True)
class Figures:
    """What all runs of a batch of prompts showed; goes into JSON."""

    prompts: int
    changes: list[tuple[float, float]] | None
    detail: dict[int, list[float]]
    likeness: list[list[float]]
    """PSNR to plain in dB of each prompt, for each of `SPEEDUPS`; empty where runs are too short to plan."""
    expected: list[float]
    """Expected error of their plans."""
    errors: Errors

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Figures:
        """The inverse of `dataclasses.asdict`, through JSON."""
        detail = {int(s): v for s, v in values["detail"].items()}
        return cls(**{**values, "detail": detail, "errors": Errors.from_dict(values["errors"])})


def calibrate(
    pipe: Any,
    preset: Preset,
    prompts: Sequence[str],
    settings: dict[str, Any],
    *,
    batch: int,
    seed: int,
    folder: Path,
    adapter: PatchAdapter | None = None,
) -> Preset:
    """The preset with all that runs of some prompts tell. Finished batches are kept in the folder until all are done.

    Args:
        settings: Arguments of the pipeline's call.
        batch: Prompts that are run together.
        adapter: In use where likeness to plain is measured, and where it will be asked for.

    Raises:
        ValueError: With too few steps to fit TeaCache's polynomial to.
    """
    _check_steps(pipe, settings, min(batch, len(prompts)))
    kept = folder / f"{FILE}.part"
    asked = {
        "base": [config_hash(pipe.transformer), fingerprint(pipe.transformer)],
        "preset": repr(preset),
        "adapter": None if adapter is None else digest(adapter),
        "dtype": str(pipe.transformer.dtype),
        "settings": settings,
        "prompts": list(prompts),
        "batch": batch,
        "seed": seed,
    }
    done = _kept(kept, asked)
    parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
    with progress("calibrate", len(parts) * (1 + len(SPEEDUPS))) as advance:
        for _ in range(len(done) * (1 + len(SPEEDUPS))):
            advance()
        for part in parts[len(done) :]:
            seeds = [seed * 1_000_003 + part.start + k for k in range(len(prompts[part]))]
            done.append(measure(pipe, list(prompts[part]), seeds, settings, preset, advance, adapter))
            coefficients(done[:1])  # where there are too few steps, there is no use in more runs
            write_json(kept, {**asked, "done": [asdict(figures) for figures in done]})
    measured = told(done, preset, adapter="" if adapter is None else fingerprint(adapter))
    measured.save(folder)
    kept.unlink()
    return measured


def _check_steps(pipe: Any, settings: dict[str, Any], batch: int) -> None:
    """Refuse runs that are too short to fit TeaCache's polynomial to, before the first one."""
    passes = 2 if guidance_scale(pipe, settings) > 1 else 1
    changes = max(run_steps(pipe, settings) - 1, 0) * passes * batch
    if _has_teacache(architecture_for(pipe.transformer)) and changes <= DEGREE:
        raise ValueError(
            f"a batch has {changes} changes from step to step, too few to fit TeaCache's polynomial to; take more "
            "--steps, or a larger --batch and --count"
        )


def _has_teacache(architecture: Architecture) -> bool:
    return suits(architecture, TeaCacheConfig(coefficients=(0.0,)))


def _kept(path: Path, asked: dict[str, Any]) -> list[Figures]:
    """Figures of an earlier run that was cut short, if it was asked for the same."""
    try:
        before = json.loads(path.read_text())
        done = [Figures.from_dict(values) for values in before.pop("done")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return done if before == json.loads(json.dumps(asked)) else []


def measure(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    preset: Preset,
    advance: Callable[[], None],
    adapter: PatchAdapter | None = None,
) -> Figures:
    """Plain runs of one batch, and runs with every speedup; ``advance`` is called after each."""
    plain = plain_runs(pipe, prompts, seeds, settings, SCALES)
    advance()
    profile = profile_of([(len(prompts), plain.errors)])
    likeness, expected = [], []
    for speedup in SPEEDUPS:
        if profile is not None:
            known = replace(preset, profile=profile)
            method = Method(patches=None, skip=SkipSchedule(speedup=speedup), adapter=adapter, preset=known)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a speedup that so few steps can't reach
                outcome = run(pipe, prompts, seeds, settings, method=method)
            likeness.append(decibels(outcome.pictures, plain.pictures))
            assert outcome.report is not None, "a method was applied"
            steps = outcome.report.steps
            errors = profile if adapter is None else profile.learnt(adapter.errors)
            expected.append(expected_error([s.sigma for s in steps], [s.scales[0] for s in steps], errors))
        advance()
    return Figures(len(prompts), plain.changes, plain.detail, likeness, expected, plain.errors)


@torch.no_grad()
def plain_runs(
    pipe: Any, prompts: list[str], seeds: list[int], settings: dict[str, Any], scales: Sequence[int]
) -> Plain:
    """Draw prompts, and look at what goes on."""
    architecture = architecture_for(pipe.transformer)
    watched = _signals(architecture) if _has_teacache(architecture) else nullcontext()
    with watched as signals, recorded(pipe) as calls, _stepped(pipe.scheduler) as latents:
        pictures = run(pipe, prompts, seeds, settings).pictures
    changes = None if signals is None else _changes(architecture, signals, calls, len(prompts))
    clean = architecture.read({**calls[-1][0], architecture.batched[0]: latents[-1]}).latents
    detail = {s: detail_variance(clean, s, architecture.patch_size).tolist() for s in scales}
    return Plain(
        pictures, changes, detail, measured_errors(architecture, calls, scales, guidance_scale(pipe, settings))
    )


@contextmanager
def _signals(architecture: Architecture) -> Iterator[list[Tensor]]:
    """What TeaCache watches, of each call inside the block."""
    block, signals = architecture.blocks()[0], []
    signature = inspect.signature(type(block).forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(module, *args, **kwargs).arguments
        signals.append(architecture.teacache_signal(module, given.__getitem__).detach())

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield signals
    finally:
        hook.remove()


def _changes(
    architecture: Architecture, signals: Sequence[Tensor], calls: Sequence[tuple[Inputs, Tensor]], count: int
) -> list[tuple[float, float]]:
    """`Plain.changes` of the calls of a run of ``count`` prompts."""
    levels = [float(architecture.sigma(inputs)[0]) for inputs, _ in calls]
    passes: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for k, (signal, (_, answer)) in enumerate(zip(signals, calls, strict=True)):
        passes[levels[:k].count(levels[k])].append((signal, answer))
    return [
        (relative_change(later[i], signal[i]), relative_change(new[i], answer[i]))
        for steps in passes.values()
        for i in range(count)
        for (signal, answer), (later, new) in pairwise(steps)
    ]


@contextmanager
def _stepped(scheduler: Any) -> Iterator[list[Tensor]]:
    """Latents after the last of the scheduler's steps inside the block, as the pipeline has them."""
    last: list[Tensor] = []
    step = scheduler.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        answer = step(*args, **kwargs)
        last[:] = [first(answer)]
        return answer

    scheduler.step = spy
    try:
        yield last
    finally:
        del scheduler.step


def told(done: Sequence[Figures], preset: Preset, *, adapter: str = "") -> Preset:
    """What the figures of all batches make of a preset.

    Args:
        adapter: See `QualityCurve`.
    """
    prompts = [figures.prompts for figures in done]
    detail = {
        scale: np.average([figures.detail[scale] for figures in done], axis=0, weights=prompts).tolist()
        for scale in done[0].detail
    }
    return replace(
        preset,
        detail_variance=detail,
        teacache=coefficients(done),
        profile=profile_of([(figures.prompts, figures.errors) for figures in done]),
        quality=curve(done, adapter),
        origin="",
    )


def coefficients(done: Sequence[Figures]) -> tuple[float, ...]:
    """Of TeaCache's polynomial; none where the model can't have it.

    Raises:
        ValueError: With too few steps.
    """
    changes = [figures.changes for figures in done if figures.changes is not None]
    return fit(list(chain.from_iterable(changes))) if changes else ()


def curve(done: Sequence[Figures], adapter: str = "") -> QualityCurve | None:
    """Likeness over expected errors of all batches; ``None`` where there are too few of different errors."""
    measured: dict[float, float] = {}
    for k in range(min(len(figures.expected) for figures in done)):
        error = statistics.geometric_mean(figures.expected[k] or 1e-12 for figures in done)
        measured[error] = statistics.median(chain.from_iterable(figures.likeness[k] for figures in done))
    errors = sorted(measured)
    if len(errors) < 2:
        return None
    return QualityCurve(errors=tuple(errors), psnr=tuple(measured[e] for e in errors), adapter=adapter)


def fit(pairs: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Coefficients of the polynomial that tells the second of each pair from the first, highest power first.

    Raises:
        ValueError: With too few pairs.
    """
    if len(pairs) <= DEGREE:
        raise ValueError(f"{len(pairs)} steps are too few to fit a polynomial to; take more steps or prompts")
    x, y = np.array(pairs).T
    return tuple(np.polyfit(x, y, DEGREE).tolist())
