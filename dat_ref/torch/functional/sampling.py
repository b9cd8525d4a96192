"""Bilinear sampling φ: `dat_ref.ops.sampling` on tensors.

Two samplers, equal up to rounding:

- ``"gather"``: four indexed reads. On the lattice it has exactly the right derivative, as the spec does. It supports
  forward-mode derivatives and exports without a GridSample operator.
- ``"grid_sample"``: torch's own operator. It takes normalized coordinates, so rounding decides whether a point on the
  lattice gets the left or the right derivative.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import ConfigError
from .._checks import check_tensors
from ._dtypes import wide_dtype

Sampler = Literal["gather", "grid_sample"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


def check_sampler(sampler: str) -> None:
    """Raise `ConfigError` unless `sampler` is the name of a sampling method."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")


def bilinear_sample(x: Tensor, points_px: Tensor, *, sampler: Sampler = "gather") -> Tensor:
    """Sample maps at continuous points, with zeros outside.

    Args:
        x: (N, C, H, W).
        points_px: (N, P, 2), (y, x), in pixels; 0 is the center of the first pixel.
        sampler: ``"gather"`` or ``"grid_sample"``.

    Returns:
        (N, C, P), float32 or wider. At a pixel center: the value of the pixel. One pixel outside the map or farther: 0.
        At a NaN point: NaN.

    >>> ramp = torch.arange(6.0).reshape(1, 1, 2, 3)
    >>> bilinear_sample(ramp, torch.tensor([[[0.5, 1.0], [1.0, 2.5], [9.0, 0.0]]])).tolist()
    [[[2.5, 2.5, 0.0]]]
    """
    check_tensors(x=x, points_px=points_px)
    sampled = sample_tokens(x.permute(0, 2, 3, 1)[:, :, :, None], points_px[:, None], sampler=sampler)  # (N, 1, P, C)
    return sampled[:, 0].transpose(1, 2)


def _grid_sample(x: Tensor, points_px: Tensor) -> Tensor:
    dtype = wide_dtype(x, points_px)
    point_y, point_x = points_px.to(dtype).unbind(-1)
    height, width = x.shape[2:]
    grid = torch.stack(((2 * point_x + 1) / width - 1, (2 * point_y + 1) / height - 1), dim=-1)
    sampled = F.grid_sample(x.to(dtype), grid[:, None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[:, :, 0]


def sample_tokens(x: Tensor, points_px: Tensor, *, sampler: Sampler = "gather") -> Tensor:
    """Sample every group of channels at its own points, channels last.

    Args:
        x: (B, H, W, G, C/G).
        points_px: (B, G, P, 2), in pixels.
        sampler: ``"gather"`` or ``"grid_sample"``.

    Returns:
        (B, G, P, C/G), float32 or wider.
    """
    check_tensors(x=x, points_px=points_px)
    check_sampler(sampler)
    if sampler == "grid_sample":
        maps = x.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B·G, C/G, H, W)
        return _grid_sample(maps, points_px.flatten(0, 1)).unflatten(0, points_px.shape[:2]).transpose(2, 3)
    batch, height, width, groups, channels = x.shape
    dtype = wide_dtype(x, points_px)
    point_y, point_x = points_px.to(dtype).unbind(-1)
    rows = x.reshape(batch * height * width * groups, channels)
    device = x.device
    # Row of pixel 0 of every image and group; the next pixel is G rows further.
    first_row = torch.arange(batch, device=device)[:, None] * (height * width * groups) + torch.arange(
        groups, device=device
    )
    top, frac_y = _floor_and_fraction(point_y, height)
    left, frac_x = _floor_and_fraction(point_x, width)
    sampled = None
    for row, weight_y in ((top, 1 - frac_y), (top + 1, frac_y)):
        for column, weight_x in ((left, 1 - frac_x), (left + 1, frac_x)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = torch.where(inside, row * width + column, 0)
            corner = F.embedding(first_row[:, :, None] + pixel * groups, rows).to(dtype)  # (B, G, P, C/G)
            weight = weight_y * weight_x * inside  # NaN · 0 stays NaN
            term = corner * weight[..., None]
            sampled = term if sampled is None else sampled + term
    assert sampled is not None
    return sampled


def _floor_and_fraction(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the pixel before a position, and the distance to it in [0, 1), with the right derivative."""
    # More than one pixel outside the map all samples are zero; clamping keeps the integers small. The distance of a
    # NaN position stays NaN.
    position = position.clamp(-2, length + 1)
    floor = position.detach().floor()
    return torch.nan_to_num(floor).long(), position - floor
