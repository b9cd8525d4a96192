"""Pictures and weights that ship with the package.

Photographs in the public domain or under CC0, small pictures of objects under the MIT license, and a small trained
network. ``MANIFEST.json`` records the author, source and license of each picture.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

# Mean and deviation of ImageNet's pixels, red, green and blue in [0, 1], with which the released models were trained.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_DEVIATION = (0.229, 0.224, 0.225)

_FOLDER = Path(__file__).parent
NETWORK = "dat_spot"  # the trained network that ships


@cache
def _manifest(part: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a part of the manifest by name, in the manifest's order."""
    rows = json.loads((_FOLDER / "MANIFEST.json").read_text(encoding="utf-8"))[part]
    return {row["name"]: row for row in rows}


def _path(part: str, name: str) -> Path:
    rows = _manifest(part)
    if name not in rows:
        raise ValueError(f"name: expected one of {', '.join(rows)}, got {name!r}")
    return _FOLDER / str(rows[name]["file"])


def photographs() -> tuple[str, ...]:
    """Return the names of the photographs, the default one first.

    >>> photographs()
    ('chelsea', 'coffee', 'rocket', 'astronaut')
    """
    return tuple(_manifest("photographs"))


def photograph_path(name: str = "chelsea") -> Path:
    """Return the path of a photograph's JPEG file.

    >>> photograph_path("coffee").name
    'coffee.jpg'
    """
    return _path("photographs", name)


def objects() -> tuple[str, ...]:
    """Return the names of the small pictures of objects.

    >>> objects()
    ('giraffe', 'surfer', 'doughnut', 'octopus', 'ladybug', 'fish', 'tiger', 'crab')
    """
    return tuple(_manifest("objects"))


def object_path(name: str) -> Path:
    """Return the path of the small picture of an object, with an alpha channel.

    >>> object_path("giraffe").name
    'giraffe.webp'
    """
    return _path("objects", name)


def network_path(name: str = NETWORK) -> Path:
    """Return the path of the weights of the network that ships.

    >>> network_path().name
    'dat_spot.safetensors'
    """
    if name != NETWORK:
        raise ValueError(f"name: expected {NETWORK!r}, got {name!r}")
    return _FOLDER / f"{name}.safetensors"


def network_card(name: str = NETWORK) -> dict[str, Any]:
    """Return how the network that ships was trained, and its measured accuracy."""
    card: dict[str, Any] = json.loads(network_path(name).with_suffix(".json").read_text(encoding="utf-8"))
    return card


def provenance(name: str) -> dict[str, Any]:
    """Return a picture's row of the manifest: licence, author, source, checksum, changes.

    >>> provenance("chelsea")["licence"]
    'CC0-1.0'
    """
    rows = _manifest("photographs") | _manifest("objects")
    if name not in rows:
        raise ValueError(f"name: expected one of {', '.join(rows)}, got {name!r}")
    return dict(rows[name])
