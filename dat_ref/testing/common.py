"""Tests that every operation shares: does it run, leave its inputs alone, keep shape and precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .context import CheckContext
from .gradients import STEP
from .op_spec import Case, Mismatch, Skip
from .strategies import non_contiguous


def runs(ctx: CheckContext, case: Case) -> None:
    """It returns finite numbers of the right precision."""
    try:
        got = ctx.got(case)
    except Skip as skip:  # an option may be missing, but not everything
        raise Mismatch(f"it raised NotImplementedError: {skip}") from skip
    if case.arrays() and got.dtype != ctx.setting.dtype:
        raise Mismatch(f"it returns {got.dtype} for {ctx.setting.dtype} (check it with --dtype {got.dtype})")
    if not np.isfinite(got).all():
        raise Mismatch("it returns NaN or infinity", None, got)


def leaves_inputs_alone(ctx: CheckContext, case: Case) -> None:
    """Read-only, strided arrays, stored back to front, give the same and are not written to."""
    expected = ctx.got(case)
    try:
        ctx.require_close(ctx.got(case), expected)
    except Mismatch as mismatch:
        raise Mismatch(f"asked again, it answers differently: {mismatch.message}") from None
    plain = ctx.cast(case)
    given = plain.with_arrays({name: non_contiguous(array) for name, array in plain.arrays().items()})
    try:
        got = ctx.call(ctx.implementation, given)
    except Exception as error:
        raise Mismatch(f"with read-only, strided arrays it raised {type(error).__name__}: {error}") from error
    ctx.require_close(got, expected)
    for name, array in given.arrays().items():
        if not np.array_equal(array, plain.arrays()[name]):
            raise Mismatch(f"it changed {name}")


def shape(ctx: CheckContext, case: Case) -> None:
    """The result has the reference's shape."""
    got, expected = ctx.got(case), ctx.expected(case)
    if got.shape != expected.shape:
        raise Mismatch(f"expected shape {expected.shape}, got {got.shape}")


def slopes(*names: str, step: float = STEP) -> Callable[[CheckContext, Case], None]:
    """Return the test of some gradients, or of all: along random directions each is the slope."""

    def test(ctx: CheckContext, case: Case) -> None:
        chosen = [name for name in ctx.differentiable_arrays(case) if name.partition(".")[0] in names or not names]
        ctx.compare_slopes(chosen, case, step=step)

    return test
