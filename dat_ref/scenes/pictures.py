"""Objects that people recognize: small pictures with an alpha channel, drawn at any position, size and rotation.

    colour(p) = M(hue) · brightness · picture(R(turn) · p / radius),      M rotates colours about the grey axis

Hue, brightness, turn and mirroring vary from scene to scene, and several kinds share a colour, so that colour alone
does not name the object.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .._checks import Array
from ..data import object_path, objects
from ..ops.sampling import bilinear_sample
from ..pictures import import_pillow

PICTURES = objects()
HUE = 0.4  # largest rotation of the colours about the grey axis, radians
TURN = 0.3  # largest rotation of the picture, radians
BRIGHTNESS = (0.8, 1.15)


@cache
def picture(kind: str, side: int = 128) -> Array:
    """Return an object's picture, cut to its opaque part: (side, side, 4) float32, colours times alpha, and alpha."""
    image = import_pillow()
    with image.open(object_path(kind)) as opened:
        layered = opened.convert("RGBA")
    left, top, right, bottom = layered.getchannel("A").point(lambda alpha: 255 * (alpha > 5)).getbbox() or (0, 0, 1, 1)
    half = max(right - left, bottom - top) / 2 + 2
    x, y = (left + right) / 2, (top + bottom) / 2
    square = layered.transform(
        (side, side), image.Transform.EXTENT, (x - half, y - half, x + half, y + half), image.Resampling.BILINEAR
    )
    values = np.asarray(square, dtype=np.float32) / 255
    return np.concatenate((values[..., :3] * values[..., 3:], values[..., 3:]), axis=-1)


@cache
def _reduced(kind: str, factor: int) -> Array:
    """Return the picture averaged over factor × factor pixels, as a map (1, 4, n, n)."""
    whole = picture(kind)
    rows = len(whole) // factor
    blocks = whole[: rows * factor, : rows * factor].reshape(rows, factor, rows, factor, 4)
    return blocks.mean((1, 3)).transpose(2, 0, 1)[None]


def draw(kind: str, x: Array, y: Array, radius: float, generator: np.random.Generator) -> tuple[Array, Array]:
    """Return alpha (h, w, 1) and colour times alpha (h, w, 3) of an object at each pixel.

    Args:
        kind: one of `PICTURES`.
        x, y: (h, w), position of each pixel relative to the object's center, in radii; x to the right, y down.
        radius: in pixels.
        generator: draws mirroring, hue and brightness; always three numbers, whatever the size.
    """
    mirrored, hue = generator.uniform(size=2) * 2 - 1
    brightness = generator.uniform(*BRIGHTNESS)
    factor = max(int(len(picture(kind)) / (2 * radius)), 1)
    small = _reduced(kind, factor)
    pixels = (np.stack([y, np.where(mirrored < 0, -x, x)], axis=-1) + 1) / 2 * small.shape[-1] - 0.5
    sampled = bilinear_sample(small, pixels.reshape(1, -1, 2)).reshape(4, *x.shape).transpose(1, 2, 0)
    alpha = sampled[..., 3:]
    colour = np.clip(brightness * sampled[..., :3] @ hue_rotation(HUE * hue).T, 0, alpha)
    return alpha, colour


def hue_rotation(angle: float) -> Array:
    """Return the rotation of (red, green, blue) about the grey axis (1, 1, 1), (3, 3).

    >>> np.allclose(hue_rotation(1.0) @ np.ones(3), 1)
    True
    """
    axis = np.full(3, 3**-0.5)
    cross = np.cross(np.eye(3), axis)
    return np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)
