"""Tiles in scratch memory and matrix products of tiles.

A tile is a 1D array with element (i, lane) at index ``i * TILE_STRIDE + lane``. The lanes are queries, so a softmax
over keys works on whole vectors. Products process one strip of a tile at a time: four rows, with as many lanes as a
vector, accumulated in registers.
"""

from __future__ import annotations

from typing import Any

from .vectors import NARROW, broadcast, compiled, load, load_broadcast, store, transpose_block

BLOCK_M = 448  # maximum number of queries in a tile; 448 = 8·56 = 16·28 = 32·14 = 64·7
# Padding for a vector that starts at the last lane. The stride is an odd number of cache lines. With an even number,
# the rows would map to few cache sets and evict each other.
TILE_STRIDE = BLOCK_M + NARROW


@compiled
def add_product(
    out: Any, factor: Any, a: Any, a_row: int, a_column: int, b: Any, rows: int, depth: int, lane: int
) -> None:
    """Compute out[i, strip] = factor · out[i, strip] + Σ_j a[i·a_row + j·a_column] · b[j, strip], four i at a time.

    The strip starts at `lane` and has as many lanes as the vector `factor`.
    """
    for i in range(0, rows, 4):
        offset, first = i * TILE_STRIDE + lane, i * a_row
        out0 = load(out, offset, factor) * factor
        out1 = load(out, offset + TILE_STRIDE, factor) * factor
        out2 = load(out, offset + 2 * TILE_STRIDE, factor) * factor
        out3 = load(out, offset + 3 * TILE_STRIDE, factor) * factor
        for j in range(depth):
            entry = first + j * a_column
            b_j = load(b, j * TILE_STRIDE + lane, factor)
            out0 += load_broadcast(a, entry, factor) * b_j
            out1 += load_broadcast(a, entry + a_row, factor) * b_j
            out2 += load_broadcast(a, entry + 2 * a_row, factor) * b_j
            out3 += load_broadcast(a, entry + 3 * a_row, factor) * b_j
        store(out, offset, out0)
        store(out, offset + TILE_STRIDE, out1)
        store(out, offset + 2 * TILE_STRIDE, out2)
        store(out, offset + 3 * TILE_STRIDE, out3)


@compiled
def add_outer(
    out: Any, out_start: int, a: Any, b: Any, row_stride: int, rows: int, lanes: int, channel: int, like: Any
) -> None:
    """Add Σ_lane a[i, lane] · b[lane·row_stride + channels] to out[out_start + i·row_stride + channels].

    Four i at a time. The channels start at `channel`; their number is the number of lanes of the vector `like`.
    """
    for i in range(0, rows, 4):
        target, first = out_start + i * row_stride + channel, i * TILE_STRIDE
        out0 = load(out, target, like)
        out1 = load(out, target + row_stride, like)
        out2 = load(out, target + 2 * row_stride, like)
        out3 = load(out, target + 3 * row_stride, like)
        for lane in range(first, first + lanes):
            b_lane = load(b, (lane - first) * row_stride + channel, like)
            out0 += load_broadcast(a, lane, like) * b_lane
            out1 += load_broadcast(a, lane + TILE_STRIDE, like) * b_lane
            out2 += load_broadcast(a, lane + 2 * TILE_STRIDE, like) * b_lane
            out3 += load_broadcast(a, lane + 3 * TILE_STRIDE, like) * b_lane
        store(out, target, out0)
        store(out, target + row_stride, out1)
        store(out, target + 2 * row_stride, out2)
        store(out, target + 3 * row_stride, out3)


@compiled
def copy_rows(
    target: Any,
    target_start: int,
    target_stride: int,
    source: Any,
    source_start: int,
    source_stride: int,
    rows: int,
    length: int,
    factor: float,
) -> None:
    """Copy rows: target[target_start + i·target_stride + j] = factor · source[source_start + i·source_stride + j].

    For i < rows and j < length.
    """
    like = broadcast(factor, NARROW)
    vectorized = length - length % NARROW
    for i in range(rows):
        dst, src = target_start + i * target_stride, source_start + i * source_stride
        for j in range(0, vectorized, NARROW):
            store(target, dst + j, factor * load(source, src + j, like))
        for j in range(vectorized, length):
            target[dst + j] = factor * source[src + j]


@compiled
def transpose(target: Any, target_stride: int, source: Any, source_stride: int, rows: int, columns: int) -> None:
    """Compute target[j, i] = source[i, j] for i < rows and j < columns, both rounded up to multiples of NARROW."""
    for i in range(0, rows, NARROW):
        for j in range(0, columns, NARROW):
            transpose_block(target, j * target_stride + i, target_stride, source, i * source_stride + j, source_stride)
