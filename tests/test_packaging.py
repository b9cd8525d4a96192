"""Installation: pictures with provenance and licences, a complete wheel, a command that starts."""

import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dat_ref
from dat_ref.data import network_path, object_path, objects, photograph_path, photographs, provenance

ROOT = Path(__file__).parents[1]
FREE = {"CC0-1.0", "public domain"}
PROVENANCE_KEYS = {"name", "file", "sha256", "size", "licence", "author", "source", "changes"}


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


# Photographs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", photographs())
def test_photograph_is_the_one_in_the_manifest(name):
    content = photograph_path(name).read_bytes()
    row = provenance(name)
    assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert len(content) == row["bytes"]


@pytest.mark.parametrize("name", photographs())
def test_photograph_is_free_and_says_where_it_is_from(name):
    row = provenance(name)
    assert row.keys() >= PROVENANCE_KEYS
    assert row["licence"] in FREE
    assert all(row[key] for key in PROVENANCE_KEYS)


@pytest.mark.parametrize("name", photographs())
def test_photograph_opens_at_the_recorded_size(name):
    image = pytest.importorskip("PIL.Image")
    with image.open(photograph_path(name)) as photograph:
        assert photograph.mode == "RGB"
        assert list(photograph.size) == provenance(name)["size"]
        assert max(photograph.size) <= 512


def test_photographs_are_all_listed_and_stay_small():
    on_disk = {path.name for path in photograph_path().parent.glob("*.jpg")}
    assert on_disk == {provenance(name)["file"] for name in photographs()}
    assert sum(provenance(name)["bytes"] for name in photographs()) < 400_000


@pytest.mark.parametrize("name", objects())
def test_object_is_the_one_in_the_manifest(name):
    image = pytest.importorskip("PIL.Image")
    row, content = provenance(name), object_path(name).read_bytes()
    assert row.keys() >= PROVENANCE_KEYS
    assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert len(content) == row["bytes"]
    assert row["licence"] == "MIT"
    with image.open(object_path(name)) as picture:
        assert list(picture.size) == row["size"]
        assert picture.convert("RGBA").getchannel("A").getextrema() == (0, 255)


def test_objects_are_all_listed_with_their_licence_and_stay_small():
    folder = object_path("giraffe").parent
    on_disk = {f"objects/{path.name}" for path in folder.glob("*.webp")}
    assert on_disk == {provenance(name)["file"] for name in objects()}
    assert "Permission is hereby granted, free of charge" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert sum(provenance(name)["bytes"] for name in objects()) < 300_000


def test_unknown_photograph_object_or_network_is_refused_by_name():
    with pytest.raises(ValueError, match=r"name: expected one of chelsea, .*, got 'lenna'"):
        photograph_path("lenna")
    with pytest.raises(ValueError, match=r"name: expected one of giraffe, .*, got 'unicorn'"):
        object_path("unicorn")
    with pytest.raises(ValueError, match=r"name: expected 'dat_spot', got 'dat_nano'"):
        network_path("dat_nano")


def test_provenance_is_a_copy():
    provenance("chelsea").clear()
    assert provenance("chelsea")["name"] == "chelsea"


# What is built ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Build sdist and wheel without a network; return the names of the files in each."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    built = run_python("-m", "hatchling", "build", "-d", str(out))
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    return {"wheel": in_wheel, "sdist": in_sdist}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_every_file_of_the_package_is_built_in(distributions, kind):
    package = ROOT / "dat_ref"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"dat_ref/py.typed", "dat_ref/data/MANIFEST.json", "dat_ref/data/objects/LICENSE"} <= expected
    assert expected <= distributions[kind]


def test_wheel_holds_the_package_and_nothing_else(distributions):
    assert {name.split("/")[0].split("-")[0] for name in distributions["wheel"]} == {"dat_ref"}
    assert any(name.endswith("licenses/LICENSE") for name in distributions["wheel"])


def test_sdist_can_run_the_tests_and_carries_no_environment(distributions):
    names = distributions["sdist"]
    needed = {"LICENSE", "Makefile", "constraints.txt", "tests/conftest.py", "tests/golden/recipe.py"}
    assert needed | {"experiments/objects.py", "experiments/results/objects.json"} <= names
    assert not [name for name in names if name.startswith((".venv", "demo", "site"))]


def test_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert importlib.metadata.version("dat-ref") == dat_ref.__version__
    assert f"\nversion: {dat_ref.__version__}\n" in citation
    assert f"\n## [{dat_ref.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# How it starts ------------------------------------------------------------------------------------


def test_module_command_prints_its_version():
    finished = run_python("-m", "dat_ref", "--version")
    assert finished.returncode == 0, finished.stderr
    assert dat_ref.__version__ in finished.stdout


def test_console_script_is_the_same_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="dat-ref")
    assert script.value == "dat_ref.cli:main"
    assert callable(script.load())


def test_running_as_a_module_does_not_hide_torch(tmp_path):
    """`dat_ref/torch` must not be found as `torch`, as it is when a file in `dat_ref` runs as a script."""
    pytest.importorskip("torch")
    code = (
        "import json, runpy, sys\n"
        "sys.argv = ['dat-ref', '--version']\n"
        "try: runpy.run_module('dat_ref', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: assert not stop.code\n"
        "import torch\n"
        "print(json.dumps([torch.__name__, torch.__file__, hasattr(torch, 'Tensor')]))\n"
    )
    finished = run_python("-c", code, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    name, file, is_torch = json.loads(finished.stdout.splitlines()[-1])
    assert (name, is_torch) == ("torch", True)
    assert not Path(file).is_relative_to(ROOT / "dat_ref")


def test_importing_the_package_needs_numpy_and_scipy_only():
    code = "import sys, dat_ref, dat_ref.data; print({'torch', 'matplotlib', 'PIL'} & set(sys.modules))"
    finished = run_python("-c", code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "set()"


# Extras -------------------------------------------------------------------------------------------


def extras():
    """Return the names of the extras of the package."""
    return set(importlib.metadata.metadata("dat-ref").get_all("Provides-Extra"))


def named_extras(text):
    """Return the extras that lines such as ``pip install -e '.[torch]'`` and ``'dat-ref[cpu]'`` name."""
    groups = re.findall(r"['\"](?:\.|dat-ref)\[([\w,]+)\]", text)
    return {name for group in groups for name in group.split(",")}


def test_page_on_installation_lists_every_extra():
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/install.md").read_text(encoding="utf-8"), re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == extras()


def test_extras_that_pages_and_messages_name_exist():
    paths = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "dat_ref").rglob("*.py")]
    named = {path: named_extras(path.read_text(encoding="utf-8")) for path in paths}
    assert {path.name: names - extras() for path, names in named.items() if names - extras()} == {}
    assert {"torch", "cpu", "viz", "train", "testing"} <= set().union(*named.values())
    assert named_extras("pip install 'dat-ref[nothing]'") - extras() == {"nothing"}
