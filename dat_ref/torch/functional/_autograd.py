"""Autograd and autocast rules for custom operations that have a backward operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autograd_rule(
    operation: Callable[..., Any],
    backward: Callable[..., Any],
    num_tensors: int,
    double_backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> Callable[..., Any]:
    """Return a function to register under the dispatch key ``"Autograd"``.

    `torch.library.register_autograd` does the same at three times the overhead.

    Args:
        operation: (tensors, geometry) → (out, lse); only `out` is differentiable.
        backward: (cotangent of out, tensors, out, lse, geometry) → gradients of the tensors.
        num_tensors: number of arguments that are tensors; they come first.
        double_backward: (cotangent of out, tensors, geometry, flags of required gradients) → gradients of the tensors,
            or None where not required, computed with differentiable operations.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = operation(*args)
            ctx.save_for_backward(*args[:num_tensors], out, lse)
            ctx.geometry = args[num_tensors:]
            ctx.mark_non_differentiable(lse)
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            no_grads = (None,) * len(ctx.geometry)
            needed = ctx.needs_input_grad[:num_tensors]
            if grad_out is None:
                return (None,) * num_tensors + no_grads
            if torch.is_grad_enabled():  # create_graph=True
                if double_backward is None:
                    raise NotImplementedError(f"{operation} has no second derivative; backend='matmul' has")
                return double_backward(grad_out, ctx.saved_tensors[:num_tensors], ctx.geometry, needed) + no_grads
            grads = backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
            return tuple(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)) + no_grads

    def rule(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(each.requires_grad for each in args[:num_tensors]):
            return Differentiable.apply(*args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*args)

    return rule


def autocast_rule(operation: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return a function to register for autocast on a device. It casts q, k and v; all other arguments are geometry."""

    def rule(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        # float64 is a deliberate choice of the caller; keep it.
        narrow = (each if each.dtype is torch.float64 else each.to(dtype) for each in (q, k, v))
        with torch.autocast(device, enabled=False):
            return operation(*narrow, *others)

    return rule
