"""Neighborhood attention with a relative bias for CUDA devices, fused, in Triton.

    z = softmax(scale · q kᵀ + B̂[key - query + K - 1]) v        over the K × K keys around each query

Each program computes a rectangle of queries. Their keys form a slightly larger rectangle, over which it loops as in
`deformable`; keys outside a query's neighborhood are masked. With dilation, each interleaved sub-map has its own
rectangles. The bias of a pair is one load from a table of (2K-1)² elements.

The table's gradient is a sum of logit gradients over all pairs with equal displacement (key minus query). Each program
computes its part by two small matrix products with indicator matrices, one for the columns and one for the rows of the
rectangles. The partial sums of all programs are then added in a fixed order. There are no atomic additions, so all
gradients are deterministic.

Tested in Triton's interpreter and compiled for sm_80 and sm_90; not yet timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....peers.neighborhood import axis_kernel
from .common import (
    LN_2,
    LOG2_E,
    check_qkv,
    contiguous_last_dim,
    load_rows,
    match_strides,
    on_its_device,
    online_softmax_step,
    restore_layout,
    store_rows,
    strides,
)
from .tile_config import Kernel, default_config

MAX_KERNEL = 32
_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)
_NOT_SPECIALIZED = ("heads", "map_height", "map_width", "dilation", "num_keys_y", "num_keys_x")  # one binary for all


@on_its_device
def neighborhood_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, size: tuple[int, int], kernel: int, dilation: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the K × K keys around each query; at the border the neighborhood slides inwards.

    Args:
        q, k, v: (B, heads, H·W, d), float16, bfloat16 or float32, d at most 128, or 64 in float32.
        table: (heads, 2K-1, 2K-1).
        size: (H, W).
        kernel: K, at most 32.
        dilation: distance in pixels between neighbors.
        scale: factor of the dot products.

    Returns:
        out (B, heads, H·W, d), and lse (B, heads, H·W) float32.

    Raises:
        TypeError: for other dtypes, or different dtypes of q, k and v.
        ValueError: for a larger d or K.
    """
    inputs = q
    q, k, v = check_qkv(q, k, v)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = _LaunchConfig("neighborhood_forward", q, table, size, kernel, dilation, scale)
    if out.numel() > 0:
        _forward[launch.grid](q, k, v, launch.table, out, lse, *strides(q, k, v, out), **launch.arguments)
    return restore_layout(out, inputs), lse


@on_its_device
def neighborhood_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    size: tuple[int, int],
    kernel: int,
    dilation: int,
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `neighborhood_forward` with respect to q, k, v and table, always deterministic."""
    inputs = (q, k, v)
    q, k, v = check_qkv(q, k, v)
    grad_q, grad_k, grad_v = grads = [torch.empty_like(each) for each in (q, k, v)]
    if out.numel() == 0:
        return grad_q, grad_k, grad_v, torch.zeros_like(table)
    out = contiguous_last_dim(out)
    grad_out = match_strides(grad_out, out)
    delta = torch.empty_like(lse)
    launch = _LaunchConfig("neighborhood_grad_queries", q, table, size, kernel, dilation, scale)
    side = triton.next_power_of_2(max(2 * kernel - 1, 16))
    partials = torch.empty((*q.shape[:2], launch.num_tiles, side, side), dtype=torch.float32, device=q.device)
    _grad_queries[launch.grid](
        *(q, k, v, launch.table, out, grad_out, lse, delta, grad_q, partials),
        *strides(q, k, v, out, grad_q),
        SIDE=side,
        **launch.arguments,
    )
    launch = _LaunchConfig("neighborhood_grad_keys", q, table, size, kernel, dilation, scale)
    _grad_keys[launch.grid](
        *(q, k, v, launch.table, grad_out, lse, delta, grad_k, grad_v),
        *strides(q, k, v, out, grad_k, grad_v),
        **launch.arguments,
    )
    grad_table = partials.sum((0, 2))[:, : 2 * kernel - 1, : 2 * kernel - 1]
    grad_q, grad_k, grad_v = (restore_layout(grad, like) for grad, like in zip(grads, inputs, strict=True))
    return grad_q, grad_k, grad_v, match_strides(grad_table.to(table.dtype), table)


class _LaunchConfig:
    """Launch configuration. A program computes a rectangle of queries (or keys), in a loop over keys (or queries)."""

    def __init__(
        self,
        kernel_name: Kernel,
        q: Tensor,
        table: Tensor,
        size: tuple[int, int],
        kernel: int,
        dilation: int,
        scale: float,
    ) -> None:
        if kernel > MAX_KERNEL:
            raise ValueError(f"kernel: expected at most {MAX_KERNEL}, got {kernel}")
        batch, heads, _, depth = q.shape
        config = default_config(kernel_name, q)
        own_size, other_size = config.block_m, config.block_n
        if kernel_name == "neighborhood_grad_keys":
            own_size, other_size = other_size, own_size
        edge = {64: 8, 16: 4}[own_size]
        rows = max(other_size // 16, 16 // edge)  # so that the products in `_add_diagonals` sum over 16 pairs or more
        # A map smaller than the dilation has one sub-map per pixel, and no empty ones.
        tiles_y, tiles_x = (min(dilation, length) * triton.cdiv(triton.cdiv(length, dilation), edge) for length in size)
        self.num_tiles = tiles_y * tiles_x
        self.grid = (batch * heads * self.num_tiles,)
        self.table = table.float().contiguous()
        self.arguments: dict[str, Any] = {
            "heads": heads,
            "map_height": size[0],
            "map_width": size[1],
            "dilation": dilation,
            "num_keys_y": axis_kernel(size[0], kernel, dilation),
            "num_keys_x": axis_kernel(size[1], kernel, dilation),
            "scale": scale,
            "log2_scale": scale * LOG2_E,
            "KERNEL": kernel,
            "EDGE": edge,
            "ROWS": rows,
            "COLUMNS": other_size // rows,
            **config.arguments(depth, q.dtype),
        }


# ------------------------------------------------------------------------------------------------ geometry


@triton.jit
def _rectangle(pid, map_height, map_width, dilation, heads, EDGE: tl.constexpr):
    """Return the image, the head, the sub-map and the rectangle of a program."""
    tiles_x = tl.cdiv(tl.cdiv(map_width, dilation), EDGE)
    tiles_y = tl.cdiv(tl.cdiv(map_height, dilation), EDGE)
    x, pid = pid % tiles_x * EDGE, pid // tiles_x
    y, pid = pid % tiles_y * EDGE, pid // tiles_y
    submaps_x, submaps_y = tl.minimum(dilation, map_width), tl.minimum(dilation, map_height)  # no empty ones
    submap_x, pid = pid % submaps_x, pid // submaps_x
    submap_y, pid = pid % submaps_y, pid // submaps_y
    return (pid // heads).to(tl.int64), (pid % heads).to(tl.int64), submap_y, submap_x, y, x


@triton.jit
def _length(length, submap, dilation):
    """Return the number of pixels of a sub-map on one axis."""
    return (length - submap + dilation - 1) // dilation


@triton.jit
def _first_key(query, length, num_keys):
    """Return the first key in the neighborhood of a query, on one axis."""
    return tl.minimum(tl.maximum(query - num_keys // 2, 0), length - num_keys)


@triton.jit
def _first_query(key, length, num_keys):
    """Return the first query whose neighborhood contains a key, on one axis."""
    return tl.where(key < num_keys, 0, key - num_keys + 1 + num_keys // 2)


@triton.jit
def _last_query(key, length, num_keys):
    """Return the last query whose neighborhood contains a key, on one axis."""
    return tl.where(key >= length - num_keys, length - 1, key + num_keys // 2)


@triton.jit
def _is_visible(key, first, num_keys):
    return (key >= first) & (key < first + num_keys)


@triton.jit
def _pixel(y, x, submap_y, submap_x, map_width, dilation):
    return (submap_y + dilation * y) * map_width + submap_x + dilation * x


# ------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _forward(
    q, k, v, table, out, lse,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m,
    heads, map_height, map_width, dilation, num_keys_y, num_keys_x, scale, log2_scale,
    KERNEL: tl.constexpr, EDGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, submap_y, submap_x, start_y, start_x = _rectangle(
        tl.program_id(0), map_height, map_width, dilation, heads, EDGE
    )
    length_y, length_x = _length(map_height, submap_y, dilation), _length(map_width, submap_x, dilation)
    offs_m = tl.arange(0, BLOCK_M)
    # Queries outside the map repeat the last one; their results are not stored.
    mask = (start_y + offs_m // EDGE < length_y) & (start_x + offs_m % EDGE < length_x)
    y, x = tl.minimum(start_y + offs_m // EDGE, length_y - 1), tl.minimum(start_x + offs_m % EDGE, length_x - 1)
    pixel = _pixel(y, x, submap_y, submap_x, map_width, dilation)
    first_y, first_x = _first_key(y, length_y, num_keys_y), _first_key(x, length_x, num_keys_x)
    bias_ptr = table + (h * (2 * KERNEL - 1) + KERNEL - 1 - y) * (2 * KERNEL - 1) + KERNEL - 1 - x
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, pixel, q_m, mask, DEPTH, BLOCK_D)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    for begin_y in range(tl.min(first_y), tl.max(first_y) + num_keys_y, ROWS):
        for begin_x in range(tl.min(first_x), tl.max(first_x) + num_keys_x, COLUMNS):
            key_y, key_x = begin_y + offs_n // COLUMNS, begin_x + offs_n % COLUMNS
            key = _pixel(key_y, key_x, submap_y, submap_x, map_width, dilation)
            in_map = (key_y < length_y) & (key_x < length_x)
            k_tile = load_rows(k, key, k_n, in_map, DEPTH, BLOCK_D)
            v_tile = load_rows(v, key, v_n, in_map, DEPTH, BLOCK_D)
            visible = _is_visible(key_y[None, :], first_y[:, None], num_keys_y)
            visible = visible & _is_visible(key_x[None, :], first_x[:, None], num_keys_x)
            bias = tl.load(bias_ptr[:, None] + (key_y * (2 * KERNEL - 1) + key_x)[None, :], mask=visible, other=0.0)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + bias * _LOG2_E
            logits = tl.where(visible, logits, float("-inf"))
            m, l, acc = online_softmax_step(m, l, acc, logits, v_tile, PRECISION)
    store_rows(out + b * out_b + h * out_h, pixel, out_m, mask, acc / l[:, None], DEPTH, BLOCK_D)
    row = (b * heads + h) * map_height * map_width + pixel
    tl.store(lse + row, (m + tl.log2(l)) * _LN_2, mask=mask)


# ------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grad_queries(
    q, k, v, table, out, grad_out, lse, delta, grad_q, partials,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, dq_b, dq_h, dq_m,
    heads, map_height, map_width, dilation, num_keys_y, num_keys_x, scale, log2_scale,
    KERNEL: tl.constexpr, SIDE: tl.constexpr, EDGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, submap_y, submap_x, start_y, start_x = _rectangle(
        tl.program_id(0), map_height, map_width, dilation, heads, EDGE
    )
    length_y, length_x = _length(map_height, submap_y, dilation), _length(map_width, submap_x, dilation)
    offs_m = tl.arange(0, BLOCK_M)
    mask = (start_y + offs_m // EDGE < length_y) & (start_x + offs_m % EDGE < length_x)
    y, x = tl.minimum(start_y + offs_m // EDGE, length_y - 1), tl.minimum(start_x + offs_m % EDGE, length_x - 1)
    pixel = _pixel(y, x, submap_y, submap_x, map_width, dilation)
    first_y, first_x = _first_key(y, length_y, num_keys_y), _first_key(x, length_x, num_keys_x)
    bias_ptr = table + (h * (2 * KERNEL - 1) + KERNEL - 1 - y) * (2 * KERNEL - 1) + KERNEL - 1 - x
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, pixel, q_m, mask, DEPTH, BLOCK_D)
    out_offset = b * out_b + h * out_h
    grad_out_tile = load_rows(grad_out + out_offset, pixel, out_m, mask, DEPTH, BLOCK_D)
    out_tile = load_rows(out + out_offset, pixel, out_m, mask, DEPTH, BLOCK_D)
    row = (b * heads + h) * map_height * map_width + pixel
    lse_tile = tl.load(lse + row, mask=mask, other=float("inf")) * _LOG2_E  # inf: no weight past the end
    delta_tile = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + row, delta_tile, mask=mask)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_table = tl.zeros([SIDE, SIDE], tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    for begin_y in range(tl.min(first_y), tl.max(first_y) + num_keys_y, ROWS):
        for begin_x in range(tl.min(first_x), tl.max(first_x) + num_keys_x, COLUMNS):
            key_y, key_x = begin_y + offs_n // COLUMNS, begin_x + offs_n % COLUMNS
            key = _pixel(key_y, key_x, submap_y, submap_x, map_width, dilation)
            in_map = (key_y < length_y) & (key_x < length_x)
            k_tile = load_rows(k, key, k_n, in_map, DEPTH, BLOCK_D)
            v_tile = load_rows(v, key, v_n, in_map, DEPTH, BLOCK_D)
            visible = _is_visible(key_y[None, :], first_y[:, None], num_keys_y)
            visible = visible & _is_visible(key_x[None, :], first_x[:, None], num_keys_x)
            bias = tl.load(bias_ptr[:, None] + (key_y * (2 * KERNEL - 1) + key_x)[None, :], mask=visible, other=0.0)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + bias * _LOG2_E
            weights = tl.where(visible, tl.exp2(logits - lse_tile[:, None]), 0.0)
            grad_weights = tl.dot(grad_out_tile, tl.trans(v_tile), input_precision=PRECISION)
            grad_logits = (weights * (grad_weights - delta_tile[:, None])).to(k_tile.dtype)
            dq = tl.dot(grad_logits, k_tile, dq, input_precision=PRECISION)
            grad_table = _add_diagonals(
                grad_table, grad_logits, begin_y - start_y + KERNEL - 1, begin_x - start_x + KERNEL - 1,
                SIDE, EDGE, ROWS, COLUMNS, PRECISION,
            )  # fmt: skip
    store_rows(grad_q + b * dq_b + h * dq_h, pixel, dq_m, mask, dq * scale, DEPTH, BLOCK_D)
    side = tl.arange(0, SIDE)
    partials += tl.program_id(0).to(tl.int64) * SIDE * SIDE
    tl.store(partials + side[:, None] * SIDE + side[None, :], grad_table)


@triton.jit
def _add_diagonals(
    grad_table, grad_logits, shift_y, shift_x,
    SIDE: tl.constexpr, EDGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of logit gradients to the table. Query (i, j) and key (r, c) have entry (r - i, c - j) + shift."""
    paired = tl.permute(tl.reshape(grad_logits, [EDGE, EDGE, ROWS, COLUMNS]), 0, 2, 1, 3)
    paired = tl.reshape(paired, [EDGE * ROWS, EDGE * COLUMNS])
    side = tl.arange(0, SIDE)
    pair_x = tl.arange(0, EDGE * COLUMNS)
    index_x = pair_x % COLUMNS - pair_x // COLUMNS + shift_x
    summed_x = tl.dot(paired, (index_x[:, None] == side[None, :]).to(paired.dtype), input_precision=PRECISION)
    pair_y = tl.arange(0, EDGE * ROWS)
    index_y = pair_y % ROWS - pair_y // ROWS + shift_y
    return tl.dot((side[:, None] == index_y[None, :]).to(tl.float32), summed_x, grad_table, input_precision="tf32x3")


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grad_keys(
    q, k, v, table, grad_out, lse, delta, grad_k, grad_v,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, map_height, map_width, dilation, num_keys_y, num_keys_x, scale, log2_scale,
    KERNEL: tl.constexpr, EDGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, submap_y, submap_x, start_y, start_x = _rectangle(
        tl.program_id(0), map_height, map_width, dilation, heads, EDGE
    )
    length_y, length_x = _length(map_height, submap_y, dilation), _length(map_width, submap_x, dilation)
    offs_n = tl.arange(0, BLOCK_N)
    key_y, key_x = start_y + offs_n // EDGE, start_x + offs_n % EDGE
    mask = (key_y < length_y) & (key_x < length_x)
    key = _pixel(key_y, key_x, submap_y, submap_x, map_width, dilation)
    bias_ptr = table + (h * (2 * KERNEL - 1) + KERNEL - 1 + key_y) * (2 * KERNEL - 1) + KERNEL - 1 + key_x
    k_tile = load_rows(k + b * k_b + h * k_h, key, k_n, mask, DEPTH, BLOCK_D)
    v_tile = load_rows(v + b * v_b + h * v_h, key, v_n, mask, DEPTH, BLOCK_D)
    q += b * q_b + h * q_h
    grad_out += b * out_b + h * out_h
    row = (b * heads + h) * map_height * map_width

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    last_y, last_x = tl.minimum(start_y + EDGE, length_y) - 1, tl.minimum(start_x + EDGE, length_x) - 1
    end_y, end_x = _last_query(last_y, length_y, num_keys_y) + 1, _last_query(last_x, length_x, num_keys_x) + 1
    for begin_y in range(_first_query(start_y, length_y, num_keys_y), end_y, ROWS):
        for begin_x in range(_first_query(start_x, length_x, num_keys_x), end_x, COLUMNS):
            y, x = begin_y + offs_m // COLUMNS, begin_x + offs_m % COLUMNS
            in_map = (y < length_y) & (x < length_x)
            pixel = _pixel(y, x, submap_y, submap_x, map_width, dilation)
            q_tile = load_rows(q, pixel, q_m, in_map, DEPTH, BLOCK_D)
            grad_out_tile = load_rows(grad_out, pixel, out_m, in_map, DEPTH, BLOCK_D)
            lse_tile = tl.load(lse + row + pixel, mask=in_map, other=float("inf")) * _LOG2_E
            delta_tile = tl.load(delta + row + pixel, mask=in_map, other=0.0)
            first_y, first_x = _first_key(y, length_y, num_keys_y), _first_key(x, length_x, num_keys_x)
            visible = _is_visible(key_y[:, None], first_y[None, :], num_keys_y)
            visible = visible & _is_visible(key_x[:, None], first_x[None, :], num_keys_x) & in_map[None, :]
            bias = tl.load(bias_ptr[:, None] - (y * (2 * KERNEL - 1) + x)[None, :], mask=visible, other=0.0)
            logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * log2_scale + bias * _LOG2_E
            weights = tl.where(visible, tl.exp2(logits - lse_tile[None, :]), 0.0)
            dv = tl.dot(weights.to(grad_out_tile.dtype), grad_out_tile, dv, input_precision=PRECISION)
            grad_weights = tl.dot(v_tile, tl.trans(grad_out_tile), input_precision=PRECISION)
            grad_logits = weights * (grad_weights - delta_tile[None, :])
            dk = tl.dot(grad_logits.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    store_rows(grad_k + b * dk_b + h * dk_h, key, dk_n, mask, dk * scale, DEPTH, BLOCK_D)
    store_rows(grad_v + b * dv_b + h * dv_h, key, dv_n, mask, dv, DEPTH, BLOCK_D)
