"""Kit in the test suite of another project, as a plugin and as tests in a file."""

import os
import re
import subprocess
import sys

import pytest

from dat_ref.testing.pytest import conformance_tests

PORT = """
from dat_ref.ops.sampling import bilinear_sample as right

def bilinear_sample(x, points_px):
    return right(x, points_px[..., ::-1])
"""

IN_A_FILE = """
from dat_ref.testing.pytest import conformance_tests

known = {name: "x and y are swapped" for name in ("sampler.rows_before_columns", "not_square")}
test_port = conformance_tests("port", ["sampler"], max_examples=2, expected_failures=known)
"""


@pytest.fixture
def project(tmp_path):
    """Return a function that runs pytest in a fresh folder with a port and a test of its own."""
    (tmp_path / "port.py").write_text(PORT, encoding="utf-8")
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n", encoding="utf-8")

    def run(*arguments):
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    run.folder = tmp_path
    return run


def outcomes(printed):
    """Return the number of tests by outcome, from pytest's last line."""
    counts = re.findall(r"(\d+) (failed|passed|skipped|xfailed)", printed.splitlines()[-1])
    return {word: int(count) for count, word in counts}


PLUGIN = ("-p", "dat_ref.testing.pytest", "--conformance", "port", "--conformance-op", "sampler")


def test_as_a_plugin(project):
    """The plugin makes one test per check, selectable by -k; failures are reported as by the command."""
    code, printed = project(*PLUGIN, "-rA", "-k", "own or first_pixel or rows_before or gradient_adds_up")
    assert code == 1
    assert "PASSED test_own.py::test_own" in printed
    assert "PASSED ::port[sampler-first_pixel]" in printed
    assert "FAILED ::port[sampler-rows_before_columns]" in printed
    assert "likely cause: x and y are swapped" in printed
    assert "the implementation has no gradient" in printed
    assert outcomes(printed) == {"failed": 1, "passed": 2, "skipped": 1}


def test_expected_failures_of_the_plugin_are_strict(project):
    (project.folder / "known.txt").write_text("rows_before_columns  # so it is\nfirst_pixel  # is right\n")
    code, printed = project(*PLUGIN, "--conformance-xfails", "known.txt", "-k", "first_pixel or rows_before")
    assert code == 1
    assert outcomes(printed) == {"failed": 1, "xfailed": 1}
    assert "XPASS(strict)" in printed
    (project.folder / "known.txt").write_text("rows_before  # no such check\n")
    code, printed = project(*PLUGIN, "--conformance-xfails", "known.txt")
    assert code == 4
    assert "'rows_before' is not a check" in printed


def test_targets_that_the_plugin_cannot_check(project):
    code, printed = project("-p", "dat_ref.testing.pytest", "--conformance", "elsewhere")
    assert code == 4
    assert "ERROR: --conformance: TARGET: expected package.module:object, found no module 'elsewhere'" in printed


def test_in_a_test_file(project):
    (project.folder / "test_port.py").write_text(IN_A_FILE, encoding="utf-8")
    code, printed = project("test_port.py", "-rA", "-k", "pixel or rows_before or not_square")
    assert code == 1  # it is also wrong between pixels, an unexpected failure
    assert "FAILED test_port.py::test_port[sampler-between_pixels]" in printed
    assert outcomes(printed) == {"failed": 1, "passed": 2, "xfailed": 2}


def test_an_expected_failure_must_be_a_check():
    with pytest.raises(ValueError, match="'first_pixels' is not a check; did you mean 'first_pixel'"):
        conformance_tests("dat_ref.ops.sampling", ["sampler"], expected_failures={"first_pixels": "why"})
