"""The distillation loss (arXiv 2602.16968, section 3.2): coarse velocity against the frozen model's own."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.anchor import Anchor
from ddit.config import ScheduleConfig
from ddit.models.base import Architecture, Inputs
from ddit.patches import detail_variance, half_log_snr
from ddit.train.config import TrainConfig
from ddit.train.samples import Samples


@dataclass(frozen=True)
class Draw:
    """What chance decides for one sample of one step."""

    record: int
    """Index into `Samples`."""
    scale: int
    step: int
    """Number of the step in the record's run."""


def draw(config: TrainConfig, samples: Samples, records: int, step: int, number: int) -> Draw:
    """The same for the same seed, step and number within the step's global batch, on any number of processes."""
    rng = np.random.default_rng([config.seed, step, number])
    among = bisect_left(samples.usable, records)
    record, scale = samples.usable[int(rng.integers(among))], int(rng.choice(config.scales))
    return Draw(record, scale, int(rng.choice(samples.coarse(record))))


@dataclass
class Batch:
    """Noisy latents, the call they belong to, and what the frozen model answers."""

    inputs: Inputs
    scales: list[int]
    sigma: Tensor
    """``[B]``"""
    target: Tensor
    """The model's own velocity ``[B, C, ..., H, W]``, float32."""
    anchor: Anchor
    """The last step at scale 1 before, on lines through the one before that."""


def make_batch(architecture: Architecture, samples: Samples, draws: Sequence[Draw], device: Any, dtype: Any) -> Batch:
    """Steps with large patches as they were met, with the base's own velocity there."""
    records = [d.record for d in draws]
    steps = [[*samples.anchors(d.record, d.step), d.step] for d in draws]
    latents, velocities, call = samples.load(records, steps)
    call = {k: placed(v, device, dtype if k in architecture.batched else None) for k, v in call.items()}
    table = torch.tensor([[samples.sigmas[i] for i in chosen] for chosen in steps], device=device)
    (z0, z1, z), (v0, v1, v) = (list(x.to(device).float().unbind(1)) for x in (latents, velocities))
    sigma0, sigma1, sigma = table.unbind(1)
    anchor = Anchor.after(z1, sigma1, v1, Anchor.after(z0, sigma0, v0))
    inputs = architecture.renoised(call, z.to(dtype), sigma)
    return Batch(inputs, [d.scale for d in draws], sigma, v, anchor)


def placed(value: Any, device: Any, dtype: Any) -> Any:
    """A tensor on the device, in the dtype where it is floating-point."""
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
    form: ScheduleConfig,
    adapter: PatchAdapter | None,
    variance: Mapping[int, Tensor],
    batch: Batch,
    scale: int,
    rows: list[int],
) -> Tensor:
    """Mean squared error of the coarse velocity of each row, ``[rows]``.

    ``adapter=None`` is the step without: by a forecast where there are anchors, else the training-free one.
    """
    velocity = architecture.coarse_step(
        transformer.forward,
        architecture.rows(batch.inputs, rows),
        scale,
        form,
        anchor=batch.anchor.rows(rows) if form.anchored else None,
        variance=variance.get(scale),
        adapter=adapter,
    )
    return (velocity - batch.target[rows]).square().flatten(1).mean(1)


def weights(kind: str, sigma: Tensor) -> Tensor:
    """Weight of each noise level ``[B]`` in the loss (see `TrainConfig.weighting`)."""
    if kind == "relative":
        return torch.exp(-half_log_snr(sigma))
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
