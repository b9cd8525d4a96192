"""Live figures: each is also an HTML file of the site, figures-live/*.html, that opens without a server.

Browsers refuse to import modules from a disk. Each module that a figure needs is therefore written into the file, as a
function that returns its exports. The caption is the one on the figure's page of the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parents[1]
MODULES = DOCS / "js" / "figures"
FIGURES = ("sampling", "offsets", "bias", "cost", "receptive_field")

IMPORT = re.compile(r'^import \{([^}]*)\} from "(\./[\w./]+\.mjs)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?:const|function) (\w+)", re.MULTILINE)
CAPTION = r'data-figure="{}">.*?<figcaption>(.*?)\s*<a [^>]*>[^<]*</a></figcaption>'

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{page_style}
{style}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<figure>
<div data-figure="{name}"><noscript>This figure is drawn by JavaScript, which is switched off here.</noscript></div>
<figcaption>{caption}</figcaption>
</figure>
</main>
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => (document.documentElement.dataset.mdColorScheme = dark.matches ? "slate" : "default");
dark.addEventListener("change", follow);
follow();
</script>
<script>
"use strict";
{script}
{name}.mount(document.querySelector("[data-figure]"));
</script>
</body>
</html>
"""

PAGE_STYLE = """\
html { background: #ffffff; color: #1f2328; font: 20px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
html[data-md-color-scheme="slate"] { background: #1e2429; color: #e7eaed; --md-default-bg-color: #1e2429; }
body { margin: 0; }
main { box-sizing: border-box; margin: 0 auto; max-width: 46rem; padding: 1.2rem 1rem 2.5rem; }
h1 { font-size: 1.1rem; font-weight: 600; letter-spacing: -0.01em; margin: 0 0 1rem; }
figure { margin: 0; }
figcaption { font-size: 0.72rem; margin: 1.4rem auto 0; max-width: 38rem; opacity: 0.8; }"""


def dependency_order(path: Path, collected: tuple[Path, ...] = ()) -> tuple[Path, ...]:
    """Return a module and all its imports, each after its own dependencies."""
    for _, target in IMPORT.findall(path.read_text(encoding="utf-8")):
        dependency = (path.parent / target).resolve()
        if dependency not in collected:
            collected = dependency_order(dependency, collected)
    return (*collected, path)


def to_function(path: Path) -> str:
    """Return a module as a constant that holds its exports."""
    source = path.read_text(encoding="utf-8")
    names = ", ".join(EXPORT.findall(source))
    source = IMPORT.sub(lambda match: f"const {{{match[1]}}} = {Path(match[2]).stem};\n", source)
    source = source.replace("\nexport ", "\n").removeprefix("export ")
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", source, flags=re.DOTALL)
    assert "import " not in code, f"{path}: unknown form of import"
    return f"const {path.stem} = (() => {{\n{source}\nreturn {{ {names} }};\n}})();\n"


def find_caption(name: str) -> str:
    """Return a figure's caption on the site without its link, for the state in which the figure opens alone."""
    for page in sorted(DOCS.rglob("*.md")):
        match = re.search(CAPTION.format(name), page.read_text(encoding="utf-8"), re.DOTALL)
        if match:
            return match[1].strip()
    raise ValueError(f"name: expected a figure that a page of the site shows with a caption, got {name!r}")


def page(name: str) -> str:
    """Return the HTML of a figure."""
    path = (MODULES / f"{name}.mjs").resolve()
    title = re.search(r'^export const title = "(.*)";$', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert title is not None, f"{path}: no title"
    return PAGE.format(
        name=name,
        title=title[1],
        caption=find_caption(name),
        style=(DOCS / "css" / "figures.css").read_text(encoding="utf-8").strip(),
        page_style=PAGE_STYLE,
        script="\n".join(map(to_function, dependency_order(path))),
    )


def outputs() -> dict[str, str]:
    """Return the pages by path inside the site."""
    return {f"figures-live/{name}.html": page(name) for name in FIGURES}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages to the files of the site."""
    for path, content in outputs().items():
        files.append(File.generated(config, path, content=content))
