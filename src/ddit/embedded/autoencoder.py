"""The autoencoder's training, and the drawings as its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from ddit.embedded import components
from ddit.embedded.config import RESOLUTIONS, TrainingConfig
from ddit.embedded.optim import set_lr, warm_cosine
from ddit.files import replacing
from ddit.progress import progress


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


def reconstruction(output: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of absolute and squared differences, with a weight per pixel."""
    difference = output - target
    return ((difference.abs() + difference.square()) * weight).mean()


def crops(pictures: np.ndarray, rng: np.random.Generator, *, count: int, size: int) -> Tensor:
    """Random crops ``[count, 3, size, size]`` in [-1, 1]."""
    height, width = pictures.shape[1:3]
    out = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        y, x = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
        out[i] = pictures[rng.integers(len(pictures)), y : y + size, x : x + size]
    return to_model(out)


def to_model(pictures: np.ndarray) -> Tensor:
    """uint8 ``[N, ..., H, W, 3]`` -> float ``[N, 3, ..., H, W]`` in [-1, 1]."""
    return rearrange(torch.from_numpy(pictures), "n ... c -> n c ...").float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(folder: Path, vae: AutoencoderKL, pictures: np.ndarray, device: str) -> dict[int, np.ndarray]:
    """Normalised latents of the pictures at every resolution, packed as FLUX packs them, cached as float16."""
    latents = {}
    shift, scaling = vae.config["shift_factor"], vae.config["scaling_factor"]
    for size in RESOLUTIONS:
        path = folder / f"latents-{size}.npy"
        if not path.exists():
            batches = []
            with progress(f"latents at {size}", -(-len(pictures) // 10)) as advance:
                for batch in np.split(pictures, range(10, len(pictures), 10)):
                    x = F.avg_pool2d(to_model(batch).to(device), 128 // size)
                    z = (vae.encode(x).latent_dist.mean - shift) * scaling  # type: ignore[union-attr]
                    packed = rearrange(z, "b c (h dy) (w dx) -> b (h w) (c dy dx)", dy=2, dx=2)
                    batches.append(packed.half().cpu().numpy())
                    advance()
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, np.concatenate(batches))
        latents[size] = np.load(path, mmap_mode="r")
    return latents
