"""Gradient of the bias table, with and without atomic additions.

Every pair of a query and a key contributes to the four coefficients (see `lookup`) of its cell in the table,

    ∂L/∂c₀ += s,    ∂L/∂c₁ += x s,    ∂L/∂c₂ += y s,    ∂L/∂c₃ += x y s,    with s = ∂L/∂logit.

The coefficients are linear in the table's entries, so the transposed map gives the gradient of the entries. A table
has few cells, and there are many pairs. Atomic additions to the same cell are therefore serialized, in an order that
changes from run to run.

The deterministic alternative sums by cell. A kernel writes s of all queries for a run of keys, whose length is limited
by the size of the workspace. Then each program sums the contributions to a tile of cells, key by key. The queries that
read a tile for one key form a window of the key's row in the workspace. So each pair costs one load and a few
multiply-adds, without serialization and in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lookup import Lookup, keys_of_head

_WORKSPACE_BYTES = 1 << 27
_ROWS, _COLUMNS, _KEYS = 16, 32, 4  # rows and columns of cells per program, and keys per iteration
_NOWHERE = tl.constexpr(1 << 20)
_TARGET_PROGRAMS = 512  # constant, so that the order of summation does not depend on the device


class AtomicTableGradient:
    """Sum by atomic additions; `buffer` (1, heads, 4, cells) has the layout of `Lookup.cells`, with empty border."""

    def __init__(self, table: Tensor, lookup: Lookup) -> None:
        self.table, self.lookup = table, lookup
        shape = (1, table.shape[0], 4, lookup.rows * lookup.width)
        self.buffer = torch.empty(shape, dtype=torch.float32, device=table.device)

    def key_runs(self) -> list[tuple[int, int]]:
        """Return the runs of keys, [start, stop): one run of all keys."""
        return [(0, self.lookup.samples)]

    def reset(self) -> None:
        """Set the sums to zero."""
        self.buffer.zero_()

    def collect(self, start: int, stop: int) -> None:
        """Do nothing: the kernel has already added the contributions of the run."""

    def finish(self) -> Tensor:
        """Return the gradient of the table."""
        height, width = self.table.shape[1:]
        top, left = self.lookup.extent[0] + 1, self.lookup.extent[1] + 1
        grad_cells = self.buffer[0].unflatten(2, (self.lookup.rows, self.lookup.width))
        return _entry_gradients(grad_cells[:, :, top : top + height + 1, left : left + width + 1], self.table.dtype)


class DeterministicTableGradient:
    """Sum by cell; `buffer` is the workspace, (B, heads, keys of a run, H·W and padding) in the dtype of q.

    A run consists of whole tiles of keys, and rows are padded for alignment.
    """

    def __init__(self, table: Tensor, lookup: Lookup, q: Tensor, query_size: tuple[int, int], block_n: int) -> None:
        self.table, self.lookup, self.query_size = table, lookup, query_size
        batch, heads, queries, _ = q.shape
        row_length = triton.cdiv(queries, 16) * 16
        tiles_per_run = _WORKSPACE_BYTES // (batch * heads * row_length * q.element_size() * block_n)
        self.run_length = min(max(tiles_per_run, 1), triton.cdiv(lookup.samples, block_n)) * block_n
        self.buffer = torch.empty((batch, heads, self.run_length, row_length), dtype=q.dtype, device=q.device)
        height, width = table.shape[1] + 1, table.shape[2] + 1  # cells with at least one entry
        self.tiles = triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)
        segments = triton.cdiv(_TARGET_PROGRAMS, self.tiles * heads * batch)
        self.segment = max(triton.cdiv(triton.cdiv(self.run_length, segments), _KEYS), 4) * _KEYS
        num_partials = batch * triton.cdiv(self.run_length, self.segment)
        self.partials = torch.empty((num_partials, heads, 4, height, width), dtype=torch.float32, device=q.device)

    def key_runs(self) -> list[tuple[int, int]]:
        """Return the runs of keys, [start, stop)."""
        samples = self.lookup.samples
        return [(start, min(start + self.run_length, samples)) for start in range(0, samples, self.run_length)]

    def reset(self) -> None:
        """Set the sums to zero."""
        self.partials.zero_()

    def collect(self, start: int, stop: int) -> None:
        """Add the contributions of keys [start, stop) in the workspace."""
        lookup = self.lookup
        heads = self.buffer.shape[1]
        _collect[(self.tiles, heads, self.partials.shape[0])](
            self.buffer,
            self.partials,
            lookup.keys,
            *self.buffer.stride()[:3],
            heads,
            heads * self.buffer.shape[0] // lookup.keys.shape[0],
            start,
            stop - start,
            self.segment,
            triton.cdiv(self.run_length, self.segment),
            *self.query_size,
            *self.partials.shape[3:],
            lookup.keys.shape[2],
            *lookup.extent,
            *lookup.step,
            *(1 / step for step in lookup.step),
            *(_max_readers(step) for step in lookup.step),
            lookup.unit,
            _ROWS,
            _COLUMNS,
            _KEYS,
        )

    def finish(self) -> Tensor:
        """Return the gradient of the table."""
        return _entry_gradients(self.partials.sum(0), self.table.dtype)


def _entry_gradients(grad_cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the table's entries, (heads, T_y, T_x), from the gradient of the cells' coefficients.

    Args:
        grad_cells: (heads, 4, T_y + 1, T_x + 1), starting at the cell before the first entry.
        dtype: dtype of the result.
    """
    c0, c1, c2, c3 = grad_cells.unbind(1)
    t11, t10, t01 = c3, c2 - c3, c1 - c3
    t00 = c0 - c1 - t10
    return (t00[:, 1:, 1:] + t01[:, 1:, :-1] + t10[:, :-1, 1:] + t11[:, :-1, :-1]).to(dtype)


def _max_readers(step: float) -> int:
    """Return the maximum number of queries of an axis that read the same cell for one key."""
    return 1 if step == 1 else math.floor(1 / step + 1e-3) + 1  # 1e-3 allows for rounding


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def add_atomically(ptr, plane, y, x, s):
    """Add the logit gradients s of a tile to the gradients of the coefficients. `ptr` points to c₀ of their cells.

    Without a mask, which would cost registers and a branch per addition: padding queries and keys have s = 0, and the
    cells of other queries and keys, or empty ones.
    """
    x_s = x * s
    tl.atomic_add(ptr, s, sem="relaxed")
    tl.atomic_add(ptr + plane, x_s, sem="relaxed")
    tl.atomic_add(ptr + 2 * plane, y * s, sem="relaxed")
    tl.atomic_add(ptr + 3 * plane, y * x_s, sem="relaxed")


_NOT_SPECIALIZED = (
    "heads",
    "group_heads",
    "count",
    "map_height",
    "map_width",
    "height",
    "width",
    "extent_y",
    "extent_x",
)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _collect(
    workspace, partials, keys, buffer_batch, buffer_head, buffer_row, heads, group_heads, start, count, segment,
    segments, map_height, map_width, height, width, pitch, extent_y, extent_x, step_y, step_x, queries_per_cell_y,
    queries_per_cell_x, max_readers_y, max_readers_x,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    h, partial = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b = partial // segments
    workspace += b * buffer_batch + h * buffer_head
    keys = keys_of_head(keys, b, h, heads, group_heads, pitch) + start
    first = (partial % segments).to(tl.int32) * segment
    stop = tl.minimum(first + segment, count)

    sum0 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum3 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start_n in range(first, stop, KEYS):
        offs_n = start_n + tl.arange(0, KEYS)
        y = tl.load(keys + pitch + offs_n).to(tl.float32, bitcast=True)
        x = tl.load(keys + 2 * pitch + offs_n).to(tl.float32, bitcast=True)
        # Cell indices start at the cell before the table's first entry. Padding keys have no cell.
        key_row = tl.where(offs_n < stop, tl.load(keys + 3 * pitch + offs_n) - extent_y - 1, _NOWHERE)
        key_column = tl.load(keys + 4 * pitch + offs_n) - extent_x - 1
        first_i, stop_i = _readers(row, key_row, y, queries_per_cell_y, UNIT)
        first_j, stop_j = _readers(column, key_column, x, queries_per_cell_x, UNIT)
        for nth_y in range(0, max_readers_y):
            i, frac_y, reads_row = _nth_reader(first_i, stop_i, nth_y, row, key_row, y, step_y, map_height, UNIT)
            if tl.max(reads_row.to(tl.int32)) > 0:
                for nth_x in range(0, max_readers_x):
                    j, frac_x, reads_column = _nth_reader(
                        first_j, stop_j, nth_x, column, key_column, x, step_x, map_width, UNIT
                    )
                    if tl.max(reads_column.to(tl.int32)) > 0:
                        window = (offs_n[:, None] * buffer_row + i * map_width)[:, :, None] + j[:, None, :]
                        mask = reads_row[:, :, None] & reads_column[:, None, :]
                        s = tl.load(workspace + window, mask=mask, other=0.0).to(tl.float32)
                        x_s = frac_x[:, None, :] * s
                        sum0 += tl.sum(s, 0)
                        sum1 += tl.sum(x_s, 0)
                        sum2 += tl.sum(frac_y[:, :, None] * s, 0)
                        sum3 += tl.sum(frac_y[:, :, None] * x_s, 0)

    plane = height * width
    partials += (partial * heads + h) * 4 * plane + row[:, None] * width + column[None, :]
    in_table = (row < height)[:, None] & (column < width)[None, :]
    tl.store(partials, tl.load(partials, mask=in_table) + sum0, mask=in_table)
    tl.store(partials + plane, tl.load(partials + plane, mask=in_table) + sum1, mask=in_table)
    tl.store(partials + 2 * plane, tl.load(partials + 2 * plane, mask=in_table) + sum2, mask=in_table)
    tl.store(partials + 3 * plane, tl.load(partials + 3 * plane, mask=in_table) + sum3, mask=in_table)


@triton.jit
def _readers(cells, key_cell, fraction, queries_per_cell, UNIT: tl.constexpr):
    """Return the range [first, stop) of queries of one axis that read each line of cells for each key.

    Rounding may assign a query at the edge of a line to the neighboring line. This is harmless, because bilinear
    interpolation is continuous there. Each query is counted exactly once.

    Args:
        cells: (lines,) rows or columns of cells.
        key_cell, fraction: (KEYS,), line of cells of query 0 for each key, and its position in the line.
        queries_per_cell: queries per cell, the inverse of the step.
        UNIT: whether the step is 1.
    """
    distance = cells[None, :] - key_cell[:, None]
    if UNIT:
        return distance, distance + 1
    else:
        fraction = tl.where(fraction == fraction, fraction, 0.0)[:, None]
        first = tl.ceil((distance.to(tl.float32) - fraction) * queries_per_cell).to(tl.int32)
        stop = tl.ceil(((distance + 1).to(tl.float32) - fraction) * queries_per_cell).to(tl.int32)
        return first, stop


@triton.jit
def _nth_reader(first, stop, nth, cells, key_cell, fraction, step, length, UNIT: tl.constexpr):
    """Return the nth query that reads each line of cells for each key, its position in it, and whether it exists."""
    query = first + nth
    exists = (query < stop) & (query >= 0) & (query < length)
    if UNIT:
        return query, fraction[:, None], exists
    else:
        distance = (cells[None, :] - key_cell[:, None]).to(tl.float32)
        return query, fraction[:, None] + (query.to(tl.float32) * step - distance), exists
