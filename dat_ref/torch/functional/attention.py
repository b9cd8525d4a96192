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

The first three implement one PyTorch operation, `operation.fused_attention`, and never store all logits at once.
`registry.register_backend` adds others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...config import BiasResolution
from ...conventions import Convention
from ...ops.attention import check_core, check_options
from .. import kernels
from .._checks import check_tensor, check_tensors
from ..kernels import self_check, triton_support
from ..kernels.self_check import Checked
from . import blockwise
from ._sdpa import is_recording, masked_attention
from .bias import SeparableInterp, sampled_table_bias, table_index
from .grid import Size
from .operation import fused_attention, is_transformed, register_kernels
from .registry import Call, CoreFunction, choose_backend, constant, register_backend, warn_once

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
    selected = choose_backend(backend, Call(q, k, v, points, bias_table, dropout))
    return selected.function(backend)(
        q,
        k,
        v,
        points,
        bias_table,
        query_size=query_size,
        convention=convention,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        resolution=resolution,
        dropout=dropout,
    )


# ------------------------------------------------------------------------------------------------ "eager"


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Tensor,
    bias_table: Tensor | None,
    *,
    query_size: Size,
    convention: Convention,
    scale: float,
    resolution: BiasResolution,
    dropout: float,
) -> Tensor:
    logits = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    if bias_table is not None:
        geometry = {"query_size": query_size, "convention": convention, "resolution": resolution}
        logits = logits + sampled_table_bias(bias_table, points, **geometry)  # type: ignore[arg-type]
    weights = F.dropout(torch.softmax(logits, dim=-1).to(v.dtype), dropout)
    return torch.einsum("bhmn,bhnd->bhmd", weights, v)


# ------------------------------------------------------------------------------------------------ "matmul"

# Maximum number of logits computed at once: they fit into the cache of a CPU, or occupy an accelerator.
_MAX_LOGITS = {"cpu": 1 << 21}
_DEFAULT_MAX_LOGITS = 1 << 28


def _matmul(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Tensor,
    bias_table: Tensor | None,
    *,
    query_size: Size,
    convention: Convention,
    scale: float,
    resolution: BiasResolution,
    dropout: float,
) -> Tensor:
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


# ------------------------------------------------------------------------------------------------ kernels


def kernel_backend(name: str) -> CoreFunction:
    """Return the backend that runs `fused_attention` with a registered kernel module."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        points: Tensor,
        bias_table: Tensor | None,
        *,
        query_size: Size,
        convention: Convention,
        scale: float,
        resolution: BiasResolution,
        dropout: float,
    ) -> Tensor:
        if bias_table is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        table_size = (bias_table.shape[1], bias_table.shape[2])
        origin, step = table_index(points, table_size, query_size, convention, resolution)
        return fused_attention(q, k, v, origin, bias_table, query_size=query_size, step=step, scale=scale, kernels=name)

    return run


def _unsupported_by_kernels(call: Call) -> str:
    """Return the reason why no kernel module supports a call, or ``""``."""
    if call.dropout:
        return "it has no dropout of attention weights"
    if is_recording():
        return "an exported or traced program has plain operations only"
    if is_transformed(call.q, call.k, call.v, call.points, call.bias_table):
        return "torch.func and forward-mode derivatives need plain operations"
    return ""


def _unsupported_by_blockwise(call: Call) -> str:
    if call.q.device.type not in ("cpu", "meta") and torch.are_deterministic_algorithms_enabled():
        return f"on {call.q.device.type!r} the order of summation of the table's gradient is not deterministic"
    return _unsupported_by_kernels(call)


def _unsupported_by_cpu(call: Call) -> str:
    if call.q.device.type != "cpu":
        return f"it runs on CPUs, and the tensors are on {call.q.device.type!r}"
    return _unsupported_by_kernels(call)


def _unsupported_by_triton(call: Call) -> str:
    if call.q.device.type != "cuda" and not kernels.triton_is_interpreted():
        return f"it runs on CUDA devices, and the tensors are on {call.q.device.type!r}"
    return _unsupported_by_kernels(call)


@constant
def _dtype_under_autocast(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype that `autocast_rule` gives q, k and v."""
    if dtype is torch.float64 or not torch.is_autocast_enabled(device_type):
        return dtype
    return torch.get_autocast_dtype(device_type)


def triton_failure(checked: Checked, *, always_float32: bool = False) -> Callable[[Call, bool], str]:
    """Return the function `fails` of Triton kernels: see `register_backend`.

    Args:
        checked: the operation.
        always_float32: whether it has float32 products for every dtype.
    """

    # A constant of compiled graphs: the self-check runs while the compiler traces, on real tensors.
    @constant
    def reason(dtype: torch.dtype, depth: int, device: torch.device, requested: bool) -> str:
        if triton_support.absent_reason():
            return ""  # the backend is missing
        facts = (triton_support.capability(device), torch.version.hip, triton_support.installed_version())
        unsupported = triton_support.unsupported_reason(dtype, depth, *facts, always_float32=always_float32)
        if unsupported:
            return unsupported
        cause = self_check.failure(checked, device, dtype)
        if cause and not requested and cause is not self_check.CAPTURING:
            warn_of_kernels(self_check.report(checked, device, dtype, cause))
        return cause

    def fails(call: Call, requested: bool) -> str:
        if call.bias_table is None:
            return ""  # torch's own attention runs instead
        q, k, v = (_dtype_under_autocast(each.dtype, each.device.type) for each in (call.q, call.k, call.v))
        if q is not k or q is not v:
            return f"q, k and v have different dtypes, {q}, {k} and {v}"
        depth = call.q.shape[-1]
        if torch.compiler.is_compiling():  # a symbolic depth is no constant, its comparison is
            limit = _max_depth(q)
            depth = limit + 1 if depth > limit else limit
        return reason(q, depth, call.q.device, requested)

    return fails


@constant
def _max_depth(dtype: torch.dtype) -> int:
    return triton_support.MAX_DEPTH.get(dtype, 0)


def warn_of_kernels(message: str) -> None:
    """Warn that kernels fail, once per message."""
    warn_once(message, RuntimeWarning)


_TRITON = Checked(
    "deformable",
    partial(kernels.load, "triton"),
    blockwise,
    self_check.deformable_examples,
    ("q", "k", "v", "origin", "table"),
)
register_kernels("blockwise", lambda: blockwise)
register_kernels("cpu", partial(kernels.load, "cpu"))
register_kernels("triton", lambda: _TRITON.load())
register_kernels("triton_or_blockwise", partial(self_check.with_fallback, _TRITON, warn_of_kernels))

register_backend("eager", _eager, "formulation of the released code: table sampled at all displacements, einsum")
register_backend(
    "matmul", _matmul, "plain operations for exporters: bias as two matrix products, fused attention", priority=10
)
register_backend(
    "blockwise",
    kernel_backend("blockwise"),
    "plain PyTorch, one tile of logits at a time, on any device",
    priority=20,
    refuses=_unsupported_by_blockwise,
)
register_backend(
    "cpu",
    kernel_backend("cpu"),
    "Numba, compiled for the host CPU: bias, softmax and products in one pass",
    priority=30,
    missing=partial(kernels.missing, "cpu"),
    refuses=_unsupported_by_cpu,
)
register_backend(
    "triton",
    kernel_backend("triton"),
    "Triton, fused, for CUDA devices",
    priority=40,
    missing=partial(kernels.missing, "triton"),
    refuses=_unsupported_by_triton,
    fails=triton_failure(_TRITON),
    safe_run=kernel_backend("triton_or_blockwise"),
)
