"""Deformable attention for CUDA devices, fused, in Triton: no logit matrix and no bias matrix, forward and backward.

    z = softmax(scale · q kᵀ + B) v

*Forward.* One program per head and tile of queries. It loops over tiles of keys with an online softmax (running maximum
and sum, in powers of two), and stores the log-sum-exp for the backward pass.
*Backward.* The weights are recomputed from the log-sum-exp. One kernel computes the gradient of a tile of queries,
another one the gradients of a tile of keys, of their values and of their origins in the table. Each program writes its
own results once, so there are no sums across programs. For the table's gradient see `table_gradient`.

Matrix products run on tensor cores: float16 and bfloat16 directly, float32 as three TF32 products, which is as accurate
as float32. Geometry, softmax and sums are float32.

Tested in Triton's interpreter and compiled for sm_80 and sm_90; not yet timed on a GPU. The tile sizes are not tuned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from .lookup import (
    Lookup,
    cells_of_positions,
    keys_of_head,
    locate,
    next_positions,
    prepare_lookup,
    query_cells,
    read_bias,
)
from .table_gradient import AtomicTableGradient, DeterministicTableGradient, add_atomically
from .tile_config import Kernel, TileConfig, autotune, default_config

_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)
# Kernels are compiled once for all values of these arguments. Triton specializes strides, which affect memory access.
_NOT_SPECIALIZED = ("heads", "group_heads", "queries", "map_width", "samples", "width", "plane")


@on_its_device
def deformable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    *,
    query_size: tuple[int, int],
    step: tuple[float, float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to sampled keys with a bias interpolated in a table, see `dat_ref.torch.kernels`.

    Args:
        q: (B, heads, H·W, d), float16, bfloat16 or float32, d at most 128, or 64 in float32.
        k, v: (B, heads, Ns, d), dtype of q.
        origin: (B, G, Ns, 2), table position (y, x) of query (0, 0) for each key, in cells.
        table: (heads, T_y, T_x).
        query_size: (H, W).
        step: table cells between neighboring queries, (y, x).
        scale: factor of the dot products.

    Returns:
        out (B, heads, H·W, d), and lse (B, heads, H·W) float32.

    Raises:
        TypeError: for other dtypes, or different dtypes of q, k and v.
        ValueError: for a larger d.
    """
    inputs = q
    q, k, v = check_qkv(q, k, v)
    out = torch.empty_like(q)
    batch, heads, queries, depth = q.shape
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    lookup = prepare_lookup(origin, table, query_size, step, packed=q.dtype is not torch.float32)

    def launch(config: TileConfig) -> None:
        _forward[(triton.cdiv(queries, config.block_m) * batch * heads,)](
            *(q, k, v, out, lse),
            *strides(q, k, v, out),
            **_size_arguments(q, k, origin, query_size, scale),
            **lookup.arguments(),
            **config.arguments(depth, q.dtype),
        )

    launch(autotune("forward", q, lookup.samples, lookup.unit, launch))
    return restore_layout(out, inputs), lse


@on_its_device
def deformable_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    query_size: tuple[int, int],
    step: tuple[float, float],
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `deformable_forward` with respect to q, k, v, origin and table.

    Args:
        grad_out: (B, heads, H·W, d).
        out, lse: outputs of `deformable_forward`. All other arguments are the same as in the forward call.
        deterministic: whether equal inputs must give a bitwise equal table gradient. Otherwise the table's gradient
            uses atomic additions.
    """
    inputs = (q, k, v)
    q, k, v = check_qkv(q, k, v)
    grads = [torch.empty_like(each) for each in (q, k, v)]
    if out.numel() == 0:
        return grads[0], grads[1], grads[2], torch.zeros_like(origin), torch.zeros_like(table)
    out = contiguous_last_dim(out)
    grad_out = match_strides(grad_out, out)
    lookup = prepare_lookup(origin, table, query_size, step, packed=q.dtype is not torch.float32)
    shared_arguments = {**_size_arguments(q, k, origin, query_size, scale), **lookup.arguments()}
    delta = torch.empty_like(lse)  # row sum of ∂out ⊙ out of each query
    grad_table = _launch_grad_queries(
        (q, k, v, out, grad_out, lse, delta), grads[0], lookup, table, query_size, shared_arguments, deterministic
    )
    grad_origin = _launch_grad_keys((q, k, v, grad_out, lse, delta), grads[1], grads[2], origin, shared_arguments)
    grad_q, grad_k, grad_v = (restore_layout(grad, like) for grad, like in zip(grads, inputs, strict=True))
    return grad_q, grad_k, grad_v, match_strides(grad_origin, origin), match_strides(grad_table, table)


def _size_arguments(q: Tensor, k: Tensor, origin: Tensor, query_size: tuple[int, int], scale: float) -> dict[str, Any]:
    heads = q.shape[1]
    return {
        "heads": heads,
        "group_heads": heads // origin.shape[1],
        "queries": q.shape[2],
        "map_width": query_size[1],
        "samples": k.shape[2],
        "scale": scale,
        "log2_scale": scale * LOG2_E,
    }


# ------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _forward(
    q, k, v, out, lse,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m,
    heads, group_heads, queries, map_width, samples, scale, log2_scale,
    keys, cells, pitch, width, plane, step_y, step_x, UNIT: tl.constexpr, PACKED: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    b, h = (pid // num_tiles // heads).to(tl.int64), (pid // num_tiles % heads).to(tl.int64)
    offs_m = pid % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    cell_offset, frac_y, frac_x = query_cells(offs_m, queries, map_width, width, step_y, step_x, UNIT)
    cell_ptr = cells + h * (plane if PACKED else 4 * plane) + cell_offset
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, offs_m, q_m, offs_m < queries, DEPTH, BLOCK_D)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of the logits
    l = tl.zeros([BLOCK_M], tl.float32)  # running sum of the exponentials
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # running weighted sum of the values
    even_stop = samples // BLOCK_N * BLOCK_N
    for start in range(0, even_stop, BLOCK_N):
        m, l, acc = _attend_tile(
            m, l, acc, q_tile, k, v, k_n, v_n, start, samples, log2_scale,
            cell_ptr, frac_y, frac_x, keys, pitch, width, plane, UNIT, PACKED,
            DEPTH, BLOCK_D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    if even_stop < samples:
        m, l, acc = _attend_tile(
            m, l, acc, q_tile, k, v, k_n, v_n, even_stop, samples, log2_scale,
            cell_ptr, frac_y, frac_x, keys, pitch, width, plane, UNIT, PACKED,
            DEPTH, BLOCK_D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    store_rows(out + b * out_b + h * out_h, offs_m, out_m, offs_m < queries, acc / l[:, None], DEPTH, BLOCK_D)
    tl.store(lse + (b * heads + h) * queries + offs_m, (m + tl.log2(l)) * _LN_2, mask=offs_m < queries)


@triton.jit
def _attend_tile(
    m, l, acc, q_tile, k, v, k_n, v_n, start, samples, log2_scale,
    cell_ptr, frac_y, frac_x, keys, pitch, width, plane, UNIT: tl.constexpr, PACKED: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    offs_n = start + tl.arange(0, BLOCK_N)
    mask = offs_n < samples
    k_tile = load_rows(k, offs_n, k_n, mask, DEPTH, BLOCK_D, EVEN_N)
    bias, _, _ = read_bias(cell_ptr, frac_y, frac_x, keys, offs_n, pitch, width, plane, UNIT, PACKED)
    logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + tl.trans(bias)
    if not EVEN_N:
        logits = tl.where(mask[None, :], logits, float("-inf"))
    v_tile = load_rows(v, offs_n, v_n, mask, DEPTH, BLOCK_D, EVEN_N)
    return online_softmax_step(m, l, acc, logits, v_tile, PRECISION)


# ------------------------------------------------------------------------------------------------ backward, queries


def _launch_grad_queries(
    tensors: tuple[Tensor, ...],
    grad_q: Tensor,
    lookup: Lookup,
    table: Tensor,
    query_size: tuple[int, int],
    shared_arguments: dict[str, Any],
    deterministic: bool,
) -> Tensor:
    """Compute `grad_q` and `delta` (the last of `tensors`) in place; return the table's gradient."""
    q = tensors[0]
    batch, heads, queries, depth = q.shape
    table_gradient: AtomicTableGradient | DeterministicTableGradient
    if deterministic:
        block_n = default_config("grad_queries", q).block_n
        table_gradient = DeterministicTableGradient(table, lookup, q, query_size, block_n)
    else:
        table_gradient = AtomicTableGradient(table, lookup)
    key_runs = table_gradient.key_runs()
    grad_q_sum = grad_q if len(key_runs) == 1 else torch.empty_like(grad_q, dtype=torch.float32)

    def launch(config: TileConfig, start: int, stop: int) -> None:
        _grad_queries[(triton.cdiv(queries, config.block_m) * batch * heads,)](
            *tensors,
            grad_q_sum,
            table_gradient.buffer,
            *strides(*tensors[:4], grad_q_sum),
            run_start=start,
            run_stop=stop,
            buffer_head=table_gradient.buffer.stride(1),
            buffer_row=table_gradient.buffer.stride(2),
            ATOMIC=not deterministic,
            **shared_arguments,
            **config.arguments(depth, q.dtype),
        )

    kernel: Kernel = "grad_queries" if deterministic else "grad_queries_atomic"
    config = autotune(kernel, q, lookup.samples, lookup.unit, lambda candidate: launch(candidate, *key_runs[0]))
    table_gradient.reset()
    for start, stop in key_runs:
        launch(config, start, stop)
        table_gradient.collect(start, stop)
    if grad_q_sum is not grad_q:
        grad_q.copy_(grad_q_sum)
    return table_gradient.finish()


@triton.jit(do_not_specialize=(*_NOT_SPECIALIZED, "run_stop"))
def _grad_queries(
    q, k, v, out, grad_out, lse, delta, grad_q, buffer,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, dq_b, dq_h, dq_m,
    run_start, run_stop, buffer_head, buffer_row, heads, group_heads, queries, map_width, samples, scale, log2_scale,
    keys, cells, pitch, width, plane, step_y, step_x, UNIT: tl.constexpr, PACKED: tl.constexpr, ATOMIC: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    b, h = (pid // num_tiles // heads).to(tl.int64), (pid // num_tiles % heads).to(tl.int64)
    offs_m = pid % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    cell_offset, frac_y, frac_x = query_cells(offs_m, queries, map_width, width, step_y, step_x, UNIT)
    cell_ptr = cells + h * (plane if PACKED else 4 * plane) + cell_offset
    if ATOMIC:
        buffer += h * buffer_head + cell_offset
    else:
        buffer += (b * heads + h) * buffer_head + offs_m
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    q_tile = load_rows(q + b * q_b + h * q_h, offs_m, q_m, offs_m < queries, DEPTH, BLOCK_D)
    out_offset = b * out_b + h * out_h
    grad_out_tile = load_rows(grad_out + out_offset, offs_m, out_m, offs_m < queries, DEPTH, BLOCK_D)
    out_tile = load_rows(out + out_offset, offs_m, out_m, offs_m < queries, DEPTH, BLOCK_D)
    row = (b * heads + h) * queries + offs_m
    lse_tile = tl.load(lse + row, mask=offs_m < queries, other=float("inf")) * _LOG2_E  # inf: no weight past the end
    delta_tile = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + row, delta_tile, mask=offs_m < queries)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    even_stop = run_start + (run_stop - run_start) // BLOCK_N * BLOCK_N
    for start in range(run_start, even_stop, BLOCK_N):
        dq = _add_query_gradient(
            dq, q_tile, grad_out_tile, lse_tile, delta_tile, offs_m, queries, k, v, k_n, v_n, start, run_start,
            run_stop, buffer_row, log2_scale, cell_ptr, buffer, frac_y, frac_x, keys, pitch, width, plane, UNIT,
            PACKED, ATOMIC, DEPTH, BLOCK_D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    if even_stop < run_stop:
        dq = _add_query_gradient(
            dq, q_tile, grad_out_tile, lse_tile, delta_tile, offs_m, queries, k, v, k_n, v_n, even_stop, run_start,
            run_stop, buffer_row, log2_scale, cell_ptr, buffer, frac_y, frac_x, keys, pitch, width, plane, UNIT,
            PACKED, ATOMIC, DEPTH, BLOCK_D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    dq *= scale
    grad_q += b * dq_b + h * dq_h
    if run_start > 0:  # add to the results of the previous runs of keys
        dq += load_rows(grad_q, offs_m, dq_m, offs_m < queries, DEPTH, BLOCK_D)
    store_rows(grad_q, offs_m, dq_m, offs_m < queries, dq, DEPTH, BLOCK_D)


@triton.jit
def _add_query_gradient(
    dq, q_tile, grad_out_tile, lse_tile, delta_tile, offs_m, queries, k, v, k_n, v_n, start, run_start, run_stop,
    buffer_row, log2_scale, cell_ptr, buffer, frac_y, frac_x, keys, pitch, width, plane,
    UNIT: tl.constexpr, PACKED: tl.constexpr, ATOMIC: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    offs_n = start + tl.arange(0, BLOCK_N)
    mask = offs_n < run_stop
    k_tile = load_rows(k, offs_n, k_n, mask, DEPTH, BLOCK_D, EVEN_N)
    v_tile = load_rows(v, offs_n, v_n, mask, DEPTH, BLOCK_D, EVEN_N)
    bias, _, _ = read_bias(cell_ptr, frac_y, frac_x, keys, offs_n, pitch, width, plane, UNIT, PACKED)
    logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale + tl.trans(bias)
    weights = tl.exp2(logits - lse_tile[:, None])
    grad_weights = tl.dot(grad_out_tile, tl.trans(v_tile), input_precision=PRECISION)
    grad_logits = weights * (grad_weights - delta_tile[:, None])
    if not EVEN_N:
        grad_logits = tl.where(mask[None, :], grad_logits, 0.0)
    grad_logits_cast = grad_logits.to(k_tile.dtype)
    dq = tl.dot(grad_logits_cast, k_tile, dq, input_precision=PRECISION)
    if ATOMIC:
        cell_offset, y, x = locate(keys, offs_n, pitch, frac_y, frac_x, width, UNIT)
        add_atomically(buffer[None, :] + cell_offset, plane, y, x, tl.trans(grad_logits))
    else:
        # The workspace is padded to whole tiles of keys, and its rows to a multiple of 16 queries, for aligned stores.
        row_offsets = (offs_n - run_start)[None, :] * buffer_row
        tl.store(buffer[:, None] + row_offsets, grad_logits_cast, mask=(offs_m < buffer_row)[:, None])
    return dq


# ------------------------------------------------------------------------------------------------ backward, keys


def _launch_grad_keys(
    tensors: tuple[Tensor, ...], grad_k: Tensor, grad_v: Tensor, origin: Tensor, shared_arguments: dict[str, Any]
) -> Tensor:
    """Compute `grad_k` and `grad_v` in place; return the gradient of `origin`."""
    q, k = tensors[:2]
    batch, heads, samples, depth = k.shape
    config = default_config("grad_keys", q)
    grad_by_head = torch.empty((batch, heads, samples, 2), dtype=torch.float32, device=q.device)
    _grad_keys[(triton.cdiv(samples, config.block_n) * batch * heads,)](
        *tensors,
        grad_k,
        grad_v,
        grad_by_head,
        *strides(*tensors[:4], grad_k, grad_v),
        **shared_arguments,
        **config.arguments(depth, q.dtype),
    )
    return grad_by_head.unflatten(1, (origin.shape[1], -1)).sum(2).to(origin.dtype)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grad_keys(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, grad_origin,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, group_heads, queries, map_width, samples, scale, log2_scale,
    keys, cells, pitch, width, plane, step_y, step_x, UNIT: tl.constexpr, PACKED: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(samples, BLOCK_N)
    pid = tl.program_id(0)
    b, h = (pid // num_tiles // heads).to(tl.int64), (pid // num_tiles % heads).to(tl.int64)
    offs_n = pid % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    cells += h * (plane if PACKED else 4 * plane)
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch)
    q += b * q_b + h * q_h
    grad_out += b * out_b + h * out_h
    row = (b * heads + h) * queries
    k_tile = load_rows(k + b * k_b + h * k_h, offs_n, k_n, offs_n < samples, DEPTH, BLOCK_D)
    v_tile = load_rows(v + b * v_b + h * v_h, offs_n, v_n, offs_n < samples, DEPTH, BLOCK_D)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dy = tl.zeros([BLOCK_N], tl.float32)
    dx = tl.zeros([BLOCK_N], tl.float32)
    last_row = queries // map_width - 1
    i, j = tl.arange(0, BLOCK_M) // map_width, tl.arange(0, BLOCK_M) % map_width  # row and column of each query
    for start in range(0, queries, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, offs_m, q_m, offs_m < queries, DEPTH, BLOCK_D)
        grad_out_tile = load_rows(grad_out, offs_m, out_m, offs_m < queries, DEPTH, BLOCK_D)
        lse_tile = tl.load(lse + row + offs_m, mask=offs_m < queries, other=float("inf")) * _LOG2_E
        delta_tile = tl.load(delta + row + offs_m, mask=offs_m < queries, other=0.0)
        # Padding queries after the last row have no weight; they must only read inside the table's border.
        cell_offset, frac_y, frac_x = cells_of_positions(tl.minimum(i, last_row), j, width, step_y, step_x, UNIT)
        i, j = next_positions(i, j, BLOCK_M // map_width, BLOCK_M % map_width, map_width)
        bias, slope_y, slope_x = read_bias(
            cells + cell_offset, frac_y, frac_x, keys, offs_n, pitch, width, plane, UNIT, PACKED
        )
        logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * log2_scale + bias
        weights = tl.exp2(logits - lse_tile[None, :])
        dv = tl.dot(weights.to(grad_out_tile.dtype), grad_out_tile, dv, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(grad_out_tile), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta_tile[None, :])
        dk = tl.dot(grad_logits.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
        dy += tl.sum(grad_logits * slope_y, 1)
        dx += tl.sum(grad_logits * slope_x, 1)
    store_rows(grad_k + b * dk_b + h * dk_h, offs_n, dk_n, offs_n < samples, dk * scale, DEPTH, BLOCK_D)
    store_rows(grad_v + b * dv_b + h * dv_h, offs_n, dv_n, offs_n < samples, dv, DEPTH, BLOCK_D)
    # The coefficients in `cells` include the factor log₂ e.
    ptr = grad_origin + ((b * heads + h) * samples + offs_n) * 2
    tl.store(ptr, dy * _LN_2, mask=offs_n < samples)
    tl.store(ptr + 1, dx * _LN_2, mask=offs_n < samples)
