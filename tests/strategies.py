"""Hypothesis strategies: axes of different, mostly odd lengths; points on, near and off the lattice, and outside.

Array elements come from a seed, so that a failure shrinks to a small shape and names the seed; shapes, options and
single points are drawn one by one.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from helpers.layers import random_params
from hypothesis import strategies as st

from dat_ref import (
    BiasKind,
    Convention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
)
from dat_ref.block import ATTENTIONS
from dat_ref.ops.grid import key_grid_size
from dat_ref.testing.op_spec import show_shapes
from dat_ref.testing.strategies import anywhere, map_sizes, non_contiguous, points_in, seeds

__all__ = [
    "Case",
    "consistent_conventions",
    "conventions",
    "layer_cases",
    "map_sizes",
    "neighborhood_cases",
    "non_contiguous",
    "numbers",
    "points_px",
    "seeds",
    "shown_by_shape",
    "window_cases",
]

conventions = st.sampled_from(list(Convention))
consistent_conventions = st.sampled_from([Convention.CELL_CENTER, Convention.PAPER])


def numbers(seed: int, *shape: int, dtype: Any = np.float64) -> np.ndarray:
    """Return standard normal elements, drawn by seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def points_px(size: tuple[int, int], count: int) -> st.SearchStrategy[np.ndarray]:
    """Draw pixel positions (count, 2): integers, next to integers, between them, just outside and far outside."""
    return points_in(size, anywhere, (count,))


class Drawn(tuple[Any, ...]):
    """A drawn tuple. Its representation has the shapes of arrays: Hypothesis warns about one with all elements."""

    def __repr__(self) -> str:
        return show_shapes(tuple(self))


def shown_by_shape(make: Callable[..., st.SearchStrategy[Any]]) -> Callable[..., st.SearchStrategy[Any]]:
    """Decorate the function of a composite strategy whose values are tuples with arrays."""

    @functools.wraps(make)
    def strategy(*arguments: Any, **options: Any) -> st.SearchStrategy[Any]:
        return make(*arguments, **options).map(Drawn)

    return strategy


@dataclass(frozen=True)
class Case:
    """An attention layer to run: configuration, map size, batch size and the seed of its arrays."""

    config: Any
    size: tuple[int, int]
    batch: int
    seed: int

    def x(self, dtype: Any = np.float64) -> np.ndarray:
        """Return the map (B, C, H, W)."""
        return numbers(self.seed, self.batch, self.config.dim, *self.size, dtype=dtype)

    def params(self, dtype: Any = np.float64) -> Any:
        """Return random parameters."""
        shapes = ATTENTIONS[type(self.config)].shapes(self.config)
        return random_params(shapes, np.random.default_rng([self.seed, 1]), dtype)

    @property
    def keys(self) -> tuple[int, int]:
        """Return the size of a deformable layer's key grid."""
        config = self.config
        return key_grid_size(self.size, config.kernel_size, config.stride, config.convention)


@st.composite
def layer_cases(
    draw: st.DrawFn,
    *,
    among: Sequence[Convention] = tuple(Convention),
    bounds: Sequence[OffsetBound] = tuple(OffsetBound),
    biases: Sequence[BiasKind] = tuple(BiasKind),
    strides: Sequence[int] = (1, 2, 3),
    batches: Sequence[int] = (1, 2),
    smallest: int = 1,
    largest: int = 5,
    other_table: bool = True,
) -> Case:
    """Draw a deformable layer.

    A single key of the 2023 release is at infinity, where an offset alone is not defined: the clamp replaces it. If ±1
    are pixel centers, "fractions of the map" are undefined on an axis of one pixel: such an axis keeps its own table.
    """
    size = draw(map_sizes(smallest, largest))
    convention = draw(st.sampled_from(list(among)))
    bound, bias = draw(st.sampled_from(list(bounds))), draw(st.sampled_from(list(biases)))
    groups, heads_each, head_dim = draw(st.sampled_from([(2, 1, 3), (1, 2, 3), (3, 2, 1), (2, 2, 2), (1, 1, 2)]))
    stride = draw(st.sampled_from([stride for stride in strides if stride <= min(size)] or [1]))
    kernel = draw(st.sampled_from([3, 5, 1, 2, stride]))
    keys = key_grid_size(size, kernel, stride, convention)
    if convention is Convention.DATPP2023 and 1 in keys and bound in (OffsetBound.TANH_CELLS, OffsetBound.RAW):
        bound = OffsetBound.CLAMP
    pools = bound is OffsetBound.NONE and tuple(stride * count for count in keys) == size
    built = list(size)
    if other_table and bias is BiasKind.TABLE:
        for axis in range(2):
            if size[axis] > 1 or not convention.align_corners:
                built[axis] = draw(st.sampled_from([size[axis], 1, 3, 4]))
    config = DeformableAttentionConfig(
        dim=groups * heads_each * head_dim,
        heads=groups * heads_each,
        groups=groups,
        stride=stride,
        kernel_size=kernel,
        offset_bound=bound,
        offset_range=draw(st.sampled_from([2.0, 3.5, 0.0])),
        bias=bias,
        size=(built[0], built[1]) if bias in (BiasKind.TABLE, BiasKind.FIXED) else None,
        convention=convention,
        bias_resolution=draw(st.sampled_from(["fractions", "pixels"])),
        average_pool=pools and draw(st.booleans()),
    )
    return Case(config, size, draw(st.sampled_from(list(batches))), draw(seeds))


@st.composite
def window_cases(draw: st.DrawFn, batches: Sequence[int] = (1, 2), largest: int = 7) -> Case:
    """Draw window attention, with and without shift, on maps larger and smaller than a window."""
    window = draw(st.sampled_from([3, 2, 4, 1]))
    heads, head_dim = draw(st.sampled_from([(2, 1), (1, 3), (3, 2)]))
    config = WindowAttentionConfig(heads * head_dim, heads, window, shift=draw(st.integers(0, window - 1)))
    return Case(config, draw(map_sizes(largest=largest)), draw(st.sampled_from(list(batches))), draw(seeds))


@st.composite
def neighborhood_cases(draw: st.DrawFn, batches: Sequence[int] = (1, 2), largest: int = 7) -> Case:
    """Draw neighborhood attention on maps larger and smaller than the neighborhood, under both rules for small maps."""
    heads, head_dim = draw(st.sampled_from([(2, 1), (1, 3), (3, 2)]))
    rule = draw(st.sampled_from(["shrink", "pad"]))
    config = NeighborhoodAttentionConfig(heads * head_dim, heads, draw(st.sampled_from([3, 5, 1])), small_map=rule)
    return Case(config, draw(map_sizes(largest=largest)), draw(st.sampled_from(list(batches))), draw(seeds))
