"""Time of a forward pass by kind of operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_KINDS = {
    "linear layers": ("linear", "addmm", "aten::mm", "gemm"),
    "deformable core": ("dat_ref::deformable_attention",),
    "neighborhoods": ("dat_ref::neighborhood_attention",),
    "windows": ("scaled_dot_product",),
    "convolutions": ("conv",),
    "norms": ("layer_norm",),
}
OTHER = "all else"
KINDS = (*_KINDS, OTHER)


def time_shares(forward: Callable[[], object]) -> dict[str, float]:
    """Return the share of each kind of operation in the CPU time of a call.

    The time of an operation includes the operations that it calls. The call must have run before.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        forward()
    times: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.cpu_parent is None:
            _add(event, times)
    total = sum(times.values())
    return {kind: times[kind] / total for kind in KINDS}


def _add(event: torch.autograd.profiler_util.FunctionEvent, times: Counter[str]) -> None:
    """Add the total time of an operation of a known kind; else its own time, then recurse into its children."""
    kind = next((kind for kind, names in _KINDS.items() if any(name in event.name for name in names)), None)
    if kind is not None:
        times[kind] += event.cpu_time_total
        return
    times[OTHER] += event.self_cpu_time_total
    for child in event.cpu_children:
        _add(child, times)
