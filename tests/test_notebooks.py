"""Notebooks run from top to bottom, with their assertions, and are kept as text without outputs."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    """Every cell of the notebook runs; each section ends in an assertion."""
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    notebook = jupytext.read(path)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert "assert" in path.read_text(encoding="utf-8")


def test_there_are_notebooks_and_only_their_sources():
    """The folder holds py:percent sources, and no executed copy."""
    assert NOTEBOOKS
    assert not list(NOTEBOOKS[0].parent.glob("*.ipynb"))
