"""The kit in other people's suites: every check of an implementation is a test. In a test file:

    from dat_ref.testing.pytest import conformance_tests

    test_my_port = conformance_tests("my_port.sampling:sample", ops=["sampler"])

or as a plugin, without a line of code:

    pytest -p dat_ref.testing.pytest --conformance my_port.sampling:sample --conformance-op sampler

Options that are always the same go to ``addopts``. There is no entry point: then every run of pytest in the environment
would import NumPy.
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
    """Return a test function with one parameter a check; bind it to a name that starts with ``test``.

    Args:
        target: ``"package.module:object"``, or a function, an instance, a class or a module.
        ops: names; empty for all that the target implements.
        convention: whose geometry is the truth; None to find out.
        expected_failures: reasons by the name of a check; those tests are marked xfail, strictly.

    Raises:
        ValueError: if there is nothing to check, or an expected failure is no check.
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
        """One property of the protocol."""
        run_as_test(ctx, check)

    return test_conformance


def iter_checks(
    target: Any, ops: Sequence[str], convention: Convention | None, setting: Setting
) -> Iterator[tuple[str, CheckContext, Check]]:
    """Yield every check of a target, with a name for the test."""
    for op, implementation in find_ops(target, ops):
        for each, _ in settings_for(implementation, op, convention, setting):
            prefix = f"{each.convention.name.lower()}-" if op.depends_on_convention else ""
            for check in op.checks:
                yield f"{op.name}-{prefix}{check.name}", CheckContext(implementation, op, each), check


def xfail_marks(check: Check, ctx: CheckContext, expected_failures: Mapping[str, str]) -> list[pytest.MarkDecorator]:
    """Return the mark of a check that is expected to fail."""
    reason = expected_failures.get(f"{ctx.op.name}.{check.name}", expected_failures.get(check.name))
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []


def run_as_test(ctx: CheckContext, check: Check) -> None:
    """Run a check as a test: it passes, is skipped, or fails with the counter-example."""
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
        help="check it as this operation only (see dat-ref check --list); repeatable",
    )  # fmt: skip
    group.addoption(  # its name in 0.1
        "--conformance-subject", dest="conformance_op", action="append", default=[], help=argparse.SUPPRESS
    )
    names = [convention.name.lower() for convention in Convention]
    group.addoption("--conformance-convention", choices=names, help="whose geometry is right (otherwise it is found)")
    group.addoption(
        "--conformance-xfails", type=Path, metavar="FILE", help="checks that are known to fail: `name  # why`"
    )


@pytest.hookimpl(tryfirst=True)  # before -k chooses
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each check."""
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
    """One property of the protocol."""

    def __init__(self, *, ctx: CheckContext, check: Check, **options: Any) -> None:
        super().__init__(**options)
        self.ctx, self.check = ctx, check

    def runtest(self) -> None:
        """Run the check."""
        run_as_test(self.ctx, self.check)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return what pytest prints as the test's place and name."""
        return self.path, None, self.name
