"""The pieces of neighborhood attention: bands of a map in packed memory, tiles of queries, their windows and biases.

A tile is 2 × 2 queries. Together they see at most (K+1)² keys, of which each sees K²; what it does not see is hidden by
-∞. Keys come in blocks of four neighbors in a row: a block of scores is one vector, with query i and key j in lane
4·i + j (`quads`).

A band of rows of the map is packed into scratch memory first, with the channels filled up to whole vectors: whatever
strides, dilation (each sub-map is a map of its own) or number of channels come in, the rest does not notice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .quads import LANES, QUAD, inlined, interleave
from .rows import Rows, read_rows, write_rows
from .tiles import copy_rows
from .vectors import compiled, filled, load, store

LOG2_E = math.log2(math.e)
SPARE = QUAD - 1  # pixels behind each packed row, for a block that begins at its last key
NO_WINDOW = 2  # begins nowhere: not even at the second query's place, 1, as windows do for K = 1
BOTH, UPPER, LOWER = 0, 1, 2  # which of a tile's queries see a row of keys


class Shape(NamedTuple):
    """The sizes of a call, and what follows from them; see `neighborhood.make_plan`."""

    batch: int
    heads: int
    height: int
    width: int
    depth: int
    kernel: int
    dilation: int
    down: int  # keys that a query sees on each axis
    across: int
    band: int  # rows of queries in a band, even
    bands: int  # of a sub-map
    apart: int  # so far apart bands have no key in common
    pixel: int  # length of a pixel in packed memory
    line: int  # of a row of pixels
    blocks: int  # numbers in all blocks of bias of a head
    phases: int  # blocks of bias, four columns apart, in a row of them
    margined: int  # length of a row of a table with margins, so that four blocks can be read at its last column


@compiled
def shape_of(call: Any) -> Shape:
    """Return the sizes as values: what stands in memory would be read again after every store."""
    return Shape(
        call.batch, call.heads, call.height, call.width, call.depth, call.kernel, call.dilation, call.down, call.across,
        call.band, call.bands, call.apart, call.pixel, call.line, call.blocks, call.phases, call.margined,
    )  # fmt: skip


class Map(NamedTuple):
    """A sub-map, and in it a band: some rows of queries, and the rows of keys that these see."""

    image: int
    head: int
    pixel: int  # its first one on the whole map
    height: int
    width: int
    first: int
    stop: int
    first_key: int
    stop_key: int


class Tile(NamedTuple):
    """2 × 2 queries, or fewer at the end of a map, and the window of keys that they see; places in packed memory."""

    queries: int
    right: int  # from a query to its neighbor, 0 where there is none
    below: int
    keys: int
    rows: int  # of the window
    blocks: int  # in each of them
    bias: int
    lower_from: int  # first row that the lower queries see


# ------------------------------------------------------------------------------------------------ geometry


@inlined
def first_key(query: int, length: int, seen: int) -> int:
    return max(min(query - seen // 2, length - seen), 0)


@compiled
def make_map(item: int, column: int, band: int, shape: Shape) -> Map:
    """Return a band of a sub-map: the one that begins at this column and a row that `item` counts, head by head."""
    rows = min(shape.dilation, shape.height)  # where sub-maps begin
    row, image, head = item % rows, item // rows % shape.batch, item // rows // shape.batch
    height, width = -(-(shape.height - row) // shape.dilation), -(-(shape.width - column) // shape.dilation)
    first = band * shape.band
    stop = min(first + shape.band, height)
    return Map(
        image, head, row * shape.width + column, height, width, first, stop, first_key(first, height, shape.down),
        first_key(stop - 1, height, shape.down) + shape.down,
    )  # fmt: skip


@inlined
def make_tile(map_: Map, row: int, column: int, shape: Shape) -> Tile:
    """Return the tile whose first query this is."""
    below, right = row + 1 < map_.stop, column + 1 < map_.width
    y, x = first_key(row, map_.height, shape.down), first_key(column, map_.width, shape.across)
    lower_from = first_key(row + 1, map_.height, shape.down) - y if below else shape.down
    columns = shape.across + (first_key(column + 1, map_.width, shape.across) - x if right else 0)
    return Tile(
        (row - map_.first) * shape.line + column * shape.pixel,
        shape.pixel if right else 0,
        shape.line if below else 0,
        (y - map_.first_key) * shape.line + x * shape.pixel,
        shape.down + (lower_from if below else 0),
        -(-columns // QUAD),
        bias_place(y - row + shape.kernel - 1, x - column + shape.kernel - 1, shape.phases),
        lower_from,
    )


@inlined
def query_number(map_: Map, row: int, column: int, tile: Tile, place: int, shape: Shape) -> int:
    """Return the number of one of a tile's queries, or of one beside it where there is no such query."""
    y = row + (place // 2 if tile.below else 0)
    x = column + (place % 2 if tile.right else 0)
    first = (map_.image * shape.heads + map_.head) * shape.height * shape.width + map_.pixel
    return first + shape.dilation * (y * shape.width + x)


@inlined
def rows_seen(row: int, tile: Tile, shape: Shape) -> int:
    """Return which of a tile's queries see this row of its window."""
    if row < tile.lower_from:
        return UPPER
    return BOTH if row < shape.down else LOWER


# ------------------------------------------------------------------------------------------------ bias and visibility

# Block (r, c) of a table holds what query (y, x) of a tile sees at keys r - (K-1) rows below the tile's first query and
# in four columns, of which the first is c - (K-1) to the right of it: entries r - y and c - x to c - x + 3. Blocks four
# columns apart are neighbors in memory, as they are in a row of a window.


@inlined
def bias_place(row: int, column: int, phases: int) -> int:
    return ((row * QUAD + column % QUAD) * phases + column // QUAD) * LANES


@compiled
def fill_bias(bias: Any, margined: Any, table: Any, head: int, shape: Shape) -> None:
    """Lay out the blocks of a head's table (2K-1, 2K-1); `margined` is room for a copy with margins."""
    side, line, like = 2 * shape.kernel - 1, shape.margined, filled(bias[0], LANES)
    margined[:] = 0
    copy_rows(margined, line + 1, line, table, head * side * side, side, side, side, LOG2_E)
    for row in range(side + 1):
        for column in range(side + 1):
            if column % LANES < QUAD:  # four blocks at a time, each four columns from the one before
                here = (row + 1) * line + column + 1
                interleave(
                    bias, bias_place(row, column, shape.phases),
                    load(margined, here, like), load(margined, here - 1, like),
                    load(margined, here - line, like), load(margined, here - line - 1, like),
                )  # fmt: skip


@compiled
def fold_bias(grad_table: Any, head: int, grad_bias: Any, shape: Shape) -> None:
    """Add up the gradients of each entry of a table, which stands in 16 lanes of the blocks."""
    side = 2 * shape.kernel - 1
    for row in range(side):
        for column in range(side):
            total = 0.0
            for lane in range(LANES):
                y, x, key = lane // 8, lane // QUAD % 2, lane % QUAD
                if column + x >= key:
                    total += grad_bias[bias_place(row + y, column + x - key, shape.phases) + lane]
            grad_table[(head * side + row) * side + column] = total


@compiled
def fill_masks(masks: Any, map_: Map, column: int, blocks: int, shape: Shape) -> None:
    """Write for each block of a row what is added to its scores, 0 or -∞: for rows that BOTH, UPPER and LOWER see."""
    window = first_key(column, map_.width, shape.across)
    for block in range(blocks):
        for lane in range(LANES):
            y, x, key = lane // 8, column + lane // QUAD % 2, window + QUAD * block + lane % QUAD
            first = first_key(x, map_.width, shape.across)
            seen = x < map_.width and first <= key < first + shape.across
            for rows in range(3):
                place = (rows * blocks + block) * LANES + lane
                masks[place] = 0 if seen and (rows == BOTH or rows == UPPER + y) else -np.inf


@inlined
def column_windows(map_: Map, column: int, shape: Shape) -> Any:
    """Return where the windows of a column of tiles begin: what its masks follow from."""
    right = first_key(column + 1, map_.width, shape.across) - column
    return first_key(column, map_.width, shape.across) - column, right if column + 1 < map_.width else NO_WINDOW


# ------------------------------------------------------------------------------------------------ packed memory


@compiled
def pack(target: Any, source: Rows, map_: Map, first: int, stop: int, shape: Shape) -> None:
    """Copy some rows of a sub-map, pixels one behind the other."""
    for row in range(first, stop):
        to = (row - first) * shape.line
        at, step = _row_of(source, map_, row, shape)
        read_rows(target, to, shape.pixel, source, at, step, map_.width, shape.depth, 1.0)
        target[to + map_.width * shape.pixel : to + (map_.width + SPARE) * shape.pixel] = 0


@compiled
def unpack(target: Rows, source: Any, map_: Map, first: int, stop: int, shape: Shape, factor: float) -> None:
    """Copy packed rows back, times a factor."""
    for row in range(first, stop):
        to, step = _row_of(target, map_, row, shape)
        at = (row - first) * shape.line
        write_rows(target, to, step, source, at, shape.pixel, map_.width, shape.depth, factor)


@compiled
def add_packed(target: Rows, source: Any, map_: Map, first: int, stop: int, shape: Shape, factor: float) -> None:
    like, whole = filled(source[0], LANES), shape.depth - shape.depth % LANES
    for row in range(first, stop):
        to, step = _row_of(target, map_, row, shape)
        at = (row - first) * shape.line
        for _ in range(map_.width):
            for channel in range(0, whole, LANES):
                total = load(target.numbers, to + channel, like) + factor * load(source, at + channel, like)
                store(target.numbers, to + channel, total)
            for channel in range(whole, shape.depth):
                target.numbers[to + channel] += factor * source[at + channel]
            to, at = to + step, at + shape.pixel


@inlined
def _row_of(rows: Rows, map_: Map, row: int, shape: Shape) -> Any:
    """Return where a row of a sub-map begins in a tensor, and how far its pixels are apart."""
    pixel = map_.pixel + row * shape.dilation * shape.width
    at = map_.image * rows.image + map_.head * rows.head + pixel * rows.row
    return at, shape.dilation * rows.row
