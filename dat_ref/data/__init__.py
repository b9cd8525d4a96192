"""Photographs that ship with the package, each in the public domain or under CC0, and a small trained network.

``MANIFEST.json`` beside them records who took each one, where it came from and what was done to it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

# Mean and deviation of ImageNet's pixels, red, green and blue in [0, 1], with which the released models were trained.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_DEVIATION = (0.229, 0.224, 0.225)

NETWORK = "dat_nano"  # the trained network that ships

_FOLDER = Path(__file__).parent


@cache
def _manifest() -> dict[str, dict[str, Any]]:
    """Return the manifest's rows by photograph name, in the manifest's order."""
    rows = json.loads((_FOLDER / "MANIFEST.json").read_text(encoding="utf-8"))["photographs"]
    return {row["name"]: row for row in rows}


def _row(name: str) -> dict[str, Any]:
    if name not in _manifest():
        raise ValueError(f"name: expected one of {', '.join(photographs())}, got {name!r}")
    return _manifest()[name]


def photographs() -> tuple[str, ...]:
    """Return the names of the photographs, the default one first.

    >>> photographs()
    ('chelsea', 'coffee', 'rocket', 'astronaut')
    """
    return tuple(_manifest())


def photograph_path(name: str = "chelsea") -> Path:
    """Return the path of a photograph's JPEG file.

    >>> photograph_path("coffee").name
    'coffee.jpg'
    """
    return _FOLDER / str(_row(name)["file"])


def network_path(name: str = NETWORK) -> Path:
    """Return the path of the weights of a network that ships; how it was trained stands in a JSON file beside them.

    >>> network_path().name
    'dat_nano.safetensors'
    """
    if name != NETWORK:
        raise ValueError(f"name: expected {NETWORK!r}, got {name!r}")
    return _FOLDER / f"{name}.safetensors"


def network_card(name: str = NETWORK) -> dict[str, Any]:
    """Return how a network that ships was trained, and its accuracy.

    >>> network_card()["recipe"]["image_size"]
    64
    """
    card: dict[str, Any] = json.loads(network_path(name).with_suffix(".json").read_text(encoding="utf-8"))
    return card


def provenance(name: str) -> dict[str, Any]:
    """Return a photograph's row of the manifest: licence, author, source, checksum, what was changed.

    >>> provenance("chelsea")["licence"]
    'CC0-1.0'
    """
    return dict(_row(name))
