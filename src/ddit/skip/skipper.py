"""What skipping keeps in one run: for each guidance pass the last called steps, and a policy."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields
from typing import TypeVar, cast

from torch import Tensor

from ddit.patches import where_rows
from ddit.schedule import StepContext
from ddit.skip.forecast import Line, Reference
from ddit.skip.policy import SkipPolicy

Values = TypeVar("Values", Tensor, Line, Reference)


class PassMemory:
    """The last called steps of each sample in one guidance pass."""

    def __init__(self) -> None:
        self.reference: Reference | None = None
        self.step: list[int] = []
        """Per sample, the step of its reference; -1 for none."""
        self.kind: list[Hashable] = []
        """Per sample, how its reference was computed (which patches)."""
        self.count: list[int] = []
        """Per sample, called steps in a row that were computed so."""

    def alike(self, kinds: Sequence[Hashable], since: Sequence[int]) -> list[bool]:
        """Per sample, whether its reference is of the same kind, and no older than the last called step."""
        known = zip(self.count, self.kind, kinds, self.step, since, strict=True)
        return [count > 0 and old == new and step >= last for count, old, new, step, last in known]

    def renew(
        self, now: Sequence[bool], made: Reference, step: int, kinds: Sequence[Hashable], alike: Sequence[bool]
    ) -> None:
        """These samples' newest reference is this one, a further one where it is alike."""
        if self.reference is None:
            self.step, self.kind, self.count = [-1] * len(now), [None] * len(now), [0] * len(now)
        self.reference = made if self.reference is None else _where(now, made, self.reference)
        for i, called in enumerate(now):
            if called:
                self.count[i] = self.count[i] + 1 if alike[i] else 1
                self.step[i], self.kind[i] = step, kinds[i]


class Skipper:
    """Skipping in one run.

    Args:
        policy: Wishes to skip.
    """

    def __init__(self, policy: SkipPolicy) -> None:
        self.policy = policy
        self._passes: list[PassMemory] = []
        self._called: list[int] = []
        """Per sample, the last step in which the model answered the first pass."""
        self._before: list[int] = []
        """The same before the last one."""
        self._active = 0
        """Guidance passes of the last step: all are called together until each can forecast."""

    @property
    def watches(self) -> bool:
        """Whether the policy looks at the latents' path."""
        return self.policy.watches

    def forget(self) -> None:
        """After a step that can't be looked at, forecasts need new answers."""
        self._passes = []

    def choose(self, context: StepContext, moved: Tensor | None, called: Sequence[bool]) -> list[bool]:
        """Per sample, whether this step is skipped; see `SkipPolicy.choose`."""
        if not self._called:
            called = [False] * context.batch
            self._called = self._before = [-1] * context.batch
        wished = self.policy.choose(context, moved, called)
        active, self._active = range(max(self._active, 1)), 0
        return [wish and all(self.ready(which, i) for which in active) for i, wish in enumerate(wished)]

    def ready(self, which: int, sample: int) -> bool:
        """Whether a guidance pass can forecast for a sample: two answers alike, the last one in the last called step.

        A pass that comes back after a pause, as with guidance inside an interval, has old answers, and is called.
        """
        if which >= len(self._passes) or self._passes[which].reference is None:
            return False
        memory = self._passes[which]
        return memory.count[sample] > 1 and memory.step[sample] >= self._called[sample]

    def observe(
        self,
        which: int,
        step: int,
        called: Sequence[bool],
        kinds: Sequence[Hashable],
        latents: Tensor,
        velocity: Tensor,
        sigma: float,
    ) -> None:
        """The model answered some samples in a pass.

        Args:
            called: Per sample, whether it did, and no cache for it.
            kinds: Per sample, how (which patches).
            latents, velocity: ``[B, C, ..., H, W]``, float32.
            sigma: Noise level of this step.
        """
        self._active = which + 1
        while len(self._passes) <= which:
            self._passes.append(PassMemory())
        if not any(called):
            return
        memory, level = self._passes[which], latents.new_full((len(latents),), sigma)
        before, alike = memory.reference, [False] * len(called)
        if before is not None:
            # Where the patches changed, the pass was away, or there was nothing yet, the line starts anew.
            flat = Reference.after(latents, level, velocity)
            alike = memory.alike(kinds, self._before if which else self._called)
            before = _where(alike, before, flat)
        made = Reference.after(latents, level, velocity, before)
        memory.renew(called, made, step, kinds, alike)
        if which == 0:
            pairs = zip(called, self._called, self._before, strict=True)
            self._before = [last if now else before for now, last, before in pairs]
            self._called = [step if now else old for now, old in zip(called, self._called, strict=True)]

    def forecast(self, which: int, samples: Sequence[int], z: Tensor, sigma: Tensor) -> Tensor:
        """What the model would answer to ``z [len(samples), C, ..., H, W]``."""
        reference = self._passes[which].reference
        assert reference is not None, "a pass that is ready has a reference"
        return reference.rows(samples).forecast(z, sigma)


def _where(chosen: Sequence[bool], new: Values, old: Values) -> Values:
    """``new`` for the chosen samples of a batch, ``old`` for the others."""
    if all(chosen):
        return new
    if isinstance(new, Tensor):
        return where_rows(chosen, new, cast(Tensor, old))
    parts = []
    for field in fields(new):
        newer, older = getattr(new, field.name), getattr(old, field.name)
        parts.append(newer if newer is None or older is None else _where(chosen, newer, older))
    return cast(Values, type(new)(*parts))
