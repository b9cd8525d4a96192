"""Multi-head self-attention as a module: `dat_ref.peers.mhsa` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...conventions import Convention
from ...peers.mhsa import MultiHeadAttentionConfig, MultiHeadTrace
from .. import functional
from ..functional._dtypes import wide_dtype
from ..functional._sdpa import masked_attention
from ..functional.grid import Size
from ..initialization import init_table
from .base import PeerAttention, map_to_tokens, tokens_to_map


class PositionBias(nn.Module):
    """Relative position bias with a (2H₀-1) × (2W₀-1) table per head."""

    def __init__(self, heads: int, size: Size) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(heads, 2 * size[0] - 1, 2 * size[1] - 1))
        init_table(self.table, 0.01)

    def forward(self, size: Size, like: Tensor) -> Tensor:
        """Return the bias of every pair of pixels, (1, heads, H·W, H·W). Displacements are in fractions of the map."""
        dtype = wide_dtype(like)
        points = functional.reference_points(size, Convention.CELL_CENTER, dtype=dtype, device=like.device)
        geometry: dict[str, Any] = {"query_size": size, "convention": Convention.CELL_CENTER}
        return functional.sampled_table_bias(self.table, points.reshape(1, 1, -1, 2), **geometry)


class MultiHeadAttention(PeerAttention):
    """Global self-attention over all pixels: (B, C, H, W) → (B, C, H, W), for any H and W.

    >>> layer = MultiHeadAttention(MultiHeadAttentionConfig(dim=12, heads=3, size=(5, 7)))
    >>> layer(torch.ones(2, 12, 4, 9)).shape
    torch.Size([2, 12, 4, 9])
    """

    config: MultiHeadAttentionConfig

    def __init__(self, config: MultiHeadAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.position_bias = None if config.size is None else PositionBias(config.heads, config.size)
        self.output = nn.Linear(config.dim, config.dim)
        self.projection_dropout = nn.Dropout(config.projection_dropout)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, MultiHeadTrace | None]:
        config, size = self.config, (x.shape[2], x.shape[3])
        qkv = self.qkv(map_to_tokens(x)).unflatten(2, (3, config.heads, config.dim // config.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, H·W, d)
        bias = None if self.position_bias is None else self.position_bias(size, x)
        attention = None
        if traced:
            attended, attention = functional.attend(q, k, v, bias, config.scale)
        else:
            dropout = config.attention_dropout if self.training else 0.0
            if bias is None:
                attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=config.scale)
            else:
                attended = masked_attention(q, k, v, bias.to(q.dtype), scale=config.scale, dropout=dropout)
        merged = attended.transpose(1, 2).flatten(2)
        y = tokens_to_map(self.projection_dropout(self.output(merged)), size)
        if not traced:
            return y, None
        fields: dict[str, Any] = {"x": x, "q": q, "k": k, "v": v, "attention": attention}
        return y, MultiHeadTrace(**fields, merged=tokens_to_map(merged, size))  # type: ignore[arg-type]
