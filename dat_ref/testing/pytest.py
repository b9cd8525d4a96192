"""One test for each check, in other people's suites:

    from dat_ref.testing.pytest import conformance_tests

    test_my_port = conformance_tests("my_port.sampling:sample", subjects=["sampler"])

Nothing has to be registered, and suites that do not import this module do not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    listed = expected_failures or {}
    parameters = []
    for subject, implementation in choose(target, subjects):
        for each, _ in settings_for(implementation, subject, convention, setting):
            trial = Trial(implementation, subject, each)
            told = f"{each.convention.name.lower()}-" if subject.conventional else ""
            for check in subject.checks:
                reason = listed.get(f"{subject.name}.{check.name}", listed.get(check.name))
                marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                name = f"{subject.name}-{told}{check.name}"
                parameters.append(pytest.param(trial, check, id=name, marks=marks))

    @pytest.mark.parametrize(("trial", "check"), parameters)
    def test_conformance(trial: Trial, check: Check) -> None:
        """One promise of the protocol."""
        result = check_one(trial, check)
        if result.skipped:
            pytest.skip(result.skipped)
        if result.failure:
            pytest.fail(failure_text(trial, result), pytrace=False)

    return test_conformance
