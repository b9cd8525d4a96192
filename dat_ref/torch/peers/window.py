"""Window and shifted-window attention as a module: `dat_ref.peers.window` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...config import WindowAttentionConfig
from ...peers.window import WindowTrace
from .. import functional
from ..functional._symbolic import statically_zero
from ..functional.grid import Size
from ..initialization import init_table
from .base import PeerAttention


class RelativeBias(nn.Module):
    """Relative position bias with a (2w-1)² table per head."""

    def __init__(self, heads: int, window: int, sigma: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(heads, 2 * window - 1, 2 * window - 1))
        init_table(self.table, sigma)

    def forward(self) -> Tensor:
        """Return the table."""
        return self.table


class WindowAttention(PeerAttention):
    """Attention within (shifted) windows: (B, C, H, W) → (B, C, H, W), for any H and W.

    Incomplete windows at the border are padded and masked.

    >>> layer = WindowAttention(WindowAttentionConfig(dim=12, heads=3, window_size=4, shift=2))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    config: WindowAttentionConfig

    def __init__(self, config: WindowAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.window_bias = RelativeBias(config.heads, config.window_size, sigma=0.01)
        self.output = nn.Linear(config.dim, config.dim)
        self.projection_dropout = nn.Dropout(config.projection_dropout)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, WindowTrace | None]:
        return self._traced(x) if traced else (self._plain(x), None)

    def _plain(self, x: Tensor) -> Tensor:
        config, size = self.config, (x.shape[2], x.shape[3])
        geometry = (config.window_size, config.shift)
        tokens = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if statically_zero(size[0] % config.window_size, size[1] % config.window_size):
            windows = self.qkv(functional.window_partition(tokens, *geometry))
            y = functional.window_reverse(self.output(self.attend_in_windows(windows, size)), size, *geometry)
        else:  # project before partitioning, because the padding needs no projection
            windows = functional.window_partition(self.qkv(tokens), *geometry)
            y = self.output(functional.window_reverse(self.attend_in_windows(windows, size), size, *geometry))
        return self.projection_dropout(y).permute(0, 3, 1, 2)

    def attend_in_windows(self, qkv: Tensor, size: Size) -> Tensor:
        """Attend within the windows of a map of this size: (B, nW, w², 3C) → (B, nW, w², C)."""
        dropout = self.config.attention_dropout if self.training else 0.0
        mask = self.mask(size, qkv.dtype)
        return functional.attend_in_windows(qkv, mask, scale=self.config.scale, dropout=dropout)

    def mask(self, size: Size, dtype: torch.dtype) -> Tensor:
        """Return the term that is added to the logits on a map of this size: (nW or 1, heads, w², w²)."""
        return functional.window_mask(self.window_bias().to(dtype), size, self.config.window_size, self.config.shift)

    def _traced(self, x: Tensor) -> tuple[Tensor, WindowTrace]:
        config, size = self.config, (x.shape[2], x.shape[3])
        merged, weights = functional.window_attention(
            self.qkv(x.permute(0, 2, 3, 1)),
            self.window_bias(),
            window=config.window_size,
            shift=config.shift,
            scale=config.scale,
            return_weights=True,
        )
        y = self.projection_dropout(self.output(merged)).permute(0, 3, 1, 2)
        grid, cells = functional.window_cells(size, config.window_size, config.shift, x.device)
        fields: dict[str, Any] = {"x": x, **weights, "merged": merged.permute(0, 3, 1, 2), "grid": grid, "cells": cells}
        return y, WindowTrace(**fields)
