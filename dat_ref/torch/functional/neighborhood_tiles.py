"""Neighborhood attention in plain PyTorch, by tiles of queries: backend ``"matmul"`` and kernels ``"blockwise"``.

Gathering the K² keys of every query would copy each key K² times. Instead the queries are cut into T × T tiles with
T = ⌈K/2⌉; the keys that a tile needs form a rectangle of at most (T+K-1)², and inside it a mask hides what a query does
not see. The products are then dense ones. With dilation every interleaved sub-map is cut into tiles of its own.

Autograd on ``"matmul"`` keeps the logits of all tiles. The kernels keep none of them: forward and backward work on some
tiles at a time, and the backward pass computes the weights again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._precision import wide_dtype
from ._sizes import ceil_div
from .grid import Size

# Logits computed at once by the kernels: on a CPU few, so that they stay in cache, elsewhere enough for a whole device.
_LOGITS_AT_ONCE = {"cpu": 1 << 20}
_LOGITS_AT_ONCE_ELSEWHERE = 1 << 27
_LARGEST_TILE = 16  # of the kernels: a row of tiles must not have too many logits, however large K is


# ------------------------------------------------------------------------------------------------ an axis


def axis_kernel(length: int, kernel: int, dilation: int = 1) -> int:
    """Return how many keys a query of an axis sees: K, or as many as the shortest sub-map has."""
    return min(kernel, length) if dilation == 1 else min(kernel, max(length // dilation, 1))


def submap_length(length: int, submap: Tensor, dilation: int) -> Tensor:
    """Return ⌈(length - ρ)/δ⌉, the pixels of each sub-map ρ."""
    return (length - submap + dilation - 1) // dilation


def first_key(query: Tensor, length: Tensor, seen: int) -> Tensor:
    """Return where the neighborhood of a query begins, on a sub-map of this length."""
    return torch.minimum((query - seen // 2).clamp(min=0), (length - seen).clamp(min=0))


class Axis(NamedTuple):
    """One axis cut into tiles of T queries, sub-map after sub-map."""

    queries: Tensor  # (tiles, T), the queries of each tile
    exists: Tensor  # (tiles, T), whether there is such a query
    places: Tensor  # (length,), where among those each query is
    keys: Tensor  # (tiles, span), the keys of each tile
    shift: Tensor  # (tiles, T, span), displacement + K - 1, any valid number where the query does not see the key
    seen: Tensor  # (tiles, T, span)

    def part(self, tiles: slice) -> Axis:
        """Return some of the tiles; `places` stays that of all."""
        return self._replace(
            queries=self.queries[tiles],
            exists=self.exists[tiles],
            keys=self.keys[tiles],
            shift=self.shift[tiles],
            seen=self.seen[tiles],
        )


def cut_axis(length: int, kernel: int, dilation: int, side: int, device: torch.device) -> Axis:
    """Cut an axis into tiles of `side` queries."""
    seen_keys = axis_kernel(length, kernel, dilation)
    longest = ceil_div(length, dilation)  # of the sub-maps
    tiles = ceil_div(longest, side)
    span = min(side + seen_keys - 1, longest)
    tile = torch.arange(tiles, device=device)[:, None]
    submap = torch.arange(dilation, device=device)[:, None, None]
    lengths = submap_length(length, submap, dilation)
    # Counted inside a sub-map: keys (δ, tiles, span) and queries (δ, tiles, T). Queries beyond its end repeat the last
    # one, and their results are thrown away; keys beyond it are seen by nobody.
    first = torch.minimum((tile * side - seen_keys // 2).clamp(min=0), (lengths - span).clamp(min=0))
    keys = first + torch.arange(span, device=device)
    place = tile * side + torch.arange(side, device=device)
    query = torch.minimum(place, (lengths - 1).clamp(min=0))
    offset = keys[:, :, None] - first_key(query, lengths, seen_keys)[..., None]  # (δ, tiles, T, span)
    shift = (keys[:, :, None] - query[..., None] + kernel - 1).clamp(0, 2 * kernel - 2)
    seen = (offset >= 0) & (offset < seen_keys)
    query, keys = ((submap + dilation * steps).clamp(max=length - 1).flatten(0, 1) for steps in (query, keys))
    pixel = torch.arange(length, device=device)
    places = pixel % dilation * (tiles * side) + pixel // dilation
    return Axis(query, (place < lengths).flatten(0, 1), places, keys, shift.flatten(0, 1), seen.flatten(0, 1))


# ------------------------------------------------------------------------------------------------ two axes


def _pixels(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Return the numbers of the pixels of all tiles, from the rows (tiles down, …) and columns (tiles across, …)."""
    return (rows[:, None, :, None] * width + columns[:, None, :]).flatten()


def _places(down: Axis, across: Axis) -> Tensor:
    """Return where in the order of tiles the query of each pixel is, (H·W,)."""
    tiles, side = across.queries.shape
    tile = (down.places // side)[:, None] * tiles + across.places // side
    return ((tile * side + (down.places % side)[:, None]) * side + across.places % side).flatten()


def _select(x: Tensor, pixels: Tensor) -> Tensor:
    """(B, heads, pixels, d) → (B, heads, chosen pixels, d)."""
    chosen = x.reshape(-1, x.shape[3]).index_select(0, _rows(x, pixels))  # many times faster than along the third axis
    return chosen.view(x.shape[0], x.shape[1], pixels.shape[0], x.shape[3])


def _rows(x: Tensor, pixels: Tensor) -> Tensor:
    """Return the numbers of chosen pixels of all images and heads, where those are one axis."""
    return (torch.arange(x.shape[0] * x.shape[1], device=x.device)[:, None] * x.shape[2] + pixels).flatten()


def _cut(x: Tensor, pixels: Tensor, down: Axis, across: Axis) -> Tensor:
    """(B, heads, H·W, d) → (B, heads, tiles, pixels of a tile, d)."""
    return _select(x, pixels).unflatten(2, (down.queries.shape[0] * across.queries.shape[0], -1))


def _table_places(side: int, down: Axis, across: Axis) -> Tensor:
    """Return where in a table (side, side) each pair of a tile reads: (tiles down, across, T, T, span_y, span_x)."""
    return down.shift[:, None, :, None, :, None] * side + across.shift[None, :, None, :, None, :]


def _mask(table: Tensor, down: Axis, across: Axis) -> Tensor:
    """Return what is added to the logits: (heads, tiles, T², span_y · span_x)."""
    place = _table_places(table.shape[2], down, across)
    seen = down.seen[:, None, :, None, :, None] & across.seen[None, :, None, :, None, :]
    bias = table.flatten(1).index_select(1, place.flatten()).view(table.shape[0], *place.shape)
    return bias.masked_fill(~seen, float("-inf")).flatten(5, 6).flatten(3, 4).flatten(1, 2)


# ------------------------------------------------------------------------------------------------ "matmul"


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    size: Size,
    kernel: int,
    dilation: int,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attend with plain operations, of which a compiler or an exporter takes any size for a symbol.

    Args:
        q, k, v: (B, heads, H·W, d).
        table: (heads, 2K-1, 2K-1).
        size: (H, W).

    Returns:
        (B, heads, H·W, d).
    """
    down, across = (cut_axis(length, kernel, dilation, (kernel + 1) // 2, q.device) for length in size)
    pixels = _pixels(down.keys, across.keys, size[1])
    queries = _cut(q, _pixels(down.queries, across.queries, size[1]), down, across)
    keys, values = (_cut(x, pixels, down, across).flatten(1, 2) for x in (k, v))
    mask = _mask(table.to(q.dtype), down, across).flatten(0, 1)[None]
    options = {"attn_mask": mask, "dropout_p": dropout, "scale": scale}
    attended = F.scaled_dot_product_attention(queries.flatten(1, 2), keys, values, **options)  # type: ignore[arg-type]
    return _select(attended.view(*queries.shape[:-1], v.shape[3]).flatten(2, 3), _places(down, across))


# ------------------------------------------------------------------------------------------------ "blockwise"


def neighborhood_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, size: Size, kernel: int, dilation: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute output and logarithms, see `neighborhood_operation`."""
    down, across = _axes(size, kernel, dilation, q.device)
    wide, count = wide_dtype(q), down.queries.numel() * across.queries.numel()
    out = q.new_empty(*q.shape[:2], count, v.shape[3], dtype=v.dtype)  # in the order of tiles
    lse = q.new_empty(*q.shape[:2], count, dtype=wide)
    for images, part, place in _parts(q, down, across):
        query_pixels, key_pixels = (
            _pixels(*pair, size[1]) for pair in ((part.queries, across.queries), (part.keys, across.keys))
        )
        keys, values = (_cut(x[images], key_pixels, part, across) for x in (k, v))
        logits = _logits(_cut(q[images], query_pixels, part, across), keys, scale, _mask(table.to(wide), part, across))
        peak = logits.amax(-1, keepdim=True)
        weights = logits.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        out[images, :, place] = ((weights.to(v.dtype) @ values) / total.to(v.dtype)).flatten(2, 3)
        lse[images, :, place] = (peak + total.log()).flatten(2)
    places = _places(down, across)
    return torch.empty_like(q, dtype=v.dtype).copy_(_select(out, places)), _select(lse[..., None], places)[..., 0]


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
    """Compute the gradients of q, k, v and table, see `neighborhood_operation`."""
    down, across = _axes(size, kernel, dilation, q.device)
    wide, count = lse.dtype, down.queries.numel() * across.queries.numel()
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    grad_q = q.new_empty(*q.shape[:2], count, q.shape[3])  # in the order of tiles
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    grad_table = torch.zeros_like(table, dtype=wide)
    for images, part, place in _parts(q, down, across):
        query_pixels, key_pixels = (
            _pixels(*pair, size[1]) for pair in ((part.queries, across.queries), (part.keys, across.keys))
        )
        queries, logs = (_cut(x[images], query_pixels, part, across) for x in (q, lse[..., None]))
        exists = (part.exists[:, None, :, None] & across.exists[:, None, :]).flatten(2).flatten(0, 1)[..., None]
        # What belongs to no query must give nothing a gradient.
        cotangent, mean = (
            _cut(x[images], query_pixels, part, across).masked_fill_(~exists, 0) for x in (grad_out, delta)
        )
        keys, values = (_cut(x[images], key_pixels, part, across) for x in (k, v))
        weights = _logits(queries, keys, scale, _mask(table.to(wide), part, across)).sub_(logs).exp_()
        grad_logits = (cotangent @ values.transpose(3, 4)).to(wide).sub_(mean).mul_(weights)
        narrow = grad_logits.to(q.dtype)
        grad_q[images, :, place] = ((narrow @ keys) * scale).flatten(2, 3)
        of_keys = narrow.transpose(3, 4) @ (queries * scale)
        of_values = weights.to(v.dtype).transpose(3, 4) @ cotangent
        key_rows = _rows(k[images], key_pixels)
        grad_k[images].view(-1, k.shape[3]).index_add_(0, key_rows, of_keys.flatten(0, 3).to(wide))
        grad_v[images].view(-1, v.shape[3]).index_add_(0, key_rows, of_values.flatten(0, 3).to(wide))
        table_places = _table_places(table.shape[2], part, across).flatten()
        grad_table.view(table.shape[0], -1).index_add_(1, table_places, grad_logits.sum(0).flatten(1))
    of_q = _laid_as(_select(grad_q, _places(down, across)), q)
    return of_q, _laid_as(grad_k, k), _laid_as(grad_v, v), grad_table.to(table.dtype)


def _axes(size: Size, kernel: int, dilation: int, device: torch.device) -> tuple[Axis, Axis]:
    side = min((kernel + 1) // 2, _LARGEST_TILE)
    return cut_axis(size[0], kernel, dilation, side, device), cut_axis(size[1], kernel, dilation, side, device)


def _parts(q: Tensor, down: Axis, across: Axis) -> Iterator[tuple[slice, Axis, slice]]:
    """Cut the work: some images, some rows of tiles, and where their queries are in the order of tiles."""
    budget = _LOGITS_AT_ONCE.get(q.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    tiles, row = down.queries.shape[0], across.queries.numel() * down.queries.shape[1]  # queries in a row of tiles
    logits = q.shape[1] * row * down.keys.shape[1] * across.keys.shape[1]  # of a row of tiles, of an image
    parts = ceil_div(tiles, min(max(budget // logits, 1), tiles))
    rows = ceil_div(tiles, parts)
    images = max(budget // (logits * rows), 1)
    for start in range(0, tiles, rows):
        part = down.part(slice(start, start + rows))
        for image in range(0, q.shape[0], images):
            yield slice(image, image + images), part, slice(start * row, (start + rows) * row)


def _logits(queries: Tensor, keys: Tensor, scale: float, mask: Tensor) -> Tensor:
    return ((queries * scale) @ keys.transpose(3, 4)).to(mask.dtype).add_(mask)


def _laid_as(x: Tensor, like: Tensor) -> Tensor:
    """Return the values in memory and in the dtype as `like` is."""
    return torch.empty_like(like).copy_(x)
