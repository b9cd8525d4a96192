"""Window and shifted-window attention (Swin): `dat_ref.peers.window` on tensors.

A layer partitions its map into windows before it projects queries, keys and values. This moves a third of the data that
a partition after the projection would move, and the heads are views.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_tensors
from ._sdpa import is_recording, masked_attention
from ._symbolic import ceil_div, crop, statically_zero
from .attention import attend
from .grid import Size


def window_cells(size: Size, window: int, shift: int, device: torch.device | None = None) -> tuple[Size, Tensor]:
    """Return the size of the grid of windows, and the map pixel (y, x) at each window position, (nW, w², 2).

    Padding positions have pixels outside the map.
    """
    down, across = (ceil_div(length, window) for length in size)
    rows = torch.arange(down * window, device=device).roll(-shift, dims=0).view(down, 1, window, 1)
    columns = torch.arange(across * window, device=device).roll(-shift, dims=0).view(1, across, 1, window)
    shape = (down, across, window, window)
    cells = torch.stack((rows.expand(shape), columns.expand(shape)), dim=-1)
    return (down, across), cells.reshape(down * across, window * window, 2)


def window_visibility(cells: Tensor, size: Size, window: int, shift: int) -> Tensor:
    """Return the keys that each query of a window may attend to: (nW, w², w²) booleans, [window, query, key].

    A cyclic shift puts pixels from opposite borders into one window. A query and a key see each other if, on both axes,
    they come from the same border, and if both are in the map or both in the padding. Results of padding queries are
    dropped.
    """
    check_tensors(cells=cells)
    y, x = cells.unbind(-1)
    padding = (y >= size[0]) | (x >= size[1])
    region = 4 * padding
    if shift:
        region = region + 2 * (y < shift) + (x < shift)
    return region[:, :, None] == region[:, None, :]


def relative_index(window: int, device: torch.device | None = None) -> Tensor:
    """Return the flat table index of the displacement d + w - 1 for each pair of window positions: (w²·w²,)."""
    position = torch.arange(window * window, device=device)
    y, x = position // window, position % window
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
        window: w, window size in pixels.
        shift: cyclic shift in pixels.
        scale: factor of the dot products.
        dropout: probability of dropping an attention weight, for training.
        return_weights: whether to use plain operations and return ``q``, ``k``, ``v`` (B·nW, heads, w², d) and
            ``attention`` (B·nW, heads, w², w²).

    Returns:
        (B, H, W, C), and a dict with the intermediates (empty without `return_weights`).
    """
    check_tensors(qkv=qkv, table=table)
    size = (qkv.shape[1], qkv.shape[2])
    windows = window_partition(qkv, window, shift)
    mask = window_mask(table.to(qkv.dtype), size, window, shift)
    traced: dict[str, Tensor] = {}
    if return_weights:
        q, k, v = split_windows(windows, table.shape[0])
        attended, weights = attend(q, k, v, mask, scale)
        parts = {"q": q, "k": k, "v": v, "attention": weights}
        traced = {name: part.flatten(0, 1) for name, part in parts.items()}
        attended = attended.transpose(2, 3).flatten(3)
    else:
        attended = attend_in_windows(windows, mask, scale=scale, dropout=dropout)
    return window_reverse(attended, size, window, shift), traced


def window_mask(table: Tensor, size: Size, window: int, shift: int) -> Tensor:
    """Return the bias of each window, -inf for invisible keys: (nW, heads, w², w²), or (1, …) if all are equal."""
    check_tensors(table=table)
    heads, area = table.shape[0], window * window
    bias = table.flatten(1).index_select(1, relative_index(window, table.device)).view(1, heads, area, area)
    (down, across), cells = window_cells(size, window, shift, table.device)
    if not shift and statically_zero(down * window - size[0], across * window - size[1]):
        return bias
    visible = window_visibility(cells, size, window, shift)
    return bias.masked_fill(~visible[:, None], float("-inf"))


def window_partition(x: Tensor, window: int, shift: int) -> Tensor:
    """Partition a map into windows, with zero padding: (B, H, W, C) → (B, nW, w², C)."""
    check_tensors(x=x)
    batch, height, width, channels = x.shape
    down, across = ceil_div(height, window), ceil_div(width, window)
    bottom, right = down * window - height, across * window - width
    if not statically_zero(bottom, right):
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    partitioned = x.reshape(batch, down, window, across, window, channels).transpose(2, 3)
    return partitioned.reshape(batch, down * across, window * window, channels)


def window_reverse(windows: Tensor, size: Size, window: int, shift: int) -> Tensor:
    """Merge windows into a map, the inverse of `window_partition`: (B, nW, w², C) → (B, H, W, C)."""
    check_tensors(windows=windows)
    batch, channels = windows.shape[0], windows.shape[3]
    down, across = ceil_div(size[0], window), ceil_div(size[1], window)
    x = windows.reshape(batch, down, across, window, window, channels).transpose(2, 3)
    x = x.reshape(batch, down * window, across * window, channels)
    if shift:
        x = x.roll((shift, shift), dims=(1, 2))
    if not statically_zero(down * window - size[0], across * window - size[1]):
        x = crop(x, size)
    return x


def attend_in_windows(qkv: Tensor, mask: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Attend inside each window.

    Args:
        qkv: (B, nW, w², 3C), projected.
        mask: (nW or 1, heads, w², w²), see `window_mask`.

    Returns:
        (B, nW, w², C).
    """
    check_tensors(qkv=qkv, mask=mask)
    batch, count = qkv.shape[:2]
    heads = mask.shape[1]
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scale}
    if mask.shape[0] == 1 and not torch.compiler.is_compiling():
        q, k, v = split_windows(qkv.flatten(0, 1), heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        return attended.transpose(1, 2).flatten(2).unflatten(0, (batch, count))
    if batch and _by_image(qkv, mask):
        images = [F.scaled_dot_product_attention(*split_windows(one, heads), attn_mask=mask, **options) for one in qkv]
        attended = torch.stack(images) if batch > 1 else images[0][None]
        return attended.transpose(2, 3).flatten(3)
    # Merge windows and heads into one axis, (B, nW·heads, w², d), so that all images share one mask.
    q, k, v = (part.flatten(1, 2) for part in split_windows(qkv, heads))
    shared = mask.expand(count, -1, -1, -1).flatten(0, 1)[None]
    attended = masked_attention(q, k, v, shared, scale=scale, dropout=dropout)
    return attended.unflatten(1, (count, heads)).transpose(2, 3).flatten(3)


def _by_image(qkv: Tensor, mask: Tensor) -> bool:
    """Return whether to attend image by image. This avoids a copy of q, k and v if torch's fused CPU kernel runs."""
    if torch.compiler.is_compiling() or qkv.device.type != "cpu":
        return False
    if is_recording():  # a trace must not depend on whether its example needs gradients
        return False
    return not (torch.is_grad_enabled() and (qkv.requires_grad or mask.requires_grad))


def split_windows(windows: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split projected windows into q, k and v, without a copy: (…, w², 3C) → (…, heads, w², d) each."""
    check_tensors(windows=windows)
    q, k, v = windows.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
