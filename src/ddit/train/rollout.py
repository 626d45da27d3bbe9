"""The loss of a corrector: how far runs with corrected forecasts end up from the plain run.

The error of single forecasts is not it. A line through the model's own answers is off along the path, which the next
called step mends; a smaller error in any other direction stays, and is carried on by the next forecast. So runs are
drawn anew by the pipeline's own sampler, forecasts and called steps by turns, and gradients flow through the frozen
model. They are cut every few gaps (truncated backpropagation through time), errors are not: a small one that is
the same in every gap shows at the end of a run only. Errors count where gradients are cut, not before: runs that end
nearest to the plain one need not be the nearest after each gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit.models.base import Architecture, Inputs, first
from ddit.skip.corrector import ForecastCorrector
from ddit.skip.forecast import Reference
from ddit.skip.policy import SkipPlan
from ddit.train.config import TrainConfig
from ddit.train.distill import placed
from ddit.train.sampler import Sampler, cut, moved
from ddit.train.samples import Samples

STRETCH = 6
"""Gaps between called steps through which gradients flow together."""
COMPANY = 4
"""Samples of a global batch that share a course, so that they are called together."""


@dataclass(frozen=True)
class Course:
    """What chance decides for some runs of one optimiser step."""

    fine: tuple[int, ...]
    """Numbers of the called steps of a plan."""
    gaps: range
    """Indices into these of the gaps that runs go through, from the plain path on."""
    which: int = 0
    """Index into the sets of samples, which differ in their number of steps."""

    @property
    def marks(self) -> list[int]:
        """The gaps where stretches end, after which gradients are cut; counted from the last, which a user gets."""
        return [j for j in self.gaps if (self.gaps[-1] - j) % STRETCH == 0]


def ends(fine: Sequence[int], total: int) -> list[int]:
    """Where the gaps after each called step end: at the next, the last at the number of steps."""
    return [*fine[1:], total]


def learnable(fine: Sequence[int], total: int) -> list[int]:
    """Indices of the gaps that hold forecasts; the one after the first step has a single one to forecast from."""
    return [j for j, end in enumerate(ends(fine, total)) if j > 0 and end - fine[j] > 1]


def plan(speedup: float, sigmas: Sequence[float]) -> tuple[int, ...]:
    """Numbers of the called steps under a speedup."""
    return tuple(sorted(SkipPlan(min(speedup, len(sigmas) / 2)).plan(sigmas)))


def draw_course(config: TrainConfig, sets: Sequence[Sequence[float]], step: int, number: int) -> Course:
    """The same for the same seed, step and company within the step's global batch, on any number of processes.

    Args:
        sets: Noise levels of each set of samples. Each is drawn as often as it has steps.

    Raises:
        ValueError: Where a speedup leaves no step to forecasts.
    """
    rng = np.random.default_rng([config.seed, step, number // COMPANY])
    low, high = np.log(config.speedups)
    counts = np.array([len(sigmas) for sigmas in sets])
    which = int(rng.choice(len(sets), p=counts / counts.sum()))
    sigmas = sets[which]
    fine = plan(float(np.exp(rng.uniform(low, high))), sigmas)
    able = learnable(fine, len(sigmas))
    if not able:
        raise ValueError(
            f"speedups {config.speedups} leave no step of {len(sigmas)} to forecasts; give higher --speedups"
        )
    return Course(fine, range(able[0], able[-1] + 1), which)


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
    corrector: ForecastCorrector | None
    hidden: Tensor | None = None
    """What the model's last layer read in the last call."""

    @property
    def sigmas(self) -> list[float]:
        return [*self.runs.samples.sigmas, 0.0]

    def mixed(self, velocity: Tensor) -> Tensor:
        """Velocity of the path ``[B, C, ..., H, W]``, of all passes' ``[passes B, C, ..., H, W]``."""
        return self.runs.sampler.mixed(velocity.unflatten(0, (self.runs.samples.passes, -1)))

    def each(self, z: Tensor) -> Tensor:
        """The same latents for all passes."""
        return z.repeat(self.runs.samples.passes, *[1] * (z.ndim - 1))

    def reference(self, z: Tensor, velocity: Tensor, step: int, before: Reference | None) -> Reference:
        """The called step that the passes answered so."""
        sigma, end = (torch.full((len(velocity),), self.sigmas[k], device=z.device) for k in (step, step + 1))
        return Reference.after(self.each(z), sigma, velocity, before, end=end, hidden=self.hidden)

    def inputs(self, z: Tensor, step: int) -> Inputs:
        """Calls of all passes at a step."""
        wide = self.each(z).to(self.runs.dtype)
        return self.architecture.renoised(self.call, wide, torch.full((len(wide),), self.sigmas[step], device=z.device))

    def called(self, z: Tensor, step: int) -> Tensor:
        """What the model answers, all passes."""
        output = first(self.transformer.forward(**self.inputs(z, step)))
        self.hidden = None if self.corrector is None else self.corrector.take_hidden()
        return self.architecture.velocity(output, z.shape[2:]).float()

    def forecast(self, z: Tensor, step: int, reference: Reference) -> Tensor:
        """What a skipped step takes for the model's answers, all passes."""
        wide = self.each(z)
        sigma = torch.full((len(wide),), self.sigmas[step], device=z.device)
        velocity = reference.forecast(wide, sigma)
        return velocity if self.corrector is None else self.corrector.correct(velocity, sigma, reference)

    def moved(self, z: Tensor, velocity: Tensor) -> Tensor:
        """Latents at the next step."""
        return moved(self.scheduler, z, self.mixed(velocity))

    def cut(self) -> None:
        """What comes after has no gradients to what was before."""
        cut(self.scheduler)
        self.hidden = None if self.hidden is None else self.hidden.detach()

    def clean(self, z: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Clean latents that the model sees."""
        return z - self.sigmas[step] * self.mixed(velocity)


def errors(
    transformer: Any,
    architecture: Architecture,
    corrector: ForecastCorrector | None,
    runs: Runs,
    course: Course,
) -> Iterator[Tensor]:
    """Mean squared distance ``[B]`` of each run to the plain one, where each stretch of gaps ends.

    What is compared are the clean latents that the model sees there: what it does not see does no harm. Gradients flow
    through the stretch.

    Args:
        corrector: Attached to the transformer; ``None`` for forecasts without.
    """
    total = len(runs.samples.sigmas)
    fine, gaps = course.fine, course.gaps
    at_end, marks = ends(fine, total), course.marks
    # Of the plain path: what the sampler looks back on, called steps before the start, it, what to compare with.
    behind = fine[gaps[0]] if runs.sampler.looks_back else 0
    earlier = fine[max(0, gaps[0] - 2) : gaps[0]]
    there = [*earlier, fine[gaps[0]], *(at_end[j] for j in marks if at_end[j] < total)]
    latents, velocities, call = runs.at(architecture, [*range(behind), *there])
    plain = ((latents[:, i], velocities[:, :, i].flatten(0, 1)) for i in range(behind, behind + len(there)))
    past = runs.sampler.mixed(velocities[:, :, :behind])
    scheduler = runs.sampler.taken_up(latents[:, :behind], past, fine[gaps[0]])
    walk = Walk(transformer, architecture, runs, call, scheduler, corrector)
    reference = None
    for step in earlier:
        reference = walk.reference(*next(plain), step, reference)
    z, velocity = next(plain)
    if corrector is not None:  # which listens; without one the stored answer will do
        with torch.no_grad():
            velocity = walk.called(z, fine[gaps[0]])
    for j in gaps:
        step, end = fine[j], at_end[j]
        reference = walk.reference(z, velocity, step, reference)
        z = walk.moved(z, velocity)
        for k in range(step + 1, end):
            z = walk.moved(z, walk.forecast(z, k, reference))
        if end < total:
            velocity = walk.called(z, end)
        if j in marks:
            if end < total:
                distance = walk.clean(z, velocity, end) - walk.clean(*next(plain), end)
            else:
                distance = z - runs.clean()
            yield distance.square().flatten(1).mean(1)
            z, velocity, reference = z.detach(), velocity.detach(), reference.detach()
            walk.cut()


def weights(course: Course) -> list[float]:
    """Of each stretch's error in the loss of a run: where it ends counts as much as all stretches together."""
    count = len(course.marks)
    return [0.5 / count] * (count - 1) + [0.5 / count + 0.5]


def decibels(error: Tensor) -> Tensor:
    """Squared errors as a loss: all speeds, noise levels and pictures then count alike, as PSNR counts them."""
    return 10 * torch.log10(error + 1e-10)
