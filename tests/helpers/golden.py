"""Golden fixtures: outputs, points and gradients of the released code, recorded in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_names(prefix: str = "") -> list[str]:
    """Return the names of the fixtures that begin with `prefix`, sorted: for `pytest.mark.parametrize`."""
    return sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.npz"))


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a fixture's description (kind, release, constructor arguments, seed) and its arrays by key."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    meta = json.loads(str(arrays.pop("meta")))
    return meta, arrays


def under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays below `prefix` ("state" or "grad") by the rest of their key."""
    return {key[len(prefix) + 1 :]: array for key, array in arrays.items() if key.startswith(f"{prefix}.")}


def official_state_dicts() -> dict[str, Any]:
    """Return configuration, keys and shapes of the eight released models."""
    return json.loads((GOLDEN / "official_state_dicts.json").read_text(encoding="utf-8"))
