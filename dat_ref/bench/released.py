"""Backbone in the formulation of the released code, the reference for whole models.

It is written from the measured behavior: projections are 1 × 1 convolutions, the bias is sampled for every pair of
query and key, and window attention forms its weights explicitly. For neighborhood attention the 2023 release calls a
compiled package. Dense tiles in plain operations replace it here; they are several times as fast as gathering each
query's keys.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from ..torch import DAT, DeformableAttention, NeighborhoodAttention, WindowAttention, functional


class PointwiseConvolution(nn.Linear):
    """Linear layer, computed as a convolution of maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (B, …, C) → (B, …, C')."""
        maps = x.movedim(-1, 1)
        kernel = self.weight[:, :, None, None]
        convolved = F.conv2d(maps if x.ndim == 4 else maps[:, :, None], kernel, self.bias)
        return (convolved if x.ndim == 4 else convolved[:, :, 0]).movedim(1, -1)


class ExplicitWindowAttention(WindowAttention):
    """Window attention with explicit attention weights."""

    def _plain(self, x: Tensor) -> Tensor:
        config, size = self.config, (x.shape[2], x.shape[3])
        windows = functional.window_partition(x.permute(0, 2, 3, 1), config.window_size, config.shift)
        qkv = self.qkv(windows).unflatten(3, (3, config.heads, config.dim // config.heads))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, nW, heads, w², d)
        attended, _ = functional.attend(q, k, v, self.mask(size, x.dtype), config.scale)
        merged = self.output(attended.transpose(2, 3).flatten(3))
        return functional.window_reverse(merged, size, config.window_size, config.shift).permute(0, 3, 1, 2)


def released_formulation(model: DAT) -> DAT:
    """Return a copy of a backbone in the released formulation, with the same parameters under the same names."""
    model = copy.deepcopy(model)
    model.set_backend("eager", "grid_sample")
    for module in list(model.modules()):
        if isinstance(module, NeighborhoodAttention):
            module.backend = "matmul"
        if isinstance(module, DeformableAttention):
            for name in ("query", "key", "value", "output"):
                setattr(module, name, _as(PointwiseConvolution, getattr(module, name)))
        for name, child in module.named_children():
            if isinstance(child, WindowAttention):
                windows = ExplicitWindowAttention(child.config)
                windows._modules = child._modules
                setattr(module, name, windows)
    return model


def _as(kind: type[PointwiseConvolution], linear: nn.Linear) -> PointwiseConvolution:
    layer = kind(linear.in_features, linear.out_features)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer
