"""Notebooks: they run from top to bottom, every section has an assertion, and only text sources are committed."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.site import assert_executed, built_site

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))

CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)
SECTION = re.compile(r"^# ## (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\((\.\.[^)#\s]*)")
NUMBERED = re.compile(r"\d+\. ")


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    """Every cell with its assertions runs. If the site has been built, that build has executed the notebook."""
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path)
    if built_site():
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        assert_executed(built_site() / "notebooks" / path.stem, path, cells)
        return
    nbclient = pytest.importorskip("nbclient")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()


def test_a_page_of_another_notebook_or_without_execution_is_noticed(tmp_path):
    source = tmp_path / "01_a.py"
    source.write_text("# %%\n1\n", encoding="utf-8")
    page = tmp_path / "page"
    page.mkdir()
    with pytest.raises(AssertionError, match="no page of"):
        assert_executed(page, source, 1)
    (page / source.name).write_text("# %%\n2\n", encoding="utf-8")
    prompt = '<div class="jp-InputPrompt jp-InputArea-prompt">In\N{NO-BREAK SPACE}[{}]:</div>'
    (page / "index.html").write_text(prompt.format(1), encoding="utf-8")
    with pytest.raises(AssertionError, match="another version"):
        assert_executed(page, source, 1)
    (page / source.name).write_bytes(source.read_bytes())
    assert_executed(page, source, 1)
    with pytest.raises(AssertionError, match="cells executed"):
        assert_executed(page, source, 2)
    (page / "index.html").write_text(prompt.format(" "), encoding="utf-8")
    with pytest.raises(AssertionError, match="cells executed"):
        assert_executed(page, source, 1)


def test_there_are_notebooks_and_only_their_sources():
    """The folder contains nine py:percent sources, numbered in order, and no executed copy."""
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, 10)]
    assert [path.name for path in NOTEBOOKS] == sorted(
        path.name for path in NOTEBOOKS[0].parent.iterdir() if path.is_file()
    )


# ------------------------------------------------------------------------------------------------ sections


def sections(source):
    """Yield (title, text, code) of every section of a py:percent notebook."""
    starts = [*SECTION.finditer(source), None]
    for start, following in pairwise(starts):
        body = source[start.start() : following.start() if following else len(source)]
        text, code = [], []
        parts = CELL.split("# %% [markdown]\n" + body)[1:]
        for kind, cell in zip(parts[::2], parts[1::2]):
            (text if "[markdown]" in kind else code).append(cell)
        yield start[1], "\n".join(text), "\n".join(code)


def missing_parts(title, text, code):
    """Return the missing parts of a numbered section: claim, function, figure, assertion."""
    if not NUMBERED.match(title):
        return []
    holds = {
        "a claim": "**Claim" in text,
        "a figure": any(drawn in code for drawn in ("plt.show()", "viz.draw_", "figures.draw_")),
        "an assertion": re.search(r"^ *(assert |\w+\.testing\.assert_)", code, re.MULTILINE) is not None,
    }
    return [what for what, is_there in holds.items() if not is_there]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_section_has_claim_figure_and_assertion(path):
    found = list(sections(path.read_text(encoding="utf-8")))
    numbers = [int(title.split(".")[0]) for title, _, _ in found if NUMBERED.match(title)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 5
    for title, text, code in found:
        assert missing_parts(title, text, code) == [], f"{path.name}, {title}"


def test_a_missing_part_is_detected():
    whole = "# ## 1. Title\n#\n# **Claim.** It is.\n\n# %%\nplt.show()\n\n# %%\nassert it\n"
    cases = {"# **Claim.** It is.": "a claim", "plt.show()": "a figure", "assert it": "an assertion"}
    assert [missing_parts(*section) for section in sections(whole)] == [[]]
    for part, missing in cases.items():
        assert [missing_parts(*section) for section in sections(whole.replace(part, "pass"))] == [[missing]]
    assert [missing_parts(*section) for section in sections("# ## What to remember\n#\n# Words.\n")] == [[]]


# ------------------------------------------------------------------------------------------------ links


def target_of(link):
    """Return the target file of a link on a notebook's page; each page is a folder."""
    place = [part for part in link.split("/") if part]
    if place[:2] == ["..", ".."]:
        page = ROOT.joinpath("docs", *place[2:])
        return page / "index.md" if page.is_dir() else page.with_suffix(".md")
    return ROOT / "notebooks" / f"{place[1]}.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_have_targets(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        assert target_of(link).is_file(), f"{path.name}: {link}"


def test_a_dead_link_is_detected():
    assert target_of("../../conventions/").is_file()
    assert target_of("../../spec/").is_file()
    assert not target_of("../../convention/").is_file()
    assert not target_of("../99_nothing/").is_file()
