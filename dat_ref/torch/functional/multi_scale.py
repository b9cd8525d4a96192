"""Multi-scale deformable attention of Deformable DETR: `dat_ref.peers.multi_scale` on tensors.

`multi_scale_deformable_attention` has the signature and layouts of the function in transformers and mmcv.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_tensor, check_tensors
from ._dtypes import wide_dtype
from .grid import Size
from .sampling import Sampler, sample_tokens


def level_sizes(spatial_shapes: Sequence[Size] | Tensor) -> list[Size]:
    """Return the sizes (H_l, W_l) of the levels, from pairs or a tensor (L, 2). A tensor prevents graph capture."""
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(height, width) for height, width in pairs]


def location_pixels(locations: Tensor, spatial_shapes: Sequence[Size]) -> Tensor:
    """Convert locations (B, Q, heads, L, P, 2), (x, y) in [0, 1], to points (y, x) in pixels of their level."""
    check_tensors(locations=locations)
    wide = locations.to(wide_dtype(locations))
    levels = [
        torch.stack((level[..., 1] * height - 0.5, level[..., 0] * width - 0.5), dim=-1)
        for level, (height, width) in zip(wide.unbind(3), spatial_shapes, strict=True)
    ]
    return torch.stack(levels, dim=3)


def sample_levels(
    value: Tensor, points_px: Tensor, spatial_shapes: Sequence[Size], *, sampler: Sampler = "gather"
) -> Tensor:
    """Sample every head of every level at the points of every query.

    Args:
        value: (B, S, heads, d), the pixels of all levels, concatenated.
        points_px: (B, Q, heads, L, P, 2), (y, x), in pixels of the level.
        spatial_shapes: sizes (H_l, W_l) of the L levels.
        sampler: see `bilinear_sample`.

    Returns:
        (B, Q, heads, L, P, d), in the dtype of `value`.
    """
    queries, points = points_px.shape[1], points_px.shape[4]
    pixels = [height * width for height, width in spatial_shapes]
    sampled = []
    for tokens, size, level_points in zip(value.split(pixels, dim=1), spatial_shapes, points_px.unbind(3), strict=True):
        flat = level_points.transpose(1, 2).flatten(2, 3)  # (B, heads, Q·P, 2)
        values = sample_tokens(tokens.unflatten(1, size), flat, sampler=sampler).to(value.dtype)  # (B, heads, Q·P, d)
        sampled.append(values.unflatten(2, (queries, points)).transpose(1, 2))
    return torch.stack(sampled, dim=3)


def weighted_sum(sampled: Tensor, weights: Tensor) -> Tensor:
    """Sum samples (B, Q, heads, L, P, d) with weights (B, Q, heads, L, P) over levels and points: (B, Q, heads·d)."""
    return torch.einsum("bqhlp,bqhlpd->bqhd", weights.to(sampled.dtype), sampled).flatten(2)


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Sequence[Size] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    sampler: Sampler = "gather",
) -> Tensor:
    """Sum sampled values over levels and points.

    Args:
        value: (B, S, heads, d), S = Σ H_l·W_l.
        value_spatial_shapes: (L, 2), sizes (H_l, W_l); graph capture requires pairs of integers.
        sampling_locations: (B, Q, heads, L, P, 2), (x, y) in [0, 1]; samples outside the map are zero.
        attention_weights: (B, Q, heads, L, P).
        sampler: see `bilinear_sample`.

    Returns:
        (B, Q, heads·d).

    Raises:
        ShapeError: if the shapes do not match.
    """
    shapes = level_sizes(value_spatial_shapes)
    if not torch.compiler.is_compiling():
        _check(value, shapes, sampling_locations, attention_weights)
    sampled = sample_levels(value, location_pixels(sampling_locations, shapes), shapes, sampler=sampler)
    return weighted_sum(sampled, attention_weights)


def _check(value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor) -> None:
    total = sum(height * width for height, width in shapes)
    check_tensor("value", value, {"B": None, "S": total, "heads": None, "d": None}, "S = Σ H_l·W_l")
    batch, _, heads, _ = value.shape
    axes: dict[str, int | None] = {"B": batch, "Q": None, "heads": heads, "L": len(shapes), "P": None}
    check_tensor("sampling_locations", locations, {**axes, "(x, y)": 2})
    check_tensor("attention_weights", weights, {**axes, "Q": locations.shape[1], "P": locations.shape[4]})
