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
from .contenders import BACKWARD, FORWARD, AttentionCase, contender, draw, objection, small
from .measure import Options, comparisons, curve, name_of
from .memory import fresh_process

Found = dict[str, Any]
Tell = Callable[[str], None]

KERNELS = ("cpu", "triton")  # backends that are compiled at first use
_BESIDE = ("numba", "triton")  # whose versions matter beside torch's


def benchmark(
    cases: list[Case], sides: tuple[int, ...], options: Options, *, command: str, save: Path | None, tell: Tell
) -> Found:
    """Measure everything.

    Args:
        cases: one comparison each, or one for each dtype.
        sides: of the maps on which the forward pass is timed; none if empty.
        command: that was typed, for the record.
        save: a JSON file, written anew after every comparison.
        tell: is told what comes next.

    Raises:
        Disagreement: if a contender computes something else; the file is then removed.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    found = nothing(options, command)
    try:
        for kind, some in (
            ("comparisons", comparisons(cases, options, tell)),
            ("resolutions", curve(sides, options, tell)),
        ):
            for each in some:
                found[kind].append(each)
                write(found, save)
    except Disagreement:
        if save is not None:
            save.unlink(missing_ok=True)
        raise
    return found


def nothing(options: Options, command: str) -> Found:
    """Return results with nothing in them yet."""
    return {"machine": machine(options, command), "comparisons": [], "resolutions": [], "first_use": []}


def write(found: Found, path: Path | None) -> None:
    """Write JSON, if there is somewhere to."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ where it ran


def machine(options: Options, command: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions = {"dat_ref": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _BESIDE if importlib.util.find_spec(name)}
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


def first_use(cases: list[Case], options: Options, tell: Tell) -> Iterator[Found]:
    """Yield how long the first calls of a process take: once, and again when what was compiled is on disk.

    All cases are run, so that every kernel they need is compiled and kept. On a CPU small ones do.
    """
    attentions = [case for case in cases if not isinstance(case, ModelCase)]
    for backend in KERNELS:
        for dtype in options.dtypes:
            able = [
                case for case in attentions if not objection(backend, case, draw(small(case), dtype, options.device, 0))
            ]
            if backend not in options.backends or not able:
                continue
            tell(f"first use of {backend} in {name_of(dtype)}")
            ran = [fresh_process(_call, options.threads, backend, able, dtype, options.device) for _ in range(2)]
            yield {"backend": backend, "dtype": name_of(dtype), "first": ran[0], "again": ran[1]}


def _call(threads: int, backend: str, cases: list[AttentionCase], dtype: torch.dtype, device: str) -> float:
    torch.set_num_threads(threads)
    inputs = [(case, draw(case, dtype, device, 0)) for case in (cases if device == "cuda" else map(small, cases))]
    start = time.perf_counter()
    for case, data in inputs:
        contender(backend, case, data).results((FORWARD, BACKWARD))
    return time.perf_counter() - start
