"""Reference and query grids, and conversion between normalized and pixel coordinates.

Points are given in normalized coordinates. All computation uses pixels of the map, where 0 is the center of the first
pixel. On an axis of length H, with a = 1 for ``align_corners`` and 0 otherwise,

    pixel(n) = (n + 1)/2 · (H - a) - (1 - a)/2,        d pixel/dn = (H - a)/2.
"""

from __future__ import annotations

import math

import numpy as np

from .._checks import Array, ConfigError, ShapeError, check_dtype, integer, size_pair
from ..conventions import Convention, Spacing
from .basic import Padding, conv_size

Size = tuple[int, int]


def check_convention(convention: object) -> None:
    """Raise `ConfigError` unless `convention` is a `Convention`."""
    if not isinstance(convention, Convention):
        known = ", ".join(each.name for each in Convention)
        raise ConfigError(f"convention: expected a Convention ({known}), got {convention!r}")


def _check_points(name: str, points: Array) -> None:
    check_dtype(name, points, integers=True)
    if points.ndim == 0 or points.shape[-1] != 2:
        raise ShapeError(f"{name}: expected (..., 2), order (y, x), got {points.shape}")


def _grid(size: Size, spacing: Spacing) -> Array:
    """Return the (rows, columns, 2) grid of normalized (y, x) coordinates."""
    axes = [[spacing.coordinate(index, count) for index in range(count)] for count in size]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def reference_points(key_size: Size, convention: Convention) -> Array:
    """Return the reference points p of a key grid (the uniform grid of points in the paper).

    Args:
        key_size: (Hk, Wk).

    Returns:
        (Hk, Wk, 2), order (y, x), normalized, float64. ``DATPP2023`` places a single key at +inf. Bounds on the
        coordinates then move it to the last pixel; other bounds raise an error.

    >>> reference_points((1, 2), Convention.CELL_CENTER).tolist()
    [[[0.0, -0.5], [0.0, 0.5]]]
    """
    check_convention(convention)
    return _grid(size_pair("key_size", key_size), convention.reference)


def query_points(query_size: Size, convention: Convention) -> Array:
    """Return the normalized coordinates of the queries, one per pixel: (H, W, 2), order (y, x), float64."""
    check_convention(convention)
    return _grid(size_pair("query_size", query_size), convention.query)


def pixels_per_unit(size: Size, convention: Convention) -> Array:
    """Return the derivative d pixel/dn = (H - a)/2 for both axes, (2,)."""
    check_convention(convention)
    return (np.asarray(size_pair("size", size), dtype=np.float64) - convention.align_corners) / 2


def to_pixels(points: Array, size: Size, convention: Convention) -> Array:
    """Convert normalized coordinates to pixels of a map.

    Args:
        points: (..., 2), order (y, x), normalized coordinates of the convention.
        size: (H, W) of the map.

    Returns:
        (..., 2) in pixels, at least float32. With ``align_corners``, an axis of length 1 maps every point to pixel 0.

    >>> to_pixels(np.array([-1.0, 1.0]), (4, 4), Convention.PAPER).tolist()
    [0.0, 3.0]
    >>> to_pixels(np.array([-1.0, 1.0]), (4, 4), Convention.CELL_CENTER).tolist()
    [-0.5, 3.5]
    """
    _check_points("points", points)
    wide = _at_least_float32(points)
    scale = pixels_per_unit(size, convention).astype(wide.dtype)
    edge = wide.dtype.type((not convention.align_corners) / 2)
    with np.errstate(invalid="ignore"):  # inf · 0: a single key at infinity on a map of one pixel
        return (wide + 1) * scale - edge


def to_pixels_vjp(cotangent: Array, size: Size, convention: Convention) -> Array:
    """Gradient of `to_pixels`: ∂L/∂n = ∂L/∂pixel · (H - a)/2."""
    _check_points("cotangent", cotangent)
    return cotangent * pixels_per_unit(size, convention).astype(cotangent.dtype)


def from_pixels(points_px: Array, size: Size, convention: Convention) -> Array:
    """Convert pixels to normalized coordinates: the inverse of `to_pixels`.

    The result is 0 on an axis where `to_pixels` maps every coordinate to pixel 0.
    """
    _check_points("points_px", points_px)
    wide = _at_least_float32(points_px)
    scale = pixels_per_unit(size, convention).astype(wide.dtype)
    edge = wide.dtype.type((not convention.align_corners) / 2)
    return np.divide(wide + edge, scale, out=np.ones_like(wide), where=scale > 0) - 1


def _at_least_float32(points: Array) -> Array:
    return points.astype(np.result_type(points.dtype, np.float32), copy=False)


def offset_padding(size: Size, kernel: int, stride: int, convention: Convention) -> Padding:
    """Return the zero padding with which the offset network's convolution produces the key grid.

    - ``"same"``: Hk = ⌈H/r⌉ windows, distributed symmetrically over the map. If r divides H, the windows are centered
      on the key cells for even k - r, and half a pixel off center for odd k - r.
    - ``"half"``: ⌊k/2⌋ on each side. The windows are centered on pixel i·r. The 2023 code has no padding if k = r.
    """
    check_convention(convention)
    size, kernel, stride = size_pair("size", size), integer(1)("kernel", kernel), integer(1)("stride", stride)
    if convention.offset_padding == "half":
        half = 0 if kernel == stride and convention is Convention.DATPP2023 else kernel // 2
        return (half, half), (half, half)
    vertical, horizontal = (_centered_padding(length, kernel, stride) for length in size)
    return vertical, horizontal


def _centered_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


def key_grid_size(size: Size, kernel: int, stride: int, convention: Convention) -> Size:
    """Return the size (Hk, Wk) of the key grid over a map of (H, W).

    It is ⌈H/r⌉ for an odd kernel, under every convention, so that a map smaller than the stride has one key.

    Raises:
        ConfigError: if the kernel is larger than the map and there is no padding (2023 code with k = r).

    >>> key_grid_size((7, 12), 5, 2, Convention.CELL_CENTER), key_grid_size((3, 12), 9, 8, Convention.DATPP2023)
    ((4, 6), (1, 2))
    """
    check_convention(convention)
    size, kernel, stride = size_pair("size", size), integer(1)("kernel", kernel), integer(1)("stride", stride)
    key_size = conv_size(size, kernel, stride, offset_padding(size, kernel, stride, convention))
    if min(key_size) < 1:
        raise ConfigError(
            f"kernel_size: expected at most the padded map, got {kernel} on a map of {size[0]}×{size[1]}; with "
            f"kernel_size = stride the 2023 code has no padding, and the smallest map is {kernel}×{kernel}"
        )
    return key_size
