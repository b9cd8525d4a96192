"""Neighborhood attention with a relative bias: `dat_ref.peers.neighborhood` on tensors.

Gathering the K² keys of every query would copy each key K² times. Instead the queries are cut into K × K tiles; the
keys that a tile needs form a rectangle of at most (2K - 1)², and inside it a mask hides what a query does not see. A
key is copied fewer than four times, and the products are dense ones. With dilation every interleaved sub-map is cut
into tiles of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._sizes import ceil_div, crop, surely_zero
from .attention import attend
from .grid import Size


def axis_kernel(length: int, kernel: int, dilation: int = 1) -> int:
    """Return how many keys a query of an axis sees: K, or as many as the shortest sub-map has."""
    return min(kernel, length) if dilation == 1 else min(kernel, max(length // dilation, 1))


def axis_neighbors(length: int, kernel: int, dilation: int = 1, device: torch.device | None = None) -> Tensor:
    """Return the keys that each query of an axis sees, (length, `axis_kernel`).

    >>> axis_neighbors(5, 3).tolist()
    [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    """
    seen = axis_kernel(length, kernel, dilation)
    query = torch.arange(length, device=device)
    place, submap = query // dilation, query % dilation
    first = _first_key(place, _submap_length(length, submap, dilation), seen)
    return submap[:, None] + dilation * (first[:, None] + torch.arange(seen, device=device))


def _submap_length(length: int, submap: Tensor, dilation: int) -> Tensor:
    """Return ⌈(length - ρ)/δ⌉, the pixels of each sub-map ρ."""
    return (length - submap + dilation - 1) // dilation


def _first_key(query: Tensor, length: Tensor, seen: int) -> Tensor:
    return torch.minimum((query - seen // 2).clamp(min=0), (length - seen).clamp(min=0))


def neighbor_index(
    size: Size, kernel: int, dilation: int = 1, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return for each query its keys, and where in the (2K-1)² table each displacement stands; both (H·W, K_y·K_x)."""
    rows, columns = (axis_neighbors(length, kernel, dilation, device) for length in size)
    row_shift = (rows - torch.arange(size[0], device=device)[:, None]) // dilation + kernel - 1
    column_shift = (columns - torch.arange(size[1], device=device)[:, None]) // dilation + kernel - 1
    keys = rows[:, None, :, None] * size[1] + columns[None, :, None, :]  # (H, W, K_y, K_x)
    table = row_shift[:, None, :, None] * (2 * kernel - 1) + column_shift[None, :, None, :]
    count = size[0] * size[1]
    return keys.reshape(count, -1), table.reshape(count, -1)


def neighborhood_attention(
    qkv: Tensor,
    table: Tensor,
    *,
    scale: float,
    dilation: int = 1,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend to the K × K keys around each query; at the border the neighborhood slides inwards.

    Args:
        qkv: (B, H, W, 3C), the projected map, channels last.
        table: (heads, 2K-1, 2K-1).
        dilation: δ, distance in pixels between neighbors.
        return_weights: whether to gather each query's keys and return ``q`` (B, heads, H·W, 1, d), ``k``, ``v`` (B,
            heads, H·W, K_y·K_x, d), ``attention`` (B, heads, H·W, 1, K_y·K_x) and ``neighbors`` (H·W, K_y·K_x).

    Returns:
        (B, H, W, C), and the weights if asked (else an empty dict).
    """
    if return_weights:
        return _gathered(qkv, table, scale, dilation)
    return _tiled(qkv, table, scale, dilation, dropout), {}


# ------------------------------------------------------------------------------------------------ query by query


def _gathered(qkv: Tensor, table: Tensor, scale: float, dilation: int) -> tuple[Tensor, dict[str, Tensor]]:
    batch, height, width, channels = qkv.shape
    heads, kernel = table.shape[0], (table.shape[1] + 1) // 2
    split = qkv.reshape(batch, height * width, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4)
    neighbors, places = neighbor_index((height, width), kernel, dilation, qkv.device)
    q, k, v = split[0][:, :, :, None], split[1][:, :, neighbors], split[2][:, :, neighbors]
    bias = table.flatten(1)[:, places][:, :, None]  # (heads, H·W, 1, K²)
    attended, weights = attend(q, k, v, bias, scale)
    merged = attended[:, :, :, 0].transpose(1, 2).reshape(batch, height, width, channels // 3)
    return merged, {"q": q, "k": k, "v": v, "attention": weights, "neighbors": neighbors}


# ------------------------------------------------------------------------------------------------ tile by tile


class _Axis(NamedTuple):
    """One axis cut into tiles of K queries, sub-map after sub-map."""

    tiles: int
    span: int  # keys of a tile
    queries: Tensor  # (tiles · K,), the queries of each tile
    places: Tensor  # (length,), where among those each query is
    keys: Tensor  # (tiles · span,), the keys of each tile
    shift: Tensor  # (tiles, K, span), displacement + K - 1, any valid number where the query does not see the key
    seen: Tensor  # (tiles, K, span)


def _cut_axis(length: int, kernel: int, dilation: int, device: torch.device) -> _Axis:
    seen_keys = axis_kernel(length, kernel, dilation)
    longest = ceil_div(length, dilation)  # of the sub-maps
    tiles = ceil_div(longest, kernel)
    span = min(kernel + seen_keys - 1, longest)
    tile = torch.arange(tiles, device=device)[:, None]
    submap = torch.arange(dilation, device=device)[:, None, None]
    lengths = _submap_length(length, submap, dilation)
    # Counted inside a sub-map: keys (δ, tiles, span) and queries (δ, tiles, K). Queries beyond its end repeat the last
    # one, and their results are thrown away; keys beyond it are seen by nobody.
    first = torch.minimum((tile * kernel - seen_keys // 2).clamp(min=0), (lengths - span).clamp(min=0))
    keys = first + torch.arange(span, device=device)
    query = torch.minimum(tile * kernel + torch.arange(kernel, device=device), (lengths - 1).clamp(min=0))
    offset = keys[:, :, None] - _first_key(query, lengths, seen_keys)[..., None]  # (δ, tiles, K, span)
    shift = (keys[:, :, None] - query[..., None] + kernel - 1).clamp(0, 2 * kernel - 2)
    seen = (offset >= 0) & (offset < seen_keys)
    in_map = [(submap + dilation * steps).clamp(max=length - 1).flatten() for steps in (query, keys)]
    pixel = torch.arange(length, device=device)
    places = pixel % dilation * (tiles * kernel) + pixel // dilation
    return _Axis(dilation * tiles, span, in_map[0], places, in_map[1], shift.flatten(0, 1), seen.flatten(0, 1))


def _tiled(qkv: Tensor, table: Tensor, scale: float, dilation: int, dropout: float) -> Tensor:
    batch, height, width, channels = qkv.shape
    heads, kernel = table.shape[0], (table.shape[1] + 1) // 2
    depth = channels // (3 * heads)
    down, across = (_cut_axis(length, kernel, dilation, qkv.device) for length in (height, width))
    tiles = down.tiles * across.tiles * heads  # tiles join the heads' axis, so that one mask serves the whole batch

    q, kv = qkv.split((channels // 3, 2 * channels // 3), dim=3)
    bottom, right = down.tiles * kernel - height, across.tiles * kernel - width
    filled = not surely_zero(bottom, right)
    if dilation > 1:
        q = q.index_select(1, down.queries).index_select(2, across.queries)
    elif filled:
        q = F.pad(q, (0, 0, 0, right, 0, bottom))
    q = q.reshape(batch, down.tiles, kernel, across.tiles, kernel, heads, depth).permute(0, 1, 3, 5, 2, 4, 6)
    q = q.reshape(batch, tiles, kernel * kernel, depth)
    kv = kv.index_select(1, down.keys).index_select(2, across.keys)
    kv = kv.reshape(batch, down.tiles, down.span, across.tiles, across.span, 2, heads, depth)
    kv = kv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (2, B, tiles down, tiles across, heads, span_y, span_x, d)
    k, v = kv.reshape(2, batch, tiles, down.span * across.span, depth).unbind(0)

    mask = _tile_mask(table.to(q.dtype), down, across)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    attended = attended.reshape(batch, down.tiles, across.tiles, heads, kernel, kernel, depth)
    attended = attended.permute(0, 1, 4, 2, 5, 3, 6)
    attended = attended.reshape(batch, down.tiles * kernel, across.tiles * kernel, heads * depth)
    if dilation > 1:
        return attended.index_select(1, down.places).index_select(2, across.places)
    return crop(attended, (height, width)) if filled else attended


def _tile_mask(table: Tensor, down: _Axis, across: _Axis) -> Tensor:
    """Return what is added to the logits: (1, tiles·heads, K², span_y·span_x)."""
    heads, side = table.shape[0], table.shape[2]
    kernel = (side + 1) // 2
    place = down.shift[:, None, :, None, :, None] * side + across.shift[None, :, None, :, None, :]
    seen = down.seen[:, None, :, None, :, None] & across.seen[None, :, None, :, None, :]
    bias = table.flatten(1).index_select(1, place.flatten()).view(heads, *place.shape)
    bias = bias.masked_fill(~seen, float("-inf")).permute(1, 2, 0, 3, 4, 5, 6)
    return bias.reshape(1, down.tiles * across.tiles * heads, kernel * kernel, down.span * across.span)
