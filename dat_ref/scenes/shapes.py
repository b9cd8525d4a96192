"""The objects: flat shapes, each given by how far a place lies inside its outline.

    depth(x, y) > 0 inside, 0 on the outline, < 0 outside, in units of the shape's radius; x to the right, y down.

Near the outline the depth is the distance to it, so that a pixel's share in the shape is depth / pixel + ½, clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from .._checks import Array

Depth = Callable[[Array, Array], Array]


def depth(kind: str, x: Array, y: Array) -> Array:
    """Return how far places lie inside a shape.

    Args:
        kind: one of `KINDS`.
        x, y: places relative to the shape's middle, in radii, of one shape.

    >>> depth("disc", np.array([0.0, 1.0, 2.0]), np.zeros(3))
    array([ 1.,  0., -1.])
    """
    return _DEPTHS[kind](x, y)


# ------------------------------------------------------------------------------------------------ round ones


def _disc(x: Array, y: Array) -> Array:
    return 1 - np.hypot(x, y)


def _ring(x: Array, y: Array) -> Array:
    return 0.21 - np.abs(np.hypot(x, y) - 0.79)


def _moon(x: Array, y: Array) -> Array:
    return np.minimum(_disc(x, y), np.hypot(x - 0.48, y) - 0.80)


# ------------------------------------------------------------------------------------------------ polygons


def _polygon(corners: Array, x: Array, y: Array) -> Array:
    """Return the distance to the nearest edge, positive inside.

    Args:
        corners: (N, 2), (x, y), one after the other.
    """
    place = np.stack([x, y], axis=-1)[..., None, :]  # (..., 1, 2)
    start, edge = corners, np.roll(corners, -1, axis=0) - corners  # (N, 2)
    to_place = place - start
    along = np.clip((to_place * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    away = to_place - along[..., None] * edge
    distance = np.sqrt((away**2).sum(-1).min(-1))
    # A ray to the right crosses the outline an odd number of times from inside.
    above, below = start[:, 1] > place[..., 1], start[:, 1] + edge[:, 1] > place[..., 1]
    slanted = np.where(edge[:, 1] == 0, 1, edge[:, 1])
    crossing = start[:, 0] + (place[..., 1] - start[:, 1]) / slanted * edge[:, 0]
    inside = ((above != below) & (place[..., 0] < crossing)).sum(-1) % 2 == 1
    return np.where(inside, distance, -distance)


@cache
def _corners(kind: str) -> Array:
    if kind == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.76
    if kind == "triangle":
        return _on_circle(3)
    if kind == "star":
        return _on_circle(10) * np.where(np.arange(10) % 2, 0.42, 1.05)[:, None]
    if kind == "cross":
        a, b = 0.34, 1.0
        quarter = [(a, -b), (a, -a), (b, -a)]
        turned = [[(x, y), (-y, x), (-x, -y), (y, -x)] for x, y in quarter]
        return np.array([corner for turn in range(4) for corner in (each[turn] for each in turned)])
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)  # a heart
    outline = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return np.stack([16 * np.sin(turn) ** 3, -outline - 2], axis=-1) / 16.5


def _on_circle(number: int) -> Array:
    """Return places on the unit circle, the first at the top."""
    turn = 2 * np.pi * np.arange(number) / number
    return np.stack([np.sin(turn), -np.cos(turn)], axis=-1)


def _polygonal(kind: str) -> Depth:
    return lambda x, y: _polygon(_corners(kind), x, y)


_DEPTHS: dict[str, Depth] = {
    "disc": _disc,
    "ring": _ring,
    "moon": _moon,
    **{kind: _polygonal(kind) for kind in ("square", "triangle", "cross", "star", "heart")},
}
KINDS = tuple(_DEPTHS)
