"""Bias of one key for a tile of queries, and its gradients.

Query (i, j) reads the table at (y + i·step_y, x + j·step_x) by bilinear interpolation, with zeros outside. The bias of
one key for a row of queries is a weighted sum of windows of two table rows. The windows advance together with the
query. So they are loaded as vectors, without a gather.

- ``UNIT``, step 1: all queries of a row have the same fraction f. Two windows.
- ``NEAR_UNIT``, step slightly below 1 ((W-1)/W in the 2022 geometry): the fraction decreases from query to query,
  f[j] = f[0] - j (1 - step), and stays in (-1, 1). Three windows, with hat weights max(0, -f), 1 - |f|, max(0, f).
- ``GENERAL``, any other step: scalar loads.

At integer positions the derivative is the right-hand one. The table is padded with zeros, so windows that are partly or
completely outside need no special case.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import float64

from .tiles import TILE_STRIDE, copy_rows
from .vectors import (
    NARROW,
    broadcast,
    compiled,
    lane_indices,
    lane_sum,
    load,
    mask_lanes,
    maximum,
    store,
    where_not_negative,
)

UNIT, NEAR_UNIT, GENERAL = 0, 1, 2


class Tile(NamedTuple):
    """Queries [row, row + rows) × [column, column + columns) of the map: either whole rows or a part of one row."""

    row: int
    column: int
    rows: int
    columns: int


class Step(NamedTuple):
    """Table cells between neighboring queries."""

    kind: int  # UNIT if y = x = 1; otherwise NEAR_UNIT or GENERAL, which depends on x
    y: float
    x: float


class Table(NamedTuple):
    """A bias table (rows, columns) inside a border of zeros."""

    cells: Any  # flat array of the padded table
    start: int  # index of cell (0, 0)
    stride: int  # elements between neighboring rows
    rows: int
    columns: int


# ------------------------------------------------------------------------------------------------ the padded table


def table_padding(tile_rows: int, tile_columns: int) -> tuple[int, int, int]:
    """Return the zero padding of a table: rows above and below (one number), columns on the left, on the right.

    Windows start up to three cells before their tile. They end up to one vector and two cells after it.
    """
    return tile_rows + 2, tile_columns + 4, tile_columns + 2 * NARROW


@compiled
def fill_table(table: Table, values: Any, source_start: int, factor: float) -> None:
    """Write factor · values to the cells and zeros to the border."""
    table.cells[:] = 0
    copy_rows(
        table.cells, table.start, table.stride, values, source_start, table.columns, table.rows, table.columns, factor
    )


# ------------------------------------------------------------------------------------------------ positions


@compiled
def floor_and_fraction(position: float, lowest: int, highest: int) -> Any:
    """Return floor and fraction of a position clamped to [lowest, highest].

    A NaN position gives the valid cell 0 and the fraction NaN.
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
    """Return the index of a tile's first window and the fractions in y and x, for the UNIT step."""
    top, frac_y = floor_and_fraction(y, -tile.rows - 1, table.rows)
    left, frac_x = floor_and_fraction(x, -tile.columns - 1, table.columns)
    return table.start + top * table.stride + left, frac_y, frac_x


@compiled
def _row_start(table: Table, y: float) -> Any:
    """Return the index of the table row at or above y, and the fraction in y. Far outside, both rows are zeros."""
    top, frac_y = floor_and_fraction(y, -2, table.rows)
    return table.start + top * table.stride, frac_y


# ------------------------------------------------------------------------------------------------ the bias


@compiled
def write_bias(logits: Any, table: Table, origin: Any, start: int, num_keys: int, tile: Tile, step: Step) -> None:
    """Write logits[n, lane] = bias of key n for the query in this lane, for n < num_keys.

    origin[start + 2·n] and the next element are (y, x) of key n.
    """
    for n in range(num_keys):
        y = float64(origin[start + 2 * n]) + tile.row * step.y
        x = float64(origin[start + 2 * n + 1]) + tile.column * step.x
        if step.kind == UNIT:
            _write_unit(logits, n * TILE_STRIDE, table, y, x, tile)
        elif step.kind == NEAR_UNIT:
            _write_near_unit(logits, n * TILE_STRIDE, table, y, x, tile, step)
        else:
            _write_general(logits, n * TILE_STRIDE, table, y, x, tile, step)


@compiled
def _last_vector(columns: int) -> int:
    return (columns - 1) // NARROW * NARROW


@compiled
def _write_unit(logits: Any, start: int, table: Table, y: float, x: float, tile: Tile) -> None:
    first, frac_y, frac_x = _first_window(table, y, x, tile)
    zero = broadcast(table.cells[0], NARROW)
    # The last vector of a row may overwrite the start of the next row. So iterate columns backward and rows forward:
    # the correct values are written last.
    for column in range(_last_vector(tile.columns), -1, -NARROW):
        window = first + column
        upper = load(table.cells, window, zero) * (1 - frac_x) + load(table.cells, window + 1, zero) * frac_x
        for i in range(tile.rows):
            window += table.stride
            lower = load(table.cells, window, zero) * (1 - frac_x) + load(table.cells, window + 1, zero) * frac_x
            store(logits, start + i * tile.columns + column, upper * (1 - frac_y) + lower * frac_y)
            upper = lower


@compiled
def _write_near_unit(logits: Any, start: int, table: Table, y: float, x: float, tile: Tile, step: Step) -> None:
    left, frac_x = floor_and_fraction(x, -tile.columns - 1, table.columns)
    like = broadcast(table.cells[0], NARROW)
    zero = like - like
    for column in range(_last_vector(tile.columns), -1, -NARROW):
        f = frac_x - (lane_indices(zero) + column) * (1 - step.x)
        hats = maximum(zero, zero - f), maximum(zero, f)
        for i in range(tile.rows):
            row, frac_y = _row_start(table, y + i * step.y)
            window = row + left + column
            upper = _read_hats(table, window, hats)
            lower = _read_hats(table, window + table.stride, hats)
            store(logits, start + i * tile.columns + column, upper * (1 - frac_y) + lower * frac_y)


@compiled
def _read_hats(table: Table, window: int, hats: Any) -> Any:
    w_before, w_after = hats
    w_here = 1 - w_before - w_after
    before, here, after = (
        load(table.cells, window - 1, w_before),
        load(table.cells, window, w_before),
        load(table.cells, window + 1, w_before),
    )
    return before * w_before + here * w_here + after * w_after


@compiled
def _write_general(logits: Any, start: int, table: Table, y: float, x: float, tile: Tile, step: Step) -> None:
    for i in range(tile.rows):
        row, frac_y = _row_start(table, y + i * step.y)
        for j in range(tile.columns):
            left, frac_x = floor_and_fraction(x + j * step.x, -2, table.columns)
            cell = row + left
            upper = table.cells[cell] * (1 - frac_x) + table.cells[cell + 1] * frac_x
            cell += table.stride
            lower = table.cells[cell] * (1 - frac_x) + table.cells[cell + 1] * frac_x
            logits[start + i * tile.columns + j] = upper * (1 - frac_y) + lower * frac_y


# ------------------------------------------------------------------------------------------------ gradients of the bias


@compiled
def add_bias_gradients(
    grad_bias: Any, table: Table, grad_table: Table, origin: Any, start: int, grad_origin: Any, grad_start: int,
    num_keys: int, tile: Tile, step: Step,
) -> None:  # fmt: skip
    """Accumulate the gradients of the table and of each key's (y, x), given grad_bias[n, lane].

    The loads start up to two elements before `grad_bias`; those elements are masked.
    """
    for n in range(num_keys):
        y = float64(origin[start + 2 * n]) + tile.row * step.y
        x = float64(origin[start + 2 * n + 1]) + tile.column * step.x
        if step.kind == UNIT:
            grad_y, grad_x = _unit_gradients(grad_bias, n * TILE_STRIDE, table, grad_table, y, x, tile)
        elif step.kind == NEAR_UNIT:
            grad_y, grad_x = _near_unit_gradients(grad_bias, n * TILE_STRIDE, table, grad_table, y, x, tile, step)
        else:
            grad_y, grad_x = _general_gradients(grad_bias, n * TILE_STRIDE, table, grad_table, y, x, tile, step)
        grad_origin[grad_start + 2 * n] += grad_y
        grad_origin[grad_start + 2 * n + 1] += grad_x


@compiled
def _columns_from(grad_bias: Any, row: int, first: int, columns: int, like: Any) -> Any:
    """Return the gradients of columns first, first + 1, … of a row of queries, with zeros outside the row."""
    return mask_lanes(load(grad_bias, row + first, like), -first, columns - first)


@compiled
def _unit_gradients(grad_bias: Any, start: int, table: Table, grad_table: Table, y: float, x: float, tile: Tile) -> Any:
    first, frac_y, frac_x = _first_window(table, y, x, tile)
    like = broadcast(table.cells[0], NARROW)
    zero = like - like
    total_y, total_x = zero, zero
    for column in range(0, tile.columns + 1, NARROW):  # the last query reads one column further
        window = first + column
        here, after = load(table.cells, window, zero), load(table.cells, window + 1, zero)
        upper, upper_slope = here * (1 - frac_x) + after * frac_x, after - here
        carry = zero
        # Each cell is loaded and stored once, with the contributions of all four queries around it.
        for i in range(tile.rows):
            row = start + i * tile.columns
            grad = _columns_from(grad_bias, row, column, tile.columns, zero)
            row_grad = grad * (1 - frac_x) + _columns_from(grad_bias, row, column - 1, tile.columns, zero) * frac_x
            cells = load(grad_table.cells, window, zero)
            store(grad_table.cells, window, cells + row_grad * (1 - frac_y) + carry * frac_y)
            carry = row_grad
            window += table.stride
            here, after = load(table.cells, window, zero), load(table.cells, window + 1, zero)
            lower, lower_slope = here * (1 - frac_x) + after * frac_x, after - here
            total_y += grad * (lower - upper)
            total_x += grad * (upper_slope * (1 - frac_y) + lower_slope * frac_y)
            upper, upper_slope = lower, lower_slope
        store(grad_table.cells, window, load(grad_table.cells, window, zero) + carry * frac_y)
    return lane_sum(total_y), lane_sum(total_x)


@compiled
def _near_unit_gradients(
    grad_bias: Any, start: int, table: Table, grad_table: Table, y: float, x: float, tile: Tile, step: Step
) -> Any:
    left, frac_x = floor_and_fraction(x, -tile.columns - 1, table.columns)
    like = broadcast(table.cells[0], NARROW)
    zero = like - like
    total_y, total_x = zero, zero
    for column in range(-1, tile.columns + 1, NARROW):  # queries read from one column before to one after
        f = frac_x - (lane_indices(zero) + column) * (1 - step.x)
        f_before, f_after = f + (1 - step.x), f - (1 - step.x)
        hats = maximum(zero, zero - f), maximum(zero, f)
        w_next, w_here, w_previous = maximum(zero, zero - f_after), 1 - hats[0] - hats[1], maximum(zero, f_before)
        for i in range(tile.rows):
            row_start, frac_y = _row_start(table, y + i * step.y)
            window = row_start + left + column
            row = start + i * tile.columns
            grad = _columns_from(grad_bias, row, column, tile.columns, zero)
            row_grad = (
                _columns_from(grad_bias, row, column + 1, tile.columns, zero) * w_next
                + grad * w_here
                + _columns_from(grad_bias, row, column - 1, tile.columns, zero) * w_previous
            )
            for weight in (1 - frac_y, frac_y):
                store(grad_table.cells, window, load(grad_table.cells, window, zero) + row_grad * weight)
                window += table.stride
            window = row_start + left + column
            upper = _read_hats(table, window, hats)
            lower = _read_hats(table, window + table.stride, hats)
            total_y += grad * (lower - upper)
            upper_slope = _hat_slope(table, window, f)
            lower_slope = _hat_slope(table, window + table.stride, f)
            total_x += grad * (upper_slope * (1 - frac_y) + lower_slope * frac_y)
    return lane_sum(total_y), lane_sum(total_x)


@compiled
def _hat_slope(table: Table, window: int, f: Any) -> Any:
    here = load(table.cells, window, f)
    return where_not_negative(f, load(table.cells, window + 1, f) - here, here - load(table.cells, window - 1, f))


@compiled
def _general_gradients(
    grad_bias: Any, start: int, table: Table, grad_table: Table, y: float, x: float, tile: Tile, step: Step
) -> Any:
    total_y, total_x = 0.0, 0.0
    for i in range(tile.rows):
        row, frac_y = _row_start(table, y + i * step.y)
        for j in range(tile.columns):
            left, frac_x = floor_and_fraction(x + j * step.x, -2, table.columns)
            grad = grad_bias[start + i * tile.columns + j]
            cell = row + left
            here, after = table.cells[cell], table.cells[cell + 1]
            below, diagonal = table.cells[cell + table.stride], table.cells[cell + table.stride + 1]
            total_y += grad * ((below - here) * (1 - frac_x) + (diagonal - after) * frac_x)
            total_x += grad * ((after - here) * (1 - frac_y) + (diagonal - below) * frac_y)
            grad_table.cells[cell] += grad * (1 - frac_y) * (1 - frac_x)
            grad_table.cells[cell + 1] += grad * (1 - frac_y) * frac_x
            grad_table.cells[cell + table.stride] += grad * frac_y * (1 - frac_x)
            grad_table.cells[cell + table.stride + 1] += grad * frac_y * frac_x
    return total_y, total_x
