"""Large patches for a speed that is asked for, without a threshold: which steps of a run take them.

The distribution of pictures drawn with velocities that are off by ``dv`` differs from the model's own by a
Kullback-Leibler divergence of at most ``int (1 - sigma) / sigma |dv|^2 dsigma`` (Girsanov's theorem for the sampler
with as much noise as makes the bound least; see Stochastic Interpolants, arXiv 2303.08797). So a coarse step harms by
its error and its length, and the more, the less noise is left to cover it. Errors of single steps are known before the
run, and steps add up: what is left is a knapsack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from ddit.config import PlannedSchedule
from ddit.schedule import Guard, StepContext, known_levels
from ddit.util.tell import warn

CoarseError = Callable[[int, float], float]
"""Error of a coarse step that stands alone, root mean square of the velocity: of a scale, at a noise level."""


def divergence(sigma: float, end: float, error: float) -> float:
    """What a step from one noise level to another adds to the bound above, per number of the latents."""
    middle = (sigma + end) / 2
    return (sigma - end) * (1 - middle) / middle * error**2


def planned_scales(harm: Mapping[int, Sequence[float]], costs: Mapping[int, float], budget: float) -> list[int]:
    """The scale of every step of a run, for the least harm within a budget: a knapsack, filled greedily.

    All steps begin at their cheapest. Again and again the change of one step that takes off most harm for its work is
    made, as long as the budget allows any.

    Args:
        harm: Scale -> that of each step; infinite where the scale may not be used.
        costs: Scale -> work of a step.
        budget: Work of the whole run. Where not even the cheapest steps keep to it, they are taken.
    """
    steps = range(len(harm[1]))
    chosen = [min((s for s in harm if harm[s][i] < float("inf")), key=costs.__getitem__) for i in steps]
    left = budget - sum(costs[scale] for scale in chosen)
    while True:
        best, gained = None, 0.0
        for i, now in enumerate(chosen):
            for scale in harm:
                extra, gain = costs[scale] - costs[now], harm[now][i] - harm[scale][i]
                if 0 < extra <= left + 1e-9 and gain / extra > gained:
                    best, gained = (i, scale), gain / extra
        if best is None:
            return chosen
        i, scale = best
        left -= costs[scale] - costs[chosen[i]]
        chosen[i] = scale


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
        ends = [*sigmas[1:], 0.0]
        harm = {s: [self._harm(s, *step) for step in zip(sigmas, ends, strict=True)] for s in self.scales}
        scales = planned_scales(harm, costs, len(sigmas) / self.schedule.speedup)
        got = len(sigmas) / sum(costs[s] for s in scales)
        if got < self.schedule.speedup - 1e-6:
            warn(
                f"large patches alone can't reach a speedup of {self.schedule.speedup:g}: with these noise levels the "
                f"most is {got:.2f}. Skip steps as well (skip=SkipSchedule(speedup=...)), or train an adapter for more "
                "noise levels"
            )
        return scales

    def _harm(self, scale: int, sigma: float, end: float) -> float:
        if scale == 1:
            return 0.0
        if sigma <= 0 or not (self.guard is None or self.guard(scale, sigma)):
            return float("inf")
        return divergence(sigma, end, self.error(scale, sigma))
