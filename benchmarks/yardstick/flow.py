"""The transformer's training: flow matching at 64 pixels, then at 128, then guidance distilled into its input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.yardstick.components import WIDTH, TextEncoders, grid_ids, make_transformer
from benchmarks.yardstick.config import SIZES, Settings
from benchmarks.yardstick.data import Drawings
from benchmarks.yardstick.fit import (
    Deadline,
    Figures,
    Loss,
    Stage,
    constant,
    cosine,
    fit,
    noise_from,
    precision,
    trapezoid,
)
from benchmarks.yardstick.muon import Muon
from benchmarks.yardstick.scenes import MOST


class Flow(nn.Module):
    """The transformer, and a linear layer on half-way features that tells which object covers what.

    Outlines are a small part of the flow's loss beside detail that nobody can predict; with this aid they are
    learnt many times sooner. The layer is used in training only.
    """

    BLOCK = 1
    """Single block whose features are read: the third of five blocks."""
    SIDE = 2
    """A token's area is told in so many parts a side."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer: Any = make_transformer()
        self.masks = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, MOST * self.SIDE**2))
        self._features: Tensor | None = None
        self.transformer.single_transformer_blocks[self.BLOCK].register_forward_hook(self._read)

    def compile_blocks(self) -> None:
        """Compile each block, anew for each size; the one that is read stays as it is, as its hook would break it."""
        torch._dynamo.config.recompile_limit = 32
        transformer = self.transformer
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            if block is not transformer.single_transformer_blocks[self.BLOCK]:
                block.compile(dynamic=False)

    def _read(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._features = output[1]

    def velocity(self, noisy: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor) -> Tensor:
        """Noisy latents ``[B, N, 16]`` of a square grid, noise levels and guidance ``[B]`` -> velocity."""
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

    def mask_loss(self, covers: Tensor) -> Tensor:
        """Cross-entropy of the last call's features with what covers what ``[B, 3, 32, 32]`` in [0, 1]."""
        features, self._features = self._features, None
        assert features is not None, "call velocity first"
        side = self.SIDE * math.isqrt(features.shape[1])
        target = F.adaptive_avg_pool2d(covers, side)
        target = rearrange(target, "b k (h y) (w x) -> b (h w) (k y x)", y=self.SIDE, x=self.SIDE)
        return F.binary_cross_entropy_with_logits(self.masks(features).float(), target)


@dataclass
class Batch:
    """What a step sees."""

    x: Tensor
    """Latents ``[B, N, 16]``"""
    noisy: Tensor
    eps: Tensor
    sigma: Tensor
    """``[B]``"""
    text: tuple[Tensor, Tensor]
    covers: Tensor


@dataclass
class Source:
    """Latents at every size, what covers what, and prompts."""

    latents: dict[int, Tensor]
    """Size -> ``[P, N, 16]``, float16"""
    masks: Tensor
    """``[P, 3, 32, 32]`` uint8"""
    pooled: Tensor
    """``[P + 1, 128]`` of the prompts and, last, of the empty one"""
    tokens: Tensor
    """``[P + 1, 24, 128]``"""
    settings: Settings
    device: str

    @classmethod
    @torch.no_grad()
    def made(
        cls, latents: dict[int, np.ndarray], drawn: Drawings, encoders: TextEncoders, settings: Settings, device: str
    ) -> Source:
        """All on the device, prompts as the encoders' vectors."""
        ids = encoders.ids([*drawn.prompts, ""])
        pooled, tokens = zip(*(encoders(part.to(device)) for part in ids.split(500)), strict=True)
        there = {size: torch.from_numpy(x).to(device) for size, x in latents.items()}
        masks = torch.from_numpy(drawn.masks).to(device)
        return cls(there, masks, torch.cat(pooled), torch.cat(tokens), settings, device)

    def text(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of prompts by number; -1 is the empty one."""
        return self.pooled[rows], self.tokens[rows]

    def batch(self, rng: np.random.Generator, mix: tuple[float, ...], drop: float) -> Batch:
        """Pictures of one size at logit-normal noise levels (SD3, arXiv 2403.03206).

        Pooling by s divides the noise by s: the same picture is as visible at a logit higher by log(s).
        """
        settings, device = self.settings, self.device
        size = int(rng.choice(SIZES, p=mix))
        count = settings.batch * max(SIZES) // size
        generator = noise_from(rng, device)
        rows = torch.randint(len(self.masks), (count,), generator=generator, device=device)
        x, covers = self.latents[size][rows].float(), self.masks[rows].float() / 255
        eps = torch.randn(x.shape, generator=generator, device=device)
        mean = settings.noise_mean + math.log(size / min(SIZES))
        logit = mean + settings.noise_std * torch.randn(len(x), generator=generator, device=device)
        sigma = torch.sigmoid(logit)
        words = rows.where(torch.rand(count, generator=generator, device=device) >= drop, -1)
        return Batch(x, torch.lerp(x, eps, sigma[:, None, None]), eps, sigma, self.text(words), covers)


def train_flow(folder: Path, source: Source, device: str, deadline: Deadline) -> tuple[Flow, dict[str, Tensor]]:
    """All three stages; returns the model with its averaged weights."""
    settings = source.settings
    torch.manual_seed(settings.seed + 2)
    flow = Flow().to(device)
    if settings.compile:
        flow.compile_blocks()
    for name, steps, seconds, mix, schedule in (
        ("flow-64", settings.low_steps, settings.low_seconds, settings.low_mix, constant),
        ("flow-128", settings.high_steps, settings.high_seconds, settings.high_mix, trapezoid),
    ):
        stage = _stage(folder, name, flow, _matching(flow, source, mix), (steps, seconds), schedule, settings)
        flow.load_state_dict(fit(stage, deadline), strict=False)
    flow._features = None  # part of a graph if the last step was cut short, and not to be copied
    teacher = copy.deepcopy(flow.requires_grad_(False).eval())
    flow.requires_grad_(True).masks.requires_grad_(False)
    loss = _distilling(flow, teacher, source)
    length = settings.distil_steps, settings.distil_seconds
    stage = _stage(folder, "flow-guided", flow, loss, length, cosine, settings, factor=0.3)
    average = fit(stage, deadline)
    flow.load_state_dict(average, strict=False)
    return flow, average


def _stage(
    folder: Path,
    name: str,
    flow: Flow,
    loss: Loss,
    length: tuple[int, float | None],
    schedule: Callable[[int, float], float],
    settings: Settings,
    factor: float = 1.0,
) -> Stage:
    seed = 20 + sum(map(ord, name)) + 1000 * settings.seed
    optimizers = make_optimizers(flow, factor * settings.lr)
    path, (steps, seconds) = folder / f"{name}.pt", length
    return Stage(name, path, flow, optimizers, loss, steps, schedule, seed, settings.ema, seconds=seconds)


def make_optimizers(flow: Flow, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices but those of modulation, AdamW for all else, as Muon's authors advise."""
    named = flow.transformer.named_parameters()
    blocks = [p for name, p in named if "blocks." in name and "norm" not in name and p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in flow.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        Muon(blocks, lr=lr),
        torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _matching(flow: Flow, source: Source, mix: tuple[float, ...]) -> Loss:
    """Flow matching with guidance 1: mean squared error to ``eps - x``."""
    settings = source.settings

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = source.batch(rng, mix, settings.unconditional)
        with precision(source.device):
            output = flow.velocity(batch.noisy, batch.sigma, batch.text, torch.ones_like(batch.sigma))
            aside = flow.mask_loss(batch.covers)
        error = F.mse_loss(output.float(), batch.eps - batch.x)
        figures: Figures = {"flow": error.detach(), "masks": aside.detach(), "tokens": batch.x.shape[1]}
        return error + settings.mask_weight * aside, figures

    return loss


def _distilling(flow: Flow, teacher: Flow, source: Source) -> Loss:
    """Guidance distillation (arXiv 2210.03142): one call answers as the teacher's two, combined, do."""
    low, high = source.settings.guidance

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = source.batch(rng, source.settings.high_mix, 0.0)
        one = torch.ones_like(batch.sigma)
        empty = source.text(torch.full((len(one),), -1, device=source.device))
        guidance = torch.empty_like(one).uniform_(low, high, generator=noise_from(rng, source.device))
        with precision(source.device):
            with torch.no_grad():
                asked = teacher.velocity(batch.noisy, batch.sigma, batch.text, one).float()
                unasked = teacher.velocity(batch.noisy, batch.sigma, empty, one).float()
            output = flow.velocity(batch.noisy, batch.sigma, batch.text, guidance)
        target = unasked + guidance[:, None, None] * (asked - unasked)
        return F.mse_loss(output.float(), target), {"tokens": batch.x.shape[1]}

    return loss
