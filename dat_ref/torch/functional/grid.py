"""Reference and query grids, and conversion of their coordinates to pixels: `dat_ref.ops.grid` on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import ConfigError
from ...conventions import Convention, Spacing
from .._checks import check_tensors
from ._dtypes import wide_dtype
from ._symbolic import ceil_div

Size = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))


def axis_coordinates(
    count: int, spacing: Spacing, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Return the normalized coordinates of one axis of a grid, (count,)."""
    dtype = dtype or torch.get_default_dtype()
    if count == spacing.gap:
        return torch.full((count,), spacing.degenerate, dtype=dtype, device=device)
    index = torch.arange(count, dtype=dtype, device=device)
    return 2 * (index + spacing.shift) / (count - spacing.gap) - 1


def _grid(size: Size, spacing: Spacing, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    height, width = size
    y = axis_coordinates(height, spacing, dtype, device)[:, None].expand(height, width)
    x = axis_coordinates(width, spacing, dtype, device).expand(height, width)
    return torch.stack((y, x), dim=-1)


def reference_points(
    key_size: Size,
    convention: Convention,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the reference points p of a key grid, (Hk, Wk, 2), (y, x), normalized.

    ``DATPP2023`` places a single key at +inf. Only `OffsetBound.CLAMP` makes it finite again, at the last pixel.

    >>> reference_points((1, 2), Convention.CELL_CENTER).tolist()
    [[[0.0, -0.5], [0.0, 0.5]]]
    """
    return _grid(key_size, convention.value.reference, dtype, device)


def query_points(
    query_size: Size,
    convention: Convention,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the normalized coordinates of the queries, one per pixel: (H, W, 2), (y, x)."""
    return _grid(query_size, convention.value.query, dtype, device)


def pixels_per_unit(size: Size, convention: Convention) -> tuple[float, float]:
    """Return the pixels per unit of normalized coordinate, (H - a)/2, for both axes."""
    aligned = int(convention.value.align_corners)
    return (size[0] - aligned) / 2, (size[1] - aligned) / 2


def axis_pixels(coordinates: Tensor, length: int, convention: Convention) -> Tensor:
    """Convert normalized coordinates of one axis to pixels, float32 or wider."""
    aligned = int(convention.value.align_corners)
    return (coordinates.to(wide_dtype(coordinates)) + 1) * ((length - aligned) / 2) - (1 - aligned) / 2


def to_pixels(points: Tensor, size: Size, convention: Convention) -> Tensor:
    """Convert normalized points (..., 2), (y, x), to pixels of a map of `size`, float32 or wider.

    >>> to_pixels(torch.tensor([-1.0, 1.0]), (4, 4), Convention.CELL_CENTER).tolist()
    [-0.5, 3.5]
    """
    check_tensors(points=points)
    y, x = points.unbind(-1)
    return torch.stack((axis_pixels(y, size[0], convention), axis_pixels(x, size[1], convention)), dim=-1)


def from_pixels(points_px: Tensor, size: Size, convention: Convention) -> Tensor:
    """Convert pixel positions to normalized coordinates: inverse of `to_pixels`, and 0 on an axis of one position."""
    check_tensors(points_px=points_px)
    edge = (not convention.value.align_corners) / 2
    wide = points_px.to(wide_dtype(points_px))
    axes = [
        (coordinates + edge) / scale - 1 if scale > 0 else torch.zeros_like(coordinates)
        for coordinates, scale in zip(wide.unbind(-1), pixels_per_unit(size, convention), strict=True)
    ]
    return torch.stack(axes, dim=-1)


def offset_padding(size: Size, kernel: int, stride: int, convention: Convention) -> Padding:
    """Return the zero padding of the offset network's convolution, whose output has the size of the key grid.

    - ``"same"``: Hk = ⌈H/r⌉ windows, centered on the key cells to within half a pixel.
    - ``"half"``: ⌊k/2⌋ on every side, windows centered on pixel i·r; no padding in the 2023 code if k = r.
    """
    if convention.value.offset_padding == "half":
        half = 0 if kernel == stride and convention is Convention.DATPP2023 else kernel // 2
        return (half, half), (half, half)
    return _centered_padding(size[0], kernel, stride), _centered_padding(size[1], kernel, stride)


def _centered_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((ceil_div(length, stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


def key_grid_size(size: Size, kernel: int, stride: int, convention: Convention) -> Size:
    """Return the size (Hk, Wk) of the key grid of a map (H, W).

    It is ⌈H/r⌉ for an odd kernel, under every convention, so that a map smaller than the stride has one key.

    Raises:
        ConfigError: if the kernel is larger than the map and there is no padding (2023 code with k = r).

    >>> key_grid_size((7, 12), 5, 2, Convention.CELL_CENTER), key_grid_size((3, 12), 9, 8, Convention.DATPP2023)
    ((4, 6), (1, 2))
    """
    (top, bottom), (left, right) = offset_padding(size, kernel, stride, convention)
    rows = (size[0] + top + bottom - kernel) // stride + 1
    columns = (size[1] + left + right - kernel) // stride + 1
    if not torch.compiler.is_compiling():
        _check_key_grid(size, kernel, (rows, columns))
    return rows, columns


def _check_key_grid(size: Size, kernel: int, key_size: Size) -> None:
    if min(key_size) < 1:
        raise ConfigError(
            f"kernel_size: expected at most the padded map, got {kernel} on a map of {size[0]}×{size[1]}; with "
            f"kernel_size = stride the 2023 code has no padding, and the smallest map is {kernel}×{kernel}"
        )
