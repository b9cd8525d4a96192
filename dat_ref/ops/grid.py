"""Reference and query grids, and what their coordinates mean in pixels: the only place that reads a `Convention`.

Normalised coordinates are for people and for weights; everything is computed in pixels of the map, where pixel 0 is the
center of the first pixel. On an axis of length H, with a = 1 for ``align_corners`` and 0 otherwise,

    pixel(n) = (n + 1)/2 · (H - a) - (1 - a)/2,        d pixel/dn = (H - a)/2.
"""

from __future__ import annotations

import math

import numpy as np

from .._checks import Array, ConfigError
from ..conventions import Convention, Spacing
from .basic import Padding, conv_size

Size = tuple[int, int]


def _grid(size: Size, spacing: Spacing) -> Array:
    """Return the (rows, columns, 2) grid of normalised (y, x) coordinates."""
    axes = [[spacing.coordinate(index, count) for index in range(count)] for count in size]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def reference_points(key_size: Size, convention: Convention) -> Array:
    """Return the reference points p of a key grid (the article's uniform grid of points).

    Args:
        key_size: (Hk, Wk).

    Returns:
        (Hk, Wk, 2), (y, x), normalised, float64. ``DATPP2023`` places a single key at +inf, from where only
        a bound on coordinates brings it back (to the last pixel).

    >>> reference_points((1, 2), Convention.CELL_CENTER).tolist()
    [[[0.0, -0.5], [0.0, 0.5]]]
    """
    return _grid(key_size, convention.reference)


def query_points(query_size: Size, convention: Convention) -> Array:
    """Return the normalised coordinates of the queries, one a pixel: (H, W, 2), (y, x), float64."""
    return _grid(query_size, convention.query)


def pixels_per_unit(size: Size, convention: Convention) -> Array:
    """Return d pixel/dn = (H - a)/2 for both axes, (2,)."""
    return (np.asarray(size, dtype=np.float64) - convention.align_corners) / 2


def to_pixels(points: Array, size: Size, convention: Convention) -> Array:
    """Return normalised points in pixels of a map.

    Args:
        points: (..., 2), (y, x), normalised by the convention.
        size: (H, W) of the map.

    Returns:
        (..., 2) in pixels, float32 or wider. An axis of length 1 under ``align_corners`` has only pixel 0.

    >>> to_pixels(np.array([-1.0, 1.0]), (4, 4), Convention.PAPER).tolist()
    [0.0, 3.0]
    >>> to_pixels(np.array([-1.0, 1.0]), (4, 4), Convention.CELL_CENTER).tolist()
    [-0.5, 3.5]
    """
    wide = _wide(points)
    scale = pixels_per_unit(size, convention).astype(wide.dtype)
    edge = wide.dtype.type((not convention.align_corners) / 2)
    with np.errstate(invalid="ignore"):  # inf · 0 where a lone key at infinity meets a map of one pixel
        return (wide + 1) * scale - edge


def to_pixels_vjp(cotangent: Array, size: Size, convention: Convention) -> Array:
    """∂L/∂n = ∂L/∂pixel · (H - a)/2."""
    return cotangent * pixels_per_unit(size, convention).astype(cotangent.dtype)


def from_pixels(points_px: Array, size: Size, convention: Convention) -> Array:
    """Return pixel positions in normalised coordinates: the inverse of `to_pixels` (0 where every n is one pixel)."""
    wide = _wide(points_px)
    scale = pixels_per_unit(size, convention).astype(wide.dtype)
    edge = wide.dtype.type((not convention.align_corners) / 2)
    return np.divide(wide + edge, scale, out=np.ones_like(wide), where=scale > 0) - 1


def _wide(points: Array) -> Array:
    """Geometry is never narrower than float32."""
    return points.astype(np.result_type(points.dtype, np.float32), copy=False)


def offset_padding(size: Size, kernel: int, stride: int, convention: Convention) -> Padding:
    """Return the zeros around the map with which the offset network's convolution makes the key grid.

    - ``"same"``: Hk = ⌈H/r⌉ windows, spread symmetrically over the map: on the key cells where r divides H and
      k - r is even, half a pixel beside them where it is odd.
    - ``"half"``: ⌊k/2⌋ on every side, windows centered on pixel i·r; none in the 2023 code if k = r.
    """
    if convention.offset_padding == "half":
        half = 0 if kernel == stride and convention is Convention.DATPP2023 else kernel // 2
        return (half, half), (half, half)
    vertical, horizontal = (_centered_padding(length, kernel, stride) for length in size)
    return vertical, horizontal


def _centered_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


def key_grid_size(size: Size, kernel: int, stride: int, convention: Convention) -> Size:
    """Return (Hk, Wk), the key grid over a map of (H, W).

    Raises:
        ConfigError: if the stride is larger than the map.

    >>> key_grid_size((7, 12), 5, 2, Convention.CELL_CENTER)
    (4, 6)
    """
    if stride > min(size):
        raise ConfigError(
            f"stride: expected at most the map's height and width, got stride={stride} on a map of {size[0]}×{size[1]} "
            "(feed a larger input, or build the layer with a smaller stride)"
        )
    key_size = conv_size(size, kernel, stride, offset_padding(size, kernel, stride, convention))
    if min(key_size) < 1:
        raise ConfigError(f"kernel_size: expected at most the padded map, got {kernel} on a map of {size[0]}×{size[1]}")
    return key_size
