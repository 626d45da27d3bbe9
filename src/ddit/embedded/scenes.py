"""Pictures the project draws itself: a grammar of prompts, and a renderer that draws what a prompt asks for.

A prompt names one object or two (colour, shape, size, texture, place or relation) and a background. What it
does not name is drawn at random: the exact place, rotation, hue, texture phase, light, shadow and the
background's tones. Prompts are split by a hash of their words, so that those used for training, for tuning and
for judging never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ddit.embedded.drawing import background, hsv, stamp

IMAGE_SIZE = 128
"""Height and width in pixels of a drawing."""

COLOURS: dict[str, float] = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 55.0,
    "green": 125.0,
    "blue": 220.0,
    "purple": 285.0,
}
"""Colour name -> hue in degrees."""
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (15.0, 17.0), "large": (23.0, 26.0)}
"""Size name -> range of the radius in pixels."""
TEXTURES = ("plain", "striped", "dotted", "hatched")
BACKGROUNDS = ("smooth", "brick", "grainy", "wavy")
PLACES: dict[str, tuple[str, tuple[float, float]]] = {
    "left": ("on the left", (34.0, 64.0)),
    "right": ("on the right", (94.0, 64.0)),
    "top": ("at the top", (64.0, 34.0)),
    "bottom": ("at the bottom", (64.0, 94.0)),
    "center": ("in the center", (64.0, 64.0)),
}
"""Place -> words in the prompt, centre (x, y) in pixels."""
RELATIONS: dict[str, tuple[str, str]] = {"left of": ("left", "right"), "above": ("top", "bottom")}
"""Relation -> place of the first object, place of the second."""

Split = Literal["train", "tune", "judge"]


@dataclass(frozen=True)
class Thing:
    """One object. ``None`` means that the prompt does not say."""

    shape: str
    colour: str
    size: str | None
    texture: str | None
    place: str | None

    def words(self) -> str:
        adjectives = [w for w in (self.size, self.texture, self.colour) if w]
        return " ".join(["a", *adjectives, self.shape])


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one object or two, and a background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def prompt(self) -> str:
        first = self.things[0]
        if len(self.things) == 1:
            place = f" {PLACES[first.place][0]}" if first.place else ""
            return f"{first.words()}{place} on a {self.background} background"
        relation = next(r for r, places in RELATIONS.items() if places[0] == first.place)
        return f"{first.words()} {relation} {self.things[1].words()} on a {self.background} background"

    @property
    def split(self) -> Split:
        return split_of(self.prompt)


def split_of(prompt: str) -> Split:
    """Eight in ten prompts train, one tunes, one judges; decided by the words alone."""
    digit = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
    return "judge" if digit == 0 else "tune" if digit == 1 else "train"


def named_places(prompt: str) -> tuple[str, ...]:
    """Places where a prompt says that there is something."""
    for relation, places in RELATIONS.items():
        if f" {relation} " in prompt:
            return places
    return tuple(place for place, (words, _) in PLACES.items() if f" {words} " in prompt)


def vocabulary() -> list[str]:
    """Every word the grammar can use, in a fixed order."""
    words = ["a", "on", "the", "at", "in", "of", "above", "background"]
    words += [*COLOURS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *PLACES]
    return list(dict.fromkeys(words))


def random_scene(rng: np.random.Generator, *, omit: float = 0.1, two: float = 0.4) -> Scene:
    """Draw a scene; ``omit`` is the chance that size, texture or place is left unsaid, ``two`` of two objects."""

    def pick(options) -> str:
        return str(rng.choice(list(options)))

    def maybe(options) -> str | None:
        value = pick(options)
        return None if rng.random() < omit else value

    def thing(place: str | None) -> Thing:
        return Thing(pick(SHAPES), pick(COLOURS), maybe(SIZES), maybe(TEXTURES), place)

    if rng.random() < two:
        first, second = RELATIONS[pick(RELATIONS)]
        things: tuple[Thing, ...] = (thing(first), thing(second))
    else:
        things = (thing(maybe(PLACES)),)
    return Scene(things, pick(BACKGROUNDS))


def scenes(seed: int, split: Split, *, omit: float = 0.1, two: float = 0.4) -> Iterator[Scene]:
    """Endless scenes of one split, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, omit=omit, two=two)
        if scene.split == split:
            yield scene


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """Settle at random what the scene leaves unsaid."""
    things = tuple(
        Thing(
            t.shape,
            t.colour,
            t.size or str(rng.choice(list(SIZES))),
            t.texture or str(rng.choice(TEXTURES)),
            t.place or str(rng.choice(list(PLACES))),
        )
        for t in scene.things
    )
    return Scene(things, scene.background)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: A complete scene (see `complete`).
        rng: Decides everything the scene does not fix.

    Returns:
        Picture ``[128, 128, 3]`` as uint8.
    """
    return draw_with_masks(scene, rng)[0]


def draw_with_masks(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As `draw`; also what each thing covers, ``[2, 128, 128]`` or more in [0, 1], in the prompt's order."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5
    light = rng.uniform(0, 2 * np.pi)
    shade = 1 + rng.uniform(0.05, 0.22) * ((x - 64) * np.cos(light) + (y - 64) * np.sin(light)) / 64
    picture = background(scene.background, x, y, rng)
    masks = np.zeros((max(2, len(scene.things)), IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for i, thing in enumerate(scene.things):
        picture, masks[i] = _place(thing, picture, x, y, light, rng)
        masks[:i] *= 1 - masks[i]
    return (np.clip(picture * shade[..., None], 0, 1) * 255).round().astype(np.uint8), masks


def _place(thing: Thing, picture, x, y, light: float, rng: np.random.Generator):
    assert thing.size and thing.texture and thing.place, "complete the scene before drawing it"
    cx, cy = PLACES[thing.place][1]
    cx, cy = cx + rng.uniform(-2, 2), cy + rng.uniform(-2, 2)
    radius = rng.uniform(*SIZES[thing.size])
    angle = rng.uniform(-0.1, 0.1)
    ink = hsv(COLOURS[thing.colour] + rng.uniform(-6, 6), rng.uniform(0.8, 0.95), rng.uniform(0.8, 0.95))
    shadow = rng.uniform(2.5, 4.5) * np.array([np.cos(light), np.sin(light)])
    return stamp(picture, thing.shape, thing.texture, ink, x - cx, y - cy, radius, angle, shadow, rng)
