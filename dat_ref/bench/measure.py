"""Comparisons: for each case check the results, then measure time, then memory."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import torch

from .agreement import Results, check
from .cases import Case, CoreCase, ModelCase, resolutions
from .implementations import (
    BACKWARD,
    EAGER,
    FORWARD,
    SDPA,
    AttentionCase,
    Implementation,
    Inputs,
    draw_inputs,
    eager_bytes,
    free_bytes,
    make_implementation,
    unsupported_reason,
    warmup_case,
)
from .memory import extra_bytes
from .models import COMPILED, OPTIMIZED, RELEASED, model_implementations, unavailable
from .profile import time_shares
from .timing import median_seconds


@dataclass(frozen=True)
class Options:
    """Options of the measurements."""

    device: str
    threads: int
    rounds: int
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    model_backends: tuple[str, ...] = ("auto",)
    model_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    compiled: tuple[str, ...] = ()  # models that also run under torch.compile


Comparison = dict[str, Any]


def compare_cases(cases: list[Case], options: Options, log: Callable[[str], None]) -> Iterator[Comparison]:
    """Yield the measurements of each case and dtype, in a form that JSON can store.

    Raises:
        Disagreement: if an implementation does not agree with the reference. Nothing is yielded for its case.
    """
    for case in cases:
        if isinstance(case, ModelCase):
            log(f"{case.name}, {case.description}")
            yield _models(case, options)
            continue
        for dtype in options.dtypes:
            log(f"{case.name}, {case.description}, {dtype_name(dtype)}")
            yield _attention(case, dtype, options, (FORWARD, BACKWARD))


def resolution_sweep(sides: tuple[int, ...], options: Options, log: Callable[[str], None]) -> Iterator[Comparison]:
    """Yield measurements of the core's forward pass on maps of increasing size, in the first dtype."""
    for case in resolutions(sides):
        log(f"resolution {case.description}")
        yield {"side": case.size[0], **_attention(case, options.dtypes[0], options, (FORWARD,))}


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ single attention


def _attention(case: AttentionCase, dtype: torch.dtype, options: Options, kinds: tuple[str, ...]) -> Comparison:
    data = draw_inputs(case, dtype, options.device, secrets.randbits(32))
    names = [EAGER, *(name for name in options.backends if name != EAGER)]
    names += [SDPA] if isinstance(case, CoreCase) else []
    skipped = {name: reason for name in names if (reason := unsupported_reason(name, case, data))}
    needed, free = eager_bytes(case, BACKWARD in kinds), free_bytes(options.device)
    if needed > free:
        skipped[EAGER] = f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    reference_results = None if EAGER in skipped else _reference_results(EAGER, case, data, kinds)
    reference = EAGER
    if reference_results is None:
        reference, reference_results = "blockwise", _reference_results("blockwise", case, data, kinds)
        skipped.setdefault(EAGER, "ran out of memory")
    assert reference_results is not None
    candidates = [make_implementation(name, case, data) for name in names if name not in skipped]
    rows = _rows(candidates, reference, reference_results, options, kinds)
    for row in rows:
        for kind in kinds:
            row["bytes"][kind] = _extra_bytes(options, attention_runs, case, row["name"], dtype, options.device, kind)
    return {
        "case": case.name,
        "kind": "core" if isinstance(case, CoreCase) else "neighborhood",
        "description": case.description,
        "dtype": dtype_name(dtype),
        "queries": case.batch * case.size[0] * case.size[1],
        "checked_against": f"{reference} in float32",
        "rows": rows,
        "skipped": skipped,
    }


def _reference_results(
    reference: str, case: AttentionCase, data: Inputs, kinds: tuple[str, ...]
) -> dict[torch.dtype, Results] | None:
    """Return a formulation's results in float32 and in the dtype of the data, or None if memory does not suffice."""
    dtypes = dict.fromkeys((torch.float32, data.dtype))
    try:
        return {dtype: make_implementation(reference, case, data.to(dtype)).results(kinds) for dtype in dtypes}
    except torch.OutOfMemoryError:
        return None


def attention_runs(
    case: AttentionCase, name: str, dtype: torch.dtype, device: str, kind: str
) -> list[Callable[[], object]]:
    """Return a warm-up run and the run to measure, for `extra_bytes`."""
    return [
        make_implementation(name, candidate, draw_inputs(candidate, dtype, device, 0)).run(kind)
        for candidate in (warmup_case(case), case)
    ]


# ------------------------------------------------------------------------------------------------ whole models


def _models(case: ModelCase, options: Options) -> Comparison:
    compiled = case.name in options.compiled
    names = [RELEASED, *options.model_backends, *([OPTIMIZED] if options.device == "cpu" else [])]
    dtypes = dict.fromkeys((torch.float32, *options.model_dtypes))
    candidates = model_implementations(case, names, list(dtypes), options.device, secrets.randbits(32), compiled)
    reference_results = {candidate.dtype: candidate.results() for candidate in candidates if candidate.name == RELEASED}
    rows = _rows(candidates, RELEASED, reference_results, options, (FORWARD, BACKWARD))
    missing = unavailable(case, list(dtypes), options.device) if OPTIMIZED in names else {}
    rows += [{**_row(OPTIMIZED, dtype, None), "unavailable": reason} for dtype, reason in missing.items()]
    rows.sort(key=lambda row: list(map(dtype_name, dtypes)).index(row["dtype"]))
    for row in rows:
        if COMPILED in row["name"] or (options.device == "cpu" and row["dtype"] != "float32"):
            continue  # a new process for each would take longer than all other measurements
        for kind in row["seconds"]:
            factory = (model_runs, case, row["name"], getattr(torch, row["dtype"]), options.device, kind)
            row["bytes"][kind] = _extra_bytes(options, *factory)
    optimized = [candidate for candidate in candidates if candidate.name == OPTIMIZED]
    return {
        "case": case.name,
        "kind": "model",
        "description": case.description,
        "batch": case.batch,
        "checked_against": f"{RELEASED} in float32",
        "rows": rows,
        "skipped": {},
        "shares": {dtype_name(candidate.dtype): time_shares(candidate.forward) for candidate in optimized},
    }


def model_runs(case: ModelCase, name: str, dtype: torch.dtype, device: str, kind: str) -> list[Callable[[], object]]:
    """Return a warm-up run and the run to measure, for `extra_bytes`."""
    sizes = (replace(case, batch=1, image=64), case)
    return [
        model_implementations(candidate, [name], [dtype], device, 0, compiled=False)[0].run(kind) for candidate in sizes
    ]


# ------------------------------------------------------------------------------------------------ common parts


def _rows(
    implementations: list[Implementation],
    reference: str,
    reference_results: dict[torch.dtype, Results],
    options: Options,
    kinds: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Check all implementations, then time them; return one row for each.

    Args:
        reference: name of the implementation whose float32 results are the reference.
        reference_results: its results in every dtype of the comparison.
    """
    rows: list[dict[str, Any]] = []
    for implementation in implementations:
        dtype, expected = implementation.dtype, reference_results[torch.float32]
        if implementation.backward is None:
            expected = {"forward": expected["forward"]}
        error = None
        if implementation.comparable:
            results = reference_results[dtype] if implementation.name == reference else implementation.results(kinds)
            error = check(
                f"{implementation.name} in {dtype_name(dtype)}", results, expected, reference_results[dtype], dtype
            )
        rows.append(_row(implementation.name, dtype, error))
    for kind in kinds:
        runs = {
            index: implementation.run(kind)
            for index, implementation in enumerate(implementations)
            if kind == FORWARD or implementation.backward
        }
        seconds, rounds = median_seconds(runs, options.rounds, options.device)
        for index, median in seconds.items():
            rows[index]["seconds"][kind], rows[index]["rounds"][kind] = median, rounds
    return rows


def _row(name: str, dtype: torch.dtype, error: float | None) -> dict[str, Any]:
    return {"name": name, "dtype": dtype_name(dtype), "error": error, "seconds": {}, "rounds": {}, "bytes": {}}


def _extra_bytes(options: Options, factory: Callable[..., Any], *arguments: Any) -> int | None:
    try:
        return extra_bytes(options.device, options.threads, factory, *arguments)
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:
        print(f"memory of {arguments[1]}: {type(error).__name__}", file=sys.stderr)
        return None
