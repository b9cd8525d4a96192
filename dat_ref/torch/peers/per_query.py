"""Attention with separate sampled keys for each query, as a module: `dat_ref.peers.per_query` in PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...config import Init
from ...ops.offsets import OffsetNetworkTrace
from ...peers.per_query import PerQueryAttentionConfig, PerQueryTrace, PointsTrace
from ..functional.offsets import predict_offsets
from ..functional.per_query import attend_at_points, lattice
from ..functional.sampling import Sampler, check_sampler
from ..initialization import init_offsets
from ..wide_layers import WideLayerNorm, WideLinear
from .base import PeerAttention, map_to_tokens, tokens_to_map


class PointsNetwork(nn.Module):
    """Offset network of a deformable layer, with two output channels per key."""

    def __init__(self, config: PerQueryAttentionConfig, init: Init) -> None:
        super().__init__()
        channels, kernel = config.dim // config.groups, config.offset_kernel_size
        self.config = config
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = WideLayerNorm(channels)
        self.pointwise = WideLinear(channels, 2 * config.keys, bias=False)
        init_offsets(self.pointwise, init)

    def forward(self, query: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return raw offsets (B·G, 2N, H, W) for a query map (B, C, H, W), and the intermediates."""
        return predict_offsets(query, self.depthwise, self.norm, self.pointwise, groups=self.config.groups)


class SampledProjection(nn.Module):
    """Parameters of a projection of sampled features, with `torch.nn.Linear`'s initialization.

    It is not a `torch.nn.Linear`: `functional.attend_at_points` applies the weight to the map, where it is cheaper, one
    group of channels at a time, and adds the bias to the samples.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        plain = nn.Linear(dim, dim)
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self) -> dict[str, Tensor]:
        """Return the weight (C, C) and the bias (C,)."""
        return {"weight": self.weight, "bias": self.bias}


class PerQueryAttention(PeerAttention):
    """Attention of each pixel over N sampled keys of its own: (B, C, H, W) → (B, C, H, W), for any H and W.

    The keys need N times the memory of the map, and autograd stores them for the backward pass. Keys that are shared by
    all queries, as in deformable attention, avoid this cost.

    Args:
        config: layer configuration.
        sampler: sampling method, see `functional.bilinear_sample`.
        init: ``"released"``, or ``"zero_offset"`` to start with every key on the lattice around its query.

    >>> import torch
    >>> layer = PerQueryAttention(PerQueryAttentionConfig(dim=12, heads=4, groups=2))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    config: PerQueryAttentionConfig

    def __init__(
        self, config: PerQueryAttentionConfig, *, sampler: Sampler = "gather", init: Init = "released"
    ) -> None:
        super().__init__()
        check_sampler(sampler)
        self.config, self.sampler = config, sampler
        self.query = nn.Linear(config.dim, config.dim)
        self.key = SampledProjection(config.dim)
        self.value = SampledProjection(config.dim)
        self.output = nn.Linear(config.dim, config.dim)
        self.offset_network = PointsNetwork(config, init)

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, PerQueryTrace | None]:
        config, size = self.config, (x.shape[2], x.shape[3])
        query = tokens_to_map(self.query(map_to_tokens(x)), size)  # (B, C, H, W)
        raw, network = self.offset_network(query)
        raw = raw.unflatten(0, (x.shape[0], config.groups)).unflatten(2, (config.keys, 2)).flatten(4)
        offsets = raw.permute(0, 1, 4, 2, 3)  # (B, G, H·W, N, 2)
        points_px = offsets + lattice(size, config.kernel_size, dtype=offsets.dtype, device=x.device)
        params = {"key": self.key(), "value": self.value()}
        merged, parts = attend_at_points(query.flatten(2), x, points_px, params, config.heads, sampler=self.sampler)
        y = tokens_to_map(self.output(merged.transpose(1, 2)), size)
        if not traced:
            return y, None
        at_points: dict[str, Any] = {"x": x, "points_px": points_px, **parts}
        fields: dict[str, Any] = {
            "x": x,
            "query": query,
            "offset_network": OffsetNetworkTrace(**network),
            "offsets": offsets,
            "points_px": points_px,
            "at_points": PointsTrace(**at_points),
            "merged": merged.unflatten(2, size),
        }
        return y, PerQueryTrace(**fields)
