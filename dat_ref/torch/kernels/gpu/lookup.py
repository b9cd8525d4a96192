"""The bias table as the GPU kernels read it: one polynomial a cell, found by adding two integers.

Between four neighbouring entries T the bilinear interpolation is a polynomial of the place (y, x) in [0, 1)² inside the
cell,

    B(y, x) = c₀ + y c₂ + x (c₁ + y c₃),    c₀ = T₀₀,  c₁ = T₀₁ - T₀₀,  c₂ = T₁₀ - T₀₀,  c₃ = T₁₁ - T₁₀ - T₀₁ + T₀₀,

whose slopes along y and x cost one more multiply-add. So each cell keeps its four coefficients side by side: a single
load of 64 bits where the values are half precision (the coefficients are then float16, and differences keep their
relative precision, which the gradient with respect to the points needs), four loads where they are float32.

Query (i, j) reads key n in row origin[n, 0] + i·step. Both summands are split into an integer and a fraction once, the
key's by a kernel here and the query's at the start of each program; in the inner loop the integers are added, which
gives the cell, and the fractions, which give the place in it, with a carry where they reach 1. For a step of 1 the
query has no fraction: there is nothing to carry, and all queries read a key at the same place of different cells.

No address is ever out of bounds, and no test is needed for that: keys are clamped to where they just read nothing, and
around the table there are as many empty cells as a map of queries can reach from there. Memory: 16 times the map's
pixels times 4 coefficients, a head.
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

# ------------------------------------------------------------------------------------------------ preparing


@dataclass(frozen=True)
class Lookup:
    """A table and the keys that read it, laid out for the kernels."""

    cells: Tensor  # coefficients · log₂ e: (heads, rows, width) of 4 float16 in an int64, or (heads, 4, rows, width)
    keys: Tensor  # (B·G, 5, pitch) int32: the cell of query (0, 0), the bits of the two fractions, its row and column
    samples: int
    rows: int  # of cells, the empty ones around the table included
    width: int
    extent: tuple[int, int]  # how many cells further than the first the last query can read, on each axis
    step: tuple[float, float]

    @property
    def unit(self) -> bool:
        """Whether queries are exactly one cell apart."""
        return self.step == (1.0, 1.0)

    @property
    def packed(self) -> bool:
        """Whether the four coefficients of a cell share a word."""
        return self.cells.dtype is torch.int64

    def arguments(self) -> dict[str, Any]:
        """Return what every kernel that reads the table takes, by name."""
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
    """Lay out a table and the keys that read it.

    Args:
        origin: (B, G, Ns, 2), where query (0, 0) reads each key, in cells of the table.
        table: (heads, T_y, T_x).
        query_size: (H, W).
        step: cells from one query to the next, positive.
        packed: whether to keep the coefficients as float16.
    """
    heads, table_height, table_width = table.shape
    batch, groups, samples, _ = origin.shape
    # A single query takes no step.
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
    # Beyond the last key, up to the pitch, there are keys that read nothing, so that whole tiles can be loaded.
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
    """Split a position on one axis, after clamping it to [-(extent + 2), length], from where no query reads anything.

    NaN becomes a valid cell and the fraction NaN.
    """
    position = position.to(tl.float32)
    lowest, highest = -1.0 * (extent + 2), 1.0 * length
    position = tl.where(position < lowest, lowest, tl.where(position > highest, highest, position))
    floor = tl.floor(position)
    cell = tl.where(floor == floor, floor, lowest).to(tl.int32)
    return cell + extent + 2, position - floor


# ------------------------------------------------------------------------------------------------ reading


@triton.jit
def query_cells(offs_m, queries, map_width, width, step_y, step_x, UNIT: tl.constexpr):
    """Return how many cells further than query 0 each query reads, and the fractions left over on both axes.

    Queries beyond the last one read what that reads.
    """
    offs_m = tl.minimum(offs_m, queries - 1)
    i, j = offs_m // map_width, offs_m % map_width
    if UNIT:
        zero = tl.zeros(offs_m.shape, tl.float32)
        return i * width + j, zero, zero
    else:
        y, x = i.to(tl.float32) * step_y, j.to(tl.float32) * step_x
        floor_y, floor_x = tl.floor(y), tl.floor(x)
        return floor_y.to(tl.int32) * width + floor_x.to(tl.int32), y - floor_y, x - floor_x


@triton.jit
def read_bias(cell_ptr, frac_y, frac_x, keys, offs_n, pitch, width, plane, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """Read the bias of a tile of keys, BLOCK_N × BLOCK_M queries, times log₂ e, and its slopes along y and x.

    Args:
        cell_ptr: (BLOCK_M,) pointers to the cell that each query would read for a key that starts at cell 0.
        frac_y, frac_x: (BLOCK_M,) the queries' fractions.
        offs_n: (BLOCK_N,).
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
    """Return where the keys of a head's group begin."""
    return keys + (b * (heads // group_heads) + h // group_heads) * 5 * pitch


@triton.jit
def locate(keys, offs_n, pitch, frac_y, frac_x, width, UNIT: tl.constexpr):
    """Return the cells from which the queries count for each key, and the fractions, (BLOCK_N, BLOCK_M or 1)."""
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
