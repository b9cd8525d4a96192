"""Neighborhood attention in plain PyTorch, by tiles of queries: backend ``"matmul"`` and kernels ``"blockwise"``.

Gathering the K² keys of every query would copy each key K² times. Instead the queries are split into T × T tiles with
T = ⌈K/2⌉. The keys of a tile form a rectangle of at most (T+K-1)², in which a mask hides the keys outside a query's
neighborhood. So the products are dense. With dilation, each interleaved sub-map is split into its own tiles.

With ``"matmul"``, autograd stores the logits of all tiles. The kernels store none: the forward and the backward pass
compute some tiles at a time, and the backward pass recomputes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...peers.neighborhood import axis_kernel
from ._dtypes import wide_dtype
from ._sdpa import masked_attention
from ._symbolic import ceil_div
from .grid import Size
from .registry import NeighborhoodGeometry

# Maximum number of logits that the kernels compute at once: they fit into the cache of a CPU, or occupy an accelerator.
_MAX_LOGITS = {"cpu": 1 << 20}
_DEFAULT_MAX_LOGITS = 1 << 27
_MAX_TILE = 16  # of the kernels; limits the logits of a row of tiles for large K


# ------------------------------------------------------------------------------------------------ one axis


def submap_length(length: int, submap: Tensor, dilation: int) -> Tensor:
    """Return the number of pixels of each sub-map ρ, ⌈(length - ρ)/δ⌉."""
    return (length - submap + dilation - 1) // dilation


def first_key(query: Tensor, length: Tensor, num_keys: int) -> Tensor:
    """Return the first key in the neighborhood of a query, on a sub-map of this length."""
    return torch.minimum((query - num_keys // 2).clamp(min=0), (length - num_keys).clamp(min=0))


class Axis(NamedTuple):
    """One axis, split into tiles of T queries, one sub-map after the other."""

    queries: Tensor  # (tiles, T), queries of each tile
    exists: Tensor  # (tiles, T), False for padding queries
    position: Tensor  # (length,), position of each query in the flattened `queries`
    keys: Tensor  # (tiles, span), keys of each tile
    # (tiles, T, span), displacement + K - 1; any valid index if the key is not visible
    table_offset: Tensor
    visible: Tensor  # (tiles, T, span), whether the key is in the query's neighborhood

    def select_tiles(self, tiles: slice) -> Axis:
        """Return a range of tiles, with the `position` of all tiles."""
        return self._replace(
            queries=self.queries[tiles],
            exists=self.exists[tiles],
            keys=self.keys[tiles],
            table_offset=self.table_offset[tiles],
            visible=self.visible[tiles],
        )


def tile_axis(length: int, kernel: int, dilation: int, tile_size: int, device: torch.device) -> Axis:
    """Split an axis into tiles of `tile_size` queries."""
    num_keys = axis_kernel(length, kernel, dilation)
    longest = ceil_div(length, dilation)  # length of the longest sub-map
    tiles = ceil_div(longest, tile_size)
    span = min(tile_size + num_keys - 1, longest)
    tile = torch.arange(tiles, device=device)[:, None]
    submap = torch.arange(dilation, device=device)[:, None, None]
    lengths = submap_length(length, submap, dilation)
    # Indices inside a sub-map: keys (δ, tiles, span) and queries (δ, tiles, T). Queries past its end repeat the last
    # one, and their results are dropped. Keys past its end are visible to no query.
    first = torch.minimum((tile * tile_size - num_keys // 2).clamp(min=0), (lengths - span).clamp(min=0))
    keys = first + torch.arange(span, device=device)
    position = tile * tile_size + torch.arange(tile_size, device=device)
    query = torch.minimum(position, (lengths - 1).clamp(min=0))
    offset = keys[:, :, None] - first_key(query, lengths, num_keys)[..., None]  # (δ, tiles, T, span)
    table_offset = (keys[:, :, None] - query[..., None] + kernel - 1).clamp(0, 2 * kernel - 2)
    visible = (offset >= 0) & (offset < num_keys)
    query, keys = ((submap + dilation * index).clamp(max=length - 1).flatten(0, 1) for index in (query, keys))
    pixel = torch.arange(length, device=device)
    order = pixel % dilation * (tiles * tile_size) + pixel // dilation
    exists = (position < lengths).flatten(0, 1)
    return Axis(query, exists, order, keys, table_offset.flatten(0, 1), visible.flatten(0, 1))


# ------------------------------------------------------------------------------------------------ two axes


def _pixel_index(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Return the pixel indices of all tiles, from the rows (tiles_y, …) and columns (tiles_x, …) of the tiles."""
    return (rows[:, None, :, None] * width + columns[:, None, :]).flatten()


def _tile_order(axis_y: Axis, axis_x: Axis) -> Tensor:
    """Return the position of each pixel's query in tile order, (H·W,)."""
    tiles, tile_size = axis_x.queries.shape
    tile = (axis_y.position // tile_size)[:, None] * tiles + axis_x.position // tile_size
    rows = tile * tile_size + (axis_y.position % tile_size)[:, None]
    return (rows * tile_size + axis_x.position % tile_size).flatten()


def _select_pixels(x: Tensor, pixels: Tensor) -> Tensor:
    """Select pixels: (B, heads, pixels, d) → (B, heads, selected pixels, d)."""
    # One flattened axis is many times faster than `index_select` along the third axis.
    selected = x.reshape(-1, x.shape[3]).index_select(0, _row_index(x, pixels))
    return selected.view(x.shape[0], x.shape[1], pixels.shape[0], x.shape[3])


def _row_index(x: Tensor, pixels: Tensor) -> Tensor:
    """Return the indices of selected pixels in the flattened axis of images, heads and pixels."""
    return (torch.arange(x.shape[0] * x.shape[1], device=x.device)[:, None] * x.shape[2] + pixels).flatten()


def _gather_tiles(x: Tensor, pixels: Tensor, axis_y: Axis, axis_x: Axis) -> Tensor:
    """Gather the pixels of each tile: (B, heads, H·W, d) → (B, heads, tiles, pixels of a tile, d)."""
    return _select_pixels(x, pixels).unflatten(2, (axis_y.queries.shape[0] * axis_x.queries.shape[0], -1))


def _table_index(side: int, axis_y: Axis, axis_x: Axis) -> Tensor:
    """Return the table index of each pair of query and key, (tiles_y, tiles_x, T, T, span_y, span_x).

    The table is (side, side).
    """
    return axis_y.table_offset[:, None, :, None, :, None] * side + axis_x.table_offset[None, :, None, :, None, :]


def _mask(table: Tensor, axis_y: Axis, axis_x: Axis) -> Tensor:
    """Return the bias of each pair of query and key, -inf for invisible keys: (heads, tiles, T², span_y · span_x)."""
    index = _table_index(table.shape[2], axis_y, axis_x)
    visible = axis_y.visible[:, None, :, None, :, None] & axis_x.visible[None, :, None, :, None, :]
    bias = table.flatten(1).index_select(1, index.flatten()).view(table.shape[0], *index.shape)
    return bias.masked_fill(~visible, float("-inf")).flatten(5, 6).flatten(3, 4).flatten(1, 2)


# ------------------------------------------------------------------------------------------------ "matmul"


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, geometry: NeighborhoodGeometry) -> Tensor:
    """Attend with plain operations; compilers and exporters can treat all sizes as symbols.

    Args:
        q, k, v: (B, heads, H·W, d).
        table: (heads, 2K-1, 2K-1).
        geometry: size (H, W), K, dilation, scale and dropout.

    Returns:
        (B, heads, H·W, d).
    """
    size, kernel, dilation, scale, dropout = geometry
    axis_y, axis_x = (tile_axis(length, kernel, dilation, (kernel + 1) // 2, q.device) for length in size)
    pixels = _pixel_index(axis_y.keys, axis_x.keys, size[1])
    queries = _gather_tiles(q, _pixel_index(axis_y.queries, axis_x.queries, size[1]), axis_y, axis_x)
    keys, values = (_gather_tiles(x, pixels, axis_y, axis_x).flatten(1, 2) for x in (k, v))
    mask = _mask(table.to(q.dtype), axis_y, axis_x).flatten(0, 1)[None]
    attended = masked_attention(queries.flatten(1, 2), keys, values, mask, scale=scale, dropout=dropout)
    return _select_pixels(attended.view(*queries.shape[:-1], v.shape[3]).flatten(2, 3), _tile_order(axis_y, axis_x))


# ------------------------------------------------------------------------------------------------ "blockwise"


def neighborhood_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, size: Size, kernel: int, dilation: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp, see `dat_ref.torch.kernels`."""
    axis_y, axis_x = _axes(size, kernel, dilation, q.device)
    wide, count = wide_dtype(q), axis_y.queries.numel() * axis_x.queries.numel()
    out = q.new_empty(*q.shape[:2], count, v.shape[3], dtype=v.dtype)  # in tile order
    lse = q.new_empty(*q.shape[:2], count, dtype=wide)
    for images, chunk_y, query_slice in _work_chunks(q, axis_y, axis_x):
        query_pixels, key_pixels = (
            _pixel_index(*pair, size[1]) for pair in ((chunk_y.queries, axis_x.queries), (chunk_y.keys, axis_x.keys))
        )
        keys, values = (_gather_tiles(x[images], key_pixels, chunk_y, axis_x) for x in (k, v))
        logits = _logits(
            _gather_tiles(q[images], query_pixels, chunk_y, axis_x), keys, scale, _mask(table.to(wide), chunk_y, axis_x)
        )
        m = logits.amax(-1, keepdim=True)
        weights = logits.sub_(m).exp_()
        l = weights.sum(-1, keepdim=True)
        out[images, :, query_slice] = ((weights.to(v.dtype) @ values) / l.to(v.dtype)).flatten(2, 3)
        lse[images, :, query_slice] = (m + l.log()).flatten(2)
    order = _tile_order(axis_y, axis_x)
    out = torch.empty_like(q, dtype=v.dtype).copy_(_select_pixels(out, order))
    return out, _select_pixels(lse[..., None], order)[..., 0]


def neighborhood_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    size: Size,
    kernel: int,
    dilation: int,
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and table, see `dat_ref.torch.kernels`."""
    axis_y, axis_x = _axes(size, kernel, dilation, q.device)
    wide, count = lse.dtype, axis_y.queries.numel() * axis_x.queries.numel()
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    grad_q = q.new_empty(*q.shape[:2], count, q.shape[3])  # in tile order
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    grad_table = torch.zeros_like(table, dtype=wide)
    for images, chunk_y, query_slice in _work_chunks(q, axis_y, axis_x):
        query_pixels, key_pixels = (
            _pixel_index(*pair, size[1]) for pair in ((chunk_y.queries, axis_x.queries), (chunk_y.keys, axis_x.keys))
        )
        queries, lse_tile = (_gather_tiles(x[images], query_pixels, chunk_y, axis_x) for x in (q, lse[..., None]))
        exists = (chunk_y.exists[:, None, :, None] & axis_x.exists[:, None, :]).flatten(2).flatten(0, 1)[..., None]
        # Padding queries must not contribute to any gradient.
        grad_out_tile, delta_tile = (
            _gather_tiles(x[images], query_pixels, chunk_y, axis_x).masked_fill_(~exists, 0) for x in (grad_out, delta)
        )
        keys, values = (_gather_tiles(x[images], key_pixels, chunk_y, axis_x) for x in (k, v))
        weights = _logits(queries, keys, scale, _mask(table.to(wide), chunk_y, axis_x)).sub_(lse_tile).exp_()
        grad_logits = (grad_out_tile @ values.transpose(3, 4)).to(wide).sub_(delta_tile).mul_(weights)
        grad_logits_cast = grad_logits.to(q.dtype)
        grad_q[images, :, query_slice] = ((grad_logits_cast @ keys) * scale).flatten(2, 3)
        grad_keys = grad_logits_cast.transpose(3, 4) @ (queries * scale)
        grad_values = weights.to(v.dtype).transpose(3, 4) @ grad_out_tile
        key_rows = _row_index(k[images], key_pixels)
        grad_k[images].view(-1, k.shape[3]).index_add_(0, key_rows, grad_keys.flatten(0, 3).to(wide))
        grad_v[images].view(-1, v.shape[3]).index_add_(0, key_rows, grad_values.flatten(0, 3).to(wide))
        table_index = _table_index(table.shape[2], chunk_y, axis_x).flatten()
        grad_table.view(table.shape[0], -1).index_add_(1, table_index, grad_logits.sum(0).flatten(1))
    grad_q_map = _copy_like(_select_pixels(grad_q, _tile_order(axis_y, axis_x)), q)
    return grad_q_map, _copy_like(grad_k, k), _copy_like(grad_v, v), grad_table.to(table.dtype)


def _axes(size: Size, kernel: int, dilation: int, device: torch.device) -> tuple[Axis, Axis]:
    tile_size = min((kernel + 1) // 2, _MAX_TILE)
    axis_y, axis_x = (tile_axis(length, kernel, dilation, tile_size, device) for length in size)
    return axis_y, axis_x


def _work_chunks(q: Tensor, axis_y: Axis, axis_x: Axis) -> Iterator[tuple[slice, Axis, slice]]:
    """Yield ranges of images, rows of tiles, and the range of their queries in tile order."""
    budget = _MAX_LOGITS.get(q.device.type, _DEFAULT_MAX_LOGITS)
    tiles, row_queries = axis_y.queries.shape[0], axis_x.queries.numel() * axis_y.queries.shape[1]  # per row of tiles
    row_logits = q.shape[1] * row_queries * axis_y.keys.shape[1] * axis_x.keys.shape[1]  # per row of tiles of an image
    chunks = ceil_div(tiles, min(max(budget // row_logits, 1), tiles))
    rows = ceil_div(tiles, chunks)
    images = max(budget // (row_logits * rows), 1)
    for start in range(0, tiles, rows):
        chunk_y = axis_y.select_tiles(slice(start, start + rows))
        for image in range(0, q.shape[0], images):
            yield slice(image, image + images), chunk_y, slice(start * row_queries, (start + rows) * row_queries)


def _logits(queries: Tensor, keys: Tensor, scale: float, mask: Tensor) -> Tensor:
    return ((queries * scale) @ keys.transpose(3, 4)).to(mask.dtype).add_(mask)


def _copy_like(x: Tensor, like: Tensor) -> Tensor:
    """Return a copy with the memory layout and dtype of `like`."""
    return torch.empty_like(like).copy_(x)
