"""Helpers of all Triton kernels: input checks, loads and stores of rows, online softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import MAX_DEPTH

LOG2_E = 1.4426950408889634  # the kernels compute exponentials as powers of 2
LN_2 = 0.6931471805599453

# ------------------------------------------------------------------------------------------------ device


def device_guard(tensor: Tensor) -> torch.cuda.device:
    """Return a context in which the tensor's device is the current one. For CPU tensors it has no effect."""
    return torch.cuda.device_of(tensor)


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function run with the device of its first tensor as the current device.

    Triton launches kernels on the current device and its stream, wherever the tensors are.
    """

    @wraps(function)
    def guarded(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        with device_guard(tensor):
            return function(tensor, *arguments, **options)

    return guarded


# ------------------------------------------------------------------------------------------------ inputs


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Check q, k and v, and return them with unit stride in the last dimension.

    Raises:
        TypeError: if the dtype is not in `MAX_DEPTH`, or the three dtypes differ.
        ValueError: if the head dimension is larger than `MAX_DEPTH`.
    """
    dtypes = [each.dtype for each in (q, k, v)]
    if q.dtype not in MAX_DEPTH or len(set(dtypes)) > 1:
        raise TypeError(f"q, k, v: expected one of {', '.join(map(str, MAX_DEPTH))} for all three, got {dtypes}")
    max_depth = MAX_DEPTH[q.dtype]
    if q.shape[-1] > max_depth:
        raise ValueError(f"q: expected (B, heads, H·W, d) with d <= {max_depth} in {q.dtype}, got {tuple(q.shape)}")
    return [contiguous_last_dim(each) for each in (q, k, v)]


def contiguous_last_dim(x: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy if its last dimension does not have unit stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def match_strides(x: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of `like`. Incoming gradients may be expanded or transposed."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def restore_layout(x: Tensor, like: Tensor) -> Tensor:
    """Return a result in the memory layout of `like`, the input before `contiguous_last_dim`."""
    return x if like.stride(-1) == 1 else torch.empty_like(like).copy_(x)


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of the first three dimensions of each (B, heads, N, d) tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


# ------------------------------------------------------------------------------------------------ rows


@triton.jit
def load_rows(ptr, rows, stride, mask, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr = False):
    """Load rows of DEPTH elements, with zeros in masked rows. With EVEN, `mask` must be true for all rows."""
    offs_d = tl.arange(0, BLOCK_D)
    ptr += rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if EVEN and DEPTH == BLOCK_D:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask[:, None] & (offs_d < DEPTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, mask, values, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows where `mask` is true, converted to the dtype of `ptr`."""
    offs_d = tl.arange(0, BLOCK_D)
    ptr += rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptr, values.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < DEPTH)[None, :])


@triton.jit
def online_softmax_step(m, l, acc, logits, v_tile, PRECISION: tl.constexpr):
    """Update m, l and acc of the online softmax with one tile of keys. Exponentials are powers of 2.

    Args:
        m, l, acc: running maximum (BLOCK_M,), running sum (BLOCK_M,) and unnormalized output (BLOCK_M, BLOCK_D).
        logits: (BLOCK_M, BLOCK_N) times log₂ e, -inf for masked keys.
        v_tile: (BLOCK_N, BLOCK_D).
    """
    m_new = tl.maximum(m, tl.max(logits, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - (-inf) would be NaN
    weights = tl.exp2(logits - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l * alpha + tl.sum(weights, 1), acc
