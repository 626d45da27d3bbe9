"""Drawings on disk: rendered once, then read by every stage of the training."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ddit.embedded.scenes import IMAGE_SIZE, Scene, Split, complete, draw_with_masks, scenes
from ddit.files import replacing

MASK_SIZE = 64
"""Height and width of the masks that are kept."""


def drawings(seed: int, split: Split, **grammar: float) -> Iterator[tuple[Scene, Scene, np.ndarray]]:
    """Endless (scene as asked, scene as drawn, picture ``[128, 128, 3]`` uint8), the same for the same seed."""
    for scene, drawn, picture, _ in _masked_drawings(seed, split, **grammar):
        yield scene, drawn, picture


def _masked_drawings(
    seed: int, split: Split, **grammar: float
) -> Iterator[tuple[Scene, Scene, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng([seed, 1])
    for scene in scenes(seed, split, **grammar):
        drawn = complete(scene, rng)
        yield scene, drawn, *draw_with_masks(drawn, rng)


def _draw_shard(seed: int, count: int) -> dict[str, np.ndarray]:
    prompts, pictures = [], np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    masks = np.empty((count, 2, MASK_SIZE, MASK_SIZE), np.uint8)
    pool = IMAGE_SIZE // MASK_SIZE
    for i, (scene, _, picture, covers) in enumerate(islice(_masked_drawings(seed, "train"), count)):
        prompts.append(scene.prompt)
        pictures[i] = picture
        pooled = covers.reshape(2, MASK_SIZE, pool, MASK_SIZE, pool).mean((2, 4))
        masks[i] = (pooled * 255).round().astype(np.uint8)
    return {"prompts": np.array(prompts), "pictures": pictures, "masks": masks}


def cached_drawings(folder: Path, *, count: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Prompts, pictures ``[count, 128, 128, 3]`` and masks ``[count, 2, 64, 64]`` (uint8, what each thing covers)."""
    arrays = cached_shards(folder, "masked", _draw_shard, count=count, seed=seed)
    return arrays["prompts"].tolist(), arrays["pictures"], arrays["masks"]


def cached_shards(
    folder: Path,
    name: str,
    make: Callable[[int, int], dict[str, np.ndarray]],
    *,
    count: int,
    seed: int,
    shard: int = 1000,
    workers: int = 2,
) -> dict[str, np.ndarray]:
    """Arrays of ``count`` entries, made shard by shard in several processes; shards already on disk are kept.

    Args:
        folder: Where shards are kept.
        name: First word of their file names.
        make: Called with a seed and a number of entries, at the top level of a module.
        count: Number of entries.
        seed: Of the whole; each shard has one of its own.
        shard: Entries per file.
        workers: Processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard = min(shard, count)
    paths = [folder / f"{name}-{i:03d}.npz" for i in range(-(-count // shard))]
    missing = [(make, path, seed * 1_000_003 + i, shard) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pool.starmap(_make_shard, missing, chunksize=1)
    shards = [dict(np.load(path)) for path in paths]
    return {key: np.concatenate([s[key] for s in shards])[:count] for key in shards[0]}


def _make_shard(make: Callable[[int, int], dict[str, np.ndarray]], path: Path, seed: int, count: int) -> None:
    arrays: dict[str, Any] = make(seed, count)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
