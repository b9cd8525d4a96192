"""Live figures: generated files are up to date, and every figure is on a page."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def load(name):
    """Import a script of docs/figures, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"figures_{name}", DOCS / "figures" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["live_data", "bundle"])
def test_written_files_are_what_the_script_would_write(script):
    """`python docs/figures/live_data.py`, then `python docs/figures/bundle.py` regenerate them."""
    if script == "live_data":
        pytest.importorskip("PIL")
    for name, content in load(script).outputs().items():
        assert (DOCS / name).read_text(encoding="utf-8") == content, f"docs/{name} is out of step"


def test_every_figure_is_on_a_page_and_every_place_has_its_figure():
    """A figure is a module with a title. Those that open alone are some of them."""
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    modules = (DOCS / "js" / "figures").glob("*.mjs")
    figures = {path.stem for path in modules if "export const title" in path.read_text(encoding="utf-8")}
    assert set(re.findall(r'data-figure="(\w+)"', pages)) == figures
    assert figures > set(load("bundle").FIGURES)


def test_a_figure_that_opens_alone_loads_nothing():
    for page in (DOCS / "figures-live").glob("*.html"):
        html = page.read_text(encoding="utf-8")
        markup = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
        assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', markup) == [], page.name
        assert "import " not in re.sub(r"/\*.*?\*/|//[^\n]*", "", html, flags=re.DOTALL), page.name


def test_modules_are_joined_in_the_order_of_their_imports(tmp_path):
    bundle = load("bundle")
    (tmp_path / "a.mjs").write_text("export const one = 1;\n", encoding="utf-8")
    (tmp_path / "b.mjs").write_text(
        'import { one } from "./a.mjs";\n\nexport function two() {\n  return 2 * one;\n}\n', encoding="utf-8"
    )
    modules = bundle.dependency_order(tmp_path / "b.mjs")
    assert [path.stem for path in modules] == ["a", "b"]
    assert bundle.to_function(modules[1]) == (
        "const b = (() => {\nconst { one } = a;\n\nfunction two() {\n  return 2 * one;\n}\n\nreturn { two };\n})();\n"
    )


def test_a_form_of_import_that_cannot_be_joined_is_refused(tmp_path):
    (tmp_path / "a.mjs").write_text('import * as all from "./b.mjs";\n', encoding="utf-8")
    with pytest.raises(AssertionError, match="unknown form of import"):
        load("bundle").to_function(tmp_path / "a.mjs")
