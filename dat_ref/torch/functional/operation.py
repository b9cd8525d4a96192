"""Deformable attention as one PyTorch operation, `dat_ref::deformable_attention`, implemented by kernel modules.

For compilers, exporters, autograd and autocast the operation is a single node, in whatever language its kernels are
written. A kernel module is a module, or any other object, with the two functions that `dat_ref.torch.kernels`
describes. `register_kernels` gives it a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from ._autograd import autocast_rule, autograd_rule
from ._dtypes import wide_dtype
from .bias import AffineIndex, SeparableInterp
from .grid import Size
from .registry import warn_once

_KERNELS: dict[str, Callable[[], Any]] = {}


def register_kernels(name: str, load: Callable[[], Any]) -> None:
    """Register a kernel module.

    Args:
        name: name for `fused_attention`.
        load: function that returns the kernel module; called on first use, never at import.
    """
    _KERNELS[name] = load


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    *,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
    kernels: str,
) -> Tensor:
    """Run the operation: softmax(scale · q kᵀ + B) v, with the bias B in affine form.

    Args:
        q: (B, heads, H·W, d).
        k, v: (B, heads, Ns, d).
        origin, step: index into the table, see `bias.table_index`.
        table: (heads, T_y, T_x).
        query_size: (H, W).
        scale: factor of the dot products.
        kernels: name of a registered kernel module.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _operation(q, k, v, origin, table, query_size, *step, scale, kernels, deterministic)[0]


def is_transformed(*tensors: Tensor | None) -> bool:
    """Return whether `torch.func` or forward-mode differentiation is active. They need plain operations."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(each is not None and forward_ad.unpack_dual(each).tangent is not None for each in tensors)


# ------------------------------------------------------------------------------------------------ the operation

# `Scalar` instead of `float`: compilers keep a `Scalar` symbolic if it is computed from the size of a map.
_GEOMETRY = "SymInt[2] query_size, Scalar step_y, Scalar step_x, Scalar scale, str kernels, bool deterministic"
_VALUES = "Tensor q, Tensor k, Tensor v, Tensor origin, Tensor table"

_LIBRARY = torch.library.Library("dat_ref", "FRAGMENT")
_LIBRARY.define(
    f"deformable_attention({_VALUES}, {_GEOMETRY}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"deformable_attention_backward(Tensor grad_out, {_VALUES}, Tensor out, Tensor lse, {_GEOMETRY}) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_origin, Tensor grad_table)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operation = torch.ops.dat_ref.deformable_attention.default
_backward_operation = torch.ops.dat_ref.deformable_attention_backward.default


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    query_size: Size,
    step_y: float,
    step_x: float,
    scale: float,
    kernels: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    geometry = {"query_size": tuple(query_size), "step": (step_y, step_x), "scale": scale}
    out, lse = _KERNELS[kernels]().deformable_forward(q, k, v, origin, table, **geometry)
    return _match_layout(out, q), lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    query_size: Size,
    step_y: float,
    step_x: float,
    scale: float,
    kernels: str,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    grads = _KERNELS[kernels]().deformable_backward(
        _match_layout(grad_out, out),  # cotangents can be expanded or transposed
        q,
        k,
        v,
        origin,
        table,
        out,
        lse,
        query_size=tuple(query_size),
        step=(step_y, step_x),
        scale=scale,
        deterministic=deterministic,
    )
    return tuple(_match_layout(grad, like) for grad, like in zip(grads, (q, k, v, origin, table), strict=True))


def _match_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the memory layout of `torch.empty_like(like)`."""
    if tensor.stride() == like.stride():
        return tensor
    empty = torch.empty_like(like, dtype=tensor.dtype)
    return tensor if tensor.stride() == empty.stride() else empty.copy_(tensor)


_LIBRARY.impl("deformable_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("deformable_attention_backward", _backward, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------------ rules


@torch.library.register_fake("dat_ref::deformable_attention", lib=_LIBRARY)
def _shapes(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, dtype=v.dtype), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@torch.library.register_fake("dat_ref::deformable_attention_backward", lib=_LIBRARY)
def _backward_shapes(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, origin: Tensor, table: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each) for each in (q, k, v, origin, table))


def _differentiable_gradients(
    grad_out: Tensor, inputs: Sequence[Tensor], geometry: tuple[Any, ...], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients, computed with differentiable operations."""
    query_size, step_y, step_x, scale, kernels, _ = geometry
    warn_once(f"The kernels {kernels!r} have no second derivative; plain operations compute these gradients again.")
    q, k, v, origin, table = inputs
    bias = SeparableInterp(table, AffineIndex(origin, (step_y, step_x)), query_size).read(0, query_size[0])
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    differentiable = [each for each, is_needed in zip(inputs, needed, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(out, differentiable, grad_out, create_graph=True))
    return tuple(next(grads) if is_needed else None for is_needed in needed)


_LIBRARY.impl(
    "deformable_attention", autograd_rule(_operation, _backward_operation, 5, _differentiable_gradients), "Autograd"
)
for _device, _key in {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}.items():
    _LIBRARY.impl("deformable_attention", autocast_rule(_operation, _device), _key)


@register_flop_formula(torch.ops.dat_ref.deformable_attention)
def _flops(q: Any, k: Any, v: Any, *others: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]
