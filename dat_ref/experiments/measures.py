"""How far points are from an object, and how sure a mean is."""

from __future__ import annotations

import numpy as np
from scipy import stats

from .._checks import Array
from ..layer import LayerTrace
from ..scenes.measures import on_image, received, share_on_mask


def distance_to_mask(points_px: Array, mask: Array, reduction: float) -> Array:
    """Return how far each point is from the nearest pixel of a mask, in pixels of the image.

    Args:
        points_px: (..., 2), (y, x), in pixels of a map; the middle of its pixel i is at i.
        mask: bool (H, W), of the image, with a pixel at least.
        reduction: image pixels for one of the map's.

    Returns:
        (...), 0 or more.

    Raises:
        ValueError: if the mask is empty.

    >>> mask = np.zeros((8, 8), bool)
    >>> mask[6, 1] = True
    >>> distance_to_mask(np.array([[1.125, 0.0]]), mask, reduction=4)
    array([0.5])
    """
    if not mask.any():
        raise ValueError("mask: expected a pixel at least, got none")
    positions = on_image(points_px, reduction)
    distances: Array = np.linalg.norm(positions[..., None, :] - np.argwhere(mask), axis=-1)
    return distances.min(-1)


COLUMNS = ("points", "reference", "attention", "distance", "reference_distance")


def group_metrics(trace: LayerTrace, mask: Array, reduction: float) -> list[tuple[float, ...]]:
    """Return `COLUMNS` for each group: shares on the object, then mean distances to it.

    Args:
        trace: of one image.
        mask, reduction: see `share_on_mask`.
    """
    points = trace.points_px[0]
    reference = np.broadcast_to(trace.reference_px[0], points.shape)
    return [
        (
            share_on_mask(group, mask, reduction),
            share_on_mask(unmoved, mask, reduction),
            share_on_mask(group, mask, reduction, weights),
            float(distance_to_mask(group, mask, reduction).mean()),
            float(distance_to_mask(unmoved, mask, reduction).mean()),
        )
        for group, unmoved, weights in zip(points, reference, received(trace))
    ]


def shift_fraction(offsets: Array) -> float:
    """Return what share of offsets is one shift of each group, the same at all places of all scenes.

        |mean offset|² / mean |offset|²,        the means over scenes and places, then over groups

    Args:
        offsets: (scenes, G, Hk, Wk, 2).

    >>> shift_fraction(np.array([1.0, 0.0, 3.0, 0.0]).reshape(1, 1, 1, 2, 2))
    0.8
    """
    squares = (offsets**2).sum(-1).mean()
    return float((offsets.mean((0, 2, 3)) ** 2).sum(-1).mean() / squares) if squares > 0 else 0.0


def interval(values: Array) -> dict[str, float]:
    """Return the mean, and the half-width of its 95 % interval by Student's t.

        half-width = t(0.975; n - 1) · s / √n

    Args:
        values: (n,), n ≥ 2, independent of each other.

    >>> interval(np.array([1.0, 3.0]))
    {'mean': 2.0, 'half_width': 12.706204736174694}
    """
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return {"mean": float(np.mean(values)), "half_width": float(half)}


def welch_difference(ours: Array, theirs: Array) -> dict[str, float]:
    """Return the difference of two means, and the half-width of its 95 % interval by Welch's t.

        half-width = t(0.975; ν) · e,    e² = s₁²/n₁ + s₂²/n₂,    ν = e⁴ / (s₁⁴/(n₁² (n₁ - 1)) + s₂⁴/(n₂² (n₂ - 1)))

    Args:
        ours, theirs: (n,), n ≥ 2 and not always the same, all independent of each other.

    >>> found = welch_difference(np.array([2.0, 4.0]), np.array([1.0, 3.0]))
    >>> found["mean"], round(found["half_width"], 4)
    (1.0, 6.0849)
    """
    parts = np.array([np.var(values, ddof=1) / len(values) for values in (ours, theirs)])
    error = parts.sum()
    mean = float(np.mean(ours) - np.mean(theirs))
    if error == 0:
        return {"mean": mean, "half_width": 0.0}
    freedom = error**2 / (parts**2 / [len(values) - 1 for values in (ours, theirs)]).sum()
    return {"mean": mean, "half_width": float(stats.t.ppf(0.975, freedom) * np.sqrt(error))}
