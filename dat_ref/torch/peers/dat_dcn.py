"""Deformable DETR's attention as it is used in DAT's blocks: `dat_ref.peers.dat_dcn` in PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..._checks import ConfigError
from ...peers.dat_dcn import DATDCNAttentionConfig, DATDCNTrace
from .. import functional
from ..functional.grid import Size
from ..functional.multi_scale import sample_levels, weighted_sum
from ..functional.sampling import Sampler, check_sampler
from ..wide_layers import WideLinear
from .base import PeerAttention, map_to_tokens, tokens_to_map
from .ms_deform_attn import init_ring_offsets


class DATDCNAttention(PeerAttention):
    """Weighted sum of values sampled around each pixel: (B, C, H, W) → (B, C, H, W).

    Weights and offsets are predicted from the pixel's features; offsets are in units of half a map. Under ``DATPP2023``
    the map must have more than one row and column. The initialization is the released one.

    Args:
        config: layer configuration.
        sampler: sampling method, see `functional.bilinear_sample`.

    >>> import torch
    >>> layer = DATDCNAttention(DATDCNAttentionConfig(dim=12, heads=3))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    config: DATDCNAttentionConfig

    def __init__(self, config: DATDCNAttentionConfig, *, sampler: Sampler = "gather") -> None:
        super().__init__()
        dim, samples = config.dim, config.heads * config.points
        check_sampler(sampler)
        self.config, self.sampler = config, sampler
        self.offset = WideLinear(dim, 2 * samples)
        self.weights = nn.Linear(dim, samples)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        init_ring_offsets(self.offset, config.heads, 1, config.points)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, DATDCNTrace | None]:
        config, size = self.config, (x.shape[2], x.shape[3])
        self._check_size(size)
        tokens, per_point = map_to_tokens(x), (config.heads, 1, config.points)
        offsets = self.offset(tokens).unflatten(2, (*per_point, 2))  # (B, H·W, heads, 1, P, 2)
        reference = functional.reference_points(size, config.convention, dtype=offsets.dtype, device=x.device)
        points = reference.reshape(-1, 1, 1, 1, 2) + offsets
        points_px = functional.to_pixels(points, size, config.convention)
        attention = self.weights(tokens).unflatten(2, per_point).softmax(dim=-1)
        value = self.value(tokens).unflatten(2, (config.heads, config.dim // config.heads))
        sampled = sample_levels(value, points_px, [size], sampler=self.sampler)
        merged = weighted_sum(sampled, attention)
        y = tokens_to_map(self.output(merged), size)
        if not traced:
            return y, None
        fields: dict[str, Any] = {
            "x": x,
            "value": value,
            "points": points,
            "points_px": points_px,
            "sampled": sampled,
            "attention": attention,
            "merged": tokens_to_map(merged, size),
        }
        return y, DATDCNTrace(**fields)

    def _check_size(self, size: Size) -> None:
        spacing = self.config.convention.value.reference
        if spacing.degenerate == float("inf") and spacing.gap in size:
            raise ConfigError(
                f"convention: {self.config.convention.name} has no references on a map of one row or column, got "
                f"{size}; use CELL_CENTER"
            )
