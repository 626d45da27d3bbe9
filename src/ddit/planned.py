"""Large patches for a speed that is asked for, without a threshold: which steps of a run take them.

The distribution of pictures drawn with velocities that are off by ``dv`` differs from the model's own by a
Kullback-Leibler divergence of at most ``int (1 - sigma) / sigma |dv|^2 dsigma`` (Girsanov's theorem for the sampler
with as much noise as makes the bound least; see Stochastic Interpolants, arXiv 2303.08797). So a coarse step harms by
its error and its length, and the more, the less noise is left to cover it. Errors of single steps are known before the
run, and steps add up: what is left is a knapsack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from ddit.config import PlannedSchedule
from ddit.schedule import Guard, StepContext, known_levels

CoarseError = Callable[[int, float], float]
"""Error of a coarse step that stands alone, root mean square of the velocity: of a scale, at a noise level."""


def divergence(sigma: float, end: float, error: float) -> float:
    """What a step from one noise level to another adds to the bound above, per number of the latents."""
    middle = (sigma + end) / 2
    return (sigma - end) * (1 - middle) / middle * error**2


def whole_units(costs: Mapping[int, float], total: int) -> tuple[int, dict[int, int]]:
    """Units of work in a full step, and of each scale to the nearest unit: what dynamic programs count in."""
    grain = max(UNITS // total, 20)
    return grain, {scale: max(round(cost * grain), 1) for scale, cost in costs.items() if scale}


UNITS = 4000
"""Of work in a plain run, about."""
SLACK = 0.5
"""Full steps by which whole units of a plan may lie above its budget, as long as its own costs do not."""


def planned_scales(harm: Mapping[int, Sequence[float]], costs: Mapping[int, float], budget: float) -> list[int]:
    """The scale of every step of a run, for the least harm within a budget.

    A knapsack, by dynamic programming over the steps and whole units of work.

    Args:
        harm: Scale -> that of each step; infinite where the scale may not be used.
        costs: Scale -> work of a step in full steps.
        budget: Work of the whole run. Where not even the cheapest steps keep to it, they are taken.
    """
    total, scales = len(harm[1]), list(harm)
    if total * costs[1] <= budget + 1e-9:
        return [1] * total
    grain, units = whole_units({scale: costs[scale] for scale in scales}, total)
    least = np.full(int((budget + SLACK) * grain) + 1, np.inf)
    least[0] = 0.0
    chosen = np.zeros((total, len(least)), np.int8)
    for i in range(total):
        options = np.full((len(scales), len(least)), np.inf)
        for k, scale in enumerate(scales):
            unit = units[scale]
            options[k, unit:] = least[: max(len(least) - unit, 0)] + harm[scale][i]
        chosen[i], least = options.argmin(0), options.min(0)
    for work in np.argsort(least, kind="stable"):
        if not np.isfinite(least[work]):
            break
        steps: list[int] = []
        for row in reversed(chosen):
            steps.append(scales[row[work]])
            work -= units[steps[-1]]
        if sum(costs[scale] for scale in steps) <= budget + 1e-9:
            return steps[::-1]
    allowed = ([s for s in scales if harm[s][i] < float("inf")] for i in range(total))
    return [min(some, key=costs.__getitem__) for some in allowed]


class Planned:
    """Follows a plan, which is made once for runs alike (`planned_scales`).

    Args:
        schedule: Its settings.
        error: What coarse steps are off by.
        guard: Where large patches may be used at all; a schedule that is not careful has none.
    """

    needs_costs = True

    def __init__(self, schedule: PlannedSchedule, error: CoarseError, guard: Guard) -> None:
        self.schedule = schedule
        self.scales = schedule.scales
        self.error = error
        self.guard = guard if schedule.careful else None
        self._made = lru_cache(maxsize=64)(self._make)

    def ahead(self, context: StepContext) -> list[int]:
        """Scale of this step and of all to come."""
        costs = tuple(context.costs[s] for s in self.scales)
        return list(self._made(tuple(known_levels(context)), costs)[context.step :])

    def choose(self, context: StepContext) -> list[int]:
        """See `ddit.schedule.Policy`."""
        ahead = self.ahead(context) or [1]  # of a run that goes on where its sampler's steps end
        return ahead[:1] * context.batch

    def _make(self, sigmas: Sequence[float], works: Sequence[float]) -> list[int]:
        """Scale of every step of a run with these noise levels and this work of a step at each scale."""
        costs = dict(zip(self.scales, works, strict=True))
        # Samplers with several calls at a level (Heun) share what lies between it and the next.
        levels = Counter(sigmas)
        ends = dict(zip(sorted(levels, reverse=True), [*sorted(levels, reverse=True)[1:], 0.0], strict=True))
        harm = {s: [self._harm(s, sigma, ends[sigma]) / levels[sigma] for sigma in sigmas] for s in self.scales}
        return planned_scales(harm, costs, len(sigmas) / self.schedule.speedup)

    def _harm(self, scale: int, sigma: float, end: float) -> float:
        if scale == 1:
            return 0.0
        if sigma <= 0 or not (self.guard is None or self.guard(scale, sigma)):
            return float("inf")
        return divergence(sigma, end, self.error(scale, sigma))
