"""Search index: entries of single functions and classes rank after the pages that explain them."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

NAME = re.compile(r"#dat_ref\.")  # anchor of an entry that mkdocstrings has written
BOOST = 0.05
PARAGRAPH = re.compile(r"<p>.*?</p>", re.DOTALL)


@event_priority(-100)  # after the plugin that writes the index
def on_post_build(*, config: Any, **_: Any) -> None:
    """Lower the rank of the entries of single names and keep only their first paragraph."""
    path = Path(config["site_dir"]) / "search" / "search_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["docs"] = [demoted(entry) for entry in index["docs"]]
    path.write_text(json.dumps(index, separators=(",", ":")), encoding="utf-8")


def demoted(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the index, demoted if it belongs to a single name.

    >>> demoted({"location": "api/#dat_ref.DAT", "title": "DAT", "text": "<p>Backbone.</p> <p>Arguments</p>"})
    {'location': 'api/#dat_ref.DAT', 'title': 'DAT', 'text': '<p>Backbone.</p>', 'boost': 0.05}
    >>> demoted({"location": "cost/#memory", "title": "Memory", "text": ""})
    {'location': 'cost/#memory', 'title': 'Memory', 'text': ''}
    """
    if not NAME.search(entry["location"]):
        return entry
    paragraph = PARAGRAPH.search(entry["text"])
    return {**entry, "text": paragraph[0] if paragraph else "", "boost": BOOST}
