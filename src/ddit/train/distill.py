"""The distillation loss (arXiv 2602.16968, section 3.2): coarse velocity against the frozen model's own.

With classifier-free guidance in two passes ``a`` and ``b`` a step moves by ``g a - (g - 1) b``, so their errors count
apart and together: ``|g a - (g - 1) b|^2 = g |a|^2 - (g - 1) |b|^2 + g (g - 1) |a - b|^2``. Without the last term an
adapter learns what both passes share, and loses what guidance says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.coarse import coarse_step
from ddit.config import Coarse
from ddit.models.base import Architecture, Inputs
from ddit.patches import detail_variance
from ddit.pipelines.generate import guided_error
from ddit.train.config import TrainConfig
from ddit.train.samples import Samples

FINEST = 1e-3
"""Added to what is divided by, so that the weight of pure noise is finite."""


@dataclass(frozen=True)
class Draw:
    """What chance decides for one sample of one step."""

    run: int
    """Number of the run, of which all guidance passes are taken."""
    scale: int
    step: int


def draw(config: TrainConfig, samples: Samples, runs: int, step: int, number: int) -> Draw:
    """The same for the same seed, step and number within the step's global batch, on any number of processes."""
    rng = np.random.default_rng([config.seed, step, number])
    run, scale = int(rng.integers(runs)), int(rng.choice(config.scales))
    lowest = config.lowest[scale]
    steps = sum(sigma >= lowest for sigma in samples.sigmas)  # levels fall
    return Draw(run, scale, int(rng.integers(max(steps, 1))))


@dataclass
class Batch:
    """Noisy latents, the call they belong to, and what the frozen model answers."""

    inputs: Inputs
    scales: list[int]
    sigma: Tensor
    """``[B]``"""
    target: Tensor
    """The model's own velocity ``[B, C, ..., H, W]``, float32."""


def make_batch(
    architecture: Architecture, samples: Samples, draws: Sequence[Draw], which: int, device: Any, dtype: Any
) -> Batch:
    """Steps of plain runs, with what the base said there in one of its guidance passes."""
    records = [d.run * samples.passes + which for d in draws]
    latents, velocities, call = samples.load(records, [[d.step] for d in draws])
    call = {k: placed(v, device, dtype if k in architecture.batched else None) for k, v in call.items()}
    sigma = torch.tensor([samples.sigmas[d.step] for d in draws], device=device)
    z, target = (x[:, 0].to(device).float() for x in (latents, velocities))
    inputs = architecture.renoised(call, z.to(dtype), sigma)
    return Batch(inputs, [d.scale for d in draws], sigma, target)


def placed(value: Any, device: Any, dtype: Any) -> Any:
    """A tensor on the device, in the dtype where it is floating-point; also those of a list."""
    if isinstance(value, list):
        return [placed(one, device, dtype) for one in value]
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def groups(scales: Sequence[int]) -> dict[int, list[int]]:
    """Scale -> rows of the batch."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, scale in enumerate(scales):
        rows[scale].append(row)
    return dict(sorted(rows.items()))


def errors(
    transformer: Any,
    architecture: Architecture,
    coarse: Coarse,
    adapter: PatchAdapter | None,
    variance: Mapping[int, Tensor],
    batch: Batch,
    scale: int,
    rows: list[int],
) -> Tensor:
    """Coarse velocity less the model's own, of each row, ``[rows, C, ..., H, W]``.

    ``adapter=None`` is the training-free step.
    """
    inputs = architecture.rows(batch.inputs, rows)
    velocity = coarse_step(
        architecture,
        transformer.forward,
        inputs,
        architecture.read(inputs),
        scale,
        coarse,
        variance=variance.get(scale),
        adapter=adapter,
    )
    return velocity - batch.target[rows]


def losses(errors: Sequence[Tensor], guidance: float) -> tuple[Tensor, Tensor]:
    """Mean squared errors of each row, ``[rows]``: of its guidance passes, and of what guidance makes of them
    (`ddit.pipelines.generate.guided_error`)."""
    return guided_error(errors, 1.0), guided_error(errors, guidance)


def weights(kind: str, sigma: Tensor) -> Tensor:
    """Weight of each noise level ``[B]`` in the loss (see `TrainConfig.weighting`)."""
    if kind == "relative":
        return (sigma + FINEST) / (1 - sigma + FINEST)
    if kind == "bounded":
        return (sigma / 0.25).square().clamp_max(1)
    return compute_loss_weighting_for_sd3(kind, sigma)


@torch.no_grad()
def measured_detail(
    samples: Samples, scales: Sequence[int], patch_size: int, count: int = 64
) -> dict[int, list[float]]:
    """Scale -> variance per channel of what pooling loses, over the first samples."""
    indices = range(0, min(len(samples), count * samples.passes), samples.passes)
    clean = [samples.clean(index) for index in indices]
    return {s: torch.stack([detail_variance(x, s, patch_size) for x in clean]).mean(0).tolist() for s in scales}
