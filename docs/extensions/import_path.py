"""Import path: executed blocks of the pages import `dat_ref` and `experiments` from the project's root."""

import sys
from pathlib import Path
from typing import Any


def on_config(config: Any) -> None:
    """Put the folder of mkdocs.yml first on the import path."""
    root = str(Path(config.config_file_path).parent)
    if root not in sys.path:
        sys.path.insert(0, root)
