"""The four coordinate conventions, one axis at a time, each formula as in its own source.

                 reference of key i of K      query i of n          pixel of coordinate t, map of H pixels
cell_center      center of cell i of K        center of cell i      t = -1, 1: the outer edges of the map
paper            -1 + 2 i / (K - 1)           -1 + 2 i / (n - 1)    t = -1, 1: the centers of the end pixels
cvpr2022         (i + 0.5) / K * 2 - 1        same formula          as paper
datpp2023        (i + 0.5) / (K - 1) * 2 - 1  i / (n - 1) * 2 - 1   as paper

One key or query, where the formula divides by zero: 0, the center. Exception: the 2023 reference is 0.5 / 0 =
infinity, which its clamp turns into 1.
"""

import math

from .basic import Padding

CONVENTIONS = ("cell_center", "paper", "cvpr2022", "datpp2023")


def unknown(convention: str) -> ValueError:
    return ValueError(f"convention: expected one of {CONVENTIONS}, got {convention!r}")


def reference(convention: str, i: int, n_keys: int) -> float:
    """Return the normalized coordinate of the reference point of key i of n_keys."""
    if convention == "cell_center":
        cell = 2.0 / n_keys  # the axis [-1, 1] divided into n_keys equal cells
        return -1.0 + cell * i + cell / 2.0
    if convention == "paper":
        return corner_to_corner(i, n_keys)
    if convention == "cvpr2022":
        return (0.5 + i) / n_keys * 2.0 - 1.0
    if convention == "datpp2023":
        return math.inf if n_keys == 1 else (0.5 + i) / (n_keys - 1.0) * 2.0 - 1.0
    raise unknown(convention)


def query(convention: str, i: int, n: int) -> float:
    """Return the normalized coordinate of query pixel i of n, as used by the position bias."""
    if convention == "cell_center":
        cell = 2.0 / n
        return -1.0 + cell * i + cell / 2.0
    if convention == "paper":
        return corner_to_corner(i, n)
    if convention == "cvpr2022":
        return (0.5 + i) / n * 2.0 - 1.0
    if convention == "datpp2023":
        return 0.0 if n == 1 else i / (n - 1.0) * 2.0 - 1.0
    raise unknown(convention)


def corner_to_corner(i: int, n: int) -> float:
    """Return value i of n values equally spaced from -1 to 1; a single value is at the center."""
    return 0.0 if n == 1 else -1.0 + 2.0 * i / (n - 1)


def to_pixel(convention: str, n: float, size: int) -> float:
    """Return the pixel of normalized coordinate n on a map of that size; 0 is the center of the first pixel."""
    if convention == "cell_center":
        return ((n + 1.0) * size - 1.0) / 2.0  # -1 -> -1/2, 1 -> size - 1/2
    if convention in ("paper", "cvpr2022", "datpp2023"):
        if size == 1 and math.isinf(n):  # one pixel for all coordinates
            return 0.0
        return (n + 1.0) / 2.0 * (size - 1)
    raise unknown(convention)


def padding(convention: str, size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return (before, after): zeros around one axis for the offset network's convolution."""
    if convention in ("cell_center", "paper"):  # enough for ceil(size / stride) windows, centered
        keys = math.ceil(size / stride)
        total = max((keys - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2
    if convention == "cvpr2022":
        return kernel // 2, kernel // 2
    if convention == "datpp2023":
        return (0, 0) if kernel == stride else (kernel // 2, kernel // 2)
    raise unknown(convention)


def key_count(convention: str, size: int, kernel: int, stride: int) -> int:
    """Return the number of keys along an axis: the windows of the kernel's length, stride apart, in the padded axis."""
    before, after = padding(convention, size, kernel, stride)
    count, start = 0, 0
    while start + kernel <= size + before + after:
        count += 1
        start += stride
    return count


def padding_2d(convention: str, size: tuple[int, int], kernel: int, stride: int) -> Padding:
    """((top, bottom), (left, right))"""
    return padding(convention, size[0], kernel, stride), padding(convention, size[1], kernel, stride)


def offset_range(convention: str, n_keys: int, s: float) -> float:
    """Return the largest normalized move of a bounded point: half of s key cells; a cell is the references' spacing.

    A single key has no spacing, so its cell is the whole axis (length 2). The 2023 release divides by zero there, and
    this function does the same.
    """
    if convention in ("cell_center", "cvpr2022"):
        return s / n_keys
    if convention == "paper":
        return s if n_keys == 1 else s / (n_keys - 1)
    if convention == "datpp2023":
        return s * (1.0 / (n_keys - 1.0))
    raise unknown(convention)
