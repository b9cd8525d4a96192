"""Base class and helpers of the peers' modules."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..._checks import ConfigError
from ...config import AttentionConfig
from ...official import NameMapping
from ...peers.registry import row_of
from .._checks import check_map
from ..bridge import SpecModule


class PeerAttention(SpecModule):
    """Base class of attention modules for a block: (B, C, H, W) → (B, C, H, W), for any H and W per call."""

    config: AttentionConfig

    @overload
    def forward(self, x: Tensor, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_trace: Literal[True]) -> tuple[Tensor, Any]: ...

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor | tuple[Tensor, Any]:
        """Return y (B, C, H, W), and the trace of the spec if requested (then without attention dropout)."""
        check_map("x", x, self.config.dim)
        y, trace = self._attend(x, return_trace)
        return (y, trace) if return_trace else y

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, Any]:
        """Return y and the trace, which may be None if `traced` is False."""
        raise NotImplementedError

    def official_names(self) -> NameMapping:
        """Return the released name and layout of each parameter.

        Raises:
            ConfigError: if there is no released module for this configuration.
        """
        names = row_of(self.config).released_names
        if names is None:
            raise ConfigError(f"config: expected an attention with a released module, got {self.config.kind}")
        return names(self.config)


def map_to_tokens(x: Tensor) -> Tensor:
    """Flatten a map to tokens: (B, C, H, W) → (B, H·W, C). A map in channels_last layout is not copied."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Unflatten tokens to a map: (B, H·W, C) → (B, C, H, W)."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)
