"""The whole benchmark, gathered as JSON can hold it."""

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

KERNELS = ("cpu", "triton")  # backends that are compiled at first use
_EXTRA_PACKAGES = ("numba", "triton")  # whose versions matter beside torch's


def benchmark(
    cases: list[Case], sides: tuple[int, ...], options: Options, *, command: str, save: Path | None, log: Log
) -> Results:
    """Measure everything.

    Args:
        cases: one comparison each, or one for each dtype.
        sides: of the maps on which the forward pass is timed; none if empty.
        command: that was typed, for the record.
        save: a JSON file, written anew after every comparison.
        log: is told what comes next.

    Raises:
        Disagreement: if an implementation computes something else; the file is then removed.
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
    """Return results with nothing in them yet."""
    return {"machine": machine(options, command), "comparisons": [], "resolutions": [], "first_use": []}


def save_results(results: Results, path: Path | None) -> None:
    """Write JSON, if there is somewhere to."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ where it ran


def machine(options: Options, command: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
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
    """Return the processor's name, family and widest vectors."""
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
    """Yield how long the first calls of a process take: once, and again when what was compiled is on disk.

    All cases are run, so that every kernel they need is compiled and kept. On a CPU small ones do.
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
