"""The loss of an adapter that mends forecasts: how far runs with them end up from the plain run.

The error of single forecasts is not it. A line through the model's own answers is off along the path, which the next
step at scale 1 mends; a smaller error in any other direction stays, and is carried on by the next forecast. So runs are
drawn anew by the pipeline's own sampler, forecasts and steps at scale 1 by turns, and gradients flow through the frozen
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.anchor import Anchor
from ddit.config import ScheduleConfig
from ddit.dial import Budget
from ddit.models.base import Architecture, Inputs, first
from ddit.train.config import TrainConfig
from ddit.train.distill import placed
from ddit.train.sampler import Sampler, moved
from ddit.train.samples import Samples

LEARNT = 2
"""Gaps between steps at scale 1 through which gradients flow."""
BEFORE = 2
"""Gaps before these, from the plain path on, that a run goes through to be off it as in use."""
COMPANY = 4
"""Samples of a global batch that share a course, so that they are called together."""
TO_THE_END = 0.3
"""Share of the courses that end where the picture is done."""


@dataclass(frozen=True)
class Course:
    """What chance decides for some runs of one optimiser step."""

    scale: int
    fine: tuple[int, ...]
    """Numbers of the steps at scale 1 of a plan."""
    last: int
    """Index into these of the gap that ends the runs."""
    which: int = 0
    """Index into the sets of samples, which differ in their number of steps."""
    alone: bool = False
    """Whether that gap is all, from the plain path on, and judged by its latents: the model is asked at its start only.
    """

    @property
    def counted(self) -> range:
        """Gaps that gradients flow through, and where errors are taken."""
        return range(max(0, self.last + 1 - (1 if self.alone else LEARNT)), self.last + 1)

    def ends(self, total: int) -> list[int]:
        """Where the gaps after each step at scale 1 end: at the next, the last at the number of steps."""
        return [*self.fine[1:], total]


def plan(speedup: float, scale: int, sigmas: Sequence[float]) -> tuple[int, ...]:
    """Numbers of the steps at scale 1 under a speedup, where forecasts cost nothing."""
    budget = Budget(ScheduleConfig(speedup=min(speedup, len(sigmas) / 2), scales=(1, scale)))
    return tuple(i for i, s in enumerate(budget.plan(sigmas, {1: 1.0, scale: 0.0})) if s == 1)


def draw_course(config: TrainConfig, sets: Sequence[Sequence[float]], step: int, number: int) -> Course:
    """The same for the same seed, step and company within the step's global batch, on any number of processes.

    Args:
        sets: Noise levels of each set of samples. Each is drawn as often as it has steps.

    Raises:
        ValueError: Where a speedup leaves no step to forecasts.
    """
    rng = np.random.default_rng([config.seed, step, number // COMPANY])
    low, high = np.log(config.speedups)
    scale = int(rng.choice(config.scales))
    counts = np.array([len(sigmas) for sigmas in sets])
    which = int(rng.choice(len(sets), p=counts / counts.sum()))
    sigmas = sets[which]
    fine = plan(float(np.exp(rng.uniform(low, high))), scale, sigmas)
    alone = step < (config.single_gaps or 0)
    courses = [Course(scale, fine, last, which, alone) for last in range(1, len(fine))]
    # The gap after the first step has a single one to forecast from, and nothing is learnt there.
    able = [c for c in courses if any(c.ends(len(sigmas))[j] - fine[j] > 1 for j in c.counted if j > 0)]
    if not able:
        raise ValueError(
            f"speedups {config.speedups} leave no step of {len(sigmas)} to forecasts; give higher --speedups"
        )
    return able[-1] if rng.random() < TO_THE_END else able[int(rng.choice(len(able)))]


def draw_run(config: TrainConfig, count: int, step: int, number: int) -> int:
    """The run of one sample of the global batch, among the first ``count``."""
    return int(np.random.default_rng([config.seed, step, number, 1]).integers(count))


@dataclass
class Runs:
    """Plain runs to start from and to compare with."""

    sampler: Sampler
    numbers: list[int]
    device: torch.device
    dtype: torch.dtype

    @property
    def samples(self) -> Samples:
        return self.sampler.samples

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


@dataclass
class Walk:
    """Some runs drawn anew from stored ones."""

    transformer: Any
    architecture: Architecture
    runs: Runs
    call: Inputs
    """Of all guidance passes, one after another."""
    scheduler: Any
    """At the step where these start."""
    adapter: PatchAdapter | None
    hidden: Tensor | None = None
    """What the adapter heard of the model's last call."""

    @property
    def sigmas(self) -> list[float]:
        return [*self.runs.samples.sigmas, 0.0]

    def mixed(self, velocity: Tensor) -> Tensor:
        """Velocity of the path ``[B, C, ..., H, W]``, of all passes' ``[passes B, C, ..., H, W]``."""
        return self.runs.sampler.mixed(velocity.unflatten(0, (self.runs.samples.passes, -1)))

    def each(self, z: Tensor) -> Tensor:
        """The same latents for all passes."""
        return z.repeat(self.runs.samples.passes, *[1] * (z.ndim - 1))

    def anchor(self, z: Tensor, velocity: Tensor, step: int, before: Anchor | None) -> Anchor:
        """The step at scale 1 that the passes answered so."""
        sigma, end = (torch.full((len(velocity),), self.sigmas[k], device=z.device) for k in (step, step + 1))
        return Anchor.after(self.each(z), sigma, velocity, before, end=end, hidden=self.hidden)

    def inputs(self, z: Tensor, step: int) -> Inputs:
        """Calls of all passes at a step."""
        wide = self.each(z).to(self.runs.dtype)
        return self.architecture.renoised(self.call, wide, torch.full((len(wide),), self.sigmas[step], device=z.device))

    def asked(self, z: Tensor, step: int) -> Tensor:
        """What the model answers at scale 1, all passes."""
        height, width = z.shape[-2:]
        output = first(self.transformer.forward(**self.inputs(z, step)))
        self.hidden = None if self.adapter is None else self.adapter.heard()
        return self.architecture.velocity(output, (height, width)).float()

    def moved(self, z: Tensor, velocity: Tensor) -> Tensor:
        """Latents at the next step."""
        return moved(self.scheduler, z, self.mixed(velocity))

    def clean(self, z: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Clean latents that the model sees."""
        return z - self.sigmas[step] * self.mixed(velocity)


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
        adapter: Attached to the transformer; ``None`` for forecasts without.
        before: Gaps to go through before those that count; ``None`` starts with the run itself.
    """
    total = len(runs.samples.sigmas)
    fine, ends = course.fine, course.ends(total)
    counted = course.counted
    begin = 0 if before is None else max(0, counted[0] - (0 if course.alone else before))
    # Of the plain path: what the sampler looks back on, steps at scale 1 before the start, it, what to compare with.
    behind = fine[begin] if runs.sampler.looks_back else 0
    earlier = fine[max(0, begin - 2) : begin]
    there = [*earlier, fine[begin], *(ends[j] for j in counted if ends[j] < total)]
    latents, velocities, call = runs.at(architecture, [*range(behind), *there])
    plain = [(latents[:, i], velocities[:, :, i].flatten(0, 1)) for i in range(behind, behind + len(there))]
    past = runs.sampler.mixed(velocities[:, :, :behind])
    scheduler = runs.sampler.taken_up(latents[:, :behind], past, fine[begin])
    walk = Walk(transformer, architecture, runs, call, scheduler, adapter)
    anchor = None
    for (z, velocity), step in zip(plain, earlier, strict=False):
        anchor = walk.anchor(z, velocity, step, anchor)
    (z, velocity), *ahead = plain[len(earlier) :]
    if adapter is not None:  # which listens; without one the stored answer will do
        with torch.no_grad():
            velocity = walk.asked(z, fine[begin])
    distances: list[Tensor] = []
    forecasts = 0
    for j in range(begin, course.last + 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and j in counted):
            step, end = fine[j], ends[j]
            anchor = walk.anchor(z, velocity, step, anchor)
            z = walk.moved(z, velocity)
            for k in range(step + 1, end):
                forecasts += 1
                velocity = architecture.coarse_step(
                    transformer.forward, walk.inputs(z, k), course.scale, form, anchor=anchor, adapter=adapter
                )
                z = walk.moved(z, velocity)
            if end == total:
                distances.append(z - runs.clean())
                continue
            met = ahead[counted.index(j)] if j in counted else None
            if course.alone:
                assert met is not None, "the one gap counts"
                distances.append(z - met[0])
                continue
            velocity = walk.asked(z, end)
            if met is not None and forecasts:
                distances.append(walk.clean(z, velocity, end) - walk.clean(*met, end))
    return torch.stack(distances, 1).square().flatten(2).mean(2)


def decibels(error: Tensor) -> Tensor:
    """Squared errors as a loss: all speeds, noise levels and pictures then count alike, as PSNR counts them."""
    return 10 * torch.log10(error + 1e-10)
