"""Experiments: what trained networks do, measured by scripts that write JSON; pages and a notebook are drawn from it.

====================  ==================================================================================
`measures`            how far points are from an object, and how sure a mean is
`recording`           what each layer of a network did
`offset_ablation`     does the network that ships use its offsets? They are taken away, and others given
`no_offset_baseline`  is it better than a baseline trained without?
`models`              a small network, and what is changed in it
`study`               trains it and everything that is changed, several seeds each
`attention_maps`      where those networks look: points and attention against the objects' masks
`costs`               what they cost: parameters, multiply-adds, memory, time
`figures`             drawn from what was found
`pages`               the pages of the site, written from what was found
====================  ==================================================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "measured"
NAMES = ("study", "attention_maps", "costs", "offset_ablation", "no_offset_baseline")


def load_results(name: str) -> dict[str, Any]:
    """Return what an experiment found, from the file that ships.

    Args:
        name: one of `NAMES`.
    """
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


def save_results(name: str, results: dict[str, Any]) -> None:
    """Write what an experiment found to the file that ships."""
    (RESULTS / f"{name}.json").write_text(json.dumps(_round(results), indent=1) + "\n", encoding="utf-8")


def _round(results: Any) -> Any:
    """Numbers to seven digits: more would only tell of the machine."""
    if isinstance(results, dict):
        return {name: _round(value) for name, value in results.items()}
    if isinstance(results, list | tuple):
        return [_round(value) for value in results]
    return float(f"{results:.7g}") if isinstance(results, float) else results
