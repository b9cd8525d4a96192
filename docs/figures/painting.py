"""Write the data of the painting: the map, the offset network's result and the learned points of notebook 01.

    python docs/figures/painting.py            writes docs/js/figures/data/lesson.mjs

The notebook's own cells are executed up to its training, so that the live figures continue what the lesson shows. A
slow test compares the file with a new training.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from dat_ref.ops.grid import to_pixels
from dat_ref.ops.offsets import bound_offsets

DOCS = Path(__file__).parents[1]
NOTEBOOK = DOCS.parent / "notebooks" / "01_one_tensor_through_a_layer.py"
HEAD = "/** The painting of the first notebook. Written by docs/figures/painting.py; do not edit. */\n"


def lesson(until: str) -> dict[str, Any]:
    """Execute the code cells of the notebook until a name is defined, and return its variables."""
    matplotlib.use("Agg")
    found: dict[str, Any] = {}
    for cell in NOTEBOOK.read_text(encoding="utf-8").split("\n# %%")[1:]:
        header, _, code = cell.partition("\n")
        if "[markdown]" in header:
            continue
        exec(compile(code, str(NOTEBOOK), "exec"), found)
        found["plt"].close("all")
        if until in found:
            return found
    raise ValueError(f"until: expected a name that a cell of {NOTEBOOK.name} defines, got {until!r}")


def painting() -> dict[str, Any]:
    """Return the map as bytes, and for each of the 24 cells the filters' activations, the offset and the point."""
    found = lesson(until="network")
    config, size = found["config"], found["SIZE"]
    activated = np.round(found["network"].activated[0].reshape(config.dim, -1).T, 4)  # (24, 16)
    pointwise = np.round(found["params"]["offset_network"]["pointwise"]["weight"], 4)  # (2, 16)
    raw = (activated @ pointwise.T).reshape(1, 1, *found["keys"], 2)
    _, points = bound_offsets(
        raw, found["reference"], config.offset_bound, offset_range=config.offset_range, convention=config.convention
    )
    pixels = np.round(255 * (found["colors"].transpose(1, 2, 0) + 0.5)).astype(np.uint8)
    return {
        "size": list(size),
        "keys": list(found["keys"]),
        "sharpness": found["BETA"],
        "near": found["NEAR"],
        "pixels": base64.b64encode(pixels.tobytes()).decode("ascii"),
        "activated": activated.tolist(),
        "pointwise": pointwise.tolist(),
        "learned": np.round(to_pixels(points, size, config.convention).reshape(-1, 2), 3).tolist(),
    }


def outputs() -> dict[str, str]:
    """Return the file of this script by path inside docs/."""
    content = json.dumps(painting(), separators=(",", ":"))
    return {"js/figures/data/lesson.mjs": f"{HEAD}export const LESSON = {content};\n"}


if __name__ == "__main__":
    for name, content in outputs().items():
        (DOCS / name).write_text(content, encoding="utf-8")
