"""Deformable attention fused for CUDA devices, in Triton: no score matrix and no bias matrix, forward and backward.

    z = softmax(scale · q kᵀ + B) v

*Forward.* One program for each head and tile of queries; it walks over the keys a tile at a time, with the softmax
computed online (running maximum and sum, in powers of two), and leaves the logarithm of the sum for the backward pass.
*Backward.* The weights are computed again from it. One kernel a tile of queries gives the queries' gradient, one a tile
of keys those of the keys, of the values and of where the keys read the table; each program writes what it owns, once,
so nothing is added across programs. The table's gradient is another matter: see `table_gradient`.

Values are multiplied on tensor cores: float16 and bfloat16 as they are, float32 as three products of TF32, which is as
good as float32. Geometry, softmax and sums are float32.

Checked in Triton's interpreter and compiled for sm_80 and sm_90; not yet timed on a GPU. The formulation is the plain
one, and the tiles are sensible ones, not tuned ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lookup import Lookup, keys_of_head, locate, prepare_lookup, query_cells, read_bias
from .table_gradient import AtomicTableGradient, CollectedTableGradient, add_atomically
from .tiles import Tiles, choose_tiles, fastest_tiles
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

_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)
# Compiled once for all sizes; only what decides how memory is accessed, strides and the like, is looked at.
_ANY_SIZE = ("heads", "group_heads", "queries", "map_width", "samples", "width", "plane")


def deformable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    table: Tensor,
    *,
    query_size: tuple[int, int],
    step: tuple[float, float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to sampled keys with a bias read from a table: see `dat_ref.torch.kernels`.

    Args:
        q: (B, heads, H·W, d), float16, bfloat16 or float32, d at most 128, or 64 in float32.
        k, v: (B, heads, Ns, d), likewise.
        base: (B, G, Ns, 2), where query (0, 0) reads each key's bias, in cells of the table.
        table: (heads, T_y, T_x).
        query_size: (H, W).
        step: cells of the table from one query to the next, on each axis.
        scale: of the dot products.

    Returns:
        out (B, heads, H·W, d), and lse (B, heads, H·W) float32.

    Raises:
        TypeError: for values of other dtypes, or of several.
        ValueError: for deeper heads.
    """
    given = q
    q, k, v = checked_values(q, k, v)
    out = torch.empty_like(q)
    batch, heads, queries, depth = q.shape
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    lookup = prepare_lookup(base, table, query_size, step, packed=q.dtype is not torch.float32)

    def launch(tiles: Tiles) -> None:
        _forward[(triton.cdiv(queries, tiles.queries) * batch * heads,)](
            *(q, k, v, out, lse),
            *strides(q, k, v, out),
            **_sizes(q, k, base, query_size, scale),
            **lookup.arguments(),
            **tiles.arguments(depth, q.dtype),
        )

    launch(fastest_tiles("forward", q, lookup.samples, lookup.unit, launch))
    return given_back(out, given), lse


def deformable_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    query_size: tuple[int, int],
    step: tuple[float, float],
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `deformable_forward` with respect to q, k, v, base and table.

    Args:
        grad_out: (B, heads, H·W, d).
        out, lse: what `deformable_forward` returned.
        deterministic: whether the same input must give the same table gradient to the last bit. Without it the
            table's gradient is added up atomically.
    """
    given = (q, k, v)
    q, k, v = checked_values(q, k, v)
    gradients = [torch.empty_like(each) for each in (q, k, v)]
    if out.numel() == 0:
        return gradients[0], gradients[1], gradients[2], torch.zeros_like(base), torch.zeros_like(table)
    out = with_channels_together(out)
    grad_out = laid_like(grad_out, out)
    lookup = prepare_lookup(base, table, query_size, step, packed=q.dtype is not torch.float32)
    shared = {**_sizes(q, k, base, query_size, scale), **lookup.arguments()}
    mean = torch.empty_like(lse)  # of each query's cotangents of the weights
    grad_table = _launch_grad_queries(
        (q, k, v, out, grad_out, lse, mean), gradients[0], lookup, table, query_size, shared, deterministic
    )
    grad_base = _launch_grad_keys((q, k, v, grad_out, lse, mean), gradients[1], gradients[2], base, shared)
    grad_q, grad_k, grad_v = (given_back(grad, like) for grad, like in zip(gradients, given, strict=True))
    return grad_q, grad_k, grad_v, laid_like(grad_base, base), laid_like(grad_table, table)


def _sizes(q: Tensor, k: Tensor, base: Tensor, query_size: tuple[int, int], scale: float) -> dict[str, Any]:
    heads = q.shape[1]
    return {
        "heads": heads,
        "group_heads": heads // base.shape[1],
        "queries": q.shape[2],
        "map_width": query_size[1],
        "samples": k.shape[2],
        "scale": scale,
        "log2_scale": scale * LOG2_E,
    }


# ------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=_ANY_SIZE)
def _forward(
    q, k, v, out, lse,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m,
    heads, group_heads, queries, map_width, samples, scale, log2_scale,
    keys, cells, pitch, width, plane, step_y, step_x, UNIT: tl.constexpr, PACKED: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    b, h = (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)
    m = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offset, rest_y, rest_x = query_cells(m, queries, map_width, width, step_y, step_x, UNIT)
    first = cells + h * (plane if PACKED else 4 * plane) + offset
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, m, q_m, m < queries, DEPTH, BLOCK_D)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the largest logit so far
    total = tl.zeros([BLOCK_M], tl.float32)  # of the exponentials
    mix = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # of the values
    whole = samples // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        top, total, mix = _attend_to_tile(
            top, total, mix, q_tile, k, v, k_n, v_n, start, samples, log2_scale,
            first, rest_y, rest_x, keys, pitch, width, plane, UNIT, PACKED,
            DEPTH, BLOCK_D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    if whole < samples:
        top, total, mix = _attend_to_tile(
            top, total, mix, q_tile, k, v, k_n, v_n, whole, samples, log2_scale,
            first, rest_y, rest_x, keys, pitch, width, plane, UNIT, PACKED,
            DEPTH, BLOCK_D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    store_rows(out + b * out_b + h * out_h, m, out_m, m < queries, mix / total[:, None], DEPTH, BLOCK_D)
    tl.store(lse + (b * heads + h) * queries + m, (top + tl.log2(total)) * _LN_2, mask=m < queries)


@triton.jit
def _attend_to_tile(
    top, total, mix, q_tile, k, v, k_n, v_n, start, samples, log2_scale,
    first, rest_y, rest_x, keys, pitch, width, plane, UNIT: tl.constexpr, PACKED: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    n = start + tl.arange(0, BLOCK_N)
    exist = n < samples
    k_tile = load_rows(k, n, k_n, exist, DEPTH, BLOCK_D, WHOLE)
    bias, _, _ = read_bias(first, rest_y, rest_x, keys, n, pitch, width, plane, UNIT, PACKED)
    logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + tl.trans(bias)
    if not WHOLE:
        logits = tl.where(exist[None, :], logits, float("-inf"))
    v_tile = load_rows(v, n, v_n, exist, DEPTH, BLOCK_D, WHOLE)
    return add_tile_to_softmax(top, total, mix, logits, v_tile, PRECISION)


# ------------------------------------------------------------------------------------------------ backward, queries


def _launch_grad_queries(
    values: tuple[Tensor, ...],
    grad_q: Tensor,
    lookup: Lookup,
    table: Tensor,
    query_size: tuple[int, int],
    shared: dict[str, Any],
    deterministic: bool,
) -> Tensor:
    """Fill `grad_q` and the last of `values`, the mean cotangents; return the table's gradient."""
    q = values[0]
    batch, heads, queries, depth = q.shape
    gradient: AtomicTableGradient | CollectedTableGradient
    if deterministic:
        keys_of_tile = choose_tiles("grad_queries", depth, q.dtype).keys
        gradient = CollectedTableGradient(table, lookup, q, query_size, keys_of_tile)
    else:
        gradient = AtomicTableGradient(table, lookup)
    runs = gradient.runs()
    total = grad_q if len(runs) == 1 else torch.empty_like(grad_q, dtype=torch.float32)

    def launch(tiles: Tiles, start: int, stop: int) -> None:
        _grad_queries[(triton.cdiv(queries, tiles.queries) * batch * heads,)](
            *values,
            total,
            gradient.sink,
            *strides(*values[:4], total),
            run_start=start,
            run_stop=stop,
            sink_head=gradient.sink.stride(1),
            sink_row=gradient.sink.stride(2),
            ATOMIC=not deterministic,
            **shared,
            **tiles.arguments(depth, q.dtype),
        )

    tiles = fastest_tiles("grad_queries", q, lookup.samples, lookup.unit, lambda tried: launch(tried, *runs[0]))
    gradient.clear()
    for start, stop in runs:
        launch(tiles, start, stop)
        gradient.collect(start, stop)
    if total is not grad_q:
        grad_q.copy_(total)
    return gradient.finish()


@triton.jit(do_not_specialize=(*_ANY_SIZE, "run_stop"))
def _grad_queries(
    q, k, v, out, grad_out, lse, mean, grad_q, sink,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, grad_b, grad_h, grad_m,
    run_start, run_stop, sink_head, sink_row, heads, group_heads, queries, map_width, samples, scale, log2_scale,
    keys, cells, pitch, width, plane, step_y, step_x, UNIT: tl.constexpr, PACKED: tl.constexpr, ATOMIC: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    b, h = (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)
    m = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offset, rest_y, rest_x = query_cells(m, queries, map_width, width, step_y, step_x, UNIT)
    first = cells + h * (plane if PACKED else 4 * plane) + offset
    if ATOMIC:
        sink += h * sink_head + offset
    else:
        sink += (b * heads + h) * sink_head + m
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, m, q_m, m < queries, DEPTH, BLOCK_D)
    out_at = b * out_b + h * out_h
    cotangent = load_rows(grad_out + out_at, m, out_m, m < queries, DEPTH, BLOCK_D)
    result = load_rows(out + out_at, m, out_m, m < queries, DEPTH, BLOCK_D)
    row = (b * heads + h) * queries + m
    log2_total = tl.load(lse + row, mask=m < queries, other=float("inf")) * _LOG2_E  # without a query, weights of 0
    mean_of_row = tl.sum(cotangent.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(mean + row, mean_of_row, mask=m < queries)

    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = run_start + (run_stop - run_start) // BLOCK_N * BLOCK_N
    for start in range(run_start, whole, BLOCK_N):
        grad = _pull_back_to_queries(
            grad, q_tile, cotangent, log2_total, mean_of_row, m, queries, k, v, k_n, v_n, start, run_start, run_stop,
            sink_row, log2_scale, first, sink, rest_y, rest_x, keys, pitch, width, plane, UNIT, PACKED, ATOMIC,
            DEPTH, BLOCK_D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    if whole < run_stop:
        grad = _pull_back_to_queries(
            grad, q_tile, cotangent, log2_total, mean_of_row, m, queries, k, v, k_n, v_n, whole, run_start, run_stop,
            sink_row, log2_scale, first, sink, rest_y, rest_x, keys, pitch, width, plane, UNIT, PACKED, ATOMIC,
            DEPTH, BLOCK_D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    grad *= scale
    grad_q += b * grad_b + h * grad_h
    if run_start > 0:  # after other runs of keys
        grad += load_rows(grad_q, m, grad_m, m < queries, DEPTH, BLOCK_D)
    store_rows(grad_q, m, grad_m, m < queries, grad, DEPTH, BLOCK_D)


@triton.jit
def _pull_back_to_queries(
    grad, q_tile, cotangent, log2_total, mean, m, queries, k, v, k_n, v_n, start, run_start, run_stop,
    sink_row, log2_scale, first, sink, rest_y, rest_x, keys, pitch, width, plane,
    UNIT: tl.constexpr, PACKED: tl.constexpr, ATOMIC: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    n = start + tl.arange(0, BLOCK_N)
    exist = n < run_stop
    k_tile = load_rows(k, n, k_n, exist, DEPTH, BLOCK_D, WHOLE)
    v_tile = load_rows(v, n, v_n, exist, DEPTH, BLOCK_D, WHOLE)
    bias, _, _ = read_bias(first, rest_y, rest_x, keys, n, pitch, width, plane, UNIT, PACKED)
    logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + tl.trans(bias)
    weights = tl.exp2(logits - log2_total[:, None])
    grad_weights = tl.dot(cotangent, tl.trans(v_tile), input_precision=PRECISION)
    grad_logits = weights * (grad_weights - mean[:, None])
    if not WHOLE:
        grad_logits = tl.where(exist[None, :], grad_logits, 0.0)
    narrow = grad_logits.to(k_tile.dtype)
    if ATOMIC:
        cell, y, x = locate(keys, n, pitch, rest_y, rest_x, width, UNIT)
        inside = (m < queries)[None, :] & exist[:, None]
        add_atomically(sink[None, :] + cell, plane, y, x, tl.trans(grad_logits), inside)
    else:
        # The workspace has room for whole tiles of keys, and rows that are longer than the map, for aligned stores.
        rows = (n - run_start)[None, :] * sink_row
        tl.store(sink[:, None] + rows, narrow, mask=(m < sink_row)[:, None])
    return tl.dot(narrow, k_tile, grad, input_precision=PRECISION)


# ------------------------------------------------------------------------------------------------ backward, keys


def _launch_grad_keys(
    values: tuple[Tensor, ...], grad_k: Tensor, grad_v: Tensor, base: Tensor, shared: dict[str, Any]
) -> Tensor:
    """Fill `grad_k` and `grad_v`; return the gradient of where the keys read the table."""
    q, k = values[:2]
    batch, heads, samples, depth = k.shape
    tiles = choose_tiles("grad_keys", depth, q.dtype)
    by_head = torch.empty((batch, heads, samples, 2), dtype=torch.float32, device=q.device)
    _grad_keys[(triton.cdiv(samples, tiles.keys) * batch * heads,)](
        *values,
        grad_k,
        grad_v,
        by_head,
        *strides(*values[:4], grad_k, grad_v),
        **shared,
        **tiles.arguments(depth, q.dtype),
    )
    return by_head.unflatten(1, (base.shape[1], -1)).sum(2).to(base.dtype)


@triton.jit(do_not_specialize=_ANY_SIZE)
def _grad_keys(
    q, k, v, grad_out, lse, mean, grad_k, grad_v, grad_base,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, group_heads, queries, map_width, samples, scale, log2_scale,
    keys, cells, pitch, width, plane, step_y, step_x, UNIT: tl.constexpr, PACKED: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(samples, BLOCK_N)
    program = tl.program_id(0)
    b, h = (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)
    n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    cells += h * (plane if PACKED else 4 * plane)
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch)
    q += b * q_b + h * q_h
    grad_out += b * out_b + h * out_h
    row = (b * heads + h) * queries
    k_tile = load_rows(k + b * k_b + h * k_h, n, k_n, n < samples, DEPTH, BLOCK_D)
    v_tile = load_rows(v + b * v_b + h * v_h, n, v_n, n < samples, DEPTH, BLOCK_D)

    of_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_y = tl.zeros([BLOCK_N], tl.float32)
    of_x = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, queries, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, m, q_m, m < queries, DEPTH, BLOCK_D)
        cotangent = load_rows(grad_out, m, out_m, m < queries, DEPTH, BLOCK_D)
        log2_total = tl.load(lse + row + m, mask=m < queries, other=float("inf")) * _LOG2_E  # as in `_grad_queries`
        mean_of_row = tl.load(mean + row + m, mask=m < queries, other=0.0)
        offset, rest_y, rest_x = query_cells(m, queries, map_width, width, step_y, step_x, UNIT)
        bias, slope_y, slope_x = read_bias(cells + offset, rest_y, rest_x, keys, n, pitch, width, plane, UNIT, PACKED)
        logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * log2_scale + bias
        weights = tl.exp2(logits - log2_total[None, :])
        of_v = tl.dot(weights.to(cotangent.dtype), cotangent, of_v, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(cotangent), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - mean_of_row[None, :])
        of_k = tl.dot(grad_logits.to(q_tile.dtype), q_tile, of_k, input_precision=PRECISION)
        of_y += tl.sum(grad_logits * slope_y, 1)
        of_x += tl.sum(grad_logits * slope_x, 1)
    store_rows(grad_k + b * dk_b + h * dk_h, n, dk_n, n < samples, of_k * scale, DEPTH, BLOCK_D)
    store_rows(grad_v + b * dv_b + h * dv_h, n, dv_n, n < samples, of_v, DEPTH, BLOCK_D)
    # The cells hold log₂ e times the table.
    at = grad_base + ((b * heads + h) * samples + n) * 2
    tl.store(at, of_y * _LN_2, mask=n < samples)
    tl.store(at + 1, of_x * _LN_2, mask=n < samples)
