"""The image model: flow matching on pictures, then guidance distilled into its input."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from einops import rearrange
from torch import Tensor

from benchmarks.yardstick.autoencoder import encode, train_vae
from benchmarks.yardstick.components import WIDTH, TextEncoders, grid_ids, make_pipeline, make_transformer, make_vae
from benchmarks.yardstick.config import SIZES, ImageSettings
from benchmarks.yardstick.data import Drawings
from benchmarks.yardstick.fit import Deadline, Figures, Loss, cosine, fit, noise_from, precision
from benchmarks.yardstick.flow import Flow, Source, flow_stage, train_flow
from benchmarks.yardstick.scenes import MOST
from benchmarks.yardstick.text import train_text


class FluxFlow(Flow):
    """Reads the second single block: the third of five blocks."""

    def __init__(self) -> None:
        flux = make_transformer()
        super().__init__(flux, flux.single_transformer_blocks[1], WIDTH, MOST * self.SIDE**2)

    def velocity(self, noisy: Tensor, sigma: Tensor, text: tuple[Tensor, ...], guidance: Tensor) -> Tensor:
        """Latents ``[B, N, 16]`` of a square grid."""
        pooled, tokens = text
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            img_ids=grid_ids(math.isqrt(noisy.shape[1]), noisy.device),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=noisy.device),
            return_dict=False,
        )[0]

    def targets(self, covers: Tensor, tokens: int) -> Tensor:
        """Of three objects ``[B, 3, 32, 32]``."""
        side = self.SIDE * math.isqrt(tokens)
        return rearrange(
            F.adaptive_avg_pool2d(covers, side), "b k (h y) (w x) -> b (h w) (k y x)", y=self.SIDE, x=self.SIDE
        )


def train_image(
    folder: Path, drawn: Drawings, settings: ImageSettings, device: str, deadline: Deadline, only: str | None = None
) -> FluxPipeline | None:
    """Train all stages that are not done; ``only`` ends after that stage, without a pipeline."""
    vae = train_vae(folder, make_vae, drawn.pictures, settings, device, deadline, side=64)
    if only == "vae":
        return None
    encoders = train_text(folder, settings, device, deadline)
    if only == "text":
        return None
    latents = {size: encode(folder, vae, drawn.pictures, size, device) for size in SIZES}
    source = Source.made(latents, drawn.masks, vectors(encoders, drawn.prompts, device), settings, device)
    torch.manual_seed(settings.seed + 2)
    flow = FluxFlow().to(device)
    if settings.compile:
        flow.compile_blocks(flow.transformer.transformer_blocks, flow.transformer.single_transformer_blocks)
    train_flow(folder, flow, source, deadline)
    distil(folder, flow, source, settings, deadline)
    return make_pipeline(vae, encoders, flow.transformer)


@torch.no_grad()
def vectors(encoders: TextEncoders, prompts: list[str], device: str) -> tuple[Tensor, ...]:
    """Pooled ``[P + 1, 128]`` and tokens ``[P + 1, 24, 128]`` of the prompts and of the empty one."""
    parts = [encoders(part.to(device)) for part in encoders.ids([*prompts, ""]).split(500)]
    return tuple(torch.cat(list(one)) for one in zip(*parts, strict=True))


def distil(folder: Path, flow: FluxFlow, source: Source, settings: ImageSettings, deadline: Deadline) -> None:
    """Stage C: one call answers as the model's two, combined, do (arXiv 2210.03142)."""
    teacher = copy.deepcopy(flow.requires_grad_(False).eval())
    flow.requires_grad_(True).masks.requires_grad_(False)
    loss = _distilling(flow, teacher, source, settings)
    length = settings.distil_steps, settings.distil_seconds
    stage = flow_stage(folder, "flow-guided", flow, loss, length, cosine, settings, factor=0.3)
    flow.load_state_dict(fit(stage, deadline), strict=False)


def _distilling(flow: FluxFlow, teacher: FluxFlow, source: Source, settings: ImageSettings) -> Loss:
    low, high = settings.guidance

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = source.batch(rng, settings.high_mix, 0.0)
        one = torch.ones_like(batch.sigma)
        empty = source.text(torch.full((len(one),), -1, device=source.device))
        guidance = torch.empty_like(one).uniform_(low, high, generator=noise_from(rng, source.device))
        with precision(source.device):
            with torch.no_grad():
                asked = teacher.velocity(batch.noisy, batch.sigma, batch.text, one).float()
                unasked = teacher.velocity(batch.noisy, batch.sigma, empty, one).float()
            output = flow.velocity(batch.noisy, batch.sigma, batch.text, guidance)
        target = unasked + guidance[:, None, None] * (asked - unasked)
        return F.mse_loss(output.float(), target), {"size": batch.size}

    return loss
