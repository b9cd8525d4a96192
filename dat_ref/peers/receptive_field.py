"""Receptive field of one attention layer: the pixels whose features enter a query's output as keys or values.

The layer's structure fixes it. For layers with predicted points it depends on the points of one traced forward pass. A
pixel counts if it contributes to a key or value, however small its weight. A sampled point reads at most four pixels,
those with nonzero bilinear weight. Pixels that only determine point positions or attention weights do not count: the
query's own pixel, and the pixels in the window of an offset network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._checks import Array, ShapeError
from ..config import (
    AttentionConfig,
    BiasKind,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    WindowAttentionConfig,
)
from ..layer import BIAS_KERNEL, LayerTrace
from ..ops.grid import Size
from .dat_dcn import DATDCNAttentionConfig, DATDCNTrace
from .deform_conv import DeformableConvConfig, DeformableConvTrace
from .mhsa import MultiHeadAttentionConfig
from .ms_deform_attn import MultiScaleDeformableConfig, MultiScaleDeformableTrace
from .neighborhood import axis_neighbors, padded_size
from .per_query import PerQueryAttentionConfig, PerQueryTrace
from .pyramid import PyramidAttentionConfig
from .window import window_cells, window_visibility

Pixel = tuple[int, int]


def receptive_field(query: Pixel, size: Size, config: AttentionConfig, trace: Any = None, *, image: int = 0) -> Array:
    """Return the receptive field of a query as a boolean mask (H, W).

    Args:
        query: pixel (y, x) of the map.
        size: map size (H, W).
        config: configuration of the attention.
        trace: trace of a forward pass on a map of this size; required for layers with predicted points, otherwise
            ignored.
        image: index of the image in the trace's batch.

    Raises:
        ShapeError: if the query is not a pixel of the map, or if a trace is missing or has another map size.

    >>> receptive_field((0, 2), (2, 4), WindowAttentionConfig(dim=2, heads=1, window_size=2)).astype(int).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if not all(0 <= index < length for index, length in zip(query, size, strict=True)):
        raise ShapeError(f"query: expected a pixel (y, x) of a map of {size}, got {query}")
    if type(config) in _STRUCTURAL:
        return _STRUCTURAL[type(config)](query, size, config)
    if trace is None:
        raise ShapeError(f"trace: expected the trace of a forward pass, needed for {config.kind} attention, got None")
    return _BY_TRACE[type(config)](query, size, config, trace, image)


def sampled_pixels(points_px: Array, size: Size) -> Array:
    """Return the pixels that points (..., 2), (y, x), read with nonzero weight, as a boolean mask (H, W)."""
    flat = points_px.reshape(-1, 2)
    near_y, near_x = (np.abs(flat[:, axis, None] - np.arange(size[axis])) < 1 for axis in range(2))  # (P, H), (P, W)
    return np.any(near_y[:, :, None] & near_x[:, None, :], axis=0)


# ------------------------------------------------------------------------------------------------ by structure


def _whole_map(query: Pixel, size: Size, config: Any) -> Array:
    return np.ones(size, dtype=bool)


def _window(query: Pixel, size: Size, config: WindowAttentionConfig) -> Array:
    _, cells = window_cells(size, config.window_size, config.shift)
    visibility = window_visibility(cells, size, config.window_size, config.shift)
    window, index = np.argwhere((cells == query).all(axis=-1))[0]
    return _to_mask(cells[window][visibility[window, index]], size)


def _to_mask(pixels: Array, size: Size) -> Array:
    mask = np.zeros(size, dtype=bool)
    mask[pixels[:, 0], pixels[:, 1]] = True
    return mask


def _neighborhood(query: Pixel, size: Size, config: NeighborhoodAttentionConfig) -> Array:
    padded = padded_size(size, config)
    rows, columns = (
        axis_neighbors(length, config.kernel_size, config.dilation)[index]
        for length, index in zip(padded, query, strict=True)
    )
    mask = np.zeros(padded, dtype=bool)
    mask[np.ix_(rows, columns)] = True
    return mask[: size[0], : size[1]]


_STRUCTURAL: dict[type, Callable[[Pixel, Size, Any], Array]] = {
    MultiHeadAttentionConfig: _whole_map,
    PyramidAttentionConfig: _whole_map,
    WindowAttentionConfig: _window,
    NeighborhoodAttentionConfig: _neighborhood,
}


# ------------------------------------------------------------------------------------------------ by trace


def _check_size(traced_size: tuple[int, ...], size: Size) -> None:
    if tuple(traced_size) != tuple(size):
        raise ShapeError(f"trace: expected a trace of a map of size {size}, got {tuple(traced_size)}")


def _deformable(query: Pixel, size: Size, config: DeformableAttentionConfig, trace: LayerTrace, image: int) -> Array:
    """Return the receptive field; it is equal for all queries unless a depthwise convolution replaces the bias."""
    _check_size(trace.x.shape[2:], size)
    if config.average_pool:
        covered = [count * config.stride for count in trace.sampled.shape[2:]]
        visible = np.zeros(size, dtype=bool)
        visible[: covered[0], : covered[1]] = True
    else:
        visible = sampled_pixels(trace.points_px[image], size)
    if config.bias is BiasKind.DEPTHWISE:
        rows, columns = (np.abs(np.arange(size[axis]) - query[axis]) <= BIAS_KERNEL // 2 for axis in range(2))
        visible |= rows[:, None] & columns
    return visible


def _deform_conv(
    query: Pixel, size: Size, config: DeformableConvConfig, trace: DeformableConvTrace, image: int
) -> Array:
    _check_size(trace.x.shape[2:], size)
    return sampled_pixels(trace.points_px[image][:, :, query[0], query[1]], size)


def _multi_scale_deformable(
    query: Pixel, size: Size, config: MultiScaleDeformableConfig, trace: MultiScaleDeformableTrace, image: int
) -> Array:
    _check_size(trace.spatial_shapes[0], size)
    return sampled_pixels(trace.points_px[image, query[0] * size[1] + query[1], :, 0], size)


def _per_query(query: Pixel, size: Size, config: PerQueryAttentionConfig, trace: PerQueryTrace, image: int) -> Array:
    _check_size(trace.x.shape[2:], size)
    return sampled_pixels(trace.points_px[image, :, query[0] * size[1] + query[1]], size)


def _dat_dcn(query: Pixel, size: Size, config: DATDCNAttentionConfig, trace: DATDCNTrace, image: int) -> Array:
    _check_size(trace.x.shape[2:], size)
    return sampled_pixels(trace.points_px[image, query[0] * size[1] + query[1]], size)


_BY_TRACE: dict[type, Callable[[Pixel, Size, Any, Any, int], Array]] = {
    DeformableAttentionConfig: _deformable,
    DeformableConvConfig: _deform_conv,
    MultiScaleDeformableConfig: _multi_scale_deformable,
    PerQueryAttentionConfig: _per_query,
    DATDCNAttentionConfig: _dat_dcn,
}
