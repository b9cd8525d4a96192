"""A backbone that computes as the released code does: what whole models are compared with.

Measured behaviour, written anew: 1 × 1 convolutions for projections, the bias of every pair of query and key sampled,
attention in windows written out. For neighborhood attention the 2023 release calls a compiled package; here dense
tiles in plain operations stand for it, several times as fast as gathering each query's keys.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from ..torch import DAT, DeformableAttention, NeighborhoodAttention, WindowAttention, functional


class PointwiseConvolution(nn.Linear):
    """A linear layer carried out as a convolution of maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, C) → (B, …, C')."""
        maps = x.movedim(-1, 1)
        kernel = self.weight[:, :, None, None]
        convolved = F.conv2d(maps if x.ndim == 4 else maps[:, :, None], kernel, self.bias)
        return (convolved if x.ndim == 4 else convolved[:, :, 0]).movedim(1, -1)


class ExplicitWindowAttention(WindowAttention):
    """Window attention whose weights are written out."""

    def _attend(self, x: Tensor) -> Tensor:
        config, size = self.config, (x.shape[2], x.shape[3])
        windows = functional.window_partition(x.permute(0, 2, 3, 1), config.window_size, config.shift)
        qkv = self.qkv(windows).unflatten(3, (3, config.heads, config.dim // config.heads))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, nW, heads, w², d)
        attended, _ = functional.attend(q, k, v, self.mask(size, x.dtype), config.scale)
        merged = self.output(attended.transpose(2, 3).flatten(3))
        return functional.window_reverse(merged, size, config.window_size, config.shift).permute(0, 3, 1, 2)


def released_formulation(model: DAT) -> DAT:
    """Return a copy of a backbone, with the same parameters by the same names, that computes as released."""
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
