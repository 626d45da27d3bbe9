"""Drawings on disk: rendered once, then read by every stage of the training."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ddit.embedded.scenes import IMAGE_SIZE, Scene, Split, complete, draw, scenes


def drawings(seed: int, split: Split, **grammar: float) -> Iterator[tuple[Scene, Scene, np.ndarray]]:
    """Endless (scene as asked, scene as drawn, picture ``[128, 128, 3]`` uint8), the same for the same seed."""
    rng = np.random.default_rng([seed, 1])
    for scene in scenes(seed, split, **grammar):
        drawn = complete(scene, rng)
        yield scene, drawn, draw(drawn, rng)


def _draw_shard(path: Path, seed: int, count: int) -> None:
    prompts, pictures = [], np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i, (scene, _, picture) in enumerate(islice(drawings(seed, "train"), count)):
        prompts.append(scene.prompt)
        pictures[i] = picture
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, prompts=np.array(prompts), pictures=pictures)
    partial.replace(path)


def cached_drawings(
    folder: Path, *, count: int, seed: int = 0, shard: int = 1000, workers: int = 2
) -> tuple[list[str], np.ndarray]:
    """Prompts and pictures ``[count, 128, 128, 3]`` for training; shards already on disk are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = min(shard, count)
    paths = [folder / f"drawings-{i:03d}.npz" for i in range(-(-count // shard))]
    missing = [(path, seed * 1_000_003 + i, shard) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pool.starmap(_draw_shard, missing, chunksize=1)
    prompts: list[str] = []
    pictures = []
    for path in paths:
        with np.load(path) as data:
            prompts += data["prompts"].tolist()
            pictures.append(data["pictures"])
    return prompts[:count], np.concatenate(pictures)[:count]
