"""Tiles in scratch memory, and their products.

A tile is flat: entry (i, lane) stands at ``i * TILE_STRIDE + lane``, with queries along the lanes, so that a softmax
over keys is work on whole vectors. Products run on strips of a tile, as many lanes as a vector has, and keep a few rows
of sums in registers while they go along the axis that is summed.
"""

from __future__ import annotations

from typing import Any

from .vectors import NARROW, broadcast, compiled, load, load_broadcast, store, transpose_block

BLOCK_M = 448  # queries in a tile, at most; 448 = 8·56 = 16·28 = 32·14 = 64·7
# Room for a vector that begins at the last lane. An odd number of cache lines, or else the rows would all fall on the
# same few sets of the cache and throw each other out.
TILE_STRIDE = BLOCK_M + NARROW


@compiled
def add_product(
    out: Any, factor: Any, a: Any, a_row: int, a_column: int, b: Any, rows: int, depth: int, lane: int
) -> None:
    """out[i, strip] = factor · out[i, strip] + Σ_j a[i·a_row + j·a_column] · b[j, strip], for four i at a time.

    The strip begins at `lane`, and is as long as the vector `factor`.
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
    """out[out_start + i·row_stride + channels] += Σ_lane a[i, lane] · b[lane·row_stride + channels], four i at a time.

    The channels begin at `channel`, and are as many as the vector `like` has lanes.
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
    """target[target_start + i·target_stride + j] = factor · source[source_start + i·source_stride + j].

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
    """target[j, i] = source[i, j] for i < rows and j < columns, and beyond them up to multiples of NARROW."""
    for i in range(0, rows, NARROW):
        for j in range(0, columns, NARROW):
            transpose_block(target, j * target_stride + i, target_stride, source, i * source_stride + j, source_stride)
