"""When two arrays agree: to a tolerance in float64, or within an error budget in a lower precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .._checks import Array

BUDGET_FACTOR = 8.0


def disagreement(actual: ArrayLike, expected: ArrayLike, tolerance: float) -> str:
    """Return what is wrong in words, "" where |actual - expected| <= tolerance (1 + |expected|) everywhere.

    >>> disagreement([1.0, 2.5], [1.0, 2.0], 1e-9)
    '1 of 2 differ, by up to 0.5'
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return f"shapes {actual.shape} and {expected.shape}"
    error = np.abs(actual - expected)
    wrong = ~(error <= tolerance * (1 + np.abs(expected)))  # a comparison with NaN is false
    return f"{wrong.sum()} of {wrong.size} differ, by up to {error[wrong].max():.3g}" if wrong.any() else ""


def over_budget(result: Array, truth: Array, yardstick: Array, factor: float = BUDGET_FACTOR) -> str:
    """Return what is wrong with a low-precision result in words, "" where it is about as good as a plain one.

    An element may be off by `factor` times (the yardstick's own error there + the root mean square of the yardstick's
    errors + one rounding of the true value). A yardstick that happens to be right in one place is no reason to fail.

    Args:
        result: what is judged, in the low precision.
        truth: the same, computed in float64.
        yardstick: the same mathematics, carried out plainly in the low precision.
    """
    if not result.shape == truth.shape == yardstick.shape:
        return f"{result.shape}, {truth.shape}, {yardstick.shape}"
    if result.dtype != yardstick.dtype:
        return f"{result.dtype} is judged by {yardstick.dtype}"
    if truth.dtype != np.float64:
        return f"truth in {truth.dtype}"
    for name, array in (("truth", truth), ("yardstick", yardstick)):
        if not np.isfinite(array).all():
            return f"the {name} is not finite"
    yardstick_error = np.abs(yardstick - truth)
    typical = np.sqrt(np.square(yardstick_error).mean()) if yardstick_error.size else 0.0
    budget = factor * (yardstick_error + typical + np.finfo(result.dtype).eps * np.abs(truth))
    error = np.abs(result - truth)
    wrong = ~(error <= budget)
    if not wrong.any():
        return ""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.max(error[wrong] / budget[wrong])
    return f"{wrong.sum()} of {wrong.size} over the budget, up to {ratio:.3g} times"


def assert_agree(actual: ArrayLike, expected: ArrayLike, tolerance: float = 1e-12, what: str = "") -> None:
    """Require equal shapes and |actual - expected| <= tolerance (1 + |expected|) everywhere; NaN never passes."""
    message = disagreement(actual, expected, tolerance)
    assert not message, f"{what}: {message}"


def assert_within_budget(
    result: Array, truth: Array, yardstick: Array, factor: float = BUDGET_FACTOR, what: str = ""
) -> None:
    """Require that a low-precision result is about as good as a plain computation in it; see `over_budget`."""
    message = over_budget(result, truth, yardstick, factor)
    assert not message, f"{what}: {message}"
