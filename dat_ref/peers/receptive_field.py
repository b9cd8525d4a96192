"""Receptive field of one attention layer: the pixels whose features enter a query's output as keys or values.

The layer's structure fixes it. For layers with predicted points it depends on the points of one traced forward pass. A
pixel counts if it contributes to a key or value, however small its weight. A sampled point reads at most four pixels,
those with nonzero bilinear weight. Pixels that only determine point positions or attention weights do not count: the
query's own pixel, and the pixels in the window of an offset network. The rule of each system is in its row.
"""

from __future__ import annotations

from typing import Any

from .._checks import Array, ShapeError
from ..config import AttentionConfig
from ..ops.grid import Size
from .attention import Pixel
from .attention import sampled_pixels as sampled_pixels  # re-exported
from .registry import row_of


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

    >>> from dat_ref import WindowAttentionConfig
    >>> receptive_field((0, 2), (2, 4), WindowAttentionConfig(dim=2, heads=1, window_size=2)).astype(int).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if not all(0 <= index < length for index, length in zip(query, size, strict=True)):
        raise ShapeError(f"query: expected a pixel (y, x) of a map of {size}, got {query}")
    row = row_of(config)
    if row.needs_trace and trace is None:
        raise ShapeError(f"trace: expected the trace of a forward pass, needed for {config.kind} attention, got None")
    return row.receptive_field(query, size, config, trace, image)
