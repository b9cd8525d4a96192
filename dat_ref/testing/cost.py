"""What an implementation costs in memory: how much more it takes for a larger case.

Only NumPy's memory can be seen from Python; for what is written in another language, or for another library, the
property is not put to the test.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

from .context import CheckContext
from .op_spec import Case, Mismatch, Skip


def memory_grows_by_at_most(ctx: CheckContext, small: Case, large: Case, elements: int) -> None:
    """Require that a larger case takes at most so many float64 numbers more at its peak.

    Raises:
        Mismatch: if it takes more.
        Skip: if its memory cannot be seen.
    """
    if not getattr(ctx.implementation.forward, "numpy_memory", True):
        raise Skip("its memory is not NumPy's")
    peaks = []
    for case in (small, large):
        result, peak = peak_bytes(partial(ctx.call, ctx.implementation, ctx.cast(case)))
        if peak < result.nbytes:
            raise Skip("its memory is not NumPy's")
        peaks.append(peak)
    growth = peaks[1] - peaks[0]
    if growth > 8 * elements:
        raise Mismatch(f"it takes {growth:,} bytes more; {8 * elements:,} would be generous", case=large)


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a call returns, and how much memory it took at its peak."""
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = call()
        return result, tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced:
            tracemalloc.stop()
