"""The whole benchmark, with results that JSON can store."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..state_files import atomic_write
from ..torch.functional import backends
from .agreement import Disagreement
from .cases import Case, ModelCase
from .implementations import (
    BACKWARD,
    FORWARD,
    AttentionCase,
    draw_inputs,
    make_implementation,
    unsupported_reason,
    warmup_case,
)
from .measure import Options, compare_cases, dtype_name, resolution_sweep
from .memory import fresh_process

Results = dict[str, Any]
Log = Callable[[str], None]

KERNELS = ("cpu", "triton")  # backends that compile at first use
_EXTRA_PACKAGES = ("numba", "triton")  # packages with a relevant version, in addition to torch


def benchmark(
    cases: list[Case], sides: tuple[int, ...], options: Options, *, command: str, save: Path | None, log: Log
) -> Results:
    """Run all measurements.

    Args:
        cases: cases, one comparison each, or one for each dtype.
        sides: sides of the maps of the resolution sweep; empty for no sweep.
        options: options of the measurements.
        command: command line, stored with the results.
        save: path of a JSON file, rewritten after every comparison, or None.
        log: function that is called with a description of each next step.

    Raises:
        Disagreement: if an implementation does not agree with the reference; the file is then removed.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    results = empty_results(options, command)
    try:
        for kind, comparisons in (
            ("comparisons", compare_cases(cases, options, log)),
            ("resolutions", resolution_sweep(sides, options, log)),
        ):
            for comparison in comparisons:
                results[kind].append(comparison)
                save_results(results, save)
    except Disagreement:
        if save is not None:
            save.unlink(missing_ok=True)
        raise
    return results


def empty_results(options: Options, command: str) -> Results:
    """Return results without measurements."""
    return {"machine": machine(options, command), "comparisons": [], "resolutions": [], "first_use": []}


def save_results(results: Results, path: Path | None) -> None:
    """Write the results to a JSON file, if a path is given."""
    if path is not None:
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ machine


def machine(options: Options, command: str) -> dict[str, Any]:
    """Return a description of the machine: hardware, threads, versions, date, command."""
    versions = {"dat_ref": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _EXTRA_PACKAGES if importlib.util.find_spec(name)}
    if options.device == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
    return {
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else _processor(),
        "device": options.device,
        "threads": options.threads,
        "versions": versions,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "missing": backends(missing=True),
        "command": command,
    }


def _processor() -> str:
    """Return the processor's name, its family and its vector instructions."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in lines}
    name = fields.get("model name", platform.processor() or platform.machine())
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return f"{name}{family}, {torch.backends.cpu.get_cpu_capability()}"


# ------------------------------------------------------------------------------------------------ first use


def first_use(cases: list[Case], options: Options, log: Log) -> Iterator[Results]:
    """Yield the time of the first calls of a process: with compilation, and then with compiled kernels from disk.

    All cases are run, so that all their kernels are compiled and stored. On a CPU, small cases suffice.
    """
    attention_cases = [case for case in cases if not isinstance(case, ModelCase)]
    for backend in KERNELS:
        for dtype in options.dtypes:
            supported = [
                case
                for case in attention_cases
                if not unsupported_reason(backend, case, draw_inputs(warmup_case(case), dtype, options.device, 0))
            ]
            if backend not in options.backends or not supported:
                continue
            log(f"first use of {backend} in {dtype_name(dtype)}")
            seconds = [
                fresh_process(_call, options.threads, backend, supported, dtype, options.device) for _ in range(2)
            ]
            yield {"backend": backend, "dtype": dtype_name(dtype), "first": seconds[0], "again": seconds[1]}


def _call(threads: int, backend: str, cases: list[AttentionCase], dtype: torch.dtype, device: str) -> float:
    torch.set_num_threads(threads)
    inputs = [
        (case, draw_inputs(case, dtype, device, 0)) for case in (cases if device == "cuda" else map(warmup_case, cases))
    ]
    start = time.perf_counter()
    for case, data in inputs:
        make_implementation(backend, case, data).results((FORWARD, BACKWARD))
    return time.perf_counter() - start
