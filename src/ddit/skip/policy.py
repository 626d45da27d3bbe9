"""When the model is not called: by a rule that watches the run, or by a plan for a speedup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from ddit.patches import where_rows
from ddit.schedule import StepContext, known_levels, statistics
from ddit.skip.forecast import SPLIT, amplified, difference_per_sigma, gap_errors, growth, half_log_snr
from ddit.util.tell import warn

NODES = 3
"""Called steps that the rule looks back on, so that its difference is of the paper's order."""
QUANTILE = 0.4
"""rho of the paper, for the rule's statistic."""
WARMUP = 2
"""Called steps at the beginning of a plan, as many as a line needs."""


class SkipPolicy(Protocol):
    """Wishes to skip a step, sample by sample."""

    watches: bool
    """Whether it looks at the latents' path."""

    def choose(self, context: StepContext, moved: Tensor | None, called: Sequence[bool]) -> list[bool]:
        """Per sample, whether to skip.

        Args:
            moved: How the latents moved in the step before ``[B, C, ..., H, W]``, float32; ``None`` in the first step,
                and for a policy that does not watch.
            called: Per sample, whether the model itself answered in the step before.
        """
        ...


class SkipRule:
    """Skip while the forecasts since the last call are expected to have changed the picture by less than a threshold.

    At each called step the newest velocity of the path is compared with its forecast by the two before; the paper's
    statistic of that difference, times what forecasts up to and with this step make of it (`growth`), times what is
    made of an error until the picture is done (`amplified`).

    Args:
        threshold: Of the latents' standard deviation.
        patch_size: The model's own, in latent pixels.
    """

    watches = True

    def __init__(self, threshold: float, patch_size: int) -> None:
        self.threshold = threshold
        self.patch = SPLIT * patch_size
        self._nodes: list[Tensor] = []
        self._levels: list[list[float]] = []
        self._measured: list[float | None] = []
        self._owed: list[float] = []
        self._sigma = 1.0
        """Noise level of the step before."""

    def choose(self, context: StepContext, moved: Tensor | None, called: Sequence[bool]) -> list[bool]:
        if moved is None:
            self._levels, self._measured = [[] for _ in called], [None] * len(called)
            self._owed, self._sigma = [0.0] * len(called), context.sigma
            return [False] * len(called)
        if context.sigma < self._sigma:
            self._add(moved / (context.sigma - self._sigma), called)
        self._sigma, end, here = context.sigma, context.end, half_log_snr(context.sigma)
        wished = []
        for i, statistic in enumerate(self._measured):
            if statistic is None:
                wished.append(False)
                continue
            self._owed[i] += (context.sigma - end) * growth(self._levels[i], here)
            wished.append(amplified(end) * self._owed[i] * statistic < self.threshold)
        return wished

    def _add(self, velocity: Tensor, called: Sequence[bool]) -> None:
        """The path's velocity over the last step joins the nodes of the samples whose model was called there."""
        level = half_log_snr(self._sigma)
        nodes = self._nodes or [velocity] * NODES
        newer = [*nodes[1:], velocity]
        self._nodes = [where_rows(called, new, old) for old, new in zip(nodes, newer, strict=True)]
        for i, now in enumerate(called):
            if now:
                self._levels[i] = [*self._levels[i], level][-NODES:]
        ready = [i for i, now in enumerate(called) if now and len(self._levels[i]) == NODES]
        if ready:
            values = difference_per_sigma([v[ready] for v in self._nodes], [self._levels[i] for i in ready])
            rows = statistics(values, self.patch // SPLIT, (1, SPLIT), QUANTILE)
            for i, row in zip(ready, rows, strict=True):
                self._measured[i], self._owed[i] = row[SPLIT], 0.0


class SkipPlan:
    """As many called steps as ``1 / speedup`` of a plain run pays for, where forecasts between them err least.

    The budget is the whole run's, patches included: work that coarse steps save pays for further calls. So each sample
    has a plan of its own, made anew whenever the run has cost another amount than it expected, or will.

    Args:
        speedup: Times less work than a plain run of as many steps.
    """

    watches = False

    def __init__(self, speedup: float) -> None:
        self.speedup = speedup
        self._plans: list[set[int]] = []
        self._expected: list[float] = []
        """Per sample, what its plan expected to have cost by now, in full steps."""
        self._prices: list[float] = []
        """Per sample, what its plan takes a call to come for, in full steps."""
        self._last: list[int] = []
        """Per sample, the last called step."""

    def choose(self, context: StepContext, moved: Tensor | None, called: Sequence[bool]) -> list[bool]:
        sigmas = known_levels(context)
        if not self._plans:  # in the first step but where that could not be read
            first = max((sum(row[:WARMUP]) / len(row[:WARMUP]) for row in context.ahead), default=1.0)
            self._plans, self._expected = [self.plan(sigmas, first)] * context.batch, [0.0] * context.batch
            self._last, self._prices = [0] * context.batch, [0.0] * context.batch
        if context.step >= len(sigmas):  # of a run that goes on where its sampler's steps end
            return [False] * context.batch
        for i, now in enumerate(called):
            self._last[i] = context.step - 1 if now else self._last[i]
        for i, (spent, ahead) in enumerate(zip(context.spent, context.ahead, strict=True)):
            price = sum(ahead) / len(ahead)
            off = abs(spent - self._expected[i]), abs(price - self._prices[i]) * len(ahead)
            if max(off) > TOLERANCE and context.step >= WARMUP:
                self._plans[i] = self._from(context, self._last[i], spent, price)
                self._expected[i], self._prices[i] = spent, price
        wished = [context.step not in plan for plan in self._plans]
        for i, ahead in enumerate(context.ahead):
            self._expected[i] += 0.0 if wished[i] else ahead[0]
        return wished

    def _from(self, context: StepContext, last: int, spent: float, price: float) -> set[int]:
        """Called steps from this one on, for what is left of the budget at this price of a call."""
        left, steps = len(context.sigmas) / self.speedup - spent, len(context.sigmas) - context.step
        return places(context.sigmas, last, min(max(math.floor(left / price + 0.5), 0), steps), first=context.step)

    def plan(self, sigmas: Sequence[float], first: float = 1.0) -> set[int]:
        """Numbers of the called steps of a run of full steps, whose work comes as near to the budget as steps can.

        Args:
            first: Work of each of the first steps in full steps, which are called whatever is asked.
        """
        total = len(sigmas)
        warmup = min(WARMUP, total)
        most = total / (warmup * first)
        if self.speedup > most + 1e-9:
            warn(
                f"a speedup of {self.speedup:g} can't be reached with {total} steps, of which {warmup} are warm-up: "
                f"the most is {most:.2f}; take fewer steps instead"
            )
        count = min(max(math.floor(total / self.speedup + 0.5) - warmup, 0), total - warmup)
        return {*range(warmup), *places(sigmas, warmup - 1, count)}


TOLERANCE = 0.25
"""Full steps by which a run may cost more or less than its plan expected before it is planned anew."""


def places(sigmas: Sequence[float], last: int, count: int, first: int | None = None) -> set[int]:
    """Numbers of the called steps to come for which the others' forecasts are expected to err least.

    Errors of different gaps know nothing of each other, so that their squares add up (`gap_errors`); dynamic
    programming over the gaps makes the sum least.

    Args:
        sigmas: Noise levels of all steps of a run, falling.
        last: Number of the last called step.
        count: Number of steps to choose, at most those that may be.
        first: Number of the first step that may be chosen, by default the one after ``last``.
    """
    total = len(sigmas)
    errors = gap_errors(sigmas)
    if first is not None:
        errors[last, last + 1 : first] = np.inf  # those are past

    least, before = errors[last], []
    for _ in range(count):
        sums = least[:total, None] + errors
        before.append(sums.argmin(0))
        least = sums.min(0)
    chosen: list[int] = []
    for earlier in reversed(before):
        chosen.append(int(earlier[chosen[-1] if chosen else total]))
    return set(chosen)
