"""Multi-scale deformable sampling (Deformable DETR): weighted sums of samples from maps of several sizes.

    y[q] = Σ_l Σ_p a[q, l, p] φ(v_l; p̃[q, l, p])        for each head

`multi_scale_deformable_attention` has the signature and the layouts of the function in transformers and mmcv. Tokens
are (B, tokens, heads, d): each map is flattened row by row, and the maps are concatenated. Locations are (x, y) in
[0, 1] of each level, with the map's edges at 0 and 1: pixel x = location · W - ½. Samples outside a map are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .._checks import Array, check_array
from ..ops.grid import Size
from ..ops.sampling import bilinear_sample, bilinear_sample_vjp
from .memory import Tape, sampling_workspace


def level_sizes(spatial_shapes: Sequence[Size] | Array) -> list[Size]:
    """Return the sizes (H_l, W_l) of the levels from pairs or from an array (L, 2)."""
    return [(int(height), int(width)) for height, width in np.asarray(spatial_shapes).reshape(-1, 2)]


def location_pixels(locations: Array, spatial_shapes: Sequence[Size]) -> Array:
    """Return locations (B, Q, heads, L, P, 2), (x, y) in [0, 1], as points (y, x) in pixels of their level."""
    extent = np.asarray(spatial_shapes, dtype=np.result_type(locations.dtype, np.float32))  # (L, 2), (H, W)
    return locations[..., ::-1] * extent[:, None] - extent.dtype.type(0.5)


def sample_tokens(value: Array, points_px: Array, spatial_shapes: Sequence[Size]) -> Array:
    """Sample every head of every level at the points of every query.

    Args:
        value: pixels of all levels, concatenated, (B, S, heads, d).
        points_px: points (B, Q, heads, L, P, 2), (y, x), in pixels of the level.

    Returns:
        Samples (B, Q, heads, L, P, d).
    """
    sampled = np.empty((*points_px.shape[:-1], value.shape[3]), dtype=np.result_type(value, points_px))
    for level, maps, points in _by_level(value, points_px, spatial_shapes):
        values = bilinear_sample(maps, points)  # (B·heads, d, Q·P)
        sampled[:, :, :, level] = _from_maps(values, points_px.shape)
    return sampled


def sample_tokens_vjp(
    cotangent: Array, value: Array, points_px: Array, spatial_shapes: Sequence[Size]
) -> tuple[Array, Array]:
    """Return (∂L/∂value, ∂L/∂points_px) from ∂L/∂sampled (B, Q, heads, L, P, d)."""
    batch, _, heads, depth = value.shape
    grad_value, grad_points = np.zeros_like(value, dtype=cotangent.dtype), np.zeros_like(points_px)
    start = 0
    for level, maps, points in _by_level(value, points_px, spatial_shapes):
        grads = bilinear_sample_vjp(_to_maps(cotangent[:, :, :, level]), maps, points)
        pixels = maps.shape[2] * maps.shape[3]
        grad_maps = grads.x.reshape(batch, heads, depth, pixels).transpose(0, 3, 1, 2)
        grad_value[:, start : start + pixels] = grad_maps
        grad_points[:, :, :, level] = _from_maps(grads.points_px.swapaxes(1, 2), points_px.shape)
        start += pixels
    return grad_value, grad_points


def _by_level(value: Array, points_px: Array, spatial_shapes: Sequence[Size]) -> Iterator[tuple[int, Array, Array]]:
    """Yield (level, maps (B·heads, d, H_l, W_l), points (B·heads, Q·P, 2))."""
    batch, _, heads, depth = value.shape
    start = 0
    for level, (height, width) in enumerate(level_sizes(spatial_shapes)):
        tokens = value[:, start : start + height * width]  # (B, H_l·W_l, heads, d)
        maps = tokens.transpose(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
        yield level, maps, _to_maps(points_px[:, :, :, level]).swapaxes(1, 2)
        start += height * width


def _to_maps(per_query: Array) -> Array:
    """Reshape (B, Q, heads, P, n) → (B·heads, n, Q·P)."""
    batch, queries, heads, points, depth = per_query.shape
    return per_query.transpose(0, 2, 4, 1, 3).reshape(batch * heads, depth, queries * points)


def _from_maps(values: Array, points_shape: tuple[int, ...]) -> Array:
    """Reshape (B·heads, n, Q·P) → (B, Q, heads, P, n)."""
    batch, queries, heads, _, points, _ = points_shape
    return values.reshape(batch, heads, values.shape[1], queries, points).transpose(0, 3, 1, 4, 2)


def multi_scale_deformable_attention(
    value: Array, value_spatial_shapes: Sequence[Size] | Array, sampling_locations: Array, attention_weights: Array
) -> Array:
    """Sum sampled values with given weights: y[q] = Σ_l Σ_p a[q, l, p] φ(v_l; p̃[q, l, p]) for each head.

    Args:
        value: value tokens (B, S, heads, d), S = Σ H_l W_l.
        value_spatial_shapes: size (H_l, W_l) of each level, (L, 2).
        sampling_locations: (B, Q, heads, L, P, 2), (x, y) in [0, 1] inside a map; samples outside are zero.
        attention_weights: (B, Q, heads, L, P).

    Returns:
        Sums (B, Q, heads·d).

    Raises:
        ShapeError: if the shapes are inconsistent.
    """
    shapes = _check(value, value_spatial_shapes, sampling_locations, attention_weights)
    sampled = sample_tokens(value, location_pixels(sampling_locations, shapes), shapes)
    return weighted_sum(sampled, attention_weights)


def weighted_sum(sampled: Array, weights: Array) -> Array:
    """Sum samples (B, Q, heads, L, P, d) with weights (B, Q, heads, L, P) over levels and points: (B, Q, heads·d)."""
    batch, queries, heads, _, _, depth = sampled.shape
    return np.einsum("bqhlp,bqhlpd->bqhd", weights, sampled).reshape(batch, queries, heads * depth)


class MultiScaleGradients(NamedTuple):
    """Gradients of `multi_scale_deformable_attention`."""

    value: Array
    sampling_locations: Array
    attention_weights: Array


def multi_scale_deformable_attention_vjp(
    cotangent: Array,
    value: Array,
    value_spatial_shapes: Sequence[Size] | Array,
    sampling_locations: Array,
    attention_weights: Array,
) -> MultiScaleGradients:
    """Return the gradients of `multi_scale_deformable_attention`: ∂L/∂a = ⟨φ, ∂L/∂y⟩, ∂L/∂φ = a ∂L/∂y."""
    shapes = _check(value, value_spatial_shapes, sampling_locations, attention_weights)
    points_px = location_pixels(sampling_locations, shapes)
    sampled = sample_tokens(value, points_px, shapes)
    grad_sampled, grad_weights = weighted_sum_vjp(cotangent, sampled, attention_weights)
    grad_value, grad_points = sample_tokens_vjp(grad_sampled, value, points_px, shapes)
    return MultiScaleGradients(grad_value, location_gradient(grad_points, shapes), grad_weights)


def weighted_sum_vjp(cotangent: Array, sampled: Array, weights: Array) -> tuple[Array, Array]:
    """Return (∂L/∂sampled, ∂L/∂weights)."""
    grad_y = cotangent.reshape(*sampled.shape[:3], sampled.shape[5])  # (B, Q, heads, d)
    return weights[..., None] * grad_y[:, :, :, None, None], np.einsum("bqhd,bqhlpd->bqhlp", grad_y, sampled)


def location_gradient(grad_points: Array, shapes: Sequence[Size]) -> Array:
    """Return ∂L/∂locations, (x, y): ∂L/∂points_px, (y, x), times the size of the level in pixels."""
    extent = np.asarray(shapes, dtype=grad_points.dtype)
    return (grad_points * extent[:, None])[..., ::-1]


def _check(value: Array, spatial_shapes: Sequence[Size] | Array, locations: Array, weights: Array) -> list[Size]:
    shapes = level_sizes(spatial_shapes)
    total = sum(height * width for height, width in shapes)
    check_array("value", value, {"B": None, "S": total, "heads": None, "d": None}, "S = Σ H_l·W_l")
    axes: dict[str, int | None] = {"B": len(value), "Q": None, "heads": value.shape[2], "L": len(shapes), "P": None}
    check_array("sampling_locations", locations, {**axes, "(x, y)": 2})
    check_array("attention_weights", weights, {**axes, "Q": locations.shape[1], "P": locations.shape[4]})
    return shapes


def sample_tokens_memory(tape: Tape, batch: int, size: Size, dim: int, heads: int, points: int) -> None:
    """Record the memory step of `sample_tokens` for one level of `size`, where every pixel is a query.

    The workspace is the map and the points in head order, and the samples before their final layout.
    """
    pixels = batch * math.prod(size)
    sampled_points, gathered = pixels * heads * points, pixels * points * dim
    workspace = sampling_workspace(sampled_points, dim // heads, tape.itemsize)
    tape.step("sampling", gathered, gathered + 2 * sampled_points + pixels * dim + workspace)
