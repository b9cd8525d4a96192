"""Notebooks on the site: every ``notebooks/*.py`` is a page of one section, titled by its first heading."""

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

AFTER = "Quick start"  # navigation entry before the notebooks
TITLE = re.compile(r"^# # (.+)$", re.MULTILINE)


def notebooks(config: Any) -> list[Path]:
    """Return the notebooks in the order of their numbers."""
    return sorted(Path(config.config_file_path).parent.glob("notebooks/*.py"))


def on_config(config: Any) -> None:
    """Add the section of the notebooks to the navigation."""
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
    """Add the notebooks to the files of the site: they are outside docs/."""
    root = str(Path(config.config_file_path).parent)
    for path in notebooks(config):
        files.append(File(f"notebooks/{path.name}", root, config.site_dir, config.use_directory_urls))
