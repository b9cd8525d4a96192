"""Dtype of geometry: float32 or wider, for values of any dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float32, or the widest dtype among the tensors if that is wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def autocast_disabled(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast does not change the dtype of matrix products."""
    if tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type):  # meta has no autocast
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer in float32 or wider, also under autocast."""
    with autocast_disabled(x):
        dtype = wide_dtype(x)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Apply a layer norm over the last axis in float32 or wider, also under autocast."""
    with autocast_disabled(x):
        dtype = wide_dtype(x)
        return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), epsilon)
