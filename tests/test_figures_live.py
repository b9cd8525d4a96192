"""Live figures: written data is up to date, the site has every standalone page, and every figure is on a page."""

import re

import pytest
from helpers.figures import DOCS, load

pytest.importorskip("mkdocs")
BUNDLE = "extensions/live_figures.py"


def test_written_data_is_what_the_script_would_write():
    """`python docs/figures/live_data.py` regenerates it."""
    pytest.importorskip("PIL")
    for name, content in load("figures/live_data.py").outputs().items():
        assert (DOCS / name).read_text(encoding="utf-8") == content, f"docs/{name} is out of step"


def test_every_figure_is_on_a_page_and_every_place_has_its_figure():
    """A figure is a module with a title. Those that open alone are some of them."""
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    modules = (DOCS / "js" / "figures").glob("*.mjs")
    figures = {path.stem for path in modules if "export const title" in path.read_text(encoding="utf-8")}
    assert set(re.findall(r'data-figure="(\w+)"', pages)) == figures
    assert figures > set(load(BUNDLE).FIGURES)


def test_a_figure_that_opens_alone_loads_nothing():
    pages = load(BUNDLE).outputs()
    assert pages
    for name, html in pages.items():
        markup = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
        assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', markup) == [], name
        assert "import " not in re.sub(r"/\*.*?\*/|//[^\n]*", "", html, flags=re.DOTALL), name


def test_the_site_has_the_page_of_every_figure(site_folder):
    for name, content in load(BUNDLE).outputs().items():
        assert (site_folder / name).read_text(encoding="utf-8") == content, f"{name}: another version"


def test_modules_are_joined_in_the_order_of_their_imports(tmp_path):
    bundle = load(BUNDLE)
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
        load(BUNDLE).to_function(tmp_path / "a.mjs")
