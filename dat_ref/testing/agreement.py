"""Comparison of arrays: with a tolerance in float64, or with an error budget in a lower precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .._checks import Array

BUDGET_FACTOR = 8.0


def disagreement(actual: ArrayLike, expected: ArrayLike, tolerance: float) -> str:
    """Describe where |actual - expected| <= tolerance (1 + |expected|) is false; return "" if it holds everywhere.

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
    """Describe where a low-precision result exceeds its error budget; return "" if it does not.

    The budget of an element is `factor` times the sum of the yardstick's error in this element, the root mean square of
    the yardstick's errors, and one rounding of the true value. The root mean square matters where the yardstick happens
    to be exact.

    Args:
        result: result under test, in the low precision.
        truth: true result, computed in float64.
        yardstick: result of a plain computation in the low precision.
        factor: see above.
    """
    if not result.shape == truth.shape == yardstick.shape:
        return f"{result.shape}, {truth.shape}, {yardstick.shape}"
    if result.dtype != yardstick.dtype:
        return f"result has {result.dtype}, yardstick has {yardstick.dtype}"
    if truth.dtype != np.float64:
        return f"truth has {truth.dtype}, expected float64"
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
    """Require equal shapes and |actual - expected| <= tolerance (1 + |expected|) everywhere. NaN never passes."""
    message = disagreement(actual, expected, tolerance)
    assert not message, f"{what}: {message}"


def assert_within_budget(
    result: Array, truth: Array, yardstick: Array, factor: float = BUDGET_FACTOR, what: str = ""
) -> None:
    """Require that a low-precision result is about as accurate as a plain computation, see `over_budget`."""
    message = over_budget(result, truth, yardstick, factor)
    assert not message, f"{what}: {message}"
