"""Attention over sampled keys: `dat_ref.ops.attention` on tensors, with selectable backends.

    z = softmax(q k̃ᵀ / √d + B) ṽ        for each head

=================  ===============================================================================================
``"triton"``       Triton kernels, for CUDA devices
``"cpu"``          Numba kernels, for CPUs
``"blockwise"``    the same algorithm in plain PyTorch, on any device
``"matmul"``       plain operations: bias as two matrix products (`bias.SeparableInterp`), then torch's fused
                   attention. For exporters, `torch.func`, derivatives of any order, and dropout
``"eager"``        formulation of the released code: all displacements materialized, table sampled at each of them,
                   einsum, softmax. For comparison
``"auto"``         the first of these that supports the call
=================  ===============================================================================================

The first three are kernels of one PyTorch operation, `DEFORMABLE`, and never store all logits at once.
`registry.register_backend` adds others; the built-in ones are in `builtin_backends`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import sdpa_flop_count

from ...config import BiasResolution
from ...conventions import Convention
from ...ops.attention import check_core, check_options
from .._checks import check_tensor, check_tensors
from ._sdpa import masked_attention
from .bias import AffineIndex, SeparableInterp, sampled_table_bias, table_index
from .fused import FusedAttention, is_transformed
from .grid import Size
from .registry import Call, CoreGeometry, choose_backend

# ------------------------------------------------------------------------------------------------ building blocks


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the channels of a map into heads: (B, C, H, W) or (B, C, N) → (B, heads, N, C/heads)."""
    check_tensors(x=x)
    return x.unflatten(1, (heads, x.shape[1] // heads)).flatten(3).transpose(2, 3)


def merge_heads(x: Tensor, size: Size) -> Tensor:
    """Merge heads into a map: (B, heads, H·W, d) → (B, heads·d, H, W)."""
    check_tensors(x=x)
    return x.transpose(2, 3).unflatten(3, size).flatten(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention with an additive bias, in plain operations.

    Args:
        q: (..., M, d).
        k, v: (..., N, d).
        bias: broadcastable to (..., M, N), or None; -inf hides a key.
        scale: factor of the dot products.

    Returns:
        output (..., M, d) and attention weights (..., M, N), whose rows sum to one.
    """
    check_tensors(q=q, k=k, v=v, bias=bias)
    logits = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    weights = torch.softmax(logits, dim=-1)
    return weights.to(v.dtype) @ v, weights


# ------------------------------------------------------------------------------------------------ deformable attention


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Tensor,
    bias_table: Tensor | None,
    *,
    query_size: Size,
    convention: Convention,
    scale: float | None = None,
    resolution: BiasResolution = "fractions",
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Attend to sampled keys, with a relative position bias interpolated at their continuous positions.

    Args:
        q: (B, heads, H·W, d).
        k, v: (B, heads, Ns, d), projected from the features sampled at `points`.
        points: (B, G, Ns, 2), (y, x), in the convention's normalized coordinates. Group g has heads
            [g·heads/G, (g+1)·heads/G).
        bias_table: (heads, 2H-1, 2W-1), or None for no bias. `resolution` defines how a table of another size is used.
        query_size: (H, W).
        convention: geometry of points and bias.
        scale: factor of the dot products, d^(-1/2) if None.
        resolution: unit of displacements in a table of another size, see `DeformableAttentionConfig.bias_resolution`.
        backend: one of `backends()`, or ``"auto"``. If the backend does not support the call, another one runs it, with
            a `BackendWarning`.
        dropout: probability of dropping an attention weight, for training.

    Returns:
        (B, heads, H·W, d), in the dtype of `v`.

    Raises:
        ShapeError, ConfigError: if the shapes do not match.
        ValueError: for an unknown backend.
        BackendError: if the requested backend cannot compute the call on this machine.
    """
    if not torch.compiler.is_compiling():
        check_core(check_tensor, q, k, v, points, bias_table, query_size)
        check_options(convention, resolution)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    selected = choose_backend(backend, Call(q, k, v, points, bias_table, dropout))
    implementation = selected.operations["deformable"]
    if implementation.run is not None:
        run = implementation.run if backend == selected.name else implementation.safe_run or implementation.run
        return run(q, k, v, points, bias_table, CoreGeometry(query_size, convention, scale, resolution, dropout))
    if bias_table is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    origin, step = table_index(points, (bias_table.shape[1], bias_table.shape[2]), query_size, convention, resolution)
    kernels = selected.kernels_for("deformable", backend)
    return DEFORMABLE(q, k, v, origin, bias_table, geometry=(query_size, *step, scale), kernels=kernels)


# ------------------------------------------------------------------------------------------------ the operation


def _options(query_size: Size, step_y: float, step_x: float, scale: float) -> dict[str, Any]:
    return {"query_size": tuple(query_size), "step": (step_y, step_x), "scale": scale}


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
) -> Tensor:
    bias = SeparableInterp(table, AffineIndex(origin, step), query_size).read(0, query_size[0])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


# softmax(scale · q kᵀ + B) v, with the bias B read in `table` at the affine index (origin, step), see `table_index`.
# `Scalar` instead of `float`: compilers keep a `Scalar` symbolic if it is computed from the size of a map.
DEFORMABLE = FusedAttention(
    "deformable",
    ("q", "k", "v", "origin", "table"),
    "SymInt[2] query_size, Scalar step_y, Scalar step_x, Scalar scale",
    options=_options,
    plain=_plain,
    flops=lambda shapes, options: int(sdpa_flop_count(*shapes[:3])),  # type: ignore[no-untyped-call]
)


# ------------------------------------------------------------------------------------------------ "eager"


def eager(q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor | None, geometry: CoreGeometry) -> Tensor:
    """Compute the released formulation."""
    query_size, convention, scale, resolution, dropout = geometry
    logits = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    if bias_table is not None:
        logits = logits + sampled_table_bias(
            bias_table, points, query_size=query_size, convention=convention, resolution=resolution
        )
    weights = F.dropout(torch.softmax(logits, dim=-1).to(v.dtype), dropout)
    return torch.einsum("bhmn,bhnd->bhmd", weights, v)


# ------------------------------------------------------------------------------------------------ "matmul"

# Maximum number of logits computed at once: they fit into the cache of a CPU, or occupy an accelerator.
_MAX_LOGITS = {"cpu": 1 << 21}
_DEFAULT_MAX_LOGITS = 1 << 28


def matmul(
    q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor | None, geometry: CoreGeometry
) -> Tensor:
    """Compute the bias with two matrix products, then torch's fused attention."""
    query_size, convention, scale, resolution, dropout = geometry
    if bias_table is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
    index = table_index(points, (bias_table.shape[1], bias_table.shape[2]), query_size, convention, resolution)
    interp = SeparableInterp(bias_table, index, query_size)
    # Fused attention supports neither forward-mode nor second derivatives.
    transformed = is_transformed(q, k, v, points, bias_table)
    with sdpa_kernel(SDPBackend.MATH) if transformed else nullcontext():
        return _attend_row_chunks(q, k, v, interp, query_size, scale, dropout)


def _attend_row_chunks(
    q: Tensor, k: Tensor, v: Tensor, interp: SeparableInterp, size: Size, scale: float, dropout: float
) -> Tensor:
    height, width = size
    compiling = torch.compiler.is_compiling()  # a graph would be specialized to the number of loop iterations
    rows = height if compiling else _rows_per_chunk(q, k, width)
    if compiling or rows >= height:
        mask = interp.read(0, height).to(q.dtype)
        return masked_attention(q, k, v, mask, scale=scale, dropout=dropout)
    chunks = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        mask = interp.read(start, stop).to(q.dtype)
        queries = q[:, :, start * width : stop * width]
        chunks.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale, dropout_p=dropout))
    return torch.cat(chunks, dim=2)


def _rows_per_chunk(q: Tensor, k: Tensor, width: int) -> int:
    budget = _MAX_LOGITS.get(q.device.type, _DEFAULT_MAX_LOGITS)
    return max(budget // max(q.shape[0] * q.shape[1] * width * k.shape[2], 1), 1)
