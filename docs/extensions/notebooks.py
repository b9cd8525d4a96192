"""Notebooks on the site: titles in the navigation, folded code, descriptions of figures, live figures.

The metadata of a code cell carries what a page needs and Jupyter does not show::

    # %% alt="The error falls with the number of steps" plot=true live="sampling"

``alt`` is the text alternative of the figure that the cell draws; the build fails without one. ``plot`` says that the
figure has no photograph: dark mode inverts it. ``live`` names a live figure that the page shows after the cell.
"""

import ast
import re
from pathlib import Path
from typing import Any

import jupytext
from bs4 import BeautifulSoup, Tag
from mkdocs.exceptions import Abort
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

TITLE = re.compile(r"^# # (.+)$", re.MULTILINE)
ASSERTION = re.compile(r"^ *(?:assert |\w+\.testing\.assert_)", re.MULTILINE)
LONG = 15  # lines; longer cells are folded
LIVE = {
    "sampling": "Drag the point, or move it with the arrow keys: the four weights, the value and its slope follow.",
    "bias": "Drag the key: the bias is read between the entries of the table, and its slope pulls at the key.",
    "offsets": "Drag a point. The control below sets the bound, and with it how far a point can move.",
    "receptive_field": "Choose a system and move the query: the colored pixels are those that it can read.",
    "cost": "Choose the side of the map: the multiply-adds and the reads of each system, by the spec's formulas.",
}


def notebooks(config: Any) -> list[Path]:
    """Return the notebooks in the order of their numbers."""
    return sorted(Path(config.config_file_path).parent.glob("notebooks/*.py"))


# ------------------------------------------------------------------------------------------------ navigation


def on_config(config: Any) -> None:
    """Title the notebooks in the navigation by their first headings."""
    titles = {}
    for path in notebooks(config):
        heading = TITLE.search(path.read_text(encoding="utf-8"))
        titles[f"notebooks/{path.name}"] = heading[1] if heading else path.stem
    config.nav = named(config.nav, titles)
    missing = [name for name in titles if name not in str(config.nav)]
    if missing:
        raise Abort(f"nav of mkdocs.yml: expected every notebook, {', '.join(missing)} is missing")
    config.watch.append(str(Path(config.config_file_path).parent / "notebooks"))


def named(entries: list[Any], titles: dict[str, str]) -> list[Any]:
    """Return a part of the navigation in which each notebook has its title."""
    result: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            result.append({key: named(at, titles) if isinstance(at, list) else at for key, at in entry.items()})
        else:
            result.append({titles[entry]: entry} if entry in titles else entry)
    return result


@event_priority(100)  # before the plugin that turns them into pages
def on_files(files: Files, config: Any) -> None:
    """Add the notebooks to the files of the site: they are outside docs/."""
    root = str(Path(config.config_file_path).parent)
    for path in notebooks(config):
        files.append(File(f"notebooks/{path.name}", root, config.site_dir, config.use_directory_urls))


# ------------------------------------------------------------------------------------------------ pages


def on_page_content(html: str, *, page: Any, config: Any, **_: Any) -> str:
    """Fold the code of a notebook's page, describe its figures and insert the live ones."""
    if not page.file.src_uri.startswith("notebooks/"):
        return html
    source = Path(config.config_file_path).parent / page.file.src_uri
    return present(html, jupytext.read(source), page.file.src_uri)


def present(html: str, notebook: Any, name: str) -> str:
    """Return the page of a notebook with folded code, described figures and live figures."""
    soup = BeautifulSoup(html, "html.parser")
    # The template writes each cell twice, one inside the other.
    elements = soup.select("div.jp-CodeCell:not(div.jp-CodeCell div.jp-CodeCell)")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if len(elements) != len(cells):
        raise Abort(f"{name}: expected a part of the page for each of {len(cells)} code cells, got {len(elements)}")
    for number, (element, cell) in enumerate(zip(elements, cells)):
        describe(element, cell.metadata, f"{name}, code cell {number + 1}")
        fold(soup, element, summary(cell, first=number == 0))
        if "live" in cell.metadata:
            element.insert_after(live_figure(cell.metadata["live"]))
    return str(soup)


def describe(element: Tag, metadata: dict[str, Any], where: str) -> None:
    """Set the text alternative and the class of the images of a cell."""
    for image in element.select("img"):
        if not metadata.get("alt"):
            raise Abort(f'{where} draws a figure: expected its description, `# %% alt="…"`')
        image["alt"] = metadata["alt"]
        if metadata.get("plot"):
            image["class"] = "plot"


def summary(cell: Any, first: bool) -> str:
    """Return the line that stands for the code of a cell, or nothing if its code is shown.

    >>> from types import SimpleNamespace as Cell
    >>> summary(Cell(source="assert 1\\nassert 2", metadata={}), first=False)
    'Checked by 2 assertions'
    >>> summary(Cell(source="figure.plot()", metadata={"alt": "A line"}), first=False)
    'Code of the figure'
    """
    assertions = len(ASSERTION.findall(cell.source))
    checked = f"{assertions} assertion{'s' if assertions > 1 else ''}"
    if first:
        return "Setup: imports and helper functions"
    if "alt" in cell.metadata:
        return f"Code of the figure, with {checked}" if assertions else "Code of the figure"
    if assertions:
        return f"Checked by {checked}"
    lines = cell.source.count("\n") + 1
    if lines <= LONG:
        return ""
    functions = [node.name for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]
    return f"Code: {', '.join(functions)}" if functions else f"Code: {lines} lines"


def fold(soup: BeautifulSoup, element: Tag, line: str) -> None:
    """Move the code of a cell into a closed `<details>`, which the search does not read."""
    code = element.select_one("div.jp-Cell-inputWrapper")
    if not line or code is None:
        return
    details = soup.new_tag("details", attrs={"class": "fold", "data-search-exclude": "true"})
    code.wrap(details)
    label = soup.new_tag("summary")
    label.string = line
    details.insert(0, label)


def live_figure(name: str) -> BeautifulSoup:
    """Return a live figure with its caption."""
    if name not in LIVE:
        raise Abort(f"live: expected one of {', '.join(LIVE)}, got {name!r}")
    return BeautifulSoup(
        f'<figure class="lesson"><div data-figure="{name}"></div><figcaption>{LIVE[name]}</figcaption></figure>',
        "html.parser",
    )
