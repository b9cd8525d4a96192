"""Deformable convolution as a module: `dat_ref.peers.deform_conv` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...peers.deform_conv import ConvGeometry, DeformableConvConfig, DeformableConvTrace
from .. import functional
from ..functional.sampling import Sampler, check_sampler
from .base import PeerAttention, wide_conv2d


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
        self.convolution = nn.Conv2d(dim, dim, kernel, padding=half, groups=config.groups)
        self.offset = nn.Conv2d(dim, 2 * points, kernel, padding=half)
        self.modulation = nn.Conv2d(dim, points, kernel, padding=half) if config.modulated else None
        for predictor in (self.offset, self.modulation):
            for leaf in () if predictor is None else predictor.parameters():
                nn.init.zeros_(leaf)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, DeformableConvTrace | None]:
        kernel = self.config.kernel_size
        offset = wide_conv2d(x, self.offset)
        mask = None if self.modulation is None else torch.sigmoid(self.modulation(x))
        weight, bias = self.convolution.weight, self.convolution.bias
        y = functional.deform_conv2d(x, offset, weight, bias, padding=kernel // 2, mask=mask, sampler=self.sampler)
        if not traced:
            return y, None
        geometry = ConvGeometry((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1))
        points_px = functional.deform_points(offset, geometry)
        fields: dict[str, Any] = {"x": x, "offset": offset, "mask": mask, "points_px": points_px}
        return y, DeformableConvTrace(**fields)
