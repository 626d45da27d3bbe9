"""The renderer: a scene becomes a picture of 128 x 128 with edges one pixel wide. Lengths are in pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ddit.embedded.backdrops import backdrop
from ddit.embedded.outlines import distance, hsv, mix, rotate
from ddit.embedded.scenes import COLOURS, IMAGE_SIZE, MOST, Scene, Split, Thing, arrange, scenes

TILT = 0.15
"""Most that an object is turned, in radians."""
PERIOD = 16.0
"""Of textures, along both axes: of two tokens of the image model."""
CLUTTER = ("leaf", "pebble", "dot", "ring", "bird", "bloom", "spark")
"""Small things no prompt names."""


def draw(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a scene.

    Args:
        scene: What is asked for.
        rng: Decides everything the scene leaves open.

    Returns:
        Picture ``[128, 128, 3]`` uint8; what each object covers, ``[3, 128, 128]`` in [0, 1], in the prompt's order;
        and where each lies, ``[objects, 3]`` (x, y, radius).
    """
    light = rng.uniform(0, 2 * np.pi)
    sun = (float(np.cos(light)), float(np.sin(light)))
    picture = backdrop(scene.background, rng)
    spots = arrange(scene, rng)
    masks = np.zeros((MOST, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    count = int(rng.integers(3, 10))
    front = int(rng.binomial(count, 0.15))
    for _ in range(count - front):
        clutter(picture, sun, rng)
    for i in rng.permutation(len(scene.things)):
        cover = stamp(picture, scene.things[i], spots[i], sun, rng)
        masks *= 1 - cover
        masks[i] = cover
    for _ in range(front):
        clutter(picture, sun, rng)
    picture *= lit(sun, rng)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8), masks, spots


def drawings(seed: int, split: Split) -> Iterator[tuple[Scene, np.ndarray, np.ndarray, np.ndarray]]:
    """Endless (scene, picture, masks, spots) as `draw` gives them, the same for the same seed."""
    rng = np.random.default_rng([seed, 1])
    for scene in scenes(seed, split):
        yield scene, *draw(scene, rng)


def lit(sun: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """How bright a picture is, brighter where the light comes from: ``[128, 128, 1]``."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) / 64 - 1
    return (1 - rng.uniform(0.02, 0.12) * (x * sun[0] + y * sun[1]))[..., None]


def _window(x: float, y: float, r: float):
    """Slices of the part of a picture around a spot, and its columns and rows relative to it."""
    x0, x1 = max(0, int(x - r)), min(IMAGE_SIZE, int(x + r) + 1)
    y0, y1 = max(0, int(y - r)), min(IMAGE_SIZE, int(y + r) + 1)
    v, u = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    return (slice(y0, y1), slice(x0, x1)), u + 0.5 - x, v + 0.5 - y


def stamp(
    picture: np.ndarray,
    thing: Thing,
    spot,
    sun: tuple[float, float],
    rng: np.random.Generator,
    grain: float | None = None,
) -> np.ndarray:
    """Draw an object and its shadow into the picture; returns what it covers ``[128, 128]``.

    Its texture shows through it from the canvas, which small models learn soonest; with ``grain`` it moves with the
    object, and is so much coarser.
    """
    x, y, r = map(float, spot)
    here, u, v = _window(x, y, 1.25 * r + 8)
    angle = rng.uniform(-TILT, TILT)
    ink = hsv(COLOURS[thing.colour] + rng.uniform(-6, 6), rng.uniform(0.72, 0.92), rng.uniform(0.82, 0.98))
    fall = rng.uniform(2.5, 5)
    shade = distance(thing.shape, *rotate(u + fall * sun[0], v + fall * sun[1], angle), r)
    part = picture[here] * (1 - rng.uniform(0.3, 0.5) * np.clip(0.5 - shade / 3, 0, 1)[..., None])
    a, b = rotate(u, v, angle)
    edge = distance(thing.shape, a, b, r)
    cover = np.clip(0.5 - edge, 0, 1)
    surface = texture(thing.texture, ink, *((a / grain, b / grain) if grain else (u + x, v + y)), rng)
    surface = surface * (1 + 0.16 * (u * sun[0] + v * sun[1]) / r)[..., None]
    rim = np.clip(edge + 2.2, 0, 1)
    surface = mix(surface, 0.45 * ink, 0.75 * rim)
    picture[here] = mix(part, surface, cover)
    whole = np.zeros(picture.shape[:2], np.float32)
    whole[here] = cover
    return whole


def texture(name: str, ink: np.ndarray, u, v, rng: np.random.Generator) -> np.ndarray:
    """Colour inside an object, ``[H, W, 3]``, at places in pixels; each texture lies in one of two ways."""
    pale, deep = 0.25 * ink + 0.75, 0.42 * ink
    other = rng.integers(2)
    half = PERIOD / 2
    if name == "plain":
        return np.broadcast_to(ink, (*u.shape, 3))
    if name == "striped":
        return mix(ink, deep, _stripes(u + v if other else u - v, np.sqrt(2)))
    if name == "dotted":
        u = u + half * other
        rows = [np.hypot((u + p + half) % PERIOD - half, (v + p + half) % PERIOD - half) for p in (0, half)]
        return mix(ink, pale, np.clip(0.5 + 0.23 * PERIOD - np.minimum(*rows), 0, 1))
    a, b = _stripes(u + half * other), _stripes(v)
    return mix(ink, pale, a + b - 2 * a * b)


def _stripes(t, stretch: float = 1.0):
    """Stripes of equal width with edges one pixel wide, in [0, 1]; ``t`` in pixels times ``stretch``."""
    return np.clip(0.5 + (abs(t % PERIOD - PERIOD / 2) - PERIOD / 4) / stretch, 0, 1)


def clutter(picture: np.ndarray, sun: tuple[float, float], rng: np.random.Generator) -> None:
    """Draw a small thing of random kind, colour and place into the picture, with a faint shadow."""
    kind, r = str(rng.choice(CLUTTER)), rng.uniform(2.2, 6.5)
    x, y = rng.uniform(0, IMAGE_SIZE, 2)
    here, u, v = _window(x, y, r + 4)
    angle = rng.uniform(0, 2 * np.pi)
    ink = hsv(rng.uniform(0, 360), rng.uniform(0.25, 0.75), rng.uniform(0.45, 0.95))
    if kind == "pebble":
        ink = hsv(rng.uniform(20, 50), rng.uniform(0.05, 0.25), rng.uniform(0.4, 0.8))
    elif kind == "leaf":
        ink = hsv(rng.uniform(20, 140), rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.85))
    elif kind == "bird":
        angle, ink = rng.uniform(-0.5, 0.5), hsv(rng.uniform(200, 260), 0.3, rng.uniform(0.15, 0.35))
    shade = np.clip(0.5 - _small(kind, *rotate(u + 1.3 * sun[0], v + 1.3 * sun[1], angle), r), 0, 1)
    part = picture[here] * (1 - 0.22 * shade[..., None])
    a, b = rotate(u, v, angle)
    part = mix(part, ink, np.clip(0.5 - _small(kind, a, b, r), 0, 1))
    if kind == "bloom":
        part = mix(part, hsv(48, 0.7, 1.0), np.clip(0.5 + 0.32 * r - np.hypot(a, b), 0, 1))
    if kind == "leaf":
        part = mix(part, 0.6 * ink, np.clip(0.9 - abs(b), 0, 1) * (abs(a) < r - 1))
    picture[here] = part


def _small(kind: str, u, v, r: float):
    """Signed distance (roughly) to the outline of a small thing, negative inside."""
    if kind == "leaf":
        lift = 0.75 * r
        return np.hypot(u, abs(v) + lift) - np.hypot(r, lift)
    if kind == "pebble":
        return (np.hypot(u, v / 0.7) - r) * 0.8
    if kind == "ring":
        return abs(np.hypot(u, v) - r + 1) - 0.8
    if kind == "bird":
        return abs(np.hypot(abs(u) - 0.55 * r, v) - 0.55 * r) - 0.7 + 2.0 * np.clip(v, 0, None)
    if kind == "bloom":
        return distance("flower", u, v, r)
    if kind == "spark":
        return (np.sqrt(abs(u)) + np.sqrt(abs(v)) - np.sqrt(r)) * np.sqrt(r) * 0.8
    return np.hypot(u, v) - 0.6 * r
