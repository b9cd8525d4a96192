"""Cost of the deformable layer and its peers against the map size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import DeformableAttentionConfig
from ..ops.grid import key_grid_size
from ..peers.matching import REPLACEMENTS, matched_peer
from .formulas import attention_terms, total

# Peers with the same cost as another peer; one curve represents both.
SAME_COST_AS = {"shifted_window": "window", "dat_dcn": "ms_deform"}


@dataclass(frozen=True)
class Curve:
    """The cost of one system on square maps, one image at a time.

    Args:
        kind: one of `dat_ref.peers.REPLACEMENTS`; ``"deformable"`` with a fixed stride, ``"deformable_fixed"`` with a
            fixed key grid.
        sides: sides of the square maps, in pixels.
        macs: multiply-adds at each side.
        saved_bytes: bytes saved for the backward pass at each side.
    """

    kind: str
    sides: tuple[int, ...]
    macs: tuple[int, ...]
    saved_bytes: tuple[int, ...]


def compared_systems(layer: DeformableAttentionConfig, side: int) -> dict[str, Any]:
    """Return the compared systems by kind, matched in keys to the layer on a map of `side` × `side`.

    Their parameters do not change on larger maps: a 7 × 7 window stays 7 × 7.
    """
    peers = {kind: matched_peer(layer, (side, side), kind) for kind in REPLACEMENTS if kind not in SAME_COST_AS}
    return {"deformable": layer, **peers}


def curves(layer: DeformableAttentionConfig, sides: Sequence[int], *, itemsize: int = 4) -> list[Curve]:
    """Return multiply-adds and memory of every system at every side.

    The deformable layer appears twice: with a fixed stride, where the number of keys grows with the map, and with a
    stride proportional to the side, where it does not.

    Args:
        layer: configuration of the deformable layer.
        sides: sides of the square maps, in pixels, each a multiple of the first.
        itemsize: bytes per element, 4 or 8.
    """
    systems = {kind: [config] * len(sides) for kind, config in compared_systems(layer, sides[0]).items()}
    growing_strides = [replace(layer, stride=layer.stride * side // sides[0]) for side in sides]
    result = []
    for kind, configs in {"deformable_fixed": growing_strides, **systems}.items():
        costs = [
            total(attention_terms(1, (side, side), config, itemsize=itemsize))
            for side, config in zip(sides, configs, strict=True)
        ]
        result.append(
            Curve(kind, tuple(sides), tuple(cost.macs for cost in costs), tuple(cost.saved_bytes for cost in costs))
        )
    return result


def keys_at(layer: DeformableAttentionConfig, side: int) -> int:
    """Return the number of keys of a layer on a map of `side` × `side`."""
    rows, columns = key_grid_size((side, side), layer.kernel_size, layer.stride, layer.convention)
    return rows * columns
