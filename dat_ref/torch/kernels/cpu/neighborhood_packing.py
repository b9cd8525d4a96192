"""The pieces of neighborhood attention: bands of a map in packed memory, tiles of queries, their windows and biases.

A tile is 2 × 2 queries. Together they see at most (K+1)² keys, of which each sees K²; what it does not see is hidden by
-∞. Keys come in blocks of four neighbors in a row: a block of logits is one vector, with query i and key j in lane
4·i + j (`lane_shuffles`).

A band of rows of the map is packed into scratch memory first, with the channels filled up to whole vectors: whatever
strides, dilation (each sub-map is a map of its own) or number of channels come in, the rest does not notice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .lane_shuffles import LANES, QUAD, inlined, interleave
from .strided_io import StridedTensor, load_rows, store_rows
from .tiles import copy_rows
from .vectors import broadcast, compiled, load, store

LOG2_E = math.log2(math.e)
PAD_PIXELS = QUAD - 1  # pixels behind each packed row, for a block that begins at its last key
NO_WINDOW = 2  # begins nowhere: not even at the second query's column, 1, as windows do for K = 1
BOTH, UPPER, LOWER = 0, 1, 2  # which of a tile's queries see a row of keys


class Shape(NamedTuple):
    """The sizes of a call, and what follows from them; see `neighborhood.make_shape`."""

    batch: int
    heads: int
    height: int
    width: int
    depth: int
    kernel: int
    dilation: int
    keys_y: int  # keys that a query sees on each axis
    keys_x: int
    band_rows: int  # rows of queries in a band, even
    num_bands: int  # of a sub-map
    band_groups: int  # so far apart bands have no key in common
    pixel_stride: int  # length of a pixel in packed memory
    row_stride: int  # of a row of pixels
    bias_size: int  # elements in all blocks of bias of a head
    phases: int  # blocks of bias, four columns apart, in a row of them
    table_row_stride: int  # length of a row of a table with margins, so that four blocks can be read at its last column


@compiled
def load_shape(call: Any) -> Shape:
    """Return the sizes as values: what stands in memory would be read again after every store."""
    return Shape(
        call.batch, call.heads, call.height, call.width, call.depth, call.kernel, call.dilation, call.keys_y,
        call.keys_x, call.band_rows, call.num_bands, call.band_groups, call.pixel_stride, call.row_stride,
        call.bias_size, call.phases, call.table_row_stride,
    )  # fmt: skip


class Map(NamedTuple):
    """A sub-map, and in it a band: some rows of queries, and the rows of keys that these see."""

    image: int
    head: int
    first_pixel: int  # its first one on the whole map
    height: int
    width: int
    first_row: int
    stop_row: int
    first_key_row: int
    stop_key_row: int


class Tile(NamedTuple):
    """2 × 2 queries, or fewer at the end of a map, and the window of keys that they see; offsets in packed memory."""

    queries: int
    right: int  # from a query to its neighbor, 0 where there is none
    below: int
    keys: int
    rows: int  # of the window
    blocks: int  # in each of them
    bias: int
    lower_start: int  # first row that the lower queries see


# ------------------------------------------------------------------------------------------------ geometry


@inlined
def first_key(query: int, length: int, num_keys: int) -> int:
    return max(min(query - num_keys // 2, length - num_keys), 0)


@compiled
def make_map(item: int, column: int, band: int, shape: Shape) -> Map:
    """Return a band of a sub-map: the one that begins at this column and a row that `item` counts, head by head."""
    rows = min(shape.dilation, shape.height)  # where sub-maps begin
    row, image, head = item % rows, item // rows % shape.batch, item // rows // shape.batch
    height, width = -(-(shape.height - row) // shape.dilation), -(-(shape.width - column) // shape.dilation)
    first_row = band * shape.band_rows
    stop_row = min(first_row + shape.band_rows, height)
    return Map(
        image, head, row * shape.width + column, height, width, first_row, stop_row,
        first_key(first_row, height, shape.keys_y), first_key(stop_row - 1, height, shape.keys_y) + shape.keys_y,
    )  # fmt: skip


@inlined
def make_tile(map_: Map, row: int, column: int, shape: Shape) -> Tile:
    """Return the tile whose first query this is."""
    below, right = row + 1 < map_.stop_row, column + 1 < map_.width
    y, x = first_key(row, map_.height, shape.keys_y), first_key(column, map_.width, shape.keys_x)
    lower_start = first_key(row + 1, map_.height, shape.keys_y) - y if below else shape.keys_y
    columns = shape.keys_x + (first_key(column + 1, map_.width, shape.keys_x) - x if right else 0)
    return Tile(
        (row - map_.first_row) * shape.row_stride + column * shape.pixel_stride,
        shape.pixel_stride if right else 0,
        shape.row_stride if below else 0,
        (y - map_.first_key_row) * shape.row_stride + x * shape.pixel_stride,
        shape.keys_y + (lower_start if below else 0),
        -(-columns // QUAD),
        bias_offset(y - row + shape.kernel - 1, x - column + shape.kernel - 1, shape.phases),
        lower_start,
    )


@inlined
def query_index(map_: Map, row: int, column: int, tile: Tile, slot: int, shape: Shape) -> int:
    """Return the index of one of a tile's queries, or of one next to it where there is no such query."""
    y = row + (slot // 2 if tile.below else 0)
    x = column + (slot % 2 if tile.right else 0)
    first = (map_.image * shape.heads + map_.head) * shape.height * shape.width + map_.first_pixel
    return first + shape.dilation * (y * shape.width + x)


@inlined
def row_visibility(row: int, tile: Tile, shape: Shape) -> int:
    """Return which of a tile's queries see this row of its window."""
    if row < tile.lower_start:
        return UPPER
    return BOTH if row < shape.keys_y else LOWER


# ------------------------------------------------------------------------------------------------ bias and visibility

# Block (r, c) of a table holds what query (y, x) of a tile sees at keys r - (K-1) rows below the tile's first query and
# in four columns, of which the first is c - (K-1) to the right of it: entries r - y and c - x to c - x + 3. Blocks four
# columns apart are neighbors in memory, as they are in a row of a window.


@inlined
def bias_offset(row: int, column: int, phases: int) -> int:
    return ((row * QUAD + column % QUAD) * phases + column // QUAD) * LANES


@compiled
def fill_bias(bias: Any, padded_table: Any, table: Any, head: int, shape: Shape) -> None:
    """Lay out the blocks of a head's table (2K-1, 2K-1); `padded_table` is room for a copy with margins."""
    side, row_stride, like = 2 * shape.kernel - 1, shape.table_row_stride, broadcast(bias[0], LANES)
    padded_table[:] = 0
    copy_rows(padded_table, row_stride + 1, row_stride, table, head * side * side, side, side, side, LOG2_E)
    for row in range(side + 1):
        for column in range(side + 1):
            if column % LANES < QUAD:  # four blocks at a time, each four columns from the one before
                offset = (row + 1) * row_stride + column + 1
                interleave(
                    bias, bias_offset(row, column, shape.phases),
                    load(padded_table, offset, like), load(padded_table, offset - 1, like),
                    load(padded_table, offset - row_stride, like), load(padded_table, offset - row_stride - 1, like),
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
                    total += grad_bias[bias_offset(row + y, column + x - key, shape.phases) + lane]
            grad_table[(head * side + row) * side + column] = total


@compiled
def fill_masks(masks: Any, map_: Map, column: int, blocks: int, shape: Shape) -> None:
    """Write for each block of a row what is added to its logits, 0 or -∞: for rows that BOTH, UPPER and LOWER see."""
    window = first_key(column, map_.width, shape.keys_x)
    for block in range(blocks):
        for lane in range(LANES):
            y, x, key = lane // 8, column + lane // QUAD % 2, window + QUAD * block + lane % QUAD
            first = first_key(x, map_.width, shape.keys_x)
            visible = x < map_.width and first <= key < first + shape.keys_x
            for rows in range(3):
                offset = (rows * blocks + block) * LANES + lane
                masks[offset] = 0 if visible and (rows == BOTH or rows == UPPER + y) else -np.inf


@inlined
def column_windows(map_: Map, column: int, shape: Shape) -> Any:
    """Return where the windows of a column of tiles begin: what its masks follow from."""
    right = first_key(column + 1, map_.width, shape.keys_x) - column
    return first_key(column, map_.width, shape.keys_x) - column, right if column + 1 < map_.width else NO_WINDOW


# ------------------------------------------------------------------------------------------------ packed memory


@compiled
def pack(target: Any, source: StridedTensor, map_: Map, first_row: int, stop_row: int, shape: Shape) -> None:
    """Copy some rows of a sub-map, pixels one behind the other."""
    for row in range(first_row, stop_row):
        target_start = (row - first_row) * shape.row_stride
        source_start, step = _row_offset(source, map_, row, shape)
        load_rows(target, target_start, shape.pixel_stride, source, source_start, step, map_.width, shape.depth, 1.0)
        end = target_start + map_.width * shape.pixel_stride
        target[end : end + PAD_PIXELS * shape.pixel_stride] = 0


@compiled
def unpack(
    target: StridedTensor, source: Any, map_: Map, first_row: int, stop_row: int, shape: Shape, factor: float
) -> None:
    """Copy packed rows back, times a factor."""
    for row in range(first_row, stop_row):
        target_start, step = _row_offset(target, map_, row, shape)
        source_start = (row - first_row) * shape.row_stride
        store_rows(
            target, target_start, step, source, source_start, shape.pixel_stride, map_.width, shape.depth, factor
        )


@compiled
def add_packed(
    target: StridedTensor, source: Any, map_: Map, first_row: int, stop_row: int, shape: Shape, factor: float
) -> None:
    like, vectorized = broadcast(source[0], LANES), shape.depth - shape.depth % LANES
    for row in range(first_row, stop_row):
        target_start, step = _row_offset(target, map_, row, shape)
        source_start = (row - first_row) * shape.row_stride
        for _ in range(map_.width):
            for channel in range(0, vectorized, LANES):
                addend = factor * load(source, source_start + channel, like)
                total = load(target.elements, target_start + channel, like) + addend
                store(target.elements, target_start + channel, total)
            for channel in range(vectorized, shape.depth):
                target.elements[target_start + channel] += factor * source[source_start + channel]
            target_start, source_start = target_start + step, source_start + shape.pixel_stride


@inlined
def _row_offset(tensor: StridedTensor, map_: Map, row: int, shape: Shape) -> Any:
    """Return where a row of a sub-map begins in a tensor, and how far its pixels are apart."""
    pixel = map_.first_pixel + row * shape.dilation * shape.width
    start = map_.image * tensor.image_stride + map_.head * tensor.head_stride + pixel * tensor.row_stride
    return start, shape.dilation * tensor.row_stride
