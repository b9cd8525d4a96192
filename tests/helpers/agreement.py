"""When two arrays agree: to a tolerance in float64, or within an error budget in a lower precision."""

import numpy as np
from numpy.typing import ArrayLike


def assert_agree(actual: ArrayLike, expected: ArrayLike, tolerance: float = 1e-12, what: str = "") -> None:
    """Require equal shapes and |actual - expected| <= tolerance (1 + |expected|) everywhere; NaN never passes."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shapes {actual.shape} and {expected.shape}"
    error = np.abs(actual - expected)
    wrong = ~(error <= tolerance * (1 + np.abs(expected)))  # a comparison with NaN is false
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} differ, by up to {error[wrong].max():.3g}"


def assert_within_budget(
    result: np.ndarray, truth: np.ndarray, yardstick: np.ndarray, factor: float = 8.0, what: str = ""
) -> None:
    """Require that a low-precision result is about as good as a plain computation in the same precision.

    An element may be off by `factor` times (the yardstick's own error there + the root mean square of the yardstick's
    errors + one rounding of the true value). A yardstick that happens to be right in one place is no reason to fail.

    Args:
        result: what is judged, in the low precision.
        truth: the same, computed in float64.
        yardstick: the same mathematics, carried out plainly in the low precision.
    """
    assert result.shape == truth.shape == yardstick.shape, f"{what}: {result.shape}, {truth.shape}, {yardstick.shape}"
    assert result.dtype == yardstick.dtype, f"{what}: {result.dtype} is judged by {yardstick.dtype}"
    assert truth.dtype == np.float64, f"{what}: truth in {truth.dtype}"
    assert np.isfinite(truth).all(), f"{what}: the truth is not finite"
    assert np.isfinite(yardstick).all(), f"{what}: the yardstick is not finite"
    own = np.abs(yardstick - truth)
    typical = np.sqrt(np.square(own).mean()) if own.size else 0.0
    budget = factor * (own + typical + np.finfo(result.dtype).eps * np.abs(truth))
    error = np.abs(result - truth)
    wrong = ~(error <= budget)
    share = np.max(error[wrong] / budget[wrong]) if wrong.any() else 0.0
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} over the budget, up to {share:.3g} times"
