"""Conversion between pixels of the map and of the photograph, and attention maps. Inputs and outputs are arrays.

Integer pixel coordinates are the centers of the pixels: 0 is the center of the first pixel, -0.5 the border of the map.
The order is always (y, x).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Size = tuple[int, int]
Array = NDArray[Any]


class QueryAttention(NamedTuple):
    """Attention of one query: the weight and the position of each of its keys."""

    weights: Array  # (N,)
    keys_px: Array  # (N, 2), (y, x) in pixels of the map


def to_image_px(points_px: ArrayLike, map_size: Size, image_size: Size) -> Array:
    """Convert pixels of the map to pixels of the photograph: (p + 1/2) · image / map - 1/2 on each axis.

    The map and the photograph cover the same region, so distances from the border scale.

    Args:
        points_px: (..., 2), order (y, x), in pixels of the map.
        map_size, image_size: (height, width).

    Returns:
        (..., 2), in pixels of the photograph.
    """
    points = np.asarray(points_px, dtype=np.float64)
    if points.ndim == 0 or points.shape[-1] != 2:
        raise ValueError(f"points_px: expected (..., 2) in (y, x) order, got {points.shape}")
    if min(*map_size, *image_size) < 1:
        raise ValueError(f"map_size, image_size: expected positive sizes, got {map_size} and {image_size}")
    return (points + 0.5) * np.divide(image_size, map_size) - 0.5


def key_importance(attention: ArrayLike, groups: int = 1) -> Array:
    """Return the attention that each key receives: I[b, g, n] = sum_q mean_{m in group g} A[b, m, q, n].

    Args:
        attention: (B, heads, Nq, Ns); each row sums to one. Head m is in group m // (heads / groups).
        groups: number of offset groups.

    Returns:
        (B, groups, Ns). The sum over the keys is Nq, so a uniform share is Nq / Ns.
    """
    attention = np.asarray(attention)
    if attention.ndim != 4 or groups < 1 or attention.shape[1] % groups:
        raise ValueError(
            f"attention: expected (B, heads, Nq, Ns) with heads divisible by groups={groups}, got {attention.shape}"
        )
    batch, heads, queries, keys = attention.shape
    grouped = attention.reshape(batch, groups, heads // groups, queries, keys)
    return grouped.mean(axis=2).sum(axis=2)


def attention_map(weights: ArrayLike, keys_px: ArrayLike, map_size: Size) -> Array:
    """Distribute the attention of one query over the cells of the map.

    A key on a cell (windows, neighborhoods) adds its whole weight to the cell. A deformed point distributes its weight
    to four cells, with its bilinear weights. The part outside the map is dropped, so the sum of the result is the
    attention to the map itself.

    Args:
        weights: (N,).
        keys_px: (N, 2), order (y, x), in pixels of the map.
        map_size: (H, W).

    Returns:
        (H, W).
    """
    weights, keys = np.asarray(weights, dtype=np.float64), np.asarray(keys_px, dtype=np.float64)
    if weights.ndim != 1 or keys.shape != (len(weights), 2):
        raise ValueError(f"weights, keys_px: expected (N,) and (N, 2), got {weights.shape} and {keys.shape}")
    height, width = map_size
    heat = np.zeros((height, width))
    keys = np.clip(keys, -2, np.add(map_size, 1))  # all bilinear weights are zero at these limits
    floor_px = np.floor(keys).astype(int)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner_px = floor_px + (dy, dx)
        share = np.prod(1 - np.abs(keys - corner_px), axis=-1)
        inside = np.all((corner_px >= 0) & (corner_px < map_size), axis=-1)
        np.add.at(heat, tuple(corner_px[inside].T), (weights * share)[inside])
    return heat


def deformable_query_attention(trace: Any, query: tuple[int, int], batch: int = 0) -> QueryAttention:
    """Return the attention of the query at cell (y, x), as one distribution over the points of all groups.

    The weights are the mean over the heads. Each group has the same total weight, and all weights sum to one.
    """
    y, x = _check_query(query, trace_map_size(trace))
    points = item_points(trace, batch)
    groups = len(points)
    row = np.asarray(trace.attention)[batch, :, y * trace.x.shape[-1] + x, :]  # (heads, Ns)
    weights = row.reshape(groups, -1, row.shape[-1]).mean(axis=1) / groups  # (G, Ns)
    return QueryAttention(weights.reshape(-1), points.reshape(-1, 2))


def window_query_attention(trace: Any, query: tuple[int, int], batch: int = 0) -> QueryAttention:
    """Return the attention of the query at cell (y, x) in its (shifted) window: the mean over the heads.

    Masked keys are omitted: keys outside the map, and keys in another region of a shifted window.
    """
    size = trace_map_size(trace)
    cells = np.asarray(trace.cells)  # (windows, positions, 2)
    window, position = np.argwhere((cells == _check_query(query, size)).all(axis=-1))[0]
    row = np.asarray(trace.attention)[batch * len(cells) + window, :, position].mean(axis=0)
    visible = (row > 0) & (cells[window] < size).all(axis=-1)
    return QueryAttention(row[visible], cells[window][visible].astype(np.float64))


def neighborhood_query_attention(trace: Any, query: tuple[int, int], batch: int = 0) -> QueryAttention:
    """Return the attention of the query at cell (y, x) in its neighborhood: the mean over the heads.

    If the map was padded to the size of the neighborhood, keys of the padding are included, outside the map.
    """
    y, x = _check_query(query, trace.size)
    width = trace.padded.shape[-1]
    row = np.asarray(trace.attention)[batch, :, y * width + x].mean(axis=0).reshape(-1)
    cells = np.stack(np.divmod(trace.neighbors[y * width + x], width), axis=-1)
    return QueryAttention(row, cells.astype(np.float64))


def _check_query(query: tuple[int, int], size: Size) -> tuple[int, int]:
    if not all(0 <= coordinate < length for coordinate, length in zip(query, size, strict=True)):
        raise ValueError(f"query: expected (y, x) inside the {size[0]}×{size[1]} map, got {query}")
    return query


def trace_map_size(trace: Any) -> Size:
    """Return (H, W) of the layer's map, from its input (B, C, H, W)."""
    height, width = trace.x.shape[-2:]
    return int(height), int(width)


def item_points(trace: Any, batch: int) -> Array:
    """Return the sampling points of one image, (G, Hk, Wk, 2), in pixels of the map."""
    points = np.asarray(trace.points_px, dtype=np.float64)
    if not -len(points) <= batch < len(points):
        raise ValueError(f"batch: expected an item of a batch of {len(points)}, got {batch}")
    return points[batch]


def item_references(trace: Any, batch: int) -> Array:
    """Return the reference points of one image, (G, Hk, Wk, 2), in pixels of the map.

    In the 2023 release a single key on an axis has no finite reference point (a division by zero). The sampling point
    replaces it.
    """
    points = item_points(trace, batch)
    references = np.broadcast_to(np.asarray(trace.reference_px, dtype=np.float64)[batch], points.shape)
    return np.where(np.isfinite(references), references, points)
