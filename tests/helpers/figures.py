"""Live figures of the site: the scripts that make them, and their standalone pages."""

import importlib.util
import sys
import tempfile
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def load(path):
    """Import a script of docs/, which is not a package; it can import the scripts in its folder, as when it is run.

    Args:
        path: path in docs/, or an absolute one.
    """
    folder = str((DOCS / path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"docs_{Path(path).stem}", DOCS / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look up their module
    spec.loader.exec_module(module)
    return module


@cache
def _pages():
    folder = tempfile.TemporaryDirectory(prefix="figures-live-")  # removed when the process ends
    for name, content in load("extensions/live_figures.py").outputs().items():
        (Path(folder.name) / Path(name).name).write_text(content, encoding="utf-8")
    return folder


def standalone_pages():
    """Return a folder with the standalone page of every figure, as the site's hook makes them."""
    return Path(_pages().name)
