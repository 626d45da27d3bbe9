"""The scheduler of DDiT (arXiv 2602.16968, section 3.3): pure functions from recent latents to patch scales.

Letters: B samples, C channels, H and W latent height and width, N patches, p the model's own patch size in latent
pixels, s a scale (patch size ``s * p``). Latents are ``[B, C, H, W]`` or ``[B, C, F, H, W]``, newest last in a list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from ddit.config import ScheduleConfig
from ddit.patches import pad_to_multiple


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


def difference_per_sigma(velocities: Sequence[Tensor], levels: Sequence[Sequence[float]]) -> Tensor:
    """The same from velocities ``dz/dsigma`` at uneven noise levels.

    A third difference of the latents is what the newest step differs from a straight line through the two before. This
    one is that for lines in lambda: the newest velocity minus the forecast by a polynomial of degree n - 2 through the
    other n - 1 (Lagrange's formula). At equal steps of lambda and sigma it is `difference` divided by a step of sigma.

    Args:
        velocities: n tensors ``[B, ...]``, newest last.
        levels: Their `ddit.patches.half_log_snr`, n for each sample, rising.

    Returns:
        ``[B, ...]``, float32.
    """
    nodes = torch.stack(list(velocities)).float()
    shares = [[_share(sample, node) for sample in levels] for node in range(len(nodes))]
    weights = torch.tensor(shares).to(nodes.device)
    return (nodes * weights.reshape(*weights.shape, *[1] * (nodes.ndim - 2))).sum(0)


def _share(levels: Sequence[float], node: int) -> float:
    """Weight of a node in the newest minus its forecast by the others."""
    distance = math.prod(levels[-1] - other for other in levels[:-1])
    return distance / math.prod(levels[node] - other for i, other in enumerate(levels) if i != node)


def growth(levels: Sequence[float], here: float) -> float:
    """How many times larger than at its last node a difference per sigma will be at a noise level ahead.

    The error of a forecast through given nodes grows with the product of the distances to them: 1 one even step after
    the last node, 3 two steps after, 6, 10, ... for order 3.

    Args:
        levels: `ddit.patches.half_log_snr` of the nodes of one sample, rising.
        here: That of the step to be decided.
    """
    ahead = math.prod(here - node for node in levels[1:])
    return ahead / math.prod(levels[-1] - node for node in levels[:-1])


def channel_moments(values: Tensor) -> Tensor:
    """Mean and variance (population) over the channels: ``[B, C, ..., H, W]`` -> ``[2, B, ..., H, W]``."""
    mean = values.mean(1)
    return torch.stack([mean, (values - mean[:, None]).square().mean(1)])


def patch_deviation(moments: Tensor, patch: int) -> Tensor:
    """Standard deviation (population) inside each ``patch x patch`` square, over its pixels and channels.

    Law of total variance: the mean of the pixels' variances plus the variance of their means, so that one pass over
    the channels serves every scale. Grids that the patch does not divide are continued by their last row and column;
    patches of a video lie inside one frame.

    Args:
        moments: Of `channel_moments`.

    Returns:
        ``[B, N]``.
    """
    pixels = pad_to_multiple(moments, patch)
    mean, variance = rearrange(pixels, "m b ... (h y) (w x) -> m b (... h w) (y x)", y=patch, x=patch)
    return (variance.mean(-1) + mean.var(-1, correction=0)).sqrt()


def statistic(moments: Tensor, patch: int, percentile: float) -> Tensor:
    """``sigma_s^(rho)`` of the paper: the ``percentile``-quantile over patches of their deviation, ``[B]``."""
    ordered = patch_deviation(moments, patch).sort(-1).values
    place = percentile * (ordered.shape[-1] - 1)
    # As torch.quantile, which costs a small model's step half a percent.
    return torch.lerp(ordered[:, math.floor(place)], ordered[:, math.ceil(place)], place % 1)


def statistics(values: Tensor, patch_size: int, scales: Sequence[int], percentile: float) -> list[dict[int, float]]:
    """Per sample, the statistic of every scale above 1, read by the host at once.

    Args:
        values: Differences ``[B, C, H, W]`` or ``[B, C, F, H, W]``.

    Raises:
        ValueError: When the latents hold NaN.
    """
    coarse = [s for s in scales if s > 1]
    if not coarse:
        return [{} for _ in values]
    moments = channel_moments(values)
    table = torch.stack([statistic(moments, s * patch_size, percentile) for s in coarse])
    rows = table.T.tolist()
    if any(x != x for row in rows for x in row):
        raise ValueError("the latents hold NaN; the model's output is broken before any scale could be chosen")
    return [dict(zip(coarse, row, strict=True)) for row in rows]


def choose_scale(stats: Mapping[int, float], threshold: float) -> int:
    """The largest scale whose statistic lies below ``threshold``, else 1 (the paper's rule)."""
    return max((s for s, value in stats.items() if value < threshold), default=1)


@dataclass(frozen=True)
class Moment:
    """What a policy knows when it chooses the scales of a step."""

    step: int
    """Number of the step, from 0."""
    total: int | None
    """Number of steps of this generation, ``None`` where nobody knows."""
    stats: list[dict[int, float]]
    """Per sample, scale -> statistic; empty dictionaries while there are too few latents."""
    sigma: float = 1.0
    """Noise level of the latents."""
    sigmas: Sequence[float] = ()
    """Noise levels of all steps of the run; empty where nobody knows."""
    costs: Mapping[int, float] = field(default_factory=dict)
    """Scale -> work of a step, in steps at scale 1. Only for `ddit.dial.Budget`."""
    gap: float = 0.0
    """Work of an adapter that mends forecasts for all that follow a step at scale 1, in the same. Likewise."""


class Policy(Protocol):
    """Chooses the scales of one step. Passed to `ddit.apply` as ``policy=`` in place of the built-in ones.

    One that has ``blind = True`` does not look at statistics, which are then neither measured nor reported: that
    saves time, memory, and a read that waits for the device.
    """

    def choose(self, moment: Moment) -> list[int]:
        """Scale of each sample."""
        ...


class Dynamic:
    """The paper's rule, after a warm-up."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def choose(self, moment: Moment) -> list[int]:
        if moment.step < self.config.warmup:
            return [self.config.warmup_scale] * len(moment.stats)
        return [choose_scale(sample, self.config.threshold) for sample in moment.stats]

    def remark(self, chosen: Sequence[Sequence[int]], stats: Sequence[Sequence[Mapping[int, float]]]) -> str | None:
        """What to do about a run in which the rule never used large patches, or did in all steps; else ``None``.

        Args:
            chosen: Scale of each sample, for every step.
            stats: The same for the statistics, scale -> statistic.
        """
        config, decided = self.config, chosen[self.config.warmup :]
        if config.threshold == 0 or max(config.scales) == 1:
            return None
        if not decided:
            return (
                f"no step could use large patches: all {len(chosen)} belong to the warm-up of {config.warmup}. "
                f"Take more steps, or a shorter warm-up ({config.order} at least); "
                "a model distilled to so few has nothing to gain"
            )
        used = {scale for step in decided for scale in step}
        seen = [min(sample.values()) for step in stats[config.warmup :] for sample in step if sample]
        if used == {1} and seen:
            return (
                f"no step used large patches: the statistic was {min(seen):.2g} at the least, threshold is "
                f"{config.threshold:g}. Raise the threshold, or ask for a speedup"
            )
        if 1 not in used and seen:
            return (
                f"every step after the warm-up used large patches: the statistic was {max(seen):.2g} at the most, "
                f"threshold is {config.threshold:g}, and detail may be lost. Lower the threshold, or ask for a quality"
            )
        return None


class Fixed:
    """A list of scales; the last one holds for further steps."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def choose(self, moment: Moment) -> list[int]:
        steps = self.config.steps
        return [steps[min(moment.step, len(steps) - 1)]] * len(moment.stats)


class First:
    """The first fraction of the steps at the largest scale, the rest at 1."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def choose(self, moment: Moment) -> list[int]:
        if moment.total is None:
            raise ValueError(
                "policy 'first' needs the number of steps, which only a pipeline knows; "
                "apply ddit to the pipeline, or use policy 'fixed' with a list of scales"
            )
        scale = max(self.config.scales) if moment.step < round(self.config.fraction * moment.total) else 1
        return [scale] * len(moment.stats)


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
