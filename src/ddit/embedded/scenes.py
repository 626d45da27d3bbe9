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
        """Eight in ten prompts train, one tunes, one judges; decided by the words alone."""
        digit = int(hashlib.sha256(self.prompt.encode()).hexdigest(), 16) % 10
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
    picture = _background(scene.background, x, y, rng)
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
    ink = _hsv(COLOURS[thing.colour] + rng.uniform(-6, 6), rng.uniform(0.8, 0.95), rng.uniform(0.8, 0.95))
    u, v = _rotate(x - cx, y - cy, angle)
    shadow = rng.uniform(2.5, 4.5)
    su, sv = _rotate(x - cx + shadow * np.cos(light), y - cy + shadow * np.sin(light), angle)
    dark = 0.45 * np.clip(0.5 - _distance(thing.shape, su, sv, radius) / 3, 0, 1)
    cover = np.clip(0.5 - _distance(thing.shape, u, v, radius), 0, 1)[..., None]
    picture = picture * (1 - dark[..., None]) * (1 - cover) + _texture(thing.texture, ink, u, v, rng) * cover
    return picture, cover[..., 0]


def _rotate(x, y, angle: float):
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def _distance(shape: str, u, v, r: float):
    """Signed distance in pixels to the outline, negative inside (exact or a lower bound near it)."""
    if shape == "circle":
        return np.hypot(u, v) - r
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.86 * r
    if shape == "triangle":
        sides = [u * np.sin(a) - v * np.cos(a) for a in np.deg2rad([60, 180, 300])]
        return np.maximum.reduce(sides) - 0.6 * r
    if shape == "cross":
        arm, reach = 0.3 * r, r
        across = np.maximum(abs(u) - reach, abs(v) - arm)
        return np.minimum(across, np.maximum(abs(u) - arm, abs(v) - reach))
    # Star: fold the plane into one of ten half-points, then the distance to a single edge.
    sector = np.pi / 5
    theta = np.arctan2(u, -v)
    folded = abs((theta + sector) % (2 * sector) - sector)
    rho = np.hypot(u, v)
    tip = np.array([1.1 * r, 0.0])
    inner = 0.5 * r * np.array([np.cos(sector), np.sin(sector)])
    edge = inner - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (rho * np.cos(folded) - tip[0]) * normal[0] + (rho * np.sin(folded) - tip[1]) * normal[1]


def _texture(name: str, ink, u, v, rng: np.random.Generator):
    """Colour inside an object, ``[H, W, 3]``; ``u, v`` are the object's own axes in pixels."""
    pale, deep = 0.25 * ink + 0.75, 0.35 * ink
    pu, pv = rng.uniform(0, 20, 2)
    if name == "plain":
        return np.broadcast_to(ink, (*u.shape, 3))
    if name == "striped":
        period = rng.uniform(9, 11)
        mask = _wave((u if rng.random() < 0.5 else v) + pu, period)
        return _mix(ink, deep, mask)
    if name == "dotted":
        period = rng.uniform(8.5, 10)
        du, dv = ((a + p) % period - period / 2 for a, p in ((u, pu), (v, pv)))
        return _mix(ink, pale, np.clip(0.5 + 2.5 - np.hypot(du, dv), 0, 1))
    period = rng.uniform(5, 5.6)  # hatched: thin crossed lines
    a, b = _rotate(u, v, np.pi / 4)
    lines = np.maximum(*(np.clip(1.3 - abs((c + p) % period - period / 2), 0, 1) for c, p in ((a, pu), (b, pv))))
    return _mix(ink, deep, lines)


def _background(name: str, x, y, rng: np.random.Generator):
    """Muted background, ``[H, W, 3]``."""
    hue, value = rng.uniform(0, 360), rng.uniform(0.4, 0.75)
    one = _hsv(hue, rng.uniform(0.05, 0.2), value)
    step = rng.uniform(0.12, 0.2) * (1 if value < 0.55 else -1)
    two = _hsv(hue + rng.uniform(-40, 40), rng.uniform(0.05, 0.2), value + step)
    if name == "smooth":
        angle = rng.uniform(0, 2 * np.pi)
        return _mix(one, two, 0.5 + (_rotate(x - 64, y - 64, angle)[0]) / 181)
    if name == "brick":
        px, py = rng.uniform(0, 24), rng.uniform(0, 24)
        row = np.floor((y + py) / 12)
        inside_y, inside_x = (y + py) % 12, (x + px + 12 * (row % 2)) % 24
        return _mix(one, two, np.clip(1.6 - np.minimum(inside_y, inside_x), 0, 1))
    if name == "grainy":
        grain = rng.normal(size=(IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
        grain = sum(np.roll(grain, s, axis=(0, 1)) for s in ((0, 0), (0, 1), (1, 0), (1, 1))) / 2
        return _mix(one, two, 0.5 + 0.4 * grain)
    angle, period, bend = rng.uniform(0, np.pi), rng.uniform(13, 17), rng.uniform(2, 4)
    u, v = _rotate(x, y, angle)
    return _mix(one, two, 0.5 + 0.5 * np.sin(2 * np.pi * (u + bend * np.sin(v / 9)) / period + rng.uniform(0, 6.28)))


def _wave(t, period: float):
    """Stripes of equal width with edges one pixel wide, in [0, 1]."""
    return np.clip(0.5 + abs((t % period) - period / 2) - period / 4, 0, 1)


def _mix(one, two, mask):
    return one + (two - one) * mask[..., None]


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour ``[3]`` in [0, 1] from hue in degrees."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)
