"""Position bias of one tile of keys and queries, interpolated in windows of the table, and its gradient.

All queries of a key read the table on one lattice, origin + (i·step_y, j·step_x) (`bias.table_index`). So each key
needs one window of the table, which begins at the cell ⌊origin⌋. It is interpolated along rows, then along columns.
With r = origin - ⌊origin⌋ and a step of 1, query i is between two cells of the window,

    (1 - r) · window[i] + r · window[i + 1].

With another step, i·step = f + e with an integer f and e in [0, 1]. Then r + e in [0, 2) is between two of the three
cells f, f + 1 and f + 2, and f is the same for all keys.

On the lattice r is 0, and the derivative is the right derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import wide_dtype
from .bias import AffineIndex
from .grid import Size

_MAX_UNFOLDED_CELLS = 1 << 22


class Tile(NamedTuple):
    """Ranges of images, heads and keys, and a rectangle of queries."""

    batch: slice
    groups: slice
    group_heads: slice  # heads within each group
    keys: slice
    rows: slice
    columns: slice


def narrow_dims(tensor: Tensor, *slices: slice) -> Tensor:
    """Return tensor[slices]; axes that are not narrowed cost nothing."""
    for dim, part in enumerate(slices):
        length = part.stop - part.start
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, part.start, length)
    return tensor


class _Axis:
    """Mapping from the queries of one axis to the cells of a window.

    Args:
        dim: -2 for rows, -1 for columns.
        length: number of queries.
        step: cells between neighboring queries.
        like: tensor that defines dtype and device.
    """

    def __init__(self, dim: int, length: int, step: float, like: Tensor) -> None:
        self.dim = dim
        self.first_cell: Sequence[int] = range(length)  # f
        self.taps, self.skips_cells = 2, False
        if step != 1:
            self._init_three_taps(length, step, like)
        self.span = self.first_cell[-1] + self.taps + 1

    def _init_three_taps(self, length: int, step: float, like: Tensor) -> None:
        positions = [index * step for index in range(length)]
        # Steps close to 1, such as (H-1)/H, skip no cell: interpolation then uses slices instead of indices.
        lag = min(math.floor(position - index) for index, position in enumerate(positions))
        self.skips_cells = any(position - index - lag > 1 for index, position in enumerate(positions))
        self.first_cell = [math.floor(each) for each in positions] if self.skips_cells else range(lag, length + lag)
        self.taps = 3
        fractions = [position - cell for cell, position in zip(self.first_cell, positions, strict=True)]
        self.fractions = torch.tensor(fractions, dtype=like.dtype, device=like.device)  # e
        self.cell_index = torch.tensor(self.first_cell, device=like.device)

    def num_cells(self, queries: slice) -> int:
        """Return the number of cells that a range of queries reads."""
        return self.first_cell[queries.stop - 1] + self.taps - self.first_cell[queries.start]


class _AxisInterp:
    """Linear interpolation along one axis of a tile: maps cells to queries along `dim`.

    Args:
        axis: mapping from queries to cells.
        remainder: r, (B, G, 1, Ns) and singleton axes, broadcastable to the cells.
        queries: range of queries of the tile.
        num_queries: number of queries along `dim`.
    """

    def __init__(self, axis: _Axis, remainder: Tensor, queries: slice, num_queries: int) -> None:
        self.axis, self.queries, self.num_queries = axis, queries, num_queries
        self.fraction = remainder  # interpolation weight of the upper cell
        self.shifted: Tensor | None = None  # with three taps: whether the last two are used, not the first two
        if axis.taps == 3:
            fractions = axis.fractions[queries]
            position = remainder + (fractions[:, None] if axis.dim == -2 else fractions)
            self.shifted = position >= 1
            self.fraction = position - self.shifted.to(position.dtype)

    def interpolate(self, cells: Tensor) -> Tensor:
        """Return the values at the queries."""
        taps = self._taps(cells)
        if self.shifted is None:
            return torch.lerp(taps[0], taps[1], self.fraction)
        return _weighted_sum(taps, self._weights(1 - self.fraction, self.fraction))

    def derivative(self, cells: Tensor) -> Tensor:
        """Return the derivative of the values along the axis."""
        taps = self._taps(cells)
        if self.shifted is None:
            return taps[1] - taps[0]
        one = torch.ones_like(self.fraction)
        return _weighted_sum(taps, self._weights(-one, one))

    def backward(self, grad: Tensor, cells: Tensor) -> Tensor:
        """Return the gradient with respect to the cells."""
        dim, num_queries = self.axis.dim, self.num_queries
        weights = self._weights(1 - self.fraction, self.fraction)
        if self.axis.skips_cells:
            grad_cells = torch.zeros_like(cells)
            for tap, weight in enumerate(weights):
                grad_cells.index_add_(dim, self._tap_index(tap), grad * weight)
            return grad_cells
        grad_cells = torch.empty_like(cells)
        torch.mul(grad, weights[0], out=grad_cells.narrow(dim, 0, num_queries))
        grad_cells.narrow(dim, num_queries, cells.shape[dim] - num_queries).zero_()
        for tap, weight in enumerate(weights[1:], start=1):
            grad_cells.narrow(dim, tap, num_queries).addcmul_(grad, weight)
        return grad_cells

    def _taps(self, cells: Tensor) -> list[Tensor]:
        """Return the cells that each query may read, one tensor per tap."""
        dim, num_queries, taps = self.axis.dim, self.num_queries, range(self.axis.taps)
        if self.axis.skips_cells:
            return [cells.index_select(dim, self._tap_index(tap)) for tap in taps]
        return [cells.narrow(dim, tap, num_queries) for tap in taps]

    def _tap_index(self, tap: int) -> Tensor:
        return self.axis.cell_index[self.queries] - (self.axis.first_cell[self.queries.start] - tap)

    def _weights(self, lower: Tensor, upper: Tensor) -> list[Tensor]:
        """Return the factor of each tap, from the factors of the lower and upper cell."""
        if self.shifted is None:
            return [lower, upper]
        zero = torch.zeros_like(lower)
        return [
            torch.where(self.shifted, zero, lower),
            torch.where(self.shifted, lower, upper),
            torch.where(self.shifted, upper, zero),
        ]


def _weighted_sum(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.addcmul_(value, weight)
    return total


class BiasWindows:
    """Bias of a table, computed from windows of its cells.

    Args:
        table: (heads, T_y, T_x).
        index: origin (B, G, Ns, 2), and step.
        query_size: (H, W).
    """

    def __init__(self, table: Tensor, index: AffineIndex, query_size: Size) -> None:
        origin, step = index
        origin = origin.to(wide_dtype(table, origin))
        self.row_axis, self.column_axis = (_Axis(dim, query_size[dim], step[dim], origin) for dim in (-2, -1))
        # With this zero padding every window is inside, also the window of a key whose queries are all off the table.
        pad_y, pad_x = self.row_axis.span + 2, self.column_axis.span + 2
        padded = F.pad(table.to(origin.dtype), (pad_x, pad_x, pad_y, pad_y))
        self.interior = (slice(pad_y, pad_y + table.shape[1]), slice(pad_x, pad_x + table.shape[2]))
        self.shape = padded.shape
        self.cells = padded.flatten()

        y, x = origin.unbind(-1)
        # Positions farther out give the same zero bias.
        y = y.clamp(-self.row_axis.span - 1, table.shape[1] + 1)
        x = x.clamp(-self.column_axis.span - 1, table.shape[2] + 1)
        row, column = y.floor(), x.floor()
        # r, (B, G, 1, Ns, 1, 1) on each axis; NaN stays NaN here.
        self.fractions = ((y - row)[:, :, None, :, None, None], (x - column)[:, :, None, :, None, None])
        self.corners = (row.nan_to_num_().long().add_(pad_y), column.nan_to_num_().long().add_(pad_x))  # (B, G, Ns)
        self.head_index = torch.arange(table.shape[0], device=origin.device).view(origin.shape[1], -1, 1)
        self._unfold_columns()

    def _unfold_columns(self) -> None:
        """Choose the source of windows: the table, or an unfolded copy in which the rows of a window are adjacent.

        The unfolded table has one slab for each first column of a window. Reading from it is several times faster, but
        it has several times as many cells. So it is used only if it is small, and small compared to the cells read.
        """
        heads, height, width = self.shape
        self.source, self.source_strides = self.cells, (height * width, width, 1)  # of head, row, column
        window_columns = self.column_axis.num_cells(slice(0, len(self.column_axis.first_cell)))
        unfolded_size = heads * height * (width - window_columns + 1) * window_columns
        gathered_size = self.corners[0].numel() * self.head_index.shape[1] * self.row_axis.span * window_columns
        if unfolded_size <= _MAX_UNFOLDED_CELLS and 4 * unfolded_size <= gathered_size:
            unfolded = self.cells.view(self.shape).unfold(2, window_columns, 1).transpose(1, 2).contiguous()
            self.source = unfolded.flatten()
            self.source_strides = (unfolded.stride(0), unfolded.stride(2), unfolded.stride(1))

    def pitch(self, tile: Tile) -> int:
        """Return the distance between rows of queries in a tile.

        With a step of 1, one padding query ends each row except the last. Interpolation can then process all rows at
        once, which is several times faster on narrow maps.
        """
        columns = tile.columns
        return self.column_axis.num_cells(columns) if self.column_axis.taps == 2 else columns.stop - columns.start

    def gather(self, tile: Tile) -> Tensor:
        """Return the windows of a tile: (B, G, heads/G, Ns, rows, columns) of cells."""
        rows, columns = self.row_axis.num_cells(tile.rows), self.column_axis.num_cells(tile.columns)
        head_stride, row_stride, column_stride = self.source_strides
        offsets = self._corners(tile, row_stride, column_stride)[:, :, None]
        heads = narrow_dims(self.head_index, tile.groups, tile.group_heads)
        offsets = offsets + heads * head_stride  # (B, G, heads/G, Ns)
        count = self.source.numel() - (rows - 1) * row_stride - (columns - 1)
        windows = self.source.as_strided((count, rows, columns), (1, row_stride, 1)).index_select(0, offsets.flatten())
        return windows.view(*offsets.shape, rows, columns)

    def interpolate(self, windows: Tensor, tile: Tile) -> Tensor:
        """Return the bias of a tile: (B, G, heads/G, Ns, queries), see `pitch`."""
        interp_y, interp_x = self._interps(tile)
        return interp_x.interpolate(self._join_rows(interp_y.interpolate(windows))).flatten(4)

    def backward(self, grad: Tensor, windows: Tensor, tile: Tile, grad_cells: Tensor, grad_origin: Tensor) -> None:
        """Add the contribution of a tile to the gradients.

        Args:
            grad: gradient of the bias, (B, G, heads/G, Ns, queries), see `pitch`; zero at padding queries.
            windows: result of `gather`.
            tile: the tile.
            grad_cells: gradient of `cells`, updated in place.
            grad_origin: gradient of the origin, (B, G, Ns, 2), updated in place.
        """
        interp_y, interp_x = self._interps(tile)
        rows = interp_y.interpolate(windows)  # rows of queries, columns of cells
        interpolated = self._join_rows(rows)
        grad_y, grad_x = narrow_dims(grad_origin, tile.batch, tile.groups, tile.keys).unbind(-1)
        derivative = interp_x.derivative(interpolated)
        grad = grad.view(derivative.shape)
        grad_x += derivative.mul_(grad).flatten(4).sum((2, 4))
        grad = interp_x.backward(grad, interpolated).view(rows.shape)
        grad_y += interp_y.derivative(windows).mul_(grad).sum((2, 4, 5))
        self._scatter_add_windows(grad_cells, interp_y.backward(grad, windows), tile)

    def unpad(self, cells: Tensor) -> Tensor:
        """Return the part of a tensor like `cells` that belongs to the table."""
        rows, columns = self.interior
        return cells.view(self.shape)[:, rows, columns]

    def _scatter_add_windows(self, cells: Tensor, windows: Tensor, tile: Tile) -> None:
        """Add windows to the cells that they were gathered from."""
        rows, columns = (torch.arange(length, device=cells.device) for length in windows.shape[4:])
        offsets = self._corners(tile, self.shape[2], 1)[..., None, None] + (rows[:, None] * self.shape[2] + columns)
        tables = narrow_dims(cells.view(*self.head_index.shape[:2], -1), tile.groups, tile.group_heads)
        # One image at a time: offsets (G, …), shared by the heads of a group, and cells (G, heads/G, …).
        for index, values in zip(offsets.flatten(2), windows.flatten(3), strict=True):
            tables.scatter_add_(2, index[:, None].expand_as(values), values)

    def _interps(self, tile: Tile) -> tuple[_AxisInterp, _AxisInterp]:
        y, x = (narrow_dims(each, tile.batch, tile.groups, slice(0, 1), tile.keys) for each in self.fractions)
        rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        interp_y = _AxisInterp(self.row_axis, y, tile.rows, rows)
        if self.column_axis.taps == 2:
            return interp_y, _AxisInterp(self.column_axis, x[..., 0], tile.columns, rows * self.pitch(tile) - 1)
        return interp_y, _AxisInterp(self.column_axis, x, tile.columns, columns)

    def _join_rows(self, rows: Tensor) -> Tensor:
        """Join the rows into one axis if the step is 1."""
        return rows.flatten(4) if self.column_axis.taps == 2 else rows

    def _corners(self, tile: Tile, row_stride: int, column_stride: int) -> Tensor:
        """Return the offset of the first cell of each window in a head's table with these strides, (B, G, Ns)."""
        row, column = (narrow_dims(each, tile.batch, tile.groups, tile.keys) for each in self.corners)
        first = (
            self.row_axis.first_cell[tile.rows.start] * row_stride
            + self.column_axis.first_cell[tile.columns.start] * column_stride
        )
        return (row * row_stride + first).add_(column, alpha=column_stride)
