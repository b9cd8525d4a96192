"""The position bias of some keys and some queries at a time, cut from the table in windows, and its gradient.

All queries of a key read the table on one lattice, base + (i·step_y, j·step_x) (`bias.table_lookup`). So a key reads a
window of the table, which begins at the cell ⌊base⌋, and blends neighbouring cells of it: first rows, then columns.
With r = base - ⌊base⌋ and a step of 1, query i lies between two cells of the window,

    (1 - r) · window[i] + r · window[i + 1].

With another step, i·step = f + e with f whole and e in [0, 1]; then r + e in [0, 2) lies between two of the three cells
f, f + 1 and f + 2, and f is the same for all keys.

On the lattice r is 0, and the derivative the one from the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._precision import wide_dtype
from .bias import TableLookup
from .grid import Size

_SLAB_CELLS = 1 << 22


class Tile(NamedTuple):
    """Some heads of some images, some of their keys, and a rectangle of the queries."""

    batch: slice
    groups: slice
    members: slice  # of each group's heads
    keys: slice
    rows: slice
    columns: slice


def part_of(tensor: Tensor, *slices: slice) -> Tensor:
    """Return tensor[slices]; at no cost along the axes that are taken whole."""
    for dim, some in enumerate(slices):
        length = some.stop - some.start
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, some.start, length)
    return tensor


class _Axis:
    """How the queries of one axis read the cells of a window.

    Args:
        dim: -2 for rows, -1 for columns.
        length: number of queries.
        step: cells from one to the next.
    """

    def __init__(self, dim: int, length: int, step: float, like: Tensor) -> None:
        self.dim = dim
        self.first: Sequence[int] = range(length)  # f
        self.taps, self.skips = 2, False
        if step != 1:
            self._blend_three(length, step, like)
        self.span = self.first[-1] + self.taps + 1

    def _blend_three(self, length: int, step: float, like: Tensor) -> None:
        places = [index * step for index in range(length)]
        # Steps of nearly 1, as (H-1)/H, need not skip a cell: blending then works on slices, not on indices.
        lag = min(math.floor(place - index) for index, place in enumerate(places))
        self.skips = any(place - index - lag > 1 for index, place in enumerate(places))
        self.first = [math.floor(place) for place in places] if self.skips else range(lag, length + lag)
        self.taps = 3
        rest = [place - cell for cell, place in zip(self.first, places, strict=True)]
        self.rest = torch.tensor(rest, dtype=like.dtype, device=like.device)  # e
        self.index = torch.tensor(self.first, device=like.device)

    def reach(self, queries: slice) -> int:
        """Return how many cells some queries read."""
        return self.first[queries.stop - 1] + self.taps - self.first[queries.start]


class _Blend:
    """The blending of one axis in one tile: cells become queries along `dim`.

    Args:
        remainder: r, (B, G, 1, Ns) and 1 along every axis that the cells have besides.
        count: how many queries there are along `dim`.
    """

    def __init__(self, axis: _Axis, remainder: Tensor, queries: slice, count: int) -> None:
        self.axis, self.queries, self.count = axis, queries, count
        self.fraction = remainder  # of the way from the cell before to the one behind
        self.later: Tensor | None = None  # of three taps: whether the last two are read, not the first two
        if axis.taps == 3:
            rest = axis.rest[queries]
            place = remainder + (rest[:, None] if axis.dim == -2 else rest)
            self.later = place >= 1
            self.fraction = place - self.later.to(place.dtype)

    def read(self, cells: Tensor) -> Tensor:
        """Return the values at the queries."""
        taps = self._taps(cells)
        if self.later is None:
            return torch.lerp(taps[0], taps[1], self.fraction)
        return _weighted_sum(taps, self._weights(1 - self.fraction, self.fraction))

    def slope(self, cells: Tensor) -> Tensor:
        """Return the derivative of the values along the axis."""
        taps = self._taps(cells)
        if self.later is None:
            return taps[1] - taps[0]
        one = torch.ones_like(self.fraction)
        return _weighted_sum(taps, self._weights(-one, one))

    def pull_back(self, grad: Tensor, cells: Tensor) -> Tensor:
        """Return the gradient with respect to the cells."""
        dim, count = self.axis.dim, self.count
        weights = self._weights(1 - self.fraction, self.fraction)
        if self.axis.skips:
            total = torch.zeros_like(cells)
            for tap, weight in enumerate(weights):
                total.index_add_(dim, self._index(tap), grad * weight)
            return total
        total = torch.empty_like(cells)
        torch.mul(grad, weights[0], out=total.narrow(dim, 0, count))
        total.narrow(dim, count, cells.shape[dim] - count).zero_()
        for tap, weight in enumerate(weights[1:], start=1):
            total.narrow(dim, tap, count).addcmul_(grad, weight)
        return total

    def _taps(self, cells: Tensor) -> list[Tensor]:
        """Return the cells that each query may read, one after the other."""
        dim, count, taps = self.axis.dim, self.count, range(self.axis.taps)
        if self.axis.skips:
            return [cells.index_select(dim, self._index(tap)) for tap in taps]
        return [cells.narrow(dim, tap, count) for tap in taps]

    def _index(self, tap: int) -> Tensor:
        return self.axis.index[self.queries] - (self.axis.first[self.queries.start] - tap)

    def _weights(self, before: Tensor, behind: Tensor) -> list[Tensor]:
        """Return the factor of each tap, given those of the cells before and behind a query."""
        if self.later is None:
            return [before, behind]
        zero = torch.zeros_like(before)
        return [
            torch.where(self.later, zero, before),
            torch.where(self.later, before, behind),
            torch.where(self.later, behind, zero),
        ]


def _weighted_sum(parts: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(part, weight)
    return total


class TableWindows:
    """A table, and where keys and queries read it.

    Args:
        table: (heads, T_y, T_x).
        lookup: base (B, G, Ns, 2), and the step.
        query_size: (H, W).
    """

    def __init__(self, table: Tensor, lookup: TableLookup, query_size: Size) -> None:
        base, step = lookup
        base = base.to(wide_dtype(table, base))
        self.rows, self.columns = (_Axis(dim, query_size[dim], step[dim], base) for dim in (-2, -1))
        # With so many zeros around it every window lies inside, also that of a key that sees nothing of the table.
        down, across = self.rows.span + 2, self.columns.span + 2
        padded = F.pad(table.to(base.dtype), (across, across, down, down))
        self.inside = (slice(down, down + table.shape[1]), slice(across, across + table.shape[2]))
        self.shape = padded.shape
        self.cells = padded.flatten()

        y, x = base.unbind(-1)
        # Farther out nothing changes any more.
        y, x = y.clamp(-self.rows.span - 1, table.shape[1] + 1), x.clamp(-self.columns.span - 1, table.shape[2] + 1)
        row, column = y.floor(), x.floor()
        # r, (B, G, 1, Ns, 1, 1) on each axis; NaN stays NaN here.
        self.remainders = ((y - row)[:, :, None, :, None, None], (x - column)[:, :, None, :, None, None])
        self.corners = (row.nan_to_num_().long().add_(down), column.nan_to_num_().long().add_(across))  # (B, G, Ns)
        self.heads = torch.arange(table.shape[0], device=base.device).view(base.shape[1], -1, 1)
        self._lay_slabs()

    def _lay_slabs(self) -> None:
        """Choose where windows are cut from: the table, or slabs, in which the rows of a window follow each other.

        There is a slab for each column where a window may begin. To cut from them takes a fraction of the time, but
        they have a multiple of the table's cells; so they must be few, and soon be made up for.
        """
        heads, height, width = self.shape
        self.source, self.strides = self.cells, (height * width, width, 1)  # of head, row, column
        whole = self.columns.reach(slice(0, len(self.columns.first)))
        count = heads * height * (width - whole + 1) * whole
        in_windows = self.corners[0].numel() * self.heads.shape[1] * self.rows.span * whole
        if count <= _SLAB_CELLS and 4 * count <= in_windows:
            slabs = self.cells.view(self.shape).unfold(2, whole, 1).transpose(1, 2).contiguous()
            self.source, self.strides = slabs.flatten(), (slabs.stride(0), slabs.stride(2), slabs.stride(1))

    def pitch(self, tile: Tile) -> int:
        """Return how far apart rows of queries lie in a tile: with a step of 1, a query without meaning ends each row.

        Blending then runs over all rows at once, which makes it several times faster on narrow maps. There is none
        behind the last row.
        """
        return self.columns.reach(tile.columns) if self.columns.taps == 2 else tile.columns.stop - tile.columns.start

    def cut(self, tile: Tile) -> Tensor:
        """Return the windows of a tile: (B, G, members, Ns, rows, columns), in cells."""
        rows, columns = self.rows.reach(tile.rows), self.columns.reach(tile.columns)
        of_head, of_row, of_column = self.strides
        places = self._corners(tile, of_row, of_column)[:, :, None]
        places = places + part_of(self.heads, tile.groups, tile.members) * of_head  # (B, G, members, Ns)
        count = self.source.numel() - (rows - 1) * of_row - (columns - 1)
        windows = self.source.as_strided((count, rows, columns), (1, of_row, 1)).index_select(0, places.flatten())
        return windows.view(*places.shape, rows, columns)

    def blend(self, windows: Tensor, tile: Tile) -> Tensor:
        """Return the bias of a tile: (B, G, members, Ns, queries), see `pitch`."""
        down, across = self._blends(tile)
        return across.read(self._flat(down.read(windows))).flatten(4)

    def pull_back(self, grad: Tensor, windows: Tensor, tile: Tile, grad_cells: Tensor, grad_base: Tensor) -> None:
        """Add what a tile contributes to the gradients.

        Args:
            grad: (B, G, members, Ns, queries), see `pitch`; zero where queries have no meaning.
            windows: what `cut` returned.
            grad_cells: of `cells`.
            grad_base: (B, G, Ns, 2).
        """
        down, across = self._blends(tile)
        rows = down.read(windows)  # of queries, columns of cells
        blended = self._flat(rows)
        of_y, of_x = part_of(grad_base, tile.batch, tile.groups, tile.keys).unbind(-1)
        slope = across.slope(blended)
        grad = grad.view(slope.shape)
        of_x += slope.mul_(grad).flatten(4).sum((2, 4))
        grad = across.pull_back(grad, blended).view(rows.shape)
        of_y += down.slope(windows).mul_(grad).sum((2, 4, 5))
        self._add_windows(grad_cells, down.pull_back(grad, windows), tile)

    def without_margins(self, cells: Tensor) -> Tensor:
        """Return the table in a tensor such as `cells`."""
        down, across = self.inside
        return cells.view(self.shape)[:, down, across]

    def _add_windows(self, cells: Tensor, windows: Tensor, tile: Tile) -> None:
        """Add windows to the places that they were cut from."""
        rows, columns = (torch.arange(length, device=cells.device) for length in windows.shape[4:])
        places = self._corners(tile, self.shape[2], 1)[..., None, None] + (rows[:, None] * self.shape[2] + columns)
        tables = part_of(cells.view(*self.heads.shape[:2], -1), tile.groups, tile.members)
        # An image at a time: places (G, …), which all members share, and cells (G, members, …).
        for index, parts in zip(places.flatten(2), windows.flatten(3), strict=True):
            tables.scatter_add_(2, index[:, None].expand_as(parts), parts)

    def _blends(self, tile: Tile) -> tuple[_Blend, _Blend]:
        y, x = (part_of(each, tile.batch, tile.groups, slice(0, 1), tile.keys) for each in self.remainders)
        rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        down = _Blend(self.rows, y, tile.rows, rows)
        if self.columns.taps == 2:
            return down, _Blend(self.columns, x[..., 0], tile.columns, rows * self.pitch(tile) - 1)
        return down, _Blend(self.columns, x, tile.columns, columns)

    def _flat(self, rows: Tensor) -> Tensor:
        """Lay rows one behind the other, where one step of 1 leads from each place to the next."""
        return rows.flatten(4) if self.columns.taps == 2 else rows

    def _corners(self, tile: Tile, of_row: int, of_column: int) -> Tensor:
        """Return where the windows of a tile begin in a head's table, (B, G, Ns), given its strides."""
        row, column = (part_of(each, tile.batch, tile.groups, tile.keys) for each in self.corners)
        first = self.rows.first[tile.rows.start] * of_row + self.columns.first[tile.columns.start] * of_column
        return (row * of_row + first).add_(column, alpha=of_column)
