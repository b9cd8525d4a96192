"""Fused attention operations: one class that registers an operation with PyTorch.

For compilers, exporters, autograd and autocast a fused operation is a single node, in whatever language its kernels are
written. Deformable and neighborhood attention are the two instances. Kernels come from the backend registry.

The dispatcher of PyTorch needs flat arguments. So the schema of an operation ``name`` is::

    dat_ref::{name}_attention(Tensor q, Tensor k, Tensor v, …, <geometry>, str kernels, bool deterministic)
        -> (Tensor out, Tensor lse)
    dat_ref::{name}_attention_backward(Tensor grad_out, Tensor q, …, Tensor out, Tensor lse, <the same>)
        -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, …)

with lse the log-sum-exp of each query's logits, and its kernel modules have the functions ``{name}_forward`` and
``{name}_backward``, see `dat_ref.torch.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from ._dtypes import wide_dtype
from .registry import kernel_module, warn_once

_LIBRARY = torch.library.Library("dat_ref", "FRAGMENT")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


class FusedAttention:
    """Attention operation of PyTorch with forward and backward kernels.

    Args:
        name: name of the operation, ``"deformable"`` or ``"neighborhood"``.
        tensors: names of the tensor arguments; the first three are q, k and v, the others are geometry, which autocast
            does not narrow.
        geometry: schema of the other arguments.
        options: converts their values to the keyword arguments of the kernels.
        plain: (tensors, options) → output, by differentiable operations. For second derivatives.
        flops: (shapes of the tensors, options) → floating-point operations of the forward pass.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[str],
        geometry: str,
        *,
        options: Callable[..., dict[str, Any]],
        plain: Callable[..., Tensor],
        flops: Callable[..., int],
    ) -> None:
        self.name, self.tensors, self.count = name, tuple(tensors), len(tensors)
        self.options, self.plain = options, plain
        self._define(f"{geometry}, str kernels, bool deterministic")
        operations = (
            getattr(torch.ops.dat_ref, f"{name}_attention"),
            getattr(torch.ops.dat_ref, f"{name}_attention_backward"),
        )
        self.forward, self.backward = (operation.default for operation in operations)
        self._register()
        register_flop_formula(operations[0])(
            lambda *arguments, **_: flops(arguments[: self.count], options(*arguments[self.count : -2]))
        )

    def __call__(self, *tensors: Tensor, geometry: tuple[Any, ...], kernels: str) -> Tensor:
        """Run the operation.

        Args:
            tensors: q, k, v and the other tensors.
            geometry: values for the schema's geometry.
            kernels: name of the kernels, see `registry.kernel_module`.

        Returns:
            (B, heads, H·W, d).
        """
        arguments = (*tensors, *geometry, kernels, torch.are_deterministic_algorithms_enabled())
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(each.requires_grad for each in tensors)):
            return self.forward(*arguments)[0]
        # Without a gradient the dispatcher need not pass through Python twice.
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward(*arguments)[0]

    def _define(self, geometry: str) -> None:
        inputs = ", ".join(f"Tensor {each}" for each in self.tensors)
        grads = ", ".join(f"Tensor grad_{each}" for each in self.tensors)
        for suffix, arguments, results in (
            ("", inputs, "Tensor out, Tensor lse"),
            ("_backward", f"Tensor grad_out, {inputs}, Tensor out, Tensor lse", grads),
        ):
            schema = f"{self.name}_attention{suffix}({arguments}, {geometry}) -> ({results})"
            _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def _register(self) -> None:
        forward, backward = f"{self.name}_attention", f"{self.name}_attention_backward"
        _LIBRARY.impl(forward, self._run_forward, "CompositeExplicitAutograd")
        _LIBRARY.impl(backward, self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dat_ref::{forward}", self._fake_forward, lib=_LIBRARY)
        torch.library.register_fake(f"dat_ref::{backward}", self._fake_backward, lib=_LIBRARY)
        # `torch.library.register_autograd` does the same at three times the overhead.
        _LIBRARY.impl(forward, _autograd_rule(self), "Autograd")
        for device, key in _AUTOCAST_KEYS.items():
            _LIBRARY.impl(forward, _autocast_rule(self.forward, device), key)

    # -------------------------------------------------------------------------------------------- kernels

    def _run_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        tensors, (*geometry, kernels, _) = arguments[: self.count], arguments[self.count :]
        function = getattr(kernel_module(self.name, kernels), f"{self.name}_forward")
        out, lse = function(*tensors, **self.options(*geometry))
        return _match_layout(out, tensors[0]), lse

    def _run_backward(self, grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, (*geometry, kernels, deterministic) = arguments[: self.count + 2], arguments[self.count + 2 :]
        function = getattr(kernel_module(self.name, kernels), f"{self.name}_backward")
        grad_out = _match_layout(grad_out, tensors[-2])  # cotangents can be expanded or transposed
        grads = function(grad_out, *tensors, **self.options(*geometry), deterministic=deterministic)
        return tuple(_match_layout(grad, like) for grad, like in zip(grads, tensors))

    def _fake_forward(self, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q, dtype=v.dtype), q.new_empty(q.shape[:3], dtype=wide_dtype(q))

    def _fake_backward(self, grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in arguments[: self.count])

    # -------------------------------------------------------------------------------------------- second derivative

    def differentiable_gradients(
        self, grad_out: Tensor, tensors: Sequence[Tensor], geometry: Sequence[Any], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors where needed, computed with differentiable operations."""
        *geometry, kernels, _ = geometry
        warn_once(f"The kernels {kernels!r} have no second derivative; plain operations compute these gradients again.")
        with sdpa_kernel(SDPBackend.MATH):
            out = self.plain(*tensors, **self.options(*geometry))
        differentiable = [each for each, is_needed in zip(tensors, needed, strict=True) if is_needed]
        grads = iter(torch.autograd.grad(out, differentiable, grad_out, create_graph=True))
        return tuple(next(grads) if is_needed else None for is_needed in needed)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Return whether `torch.func` or forward-mode differentiation is active. They need plain operations."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(each is not None and forward_ad.unpack_dual(each).tangent is not None for each in tensors)


def _match_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the memory layout of `torch.empty_like(like)`."""
    if tensor.stride() == like.stride():
        return tensor
    empty = torch.empty_like(like, dtype=tensor.dtype)
    return tensor if tensor.stride() == empty.stride() else empty.copy_(tensor)


# ------------------------------------------------------------------------------------------------ dispatch rules


def _autograd_rule(operation: FusedAttention) -> Callable[..., Any]:
    """Return the function for the dispatch key ``"Autograd"``. Only the first output is differentiable."""
    count = operation.count

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = operation.forward(*arguments)
            ctx.save_for_backward(*arguments[:count], out, lse)
            ctx.geometry = arguments[count:]
            ctx.mark_non_differentiable(lse)
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            no_grads = (None,) * len(ctx.geometry)
            if grad_out is None:
                return (None,) * count + no_grads
            needed = ctx.needs_input_grad[:count]
            saved = ctx.saved_tensors  # before the guard: activation checkpointing computes them again, with autograd
            if torch.is_grad_enabled():  # create_graph=True
                return operation.differentiable_gradients(grad_out, saved[:count], ctx.geometry, needed) + no_grads
            with torch._C._AutoDispatchBelowAutograd():
                grads = operation.backward(grad_out, *saved, *ctx.geometry)
            return tuple(grad if is_needed else None for grad, is_needed in zip(grads, needed)) + no_grads

    return Differentiable.apply


def _autocast_rule(operation: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return the function for autocast on a device. It casts q, k and v; all other arguments are geometry."""

    def rule(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        # float64 is a deliberate choice of the caller; keep it.
        narrow = (each if each.dtype is torch.float64 else each.to(dtype) for each in (q, k, v))
        with torch.autocast(device, enabled=False):
            return operation(*narrow, *others)

    return rule
