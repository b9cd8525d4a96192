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
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from .._checks import ConfigError
from ..config import (
    AttentionConfig,
    BiasKind,
    DATConfig,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
)
from ..conventions import Convention
from ..ops.grid import Size, key_grid_size
from .dat_dcn import DATDCNAttentionConfig
from .deform_conv import DeformableConvConfig
from .mhsa import MultiHeadAttentionConfig
from .ms_deform_attn import MultiScaleDeformableConfig
from .per_query import PerQueryAttentionConfig
from .pyramid import PyramidAttentionConfig
from .registry import ATTENTIONS

Match = Literal["keys", "macs"]


class Candidate(NamedTuple):
    """Candidate replacement of a layer, and its number of keys per query."""

    config: AttentionConfig
    keys: int


Rule = Callable[[DeformableAttentionConfig, Size], Iterator[Candidate]]


def _window_sizes(size: Size) -> range:
    return range(1, max(size) + 1)


def _odd_sizes(size: Size) -> range:
    return range(1, max(size) + 1, 2)


def _point_counts(size: Size) -> range:
    return range(1, size[0] * size[1] + 1)


def _multi_head(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    bias_size = size if layer.bias is BiasKind.TABLE else None
    yield Candidate(
        MultiHeadAttentionConfig(layer.dim, layer.heads, bias_size, **_dropout_rates(layer)), size[0] * size[1]
    )


def _dropout_rates(layer: DeformableAttentionConfig) -> dict[str, Any]:
    return {"attention_dropout": layer.attention_dropout, "projection_dropout": layer.projection_dropout}


def _window(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in _window_sizes(size):
        yield Candidate(WindowAttentionConfig(layer.dim, layer.heads, side, **_dropout_rates(layer)), side**2)


def _shifted_window(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in range(2, max(*size, 2) + 1):
        shift = min(-(-side // 2), side - 1)
        yield Candidate(WindowAttentionConfig(layer.dim, layer.heads, side, shift, **_dropout_rates(layer)), side**2)


def _neighborhood(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in range(1, max(size) + 2, 2):  # the last one covers the map
        keys = min(side, size[0]) * min(side, size[1])
        yield Candidate(NeighborhoodAttentionConfig(layer.dim, layer.heads, side, **_dropout_rates(layer)), keys)


def _pyramid(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for reduction in _window_sizes(size):
        keys = -(-size[0] // reduction) * -(-size[1] // reduction)
        yield Candidate(PyramidAttentionConfig(layer.dim, layer.heads, reduction, **_dropout_rates(layer)), keys)


def _deform_conv(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in _odd_sizes(size):
        yield Candidate(DeformableConvConfig(layer.dim, side, offset_groups=layer.groups), side**2)


def _ms_deform(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for points in _point_counts(size):
        yield Candidate(MultiScaleDeformableConfig(layer.dim, layer.heads, points), points)


def _ms_deform_dot(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for points in _point_counts(size):
        config = MultiScaleDeformableConfig(layer.dim, layer.heads, points, scoring="dot_product")
        yield Candidate(config, points)


def _per_query(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    offset_kernel_size = layer.kernel_size + (layer.kernel_size + 1) % 2  # the next odd size
    for side in _odd_sizes(size):
        yield Candidate(
            PerQueryAttentionConfig(layer.dim, layer.heads, layer.groups, side, offset_kernel_size), side**2
        )


def _dat_dcn(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    # The released references do not exist on a map of one row or column.
    convention = Convention.DATPP2023 if min(size) > 1 else Convention.CELL_CENTER
    for points in _point_counts(size):
        yield Candidate(DATDCNAttentionConfig(layer.dim, layer.heads, points, convention), points)


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


REPLACEMENTS: dict[str, Rule] = {
    "multi_head": _multi_head,
    "window": _window,
    "shifted_window": _shifted_window,
    "neighborhood": _neighborhood,
    "pyramid": _pyramid,
    "deform_conv": _deform_conv,
    "ms_deform": _ms_deform,
    "ms_deform_dot": _ms_deform_dot,
    "per_query": _per_query,
    "dat_dcn": _dat_dcn,
}
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
    return ATTENTIONS[type(config)].macs(1, size, config)


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

    def matched(attention: AttentionConfig, reduction: int) -> AttentionConfig:
        if not isinstance(attention, DeformableAttentionConfig):
            return attention
        height, width = (-(-length // reduction) for length in config.image_size)
        return matched_peer(attention, (height, width), kind, match)

    stages = tuple(
        tuple(replace(block, attention=matched(block.attention, reduction)) for block in blocks)
        for blocks, reduction in zip(config.stages, config.reductions, strict=True)
    )
    return replace(config, stages=stages)
