"""Puts the notebooks on the site: every ``notebooks/*.py`` becomes a page of its own section, under its own title."""

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

AFTER = "Quick start"  # the entry of the navigation that the notebooks follow
TITLE = re.compile(r"^# # (.+)$", re.MULTILINE)


def notebooks(config: Any) -> list[Path]:
    """Return the notebooks, in the order of their numbers."""
    return sorted(Path(config.config_file_path).parent.glob("notebooks/*.py"))


def on_config(config: Any) -> None:
    """Add the section to the navigation; a notebook's title is its first heading."""
    paths = notebooks(config)
    if not paths:
        return
    pages = []
    for path in paths:
        title = TITLE.search(path.read_text(encoding="utf-8"))
        pages.append({title[1] if title else path.stem: f"notebooks/{path.name}"})
    position = next(index for index, entry in enumerate(config.nav) if AFTER in entry)
    config.nav.insert(position + 1, {"Learn": pages})
    config.watch.append(str(paths[0].parent))


@event_priority(100)  # before the plugin that turns them into pages
def on_files(files: Files, config: Any) -> None:
    """Add the files, which lie beside docs/ and not in it."""
    root = str(Path(config.config_file_path).parent)
    for path in notebooks(config):
        files.append(File(f"notebooks/{path.name}", root, config.site_dir, config.use_directory_urls))
