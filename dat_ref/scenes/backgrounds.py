"""Backgrounds of scenes: the photographs that ship, each cut into a training part and a held-out part.

The right third of every photograph is held out. Both parts show similar things and share no pixel.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .._checks import Array
from ..data import photograph_path, photographs
from ..pictures import import_pillow, read_picture

HELD_OUT = 1 / 3  # of each photograph's width, on its right
LEAST_SIDE = 80  # pixels of the photograph that a background shows, at least; fewer are a blur


@cache
def part(name: str, split: str) -> Array:
    """Return a split's part of a photograph, (H, W, 3), uint8."""
    pixels = np.asarray(read_picture(photograph_path(name)))
    border = round(pixels.shape[1] * (1 - HELD_OUT))
    return pixels[:, :border] if split == "train" else pixels[:, border:]


def background(generator: np.random.Generator, split: str, size: int) -> Array:
    """Draw a background: a square cut from a photograph, mirrored half of the time, lighter or darker.

    Args:
        generator: source of the random numbers.
        split: ``"train"`` or ``"held_out"``.
        size: side of the background, pixels.

    Returns:
        (size, size, 3) float32 in [0, 1].
    """
    names = photographs()
    pixels = part(names[generator.integers(len(names))], split)
    height, width = pixels.shape[:2]
    side = int(generator.integers(LEAST_SIDE, min(height, width) + 1))
    top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
    square = _resized(pixels[top : top + side, left : left + side], size)
    if generator.integers(2):
        square = square[:, ::-1]
    return np.clip(square * generator.uniform(0.75, 1.2), 0, 1).astype(np.float32)


def _resized(pixels: Array, size: int) -> Array:
    """Return a square of another size, in [0, 1], with antialiasing where it is reduced."""
    image = import_pillow()
    resized = image.fromarray(pixels).resize((size, size), image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32) / 255
