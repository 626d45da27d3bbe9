"""The loss of an adapter that mends forecasts: how far runs with them end up from the plain run.

The error of single forecasts is not it. A line through the model's own answers is off along the path, which the next
step at scale 1 mends; a smaller error in any other direction stays, and is carried on by the next forecast. So runs are
drawn anew, forecasts and steps at scale 1 by turns, and gradients flow through the frozen model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.config import ScheduleConfig
from ddit.dial import Budget
from ddit.models.base import Anchor, Architecture, Inputs, first
from ddit.train.config import TrainConfig
from ddit.train.distill import placed
from ddit.train.samples import Samples

LEARNT = 2
"""Gaps between steps at scale 1 through which gradients flow."""
BEFORE = 2
"""Gaps before these, from the plain path on, that a run goes through to be off it as in use."""
TO_THE_END = 0.3
"""Share of the courses that end where the picture is done."""


@dataclass(frozen=True)
class Course:
    """What chance decides for all runs of one optimiser step."""

    scale: int
    fine: tuple[int, ...]
    """Numbers of the steps at scale 1 of a plan."""
    last: int
    """Index into these of the gap that ends the runs."""

    def ends(self, total: int) -> list[int]:
        """Where the gaps after each step at scale 1 end: at the next, the last at the number of steps."""
        return [*self.fine[1:], total]


def plan(speedup: float, scale: int, sigmas: Sequence[float]) -> tuple[int, ...]:
    """Numbers of the steps at scale 1 under a speedup, where forecasts cost nothing."""
    budget = Budget(ScheduleConfig(speedup=min(speedup, len(sigmas) / 2), scales=(1, scale)))
    return tuple(i for i, s in enumerate(budget.plan(sigmas, {1: 1.0, scale: 0.0})) if s == 1)


def draw_course(config: TrainConfig, sigmas: Sequence[float], step: int) -> Course:
    """The same for the same seed and step, on any number of processes.

    Raises:
        ValueError: Where a speedup leaves no step to forecasts.
    """
    rng = np.random.default_rng([config.seed, step])
    low, high = np.log(config.speedups)
    scale = int(rng.choice(config.scales))
    fine = plan(float(np.exp(rng.uniform(low, high))), scale, sigmas)
    course = Course(scale, fine, len(fine) - 1)
    gaps = np.subtract(course.ends(len(sigmas)), fine) > 1
    able = [j for j in range(1, len(fine)) if gaps[max(1, j + 1 - LEARNT) : j + 1].any()]
    if not able:
        raise ValueError(
            f"speedups {config.speedups} leave no step of {len(sigmas)} to forecasts; give higher --speedups"
        )
    last = able[-1] if rng.random() < TO_THE_END else int(rng.choice(able))
    return Course(scale, fine, last)


def draw_runs(config: TrainConfig, count: int, step: int, numbers: Sequence[int]) -> list[int]:
    """Runs of the global batch's samples ``numbers``, among the first ``count``."""
    return [int(np.random.default_rng([config.seed, step, n]).integers(count)) for n in numbers]


@dataclass
class Runs:
    """Plain runs to start from and to compare with."""

    samples: Samples
    numbers: list[int]
    device: torch.device
    dtype: torch.dtype

    def at(self, architecture: Architecture, steps: Sequence[int]) -> tuple[Tensor, Tensor, Inputs]:
        """Latents ``[B, steps, C, ..., H, W]``, velocities ``[passes, B, steps, ...]`` and calls of all passes."""
        passes, n = self.samples.passes, len(self.numbers)
        records = [i * passes + which for which in range(passes) for i in self.numbers]
        latents, velocities, call = self.samples.load(records, [steps] * len(records))
        call = {k: placed(v, self.device, self.dtype if k in architecture.batched else None) for k, v in call.items()}
        velocities = velocities.to(self.device).float()
        return latents[:n].to(self.device).float(), velocities.unflatten(0, (passes, n)), call

    def clean(self) -> Tensor:
        """Where they ended, ``[B, C, ..., H, W]``."""
        parts = [self.samples.clean(i * self.samples.passes) for i in self.numbers]
        return torch.cat(parts).to(self.device).float()


def errors(
    transformer: Any,
    architecture: Architecture,
    form: ScheduleConfig,
    adapter: PatchAdapter | None,
    runs: Runs,
    course: Course,
    *,
    before: int | None = BEFORE,
) -> Tensor:
    """Mean squared distance of each run to the plain one where the last gaps end, ``[B, gaps]``, after some forecast.

    What is compared are the clean latents that the model sees there: what it does not see does no harm.

    Args:
        before: Gaps to go through before those that count; ``None`` starts with the run itself.
    """
    samples, sigmas = runs.samples, runs.samples.sigmas
    total, guidance = len(sigmas), samples.guidance.to(runs.device)
    fine, ends = course.fine, course.ends(total)
    counted = range(max(0, course.last + 1 - LEARNT), course.last + 1)
    begin = 0 if before is None else max(0, counted[0] - before)
    # The anchor before the first step that is run anew lies on the plain path.
    stored = [fine[max(0, begin - 1)], fine[begin], *(ends[j] for j in counted if ends[j] < total)]
    latents, velocities, call = runs.at(architecture, stored)
    passes, n = velocities.shape[:2]

    def level(step: int) -> Tensor:
        return torch.full((passes * n,), sigmas[step], device=runs.device)

    def mixed(velocity: Tensor) -> Tensor:
        return torch.einsum("p,p...->...", guidance, velocity.unflatten(0, (passes, n)))

    def each(z: Tensor) -> Tensor:
        return z.repeat(passes, *[1] * (z.ndim - 1))

    def call_at(z: Tensor, step: int) -> Inputs:
        return architecture.renoised(call, each(z).to(runs.dtype), level(step))

    def asked(z: Tensor, step: int) -> Tensor:
        height, width = z.shape[-2:]
        return architecture.velocity(first(transformer.forward(**call_at(z, step))), (height, width)).float()

    def seen(z: Tensor, velocity: Tensor, step: int) -> Tensor:
        return z - sigmas[step] * mixed(velocity)

    def stored_at(column: int) -> tuple[Tensor, Tensor]:
        return latents[:, column], velocities[:, :, column].flatten(0, 1)

    anchor: Anchor | None = None
    if begin > 0:
        z, velocity = stored_at(0)
        anchor = Anchor.after(each(z), level(stored[0]), velocity)
    z, velocity = stored_at(1)
    distances: list[Tensor] = []
    forecasts = 0
    columns = iter(range(2, len(stored)))
    for j in range(begin, course.last + 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and j in counted):
            step, end = fine[j], ends[j]
            anchor = Anchor.after(each(z), level(step), velocity, anchor)
            for k in range(step, end):
                if k > step:
                    forecasts += 1
                    inputs = call_at(z, k)
                    velocity = architecture.coarse_step(
                        transformer.forward, inputs, course.scale, form, anchor=anchor, adapter=adapter
                    )
                z = z + ([*sigmas, 0.0][k + 1] - sigmas[k]) * mixed(velocity)
            if end < total:
                velocity = asked(z, end)
            if j in counted and end < total:
                there = seen(*stored_at(next(columns)), end)
                if forecasts:
                    distances.append((seen(z, velocity, end) - there).square().flatten(1).mean(1))
    if ends[course.last] == total:
        distances.append((z - runs.clean()).square().flatten(1).mean(1))
    return torch.stack(distances, 1)


def decibels(error: Tensor) -> Tensor:
    """Squared errors as a loss: all speeds, noise levels and pictures then count alike, as PSNR counts them."""
    return 10 * torch.log10(error + 1e-10)
