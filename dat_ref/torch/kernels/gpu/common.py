"""What all kernels share: which values they take, how rows of a matrix are loaded and stored, and the softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# How deep a head may be: beyond, tiles no longer fit into the registers.
MAX_DEPTH = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}
LOG2_E = 1.4426950408889634  # the kernels work with powers of two
LN_2 = 0.6931471805599453

# ------------------------------------------------------------------------------------------------ values


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return queries, keys and values with unit stride in the channels.

    Raises:
        TypeError: for values of a dtype that is not in `MAX_DEPTH`, or of several.
        ValueError: for deeper heads.
    """
    dtypes = [each.dtype for each in (q, k, v)]
    if q.dtype not in MAX_DEPTH or len(set(dtypes)) > 1:
        raise TypeError(f"q, k, v: expected one of {', '.join(map(str, MAX_DEPTH))} for all three, got {dtypes}")
    max_depth = MAX_DEPTH[q.dtype]
    if q.shape[-1] > max_depth:
        raise ValueError(f"q: expected (B, heads, H·W, d) with d <= {max_depth} in {q.dtype}, got {tuple(q.shape)}")
    return [contiguous_last_dim(each) for each in (q, k, v)]


def contiguous_last_dim(x: Tensor) -> Tensor:
    """Return the tensor, or a copy of it, so that its last axis has unit stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def match_strides(x: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of another one: cotangents come expanded, transposed, from anywhere."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def restore_layout(x: Tensor, like: Tensor) -> Tensor:
    """Return a result in the memory layout of the argument it belongs to, before `contiguous_last_dim`."""
    return x if like.stride(-1) == 1 else torch.empty_like(like).copy_(x)


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of the first three axes of each (B, heads, N, d) tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


# ------------------------------------------------------------------------------------------------ rows


@triton.jit
def load_rows(ptr, rows, stride, mask, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr = False):
    """Load rows of DEPTH elements, zeros where masked; EVEN promises that no row is masked."""
    offs_d = tl.arange(0, BLOCK_D)
    ptr += rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if EVEN and DEPTH == BLOCK_D:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask[:, None] & (offs_d < DEPTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, mask, values, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows that are not masked, in the dtype of the memory."""
    offs_d = tl.arange(0, BLOCK_D)
    ptr += rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptr, values.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < DEPTH)[None, :])


@triton.jit
def online_softmax_step(m, l, acc, logits, v_tile, PRECISION: tl.constexpr):
    """One step of the online softmax, in powers of two.

    Args:
        m, l, acc: each query's running maximum, running sum of exponentials and unnormalised output.
        logits: (BLOCK_M, BLOCK_N) times log₂ e, -inf where a key does not count.
        v_tile: (BLOCK_N, BLOCK_D).
    """
    m_new = tl.maximum(m, tl.max(logits, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - (-inf) would be NaN
    weights = tl.exp2(logits - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l * alpha + tl.sum(weights, 1), acc
