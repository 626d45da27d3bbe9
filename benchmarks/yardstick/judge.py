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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.yardstick.clips import parse_clip
from benchmarks.yardstick.config import JudgeSettings
from benchmarks.yardstick.data import Clips, Drawings, to_model
from benchmarks.yardstick.fit import Deadline, Figures, Stage, cosine, fit, noise_from
from benchmarks.yardstick.scenes import (
    APART,
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    MOST,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    parse,
    reach,
)

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


# Training


def train_judge(
    folder: Path, drawn: Drawings, filmed: Clips, settings: JudgeSettings, device: str, deadline: Deadline
) -> Judge:
    """Train on drawings and frames of clips, disturbed a little; the weights go to ``judge.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed + 3)
    judge = Judge().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scenes = [parse(prompt) for prompt in drawn.prompts]
    scenes += [Scene((clip.thing,), clip.background) for clip in map(parse_clip, filmed.prompts)]
    answers, grounds = labels(scenes)
    few = settings.batch // 4

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        rows, more = (
            rng.integers(len(drawn.prompts), size=settings.batch - few),
            rng.integers(len(filmed.prompts), size=few),
        )
        times = rng.integers(filmed.frames.shape[1], size=few)
        x = torch.cat([to_model(drawn.pictures[rows], device), enlarged(to_model(filmed.frames[more, times], device))])
        places = np.zeros((few, MOST, 3), np.float32)
        places[:, 0] = filmed.spots[more, times]
        where = torch.from_numpy(np.concatenate([drawn.spots[rows], places])).to(device)
        both = np.concatenate([rows, len(drawn.prompts) + more])
        found = judge(disturb(x, noise_from(rng, device)))
        return judge_loss(*found, where, answers[both].to(device), grounds[both].to(device)), {}

    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    fit(Stage("judge", folder / "judge.pt", judge, [optimizer], loss, settings.steps, cosine, 30), deadline)
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, folder / "judge.safetensors")
    return judge


def enlarged(frames: Tensor) -> Tensor:
    """Frames ``[B, 3, h, w]`` of clips at the size of pictures."""
    return F.interpolate(frames, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=False)


def load_judge(folder: Path) -> Judge:
    """The one trained in a run's folder."""
    path = folder / "judge.safetensors"
    if not path.exists():
        raise SystemExit(f"no {path}; make it with train-judge")
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


def labels(asked: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Index of each answer ``[N, 3 objects, 3]``, -1 where there is no object, and of the background ``[N]``."""
    answers = torch.full((len(asked), MOST, len(ANSWERS)), -1)
    for i, scene in enumerate(asked):
        for j, thing in enumerate(scene.things):
            told = [options.index(getattr(thing, name)) for name, options in ANSWERS.items()]
            answers[i, j] = torch.tensor(told)
    return answers, torch.tensor([BACKGROUNDS.index(scene.background) for scene in asked])


def judge_loss(maps: Tensor, ground: Tensor, spots: Tensor, answers: Tensor, grounds: Tensor) -> Tensor:
    """Focal loss of the centres (CenterNet's), radius and answers at the centres, background."""
    grid = CELL * (torch.arange(IMAGE_SIZE // CELL, device=maps.device) + 0.5)
    x, y, r = spots[..., None, None].unbind(2)
    there = answers[..., 0] >= 0
    spread = (grid - x).square() + (grid[:, None] - y).square()
    heat = (torch.exp(-spread / (2 * (0.2 * r + 1).square())) * there[..., None, None]).amax(1)
    rows, slots = there.nonzero(as_tuple=True)
    column, row = ((spots[rows, slots, k] / CELL).long().clamp(0, 31) for k in (0, 1))
    heat[rows, row, column] = 1.0
    _, radius, *told = maps[rows, :, row, column].split(WIDTHS, dim=-1)
    p = torch.sigmoid(maps[:, 0]).clamp(1e-4, 1 - 1e-4)
    hit = (heat == 1).float()
    focal = hit * (1 - p).square() * p.log() + (1 - hit) * (1 - heat) ** 4 * p.square() * (1 - p).log()
    losses = [-focal.sum() / len(rows), F.smooth_l1_loss(radius[:, 0], spots[rows, slots, 2] / RADIUS)]
    losses += [F.cross_entropy(part, answers[rows, slots, k]) for k, part in enumerate(told)]
    return torch.stack([*losses, F.cross_entropy(ground, grounds)]).sum()


def disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Do to pictures ``[B, 3, H, W]`` a little of what generating them might: blur, tone, noise."""

    def uniform(low: float, high: float) -> Tensor:
        shape = (len(pictures), 1, 1, 1)
        return low + (high - low) * torch.rand(shape, generator=generator, device=pictures.device)

    blur, x = uniform(0, 0.25), pictures
    for dim in (2, 3):
        x = (1 - 2 * blur) * x + blur * (x.roll(1, dim) + x.roll(-1, dim))
    x = x * uniform(0.92, 1.08) + uniform(-0.06, 0.06)
    return x + uniform(0, 0.06) * torch.randn(x.shape, generator=generator, device=x.device)


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


def adherence(rows: Sequence[dict[str, float]]) -> dict[str, object]:
    """Mean share of what is asked that is right, in percent, its 95 % bootstrap interval, and by attribute."""
    each = np.array([np.mean(list(row.values())) for row in rows])
    draws = np.random.default_rng(0).integers(len(each), size=(2000, len(each)))
    low, high = np.quantile(each[draws].mean(1), [0.025, 0.975])
    by = {k: [row[k] for row in rows if k in row] for k in dict.fromkeys(k for row in rows for k in row)}
    mean = {k: round(100 * float(np.mean(v)), 2) for k, v in by.items() if v}
    return {"mean": round(100 * each.mean(), 2), "interval": [round(100 * low, 2), round(100 * high, 2)], **mean}


@torch.no_grad()
def features(judge: Judge, pictures: Tensor, batch: int = 50) -> Tensor:
    """``[N, 128]`` of pictures ``[N, 3, 128, 128]``."""
    return torch.cat([judge.features(part) for part in pictures.split(batch)])


def frechet(one: Tensor, two: Tensor) -> float:
    """Fréchet distance between the features ``[N, D]`` of two sets."""
    (mean_a, cov_a), (mean_b, cov_b) = ((f.mean(0), torch.cov(f.T)) for f in (one.double().cpu(), two.double().cpu()))
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
