"""Clips: a grammar of prompts for one object in motion, and a renderer that draws what a prompt asks for.

Objects, backgrounds and small things are those of the pictures. Where the object starts, its pose, light, tones and
all that lies around are left open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from ddit.embedded import scenes
from ddit.embedded.backdrops import backdrop
from ddit.embedded.drawing import clutter, lit, stamp
from ddit.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    TEXTURES,
    Split,
    Thing,
    parse_thing,
    split_of,
)

FRAMES = 9
CLIP_SIZE = 96
"""Height and width in pixels of a clip; it is drawn on a canvas of 128 and made smaller."""
RADII = (22.0, 28.0)
"""Range of an object's radius in pixels of the canvas."""
GRAIN = 1.6
"""How much coarser textures are than in pictures, as a clip has fewer pixels for them."""
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Name -> (x, y), downwards positive."""
SIDES = {"left": "left", "right": "right", "top": "up", "bottom": "down"}
"""Side of the frame -> direction towards it."""
MOTIONS = (*(f"moving {name}" for name in DIRECTIONS), *(f"bouncing off the {side}" for side in SIDES))
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (2.5, 3.5), "quickly": (5.5, 6.5)}
"""Word -> pixels of the canvas per frame."""


@dataclass(frozen=True)
class Clip:
    """What a prompt asks for; ``speed`` is None where it is left open."""

    thing: Thing
    motion: str
    speed: str | None
    background: str

    @property
    def prompt(self) -> str:
        moves = " ".join(w for w in (self.motion, self.speed) if w)
        return f"{self.thing.words} {moves} on a {self.background} background"

    @property
    def split(self) -> Split:
        return split_of(self.prompt)


def parse_clip(prompt: str) -> Clip:
    """The clip of a prompt; a `ValueError` where the grammar has no such prompt."""
    for motion in MOTIONS:
        thing, found, rest = prompt.partition(f" {motion}")
        if found:
            words, _, background = rest.removesuffix(" background").partition("on a ")
            clip = Clip(parse_thing(thing), motion, words.strip() or None, background)
            known = background in BACKGROUNDS and (clip.speed is None or clip.speed in SPEEDS)
            if known and clip.thing.size is None and clip.prompt == prompt:
                return clip
    raise ValueError(f"the grammar of clips has no prompt {prompt!r}")


def vocabulary() -> list[str]:
    """Every word the grammar uses, in a fixed order; those of pictures first."""
    return list(dict.fromkeys([*scenes.vocabulary(), "moving", "bouncing", "off", *DIRECTIONS, *SIDES, *SPEEDS]))


def clips(seed: int, split: Split, *, told: float = 0.7) -> Iterator[Clip]:
    """Endless clips of one split, the same for the same seed; ``told`` is the chance that a speed is named."""
    rng = np.random.default_rng(seed)

    def pick(options) -> str:
        return str(rng.choice(list(options)))

    while True:
        thing = Thing(pick(SHAPES), pick(COLOURS), pick(TEXTURES))
        clip = Clip(thing, pick(MOTIONS), pick(SPEEDS) if rng.random() < told else None, pick(BACKGROUNDS))
        if clip.split == split:
            yield clip


def direction(motion: str) -> np.ndarray:
    """Where a motion heads first: (x, y)."""
    last = motion.split()[-1]
    return np.array(DIRECTIONS[SIDES.get(last, last)], dtype=float)


def track(clip: Clip, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Centres ``[9, 2]`` (x, y) of the object in pixels of the canvas.

    What moves crosses the middle half-way; what bounces touches its side half-way.
    """
    speed = rng.uniform(*SPEEDS[clip.speed or str(rng.choice(list(SPEEDS)))])
    towards = direction(clip.motion)
    across = abs(towards[::-1]) * rng.uniform(-18, 18)
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    if clip.motion.startswith("moving"):
        way = speed * time + rng.uniform(-6, 6)
    else:
        way = IMAGE_SIZE / 2 - radius - 2 - speed * abs(time)
    return IMAGE_SIZE / 2 + way[:, None] * towards + across


def film(clip: Clip, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a clip.

    Args:
        clip: What is asked for.
        rng: Decides everything the clip leaves open.

    Returns:
        Frames ``[9, 96, 96, 3]`` uint8; what the object covers ``[9, 96, 96]`` in [0, 1]; and where it is in each,
        ``[9, 3]`` (x, y, radius) in pixels of the canvas.
    """
    light = rng.uniform(0, 2 * np.pi)
    sun = (float(np.cos(light)), float(np.sin(light)))
    ground = backdrop(clip.background, rng)
    count = int(rng.integers(3, 12))
    front = int(rng.binomial(count, 0.1))
    for _ in range(count - front):
        clutter(ground, sun, rng)
    shade = lit(sun, rng)
    radius = rng.uniform(*RADII)
    centres = track(clip, radius, rng)
    lies, before = rng.integers(2**62, size=2)
    frames = np.empty((FRAMES, CLIP_SIZE, CLIP_SIZE, 3), np.uint8)
    covers = np.empty((FRAMES, CLIP_SIZE, CLIP_SIZE), np.float32)
    for i, centre in enumerate(centres):
        frame = ground.copy()
        # The same numbers each time: pose, tone and texture move with the object, what lies in front stays.
        cover = stamp(frame, clip.thing, (*centre, radius), sun, np.random.default_rng(lies), GRAIN)
        rest = np.random.default_rng(before)
        for _ in range(front):
            clutter(frame, sun, rest)
        frames[i] = (shrunk(np.clip(frame * shade, 0, 1)) * 255).round().astype(np.uint8)
        covers[i] = shrunk(cover)
    return frames, covers, np.column_stack([centres, np.full(FRAMES, radius)])


def shrunk(canvas: np.ndarray) -> np.ndarray:
    """``[S, S, ...]`` -> ``[96, 96, ...]``, each pixel the mean of the area it covers."""
    area = _areas(len(canvas), CLIP_SIZE)
    return np.tensordot(area, np.tensordot(area, canvas, (1, 0)), (1, 1)).swapaxes(0, 1)


@cache
def _areas(size: int, smaller: int) -> np.ndarray:
    """Share of each of ``size`` pixels in a row in each of the ``smaller`` ones, ``[smaller, size]``."""
    parts = np.repeat(np.eye(size, dtype=np.float32), smaller, 0)
    return parts.reshape(smaller, size, size).mean(1)
