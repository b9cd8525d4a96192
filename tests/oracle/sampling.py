"""Bilinear sampling of a map between its pixels.

    f(y, x) = sum_i sum_j hat(y - i) hat(x - j) map[i, j],   hat(t) = max(0, 1 - |t|)

over the pixels of the map, so that the map is zero outside. The slope of f jumps where y or x is an integer; the
right-hand slope is used: lim_{h -> 0, h > 0} (f(y + h, x) - f(y, x)) / h.
"""

import math
from collections.abc import Sequence

from .basic import Array

Plane = Sequence[Sequence[float]] | Array


def hat(t: float) -> float:
    """max(0, 1 - |t|); NaN stays NaN."""
    if math.isnan(t):
        return t
    return max(0.0, 1.0 - abs(t))


def hat_slope(y: float, i: int) -> float:
    """Return the right-hand derivative of y -> hat(y - i): 1 on [i - 1, i), -1 on [i, i + 1), 0 elsewhere.

    The comparisons use y itself: y - i may round onto a vertex of the hat that y has not reached.
    """
    if math.isnan(y):
        return y
    if i - 1 <= y < i:
        return 1.0
    if i <= y < i + 1:
        return -1.0
    return 0.0


def weighted_sum(plane: Plane, rows: Sequence[float], columns: Sequence[float]) -> float:
    """sum_ij rows[i] columns[j] plane[i][j]"""
    total = 0.0
    for i, row_weight in enumerate(rows):
        if row_weight == 0.0:  # saves time; the terms are all zero
            continue
        for j, column_weight in enumerate(columns):
            if column_weight != 0.0:
                total += row_weight * column_weight * float(plane[i][j])
    return total


def bilinear(plane: Plane, y: float, x: float) -> float:
    """Return f(y, x) above, with y and x in pixels."""
    rows = [hat(y - i) for i in range(len(plane))]
    columns = [hat(x - j) for j in range(len(plane[0]))]
    return weighted_sum(plane, rows, columns)


def bilinear_slopes(plane: Plane, y: float, x: float) -> tuple[float, float]:
    """Return (df/dy, df/dx), right-hand, per pixel."""
    height, width = len(plane), len(plane[0])
    rows, columns = [hat(y - i) for i in range(height)], [hat(x - j) for j in range(width)]
    row_slopes = [hat_slope(y, i) for i in range(height)]
    column_slopes = [hat_slope(x, j) for j in range(width)]
    return weighted_sum(plane, row_slopes, columns), weighted_sum(plane, rows, column_slopes)


def bilinear_spread(cotangent: float, size: tuple[int, int], y: float, x: float) -> list[list[float]]:
    """d(cotangent * f(y, x)) / d map[i, j] = cotangent hat(y - i) hat(x - j)"""
    return [[cotangent * hat(y - i) * hat(x - j) for j in range(size[1])] for i in range(size[0])]


def bilinear_channels(x: Array, b: int, channels: range, y_px: float, x_px: float) -> list[float]:
    """Return f of channels of x[b], (B, C, H, W), at one point."""
    return [bilinear(x[b, c].tolist(), y_px, x_px) for c in channels]
