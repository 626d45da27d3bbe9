"""A plan over both mechanisms: in each step of a run full, large patches, or skipped, so that a speedup costs least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ddit.planned import SLACK, whole_units
from ddit.profile import ErrorProfile
from ddit.schedule import Guard, StepContext, known_levels
from ddit.skip.forecast import gap_errors
from ddit.util.tell import warn

SKIPPED = 0
"""In a plan, in place of a scale."""


@dataclass(frozen=True, eq=False)
class JointPlan:
    """Decides for patches and for skipping at once; plans that were made are kept.

    Args:
        scales: To choose from, 1 among them.
        profile: How much each way to take a step errs.
        guard: Where large patches may be used at all.
        speedup: Times less work than a plain run of as many steps, at the least error; or
        error: expected at most, at the least work (`expected_error`).
    """

    scales: tuple[int, ...]
    profile: ErrorProfile
    guard: Guard
    speedup: float | None = None
    error: float = 0.0
    _made: dict[tuple[tuple[float, ...], tuple[float, ...]], tuple[int, ...]] = field(default_factory=dict, init=False)
    """Noise levels and costs -> plan."""

    def steps(self, context: StepContext) -> tuple[int, ...]:
        """Scale of every step of the run, 0 where it is skipped."""
        key = (tuple(known_levels(context)), tuple(context.costs.get(s, 1.0) for s in self.scales))
        if key not in self._made:
            costs = dict(zip(self.scales, key[1], strict=True))
            segments = Segments.of(key[0], self.scales, self.profile, self.guard)
            if self.speedup is None:
                self._made[key] = cheapest_steps(segments, costs, self.error)
            else:
                self._made[key] = nearest_steps(segments, costs, self.speedup)
        return self._made[key]


class JointPatches:
    """Its half for `ddit.apply`'s patches; in a skipped step, the scale of the last called one."""

    needs_skipping = True

    def __init__(self, plan: JointPlan) -> None:
        self.plan = plan
        self.scales = plan.scales

    def choose(self, context: StepContext) -> list[int]:
        """See `ddit.schedule.Policy`."""
        steps = self.plan.steps(context)
        if context.step >= len(steps):  # of a run that goes on where its sampler's steps end
            return [1] * context.batch
        called = [scale for scale in steps[: context.step + 1] if scale != SKIPPED]
        return [called[-1]] * context.batch


class JointSkips:
    """Its half for skipping."""

    watches = False

    def __init__(self, plan: JointPlan) -> None:
        self.plan = plan

    def choose(self, context: StepContext, moved: Tensor | None, called: Sequence[bool]) -> list[bool]:
        """See `ddit.skip.policy.SkipPolicy`."""
        steps = self.plan.steps(context)
        return [context.step < len(steps) and steps[context.step] == SKIPPED] * context.batch


def nearest_steps(segments: Segments, costs: Mapping[int, float], speedup: float) -> tuple[int, ...]:
    """The plan whose errors are expected to be least among those that cost no more than a speedup allows.

    Args:
        costs: Scale -> work of a step in full steps.

    Returns:
        Scale of every step, 0 where it is skipped.
    """
    budget = segments.total / speedup
    plans = segments.plans(costs, budget + SLACK)
    for work in np.argsort(plans.errors, kind="stable")[: len(plans.reachable)]:
        if segments.work(steps := plans.steps(int(work)), costs) <= budget + 1e-9:
            return steps
    plans = segments.plans(costs, segments.total)
    steps = min((plans.steps(work) for work in plans.reachable[:FEW]), key=lambda steps: segments.work(steps, costs))
    warn(
        f"a speedup of {speedup:g} can't be reached with {segments.total} steps: the most is "
        f"{segments.total / segments.work(steps, costs):.2f}; take fewer steps instead"
    )
    return steps


FEW = 10
"""Plans of nearly as little work as can be."""


def cheapest_steps(segments: Segments, costs: Mapping[int, float], error: float) -> tuple[int, ...]:
    """The plan of least work among those whose expected squared error is at most this."""
    plans = segments.plans(costs, segments.total)
    enough = [work for work in plans.reachable if plans.errors[work] <= error][:FEW]
    return min((plans.steps(work) for work in enough), key=lambda steps: segments.work(steps, costs))


def expected_error(sigmas: Sequence[float], steps: Sequence[int], profile: ErrorProfile) -> float:
    """Expected squared error of the latents at the end of a run, mean over their numbers.

    Args:
        sigmas: Noise levels of all steps, falling.
        steps: Scale of every step, 0 where it is skipped.
    """
    scales = sorted({1, *steps} - {SKIPPED})
    return Segments.of(sigmas, scales, profile, lambda scale, sigma: True).error(steps)


@dataclass(frozen=True)
class Segments:
    """What a called step and the skipped ones after it err.

    Within a segment errors add up; those of different segments know nothing of each other, and their squares add up.
    """

    errors: dict[int, np.ndarray]
    """Scale -> squared error ``[N, N + 1]`` of a step (row) and those before the next called one (column; N is none);
    infinite where the scale may not be used."""

    @classmethod
    def of(cls, sigmas: Sequence[float], scales: Sequence[int], profile: ErrorProfile, guard: Guard) -> Segments:
        """Of a run with these noise levels (`ddit.skip.forecast.gap_errors`)."""
        bend, errors = [profile.bend_at(sigma) for sigma in sigmas], {}
        for scale in scales:
            errors[scale] = gap_errors(sigmas, bend, [profile.coarse_error(scale, sigma) for sigma in sigmas])
            if scale > 1:
                errors[scale][[not guard(scale, sigma) for sigma in sigmas]] = np.inf
        return cls(errors)

    @property
    def total(self) -> int:
        """Number of steps."""
        return len(self.errors[1])

    def plans(self, costs: Mapping[int, float], most: float) -> Plans:
        """The best plan for every amount of work up to ``most``, by dynamic programming over the called steps.

        Forecasts need two answers alike: after a change of patches a further call of the same kind comes first.
        """
        scales, total = tuple(self.errors), self.total
        grain, by_scale = whole_units({scale: costs[scale] for scale in scales}, total)
        units, bins = [by_scale[scale] for scale in scales], int(most * grain + 1e-9) + 1
        tables = np.stack([self.errors[s] for s in scales]).astype(np.float32)
        # Of a called step that is the first of its kind (0) or a further one (1), of a scale, at a place, after so much
        # work: least error before it, and the called step that led there.
        least = np.full((2, len(scales), total, bins), np.inf, np.float32)
        before = np.full((2, len(scales), total, bins), -1, np.int32)
        for k, unit in enumerate(units):
            least[0, k, 0, unit : unit + 1] = 0.0
        for i in range(1, total):
            ended = self._ended(least, tables, i)
            for k, unit in enumerate(units):
                for row, others in ((0, [j for j in range(len(scales)) if j != k]), (1, [k])):
                    if not others or unit >= bins:
                        continue
                    part = ended[others].reshape(-1, bins)[:, : bins - unit]
                    found = part.argmin(0)
                    least[row, k, i, unit:] = np.take_along_axis(part, found[None], 0)[0]
                    kinds, places = np.divmod(found, i + 1)
                    before[row, k, i, unit:] = _code(np.array(others)[kinds], places, i, total)
        ended = self._ended(least, tables, total)
        last = ended.reshape(-1, bins).argmin(0)
        kinds, places = np.divmod(last, total + 1)
        errors = np.take_along_axis(ended.reshape(-1, bins), last[None], 0)[0]
        return Plans(scales, total, units, errors, _code(kinds, places, total, total), before)

    def _ended(self, least: np.ndarray, tables: np.ndarray, end: int) -> np.ndarray:
        """Error of all that comes before a step, ``[scales, end + 1, work]``: by the last called one, if that was a
        further one of its kind, and in the end if it was the first, after which no step can be skipped."""
        further = least[1, :, :end] + tables[:, :end, end, None]
        first = least[0, :, end - 1] + tables[:, end - 1, end, None]
        return np.concatenate([further, first[:, None]], 1)

    def work(self, steps: Sequence[int], costs: Mapping[int, float]) -> float:
        """Of a plan, in full steps."""
        return sum(costs[scale] for scale in steps if scale != SKIPPED)

    def error(self, steps: Sequence[int]) -> float:
        """Expected squared error of a plan; infinite for one that forecasts from fewer than two answers alike."""
        called = [i for i, scale in enumerate(steps) if scale != SKIPPED]
        error, count, before = 0.0, 0, SKIPPED
        for i, after in zip(called, [*called[1:], self.total], strict=True):
            count, before = count + 1 if steps[i] == before else 1, steps[i]
            if after > i + 1 and count < 2:
                return float("inf")
            error += float(self.errors[steps[i]][i, after])
        return error


def _code(kinds: np.ndarray, places: np.ndarray, end: int, total: int) -> np.ndarray:
    """One number for a called step that led to the one at ``end``: if it is a further one, its scale, its place."""
    first = places == end
    return np.where(first, kinds * total + end - 1, (kinds + MANY) * total + places).astype(np.int32)


MANY = 16
"""More than there are scales."""


@dataclass(frozen=True)
class Plans:
    """The best plan for every amount of work in whole units."""

    scales: tuple[int, ...]
    total: int
    """Number of steps."""
    units: Sequence[int]
    """Work of a step at each scale."""
    errors: np.ndarray
    """Least squared error, by work; infinite where no plan takes just that."""
    last: np.ndarray
    before: np.ndarray
    """See `Segments.plans`."""

    @property
    def reachable(self) -> list[int]:
        """Amounts of work that a plan takes, rising."""
        return np.flatnonzero(np.isfinite(self.errors)).tolist()

    def steps(self, work: int) -> tuple[int, ...]:
        """Scale of every step of one of them, 0 where it is skipped."""
        steps, code = [SKIPPED] * self.total, int(self.last[work])
        while code >= 0:
            kind, i = divmod(code, self.total)
            row, k = divmod(kind, MANY)
            steps[i] = self.scales[k]
            code, work = int(self.before[row, k, i, work]), work - self.units[k]
        return tuple(steps)
