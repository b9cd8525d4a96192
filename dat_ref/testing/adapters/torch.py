"""Adapter of ``torch.nn.functional.grid_sample``, which most ports of the sampler use, with correct coordinates."""

from __future__ import annotations

from typing import Any

from ..torch import from_torch
from . import require

torch = require("torch")


def _bilinear_sample(x: Any, points_px: Any) -> Any:
    """Sample with grid_sample. Its coordinates are (x, y), and -1 and 1 are the edges of the map."""
    size = torch.tensor(x.shape[2:], dtype=points_px.dtype)  # (H, W)
    grid = ((2 * points_px + 1) / size - 1).flip(-1)  # (N, P, 2), (x, y)
    sampled = torch.nn.functional.grid_sample(x, grid[:, :, None], padding_mode="zeros", align_corners=False)
    return sampled[..., 0]


bilinear_sample = from_torch(_bilinear_sample)
bilinear_sample_vjp = bilinear_sample.vjp
