"""A network that has only ever seen drawings finds objects in a picture, and tells what they are.

It judges pictures, and clips frame by frame (`clip_judge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from ddit.embedded.scenes import (
    APART,
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    reach,
)

JUDGE = Path(__file__).parent / "assets" / "judge" / "model.safetensors"
ANSWERS: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES}
"""What is told of every object -> the possible answers."""
WIDTHS = [1, 1, *map(len, ANSWERS.values())]
"""Channels of the map: is a centre here, radius, answers."""
CELL = 4
"""Side in pixels of a cell of the map."""
RADIUS = (SIZES["small"][1] + SIZES["large"][0]) / 2
"""Radius in pixels between small and large."""


class Judge(nn.Module):
    """A small U-shaped network: centres and answers on a map of 32 x 32 cells (after CenterNet, arXiv 1904.07850)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 24, 2), block(24, 48, 2), block(48, 48))
        self.mid = nn.Sequential(block(48, 96, 2), block(96, 96))
        self.low = nn.Sequential(block(96, 128, 2), block(128, 128), block(128, 128))
        self.up_mid, self.up_stem = nn.Conv2d(128, 96, 1), nn.Conv2d(96, 48, 1)
        self.join_mid, self.join_stem = block(96, 96), block(48, 64)
        self.out = nn.Sequential(block(64, 96), nn.Conv2d(96, sum(WIDTHS), 1))
        self.background = nn.Linear(128, len(BACKGROUNDS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures ``[B, 3, 128, 128]`` in [-1, 1] -> map ``[B, 20, 32, 32]``, background ``[B, 6]``."""
        stem, mid, low = self.maps(pictures)
        mid = self.join_mid(mid + self.up_mid(F.interpolate(low, scale_factor=2)))
        fine = self.join_stem(stem + self.up_stem(F.interpolate(mid, scale_factor=2)))
        return self.out(fine), self.background(low.mean((2, 3)))

    def maps(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at a quarter, an eighth and a sixteenth of the size."""
        stem = self.stem(pictures.contiguous(memory_format=torch.channels_last))
        mid = self.mid(stem)
        return stem, mid, self.low(mid)

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures ``[B, 3, 128, 128]`` -> ``[B, 128]``: the mean of the coarsest map."""
        return self.maps(pictures)[2].mean((2, 3))

    def distance(self, one: Tensor, two: Tensor) -> Tensor:
        """Perceptual distance of pictures ``[B, 3, 128, 128]`` each -> ``[B]``, 0 where they are alike.

        Squared differences of features of unit length, averaged over places, added up over the three maps, as LPIPS
        does with equal weights (arXiv 1801.03924).
        """
        pairs = zip(self.maps(one), self.maps(two), strict=True)
        parts = [(F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
        return torch.stack(parts).sum(0)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def load_judge(path: Path = JUDGE) -> Judge:
    """The judge that ships with ddit, or one from a file.

    Raises:
        ValueError: For a file that is missing, damaged or of another grammar.
    """
    judge = Judge()
    try:
        judge.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch each raise their own
        told = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"the judge in {path} can't be read ({told}); train it again with train-judge") from error
    return judge.float().eval()


def to_model(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 ``[N, (F,) H, W, 3]`` -> float ``[N, 3, (F,) H, W]`` in [-1, 1]."""
    return rearrange(torch.from_numpy(pictures).to(device), "n ... c -> n c ...").float() / 127.5 - 1


def enlarged(frames: Tensor) -> Tensor:
    """Frames ``[B, 3, h, w]`` of clips at the size of pictures."""
    return F.interpolate(frames, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=False)


# Judging


@dataclass(frozen=True)
class Found:
    """An object found in a picture."""

    x: float
    y: float
    radius: float
    told: dict[str, str]


@torch.no_grad()
def find(judge: Judge, pictures: Tensor, threshold: float = 0.3) -> list[tuple[list[Found], str]]:
    """Objects and background of each picture ``[B, 3, 128, 128]`` in [-1, 1]."""
    maps, grounds = judge(pictures)
    peaks = (F.max_pool2d(maps[:, :1], 5, 1, 2) == maps[:, :1])[:, 0] & (torch.sigmoid(maps[:, 0]) > threshold)
    result = []
    for b, peak in enumerate(peaks):
        found = []
        for row, column in peak.nonzero().tolist():
            _, radius, *told = maps[b, :, row, column].split(WIDTHS)
            names = {k: options[int(part.argmax())] for (k, options), part in zip(ANSWERS.items(), told, strict=True)}
            found.append(Found(CELL * (column + 0.5), CELL * (row + 0.5), RADIUS * float(radius), names))
        result.append((found, BACKGROUNDS[int(grounds[b].argmax())]))
    return result


def score(scene: Scene, found: list[Found], background: str) -> dict[str, float]:
    """Share of what a scene asks that is right, by attribute, objects paired with those found as suits best.

    An object that is not there has nothing right. ``count`` is 1 where as many were found as asked; ``layout`` is 1
    where the place or relation named holds. What a prompt leaves open is absent.
    """
    seats: list[Found | None] = [*found, *[None] * len(scene.things)]
    pairings = permutations(range(len(seats)), len(scene.things)) if len(found) < 7 else [range(len(scene.things))]
    best: dict[str, list[float]] = {}
    paired: list[Found | None] = []
    for pairing in pairings:
        pair = [seats[i] for i in pairing]
        right = _right(scene, pair)
        if not best or sum(map(sum, right.values())) > sum(map(sum, best.values())):
            best, paired = right, pair
    result = {name: float(np.mean(values)) for name, values in best.items()}
    if scene.layout:
        spots = np.array([[f.x, f.y] for f in paired if f is not None])
        result["layout"] = float(len(spots) == len(scene.things) and reach(scene.layout, spots) >= APART / 2)
    result["count"] = float(len(found) == len(scene.things))
    result["background"] = float(background == scene.background)
    return result


def _right(scene: Scene, paired: list[Found | None]) -> dict[str, list[float]]:
    right: dict[str, list[float]] = {}
    for thing, found in zip(scene.things, paired, strict=True):
        for name in ANSWERS:
            right.setdefault(name, []).append(float(found is not None and found.told[name] == getattr(thing, name)))
        if thing.size:
            size = None if found is None else list(SIZES)[int(found.radius > RADIUS)]
            right.setdefault("size", []).append(float(size == thing.size))
    return right


def verdicts(judge: Judge, pictures: Tensor, asked: Sequence[Scene], batch: int = 50) -> list[dict[str, float]]:
    """`score` of each picture ``[N, 3, 128, 128]``."""
    seen = [pair for start in range(0, len(pictures), batch) for pair in find(judge, pictures[start : start + batch])]
    return [score(scene, *pair) for scene, pair in zip(asked, seen, strict=True)]


@torch.no_grad()
def features(judge: Judge, pictures: Tensor, batch: int = 50) -> Tensor:
    """``[N, 128]`` of pictures ``[N, 3, 128, 128]``."""
    return torch.cat([judge.features(part) for part in pictures.split(batch)])


@torch.no_grad()
def distances(judge: Judge, one: Tensor, two: Tensor, batch: int = 50) -> Tensor:
    """`Judge.distance` of pictures ``[N, 3, 128, 128]`` each, ``[N]``."""
    return torch.cat([judge.distance(*pair) for pair in zip(one.split(batch), two.split(batch), strict=True)])
