"""Cases of subject ``layer``: weights so quiet that only one thing at a time can be seen.

The pieces that most cases are made of:

- Queries are zero, so that every key has the same share and a result is a mean over the keys; or the bias alone
  decides.
- The offset network's norm is silenced (weight 0, bias 8, where GELU and ReLU are the identity), so that all keys move
  by the same offset, which the pointwise weight sets.
- A stride of three puts keys onto pixels 1, 4, 7 …, so that what is off by half a pixel still reads inside the map; a
  stride of one puts them on all pixels.
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
from ..strategies import map_sizes, numbers, seeds
from ..subject import Case, Setting

Make = Callable[..., Case]
Weights = dict[str, Array]
CLEAR = 5e-3  # pixels between a point and the nearest kink
LOUD = 8.0  # beyond which an activation is the identity

DEFAULTS: dict[str, Any] = {
    "heads": 1,
    "groups": 1,
    "stride": 1,
    "kernel_size": 3,
    "offset_bound": "tanh_cells",
    "offset_range": 2.0,
}


# What the protocol hands over, for people.
WEIGHTS = "\n".join(
    [
        "dict of arrays by name; W is (outputs, inputs), k the kernel:",
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
    """Return the configuration of a layer from what the protocol hands over."""
    rows, columns = weights["position_bias.table"].shape[1:]
    return layer_config(x.shape[1], ((rows + 1) // 2, (columns + 1) // 2), options, convention)


def layer_config(
    dim: int, size: Size, options: dict[str, Any], convention: Convention = Convention.CELL_CENTER
) -> DeformableAttentionConfig:
    """Return a configuration from a number of channels, the size of the map and the protocol's options."""
    given = {**options, "offset_bound": OffsetBound(options["offset_bound"])}
    return DeformableAttentionConfig(dim, size=size, convention=convention, **given)


def layer_case(x: Array, change: dict[str, Array], name: str = "", **options: Any) -> Case:
    """Return a case: silent weights but for those given; value and output projections are the identity."""
    options = {**DEFAULTS, **options}
    shapes = flatten(deformable_shapes(layer_config(x.shape[1], x.shape[2:], options)))
    weights = {leaf: np.zeros(shape) for leaf, shape in shapes.items()}
    for projection in ("value", "output"):
        weights[f"{projection}.weight"] = np.eye(x.shape[1])
    weights["offset_network.norm.bias"] += LOUD
    return Case({"x": x, "weights": {**weights, **change}, "options": options}, name)


def constant_offset(group_dim: int, y: float, x: float) -> Weights:
    """Return the weight that moves every point by these shares of the bound, -1 … 1."""
    raw = np.arctanh([y, x]) / (LOUD * group_dim)
    return {"offset_network.pointwise.weight": np.repeat(raw[:, None], group_dim, axis=1)}


# ------------------------------------------------------------------------------------------------ maps


def same_everywhere(side: int, seed: int, channels: int) -> Array:
    """Return a map of one pixel, repeated."""
    return np.broadcast_to(numbers(seed, 1, channels, 1, 1) / 4, (1, channels, side, side)).copy()


def in_cells(seed: int, channels: int) -> Array:
    """Return a map of 6 × 6 that is constant on cells of 3 × 3."""
    return np.kron(numbers(seed, 1, channels, 2, 2) / 4, np.ones((3, 3)))


# Means of positive numbers do not cancel, so that rounding stays small beside them.


def ramp(side: int, seed: int) -> Array:
    """Return a square map that is linear in y and x."""
    slope_y, slope_x, start = np.random.default_rng(seed).permutation([1.0, 2.0, 3.0])
    at = np.arange(float(side))
    return (start + slope_y * at[:, None] + slope_x * at)[None, None]


def symmetric(side: int, seed: int) -> Array:
    """Return a square map that is its own transpose."""
    drawn = numbers(seed, side, side)
    return (drawn + drawn.T + 20)[None, None]


def positive_map(size: Size, seed: int) -> Array:
    """Return a map of positive numbers."""
    return numbers(seed, 1, 1, *size) + 10


def any_map(size: Size, seed: int, channels: int = 1, images: int = 1) -> Array:
    """Return a map of small numbers."""
    return numbers(seed, images, channels, *size) / 8


# ------------------------------------------------------------------------------------------------ cases, in order


def projections(side: int, seed: int, name: str = "") -> Case:
    """The same pixel everywhere: every value is the same, whatever the weights."""
    given = {
        f"{each}.weight": numbers(seed + i, 3, 3) / 4 for i, each in enumerate(("query", "key", "value", "output"))
    }
    given |= {
        f"{each}.bias": numbers(seed + 4 + i, 3) / 4 for i, each in enumerate(("query", "key", "value", "output"))
    }
    return layer_case(same_everywhere(side, seed, 3), given, name, stride=3)


def of_content(channels: int, heads: int) -> Callable[..., Case]:
    """Return what makes cases in which features decide, and positions do not: four cells of constant features."""

    def case(seed: int, name: str = "") -> Case:
        given = {f"{each}.weight": numbers(seed + i, channels, channels) / 4 for i, each in enumerate(("query", "key"))}
        return layer_case(in_cells(seed + 2, channels), given, name, stride=3, heads=heads)

    return case


def means_of(make_map: Callable[[int, int], Array], stride: int) -> Callable[..., Case]:
    """Return what makes cases in which the result is the mean over the points, without offsets."""
    return lambda side, seed, name="": layer_case(make_map(side, seed), {}, name, stride=stride)


def moved_means(x: Array, y: float, right: float, name: str = "", *, stride: int = 3, reach: float = 1.0) -> Case:
    """The mean over points that all move by shares of the bound."""
    return layer_case(x, constant_offset(1, y, right), name, stride=stride, offset_range=reach)


def by_bias(
    x: Array, table: Array, name: str = "", *, y: float = 0.0, right: float = 0.0, channels: int = 1, heads: int = 1
) -> Case:
    """The bias alone decides; a key on each pixel, all moved by (y, right) pixels, a quarter at least."""
    given = {"position_bias.table": table, **constant_offset(channels, y / 2, right / 2)}
    return layer_case(x, given, name, heads=heads, offset_range=4.0)


def table_for(x: Array, seed: int, heads: int = 1) -> Array:
    """Return a table of order one."""
    height, width = x.shape[2:]
    return numbers(seed, heads, 2 * height - 1, 2 * width - 1) / 8


def middle_only(x: Array) -> Array:
    """Return a table that is zero but for its middle."""
    table = np.zeros((1, 2 * x.shape[2] - 1, 2 * x.shape[3] - 1))
    table[0, x.shape[2] - 1, x.shape[3] - 1] = 1
    return table


def even_table(x: Array, seed: int) -> Array:
    """Return a square table that has no direction: mirrored and transposed it is the same."""
    table = table_for(x, seed)
    table = table + table[:, ::-1]
    table = table + table[:, :, ::-1]
    return (table + table.swapaxes(1, 2)) / 8


def without_border(table: Array) -> Array:
    """Return a table whose outermost entries are zero."""
    kept = np.zeros_like(table)
    kept[:, 1:-1, 1:-1] = table[:, 1:-1, 1:-1]
    return kept


def random_layer(size: Size, seed: int, name: str = "", *, channels: int = 4, images: int = 1, **options: Any) -> Case:
    """Every weight drawn, offsets and tables of order one."""
    x = any_map(size, seed + 1, channels, images)
    shapes = deformable_shapes(layer_config(channels, size, {**DEFAULTS, **options}))
    return layer_case(x, flatten(random_params(shapes, np.random.default_rng(seed))), name, **options)


def equal_keys(case: Case, *, table: bool = False) -> Case:
    """The same case with keys that are all equal, so that every share is the same (or, with the table, its affair)."""
    silenced = ["key.weight", "key.bias", *(() if table else ("position_bias.table",))]
    return case.with_arrays({f"weights.{name}": 0 * case.arguments["weights"][name] for name in silenced})


# ------------------------------------------------------------------------------------------------ families of cases

squares = st.sampled_from([6, 9])
small_squares = st.sampled_from([3, 4, 5])
shares = st.sampled_from([0.5, -0.5])
not_square = map_sizes(smallest=2, largest=5)
threes = st.sampled_from([(6, 9), (9, 6), (12, 6)])


def drawn(make: Make, *strategies: st.SearchStrategy[Any], **named: st.SearchStrategy[Any]) -> Any:
    """Return the strategy of a check, which the setting does not change."""
    return lambda setting: st.builds(make, *strategies, **named)


def with_table(
    make: Callable[[Array, int], Array], *, channels: int = 1, heads: int = 1, y: float = 0, x: float = 0
) -> Make:
    """Return what makes cases in which the bias alone decides, with a table for the map."""

    def case(size: Any, seed: int, name: str = "") -> Case:
        size = size if isinstance(size, tuple) else (size, size)
        placed = any_map(size, seed + 1, channels)
        return by_bias(placed, make(placed, seed), name, y=y, right=x, channels=channels, heads=heads)

    return case


def middle_table(x: Array, seed: int) -> Array:
    return middle_only(x)


def transposable_table(x: Array, seed: int) -> Array:
    table = table_for(x, seed)
    return table + table.swapaxes(1, 2)


def two_tables(x: Array, seed: int) -> Array:
    return table_for(x, seed, heads=2)


def bordered_even_table(x: Array, seed: int) -> Array:
    return without_border(even_table(x, seed))


def bordered_table(x: Array, seed: int) -> Array:
    return without_border(table_for(x, seed))


def offsets_alone(size: Any, seed: int, name: str = "", **options: Any) -> Case:
    """Equal keys: the result is the mean of what is sampled where the network says."""
    return equal_keys(random_layer(size, seed, name, **options))


def long_map(size: Any, seed: int, name: str = "") -> Case:
    """Points a quarter of a pixel beside pixels, far along a map."""
    return moved_means(positive_map(size, seed), 1 / 6, 1 / 6, name)


def moved_by(stride: int, reach: float, make_map: Callable[[Any, int], Array]) -> Make:
    """Return what makes means over moved points, the map from a size and a seed."""
    return lambda size, seed, y, x, name="": moved_means(make_map(size, seed), y, x, name, stride=stride, reach=reach)


bounded = moved_by(3, 1.0, ramp)


def bounded_alike(side: int, seed: int, share: float) -> Case:
    """The same in y and x: which is which does not show."""
    return bounded(side, seed, share, share)


on_rectangles = moved_by(3, 0.5, positive_map)
at_the_border = moved_by(1, 4.0, positive_map)
grouped = partial(random_layer, channels=8, heads=4, groups=2)
plain = [random_layer((4, 6), 3, "two groups, stride 2, two images", heads=2, groups=2, stride=2, images=2)]


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
    """Draw any number of images, none included."""
    return st.builds(
        random_layer, map_sizes(smallest=3), seeds, images=st.integers(0, 3), stride=st.sampled_from([1, 2])
    )


def clear_of_kinks(make: Make) -> Callable[[Setting], Sequence[Case]]:
    """Return the example whose pass, under the setting's convention, comes near no kink."""
    return lambda setting: [_clear_of_kinks(make, setting.convention)]


@cache
def _clear_of_kinks(make: Make, convention: Convention) -> Case:
    for seed in count():
        case = make((4, 5), seed, "two groups, two images", heads=2, groups=2, stride=2, images=2)
        if _kink_distance(case, convention) > CLEAR:
            return case
    raise AssertionError  # one in ten is clear


def _kink_distance(case: Case, convention: Convention) -> float:
    x, weights, options = case.arguments.values()
    config = config_of(x, weights, options, convention)
    trace = deformable_layer(x, unflatten(weights), config)[1]
    return kink_distance(trace, config, weights["position_bias.table"].shape[1:])


def without_table(size: Any, seed: int, name: str = "", **options: Any) -> Case:
    case = random_layer(size, seed, name, **options)
    return case.with_arrays({"weights.position_bias.table": 0 * case.arguments["weights"]["position_bias.table"]})
