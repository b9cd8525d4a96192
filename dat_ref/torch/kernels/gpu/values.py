"""What all kernels share: which values they take, how rows of a matrix are loaded and stored, and the softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# How deep a head may be: beyond, tiles no longer fit into the registers.
LARGEST_DEPTH = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}
LOG2_E = 1.4426950408889634  # the kernels work with powers of two
LN_2 = 0.6931471805599453

# ------------------------------------------------------------------------------------------------ values


def checked_values(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return queries, keys and values with the channels side by side.

    Raises:
        TypeError: for values of a dtype that is not in `LARGEST_DEPTH`, or of several.
        ValueError: for deeper heads.
    """
    dtypes = [each.dtype for each in (q, k, v)]
    if q.dtype not in LARGEST_DEPTH or len(set(dtypes)) > 1:
        raise TypeError(f"q, k, v: expected one of {', '.join(map(str, LARGEST_DEPTH))} for all three, got {dtypes}")
    deepest = LARGEST_DEPTH[q.dtype]
    if q.shape[-1] > deepest:
        raise ValueError(f"q: expected (B, heads, H·W, d) with d <= {deepest} in {q.dtype}, got {tuple(q.shape)}")
    return [with_channels_together(each) for each in (q, k, v)]


def with_channels_together(x: Tensor) -> Tensor:
    """Return the tensor, or a copy of it, so that the numbers of its last axis lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_like(x: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of another one: cotangents come expanded, transposed, from anywhere."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def given_back(x: Tensor, like: Tensor) -> Tensor:
    """Return a result in the memory layout of the argument it belongs to, before `with_channels_together`."""
    return x if like.stride(-1) == 1 else torch.empty_like(like).copy_(x)


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of the first three axes of each (B, heads, N, d) tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


# ------------------------------------------------------------------------------------------------ rows


@triton.jit
def load_rows(at, rows, stride, exist, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Load rows of DEPTH numbers, zeros for those that do not exist; WHOLE promises that all do."""
    d = tl.arange(0, BLOCK_D)
    at += rows.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE and DEPTH == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=exist[:, None] & (d < DEPTH)[None, :], other=0.0)


@triton.jit
def store_rows(at, rows, stride, exist, values, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows that exist, in the dtype of the memory."""
    d = tl.arange(0, BLOCK_D)
    at += rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, values.to(at.dtype.element_ty), mask=exist[:, None] & (d < DEPTH)[None, :])


@triton.jit
def add_tile_to_softmax(top, total, mix, logits, v_tile, PRECISION: tl.constexpr):
    """One step of the online softmax, in powers of two.

    Args:
        top, total, mix: each query's largest logit so far, the sum of its exponentials and that of its values.
        logits: (BLOCK_M, BLOCK_N) times log₂ e, -inf where a key does not count.
        v_tile: (BLOCK_N, BLOCK_D).
    """
    new_top = tl.maximum(top, tl.max(logits, 1))
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - (-inf) would be NaN
    weights = tl.exp2(logits - origin[:, None])
    shrink = tl.exp2(top - origin)
    mix = tl.dot(weights.to(v_tile.dtype), v_tile, mix * shrink[:, None], input_precision=PRECISION)
    return new_top, total * shrink + tl.sum(weights, 1), mix
