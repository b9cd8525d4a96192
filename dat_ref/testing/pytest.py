"""Pytest integration: each check of an implementation is a test. In a test file:

    from dat_ref.testing.pytest import conformance_tests

    test_my_port = conformance_tests("my_port.sampling:sample", ops=["sampler"])

or as a plugin, without code:

    pytest -p dat_ref.testing.pytest --conformance my_port.sampling:sample --conformance-op sampler

Permanent options can be put into ``addopts``. The plugin has no entry point, because every run of pytest in the
environment would then import NumPy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from .._deprecation import deprecated_keywords
from ..conventions import Convention
from .context import CheckContext
from .kit import find_ops, read_expected_failures, require_known_checks, settings_for
from .op_spec import Check, Setting
from .report import format_failure
from .run import run_check

EXAMPLES = 20

# ------------------------------------------------------------------------------------------------ in a test file


@deprecated_keywords(subjects="ops")
def conformance_tests(
    target: Any,
    ops: Sequence[str] = (),
    *,
    convention: Convention | None = None,
    dtype: str = "float64",
    max_examples: int = EXAMPLES,
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[CheckContext, Check], None]:
    """Return a test function with one parameter set per check. Assign it to a name that starts with ``test``.

    Args:
        target: ``"package.module:object"``, or a function, an instance, a class or a module.
        ops: names of operations; empty for all that the target has.
        convention: convention of the reference; None to infer it.
        dtype: dtype of the arrays.
        max_examples: number of random cases per check.
        expected_failures: reasons by name of the check; these tests are marked as strict xfail.

    Raises:
        ValueError: if there is nothing to check, or an expected failure is not the name of a check.
    """
    expected_failures = expected_failures or {}
    require_known_checks(expected_failures)
    setting = Setting(dtype=dtype, max_examples=max_examples)
    parameters = [
        pytest.param(ctx, check, id=name, marks=xfail_marks(check, ctx, expected_failures))
        for name, ctx, check in iter_checks(target, ops, convention, setting)
    ]

    @pytest.mark.parametrize(("ctx", "check"), parameters)
    def test_conformance(ctx: CheckContext, check: Check) -> None:
        """Check one property of the protocol."""
        run_as_test(ctx, check)

    return test_conformance


def iter_checks(
    target: Any, ops: Sequence[str], convention: Convention | None, setting: Setting
) -> Iterator[tuple[str, CheckContext, Check]]:
    """Yield all checks of a target, each with the name of its test."""
    for op, implementation in find_ops(target, ops):
        for each, _ in settings_for(implementation, op, convention, setting):
            prefix = f"{each.convention.name.lower()}-" if op.depends_on_convention else ""
            for check in op.checks:
                yield f"{op.name}-{prefix}{check.name}", CheckContext(implementation, op, each), check


def xfail_marks(check: Check, ctx: CheckContext, expected_failures: Mapping[str, str]) -> list[pytest.MarkDecorator]:
    """Return the xfail mark of a check that is expected to fail."""
    reason = expected_failures.get(f"{ctx.op.name}.{check.name}", expected_failures.get(check.name))
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []


def run_as_test(ctx: CheckContext, check: Check) -> None:
    """Run a check as a test. A failure prints the counter-example."""
    result = run_check(ctx, check)
    if result.skipped:
        pytest.skip(result.skipped)
    if result.failure:
        pytest.fail(format_failure(ctx, result), pytrace=False)


# ------------------------------------------------------------------------------------------------ as a plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("conformance", "conformance with dat_ref's reference")
    group.addoption(
        "--conformance", action="append", default=[], metavar="TARGET",
        help="package.module:object to check; repeatable",
    )  # fmt: skip
    group.addoption(
        "--conformance-op", action="append", default=[], metavar="NAME",
        help="operation to check (see dat-ref check --list), default: all; repeatable",
    )  # fmt: skip
    group.addoption(  # its name in 0.1
        "--conformance-subject", dest="conformance_op", action="append", default=[], help=argparse.SUPPRESS
    )
    names = [convention.name.lower() for convention in Convention]
    group.addoption("--conformance-convention", choices=names, help="convention of the reference, default: inferred")
    group.addoption(
        "--conformance-xfails", type=Path, metavar="FILE", help="expected failures, one line each: `name  # reason`"
    )


@pytest.hookimpl(tryfirst=True)  # before -k selects
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add one test per check."""
    try:
        items.extend(_collected(session, config))
    except (ValueError, OSError) as error:
        raise pytest.UsageError(f"--conformance: {error}") from error


def _collected(session: pytest.Session, config: pytest.Config) -> Iterator[pytest.Item]:
    file, convention_name = config.getoption("--conformance-xfails"), config.getoption("--conformance-convention")
    expected_failures = read_expected_failures(file) if file else {}
    convention = Convention[convention_name.upper()] if convention_name else None
    for target in config.getoption("--conformance"):
        ops = config.getoption("--conformance-op")
        for name, ctx, check in iter_checks(target, ops, convention, Setting(max_examples=EXAMPLES)):
            item = ConformanceItem.from_parent(session, name=f"{target}[{name}]", ctx=ctx, check=check)
            for mark in xfail_marks(check, ctx, expected_failures):
                item.add_marker(mark)
            yield item


class ConformanceItem(pytest.Item):
    """Test of one property of the protocol."""

    def __init__(self, *, ctx: CheckContext, check: Check, **options: Any) -> None:
        super().__init__(**options)
        self.ctx, self.check = ctx, check

    def runtest(self) -> None:
        """Run the check."""
        run_as_test(self.ctx, self.check)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return the location and the name of the test."""
        return self.path, None, self.name
