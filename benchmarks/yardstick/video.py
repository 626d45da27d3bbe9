"""The video model: autoencoder, text encoder, then flow matching on clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.yardstick.config import VideoSettings
from benchmarks.yardstick.data import Drawn, cached_clips
from benchmarks.yardstick.fit import Deadline, Figures, Stage, cosine, fit
from benchmarks.yardstick.flow import Flow, grid
from benchmarks.yardstick.kind import Kind
from benchmarks.yardstick.wan import TEXT_WIDTH, WIDTH, TextEncoder, make_pipeline, make_transformer, make_vae
from ddit.embedded.clips import CLIP_SIZE, FRAMES, MOTIONS, SPEEDS, Clip, clips, film
from ddit.embedded.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, TEXTURES, Split

ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "motion": MOTIONS,
    "speed": (*SPEEDS, None),
    "background": BACKGROUNDS,
}
"""What a prompt says -> the possible answers."""


class WanFlow(Flow):
    """Reads the third of five blocks."""

    def __init__(self) -> None:
        wan = make_transformer()
        super().__init__(wan, list(wan.blocks), 2, WIDTH, self.SIDE**2, 1)

    def velocity(self, noisy: Tensor, sigma: Tensor, text: tuple[Tensor, ...], guidance: Tensor) -> Tensor:
        """Latents ``[B, 5, F, h, w]``; Wan has no input for guidance."""
        told = {"hidden_states": noisy, "timestep": 1000 * sigma, "encoder_hidden_states": text[0]}
        return self.transformer(**told, return_dict=False)[0]

    def targets(self, covers: Tensor, tokens: int) -> Tensor:
        """Of one object at the time of each frame of latents, ``[B, F, 32, 32]``."""
        side = self.SIDE * round((tokens / covers.shape[1]) ** 0.5)
        return rearrange(
            F.adaptive_avg_pool2d(covers, side), "b f (h y) (w x) -> b (f h w) (y x)", y=self.SIDE, x=self.SIDE
        )

    def places(self, spots: Tensor, tokens: int) -> Tensor:
        """Of one object in each of 9 frames ``[B, 9, 3]``: a frame of latents is the first frame, then two each."""
        times = torch.cat([spots[:, :1], (spots[:, 1::2] + spots[:, 2::2]) / 2], 1)
        centres = grid(math.isqrt(tokens // times.shape[1]), spots.device)
        return self.seen_from(centres[:, None], times[:, :, None, None]).flatten(1, 2)


def train_text(folder: Path, settings: VideoSettings, device: str, deadline: Deadline) -> TextEncoder:
    """Teach the encoder to parse: the mean of its vectors tells every attribute; it is frozen then."""
    torch.manual_seed(settings.seed + 1)
    text = TextEncoder()
    heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(options)) for name, options in ATTRIBUTES.items()})
    model = nn.ModuleDict({"text": text, "heads": heads}).to(device)

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = list(islice(clips(int(rng.integers(2**62)), "train"), 128))
        ids, mask = (t.to(device) for t in text.ids([clip.prompt for clip in batch]))
        mean = text(ids, mask).sum(1) / mask.sum(1, keepdim=True)
        answers = torch.tensor([_answers(clip) for clip in batch], device=device)
        parts = [F.cross_entropy(heads[name](mean), answers[:, k]) for k, name in enumerate(ATTRIBUTES)]
        return torch.stack(parts).mean(), {}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    fit(Stage("text encoder", folder / "text.pt", model, [optimizer], loss, settings.text_steps, cosine, 11), deadline)
    return text.requires_grad_(False).eval()


def _answers(clip: Clip) -> list[int]:
    """Index of each of `ATTRIBUTES`."""
    said = {**vars(clip.thing), **vars(clip)}
    return [options.index(said[name]) for name, options in ATTRIBUTES.items()]


class VideoKind(Kind):
    """A `WanPipeline`, called twice a step for guidance."""

    name = "video"
    settings = VideoSettings
    crop = 32
    call: ClassVar = {
        "height": CLIP_SIZE,
        "width": CLIP_SIZE,
        "num_frames": FRAMES,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
    }

    make_vae = staticmethod(make_vae)
    make_flow = WanFlow
    train_text = staticmethod(train_text)
    make_pipeline = staticmethod(make_pipeline)

    def drawn(self, folder: Path, settings: VideoSettings) -> Drawn:
        return cached_clips(folder, settings.clips, settings.seed, settings.workers)

    def asked(self, seed: int, split: Split) -> Iterator[Clip]:
        return clips(seed, split)

    def draw(self, asked: Clip, rng: np.random.Generator) -> np.ndarray:
        return film(asked, rng)[0]

    @torch.no_grad()
    def vectors(self, text: TextEncoder, prompts: list[str], device: str) -> tuple[Tensor, ...]:
        """``[P + 1, 16, 128]``"""
        ids, mask = text.ids([*prompts, ""])
        parts = zip(ids.split(500), mask.split(500), strict=True)
        return (torch.cat([text(one.to(device), two.to(device)) for one, two in parts]),)

    def centres(self, drawn: Drawn) -> np.ndarray:
        """Where the object is half-way."""
        return drawn.spots[:, FRAMES // 2, :2] * CLIP_SIZE / IMAGE_SIZE
