"""One comparison after the other: check, then time, then memory."""

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
from .contenders import (
    BACKWARD,
    EAGER,
    FORWARD,
    SDPA,
    AttentionCase,
    Contender,
    Data,
    contender,
    draw,
    eager_bytes,
    free_bytes,
    objection,
    small,
)
from .memory import extra_bytes
from .models import COMPILED, OPTIMIZED, RELEASED, model_contenders
from .profile import shares
from .timing import medians


@dataclass(frozen=True)
class Options:
    """How to measure."""

    device: str
    threads: int
    rounds: int
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    model_backends: tuple[str, ...] = ("auto",)
    model_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    compiled: tuple[str, ...] = ()  # models to run under torch.compile as well


Comparison = dict[str, Any]


def comparisons(cases: list[Case], options: Options, tell: Callable[[str], None]) -> Iterator[Comparison]:
    """Yield what is to be said about each case and dtype, as JSON can say it.

    Raises:
        Disagreement: if a contender does not compute what it should; nothing is said of that case then.
    """
    for case in cases:
        if isinstance(case, ModelCase):
            tell(f"{case.name}, {case.what}")
            yield _models(case, options)
            continue
        for dtype in options.dtypes:
            tell(f"{case.name}, {case.what}, {name_of(dtype)}")
            yield _attention(case, dtype, options, (FORWARD, BACKWARD))


def curve(sides: tuple[int, ...], options: Options, tell: Callable[[str], None]) -> Iterator[Comparison]:
    """Yield the forward pass of the core on maps of growing size, in the first of the dtypes."""
    for case in resolutions(sides):
        tell(f"resolution {case.what}")
        yield {"side": case.size[0], **_attention(case, options.dtypes[0], options, (FORWARD,))}


def name_of(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ one attention


def _attention(case: AttentionCase, dtype: torch.dtype, options: Options, kinds: tuple[str, ...]) -> Comparison:
    data = draw(case, dtype, options.device, secrets.randbits(32))
    names = [EAGER, *(name for name in options.backends if name != EAGER)]
    names += [SDPA] if isinstance(case, CoreCase) else []
    skipped = {name: reason for name in names if (reason := objection(name, case, data))}
    needed, free = eager_bytes(case, BACKWARD in kinds), free_bytes(options.device)
    if needed > free:
        skipped[EAGER] = f"would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    plain = None if EAGER in skipped else _references(EAGER, case, data, kinds)
    formulation = EAGER
    if plain is None:
        formulation, plain = "blockwise", _references("blockwise", case, data, kinds)
        skipped.setdefault(EAGER, "ran out of memory")
    assert plain is not None
    present = [contender(name, case, data) for name in names if name not in skipped]
    rows = _rows(present, formulation, plain, options, kinds)
    for row in rows:
        for kind in kinds:
            row["bytes"][kind] = _extra_bytes(options, attention_runs, case, row["name"], dtype, options.device, kind)
    return {
        "case": case.name,
        "kind": "core" if isinstance(case, CoreCase) else "neighborhood",
        "what": case.what,
        "dtype": name_of(dtype),
        "queries": case.batch * case.size[0] * case.size[1],
        "checked_against": f"{formulation} in float32",
        "rows": rows,
        "skipped": skipped,
    }


def _references(
    formulation: str, case: AttentionCase, data: Data, kinds: tuple[str, ...]
) -> dict[torch.dtype, Results] | None:
    """Return what a formulation gives in float32 and in the dtype of the data; None if that takes too much memory."""
    dtypes = dict.fromkeys((torch.float32, data.dtype))
    try:
        return {dtype: contender(formulation, case, data.to(dtype)).results(kinds) for dtype in dtypes}
    except torch.OutOfMemoryError:
        return None


def attention_runs(
    case: AttentionCase, name: str, dtype: torch.dtype, device: str, kind: str
) -> list[Callable[[], object]]:
    """Return a small run and the run itself, for `extra_bytes`."""
    return [contender(name, each, draw(each, dtype, device, 0)).run(kind) for each in (small(case), case)]


# ------------------------------------------------------------------------------------------------ whole models


def _models(case: ModelCase, options: Options) -> Comparison:
    compiled = case.name in options.compiled
    names = [RELEASED, *options.model_backends, *([OPTIMIZED] if options.device == "cpu" else [])]
    dtypes = dict.fromkeys((torch.float32, *options.model_dtypes))
    present = model_contenders(case, names, list(dtypes), options.device, secrets.randbits(32), compiled)
    plain = {each.dtype: each.results() for each in present if each.name == RELEASED}
    rows = _rows(present, RELEASED, plain, options, (FORWARD, BACKWARD))
    for row in rows:
        if COMPILED in row["name"] or (options.device == "cpu" and row["dtype"] != "float32"):
            continue  # a process for each would take longer than all the rest
        for kind in row["seconds"]:
            make = (model_runs, case, row["name"], getattr(torch, row["dtype"]), options.device, kind)
            row["bytes"][kind] = _extra_bytes(options, *make)
    fast = [each for each in present if each.name == OPTIMIZED]
    return {
        "case": case.name,
        "kind": "model",
        "what": case.what,
        "batch": case.batch,
        "checked_against": f"{RELEASED} in float32",
        "rows": rows,
        "skipped": {},
        "shares": {name_of(each.dtype): shares(each.forward) for each in fast},
    }


def model_runs(case: ModelCase, name: str, dtype: torch.dtype, device: str, kind: str) -> list[Callable[[], object]]:
    """Return a small run and the run itself, for `extra_bytes`."""
    sizes = (replace(case, batch=1, image=64), case)
    return [model_contenders(each, [name], [dtype], device, 0, compiled=False)[0].run(kind) for each in sizes]


# ------------------------------------------------------------------------------------------------ both


def _rows(
    contenders: list[Contender],
    formulation: str,
    plain: dict[torch.dtype, Results],
    options: Options,
    kinds: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Check all, then time all.

    Args:
        formulation: the contender whose results in float32 are the reference.
        plain: its results, in every dtype that takes part.
    """
    rows: list[dict[str, Any]] = []
    for one in contenders:
        dtype, expected = one.dtype, plain[torch.float32]
        if one.backward is None:
            expected = {"forward": expected["forward"]}
        error = None
        if one.checked:
            results = plain[dtype] if one.name == formulation else one.results(kinds)
            error = check(f"{one.name} in {name_of(dtype)}", results, expected, plain[dtype], dtype)
        rows.append(
            {"name": one.name, "dtype": name_of(dtype), "error": error, "seconds": {}, "rounds": {}, "bytes": {}}
        )
    for kind in kinds:
        runs = {place: one.run(kind) for place, one in enumerate(contenders) if kind == FORWARD or one.backward}
        seconds, rounds = medians(runs, options.rounds, options.device)
        for place, median in seconds.items():
            rows[place]["seconds"][kind], rows[place]["rounds"][kind] = median, rounds
    return rows


def _extra_bytes(options: Options, make: Callable[..., Any], *arguments: Any) -> int | None:
    try:
        return extra_bytes(options.device, options.threads, make, *arguments)
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:
        print(f"memory of {arguments[1]}: {type(error).__name__}", file=sys.stderr)
        return None
