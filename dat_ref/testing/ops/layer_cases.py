"""Cases of operation ``layer``. Most weights are zero, so that each case tests one property.

Most cases use these constructions:

- Queries are zero. So all keys have equal attention weights, and the result is a mean over the keys; or the bias alone
  defines the weights.
- The offset network's norm has weight 0 and bias 8, where GELU and ReLU are the identity. So all keys have the same
  offset, which is given by the pointwise weight.
- With a stride of 3 the keys are on pixels 1, 4, 7 …, so that points shifted by half a pixel are still inside the map.
  With a stride of 1 they are on all pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...config import DeformableAttentionConfig, OffsetBound
from ...conventions import Convention
from ...layer import deformable_layer, deformable_shapes
from ...ops.grid import Size
from ...params import flatten, unflatten
from ..layers import kink_distance, random_params
from ..op_spec import Case, Setting
from ..strategies import integers, map_sizes, seeds

CaseFactory = Callable[..., Case]
Weights = dict[str, Array]
MIN_KINK_DISTANCE = 5e-3  # pixels between a point and the nearest kink
IDENTITY_RANGE = 8.0  # GELU is the identity for larger inputs

DEFAULTS: dict[str, Any] = {
    "heads": 1,
    "groups": 1,
    "stride": 1,
    "kernel_size": 3,
    "offset_bound": "tanh_cells",
    "offset_range": 2.0,
}


# Descriptions of the protocol's arguments.
WEIGHTS = "\n".join(
    [
        "dict of arrays by name; matrices are (outputs, inputs), k is the kernel size:",
        "query, key, value, output: each .weight (C, C) and .bias (C)",
        "offset_network.depthwise.weight (C/G, 1, k, k) and .bias (C/G)",
        "offset_network.norm.weight and .bias (C/G)",
        "offset_network.pointwise.weight (2, C/G), y first",
        "position_bias.table (M, 2H - 1, 2W - 1)",
    ]
)
OPTIONS = "\n".join(
    [
        "dict of heads, groups, stride, kernel_size, offset_range,",
        "offset_bound ('tanh_cells', 'clamp' or 'tanh_coordinates')",
    ]
)


def config_of(x: Array, weights: Weights, options: dict[str, Any], convention: Convention) -> DeformableAttentionConfig:
    """Return the configuration of a layer from the protocol's arguments."""
    rows, columns = weights["position_bias.table"].shape[1:]
    return layer_config(x.shape[1], ((rows + 1) // 2, (columns + 1) // 2), options, convention)


def layer_config(
    dim: int, size: Size, options: dict[str, Any], convention: Convention = Convention.CELL_CENTER
) -> DeformableAttentionConfig:
    """Return a configuration from a number of channels, the size of the map and the protocol's options."""
    changes = {**options, "offset_bound": OffsetBound(options["offset_bound"])}
    return DeformableAttentionConfig(dim, size=size, convention=convention, **changes)


def layer_case(x: Array, change: dict[str, Array], name: str = "", **options: Any) -> Case:
    """Return a case: zero weights except the given ones, and identity value and output projections."""
    options = {**DEFAULTS, **options}
    shapes = flatten(deformable_shapes(layer_config(x.shape[1], x.shape[2:], options)))
    weights = {leaf: np.zeros(shape) for leaf, shape in shapes.items()}
    for projection in ("value", "output"):
        weights[f"{projection}.weight"] = np.eye(x.shape[1])
    weights["offset_network.norm.bias"] += IDENTITY_RANGE
    return Case({"x": x, "weights": {**weights, **change}, "options": options}, name)


def constant_offset(group_dim: int, y: float, x: float) -> Weights:
    """Return the weight that moves all points by fractions y and x of the bound, in (-1, 1)."""
    raw = np.arctanh([y, x]) / (IDENTITY_RANGE * group_dim)
    return {"offset_network.pointwise.weight": np.repeat(raw[:, None], group_dim, axis=1)}


# ------------------------------------------------------------------------------------------------ maps


def constant_map(side: int, seed: int, channels: int) -> Array:
    """Return a map with equal pixels."""
    return np.broadcast_to(integers(seed, 1, channels, 1, 1) / 4, (1, channels, side, side)).copy()


def cell_map(seed: int, channels: int) -> Array:
    """Return a map of 6 × 6 that is constant on cells of 3 × 3."""
    return np.kron(integers(seed, 1, channels, 2, 2) / 4, np.ones((3, 3)))


# Means of positive values do not cancel, so relative rounding errors stay small.


def ramp(side: int, seed: int) -> Array:
    """Return a square map that is linear in y and x."""
    slope_y, slope_x, start = np.random.default_rng(seed).permutation([1.0, 2.0, 3.0])
    position = np.arange(float(side))
    return (start + slope_y * position[:, None] + slope_x * position)[None, None]


def symmetric(side: int, seed: int) -> Array:
    """Return a square map that equals its transpose."""
    half = integers(seed, side, side)
    return (half + half.T + 20)[None, None]


def positive_map(size: Size, seed: int) -> Array:
    """Return a map of positive values."""
    return integers(seed, 1, 1, *size) + 10


def any_map(size: Size, seed: int, channels: int = 1, images: int = 1) -> Array:
    """Return a map of small values."""
    return integers(seed, images, channels, *size) / 8


# ------------------------------------------------------------------------------------------------ cases


def projections(side: int, seed: int, name: str = "") -> Case:
    """Return a case with equal pixels: all values are equal for any weights."""
    changes = {
        f"{each}.weight": integers(seed + i, 3, 3) / 4 for i, each in enumerate(("query", "key", "value", "output"))
    }
    changes |= {
        f"{each}.bias": integers(seed + 4 + i, 3) / 4 for i, each in enumerate(("query", "key", "value", "output"))
    }
    return layer_case(constant_map(side, seed, 3), changes, name, stride=3)


def content_case(channels: int, heads: int) -> Callable[..., Case]:
    """Return a factory of cases with four cells of constant features: the result depends on features, not positions."""

    def case(seed: int, name: str = "") -> Case:
        changes = {
            f"{each}.weight": integers(seed + i, channels, channels) / 4 for i, each in enumerate(("query", "key"))
        }
        return layer_case(cell_map(seed + 2, channels), changes, name, stride=3, heads=heads)

    return case


def mean_case(make_map: Callable[[int, int], Array], stride: int) -> Callable[..., Case]:
    """Return a factory of cases with zero offsets whose result is the mean over the points."""
    return lambda side, seed, name="": layer_case(make_map(side, seed), {}, name, stride=stride)


def moved_mean_case(
    x: Array, down: float, right: float, name: str = "", *, stride: int = 3, offset_range: float = 1.0
) -> Case:
    """Return a case whose result is the mean over the points, all moved by fractions of the bound."""
    return layer_case(x, constant_offset(1, down, right), name, stride=stride, offset_range=offset_range)


def bias_only_case(
    x: Array, table: Array, name: str = "", *, down: float = 0.0, right: float = 0.0, channels: int = 1, heads: int = 1
) -> Case:
    """Return a case whose attention weights depend on the bias only: one key per pixel, moved (down, right) pixels."""
    changes = {"position_bias.table": table, **constant_offset(channels, down / 2, right / 2)}
    return layer_case(x, changes, name, heads=heads, offset_range=4.0)


def table_for(x: Array, seed: int, heads: int = 1) -> Array:
    """Return a table with entries of order 1."""
    height, width = x.shape[2:]
    return integers(seed, heads, 2 * height - 1, 2 * width - 1) / 8


def middle_entry_table(x: Array) -> Array:
    """Return a table that is 1 at its center and 0 elsewhere."""
    table = np.zeros((1, 2 * x.shape[2] - 1, 2 * x.shape[3] - 1))
    table[0, x.shape[2] - 1, x.shape[3] - 1] = 1
    return table


def even_table(x: Array, seed: int) -> Array:
    """Return a square table that is invariant to flips and transposition."""
    table = table_for(x, seed)
    table = table + table[:, ::-1]
    table = table + table[:, :, ::-1]
    return (table + table.swapaxes(1, 2)) / 8


def zero_border(table: Array) -> Array:
    """Return a table whose outermost entries are zero."""
    inner = np.zeros_like(table)
    inner[:, 1:-1, 1:-1] = table[:, 1:-1, 1:-1]
    return inner


def random_layer(size: Size, seed: int, name: str = "", *, channels: int = 4, images: int = 1, **options: Any) -> Case:
    """Return a case with random weights, and with offsets and tables of order 1."""
    x = any_map(size, seed + 1, channels, images)
    shapes = deformable_shapes(layer_config(channels, size, {**DEFAULTS, **options}))
    return layer_case(x, flatten(random_params(shapes, np.random.default_rng(seed))), name, **options)


def equal_keys(case: Case, *, table: bool = False) -> Case:
    """Return a case with equal keys, so that attention weights are equal, or with `table` depend on the bias only."""
    zeroed = ["key.weight", "key.bias", *(() if table else ("position_bias.table",))]
    return case.with_arrays({f"weights.{name}": 0 * case.arguments["weights"][name] for name in zeroed})


# ------------------------------------------------------------------------------------------------ families of cases

square_sides = st.sampled_from([6, 9])
small_square_sides = st.sampled_from([3, 4, 5])
bound_fractions = st.sampled_from([0.5, -0.5])
rectangles = map_sizes(smallest=2, largest=5)
strided_sizes = st.sampled_from([(6, 9), (9, 6), (12, 6)])


def builds(make: CaseFactory, *strategies: st.SearchStrategy[Any], **options: st.SearchStrategy[Any]) -> Any:
    """Return a strategy that does not depend on the setting."""
    return lambda setting: st.builds(make, *strategies, **options)


def with_table(
    make: Callable[[Array, int], Array], *, channels: int = 1, heads: int = 1, y: float = 0, x: float = 0
) -> CaseFactory:
    """Return a factory of cases whose attention weights depend on the bias only."""

    def case(size: Any, seed: int, name: str = "") -> Case:
        size = size if isinstance(size, tuple) else (size, size)
        x_map = any_map(size, seed + 1, channels)
        return bias_only_case(x_map, make(x_map, seed), name, down=y, right=x, channels=channels, heads=heads)

    return case


def middle_table(x: Array, seed: int) -> Array:
    return middle_entry_table(x)


def transposable_table(x: Array, seed: int) -> Array:
    table = table_for(x, seed)
    return table + table.swapaxes(1, 2)


def two_tables(x: Array, seed: int) -> Array:
    return table_for(x, seed, heads=2)


def bordered_even_table(x: Array, seed: int) -> Array:
    return zero_border(even_table(x, seed))


def bordered_table(x: Array, seed: int) -> Array:
    return zero_border(table_for(x, seed))


def offsets_only(size: Any, seed: int, name: str = "", **options: Any) -> Case:
    """Return a case with equal keys: the result is the mean of the sampled features."""
    return equal_keys(random_layer(size, seed, name, **options))


def long_map(size: Any, seed: int, name: str = "") -> Case:
    """Return a case with points a quarter of a pixel off the pixel centers of a long map."""
    return moved_mean_case(positive_map(size, seed), 1 / 6, 1 / 6, name)


def moved_mean_cases(stride: int, offset_range: float, make_map: Callable[[Any, int], Array]) -> CaseFactory:
    """Return a factory of `moved_mean_case`, with maps from a size and a seed."""
    return lambda size, seed, y, x, name="": moved_mean_case(
        make_map(size, seed), y, x, name, stride=stride, offset_range=offset_range
    )


bounded = moved_mean_cases(3, 1.0, ramp)


def bounded_equally(side: int, seed: int, fraction: float) -> Case:
    """Return a case with equal offsets in y and x, which hides their order."""
    return bounded(side, seed, fraction, fraction)


on_rectangles = moved_mean_cases(3, 0.5, positive_map)
at_the_border = moved_mean_cases(1, 4.0, positive_map)
grouped = partial(random_layer, channels=8, heads=4, groups=2)
typical = [random_layer((4, 6), 3, "two groups, stride 2, two images", heads=2, groups=2, stride=2, images=2)]


@st.composite
def any_layer(draw: st.DrawFn) -> Case:
    """Draw a layer."""
    groups, heads, channels = draw(st.sampled_from([(1, 1, 2), (2, 2, 4), (1, 2, 4), (2, 4, 8)]))
    size, stride = draw(map_sizes(smallest=3, largest=5)), draw(st.sampled_from([1, 2]))
    return random_layer(
        size, draw(seeds), channels=channels, heads=heads, groups=groups, stride=stride,
        kernel_size=draw(st.sampled_from([3, 5])), images=draw(st.sampled_from([1, 2])),
        offset_range=draw(st.sampled_from([2.0, 3.0])),
    )  # fmt: skip


def any_batch(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw any number of images, including zero."""
    return st.builds(
        random_layer, map_sizes(smallest=3), seeds, images=st.integers(0, 3), stride=st.sampled_from([1, 2])
    )


def away_from_kinks(make: CaseFactory) -> Callable[[Setting], Sequence[Case]]:
    """Return an example whose forward pass in the setting's convention is not close to a kink."""
    return lambda setting: [_away_from_kinks(make, setting.convention)]


@cache
def _away_from_kinks(make: CaseFactory, convention: Convention) -> Case:
    for seed in count():
        case = make((4, 5), seed, "two groups, two images", heads=2, groups=2, stride=2, images=2)
        if _kink_distance(case, convention) > MIN_KINK_DISTANCE:
            return case
    raise AssertionError  # unreachable; about one case in ten is far enough from kinks


def _kink_distance(case: Case, convention: Convention) -> float:
    x, weights, options = case.arguments.values()
    config = config_of(x, weights, options, convention)
    trace = deformable_layer(x, unflatten(weights), config)[1]
    return kink_distance(trace, config, weights["position_bias.table"].shape[1:])


def without_table(size: Any, seed: int, name: str = "", **options: Any) -> Case:
    case = random_layer(size, seed, name, **options)
    return case.with_arrays({"weights.position_bias.table": 0 * case.arguments["weights"]["position_bias.table"]})
