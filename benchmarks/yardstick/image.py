"""The image model: flow matching on pictures, then guidance distilled into its input."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.yardstick.components import WIDTH, TextEncoders, grid_ids, make_pipeline, make_transformer, make_vae
from benchmarks.yardstick.config import ImageSettings
from benchmarks.yardstick.data import Drawn, cached_drawings
from benchmarks.yardstick.fit import Deadline, Figures, Loss, cosine, fit, noise_from, precision
from benchmarks.yardstick.flow import Flow, Source, flow_stage, grid
from benchmarks.yardstick.kind import Kind
from benchmarks.yardstick.text import train_text
from ddit.embedded.drawing import draw
from ddit.embedded.scenes import IMAGE_SIZE, MOST, Scene, Split, scenes


class FluxFlow(Flow):
    """Reads the third of five blocks."""

    def __init__(self) -> None:
        flux = make_transformer()
        blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
        super().__init__(flux, blocks, 2, WIDTH, MOST * self.SIDE**2, MOST)

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

    def places(self, spots: Tensor, tokens: int) -> Tensor:
        """Of three objects ``[B, 3, 3]``."""
        return self.seen_from(grid(math.isqrt(tokens), spots.device)[:, None], spots[:, None])


class ImageKind(Kind):
    """A `FluxPipeline`, guidance distilled."""

    name = "image"
    settings = ImageSettings
    crop = 64
    call: ClassVar = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "guidance_scale": 3.0, "max_sequence_length": 24}

    make_vae = staticmethod(make_vae)
    make_flow = FluxFlow
    train_text = staticmethod(train_text)
    make_pipeline = staticmethod(make_pipeline)

    def drawn(self, folder: Path, settings: ImageSettings) -> Drawn:
        return cached_drawings(folder, settings.pictures, settings.seed, settings.workers)

    def asked(self, seed: int, split: Split) -> Iterator[Scene]:
        return scenes(seed, split)

    def draw(self, asked: Scene, rng: np.random.Generator) -> np.ndarray:
        return draw(asked, rng)[0]

    @torch.no_grad()
    def vectors(self, text: TextEncoders, prompts: list[str], device: str) -> tuple[Tensor, ...]:
        """Pooled ``[P + 1, 128]`` and tokens ``[P + 1, 24, 128]``."""
        parts = [text(part.to(device)) for part in text.ids([*prompts, ""]).split(500)]
        return tuple(torch.cat(list(one)) for one in zip(*parts, strict=True))

    def distil(self, folder: Path, flow: Flow, source: Source, deadline: Deadline) -> None:
        """One call answers as the model's two, combined, do (arXiv 2210.03142)."""
        teacher = copy.deepcopy(flow.requires_grad_(False).eval())
        flow.requires_grad_(True)
        for aid in (flow.norm, flow.aid):
            aid.requires_grad_(False)
        settings: Any = source.settings
        length = settings.distil_steps, settings.distil_seconds
        loss = _distilling(flow, teacher, source)
        stage = flow_stage(folder, "flow-guided", flow, loss, length, cosine, settings, factor=0.3)
        flow.load_state_dict(fit(stage, deadline), strict=False)

    def call_of(self, checkpoint: str | None, count: int) -> dict[str, Any]:
        """Before it is distilled it knows guidance 1 alone, and is asked twice."""
        if checkpoint is None or "guided" in Path(checkpoint).name:
            return self.call
        twice = {"true_cfg_scale": self.call["guidance_scale"], "negative_prompt": [""] * count}
        return {**self.call, **twice, "guidance_scale": 1.0}


def _distilling(flow: Flow, teacher: Flow, source: Source) -> Loss:
    settings: Any = source.settings
    low, high = settings.guidance

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = source.batch(rng, -1, 0.0)
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
