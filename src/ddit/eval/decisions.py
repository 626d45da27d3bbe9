"""Where the steps at scale 1 of a run could lie instead, for comparison with what `ddit.dial` and the rule decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ddit.config import ScheduleConfig
from ddit.generate import Run, recorded, run
from ddit.models import architecture_for
from ddit.patches import BEND, amplified, half_log_snr
from ddit.preset import Preset
from ddit.schedule import Moment

REACH = 25
"""Most steps between two neighbouring steps at scale 1 that the oracle considers."""


@dataclass(frozen=True)
class Listed:
    """A list of scales for each sample of the batch."""

    scales: Sequence[Sequence[int]]
    blind: ClassVar[bool] = True

    def choose(self, moment: Moment) -> list[int]:
        return [sample[moment.step] for sample in self.scales]


def even(total: int, warmup: int, fine: int) -> list[int]:
    """Steps at scale 1 at even distances after the warm-up, half a distance after the last."""
    distance = (total - warmup) / (fine + 0.5)
    return [warmup + round(k * distance) - 1 for k in range(1, fine + 1)]


def interval_errors(gram: NDArray[np.float64], sigmas: Sequence[float]) -> NDArray[np.float64]:
    """What forecasts between two steps at scale 1 add to the squared error of the end, as if the path were plain's.

    An error of the latents grows until the end (`ddit.patches.amplified`).

    Args:
        gram: Inner products of the plain run's velocities at its T steps, ``[T, T]``.
        sigmas: Their noise levels, falling.

    Returns:
        ``[T, T, T + 1]``: for the last two steps at scale 1 before (older, newer) and the next one after (T: none).
    """
    count = len(sigmas)
    bent = [np.exp(-BEND * half_log_snr(s)) for s in sigmas]  # in which forecasts are straight
    growth = [amplified(s) for s in [*sigmas, 0.0]]
    widths = -np.diff([*sigmas, 0.0])
    errors = np.full((count, count, count + 1), np.inf)
    for newer in range(1, count):
        for older in range(max(0, newer - REACH), newer):
            mistake = np.zeros(count)
            errors[older, newer, newer + 1] = 0.0
            for k in range(newer + 1, min(count, newer + REACH)):
                ahead = (bent[k] - bent[older]) / (bent[newer] - bent[older])
                mistake[[k, newer, older]] += widths[k] * np.array([1, -ahead, ahead - 1])
                errors[older, newer, k + 1] = growth[k + 1] ** 2 * (mistake @ gram @ mistake)
    return errors


def least(errors: NDArray[np.float64], warmup: int, fine: int) -> list[int]:
    """The places of ``fine`` steps at scale 1 after the warm-up with the least sum of `interval_errors`."""
    count = len(errors)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(warmup - 2, warmup - 1): (0.0, [])}
    for _ in range(fine):
        longer: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (older, newer), (sum_, places) in best.items():
            for place in range(newer + 1, min(count, newer + REACH)):
                found = sum_ + errors[older, newer, place]
                if found < longer.get((newer, place), (np.inf, []))[0]:
                    longer[newer, place] = (found, [*places, place])
        best = longer
    ends = [(sum_ + errors[older, newer, count], places) for (older, newer), (sum_, places) in best.items()]
    return min(ends)[1]


@torch.no_grad()
def plain_paths(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> tuple[list[float], NDArray[np.float64]]:
    """Noise levels of plain runs, falling, and inner products of the velocities at their T steps, ``[B, T, T]``."""
    architecture = architecture_for(pipe.transformer)
    with recorded(pipe) as calls:
        run(pipe, list(prompts), list(seeds), settings)
    sigmas = sorted({float(architecture.sigma(inputs)[0]) for inputs, _ in calls}, reverse=True)
    height, width = architecture.latents(calls[0][0]).shape[-2:]
    answers = [answer for _, answer in calls[:: len(calls) // len(sigmas)]]
    velocities = torch.stack([architecture.velocity(a, (height, width)).float().flatten(1) for a in answers], dim=1)
    return sigmas, (velocities @ velocities.mT).double().numpy()


def hindsight(gram: NDArray[np.float64], sigmas: Sequence[float], config: ScheduleConfig, fine: int) -> tuple[int, ...]:
    """Scales of a run whose steps at scale 1 lie where a plain one says that forecasts err least.

    Args:
        gram: As for `interval_errors`, of one run or the mean of several.
        fine: Steps at scale 1 after the warm-up.
    """
    places = {*range(config.warmup), *least(interval_errors(gram, sigmas), config.warmup, fine)}
    return tuple(1 if k in places else max(config.scales) for k in range(len(sigmas)))


def oracle(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    config: ScheduleConfig,
    preset: Preset,
    fine: int,
) -> Run:
    """A run in which each prompt has the schedule of its own plain run's `hindsight`.

    The plain run, which nobody has beforehand, is not counted.
    """
    sigmas, grams = plain_paths(pipe, prompts, seeds, settings)
    schedules = [hindsight(gram, sigmas, config, fine) for gram in grams]
    config = replace(config, policy="fixed", steps=schedules[0])
    return run(pipe, prompts, seeds, settings, config=config, preset=preset, policy=Listed(schedules))


def fitted(
    pipe: Any, prompts: Sequence[str], settings: dict[str, Any], config: ScheduleConfig, fine: int, *, batch: int = 8
) -> ScheduleConfig:
    """The one schedule that fits plain runs of some prompts best: a `hindsight` of their mean, for any prompt."""
    sigmas, grams = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        sigmas, some = plain_paths(pipe, part, range(start, start + len(part)), settings)
        grams.append(some)
    steps = hindsight(np.concatenate(grams).mean(0), sigmas, config, fine)
    return replace(config, policy="fixed", steps=steps)
