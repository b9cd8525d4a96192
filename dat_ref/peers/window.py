"""Window and shifted-window attention (Swin): each query sees the keys of its window.

The map is cut into windows of w × w pixels; inside one, with d = query - key ∈ (-w, w)²,

    z = softmax(q kᵀ / √d_head + B̂[d + w - 1]) v.

The shifted form rolls the map by `shift` pixels first, so that its windows straddle those of the plain form.
Rolling brings opposite borders together; pixels that are not neighbours in the map stay invisible to each
other. A map that is not a whole number of windows is filled up at the bottom and right, and what fills it is
invisible too. The released code, which takes whole windows only, hides keys by adding -100 instead of -∞; the
difference is a factor e^-100.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._checks import Array, Tree, check_map
from ..config import WindowAttentionConfig
from ..ops.attention import attend, attend_macs, attend_vjp
from ..ops.basic import linear, linear_macs, linear_vjp, scatter_add
from ..ops.grid import Size


def window_shapes(config: WindowAttentionConfig) -> Tree:
    """Return the parameter tree of shapes."""
    side = 2 * config.window_size - 1
    return {
        "qkv": {"weight": (3 * config.dim, config.dim), "bias": (3 * config.dim,)},
        "window_bias": {"table": (config.heads, side, side)},
        "output": {"weight": (config.dim, config.dim), "bias": (config.dim,)},
    }


@dataclass(frozen=True)
class WindowTrace:
    """Intermediates of `window_attention`. Windows are numbered row by row, nW = nH·nW' of them."""

    x: Array  # (B, C, H, W)
    q: Array  # (B·nW, heads, w², d)
    k: Array
    v: Array
    attention: Array  # (B·nW, heads, w², w²)
    merged: Array  # (B, C, H, W), before the output projection
    grid: Size  # windows (down, across)
    cells: Array  # (nW, w², 2), the pixel (y, x) that each position of each window holds; ≥ (H, W) in the padding


def window_cells(size: Size, window: int, shift: int) -> tuple[Size, Array]:
    """Return the grid of windows and the map pixel (y, x) that each of their positions holds, (nW, w², 2).

    Positions of the padding hold pixels beyond the map.
    """
    down, across = (-(-length // window) for length in size)
    rows, columns = (np.roll(np.arange(count * window), -shift) for count in (down, across))
    cells = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)  # (nH·w, nW·w, 2)
    cells = cells.reshape(down, window, across, window, 2).swapaxes(1, 2)
    return (down, across), cells.reshape(down * across, window * window, 2)


def window_visibility(cells: Array, size: Size, window: int, shift: int) -> Array:
    """Return which key each query of a window may see, (nW, w², w²) of booleans: [window, query, key].

    Rolling puts the first `shift` rows below the last ones. Two positions see each other if they come from the
    same side of that seam, on both axes, and if both lie in the map or both in the padding (whose queries are
    thrown away).
    """
    wrapped = cells < shift  # rolled round to the other end
    if shift == 0:
        wrapped = np.zeros_like(cells, dtype=bool)
    padding = (cells >= np.asarray(size)).any(axis=-1)
    region = 4 * padding + 2 * wrapped[..., 0] + wrapped[..., 1]
    return region[:, :, None] == region[:, None, :]


def relative_index(window: int) -> Array:
    """Return d + w - 1 for each pair of positions in a window, flattened into the table: (w²·w²,)."""
    y, x = np.divmod(np.arange(window * window), window)
    rows = y[:, None] - y + window - 1
    columns = x[:, None] - x + window - 1
    return (rows * (2 * window - 1) + columns).ravel()


def window_partition(x: Array, cells: Array) -> Array:
    """Gather the positions of each window: (B, C, H, W) → (B·nW, C, w²), zeros in the padding."""
    height, width = x.shape[2:]
    inside = (cells < (height, width)).all(axis=-1)
    rows, columns = np.where(inside, cells[..., 0], 0), np.where(inside, cells[..., 1], 0)
    windows = x[:, :, rows, columns] * inside  # (B, C, nW, w²)
    return windows.swapaxes(1, 2).reshape(-1, x.shape[1], cells.shape[1])


def window_reverse(windows: Array, cells: Array, size: Size) -> Array:
    """Put the positions of each window back into the map, the inverse (and transpose) of `window_partition`."""
    count, area, _ = cells.shape
    channels = windows.shape[1]
    x = np.zeros((len(windows) // max(count, 1), channels, *size), dtype=windows.dtype)
    inside = (cells < np.asarray(size)).all(axis=-1)
    values = windows.reshape(-1, count, channels, area).swapaxes(1, 2)  # (B, C, nW, w²)
    x[:, :, cells[inside][:, 0], cells[inside][:, 1]] = values[:, :, inside]
    return x


def _split_qkv(qkv: Array, cells: Array, heads: int) -> tuple[Array, Array, Array]:
    """(B, 3C, H, W) → q, k, v (B·nW, heads, w², d)."""
    windows = window_partition(qkv, cells)
    parts = windows.reshape(len(windows), 3, heads, windows.shape[1] // (3 * heads), windows.shape[2]).swapaxes(3, 4)
    return parts[:, 0], parts[:, 1], parts[:, 2]


def _merge_heads(windows: Array) -> Array:
    """(B·nW, heads, w², d) → (B·nW, C, w²)."""
    count, heads, area, depth = windows.shape
    return windows.swapaxes(2, 3).reshape(count, heads * depth, area)


def _relative_bias(table: Array, window: int) -> Array:
    return table.reshape(len(table), -1)[:, relative_index(window)].reshape(len(table), window**2, window**2)


def window_attention(x: Array, params: Tree, config: WindowAttentionConfig) -> tuple[Array, WindowTrace]:
    """Attend inside (shifted) windows.

    Args:
        x: (B, C, H, W), any H and W.
        params: tree of `window_shapes`.

    Returns:
        (B, C, H, W) and the trace. With one window as large as the map and no shift this is plain multi-head attention.
    """
    x = check_map("x", x, config.dim)
    size, window = x.shape[2:], config.window_size
    grid, cells = window_cells(size, window, config.shift)
    visible = window_visibility(cells, size, window, config.shift)
    q, k, v = _split_qkv(linear(x, **params["qkv"]), cells, config.heads)
    bias = _relative_bias(params["window_bias"]["table"], window)
    if not visible.all():
        mask = np.where(visible, bias.dtype.type(0), bias.dtype.type(-np.inf))  # (nW, w², w²)
        bias = np.tile(bias + mask[:, None], (len(x), 1, 1, 1))  # (B·nW, heads, w², w²)
    attended, attention = attend(q, k, v, bias, config.scale)
    merged = window_reverse(_merge_heads(attended), cells, size)
    return linear(merged, **params["output"]), WindowTrace(x, q, k, v, attention, merged, grid, cells)


def window_attention_vjp(
    cotangent: Array, trace: WindowTrace, params: Tree, config: WindowAttentionConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params): output projection, attention, gather of the table, qkv projection, backwards."""
    output = linear_vjp(cotangent, trace.merged, **params["output"])
    grad_attended = _split_heads(window_partition(output.x, trace.cells), config.heads)
    grads = attend_vjp(grad_attended, trace.q, trace.k, trace.v, trace.attention, config.scale)
    grad_windows = np.concatenate([_merge_heads(part) for part in (grads.q, grads.k, grads.v)], axis=1)
    grad_qkv = window_reverse(grad_windows, trace.cells, trace.x.shape[2:])
    qkv = linear_vjp(grad_qkv, trace.x, **params["qkv"])
    table = params["window_bias"]["table"]
    grad_bias = grads.bias.sum(axis=0).reshape(config.heads, -1)  # (heads, w²·w²)
    grad_table = scatter_add(grad_bias.T, relative_index(config.window_size), table[0].size).T.reshape(table.shape)
    return qkv.x, {"qkv": qkv.params, "window_bias": {"table": grad_table}, "output": output.params}


def _split_heads(windows: Array, heads: int) -> Array:
    return windows.reshape(len(windows), heads, windows.shape[1] // heads, windows.shape[2]).swapaxes(2, 3)


def window_attention_macs(batch: int, size: Size, config: WindowAttentionConfig) -> int:
    """Multiply-adds: 4 HW C² + 2 w² HW C on whole windows; the padding of others counts in the second term."""
    area = config.window_size**2
    windows = batch * -(-size[0] // config.window_size) * -(-size[1] // config.window_size)
    projections = linear_macs(batch * size[0] * size[1], config.dim, 4 * config.dim)
    return projections + attend_macs(windows, area, area, config.dim)
