"""How a call is cut into tiles, parts and shares, and how the scratch memory of a thread is laid out."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

from .bias import padding
from .tiles import LANES, ROW
from .vectors import NARROW, PAIR, WIDE

KEYS = 64  # in a block, at most; a multiple of 4


class Cut(NamedTuple):
    """What follows from the sizes of a call alone; the names are those of `deformable.FIELDS`."""

    tile_rows: int
    tile_columns: int
    tiles: int
    parts: int  # of the queries of each (image, head) in the backward pass
    table_origin: int  # see `bias.Table`
    table_stride: int
    channel_row: int  # length of a row of channels in scratch memory: whole vectors


def cut(pairs: int, depth: int, query_size: tuple[int, int], table_size: tuple[int, int], threads: int) -> Cut:
    """Cut a call into tiles and parts.

    Args:
        pairs: of an image and a head.
        depth: channels of a head.
    """
    height, width = query_size
    rows, columns = tile_size(height, width, min(LANES, -(-pairs * height * width // threads)))
    tiles = -(-height // rows) * -(-width // columns)
    # Each thread gets as many parts as the others, or so many that it hardly matters.
    parts = 1 if pairs >= 4 * threads else min(threads // math.gcd(pairs, threads), tiles)
    above, before, behind = padding(rows, columns)
    stride = before + table_size[1] + behind
    return Cut(rows, columns, tiles, parts, above * stride + before, stride, -(-depth // PAIR) * PAIR)


def forward_places(sizes: Cut, table_rows: int) -> tuple[int, ...]:
    """Return where in a thread's memory each array of `deformable.Forward` begins, and the end."""
    row = sizes.channel_row
    block, scores, tile = KEYS * row, KEYS * ROW, row * ROW
    return _places(_cells(sizes, table_rows), block, block, scores, tile, tile, tile, ROW, ROW)


def backward_places(sizes: Cut, table_rows: int, samples: int) -> tuple[int, ...]:
    """Return where in a thread's memory each array of `deformable.Backward` begins, and the end."""
    row, cells = sizes.channel_row, _cells(sizes, table_rows)
    block, scores, tile, all_keys = KEYS * row, KEYS * ROW, row * ROW, (samples + 3) * row
    return _places(cells, cells, block, block, scores, scores, *5 * (tile,), ROW, ROW, all_keys, all_keys)


def _cells(sizes: Cut, table_rows: int) -> int:
    return (table_rows + 2 * padding(sizes.tile_rows, sizes.tile_columns)[0]) * sizes.table_stride


def _places(*sizes: int) -> tuple[int, ...]:
    """Lay arrays of these sizes one after the other, each at the start of a cache line."""
    return tuple(accumulate((-(-size // 16) * 16 for size in sizes), initial=0))


# ------------------------------------------------------------------------------------------------ tiles


def tile_size(height: int, width: int, lanes: int) -> tuple[int, int]:
    """Return rows and columns of the tiles that cover a map at the least cost, with about so many queries at most.

    >>> tile_size(56, 56, 448), tile_size(3, 1000, 448)
    ((8, 56), (1, 334))
    """
    if width > LANES:
        return 1, -(-width // -(-width // LANES))
    return min(range(min(max(lanes // width, 1), height), 0, -1), key=lambda rows: _cost(height, width, rows)), width


def _cost(height: int, width: int, rows: int) -> float:
    """Return the time that tiles of so many rows take, in units of a vector in a wide strip."""
    tiles, rest = divmod(height, rows)
    return tiles * _tile_cost(rows * width) + (_tile_cost(rest * width) if rest else 0)


def _tile_cost(lanes: int) -> float:
    """What is left after the wide strips goes into narrow ones, or into one more wide one if it fills half of it."""
    wide, rest = divmod(lanes, WIDE)
    last = WIDE / NARROW if rest > WIDE // 2 else 1.7 * -(-rest // NARROW)
    return 1 + wide * WIDE / NARROW + last
