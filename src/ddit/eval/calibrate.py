"""Measure on a model's own plain runs what its preset holds."""

from __future__ import annotations

import inspect
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddit.config import ScheduleConfig
from ddit.dial import Dial
from ddit.eval.metrics import decibels
from ddit.generate import recorded, run
from ddit.models import architecture_for
from ddit.preset import Preset
from ddit.teacache import relative_change

DEGREE = 4
"""Of TeaCache's polynomial, as its authors fit it."""
THRESHOLDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
"""For which a `Dial` is measured."""


def teacache_changes(
    pipe: Any, prompts: Sequence[str], settings: dict[str, Any], *, seed: int = 0, advance: Callable[[], None]
) -> list[tuple[float, float]]:
    """How much TeaCache's signal changed from step to step, and how much the model's answer did.

    Args:
        prompts: A plain run for each.
        settings: Arguments of the pipeline's call.
        advance: Called after each run.
    """
    architecture = architecture_for(pipe.transformer)
    signals: list[Tensor] = []
    block = architecture.blocks()[0]
    signature = inspect.signature(type(block).forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(module, *args, **kwargs).arguments
        signals.append(architecture.teacache_signal(module, given.__getitem__).detach())

    pairs = []
    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for i, prompt in enumerate(prompts):
            signals.clear()
            with torch.no_grad(), recorded(pipe) as calls:
                run(pipe, [prompt], [seed * 1_000_003 + i], settings)
            levels = [float(architecture.sigma(inputs)[0]) for inputs, _ in calls]
            passes: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for k, (signal, (_, answer)) in enumerate(zip(signals, calls, strict=True)):
                passes[levels[:k].count(levels[k])].append((signal, answer))
            for steps in passes.values():
                for (signal, answer), (later, new) in pairwise(steps):
                    pairs.append((relative_change(later, signal), relative_change(new, answer)))
            advance()
    finally:
        hook.remove()
    return pairs


def fit(pairs: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Coefficients of the polynomial that tells the second of each pair from the first, highest power first.

    Raises:
        ValueError: With too few pairs.
    """
    if len(pairs) <= DEGREE:
        raise ValueError(f"{len(pairs)} steps are too few to fit a polynomial to; take more steps or prompts")
    x, y = np.array(pairs).T
    return tuple(np.polyfit(x, y, DEGREE).tolist())


def measure_dial(
    pipe: Any,
    prompts: Sequence[str],
    settings: dict[str, Any],
    preset: Preset,
    *,
    batch: int = 1,
    seed: int = 0,
    advance: Callable[[], None],
) -> Dial:
    """What each of `THRESHOLDS` makes of runs with the preset's schedule.

    Args:
        prompts: Each is run plain and with every threshold.
        advance: Called after each run.
    """
    groups = [list(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
    seeds = [[seed * 1_000_003 + i + k for k in range(len(group))] for i, group in enumerate(groups)]
    plain = []
    for group, own in zip(groups, seeds, strict=True):
        plain.append(run(pipe, group, own, settings).pictures)
        advance()
    likeness = []
    for threshold in THRESHOLDS:
        schedule = {**preset.schedule, "policy": "dynamic", "threshold": threshold, "speedup": 0.0, "quality": 0.0}
        config = ScheduleConfig.from_dict(schedule)
        likeness_of_each = []
        for group, own, reference in zip(groups, seeds, plain, strict=True):
            outcome = run(pipe, group, own, settings, config=config, preset=preset)
            likeness_of_each += decibels(outcome.pictures, reference)
            advance()
        likeness.append(statistics.median(likeness_of_each))
    return Dial(thresholds=THRESHOLDS, psnr=tuple(likeness))
