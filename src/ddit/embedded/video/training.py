"""Train the embedded video model: autoencoder, text encoder, then the flow transformer.

Each stage writes into the run folder and is skipped when its result is there; the long ones also resume from their
last checkpoint. Everything follows from the seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from einops import rearrange
from torch import Tensor, nn

from ddit.embedded.autoencoder import reconstruction, to_model
from ddit.embedded.data import cached_shards
from ddit.embedded.optim import fit, make_optimizers, trapezoid, warm_cosine
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
from ddit.files import replacing
from ddit.progress import progress

SCALES = (1, 2, 4)
"""The flow is trained on latents of a clip, and on the same pooled."""
COVER = 32
"""Height and width of the masks of `where`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
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
    mix: tuple[float, float, float] = (0.9, 0.07, 0.03)
    """Share of the steps at each."""
    lr: float = 1.2e-3
    """Learning rate of the flow: Muon for the blocks' matrices, half of it in AdamW for the rest."""
    decay_from: float = 0.7
    """Fraction of ``flow_steps`` after which the learning rate falls linearly to zero."""
    noise_mean: float = 0.4
    """Noise levels at the largest of `SCALES` are ``sigmoid(n)`` with ``n`` normal of this mean."""
    noise_std: float = 1.3
    mask_weight: float = 2.0
    """Weight of the masks' loss beside the flow's (see `MaskHead`)."""
    unconditional: float = 0.1
    """Chance that a prompt is replaced by the empty one, for guidance."""
    ema: float = 0.995
    seed: int = 0


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


def pool(clip: Tensor, scale: int) -> Tensor:
    """Average pooling in space: ``[B, C, F, H, W] -> [B, C, F, H/s, W/s]``."""
    return clip if scale == 1 else F.avg_pool3d(clip, (1, scale, scale))


# Autoencoder


def train_vae(folder: Path, frames: np.ndarray, config: TrainingConfig) -> AutoencoderKLWan:
    """Reconstruct clips, and pooled clips from pooled latents, as for pictures (`ddit.embedded.autoencoder`)."""
    done = folder / "vae"
    if (done / "config.json").exists():
        saved: Any = AutoencoderKLWan.from_pretrained(done)
        return saved
    torch.manual_seed(config.seed)
    vae: Any = components.make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        drawn = frames[np.sort(rng.choice(len(frames), config.vae_batch, replace=False))]
        x, objects = to_model(drawn), torch.from_numpy(saturation(drawn.astype(np.float32) / 255))[:, None]
        weight = 1 + config.object_weight * objects
        weight = weight / weight.mean()
        scale = int(rng.choice(SCALES[1:]))
        small = pool(x, scale)
        torch.manual_seed(int(rng.integers(2**31)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample()
            pooled = pool(z, scale)
            again, smaller = vae.decode(z).sample.float(), vae.decode(pooled).sample.float()
            alike = F.mse_loss(vae.encode(small).latent_dist.mean.float(), pooled.float())
        exact = reconstruction(again, x, weight)
        total = exact + 0.1 * reconstruction(smaller, small) + 0.05 * alike
        return total + 2e-4 * posterior.kl().mean() / z[0].numel(), {"exact": round(exact.item(), 5)}

    def rates(step: int) -> Sequence[float]:
        return [1.5e-3 * warm_cosine(step, config.vae_steps)]

    fit("autoencoder", folder / "vae.pt", vae, [optimizer], rates, loss, steps=config.vae_steps, seed=config.seed)
    with torch.no_grad():
        z = torch.cat([vae.encode(to_model(frames[i : i + 8])).latent_dist.mean for i in range(0, 64, 8)])
    vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist())
    vae.save_pretrained(done)
    return vae


@torch.no_grad()
def encode(path: Path, vae: AutoencoderKLWan, frames: np.ndarray, batch: int = 10) -> np.ndarray:
    """Normalised latents ``[N, C, 5, 16, 16]`` of all clips, cached as float16."""
    if not path.exists():
        mean, std = (torch.tensor(vae.config[k])[:, None, None, None] for k in ("latents_mean", "latents_std"))
        parts = []
        with progress("latents", -(-len(frames) // batch)) as advance:
            for begin in range(0, len(frames), batch):
                z = vae.encode(to_model(frames[begin : begin + batch])).latent_dist.mean  # type: ignore[union-attr]
                parts.append(((z - mean) / std).half().numpy())
                advance()
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


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
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    source = clips(config.seed + 2, "train")
    known = list(islice(source, 20_000))

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        batch: list[Clip] = [known[i] for i in rng.integers(len(known), size=128)]
        ids, mask = text.tokens([clip.prompt for clip in batch])
        mean = text(ids, mask).sum(1) / mask.sum(1, keepdim=True)
        parts = [
            F.cross_entropy(heads[name](mean), torch.tensor([options.index(getattr(c, name)) for c in batch]))
            for name, options in ATTRIBUTES.items()
        ]
        return torch.stack(parts).mean(), {}

    def rates(step: int) -> Sequence[float]:
        return [1e-3 * warm_cosine(step, config.text_steps)]

    fit("text encoder", folder / "text.pt", model, [optimizer], rates, loss, steps=config.text_steps, seed=config.seed)
    return text


# Flow


class MaskHead(nn.Module):
    """Where the object is, read off the features of one block: without this aid outlines are learnt late."""

    BLOCK = 3
    """The fourth of six."""
    SIDE = 4
    """A token's area is told in as many rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, self.SIDE**2)

    def forward(self, features: Tensor, covers: Tensor, side: int) -> Tensor:
        """Cross-entropy of features ``[B, F side side, width]`` with masks ``[B, F, 32, 32]``."""
        target = F.adaptive_avg_pool2d(covers, side * self.SIDE)
        target = rearrange(target, "b f (h y) (w x) -> b (f h w) (y x)", y=self.SIDE, x=self.SIDE)
        return F.binary_cross_entropy_with_logits(self.logits(self.norm(features)), target)


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
    model = nn.ModuleDict({"transformer": transformer, "masks": MaskHead(width)})
    with torch.no_grad():
        told = torch.cat([text(*text.tokens(prompts[i : i + 500])) for i in range(0, len(prompts), 500)])
        empty = text(*text.tokens([""]))

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        which = int(rng.choice(len(SCALES), p=config.mix))
        pick = np.sort(rng.choice(len(prompts), config.batches[which], replace=False))
        x = pool(torch.from_numpy(latents[pick].astype(np.float32)), SCALES[which])
        words = told[pick].clone()
        words[torch.from_numpy(rng.random(len(pick)) < config.unconditional)] = empty
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        # Pooling by s divides the noise by s: the same clip is as visible at a logit higher by log(s).
        mean = config.noise_mean + math.log(max(SCALES) / SCALES[which])
        sigma = torch.sigmoid(mean + config.noise_std * torch.randn(len(x), generator=generator))
        eps = torch.randn(x.shape, generator=generator)
        noisy = torch.lerp(x, eps, sigma.reshape(-1, 1, 1, 1, 1))
        features: list[Tensor] = []
        hook = transformer.blocks[MaskHead.BLOCK].register_forward_hook(lambda _, __, out: features.append(out))
        with torch.autocast("cpu", torch.bfloat16):
            output = transformer(
                hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=words, return_dict=False
            )[0]
            hook.remove()
            aside = model["masks"](features[0], torch.from_numpy(covers[pick]).float() / 255, x.shape[-1] // 2)
        flow = F.mse_loss(output.float(), eps - x)
        figures = {"flow": round(flow.item(), 5), "masks": round(aside.item(), 5), "scale": SCALES[which]}
        return flow + config.mask_weight * aside, figures

    def rates(step: int) -> Sequence[float]:
        rate = config.lr * trapezoid(step, config.flow_steps, config.decay_from)
        return [rate, rate / 2]

    average = fit(
        "flow",
        folder / "flow.pt",
        model,
        make_optimizers(model),
        rates,
        loss,
        steps=config.flow_steps,
        seed=config.seed,
        ema=config.ema,
    )
    model.load_state_dict(average, strict=False)
    return export(folder / "model", transformer, text, vae)


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
    pipe.to(dtype=torch.float32)
    return folder
