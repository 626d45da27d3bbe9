"""How the latents of a run moved, free of rounding: what the scheduler takes its differences of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddit.patches import expand

NEW = 1e-3
"""Share of a velocity that earlier ones don't explain, below which it is taken for one of them."""


def project(step: Tensor, velocities: Sequence[Tensor]) -> Tensor:
    """The part of a step of the latents that the model's outputs explain: least squares per sample.

    A sampler's step lies in the span of the velocities that it uses, guided or not: Euler's of the newest, a multistep
    sampler's of some before as well. The few coefficients are fitted from thousands of numbers.

    Args:
        step: Difference of two neighbouring latents ``[B, ...]``.
        velocities: Outputs of the model that the sampler used, one per guidance pass, each ``[B, ...]``.

    Returns:
        The projection, shape of ``step``, float32.
    """
    target, projected, axes = step.float().flatten(1), torch.zeros((), device=step.device), []
    for velocity in velocities:  # Gram-Schmidt: a solver would make the host wait for a GPU
        v = velocity.float().flatten(1)
        length = rest = v.norm(dim=1, keepdim=True)
        for axis in axes:
            v = v - (v * axis).sum(1, keepdim=True) * axis
            rest = v.norm(dim=1, keepdim=True)
        axes.append(torch.where(rest > NEW * length, v / rest, 0.0))
        projected = projected + (target * axes[-1]).sum(1, keepdim=True) * axes[-1]
    return projected.reshape(step.shape)


MADE = 0.05
"""Share of the latents that have to lie where the sampler puts them, up to rounding, for its step to be theirs."""


def unrounded(step: Tensor, velocities: Sequence[Tensor], jump: float | None, rounding: Tensor) -> Tensor:
    """A step of latents that are kept in bfloat16 or float16, without their rounding.

    They move by ``sum_j c_j v_j`` and rounding, which hides third differences: in bfloat16 its deviation is some 0.005,
    five times the paper's tau. Of Euler's method from one output of the model the coefficient is known; others are
    fitted (`project`). Inpainting puts back what is known of a picture after each step, and callbacks change what they
    like: where nearly no number lies where the sampler puts it, the step is taken as it is.

    Args:
        step, velocities: See `project`.
        jump: By how much the noise level rose, where the sampler goes along one output alone; else ``None``.
        rounding: The most by which rounding may have moved the latents ``[B, ...]``.

    Returns:
        Shape of ``step``, float32.
    """
    exact = project(step, velocities) if jump is None else jump * velocities[0].float()
    share = ((step - exact).abs() <= rounding).flatten(1).float().mean(1)
    return torch.where(expand(share >= MADE, step).bool(), exact, step)


@dataclass
class Path:
    """How the latents moved in the last steps, float32, newest last.

    Latents below float32 are rounded, and rounding hides third differences. Their step is taken from what the model
    answered (`unrounded`).
    """

    watched: bool = False
    """Whether anybody asks how they moved."""
    keep: int = 0
    """Number of moves kept."""
    moves: list[Tensor] = field(default_factory=list)
    seen: Tensor | None = None
    """The newest latents as the transformer got them."""
    begun: bool = False
    """Whether the next latents will have moved from ``seen``."""

    def add(self, z: Tensor, velocities: Sequence[Tensor], jump: float | None = None) -> Tensor | None:
        """Take in latents ``[B, C, ..., H, W]``; gives how they moved, if anybody watches and they did.

        Args:
            velocities: Answers of the steps that the sampler made this move of.
            jump: See `unrounded`.
        """
        before, self.seen, moved = self.seen, z.clone(), None
        if self.begun and self.watched and before is not None:
            moved = z.float() - before.float()
            if z.dtype != torch.float32 and velocities:
                rounding = torch.finfo(z.dtype).eps / 2 * z.abs()
                moved = unrounded(moved, velocities, jump, rounding)
            self.moves = [*self.moves, moved][-self.keep :] if self.keep else []
        self.begun = True
        return moved
