"""The kit in other people's suites: every check of an implementation is a test. In a test file:

    from dat_ref.testing.pytest import conformance_tests

    test_my_port = conformance_tests("my_port.sampling:sample", subjects=["sampler"])

or as a plugin, without a line of code:

    pytest -p dat_ref.testing.pytest --conformance my_port.sampling:sample --conformance-subject sampler

Options that are always the same go to ``addopts``. There is no entry point: then every run of pytest in the environment
would import NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..conventions import Convention
from .kit import choose, read_expected_failures, require_checks, settings_for
from .report import failure_text
from .run import check_one
from .subject import Check, Setting
from .trial import Trial

EXAMPLES = 20

# ------------------------------------------------------------------------------------------------ in a test file


def conformance_tests(
    target: Any,
    subjects: Sequence[str] = (),
    *,
    convention: Convention | None = None,
    dtype: str = "float64",
    max_examples: int = EXAMPLES,
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[Trial, Check], None]:
    """Return a test function with one parameter a check; bind it to a name that starts with ``test``.

    Args:
        target: ``"package.module:object"``, or a function, an instance, a class or a module.
        subjects: names; empty for all that the target implements.
        convention: whose geometry is the truth; None to find out.
        expected_failures: reasons by the name of a check; those tests are marked xfail, strictly.

    Raises:
        ValueError: if there is nothing to check, or an expected failure is no check.
    """
    listed = expected_failures or {}
    require_checks(listed)
    setting = Setting(dtype=dtype, max_examples=max_examples)
    parameters = [
        pytest.param(trial, check, id=name, marks=marks(check, trial, listed))
        for name, trial, check in trials(target, subjects, convention, setting)
    ]

    @pytest.mark.parametrize(("trial", "check"), parameters)
    def test_conformance(trial: Trial, check: Check) -> None:
        """One promise of the protocol."""
        judge(trial, check)

    return test_conformance


def trials(
    target: Any, subjects: Sequence[str], convention: Convention | None, setting: Setting
) -> Iterator[tuple[str, Trial, Check]]:
    """Yield every check of a target, with a name for the test."""
    for subject, implementation in choose(target, subjects):
        for each, _ in settings_for(implementation, subject, convention, setting):
            told = f"{each.convention.name.lower()}-" if subject.conventional else ""
            for check in subject.checks:
                yield f"{subject.name}-{told}{check.name}", Trial(implementation, subject, each), check


def marks(check: Check, trial: Trial, listed: Mapping[str, str]) -> list[pytest.MarkDecorator]:
    """Return the mark of a check that is expected to fail."""
    reason = listed.get(f"{trial.subject.name}.{check.name}", listed.get(check.name))
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []


def judge(trial: Trial, check: Check) -> None:
    """Run a check as a test: it passes, is skipped, or fails with the counter-example."""
    result = check_one(trial, check)
    if result.skipped:
        pytest.skip(result.skipped)
    if result.failure:
        pytest.fail(failure_text(trial, result), pytrace=False)


# ------------------------------------------------------------------------------------------------ as a plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("conformance", "conformance with dat_ref's reference")
    group.addoption(
        "--conformance", action="append", default=[], metavar="TARGET",
        help="package.module:object to check; repeatable",
    )  # fmt: skip
    group.addoption(
        "--conformance-subject", action="append", default=[], metavar="NAME",
        help="check it as this subject only (see dat-ref check --list); repeatable",
    )  # fmt: skip
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
    file, asked = config.getoption("--conformance-xfails"), config.getoption("--conformance-convention")
    listed = read_expected_failures(file) if file else {}
    convention = Convention[asked.upper()] if asked else None
    for target in config.getoption("--conformance"):
        subjects = config.getoption("--conformance-subject")
        for name, trial, check in trials(target, subjects, convention, Setting(max_examples=EXAMPLES)):
            item = ConformanceItem.from_parent(session, name=f"{target}[{name}]", trial=trial, check=check)
            for mark in marks(check, trial, listed):
                item.add_marker(mark)
            yield item


class ConformanceItem(pytest.Item):
    """One promise of the protocol."""

    def __init__(self, *, trial: Trial, check: Check, **options: Any) -> None:
        super().__init__(**options)
        self.trial, self.check = trial, check

    def runtest(self) -> None:
        """Run the check."""
        judge(self.trial, self.check)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return what pytest prints as the test's place and name."""
        return self.path, None, self.name
