"""Peak memory beside what was there before: of a fresh process on a CPU, of torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
T = TypeVar("T")
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)

Run = Callable[[], object]
RunFactory = Callable[..., list[Run]]


def extra_bytes(device: str, threads: int, factory: RunFactory, *arguments: Any) -> int | None:
    """Return the most memory a call takes at once beyond what is there before it.

    Args:
        device: on ``"cpu"`` a process is started for it, whose high-water mark is read.
        threads: of that process.
        factory: ``factory(*arguments)`` returns a small run, for what only a first call needs, and the run to measure.
            Both it and the arguments must be picklable.

    Returns:
        bytes, or None where the system does not tell.
    """
    if device == "cuda":
        return _on_cuda(*factory(*arguments))
    if not (_STATUS.exists() and _CLEAR.exists()):
        return None
    return fresh_process(_measure, threads, factory, *arguments)


def _on_cuda(warmup: Run, run: Run) -> int:
    warmup()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, in which everything is imported and nothing has run."""
    # A server that has imported everything forks a process for each call.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dat_ref.bench.run"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _measure(threads: int, factory: RunFactory, *arguments: Any) -> int:
    torch.set_num_threads(threads)
    warmup, run = factory(*arguments)
    warmup()
    gc.collect()
    _trim_heap()
    _CLEAR.write_text(_RESET_PEAK)
    before = _kilobytes("VmRSS")
    run()
    return max(_kilobytes("VmHWM") - before, 0) << 10


def _trim_heap() -> None:
    """Return freed memory to the system: the run would take it again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _kilobytes(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
