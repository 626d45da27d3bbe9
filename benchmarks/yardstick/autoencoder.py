"""The autoencoders' training, and drawings and clips as their latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from benchmarks.yardstick.config import Settings
from benchmarks.yardstick.fit import Deadline, Figures, Stage, cosine, fit, noise_from, precision
from ddit.embedded.judge import to_model
from ddit.util.files import replacing, replacing_folder


def train_vae(
    folder: Path,
    make: Callable[[], Any],
    samples: np.ndarray,
    settings: Settings,
    device: str,
    deadline: Deadline,
    *,
    side: int,
    spots: np.ndarray | None = None,
) -> Any:
    """Train on crops; reconstruct full and pooled latents alike.

    The pooled half (pool the latents, decode, compare with the pooled picture) keeps the latent space equivariant
    to scale, as in EQ-VAE (arXiv 2502.09509), so that a small picture and a pooled large one look alike to the flow.

    Args:
        make: Makes an untrained autoencoder.
        samples: Pictures ``[N, H, W, 3]`` or clips ``[N, F, H, W, 3]``, uint8.
        side: Of a crop in pixels.
        spots: Where an object is ``[N, 2]`` (x, y), for half of the crops to show; without, all are anywhere.
    """
    vae: Any = make()
    if (folder / "vae" / "config.json").exists():
        return type(vae).from_pretrained(folder / "vae").to(device)
    torch.manual_seed(settings.seed)
    vae = make().to(device)
    batch = max(8, settings.batch[-1] // 3)

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        x = to_model(crops(samples, rng, count=batch, side=side, spots=spots), device)
        scale = int(rng.choice([2, 4]))
        with precision(device):
            return vae_loss(vae, x, scale, noise_from(rng, device)), {}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    fit(Stage("autoencoder", folder / "vae.pt", vae, [optimizer], loss, settings.vae_steps, cosine, 10), deadline)
    with torch.no_grad():
        z = vae.encode(to_model(crops(samples, np.random.default_rng(0), count=64, side=side), device)).latent_dist.mean
    vae.register_to_config(**_statistics(z))
    with replacing_folder(folder / "vae") as partial:
        vae.save_pretrained(partial)
    return vae


def _statistics(z: Tensor) -> dict[str, Any]:
    """Mean and deviation of latents, as AutoencoderKL (pictures) and AutoencoderKLWan (clips) keep them."""
    if z.ndim == 4:
        return {"shift_factor": float(z.mean()), "scaling_factor": float(1 / z.std())}
    dims = (0, 2, 3, 4)
    return {"latents_mean": z.mean(dims).tolist(), "latents_std": z.std(dims).tolist()}


def normalised(z: Tensor, config: Any) -> Tensor:
    """Latents as the pipelines' transformers see them."""
    if z.ndim == 4:
        return (z - config["shift_factor"]) * config["scaling_factor"]
    mean, std = (torch.tensor(config[k], device=z.device)[:, None, None, None] for k in ("latents_mean", "latents_std"))
    return (z - mean) / std


def pool(x: Tensor, scale: int) -> Tensor:
    """Means of ``scale`` x ``scale`` pixels of pictures or clips ``[..., H, W]``."""
    return reduce(x, "... (h a) (w b) -> ... h w", "mean", a=scale, b=scale)


def vae_loss(vae: Any, x: Tensor, scale: int, generator: torch.Generator) -> Tensor:
    """Reconstruction of samples ``[B, 3, (F,) H, W]`` and of their pooled latents, likeness of the two, a little KL."""
    small = pool(x, scale)
    posterior = vae.encode(x).latent_dist
    z = posterior.sample(generator)
    pooled = pool(z, scale)
    alike = (vae.encode(small).latent_dist.mean - pooled).square().mean()
    whole = reconstruction(vae.decode(z).sample, x) + 0.1 * reconstruction(vae.decode(pooled).sample, small)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return whole + 0.05 * alike + 2e-4 * kl


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared differences, and the absolute ones of neighbours, which keep edges sharp."""
    difference = output.float() - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.5 * edges


def crops(
    samples: np.ndarray, rng: np.random.Generator, *, count: int, side: int, spots: np.ndarray | None = None
) -> np.ndarray:
    """Crops ``[count, (F,) side, side, 3]``; half of them around ``spots`` where these are given."""
    height, width = samples.shape[-3:-1]
    rows = rng.integers(len(samples), size=count)
    y, x = rng.integers(0, height - side + 1, count), rng.integers(0, width - side + 1, count)
    if spots is not None:
        near = rng.random(count) < 0.5
        places = (spots[rows] - side / 2 + rng.uniform(-side / 4, side / 4, (count, 2))).round().astype(int)
        x, y = (np.where(near, places[:, k].clip(0, most - side), o) for k, most, o in ((0, width, x), (1, height, y)))
    return np.stack([samples[r, ..., j : j + side, i : i + side, :] for r, j, i in zip(rows, y, x, strict=True)])


def resized(x: Tensor, size: int) -> Tensor:
    """Pictures or clips ``[B, 3, (F,) H, W]``, smaller; each pixel is the mean of those it covers."""
    return F.interpolate(x, (*x.shape[2:-2], size, size), mode="area")


@torch.no_grad()
def encode(folder: Path, vae: Any, samples: np.ndarray, size: int, device: str) -> np.ndarray:
    """Normalised latents of samples at a size, kept as float16.

    Pictures ``[N, H, W, 3]`` are packed as FLUX packs them, ``[N, tokens, 4 C]``; clips are ``[N, C, F, h, w]``.
    """
    path = folder / f"latents-{size}-{len(samples)}.npy"
    if not path.exists():
        print(f"encoding at {size} pixels", flush=True)
        batches, many = [], (50 if samples.ndim == 4 else 8) * (1 if device == "cpu" else 10)
        for start in range(0, len(samples), many):
            x = resized(to_model(samples[start : start + many], device), size)
            with precision(device):
                mean = vae.encode(x).latent_dist.mean.float()
            z = normalised(mean, vae.config)
            if z.ndim == 4:
                z = rearrange(z, "b c (h y) (w x) -> b (h w) (c y x)", y=2, x=2)
            batches.append(z.half().cpu().numpy())
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(batches))
    return np.load(path)
