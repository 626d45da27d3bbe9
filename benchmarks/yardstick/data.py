"""Drawings with their answers, made by several processes and kept in shards on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from benchmarks.yardstick.drawing import draw
from benchmarks.yardstick.scenes import IMAGE_SIZE, MOST, Scene, Split, scenes
from ddit.files import replacing

MASK_SIZE = 32
"""Height and width of the masks that are kept."""
SHARD = 500
"""Drawings in a file."""


@dataclass(frozen=True)
class Drawings:
    """N drawings in memory."""

    prompts: list[str]
    pictures: np.ndarray
    """``[N, 128, 128, 3]`` uint8"""
    masks: np.ndarray
    """``[N, 3, 32, 32]`` uint8: what each object covers, in the prompt's order"""
    spots: np.ndarray
    """``[N, 3, 3]`` (x, y, radius) in pixels, 0 where there is no object"""


def drawings(seed: int, split: Split) -> Iterator[tuple[Scene, np.ndarray, np.ndarray, np.ndarray]]:
    """Endless (scene, picture, masks, spots) as `draw` gives them, the same for the same seed."""
    rng = np.random.default_rng([seed, 1])
    for scene in scenes(seed, split):
        yield scene, *draw(scene, rng)


def cached_drawings(folder: Path, count: int, seed: int, workers: int) -> Drawings:
    """The first ``count`` drawings of training prompts; shards already on disk are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"drawings-{seed}-{i:04d}.npz" for i in range(-(-count // SHARD))]
    missing = [(path, seed * 1_000_003 + i) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"drawing {SHARD * len(missing)} pictures", flush=True)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(_make_shard, missing, chunksize=1)
    shards = [dict(np.load(path)) for path in paths]
    arrays = {key: np.concatenate([shard[key] for shard in shards])[:count] for key in shards[0]}
    return Drawings(arrays["prompts"].tolist(), arrays["pictures"], arrays["masks"], arrays["spots"])


def _make_shard(path: Path, seed: int) -> None:
    prompts, pictures = [], np.empty((SHARD, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    masks = np.empty((SHARD, MOST, MASK_SIZE, MASK_SIZE), np.uint8)
    spots = np.zeros((SHARD, MOST, 3), np.float32)
    pool = IMAGE_SIZE // MASK_SIZE
    for i, (scene, picture, covers, where) in enumerate(islice(drawings(seed, "train"), SHARD)):
        prompts.append(scene.prompt)
        pictures[i], spots[i, : len(where)] = picture, where
        pooled = covers.reshape(MOST, MASK_SIZE, pool, MASK_SIZE, pool).mean((2, 4))
        masks[i] = (pooled * 255).round().astype(np.uint8)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, prompts=np.array(prompts), pictures=pictures, masks=masks, spots=spots)


def to_model(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 ``[N, H, W, 3]`` -> float ``[N, 3, H, W]`` in [-1, 1]."""
    return rearrange(torch.from_numpy(pictures).to(device), "n h w c -> n c h w").float() / 127.5 - 1


def sheet(pictures: np.ndarray, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Pictures ``[N, H, W, 3]`` beside and below each other; N is a multiple of ``columns``."""
    framed = np.pad(pictures, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    return rearrange(framed, "(r c) h w k -> (r h) (c w) k", c=columns)
