"""The distillation loss (arXiv 2602.16968, section 3.2): coarse velocity against the frozen model's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.config import ScheduleConfig
from ddit.models.base import Anchor, Architecture, Inputs, first, held
from ddit.patches import detail, expand, half_log_snr, noise_at, pad_to_multiple
from ddit.train.config import Noise, TrainConfig
from ddit.train.samples import Samples

LEAST_SIGMA = 0.02
"""Below this noise level nothing is learnt: the velocity of what is left divides by it."""


@dataclass(frozen=True)
class Draw:
    """What chance decides for one sample of one step."""

    record: int
    """Index into `Samples`."""
    scale: int
    sigma: float
    """Noise level of the step."""
    anchors: tuple[float, float]
    """Noise levels of the last two steps at scale 1 before, newest last, for an adapter that starts from them."""
    noise: int
    """Seed of the noise."""


def draw(config: TrainConfig, samples: Samples, records: int, step: int, number: int) -> Draw:
    """The same for the same seed, step and number within the step's global batch, on any number of processes."""
    rng = np.random.default_rng([config.seed, step, number])
    record, scale = int(rng.integers(records)), int(rng.choice(config.scales))
    sigma = max(noise_level(config.noise, samples.sigmas, rng), LEAST_SIGMA)
    between = float(rng.uniform(0, 2 * config.gap))
    anchor = higher(sigma, between * float(rng.uniform(0, 1.25)))
    return Draw(record, scale, sigma, (higher(anchor, between), anchor), int(rng.integers(2**62)))


def higher(sigma: float, distance: float) -> float:
    """The noise level that lies so far above in lambda, at most 1."""
    level = half_log_snr(torch.tensor(sigma, dtype=torch.float64)) - distance
    return min(float(noise_at(level)), 1.0)


def noise_level(kind: Noise, sigmas: Sequence[float], rng: np.random.Generator) -> float:
    """A noise level in (0, 1); ``schedule`` picks one of the sampler's steps and a level inside it."""
    if kind == "uniform":
        return float(rng.uniform())
    if kind == "logit-normal":
        return float(1 / (1 + np.exp(-rng.normal())))
    edges = [*sigmas, 0.0]
    step = int(rng.integers(len(sigmas)))
    return float(rng.uniform(edges[step + 1], edges[step]))


@dataclass
class Batch:
    """Noisy latents, the call they belong to, and what the frozen model answers."""

    inputs: Inputs
    scales: list[int]
    sigma: Tensor
    """``[B]``"""
    target: Tensor
    """The model's own velocity ``[B, C, ..., H, W]``, float32."""
    anchors: tuple[Anchor, Anchor] | None
    """The last two steps at scale 1 before, newest last, for an adapter that starts from them."""


@torch.no_grad()
def make_batch(
    transformer: Any,
    architecture: Architecture,
    samples: Samples,
    draws: Sequence[Draw],
    device: Any,
    dtype: Any,
    *,
    anchored: bool,
    substeps: int = 1,
) -> Batch:
    """Ask the teacher, which is the transformer itself while the adapter is silent.

    Latents with anchors lie where the teacher leads from one to the next in ``substeps`` steps, as in use.
    """
    clean, call = samples.load([d.record for d in draws])
    clean = clean.to(device).float()
    call = {
        k: v.to(device, dtype if v.is_floating_point() and k in architecture.batched else None) for k, v in call.items()
    }
    eps = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(d.noise)) for d in draws])
    eps = eps.to(device)

    def levels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device)

    def ask(latents: Tensor, sigma: Tensor) -> tuple[Inputs, Tensor]:
        inputs = architecture.renoised(call, latents.to(dtype), sigma)
        velocity = architecture.velocity(first(transformer(**inputs)), (clean.shape[-2], clean.shape[-1]))
        return inputs, velocity.float()

    sigma = levels([d.sigma for d in draws])
    if not anchored:
        inputs, target = ask(torch.lerp(clean, eps, expand(sigma, clean)), sigma)
        return Batch(inputs, [d.scale for d in draws], sigma, target, None)

    def follow(z: Tensor, velocity: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """Latents where ``substeps`` steps of the teacher lead."""
        start, way = half_log_snr(begin), half_log_snr(end) - half_log_snr(begin)
        path = [begin, *(noise_at(start + way * i / substeps) for i in range(1, substeps)), end]
        for index, (here, there) in enumerate(pairwise(path)):
            velocity = ask(z, here)[1] if index else velocity
            z = z + expand(there - here, z) * velocity
        return z

    before, begin = (levels(level) for level in zip(*(d.anchors for d in draws), strict=True))
    noisy = torch.lerp(clean, eps, expand(before, clean))
    earlier = Anchor.after(noisy, before, ask(noisy, before)[1])
    noisy = follow(noisy, earlier.velocity.value, before, begin)
    anchor = Anchor.after(noisy, begin, ask(noisy, begin)[1], earlier)
    inputs, target = ask(follow(noisy, anchor.velocity.value, begin, sigma), sigma)
    return Batch(inputs, [d.scale for d in draws], sigma, target, (earlier, anchor))


def groups(scales: Sequence[int]) -> dict[int, list[int]]:
    """Scale -> rows of the batch."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, scale in enumerate(scales):
        rows[scale].append(row)
    return dict(sorted(rows.items()))


def errors(
    transformer: Any,
    architecture: Architecture,
    form: ScheduleConfig,
    adapter: PatchAdapter | None,
    variance: Mapping[int, Tensor],
    batch: Batch,
    scale: int,
    rows: list[int],
) -> Tensor:
    """Mean squared error of the coarse velocity of each row, ``[rows]``; ``adapter=None`` is the training-free step."""
    forward, inputs = transformer.forward, architecture.rows(batch.inputs, rows)
    anchor = low = None
    # With gradients: what an adapter does to the answers at the anchors as well is lost again in the difference.
    for anchor in (a.rows(rows) for a in batch.anchors or ()):
        low = architecture.low_line(forward, inputs, scale, form, anchor, low, adapter)
    velocity = architecture.coarse_step(
        forward,
        inputs,
        scale,
        form,
        anchor=anchor,
        low=held(low) if low else None,
        variance=variance.get(scale),
        adapter=adapter,
    )
    return (velocity - batch.target[rows]).square().flatten(1).mean(1)


def weights(kind: str, sigma: Tensor) -> Tensor:
    """Weight of each noise level ``[B]`` in the loss (see `TrainConfig.weighting`)."""
    if kind == "bounded":
        return (sigma / 0.25).square().clamp_max(1)
    return compute_loss_weighting_for_sd3(kind, sigma)


@torch.no_grad()
def detail_variance(
    samples: Samples, scales: Sequence[int], patch_size: int, count: int = 64
) -> dict[int, list[float]]:
    """Scale -> variance per channel of what pooling loses, over the first samples."""
    total: dict[int, Tensor] = {}
    indices = range(0, min(len(samples), count * samples.passes), samples.passes)
    for index in indices:
        clean, _ = samples.load([index])
        for scale in scales:
            lost = detail(pad_to_multiple(clean.float(), scale * patch_size), scale)[0]
            total[scale] = total.get(scale, torch.zeros(len(lost))) + lost.square().flatten(1).mean(1)
    return {scale: (value / len(indices)).tolist() for scale, value in total.items()}
