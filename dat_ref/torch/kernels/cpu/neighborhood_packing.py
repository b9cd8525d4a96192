"""Data layout of the neighborhood kernels: packed bands, tiles of queries, windows of keys, bias blocks, masks.

A tile has 2 × 2 queries. Its window is the union of their neighborhoods, at most (K+1)² keys. Each query attends to K²
of them; a mask of -∞ removes the others. Keys are processed in blocks of four neighbors in a row. A block of logits is
one vector, with query i and key j in lane 4·i + j (`lane_shuffles`).

A band of rows of the map is first packed into scratch memory, with the channels padded to whole vectors. Packing
handles strides, dilation (each sub-map is a separate map) and the number of channels, so the kernels see one layout.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .lane_shuffles import LANES, QUAD, inlined, interleave
from .launch import field_reader
from .strided_io import StridedTensor, load_rows, store_rows
from .tiles import copy_rows
from .vectors import broadcast, compiled, load, store

LOG2_E = math.log2(math.e)
PAD_PIXELS = QUAD - 1  # zero pixels after each packed row, for a block that starts at its last key
NO_WINDOW = 2  # not a valid start: relative to the first query, windows start at column 1 or less
BOTH, UPPER, LOWER = 0, 1, 2  # mask of a row of keys: attended by both rows of queries or by one of them


class Shape(NamedTuple):
    """Sizes of a call and derived sizes, made by `neighborhood.make_shape`."""

    batch: int
    heads: int
    height: int
    width: int
    depth: int
    kernel: int
    dilation: int
    keys_y: int  # keys per query on each axis
    keys_x: int
    band_rows: int  # rows of queries in a band, even
    num_bands: int  # bands per sub-map
    band_groups: int  # bands i and i + band_groups have no key in common
    pixel_stride: int  # elements per pixel in packed memory
    row_stride: int  # elements per row of pixels in packed memory
    bias_size: int  # elements in all bias blocks of a head
    phases: int  # bias blocks of a row with equal column modulo 4
    table_row_stride: int  # elements per row of the padded table, enough to load four blocks at its last column


# Copies the sizes from the argument record to local values. LLVM would reload them from memory after each store.
load_shape = field_reader(Shape)


class Map(NamedTuple):
    """A band of a sub-map: rows of queries, and the rows of keys in their neighborhoods."""

    image: int
    head: int
    first_pixel: int  # index of the sub-map's first pixel in the whole map
    height: int  # size of the sub-map
    width: int
    first_row: int  # rows of queries
    stop_row: int
    first_key_row: int
    stop_key_row: int


class Tile(NamedTuple):
    """Tile of 2 × 2 queries (fewer at the border of a map) and its window of keys, as offsets in packed memory."""

    queries: int  # offset of the first query
    right: int  # offset from a query to its right neighbor, 0 if it has none
    below: int  # offset from a query to the one below, 0 if it has none
    keys: int  # offset of the first key of the window
    rows: int  # rows of the window
    blocks: int  # blocks of four keys per row
    bias: int  # offset of the first bias block
    lower_start: int  # first window row that the lower queries attend to


# ------------------------------------------------------------------------------------------------ geometry


@inlined
def first_key(query: int, length: int, num_keys: int) -> int:
    """Return the first key of a query's neighborhood on one axis."""
    return max(min(query - num_keys // 2, length - num_keys), 0)


@compiled
def make_map(item: int, column: int, band: int, shape: Shape) -> Map:
    """Return a band of a sub-map.

    Args:
        item: index over heads, images and first rows of sub-maps; the last varies fastest.
        column: first column of the sub-map.
        band: index of the band in the sub-map.
    """
    rows = min(shape.dilation, shape.height)  # first rows of sub-maps
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
    """Return the tile whose first query is at (row, column)."""
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
    """Return the index of a query of a tile; for a missing query, the index of its neighbor."""
    y = row + (slot // 2 if tile.below else 0)
    x = column + (slot % 2 if tile.right else 0)
    first = (map_.image * shape.heads + map_.head) * shape.height * shape.width + map_.first_pixel
    return first + shape.dilation * (y * shape.width + x)


@inlined
def mask_index(row: int, tile: Tile, shape: Shape) -> int:
    """Return the mask for a row of the window: UPPER, BOTH or LOWER."""
    if row < tile.lower_start:
        return UPPER
    return BOTH if row < shape.keys_y else LOWER


# ------------------------------------------------------------------------------------------------ bias and masks

# Bias block (r, c) contains the bias of four neighboring keys for the four queries of a tile. Relative to the first
# query, the first key is r - (K-1) rows below and c - (K-1) columns to the right. So query (y, x) of the tile reads the
# table at row r - y and columns c - x to c - x + 3. Blocks four columns apart, the neighbors in a row of a window, are
# neighbors in memory.


@inlined
def bias_offset(row: int, column: int, phases: int) -> int:
    """Return the offset of bias block (row, column)."""
    return ((row * QUAD + column % QUAD) * phases + column // QUAD) * LANES


@compiled
def fill_bias(bias: Any, padded_table: Any, table: Any, head: int, shape: Shape) -> None:
    """Write the bias blocks of a head from its table (2K-1, 2K-1). `padded_table` is a scratch buffer."""
    side, row_stride, like = 2 * shape.kernel - 1, shape.table_row_stride, broadcast(bias[0], LANES)
    padded_table[:] = 0
    copy_rows(padded_table, row_stride + 1, row_stride, table, head * side * side, side, side, side, LOG2_E)
    for row in range(side + 1):
        for column in range(side + 1):
            if column % LANES < QUAD:  # write four blocks at once, at columns c, c + 4, c + 8 and c + 12
                offset = (row + 1) * row_stride + column + 1
                interleave(
                    bias, bias_offset(row, column, shape.phases),
                    load(padded_table, offset, like), load(padded_table, offset - 1, like),
                    load(padded_table, offset - row_stride, like), load(padded_table, offset - row_stride - 1, like),
                )  # fmt: skip


@compiled
def fold_bias(grad_table: Any, head: int, grad_bias: Any, shape: Shape) -> None:
    """Write the gradient of a head's table: each entry is the sum of 16 lanes of the bias blocks."""
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
    """Write the additive masks (0 or -∞) of a row of blocks, one set for each of BOTH, UPPER and LOWER."""
    window = first_key(column, map_.width, shape.keys_x)
    for block in range(blocks):
        for lane in range(LANES):
            y, x, key = lane // 8, column + lane // QUAD % 2, window + QUAD * block + lane % QUAD
            first = first_key(x, map_.width, shape.keys_x)
            visible = x < map_.width and first <= key < first + shape.keys_x
            for kind in range(3):
                offset = (kind * blocks + block) * LANES + lane
                masks[offset] = 0 if visible and (kind == BOTH or kind == UPPER + y) else -np.inf


@inlined
def column_windows(map_: Map, column: int, shape: Shape) -> Any:
    """Return the first column of each query's window, relative to `column`. The masks depend only on these."""
    right = first_key(column + 1, map_.width, shape.keys_x) - column
    return first_key(column, map_.width, shape.keys_x) - column, right if column + 1 < map_.width else NO_WINDOW


# ------------------------------------------------------------------------------------------------ packed memory


@compiled
def pack(target: Any, source: StridedTensor, map_: Map, first_row: int, stop_row: int, shape: Shape) -> None:
    """Copy rows of a sub-map to packed memory, with zero pixels after each row."""
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
    """Copy packed rows, multiplied by a factor, back to a tensor."""
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
    """Add packed rows, multiplied by a factor, to a tensor."""
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
    """Return the offset of a row of a sub-map in a tensor, and the stride of its pixels."""
    pixel = map_.first_pixel + row * shape.dilation * shape.width
    start = map_.image * tensor.image_stride + map_.head * tensor.head_stride + pixel * tensor.row_stride
    return start, shape.dilation * tensor.row_stride
