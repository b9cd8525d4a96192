"""Site: its Python runs and prints the shown output, its names exist, its links have targets."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from helpers.figures import load

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# docs/figures and docs/performance contain parts of pages. Notebooks have their own test.
PARTS = ("figures", "performance")
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0] not in PARTS]
README = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]


def name_of(path):
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------ code in pages

FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Block of code: its line, and its expected output from the next block titled "prints" (None without one)."""

    line: int
    language: str
    title: str
    code: str
    expected: str | None


def code_blocks(markdown):
    """Yield the blocks of a page."""
    found = list(FENCE.finditer(markdown))
    texts = [re.sub(f"^{fence[1]}", "", fence[4], flags=re.MULTILINE) for fence in found]
    titles = [re.search('title="([^"]*)"', fence[3]) for fence in found]
    titles = [title[1] if title else "" for title in titles]
    for index, fence in enumerate(found):
        line = markdown.count("\n", 0, fence.start()) + 1
        expected = texts[index + 1] if titles[index + 1 : index + 2] == ["prints"] else None
        yield Block(line, fence[2], titles[index], texts[index], expected)


def run_page(markdown, where):
    """Run the blocks of a page in order: Python in one namespace, and commands whose output is shown.

    A block with a title is a file of that name, or a patch of it."""
    names = {"__name__": "page"}
    for block in code_blocks(markdown):
        printed = None
        if block.language in ("python", "text") and Path(block.title).suffix:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "diff":
            change(Path(block.title), block.code)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * block.line + block.code, where, "exec"), names)
            printed = output.getvalue()
        elif block.language == "bash" and block.expected is not None:
            printed = run_commands(block.code)
        if block.expected is not None:
            assert printed == block.expected, f"{where}, line {block.line}: prints\n{printed}"


def change(path, difference):
    """Apply a patch to a file: replace the removed lines by the added ones."""
    lines = difference.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in (sign, " ")) for sign in "-+")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path}: expected once\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def run_commands(commands):
    """Run commands in a shell and return their output."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": scripts, "PYTHONDONTWRITEBYTECODE": "1"}  # files change within a second
    run = subprocess.run(
        ["bash", "-c", commands],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return run.stdout


@pytest.mark.filterwarnings("error:DeformableAttention:UserWarning")
@pytest.mark.parametrize("page", PAGES + README, ids=name_of)
def test_python_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(encoding="utf-8"), name_of(page))


def test_wrong_output_is_detected():
    page = '```python\nprint(1 + 1)\n```\n\n```text title="prints"\n3\n```\n'
    with pytest.raises(AssertionError, match="line 1: prints"):
        run_page(page, "page")
    run_page(page.replace("3", "2"), "page")


RUN = '```bash\npython a.py\n```\n\n```text title="prints"\n{}\n```\n\n'


def test_files_of_a_page_are_written_changed_and_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = '```python title="a.py"\nx = 1\nprint(x)\n```\n\n'
    difference = '```diff title="a.py"\n-x = 1\n+x = 2\n print(x)\n```\n\n'
    run_page(file + RUN.format(1) + difference + RUN.format(2), "page")
    with pytest.raises(AssertionError, match="line 20: prints"):
        run_page(file + RUN.format(1) + difference + RUN.format(1), "page")
    with pytest.raises(AssertionError, match="expected once"):
        run_page(file + difference + difference, "page")


def test_blocks_of_a_page_share_names_and_errors_surface():
    run_page("```python\na = 1\n```\n\ntext\n\n```python\nassert a == 1\n```\n", "page")
    with pytest.raises(AssertionError):
        run_page("```python\nassert False\n```\n", "page")


@pytest.mark.parametrize("page", PAGES + README, ids=name_of)
def test_commands_of_the_page_exist(page):
    """Every `make X` is a target, every `dat-ref X` a subcommand."""
    shell = "\n".join(
        code for _, language, _, code in FENCE.findall(page.read_text(encoding="utf-8")) if language == "bash"
    )
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"^make (\w[\w-]*)", shell, re.M)) <= targets
    from dat_ref.cli import build_parser

    for command in set(re.findall(r"(?:^|/)dat-ref (\w+)", shell, re.M)):
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()):
            build_parser().parse_args([command, "--help"])
        assert stop.value.code == 0


# ------------------------------------------------------------------------------------------------ names


def documented():
    """Return the names that the pages document, including those that the site's hook inserts."""
    fill_in = load(DOCS / "extensions" / "api_names.py").on_page_markdown
    config = {"config_file_path": str(ROOT / "mkdocs.yml")}
    pages = [fill_in(page.read_text(encoding="utf-8"), config=config) for page in PAGES]
    return {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.M)}


@pytest.mark.parametrize("module", ["dat_ref", "dat_ref.torch", "dat_ref.testing"])
def test_every_public_name_is_on_the_api_page(module):
    """A name added to `__all__` needs a line `::: module.name` in docs/."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module} yet")
    if module == "dat_ref.torch":
        pytest.importorskip("torch")
    public = getattr(importlib.import_module(module), "__all__", [])
    assert {f"{module}.{name}" for name in public} - documented() == set()


def test_the_build_fails_when_a_public_name_is_on_no_page():
    names = load(DOCS / "extensions" / "api_names.py")
    all_of_them = documented()
    assert names.undocumented(ROOT, all_of_them) == []
    assert names.undocumented(ROOT, all_of_them - {"dat_ref.DAT"}) == ["dat_ref.DAT"]
    names._documented.update(all_of_them - {"dat_ref.DAT"})
    with pytest.raises(names.Abort, match=r"no page has an entry for dat_ref\.DAT"):
        names.on_post_build(config={"config_file_path": str(ROOT / "mkdocs.yml")})


def test_every_file_of_the_reading_order_has_its_page():
    """Operations, layer, block, backbone and the two local attentions each have a page."""
    operations = [path.stem for path in (ROOT / "dat_ref" / "ops").glob("*.py") if path.stem != "__init__"]
    names = [f"ops.{name}" for name in operations]
    names += ["layer", "peers.window", "peers.neighborhood", "block", "backbone"]
    assert {f"dat_ref.{name}" for name in names} - documented() == set()


def test_tests_that_are_named_exist():
    """Every test that a page names exists."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", tests, re.M))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    assert named - there == set()


# ------------------------------------------------------------------------------------------------ figures and tables


SCRIPTS = ("draw.py", "draw_peers.py", "mutants.py")  # those in docs/figures


@pytest.mark.parametrize("script", SCRIPTS)
def test_figures_and_tables_are_up_to_date(script):
    """`python docs/figures/draw.py` regenerates them."""
    for name, content in load(DOCS / "figures" / script).outputs().items():
        assert (DOCS / "figures" / name).read_text(encoding="utf-8") == content, f"docs/figures/{name} is out of date"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_drawn_file_is_on_a_page(script):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    drawn = load(DOCS / "figures" / script).outputs()
    assert [name for name in drawn if f"docs/figures/{name}" not in text] == []


def test_images_are_small():
    assert {
        path.name: path.stat().st_size for path in (DOCS / "images").iterdir() if path.stat().st_size > 150_000
    } == {}


# ------------------------------------------------------------------------------------------------ notebooks as pages


CELL = (
    '<div class="jp-Cell jp-CodeCell"><div class="jp-Cell jp-CodeCell">'
    '<div class="jp-Cell-inputWrapper">code</div>{}</div></div>'
)
IMAGE = '<img alt="No description has been provided for this image" src="data:,"/>'


def notebook(*cells):
    """Return a notebook of code cells: pairs of source and metadata."""
    return SimpleNamespace(
        cells=[SimpleNamespace(cell_type="code", source=source, metadata=metadata) for source, metadata in cells]
    )


@pytest.fixture
def pages_of_notebooks():
    pytest.importorskip("mkdocs")
    return load(DOCS / "extensions" / "notebooks.py")


def test_code_of_a_notebook_is_folded_and_its_figures_are_described(pages_of_notebooks):
    cells = [("import a", {}), ("plot()", {"alt": "A line", "plot": True, "live": "bias"}), ("assert a", {}), ("a", {})]
    html = CELL.format("") + CELL.format(IMAGE) + CELL.format("") + CELL.format("")
    page = pages_of_notebooks.present(html, notebook(*cells), "a notebook")
    assert re.findall("<summary>(.*?)</summary>", page) == [
        "Setup: imports and helper functions",
        "Code of the figure",
        "Checked by 1 assertion",
    ]
    assert page.count('<details class="fold" data-search-exclude="true">') == 3  # the last cell is short
    assert 'alt="A line"' in page
    assert 'class="plot"' in page
    assert page.index('alt="A line"') < page.index('data-figure="bias"') < page.index("Checked")


def test_a_figure_without_a_description_stops_the_build(pages_of_notebooks):
    present, html = pages_of_notebooks.present, CELL.format(IMAGE)
    with pytest.raises(pages_of_notebooks.Abort, match="code cell 1 draws a figure: expected its description"):
        present(html, notebook(("plot()", {})), "a notebook")
    with pytest.raises(pages_of_notebooks.Abort, match="for each of 2 code cells, got 1"):
        present(html, notebook(("plot()", {"alt": "A"}), ("a", {})), "a notebook")
    with pytest.raises(pages_of_notebooks.Abort, match=r"live: expected one of .*, got 'none'"):
        present(html, notebook(("plot()", {"alt": "A", "live": "none"})), "a notebook")


def test_every_notebook_is_in_the_navigation(pages_of_notebooks):
    config = SimpleNamespace(config_file_path=str(ROOT / "mkdocs.yml"), nav=[{"Learn": ["index.md"]}], watch=[])
    with pytest.raises(pages_of_notebooks.Abort, match=r"09_what_it_learned\.py is missing"):
        pages_of_notebooks.on_config(config)
    named = pages_of_notebooks.named([{"Learn": ["a.md", "b.py"]}, {"c": "b.py"}], {"b.py": "Title"})
    assert named == [{"Learn": ["a.md", {"Title": "b.py"}]}, {"c": "b.py"}]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.py")), ids=name_of)
def test_figures_of_a_notebook_are_described(path):
    """A cell that draws has a description, which differs from all others; other cells have none."""
    jupytext = pytest.importorskip("jupytext")
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    draws = [any(drawn in cell.source for drawn in ("plt.show()", "viz.draw_")) for cell in cells]
    descriptions = [cell.metadata.get("alt", "") for cell in cells]
    assert [bool(description) for description in descriptions] == draws
    assert len(set(descriptions) - {""}) == sum(draws)
    assert min(len(description) for description in descriptions if description) > 30


def test_a_live_figure_gets_its_still_picture():
    pytest.importorskip("mkdocs")
    config = SimpleNamespace(docs_dir=str(DOCS))
    replace = load(DOCS / "extensions" / "still_pictures.py").on_page_content
    html = '<div data-figure="{}"><noscript>words</noscript></div>'
    page = replace(html.format("bias"), page=SimpleNamespace(url="spec/bias/"), config=config)
    assert '<noscript><img src="../../images/still_bias.png" alt="Still picture of the live figure.' in page
    assert replace(html.format("none"), page=SimpleNamespace(url="a/"), config=config) == html.format("none")


def test_entries_of_single_names_are_demoted_in_the_search():
    pytest.importorskip("mkdocs")
    search = load(DOCS / "extensions" / "search.py")
    assert doctest.testmod(search).attempted == 2
    assert doctest.testmod(search).failed == 0


# ------------------------------------------------------------------------------------------------ the built site


CODE = ("code", "pre", "script", "style")
UNDESCRIBED = "No description has been provided for this image"  # nbconvert's
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


class Page(HTMLParser):
    """Parser that collects the resources, links and anchors of a page."""

    def __init__(self, html):
        super().__init__()
        self.loads, self.links, self.anchors, self.classes = [], [], set(), set()
        self.meta, self.undescribed, self.text, self._code = {}, [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found:
            self.anchors.add(found["id"])
        self.classes.update((found.get("class") or "").split())
        self._code += tag in CODE
        if tag == "meta":
            self.meta[found.get("property") or found.get("name")] = found.get("content")
        if tag == "img" and found.get("alt", "").strip() in ("", UNDESCRIBED):
            self.undescribed.append(found.get("src", "")[:60])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        loaded = found.get(LOADS.get(tag, ""))
        if loaded and found.get("rel") not in ("next", "prev"):
            self.loads.append(loaded)

    def handle_endtag(self, tag):
        self._code -= tag in CODE

    def handle_data(self, data):
        if not self._code:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(site_folder):
    """Return the pages of the built site by path."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in site_folder.rglob("*.html")}


def foreign(loaded):
    """Return the resources of a page that come from another host."""
    return [address for address in loaded if urlsplit(address).scheme not in ("", "data") or address.startswith("//")]


def foreign_in_style(text):
    """Return the resources that a style sheet loads from another host."""
    return re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^)\s'\"]*)", text)


def test_foreign_hosts_are_detected():
    page = Page('<script src="https://a/b.js"></script><link href="//a/b.css"><img src="data:,"><img src="c">')
    assert foreign(page.loads) == ["https://a/b.js", "//a/b.css"]
    style = "@import 'https://a/b'; x { c: url(//d/e); f: url(g); h: url(data:,) }"
    assert foreign_in_style(style) == ["https://a/b", "//d/e"]


def test_site_loads_nothing_from_other_hosts(site):
    """Scripts, styles, fonts and images are part of the site."""
    for path, page in site.items():
        assert foreign(page.loads) == [], path
        assert "mermaid" not in page.classes, f"{path}: the theme fetches mermaid from another host"
    folder = next(path.parent for path in site if path.name == "404.html")
    for style in folder.rglob("*.css"):
        assert foreign_in_style(style.read_text(encoding="utf-8")) == [], style


def test_links_inside_the_site_have_targets(site):
    """All links, anchors and resources exist."""
    for path, page in site.items():
        if path.name == "404.html":
            continue  # the 404 page is served at any address, so its links start at the root
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = path if not parts.path else Path(os.path.normpath(path.parent / unquote(parts.path)))
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and not parts.fragment.startswith("__") and target in site:
                assert unquote(parts.fragment) in site[target].anchors, f"{path}: {link}"


def test_images_are_described(site):
    """Every image has a text alternative."""
    assert {path: page.undescribed for path, page in site.items() if page.undescribed} == {}


def test_no_markdown_link_is_left_as_text(site):
    """A link inside HTML that Markdown does not enter stays as text."""
    left = {path: re.findall(r"\]\([^)\s]+\)", "".join(page.text)) for path, page in site.items()}
    assert {path: links for path, links in left.items() if links} == {}


def test_defects_of_a_page_are_detected():
    images = f'<img src="a"><img src="b" alt="{UNDESCRIBED}"><img src="c" alt="A cat">'
    page = Page(f"{images}<code>[no](x)</code>[yes](y.md)")
    assert page.undescribed == ["a", "b"]
    assert page.text == ["[yes](y.md)"]


def test_links_of_the_error_page_have_targets(site):
    """The error page leads to pages that exist; it is served at any address, so its links start at the root."""
    path = next(path for path in site if path.name == "404.html")
    inside = [link for link in site[path].links if link.startswith("/") and not link.startswith("//")]
    assert {"/index.html", "/faq/", "/quickstart-torch/", "/experiments/", "/spec/"} <= set(inside)
    for link in inside:
        target = path.parent / urlsplit(link).path.lstrip("/")
        assert (target / "index.html" if target.is_dir() else target).exists(), link


def test_previews_have_a_picture(site):
    for path, page in site.items():
        if "og:title" in page.meta:
            root = path.parent if path.name != "404.html" else None
            picture = page.meta["og:image"]
            assert root is None or urlsplit(picture).scheme or (root / picture).resolve().exists(), path
    with_picture = [path for path, page in site.items() if page.meta.get("og:image")]
    assert len(with_picture) > 40


def test_live_figures_have_a_still_picture(site):
    """Without JavaScript, each live figure is a picture."""
    names = {path.stem for path in (DOCS / "figures-live").glob("*.html")}
    assert names <= {path.stem.removeprefix("still_") for path in (DOCS / "images").glob("still_*")}
    html = {path: path.read_text(encoding="utf-8") for path in site if "figures-live" not in path.parts}
    for path, text in html.items():
        for name in names & set(re.findall(r'data-figure="(\w+)"', text)):
            assert re.search(rf'<noscript><img src="[^"]*still_{name}\.', text), f"{path}: {name}"


def test_search_ranks_explanations_before_single_names(site_folder):
    """Entries of functions and classes rank low and are short: they are less than a fifth of the index."""
    index = json.loads((site_folder / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    names = [entry for entry in index if "#dat_ref." in entry["location"]]
    assert len(names) > 200
    assert {entry["boost"] for entry in names} == {0.05}
    characters = sum(len(entry["text"]) for entry in index)
    assert sum(len(entry["text"]) for entry in names) < characters / 5


def test_formulas_are_marked_for_the_renderer(site):
    pages = [path for path, page in site.items() if "arithmatex" in page.classes]
    assert {"conventions", "sampling", "bias"} <= {path.parent.name for path in pages}


README_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


@pytest.mark.parametrize("page", README, ids=name_of)
def test_links_of_the_readme_have_targets(page):
    links = README_LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []
