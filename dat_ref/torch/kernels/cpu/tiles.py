"""Tiles in scratch memory, and their products.

A tile is flat: entry (i, lane) stands at ``i * ROW + lane``, with queries along the lanes, so that a softmax over keys
is work on whole vectors. Products run on strips of a tile, as many lanes as a vector has, and keep a few rows of sums
in registers while they go along the axis that is summed.
"""

from __future__ import annotations

from typing import Any

from .vectors import NARROW, compiled, filled, load, spread, store, transpose_block

LANES = 448  # queries in a tile, at most; 448 = 8·56 = 16·28 = 32·14 = 64·7
# Room for a vector that begins at the last lane. An odd number of cache lines, or else the rows would all fall on the
# same few sets of the cache and throw each other out.
ROW = LANES + NARROW


@compiled
def add_product(
    out: Any, factor: Any, a: Any, a_row: int, a_column: int, b: Any, rows: int, depth: int, lane: int
) -> None:
    """out[i, strip] = factor · out[i, strip] + Σ_j a[i·a_row + j·a_column] · b[j, strip], for four i at a time.

    The strip begins at `lane`, and is as long as the vector `factor`.
    """
    for i in range(0, rows, 4):
        at, first = i * ROW + lane, i * a_row
        out0 = load(out, at, factor) * factor
        out1 = load(out, at + ROW, factor) * factor
        out2 = load(out, at + 2 * ROW, factor) * factor
        out3 = load(out, at + 3 * ROW, factor) * factor
        for j in range(depth):
            entry = first + j * a_column
            b_j = load(b, j * ROW + lane, factor)
            out0 += spread(a, entry, factor) * b_j
            out1 += spread(a, entry + a_row, factor) * b_j
            out2 += spread(a, entry + 2 * a_row, factor) * b_j
            out3 += spread(a, entry + 3 * a_row, factor) * b_j
        store(out, at, out0)
        store(out, at + ROW, out1)
        store(out, at + 2 * ROW, out2)
        store(out, at + 3 * ROW, out3)


@compiled
def add_outer(out: Any, at: int, a: Any, b: Any, row: int, rows: int, lanes: int, channel: int, like: Any) -> None:
    """out[at + i·row + channels] += Σ_lane a[i, lane] · b[lane·row + channels], for four i at a time.

    The channels begin at `channel`, and are as many as the vector `like` has lanes.
    """
    for i in range(0, rows, 4):
        target, first = at + i * row + channel, i * ROW
        out0 = load(out, target, like)
        out1 = load(out, target + row, like)
        out2 = load(out, target + 2 * row, like)
        out3 = load(out, target + 3 * row, like)
        for lane in range(first, first + lanes):
            b_lane = load(b, (lane - first) * row + channel, like)
            out0 += spread(a, lane, like) * b_lane
            out1 += spread(a, lane + ROW, like) * b_lane
            out2 += spread(a, lane + 2 * ROW, like) * b_lane
            out3 += spread(a, lane + 3 * ROW, like) * b_lane
        store(out, target, out0)
        store(out, target + row, out1)
        store(out, target + 2 * row, out2)
        store(out, target + 3 * row, out3)


@compiled
def copy_rows(
    target: Any, to: int, target_row: int, source: Any, at: int, source_row: int, rows: int, length: int, factor: float
) -> None:
    """target[to + i·target_row + j] = factor · source[at + i·source_row + j], for i < rows and j < length."""
    like = filled(factor, NARROW)
    whole = length - length % NARROW
    for i in range(rows):
        into, out_of = to + i * target_row, at + i * source_row
        for j in range(0, whole, NARROW):
            store(target, into + j, factor * load(source, out_of + j, like))
        for j in range(whole, length):
            target[into + j] = factor * source[out_of + j]


@compiled
def transpose(target: Any, target_row: int, source: Any, source_row: int, rows: int, columns: int) -> None:
    """target[j, i] = source[i, j] for i < rows and j < columns, and beyond them up to multiples of NARROW."""
    for i in range(0, rows, NARROW):
        for j in range(0, columns, NARROW):
            transpose_block(target, j * target_row + i, target_row, source, i * source_row + j, source_row)
