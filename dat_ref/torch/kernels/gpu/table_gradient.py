"""The gradient of the bias table, with and without atomic additions.

Every pair of a query and a key adds to the four coefficients (see `lookup`) of the cell in which it reads the table,

    ∂L/∂c₀ += s,    ∂L/∂c₁ += x s,    ∂L/∂c₂ += y s,    ∂L/∂c₃ += x y s,    with s = ∂L/∂logit,

and from those the table's entries get theirs by the transpose of how the coefficients are made of them. A table has few
cells and there are many pairs. Added up atomically they wait for each other, in an order that changes from run to run.

The other way turns the sum around. For a run of keys, so long that it fits a workspace of bounded size, a kernel writes
every s; then each program takes a tile of cells and collects, key by key, what reads them. For one key that is a window
of its row of the workspace, because the cell advances as the query does: one load and a few multiply-adds a pair, no
waiting, and always the same order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lookup import Lookup, keys_of_head

_WORKSPACE_BYTES = 1 << 27
_ROWS, _COLUMNS, _KEYS = 16, 32, 4  # cells of a program, and keys at a time
_NOWHERE = tl.constexpr(1 << 20)
_PROGRAMS = 512  # aimed at; a constant, so that the order of summation does not depend on the device


class AtomicTableGradient:
    """Adds up atomically; `sink` (1, heads, 4, cells) is laid out as `Lookup.cells`, with the empty cells around."""

    def __init__(self, table: Tensor, lookup: Lookup) -> None:
        self.table, self.lookup = table, lookup
        shape = (1, table.shape[0], 4, lookup.rows * lookup.width)
        self.sink = torch.empty(shape, dtype=torch.float32, device=table.device)

    def runs(self) -> list[tuple[int, int]]:
        """Return the runs of keys to go through: one."""
        return [(0, self.lookup.samples)]

    def clear(self) -> None:
        """Begin."""
        self.sink.zero_()

    def collect(self, start: int, stop: int) -> None:
        """Do nothing: what the run gives is added up already."""

    def finish(self) -> Tensor:
        """Return the gradient of the table."""
        height, width = self.table.shape[1:]
        top, left = self.lookup.reach[0] + 1, self.lookup.reach[1] + 1
        of_cells = self.sink[0].unflatten(2, (self.lookup.rows, self.lookup.width))
        return _entries(of_cells[:, :, top : top + height + 1, left : left + width + 1], self.table.dtype)


class CollectedTableGradient:
    """Collects cell by cell; `sink` is the workspace, (B, heads, keys of a run, H·W and some) in the dtype of q.

    A run is a number of whole tiles, and rows are aligned: there is more room than there are pairs.
    """

    def __init__(self, table: Tensor, lookup: Lookup, q: Tensor, query_size: tuple[int, int], tile: int) -> None:
        self.table, self.lookup, self.query_size = table, lookup, query_size
        batch, heads, queries, _ = q.shape
        row = triton.cdiv(queries, 16) * 16
        tiles_that_fit = _WORKSPACE_BYTES // (batch * heads * row * q.element_size() * tile)
        self.longest = min(max(tiles_that_fit, 1), triton.cdiv(lookup.samples, tile)) * tile
        self.sink = torch.empty((batch, heads, self.longest, row), dtype=q.dtype, device=q.device)
        height, width = table.shape[1] + 1, table.shape[2] + 1  # cells that read an entry
        self.tiles = triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)
        segments = triton.cdiv(_PROGRAMS, self.tiles * heads * batch)
        self.segment = max(triton.cdiv(triton.cdiv(self.longest, segments), _KEYS), 4) * _KEYS
        parts = batch * triton.cdiv(self.longest, self.segment)
        self.sums = torch.empty((parts, heads, 4, height, width), dtype=torch.float32, device=q.device)

    def runs(self) -> list[tuple[int, int]]:
        """Return the runs of keys to go through."""
        samples = self.lookup.samples
        return [(start, min(start + self.longest, samples)) for start in range(0, samples, self.longest)]

    def clear(self) -> None:
        """Begin."""
        self.sums.zero_()

    def collect(self, start: int, stop: int) -> None:
        """Add what the workspace holds for keys [start, stop)."""
        lookup = self.lookup
        heads = self.sink.shape[1]
        _collect[(self.tiles, heads, self.sums.shape[0])](
            self.sink,
            self.sums,
            lookup.keys,
            *self.sink.stride()[:3],
            heads,
            heads * self.sink.shape[0] // lookup.keys.shape[0],
            start,
            stop - start,
            self.segment,
            triton.cdiv(self.longest, self.segment),
            *self.query_size,
            *self.sums.shape[3:],
            lookup.keys.shape[2],
            *lookup.reach,
            *lookup.step,
            *(1 / step for step in lookup.step),
            *(_most_readers(step) for step in lookup.step),
            lookup.unit,
            _ROWS,
            _COLUMNS,
            _KEYS,
        )

    def finish(self) -> Tensor:
        """Return the gradient of the table."""
        return _entries(self.sums.sum(0), self.table.dtype)


def _entries(of_cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the table's entries, (heads, T_y, T_x), from that of the cells' coefficients.

    Args:
        of_cells: (heads, 4, T_y + 1, T_x + 1), from the cell before the first entry on.
    """
    c0, c1, c2, c3 = of_cells.unbind(1)
    t11, t10, t01 = c3, c2 - c3, c1 - c3
    t00 = c0 - c1 - t10
    return (t00[:, 1:, 1:] + t01[:, 1:, :-1] + t10[:, :-1, 1:] + t11[:, :-1, :-1]).to(dtype)


def _most_readers(step: float) -> int:
    """Return how many queries of an axis can read the same cell for one key."""
    return 1 if step == 1 else math.floor(1 / step + 1e-3) + 1  # one more where rounding could let it in


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def add_atomically(sink, plane, y, x, s, inside):
    """Add the gradients of a tile of logits to those of the coefficients: `sink` points at c₀ of their cells."""
    right = x * s
    tl.atomic_add(sink, s, mask=inside, sem="relaxed")
    tl.atomic_add(sink + plane, right, mask=inside, sem="relaxed")
    tl.atomic_add(sink + 2 * plane, y * s, mask=inside, sem="relaxed")
    tl.atomic_add(sink + 3 * plane, y * right, mask=inside, sem="relaxed")


_ANY_SIZE = ("heads", "group_heads", "count", "map_height", "map_width", "height", "width", "reach_y", "reach_x")


@triton.jit(do_not_specialize=_ANY_SIZE)
def _collect(
    workspace, sums, keys, sink_batch, sink_head, sink_row, heads, group_heads, start, count, segment, segments,
    map_height, map_width, height, width, pitch, reach_y, reach_x, step_y, step_x, per_cell_y, per_cell_x,
    most_y, most_x,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    h, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b = part // segments
    workspace += b * sink_batch + h * sink_head
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch) + start
    first = (part % segments).to(tl.int32) * segment
    stop = tl.minimum(first + segment, count)

    sum0 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum3 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(first, stop, KEYS):
        n = begin + tl.arange(0, KEYS)
        y = tl.load(keys + pitch + n).to(tl.float32, bitcast=True)
        x = tl.load(keys + 2 * pitch + n).to(tl.float32, bitcast=True)
        # Cells counted from the one before the table's first entry; a key beyond the last has none.
        key_row = tl.where(n < stop, tl.load(keys + 3 * pitch + n) - reach_y - 1, _NOWHERE)
        key_column = tl.load(keys + 4 * pitch + n) - reach_x - 1
        first_i, behind_i = _readers(row, key_row, y, per_cell_y, UNIT)
        first_j, behind_j = _readers(column, key_column, x, per_cell_x, UNIT)
        for nth_y in range(0, most_y):
            i, down, reads_row = _nth_reader(first_i, behind_i, nth_y, row, key_row, y, step_y, map_height, UNIT)
            if tl.max(reads_row.to(tl.int32)) > 0:
                for nth_x in range(0, most_x):
                    j, right, reads_column = _nth_reader(
                        first_j, behind_j, nth_x, column, key_column, x, step_x, map_width, UNIT
                    )
                    if tl.max(reads_column.to(tl.int32)) > 0:
                        window = (n[:, None] * sink_row + i * map_width)[:, :, None] + j[:, None, :]
                        inside = reads_row[:, :, None] & reads_column[:, None, :]
                        s = tl.load(workspace + window, mask=inside, other=0.0).to(tl.float32)
                        right_s = right[:, None, :] * s
                        sum0 += tl.sum(s, 0)
                        sum1 += tl.sum(right_s, 0)
                        sum2 += tl.sum(down[:, :, None] * s, 0)
                        sum3 += tl.sum(down[:, :, None] * right_s, 0)

    plane = height * width
    sums += (part * heads + h) * 4 * plane + row[:, None] * width + column[None, :]
    owned = (row < height)[:, None] & (column < width)[None, :]
    tl.store(sums, tl.load(sums, mask=owned) + sum0, mask=owned)
    tl.store(sums + plane, tl.load(sums + plane, mask=owned) + sum1, mask=owned)
    tl.store(sums + 2 * plane, tl.load(sums + 2 * plane, mask=owned) + sum2, mask=owned)
    tl.store(sums + 3 * plane, tl.load(sums + 3 * plane, mask=owned) + sum3, mask=owned)


@triton.jit
def _readers(line, start, place, per_cell, UNIT: tl.constexpr):
    """Return the first query of an axis that reads each line of cells for each key, and the first behind those.

    Rounding may count a query that reads at the edge of a line among those of its neighbour. That does no harm, for the
    weights of a bilinear read do not jump there; what matters is that each query is counted once.

    Args:
        line: (lines,) rows or columns of cells.
        start, place: (KEYS,) the line in which query 0 reads a key, and where in it.
        per_cell: queries a cell, the inverse of the step.
    """
    along = line[None, :] - start[:, None]
    if UNIT:
        return along, along + 1
    else:
        place = tl.where(place == place, place, 0.0)[:, None]
        first = tl.ceil((along.to(tl.float32) - place) * per_cell).to(tl.int32)
        behind = tl.ceil(((along + 1).to(tl.float32) - place) * per_cell).to(tl.int32)
        return first, behind


@triton.jit
def _nth_reader(first, behind, nth, line, start, place, step, length, UNIT: tl.constexpr):
    """Return the nth query that reads each line of cells for each key, where in them it does, and if there is one."""
    query = first + nth
    exists = (query < behind) & (query >= 0) & (query < length)
    if UNIT:
        return query, place[:, None], exists
    else:
        along = (line[None, :] - start[:, None]).to(tl.float32)
        return query, place[:, None] + (query.to(tl.float32) * step - along), exists
