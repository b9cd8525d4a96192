"""Peak additional memory of a call: of a new process on a CPU, of torch's allocator on a GPU."""

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
    """Return the peak memory of a call, minus the memory in use before it.

    Args:
        device: ``"cpu"`` or ``"cuda"``. On a CPU, the peak resident memory of a new process is measured.
        threads: number of CPU threads of that process.
        factory: ``factory(*arguments)`` returns a warm-up run, for the memory that only a first call needs, and the run
            to measure. It and its arguments must be picklable.

    Returns:
        bytes, or None if the system does not report them.
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
    """Call a function in a new process, in which the package is imported and nothing has run."""
    # The fork server imports the package once and forks a process for each call.
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
    """Return freed memory to the system. Otherwise the run could reuse it, and it would not be measured."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # exists only in glibc
    if trim is not None:
        trim(0)


def _kilobytes(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
