"""``torch.nn.functional.grid_sample``: what most ports of the sampler are made of, called as it should be."""

from __future__ import annotations

from typing import Any

from ..torch import from_torch
from . import require

torch = require("torch")


def _bilinear_sample(x: Any, points_px: Any) -> Any:
    """Pixels to grid_sample's coordinates: -1 and 1 are the map's edges, (x, y), each by its own length."""
    size = torch.tensor(x.shape[2:], dtype=points_px.dtype)  # (H, W)
    grid = ((2 * points_px + 1) / size - 1).flip(-1)  # (N, P, 2), (x, y)
    sampled = torch.nn.functional.grid_sample(x, grid[:, :, None], padding_mode="zeros", align_corners=False)
    return sampled[..., 0]


bilinear_sample = from_torch(_bilinear_sample)
bilinear_sample_vjp = bilinear_sample.vjp
