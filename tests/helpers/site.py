"""The built site: one build for all tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMPT = re.compile(r'jp-InputArea-prompt">In\s\[(.*?)\]:')


def built_site():
    """Return the folder of a complete build, notebooks executed: `make test` names the one that it has just made."""
    folder = os.environ.get("BUILT_SITE")
    return ROOT / folder if folder else None


def build_site(folder):
    """Build the site into a folder without executing the notebooks."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr


def assert_executed(page, source, cells):
    """Require that a notebook's page is made from this source, with all of its code cells executed in order.

    The build stops at a cell that raises, so that the assertions of an executed notebook hold.
    """
    copy = page / source.name
    assert copy.is_file(), f"{page}: no page of {source.name}"
    assert copy.read_bytes() == source.read_bytes(), f"{copy}: built from another version of the notebook"
    prompts = PROMPT.findall((page / "index.html").read_text(encoding="utf-8"))
    assert prompts == [str(number) for number in range(1, cells + 1)], f"{page}: cells executed: {prompts}"
