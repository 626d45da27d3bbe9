"""Judges whether a clip shows what its prompt asked, and how steady it is.

The judge of pictures looks at every frame: what the object is, on the whole, and where it is in each, which tells how
it moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddit.embedded.clips import MOTIONS, Clip, direction
from ddit.embedded.judge import ANSWERS, CELL, RADIUS, WIDTHS, Judge, distances, enlarged, to_model
from ddit.embedded.scenes import BACKGROUNDS, IMAGE_SIZE

SLOW = 36.0
"""Pixels of the canvas that an object moves in all; half-way between slow and quick."""
SURE = 0.3
"""Confidence below which there is no object."""
BESIDE = ("flicker", "roughness")
"""In a verdict, but no part of adherence."""


@torch.no_grad()
def verdict(judge: Judge, frames: np.ndarray, asked: Clip) -> dict[str, float]:
    """What a clip ``[F, 96, 96, 3]`` uint8 got right of what was asked, 1 or 0 by attribute, and `BESIDE`.

    What a prompt leaves open is absent. Where a frame shows no object, nothing of the object is right.
    """
    maps, grounds = judge(enlarged(to_model(frames)))
    there, track, radius, told = seen(maps)
    right = {name: float(there and told[name] == getattr(asked.thing, name)) for name in ANSWERS}
    moved, speed = motion(track)
    right["motion"] = float(there and moved == asked.motion)
    if asked.speed:
        right["speed"] = float(there and speed == asked.speed)
    right["background"] = float(BACKGROUNDS[int(grounds.mean(0).argmax())] == asked.background)
    return {**right, "roughness": roughness(track), "flicker": flicker(frames, track, radius)}


def seen(maps: Tensor) -> tuple[bool, np.ndarray, float, dict[str, str]]:
    """The surest object of the judge's maps ``[F, 20, 32, 32]``.

    Returns:
        Whether it is in every frame; its centres ``[F, 2]`` (x, y) and mean radius in pixels of a picture; what it is.
    """
    heat = torch.sigmoid(maps[:, 0])
    best = heat.flatten(1).argmax(1)
    rows, columns = best // heat.shape[2], best % heat.shape[2]
    frames = torch.arange(len(maps))
    _, radius, *told = maps[frames, :, rows, columns].split(WIDTHS, dim=-1)
    names = {k: options[int(part.mean(0).argmax())] for (k, options), part in zip(ANSWERS.items(), told, strict=True)}
    there = bool((heat[frames, rows, columns] > SURE).all())
    return there, centres(heat, rows, columns), RADIUS * float(radius.mean()), names


def centres(heat: Tensor, rows: Tensor, columns: Tensor, reach: int = 2) -> np.ndarray:
    """Centres ``[F, 2]`` (x, y) of the heat ``[F, 32, 32]`` around its peaks, finer than a cell."""
    side = torch.arange(heat.shape[1])
    near = ((side[:, None] - rows[:, None, None]).abs() <= reach) & ((side - columns[:, None, None]).abs() <= reach)
    weight = heat * near
    total = weight.sum((1, 2))
    x, y = (weight.sum(1) * side).sum(1) / total, (weight.sum(2) * side).sum(1) / total
    return (CELL * (torch.stack([x, y], 1) + 0.5)).numpy()


def motion(track: np.ndarray) -> tuple[str, str]:
    """Motion and speed of a track ``[F, 2]``: the way in either half against that of every motion there is."""
    middle = len(track) // 2
    halves = np.concatenate([track[middle] - track[0], track[-1] - track[middle]])
    ways = {name: direction(name) for name in MOTIONS}
    kinds = {name: np.concatenate([way, way if name.startswith("moving") else -way]) for name, way in ways.items()}
    told = max(kinds, key=lambda name: float(halves @ kinds[name]))
    return told, "slowly" if np.linalg.norm(halves[:2]) + np.linalg.norm(halves[2:]) < SLOW else "quickly"


def roughness(track: np.ndarray) -> float:
    """Root mean square of the track's second differences in pixels, but for the turn half-way; 0 is smooth."""
    bends = np.delete(np.diff(track, 2, axis=0), len(track) // 2 - 1, axis=0)
    return float(np.sqrt((bends**2).sum(1).mean()))


def flicker(frames: np.ndarray, track: np.ndarray, radius: float) -> float:
    """Mean change from frame to frame, in grey levels of 255, where the object does not come near at any time.

    Args:
        frames: ``[F, H, W, 3]`` uint8.
        track: Centres ``[F, 2]`` (x, y), and the radius, in pixels of a picture.
    """
    scale = IMAGE_SIZE / frames.shape[1]
    y, x = (scale * (np.mgrid[0 : frames.shape[1], 0 : frames.shape[2]] + 0.5))[:, None]
    away = np.hypot(x - track[:, 0, None, None], y - track[:, 1, None, None]).min(0) > 1.25 * radius + 10
    change = abs(np.diff(frames.astype(np.float32), axis=0))
    return float(change[:, away].mean()) if away.any() else 0.0


@torch.no_grad()
def clip_features(judge: Judge, clips: Sequence[np.ndarray]) -> Tensor:
    """``[N, 131]`` of clips ``[F, 96, 96, 3]`` uint8, for the Fréchet distance.

    The mean of the frames' features, and the mean change in between, by which a clip that stands still is far.
    """
    rows = []
    for frames in clips:
        looks = judge.features(enlarged(to_model(frames))).mean(0)
        change = abs(np.diff(frames.astype(np.float32) / 255, axis=0)).mean((0, 1, 2))
        rows.append(torch.cat([looks, 10 * torch.from_numpy(change)]))
    return torch.stack(rows)


def clip_distances(judge: Judge, one: np.ndarray, two: np.ndarray) -> Tensor:
    """Mean over the frames of `Judge.distance` of clips ``[N, F, 96, 96, 3]`` uint8 each, ``[N]``."""
    frames = ((enlarged(to_model(a)), enlarged(to_model(b))) for a, b in zip(one, two, strict=True))
    return torch.stack([distances(judge, *pair).mean() for pair in frames])
