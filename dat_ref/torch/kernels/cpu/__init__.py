"""The core's kernels for CPUs, in Numba: compiled for this very processor when first used, and kept on disk.

==============  =====================================================================================
`vectors`       numbers side by side, as values
`tiles`         products of small matrices, on vectors
`rows`          tensors in memory, in full numbers or in bfloat16
`bias`          the bias of a key for many queries, and its gradients
`plan`          how a call is cut into tiles
`deformable`    the attention, forward and backward
`launch`        from Python to compiled code: what it is told, where it is kept, its threads
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
from .plan import backward_places, cut, forward_places

Size = tuple[int, int]


def available() -> bool:
    """Return whether the kernels can run here: wherever Numba can be imported."""
    return True


def warm(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Compile all there is for these dtypes, or load it from disk."""
    for dtype in dtypes:
        q, k = torch.ones(1, 1, 6, 2, dtype=dtype), torch.ones(1, 1, 1, 2, dtype=dtype)
        base, table = torch.zeros(1, 1, 1, 2, dtype=dtype), torch.ones(1, 3, 5, dtype=dtype)
        how: dict[str, Any] = {"query_size": (2, 3), "step": (1.0, 1.0), "scale": 1.0}
        out, lse = deformable_forward(q, k, k, base, table, **how)
        deformable_backward(q, q, k, k, base, table, out, lse, **how)


# ------------------------------------------------------------------------------------------------ the core


def deformable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    table: Tensor,
    *,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to sampled keys with a bias read from a table.

        z = softmax(scale · q kᵀ + B) v,      B[m, n] = the table, bilinear, at base[n] + (i·step_y, j·step_x)

    for the query m = i·W + j, with zeros outside the table.

    Args:
        q: (B, heads, H·W, d), of any strides, as k and v.
        k, v: (B, heads, Ns, d) with Ns ≥ 1.
        base: (B, G, Ns, 2), (y, x), in cells of the table; NaN gives NaN, and what is far outside no bias.
        table: (heads, T_y, T_x); heads [g·heads/G, (g+1)·heads/G) read at the points of group g.
        query_size: (H, W).
        step: cells from one query to the next.
        scale: of the dot products.

    Returns:
        z (B, heads, H·W, d) in the dtype of v, in memory as q is; and the logarithm of the sum of the exponentials of
        each query's logits, (B, heads, H·W). Half precision is computed in float32; the kernels read and write
        bfloat16 themselves.
    """
    dtype = _computed_in(q, k, v)
    out = _empty_like(q, _kept_in(v.dtype, dtype))
    lse = torch.empty(q.shape[:3], dtype=dtype)
    if not q.numel():
        return out.to(v.dtype), lse
    threads = torch.get_num_threads()
    planned, _ = _plan(
        dtype, False, *q.shape, k.shape[2], base.shape[1], *table.shape[1:], *query_size, *step, scale, threads
    )
    tensors = _ready(dtype, q=q, k=k, v=v, base=base, table=table) | {"out": out, "lse": lse}
    launch.run(deformable.forward, deformable.FIELDS, dtype, planned, tensors, threads)
    return out.to(v.dtype), lse


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
    query_size: Size,
    step: tuple[float, float],
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `deformable_forward` with respect to q, k, v, base and table.

    Args:
        grad_out: (B, heads, H·W, d).
        out, lse: what the forward pass returned; the other arguments are those that it got.
        deterministic: has no effect: sums are always taken in the same order, for a given number of threads.
    """
    if not q.numel():
        return tuple(torch.zeros_like(x) for x in (q, k, v, base, table))  # type: ignore[return-value]
    dtype, threads = _computed_in(q, k, v), torch.get_num_threads()
    planned, parts = _plan(
        dtype, True, *q.shape, k.shape[2], base.shape[1], *table.shape[1:], *query_size, *step, scale, threads
    )
    batch, heads, groups, samples = q.shape[0], q.shape[1], base.shape[1], k.shape[2]
    grads = [_empty_like(q, _kept_in(q.dtype, dtype))]
    # Where they are summed over parts, in full precision.
    grads += [_empty_like(x, dtype if parts > 1 else _kept_in(x.dtype, dtype)) for x in (k, v)]
    grads_kv = grads[1:] if parts == 1 else [torch.empty(batch * parts, *x.shape[1:], dtype=dtype) for x in (k, v)]
    grad_base = torch.empty((groups, heads // groups, batch, parts, samples, 2), dtype=dtype)
    grad_table = torch.empty((heads, batch * parts, *table.shape[1:]), dtype=dtype)
    tensors = _ready(dtype, q=q, k=k, v=v, base=base, table=table, out=out, lse=lse, grad_out=grad_out)
    tensors |= {"grad_q": grads[0], "grad_k": grads_kv[0], "grad_v": grads_kv[1], "grad_base": grad_base}
    tensors["grad_table"] = grad_table
    launch.run(deformable.backward, deformable.FIELDS, dtype, planned, tensors, threads)
    if parts > 1:
        for grad, of_parts in zip(grads[1:], grads_kv):
            torch.sum(of_parts.unflatten(0, (batch, parts)), 1, out=grad)
    grads.append(grad_base.sum(dim=(1, 3)).transpose(0, 1))  # over the heads of a group, and parts
    grads.append(grad_table.sum(dim=1) if batch * parts > 1 else grad_table[:, 0])  # over images and parts
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v, base, table)))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ arguments

_WHOLE = {"base", "table", "lse"}  # the kernels take these to be contiguous


@lru_cache(maxsize=256)
def _plan(
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
) -> tuple[launch.Plan, int]:
    """Return what a kernel is told but the addresses, and how many parts the backward pass cuts the queries into."""
    sizes = cut(batch * heads, depth, (height, width), (table_rows, table_columns), threads)
    places, shares = backward_places(sizes, table_rows, samples), batch * heads * sizes.parts
    if not backward:  # more shares than threads, for the others' sake if one is slow
        places, shares = forward_places(sizes, table_rows), min(batch * heads * sizes.tiles, 8 * threads)
    values = {
        "batch": batch, "heads": heads, "groups": groups, "height": height, "width": width, "samples": samples,
        "depth": depth, "table_rows": table_rows, "table_columns": table_columns, "scale": scale,
        **dict(zip(("step_kind", "step_y", "step_x"), _step(step_y, step_x, height, width))),
    }  # fmt: skip
    return launch.plan(deformable.FIELDS, dtype, values | sizes._asdict(), places, shares), sizes.parts


def _step(y: float, x: float, height: int, width: int) -> tuple[int, float, float]:
    """Return which kind of step it is, and the step; along a single row or column any step is as good as 1."""
    y, x = float(y if height > 1 else 1), float(x if width > 1 else 1)
    if (y, x) == (1, 1):
        return UNIT, y, x
    return (NEAR_UNIT if 0 <= (width - 1) * (1 - x) < 1 else GENERAL), y, x


def _ready(dtype: torch.dtype, **tensors: Tensor) -> dict[str, Tensor]:
    """Return the tensors as kernels read them: in this dtype, or in bfloat16 and computed in float32; whole rows."""
    for name, tensor in tensors.items():
        kept = dtype if name in _WHOLE else _kept_in(tensor.dtype, dtype)
        x = tensor if tensor.dtype == kept else tensor.to(kept)
        tensors[name] = x.contiguous() if name in _WHOLE or x.stride(-1) != 1 else x
    return tensors


def _kept_in(given: torch.dtype, computed_in: torch.dtype) -> torch.dtype:
    """Return what an operand has in memory: bfloat16 stays where float32 is computed in, as its upper half."""
    return given if given == torch.bfloat16 and computed_in == torch.float32 else computed_in


def _computed_in(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for a result that lies as x does, if its rows are contiguous then."""
    like = torch.empty_like(x, dtype=dtype)
    return like if like.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype)
