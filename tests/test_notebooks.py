"""Notebooks: they run within their time, every section has an assertion, and only text sources are committed."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
SECONDS = 60  # processor time, so that other load does not count: below a minute on two cores

CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)
SECTION = re.compile(r"^# ## (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\((\.\.[^)#\s]*)")
NUMBERED = re.compile(r"\d+\. ")


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_a_minute(path, tmp_path):
    """Every cell with its assertions runs; the kernel measures its processor time."""
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = jupytext.read(path)
    notebook.cells.append(nbformat.v4.new_code_cell("import time\nprint(time.process_time())"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    seconds = float(notebook.cells[-1].outputs[0]["text"])
    assert seconds < SECONDS, f"{path.name}: {seconds:.0f} s of processor time"


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
