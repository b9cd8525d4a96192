"""Replacement of a backbone's deformable attentions by a peer, matched in keys or in multiply-adds.

One parameter of each peer sets its number of keys per query. The search tries all values of this parameter at the image
size of the backbone. It selects the value whose number of keys (or multiply-adds) is closest to the replaced layer's,
and the first of two that are equally close:

====================  =====================  ======================================================
kind                  searched parameter     keys per query
====================  =====================  ======================================================
``multi_head``        none                   H W
``window``            window size w          w²
``shifted_window``    window size w > 1      w², shift ⌈w/2⌉
``neighborhood``      kernel size K, odd     K², fewer on a small map
``pyramid``           reduction r            ⌈H/r⌉ ⌈W/r⌉
``deform_conv``       kernel size k, odd     k² taps
``ms_deform``         points P               P per head (heads · P in total)
``ms_deform_dot``     points P               P per head, scored by dot products
``per_query``         kernel size k, odd     k²
``dat_dcn``           points P               P per head
``no_offsets``        none                   Hk Wk, at the reference points
``average_pool``      none                   Hk Wk, means of the key cells
``more_keys``         none                   4 Hk Wk at the reference points: half the stride
====================  =====================  ======================================================

A deformable layer has Ns = Hk Wk keys. The last three are its controls: the same layer without offsets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from .._checks import ConfigError
from ..config import AttentionConfig, DATConfig, DeformableAttentionConfig, OffsetBound
from ..ops.grid import Size, key_grid_size
from .attention import Candidate, Rule
from .registry import REPLACEMENTS as REPLACEMENTS  # re-exported
from .registry import row_of

Match = Literal["keys", "macs"]


def _keys(layer: DeformableAttentionConfig, size: Size) -> int:
    """Return the number of keys of a deformable layer, Hk Wk."""
    rows, columns = key_grid_size(size, layer.kernel_size, layer.stride, layer.convention)
    return rows * columns


def _without_offsets(layer: DeformableAttentionConfig, size: Size, **changes: Any) -> Iterator[Candidate]:
    fixed = replace(layer, offset_bound=OffsetBound.NONE, **changes)
    yield Candidate(fixed, _keys(fixed, size))


def _average_pool(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    return _without_offsets(layer, size, average_pool=True)


def _more_keys(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    return _without_offsets(layer, size, stride=max(layer.stride // 2, 1))


# The same layer without offsets: what they have to be compared with.
CONTROLS: dict[str, Rule] = {
    "no_offsets": _without_offsets,
    "average_pool": _average_pool,
    "more_keys": _more_keys,
}


def resolve_kind(kind: str) -> str:
    """Return the current name of a kind: ``"dat_dcn"`` for ``"swap_in"`` (deprecated, with a warning), else `kind`."""
    if kind != "swap_in":
        return kind
    warnings.warn("the kind 'swap_in' is deprecated, use 'dat_dcn'", DeprecationWarning, stacklevel=3)
    return "dat_dcn"


def matched_peer(layer: DeformableAttentionConfig, size: Size, kind: str, match: Match = "keys") -> AttentionConfig:
    """Return the peer of a kind that is closest to a deformable layer on a map of `size`; see the module's table.

    Raises:
        ConfigError: for an unknown kind or match.

    >>> layer = DeformableAttentionConfig(dim=8, heads=2, stride=2, kernel_size=3, size=(14, 14))
    >>> matched_peer(layer, (14, 14), "window").window_size
    7
    """
    kind, rules = resolve_kind(kind), REPLACEMENTS | CONTROLS
    if kind not in rules:
        raise ConfigError(f"kind: expected one of {', '.join(rules)}, got {kind!r}")
    if match not in ("keys", "macs"):
        raise ConfigError(f"match: expected 'keys' or 'macs', got {match!r}")
    candidates = list(rules[kind](layer, size))
    if match == "keys":
        keys = _keys(layer, size)
        return min(candidates, key=lambda candidate: abs(candidate.keys - keys)).config
    target = _macs(layer, size)
    return min(candidates, key=lambda candidate: abs(_macs(candidate.config, size) - target)).config


def _macs(config: AttentionConfig, size: Size) -> int:
    return row_of(config).macs(1, size, config)


def replace_attention(config: DATConfig, kind: str, match: Match = "keys") -> DATConfig:
    """Return a backbone configuration with a peer in place of each deformable attention.

    Args:
        config: backbone configuration.
        kind: kind of peer from the module's table.
        match: quantity to match as closely as the peer allows, at ``config.image_size``: ``"keys"`` or ``"macs"``.

    Raises:
        ConfigError: for an unknown kind or match.

    >>> from dat_ref import config
    >>> replace_attention(config("dat_tiny"), "neighborhood", match="macs").stages[2][1].attention.kernel_size
    15
    """

    def matched(attention: AttentionConfig, stage: int) -> AttentionConfig:
        if not isinstance(attention, DeformableAttentionConfig):
            return attention
        height, width = (-(-length // config.reductions[stage]) for length in config.image_size)
        return matched_peer(attention, (height, width), kind, match)

    return config.map_attention(matched)
