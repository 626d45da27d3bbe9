"""Drawings and clips with their answers, made by several processes and kept in shards on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from einops import rearrange, reduce

from ddit.embedded.clips import CLIP_SIZE, clips, film
from ddit.embedded.drawing import drawings
from ddit.embedded.scenes import IMAGE_SIZE, MOST
from ddit.util.files import replacing

MASK_SIZE = 32
"""Height and width of the masks that are kept."""
SHARD = 500
"""Drawings or clips in a file."""


@dataclass(frozen=True)
class Drawn:
    """N drawings or clips in memory."""

    prompts: list[str]
    samples: np.ndarray
    """Pictures ``[N, 128, 128, 3]`` or clips ``[N, 9, 96, 96, 3]``, uint8"""
    masks: np.ndarray
    """``[N, K, 32, 32]`` uint8: what each of 3 objects covers, in the prompt's order; of clips, what the one object
    covers at the time of each of 5 frames of the latents"""
    spots: np.ndarray
    """``[N, 3, 3]`` (x, y, radius) in pixels, 0 where there is no object; of clips ``[N, 9, 3]`` on a canvas of 128"""


def cached_drawings(folder: Path, count: int, seed: int, workers: int) -> Drawn:
    """The first ``count`` drawings of training prompts; shards already on disk are kept."""
    return _cached(folder / f"drawings-{seed}", _draw_shard, count, seed, workers)


def cached_clips(folder: Path, count: int, seed: int, workers: int) -> Drawn:
    """The first ``count`` clips of training prompts; shards already on disk are kept."""
    return _cached(folder / f"clips-{CLIP_SIZE}-{seed}", _film_shard, count, seed, workers)


def _cached(stem: Path, make: Callable[[Path, int, int], None], count: int, seed: int, workers: int) -> Drawn:
    stem.parent.mkdir(parents=True, exist_ok=True)
    shard = min(SHARD, count)
    end = ".npz" if shard == SHARD else f"-{shard}.npz"
    paths = [stem.with_name(f"{stem.name}-{i:04d}{end}") for i in range(-(-count // shard))]
    missing = [(path, seed * 1_000_003 + i, shard) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"drawing {shard * len(missing)} {stem.name.split('-')[0]}", flush=True)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(make, missing, chunksize=1)
    shards = [dict(np.load(path)) for path in paths]
    arrays = {key: np.concatenate([shard[key] for shard in shards])[:count] for key in shards[0]}
    return Drawn(**{**arrays, "prompts": arrays["prompts"].tolist()})


def _film_shard(path: Path, seed: int, count: int) -> None:
    rng, prompts, made = np.random.default_rng([seed, 1]), [], []
    for clip in islice(clips(seed, "train"), count):
        frames, covers, spots = film(clip, rng)
        prompts.append(clip.prompt)
        made.append((frames, _at_latents(covers), spots.astype(np.float32)))
    frames, masks, spots = map(np.stack, zip(*made, strict=True))
    _save(path, prompts=np.array(prompts), samples=frames, masks=masks, spots=spots)


def _at_latents(covers: np.ndarray) -> np.ndarray:
    """``[9, 96, 96]`` in [0, 1] -> ``[5, 32, 32]`` uint8: a frame of latents is the first frame, then two each."""
    small = reduce(covers, "f (h a) (w b) -> f h w", "mean", h=MASK_SIZE, w=MASK_SIZE)
    joined = np.concatenate([small[:1], (small[1::2] + small[2::2]) / 2])
    return (255 * joined).round().astype(np.uint8)


def _draw_shard(path: Path, seed: int, count: int) -> None:
    prompts, pictures = [], np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    masks = np.empty((count, MOST, MASK_SIZE, MASK_SIZE), np.uint8)
    spots = np.zeros((count, MOST, 3), np.float32)
    for i, (scene, picture, covers, where) in enumerate(islice(drawings(seed, "train"), count)):
        prompts.append(scene.prompt)
        pictures[i], spots[i, : len(where)] = picture, where
        pooled = reduce(covers, "k (h a) (w b) -> k h w", "mean", h=MASK_SIZE, w=MASK_SIZE)
        masks[i] = (pooled * 255).round().astype(np.uint8)
    _save(path, prompts=np.array(prompts), samples=pictures, masks=masks, spots=spots)


def _save(path: Path, **arrays: np.ndarray) -> None:
    """Write a shard; trainings side by side may both draw it, and write the same."""
    with replacing(path, shared=True) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def sheet(pictures: np.ndarray, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Pictures ``[N, H, W, 3]`` beside and below each other; N is a multiple of ``columns``."""
    framed = np.pad(pictures, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    return rearrange(framed, "(r c) h w k -> (r h) (c w) k", c=columns)
