"""Forecasts of what a model would answer, and the law of their errors. Pure functions of tensors.

Letters: B samples, C channels, H and W latent height and width, sigma the noise level in (0, 1], lambda
``log((1 - sigma) / sigma)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ddit.patches import crop, detail, expand, pad_to_multiple

BEND = 0.25
"""Forecasts are straight in ``exp(-BEND lambda)``: velocities and clean latents change the less per unit of lambda the
nearer they come to the picture. Chosen on tuning prompts of the embedded model."""
FINEST = 1e-3
"""Step of the noise levels that models are trained on; added to what is divided by, so that pure noise is finite."""
SPLIT = 2
"""Pooling by this tells layout, which follows forecast velocities, from detail, which follows clean latents."""


@overload
def half_log_snr(sigma: float) -> float: ...
@overload
def half_log_snr(sigma: Tensor) -> Tensor: ...
def half_log_snr(sigma: float | Tensor) -> float | Tensor:
    """``log((1 - sigma) / sigma)``, lambda of DPM-Solver (arXiv 2206.00927), in which velocities change evenly."""
    odds = (1 - sigma + FINEST) / (sigma + FINEST)
    return torch.log(odds) if isinstance(odds, Tensor) else math.log(odds)


def amplified(sigma: float) -> float:
    """By how much an error of the latents at a noise level has grown when the picture is done, about.

    A part of the picture shrunk by ``1 - sigma`` shows through the latents, and what is wrong in them is taken for it.
    """
    return 1 / (1 - sigma + FINEST)


def gap_errors(sigmas: Sequence[float], bend: Sequence[float] = (1.0,), own: Sequence[float] = (0.0,)) -> np.ndarray:
    """Squared error of the picture that a called step and the forecasts after it make, for every gap between calls.

    A forecast is off by ``bend`` times the square of its distance in lambda, in which velocities bend evenly, and by as
    much as a called step at its own noise level, computed as the last one was. Each goes into the latents with its step
    in sigma, and all grow until the picture is done (`amplified`).

    Args:
        sigmas: Noise levels of all steps of a run, falling.
        bend: Of each step, or of all.
        own: Error of each step if it is called, or of all.

    Returns:
        ``[steps, steps + 1]``: of a called step (row) and the next one (column, the last is none), else infinite.
    """
    total, levels, ends = len(sigmas), np.array([half_log_snr(sigma) for sigma in sigmas]), [*sigmas[1:], 0.0]
    sizes, grown = np.subtract(sigmas, ends), np.array([amplified(end) for end in ends])
    forecast = (np.triu((levels - levels[:, None]) ** 2, 1) * np.array(bend) * sizes).cumsum(1)
    coarse = np.triu(np.tile(np.array(own) * sizes, (total, 1))).cumsum(1)
    errors = np.full((total, total + 1), np.inf)
    gaps = np.triu_indices(total)
    errors[:, 1:][gaps] = (grown**2 * (forecast**2 + coarse**2))[gaps]
    return errors


def growth(levels: Sequence[float], here: float) -> float:
    """How many times larger than at its last node a difference per sigma will be at a noise level ahead.

    The error of a forecast through given nodes grows with the product of the distances to them: 1 one even step after
    the last node, 3 two steps after, 6, 10, ... for three nodes.

    Args:
        levels: `half_log_snr` of the nodes of one sample, rising.
        here: That of the step to be decided.
    """
    ahead = math.prod(here - node for node in levels[1:])
    return ahead / math.prod(levels[-1] - node for node in levels[:-1])


def difference_per_sigma(velocities: Sequence[Tensor], levels: Sequence[Sequence[float]]) -> Tensor:
    """The newest velocity minus its forecast by the others (a polynomial through them, Lagrange's formula).

    At equal steps of lambda and sigma it is the paper's third difference of the latents, divided by a step of sigma.

    Args:
        velocities: n tensors ``dz/dsigma [B, ...]``, newest last.
        levels: Their `half_log_snr`, n for each sample, rising.

    Returns:
        ``[B, ...]``, float32.
    """
    nodes = torch.stack(list(velocities)).float()
    shares = [[_share(sample, node) for sample in levels] for node in range(len(nodes))]
    weights = torch.tensor(shares).to(nodes.device, non_blocking=True)
    return (nodes * weights.reshape(*weights.shape, *[1] * (nodes.ndim - 2))).sum(0)


def _share(levels: Sequence[float], node: int) -> float:
    """Weight of a node in the newest minus its forecast by the others."""
    distance = math.prod(levels[-1] - other for other in levels[:-1])
    return distance / math.prod(levels[node] - other for i, other in enumerate(levels) if i != node)


@dataclass
class Line:
    """A line through the last two values of something, straight in ``exp(-BEND lambda)``: a forecast of the next."""

    value: Tensor
    """The newest, ``[B, ...]``."""
    level: Tensor
    """Its lambda (`half_log_snr`), ``[B]``."""
    previous: Tensor
    previous_level: Tensor
    """At or below ``level``; where they are equal, the line is flat."""

    @classmethod
    def through(cls, value: Tensor, level: Tensor, before: Line | None = None) -> Line:
        """The line through a new value and the newest of an earlier line, or a flat one."""
        return cls(value, level, value, level) if before is None else cls(value, level, before.value, before.level)

    def at(self, level: Tensor) -> Tensor:
        """Value on the line, ``[B, ...]``."""
        here, newest, before = (torch.exp(-BEND * x) for x in (level, self.level, self.previous_level))
        ratio = torch.where(before > newest, (newest - here) / (before - newest), 0)
        return torch.lerp(self.previous, self.value, 1 + expand(ratio, self.value))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four."""
        return self.value, self.level, self.previous, self.previous_level


@dataclass
class Reference:
    """The last called step, from which forecasts start. Latents are float32."""

    sigma: Tensor
    """Its noise level ``[B]``."""
    velocity: Line
    """The model's answer ``[B, C, ..., H, W]``, and that of the called step before."""
    clean: Line
    """Clean latents that both steps predicted."""

    @classmethod
    def after(cls, latents: Tensor, sigma: Tensor, velocity: Tensor, before: Reference | None = None) -> Reference:
        """The reference that a called step makes, on lines through the one before."""
        level, clean = half_log_snr(sigma), latents - expand(sigma, latents) * velocity
        straight = Line.through(velocity, level, before.velocity if before else None)
        return cls(sigma, straight, Line.through(clean, level, before.clean if before else None))

    def forecast(self, z: Tensor, sigma: Tensor) -> Tensor:
        """What the model would answer to latents ``[B, C, ..., H, W]`` at a noise level ``[B]``; float32.

        Layout follows the forecast velocity. Detail follows forecast clean latents ``x``: in ``(z - x) / sigma`` noise
        that an error left in ``z`` goes as sigma falls, where a velocity would carry it along.
        """
        level = half_log_snr(sigma)
        padded, velocity, clean = (
            pad_to_multiple(part, SPLIT) for part in (z.float(), self.velocity.at(level), self.clean.at(level))
        )
        # In place, on tensors of its own: memory that is new to the process costs as much as the arithmetic.
        answer = detail((padded - clean).div_(expand(sigma, padded)).sub_(velocity), SPLIT).add_(velocity)
        return crop(answer, *z.shape[2:])

    def rows(self, index: Sequence[int]) -> Reference:
        """The same for some samples of the batch."""
        rows = list(index)
        if len(rows) == len(self.sigma):
            return self
        velocity, clean = (Line(*(part[rows] for part in line.parts)) for line in (self.velocity, self.clean))
        return Reference(self.sigma[rows], velocity, clean)
