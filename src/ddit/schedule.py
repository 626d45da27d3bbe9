"""The scheduler of DDiT (arXiv 2602.16968, section 3.3): pure functions from recent latents to patch scales.

Letters: B samples, C channels, H and W latent height and width, N patches, p the model's own patch size in latent
pixels, s a scale (patch size ``s * p``). Latents are ``[B, C, H, W]``, ``[B, C, F, H, W]`` or, of audio, ``[B, C, T]``,
newest last in a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ddit.config import FixedSchedule, PatchSchedule
from ddit.patches import cut, pad_to_multiple


def difference(latents: Sequence[Tensor], order: int = 3) -> Tensor:
    """Finite difference of the latents over the last ``order + 1`` steps: differences of differences.

    Order 3 is the paper's ``d3 z = z_0 - 3 z_1 + 3 z_2 - z_3`` (z_0 the newest).

    Args:
        latents: At least ``order + 1`` tensors of one shape, newest last.

    Returns:
        Shape of one latent, float32.
    """
    if len(latents) <= order:
        raise ValueError(f"a difference of order {order} needs {order + 1} latents, there are {len(latents)}")
    rows = [z.float() for z in latents[-order - 1 :]]
    for _ in range(order):
        rows = [new - old for old, new in pairwise(rows)]
    return rows[0]


def channel_moments(values: Tensor) -> Tensor:
    """Mean and variance (population) over the channels: ``[B, C, ..., H, W]`` -> ``[2, B, ..., H, W]``."""
    mean = values.mean(1)
    return torch.stack([mean, (values - mean[:, None]).square().mean(1)])


def patch_deviation(moments: Tensor, patch: int) -> Tensor:
    """Standard deviation (population) inside each ``patch x patch`` square, over its pixels and channels.

    Law of total variance: the mean of the pixels' variances plus the variance of their means, so that one pass over
    the channels serves every scale. Grids that the patch does not divide are continued by their last row and column;
    patches of a video lie inside one frame.

    Args:
        moments: Of `channel_moments`.

    Returns:
        ``[B, N]``.
    """
    mean, variance = cut(pad_to_multiple(moments, patch), patch).flatten(2, -2)
    return (variance.mean(-1) + mean.var(-1, correction=0)).sqrt()


def statistic(moments: Tensor, patch: int, percentile: float) -> Tensor:
    """``sigma_s^(rho)`` of the paper: the ``percentile``-quantile over patches of their deviation, ``[B]``."""
    ordered = patch_deviation(moments, patch).sort(-1).values
    place = percentile * (ordered.shape[-1] - 1)
    # As torch.quantile, which costs a small model's step half a percent.
    value = torch.lerp(ordered[:, math.floor(place)], ordered[:, math.ceil(place)], place % 1)
    return value.add(ordered[:, -1], alpha=0)  # NaN is sorted last, and any shall be seen


def statistics(values: Tensor, patch_size: int, scales: Sequence[int], percentile: float) -> list[dict[int, float]]:
    """Per sample, the statistic of every scale above 1, read by the host at once.

    Args:
        values: Differences of latents.

    Where the latents hold NaN so does a statistic, which lies below no threshold.
    """
    coarse = [s for s in scales if s > 1]
    if not coarse:
        return [{} for _ in values]
    moments = channel_moments(values)
    table = torch.stack([statistic(moments, s * patch_size, percentile) for s in coarse])
    rows = table.T.tolist()
    return [dict(zip(coarse, row, strict=True)) for row in rows]


def choose_scale(stats: Mapping[int, float], threshold: float) -> int:
    """The largest scale whose statistic lies below ``threshold``, else 1 (the paper's rule)."""
    return max((s for s, value in stats.items() if value < threshold), default=1)


def held_scale(before: Sequence[int], allowed: Sequence[int]) -> int | None:
    """The scale to keep while the steps in the difference are of several: their answers differ, so a switch bends the
    path by itself, which says nothing of the latents. ``None`` where they are of one, and the rule decides.

    Args:
        before: Scales of the last steps of a sample, as many as have part in the difference: those it spans, and those
            before that a multistep sampler remembers.
        allowed: Scales above 1 that may be used now.
    """
    if len(set(before)) < 2:
        return None
    return max((s for s in allowed if s <= before[-1]), default=1)


def detail_error(sigma: float, variance: float, scale: int, axes: int = 2) -> float:
    """What a coarse step without training is off by at the most where nobody has measured it, root mean square.

    It knows the detail from its variance alone (a Wiener estimate, `ddit.coarse.detail_velocity`), and a model can't
    know more than all of it.

    Args:
        variance: ``h``, mean variance of the detail in clean latents (`ddit.patches.detail_variance`).
        axes: That a patch spans (`ddit.patches.spanned`).
    """
    noise = 1 - 1 / scale**axes
    return math.sqrt(variance * noise / ((1 - sigma) ** 2 * variance + sigma**2 * noise)) if variance else 0.0


def below_noise(sigma: float, variance: float, scale: int, axes: int = 2) -> bool:
    """Whether what large patches drop lies well below the noise, so that a coarse step without training loses little.

    Pooling by ``s`` along two axes drops a share ``1 - 1/s^2`` of the noise's variance, and the detail. In each dropped
    coefficient there is ``(1 - sigma)^2 h / (1 - 1/s^2)`` of signal for ``sigma^2`` of noise (the criterion of
    progressive resolution, SPEED, arXiv 2605.18736, with its default margin).

    Args:
        sigma: Noise level.
        variance: ``h``, mean variance of the detail in clean latents (`ddit.patches.detail_variance`).
        axes: That a patch spans (`ddit.patches.spanned`).
    """
    signal = (1 - sigma) ** 2 * variance / (1 - 1 / scale**axes)
    return signal < MARGIN * sigma**2


MARGIN = 0.01
"""Signal for noise in what a careful coarse step drops; SPEED's delta."""
USUAL_DETAIL = {2: {2: 0.1, 4: 0.25}}
"""Axes that a patch spans -> scale -> `below_noise`'s variance where nobody has measured it (`ddit calibrate` does):
above what the embedded model has, for latents of unit variance. Where there is none, all of that counts as detail."""


Guard = Callable[[int, float], bool]
"""Whether a scale may be used at a noise level, whatever the latents say."""


def noise_guard(detail: Mapping[int, float], axes: int = 2) -> Guard:
    """`below_noise` with measured variances of the detail, scale -> variance; usual ones where there is none."""
    return lambda scale, sigma: below_noise(sigma, usual_detail(scale, detail, axes), scale, axes)


def usual_detail(scale: int, measured: Mapping[int, float], axes: int = 2) -> float:
    """Variance of the detail: as measured, scale -> variance, else a usual one."""
    return {**USUAL_DETAIL.get(axes, {}), **measured}.get(scale, 1.0)


@dataclass(frozen=True)
class StepContext:
    """What a policy knows when it decides on a step."""

    step: int
    """Number of the step, from 0."""
    total: int | None
    """Number of steps of this run, ``None`` where nobody knows."""
    statistics: list[dict[int, float]]
    """Per sample, scale -> statistic; empty dictionaries while there are too few latents."""
    sigma: float = 1.0
    """Noise level of the latents."""
    sigmas: Sequence[float] = ()
    """Noise levels of all steps of the run; empty where nobody knows."""
    spent: Sequence[float] = ()
    """Per sample, work of the run so far in full steps; empty where nobody counts."""
    costs: Mapping[int, float] = field(default_factory=dict)
    """Scale -> work of a step in full steps; empty where nobody counts."""
    chosen: Sequence[Sequence[int]] = ()
    """Scale of each sample that was chosen for each step before."""
    end: float = 0.0
    """Noise level where the step ends."""
    remembers: int = 1
    """Number of steps whose answers the sampler makes a move of."""
    ahead: Sequence[Sequence[float]] = ()
    """Per sample, work of this step and of those to come if none is skipped, in full steps; empty as ``spent``."""

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.statistics)


def known_levels(context: StepContext) -> Sequence[float]:
    """Noise levels of the whole run, which a plan needs.

    Raises:
        ValueError: Where nobody knows them.
    """
    if not context.sigmas:
        raise ValueError(
            "a speedup needs the noise levels of the run, which only a pipeline knows; "
            "apply ddit to the pipeline, or choose steps by a threshold"
        )
    return context.sigmas


class Policy(Protocol):
    """Chooses the scale of each sample in one step. Passed to `ddit.apply` as ``patches=``.

    It may say more of itself; what it does not say is taken for no:

    - ``needs_statistics``: it looks at them. Else they are neither measured nor reported, which saves time, memory, and
      a read that waits for the device.
    - ``needs_costs``: it looks at ``spent`` and ``costs``.
    - ``needs_skipping``: without skipped steps it is no plan, so that samplers that add noise get full steps.
    - ``ahead(context)``: the scales of this step and all to come, which it knows.
    """

    scales: tuple[int, ...]
    """The scales it may choose, 1 among them."""

    def choose(self, context: StepContext) -> list[int]:
        """Scale of each sample."""
        ...


FEW = 8
"""Steps of a run so short that there is little to gain."""


class Rule:
    """The paper's rule, after a warm-up.

    Args:
        schedule: Its settings.
        guard: Where it may use large patches at all; a schedule that is not careful has none.
    """

    needs_statistics = True

    def __init__(self, schedule: PatchSchedule, guard: Guard | None = None) -> None:
        self.schedule = schedule
        self.scales = schedule.scales
        self.guard = guard if schedule.careful else None

    def choose(self, context: StepContext) -> list[int]:
        if context.step < self.schedule.warmup:
            return [1] * context.batch
        allowed = [s for s in self.scales if s > 1 and self._allowed(s, context.sigma)]
        spanned = self.schedule.order + context.remembers - 1
        recent = context.chosen[-spanned:] if self.schedule.settle else ()
        return [
            held_scale([row[i] for row in recent], allowed)
            or choose_scale({s: v for s, v in sample.items() if s in allowed}, self.schedule.threshold)
            for i, sample in enumerate(context.statistics)
        ]

    def _allowed(self, scale: int, sigma: float) -> bool:
        return self.guard is None or self.guard(scale, sigma)

    def remark(
        self,
        chosen: Sequence[Sequence[int]],
        stats: Sequence[Sequence[Mapping[int, float]]],
        sigmas: Sequence[float],
    ) -> str | None:
        """What to do about a run in which the rule never used large patches, or did in all steps; else ``None``.

        Args:
            chosen: Scale of each sample, for every step; 0 where it was skipped.
            stats: The same for the statistics, scale -> statistic.
            sigmas: Noise level of every step.
        """
        schedule, decided = self.schedule, chosen[self.schedule.warmup :]
        if schedule.threshold == 0 or max(schedule.scales) == 1:
            return None
        if not decided:
            shorter = f", or a shorter warm-up ({schedule.order} at least)" if schedule.warmup > schedule.order else ""
            return (
                f"no step could use large patches: all {len(chosen)} belong to the warm-up of {schedule.warmup}. "
                f"Take more steps{shorter}; a model distilled to so few has nothing to gain"
            )
        used = {scale for step in decided for scale in step} - {0}
        if used == {1} and len(chosen) <= FEW:
            return (
                f"no step used large patches: {len(chosen)} steps leave {len(decided)} to decide upon. "
                "A model distilled to so few has little to gain; others gain from 20 steps on"
            )
        allowed = [[s for s in self.scales if s > 1 and self._allowed(s, sigma)] for sigma in sigmas]
        steps = list(zip(stats, allowed, strict=True))[schedule.warmup :]
        seen = [min(sample[s] for s in may) for step, may in steps for sample in step if sample and may]
        if used == {1} and not any(allowed[schedule.warmup :]):
            return (
                "no step used large patches: none is safe at the noise levels after the warm-up. "
                "Train an adapter for them (its min_sigma tells which it serves), or set careful=False"
            )
        if used == {1} and seen:
            return (
                f"no step used large patches: the statistic was {min(seen):.2g} at the least, threshold is "
                f"{schedule.threshold:g}. Raise the threshold, or ask for a speed (PlannedSchedule, --patch-speedup)"
            )
        if used and 1 not in used and seen:
            return (
                f"every step after the warm-up used large patches: the statistic was {max(seen):.2g} at the most, "
                f"threshold is {schedule.threshold:g}, and detail may be lost. Lower the threshold"
            )
        return None


class Fixed:
    """A list of scales; the last one holds for further steps."""

    def __init__(self, schedule: FixedSchedule) -> None:
        self.steps = schedule.steps
        self.scales = schedule.scales

    def ahead(self, context: StepContext) -> list[int]:
        """Scale of this step and of all to come, as far as anybody knows how many."""
        steps = range(context.step, max(context.total or 0, context.step + 1))
        return [self.steps[min(step, len(self.steps) - 1)] for step in steps]

    def choose(self, context: StepContext) -> list[int]:
        return self.ahead(context)[:1] * context.batch
