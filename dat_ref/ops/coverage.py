"""Coverage: the share of a map that the reference points read. Offsets can matter only where coverage is incomplete.

A point p reads pixel i with the bilinear weight (see `sampling`)

    w(i) = max(0, 1 - |p_y - i_y|) · max(0, 1 - |p_x - i_x|),

so its footprint, the pixels of positive weight, is at most 2 × 2 pixels. A key grid of stride r has one point for r × r
pixels. This has four consequences:

1. **Coverage.** With cell centers the grid reads every pixel at strides 1 and 2. At larger strides, a point on a pixel
   reads one pixel of its cell (odd r, coverage 1/r²); a point between pixels reads four (even r, coverage 4/r²).
2. **Average pooling.** At strides 1 and 2 the footprint is the cell, with equal weights. The layer without offsets then
   equals the layer with average pooling of its cells. It misses no pixel, so offsets cannot recover anything.
3. **Bound.** Pixels that no point reads do not change the keys. If the grid reads some pixel of the target with
   probability h over the target's positions, and a classifier of K equally frequent classes uses only the keys, then
   its accuracy is at most h + (1 - h)/K.
4. **Capture radius.** A point gets a gradient from a target only while its footprint touches the target: within half
   the target's side plus one pixel on each axis.

These statements hold for the map that the layer samples. Convolutions, windows or local perception units before the
layer move information from the pixels between the points to the points. They increase h.
"""

from __future__ import annotations

import numpy as np

from .._checks import Array, ConfigError, integer, real, size_pair
from ..conventions import Convention
from .grid import Size, key_grid_size, reference_points, to_pixels

_ROUNDING = 1e-9  # tolerance in pixels: a point this close to a pixel's center reads no other pixel


def read_pixels(size: Size, stride: int, convention: Convention = Convention.CELL_CENTER) -> Array:
    """Return a mask of the pixels that the reference points read.

    Args:
        size: (H, W) of the map, each at least `stride`.
        stride: r, map pixels per key cell.
        convention: coordinate convention. Points outside the map are clamped to it, as in DAT++.

    Returns:
        (H, W) bool.

    >>> read_pixels((3, 9), stride=3).astype(int).tolist()
    [[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]]
    """
    size, stride = size_pair("size", size), integer(1)("stride", stride)
    kernel = stride // 2 * 2 + 3  # every odd kernel larger than the stride gives the same grid
    points = reference_points(key_grid_size(size, kernel, stride, convention), convention)
    points_px = to_pixels(np.clip(points, -1, 1), size, convention)
    rows, columns = _read_on_axis(points_px[:, 0, 0], size[0]), _read_on_axis(points_px[0, :, 1], size[1])
    return rows[:, None] & columns


def _read_on_axis(points_px: Array, length: int) -> Array:
    """Return a mask of the pixels of one axis with a positive weight for some point."""
    points_px = np.clip(points_px, 0, length - 1)
    distance = np.abs(np.arange(length)[:, None] - points_px)
    return np.asarray((distance < 1 - _ROUNDING).any(1))


def coverage(size: Size, stride: int, convention: Convention = Convention.CELL_CENTER) -> float:
    """Return the share of a map's pixels that the reference points read.

    Arguments as for `read_pixels`.

    >>> [coverage((48, 48), stride) for stride in (1, 2, 4, 8)]
    [1.0, 1.0, 0.25, 0.0625]
    """
    return float(read_pixels(size, stride, convention).mean())


def hit_rate(size: Size, stride: int, target: Size, convention: Convention = Convention.CELL_CENTER) -> float:
    """Return the share of a target's positions at which some reference point reads one of its pixels.

    Args:
        size: (H, W) of the map.
        stride: r, map pixels per key cell.
        target: (h, w) of the target in map pixels. Every position entirely on the map counts once.
        convention: coordinate convention.

    Raises:
        ConfigError: if the target is empty or larger than the map.

    >>> hit_rate((16, 16), 8, (1, 1)), hit_rate((16, 16), 8, (7, 7)), hit_rate((16, 16), 2, (1, 1))
    (0.0625, 1.0, 1.0)
    """
    size = size_pair("size", size)
    sides: tuple[int, ...] = tuple(integer()("target", side) for side in target)
    if len(sides) != 2 or min(sides) < 1 or sides[0] > size[0] or sides[1] > size[1]:
        raise ConfigError(f"target: expected 1 ≤ h ≤ {size[0]} and 1 ≤ w ≤ {size[1]}, got {target}")
    read = read_pixels(size, stride, convention)
    windows = np.lib.stride_tricks.sliding_window_view(read, target)
    return float(windows.any((2, 3)).mean())


def fixed_grid_bound(hit_rate: float, classes: int) -> float:
    """Return the maximum accuracy with keys at the reference points, h + (1 - h)/K.

    Args:
        hit_rate: h, in [0, 1], see `hit_rate`.
        classes: number K of classes, equally frequent and independent of the target's position.

    Raises:
        ConfigError: if h is not in [0, 1] or K is below 1.

    >>> fixed_grid_bound(0.0, 8), fixed_grid_bound(1.0, 8)
    (0.125, 1.0)
    """
    hit_rate, classes = real()("hit_rate", hit_rate), integer()("classes", classes)
    if not 0 <= hit_rate <= 1 or classes < 1:
        raise ConfigError(f"hit_rate, classes: expected 0 ≤ h ≤ 1 and K ≥ 1, got {hit_rate} and {classes}")
    return hit_rate + (1 - hit_rate) / classes


def capture_radius(target: float) -> float:
    """Return the largest distance on an axis, in map pixels, at which a target gives a point a gradient.

    This is half the target's side plus one pixel. A pixel belongs to the target if the target covers at least half of
    it. For a target of whole pixels on the lattice the radius is half a pixel less.

    Args:
        target: side of the target in map pixels, greater than 0.

    Raises:
        ConfigError: if the side is not greater than 0.

    >>> capture_radius(3.0)
    2.5
    """
    target = real()("target", target)
    if not target > 0:
        raise ConfigError(f"target: expected a side above 0, got {target}")
    return target / 2 + 1


def share_of_cell(kernel_size: int, stride: int) -> float:
    """Return the share of a key cell of r × r pixels that the offset network's kernel sees, min(1, k/r)².

    Args:
        kernel_size: k.
        stride: r, map pixels per key cell.

    >>> share_of_cell(5, 4), round(share_of_cell(5, 8), 2)
    (1.0, 0.39)
    """
    kernel_size, stride = integer(1)("kernel_size", kernel_size), integer(1)("stride", stride)
    return float(min(1, kernel_size / stride) ** 2)
