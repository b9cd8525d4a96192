"""Sets of objects that scenes show, and how they are painted: flat shapes, coloured discs, small pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .._checks import Array, ConfigError
from . import pictures
from .shapes import KINDS, depth

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "yellow": (0.95, 0.90, 0.10),
    "green": (0.10, 0.80, 0.15),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.15, 0.20, 0.95),
    "magenta": (0.90, 0.10, 0.90),
}
CONTRAST = 0.25  # smallest mean absolute difference between a shape's colour and the mean of what it covers


class Placed(NamedTuple):
    """An object on a scene."""

    kind: str
    center: tuple[float, float]  # (y, x) in pixels; 0 is the center of the first pixel
    radius: float  # pixels
    turn: float  # radians, clockwise


class Surroundings(NamedTuple):
    """The pixels around an object, and their positions relative to its center in radii, before it is turned."""

    pixels: Array  # (h, w, 3) in [0, 1]
    x: Array  # (1, w), to the right
    y: Array  # (h, 1), down


# (object, surroundings, generator) → alpha (h, w, 1), colour times alpha (h, w, 3)
Draw = Callable[[Placed, Surroundings, np.random.Generator], tuple[Array, Array]]


class ObjectSet(NamedTuple):
    """Objects of one kind of appearance."""

    kinds: tuple[str, ...]
    radius: tuple[float, float]  # smallest and largest, in sides of the image
    draw: Draw


def paint(canvas: Array, mask: Array, placed: Placed, objects: str, generator: np.random.Generator) -> None:
    """Paint an object on a picture, in place, and set its mask.

    Args:
        canvas: (H, W, 3) float in [0, 1].
        mask: bool (H, W).
        placed: where and what; any part outside the picture is cut off.
        objects: the set that it is from, one of `OBJECTS`.
        generator: draws the rest of its appearance.

    Raises:
        ConfigError: if the set has no such kind.
    """
    if placed.kind not in OBJECTS[objects].kinds:
        raise ConfigError(f"kind: expected one of {', '.join(OBJECTS[objects].kinds)}, got {placed.kind!r}")
    height, width = mask.shape
    (y, x), reach = placed.center, 1.1 * placed.radius + 1
    top, left = max(int(y - reach), 0), max(int(x - reach), 0)
    rows, columns = np.ogrid[top : min(int(y + reach) + 2, height), left : min(int(x + reach) + 2, width)]
    if rows.size == 0 or columns.size == 0:
        return
    part = canvas[top : top + rows.size, left : left + columns.size]
    around = Surroundings(part, (columns - x) / placed.radius, (rows - y) / placed.radius)
    alpha, colour = OBJECTS[objects].draw(placed, around, generator)
    part[:] = (1 - alpha) * part + colour
    mask[top : top + rows.size, left : left + columns.size] = alpha[..., 0] >= 0.5


def _turned(around: Surroundings, angle: float) -> tuple[Array, Array]:
    """Return positions in the coordinates of an object that is turned by an angle: x, y."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * around.x + sine * around.y, cosine * around.y - sine * around.x


# ------------------------------------------------------------------------------------------------ flat shapes


def _draw_shape(placed: Placed, around: Surroundings, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draw a flat shape in a colour that stands out, lit from one side, with grain: only its outline names its kind."""
    inside = depth(placed.kind, *_turned(around, placed.turn))
    alpha = np.clip(inside * placed.radius + 0.5, 0, 1)[..., None]
    colour = _contrasting(around.pixels[alpha[..., 0] > 0].mean(0), generator)
    light = generator.uniform(-np.pi, np.pi)
    shade = 1 + 0.18 * (np.cos(light) * around.x + np.sin(light) * around.y)[..., None]
    grain = generator.normal(0, 0.03, around.pixels.shape)
    return alpha, alpha * np.clip(colour * shade + grain, 0, 1)


def _contrasting(covered: Array, generator: np.random.Generator) -> Array:
    """Draw a colour that stands out from the mean of what it covers."""
    while True:
        colour: Array = generator.uniform(0.05, 0.95, size=3)
        if np.abs(colour - covered).mean() > CONTRAST:
            return colour


# ------------------------------------------------------------------------------------------------ discs, pictures


def _draw_disc(placed: Placed, around: Surroundings, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draw a disc in the colour that is its kind, lighter or darker, with grain."""
    alpha = np.clip(depth("disc", around.x, around.y) * placed.radius + 0.5, 0, 1)[..., None]
    brightness = generator.uniform(0.85, 1.15)
    grain = generator.normal(0, 0.03, around.pixels.shape)
    return alpha, alpha * np.clip(brightness * np.array(COLOURS[placed.kind]) + grain, 0, 1)


def _draw_picture(placed: Placed, around: Surroundings, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draw a small picture, nearly upright."""
    x, y = _turned(around, placed.turn * pictures.TURN / np.pi)
    return pictures.draw(placed.kind, x, y, placed.radius, generator)


OBJECTS = {
    "shapes": ObjectSet(KINDS, (0.09, 0.17), _draw_shape),
    "discs": ObjectSet(tuple(COLOURS), (0.03, 0.125), _draw_disc),
    "pictures": ObjectSet(pictures.PICTURES, (0.05, 0.09), _draw_picture),
}
