"""Fills in API entries, so that a name added to a module's `__all__` is on its page at once.

    <!-- public names of dat_ref.torch
    Markdown that goes before them
    -->

becomes that Markdown and one entry for each public name; nothing at all where there is no such module. Names are
read from the source: the site is built without importing torch.
"""

import ast
import re
from pathlib import Path
from typing import Any

MARK = re.compile(r"<!-- public names of ([\w.]+)\n(.*?)-->", re.DOTALL)


def public_names(module: Path) -> list[str]:
    """Return the names in `__all__` of the package or module at a path without ``.py``; none if there is none."""
    for source in (module / "__init__.py", module.with_suffix(".py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body if source.exists() else []:
            if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
                return [str(name) for name in ast.literal_eval(node.value)]
    return []


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replace each mark by its entries."""
    root = Path(config["config_file_path"]).parent

    def entries(mark: re.Match[str]) -> str:
        names = public_names(root / mark[1].replace(".", "/"))
        return "\n\n".join([mark[2], *(f"::: {mark[1]}.{name}" for name in names)]) if names else ""

    return MARK.sub(entries, markdown)
