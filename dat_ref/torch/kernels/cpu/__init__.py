"""Numba kernels for deformable attention on CPUs, compiled for the host CPU on first use and cached on disk.

==============  =====================================================================================
`vectors`       SIMD vector type for Numba
`tiles`         products of small matrices on SIMD vectors
`strided_io`    loads and stores of rows of strided tensors, in the compute dtype or bfloat16
`bias`          bias of one key for a tile of queries, and its gradients
`tiling`        tile sizes, work items and scratch memory layout
`deformable`    forward and backward kernels
`launch`        kernel launcher: argument records, compilation, threading
`code_cache`    on-disk cache of compiled code; ``NUMBA_CACHE_DIR`` names its directory
==============  =====================================================================================

`neighborhood` contains the counterpart for neighborhood attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import deformable, launch
from .bias import GENERAL, NEAR_UNIT, UNIT
from .tiling import backward_sizes, forward_sizes, make_tiling

Size = tuple[int, int]


def available() -> bool:
    """Return True: the kernels run on every machine where Numba, and so this module, can be imported."""
    return True


def warm(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Compile all kernels for the given dtypes, or load them from the on-disk cache."""
    for dtype in dtypes:
        q, k = torch.ones(1, 1, 6, 2, dtype=dtype), torch.ones(1, 1, 1, 2, dtype=dtype)
        origin, table = torch.zeros(1, 1, 1, 2, dtype=dtype), torch.ones(1, 3, 5, dtype=dtype)
        options: dict[str, Any] = {"query_size": (2, 3), "step": (1.0, 1.0), "scale": 1.0}
        out, lse = deformable_forward(q, k, k, origin, table, **options)
        deformable_backward(q, q, k, k, origin, table, out, lse, **options)


# ------------------------------------------------------------------------------------------------ attention


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
    """Attend to sampled keys with a relative position bias interpolated from a table.

        z = softmax(scale · q kᵀ + B) v,      B[m, n] = φ(table; origin[n] + (i·step_y, j·step_x))

    for query m = i·W + j. φ is bilinear interpolation with zeros outside the table.

    Args:
        q: (B, heads, H·W, d), any strides.
        k, v: (B, heads, Ns, d) with Ns ≥ 1, any strides.
        origin: (B, G, Ns, 2), table position (y, x) of query (0, 0) for each key, in cells. NaN gives NaN. Positions
            outside the table give zero bias.
        table: (heads, T_y, T_x); heads [g·heads/G, (g+1)·heads/G) use the keys' origins of group g.
        query_size: (H, W).
        step: table cells between neighboring queries, (y, x).
        scale: factor of the dot products.

    Returns:
        z (B, heads, H·W, d), in the dtype of v and the memory layout of q; and lse (B, heads, H·W), the log-sum-exp of
        each query's logits. Half precision is computed in float32. The kernels read and write bfloat16 directly.
    """
    dtype = _compute_dtype(q, k, v)
    out = _empty_like(q, _storage_dtype(v.dtype, dtype))
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    if not q.numel():
        return out.to(v.dtype), lse
    threads = torch.get_num_threads()
    sizes = (q.shape, k.shape[2], origin.shape[1], table.shape, query_size)
    packed, _ = _pack_arguments(dtype, False, *sizes, step, scale, threads)
    tensors = _prepare(dtype, q=q, k=k, v=v, origin=origin, table=table)
    tensors["out"], tensors["lse"] = out, lse
    launch.run(deformable.forward, deformable.FIELDS, dtype, packed, tensors, threads)
    return _cast(out, v.dtype), lse


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
        out, lse: outputs of `deformable_forward`. All other arguments are the same as in the forward call.
        deterministic: no effect; the order of summation is fixed for a given number of threads.
    """
    if not q.numel():
        return tuple(torch.zeros_like(x) for x in (q, k, v, origin, table))  # type: ignore[return-value]
    dtype, threads = _compute_dtype(q, k, v), torch.get_num_threads()
    sizes = (q.shape, k.shape[2], origin.shape[1], table.shape, query_size)
    packed, splits = _pack_arguments(dtype, True, *sizes, step, scale, threads)
    batch, heads, groups, samples = q.shape[0], q.shape[1], origin.shape[1], k.shape[2]
    grads = [_empty_like(q, _storage_dtype(q.dtype, dtype))]
    # The kernel writes one partial gradient per split; partial gradients are summed in full precision.
    grads += [_empty_like(x, dtype if splits > 1 else _storage_dtype(x.dtype, dtype)) for x in (k, v)]
    grads_kv = grads[1:] if splits == 1 else [torch.empty(batch * splits, *x.shape[1:], dtype=dtype) for x in (k, v)]
    grad_origin = q.new_empty((groups, heads // groups, batch, splits, samples, 2), dtype=dtype)
    grad_table = q.new_empty((heads, batch * splits, *table.shape[1:]), dtype=dtype)
    tensors = _prepare(dtype, q=q, k=k, v=v, origin=origin, table=table, out=out, lse=lse, grad_out=grad_out)
    tensors |= {"grad_q": grads[0], "grad_k": grads_kv[0], "grad_v": grads_kv[1], "grad_origin": grad_origin}
    tensors["grad_table"] = grad_table
    launch.run(deformable.backward, deformable.FIELDS, dtype, packed, tensors, threads)
    if splits > 1:
        for grad, partial in zip(grads[1:], grads_kv):
            torch.sum(partial.unflatten(0, (batch, splits)), 1, out=grad)
    grads.append(grad_origin.sum(dim=(1, 3)).transpose(0, 1))  # sum over the heads of a group and splits
    grads.append(grad_table.sum(dim=1) if batch * splits > 1 else grad_table.squeeze(1))  # sum over images and splits
    return tuple(_cast(grad, x.dtype) for grad, x in zip(grads, (q, k, v, origin, table)))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ arguments

_CONTIGUOUS = {"origin", "table", "lse"}  # the kernels require these to be contiguous


@lru_cache(maxsize=256)
def _pack_arguments(
    dtype: torch.dtype,
    backward: bool,
    query_shape: tuple[int, ...],
    samples: int,
    groups: int,
    table_shape: tuple[int, ...],
    query_size: Size,
    step: tuple[float, float],
    scale: float,
    threads: int,
) -> tuple[launch.PackedArguments, int]:
    """Return the kernel arguments without the addresses, and the number of query splits in the backward pass."""
    (batch, heads, _, depth), (height, width), (_, table_rows, table_columns) = query_shape, query_size, table_shape
    tiling = make_tiling(batch * heads, depth, query_size, (table_rows, table_columns), threads)
    array_sizes: tuple[int, ...] = backward_sizes(tiling, table_rows, samples)
    work_items = batch * heads * tiling.splits
    if not backward:  # more work items than threads balance the load when one thread is slow
        array_sizes, work_items = forward_sizes(tiling, table_rows), min(batch * heads * tiling.tiles, 8 * threads)
    step_kind, step_y, step_x = _classify_step(*step, height, width)
    values = {
        "batch": batch, "heads": heads, "groups": groups, "height": height, "width": width, "samples": samples,
        "depth": depth, "table_rows": table_rows, "table_columns": table_columns, "scale": scale,
        "step_kind": step_kind, "step_y": step_y, "step_x": step_x, **tiling._asdict(),
    }  # fmt: skip
    packed = launch.pack_arguments(deformable.FIELDS, dtype, values, array_sizes, work_items)
    return packed, tiling.splits


def _classify_step(y: float, x: float, height: int, width: int) -> tuple[int, float, float]:
    """Return the kind of step, and the step (y, x). An axis with one query takes no step; its step is set to 1."""
    y, x = float(y if height > 1 else 1), float(x if width > 1 else 1)
    if (y, x) == (1, 1):
        return UNIT, y, x
    return (NEAR_UNIT if 0 <= (width - 1) * (1 - x) < 1 else GENERAL), y, x


def _prepare(dtype: torch.dtype, **tensors: Tensor) -> dict[str, Tensor]:
    """Return the tensors in a dtype that the kernels load, with unit stride in the last dimension.

    Tensors in `_CONTIGUOUS` become fully contiguous.
    """
    for name, tensor in tensors.items():
        storage = dtype if name in _CONTIGUOUS else _storage_dtype(tensor.dtype, dtype)
        x = _cast(tensor, storage)
        tensors[name] = x.contiguous() if name in _CONTIGUOUS or x.stride(-1) != 1 else x
    return tensors


def _storage_dtype(dtype: torch.dtype, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an operand in memory: bfloat16 stays bfloat16 when the kernels compute in float32."""
    return dtype if dtype == torch.bfloat16 and compute_dtype == torch.float32 else compute_dtype


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in a dtype; `Tensor.to` takes a microsecond also where nothing changes."""
    return x if x.dtype is dtype else x.to(dtype)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor with the layout of `x` if that has unit stride in the last dimension."""
    like = torch.empty_like(x, dtype=dtype)
    return like if like.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype)
