"""Shares of points, and of attention, that lie on an object's mask; targets for every position of a map."""

from __future__ import annotations

import numpy as np

from .._checks import Array
from ..layer import LayerTrace


def on_image(points_px: Array, reduction: float) -> Array:
    """Return where points of a map are on the image, both in pixels, the center of pixel i at i.

        place = (p + ½) · reduction - ½

    >>> on_image(np.array([[0.0, 1.0]]), reduction=4)
    array([[1.5, 5.5]])
    """
    place: Array = (points_px + 0.5) * reduction - 0.5
    return place


def share_on_mask(points_px: Array, mask: Array, reduction: float, weights: Array | None = None) -> float:
    """Return the share of points whose nearest pixel of the image lies on a mask.

    A point outside the image is on no object, and counts.

    Args:
        points_px: (..., 2), (y, x), in pixels of a map, the center of its pixel i at i.
        mask: (H, W), of the image: bool, or the share of each pixel on the object, in [0, 1].
        reduction: image pixels per pixel of the map.
        weights: (...), 0 or more, weight of each point, for example the attention it receives; equal weights if None.

    >>> mask = np.zeros((8, 8), bool)
    >>> mask[4:, :4] = True
    >>> share_on_mask(np.array([[1.0, 0.0], [0.0, 1.0]]), mask, reduction=4)
    0.5
    >>> share_on_mask(np.array([[1.0, 0.0], [0.0, 1.0]]), mask, reduction=4, weights=np.array([3.0, 1.0]))
    0.75
    """
    return float(np.average(points_on_mask(points_px, mask, reduction), weights=weights))


def points_on_mask(points_px: Array, mask: Array, reduction: float) -> Array:
    """Return the mask's value at each point's nearest pixel of the image, (...), 0 outside the image.

    Arguments as for `share_on_mask`.
    """
    nearest = np.rint(on_image(points_px, reduction)).astype(int)
    inside = ((nearest >= 0) & (nearest < mask.shape)).all(-1)
    y, x = np.moveaxis(np.clip(nearest, 0, np.array(mask.shape) - 1), -1, 0)
    return np.asarray(mask[y, x] * inside)


def received(trace: LayerTrace) -> Array:
    """Return the attention that each point receives, the mean over queries and a group's heads: (G, Hk, Wk)."""
    per_head = trace.attention[0].mean(1)  # (heads, Ns)
    groups, rows, columns = trace.points_px.shape[1:4]
    mean: Array = per_head.reshape(groups, -1, rows, columns).mean(1)
    return mean


def position_targets(label: int | Array, classes: int, masks: Array, reduction: int, on_objects: float) -> Array:
    """Return a weighted target for every position of a map: they all name what is on the scene.

        t(class, position) = q(class) · u(position),      Σ q = Σ u = 1

    q is the label, shared equally where it names several classes. u gives the weight `on_objects` to the
    positions that an object touches and the rest to the others, equally among each.

    Args:
        label: class index, or (classes,) of zeros and ones.
        classes: number of classes.
        masks: bool (objects, H, W) of the image.
        reduction: image pixels per pixel of the map, along each axis.
        on_objects: in [0, 1]; without effect where every position is on an object, or none is.

    Returns:
        (classes, ⌈H/reduction⌉, ⌈W/reduction⌉) float32.

    >>> mask = np.zeros((1, 4, 4), bool)
    >>> mask[0, 1, 1] = True
    >>> position_targets(1, 2, mask, reduction=2, on_objects=0.25)[1].tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    named = np.eye(classes)[label] if np.ndim(label) == 0 else np.asarray(label) / np.sum(label)
    height, width = masks.shape[1:]
    padded = np.pad(masks.any(0), ((0, -height % reduction), (0, -width % reduction)))
    rows, columns = (side // reduction for side in padded.shape)
    touched = padded.reshape(rows, reduction, columns, reduction).any((1, 3))
    share = on_objects if 0 < touched.sum() < touched.size else touched.mean()
    weights = np.where(touched, share / max(touched.sum(), 1), (1 - share) / max((~touched).sum(), 1))
    targets: Array = (named[:, None, None] * weights).astype(np.float32)
    return targets
