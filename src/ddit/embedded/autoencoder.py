"""The autoencoder's training, and the drawings as its latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange, reduce
from torch import Tensor

from ddit.embedded import components
from ddit.embedded.config import RESOLUTIONS, TrainingConfig
from ddit.embedded.optim import fit
from ddit.embedded.scenes import IMAGE_SIZE
from ddit.files import replacing
from ddit.progress import progress


def train_vae(folder: Path, pictures: np.ndarray, config: TrainingConfig, device: str) -> AutoencoderKL:
    """Train on 64-pixel crops, see `equivariant_loss`; resumes from ``vae.pt`` beside the result."""
    if (folder / "config.json").exists():
        vae: Any = AutoencoderKL.from_pretrained(folder)
        return vae.to(device)
    torch.manual_seed(config.seed)
    vae = components.make_vae()
    vae.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        return equivariant_loss(vae, crops(pictures, rng, count=8, size=64).to(device), int(rng.choice([2, 4])), rng)

    fit(folder.with_suffix(".pt"), vae, [optimizer], loss, steps=config.vae_steps, seed=[config.seed, 2])
    some = crops(pictures, np.random.default_rng([config.seed, 2]), count=64, size=64)
    with torch.no_grad():
        z = vae.encode(some.to(device)).latent_dist.mean
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))
    vae.save_pretrained(folder)
    return vae


def equivariant_loss(
    vae: Any, x: Tensor, scale: int, rng: np.random.Generator, weight: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """Reconstruct pictures or clips ``[B, 3, ..., H, W]`` in [-1, 1] from latents, and pooled ones from pooled latents.

    The pooled half (pool the latents, decode, compare with the pooled picture) keeps the latent space equivariant
    to scale, as in EQ-VAE (arXiv 2502.09509), so that a small picture and a pooled large one look alike to the flow.

    Args:
        scale: That one pools by.
        weight: Of a pixel in the reconstruction.
    """
    small = pool(x, scale)
    torch.manual_seed(int(rng.integers(2**31)))
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    pooled = pool(z, scale)
    exact = reconstruction(vae.decode(z).sample.float(), x, weight)
    small_exact = reconstruction(vae.decode(pooled).sample.float(), small)
    alike = F.mse_loss(vae.encode(small).latent_dist.mean.float(), pooled.float())
    total = exact + 0.1 * small_exact + 0.05 * alike + 2e-4 * posterior.kl().mean() / z[0].numel()
    return total, {"exact": round(exact.item(), 5)}


def reconstruction(output: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of absolute and squared differences, with a weight per pixel."""
    difference = output - target
    return ((difference.abs() + difference.square()) * weight).mean()


def pool(x: Tensor, scale: int) -> Tensor:
    """Average pooling in space: ``[B, C, ..., H, W] -> [B, C, ..., H/s, W/s]``."""
    return reduce(x, "b c ... (h y) (w x) -> b c ... h w", "mean", y=scale, x=scale)


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
    shift, scaling = vae.config["shift_factor"], vae.config["scaling_factor"]

    def encode(batch: np.ndarray, size: int) -> Tensor:
        x = pool(to_model(batch).to(device), IMAGE_SIZE // size)
        z = (vae.encode(x).latent_dist.mean - shift) * scaling  # type: ignore[union-attr]
        return rearrange(z, "b c (h dy) (w dx) -> b (h w) (c dy dx)", dy=2, dx=2)

    return {s: cached_latents(folder / f"latents-{s}.npy", pictures, partial(encode, size=s)) for s in RESOLUTIONS}


def cached_latents(path: Path, drawn: np.ndarray, encode: Callable[[np.ndarray], Tensor]) -> np.ndarray:
    """What becomes of drawings, ten at a time, as float16: made once, then read from a file."""
    if not path.exists():
        batches = []
        with progress(path.stem, -(-len(drawn) // 10)) as advance:
            for batch in np.split(drawn, range(10, len(drawn), 10)):
                batches.append(encode(batch).half().cpu().numpy())
                advance()
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, np.concatenate(batches))
    return np.load(path, mmap_mode="r")
