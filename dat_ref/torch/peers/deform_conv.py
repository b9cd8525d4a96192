"""Deformable convolution as a module: `dat_ref.peers.deform_conv` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...peers.deform_conv import ConvGeometry, DeformableConvConfig, DeformableConvTrace
from .. import functional
from ..functional.sampling import Sampler, check_sampler
from ..wide_layers import WideConv2d
from .base import PeerAttention


class DisplacedConv(nn.Module):
    """Convolution whose taps are displaced, with `torch.nn.Conv2d`'s parameters and initialization.

    It is not a `torch.nn.Conv2d`: an adapter of a convolution would add taps that are not displaced.
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        plain = nn.Conv2d(dim, dim, kernel, groups=groups)
        self.weight, self.bias = plain.weight, plain.bias
        self.padding = kernel // 2

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None, sampler: Sampler) -> Tensor:
        """Convolve a map (B, C, H, W), see `functional.deform_conv2d`."""
        options: dict[str, Any] = {"padding": self.padding, "mask": mask, "sampler": sampler}
        return functional.deform_conv2d(x, offset, self.weight, self.bias, **options)


class DeformableConv(PeerAttention):
    """Deformable convolution: (B, C, H, W) → (B, C, H, W), for any H and W.

    It predicts its offsets from the map, and in version 2 also its modulation. Initially all offsets are zero and all
    modulation factors are 1/2.

    Args:
        config: layer configuration.
        sampler: sampling method, see `functional.bilinear_sample`.

    >>> layer = DeformableConv(DeformableConvConfig(dim=12, offset_groups=2))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    config: DeformableConvConfig

    def __init__(self, config: DeformableConvConfig, *, sampler: Sampler = "gather") -> None:
        super().__init__()
        dim, kernel, half = config.dim, config.kernel_size, config.kernel_size // 2
        points = config.offset_groups * config.taps
        check_sampler(sampler)
        self.config, self.sampler = config, sampler
        self.convolution = DisplacedConv(dim, kernel, config.groups)
        self.offset = WideConv2d(dim, 2 * points, kernel, padding=half)
        self.modulation = nn.Conv2d(dim, points, kernel, padding=half) if config.modulated else None
        for predictor in (self.offset, self.modulation):
            for leaf in () if predictor is None else predictor.parameters():
                nn.init.zeros_(leaf)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, DeformableConvTrace | None]:
        kernel = self.config.kernel_size
        offset = self.offset(x)
        mask = None if self.modulation is None else torch.sigmoid(self.modulation(x))
        y = self.convolution(x, offset, mask, self.sampler)
        if not traced:
            return y, None
        geometry = ConvGeometry((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1))
        points_px = functional.deform_points(offset, geometry)
        fields: dict[str, Any] = {"x": x, "offset": offset, "mask": mask, "points_px": points_px}
        return y, DeformableConvTrace(**fields)
