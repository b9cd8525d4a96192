"""``python -m dat_ref.experiments.pages docs/experiments``"""

import sys
from pathlib import Path

from .. import NAMES, load_results
from . import pages

for name, text in pages({name: load_results(name) for name in NAMES}).items():
    (Path(sys.argv[1]) / name).write_text(text, encoding="utf-8")
