"""Tile sizes, splits and scratch memory layout of a call."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

from .bias import table_padding
from .tiles import BLOCK_M, TILE_STRIDE
from .vectors import NARROW, PAIR, WIDE

BLOCK_N = 64  # maximum number of keys in a block, a multiple of 4


class Tiling(NamedTuple):
    """Sizes derived from the sizes of a call. The names are fields of `deformable.FIELDS`."""

    tile_rows: int
    tile_columns: int
    tiles: int
    splits: int  # splits of the queries of each (image, head) in the backward pass
    table_start: int  # see `bias.Table`
    table_stride: int
    padded_depth: int  # channels per row in scratch memory, padded to whole vectors


def make_tiling(
    batch_heads: int, depth: int, query_size: tuple[int, int], table_size: tuple[int, int], threads: int
) -> Tiling:
    """Choose the tiles and splits of a call.

    Args:
        batch_heads: number of images times number of heads.
        depth: channels per head.
        query_size: (H, W).
        table_size: (T_y, T_x).
        threads: number of threads.
    """
    height, width = query_size
    rows, columns = tile_size(height, width, min(BLOCK_M, -(-batch_heads * height * width // threads)))
    tiles = -(-height // rows) * -(-width // columns)
    # With at least 4 work items per thread the load is balanced without splits. Otherwise split so that the number of
    # work items is a multiple of the number of threads.
    splits = 1 if batch_heads >= 4 * threads else min(threads // math.gcd(batch_heads, threads), tiles)
    above, before, behind = table_padding(rows, columns)
    stride = before + table_size[1] + behind
    return Tiling(rows, columns, tiles, splits, above * stride + before, stride, -(-depth // PAIR) * PAIR)


def forward_offsets(tiling: Tiling, table_rows: int) -> tuple[int, ...]:
    """Return the offsets of the arrays of `deformable.Forward` in scratch memory and the total size, in elements."""
    padded_depth = tiling.padded_depth
    block, logits, tile = BLOCK_N * padded_depth, BLOCK_N * TILE_STRIDE, padded_depth * TILE_STRIDE
    return _aligned_offsets(
        _table_elements(tiling, table_rows), block, block, logits, tile, tile, tile, TILE_STRIDE, TILE_STRIDE
    )


def backward_offsets(tiling: Tiling, table_rows: int, samples: int) -> tuple[int, ...]:
    """Return the offsets of the arrays of `deformable.Backward` in scratch memory and the total size, in elements."""
    padded_depth, cells = tiling.padded_depth, _table_elements(tiling, table_rows)
    block, logits, tile = BLOCK_N * padded_depth, BLOCK_N * TILE_STRIDE, padded_depth * TILE_STRIDE
    all_keys = (samples + 3) * padded_depth
    return _aligned_offsets(
        cells, cells, block, block, logits, logits, *5 * (tile,), TILE_STRIDE, TILE_STRIDE, all_keys, all_keys
    )


def _table_elements(tiling: Tiling, table_rows: int) -> int:
    """Return the number of elements of the padded table."""
    return (table_rows + 2 * table_padding(tiling.tile_rows, tiling.tile_columns)[0]) * tiling.table_stride


def _aligned_offsets(*lengths: int) -> tuple[int, ...]:
    """Return the offsets of consecutive arrays, each aligned to 16 elements (a cache line), and the total size."""
    return tuple(accumulate((-(-size // 16) * 16 for size in lengths), initial=0))


# ------------------------------------------------------------------------------------------------ tiles


def tile_size(height: int, width: int, lanes: int) -> tuple[int, int]:
    """Return the rows and columns of the tiles that cover a map at the lowest cost.

    Args:
        height, width: size of the map.
        lanes: approximate maximum number of queries in a tile.

    >>> tile_size(56, 56, 448), tile_size(3, 1000, 448)
    ((8, 56), (1, 334))
    """
    if width > BLOCK_M:
        return 1, -(-width // -(-width // BLOCK_M))
    return min(range(min(max(lanes // width, 1), height), 0, -1), key=lambda rows: _cost(height, width, rows)), width


def _cost(height: int, width: int, rows: int) -> float:
    """Return the estimated time to process a map in tiles of `rows` rows, in units of one vector of a wide strip."""
    tiles, remainder = divmod(height, rows)
    return tiles * _tile_cost(rows * width) + (_tile_cost(remainder * width) if remainder else 0)


def _tile_cost(lanes: int) -> float:
    """Return the estimated time of one tile.

    The remainder after the wide strips is processed in narrow strips, or in one more wide strip if it fills more than
    half of it (`deformable._is_wide`).
    """
    wide, remainder = divmod(lanes, WIDE)
    last = WIDE / NARROW if remainder > WIDE // 2 else 1.7 * -(-remainder // NARROW)
    return 1 + wide * WIDE / NARROW + last
