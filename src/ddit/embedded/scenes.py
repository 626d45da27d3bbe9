"""The grammar of prompts, and what a drawing of one settles.

A prompt names one to three objects (shape, colour, texture) and a background, in few cases also sizes and a place or
relation. All else is left open and decided by the drawing: places, sizes, poses, small things around, light, tones.
Prompts are split by a hash of their words: those used for training, for tuning and for judging never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

IMAGE_SIZE = 128
"""Height and width of a drawing in pixels."""
MOST = 3
"""Largest number of objects in a scene."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "cross", "flower")
COLOURS: dict[str, float] = {"red": 0.0, "orange": 27.0, "yellow": 56.0, "green": 130.0, "blue": 215.0, "purple": 285.0}
"""Colour -> hue in degrees."""
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("meadow", "desert", "sea", "sky", "night", "brick")
SIZES: dict[str, tuple[float, float]] = {"small": (22.0, 27.0), "large": (32.0, 38.0)}
"""Size -> range of the radius in pixels."""
RADII = {1: (26.0, 40.0), 2: (23.0, 34.0), 3: (20.0, 26.0)}
"""Number of objects -> the same where no size is named."""
SLOTS = {1: [(0.0, 0.0)], 2: [(-30.0, 0.0), (30.0, 0.0)], 3: [(-30.0, -26.0), (30.0, -26.0), (0.0, 28.0)]}
"""Number of objects -> about where they lie (x, y) from the middle of the picture: turned and mirrored at random."""
JITTER = {1: 14.0, 2: 6.0, 3: 5.0}
"""Number of objects -> how far they may lie from there, along each axis."""
PLACES: dict[str, tuple[str, tuple[float, float]]] = {
    "left": ("on the left", (-1, 0)),
    "right": ("on the right", (1, 0)),
    "top": ("at the top", (0, -1)),
    "bottom": ("at the bottom", (0, 1)),
}
"""Place of a lone object -> its words, direction (x, y) from the middle of the picture."""
RELATIONS: dict[str, tuple[float, float]] = {"left of": (-1, 0), "above": (0, -1)}
"""Relation of the first of two objects to the second -> direction (x, y) from the second to the first."""
APART = 14.0
"""Least distance in pixels along the direction that a place or relation names."""

Split = Literal["train", "tune", "judge"]


@dataclass(frozen=True)
class Thing:
    """An object as a prompt names it; ``size`` is None where it is left open."""

    shape: str
    colour: str
    texture: str
    size: str | None = None

    @property
    def words(self) -> str:
        return " ".join(w for w in ("a", self.size, self.texture, self.colour, self.shape) if w)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for."""

    things: tuple[Thing, ...]
    background: str
    layout: str | None = None
    """Key of `PLACES` for one object, of `RELATIONS` for two, or None where it is left open."""

    @property
    def prompt(self) -> str:
        first, *others = (thing.words for thing in self.things)
        if self.layout in PLACES:
            first += f" {PLACES[self.layout][0]}"
        joint = f" {self.layout} " if self.layout in RELATIONS else " and "
        return joint.join([first, *others]) + f" on a {self.background} background"

    @property
    def split(self) -> Split:
        return split_of(self.prompt)


def split_of(prompt: str) -> Split:
    """Eight in ten prompts train, one tunes, one judges; decided by the words alone."""
    digit = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
    return "judge" if digit == 0 else "tune" if digit == 1 else "train"


def parse(prompt: str) -> Scene:
    """The scene of a prompt; a `ValueError` where the grammar has no such prompt."""
    text = prompt
    for background in BACKGROUNDS:
        text = text.removesuffix(f" on a {background} background")
        if text != prompt:
            break
    layout = None
    for place, (words, _) in PLACES.items():
        if text.endswith(f" {words}"):
            layout, text = place, text.removesuffix(f" {words}")
    for relation in RELATIONS:
        if f" {relation} " in text:
            layout, text = relation, text.replace(f" {relation} ", " and ")
    scene = Scene(tuple(parse_thing(part) for part in text.split(" and ")), background, layout)
    if scene.prompt != prompt:
        raise ValueError(f"the grammar has no prompt {prompt!r}")
    return scene


def parse_thing(text: str) -> Thing:
    """The object of its words; a `ValueError` where the grammar has no such object."""
    _, *size, texture, colour, shape = text.split() if len(text.split()) in (4, 5) else [""] * 4
    known = shape in SHAPES and colour in COLOURS and texture in TEXTURES and all(s in SIZES for s in size)
    if not known:
        raise ValueError(f"{text!r} is no object of the grammar, which is: a [size] texture colour shape")
    return Thing(shape, colour, texture, *size)


def vocabulary() -> list[str]:
    """Every word the grammar uses, in a fixed order."""
    words = ["a", "and", "on", "the", "at", "of", "above", "background"]
    return list(dict.fromkeys([*words, *COLOURS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *PLACES]))


def random_scene(rng: np.random.Generator, *, told: float = 0.15) -> Scene:
    """Draw a scene; ``told`` is the chance that sizes are named, and that a place or relation is."""

    def pick(options) -> str:
        return str(rng.choice(list(options)))

    count = int(rng.choice([1, 2, 3], p=[0.5, 0.4, 0.1]))
    shapes = rng.permutation(SHAPES)[:count]
    things = tuple(Thing(str(shape), pick(COLOURS), pick(TEXTURES)) for shape in shapes)
    if count < MOST and rng.random() < told:
        things = tuple(replace(thing, size=pick(SIZES)) for thing in things)
    layouts = {1: PLACES, 2: RELATIONS}.get(count)
    layout = pick(layouts) if layouts and rng.random() < told else None
    return Scene(things, pick(BACKGROUNDS), layout)


def scenes(seed: int, split: Split, *, told: float = 0.15) -> Iterator[Scene]:
    """Endless scenes of one split, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, told=told)
        if scene.split == split:
            yield scene


def arrange(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Centres and radii ``[objects, 3]`` (x, y, r) in pixels: what the scene names holds, all else is random.

    Objects lie near slots, so that even small models learn their outlines; they stay inside and overlap little.
    """
    count = len(scene.things)
    while True:
        radii = np.array([rng.uniform(*(SIZES[t.size] if t.size else RADII[count])) for t in scene.things])
        slots = rng.permutation(SLOTS[count]) * rng.choice([-1, 1], 2)
        spots = IMAGE_SIZE / 2 + slots[:, :: int(rng.choice([-1, 1]))]
        spots += rng.uniform(-JITTER[count], JITTER[count], spots.shape)
        if scene.layout in PLACES:
            spots += rng.uniform(16, 26) * np.array(PLACES[scene.layout][1])
        inside = np.clip(spots, radii[:, None] + 1, IMAGE_SIZE - 1 - radii[:, None])
        arranged = np.column_stack([inside, radii])
        if _as_told(scene, arranged):
            return arranged


def _as_told(scene: Scene, spots: np.ndarray) -> bool:
    if scene.layout is None:
        return True
    return reach(scene.layout, spots) >= APART


def reach(layout: str, spots: np.ndarray) -> float:
    """How far in pixels, along the direction a layout names, the first of ``spots`` ``[N, 2+]`` (x, y) lies."""
    if layout in PLACES:
        return float((spots[0, :2] - IMAGE_SIZE / 2) @ np.array(PLACES[layout][1]))
    return float((spots[0, :2] - spots[1, :2]) @ np.array(RELATIONS[layout]))
