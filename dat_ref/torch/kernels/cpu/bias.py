"""The bias of one key for a tile of queries, and its gradients.

Query (i, j) reads the table at (y + i·step_y, x + j·step_x), bilinear, with zeros outside. So a key's bias over a
row of queries blends windows of two rows of the table, and these advance together with the query: nothing is
gathered, and windows are loaded as vectors.

- ``UNIT``, a step of 1: all queries of a row stand equally far to the right of a cell. Two windows.
- ``NEAR_UNIT``, a step a little below 1 (the 2022 geometry has (W-1)/W): that distance falls from query to query,
  f[j] = f[0] - j (1 - step), but stays within (-1, 1). Three windows, with hat weights max(0, -f), 1 - |f|, max(0, f).
- ``GENERAL``, any other step: entry by entry.

On the lattice the derivative is the one to the right. The table is padded with zeros, so that windows which lie partly
or wholly outside need no special case.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import float64

from .tiles import ROW, copy_rows
from .vectors import (
    NARROW,
    compiled,
    filled,
    keep_lanes,
    lane_numbers,
    lane_sum,
    load,
    maximum,
    store,
    where_not_negative,
)

UNIT, NEAR_UNIT, GENERAL = 0, 1, 2


class Tile(NamedTuple):
    """Queries [row, row + rows) × [column, column + columns) of the map: whole rows of it, or a part of one row."""

    row: int
    column: int
    rows: int
    columns: int


class Step(NamedTuple):
    """Cells of the table from one query to the next."""

    kind: int  # of the step in x: UNIT, NEAR_UNIT or GENERAL; UNIT only if y is 1 as well
    y: float
    x: float


class Table(NamedTuple):
    """A table (rows, columns) amid zeros: cell (0, 0) stands at `origin` of `cells`, rows are `stride` apart."""

    cells: Any
    origin: int
    stride: int
    rows: int
    columns: int


# ------------------------------------------------------------------------------------------------ the padded table


def padding(tile_rows: int, tile_columns: int) -> tuple[int, int, int]:
    """Return how many rows of zeros go above and below a table, and how many columns before and behind it.

    Windows begin up to three cells before their tile and end up to a vector and two cells behind it.
    """
    return tile_rows + 2, tile_columns + 4, tile_columns + 2 * NARROW


@compiled
def fill_table(table: Table, values: Any, at: int, factor: float) -> None:
    """Set the cells to factor · values, the zeros around them included."""
    table.cells[:] = 0
    copy_rows(table.cells, table.origin, table.stride, values, at, table.columns, table.rows, table.columns, factor)


# ------------------------------------------------------------------------------------------------ where


@compiled
def split(position: float, lowest: int, highest: int) -> Any:
    """Return the cell at or before a position and the distance from it, after bringing both near the table.

    A NaN position gets a cell that exists, and NaN as the distance.
    """
    if position < lowest:
        position = float64(lowest)
    elif position > highest:
        position = float64(highest)
    elif position != position:
        return 0, position
    cell = math.floor(position)
    return int(cell), position - cell


@compiled
def _first_window(table: Table, y: float, x: float, tile: Tile) -> Any:
    """Return where a tile's windows begin, and the distances down and right, for steps of 1 in y and about 1 in x."""
    top, down = split(y, -tile.rows - 1, table.rows)
    left, right = split(x, -tile.columns - 1, table.columns)
    return table.origin + top * table.stride + left, down, right


@compiled
def _row_of(table: Table, y: float) -> Any:
    """Return where the row before a position begins, and the distance down; far outside, both rows are zeros."""
    top, down = split(y, -2, table.rows)
    return table.origin + top * table.stride, down


# ------------------------------------------------------------------------------------------------ the bias


@compiled
def write_bias(scores: Any, table: Table, base: Any, at: int, count: int, tile: Tile, step: Step) -> None:
    """scores[n, lane] = the bias of key n for each query of the tile, n < count; base[at:] holds the keys' (y, x)."""
    for n in range(count):
        y = float64(base[at + 2 * n]) + tile.row * step.y
        x = float64(base[at + 2 * n + 1]) + tile.column * step.x
        if step.kind == UNIT:
            _write_unit(scores, n * ROW, table, y, x, tile)
        elif step.kind == NEAR_UNIT:
            _write_near_unit(scores, n * ROW, table, y, x, tile, step)
        else:
            _write_general(scores, n * ROW, table, y, x, tile, step)


@compiled
def _last_vector(columns: int) -> int:
    return (columns - 1) // NARROW * NARROW


@compiled
def _write_unit(scores: Any, at: int, table: Table, y: float, x: float, tile: Tile) -> None:
    first, down, right = _first_window(table, y, x, tile)
    zero = filled(table.cells[0], NARROW)
    # The last vector of a row may run into the next row, which is written later: columns backwards, rows forwards.
    for column in range(_last_vector(tile.columns), -1, -NARROW):
        window = first + column
        upper = load(table.cells, window, zero) * (1 - right) + load(table.cells, window + 1, zero) * right
        for i in range(tile.rows):
            window += table.stride
            lower = load(table.cells, window, zero) * (1 - right) + load(table.cells, window + 1, zero) * right
            store(scores, at + i * tile.columns + column, upper * (1 - down) + lower * down)
            upper = lower


@compiled
def _write_near_unit(scores: Any, at: int, table: Table, y: float, x: float, tile: Tile, step: Step) -> None:
    left, right = split(x, -tile.columns - 1, table.columns)
    like = filled(table.cells[0], NARROW)
    zero = like - like
    for column in range(_last_vector(tile.columns), -1, -NARROW):
        f = right - (lane_numbers(zero) + column) * (1 - step.x)
        hats = maximum(zero, zero - f), maximum(zero, f)
        for i in range(tile.rows):
            row, down = _row_of(table, y + i * step.y)
            window = row + left + column
            upper = _read_hats(table, window, hats)
            lower = _read_hats(table, window + table.stride, hats)
            store(scores, at + i * tile.columns + column, upper * (1 - down) + lower * down)


@compiled
def _read_hats(table: Table, window: int, hats: Any) -> Any:
    short, far = hats
    middle = 1 - short - far
    before, here, after = (
        load(table.cells, window - 1, short),
        load(table.cells, window, short),
        load(table.cells, window + 1, short),
    )
    return before * short + here * middle + after * far


@compiled
def _write_general(scores: Any, at: int, table: Table, y: float, x: float, tile: Tile, step: Step) -> None:
    for i in range(tile.rows):
        row, down = _row_of(table, y + i * step.y)
        for j in range(tile.columns):
            left, right = split(x + j * step.x, -2, table.columns)
            cell = row + left
            upper = table.cells[cell] * (1 - right) + table.cells[cell + 1] * right
            cell += table.stride
            lower = table.cells[cell] * (1 - right) + table.cells[cell + 1] * right
            scores[at + i * tile.columns + j] = upper * (1 - down) + lower * down


# ------------------------------------------------------------------------------------------------ its gradients


@compiled
def add_bias_gradients(
    grads: Any, table: Table, grad_table: Table, base: Any, at: int, grad_base: Any, grad_at: int, count: int,
    tile: Tile, step: Step,
) -> None:  # fmt: skip
    """Add the gradients that grads[n, lane], those of the biases, give the table and each key's (y, x).

    Reads up to two entries before the first of `grads`, and throws them away.
    """
    for n in range(count):
        y = float64(base[at + 2 * n]) + tile.row * step.y
        x = float64(base[at + 2 * n + 1]) + tile.column * step.x
        if step.kind == UNIT:
            grad_y, grad_x = _unit_gradients(grads, n * ROW, table, grad_table, y, x, tile)
        elif step.kind == NEAR_UNIT:
            grad_y, grad_x = _near_unit_gradients(grads, n * ROW, table, grad_table, y, x, tile, step)
        else:
            grad_y, grad_x = _general_gradients(grads, n * ROW, table, grad_table, y, x, tile, step)
        grad_base[grad_at + 2 * n] += grad_y
        grad_base[grad_at + 2 * n + 1] += grad_x


@compiled
def _columns_from(grads: Any, row: int, first: int, columns: int, like: Any) -> Any:
    """Return the gradients of columns first, first + 1, … of a row of queries, zero outside the row."""
    return keep_lanes(load(grads, row + first, like), -first, columns - first)


@compiled
def _unit_gradients(grads: Any, at: int, table: Table, grad_table: Table, y: float, x: float, tile: Tile) -> Any:
    first, down, right = _first_window(table, y, x, tile)
    like = filled(table.cells[0], NARROW)
    zero = like - like
    total_y, total_x = zero, zero
    for column in range(0, tile.columns + 1, NARROW):  # the last query reads one column further
        window = first + column
        here, after = load(table.cells, window, zero), load(table.cells, window + 1, zero)
        upper, upper_slope = here * (1 - right) + after * right, after - here
        from_above = zero
        # Each cell is read, added to and written once: it gets what the four queries around it have for it.
        for i in range(tile.rows):
            row = at + i * tile.columns
            grad = _columns_from(grads, row, column, tile.columns, zero)
            across = grad * (1 - right) + _columns_from(grads, row, column - 1, tile.columns, zero) * right
            cells = load(grad_table.cells, window, zero)
            store(grad_table.cells, window, cells + across * (1 - down) + from_above * down)
            from_above = across
            window += table.stride
            here, after = load(table.cells, window, zero), load(table.cells, window + 1, zero)
            lower, lower_slope = here * (1 - right) + after * right, after - here
            total_y += grad * (lower - upper)
            total_x += grad * (upper_slope * (1 - down) + lower_slope * down)
            upper, upper_slope = lower, lower_slope
        store(grad_table.cells, window, load(grad_table.cells, window, zero) + from_above * down)
    return lane_sum(total_y), lane_sum(total_x)


@compiled
def _near_unit_gradients(
    grads: Any, at: int, table: Table, grad_table: Table, y: float, x: float, tile: Tile, step: Step
) -> Any:
    left, right = split(x, -tile.columns - 1, table.columns)
    like = filled(table.cells[0], NARROW)
    zero = like - like
    total_y, total_x = zero, zero
    for column in range(-1, tile.columns + 1, NARROW):  # queries read from one column before to one behind
        f = right - (lane_numbers(zero) + column) * (1 - step.x)
        f_before, f_after = f + (1 - step.x), f - (1 - step.x)
        hats = maximum(zero, zero - f), maximum(zero, f)
        short, middle, far = maximum(zero, zero - f_after), 1 - hats[0] - hats[1], maximum(zero, f_before)
        for i in range(tile.rows):
            start, down = _row_of(table, y + i * step.y)
            window = start + left + column
            row = at + i * tile.columns
            grad = _columns_from(grads, row, column, tile.columns, zero)
            across = (
                _columns_from(grads, row, column + 1, tile.columns, zero) * short
                + grad * middle
                + _columns_from(grads, row, column - 1, tile.columns, zero) * far
            )
            for weight in (1 - down, down):
                store(grad_table.cells, window, load(grad_table.cells, window, zero) + across * weight)
                window += table.stride
            window = start + left + column
            upper = _read_hats(table, window, hats)
            lower = _read_hats(table, window + table.stride, hats)
            total_y += grad * (lower - upper)
            upper_slope = _hat_slope(table, window, f)
            lower_slope = _hat_slope(table, window + table.stride, f)
            total_x += grad * (upper_slope * (1 - down) + lower_slope * down)
    return lane_sum(total_y), lane_sum(total_x)


@compiled
def _hat_slope(table: Table, window: int, f: Any) -> Any:
    here = load(table.cells, window, f)
    return where_not_negative(f, load(table.cells, window + 1, f) - here, here - load(table.cells, window - 1, f))


@compiled
def _general_gradients(
    grads: Any, at: int, table: Table, grad_table: Table, y: float, x: float, tile: Tile, step: Step
) -> Any:
    total_y, total_x = 0.0, 0.0
    for i in range(tile.rows):
        row, down = _row_of(table, y + i * step.y)
        for j in range(tile.columns):
            left, right = split(x + j * step.x, -2, table.columns)
            grad = grads[at + i * tile.columns + j]
            cell = row + left
            here, after = table.cells[cell], table.cells[cell + 1]
            below, across = table.cells[cell + table.stride], table.cells[cell + table.stride + 1]
            total_y += grad * ((below - here) * (1 - right) + (across - after) * right)
            total_x += grad * ((after - here) * (1 - down) + (across - below) * down)
            grad_table.cells[cell] += grad * (1 - down) * (1 - right)
            grad_table.cells[cell + 1] += grad * (1 - down) * right
            grad_table.cells[cell + table.stride] += grad * down * (1 - right)
            grad_table.cells[cell + table.stride + 1] += grad * down * right
    return total_y, total_x
