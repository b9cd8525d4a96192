"""The kit as a pytest plugin: every check of an implementation becomes a test of the suite, without a line of code.

    pytest -p dat_ref.testing.plugin --conformance my_port.sampling:sample

or, in ``conftest.py``, ``pytest_plugins = ["dat_ref.testing.plugin"]`` and the option in ``addopts``. It is not
registered as an entry point: then every run of pytest in the environment would import NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .kit import read_expected_failures
from .pytest import expected, judge, trials
from .subject import Check, Setting
from .trial import Trial

EXAMPLES = 20


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
    group.addoption(
        "--conformance-xfails", type=Path, metavar="FILE", help="checks that are known to fail: `name  # why`"
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each check."""
    try:
        items.extend(_collected(session, config))
    except ValueError as error:
        raise pytest.UsageError(f"--conformance: {error}") from error


def _collected(session: pytest.Session, config: pytest.Config) -> Iterator[pytest.Item]:
    file = config.getoption("--conformance-xfails")
    listed = read_expected_failures(file) if file else {}
    for target in config.getoption("--conformance"):
        subjects = config.getoption("--conformance-subject")
        for name, trial, check in trials(target, subjects, None, Setting(max_examples=EXAMPLES)):
            item = ConformanceItem.from_parent(session, name=f"{target}[{name}]", trial=trial, check=check)
            reason = expected(check, trial, listed)
            if reason:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
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
