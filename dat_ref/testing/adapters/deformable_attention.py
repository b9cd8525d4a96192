"""Adapter of ``deformable-attention`` from PyPI: key positions and sampling of its two-dimensional module.

Its layer differs from DAT's by design (a bias computed by a small network, no normalization of the offsets, grouped
projections), so its outputs cannot be compared. Two properties can be checked: the grid of its keys on the map, and the
value that a key at pixel p reads. Its unit of position is a cell of the key grid, or a pixel if there is one key per
pixel.
"""

from __future__ import annotations

from typing import Any

from ..._checks import Array
from ...ops.grid import Size
from ..torch import from_torch
from . import require

torch = require("torch")
module = require("deformable_attention.deformable_attention_2d", "deformable-attention")


def _sample_with_module(x: Any, positions: Any) -> Any:
    """Run the module with its keys at `positions` (N, 2, H, W), (x, y), and return its samples (N, C, H, W)."""
    channels = x.shape[1]
    x = torch.cat([x, x.new_zeros(len(x), max(4 - channels, 0), *x.shape[2:])], dim=1)  # at least four channels
    layer = module.DeformableAttention2D(
        dim=x.shape[1], dim_head=1, heads=1, offset_groups=1, downsample_factor=1, offset_kernel_size=1
    ).to(x.dtype)
    # Replace the offsets of its network, so that the keys move to `positions`.
    layer.to_offsets.register_forward_hook(lambda *_: positions - module.create_grid_like(positions))
    captured: list[Any] = []
    layer.to_k.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    layer(x)
    return captured[0][:, :channels]


def _bilinear_sample(x: Any, points_px: Any) -> Any:
    """Sample at points (N, P, 2), in chunks of H·W, because the module has one key per pixel."""
    height, width = x.shape[2:]
    chunks = []
    for chunk in points_px.flip(-1).split(height * width, dim=1):  # (N, ≤ H·W, 2), (x, y)
        unused = chunk.new_zeros(len(chunk), height * width - chunk.shape[1], 2)
        positions = torch.cat([chunk, unused], dim=1).transpose(1, 2).reshape(-1, 2, height, width)
        chunks.append(_sample_with_module(x, positions).flatten(2)[:, :, : chunk.shape[1]])
    return torch.cat(chunks, dim=2)


bilinear_sample = from_torch(_bilinear_sample)
bilinear_sample_vjp = bilinear_sample.vjp


def reference_pixels(key_size: Size, size: Size) -> Array:
    """Return the positions of the keys in pixels.

    The module's own functions create the grid and normalize it for its grid_sample, where -1 and 1 are the edges of the
    map.
    """
    grid = module.create_grid_like(torch.zeros(1, 2, *key_size, dtype=torch.float64))
    normalized = module.normalize_grid(grid[None])[0].flip(-1)  # (Hk, Wk, 2), (y, x)
    extent = torch.tensor(size, dtype=torch.float64)
    pixels: Array = ((normalized + 1) * extent / 2 - 0.5).numpy()
    return pixels
