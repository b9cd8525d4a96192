"""Mutants of ``neighborhood``: each has one mistake and names the first check that fails.

They replace single steps of a reference in steps.
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
    """Return the keys of each query of an axis, (length, K), with windows clamped to `limit` instead of the length."""
    return axis_neighbors(max(length, limit), kernel, dilation)[:length]


def table_index_of(keys: Array, kernel: int, dilation: int) -> Array:
    """Return the table index of each key's displacement on one axis, (length, K)."""
    return (keys - np.arange(len(keys))[:, None]) // dilation + kernel - 1


def flat_index(rows: Array, columns: Array, size: Size) -> Array:
    """Return the flat index of each key in the map."""
    return rows * size[1] + columns


def identity(value: Any, *others: Any) -> Any:
    return value


@dataclass(frozen=True)
class Steps:
    """Steps of neighborhood attention, as functions.

    Args:
        inputs: (q, k, v) -> (q, k, v).
        limit: size of the map -> size to which windows are clamped.
        window: (length, limit, kernel, dilation) -> keys of an axis; keys outside the map are zero.
        flat_index: (rows, columns, size) -> flat indices of the keys.
        table_index: (keys, kernel, dilation) -> indices into the table.
        table: bias table -> bias table.
        mask: (bias, whether each key is outside the map) -> bias.
        scale: d -> factor of the dot products.
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
    key_index = np.where(outside, count, key_index)  # index of an additional key of zeros
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
    """Return a mutation that replaces windows by ``change(fn, length, limit, kernel, dilation)``."""
    return lambda fn: lambda *arguments: change(fn, *arguments)


def shifted(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.minimum(fn(length, limit, kernel, dilation) + dilation, length - 1)


def not_clamped(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Center windows on their queries, also at the border of the map."""
    return np.arange(length)[:, None] + dilation * (np.arange(kernel) - kernel // 2)


def border_repeated(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.clip(not_clamped(fn, length, limit, kernel, dilation), 0, length - 1)


def wrapped(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.mod(not_clamped(fn, length, limit, kernel, dilation), length)


def clamped_too_early(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Clamp windows at the second-to-last row and column."""
    keys = fn(length, limit, kernel, dilation)
    last = np.arange(length)[:, None] >= length - dilation * (kernel // 2)
    return np.where(last & (keys[:, :1] >= dilation), keys - dilation, keys)


def zero_padded(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Pad a map smaller than the window with zeros at its end."""
    return fn(length, max(limit, kernel * dilation), kernel, dilation)


def across_submaps(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Clamp dilated windows at the border of the map instead of the sub-map."""
    start = np.arange(length) - dilation * (kernel // 2)
    return np.clip(start, 0, max(length - 1 - dilation * (kernel - 1), 0))[:, None] + dilation * np.arange(kernel)


def shortest_submap(fn: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Assume that all sub-maps are as short as the shortest: the last pixels of longer ones are never attended to."""
    position, submap = np.divmod(np.arange(length), dilation)
    start = np.clip(position - kernel // 2, 0, max(length // dilation - kernel, 0))
    return submap[:, None] + dilation * (start[:, None] + np.arange(kernel))


def index_in_window(fn: Function) -> Function:
    """Use the bias of the key's position in the window, as if every window were centered on its query."""
    return lambda keys, kernel, dilation: np.broadcast_to(np.arange(keys.shape[1]) + kernel // 2, keys.shape)


def center_of_visible_keys(fn: Function) -> Function:
    """Compute the center of the table from the number of visible keys."""
    return lambda keys, kernel, dilation: fn(keys, keys.shape[1], dilation)


def height_for_width(rows: Array, columns: Array, size: Size) -> Array:
    return (rows * size[0] + columns) % (size[0] * size[1])


def first_image_keys(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q, np.broadcast_to(k[:1], k.shape), np.broadcast_to(v[:1], v.shape)


def masked(bias: Array, outside: Array) -> Array:
    return np.where(outside, -np.inf, bias)


# Mistakes by name: the first check that fails, and the wrong steps.
MISTAKES: dict[str, tuple[str, dict[str, Function]]] = {
    "windows are shifted by one pixel down and right": ("inside", {"window": with_window(shifted)}),
    "windows are cropped at the border: border queries attend to fewer keys": (
        "at_the_border", {"window": with_window(not_clamped), "mask": lambda fn: masked}
    ),
    "windows extend over the border, and zero padding is attended to": (
        "at_the_border", {"window": with_window(not_clamped)}
    ),
    "windows extend over the border, where the last pixel is replicated": (
        "at_the_border", {"window": with_window(border_repeated)}
    ),
    "windows wrap around at the border": ("at_the_border", {"window": with_window(wrapped)}),
    "windows are clamped one row and one column too early": (
        "at_the_border", {"window": with_window(clamped_too_early)}
    ),
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
    "on a small map, the center of the table is computed from the number of visible keys": (
        "bias_small_map", {"table_index": center_of_visible_keys}
    ),
    "tables of the heads in reverse order": ("heads", {"table": lambda fn: lambda table: table[::-1]}),
    "all heads use the first head's table": (
        "heads", {"table": lambda fn: lambda table: np.broadcast_to(table[:1], table.shape)}
    ),
    "all images attend to the first image's keys and values": (
        "images", {"inputs": lambda fn: first_image_keys}
    ),
}  # fmt: skip


def scaled_gradient(name: str, factor: float) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that multiplies one gradient by a factor."""

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
