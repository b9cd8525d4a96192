"""How a call is cut into tiles, splits and work items, and how the scratch memory of a thread is laid out."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

from .bias import table_padding
from .tiles import BLOCK_M, TILE_STRIDE
from .vectors import NARROW, PAIR, WIDE

BLOCK_N = 64  # keys in a block, at most; a multiple of 4


class Tiling(NamedTuple):
    """What follows from the sizes of a call alone; the names are those of `deformable.FIELDS`."""

    tile_rows: int
    tile_columns: int
    tiles: int
    splits: int  # of the queries of each (image, head) in the backward pass
    table_start: int  # see `bias.Table`
    table_stride: int
    padded_depth: int  # length of a row of channels in scratch memory: whole vectors


def make_tiling(
    batch_heads: int, depth: int, query_size: tuple[int, int], table_size: tuple[int, int], threads: int
) -> Tiling:
    """Cut a call into tiles and splits.

    Args:
        batch_heads: pairs of an image and a head.
        depth: channels of a head.
    """
    height, width = query_size
    rows, columns = tile_size(height, width, min(BLOCK_M, -(-batch_heads * height * width // threads)))
    tiles = -(-height // rows) * -(-width // columns)
    # Each thread gets as many splits as the others, or so many that it hardly matters.
    splits = 1 if batch_heads >= 4 * threads else min(threads // math.gcd(batch_heads, threads), tiles)
    above, before, behind = table_padding(rows, columns)
    stride = before + table_size[1] + behind
    return Tiling(rows, columns, tiles, splits, above * stride + before, stride, -(-depth // PAIR) * PAIR)


def forward_offsets(tiling: Tiling, table_rows: int) -> tuple[int, ...]:
    """Return where in a thread's memory each array of `deformable.Forward` begins, and the end."""
    padded_depth = tiling.padded_depth
    block, logits, tile = BLOCK_N * padded_depth, BLOCK_N * TILE_STRIDE, padded_depth * TILE_STRIDE
    return _aligned_offsets(
        _table_elements(tiling, table_rows), block, block, logits, tile, tile, tile, TILE_STRIDE, TILE_STRIDE
    )


def backward_offsets(tiling: Tiling, table_rows: int, samples: int) -> tuple[int, ...]:
    """Return where in a thread's memory each array of `deformable.Backward` begins, and the end."""
    padded_depth, cells = tiling.padded_depth, _table_elements(tiling, table_rows)
    block, logits, tile = BLOCK_N * padded_depth, BLOCK_N * TILE_STRIDE, padded_depth * TILE_STRIDE
    all_keys = (samples + 3) * padded_depth
    return _aligned_offsets(
        cells, cells, block, block, logits, logits, *5 * (tile,), TILE_STRIDE, TILE_STRIDE, all_keys, all_keys
    )


def _table_elements(tiling: Tiling, table_rows: int) -> int:
    return (table_rows + 2 * table_padding(tiling.tile_rows, tiling.tile_columns)[0]) * tiling.table_stride


def _aligned_offsets(*lengths: int) -> tuple[int, ...]:
    """Lay arrays of these sizes one after the other, each at the start of a cache line."""
    return tuple(accumulate((-(-size // 16) * 16 for size in lengths), initial=0))


# ------------------------------------------------------------------------------------------------ tiles


def tile_size(height: int, width: int, lanes: int) -> tuple[int, int]:
    """Return rows and columns of the tiles that cover a map at the least cost, with about so many queries at most.

    >>> tile_size(56, 56, 448), tile_size(3, 1000, 448)
    ((8, 56), (1, 334))
    """
    if width > BLOCK_M:
        return 1, -(-width // -(-width // BLOCK_M))
    return min(range(min(max(lanes // width, 1), height), 0, -1), key=lambda rows: _cost(height, width, rows)), width


def _cost(height: int, width: int, rows: int) -> float:
    """Return the time that tiles of so many rows take, in units of a vector in a wide strip."""
    tiles, remainder = divmod(height, rows)
    return tiles * _tile_cost(rows * width) + (_tile_cost(remainder * width) if remainder else 0)


def _tile_cost(lanes: int) -> float:
    """What is left after the wide strips goes into narrow ones, or into one more wide one if it fills half of it."""
    wide, remainder = divmod(lanes, WIDE)
    last = WIDE / NARROW if remainder > WIDE // 2 else 1.7 * -(-remainder // NARROW)
    return 1 + wide * WIDE / NARROW + last
