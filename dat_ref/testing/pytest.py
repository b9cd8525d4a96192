"""One test for each check, in other people's suites:

    from dat_ref.testing.pytest import conformance_tests

    test_my_port = conformance_tests("my_port.sampling:sample", subjects=["sampler"])

Nothing has to be registered, and suites that do not import this module do not pay for it. Without a line of code:
`dat_ref.testing.plugin`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from ..conventions import Convention
from .kit import choose, settings_for
from .report import failure_text
from .run import check_one
from .subject import Check, Setting
from .trial import Trial


def conformance_tests(
    target: Any,
    subjects: Sequence[str] = (),
    *,
    convention: Convention | None = None,
    dtype: str = "float64",
    max_examples: int = 20,
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[Trial, Check], None]:
    """Return a test function with one parameter a check; bind it to a name that starts with ``test``.

    Args:
        target: ``"package.module:object"``, or a function, an instance, a class or a module.
        subjects: names; empty for all that the target implements.
        convention: whose geometry is the truth; None to find out.
        expected_failures: reasons by the name of a check; those tests are marked xfail, strictly.
    """
    setting = Setting(dtype=dtype, max_examples=max_examples)
    parameters = []
    for name, trial, check in trials(target, subjects, convention, setting):
        reason = expected(check, trial, expected_failures or {})
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        parameters.append(pytest.param(trial, check, id=name, marks=marks))

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


def expected(check: Check, trial: Trial, listed: Mapping[str, str]) -> str | None:
    """Return why a check is expected to fail, or None."""
    return listed.get(f"{trial.subject.name}.{check.name}", listed.get(check.name))


def judge(trial: Trial, check: Check) -> None:
    """Run a check as a test: it passes, is skipped, or fails with the counter-example."""
    result = check_one(trial, check)
    if result.skipped:
        pytest.skip(result.skipped)
    if result.failure:
        pytest.fail(failure_text(trial, result), pytrace=False)
