"""The scheduler of DDiT (arXiv 2602.16968, section 3.3): pure functions from recent latents to patch scales.

Letters: B samples, C channels, H and W latent height and width, N patches, p the model's own patch size in latent
pixels, s a scale (patch size ``s * p``). Latents are ``[B, C, H, W]`` or ``[B, C, F, H, W]``, newest last in a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from ddit.config import ScheduleConfig
from ddit.patches import expand, pad_to_multiple

REFERENCE_STEP = 1 / 50
"""Step of sigma at which ``per-sigma`` and ``plain`` differences agree: the paper's 50 steps."""


def difference(latents: Sequence[Tensor], order: int = 3) -> Tensor:
    """Finite difference of the latents over the last ``order + 1`` steps: differences of differences.

    Order 3 is the paper's ``d3 z = z_0 - 3 z_1 + 3 z_2 - z_3`` (z_0 the newest).

    Args:
        latents: At least ``order + 1`` tensors of one shape, newest last.

    Returns:
        Shape of one latent, float32.
    """
    if len(latents) <= order:
        raise ValueError(f"a difference of order {order} needs {order + 1} latents, there are {len(latents)}")
    rows = [z.float() for z in latents[-order - 1 :]]
    for _ in range(order):
        rows = [new - old for old, new in pairwise(rows)]
    return rows[0]


def difference_per_sigma(velocities: Sequence[Tensor], sigmas: Sequence[Tensor]) -> Tensor:
    """The same from velocities ``dz/dsigma`` at any noise levels, as it would be between steps of `REFERENCE_STEP`.

    A difference of order n of the latents is one of order n - 1 of the velocity: Newton's divided difference times
    ``(n - 1)! (-1/50)**n``.

    Args:
        velocities: n tensors ``[B, ...]``, newest last.
        sigmas: Their noise levels ``[B]``, falling.

    Returns:
        ``[B, ...]``, float32.
    """
    rows = [-REFERENCE_STEP * v.float() for v in velocities]
    for level in range(1, len(rows)):
        gaps = [old - new for old, new in zip(sigmas, sigmas[level:], strict=False)]
        rows = [
            (new - old) * expand(level * REFERENCE_STEP / gap, new)
            for (old, new), gap in zip(pairwise(rows), gaps, strict=True)
        ]
    return rows[0]


def channel_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (population) over the channels: ``[B, C, ..., H, W]`` -> two of ``[B, ..., H, W]``."""
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1)


def patch_deviation(moments: tuple[Tensor, Tensor], patch: int) -> Tensor:
    """Standard deviation (population) inside each ``patch x patch`` square, over its pixels and channels.

    Law of total variance: the mean of the pixels' variances plus the variance of their means, so that one pass over
    the channels serves every scale. Grids that the patch does not divide are continued by their last row and column;
    patches of a video lie inside one frame.

    Args:
        moments: Of `channel_moments`.

    Returns:
        ``[B, N]``.
    """
    mean, variance = (
        rearrange(pad_to_multiple(m, patch), "b ... (h y) (w x) -> b (... h w) (y x)", y=patch, x=patch)
        for m in moments
    )
    return (variance.mean(-1) + mean.var(-1, correction=0)).sqrt()


def statistic(moments: tuple[Tensor, Tensor], patch: int, percentile: float) -> Tensor:
    """``sigma_s^(rho)`` of the paper: the ``percentile``-quantile over patches of their deviation, ``[B]``."""
    return torch.quantile(patch_deviation(moments, patch), percentile, dim=-1)


def statistics(values: Tensor, patch_size: int, scales: Sequence[int], percentile: float) -> dict[int, list[float]]:
    """The statistic of every scale above 1 and every sample, read by the host at once.

    Args:
        values: Differences ``[B, C, H, W]`` or ``[B, C, F, H, W]``.

    Raises:
        ValueError: When the latents hold NaN.
    """
    coarse = [s for s in scales if s > 1]
    if not coarse:
        return {}
    moments = channel_moments(values)
    table = torch.stack([statistic(moments, s * patch_size, percentile) for s in coarse])
    rows = table.tolist()
    if any(x != x for row in rows for x in row):
        raise ValueError("the latents hold NaN; the model's output is broken before any scale could be chosen")
    return dict(zip(coarse, rows, strict=True))


def choose_scale(stats: Mapping[int, float], threshold: float) -> int:
    """The largest scale whose statistic lies below ``threshold``, else 1 (the paper's rule)."""
    return max((s for s, value in stats.items() if value < threshold), default=1)


class Policy(Protocol):
    """Chooses the scales of one step. Passed to `ddit.apply` as ``policy=`` in place of the built-in ones."""

    def choose(self, step: int, total: int | None, stats: list[dict[int, float]], coarse: list[int]) -> list[int]:
        """Scale of each sample.

        Args:
            step: Number of the step, from 0.
            total: Number of steps of this generation, ``None`` where nobody knows.
            stats: Per sample, scale -> statistic; empty dictionaries while there are too few latents.
            coarse: Per sample, how many steps in a row have run with large patches until now.
        """
        ...


class Dynamic:
    """The paper's rule, after a warm-up, with a step at scale 1 whenever ``refresh`` steps had large patches."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def choose(self, step: int, total: int | None, stats: list[dict[int, float]], coarse: list[int]) -> list[int]:
        config = self.config
        if step < config.warmup:
            return [config.warmup_scale] * len(stats)
        due = [config.refresh > 0 and steps >= config.refresh for steps in coarse]
        return [1 if now else choose_scale(sample, config.threshold) for now, sample in zip(due, stats, strict=True)]


class Fixed:
    """A list of scales; the last one holds for further steps."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def choose(self, step: int, total: int | None, stats: list[dict[int, float]], coarse: list[int]) -> list[int]:
        steps = self.config.steps
        return [steps[min(step, len(steps) - 1)]] * len(stats)


class First:
    """The first fraction of the steps at the largest scale, the rest at 1."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def choose(self, step: int, total: int | None, stats: list[dict[int, float]], coarse: list[int]) -> list[int]:
        if total is None:
            raise ValueError(
                "policy 'first' needs the number of steps, which only a pipeline knows; "
                "apply ddit to the pipeline, or use policy 'fixed' with a list of scales"
            )
        scale = max(self.config.scales) if step < round(self.config.fraction * total) else 1
        return [scale] * len(stats)


POLICIES = {"dynamic": Dynamic, "fixed": Fixed, "first": First}


def make_policy(config: ScheduleConfig) -> Policy:
    """The policy a config names."""
    return POLICIES[config.policy](config)


def project(step: Tensor, velocities: Sequence[Tensor]) -> Tensor:
    """The part of a step of the latents that the model's outputs explain: least squares per sample.

    Latents kept in bfloat16 move by ``sum_j c_j v_j`` plus rounding, and the rounding hides third differences
    (its deviation is some 0.005, five times the paper's tau). Euler's step lies in the span of the velocities,
    guided or not, and the few coefficients are fitted from thousands of numbers, so the projection drops the
    rounding without knowing the sampler's step or the guidance scale.

    Args:
        step: Difference of two neighbouring latents ``[B, ...]``.
        velocities: Outputs of the model between them, one per guidance pass, each ``[B, ...]``.

    Returns:
        The projection, shape of ``step``, float32.
    """
    target = step.float().flatten(1)
    basis = torch.stack([v.float().flatten(1) for v in velocities], dim=1)
    gram = basis @ basis.mT
    coefficients = torch.linalg.pinv(gram, rtol=1e-6, hermitian=True) @ (basis @ target[..., None])
    return (coefficients.mT @ basis).reshape(step.shape)
