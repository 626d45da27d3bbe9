"""Train the embedded model: autoencoder, text encoders, then the flow transformer together with the text encoders.

Each stage writes into the run folder and is skipped when its result is there; the long ones also resume from
their last checkpoint. Everything follows from the seed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from einops import rearrange
from torch import Tensor, nn

from ddit.embedded import components
from ddit.embedded.data import cached_drawings
from ddit.embedded.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene, scenes
from ddit.progress import progress

RESOLUTIONS = (128, 64, 32)
"""Picture sizes in pixels the flow is trained at: 256, 64 and 16 image tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the whole training; saved beside the result."""

    pictures: int = 16_000
    """Number of drawings."""
    vae_steps: int = 3_000
    text_steps: int = 1_000
    flow_steps: int = 8_000
    batch: dict[int, int] | None = None
    """Batch size of each resolution; ``None`` is 24 at 128, 48 at 64 and 64 at 32 pixels."""
    early_mix: tuple[float, float, float] = (0.1, 0.7, 0.2)
    """Share of steps at 128, 64 and 32 pixels while words and layout are learnt."""
    late_mix: tuple[float, float, float] = (0.7, 0.22, 0.08)
    """The same, later on, while detail is learnt."""
    late_from: float = 0.3
    """Fraction of ``flow_steps`` after which ``late_mix`` holds."""
    lr: float = 1e-3
    """Learning rate of the flow (AdamW) after its warm-up."""
    decay_from: float = 0.8
    """Fraction of ``flow_steps`` after which the learning rate falls linearly to zero."""
    noise_mean: float = 0.2
    """Noise levels at 32 pixels are ``sigmoid(n)`` with ``n`` normal of this mean."""
    noise_std: float = 1.3
    """Deviation of ``n``."""
    mask_weight: float = 0.5
    """Weight of the masks' loss beside the flow's (see `train_flow`)."""
    ema: float = 0.998
    checkpoint_every: int = 200
    """Steps of the flow between two checkpoints."""
    unconditional: float = 0.1
    """Chance that a prompt is replaced by the empty one, which makes classifier-free guidance possible."""
    seed: int = 0
    start_from: str | None = None
    """Folder of a finished pipeline whose autoencoder is kept and whose weights the flow starts from."""

    @property
    def batches(self) -> dict[int, int]:
        return self.batch or {128: 24, 64: 48, 32: 64}


def train(folder: Path, config: TrainingConfig, device: str = "cpu") -> Path:
    """Run every stage that is not done yet; returns the folder of the finished pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(asdict(config), indent=2))
    if config.start_from and not (folder / "vae").exists():
        shutil.copytree(Path(config.start_from) / "vae", folder / "vae")
    prompts, pictures, masks = cached_drawings(folder / "drawings", count=config.pictures, seed=config.seed)
    vae = train_vae(folder / "vae", pictures, config, device)
    latents = encode_pictures(folder, vae, pictures, device)
    encoders = TextEncoders() if config.start_from else pretrain_text(folder / "text.pt", config, device)
    return train_flow(folder, prompts, latents, masks, encoders, vae, config, device)


# Autoencoder


def train_vae(folder: Path, pictures: np.ndarray, config: TrainingConfig, device: str) -> AutoencoderKL:
    """Train on 64-pixel crops; reconstruct full and pooled latents alike.

    The pooled half (pool the latents, decode, compare with the pooled picture) keeps the latent space equivariant
    to scale, as in EQ-VAE (arXiv 2502.09509), so that a small picture and a pooled large one look alike to the flow.
    """
    if (folder / "config.json").exists():
        vae: Any = AutoencoderKL.from_pretrained(folder)
        return vae.to(device)
    torch.manual_seed(config.seed)
    vae = components.make_vae()
    vae.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    rng = np.random.default_rng([config.seed, 2])
    with progress("autoencoder", config.vae_steps) as advance:
        for step in range(config.vae_steps):
            set_lr(optimizer, 2e-3 * warm_cosine(step, config.vae_steps))
            x = crops(pictures, rng, count=8, size=64).to(device)
            scale = int(rng.choice([2, 4]))
            small = F.avg_pool2d(x, scale)
            posterior = vae.encode(x).latent_dist  # type: ignore[union-attr]
            z = posterior.sample()
            pooled = F.avg_pool2d(z, scale)
            alike = F.mse_loss(vae.encode(small).latent_dist.mean, pooled)  # type: ignore[union-attr]
            loss = (
                reconstruction(vae.decode(z).sample, x)  # type: ignore[union-attr]
                + 0.1 * reconstruction(vae.decode(pooled).sample, small)  # type: ignore[union-attr]
                + 0.05 * alike
                + 2e-4 * posterior.kl().mean() / z[0].numel()
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            advance(loss=loss.item())
    vae.eval()
    with torch.no_grad():
        z = vae.encode(crops(pictures, rng, count=64, size=64).to(device)).latent_dist.mean  # type: ignore[union-attr]
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))
    vae.save_pretrained(folder)
    return vae


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(output, target) + F.mse_loss(output, target)


def crops(pictures: np.ndarray, rng: np.random.Generator, *, count: int, size: int) -> Tensor:
    """Random crops ``[count, 3, size, size]`` in [-1, 1]."""
    height, width = pictures.shape[1:3]
    out = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        y, x = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
        out[i] = pictures[rng.integers(len(pictures)), y : y + size, x : x + size]
    return to_model(out)


def to_model(pictures: np.ndarray) -> Tensor:
    """uint8 ``[N, H, W, 3]`` -> float ``[N, 3, H, W]`` in [-1, 1]."""
    return rearrange(torch.from_numpy(pictures), "n h w c -> n c h w").float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(folder: Path, vae: AutoencoderKL, pictures: np.ndarray, device: str) -> dict[int, np.ndarray]:
    """Normalised latents of the pictures at every resolution, packed as FLUX packs them, cached as float16."""
    latents = {}
    shift, scaling = vae.config["shift_factor"], vae.config["scaling_factor"]
    for size in RESOLUTIONS:
        path = folder / f"latents-{size}.npy"
        if not path.exists():
            batches = []
            with progress(f"latents at {size}", -(-len(pictures) // 50)) as advance:
                for batch in np.split(pictures, range(50, len(pictures), 50)):
                    x = F.avg_pool2d(to_model(batch).to(device), 128 // size)
                    z = (vae.encode(x).latent_dist.mean - shift) * scaling  # type: ignore[union-attr]
                    packed = rearrange(z, "b c (h dy) (w dx) -> b (h w) (c dy dx)", dy=2, dx=2)
                    batches.append(packed.half().cpu().numpy())
                    advance()
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, np.concatenate(batches))
            partial.replace(path)
        latents[size] = np.load(path, mmap_mode="r")
    return latents


# Text encoders


class TextEncoders(nn.Module):
    """CLIP and T5 under one roof, called as `FluxPipeline.encode_prompt` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = components.make_tokenizer()
        self.clip, self.t5 = components.make_text_encoders()

    def ids(self, prompts: list[str]) -> Tensor:
        return self.tokenizer(
            prompts,
            padding="max_length",
            max_length=components.TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, T]`` -> pooled ``[B, 128]``, tokens ``[B, T, 128]``."""
        return self.clip(ids).pooler_output, self.t5(ids)[0]


ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": (*SIZES, None),
    "texture": (*TEXTURES, None),
    "place": (*PLACES, None),
}


def pretrain_text(path: Path, config: TrainingConfig, device: str) -> TextEncoders:
    """Teach both encoders to parse: each noun's vector tells its object's attributes, the pooled vector tells all.

    Large models get such vectors from text they read elsewhere. Without this stage the flow spends most of its
    training on finding out which colour belongs to which object.
    """
    torch.manual_seed(config.seed + 1)
    encoders = TextEncoders().to(device)
    if path.exists():
        encoders.load_state_dict(torch.load(path, weights_only=True))
        return encoders
    classes = sum(map(len, ATTRIBUTES.values()))
    noun, whole = (
        nn.Linear(128, classes).to(device),
        nn.Linear(128, 2 * classes + len(BACKGROUNDS)).to(device),
    )
    modules = nn.ModuleList([encoders, noun, whole])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.95))
    source = scenes(config.seed + 2, "train")
    with progress("text encoders", config.text_steps) as advance:
        for step in range(config.text_steps):
            set_lr(optimizer, 2e-3 * warm_cosine(step, config.text_steps))
            batch = [next(source) for _ in range(128)]
            pooled, tokens = encoders(encoders.ids([s.prompt for s in batch]).to(device))
            loss = parse_loss(batch, noun(tokens), whole(pooled))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(loss=loss.item())
    torch.save(encoders.state_dict(), path)
    return encoders


def parse_loss(batch: list[Scene], nouns: Tensor, whole: Tensor) -> Tensor:
    """Cross-entropy of every attribute, read off each noun's logits ``[B, T, K]`` and the pooled ones ``[B, 2K+4]``."""
    rows, columns, targets, pooled = [], [], [], []
    width = nouns.shape[-1]
    for b, scene in enumerate(batch):
        words = scene.prompt.split()
        start = 0
        for i, thing in enumerate(scene.things):
            start = words.index(thing.shape, start) + 1
            rows.append(b)
            columns.append(start - 1)
            pooled.append(whole[b, i * width : (i + 1) * width])
            targets.append([options.index(getattr(thing, name)) for name, options in ATTRIBUTES.items()])
    logits = torch.cat([nouns[rows, columns], torch.stack(pooled)])
    answers = torch.tensor(targets * 2, device=logits.device)
    losses = [
        F.cross_entropy(part, answers[:, k])
        for k, part in enumerate(logits.split([len(o) for o in ATTRIBUTES.values()], dim=-1))
    ]
    ground = torch.tensor([BACKGROUNDS.index(s.background) for s in batch], device=logits.device)
    return torch.stack(losses).mean() + F.cross_entropy(whole[:, 2 * width :], ground)


# Flow


def train_flow(
    folder: Path,
    prompts: list[str],
    latents: dict[int, np.ndarray],
    masks: np.ndarray,
    encoders: TextEncoders,
    vae: AutoencoderKL,
    config: TrainingConfig,
    device: str,
) -> Path:
    """Flow matching on the latents, transformer and text encoders together; resumes from ``flow.pt``.

    A linear layer on half-way features also tells which thing covers what. Outlines are a small part of the flow's
    loss beside grain that nobody can predict; without this aid shapes were still unlearnt after 7,000 steps.
    """
    torch.manual_seed(config.seed + 3)
    model = nn.ModuleDict({"transformer": components.make_transformer(), "text": encoders, "masks": MaskHead()})
    model.to(device)
    if config.start_from:
        load_weights(model, config.start_from)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    ids = encoders.ids(prompts)
    empty = encoders.ids([""])
    checkpoint, log, first = folder / "flow.pt", folder / "flow.jsonl", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.time()
    with progress("flow", config.flow_steps, done=first) as advance:
        for step in range(first, config.flow_steps):
            # A generator per step: a resumed run draws what an uninterrupted one would have.
            rng = np.random.default_rng([config.seed, 4, step])
            late = step >= config.late_from * config.flow_steps
            size = int(rng.choice(RESOLUTIONS, p=config.late_mix if late else config.early_mix))
            pick = rng.integers(len(prompts), size=config.batches[size])
            x = torch.from_numpy(latents[size][np.sort(pick)].astype(np.float32)).to(device)
            words = ids[np.sort(pick)].clone()
            words[torch.from_numpy(rng.random(len(pick)) < config.unconditional)] = empty
            set_lr(optimizer, config.lr * trapezoid(step, config.flow_steps, config.decay_from))
            optimizer.zero_grad()
            # Pooling by s divides the noise by s: the same picture is as visible at a logit higher by log(s).
            mean = config.noise_mean + math.log(size / min(RESOLUTIONS))
            covers = torch.from_numpy(masks[np.sort(pick)]).to(device).float() / 255
            loss, aside = flow_loss(model, x, words.to(device), covers, mean, config.noise_std, rng)
            (loss + config.mask_weight * aside).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 1 - decay)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}; lower the learning rate")
            figures = {"loss": round(value, 5), "masks": round(aside.item(), 5)}
            advance(**figures, size=size)
            with log.open("a") as file:
                file.write(json.dumps({"step": step, "size": size, **figures}) + "\n")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.flow_steps:
                save_checkpoint(checkpoint, model, average, optimizer, step + 1)
                export(folder / "model", model, average, vae)
    print(f"flow: {config.flow_steps - first} steps in {(time.time() - started) / 60:.1f} minutes")
    return export(folder / "model", model, average, vae)


class MaskHead(nn.Module):
    """Which of two things covers each sixteenth of a token's area, read off the features of one block."""

    BLOCK = 1
    """Single block whose features are read: the fourth of six."""
    SIDE = 4

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, 2 * self.SIDE**2)

    def forward(self, features: Tensor, covers: Tensor) -> Tensor:
        """Cross-entropy of features ``[B, N, width]`` with masks ``[B, 2, 64, 64]``."""
        side = math.isqrt(features.shape[1])
        target = F.adaptive_avg_pool2d(covers, side * self.SIDE)
        target = rearrange(target, "b k (h y) (w x) -> b (h w) (k y x)", y=self.SIDE, x=self.SIDE)
        return F.binary_cross_entropy_with_logits(self.logits(self.norm(features)), target)


def flow_loss(
    model: nn.ModuleDict,
    x: Tensor,
    words: Tensor,
    covers: Tensor,
    mean: float,
    std: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Mean squared error to the velocity ``eps - x`` at logit-normal noise levels (SD3), and the masks' loss."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    sigma = torch.sigmoid(mean + std * torch.randn(len(x), generator=generator)).to(x.device)
    noisy = torch.lerp(x, eps, sigma[:, None, None])
    pooled, tokens = model["text"](words)
    transformer: Any = model["transformer"]
    features: list[Tensor] = []
    block = transformer.single_transformer_blocks[MaskHead.BLOCK]
    hook = block.register_forward_hook(lambda _, __, output: features.append(output[1]))
    output = transformer(
        hidden_states=noisy,
        timestep=sigma,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        img_ids=grid_ids(math.isqrt(x.shape[1])).to(x.device),
        txt_ids=torch.zeros(words.shape[1], 3, device=x.device),
        return_dict=False,
    )[0]
    hook.remove()
    return F.mse_loss(output, eps - x), model["masks"](features[0], covers)


def grid_ids(side: int) -> Tensor:
    """``[side * side, 3]`` positions (0, row, column), as `FluxPipeline` makes them."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None, :]
    return ids.reshape(-1, 3)


def save_checkpoint(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write beside the old checkpoint, then replace it, so that a kill at any moment leaves one that loads."""
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, partial)
    os.replace(partial, path)


def load_weights(model: nn.ModuleDict, source: str) -> None:
    """Weights of a pipeline that `export` saved."""
    pipe: Any = FluxPipeline.from_pretrained(source, dtype=torch.float32)
    text: Any = model["text"]
    for part, saved in (
        (model["transformer"], pipe.transformer),
        (text.clip, pipe.text_encoder),
        (text.t5, pipe.text_encoder_2),
    ):
        part.load_state_dict(saved.state_dict())


def export(folder: Path, model: nn.ModuleDict, average: dict[str, Tensor], vae: AutoencoderKL) -> Path:
    """Save the averaged weights as a `FluxPipeline` in float16."""
    current = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(average, strict=False)
    text: Any = model["text"]
    transformer: Any = model["transformer"]
    pipe = FluxPipeline(
        scheduler=components.make_scheduler(),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.tokenizer,
        transformer=transformer,
    )
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    pipe.to(dtype=torch.float32)
    model.load_state_dict(current, strict=False)
    return folder


# Shared pieces


def warm_cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trapezoid(step: int, steps: int, decay_from: float, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero from ``decay_from`` on."""
    return min(1.0, (step + 1) / warmup, (steps - step) / ((1 - decay_from) * steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
