"""Layers that predict positions: computed in float32 or wider, under autocast and in a half-precision module too.

They are called like the layers of `torch.nn` that they derive from, so that hooks, pruning, weight normalization and
adapters apply to them.
"""

from __future__ import annotations

from torch import Tensor, nn

from .functional._dtypes import autocast_disabled, wide_dtype, wide_layer_norm, wide_linear


class WideLinear(nn.Linear):
    """Linear layer whose output is float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        """Project the last axis."""
        return wide_linear(x, self.weight, self.bias)


class WideLayerNorm(nn.LayerNorm):
    """Layer norm over the last axis whose output is float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        return wide_layer_norm(x, self.weight, self.bias, self.eps)


class WideConv2d(nn.Conv2d):
    """Convolution whose output is float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map (B, C, H, W)."""
        with autocast_disabled(x):
            dtype = wide_dtype(x)
            bias = None if self.bias is None else self.bias.to(dtype)
            return self._conv_forward(x.to(dtype), self.weight.to(dtype), bias)
