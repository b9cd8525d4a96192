"""What the peers' modules share."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from ... import official
from ...config import AttentionConfig
from .._checks import check_map
from ..bridge import SpecModule
from ..functional._dtypes import autocast_disabled, wide_dtype


class PeerAttention(SpecModule):
    """An attention in a block's place for one: (B, C, H, W) → (B, C, H, W), any H and W at every call."""

    config: AttentionConfig

    @overload
    def forward(self, x: Tensor, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_trace: Literal[True]) -> tuple[Tensor, Any]: ...

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor | tuple[Tensor, Any]:
        """Return y (B, C, H, W), and the spec's trace if asked (attention dropout is then left out)."""
        check_map("x", x, self.config.dim)
        y, trace = self._attend(x, return_trace)
        return (y, trace) if return_trace else y

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, Any]:
        """Return y and the trace, which may be None if it is not asked for."""
        raise NotImplementedError

    def official_names(self) -> official.NameMapping:
        """Return where each parameter lives in a released state dict.

        Raises:
            ConfigError: where there is none.
        """
        return official.attention_names(self.config)


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), without a copy of a map in channels_last layout."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H·W, C) → (B, C, H, W)."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def wide_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a layer in float32 or wider, under autocast too: it predicts where points go."""
    with autocast_disabled(x):
        dtype = wide_dtype(x)
        return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


def wide_conv2d(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """`wide_linear` for a convolution that leaves the map its size."""
    with autocast_disabled(x):
        dtype = wide_dtype(x)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.conv2d(x.to(dtype), layer.weight.to(dtype), bias, padding=layer.kernel_size[0] // 2)
