"""Bilinear sampling φ: the value of a map at a point between its pixels.

    φ(z; p) = Σ_r g(p_y, r_y) g(p_x, r_x) z[r_y, r_x],      g(a, b) = max(0, 1 - |a - b|)

The sum runs over all pixels r. Only the four pixels around p have a nonzero weight. The map is zero outside, so φ
decreases to zero within one pixel of the border. φ is linear in z. It is piecewise bilinear in p, with kinks where p
crosses a row or column of pixel centers. At a kink, the derivative in p is taken from the right:

    ∂φ/∂p_y = Σ_r g'(p_y, r_y) g(p_x, r_x) z[r],        g'(a, b) = -1 for b ≤ a < b + 1, +1 for b - 1 ≤ a < b, else 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .._checks import Array, ShapeError, check_array
from .basic import pixel_columns, scatter_add


class Corner(NamedTuple):
    """One of the four pixels around each point: its index, its weight, and the derivatives of the weight."""

    inside: Array  # (N, P), True if the corner is inside the map
    pixel: Array  # (N, P), index into H·W; 0 if the corner is outside the map
    weight: Array  # (N, P), weight g(p_y, r_y) g(p_x, r_x), zero outside the map
    slope_y: Array  # (N, P), ∂weight/∂p_y
    slope_x: Array  # (N, P), ∂weight/∂p_x


def _corners(points_px: Array, height: int, width: int) -> Iterator[Corner]:
    # The clip keeps the indices small. It changes no result: all weights are zero at these limits. NaN stays NaN.
    y, x = (np.clip(points_px[..., axis], -2, length + 1) for axis, length in enumerate((height, width)))
    top, left = np.floor(y), np.floor(x)
    below, right = y - top, x - left  # distances in [0, 1)
    for row, weight_y, sign_y in ((top, 1 - below, -1), (top + 1, below, 1)):
        for column, weight_x, sign_x in ((left, 1 - right, -1), (left + 1, right, 1)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = np.where(inside, row, 0) * width + np.where(inside, column, 0)
            yield Corner(
                inside=inside,
                pixel=pixel.astype(np.intp),
                weight=inside * (weight_y * weight_x),  # NaN · False stays NaN
                slope_y=inside * (sign_y * weight_x),
                slope_x=inside * (sign_x * weight_y),
            )


def _pixel_rows(x: Array) -> Array:
    """Return the map with one row of channels per pixel, (N, H·W, C). Gathering whole rows is fast."""
    return pixel_columns(x).transpose(0, 2, 1)


def _read(rows: Array, corner: Corner) -> Array:
    """Gather a corner's pixels, (N, P, C). A corner outside gives zero, even if pixel 0 is NaN."""
    values = rows[np.arange(len(rows))[:, None], corner.pixel]
    return values if corner.inside.all() else np.where(corner.inside[..., None], values, rows.dtype.type(0))


def bilinear_sample(x: Array, points_px: Array) -> Array:
    """Sample maps at continuous points, with zeros outside.

    Args:
        x: (N, C, H, W).
        points_px: (N, P, 2), order (y, x), in pixels; 0 is the center of the first pixel.

    Returns:
        (N, C, P), at least float32. The pixel's value at a pixel center; 0 at least one pixel outside the map; NaN at a
        NaN point.

    Raises:
        ShapeError: if a shape or a dtype is wrong.

    >>> ramp = np.arange(6.0).reshape(1, 1, 2, 3)
    >>> bilinear_sample(ramp, np.array([[[0.5, 1.0], [1.0, 2.5], [9.0, 0.0]]])).tolist()
    [[[2.5, 2.5, 0.0]]]
    """
    _check_sampling(x, points_px)
    rows = np.ascontiguousarray(_pixel_rows(x))  # (N, H·W, C)
    sampled = np.zeros((*points_px.shape[:2], x.shape[1]), dtype=np.result_type(x, points_px, np.float32))
    for corner in _corners(points_px, *x.shape[2:]):
        sampled += corner.weight[..., None] * _read(rows, corner)  # (N, P, C)
    return sampled.transpose(0, 2, 1)


def _check_sampling(x: Array, points_px: Array) -> None:
    check_array("x", x, {"N": None, "C": None, "H": None, "W": None}, integers=True)
    if 0 in x.shape[2:]:
        raise ShapeError(f"x: expected (N, C, H, W) with H >= 1 and W >= 1, got {x.shape}")
    check_array("points_px", points_px, {"N": len(x), "P": None, "(y, x)": 2}, integers=True)


class SampleGradients(NamedTuple):
    """Gradients of `bilinear_sample`."""

    x: Array
    points_px: Array


def bilinear_sample_vjp(cotangent: Array, x: Array, points_px: Array) -> SampleGradients:
    """Compute the gradients with respect to the map and the points.

    φ multiplies the map by a matrix with four weights per point. The gradient of the map uses the transposed matrix:
    each corner pixel receives weight · ∂L/∂φ. The gradient of a point is Σ_corners ∂weight/∂p · ⟨pixel, ∂L/∂φ⟩, with
    ∂weight/∂p from the right at pixel centers.

    Args:
        cotangent: ∂L/∂φ (N, C, P).

    Returns:
        ``x`` (N, C, H, W) and ``points_px`` (N, P, 2).

    Raises:
        ShapeError: if a shape or a dtype is wrong.
    """
    _check_sampling(x, points_px)
    check_array("cotangent", cotangent, {"N": len(x), "C": x.shape[1], "P": points_px.shape[1]})
    maps, channels, height, width = x.shape
    rows = np.ascontiguousarray(_pixel_rows(x))
    grad_samples = np.ascontiguousarray(cotangent.transpose(0, 2, 1))  # (N, P, C)
    map_index = np.arange(maps)[:, None]
    flat = grad_samples.reshape(-1, channels)
    grad_rows = np.zeros((maps * height * width, channels), dtype=cotangent.dtype)
    grad_points = np.zeros(points_px.shape, dtype=np.result_type(points_px, np.float32))  # points may be integers
    for corner in _corners(points_px, height, width):
        pixels = (map_index * (height * width) + corner.pixel).ravel()
        weighted = corner.weight.reshape(-1, 1).astype(cotangent.dtype) * flat
        grad_rows += scatter_add(weighted, pixels, len(grad_rows))
        products = np.einsum("npc,npc->np", _read(rows, corner), grad_samples)  # ⟨pixel, ∂L/∂φ⟩
        grad_points[..., 0] += corner.slope_y * products
        grad_points[..., 1] += corner.slope_x * products
    grad_x = grad_rows.reshape(maps, height * width, channels).transpose(0, 2, 1).reshape(x.shape)
    return SampleGradients(grad_x, grad_points)


def bilinear_sample_macs(points: int, channels: int) -> int:
    """Multiply-adds of `bilinear_sample`: four for each point and channel."""
    return 4 * points * channels
