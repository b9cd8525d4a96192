"""The bias table as the GPU kernels read it: one polynomial a cell, found by adding two integers.

Between four neighbouring entries T the bilinear interpolation is a polynomial of the place (y, x) in [0, 1)² inside the
cell,

    B(y, x) = c₀ + y c₂ + x (c₁ + y c₃),    c₀ = T₀₀,  c₁ = T₀₁ - T₀₀,  c₂ = T₁₀ - T₀₀,  c₃ = T₁₁ - T₁₀ - T₀₁ + T₀₀,

whose slopes along y and x cost one more multiply-add. So each cell keeps its four coefficients side by side: a single
load of 64 bits where the values are half precision (the coefficients are then float16, and differences keep their
relative precision, which the gradient with respect to the points needs), four loads where they are float32.

Query (i, j) reads key n in row base[n, 0] + i·step. Both summands are split into an integer and a fraction once, the
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

from .values import LOG2_E

_LARGEST_HALF = tl.constexpr(65504.0)
_CELLS_AT_ONCE = 1024
_KEYS_AT_ONCE = 128

# ------------------------------------------------------------------------------------------------ preparing


@dataclass(frozen=True)
class Lookup:
    """A table and the keys that read it, laid out for the kernels."""

    cells: Tensor  # coefficients · log₂ e: (heads, rows, width) of 4 float16 in an int64, or (heads, 4, rows, width)
    keys: Tensor  # (B·G, 5, pitch) int32: the cell of query (0, 0), the bits of the two fractions, its row and column
    samples: int
    rows: int  # of cells, the empty ones around the table included
    width: int
    reach: tuple[int, int]  # how many cells further than the first the last query can read, on each axis
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
    base: Tensor, table: Tensor, query_size: tuple[int, int], step: tuple[float, float], packed: bool
) -> Lookup:
    """Lay out a table and the keys that read it.

    Args:
        base: (B, G, Ns, 2), where query (0, 0) reads each key, in cells of the table.
        table: (heads, T_y, T_x).
        query_size: (H, W).
        step: cells from one query to the next, positive.
        packed: whether to keep the coefficients as float16.
    """
    heads, table_height, table_width = table.shape
    batch, groups, samples, _ = base.shape
    # A single query takes no step.
    step_y, step_x = (1.0 if length == 1 else along for length, along in zip(query_size, step, strict=True))
    reach = math.floor((query_size[0] - 1) * step_y) + 1, math.floor((query_size[1] - 1) * step_x) + 1
    rows, width = table_height + 2 * reach[0] + 3, table_width + 2 * reach[1] + 3
    shape, dtype = ((heads, rows, width), torch.int64) if packed else ((heads, 4, rows, width), torch.float32)
    cells = torch.empty(shape, dtype=dtype, device=table.device)
    pitch = triton.cdiv(samples, _KEYS_AT_ONCE) * _KEYS_AT_ONCE
    keys = torch.empty((batch * groups, 5, pitch), dtype=torch.int32, device=base.device)
    _lay_out_cells[(triton.cdiv(rows * width, _CELLS_AT_ONCE), heads)](
        table.contiguous(), cells, table_height, table_width, rows, width, *reach, LOG2_E, packed, _CELLS_AT_ONCE
    )
    _locate_keys[(batch * groups, pitch // _KEYS_AT_ONCE)](
        base.contiguous(), keys, samples, pitch, table_height, table_width, width, *reach, _KEYS_AT_ONCE
    )
    return Lookup(cells, keys, samples, rows, width, reach, (step_y, step_x))


_ANY_SIZE = ("samples", "table_height", "table_width", "rows", "width", "reach_y", "reach_x")


@triton.jit(do_not_specialize=_ANY_SIZE[1:])
def _lay_out_cells(
    table, cells, table_height, table_width, rows, width, reach_y, reach_x, factor,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < rows * width
    row, column = at // width - reach_y - 2, at % width - reach_x - 2  # in the table
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
        tl.store(cells + head * rows * width + at, word, mask=valid)
    else:
        cells += head * 4 * rows * width + at
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
    x = tl.where(x > _LARGEST_HALF, _LARGEST_HALF, tl.where(x < -_LARGEST_HALF, -_LARGEST_HALF, x))  # NaN stays
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit(do_not_specialize=_ANY_SIZE)
def _locate_keys(base, keys, samples, pitch, table_height, table_width, width, reach_y, reach_x, BLOCK: tl.constexpr):
    which = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Beyond the last key, up to the pitch, there are keys that read nothing, so that whole tiles can be loaded.
    at = base + which * samples * 2 + 2 * n
    row, below = _cell_and_place(tl.load(at, mask=n < samples, other=-1e9), table_height, reach_y)
    column, right = _cell_and_place(tl.load(at + 1, mask=n < samples, other=-1e9), table_width, reach_x)
    keys += which * 5 * pitch + n
    tl.store(keys, row * width + column)
    tl.store(keys + pitch, below.to(tl.int32, bitcast=True))
    tl.store(keys + 2 * pitch, right.to(tl.int32, bitcast=True))
    tl.store(keys + 3 * pitch, row)
    tl.store(keys + 4 * pitch, column)


@triton.jit
def _cell_and_place(position, length, reach):
    """Split a position on one axis, after clamping it to [-(reach + 2), length], from where no query reads anything.

    NaN becomes a valid cell and the place NaN.
    """
    position = position.to(tl.float32)
    lowest, highest = -1.0 * (reach + 2), 1.0 * length
    position = tl.where(position < lowest, lowest, tl.where(position > highest, highest, position))
    whole = tl.floor(position)
    cell = tl.where(whole == whole, whole, lowest).to(tl.int32)
    return cell + reach + 2, position - whole


# ------------------------------------------------------------------------------------------------ reading


@triton.jit
def query_cells(m, queries, map_width, width, step_y, step_x, UNIT: tl.constexpr):
    """Return how many cells further than query 0 query m reads, and the fractions left over on both axes.

    Queries beyond the last one read what that reads.
    """
    m = tl.minimum(m, queries - 1)
    i, j = m // map_width, m % map_width
    if UNIT:
        none = tl.zeros(m.shape, tl.float32)
        return i * width + j, none, none
    else:
        down, across = i.to(tl.float32) * step_y, j.to(tl.float32) * step_x
        whole_y, whole_x = tl.floor(down), tl.floor(across)
        return whole_y.to(tl.int32) * width + whole_x.to(tl.int32), down - whole_y, across - whole_x


@triton.jit
def read_bias(first, rest_y, rest_x, keys, n, pitch, width, plane, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """Read the bias of a tile of keys, BLOCK_N × BLOCK_M queries, times log₂ e, and its slopes along y and x.

    Args:
        first: (BLOCK_M,) pointers to the cell that each query would read for a key that starts at cell 0.
        rest_y, rest_x: (BLOCK_M,) the queries' fractions.
        n: (BLOCK_N,).
    """
    start, y, x = locate(keys, n, pitch, rest_y, rest_x, width, UNIT)
    at = first[None, :] + start
    if PACKED:
        word = tl.load(at)
        c0, c1, c2, c3 = _half(word, 0), _half(word, 16), _half(word, 32), _half(word, 48)
    else:
        c0, c1, c2, c3 = tl.load(at), tl.load(at + plane), tl.load(at + 2 * plane), tl.load(at + 3 * plane)
    slope_x = c1 + y * c3
    return c0 + y * c2 + x * slope_x, c2 + x * c3, slope_x


@triton.jit
def keys_of_head(keys, b, h, heads, group_heads, pitch):
    """Return where the keys of a head's group begin."""
    return keys + (b * (heads // group_heads) + h // group_heads) * 5 * pitch


@triton.jit
def locate(keys, n, pitch, rest_y, rest_x, width, UNIT: tl.constexpr):
    """Return the cells from which the queries count for each key, and the places in them, (BLOCK_N, BLOCK_M or 1)."""
    start = tl.load(keys + n)[:, None]
    y = tl.load(keys + pitch + n).to(tl.float32, bitcast=True)[:, None]
    x = tl.load(keys + 2 * pitch + n).to(tl.float32, bitcast=True)[:, None]
    if not UNIT:
        y += rest_y[None, :]
        x += rest_x[None, :]
        start += tl.where(y >= 1.0, width, 0) + tl.where(x >= 1.0, 1, 0)
        y = tl.where(y >= 1.0, y - 1.0, y)
        x = tl.where(x >= 1.0, x - 1.0, x)
    return start, y, x


@triton.jit
def _half(word, shift: tl.constexpr):
    return (word >> shift).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
