"""Train the embedded video model: autoencoder, text encoder, then the flow transformer.

Each stage writes into the run folder and is skipped when its result is there; the long ones also resume from their
last checkpoint. Everything follows from the seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor, nn

from ddit.embedded.autoencoder import cached_latents, equivariant_loss, pool, to_model
from ddit.embedded.config import FlowConfig
from ddit.embedded.data import cached_shards
from ddit.embedded.flow import MaskHead, unsaid
from ddit.embedded.optim import fit, make_optimizers, trapezoid
from ddit.embedded.scenes import COLOURS
from ddit.embedded.video import components
from ddit.embedded.video.clips import (
    BACKGROUNDS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIZE,
    SPEEDS,
    TEXTURES,
    Clip,
    clips,
    complete,
    film,
)
from ddit.embedded.video.judge import saturation

SCALES = (1, 2, 4)
"""The flow is trained on latents of a clip, and on the same pooled."""
COVER = 32
"""Height and width of the masks of `where`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(FlowConfig):
    """Settings of the whole training; saved beside the result."""

    clips: int = 5_000
    vae_steps: int = 5_000
    vae_batch: int = 4
    object_weight: float = 4.0
    """How much more an object's pixels count than others': they are few, and its texture is the finest there is."""
    text_steps: int = 400
    flow_steps: int = 5_000
    batches: tuple[int, int, int] = (10, 24, 48)
    """Batch size at each of `SCALES`."""


def train(folder: Path, config: TrainingConfig) -> Path:
    """Run every stage that is not done yet; returns the folder of the finished pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(asdict(config), indent=2))
    drawn = cached_shards(folder / "clips", "clips", _draw_shard, count=config.clips, seed=config.seed, shard=500)
    vae = train_vae(folder, drawn["frames"], config)
    latents = encode(folder / "latents.npy", vae, drawn["frames"])
    text = train_text(folder, config)
    covers = np.concatenate([where(part) for part in np.array_split(drawn["frames"], 50)])
    return train_flow(folder, drawn["prompts"].tolist(), latents, covers, text, vae, config)


def _draw_shard(seed: int, count: int) -> dict[str, np.ndarray]:
    rng, prompts = np.random.default_rng([seed, 1]), []
    frames = np.empty((count, FRAMES, SIZE, SIZE, 3), np.uint8)
    for i, clip in enumerate(islice(clips(seed, "train"), count)):
        frames[i], _ = film(complete(clip, rng), rng)
        prompts.append(clip.prompt)
    return {"prompts": np.array(prompts), "frames": frames}


# Autoencoder


def train_vae(folder: Path, frames: np.ndarray, config: TrainingConfig) -> AutoencoderKLWan:
    """Reconstruct clips, and pooled clips from pooled latents, as for pictures (`ddit.embedded.autoencoder`)."""
    done = folder / "vae"
    if (done / "config.json").exists():
        saved: Any = AutoencoderKLWan.from_pretrained(done)
        return saved
    torch.manual_seed(config.seed)
    vae: Any = components.make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        drawn = frames[np.sort(rng.choice(len(frames), config.vae_batch, replace=False))]
        objects = torch.from_numpy(saturation(drawn.astype(np.float32) / 255))[:, None]
        weight = 1 + config.object_weight * objects
        with torch.autocast("cpu", torch.bfloat16):
            return equivariant_loss(vae, to_model(drawn), int(rng.choice(SCALES[1:])), rng, weight / weight.mean())

    fit(folder / "vae.pt", vae, [optimizer], loss, steps=config.vae_steps, seed=[config.seed])
    with torch.no_grad():
        z = torch.cat([vae.encode(to_model(frames[i : i + 8])).latent_dist.mean for i in range(0, 64, 8)])
    vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist())
    vae.save_pretrained(done)
    return vae


@torch.no_grad()
def encode(path: Path, vae: Any, frames: np.ndarray) -> np.ndarray:
    """Normalised latents ``[N, C, 5, 16, 16]`` of all clips, cached as float16."""
    mean, std = (torch.tensor(vae.config[k])[:, None, None, None] for k in ("latents_mean", "latents_std"))
    return cached_latents(path, frames, lambda batch: (vae.encode(to_model(batch)).latent_dist.mean - mean) / std)


def where(frames: np.ndarray) -> np.ndarray:
    """What the object covers at the time of each frame of the latents: ``[N, F, H, W, 3] -> [N, 5, 32, 32]``, uint8."""
    covers = saturation(frames.astype(np.float32) / 255)
    fine = SIZE // COVER
    covers = covers.reshape(*covers.shape[:2], COVER, fine, COVER, fine).mean((3, 5))
    # A frame of the latents stands for the first frame, then for two each.
    covers = np.concatenate([covers[:, :1], (covers[:, 1::2] + covers[:, 2::2]) / 2], axis=1)
    return (covers * 255).round().astype(np.uint8)


# Text


ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "texture": (*TEXTURES, None),
    "motion": MOTIONS,
    "speed": (*SPEEDS, None),
    "background": BACKGROUNDS,
}


class TextEncoder(nn.Module):
    """UMT5 called as `WanPipeline.encode_prompt` calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = components.make_tokenizer()
        self.umt5 = components.make_text_encoder()

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask ``[B, 16]``."""
        told = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=components.TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return told.input_ids, told.attention_mask

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, 16, 128]``, zero where the prompt has ended."""
        return self.umt5(ids, mask).last_hidden_state * mask[..., None]


def train_text(folder: Path, config: TrainingConfig) -> TextEncoder:
    """Teach the encoder to parse: the mean of its vectors tells every attribute."""
    torch.manual_seed(config.seed + 1)
    text = TextEncoder()
    heads = nn.ModuleDict({name: nn.Linear(components.TEXT_WIDTH, len(v)) for name, v in ATTRIBUTES.items()})
    model = nn.ModuleDict({"text": text, "heads": heads})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    source = clips(config.seed + 2, "train")
    known = list(islice(source, 20_000))

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        batch: list[Clip] = [known[i] for i in rng.integers(len(known), size=128)]
        ids, mask = text.tokens([clip.prompt for clip in batch])
        mean = text(ids, mask).sum(1) / mask.sum(1, keepdim=True)
        parts = [
            F.cross_entropy(heads[name](mean), torch.tensor([options.index(getattr(c, name)) for c in batch]))
            for name, options in ATTRIBUTES.items()
        ]
        return torch.stack(parts).mean(), {}

    fit(folder / "text.pt", model, [optimizer], loss, steps=config.text_steps, seed=[config.seed])
    return text


# Flow


BLOCK = 3
"""Whose features the masks' head reads: the fourth of six."""


def train_flow(
    folder: Path,
    prompts: list[str],
    latents: np.ndarray,
    covers: np.ndarray,
    text: TextEncoder,
    vae: AutoencoderKLWan,
    config: TrainingConfig,
) -> Path:
    """Flow matching on the latents, text encoder frozen."""
    torch.manual_seed(config.seed + 3)
    transformer: Any = components.make_transformer()
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    model = nn.ModuleDict({"transformer": transformer, "masks": MaskHead(width, things=1)})
    with torch.no_grad():
        told = torch.cat([text(*text.tokens(prompts[i : i + 500])) for i in range(0, len(prompts), 500)])
        empty = text(*text.tokens([""]))

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        which = int(rng.choice(len(SCALES), p=config.mix))
        pick = np.sort(rng.choice(len(prompts), config.batches[which], replace=False))
        x = pool(torch.from_numpy(latents[pick].astype(np.float32)), SCALES[which])
        words = unsaid(told[pick], empty, config.unconditional, rng)
        # Pooling by s divides the noise by s: the same clip is as visible at a logit higher by log(s).
        mean = config.noise_mean + math.log(max(SCALES) / SCALES[which])
        flow, aside = flow_loss(model, x, words, torch.from_numpy(covers[pick]) / 255, mean, config.noise_std, rng)
        figures = {"flow": round(flow.item(), 5), "masks": round(aside.item(), 5), "scale": SCALES[which]}
        return flow + config.mask_weight * aside, figures

    average = fit(
        folder / "flow.pt",
        model,
        make_optimizers(model, config.lr),
        loss,
        partial(trapezoid, decay_from=config.decay_from),
        steps=config.flow_steps,
        seed=[config.seed],
        ema=config.ema,
    )
    model.load_state_dict(average, strict=False)
    return export(folder / "model", transformer, text, vae)


def flow_loss(
    model: nn.ModuleDict, x: Tensor, words: Tensor, covers: Tensor, mean: float, std: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """As that of pictures (`ddit.embedded.flow.flow_loss`), of latents ``[B, C, F, H, W]``."""
    transformer: Any = model["transformer"]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    sigma = torch.sigmoid(mean + std * torch.randn(len(x), generator=generator))
    eps = torch.randn(x.shape, generator=generator)
    noisy = torch.lerp(x, eps, sigma.reshape(-1, 1, 1, 1, 1))
    features: list[Tensor] = []
    hook = transformer.blocks[BLOCK].register_forward_hook(lambda _, __, out: features.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        output = transformer(
            hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=words, return_dict=False
        )[0]
        hook.remove()
        aside = model["masks"](features[0], covers[:, None])
    return F.mse_loss(output.float(), eps - x), aside


def export(folder: Path, transformer: Any, text: TextEncoder, vae: AutoencoderKLWan) -> Path:
    """Save a `WanPipeline` in float16."""
    pipe = WanPipeline(
        tokenizer=text.tokenizer,  # type: ignore[arg-type]
        text_encoder=text.umt5,
        vae=vae,
        scheduler=components.make_scheduler(),  # type: ignore[arg-type]
        transformer=transformer,
    )
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    return folder
