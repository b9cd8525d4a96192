"""Neighborhood attention with a relative bias, fused for CUDA devices, in Triton.

    z = softmax(scale · q kᵀ + B̂[key - query + K - 1]) v        over the K × K keys around each query

As in `deformable`, but a program takes a rectangle of queries, whose keys lie in a rectangle not much larger, and walks
over that; what a query does not see is masked. With dilation every interleaved sub-map has rectangles of its own. The
bias is one load from a table of (2K-1)² numbers.

The table's gradient is a sum along the diagonals of the cotangents: displacement is key minus query. A program sums its
own by two small matrix products with indicators, one for the columns and one for the rows of the rectangles; what the
programs found is added by a plain sum. Nothing is added atomically, so the gradients are always the same.

Checked in Triton's interpreter and compiled for sm_80 and sm_90; not yet timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....peers.neighborhood import axis_kernel
from .tiles import Kernel, choose_tiles
from .values import (
    LN_2,
    LOG2_E,
    add_tile_to_softmax,
    checked_values,
    given_back,
    laid_like,
    load_rows,
    store_rows,
    strides,
    with_channels_together,
)

LARGEST_KERNEL = 32
_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)
_ANY_SIZE = ("heads", "map_height", "map_width", "dilation", "seen_y", "seen_x")  # compiled once for all


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
        scale: of the dot products.

    Returns:
        out (B, heads, H·W, d), and lse (B, heads, H·W) float32.

    Raises:
        TypeError: for values of other dtypes, or of several.
        ValueError: for deeper heads or larger neighborhoods.
    """
    given = q
    q, k, v = checked_values(q, k, v)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = _Launch("forward", q, table, size, kernel, dilation, scale)
    if out.numel() > 0:
        _forward[launch.grid](q, k, v, launch.table, out, lse, *strides(q, k, v, out), **launch.arguments)
    return given_back(out, given), lse


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
    """Return the gradients of `neighborhood_forward` with respect to q, k, v and table; deterministic in any case."""
    given = (q, k, v)
    q, k, v = checked_values(q, k, v)
    grad_q, grad_k, grad_v = gradients = [torch.empty_like(each) for each in (q, k, v)]
    if out.numel() == 0:
        return grad_q, grad_k, grad_v, torch.zeros_like(table)
    out = with_channels_together(out)
    grad_out = laid_like(grad_out, out)
    mean = torch.empty_like(lse)
    launch = _Launch("grad_queries", q, table, size, kernel, dilation, scale)
    side = triton.next_power_of_2(max(2 * kernel - 1, 16))
    sums = torch.empty((*q.shape[:2], launch.tiles, side, side), dtype=torch.float32, device=q.device)
    _grad_queries[launch.grid](
        *(q, k, v, launch.table, out, grad_out, lse, mean, grad_q, sums),
        *strides(q, k, v, out, grad_q),
        SIDE=side,
        **launch.arguments,
    )
    launch = _Launch("grad_keys", q, table, size, kernel, dilation, scale)
    _grad_keys[launch.grid](
        *(q, k, v, launch.table, grad_out, lse, mean, grad_k, grad_v),
        *strides(q, k, v, out, grad_k, grad_v),
        **launch.arguments,
    )
    grad_table = sums.sum((0, 2))[:, : 2 * kernel - 1, : 2 * kernel - 1]
    grad_q, grad_k, grad_v = (given_back(grad, like) for grad, like in zip(gradients, given, strict=True))
    return grad_q, grad_k, grad_v, laid_like(grad_table.to(table.dtype), table)


class _Launch:
    """How a kernel is launched: a program takes a rectangle of queries, or of keys, and walks over the others."""

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
        if kernel > LARGEST_KERNEL:
            raise ValueError(f"kernel: expected at most {LARGEST_KERNEL}, got {kernel}")
        batch, heads, _, depth = q.shape
        tiles = choose_tiles(kernel_name, depth, q.dtype)
        own, others = (tiles.keys, tiles.queries) if kernel_name == "grad_keys" else (tiles.queries, tiles.keys)
        edge = {64: 8, 16: 4}[own]
        rows = max(others // 16, 16 // edge)  # so that the products in `_add_diagonals` sum over 16 pairs or more
        # A map smaller than the dilation has a sub-map for each of its pixels, and none without one.
        tiles_y, tiles_x = (min(dilation, length) * triton.cdiv(triton.cdiv(length, dilation), edge) for length in size)
        self.tiles = tiles_y * tiles_x
        self.grid = (batch * heads * self.tiles,)
        self.table = table.float().contiguous()
        self.arguments: dict[str, Any] = {
            "heads": heads,
            "map_height": size[0],
            "map_width": size[1],
            "dilation": dilation,
            "seen_y": axis_kernel(size[0], kernel, dilation),
            "seen_x": axis_kernel(size[1], kernel, dilation),
            "scale": scale,
            "log2_scale": scale * LOG2_E,
            "KERNEL": kernel,
            "OWN": edge,
            "ROWS": rows,
            "COLUMNS": others // rows,
            **tiles.arguments(depth, q.dtype),
        }


# ------------------------------------------------------------------------------------------------ geometry


@triton.jit
def _rectangle(program, map_height, map_width, dilation, heads, OWN: tl.constexpr):
    """Return the batch, the head, the sub-map and the rectangle of a program."""
    across = tl.cdiv(tl.cdiv(map_width, dilation), OWN)
    down = tl.cdiv(tl.cdiv(map_height, dilation), OWN)
    x, program = program % across * OWN, program // across
    y, program = program % down * OWN, program // down
    maps_x, maps_y = tl.minimum(dilation, map_width), tl.minimum(dilation, map_height)  # none without a pixel
    rest_x, program = program % maps_x, program // maps_x
    rest_y, program = program % maps_y, program // maps_y
    return (program // heads).to(tl.int64), (program % heads).to(tl.int64), rest_y, rest_x, y, x


@triton.jit
def _length(whole, rest, dilation):
    """Return the pixels of a sub-map on an axis."""
    return (whole - rest + dilation - 1) // dilation


@triton.jit
def _first_seen(query, length, seen):
    """Return the first key that a query of an axis sees."""
    return tl.minimum(tl.maximum(query - seen // 2, 0), length - seen)


@triton.jit
def _first_seeing(key, length, seen):
    """Return the first query of an axis that sees a key."""
    return tl.where(key < seen, 0, key - seen + 1 + seen // 2)


@triton.jit
def _last_seeing(key, length, seen):
    """Return the last query of an axis that sees a key."""
    return tl.where(key >= length - seen, length - 1, key + seen // 2)


@triton.jit
def _is_seen(key, first, seen):
    return (key >= first) & (key < first + seen)


@triton.jit
def _pixel(y, x, rest_y, rest_x, map_width, dilation):
    return (rest_y + dilation * y) * map_width + rest_x + dilation * x


# ------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=_ANY_SIZE)
def _forward(
    q, k, v, table, out, lse,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m,
    heads, map_height, map_width, dilation, seen_y, seen_x, scale, log2_scale,
    KERNEL: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, rest_y, rest_x, top_y, left_x = _rectangle(tl.program_id(0), map_height, map_width, dilation, heads, OWN)
    length_y, length_x = _length(map_height, rest_y, dilation), _length(map_width, rest_x, dilation)
    m = tl.arange(0, BLOCK_M)
    # Queries beyond the map repeat the last one; their results are not stored.
    exist = (top_y + m // OWN < length_y) & (left_x + m % OWN < length_x)
    y, x = tl.minimum(top_y + m // OWN, length_y - 1), tl.minimum(left_x + m % OWN, length_x - 1)
    pixel = _pixel(y, x, rest_y, rest_x, map_width, dilation)
    first_y, first_x = _first_seen(y, length_y, seen_y), _first_seen(x, length_x, seen_x)
    bias_at = table + (h * (2 * KERNEL - 1) + KERNEL - 1 - y) * (2 * KERNEL - 1) + KERNEL - 1 - x
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, pixel, q_m, exist, DEPTH, BLOCK_D)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mix = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for begin_y in range(tl.min(first_y), tl.max(first_y) + seen_y, ROWS):
        for begin_x in range(tl.min(first_x), tl.max(first_x) + seen_x, COLUMNS):
            key_y, key_x = begin_y + n // COLUMNS, begin_x + n % COLUMNS
            key = _pixel(key_y, key_x, rest_y, rest_x, map_width, dilation)
            in_map = (key_y < length_y) & (key_x < length_x)
            k_tile = load_rows(k, key, k_n, in_map, DEPTH, BLOCK_D)
            v_tile = load_rows(v, key, v_n, in_map, DEPTH, BLOCK_D)
            seen = _is_seen(key_y[None, :], first_y[:, None], seen_y)
            seen = seen & _is_seen(key_x[None, :], first_x[:, None], seen_x)
            bias = tl.load(bias_at[:, None] + (key_y * (2 * KERNEL - 1) + key_x)[None, :], mask=seen, other=0.0)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + bias * _LOG2_E
            logits = tl.where(seen, logits, float("-inf"))
            top, total, mix = add_tile_to_softmax(top, total, mix, logits, v_tile, PRECISION)
    store_rows(out + b * out_b + h * out_h, pixel, out_m, exist, mix / total[:, None], DEPTH, BLOCK_D)
    row = (b * heads + h) * map_height * map_width + pixel
    tl.store(lse + row, (top + tl.log2(total)) * _LN_2, mask=exist)


# ------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=_ANY_SIZE)
def _grad_queries(
    q, k, v, table, out, grad_out, lse, mean, grad_q, sums,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, grad_b, grad_h, grad_m,
    heads, map_height, map_width, dilation, seen_y, seen_x, scale, log2_scale,
    KERNEL: tl.constexpr, SIDE: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, rest_y, rest_x, top_y, left_x = _rectangle(tl.program_id(0), map_height, map_width, dilation, heads, OWN)
    length_y, length_x = _length(map_height, rest_y, dilation), _length(map_width, rest_x, dilation)
    m = tl.arange(0, BLOCK_M)
    exist = (top_y + m // OWN < length_y) & (left_x + m % OWN < length_x)
    y, x = tl.minimum(top_y + m // OWN, length_y - 1), tl.minimum(left_x + m % OWN, length_x - 1)
    pixel = _pixel(y, x, rest_y, rest_x, map_width, dilation)
    first_y, first_x = _first_seen(y, length_y, seen_y), _first_seen(x, length_x, seen_x)
    bias_at = table + (h * (2 * KERNEL - 1) + KERNEL - 1 - y) * (2 * KERNEL - 1) + KERNEL - 1 - x
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, pixel, q_m, exist, DEPTH, BLOCK_D)
    out_at = b * out_b + h * out_h
    cotangent = load_rows(grad_out + out_at, pixel, out_m, exist, DEPTH, BLOCK_D)
    result = load_rows(out + out_at, pixel, out_m, exist, DEPTH, BLOCK_D)
    row = (b * heads + h) * map_height * map_width + pixel
    log2_total = tl.load(lse + row, mask=exist, other=float("inf")) * _LOG2_E  # without a query, weights of 0
    mean_of_row = tl.sum(cotangent.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(mean + row, mean_of_row, mask=exist)

    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    of_table = tl.zeros([SIDE, SIDE], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for begin_y in range(tl.min(first_y), tl.max(first_y) + seen_y, ROWS):
        for begin_x in range(tl.min(first_x), tl.max(first_x) + seen_x, COLUMNS):
            key_y, key_x = begin_y + n // COLUMNS, begin_x + n % COLUMNS
            key = _pixel(key_y, key_x, rest_y, rest_x, map_width, dilation)
            in_map = (key_y < length_y) & (key_x < length_x)
            k_tile = load_rows(k, key, k_n, in_map, DEPTH, BLOCK_D)
            v_tile = load_rows(v, key, v_n, in_map, DEPTH, BLOCK_D)
            seen = _is_seen(key_y[None, :], first_y[:, None], seen_y)
            seen = seen & _is_seen(key_x[None, :], first_x[:, None], seen_x)
            bias = tl.load(bias_at[:, None] + (key_y * (2 * KERNEL - 1) + key_x)[None, :], mask=seen, other=0.0)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + bias * _LOG2_E
            weights = tl.where(seen, tl.exp2(logits - log2_total[:, None]), 0.0)
            grad_weights = tl.dot(cotangent, tl.trans(v_tile), input_precision=PRECISION)
            grad_logits = (weights * (grad_weights - mean_of_row[:, None])).to(k_tile.dtype)
            grad = tl.dot(grad_logits, k_tile, grad, input_precision=PRECISION)
            of_table = _add_diagonals(
                of_table, grad_logits, begin_y - top_y + KERNEL - 1, begin_x - left_x + KERNEL - 1,
                SIDE, OWN, ROWS, COLUMNS, PRECISION,
            )  # fmt: skip
    store_rows(grad_q + b * grad_b + h * grad_h, pixel, grad_m, exist, grad * scale, DEPTH, BLOCK_D)
    side = tl.arange(0, SIDE)
    sums += tl.program_id(0).to(tl.int64) * SIDE * SIDE
    tl.store(sums + side[:, None] * SIDE + side[None, :], of_table)


@triton.jit
def _add_diagonals(
    of_table, grad_logits, shift_y, shift_x,
    SIDE: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of cotangents to the table: that of query (i, j) and key (r, c) belongs to (r - i, c - j) + shift."""
    by_axis = tl.permute(tl.reshape(grad_logits, [OWN, OWN, ROWS, COLUMNS]), 0, 2, 1, 3)
    by_axis = tl.reshape(by_axis, [OWN * ROWS, OWN * COLUMNS])
    side = tl.arange(0, SIDE)
    pair_x = tl.arange(0, OWN * COLUMNS)
    place_x = pair_x % COLUMNS - pair_x // COLUMNS + shift_x
    summed_x = tl.dot(by_axis, (place_x[:, None] == side[None, :]).to(by_axis.dtype), input_precision=PRECISION)
    pair_y = tl.arange(0, OWN * ROWS)
    place_y = pair_y % ROWS - pair_y // ROWS + shift_y
    return tl.dot((side[:, None] == place_y[None, :]).to(tl.float32), summed_x, of_table, input_precision="tf32x3")


@triton.jit(do_not_specialize=_ANY_SIZE)
def _grad_keys(
    q, k, v, table, grad_out, lse, mean, grad_k, grad_v,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, map_height, map_width, dilation, seen_y, seen_x, scale, log2_scale,
    KERNEL: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, rest_y, rest_x, top_y, left_x = _rectangle(tl.program_id(0), map_height, map_width, dilation, heads, OWN)
    length_y, length_x = _length(map_height, rest_y, dilation), _length(map_width, rest_x, dilation)
    n = tl.arange(0, BLOCK_N)
    key_y, key_x = top_y + n // OWN, left_x + n % OWN
    exist = (key_y < length_y) & (key_x < length_x)
    key = _pixel(key_y, key_x, rest_y, rest_x, map_width, dilation)
    bias_at = table + (h * (2 * KERNEL - 1) + KERNEL - 1 + key_y) * (2 * KERNEL - 1) + KERNEL - 1 + key_x
    k_tile = load_rows(k + b * k_b + h * k_h, key, k_n, exist, DEPTH, BLOCK_D)
    v_tile = load_rows(v + b * v_b + h * v_h, key, v_n, exist, DEPTH, BLOCK_D)
    q += b * q_b + h * q_h
    grad_out += b * out_b + h * out_h
    row = (b * heads + h) * map_height * map_width

    of_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    m = tl.arange(0, BLOCK_M)
    last_y, last_x = tl.minimum(top_y + OWN, length_y) - 1, tl.minimum(left_x + OWN, length_x) - 1
    end_y, end_x = _last_seeing(last_y, length_y, seen_y) + 1, _last_seeing(last_x, length_x, seen_x) + 1
    for begin_y in range(_first_seeing(top_y, length_y, seen_y), end_y, ROWS):
        for begin_x in range(_first_seeing(left_x, length_x, seen_x), end_x, COLUMNS):
            y, x = begin_y + m // COLUMNS, begin_x + m % COLUMNS
            in_map = (y < length_y) & (x < length_x)
            pixel = _pixel(y, x, rest_y, rest_x, map_width, dilation)
            q_tile = load_rows(q, pixel, q_m, in_map, DEPTH, BLOCK_D)
            cotangent = load_rows(grad_out, pixel, out_m, in_map, DEPTH, BLOCK_D)
            log2_total = tl.load(lse + row + pixel, mask=in_map, other=float("inf")) * _LOG2_E
            mean_of_row = tl.load(mean + row + pixel, mask=in_map, other=0.0)
            first_y, first_x = _first_seen(y, length_y, seen_y), _first_seen(x, length_x, seen_x)
            seen = _is_seen(key_y[:, None], first_y[None, :], seen_y)
            seen = seen & _is_seen(key_x[:, None], first_x[None, :], seen_x) & in_map[None, :]
            bias = tl.load(bias_at[:, None] - (y * (2 * KERNEL - 1) + x)[None, :], mask=seen, other=0.0)
            logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * log2_scale + bias * _LOG2_E
            weights = tl.where(seen, tl.exp2(logits - log2_total[None, :]), 0.0)
            of_v = tl.dot(weights.to(cotangent.dtype), cotangent, of_v, input_precision=PRECISION)
            grad_weights = tl.dot(v_tile, tl.trans(cotangent), input_precision=PRECISION)
            grad_logits = weights * (grad_weights - mean_of_row[None, :])
            of_k = tl.dot(grad_logits.to(q_tile.dtype), q_tile, of_k, input_precision=PRECISION)
    store_rows(grad_k + b * dk_b + h * dk_h, key, dk_n, exist, of_k * scale, DEPTH, BLOCK_D)
    store_rows(grad_v + b * dv_b + h * dv_h, key, dv_n, exist, of_v, DEPTH, BLOCK_D)
