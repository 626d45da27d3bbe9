"""Clips the project draws itself: a grammar of prompts, and a renderer that films what a prompt asks for.

A prompt names one object (texture, colour, shape), how it moves (direction or bounce, speed) and a background. What it
does not name is drawn at random. Prompts are split by a hash of their words, as those of pictures are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddit.embedded.drawing import background, hsv, stamp
from ddit.embedded.scenes import COLOURS, Split, split_of

FRAMES = 9
SIZE = 64
"""Height and width in pixels of a clip; it is drawn twice as large and pooled."""
CANVAS = 128
SHAPES = {"ball": "circle", "square": "square", "triangle": "triangle", "star": "star", "cross": "cross"}
"""Word -> outline."""
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("smooth", "brick", "wavy")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Name -> (x, y), downwards positive."""
SIDES = {"left": "left", "right": "right", "top": "up", "bottom": "down"}
"""Side of the frame -> direction towards it."""
MOTIONS = (*(f"moving {name}" for name in DIRECTIONS), *(f"bouncing off the {side}" for side in SIDES))
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (2.5, 3.5), "quickly": (5.5, 6.5)}
"""Word -> pixels of the canvas per frame."""


@dataclass(frozen=True)
class Clip:
    """What a prompt asks for. ``None`` means that it does not say."""

    shape: str
    colour: str
    texture: str | None
    motion: str
    speed: str | None
    background: str

    @property
    def prompt(self) -> str:
        thing = " ".join(w for w in ("a", self.texture, self.colour, self.shape, self.motion, self.speed) if w)
        return f"{thing} on a {self.background} background"

    @property
    def split(self) -> Split:
        return split_of(self.prompt)


def vocabulary() -> list[str]:
    """Every word the grammar can use, in a fixed order."""
    words = ["a", "on", "off", "the", "background", "moving", "bouncing", *SHAPES, *COLOURS, *TEXTURES, *BACKGROUNDS]
    return list(dict.fromkeys([*words, *DIRECTIONS, *SIDES, *SPEEDS]))


def clips(seed: int, split: Split, *, omit: float = 0.1) -> Iterator[Clip]:
    """Endless clips of one split, the same for the same seed; ``omit``: chance that a texture or speed is unsaid."""
    rng = np.random.default_rng(seed)

    def pick(options) -> str:
        return str(rng.choice(list(options)))

    def maybe(options) -> str | None:
        value = pick(options)
        return None if rng.random() < omit else value

    while True:
        clip = Clip(pick(SHAPES), pick(COLOURS), maybe(TEXTURES), pick(MOTIONS), maybe(SPEEDS), pick(BACKGROUNDS))
        if clip.split == split:
            yield clip


def complete(clip: Clip, rng: np.random.Generator) -> Clip:
    """Settle at random what the clip leaves unsaid."""
    texture, speed = str(rng.choice(TEXTURES)), str(rng.choice(list(SPEEDS)))
    return replace(clip, texture=clip.texture or texture, speed=clip.speed or speed)


def track(clip: Clip, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Centres ``[FRAMES, 2]`` (x, y) of a complete clip's object, in pixels of the canvas.

    What moves crosses the middle half-way; what bounces touches its side half-way.
    """
    assert clip.speed, "complete the clip before drawing it"
    speed = rng.uniform(*SPEEDS[clip.speed])
    towards = np.array(DIRECTIONS[SIDES.get(clip.motion.split()[-1], clip.motion.split()[-1])], dtype=float)
    across = abs(towards[::-1]) * rng.uniform(-18, 18)
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    if clip.motion.startswith("moving"):
        way = speed * time + rng.uniform(-6, 6)
    else:
        way = CANVAS / 2 - radius - 2 - speed * abs(time)
    return CANVAS / 2 + way[:, None] * towards + across


def film(clip: Clip, rng: np.random.Generator, chosen: Sequence[int] = range(FRAMES)) -> tuple[np.ndarray, np.ndarray]:
    """Draw a clip.

    Args:
        clip: A complete clip (see `complete`).
        rng: Decides everything the clip does not fix.
        chosen: Frames to draw.

    Returns:
        Frames ``[F, 64, 64, 3]`` and what the object covers ``[F, 64, 64]``, both uint8.
    """
    assert clip.texture, "complete the clip before drawing it"
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) + 0.5
    light = rng.uniform(0, 2 * np.pi)
    shade = 1 + rng.uniform(0.05, 0.22) * ((x - 64) * np.cos(light) + (y - 64) * np.sin(light)) / 64
    ground = background(clip.background, x, y, rng)
    radius, angle = rng.uniform(18, 23), rng.uniform(-0.1, 0.1)
    ink = hsv(COLOURS[clip.colour] + rng.uniform(-6, 6), rng.uniform(0.8, 0.95), rng.uniform(0.8, 0.95))
    shadow = rng.uniform(2.5, 4.5) * np.array([np.cos(light), np.sin(light)])
    seed = int(rng.integers(2**32))
    count = len(chosen)
    frames, covers = np.empty((count, SIZE, SIZE, 3), np.uint8), np.empty((count, SIZE, SIZE), np.uint8)
    for i, (cx, cy) in enumerate(track(clip, radius, rng)[list(chosen)]):
        lies = np.random.default_rng(seed)  # The texture moves with the object.
        outline = SHAPES[clip.shape]
        frame, cover = stamp(ground, outline, clip.texture, ink, x - cx, y - cy, radius, angle, shadow, lies)
        frames[i] = _pooled(np.clip(frame * shade[..., None], 0, 1))
        covers[i] = _pooled(cover)
    return frames, covers


def _pooled(canvas: np.ndarray) -> np.ndarray:
    """``[128, 128, ...]`` in [0, 1] -> ``[64, 64, ...]`` uint8."""
    pool = CANVAS // SIZE
    small = canvas.reshape(SIZE, pool, SIZE, pool, *canvas.shape[2:]).mean((1, 3))
    return (small * 255).round().astype(np.uint8)
