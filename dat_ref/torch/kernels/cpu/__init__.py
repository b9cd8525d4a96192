"""The core's kernels for CPUs, in Numba: compiled for this very processor when first used, and kept on disk.

==============  =====================================================================================
`vectors`       SIMD vectors, as values
`tiles`         products of small matrices, on vectors
`strided_io`    rows of strided tensors, in full precision or in bfloat16
`bias`          the bias of a key for many queries, and its gradients
`tiling`        how a call is cut into tiles
`deformable`    the attention, forward and backward
`launch`        from Python to compiled code: its arguments, where it is cached, its threads
==============  =====================================================================================

`neighborhood` has the like for neighborhood attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import deformable, launch
from .bias import GENERAL, NEAR_UNIT, UNIT
from .tiling import backward_offsets, forward_offsets, make_tiling

Size = tuple[int, int]


def available() -> bool:
    """Return whether the kernels can run here: wherever Numba can be imported."""
    return True


def warm(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Compile all there is for these dtypes, or load it from disk."""
    for dtype in dtypes:
        q, k = torch.ones(1, 1, 6, 2, dtype=dtype), torch.ones(1, 1, 1, 2, dtype=dtype)
        origin, table = torch.zeros(1, 1, 1, 2, dtype=dtype), torch.ones(1, 3, 5, dtype=dtype)
        options: dict[str, Any] = {"query_size": (2, 3), "step": (1.0, 1.0), "scale": 1.0}
        out, lse = deformable_forward(q, k, k, origin, table, **options)
        deformable_backward(q, q, k, k, origin, table, out, lse, **options)


# ------------------------------------------------------------------------------------------------ the core


def deformable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    *,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to sampled keys with a bias read from a table.

        z = softmax(scale · q kᵀ + B) v,      B[m, n] = the table, bilinear, at origin[n] + (i·step_y, j·step_x)

    for the query m = i·W + j, with zeros outside the table.

    Args:
        q: (B, heads, H·W, d), of any strides, as k and v.
        k, v: (B, heads, Ns, d) with Ns ≥ 1.
        origin: (B, G, Ns, 2), (y, x), in cells of the table; NaN gives NaN, and what is far outside no bias.
        table: (heads, T_y, T_x); heads [g·heads/G, (g+1)·heads/G) read at the points of group g.
        query_size: (H, W).
        step: cells from one query to the next.
        scale: of the dot products.

    Returns:
        z (B, heads, H·W, d) in the dtype of v, in memory as q is; and the log-sum-exp of each query's logits,
        (B, heads, H·W). Half precision is computed in float32; the kernels read and write bfloat16 themselves.
    """
    dtype = _compute_dtype(q, k, v)
    out = _empty_like(q, _storage_dtype(v.dtype, dtype))
    lse = torch.empty(q.shape[:3], dtype=dtype)
    if not q.numel():
        return out.to(v.dtype), lse
    threads = torch.get_num_threads()
    packed, _ = _pack_arguments(
        dtype, False, *q.shape, k.shape[2], origin.shape[1], *table.shape[1:], *query_size, *step, scale, threads
    )
    tensors = _prepare(dtype, q=q, k=k, v=v, origin=origin, table=table) | {"out": out, "lse": lse}
    launch.run(deformable.forward, deformable.FIELDS, dtype, packed, tensors, threads)
    return out.to(v.dtype), lse


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
    query_size: Size,
    step: tuple[float, float],
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `deformable_forward` with respect to q, k, v, origin and table.

    Args:
        grad_out: (B, heads, H·W, d).
        out, lse: what the forward pass returned; the other arguments are those that it got.
        deterministic: has no effect: sums are always taken in the same order, for a given number of threads.
    """
    if not q.numel():
        return tuple(torch.zeros_like(x) for x in (q, k, v, origin, table))  # type: ignore[return-value]
    dtype, threads = _compute_dtype(q, k, v), torch.get_num_threads()
    packed, splits = _pack_arguments(
        dtype, True, *q.shape, k.shape[2], origin.shape[1], *table.shape[1:], *query_size, *step, scale, threads
    )
    batch, heads, groups, samples = q.shape[0], q.shape[1], origin.shape[1], k.shape[2]
    grads = [_empty_like(q, _storage_dtype(q.dtype, dtype))]
    # Where they are summed over splits, in full precision.
    grads += [_empty_like(x, dtype if splits > 1 else _storage_dtype(x.dtype, dtype)) for x in (k, v)]
    grads_kv = grads[1:] if splits == 1 else [torch.empty(batch * splits, *x.shape[1:], dtype=dtype) for x in (k, v)]
    grad_origin = torch.empty((groups, heads // groups, batch, splits, samples, 2), dtype=dtype)
    grad_table = torch.empty((heads, batch * splits, *table.shape[1:]), dtype=dtype)
    tensors = _prepare(dtype, q=q, k=k, v=v, origin=origin, table=table, out=out, lse=lse, grad_out=grad_out)
    tensors |= {"grad_q": grads[0], "grad_k": grads_kv[0], "grad_v": grads_kv[1], "grad_origin": grad_origin}
    tensors["grad_table"] = grad_table
    launch.run(deformable.backward, deformable.FIELDS, dtype, packed, tensors, threads)
    if splits > 1:
        for grad, partial in zip(grads[1:], grads_kv):
            torch.sum(partial.unflatten(0, (batch, splits)), 1, out=grad)
    grads.append(grad_origin.sum(dim=(1, 3)).transpose(0, 1))  # over the heads of a group, and splits
    grads.append(grad_table.sum(dim=1) if batch * splits > 1 else grad_table[:, 0])  # over images and splits
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v, origin, table)))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ arguments

_CONTIGUOUS = {"origin", "table", "lse"}  # the kernels take these to be contiguous


@lru_cache(maxsize=256)
def _pack_arguments(
    dtype: torch.dtype,
    backward: bool,
    batch: int,
    heads: int,
    queries: int,
    depth: int,
    samples: int,
    groups: int,
    table_rows: int,
    table_columns: int,
    height: int,
    width: int,
    step_y: float,
    step_x: float,
    scale: float,
    threads: int,
) -> tuple[launch.PackedArguments, int]:
    """Return the arguments of a kernel but the addresses, and how many splits of the queries the backward pass has."""
    tiling = make_tiling(batch * heads, depth, (height, width), (table_rows, table_columns), threads)
    array_offsets, work_items = backward_offsets(tiling, table_rows, samples), batch * heads * tiling.splits
    if not backward:  # more work items than threads, for the others' sake if one is slow
        array_offsets, work_items = forward_offsets(tiling, table_rows), min(batch * heads * tiling.tiles, 8 * threads)
    values = {
        "batch": batch, "heads": heads, "groups": groups, "height": height, "width": width, "samples": samples,
        "depth": depth, "table_rows": table_rows, "table_columns": table_columns, "scale": scale,
        **dict(zip(("step_kind", "step_y", "step_x"), _classify_step(step_y, step_x, height, width))),
    }  # fmt: skip
    packed = launch.pack_arguments(deformable.FIELDS, dtype, values | tiling._asdict(), array_offsets, work_items)
    return packed, tiling.splits


def _classify_step(y: float, x: float, height: int, width: int) -> tuple[int, float, float]:
    """Return which kind of step it is, and the step; along a single row or column any step is as good as 1."""
    y, x = float(y if height > 1 else 1), float(x if width > 1 else 1)
    if (y, x) == (1, 1):
        return UNIT, y, x
    return (NEAR_UNIT if 0 <= (width - 1) * (1 - x) < 1 else GENERAL), y, x


def _prepare(dtype: torch.dtype, **tensors: Tensor) -> dict[str, Tensor]:
    """Return the tensors as kernels read them: in this dtype, or in bfloat16 and computed in float32; whole rows."""
    for name, tensor in tensors.items():
        storage = dtype if name in _CONTIGUOUS else _storage_dtype(tensor.dtype, dtype)
        x = tensor if tensor.dtype == storage else tensor.to(storage)
        tensors[name] = x.contiguous() if name in _CONTIGUOUS or x.stride(-1) != 1 else x
    return tensors


def _storage_dtype(dtype: torch.dtype, compute_dtype: torch.dtype) -> torch.dtype:
    """Return what an operand has in memory: bfloat16 stays where float32 is computed in, as its upper half."""
    return dtype if dtype == torch.bfloat16 and compute_dtype == torch.float32 else compute_dtype


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for a result that lies as x does, if its rows are contiguous then."""
    like = torch.empty_like(x, dtype=dtype)
    return like if like.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype)
