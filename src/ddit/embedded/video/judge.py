"""Judges whether a clip shows what its prompt asked, and how steady it is.

Where the object is, and so how it moves, follows from its colours by arithmetic: objects are saturated, backgrounds are
not. Shape, colour, texture and background are told by a small network that has only ever seen drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddit.embedded import ASSETS
from ddit.embedded.autoencoder import to_model
from ddit.embedded.data import cached_shards
from ddit.embedded.judging import Residual, disturb, halve, load_judge, save_judge, through
from ddit.embedded.optim import fit
from ddit.embedded.scenes import COLOURS
from ddit.embedded.video.clips import (
    BACKGROUNDS,
    DIRECTIONS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIDES,
    SIZE,
    TEXTURES,
    Clip,
    clips,
    complete,
    film,
)

FOLDER = ASSETS / "video-detector"
LOOKS: dict[str, tuple[str, ...]] = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "texture": TEXTURES}
"""What is told of an object by its looks -> the possible answers."""
ATTRIBUTES = (*LOOKS, "motion", "speed", "background")
"""Everything `judge` looks at."""
CROP = 32
"""Height and width in pixels of what is seen of an object."""
LEAST = 20.0
"""Fewer saturated pixels than this are no object; the smallest one has about 100."""
SLOW = 36 / 2
"""Pixels that an object moves in all; half-way between slow and quick."""


# Motion


def saturation(clip: np.ndarray) -> np.ndarray:
    """How surely each pixel belongs to an object, in [0, 1]: ``[..., H, W, 3]`` in [0, 1] -> ``[..., H, W]``."""
    high, low = clip.max(-1), clip.min(-1)
    return np.clip(((high - low) / np.maximum(high, 1e-3) - 0.35) / 0.3, 0, 1)


def centres(clip: np.ndarray) -> np.ndarray | None:
    """Where the object is in each frame ``[F, 2]`` (x, y) in pixels, or ``None`` where a frame has none.

    Args:
        clip: ``[F, H, W, 3]`` in [0, 1].
    """
    weight = saturation(clip)
    mass = weight.sum((1, 2))
    if mass.min() < LEAST:
        return None
    y, x = np.mgrid[0 : clip.shape[1], 0 : clip.shape[2]] + 0.5
    return np.stack([(weight * axis).sum((1, 2)) / mass for axis in (x, y)], axis=1)


def motion(track: np.ndarray) -> tuple[str, str]:
    """Motion and speed of a track ``[F, 2]``: the way in either half against that of every motion there is."""
    middle = len(track) // 2
    halves = np.concatenate([track[middle] - track[0], track[-1] - track[middle]])
    kinds = {}
    for name in MOTIONS:
        last = name.split()[-1]
        way = np.array(DIRECTIONS[SIDES.get(last, last)])
        kinds[name] = np.concatenate([way, way if name.startswith("moving") else -way])
    told = max(kinds, key=lambda name: float(halves @ kinds[name]))
    return told, "slowly" if np.linalg.norm(halves[:2]) + np.linalg.norm(halves[2:]) < SLOW else "quickly"


def roughness(track: np.ndarray) -> float:
    """Root mean square of the track's second differences in pixels, but for the turn half-way; 0 is smooth."""
    bends = np.diff(track, 2, axis=0)
    bends = np.delete(bends, len(track) // 2 - 1, axis=0)
    return float(np.sqrt((bends**2).sum(1).mean()))


def flicker(clip: np.ndarray) -> float:
    """Mean change from frame to frame, in grey levels of 255, where no object comes near at any time."""
    near = F.max_pool2d(torch.from_numpy(saturation(clip).max(0))[None], 9, 1, 4)[0].numpy()
    still = near < 0.05
    return float(255 * abs(np.diff(clip, axis=0))[:, still].mean()) if still.any() else 0.0


# Looks


class Detector(nn.Module):
    """Looks of an object from the 32 x 32 pixels around it, and the background from the whole frame."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(halve(3, 24, 5), halve(24, 48), Residual(48), halve(48, 64), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(64 * 16, 96), nn.ReLU())
        self.answers = nn.Linear(96, sum(map(len, LOOKS.values())))
        self.far = nn.Sequential(halve(3, 16, 5), halve(16, 32), Residual(32), halve(32, 32))
        self.background = nn.Linear(32, len(BACKGROUNDS))

    def forward(self, crops: Tensor, frames: Tensor) -> dict[str, Tensor]:
        """Crops ``[B, 3, 32, 32]`` and frames ``[B, 3, 64, 64]`` in [-1, 1] -> attribute -> logits ``[B, answers]``."""
        parts = self.answers(self.hidden(self.near(crops))).split([len(v) for v in LOOKS.values()], dim=-1)
        return {**dict(zip(LOOKS, parts, strict=True)), "background": self.background(self.far(frames).mean((2, 3)))}

    def features(self, crops: Tensor, frames: Tensor) -> Tensor:
        """``[B, 128]``: what the answers are read off, for the Fréchet distance."""
        return torch.cat([self.hidden(self.near(crops)), self.far(frames).mean((2, 3))], dim=1)


def crop(frame: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The 32 x 32 pixels around a place, within ``[H, W, 3]``."""
    x, y = (int(np.clip(round(c) - CROP // 2, 0, SIZE - CROP)) for c in centre)
    return frame[y : y + CROP, x : x + CROP]


def seen(clip: np.ndarray, track: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Crops and frames of the first, middle and last frame, for `Detector`; without a track, of the middle."""
    chosen = [0, len(clip) // 2, len(clip) - 1]
    whole = (clip[chosen] * 255).round().astype(np.uint8)
    places = track[chosen] if track is not None else np.full((3, 2), SIZE / 2)
    near = np.stack([crop(frame, place) for frame, place in zip(whole, places, strict=True)])
    return to_model(near), to_model(whole)


@torch.no_grad()
def judge(detector: Detector, drawn: np.ndarray, asked: Sequence[Clip]) -> list[dict[str, float]]:
    """What each clip got right of what was asked, 1 or 0 by attribute, with ``roughness`` and ``flicker`` beside.

    What a prompt leaves unsaid is absent. Where a frame shows no object, nothing of the object is right, and there is
    no ``roughness``.

    Args:
        drawn: ``[N, F, 64, 64, 3]`` in [0, 1].
    """
    rows = []
    for clip, want in zip(drawn, asked, strict=True):
        track = centres(clip)
        answers = {k: v.mean(0).argmax().item() for k, v in detector(*seen(clip, track)).items()}
        found = {name: options[int(answers[name])] for name, options in LOOKS.items()}
        if track is not None:
            found["motion"], found["speed"] = motion(track)
        row = {
            name: float(track is not None and found[name] == getattr(want, name))
            for name in ATTRIBUTES
            if name != "background" and getattr(want, name) is not None
        }
        row["background"] = float(BACKGROUNDS[int(answers["background"])] == want.background)
        row["flicker"] = flicker(clip)
        if track is not None:
            row["roughness"] = roughness(track)
        rows.append(row)
    return rows


@torch.no_grad()
def features(detector: Detector, drawn: np.ndarray) -> Tensor:
    """``[N, 131]``: looks at three times, and the mean change in between, by which a clip that stands still is far."""
    rows = []
    for clip in drawn:
        looks = detector.features(*seen(clip, centres(clip))).mean(0)
        change = torch.from_numpy(abs(np.diff(clip, axis=0)).mean((0, 1, 2))).float()
        rows.append(torch.cat([looks, 10 * change]))
    return torch.stack(rows)


# Loading and training


def load_detector(folder: Path = FOLDER) -> Detector:
    """The detector that ships with the package, or one from ``folder``."""
    return load_judge(Detector(), folder, lambda config: config == _answers())


def _answers() -> dict[str, list[str]]:
    return {**{k: list(v) for k, v in LOOKS.items()}, "background": list(BACKGROUNDS)}


def train_detector(
    folder: Path, *, count: int = 6_000, steps: int = 1_500, batch: int = 64, seed: int = 10
) -> Detector:
    """Train on frames of drawings of training prompts; the result is in ``folder / "model"``."""
    data = cached_shards(folder / "frames", "frames", _draw_shard, count=count, seed=seed, shard=500)
    torch.manual_seed(seed)
    detector = Detector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3, weight_decay=0.02)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = rng.integers(count, size=batch)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        frames = disturb(to_model(data["frames"][pick]), generator)
        shaken = data["centres"][pick] + rng.uniform(-2, 2, (batch, 2))
        near = torch.stack([_cut(frame, centre) for frame, centre in zip(frames, shaken, strict=True)])
        found = detector(near, frames)
        labels = torch.from_numpy(data["labels"][pick])
        return torch.stack([F.cross_entropy(v, labels[:, k]) for k, v in enumerate(found.values())]).mean(), {}

    fit(folder / "detector.pt", detector, [optimizer], loss, steps=steps, seed=[seed])
    save_judge(detector, folder / "model", _answers())
    return detector


def _cut(frame: Tensor, centre: np.ndarray) -> Tensor:
    """`crop` of a frame ``[3, H, W]``."""
    return torch.from_numpy(crop(frame.permute(1, 2, 0).numpy(), centre).copy()).permute(2, 0, 1)


def _draw_shard(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    frames, places, labels = [], [], []
    for clip in islice(clips(seed, "train"), count):
        full = complete(clip, rng)
        drawn, covers = film(full, rng, [int(rng.integers(FRAMES))])
        y, x = np.nonzero(covers[0] > 127)
        frames.append(drawn[0])
        places.append([x.mean() + 0.5, y.mean() + 0.5])
        looks = [options.index(getattr(full, name)) for name, options in LOOKS.items()]
        labels.append([*looks, BACKGROUNDS.index(full.background)])
    return {"frames": np.stack(frames), "centres": np.array(places), "labels": np.array(labels)}


def check(
    detector: Detector, count: int = 200, seed: int = 500, vae: Any = None, batch: int = 8
) -> dict[str, dict[str, float]]:
    """Share of right answers by attribute on drawings of judging prompts, with their flicker and roughness.

    With ``vae``, also on the same drawings encoded and decoded (see `ddit.embedded.detector.evaluate_detector`).
    """
    rng = np.random.default_rng([seed, 1])
    asked = [complete(clip, rng) for clip in islice(clips(seed, "judge"), count)]
    drawn = np.stack([film(clip, rng)[0] for clip in asked])
    seen = {"drawn": drawn.astype(np.float32) / 255}
    if vae is not None:
        parts = [through(vae, to_model(part)) for part in np.array_split(drawn, -(-count // batch))]
        seen["autoencoded"] = rearrange((torch.cat(parts) + 1) / 2, "n c ... -> n ... c").numpy()
    rows = {name: judge(detector, shown, asked) for name, shown in seen.items()}
    names = (*ATTRIBUTES, "flicker", "roughness")
    return {k: {n: float(np.mean([row[n] for row in v if n in row])) for n in names} for k, v in rows.items()}
