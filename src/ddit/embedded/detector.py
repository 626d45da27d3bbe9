"""Judges whether a picture shows what its prompt asked: a small network that has only ever seen drawings.

It looks at the five places a prompt can name and answers, for each, whether something is there and what it
is; and it names the background. It is never trained on generated pictures, so it favours no model or method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ddit.embedded.autoencoder import to_model
from ddit.embedded.data import cached_shards, drawings
from ddit.embedded.judging import Residual, disturb, halve, load_judge, save_judge, through
from ddit.embedded.optim import fit
from ddit.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    draw,
)

ANSWERS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
"""What is told of a thing -> the possible answers."""
ATTRIBUTES = (*ANSWERS, "place", "background")
"""Everything `judge` looks at."""
SLOTS = tuple(PLACES)
ASSETS = Path(__file__).parent / "assets" / "detector"
CELL, WINDOW = 16, 4
"""Side in pixels of a cell of the feature map; side in cells of the window around a place."""


@dataclass(frozen=True)
class Findings:
    """Logits for a batch of B pictures; S = 5 places in the order of `SLOTS`."""

    occupied: Tensor
    """``[B, S]``, positive where there is something."""
    things: dict[str, Tensor]
    """Attribute -> ``[B, S, number of answers]``; means something only where a place is occupied."""
    background: Tensor
    """``[B, 4]``"""


class Detector(nn.Module):
    """A convolutional trunk, and one head shared by all places that reads a window of the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            halve(3, 16, kernel=5),
            halve(16, 32),
            Residual(32),
            halve(32, 64),
            Residual(64),
            halve(64, 64),
        )
        answers = sum(map(len, ANSWERS.values()))
        self.slot = nn.Sequential(
            nn.Flatten(-3), nn.Linear(64 * WINDOW**2, 128), nn.ReLU(), nn.Linear(128, 1 + answers)
        )
        self.background = nn.Linear(64, len(BACKGROUNDS))

    def forward(self, pictures: Tensor) -> Findings:
        """Pictures ``[B, 3, 128, 128]`` in [-1, 1] -> `Findings`."""
        maps = self._maps(pictures)
        slots = self.slot(torch.stack([_window(maps, place) for place in SLOTS], dim=1))
        occupied, *things = slots.split([1, *map(len, ANSWERS.values())], dim=-1)
        background = self.background(maps.mean((2, 3)))
        return Findings(occupied[..., 0], dict(zip(ANSWERS, things, strict=True)), background)

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures ``[B, 3, 128, 128]`` in [-1, 1] -> ``[B, 64]``: the mean of the map all answers use."""
        return self._maps(pictures).mean((2, 3))

    def _maps(self, pictures: Tensor) -> Tensor:
        """``[B, 3, 128, 128]`` -> ``[B, 64, 8, 8]``"""
        if pictures.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"pictures are {tuple(pictures.shape)}, expected [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}]")
        return self.trunk(pictures.contiguous(memory_format=torch.channels_last))


def _window(maps: Tensor, place: str) -> Tensor:
    """The part ``[B, C, 4, 4]`` of the map ``[B, C, 8, 8]`` around a place."""
    x, y = (round(centre / CELL) - WINDOW // 2 for centre in PLACES[place][1])
    return maps[:, :, y : y + WINDOW, x : x + WINDOW]


# Judging


@torch.no_grad()
def judge(detector: Detector, pictures: Tensor, scenes: list[Scene]) -> list[dict[str, float]]:
    """What each picture ``[B, 3, 128, 128]`` in [-1, 1] got right of what its scene asked, by attribute.

    Shape, colour, size and texture are the fraction of the scene's things that have what was asked; each
    thing is looked for at its place, or where the detector is surest of seeing one if no place was asked. A
    thing that is not there has nothing right. Place is 1 if exactly the places asked for are occupied, else
    0. What the prompt leaves unsaid is absent.
    """
    if len(pictures) != len(scenes):
        raise ValueError(f"{len(pictures)} pictures but {len(scenes)} scenes; give one scene for each picture")
    found = detector(pictures)
    return [_judge_one(found, b, scene) for b, scene in enumerate(scenes)]


def _judge_one(found: Findings, b: int, scene: Scene) -> dict[str, float]:
    there = {slot for slot, logit in zip(SLOTS, found.occupied[b], strict=True) if logit > 0}
    surest = SLOTS[int(found.occupied[b].argmax())]
    right: dict[str, list[float]] = {}
    for thing in scene.things:
        slot = thing.place or surest
        for name, answers in ANSWERS.items():
            asked = getattr(thing, name)
            if asked is not None:
                answer = answers[int(found.things[name][b, SLOTS.index(slot)].argmax())]
                right.setdefault(name, []).append(float(slot in there and answer == asked))
    fractions = {name: float(np.mean(values)) for name, values in right.items()}
    if all(thing.place for thing in scene.things):
        fractions["place"] = float(there == {thing.place for thing in scene.things})
    fractions["background"] = float(BACKGROUNDS[int(found.background[b].argmax())] == scene.background)
    return fractions


def evaluate_detector(detector: Detector, count: int, seed: int, vae: AutoencoderKL | None = None) -> dict:
    """Share of right answers by attribute on ``count`` drawings, of judging prompts and never trained on.

    With ``vae``, also on the same drawings encoded and decoded: what is lost there, no model that generates
    through this autoencoder can show.
    """
    detector.eval()
    rows: dict[str, list[dict[str, float]]] = {"drawn": [], "autoencoded": []}
    source = islice(drawings(seed, "judge"), count)
    while batch := list(islice(source, 50)):
        scenes = [drawn for _, drawn, _ in batch]
        pictures = to_model(np.stack([picture for _, _, picture in batch]))
        rows["drawn"] += judge(detector, pictures, scenes)
        if vae is not None:
            rows["autoencoded"] += judge(detector, through(vae, pictures), scenes)
    accuracy = {
        name: {k: round(float(np.mean([row[k] for row in judged])), 4) for k in ATTRIBUTES}
        for name, judged in rows.items()
        if judged
    }
    return {
        "count": count,
        "seed": seed,
        "split": "judge",
        "date": date.today().isoformat(),
        "accuracy": accuracy,
    }


# Loading and saving


def load_detector(folder: Path = ASSETS) -> Detector:
    """The detector that ships with the package, or one from ``folder``."""
    return load_judge(Detector(), folder, lambda config: config["answers"] == _answers())


def save_detector(detector: Detector, folder: Path, training: dict[str, float]) -> None:
    """Write float16 weights, the words they stand for and how they were trained."""
    save_judge(detector, folder, {"answers": _answers(), "training": training})


def _answers() -> dict[str, list[str]]:
    """Every answer the network can give, in the order of its outputs."""
    return {**{k: list(v) for k, v in ANSWERS.items()}, "place": list(SLOTS), "background": list(BACKGROUNDS)}


# Training


def train_detector(
    folder: Path,
    *,
    pictures: int = 10_000,
    steps: int = 2_000,
    batch: int = 40,
    lr: float = 3e-3,
    seed: int = 10,
) -> Detector:
    """Train on drawings of training prompts and of crowds; resumes from ``detector.pt`` in ``folder``.

    The result is in ``folder / "model"``, ready for `load_detector`.
    """
    drawn, slots, grounds = labelled_drawings(folder / "labelled", count=pictures, seed=seed)
    torch.manual_seed(seed)
    detector = Detector().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr, weight_decay=0.02)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = rng.integers(len(drawn), size=batch)
        x = disturb(to_model(drawn[pick]), torch.Generator().manual_seed(int(rng.integers(2**62))))
        return detector_loss(detector(x), torch.from_numpy(slots[pick]), torch.from_numpy(grounds[pick])), {}

    fit(folder / "detector.pt", detector, [optimizer], loss, steps=steps, seed=[seed, 2], clip=math.inf)
    settings = {"pictures": pictures, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
    save_detector(detector, folder / "model", settings)
    return detector


def detector_loss(found: Findings, slots: Tensor, grounds: Tensor) -> Tensor:
    """Cross-entropy of every answer, of a thing's attributes only where there is one.

    Args:
        found: Logits for B pictures.
        slots: Right answers ``[B, S, 4]`` by attribute, -1 where a place is empty.
        grounds: Right backgrounds ``[B]``.
    """
    occupied = slots[..., 0] >= 0
    losses = [F.cross_entropy(found.things[name][occupied], slots[..., k][occupied]) for k, name in enumerate(ANSWERS)]
    losses.append(F.binary_cross_entropy_with_logits(found.occupied, occupied.float()))
    losses.append(F.cross_entropy(found.background, grounds))
    return torch.stack(losses).mean()


def crowd(rng: np.random.Generator) -> Scene:
    """A scene no prompt asks for: three or four things, or none.

    With these among the drawings the detector looks at every place on its own, instead of learning which
    places the grammar fills together; a generated picture may show too much or nothing.
    """
    places = rng.permutation(SLOTS)[: rng.choice([0, 3, 4])]
    sizes = ["small"] if "center" in places else list(SIZES)  # large ones would hide what is in the center

    def thing(place: str) -> Thing:
        shape, colour, size, texture = (str(rng.choice(o)) for o in (SHAPES, list(COLOURS), sizes, TEXTURES))
        return Thing(shape, colour, size, texture, place)

    return Scene(tuple(thing(str(place)) for place in places), str(rng.choice(BACKGROUNDS)))


def labels(scene: Scene) -> np.ndarray:
    """What is where in a complete scene, ``[S, 4]``: the index of each answer, -1 where a place is empty."""
    slots = np.full((len(SLOTS), len(ANSWERS)), -1)
    for thing in scene.things:
        slots[SLOTS.index(str(thing.place))] = [answers.index(getattr(thing, k)) for k, answers in ANSWERS.items()]
    return slots


def _labelled(seed: int) -> Iterator[tuple[np.ndarray, Scene]]:
    """Endless pictures with the complete scene they show; four in ten are crowds."""
    rng = np.random.default_rng([seed, 3])
    source = drawings(seed, "train")
    while True:
        if rng.random() < 0.4:
            scene = crowd(rng)
            yield draw(scene, rng), scene
        else:
            _, scene, picture = next(source)
            yield picture, scene


def _draw_shard(seed: int, count: int) -> dict[str, np.ndarray]:
    pictures, scenes = zip(*islice(_labelled(seed), count), strict=True)
    return {
        "pictures": np.stack(pictures),
        "slots": np.stack([labels(scene) for scene in scenes]),
        "grounds": np.array([BACKGROUNDS.index(scene.background) for scene in scenes]),
    }


def labelled_drawings(folder: Path, *, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures ``[N, 128, 128, 3]``, `labels` ``[N, S, 4]``, backgrounds ``[N]``; made once, then read."""
    arrays = cached_shards(folder, "labelled", _draw_shard, count=count, seed=seed)
    return arrays["pictures"], arrays["slots"], arrays["grounds"]
