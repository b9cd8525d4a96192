"""API pages: one entry for each name in a module's `__all__`.

    <!-- public names of dat_ref.torch
    Markdown that goes before them
    -->

becomes that Markdown and one entry for each public name. A module that does not exist gets nothing. Names are read from
the source, so that the site is built without importing torch. The build fails if a public name of `COMPLETE` is not on
any page.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import Abort

COMPLETE = ("dat_ref", "dat_ref.torch", "dat_ref.torch.train", "dat_ref.viz", "dat_ref.scenes", "dat_ref.testing")
ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_documented: set[str] = set()
PLACEHOLDER = re.compile(r"<!-- public names of ([\w.]+)\n(.*?)-->", re.DOTALL)


def public_names(module: Path) -> list[str]:
    """Return the names in `__all__` of the package or module at a path without ``.py``, if it exists."""
    for source in (module / "__init__.py", module.with_suffix(".py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body if source.exists() else []:
            if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
                return [str(name) for name in ast.literal_eval(node.value)]
    return []


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replace each placeholder by its entries."""
    root = Path(config["config_file_path"]).parent

    def entries(placeholder: re.Match[str]) -> str:
        names = public_names(root / placeholder[1].replace(".", "/"))
        return "\n\n".join([placeholder[2], *(f"::: {placeholder[1]}.{name}" for name in names)]) if names else ""

    expanded = PLACEHOLDER.sub(entries, markdown)
    _documented.update(ENTRY.findall(expanded))
    return expanded


def on_post_build(*, config: Any, **_: Any) -> None:
    """Fail if a public name is not on any page."""
    missing = undocumented(Path(config["config_file_path"]).parent, _documented)
    if missing:
        raise Abort(f"no page has an entry for {', '.join(missing)}: add a line `::: NAME` to docs/api.md")


def undocumented(root: Path, documented: set[str]) -> list[str]:
    """Return the public names of `COMPLETE` that are not documented."""
    names = [f"{module}.{name}" for module in COMPLETE for name in public_names(root / module.replace(".", "/"))]
    return [name for name in names if name not in documented]
