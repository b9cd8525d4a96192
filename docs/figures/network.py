"""Write the data of the network that runs in the page: weights, objects and photographs of the package.

    python docs/figures/network.py            writes docs/js/figures/data/{network,scenery}.mjs

A test fails if the files differ from the output of this script.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from dat_ref.checkpoints import read_state
from dat_ref.data import (
    PIXEL_DEVIATION,
    PIXEL_MEAN,
    network_card,
    network_path,
    object_path,
    objects,
    photograph_path,
    photographs,
)

DOCS = Path(__file__).parents[1]
HEAD = "/** {about} Written by docs/figures/network.py; do not edit. */\n"


def network() -> dict[str, Any]:
    """Return the classes, the statistics of the input, and all weights as one row of little-endian float32."""
    state = {name: np.asarray(leaf) for name, leaf in sorted(read_state(network_path()).items())}
    flat = np.concatenate([leaf.ravel() for leaf in state.values()]).astype("<f4")
    return {
        "classes": network_card()["classes"],
        "mean": PIXEL_MEAN,
        "deviation": PIXEL_DEVIATION,
        "lengths": {name: leaf.size for name, leaf in state.items()},
        "weights": base64.b64encode(flat.tobytes()).decode("ascii"),
    }


def address(path: Path) -> str:
    """Return a picture as a data URL."""
    kind = {".jpg": "jpeg", ".webp": "webp"}[path.suffix]
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def scenery() -> dict[str, Any]:
    """Return the photographs and the objects as data URLs."""
    return {
        "photographs": {name: address(photograph_path(name)) for name in photographs()},
        "objects": {name: address(object_path(name)) for name in objects()},
    }


def module(about: str, name: str, content: dict[str, Any]) -> str:
    """Return a JavaScript module that exports the content under its name."""
    return f"{HEAD.format(about=about)}export const {name} = {json.dumps(content, separators=(',', ':'))};\n"


def outputs() -> dict[str, str]:
    """Return the files of this script by path inside docs/."""
    return {
        "js/figures/data/network.mjs": module("`dat_spot`, the network of the package.", "NETWORK", network()),
        "js/figures/data/scenery.mjs": module("Photographs and objects of the package.", "SCENERY", scenery()),
    }


if __name__ == "__main__":
    for name, content in outputs().items():
        (DOCS / name).write_text(content, encoding="utf-8")
