"""Neighborhood attention: each query attends to the K × K keys around it (the local block of DAT++).

The neighborhood of query i starts at clip(i - ⌊K/2⌋, 0, H - K) on each axis. At the border it shifts inward, so every
query has K² keys. With d = key - query ∈ (-K, K)²,

    z = softmax(q kᵀ / √d_head + B̂[d + K - 1]) v.

With dilation δ (as in NATTEN) the map splits into δ² interleaved sub-maps, by i mod δ on each axis. Each sub-map has a
separate neighborhood attention. Query i = ρ + δ j attends to the keys ρ + δ j', with j' a neighbor of j in the sub-map
of ⌈(H - ρ)/δ⌉ pixels. Neighborhoods shift inward at the border of the sub-map, and d counts steps of δ.

If a sub-map is shorter than K on an axis, the neighborhood has only max(⌊H/δ⌋, 1) keys on that axis, the length of the
shortest sub-map. The released DAT++ instead pads the map with zeros at the bottom and right to K δ (with NATTEN up to
0.14). The padding takes part in the attention: its keys and values are the biases of the projections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .._checks import Array, Tree, check_map
from ..config import DeformableAttentionConfig, NeighborhoodAttentionConfig
from ..official import attention_names
from ..ops.attention import attend, attend_macs, attend_vjp, merge_heads, split_heads
from ..ops.basic import linear, linear_macs, linear_vjp, scatter_add
from ..ops.grid import Size
from .attention import Attention, Candidate, Pixel, dropout_rates, projection_terms
from .memory import INDEX, Macs, Tape


def neighborhood_shapes(config: NeighborhoodAttentionConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    side = 2 * config.kernel_size - 1
    return {
        "qkv": {"weight": (3 * config.dim, config.dim), "bias": (3 * config.dim,)},
        "neighborhood_bias": {"table": (config.heads, side, side)},
        "output": {"weight": (config.dim, config.dim), "bias": (config.dim,)},
    }


@dataclass(frozen=True)
class NeighborhoodTrace:
    """Intermediates of `neighborhood_attention`; H' × W' is the map after padding, K_y × K_x the neighborhood."""

    padded: Array  # (B, C, H', W')
    q: Array  # (B, heads, H'·W', 1, d)
    k: Array  # (B, heads, H'·W', K_y·K_x, d)
    v: Array
    attention: Array  # (B, heads, H'·W', 1, K_y·K_x)
    merged: Array  # (B, C, H', W'), before the output projection
    neighbors: Array  # (H'·W', K_y·K_x), indices into H'·W' of the keys of each query
    size: Size  # (H, W)


def axis_kernel(length: int, kernel: int, dilation: int = 1) -> int:
    """Return the number of keys per query on one axis: K, or the length of the shortest sub-map if that is less."""
    return min(kernel, length) if dilation == 1 else min(kernel, max(length // dilation, 1))


def neighborhood_padding(size: Size, config: NeighborhoodAttentionConfig) -> tuple[int, int]:
    """Return the numbers of zero rows (bottom) and columns (right) that pad the map to K δ; 0 for ``"shrink"``."""
    if config.small_map == "shrink":
        return 0, 0
    bottom, right = (max(config.kernel_size * config.dilation - length, 0) for length in size)
    return bottom, right


def padded_size(size: Size, config: NeighborhoodAttentionConfig) -> Size:
    """Return (H', W'), the size of the map after `neighborhood_padding`."""
    bottom, right = neighborhood_padding(size, config)
    return size[0] + bottom, size[1] + right


def axis_neighbors(length: int, kernel: int, dilation: int = 1) -> Array:
    """Return the keys of each query on one axis, (length, `axis_kernel`).

    >>> axis_neighbors(5, 3).tolist()
    [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    >>> axis_neighbors(7, 3, dilation=2).tolist()
    [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6]]
    """
    kernel = axis_kernel(length, kernel, dilation)
    position, submap = np.divmod(np.arange(length), dilation)
    submap_length = -(-(length - submap) // dilation)
    start = np.clip(position - kernel // 2, 0, submap_length - kernel)
    return submap[:, None] + dilation * (start[:, None] + np.arange(kernel))


def neighbor_index(size: Size, kernel: int, dilation: int = 1) -> tuple[Array, Array]:
    """Return the keys of each query, and the indices of their displacements in the (2K-1)² table.

    Both are (H·W, K_y·K_x).
    """
    rows, columns = (axis_neighbors(length, kernel, dilation) for length in size)
    row_offset = (rows - np.arange(size[0])[:, None]) // dilation + kernel - 1
    column_offset = (columns - np.arange(size[1])[:, None]) // dilation + kernel - 1
    keys = rows[:, None, :, None] * size[1] + columns[None, :, None, :]  # (H, W, K_y, K_x)
    table = row_offset[:, None, :, None] * (2 * kernel - 1) + column_offset[None, :, None, :]
    count = size[0] * size[1]
    return keys.reshape(count, -1), table.reshape(count, -1)


def neighborhood_attention(
    x: Array, params: Tree, config: NeighborhoodAttentionConfig
) -> tuple[Array, NeighborhoodTrace]:
    """Attend to the K² keys around each query.

    Args:
        x: input map (B, C, H, W), any H and W.
        params: parameter tree with the shapes of `neighborhood_shapes`.

    Returns:
        The output (B, C, H, W) and the trace. With K at least as large as the map this is plain multi-head attention.
    """
    x = check_map("x", x, config.dim)
    height, width = x.shape[2:]
    bottom, right = neighborhood_padding((height, width), config)
    padded = x if config.small_map == "shrink" else np.pad(x, ((0, 0), (0, 0), (0, bottom), (0, right)))
    neighbors, table_index = neighbor_index(padded.shape[2:], config.kernel_size, config.dilation)
    qkv = split_heads(linear(padded, **params["qkv"]), 3 * config.heads)  # (B, 3·heads, H'·W', d)
    q, k, v = np.split(qkv, 3, axis=1)
    q, k, v = q[:, :, :, None], k[:, :, neighbors], v[:, :, neighbors]
    table = params["neighborhood_bias"]["table"]
    bias = table.reshape(config.heads, -1)[:, table_index][:, :, None]  # (heads, H'·W', 1, K²)
    attended, attention = attend(q, k, v, bias, config.scale)
    merged = merge_heads(attended[:, :, :, 0], padded.shape[2:])
    y = linear(merged, **params["output"])[:, :, :height, :width]
    return y, NeighborhoodTrace(padded, q, k, v, attention, merged, neighbors, (height, width))


def neighborhood_attention_vjp(
    cotangent: Array, trace: NeighborhoodTrace, params: Tree, config: NeighborhoodAttentionConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params); a key receives gradient from all queries that attend to it, by `scatter_add`."""
    height, width = trace.size
    padded_size = trace.padded.shape[2:]
    bottom, right = padded_size[0] - height, padded_size[1] - width
    grad_y = np.pad(cotangent, ((0, 0), (0, 0), (0, bottom), (0, right)))
    output = linear_vjp(grad_y, trace.merged, **params["output"])
    grad_attended = split_heads(output.x, config.heads)[:, :, :, None]
    grads = attend_vjp(grad_attended, trace.q, trace.k, trace.v, trace.attention, config.scale)
    grad_qkv = np.concatenate(
        [
            grads.q[:, :, :, 0],
            scatter_neighbors(grads.k, trace.neighbors),
            scatter_neighbors(grads.v, trace.neighbors),
        ],
        axis=1,
    )
    qkv = linear_vjp(merge_heads(grad_qkv, padded_size), trace.padded, **params["qkv"])
    table = params["neighborhood_bias"]["table"]
    _, table_index = neighbor_index(padded_size, config.kernel_size, config.dilation)
    grad_bias = grads.bias.sum(axis=0).reshape(config.heads, -1)  # (heads, H'·W'·K²)
    grad_table = scatter_add(grad_bias.T, table_index.ravel(), table[0].size).T.reshape(table.shape)
    grad_params = {"qkv": qkv.params, "neighborhood_bias": {"table": grad_table}, "output": output.params}
    return qkv.x[:, :, :height, :width], grad_params


def scatter_neighbors(gathered: Array, neighbors: Array) -> Array:
    """Sum (B, heads, H·W, K², d) → (B, heads, H·W, d): for each key over the queries that attend to it."""
    batch, heads, count, _, depth = gathered.shape
    values = gathered.transpose(2, 3, 0, 1, 4).reshape(neighbors.size, -1)
    return scatter_add(values, neighbors.ravel(), count).reshape(count, batch, heads, depth).transpose(1, 2, 0, 3)


def neighborhood_attention_macs(batch: int, size: Size, config: NeighborhoodAttentionConfig) -> int:
    """Return multiply-adds: 4 HW C² + 2 K² HW C, for the padded map if there is padding."""
    size = padded_size(size, config)
    pixels = math.prod(size)
    keys = math.prod(axis_kernel(length, config.kernel_size, config.dilation) for length in size)
    return linear_macs(batch * pixels, config.dim, 4 * config.dim) + attend_macs(batch, pixels, keys, config.dim)


# ------------------------------------------------------------------------------------------------ the row


def _terms(batch: int, size: Size, config: NeighborhoodAttentionConfig) -> Macs:
    pixels = batch * math.prod(padded_size(size, config))
    return projection_terms(pixels, config.dim, neighborhood_attention_macs(batch, size, config))


def _memory(tape: Tape, batch: int, size: Size, config: NeighborhoodAttentionConfig) -> None:
    size = padded_size(size, config)
    pixels = math.prod(size)
    keys = math.prod(axis_kernel(length, config.kernel_size, config.dilation) for length in size)
    elements = batch * pixels * config.dim

    if config.small_map == "pad":
        tape.step("query and output", elements)  # the padded map, a copy even without padding
    with tape.temporary(pixels * keys * INDEX // tape.itemsize):  # table indices of the displacements
        tape.step("attention", pixels * keys, itemsize=INDEX)
        tape.step("query and output", elements)
        tape.step("key and value", 2 * elements + 2 * elements * keys)  # projected, then gathered per query
        with tape.temporary(config.heads * pixels * keys):  # bias
            tape.attend(batch * config.heads * pixels * keys)
            with tape.temporary(elements):
                tape.step("attention", elements)
                tape.step("query and output", elements)


def _receptive_field(query: Pixel, size: Size, config: NeighborhoodAttentionConfig, trace: object, image: int) -> Array:
    padded = padded_size(size, config)
    rows, columns = (
        axis_neighbors(length, config.kernel_size, config.dilation)[index]
        for length, index in zip(padded, query, strict=True)
    )
    mask = np.zeros(padded, dtype=bool)
    mask[np.ix_(rows, columns)] = True
    return mask[: size[0], : size[1]]


def _candidates(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in range(1, max(size) + 2, 2):  # the last one covers the map
        keys = min(side, size[0]) * min(side, size[1])
        yield Candidate(NeighborhoodAttentionConfig(layer.dim, layer.heads, side, **dropout_rates(layer)), keys)


ATTENTION = Attention(
    NeighborhoodAttentionConfig,
    neighborhood_shapes,
    neighborhood_attention,
    neighborhood_attention_vjp,
    neighborhood_attention_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=_receptive_field,
    module="dat_ref.torch.peers.neighborhood:NeighborhoodAttention",
    replacements={"neighborhood": _candidates},
    released_names=attention_names,
    parameter_terms={"neighborhood_bias": "bias"},
    saves_input=lambda config: config.small_map == "shrink",
    packed_layers=("qkv", "output"),
)
