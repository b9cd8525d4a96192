"""Checks of a target: code shared by ``dat-ref check`` and the pytest integration."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .._deprecation import deprecated_keywords
from ..conventions import Convention
from .adapters import MissingPackageError
from .convention_match import ConventionMatch, infer_convention
from .op_spec import Implementation, OpSpec, Setting
from .ops import OPS
from .run import Report, check_op
from .target import find_implementations, load, owner_of

Pair = tuple[OpSpec, Implementation]


def find_ops(target: Any, ops: Sequence[str] = ()) -> list[Pair]:
    """Return the operations that a target implements, see `dat_ref.testing.target.find_implementations`.

    Args:
        target: ``"package.module:object"``, or the object itself.
        ops: names of operations; empty for all that the target has.

    Raises:
        ValueError: if the target cannot be used, for example if its import or one of its properties raises an
            exception or calls ``sys.exit``.
        MissingPackageError: if a package that one of our adapters needs is missing.
    """
    try:
        return _find_ops(target, ops)
    except (KeyboardInterrupt, MissingPackageError):
        raise
    except BaseException as error:
        if isinstance(error, ValueError) and str(error).startswith(("TARGET:", "--op:")):
            raise
        raise ValueError(f"TARGET: finding the functions of {target} raised {type(error).__name__}: {error}") from error


def _find_ops(target: Any, ops: Sequence[str]) -> list[Pair]:
    if isinstance(target, str):
        return find_implementations(load(target), target, ops, owner_of(target))
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", type(target).__name__)
    return find_implementations(target, f"{module}:{name}" if module else name, ops, sys.modules.get(module))


def settings_for(
    implementation: Implementation, op: OpSpec, convention: Convention | None, setting: Setting
) -> Iterator[tuple[Setting, ConventionMatch | None]]:
    """Yield the settings to check.

    The convention is the requested one. Without a request it is each convention if the implementation takes a
    convention, and otherwise the inferred one.
    """
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
    """Check all operations that a target implements.

    Args:
        target: ``"package.module:object"``, or a function, an instance, a class or a module.
        ops: names of operations; empty for all that the target has.
        convention: convention of the reference; None to infer it.
        dtype: dtype of the arrays.
        max_examples: number of random cases per check.
        expected_failures: reasons by name of the check, ``first_pixel`` or ``sampler.first_pixel``.

    Returns:
        one report per operation; one per convention if the implementation takes a convention.

    Raises:
        ValueError: if there is nothing to check, or an expected failure is not the name of a check.
    """
    setting = Setting(dtype=dtype, max_examples=max_examples)
    require_known_checks(expected_failures or {})
    return [
        check_op(implementation, op, each, expected_failures)
        for op, implementation in find_ops(target, ops)
        for each, _ in settings_for(implementation, op, convention, setting)
    ]


def read_expected_failures(path: Path) -> dict[str, str]:
    """Read a list of expected failures: one line ``name  # reason`` per check. Other comments are ignored.

    Raises:
        ValueError: for a line without a reason, or with an unknown name.
    """
    listed: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, reason = (part.strip() for part in line.partition("#"))
        if not name:
            continue
        if not reason:
            raise ValueError(f"--xfails: expected `name  # reason` in {path}, line {number}, got {line.strip()!r}")
        listed[name] = reason
    require_known_checks(listed, f"--xfails: {path}")
    return listed


def require_known_checks(names: Iterable[str], where: str = "expected_failures") -> None:
    """Require names of checks, ``first_pixel`` or ``sampler.first_pixel``.

    Raises:
        ValueError: for the first unknown name.
    """
    known = {f"{op.name}.{check.name}" for op in OPS for check in op.checks}
    known |= {name.partition(".")[2] for name in known}
    for name in names:
        if name not in known:
            similar = get_close_matches(name, known, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(f"{where}: {name!r} is not a check{hint} (dat-ref check --list prints all names)")
