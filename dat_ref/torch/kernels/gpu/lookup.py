"""Bias table lookup of the GPU kernels: one polynomial per table cell.

Between four neighboring table entries T, bilinear interpolation is a polynomial in the position (y, x) ∈ [0, 1)² in the
cell:

    B(y, x) = c₀ + y c₂ + x (c₁ + y c₃),    c₀ = T₀₀,  c₁ = T₀₁ - T₀₀,  c₂ = T₁₀ - T₀₀,  c₃ = T₁₁ - T₁₀ - T₀₁ + T₀₀.

Its slopes along y and x need one more multiply-add. Each cell stores its four coefficients. If q, k and v have half
precision, the coefficients are float16, packed into one 64-bit load. Storing differences preserves their relative
precision, which the gradient of the points needs. If q, k and v are float32, a lookup needs four loads.

Query (i, j) reads the bias of key n at row origin[n, 0] + i·step_y; the column is analogous. Each summand is split into
an integer and a fraction once: a kernel in this module splits the keys', and each program splits its queries' at the
start. In the inner loop the sum of the integers gives the cell, and the sum of the fractions gives the position in it,
with a carry if the sum reaches 1. For step 1 the queries have no fraction, so there is no carry, and all queries read a
key at the same position in different cells.

All addresses are within bounds without a check. Keys outside the table are clamped to the nearest position at which
no query reads a table entry. The table is surrounded by empty cells for all queries of such keys. Memory per head:
16 × 4 coefficients per pixel of the map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E

_MAX_FLOAT16 = tl.constexpr(65504.0)
_CELL_BLOCK = 1024
_KEY_BLOCK = 128

# ------------------------------------------------------------------------------------------------ preparation


@dataclass(frozen=True)
class Lookup:
    """Bias table and keys' positions in the memory layout of the kernels."""

    cells: Tensor  # coefficients · log₂ e: (heads, rows, width) int64 of 4 float16, or (heads, 4, rows, width) float32
    # (B·G, 5, pitch) int32: cell of query (0, 0), bits of the fractions y and x, row and column of the cell
    keys: Tensor
    samples: int  # Ns
    rows: int  # rows of cells, including the empty border
    width: int  # columns of cells, including the empty border
    extent: tuple[int, int]  # maximum distance, in cells, from the first to the last query on each axis
    step: tuple[float, float]  # table cells between neighboring queries, (y, x)

    @property
    def unit(self) -> bool:
        """True if neighboring queries are exactly one cell apart."""
        return self.step == (1.0, 1.0)

    @property
    def packed(self) -> bool:
        """True if the four coefficients of a cell are packed into one 64-bit integer."""
        return self.cells.dtype is torch.int64

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of all kernels that read the table."""
        return {
            "keys": self.keys,
            "cells": self.cells,
            "pitch": self.keys.shape[2],
            "width": self.width,
            "plane": self.rows * self.width,
            "step_y": self.step[0],
            "step_x": self.step[1],
            "UNIT": self.unit,
            "PACKED": self.packed,
        }


def prepare_lookup(
    origin: Tensor, table: Tensor, query_size: tuple[int, int], step: tuple[float, float], packed: bool
) -> Lookup:
    """Compute the cells of a table and the positions of the keys.

    Args:
        origin: (B, G, Ns, 2), table position (y, x) of query (0, 0) for each key, in cells.
        table: (heads, T_y, T_x).
        query_size: (H, W).
        step: table cells between neighboring queries, (y, x), positive.
        packed: store the coefficients as packed float16.
    """
    heads, table_height, table_width = table.shape
    batch, groups, samples, _ = origin.shape
    # An axis with a single query takes no step; 1 selects the fast path.
    step_y, step_x = (1.0 if length == 1 else axis_step for length, axis_step in zip(query_size, step, strict=True))
    extent = math.floor((query_size[0] - 1) * step_y) + 1, math.floor((query_size[1] - 1) * step_x) + 1
    rows, width = table_height + 2 * extent[0] + 3, table_width + 2 * extent[1] + 3
    shape, dtype = ((heads, rows, width), torch.int64) if packed else ((heads, 4, rows, width), torch.float32)
    cells = torch.empty(shape, dtype=dtype, device=table.device)
    pitch = triton.cdiv(samples, _KEY_BLOCK) * _KEY_BLOCK
    keys = torch.empty((batch * groups, 5, pitch), dtype=torch.int32, device=origin.device)
    _fill_cells[(triton.cdiv(rows * width, _CELL_BLOCK), heads)](
        table.contiguous(), cells, table_height, table_width, rows, width, *extent, LOG2_E, packed, _CELL_BLOCK
    )
    _locate_keys[(batch * groups, pitch // _KEY_BLOCK)](
        origin.contiguous(), keys, samples, pitch, table_height, table_width, width, *extent, _KEY_BLOCK
    )
    return Lookup(cells, keys, samples, rows, width, extent, (step_y, step_x))


_NOT_SPECIALIZED = ("samples", "table_height", "table_width", "rows", "width", "extent_y", "extent_x")


@triton.jit(do_not_specialize=_NOT_SPECIALIZED[1:])
def _fill_cells(
    table, cells, table_height, table_width, rows, width, extent_y, extent_x, factor,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = offset < rows * width
    row, column = offset // width - extent_y - 2, offset % width - extent_x - 2  # in the table
    table += head * table_height * table_width
    t00 = _table_entry(table, row, column, table_height, table_width)
    t01 = _table_entry(table, row, column + 1, table_height, table_width)
    t10 = _table_entry(table, row + 1, column, table_height, table_width)
    t11 = _table_entry(table, row + 1, column + 1, table_height, table_width)
    c0 = t00 * factor
    c1 = (t01 - t00) * factor
    c2 = (t10 - t00) * factor
    c3 = ((t11 - t10) - (t01 - t00)) * factor
    if PACKED:
        word = _half_bits(c0) | (_half_bits(c1) << 16) | (_half_bits(c2) << 32) | (_half_bits(c3) << 48)
        tl.store(cells + head * rows * width + offset, word, mask=valid)
    else:
        cells += head * 4 * rows * width + offset
        tl.store(cells, c0, mask=valid)
        tl.store(cells + rows * width, c1, mask=valid)
        tl.store(cells + 2 * rows * width, c2, mask=valid)
        tl.store(cells + 3 * rows * width, c3, mask=valid)


@triton.jit
def _table_entry(table, row, column, height, width):
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(table + row * width + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _half_bits(x):
    x = tl.where(x > _MAX_FLOAT16, _MAX_FLOAT16, tl.where(x < -_MAX_FLOAT16, -_MAX_FLOAT16, x))  # NaN stays
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _locate_keys(
    origin, keys, samples, pitch, table_height, table_width, width, extent_y, extent_x, BLOCK: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # The padding keys from `samples` to `pitch` read empty cells. So kernels can load whole tiles of keys.
    ptr = origin + group * samples * 2 + 2 * offs_n
    row, frac_y = _cell_and_fraction(tl.load(ptr, mask=offs_n < samples, other=-1e9), table_height, extent_y)
    column, frac_x = _cell_and_fraction(tl.load(ptr + 1, mask=offs_n < samples, other=-1e9), table_width, extent_x)
    keys += group * 5 * pitch + offs_n
    tl.store(keys, row * width + column)
    tl.store(keys + pitch, frac_y.to(tl.int32, bitcast=True))
    tl.store(keys + 2 * pitch, frac_x.to(tl.int32, bitcast=True))
    tl.store(keys + 3 * pitch, row)
    tl.store(keys + 4 * pitch, column)


@triton.jit
def _cell_and_fraction(position, length, extent):
    """Split a position on one axis into a cell and a fraction.

    The position is first clamped to [-(extent + 2), length]; at both ends no query reads a table entry. NaN gives a
    valid cell and the fraction NaN.
    """
    position = position.to(tl.float32)
    lowest, highest = -1.0 * (extent + 2), 1.0 * length
    position = tl.where(position < lowest, lowest, tl.where(position > highest, highest, position))
    floor = tl.floor(position)
    cell = tl.where(floor == floor, floor, lowest).to(tl.int32)
    return cell + extent + 2, position - floor


# ------------------------------------------------------------------------------------------------ lookup


@triton.jit
def query_cells(offs_m, queries, map_width, width, step_y, step_x, UNIT: tl.constexpr):
    """Return the cell offset of each query relative to query 0, and its fractions in y and x.

    Padding queries after the last one get the values of the last one.
    """
    offs_m = tl.minimum(offs_m, queries - 1)
    return cells_of_positions(offs_m // map_width, offs_m % map_width, width, step_y, step_x, UNIT)


@triton.jit
def cells_of_positions(i, j, width, step_y, step_x, UNIT: tl.constexpr):
    """Return what `query_cells` returns, for queries in rows i and columns j."""
    if UNIT:
        zero = tl.zeros(i.shape, tl.float32)
        return i * width + j, zero, zero
    else:
        y, x = i.to(tl.float32) * step_y, j.to(tl.float32) * step_x
        floor_y, floor_x = tl.floor(y), tl.floor(x)
        return floor_y.to(tl.int32) * width + floor_x.to(tl.int32), y - floor_y, x - floor_x


@triton.jit
def next_positions(i, j, rows, columns, map_width):
    """Return the positions of the queries that follow after `rows` rows and `columns` columns, without a division."""
    j += columns
    wraps = j >= map_width
    return i + rows + wraps.to(tl.int32), tl.where(wraps, j - map_width, j)


@triton.jit
def read_bias(cell_ptr, frac_y, frac_x, keys, offs_n, pitch, width, plane, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """Return the bias of a tile, (BLOCK_N, BLOCK_M), times log₂ e, and its slopes along y and x.

    Args:
        cell_ptr: (BLOCK_M,), pointer of each query to the cell that it reads for a key with cell 0.
        frac_y, frac_x: (BLOCK_M,), fractions of the queries.
        keys: pointer to the keys of the head's group, see `keys_of_head`.
        offs_n: (BLOCK_N,), indices of the keys.
    """
    start, y, x = locate(keys, offs_n, pitch, frac_y, frac_x, width, UNIT)
    ptr = cell_ptr[None, :] + start
    if PACKED:
        word = tl.load(ptr)
        c0, c1, c2, c3 = _half(word, 0), _half(word, 16), _half(word, 32), _half(word, 48)
    else:
        c0, c1, c2, c3 = tl.load(ptr), tl.load(ptr + plane), tl.load(ptr + 2 * plane), tl.load(ptr + 3 * plane)
    slope_x = c1 + y * c3
    return c0 + y * c2 + x * slope_x, c2 + x * c3, slope_x


@triton.jit
def keys_of_head(keys, b, h, heads, group_heads, pitch):
    """Return the pointer to the keys of the group of a head."""
    return keys + (b * (heads // group_heads) + h // group_heads) * 5 * pitch


@triton.jit
def locate(keys, offs_n, pitch, frac_y, frac_x, width, UNIT: tl.constexpr):
    """Return the cell offset of each key, and the fractions in y and x, (BLOCK_N, BLOCK_M or 1).

    With UNIT they are the same for all queries. Otherwise they include the queries' fractions and carries.
    """
    start = tl.load(keys + offs_n)[:, None]
    y = tl.load(keys + pitch + offs_n).to(tl.float32, bitcast=True)[:, None]
    x = tl.load(keys + 2 * pitch + offs_n).to(tl.float32, bitcast=True)[:, None]
    if not UNIT:
        y += frac_y[None, :]
        x += frac_x[None, :]
        start += tl.where(y >= 1.0, width, 0) + tl.where(x >= 1.0, 1, 0)
        y = tl.where(y >= 1.0, y - 1.0, y)
        x = tl.where(x >= 1.0, x - 1.0, x)
    return start, y, x


@triton.jit
def _half(word, shift: tl.constexpr):
    return (word >> shift).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
