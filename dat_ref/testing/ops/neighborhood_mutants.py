"""Neighborhood attention that is wrong in one way each, and the first check that sees it.

The reference is cut into steps that can be exchanged one by one; with none exchanged its numbers are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._checks import Array
from ...ops.attention import attend
from ...ops.grid import Size
from ...peers.neighborhood import axis_neighbors
from ..op_spec import Function, Mutant
from .steps import replace_steps

# ------------------------------------------------------------------------------------------------ the steps


def window(length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Return the keys that each query of an axis sees, (length, K), for an axis that is taken to end at `limit`."""
    return axis_neighbors(max(length, limit), kernel, dilation)[:length]


def table_index_of(keys: Array, kernel: int, dilation: int) -> Array:
    """Return where on its axis of the table each key's displacement stands, (length, K)."""
    return (keys - np.arange(len(keys))[:, None]) // dilation + kernel - 1


def flat_index(rows: Array, columns: Array, size: Size) -> Array:
    """Return the number of each key in the map."""
    return rows * size[1] + columns


def identity(value: Any, *others: Any) -> Any:
    return value


@dataclass(frozen=True)
class Steps:
    """The steps, with what they take.

    Args:
        inputs: (q, k, v) -> the same.
        limit: the map's size -> the size that windows are clamped to.
        window: (length, limit, kernel, dilation) -> the keys of an axis; those outside the map are zero.
        flat_index: (rows, columns, size) -> the keys' numbers.
        table_index: (keys, kernel, dilation) -> places in the table.
        table: bias table -> the same.
        mask: (bias, whether the key lies outside) -> bias.
        scale: d -> the factor of the dot products.
        scale_bias: (bias, scale) -> bias.
    """

    inputs: Function = lambda q, k, v: (q, k, v)
    limit: Function = identity
    window: Function = window
    flat_index: Function = flat_index
    table_index: Function = table_index_of
    table: Function = identity
    mask: Function = identity
    scale: Callable[[int], float] = lambda depth: depth**-0.5
    scale_bias: Function = identity


def attend_in_steps(
    steps: Steps, q: Array, k: Array, v: Array, bias_table: Array, query_size: Size, kernel_size: int, dilation: int
) -> Array:
    """Return the result of attention (N, M, Q, D)."""
    q, k, v = steps.inputs(q, k, v)
    count = query_size[0] * query_size[1]
    axes = [
        steps.window(length, limit, kernel_size, dilation)
        for length, limit in zip(query_size, steps.limit(query_size), strict=True)
    ]
    axis_outside = [(keys < 0) | (keys >= len(keys)) for keys in axes]
    outside = (axis_outside[0][:, None, :, None] | axis_outside[1][None, :, None, :]).reshape(count, -1)
    key_index = steps.flat_index(axes[0][:, None, :, None], axes[1][None, :, None, :], query_size).reshape(count, -1)
    key_index = np.where(outside, count, key_index)  # one more key, of zeros
    rows, columns = (np.clip(steps.table_index(keys, kernel_size, dilation), 0, 2 * kernel_size - 2) for keys in axes)
    bias = steps.table(bias_table)[:, rows[:, None, :, None], columns[None, :, None, :]].reshape(
        len(bias_table), count, -1
    )
    scale = steps.scale(q.shape[-1])
    bias = steps.mask(steps.scale_bias(bias, scale), outside)
    padded_k, padded_v = (np.pad(each, ((0, 0), (0, 0), (0, 1), (0, 0))) for each in (k, v))
    return attend(q[:, :, :, None], padded_k[:, :, key_index], padded_v[:, :, key_index], bias[:, :, None], scale)[0][
        :, :, :, 0
    ]


# ------------------------------------------------------------------------------------------------ mistakes


def with_window(change: Callable[..., Array]) -> Function:
    """Windows are others: ``change(fn, length, limit, kernel, dilation)``."""
    return lambda fn: lambda *arguments: change(fn, *arguments)


def shifted(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.minimum(fn(length, limit, kernel, dilation) + dilation, length - 1)


def not_clamped(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Centered on the query, also where that leads out of the map."""
    return np.arange(length)[:, None] + dilation * (np.arange(kernel) - kernel // 2)


def border_repeated(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.clip(not_clamped(fn, length, limit, kernel, dilation), 0, length - 1)


def wrapped(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.mod(not_clamped(fn, length, limit, kernel, dilation), length)


def clamped_too_early(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Clamped at the last row but one."""
    keys = fn(length, limit, kernel, dilation)
    last = np.arange(length)[:, None] >= length - dilation * (kernel // 2)
    return np.where(last & (keys[:, :1] >= dilation), keys - dilation, keys)


def zero_padded(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """A map smaller than the window grows by zeros at its end."""
    return fn(length, max(limit, kernel * dilation), kernel, dilation)


def across_submaps(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Windows are clamped at the map's border, wherever that leads."""
    start = np.arange(length) - dilation * (kernel // 2)
    return np.clip(start, 0, max(length - 1 - dilation * (kernel - 1), 0))[:, None] + dilation * np.arange(kernel)


def shortest_submap(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """All sub-maps are taken to be as long as the shortest: the last pixels of the longer ones are never seen."""
    position, submap = np.divmod(np.arange(length), dilation)
    start = np.clip(position - kernel // 2, 0, max(length // dilation - kernel, 0))
    return submap[:, None] + dilation * (start[:, None] + np.arange(kernel))


def index_in_window(fn: Function) -> Function:
    """The bias belongs to the place in the window: as if every window were centered on its query."""
    return lambda keys, kernel, dilation: np.broadcast_to(np.arange(keys.shape[1]) + kernel // 2, keys.shape)


def middle_of_present_keys(fn: Function) -> Function:
    """The middle of the table is taken to be where it would be for as many keys as there are."""
    return lambda keys, kernel, dilation: fn(keys, keys.shape[1], dilation)


def height_for_width(rows: Array, columns: Array, size: Size) -> Array:
    return (rows * size[0] + columns) % (size[0] * size[1])


def first_image_keys(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q, np.broadcast_to(k[:1], k.shape), np.broadcast_to(v[:1], v.shape)


def masked(bias: Array, outside: Array) -> Array:
    return np.where(outside, -np.inf, bias)


# Each mistake: the first check that sees it, and the steps that are wrong.
MISTAKES: dict[str, tuple[str, dict[str, Function]]] = {
    "windows are shifted by one pixel down and right": ("inside", {"window": with_window(shifted)}),
    "windows are cropped at the border: border queries see fewer keys": (
        "at_the_border", {"window": with_window(not_clamped), "mask": lambda fn: masked}
    ),
    "windows extend over the border, and zero padding is attended to": (
        "at_the_border", {"window": with_window(not_clamped)}
    ),
    "windows extend over the border, where the last pixel is replicated": (
        "at_the_border", {"window": with_window(border_repeated)}
    ),
    "windows wrap around at the border": ("at_the_border", {"window": with_window(wrapped)}),
    "windows are clamped one row and one column too early": ("at_the_border", {"window": with_window(clamped_too_early)}),
    "columns are clamped to the height": ("not_square", {"limit": lambda fn: lambda size: (size[0], size[0])}),
    "rows are clamped to the width": ("not_square", {"limit": lambda fn: lambda size: (size[1], size[1])}),
    "flat key indices use the height as the row length": (
        "not_square", {"flat_index": lambda fn: height_for_width}
    ),
    "the dilation is ignored": (
        "dilation", {"window": lambda fn: lambda length, limit, kernel, dilation: fn(length, limit, kernel, 1)}
    ),
    "with dilation, windows are clamped to the map instead of their sub-map": (
        "dilation", {"window": with_window(across_submaps)}
    ),
    "with dilation, all sub-maps are assumed to be as long as the shortest": (
        "dilation", {"window": with_window(shortest_submap)}
    ),
    "padding keys are attended to: a map smaller than the window is zero-padded": (
        "small_map", {"window": with_window(zero_padded)}
    ),
    "keys and values swapped": ("scores", {"inputs": lambda fn: lambda q, k, v: (q, v, k)}),
    "the scale is missing": ("scores", {"scale": lambda fn: lambda depth: 1.0}),
    "the scale is 1/d instead of 1/√d": ("scores", {"scale": lambda fn: lambda depth: 1 / depth}),
    "the bias is ignored": ("bias_direction", {"table": lambda fn: np.zeros_like}),
    "the bias has the wrong sign": ("bias_direction", {"table": lambda fn: lambda table: -table}),
    "the displacement has the wrong sign: query minus key": (
        "bias_direction", {"table": lambda fn: lambda table: table[:, ::-1, ::-1]}
    ),
    "the bias is multiplied by the scale": (
        "bias_direction", {"scale_bias": lambda fn: lambda bias, scale: bias * scale}
    ),
    "the table is transposed": (
        "bias_rows_before_columns", {"table": lambda fn: lambda table: table.swapaxes(1, 2)}
    ),
    "the bias is indexed by the position in the window instead of the displacement": (
        "bias_at_the_border", {"table_index": index_in_window}
    ),
    "with dilation, displacements are counted in pixels instead of steps of the dilation": (
        "bias_dilated", {"table_index": lambda fn: lambda keys, kernel, dilation: fn(keys, kernel, 1)}
    ),
    "on a small map, the center of the table is computed from the number of visible keys": ("bias_small_map", {"table_index": middle_of_present_keys}),
    "tables of the heads in reverse order": ("heads", {"table": lambda fn: lambda table: table[::-1]}),
    "all heads use the first head's table": (
        "heads", {"table": lambda fn: lambda table: np.broadcast_to(table[:1], table.shape)}
    ),
    "all images attend to the first image's keys and values": (
        "images", {"inputs": lambda fn: first_image_keys}
    ),
}  # fmt: skip


def scaled_gradient(name: str, factor: float) -> Callable[[Function], Function]:
    """Return a VJP of which one gradient is multiplied."""

    def mutate(fn: Function) -> Function:
        def vjp(*arguments: Any) -> dict[str, Array]:
            grads = fn(*arguments)
            return {**grads, name: factor * grads[name]}

        return vjp

    return mutate


MUTANTS = (
    *(
        Mutant(name, check, replace_steps(attend_in_steps, Steps(), **steps))
        for name, (check, steps) in MISTAKES.items()
    ),
    *(
        Mutant(f"the gradient of {name} is 0.1 % too large", "gradient_of_q_k_v", vjp=scaled_gradient(name, 1.001))
        for name in ("q", "k", "v")
    ),
    Mutant(
        "the table's gradient is 0.1 % too large", "gradient_of_the_table", vjp=scaled_gradient("bias_table", 1.001)
    ),
    Mutant("the table gets no gradient", "gradient_of_the_table", vjp=scaled_gradient("bias_table", 0.0)),
)
