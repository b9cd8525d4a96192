"""Position biases: one value for one head, one query and one key.

q_n and p_n are the normalized (y, x) of query and key point in the layer's convention.
"""

import math

import numpy as np

from .basic import Array, Tree, affine, conv2d, dot
from .geometry import to_pixel
from .sampling import Plane, bilinear

Point = tuple[float, float]


def table_index(convention: str, q_n: float, p_n: float, size: int, length: int, resolution: str) -> float:
    """Return the index, along one axis of a table with `length` entries, of the displacement from p_n to q_n.

    The center entry, (length - 1) / 2, is displacement 0.
    "pixels":    one entry is one pixel of the given map, center + q_px - p_px
    "fractions": the table covers the displacements of the map that it was built for, H0 = (length + 1) / 2 pixels
                 long. The map is 2 long in normalized coordinates, so the displacement in entries is
                 (q_n - p_n) / 2 * H0 where -1 and 1 are edges (cell_center),
                 (q_n - p_n) / 2 * (H0 - 1) where they are the centers of the end pixels.
    """
    center = (length - 1) / 2.0
    if resolution == "pixels":
        return center + to_pixel(convention, q_n, size) - to_pixel(convention, p_n, size)
    if resolution != "fractions":
        raise ValueError(f"resolution: expected 'fractions' or 'pixels', got {resolution!r}")
    if convention == "cell_center":
        return center + (q_n - p_n) / 2.0 * ((length + 1) / 2.0)
    if length == 1 and math.isinf(p_n):  # one entry for all displacements
        return center
    return center + (q_n - p_n) / 2.0 * ((length - 1) / 2.0)


def table_bias(
    table: Plane,
    q_n: Point,
    p_n: Point,
    *,
    convention: str,
    size: tuple[int, int],
    resolution: str = "fractions",
) -> float:
    """bilinear(table, index_y, index_x), zero outside the table; table of one head, (T_y, T_x)."""
    index_y = table_index(convention, q_n[0], p_n[0], size[0], len(table), resolution)
    index_x = table_index(convention, q_n[1], p_n[1], size[1], len(table[0]), resolution)
    return bilinear(table, index_y, index_x)


def log_distance(displacement: float) -> float:
    """sign(t) log2(1 + |t|) / log2(8) with t = 4 displacement."""
    t = 4.0 * displacement
    return math.copysign(math.log2(1.0 + abs(t)) / math.log2(8.0), t)


def log_cpb_bias(params: Tree, q_n: Point, p_n: Point) -> list[float]:
    """out . relu(hidden . (log_distance(dy), log_distance(dx)) + hidden bias), one value per head."""
    features = [log_distance(q_n[0] - p_n[0]), log_distance(q_n[1] - p_n[1])]
    hidden = affine(features, params["hidden"]["weight"], params["hidden"]["bias"])
    rectified = [max(0.0, value) for value in hidden]
    return [dot(row, rectified) for row in np.asarray(params["out"]["weight"]).tolist()]


def fixed_bias(table: Array, head: int, m: int, n: int) -> float:
    """table[head, m, n] for query m = i W + j and key n = i_k Wk + j_k, wherever the key's point is."""
    return float(table[head, m, n])


def depthwise_bias(query: Array, params: Tree) -> Array:
    """A 3x3 convolution of each channel of the queries (B, C, H, W), added to the attention's output."""
    return conv2d(query, **params["depthwise"], padding=((1, 1), (1, 1)), groups=query.shape[1])
