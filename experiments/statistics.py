"""Confidence intervals of means and of differences of means."""

from __future__ import annotations

import numpy as np
from scipy import stats

from dat_ref._checks import Array


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
