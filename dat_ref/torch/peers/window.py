"""Window and shifted-window attention as a module: `dat_ref.peers.window` in PyTorch."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ... import official
from ...config import WindowAttentionConfig
from ...peers.window import WindowTrace
from .. import functional
from .._checks import check_map
from ..bridge import SpecModule
from ..initialization import init_table


class RelativeBias(nn.Module):
    """A (2w-1)² table a head."""

    def __init__(self, heads: int, window: int, sigma: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(heads, 2 * window - 1, 2 * window - 1))
        init_table(self.table, sigma)


class WindowAttention(SpecModule):
    """Attention inside (shifted) windows: (B, C, H, W) → (B, C, H, W), any H and W; a last window is filled and masked.

    >>> layer = WindowAttention(WindowAttentionConfig(dim=12, heads=3, window_size=4, shift=2))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    def __init__(self, config: WindowAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.window_bias = RelativeBias(config.heads, config.window_size, sigma=0.01)
        self.output = nn.Linear(config.dim, config.dim)
        self.projection_dropout = nn.Dropout(config.projection_dropout)

    @overload
    def forward(self, x: Tensor, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_trace: Literal[True]) -> tuple[Tensor, WindowTrace]: ...

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor | tuple[Tensor, WindowTrace]:
        """Return y (B, C, H, W), and the trace if asked (attention dropout is then left out)."""
        config = self.config
        check_map("x", x, config.dim)
        merged, weights = functional.window_attention(
            self.qkv(x.permute(0, 2, 3, 1)),
            self.window_bias.table,
            window=config.window_size,
            shift=config.shift,
            scale=config.scale,
            dropout=config.attention_dropout if self.training else 0.0,
            return_weights=return_trace,
        )
        y = self.projection_dropout(self.output(merged)).permute(0, 3, 1, 2)
        if not return_trace:
            return y
        size = (x.shape[2], x.shape[3])
        grid, cells = functional.window_cells(size, config.window_size, config.shift, x.device)
        fields: dict[str, Any] = {"x": x, **weights, "merged": merged.permute(0, 3, 1, 2), "grid": grid, "cells": cells}
        return y, WindowTrace(**fields)

    def official_names(self) -> official.Names:
        """Return where each parameter lives in a released state dict."""
        return official.attention_names(self.config)
