"""Hypothesis strategies: different, mostly odd axis lengths; points on, near and off the lattice and outside the map.

Cases shrink toward readable ones: short sides, integer coordinates, and maps with pixel values 1, 2, 3 ….
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .._checks import Array
from .._deprecation import deprecated_names
from ..ops.grid import Size

__getattr__ = deprecated_names(__name__, {"awkward": "non_contiguous", "numbers": "integers"})

SIDES = (1, 3, 5, 2, 7, 4)  # odd ones first, because failures shrink toward the front

seeds = st.integers(0, 2**16)


def integers(seed: int, *shape: int) -> Array:
    """Return small integers as float64: 1, 2, 3 … for seed 0, otherwise random ones from -9 … 9."""
    count = int(np.prod(shape))
    if seed == 0:
        return np.arange(1.0, count + 1).reshape(shape)
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float64)


def non_contiguous(array: Array) -> Array:
    """Return a read-only copy with strides of two elements, and a negative stride in the last axis."""
    padded = np.full([2 * length for length in array.shape], np.nan, dtype=array.dtype)
    view = padded[tuple(slice(None, None, 2) for _ in array.shape)][..., ::-1]
    view[...] = array
    view.flags.writeable = False
    return view


@st.composite
def map_sizes(draw: st.DrawFn, smallest: int = 1, largest: int = 7) -> Size:
    """Draw (H, W) with H != W, because a square hides swapped axes."""
    sides = [side for side in SIDES if smallest <= side <= largest]
    height = draw(st.sampled_from(sides))
    return height, draw(st.sampled_from([side for side in sides if side != height]))


def square_sizes(smallest: int = 2, largest: int = 7) -> st.SearchStrategy[Size]:
    """Draw (n, n), for checks that must not depend on the order of axes."""
    return st.sampled_from([(side, side) for side in sorted(SIDES) if smallest <= side <= largest])


@cache  # validating a strategy costs more than drawing from it
def on_pixel(length: int) -> st.SearchStrategy[float]:
    """Draw a pixel center on an axis."""
    return st.integers(0, length - 1).map(float)


@cache
def quarters(low: float, high: float) -> st.SearchStrategy[float]:
    """Draw multiples of a quarter pixel between pixel centers, low <= value <= high."""
    steps = [step / 4 for step in range(int(np.ceil(4 * low)), int(np.floor(4 * high)) + 1) if step % 4]
    return st.sampled_from(sorted(steps, key=lambda value: (abs(value), value < 0)))


@cache
def anywhere(length: int) -> st.SearchStrategy[float]:
    """Draw any coordinate on an axis: integers, quarters, close to integers, between them, just or far outside."""
    near = st.tuples(st.integers(-1, length), st.sampled_from([1e-9, -1e-9, 2.0**-40])).map(sum)
    between = st.floats(-1.5, length + 0.5, width=32)
    outside = st.sampled_from([float(length), -1.0, -1.0 - 2**-20, 1e6, -1e6])
    steps = st.integers(-6, 4 * length + 2).map(lambda step: step / 4)
    return st.one_of(on_pixel(length), steps, outside, near, between)


@st.composite
def points_in(draw: st.DrawFn, size: Size, coordinate: Any, counts: Sequence[int] = (1, 3)) -> Array:
    """Draw points (P, 2). `coordinate` returns a strategy for the length of an axis."""
    count = draw(st.sampled_from(list(counts)))
    return np.array([[draw(coordinate(length)) for length in size] for _ in range(count)]).reshape(count, 2)
