"""Outlines of shapes as signed distances, and colours."""

from __future__ import annotations

import numpy as np


def rotate(x, y, angle: float):
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def distance(shape: str, u, v, r: float):
    """Signed distance in pixels to the outline, negative inside (exact or near it)."""
    if shape == "circle":
        return np.hypot(u, v) - 0.9 * r
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.8 * r
    if shape == "triangle":
        sides = [u * np.sin(a) - v * np.cos(a) for a in np.deg2rad([60, 180, 300])]
        return np.maximum.reduce(sides) - 0.56 * r
    if shape == "cross":
        across = np.maximum(abs(u) - r, abs(v) - 0.32 * r)
        return np.minimum(across, np.maximum(abs(u) - 0.32 * r, abs(v) - r))
    if shape == "moon":
        u = u + 0.1 * r
        return np.maximum(np.hypot(u, v) - r, 0.8 * r - np.hypot(u - 0.62 * r, v))
    if shape == "heart":
        return _heart(abs(u) / r, (0.55 * r - v) / r) * r
    if shape == "flower":
        return _flower(u, v, r)
    return _star(u, v, r)


def _heart(u, v):
    """Two slanted rectangles ended by half circles (after I. Quilez, "2D distance functions")."""
    u, v = u / 1.55, v / 1.55
    lobe = np.hypot(u - 0.25, v - 0.75) - np.sqrt(2) / 4
    low = 0.5 * np.maximum(u + v, 0)
    tip = np.minimum(np.hypot(u, v - 1), np.hypot(u - low, v - low)) * np.sign(u - v)
    return 1.55 * np.where(u + v > 1, lobe, tip)


def _flower(u, v, r: float):
    """Six petals around a middle, with deep notches between them."""
    theta = np.arctan2(v, u)
    folded = abs((theta + np.pi / 6) % (np.pi / 3) - np.pi / 6)
    rho = np.hypot(u, v)
    petal = np.hypot(rho * np.cos(folded) - 0.66 * r, rho * np.sin(folded)) - 0.31 * r
    return np.minimum(petal, rho - 0.5 * r)


def _star(u, v, r: float):
    """Fold the plane into one of ten half points; the distance to a single edge."""
    sector = np.pi / 5
    folded = abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
    rho = np.hypot(u, v)
    tip = np.array([1.08 * r, 0.0])
    edge = 0.46 * r * np.array([np.cos(sector), np.sin(sector)]) - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (rho * np.cos(folded) - tip[0]) * normal[0] + rho * np.sin(folded) * normal[1]


def mix(one, two, mask):
    """From one colour to another, by a mask ``[H, W]``."""
    return one + (two - one) * mask[..., None]


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour ``[3]`` in [0, 1] from hue in degrees."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)
