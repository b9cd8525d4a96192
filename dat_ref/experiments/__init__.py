"""Experiments: what trained networks do, measured by scripts that write JSON; pages and a notebook are drawn from it.

=============  ==================================================================================
`measures`     how far points are from an object, and how sure a mean is
`traces`       what each layer of a network did
`knock_out`    does the network that ships use its offsets? They are taken away, and others given
`twin`         is it better than a twin trained without?
`small`        a small network, and what is changed in it
`study`        trains it and everything that is changed, several seeds each
`looks`        where those networks look: points and attention against the objects' masks
`costs`        what they cost: parameters, multiply-adds, memory, time
`figures`      drawn from what was found
`pages`        the pages of the site, written from what was found
=============  ==================================================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "measured"
NAMES = ("study", "looks", "costs", "knock_out", "twin")


def measured(name: str) -> dict[str, Any]:
    """Return what an experiment found, from the file that ships.

    Args:
        name: one of `NAMES`.
    """
    found: dict[str, Any] = json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def keep(name: str, found: dict[str, Any]) -> None:
    """Write what an experiment found to the file that ships."""
    (MEASURED / f"{name}.json").write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")


def _rounded(found: Any) -> Any:
    """Numbers to seven digits: more would only tell of the machine."""
    if isinstance(found, dict):
        return {name: _rounded(each) for name, each in found.items()}
    if isinstance(found, list | tuple):
        return [_rounded(each) for each in found]
    return float(f"{found:.7g}") if isinstance(found, float) else found
