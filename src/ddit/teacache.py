"""TeaCache (Liu et al., arXiv 2411.19108) as a cache for diffusers' models: diffusers itself has none.

As long as the input of the first block, modulated by the timestep, has changed little since the blocks last ran, their
whole contribution is taken from then. "Little" is a sum of relative changes, each put through a polynomial that was
fitted to how much the output changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeaCacheConfig:
    """Settings of TeaCache.

    Raises:
        ValueError: For a threshold that is not above 0.
    """

    threshold: float = 0.25
    """Sum of expected changes below which the blocks are not run; the authors' for FLUX.1: 0.25 to 0.8."""
    coefficients: tuple[float, ...] | None = None
    """Of the polynomial, highest power first; by default the model's own preset, else those published for it."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"the threshold of TeaCache is {self.threshold}; it must be above 0")


def relative_change(new: Tensor, old: Tensor) -> float:
    """Mean absolute difference, relative to the mean absolute value before."""
    return float((new - old).abs().mean() / old.abs().mean())


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Highest power first (Horner)."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
