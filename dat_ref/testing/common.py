"""Tests that every subject shares: does it run, leave its inputs alone, keep shape and precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .gradients import STEP
from .strategies import awkward
from .subject import Case, Mismatch, Skip
from .trial import Trial


def runs(trial: Trial, case: Case) -> None:
    """It returns finite numbers of the right precision."""
    try:
        got = trial.got(case)
    except Skip as skip:  # an option may be missing, but not everything
        raise Mismatch(f"it raised NotImplementedError: {skip}") from skip
    if case.arrays() and got.dtype != trial.setting.dtype:
        raise Mismatch(f"it returns {got.dtype} for {trial.setting.dtype} (check it with --dtype {got.dtype})")
    if not np.isfinite(got).all():
        raise Mismatch("it returns NaN or infinity", None, got)


def leaves_inputs_alone(trial: Trial, case: Case) -> None:
    """Read-only, strided arrays, stored back to front, give the same and are not written to."""
    expected = trial.got(case)
    try:
        trial.agree(trial.got(case), expected)
    except Mismatch as mismatch:
        raise Mismatch(f"asked again, it answers differently: {mismatch.words}") from None
    plain = trial.cast(case)
    given = plain.with_arrays({name: awkward(array) for name, array in plain.arrays().items()})
    try:
        got = trial.call(trial.implementation, given)
    except Exception as error:
        raise Mismatch(f"with read-only, strided arrays it raised {type(error).__name__}: {error}") from error
    trial.agree(got, expected)
    for name, array in given.arrays().items():
        if not np.array_equal(array, plain.arrays()[name]):
            raise Mismatch(f"it changed {name}")


def shape(trial: Trial, case: Case) -> None:
    """The result has the reference's shape."""
    got, expected = trial.got(case), trial.expected(case)
    if got.shape != expected.shape:
        raise Mismatch(f"expected shape {expected.shape}, got {got.shape}")


def slopes(*names: str, step: float = STEP) -> Callable[[Trial, Case], None]:
    """Return the test of some gradients, or of all: along random directions each is the slope."""

    def test(trial: Trial, case: Case) -> None:
        chosen = [name for name in trial.differentiable(case) if name.partition(".")[0] in names or not names]
        trial.compare_slopes(chosen, case, step=step)

    return test
