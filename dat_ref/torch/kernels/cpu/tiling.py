"""Tile sizes, splits and scratch memory layout of a call."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


# ------------------------------------------------------------------------------------------------ scratch memory


class Forward(NamedTuple):
    """Scratch arrays of a thread in the forward kernel. The lanes of a tile are queries."""

    table: Any  # cells of the padded table
    keys: Any  # one row of channels per key
    values: Any  # one row of channels per key
    logits: Any  # tile with one row per key
    queries: Any  # tile with one row per channel
    acc: Any  # tile with one row per channel: unnormalized output
    query_rows: Any  # one row of channels per query
    m: Any  # running maximum of each query's logits
    l: Any  # running sum Σ 2^(logit - m) of each query


def forward_sizes(tiling: Tiling, table_rows: int) -> Forward:
    """Return the elements of each scratch array."""
    block, tile = BLOCK_N * tiling.padded_depth, TILE_STRIDE * tiling.padded_depth
    logits = BLOCK_N * TILE_STRIDE
    return Forward(
        table=_table_elements(tiling, table_rows), keys=block, values=block, logits=logits, queries=tile, acc=tile,
        query_rows=tile, m=TILE_STRIDE, l=TILE_STRIDE,
    )  # fmt: skip


class Backward(NamedTuple):
    """Scratch arrays of a thread in the backward kernel. The lanes of a tile are queries."""

    table: Any  # cells of the padded table
    grad_table: Any
    keys: Any  # one row of channels per key of a block
    values: Any
    logits: Any  # tile with one row per key: logits, then weights
    grad_logits: Any
    queries: Any  # tile with one row per channel
    grad_out: Any
    grad_queries: Any
    query_rows: Any  # one row of channels per query
    grad_out_rows: Any
    lse: Any  # log-sum-exp of each query, base 2
    delta: Any  # ∂O·O of each query
    grad_keys: Any  # one row of channels per key, all keys
    grad_values: Any


def backward_sizes(tiling: Tiling, table_rows: int, samples: int) -> Backward:
    """Return the elements of each scratch array."""
    cells, logits = _table_elements(tiling, table_rows), BLOCK_N * TILE_STRIDE
    block, tile, all_keys = (rows * tiling.padded_depth for rows in (BLOCK_N, TILE_STRIDE, samples + 3))
    return Backward(
        table=cells, grad_table=cells, keys=block, values=block, logits=logits, grad_logits=logits, queries=tile,
        grad_out=tile, grad_queries=tile, query_rows=tile, grad_out_rows=tile, lse=TILE_STRIDE, delta=TILE_STRIDE,
        grad_keys=all_keys, grad_values=all_keys,
    )  # fmt: skip


def _table_elements(tiling: Tiling, table_rows: int) -> int:
    """Return the number of elements of the padded table."""
    return (table_rows + 2 * table_padding(tiling.tile_rows, tiling.tile_columns)[0]) * tiling.table_stride


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
