"""One run under way: recent latents, the decision on the current step, and the record of past ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ddit.config import PatchSchedule
from ddit.log import Log
from ddit.patches import period, same
from ddit.path import Path
from ddit.report import Step
from ddit.sampler import Sampler
from ddit.schedule import Policy, StepContext, difference, statistics


class Skipping(Protocol):
    """What a run needs of `ddit.skip.skipper.Skipper`."""

    @property
    def watches(self) -> bool: ...

    def choose(self, context: StepContext, moved: Tensor | None, called: Sequence[bool]) -> list[bool]: ...

    def ready(self, which: int, sample: int) -> bool: ...

    def observe(
        self,
        which: int,
        step: int,
        called: Sequence[bool],
        kinds: Sequence[Hashable],
        latents: Tensor,
        velocity: Tensor,
        sigma: float,
    ) -> None: ...

    def forecast(self, which: int, samples: Sequence[int], z: Tensor, sigma: Tensor) -> Tensor: ...

    def forget(self) -> None: ...


@dataclass
class RunState:
    """State between two calls of the transformer."""

    policy: Policy
    """Chooses patches."""
    measure: PatchSchedule
    """Says how statistics are measured, for a policy that needs them."""
    skipper: Skipping | None = None
    sampler: Sampler = Sampler()  # noqa: RUF009 (frozen)
    costs: Mapping[int, float] = field(default_factory=dict)
    """Scale -> work of a step in full steps; empty where nobody asks."""
    spent: list[float] = field(default_factory=list)
    """Per sample, work of the steps so far."""
    path: Path = field(default_factory=Path)
    levels: list[float] = field(default_factory=list)
    """Noise levels of the last two steps."""
    passes: int = 0
    """Guidance passes of the current step that are answered."""
    answered: list[int] = field(default_factory=list)
    """Per sample, how many of these the model answered."""
    velocities: list[list[Tensor]] = field(default_factory=list)
    """Answers of the last steps, newest last, where the next move of the path has to be projected onto them."""
    scales: list[int] = field(default_factory=list)
    """Decision on the current step: the scale of each sample, 0 where the model is not called."""
    cached: set[int] = field(default_factory=set)
    """Samples that a cache answered for in the current call."""
    reuses: Counter[int] = field(default_factory=Counter)
    """Sample -> passes of the current step that a cache answered: what it says is no evidence of what has changed."""
    chosen: list[list[int]] = field(default_factory=list)
    """What the policy chose for each step: `scales` without the skipped ones."""
    log: Log = field(default_factory=Log)
    """Of all steps, the current one among them."""
    model: Any = None
    """Which of several transformers answered last."""
    broken: bool = False
    """Whether latents held NaN or infinity."""

    def __post_init__(self) -> None:
        self.path.keep = self.measure.order if self.needs_statistics else 0
        self.path.watched = self.needs_statistics or (self.skipper is not None and self.skipper.watches)

    @property
    def needs_statistics(self) -> bool:
        return bool(getattr(self.policy, "needs_statistics", False)) and self.sampler.deterministic

    @property
    def blind(self) -> bool:
        """Whether something would look at latents that tell nothing."""
        return self.blind_policy or (self.skipper is not None and not self.sampler.deterministic)

    @property
    def blind_policy(self) -> bool:
        """Whether the policy would, so that steps stay full."""
        looks = any(getattr(self.policy, name, False) for name in ("needs_statistics", "needs_skipping"))
        return looks and not self.sampler.deterministic

    def repeats(self, z: Tensor, sigma: float) -> bool:
        """Whether a call is a further guidance pass of the current step: same noise level, same latents.

        Where passes are stacked in one call, a further one may be about one copy of the latents (skip-layer guidance).
        """
        if not self.levels or sigma != self.levels[-1] or not self._like(z):
            return False
        copies = self._seen.unflatten(0, (-1, len(z)))
        return same(z.expand_as(copies), copies)

    def continues(self, z: Tensor, sigma: float) -> bool:
        """Whether a call belongs to this run: the noise level does not rise, and the latents are alike.

        A forced call hands over tokens instead of latents; the two may follow each other. Guidance that was stacked in
        one call may end, and one copy of the latents goes on.
        """
        if not self.levels:
            return True
        other_form = z.ndim != self._seen.ndim and len(z) == len(self._seen)
        alike = self._like(z) and (len(z) == len(self._seen) or len(z) == period(self._seen))
        return sigma <= self.levels[-1] and (alike or other_form)

    def hand_over(self, model: Any) -> None:
        """Another transformer goes on (Wan 2.2 has two): what the last one said is no evidence of what it will say."""
        if self.model not in (None, model) and self.skipper is not None:
            self.skipper.forget()
        self.model = model

    def decide(self, z: Tensor, sigma: float, patch_size: int) -> list[int]:
        """Begin a step: the scale of each sample, 0 where the model is not called.

        Args:
            z: Latents ``[B, C, ..., H, W]`` as the transformer gets them; see `continues`.
            sigma: Their noise level.

        Raises:
            ValueError: When the policy chooses what is not allowed.
        """
        copies = len(self.scales) // len(z)
        z = z.repeat(copies, *[1] * (z.ndim - 1)) if copies > 1 else z
        called, spent = self._called(), self._count(len(z))
        velocities = [velocity for step in self.velocities for velocity in step]
        alone = self.sampler.remembers == 1 and len(velocities) == 1
        moved = self.path.add(z, velocities, sigma - self.levels[-1] if alone else None)
        stats = self._statistics(len(z), patch_size)
        self.broken = self.broken or any(math.isnan(value) for sample in stats for value in sample.values())
        self.levels = [*self.levels, sigma][-2:]
        sampler, step = self.sampler, len(self.log.steps)
        told = (sampler.sigmas, spent, self.costs, self.chosen, sampler.end(step, self.levels), sampler.remembers)
        context = StepContext(step, sampler.total, stats, sigma, *told)
        chosen, allowed = self._choose(context), self.policy.scales
        if not isinstance(chosen, Sequence) or len(chosen) != len(z) or any(s not in allowed for s in chosen):
            raise ValueError(f"the policy chose {chosen!r} for {len(z)} samples; allowed are scales of {allowed}")
        skipped = [False] * len(z)
        if self.skipper is not None and sampler.deterministic:
            skipped = self.skipper.choose(replace(context, ahead=self._ahead(context, chosen)), moved, called)
        if sigma <= 0:  # asked once more where noise has ended, and coarse steps and forecasts divide by its level
            chosen, skipped = [1] * len(z), [False] * len(z)
        scales = [0 if skip else scale for skip, scale in zip(skipped, chosen, strict=True)]
        self._open(sigma, scales, chosen, stats)
        return self.scales

    def _open(self, sigma: float, scales: Sequence[int], chosen: Sequence[int], stats: Sequence[Any]) -> None:
        """Begin a step that is decided on."""
        self.scales, self.answered, self.passes = list(scales), [0] * len(scales), 0
        self.cached, self.reuses = set(), Counter()
        self.velocities = [*self.velocities, []][-self.sampler.remembers :]
        self.log.steps.append(Step(sigma, tuple(scales), tuple(stats), 0.0))
        self.chosen.append(list(chosen))

    def _count(self, batch: int) -> list[float]:
        """`spent` with the last step; that of a step is known when all its passes are answered."""
        if not self.costs:
            return []
        if not self.log.steps:
            self.spent = [0.0] * batch
        else:
            last, share = self.log.steps[-1], self.log.reused_share
            paid = [self.costs[scale] * last.paid(i, share) for i, scale in enumerate(last.scales)]
            self.spent = [before + cost for before, cost in zip(self.spent, paid, strict=True)]
        return self.spent

    def _ahead(self, context: StepContext, chosen: Sequence[int]) -> list[list[float]]:
        """Per sample, work of this step and those to come if none is skipped: as the policy knows, else as now."""
        if not self.costs or not context.total:
            return []
        foretold = getattr(self.policy, "ahead", None)
        if foretold is not None:
            rows = [foretold(context)] * len(chosen)
        else:
            rows = [[scale] * max(context.total - context.step, 1) for scale in chosen]
        return [[self.costs[scale] for scale in row] for row in rows]

    def _choose(self, context: StepContext) -> Sequence[int]:
        if self.blind_policy:
            return [1] * context.batch
        return self.policy.choose(context)

    def _statistics(self, batch: int, patch_size: int) -> list[dict[int, float]]:
        """Per sample, scale -> statistic of the latents' difference, once there are enough latents.

        It is that of their moves, one order lower.
        """
        order = self.measure.order
        if not self.needs_statistics or len(self.path.moves) < order:
            return [{} for _ in range(batch)]
        values = difference(self.path.moves, order - 1)
        return statistics(values, patch_size, self.policy.scales, self.measure.percentile)

    def force(self, tokens: Tensor, sigma: float) -> None:
        """Begin a step that has to be full and whose latents can't be read; the path starts anew after it."""
        self._count(len(tokens))
        self.path = Path(self.path.watched, self.path.keep, seen=tokens.clone())
        self.levels, self.velocities = [sigma], []
        if self.skipper is not None:
            self.skipper.forget()
        full = [1] * len(tokens)
        self._open(sigma, full, full, [{} for _ in tokens])

    def pass_scales(self, count: int) -> list[int]:
        """The decision for the pass that is next to be answered: one that can't forecast is called in full.

        Args:
            count: Samples in this call, see `repeats`.
        """
        if self.skipper is None:
            return self.scales[:count]
        scales = [s or int(not self.skipper.ready(self.passes, i)) for i, s in enumerate(self.scales)]
        if scales != self.scales:
            self.log.amend(scales=tuple(s or now for s, now in zip(self.log.steps[-1].scales, scales, strict=True)))
        self.answered = [count + (scale > 0) for count, scale in zip(self.answered, scales, strict=True)]
        shares = tuple(count / (self.passes + 1) for count in self.answered)
        if self.log.steps[-1].shares or min(shares) < 1:
            self.log.amend(shares=shares)
        return scales[:count]

    def forecast(self, samples: Sequence[int], z: Tensor, sigma: Tensor) -> Tensor:
        """What the model would answer in this pass to some samples ``[len(samples), C, ..., H, W]``."""
        assert self.skipper is not None, "skipped"
        return self.skipper.forecast(self.passes, samples, z, sigma)

    def reused(self, samples: Sequence[int]) -> None:
        """Record that a cache answered for these samples in this call."""
        self.cached |= set(samples)

    def record(self, velocity: Tensor, scales: Sequence[int], seconds: float) -> None:
        """Take in the answer ``[B, C, ..., H, W]`` to a call, computed at these scales."""
        copies = len(self.scales) // len(velocity)
        if copies > 1:  # see `repeats`
            velocity, scales = velocity.repeat(copies, *[1] * (velocity.ndim - 1)), [*scales] * copies
        if self.skipper is not None and self.sampler.deterministic:
            called = [scale > 0 and i not in self.cached for i, scale in enumerate(scales)]
            self.skipper.observe(
                self.passes,
                len(self.log.steps) - 1,
                called,
                scales,
                self._seen.float(),
                velocity.float(),
                self.levels[-1],
            )
        if self.path.watched and self._seen.dtype != torch.float32:
            alike = period(self._seen)
            # Copies all of them: what the pipeline does to an answer is its own affair.
            self.velocities[-1] += [velocity.roll(shift, 0) for shift in range(0, len(velocity), alike)]
        self._pass_ends(seconds)

    def record_full(self, seconds: float) -> None:
        """Count a pass that could not be read, and that the model or a cache answered in full."""
        self.answered = [count + 1 for count in self.answered]
        self._pass_ends(seconds)

    def _pass_ends(self, seconds: float) -> None:
        self.passes += 1
        self.reuses.update(self.cached)
        self.cached = set()
        if self.reuses:
            reused = {i: count / self.passes for i, count in self.reuses.items()}
            self.log.amend(reused=reused)
        self.add_seconds(seconds)

    def add_seconds(self, seconds: float) -> None:
        """Count time towards the current step."""
        self.log.amend(seconds=self.log.steps[-1].seconds + seconds)

    def _called(self) -> list[bool]:
        """Per sample, whether the model itself answered the last step."""
        last = self.log.steps[-1].scales if self.log.steps else ()
        return [scale > 0 and i not in self.reuses for i, scale in enumerate(last)]

    def _like(self, z: Tensor) -> bool:
        seen = self._seen
        alike = z.shape[1:] == seen.shape[1:] and len(seen) % len(z) == 0
        return alike and z.dtype == seen.dtype and z.device == seen.device

    @property
    def _seen(self) -> Tensor:
        assert self.path.seen is not None, "a step has begun"
        return self.path.seen
