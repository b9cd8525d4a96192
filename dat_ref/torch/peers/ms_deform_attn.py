"""Deformable DETR's attention as a module: `dat_ref.peers.ms_deform_attn` in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import ConfigError, ShapeError
from ...peers.ms_deform_attn import (
    MultiScaleDeformableConfig,
    MultiScaleDeformableTrace,
    ring_offsets,
)
from .._checks import check_tensor
from ..functional._dtypes import wide_dtype
from ..functional.grid import Size
from ..functional.multi_scale import level_sizes, location_pixels, sample_levels, weighted_sum
from ..functional.sampling import Sampler, check_sampler
from ..wide_layers import WideLinear
from .base import PeerAttention, map_to_tokens, tokens_to_map


def cell_centers(size: Size, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Return the pixel centers of a map, (H·W, 1, 2), (x, y) in [0, 1]: its reference points in self-attention."""
    rows, columns = ((torch.arange(length, dtype=dtype, device=device) + 0.5) / length for length in size)
    centers = torch.stack((columns.expand(size), rows[:, None].expand(size)), dim=-1)
    return centers.flatten(0, 1)[:, None]


class MultiScaleDeformableAttention(PeerAttention):
    """Multi-scale deformable attention: a weighted sum of values sampled at a few points around a reference.

    Offsets and weights are predicted from the query. `attend` takes queries, maps of several sizes, and references
    (points or boxes). `forward` takes one map, (B, C, H, W) → (B, C, H, W): every pixel is a query, and its center is
    the reference point. The initialization is the released one: a ring of points with equal weights for every query.

    Args:
        config: layer configuration.
        sampler: sampling method, see `functional.bilinear_sample`.

    >>> layer = MultiScaleDeformableAttention(MultiScaleDeformableConfig(dim=12, heads=3))
    >>> layer(torch.ones(2, 12, 5, 7)).shape
    torch.Size([2, 12, 5, 7])
    """

    config: MultiScaleDeformableConfig

    def __init__(self, config: MultiScaleDeformableConfig, *, sampler: Sampler = "gather") -> None:
        super().__init__()
        dim = config.dim
        check_sampler(sampler)
        self.config, self.sampler = config, sampler
        self.offset = WideLinear(dim, 2 * config.samples)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        if config.scoring == "query":
            self.weights = nn.Linear(dim, config.samples)
        else:
            self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the offsets to a ring, the weights to equal values, and the projections with Xavier's method."""
        config = self.config
        for name, layer in self.named_children():
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.bias)
            if name in ("offset", "weights"):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
        init_ring_offsets(self.offset, config.heads, config.levels, config.points)

    # -------------------------------------------------------------------------------------------- on tokens

    def attend(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[Size] | Tensor,
    ) -> tuple[Tensor, MultiScaleDeformableTrace]:
        """Compute the attention of queries over maps of several sizes.

        Args:
            query: queries (B, Q, C).
            value: pixels of all maps (B, S, C), S = Σ H_l·W_l.
            reference_points: points (B, Q, L, 2) as (x, y), or boxes (B, Q, L, 4) as (x, y, w, h). Both are in [0, 1]
                of each level.
            spatial_shapes: sizes (H_l, W_l) of the levels, (L, 2). During graph capture they must be pairs of integers.

        Returns:
            output (B, Q, C) and the trace.
        """
        config, shapes = self.config, level_sizes(spatial_shapes)
        if not torch.compiler.is_compiling():
            self._check(query, value, reference_points, shapes)
        heads = (config.heads, config.dim // config.heads)
        per_point = (config.heads, config.levels, config.points)
        offsets = self.offset(query).unflatten(2, (*per_point, 2))
        locations = self._locations(offsets, reference_points, shapes)
        points_px = location_pixels(locations, shapes)
        projected = self.value(value).unflatten(2, heads)
        sampled = sample_levels(projected, points_px, shapes, sampler=self.sampler)
        keys = sampled_keys = projected_query = None
        if config.scoring == "query":
            logits = self.weights(query).unflatten(2, per_point)
        else:
            projected_query, keys = self.query(query).unflatten(2, heads), self.key(value).unflatten(2, heads)
            sampled_keys = sample_levels(keys, points_px, shapes, sampler=self.sampler)
            logits = torch.einsum("bqhd,bqhlpd->bqhlp", projected_query, sampled_keys) * config.scale
        attention = logits.flatten(3).softmax(dim=-1).unflatten(3, per_point[1:])
        merged = weighted_sum(sampled, attention)
        fields: dict[str, Any] = {
            "query": query,
            "value_input": value,
            "reference_points": reference_points,
            "spatial_shapes": shapes,
            "value": projected,
            "keys": keys,
            "projected_query": projected_query,
            "offsets": offsets,
            "locations": locations,
            "points_px": points_px,
            "sampled": sampled,
            "sampled_keys": sampled_keys,
            "attention": attention,
            "merged": merged,
        }
        return self.output(merged), MultiScaleDeformableTrace(**fields)

    def _locations(self, offsets: Tensor, reference_points: Tensor, shapes: Sequence[Size]) -> Tensor:
        """Return the sampling locations (B, Q, heads, L, P, 2), (x, y) in [0, 1] of each level.

        With reference points, offsets are in pixels of the level. With boxes, an offset of P is half the box's side.
        """
        references = reference_points.to(wide_dtype(reference_points))[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if reference_points.shape[-1] == 4:
            return references[..., :2] + offsets * references[..., 2:] / (2 * self.config.points)
        displacements = [
            torch.stack((level_offsets[..., 0] / width, level_offsets[..., 1] / height), dim=-1)
            for level_offsets, (height, width) in zip(offsets.unbind(3), shapes, strict=True)
        ]
        return references + torch.stack(displacements, dim=3)

    def _check(self, query: Tensor, value: Tensor, reference_points: Tensor, shapes: list[Size]) -> None:
        config = self.config
        if len(shapes) != config.levels:
            raise ShapeError(f"spatial_shapes: expected levels={config.levels} pairs (H, W), got {shapes}")
        check_tensor("query", query, {"B": None, "Q": None, "C": config.dim})
        total = sum(height * width for height, width in shapes)
        check_tensor("value", value, {"B": query.shape[0], "S": total, "C": config.dim}, "S = Σ H_l·W_l")
        last = 4 if reference_points.shape[-1:] == (4,) else 2
        axes = {"B": query.shape[0], "Q": query.shape[1], "L": config.levels, "(x, y) or box": last}
        check_tensor("reference_points", reference_points, axes)

    # -------------------------------------------------------------------------------------------- on a map

    def _attend(self, x: Tensor, traced: bool) -> tuple[Tensor, MultiScaleDeformableTrace]:
        if self.config.levels != 1:
            raise ConfigError(f"levels: expected 1, since a block attends to its own map, got {self.config.levels}")
        size, tokens = (x.shape[2], x.shape[3]), map_to_tokens(x)
        centers = cell_centers(size, dtype=wide_dtype(x), device=x.device)
        y, trace = self.attend(tokens, tokens, centers.expand(x.shape[0], *centers.shape), [size])
        return tokens_to_map(y, size), trace


def init_ring_offsets(offset: nn.Linear, heads: int, levels: int, points: int) -> None:
    """Initialize an offset layer so that it predicts the released ring of offsets for every input."""
    nn.init.zeros_(offset.weight)
    with torch.no_grad():
        offset.bias.copy_(torch.from_numpy(ring_offsets(heads, levels, points).copy()).flatten())
