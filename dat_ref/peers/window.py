"""Window and shifted-window attention (Swin): each query attends to the keys of its window.

The map is partitioned into windows of w × w pixels. Inside a window, with d = query - key ∈ (-w, w)²,

    z = softmax(q kᵀ / √d_head + B̂[d + w - 1]) v.

The shifted form first rolls the map by `shift` pixels, so that its windows straddle the windows of the plain form.
Rolling brings opposite borders together; a mask separates pixels that are not neighbors in the map. If w does not
divide the map size, the map is padded at the bottom and right, and the padding is masked too. The released code accepts
whole windows only. It masks by adding -100 instead of -∞; the difference is a factor e^-100.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .._checks import Array, Tree, check_map
from ..config import DeformableAttentionConfig, WindowAttentionConfig
from ..official import attention_names
from ..ops.attention import attend, attend_macs, attend_vjp
from ..ops.basic import linear, linear_macs, linear_vjp, scatter_add
from ..ops.grid import Size
from .attention import Attention, Candidate, Pixel, dropout_rates, projection_terms
from .memory import INDEX, Macs, Tape


def window_shapes(config: WindowAttentionConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    side = 2 * config.window_size - 1
    return {
        "qkv": {"weight": (3 * config.dim, config.dim), "bias": (3 * config.dim,)},
        "window_bias": {"table": (config.heads, side, side)},
        "output": {"weight": (config.dim, config.dim), "bias": (config.dim,)},
    }


@dataclass(frozen=True)
class WindowTrace:
    """Intermediates of `window_attention`. The nW = nH·nW' windows are numbered row by row."""

    x: Array  # (B, C, H, W)
    q: Array  # (B·nW, heads, w², d)
    k: Array
    v: Array
    attention: Array  # (B·nW, heads, w², w²)
    merged: Array  # (B, C, H, W), before the output projection
    grid: Size  # number of windows (down, across)
    cells: Array  # (nW, w², 2), pixel (y, x) at each window position; ≥ (H, W) in the padding


def window_cells(size: Size, window: int, shift: int) -> tuple[Size, Array]:
    """Return the window grid (down, across), and the map pixel (y, x) at each window position, (nW, w², 2).

    Positions in the padding have pixel indices outside the map.
    """
    down, across = (-(-length // window) for length in size)
    rows, columns = (np.roll(np.arange(count * window), -shift) for count in (down, across))
    cells = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)  # (nH·w, nW·w, 2)
    cells = cells.reshape(down, window, across, window, 2).swapaxes(1, 2)
    return (down, across), cells.reshape(down * across, window * window, 2)


def window_visibility(cells: Array, size: Size, window: int, shift: int) -> Array:
    """Return the attention mask [window, query, key], (nW, w², w²) booleans, True for visible keys.

    Rolling puts the first `shift` rows below the last ones. Two positions are visible to each other if they come from
    the same side of that seam on both axes, and if both are in the map or both in the padding. Outputs of padding
    queries are discarded.
    """
    wrapped = cells < shift  # rolled to the other end
    if shift == 0:
        wrapped = np.zeros_like(cells, dtype=bool)
    padding = (cells >= np.asarray(size)).any(axis=-1)
    region = 4 * padding + 2 * wrapped[..., 0] + wrapped[..., 1]
    return region[:, :, None] == region[:, None, :]


def relative_index(window: int) -> Array:
    """Return the flat table index of d + w - 1 for each pair of positions in a window: (w²·w²,)."""
    y, x = np.divmod(np.arange(window * window), window)
    rows = y[:, None] - y + window - 1
    columns = x[:, None] - x + window - 1
    return (rows * (2 * window - 1) + columns).ravel()


def window_partition(x: Array, cells: Array) -> Array:
    """Gather the pixels of each window: (B, C, H, W) → (B·nW, C, w²), zeros in the padding."""
    height, width = x.shape[2:]
    inside = (cells < (height, width)).all(axis=-1)
    rows, columns = np.where(inside, cells[..., 0], 0), np.where(inside, cells[..., 1], 0)
    windows = x[:, :, rows, columns] * inside  # (B, C, nW, w²)
    return windows.swapaxes(1, 2).reshape(-1, x.shape[1], cells.shape[1])


def window_reverse(windows: Array, cells: Array, size: Size) -> Array:
    """Write windows back to the map: (B·nW, C, w²) → (B, C, H, W), inverse and transpose of `window_partition`."""
    count, area, _ = cells.shape
    channels = windows.shape[1]
    x = np.zeros((len(windows) // max(count, 1), channels, *size), dtype=windows.dtype)
    inside = (cells < np.asarray(size)).all(axis=-1)
    values = windows.reshape(-1, count, channels, area).swapaxes(1, 2)  # (B, C, nW, w²)
    x[:, :, cells[inside][:, 0], cells[inside][:, 1]] = values[:, :, inside]
    return x


def _split_qkv(qkv: Array, cells: Array, heads: int) -> tuple[Array, Array, Array]:
    """Split (B, 3C, H, W) → q, k, v (B·nW, heads, w², d)."""
    windows = window_partition(qkv, cells)
    parts = windows.reshape(len(windows), 3, heads, windows.shape[1] // (3 * heads), windows.shape[2]).swapaxes(3, 4)
    return parts[:, 0], parts[:, 1], parts[:, 2]


def _merge_heads(windows: Array) -> Array:
    """Merge heads (B·nW, heads, w², d) → (B·nW, C, w²)."""
    count, heads, area, depth = windows.shape
    return windows.swapaxes(2, 3).reshape(count, heads * depth, area)


def _relative_bias(table: Array, window: int) -> Array:
    return table.reshape(len(table), -1)[:, relative_index(window)].reshape(len(table), window**2, window**2)


def window_attention(x: Array, params: Tree, config: WindowAttentionConfig) -> tuple[Array, WindowTrace]:
    """Attend inside (shifted) windows.

    Args:
        x: input map (B, C, H, W), any H and W.
        params: parameter tree with the shapes of `window_shapes`.

    Returns:
        The output (B, C, H, W) and the trace. With one window as large as the map and no shift this is plain
        multi-head attention.
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
    """Return (∂L/∂x, ∂L/∂params): backward through output projection, attention, bias table and qkv projection."""
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
    """Return multiply-adds: 4 HW C² + 2 w² HW C; the second term includes the padding of incomplete windows."""
    area = config.window_size**2
    windows = batch * -(-size[0] // config.window_size) * -(-size[1] // config.window_size)
    projections = linear_macs(batch * size[0] * size[1], config.dim, 4 * config.dim)
    return projections + attend_macs(windows, area, area, config.dim)


# ------------------------------------------------------------------------------------------------ the row


def _terms(batch: int, size: Size, config: WindowAttentionConfig) -> Macs:
    return projection_terms(batch * math.prod(size), config.dim, window_attention_macs(batch, size, config))


def _memory(tape: Tape, batch: int, size: Size, config: WindowAttentionConfig) -> None:
    window_area = config.window_size**2
    windows = math.prod(-(-length // config.window_size) for length in size)
    pixels, window_elements = batch * math.prod(size) * config.dim, batch * windows * window_area * config.dim
    masked = config.shift > 0 or any(length % config.window_size for length in size)
    logits = batch * windows * config.heads * window_area**2
    pairs = windows * window_area**2

    tape.step("attention", 2 * windows * window_area, itemsize=INDEX)  # the pixel at each position
    tape.step("query and output", window_elements)
    # The workspace is the projected map, and its windows in another order.
    tape.step("key and value", 2 * window_elements, 3 * pixels + 3 * window_elements)
    # With masked keys, each window has its own bias, and there are a float mask and a boolean mask.
    with tape.temporary(pairs // tape.itemsize + (logits + pairs if masked else config.heads * window_area**2)):
        tape.attend(logits)
        with tape.temporary(window_elements):  # heads before merging
            # The workspace is the merged heads, and their pixels inside the map.
            tape.step("attention", pixels, 2 * window_elements)
            tape.step("query and output", pixels)


def _receptive_field(query: Pixel, size: Size, config: WindowAttentionConfig, trace: object, image: int) -> Array:
    _, cells = window_cells(size, config.window_size, config.shift)
    visibility = window_visibility(cells, size, config.window_size, config.shift)
    window, index = np.argwhere((cells == query).all(axis=-1))[0]
    pixels = cells[window][visibility[window, index]]
    mask = np.zeros(size, dtype=bool)
    mask[pixels[:, 0], pixels[:, 1]] = True
    return mask


def _windows(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in range(1, max(size) + 1):
        yield Candidate(WindowAttentionConfig(layer.dim, layer.heads, side, **dropout_rates(layer)), side**2)


def _shifted_windows(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in range(2, max(*size, 2) + 1):
        shift = min(-(-side // 2), side - 1)
        yield Candidate(WindowAttentionConfig(layer.dim, layer.heads, side, shift, **dropout_rates(layer)), side**2)


ATTENTION = Attention(
    WindowAttentionConfig,
    window_shapes,
    window_attention,
    window_attention_vjp,
    window_attention_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=_receptive_field,
    module="dat_ref.torch.peers.window:WindowAttention",
    replacements={"window": _windows, "shifted_window": _shifted_windows},
    released_names=attention_names,
    parameter_terms={"window_bias": "bias"},
    packed_layers=("qkv", "output"),
)
