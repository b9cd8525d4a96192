"""Window and shifted-window attention (Swin): `dat_ref.peers.window` on tensors.

Windows join the heads' axis, (B, nW·heads, w², d): so one mask serves the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._sizes import ceil_div, crop, surely_zero
from .attention import attend
from .grid import Size


def window_cells(size: Size, window: int, shift: int, device: torch.device | None = None) -> tuple[Size, Tensor]:
    """Return the grid of windows and the map pixel (y, x) that each of their places holds, (nW, w², 2).

    Places of the filling hold pixels beyond the map.
    """
    down, across = (ceil_div(length, window) for length in size)
    rows = torch.arange(down * window, device=device).roll(-shift).view(down, 1, window, 1)
    columns = torch.arange(across * window, device=device).roll(-shift).view(1, across, 1, window)
    shape = (down, across, window, window)
    cells = torch.stack((rows.expand(shape), columns.expand(shape)), dim=-1)
    return (down, across), cells.reshape(down * across, window * window, 2)


def window_visibility(cells: Tensor, size: Size, window: int, shift: int) -> Tensor:
    """Return which key each query of a window may see, (nW, w², w²) of booleans: [window, query, key].

    Two places see each other if they come from the same side of the seam that rolling makes, on both axes, and if both
    lie in the map or both in the filling (whose queries are thrown away).
    """
    y, x = cells.unbind(-1)
    filling = (y >= size[0]) | (x >= size[1])
    region = 4 * filling
    if shift:
        region = region + 2 * (y < shift) + (x < shift)
    return region[:, :, None] == region[:, None, :]


def relative_index(window: int, device: torch.device | None = None) -> Tensor:
    """Return d + w - 1 for each pair of places in a window, flattened into the table: (w²·w²,)."""
    place = torch.arange(window * window, device=device)
    y, x = place // window, place % window
    rows = y[:, None] - y + window - 1
    columns = x[:, None] - x + window - 1
    return (rows * (2 * window - 1) + columns).flatten()


def window_attention(
    qkv: Tensor,
    table: Tensor,
    *,
    window: int,
    shift: int,
    scale: float,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend inside (shifted) windows.

    Args:
        qkv: (B, H, W, 3C), the projected map, channels last.
        table: (heads, 2w-1, 2w-1).
        return_weights: whether to write the attention out and return ``q``, ``k``, ``v`` (B·nW, heads, w², d) and
            ``attention`` (B·nW, heads, w², w²).

    Returns:
        (B, H, W, C), and the weights if asked (else an empty dict).
    """
    heads = table.shape[0]
    height, width = qkv.shape[1:3]
    q, k, v = _cut(qkv, window, shift, heads)
    mask = _window_mask(table.to(qkv.dtype), (height, width), window, shift)
    traced: dict[str, Tensor] = {}
    if return_weights:
        attended, weights = attend(q, k, v, mask, scale)
        parts = {"q": q, "k": k, "v": v, "attention": weights}
        traced = {name: part.unflatten(1, (-1, heads)).flatten(0, 1) for name, part in parts.items()}
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return _lay(attended, (height, width), window, shift, heads), traced


def _window_mask(table: Tensor, size: Size, window: int, shift: int) -> Tensor:
    """Return what is added to the logits, (1, nW·heads, w², w²)."""
    heads, places = table.shape[0], window * window
    bias = table.flatten(1).index_select(1, relative_index(window, table.device)).view(heads, places, places)
    (down, across), cells = window_cells(size, window, shift, table.device)
    bias = bias.expand(down * across, heads, places, places)
    if shift or not surely_zero(down * window - size[0], across * window - size[1]):
        visible = window_visibility(cells, size, window, shift)
        bias = bias.masked_fill(~visible[:, None], float("-inf"))
    return bias.reshape(1, down * across * heads, places, places)


def _cut(qkv: Tensor, window: int, shift: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3C) → q, k, v (B, nW·heads, w², d), zeros in the filling."""
    batch, height, width, channels = qkv.shape
    down, across = ceil_div(height, window), ceil_div(width, window)
    bottom, right = down * window - height, across * window - width
    if not surely_zero(bottom, right):
        qkv = F.pad(qkv, (0, 0, 0, right, 0, bottom))
    if shift:
        qkv = qkv.roll((-shift, -shift), dims=(1, 2))
    cut = qkv.reshape(batch, down, window, across, window, 3, heads, channels // (3 * heads))
    cut = cut.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, B, nH, nW', heads, w, w, d)
    q, k, v = cut.reshape(3, batch, down * across * heads, window * window, channels // (3 * heads)).unbind(0)
    return q, k, v


def _lay(attended: Tensor, size: Size, window: int, shift: int, heads: int) -> Tensor:
    """Put the places of each window back into the map: (B, nW·heads, w², d) → (B, H, W, C)."""
    batch, depth = attended.shape[0], attended.shape[3]
    down, across = ceil_div(size[0], window), ceil_div(size[1], window)
    laid = attended.reshape(batch, down, across, heads, window, window, depth).permute(0, 1, 4, 2, 5, 3, 6)
    laid = laid.reshape(batch, down * window, across * window, heads * depth)
    if shift:
        laid = laid.roll((shift, shift), dims=(1, 2))
    if not surely_zero(down * window - size[0], across * window - size[1]):
        laid = crop(laid, size)
    return laid
