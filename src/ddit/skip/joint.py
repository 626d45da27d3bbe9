"""A plan over both mechanisms: in each step of a run full, large patches, or skipped, so that a speedup costs least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ddit.profile import ErrorProfile
from ddit.schedule import Guard, StepContext, known_levels
from ddit.skip.forecast import gap_errors
from ddit.util.tell import warn

SKIPPED = 0
"""In a plan, in place of a scale."""
CHEAPEST = 1e12
"""A price on work beside which no error counts."""
HALVINGS = 24
"""Of the search for the price of work."""


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

    planned = True
    """With skipped steps, without which it is no plan."""

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

    With a price on work the best plan follows by dynamic programming. The lowest price that keeps to the budget is
    taken, and what its plan leaves of the budget pays for single dearer steps.

    Args:
        costs: Scale -> work of a step in full steps.

    Returns:
        Scale of every step, 0 where it is skipped.
    """
    budget = segments.total / speedup
    least = segments.work(segments.best(costs, CHEAPEST), costs)
    if least > budget + 1e-9:
        warn(
            f"a speedup of {speedup:g} can't be reached with {segments.total} steps: the most is "
            f"{segments.total / least:.2f}; take fewer steps instead"
        )
    _, best = segments.turning(costs, lambda steps: segments.work(steps, costs) <= max(budget, least) + 1e-9)
    return segments.improved(best, costs, budget)


def cheapest_steps(segments: Segments, costs: Mapping[int, float], error: float) -> tuple[int, ...]:
    """The plan of least work among those whose expected squared error is at most this, by the highest price."""
    if segments.error(cheapest := segments.best(costs, CHEAPEST)) <= error:
        return cheapest
    best, _ = segments.turning(costs, lambda steps: segments.error(steps) > error)
    return best


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

    def best(self, costs: Mapping[int, float], price: float) -> tuple[int, ...]:
        """Least error plus ``price`` times work.

        Forecasts need two answers alike: after a change of patches a further call of the same kind comes first.
        """
        total, scales = self.total, tuple(self.errors)
        # Of a called step that is the first of its kind (0), or a further one (1): least before it, and what led there.
        least = np.full((2, len(scales), total), np.inf)
        before = np.full((2, len(scales), total, 3), -1)
        least[0, :, 0] = [price * costs[s] for s in scales]
        tables = np.stack([self.errors[s] for s in scales])
        for i in range(1, total):
            # Whatever comes before ends in a segment up to this step; a gap needs two of a kind.
            ended = least[:, :, :i] + tables[:, :i, i]
            ended[0, :, : i - 1] = np.inf
            for k, scale in enumerate(scales):
                for row, others in ((0, [j for j in range(len(scales)) if j != k]), (1, [k])):
                    if not others:
                        continue
                    part = ended[:, others]
                    place = np.unravel_index(int(part.argmin()), part.shape)
                    least[row, k, i] = part[place] + price * costs[scale]
                    before[row, k, i] = place[0], others[int(place[1])], place[2]
        ended = least + tables[:, :, total]
        ended[0, :, : total - 1] = np.inf
        place = np.unravel_index(int(ended.argmin()), ended.shape)
        steps = [SKIPPED] * total
        row, k, i = map(int, place)
        while i >= 0:
            steps[i] = scales[k]
            row, k, i = map(int, before[row, k, i])
        return tuple(steps)

    def turning(
        self, costs: Mapping[int, float], wanted: Callable[[tuple[int, ...]], bool]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Two best plans of nearly one price: of ``wanted``, which holds from some price on, the last without, and the
        first with it."""
        low, high = 0.0, 1.0
        without, holds = self.best(costs, low), self.best(costs, high)
        while not wanted(holds):
            low, high, without = high, 4 * high, holds
            holds = self.best(costs, high)
        for _ in range(HALVINGS):
            price = (low + high) / 2 if low else high / 4
            found = self.best(costs, price)
            if wanted(found):
                high, holds = price, found
            else:
                low, without = price, found
        return without, holds

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

    def improved(self, steps: tuple[int, ...], costs: Mapping[int, float], budget: float) -> tuple[int, ...]:
        """With what is left of the budget spent on the single dearer steps that gain most for their work."""
        while True:
            left, error = budget - self.work(steps, costs), self.error(steps)
            found, gained = None, 0.0
            for i, now in enumerate(steps):
                for scale, cost in costs.items():
                    extra = cost - costs.get(now, 0.0)
                    if not 0 < extra <= left + 1e-9:
                        continue
                    tried = (*steps[:i], scale, *steps[i + 1 :])
                    gain = (error - self.error(tried)) / extra
                    if gain > gained:
                        found, gained = tried, gain
            if found is None:
                return steps
            steps = found
