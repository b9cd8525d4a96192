"""Tests shared by all operations: smoke test, unmodified inputs, shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .context import CheckContext
from .gradients import STEP
from .op_spec import Case, Mismatch, Skip
from .strategies import non_contiguous


def runs(ctx: CheckContext, case: Case) -> None:
    """Require a finite result with the dtype of the inputs."""
    try:
        got = ctx.got(case)
    except Skip as skip:  # single options may be missing, but not the whole function
        raise Mismatch(f"it raised NotImplementedError: {skip}") from skip
    if case.arrays() and got.dtype != ctx.setting.dtype:
        raise Mismatch(f"it returned {got.dtype} for {ctx.setting.dtype} inputs (check it with --dtype {got.dtype})")
    if not np.isfinite(got).all():
        raise Mismatch("it returned NaN or infinity", None, got)


def leaves_inputs_alone(ctx: CheckContext, case: Case) -> None:
    """Require the same result for read-only arrays with negative strides, and unmodified inputs."""
    expected = ctx.got(case)
    try:
        ctx.require_close(ctx.got(case), expected)
    except Mismatch as mismatch:
        raise Mismatch(f"a second call with the same inputs gave another result: {mismatch.message}") from None
    plain = ctx.cast(case)
    given = plain.with_arrays({name: non_contiguous(array) for name, array in plain.arrays().items()})
    try:
        got = ctx.call(ctx.implementation, given)
    except Exception as error:
        raise Mismatch(f"with read-only, strided arrays it raised {type(error).__name__}: {error}") from error
    ctx.require_close(got, expected)
    for name, array in given.arrays().items():
        if not np.array_equal(array, plain.arrays()[name]):
            raise Mismatch(f"it modified {name}")


def shape(ctx: CheckContext, case: Case) -> None:
    """Require the reference's shape."""
    got, expected = ctx.got(case), ctx.expected(case)
    if got.shape != expected.shape:
        raise Mismatch(f"expected shape {expected.shape}, got {got.shape}")


def slopes(*names: str, step: float = STEP) -> Callable[[CheckContext, Case], None]:
    """Return the test of some gradients, or of all: compare them with slopes along random directions."""

    def test(ctx: CheckContext, case: Case) -> None:
        chosen = [name for name in ctx.differentiable_arrays(case) if name.partition(".")[0] in names or not names]
        ctx.compare_slopes(chosen, case, step=step)

    return test
