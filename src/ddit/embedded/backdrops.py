"""Backgrounds: muted, so that objects stand out, with a layout and tones of their own each time."""

from __future__ import annotations

import numpy as np

from ddit.embedded.outlines import hsv, mix
from ddit.embedded.scenes import IMAGE_SIZE

Y, X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5


def backdrop(name: str, rng: np.random.Generator) -> np.ndarray:
    """A background ``[128, 128, 3]`` in [0, 1]."""
    return {"meadow": _meadow, "desert": _desert, "sea": _sea, "sky": _sky, "night": _night, "brick": _brick}[name](rng)


def _tone(rng: np.random.Generator, hue: float, saturation: float, value: float) -> np.ndarray:
    return hsv(hue + rng.uniform(-10, 10), saturation + rng.uniform(-0.06, 0.06), value + rng.uniform(-0.06, 0.06))


def _line(rng: np.random.Generator, height: float, bend: float) -> np.ndarray:
    """A wavy line: rows ``[128]`` over the columns."""
    waves = sum(np.sin(X[0] / rng.uniform(12, 34) + rng.uniform(0, 7)) for _ in range(2))
    return height + bend * np.asarray(waves) / 2 + rng.uniform(-0.12, 0.12) * (X[0] - 64)


def _below(line: np.ndarray) -> np.ndarray:
    return np.clip(Y - line[None] + 0.5, 0, 1)


def _upright(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return mix(one, two, Y / IMAGE_SIZE)


def _meadow(rng: np.random.Generator) -> np.ndarray:
    """Rolling green hills, blades of grass."""
    picture = _upright(_tone(rng, 95, 0.3, 0.83), _tone(rng, 100, 0.36, 0.7))
    heights = np.sort(rng.uniform(10, 120, 3))
    for depth, height in enumerate(heights):
        picture = mix(picture, _tone(rng, 98, 0.36 + 0.04 * depth, 0.76 - 0.07 * depth), _below(_line(rng, height, 7)))
    for _ in range(40):
        x, y, length = rng.uniform(0, 128), rng.uniform(6, 128), rng.uniform(3, 6)
        rows = slice(int(max(0, y - length)), int(y))
        picture[rows, int(x)] *= rng.choice([0.8, 1.15])
    return picture


def _desert(rng: np.random.Generator) -> np.ndarray:
    """Dunes with ripples on them."""
    picture = _upright(_tone(rng, 38, 0.2, 0.92), _tone(rng, 36, 0.28, 0.85))
    for depth, height in enumerate(np.sort(rng.uniform(5, 110, 3))):
        line = _line(rng, height, 12)
        ripples = np.sin((Y - line[None]) * 2 * np.pi / rng.uniform(5, 8) + 1.5 * np.sin(X / rng.uniform(7, 12)))
        sand = _tone(rng, 34, 0.3 + 0.05 * depth, 0.87 - 0.06 * depth) * (1 + 0.05 * ripples[..., None])
        picture = mix(picture, sand, _below(line))
    return picture


def _sea(rng: np.random.Generator) -> np.ndarray:
    """Rows of waves with light crests."""
    deep, pale = _tone(rng, 192, 0.45, 0.52), _tone(rng, 185, 0.25, 0.78)
    picture = _upright(_tone(rng, 190, 0.3, 0.72), deep)
    y = rng.uniform(-4, 6)
    while y < IMAGE_SIZE:
        period, phase = rng.uniform(14, 22), rng.uniform(0, 22)
        line = y + rng.uniform(1.5, 3) * abs(np.sin(np.pi * (X[0] + phase) / period)) * 2
        picture = mix(picture, pale, 0.75 * np.clip(1.3 - abs(Y - line[None]), 0, 1))
        y += rng.uniform(10, 15)
    return picture


def _sky(rng: np.random.Generator) -> np.ndarray:
    """Light air with a few clouds of round lobes."""
    picture = _upright(_tone(rng, 208, 0.34, 0.86), _tone(rng, 205, 0.14, 0.94))
    for _ in range(int(rng.integers(3, 7))):
        x, y, r = rng.uniform(0, 128), rng.uniform(5, 123), rng.uniform(6, 12)
        lobes = [np.hypot(X - x - k * r, (Y - y) * 1.1) - r * s for k, s in ((-1, 0.65), (0, 1.0), (1, 0.7))]
        cover = np.clip(0.5 - np.minimum.reduce(lobes), 0, 1) * np.clip(0.5 + y + 0.45 * r - Y, 0, 1)
        picture = mix(picture, np.array([0.97, 0.98, 1.0], np.float32), rng.uniform(0.7, 0.95) * cover)
    return picture


def _night(rng: np.random.Generator) -> np.ndarray:
    """Dark air, stars, and dark hills below."""
    picture = _upright(_tone(rng, 235, 0.5, 0.2), _tone(rng, 250, 0.4, 0.34))
    for _ in range(int(rng.integers(25, 50))):
        x, y, r = rng.uniform(0, 128), rng.uniform(0, 128), rng.uniform(0.4, 1.2)
        cover = np.clip(0.5 + r - np.hypot(X - x, Y - y), 0, 1)
        picture = mix(picture, np.array([1.0, 0.96, 0.8], np.float32), 0.85 * cover)
    return mix(picture, _tone(rng, 240, 0.4, 0.14), _below(_line(rng, rng.uniform(85, 125), 9)))


def _brick(rng: np.random.Generator) -> np.ndarray:
    """A wall, each brick in a tone of its own."""
    height, width = rng.uniform(10, 13), rng.uniform(22, 28)
    y, x = Y + rng.uniform(0, 40), X + rng.uniform(0, 40)
    row = np.floor(y / height)
    shifted = x + width / 2 * (row % 2)
    column = np.floor(shifted / width)
    tones = rng.uniform(0.88, 1.1, 997)[(31 * row + 7 * column).astype(int) % 997]
    wall = _tone(rng, 18, 0.24, 0.62) * tones[..., None]
    across = np.minimum(shifted % width, width - shifted % width)
    down = np.minimum(y % height, height - y % height)
    return mix(wall, _tone(rng, 35, 0.08, 0.8), np.clip(1.4 - np.minimum(across, down), 0, 1)).astype(np.float32)
