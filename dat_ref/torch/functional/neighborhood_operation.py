"""Neighborhood attention as one PyTorch operation, `dat_ref::neighborhood_attention`: see `operation`.

A kernel module is a module, or any other object, with two functions::

    neighborhood_forward(q, k, v, table, *, size, kernel, dilation, scale) -> (out, lse)
    neighborhood_backward(grad_out, q, k, v, table, out, lse, *, size, kernel, dilation, scale, deterministic)
        -> (grad_q, grad_k, grad_v, grad_table)

with q, k, v, out and grad_out (B, heads, H·W, d), table (heads, 2K-1, 2K-1) and lse (B, heads, H·W), the log-sum-exp
of each query's logits. Inputs may have any strides. The output has the memory layout of q, and each gradient that of
its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from ...peers.neighborhood import axis_kernel
from ._autograd import autocast_rule, autograd_rule
from ._dtypes import wide_dtype
from .grid import Size
from .neighborhood_tiles import tiled_attention
from .operation import _match_layout
from .registry import warn_once

_KERNELS: dict[str, Callable[[], Any]] = {}


def register_neighborhood_kernels(name: str, load: Callable[[], Any]) -> None:
    """Register a kernel module.

    Args:
        name: name for `fused_neighborhood_attention`.
        load: function that returns the kernel module; called on first use, never at import.
    """
    _KERNELS[name] = load


def fused_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    size: Size,
    kernel: int,
    dilation: int,
    scale: float,
    kernels: str,
) -> Tensor:
    """Run the operation: softmax(scale · q kᵀ + B) v over the K × K keys around each query.

    Args:
        q, k, v: (B, heads, H·W, d).
        table: (heads, 2K-1, 2K-1).
        size: (H, W).
        kernel: K, keys per axis.
        dilation: δ, distance in pixels between neighboring keys.
        scale: factor of the dot products.
        kernels: name of a registered kernel module.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _operation(q, k, v, table, size, kernel, dilation, scale, kernels, deterministic)[0]  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ the operation

_GEOMETRY = "SymInt[2] size, int kernel, int dilation, Scalar scale, str kernels, bool deterministic"
_VALUES = "Tensor q, Tensor k, Tensor v, Tensor table"

_LIBRARY = torch.library.Library("dat_ref", "FRAGMENT")
_LIBRARY.define(
    f"neighborhood_attention({_VALUES}, {_GEOMETRY}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"neighborhood_attention_backward(Tensor grad_out, {_VALUES}, Tensor out, Tensor lse, {_GEOMETRY})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_table)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operation = torch.ops.dat_ref.neighborhood_attention.default
_backward_operation = torch.ops.dat_ref.neighborhood_attention_backward.default


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    size: Size,
    kernel: int,
    dilation: int,
    scale: float,
    kernels: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    geometry = {"size": tuple(size), "kernel": kernel, "dilation": dilation, "scale": scale}
    out, lse = _KERNELS[kernels]().neighborhood_forward(q, k, v, table, **geometry)
    return _match_layout(out, q), lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    size: Size,
    kernel: int,
    dilation: int,
    scale: float,
    kernels: str,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    geometry = {"size": tuple(size), "kernel": kernel, "dilation": dilation, "scale": scale}
    kernel_module = _KERNELS[kernels]()
    grad_out = _match_layout(grad_out, out)  # cotangents can be expanded or transposed
    grads = kernel_module.neighborhood_backward(
        grad_out, q, k, v, table, out, lse, **geometry, deterministic=deterministic
    )
    return tuple(_match_layout(grad, like) for grad, like in zip(grads, (q, k, v, table), strict=True))


_LIBRARY.impl("neighborhood_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("neighborhood_attention_backward", _backward, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------------ rules


@torch.library.register_fake("dat_ref::neighborhood_attention", lib=_LIBRARY)
def _shapes(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, dtype=v.dtype), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@torch.library.register_fake("dat_ref::neighborhood_attention_backward", lib=_LIBRARY)
def _backward_shapes(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each) for each in (q, k, v, table))


def _differentiable_gradients(
    grad_out: Tensor, inputs: Sequence[Tensor], geometry: tuple[Any, ...], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients, computed with differentiable operations."""
    size, kernel, dilation, scale, kernels, _ = geometry
    warn_once(f"The kernels {kernels!r} have no second derivative; plain operations compute these gradients again.")
    options = {"size": size, "kernel": kernel, "dilation": dilation, "scale": scale, "dropout": 0.0}
    with sdpa_kernel(SDPBackend.MATH):
        out = tiled_attention(*inputs, **options)
    differentiable = [each for each, is_needed in zip(inputs, needed, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(out, differentiable, grad_out, create_graph=True))
    return tuple(next(grads) if is_needed else None for is_needed in needed)


_LIBRARY.impl(
    "neighborhood_attention", autograd_rule(_operation, _backward_operation, 4, _differentiable_gradients), "Autograd"
)
for _device, _key in {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}.items():
    _LIBRARY.impl("neighborhood_attention", autocast_rule(_operation, _device), _key)


@register_flop_formula(torch.ops.dat_ref.neighborhood_attention)
def _flops(q: Any, k: Any, v: Any, table: Any, size: Any, kernel: int, dilation: int, *others: Any, **_: Any) -> int:
    keys = axis_kernel(size[0], kernel, dilation) * axis_kernel(size[1], kernel, dilation)
    return int(2 * keys * (math.prod(q) + math.prod(v)))  # q and v are shapes
