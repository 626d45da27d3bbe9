"""What drawings are made of: outlines, textures, backgrounds. Lengths are in pixels of a drawing of 128 x 128."""

from __future__ import annotations

import numpy as np


def rotate(x, y, angle: float):
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def stamp(picture, shape: str, name: str, ink, x, y, radius: float, angle: float, shadow, rng: np.random.Generator):
    """Draw an object and its shadow.

    Args:
        picture: ``[H, W, 3]``
        name: Its texture.
        ink: Its colour ``[3]``.
        x: Columns from its centre, ``[H, W]``; y: rows.
        shadow: Where the shadow falls from: (x, y) in pixels.
        rng: Decides how the texture lies.

    Returns:
        The picture with it, and what it covers ``[H, W]`` in [0, 1].
    """
    u, v = rotate(x, y, angle)
    su, sv = rotate(x + shadow[0], y + shadow[1], angle)
    dark = 0.45 * np.clip(0.5 - distance(shape, su, sv, radius) / 3, 0, 1)
    cover = np.clip(0.5 - distance(shape, u, v, radius), 0, 1)
    behind = picture * (1 - dark[..., None]) * (1 - cover[..., None])
    return behind + texture(name, ink, u, v, rng) * cover[..., None], cover


def distance(shape: str, u, v, r: float):
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


def texture(name: str, ink, u, v, rng: np.random.Generator):
    """Colour inside an object, ``[H, W, 3]``; ``u, v`` are the object's own axes in pixels."""
    pale, deep = 0.25 * ink + 0.75, 0.35 * ink
    pu, pv = rng.uniform(0, 20, 2)
    if name == "plain":
        return np.broadcast_to(ink, (*u.shape, 3))
    if name == "striped":
        period = rng.uniform(9, 11)
        mask = wave((u if rng.random() < 0.5 else v) + pu, period)
        return mix(ink, deep, mask)
    if name == "dotted":
        period = rng.uniform(8.5, 10)
        du, dv = ((a + p) % period - period / 2 for a, p in ((u, pu), (v, pv)))
        return mix(ink, pale, np.clip(0.5 + 2.5 - np.hypot(du, dv), 0, 1))
    period = rng.uniform(5, 5.6)  # hatched: thin crossed lines
    a, b = rotate(u, v, np.pi / 4)
    lines = np.maximum(*(np.clip(1.3 - abs((c + p) % period - period / 2), 0, 1) for c, p in ((a, pu), (b, pv))))
    return mix(ink, deep, lines)


def background(name: str, x, y, rng: np.random.Generator):
    """Muted background, ``[H, W, 3]``."""
    hue, value = rng.uniform(0, 360), rng.uniform(0.4, 0.75)
    one = hsv(hue, rng.uniform(0.05, 0.2), value)
    step = rng.uniform(0.12, 0.2) * (1 if value < 0.55 else -1)
    two = hsv(hue + rng.uniform(-40, 40), rng.uniform(0.05, 0.2), value + step)
    if name == "smooth":
        angle = rng.uniform(0, 2 * np.pi)
        return mix(one, two, 0.5 + (rotate(x - 64, y - 64, angle)[0]) / 181)
    if name == "brick":
        px, py = rng.uniform(0, 24), rng.uniform(0, 24)
        row = np.floor((y + py) / 12)
        inside_y, inside_x = (y + py) % 12, (x + px + 12 * (row % 2)) % 24
        return mix(one, two, np.clip(1.6 - np.minimum(inside_y, inside_x), 0, 1))
    if name == "grainy":
        grain = rng.normal(size=x.shape).astype(np.float32)
        grain = sum(np.roll(grain, s, axis=(0, 1)) for s in ((0, 0), (0, 1), (1, 0), (1, 1))) / 2
        return mix(one, two, 0.5 + 0.4 * grain)
    angle, period, bend = rng.uniform(0, np.pi), rng.uniform(13, 17), rng.uniform(2, 4)
    u, v = rotate(x, y, angle)
    return mix(one, two, 0.5 + 0.5 * np.sin(2 * np.pi * (u + bend * np.sin(v / 9)) / period + rng.uniform(0, 6.28)))


def wave(t, period: float):
    """Stripes of equal width with edges one pixel wide, in [0, 1]."""
    return np.clip(0.5 + abs((t % period) - period / 2) - period / 4, 0, 1)


def mix(one, two, mask):
    return one + (two - one) * mask[..., None]


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour ``[3]`` in [0, 1] from hue in degrees."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)
