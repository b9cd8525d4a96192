"""Experiments: scripts that train small networks and measure them, with their results as JSON in `results`.

Run them from the root of the repository, for example ``python -m experiments.objects runs/objects``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load_results(name: str) -> dict[str, Any]:
    """Return the results of an experiment."""
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


def save_results(name: str, results: dict[str, Any]) -> None:
    """Write the results of an experiment, with seven significant digits."""
    text = json.dumps(rounded(results), indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Return nested results with seven significant digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
