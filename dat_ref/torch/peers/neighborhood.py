"""Neighborhood attention as a module: `dat_ref.peers.neighborhood` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...config import NeighborhoodAttentionConfig
from ...peers.neighborhood import NeighborhoodTrace, neighborhood_padding
from .. import functional
from ..functional._symbolic import crop, statically_zero
from ..functional.neighborhood import check_neighborhood_backend
from .base import PeerAttention
from .window import RelativeBias


class NeighborhoodAttention(PeerAttention):
    """Attention of each pixel over the K × K pixels around it: (B, C, H, W) → (B, C, H, W), for any H and W.

    On an axis shorter than K times the dilation, the neighborhood shrinks to the map (``small_map="shrink"``), or the
    map is padded with zeros that are included as keys (``"pad"``, as in the released DAT++).

    Args:
        config: layer configuration.
        backend: backend of the computation, see `functional.neighborhood_attention`, or ``"auto"``.

    >>> import torch
    >>> layer = NeighborhoodAttention(NeighborhoodAttentionConfig(dim=12, heads=3, kernel_size=3))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    config: NeighborhoodAttentionConfig

    def __init__(self, config: NeighborhoodAttentionConfig, *, backend: str = "auto") -> None:
        super().__init__()
        check_neighborhood_backend(backend)
        self.config = config
        self.backend = backend
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.neighborhood_bias = RelativeBias(config.heads, config.kernel_size, sigma=0.02)
        self.output = nn.Linear(config.dim, config.dim)
        self.projection_dropout = nn.Dropout(config.projection_dropout)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, NeighborhoodTrace | None]:
        config = self.config
        height, width = x.shape[2:]
        padded = x  # (B, C, H', W')
        bottom, right = neighborhood_padding((height, width), config)
        padding = not statically_zero(bottom, right)
        if padding:
            padded = F.pad(x, (0, right, 0, bottom))
        merged, weights = functional.neighborhood_attention(
            self.qkv(padded.permute(0, 2, 3, 1)),
            self.neighborhood_bias(),
            scale=config.scale,
            dilation=config.dilation,
            dropout=config.attention_dropout if self.training else 0.0,
            return_weights=traced,
            backend=self.backend,
        )
        cropped = crop(merged, (height, width)) if padding else merged
        y = self.projection_dropout(self.output(cropped)).permute(0, 3, 1, 2)
        if not traced:
            return y, None
        fields: dict[str, Any] = {
            "padded": padded,
            **weights,
            "merged": merged.permute(0, 3, 1, 2),
            "size": (height, width),
        }
        return y, NeighborhoodTrace(**fields)
