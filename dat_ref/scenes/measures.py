"""Do the points go to the object? Shares of points, and of attention, whose place lies on an object's mask."""

from __future__ import annotations

import numpy as np

from .._checks import Array
from ..layer import LayerTrace


def on_image(points_px: Array, reduction: float) -> Array:
    """Return where points of a map are on the image, both in pixels, and the middle of pixel i is at i.

        place = (p + ½) · reduction - ½

    >>> on_image(np.array([[0.0, 1.0]]), reduction=4)
    array([[1.5, 5.5]])
    """
    place: Array = (points_px + 0.5) * reduction - 0.5
    return place


def share_on_mask(points_px: Array, mask: Array, reduction: float, weights: Array | None = None) -> float:
    """Return the share of points whose nearest pixel of the image lies on a mask.

    A point outside the image lies on nothing, and counts.

    Args:
        points_px: (..., 2), (y, x), in pixels of a map; the middle of its pixel i is at i.
        mask: (H, W), of the image: bool, or how much of each pixel counts as on it, in [0, 1].
        reduction: image pixels for one of the map's.
        weights: (...), 0 or more: how much each point counts, such as the attention that it gets; alike if None.

    >>> mask = np.zeros((8, 8), bool)
    >>> mask[4:, :4] = True
    >>> share_on_mask(np.array([[1.0, 0.0], [0.0, 1.0]]), mask, reduction=4)
    0.5
    >>> share_on_mask(np.array([[1.0, 0.0], [0.0, 1.0]]), mask, reduction=4, weights=np.array([3.0, 1.0]))
    0.75
    """
    nearest = np.rint(on_image(points_px, reduction)).astype(int)
    inside = ((nearest >= 0) & (nearest < mask.shape)).all(-1)
    y, x = np.moveaxis(np.clip(nearest, 0, np.array(mask.shape) - 1), -1, 0)
    return float(np.average(mask[y, x] * inside, weights=weights))


def received(trace: LayerTrace) -> Array:
    """Return how much attention each point of an image gets, the mean over queries and a group's heads: (G, Hk, Wk)."""
    of_heads = trace.attention[0].mean(1)  # (heads, Ns)
    groups, rows, columns = trace.points_px.shape[1:4]
    mean: Array = of_heads.reshape(groups, -1, rows, columns).mean(1)
    return mean


def shares_of_layer(trace: LayerTrace, mask: Array, reduction: float) -> tuple[float, float, float]:
    """Return shares on a mask: of a layer's points, of the same points without offsets, of the attention they get.

    Args:
        trace: of one image.
        mask, reduction: see `share_on_mask`.
    """
    points = trace.points_px[0]  # (G, Hk, Wk, 2)
    reference = np.broadcast_to(trace.reference_px[0], points.shape)
    return (
        share_on_mask(points, mask, reduction),
        share_on_mask(reference, mask, reduction),
        share_on_mask(points, mask, reduction, received(trace)),
    )
