"""The video model: autoencoder, text encoder, then flow matching on clips."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from einops import rearrange
from torch import Tensor, nn

from benchmarks.yardstick.autoencoder import encode, train_vae
from benchmarks.yardstick.clips import FRAMES, MOTIONS, SPEEDS, Clip, clips
from benchmarks.yardstick.config import CLIP_SIZES, VideoSettings
from benchmarks.yardstick.data import Clips
from benchmarks.yardstick.fit import Deadline, Figures, Stage, cosine, fit
from benchmarks.yardstick.flow import Flow, Source, train_flow
from benchmarks.yardstick.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, TEXTURES
from benchmarks.yardstick.wan import TEXT_WIDTH, WIDTH, TextEncoder, make_pipeline, make_transformer, make_vae

ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "motion": MOTIONS,
    "speed": (*SPEEDS, None),
    "background": BACKGROUNDS,
}
"""What a prompt says -> the possible answers."""
LATENT_FRAMES = (FRAMES + 1) // 2


class WanFlow(Flow):
    """Reads the third of five blocks."""

    def __init__(self) -> None:
        wan = make_transformer()
        super().__init__(wan, wan.blocks[2], WIDTH, self.SIDE**2)

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


def train_video(
    folder: Path, drawn: Clips, settings: VideoSettings, device: str, deadline: Deadline, only: str | None = None
) -> WanPipeline | None:
    """Train all stages that are not done; ``only`` ends after that stage, without a pipeline."""
    centres = drawn.spots[:, FRAMES // 2, :2] * drawn.frames.shape[-2] / IMAGE_SIZE
    vae = train_vae(folder, make_vae, drawn.frames, settings, device, deadline, side=32, spots=centres)
    if only == "vae":
        return None
    encoder = train_text(folder, settings, device, deadline)
    if only == "text":
        return None
    latents = {size: encode(folder, vae, drawn.frames, size, device) for size in CLIP_SIZES}
    source = Source.made(latents, drawn.masks, vectors(encoder, drawn.prompts, device), settings, device)
    torch.manual_seed(settings.seed + 2)
    flow = WanFlow().to(device)
    if settings.compile:
        flow.compile_blocks(flow.transformer.blocks)
    train_flow(folder, flow, source, deadline)
    return make_pipeline(vae, encoder, flow.transformer)


@torch.no_grad()
def vectors(encoder: TextEncoder, prompts: list[str], device: str) -> tuple[Tensor, ...]:
    """``[P + 1, 16, 128]`` of the prompts and of the empty one."""
    ids, mask = encoder.ids([*prompts, ""])
    parts = zip(ids.split(500), mask.split(500), strict=True)
    return (torch.cat([encoder(one.to(device), two.to(device)) for one, two in parts]),)


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
