"""The last step at scale 1: what steps with large patches, and forecasts, start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddit.patches import Line, expand, half_log_snr

CLOSEST = 0.05
"""Least distance in lambda between steps at scale 1 that is divided by."""


@dataclass
class Anchor:
    """The last step at scale 1, which later steps with large patches start from. Latents are float32."""

    sigma: Tensor
    """Its noise level ``[B]``."""
    velocity: Line
    """The model's own answer ``[B, C, ..., H, W]``, and that of the step at scale 1 before."""
    clean: Line
    """Clean latents that both steps predicted."""
    bend: Tensor | None = None
    """How much the line of the anchor before was off here, as four second divided differences over lambda, for an
    adapter that sees it; zero where that one had no line."""
    step: Tensor | None = None
    """Distance in lambda to the next step ``[B]``, for the same."""
    hidden: Tensor | None = None
    """What the model's last layer read there ``[B, N, width]``, for the same."""
    learnt: Tensor | None = None
    """What an adapter that mends forecasts made of all this."""

    @classmethod
    def after(
        cls,
        latents: Tensor,
        sigma: Tensor,
        velocity: Tensor,
        before: Anchor | None = None,
        *,
        end: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Anchor:
        """The anchor that a step at scale 1 makes, on lines through the one before.

        Args:
            end: Noise level ``[B]`` where the step ends, if an adapter will mend the forecasts.
            hidden: See `hidden`; likewise.
        """
        level, clean = half_log_snr(sigma), latents - expand(sigma, latents) * velocity
        straight = Line.through(velocity, level, before.velocity if before else None)
        made = cls(sigma, straight, Line.through(clean, level, before.clean if before else None), hidden=hidden)
        if end is not None:
            made.step = half_log_snr(end) - level
            made.bend = _bend(clean, level, before.clean) if before else torch.zeros_like(clean)
        return made

    @property
    def latents(self) -> Tensor:
        """Noisy latents ``[B, C, ..., H, W]``."""
        return self.clean.value + expand(self.sigma, self.clean.value) * self.velocity.value

    def distance(self, level: Tensor) -> Tensor:
        """Share ``[B]``, 0 to 1, of an adapter's correction that counts at a level (`ddit.patches.half_log_snr`).

        The error of a line through two points grows with the product of the distances to them: at the anchor itself
        there is nothing to correct, and one unit of lambda away all of what the adapter says counts.
        """
        return ((level - self.velocity.level) * (level - self.velocity.previous_level)).clamp(0, 1)

    def detach(self) -> Anchor:
        """The same without gradients."""
        return self._of_each(Tensor.detach)

    def rows(self, index: list[int]) -> Anchor:
        """The same for some samples of the batch."""
        return self if len(index) == len(self.sigma) else self._of_each(lambda part: part[index])

    def _of_each(self, change: Callable[[Tensor], Tensor]) -> Anchor:
        """What becomes of all parts but what is learnt."""
        velocity, clean = (Line(*map(change, line.parts)) for line in (self.velocity, self.clean))
        bend, step, hidden = (None if part is None else change(part) for part in (self.bend, self.step, self.hidden))
        return Anchor(change(self.sigma), velocity, clean, bend, step, hidden)


def _bend(value: Tensor, level: Tensor, before: Line) -> Tensor:
    """See `Anchor.bend`."""
    ahead, apart = level - before.level, before.level - before.previous_level
    size = torch.where(apart > 0, 4 / (ahead.clamp_min(CLOSEST) * (ahead + apart).clamp_min(CLOSEST)), 0)
    return (value - before.at(level)) * expand(size, value)
