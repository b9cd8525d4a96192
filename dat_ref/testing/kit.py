"""From a target to its reports: what ``dat-ref check`` and the pytest helper share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .._deprecation import deprecated_keywords
from ..conventions import Convention
from .convention_match import ConventionMatch, infer_convention
from .op_spec import Implementation, OpSpec, Setting
from .ops import OPS
from .run import Report, check_op
from .target import find_implementations, load, owner_of

Pair = tuple[OpSpec, Implementation]


def find_ops(target: Any, ops: Sequence[str] = ()) -> list[Pair]:
    """Return what a target implements; see `dat_ref.testing.target.find_implementations`.

    Args:
        target: ``"package.module:object"``, or the object itself.
        ops: names; empty for all that are there.
    """
    if isinstance(target, str):
        return find_implementations(load(target), target, ops, owner_of(target))
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", type(target).__name__)
    return find_implementations(target, f"{module}:{name}" if module else name, ops, sys.modules.get(module))


def settings_for(
    implementation: Implementation, op: OpSpec, convention: Convention | None, setting: Setting
) -> Iterator[tuple[Setting, ConventionMatch | None]]:
    """Yield under what to check: the convention asked for, or each that it can be told, or the one that it follows."""
    if convention is not None or not op.depends_on_convention:
        yield replace(setting, convention=convention or setting.convention), None
    elif implementation.takes_convention:
        yield from ((replace(setting, convention=each), None) for each in Convention)
    else:
        match = infer_convention(implementation, op, setting)
        yield replace(setting, convention=match.convention), match


@deprecated_keywords(subjects="ops")
def check(
    target: Any,
    ops: Sequence[str] = (),
    *,
    convention: Convention | None = None,
    dtype: str = "float64",
    max_examples: int = 50,
    expected_failures: Mapping[str, str] | None = None,
) -> list[Report]:
    """Check everything that a target implements.

    Args:
        target: ``"package.module:object"``, or a function, an instance, a class or a module.
        ops: names; empty for all that are there.
        convention: whose geometry is the truth; None to find out.
        expected_failures: reasons by the name of a check, ``first_pixel`` or ``sampler.first_pixel``.

    Returns:
        a report for each operation, for each convention where it can be told one.

    Raises:
        ValueError: if there is nothing to check, or an expected failure is no check.
    """
    setting = Setting(dtype=dtype, max_examples=max_examples)
    require_known_checks(expected_failures or {})
    return [
        check_op(implementation, op, each, expected_failures)
        for op, implementation in find_ops(target, ops)
        for each, _ in settings_for(implementation, op, convention, setting)
    ]


def read_expected_failures(path: Path) -> dict[str, str]:
    """Read a list of checks that are known to fail, a line each: its name, then ``# why``; other comments are skipped.

    Raises:
        ValueError: for a line without a reason, or one that names no check.
    """
    listed: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, reason = (part.strip() for part in line.partition("#"))
        if not name:
            continue
        if not reason:
            raise ValueError(f"--xfails: expected `name  # why` in {path}, line {number}, got {line.strip()!r}")
        listed[name] = reason
    require_known_checks(listed, f"--xfails: {path}")
    return listed


def require_known_checks(names: Iterable[str], where: str = "expected_failures") -> None:
    """Require that all are names of checks, ``first_pixel`` or ``sampler.first_pixel``.

    Raises:
        ValueError: for the first that is not.
    """
    known = {f"{op.name}.{check.name}" for op in OPS for check in op.checks}
    known |= {name.partition(".")[2] for name in known}
    for name in names:
        if name not in known:
            similar = get_close_matches(name, known, n=1)
            hint = f"; {similar[0]!r} is one" if similar else ""
            raise ValueError(f"{where}: {name!r} is no check{hint} (dat-ref check --list prints them all)")
