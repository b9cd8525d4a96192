"""Files for people who fork the repository: workflows, scripts, hooks, templates."""

import os
import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted((ROOT / ".ci").glob("*"))

if not WORKFLOWS:
    pytest.skip("no repository around the tests", allow_module_level=True)


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow):
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


def test_the_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == ["docs", "tests", "wheel"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_of_workflows_exist(path):
    """Scripts exist and can be executed, targets are in the Makefile, permissions are those of a reader."""
    assert read(path)["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    commands = [step["run"].split() for step in steps(path) if "run" in step]
    assert commands
    for command in commands:
        if command[0] == "make":
            assert command[1] in targets
        else:
            assert os.access(ROOT / command[0], os.X_OK), command


def test_all_promised_versions_of_python_are_tested():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = int(re.search(r'requires-python = ">=3\.(\d+)"', text)[1])
    matrix = read(ROOT / ".github" / "workflows" / "wheel.yml")["jobs"]["wheel"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in range(lowest, 14)]
    extras = set(re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2], re.M))
    assert {name for group in matrix["extras"] for name in group.split(",")} <= extras


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash_that_stops_at_an_error(path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


def test_hooks_run_the_commands_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook["entry"].replace(".venv/bin/", "$(BIN)/") for hook in repository["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "language", "mypy"}
    for entry in hooks.values():
        assert f"\t@{entry.removesuffix(' --fix')}" in makefile, entry


def test_templates_have_unique_fields():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        if path.stem != "config":
            template = read(path)
            names = [field["id"] for field in template["body"]]
            assert len(set(names)) == len(names)
            assert {"name", "description", "body"} <= template.keys()
