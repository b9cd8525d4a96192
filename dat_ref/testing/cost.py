"""Memory cost of an implementation: growth of its peak memory with the size of the case.

Python can trace NumPy's memory only. For implementations in other languages or libraries the check is skipped.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

from .context import CheckContext
from .op_spec import Case, Mismatch, Skip


def memory_grows_by_at_most(ctx: CheckContext, small: Case, large: Case, elements: int) -> None:
    """Require that a larger case needs at most `elements` more float64 elements of peak memory.

    Raises:
        Mismatch: if it needs more.
        Skip: if the memory cannot be traced.
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
        raise Mismatch(f"peak memory grew by {growth:,} bytes, expected at most {8 * elements:,}", case=large)


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of a call, and its peak memory in bytes."""
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
