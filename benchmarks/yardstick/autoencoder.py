"""The autoencoder's training, and the drawings as its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from benchmarks.yardstick import components
from benchmarks.yardstick.config import SIZES, Settings
from benchmarks.yardstick.data import to_model
from benchmarks.yardstick.fit import Deadline, Figures, Stage, cosine, fit, noise_from, precision
from ddit.files import replacing, replacing_folder


def train_vae(folder: Path, pictures: np.ndarray, settings: Settings, device: str, deadline: Deadline) -> Any:
    """Train on 64-pixel crops; reconstruct full and pooled latents alike.

    The pooled half (pool the latents, decode, compare with the pooled picture) keeps the latent space equivariant
    to scale, as in EQ-VAE (arXiv 2502.09509), so that a small picture and a pooled large one look alike to the flow.
    """
    if (folder / "vae" / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder / "vae").to(device, memory_format=torch.channels_last)
    torch.manual_seed(settings.seed)
    vae: Any = components.make_vae().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = max(8, settings.batch // 3)

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        x = crops(pictures, rng, count=batch, size=64).to(device)
        scale = int(rng.choice([2, 4]))
        with precision(device):
            return vae_loss(vae, x, scale, noise_from(rng, device)), {}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    fit(Stage("autoencoder", folder / "vae.pt", vae, [optimizer], loss, settings.vae_steps, cosine, 10), deadline)
    with torch.no_grad():
        z = vae.encode(crops(pictures, np.random.default_rng(0), count=64, size=64).to(device)).latent_dist.mean
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))
    with replacing_folder(folder / "vae") as partial:
        vae.save_pretrained(partial)
    return vae


def vae_loss(vae: Any, x: Tensor, scale: int, generator: torch.Generator) -> Tensor:
    """Reconstruction of pictures ``[B, 3, H, W]`` and of their pooled latents, likeness of the two, a little KL."""
    small = F.avg_pool2d(x, scale)
    posterior = vae.encode(x).latent_dist
    z = posterior.sample(generator)
    pooled = F.avg_pool2d(z, scale)
    alike = F.mse_loss(vae.encode(small).latent_dist.mean, pooled)
    whole = reconstruction(vae.decode(z).sample, x) + 0.1 * reconstruction(vae.decode(pooled).sample, small)
    return whole + 0.05 * alike + 2e-4 * posterior.kl().mean() / z[0].numel()


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared differences, and the absolute ones of neighbours, which keep edges sharp."""
    difference = output.float() - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.5 * edges


def crops(pictures: np.ndarray, rng: np.random.Generator, *, count: int, size: int) -> Tensor:
    """Random crops ``[count, 3, size, size]`` in [-1, 1]."""
    height, width = pictures.shape[1:3]
    out = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        y, x = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
        out[i] = pictures[rng.integers(len(pictures)), y : y + size, x : x + size]
    return to_model(out).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode(folder: Path, vae: Any, pictures: np.ndarray, size: int, device: str) -> np.ndarray:
    """Latents ``[N, tokens, 16]`` of the pictures at a size, normalised, packed as FLUX packs them, kept as float16."""
    path = folder / f"latents-{size}-{len(pictures)}.npy"
    if not path.exists():
        print(f"encoding at {size} pixels", flush=True)
        shift, scaling, batches = vae.config["shift_factor"], vae.config["scaling_factor"], []
        for start in range(0, len(pictures), 50):
            x = F.avg_pool2d(to_model(pictures[start : start + 50], device), max(SIZES) // size)
            x = x.contiguous(memory_format=torch.channels_last)
            z = (vae.encode(x).latent_dist.mean - shift) * scaling
            packed = rearrange(z, "b c (h dy) (w dx) -> b (h w) (c dy dx)", dy=2, dx=2)
            batches.append(packed.half().cpu().numpy())
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(batches))
    return np.load(path)
