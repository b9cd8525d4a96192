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
from ..subject import Function, Mutant
from .steps import exchange

# ------------------------------------------------------------------------------------------------ the steps


def window(length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Return the keys that each query of an axis sees, (length, K), for an axis that is taken to end at `limit`."""
    return axis_neighbors(max(length, limit), kernel, dilation)[:length]


def displaced(keys: Array, kernel: int, dilation: int) -> Array:
    """Return where on its axis of the table each key's displacement stands, (length, K)."""
    return (keys - np.arange(len(keys))[:, None]) // dilation + kernel - 1


def row_by_row(rows: Array, columns: Array, size: Size) -> Array:
    """Return the number of each key in the map."""
    return rows * size[1] + columns


def as_it_is(value: Any, *others: Any) -> Any:
    return value


@dataclass(frozen=True)
class Steps:
    """The steps, with what they take.

    Args:
        take: (q, k, v) -> the same.
        limit: the map's size -> the size that windows are clamped to.
        window: (length, limit, kernel, dilation) -> the keys of an axis; those outside the map are zero.
        number: (rows, columns, size) -> the keys' numbers.
        displace: (keys, kernel, dilation) -> places in the table.
        table: bias table -> the same.
        hide: (bias, whether the key lies outside) -> bias.
        scale: d -> the factor of the dot products.
        scale_bias: (bias, scale) -> bias.
    """

    take: Function = lambda q, k, v: (q, k, v)
    limit: Function = as_it_is
    window: Function = window
    number: Function = row_by_row
    displace: Function = displaced
    table: Function = as_it_is
    hide: Function = as_it_is
    scale: Callable[[int], float] = lambda depth: depth**-0.5
    scale_bias: Function = as_it_is


def attend_window(
    steps: Steps, q: Array, k: Array, v: Array, bias_table: Array, query_size: Size, kernel_size: int, dilation: int
) -> Array:
    """Return the result of attention (N, M, Q, D)."""
    q, k, v = steps.take(q, k, v)
    count = query_size[0] * query_size[1]
    axes = [
        steps.window(length, limit, kernel_size, dilation)
        for length, limit in zip(query_size, steps.limit(query_size), strict=True)
    ]
    outside = [(keys < 0) | (keys >= len(keys)) for keys in axes]
    beyond = (outside[0][:, None, :, None] | outside[1][None, :, None, :]).reshape(count, -1)
    numbers = steps.number(axes[0][:, None, :, None], axes[1][None, :, None, :], query_size).reshape(count, -1)
    numbers = np.where(beyond, count, numbers)  # one more key, of zeros
    rows, columns = (np.clip(steps.displace(keys, kernel_size, dilation), 0, 2 * kernel_size - 2) for keys in axes)
    bias = steps.table(bias_table)[:, rows[:, None, :, None], columns[None, :, None, :]].reshape(
        len(bias_table), count, -1
    )
    scale = steps.scale(q.shape[-1])
    bias = steps.hide(steps.scale_bias(bias, scale), beyond)
    padded_k, padded_v = (np.pad(each, ((0, 0), (0, 0), (0, 1), (0, 0))) for each in (k, v))
    return attend(q[:, :, :, None], padded_k[:, :, numbers], padded_v[:, :, numbers], bias[:, :, None], scale)[0][
        :, :, :, 0
    ]


# ------------------------------------------------------------------------------------------------ mistakes


def windows(change: Callable[..., Array]) -> Function:
    """Windows are others: ``change(right, length, limit, kernel, dilation)``."""
    return lambda right: lambda *arguments: change(right, *arguments)


def shifted(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.minimum(right(length, limit, kernel, dilation) + dilation, length - 1)


def not_clamped(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Centered on the query, also where that leads out of the map."""
    return np.arange(length)[:, None] + dilation * (np.arange(kernel) - kernel // 2)


def repeated(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.clip(not_clamped(right, length, limit, kernel, dilation), 0, length - 1)


def around(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    return np.mod(not_clamped(right, length, limit, kernel, dilation), length)


def one_too_early(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Clamped at the last row but one."""
    keys = right(length, limit, kernel, dilation)
    last = np.arange(length)[:, None] >= length - dilation * (kernel // 2)
    return np.where(last & (keys[:, :1] >= dilation), keys - dilation, keys)


def padded(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """A map smaller than the window grows by zeros at its end."""
    return right(length, max(limit, kernel * dilation), kernel, dilation)


def across_submaps(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """Windows are clamped at the map's border, wherever that leads."""
    start = np.arange(length) - dilation * (kernel // 2)
    return np.clip(start, 0, max(length - 1 - dilation * (kernel - 1), 0))[:, None] + dilation * np.arange(kernel)


def shortest_submap(right: Function, length: int, limit: int, kernel: int, dilation: int) -> Array:
    """All sub-maps are taken to be as long as the shortest: the last pixels of the longer ones are never seen."""
    place, submap = np.divmod(np.arange(length), dilation)
    start = np.clip(place - kernel // 2, 0, max(length // dilation - kernel, 0))
    return submap[:, None] + dilation * (start[:, None] + np.arange(kernel))


def by_place(right: Function) -> Function:
    """The bias belongs to the place in the window: as if every window were centered on its query."""
    return lambda keys, kernel, dilation: np.broadcast_to(np.arange(keys.shape[1]) + kernel // 2, keys.shape)


def middle_of_the_shrunk(right: Function) -> Function:
    """The middle of the table is taken to be where it would be for as many keys as there are."""
    return lambda keys, kernel, dilation: right(keys, keys.shape[1], dilation)


def height_for_width(rows: Array, columns: Array, size: Size) -> Array:
    return (rows * size[0] + columns) % (size[0] * size[1])


def of_the_first_image(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q, np.broadcast_to(k[:1], k.shape), np.broadcast_to(v[:1], v.shape)


def hidden(bias: Array, beyond: Array) -> Array:
    return np.where(beyond, -np.inf, bias)


# Each mistake: the first check that sees it, and the steps that are wrong.
MISTAKES: dict[str, tuple[str, dict[str, Function]]] = {
    "windows lie a pixel further down and right": ("inside", {"window": windows(shifted)}),
    "windows are cut off at the border, so that fewer keys are left": (
        "at_the_border", {"window": windows(not_clamped), "hide": lambda right: hidden}
    ),
    "windows reach over the border, and keys of zeros are attended": (
        "at_the_border", {"window": windows(not_clamped)}
    ),
    "windows reach over the border, where the last pixel is repeated": ("at_the_border", {"window": windows(repeated)}),
    "windows wrap around": ("at_the_border", {"window": windows(around)}),
    "windows are clamped a row and a column too early": ("at_the_border", {"window": windows(one_too_early)}),
    "columns are clamped by the height": ("not_square", {"limit": lambda right: lambda size: (size[0], size[0])}),
    "rows are clamped by the width": ("not_square", {"limit": lambda right: lambda size: (size[1], size[1])}),
    "a row of keys is taken to be as long as the height": (
        "not_square", {"number": lambda right: height_for_width}
    ),
    "the dilation is ignored": (
        "dilation", {"window": lambda right: lambda length, limit, kernel, dilation: right(length, limit, kernel, 1)}
    ),
    "with dilation, windows are clamped at the map's border: they leave their sub-map": (
        "dilation", {"window": windows(across_submaps)}
    ),
    "with dilation, all sub-maps are taken to be as long as the shortest": (
        "dilation", {"window": windows(shortest_submap)}
    ),
    "padding keys are attended: a map smaller than the window grows by zeros": (
        "small_map", {"window": windows(padded)}
    ),
    "keys and values are exchanged": ("scores", {"take": lambda right: lambda q, k, v: (q, v, k)}),
    "the scale is missing": ("scores", {"scale": lambda right: lambda depth: 1.0}),
    "the scale is 1/d": ("scores", {"scale": lambda right: lambda depth: 1 / depth}),
    "the bias is ignored": ("bias_direction", {"table": lambda right: np.zeros_like}),
    "the bias has the wrong sign": ("bias_direction", {"table": lambda right: lambda table: -table}),
    "the displacement has the wrong sign: from key to query": (
        "bias_direction", {"table": lambda right: lambda table: table[:, ::-1, ::-1]}
    ),
    "the bias is multiplied by the scale": (
        "bias_direction", {"scale_bias": lambda right: lambda bias, scale: bias * scale}
    ),
    "the table is transposed": (
        "bias_rows_before_columns", {"table": lambda right: lambda table: table.swapaxes(1, 2)}
    ),
    "the bias belongs to the place in the window, not to the displacement": (
        "bias_at_the_border", {"displace": by_place}
    ),
    "with dilation, displacements are counted in pixels": (
        "bias_dilated", {"displace": lambda right: lambda keys, kernel, dilation: right(keys, kernel, 1)}
    ),
    "on a small map the middle of the table moves": ("bias_small_map", {"displace": middle_of_the_shrunk}),
    "heads use the tables in reverse order": ("heads", {"table": lambda right: lambda table: table[::-1]}),
    "all heads use the first head's table": (
        "heads", {"table": lambda right: lambda table: np.broadcast_to(table[:1], table.shape)}
    ),
    "all images attend to the first image's keys and values": (
        "images", {"take": lambda right: of_the_first_image}
    ),
}  # fmt: skip


def scaled(name: str, factor: float) -> Callable[[Function], Function]:
    """Return a VJP of which one gradient is multiplied."""

    def wrong(right: Function) -> Function:
        def vjp(*arguments: Any) -> dict[str, Array]:
            grads = right(*arguments)
            return {**grads, name: factor * grads[name]}

        return vjp

    return wrong


MUTANTS = (
    *(Mutant(name, check, exchange(attend_window, Steps(), **steps)) for name, (check, steps) in MISTAKES.items()),
    *(
        Mutant(f"the gradient of {name} is 0.1 % too large", "gradient_of_q_k_v", vjp=scaled(name, 1.001))
        for name in ("q", "k", "v")
    ),
    Mutant("the table's gradient is 0.1 % too large", "gradient_of_the_table", vjp=scaled("bias_table", 1.001)),
    Mutant("the table gets no gradient", "gradient_of_the_table", vjp=scaled("bias_table", 0.0)),
)
