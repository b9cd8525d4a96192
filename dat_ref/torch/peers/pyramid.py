"""Spatial-reduction attention as a module: `dat_ref.peers.pyramid` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...peers.pyramid import PyramidAttentionConfig, PyramidTrace
from .. import functional
from ..functional._symbolic import statically_zero
from .base import PeerAttention, map_to_tokens, tokens_to_map


class PyramidAttention(PeerAttention):
    """Attention of every pixel over a downsampled map: (B, C, H, W) → (B, C, H, W), for any H and W.

    >>> import torch
    >>> layer = PyramidAttention(PyramidAttentionConfig(dim=12, heads=3, reduction=2))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    config: PyramidAttentionConfig

    def __init__(self, config: PyramidAttentionConfig) -> None:
        super().__init__()
        dim, cell = config.dim, config.reduction
        self.config = config
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.reduction = nn.Conv2d(dim, dim, cell, stride=cell) if cell > 1 else None
        self.norm = nn.LayerNorm(dim) if cell > 1 else nn.Identity()
        self.projection_dropout = nn.Dropout(config.projection_dropout)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, PyramidTrace | None]:
        config, size = self.config, (x.shape[2], x.shape[3])
        convolved = self._reduce(x)  # (B, C, H̄, W̄)
        reduced = self.norm(map_to_tokens(convolved))
        heads = (config.heads, config.dim // config.heads)
        q = self.query(map_to_tokens(x)).unflatten(2, heads).transpose(1, 2)  # (B, heads, H·W, d)
        k, v = self.key_value(reduced).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = None
        if traced:
            attended, attention = functional.attend(q, k, v, None, config.scale)
        else:
            dropout = config.attention_dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=config.scale)
        merged = attended.transpose(1, 2).flatten(2)
        y = tokens_to_map(self.projection_dropout(self.output(merged)), size)
        if not traced:
            return y, None
        reduced_map = tokens_to_map(reduced, (convolved.shape[2], convolved.shape[3]))
        fields: dict[str, Any] = {"x": x, "convolved": convolved, "reduced": reduced_map, "q": q, "k": k, "v": v}
        fields |= {"attention": attention, "merged": tokens_to_map(merged, size)}
        return y, PyramidTrace(**fields)

    def _reduce(self, x: Tensor) -> Tensor:
        """Downsample by a strided convolution, with zero padding at the bottom and right to whole cells."""
        if self.reduction is None:
            return x
        bottom, right = (-length % self.config.reduction for length in x.shape[2:])
        if not statically_zero(bottom, right):
            x = F.pad(x, (0, right, 0, bottom))
        return self.reduction(x)
