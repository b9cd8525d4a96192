"""The systems that are compared, side by side, as the map grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import DeformableAttentionConfig
from ..ops.grid import key_grid_size
from ..peers.matching import REPLACEMENTS, matched_peer
from .formulas import attention_terms, total

# Peers that cost what another one costs, so that one line stands for both.
SAME_COST_AS = {"shifted_window": "window", "dat_dcn": "ms_deform"}


@dataclass(frozen=True)
class Curve:
    """The cost of one system on square maps, one image at a time.

    Args:
        kind: one of `dat_ref.peers.REPLACEMENTS`; ``"deformable"`` with a fixed stride, ``"deformable_fixed"`` with a
            fixed key grid.
        sides: of the maps.
        macs: multiply-adds.
        saved_bytes: bytes held for the backward.
    """

    kind: str
    sides: tuple[int, ...]
    macs: tuple[int, ...]
    saved_bytes: tuple[int, ...]


def compared_systems(layer: DeformableAttentionConfig, side: int) -> dict[str, Any]:
    """Return the systems by kind, each with as many keys as the layer has on a map of `side`², where it can choose.

    What is chosen there stays as it is on larger maps: a window of 7 × 7 remains one.
    """
    peers = {kind: matched_peer(layer, (side, side), kind) for kind in REPLACEMENTS if kind not in SAME_COST_AS}
    return {"deformable": layer, **peers}


def curves(layer: DeformableAttentionConfig, sides: Sequence[int], *, itemsize: int = 4) -> list[Curve]:
    """Return multiply-adds and memory of every system at every side.

    The deformable layer comes twice: with its stride, so that its keys grow with the map, and with a stride that grows
    with the map, so that they do not.

    Args:
        sides: of the maps, each a multiple of the first.
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
    """Return how many keys a layer has on a map of side²."""
    rows, columns = key_grid_size((side, side), layer.kernel_size, layer.stride, layer.convention)
    return rows * columns
