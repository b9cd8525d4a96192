"""The small network of the experiments, and what is changed in it: one thing at a time.

    48 × 48 image → stem, 12 × 12 × 32 → 1 deformable block, 36 keys → 6 × 6 × 64 → 2 deformable blocks, 9 keys each

It has no local perception unit: apart from the convolutions between its stages, only its attention moves anything from
one place to another. Its maps have four times as many places as keys, so that where the keys are matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..config import BiasKind, BlockConfig, DATConfig, DeformableAttentionConfig, OffsetBound
from ..conventions import Convention
from ..initialization import Init
from ..ops.grid import reference_points, to_pixels
from ..peers.matching import REPLACEMENTS, replace_attention
from ..scenes import KINDS

SIDE = 48  # of the images, pixels
BASE, NO_OFFSETS = "deformable", "no offsets"
MULTI_OBJECT = " (several)"  # of the name of a run on scenes with up to four objects


def base_config() -> DATConfig:
    """Return the network that all others are changed from: the article's options, in the default convention."""

    def deformable(dim: int, heads: int, side: int) -> BlockConfig:
        attention = DeformableAttentionConfig(dim, heads, groups=2, stride=2, kernel_size=3, size=(side, side))
        return BlockConfig(attention, mlp_ratio=2)

    return DATConfig(
        stages=((deformable(32, 2, 12),), (deformable(64, 4, 6), deformable(64, 4, 6))),
        patch_embedding="conv",
        image_size=(SIDE, SIDE),
        num_classes=len(KINDS),
    )


@dataclass(frozen=True)
class Variant:
    """A network: what was changed in the small one."""

    part: str  # of the page that it belongs to
    description: str
    config: DATConfig
    init: Init = "released"


def with_layers(change: Callable[[Any], DeformableAttentionConfig]) -> DATConfig:
    """Return the small network with each of its layers changed."""
    base = base_config()
    stages = (tuple(replace(block, attention=change(block.attention)) for block in blocks) for blocks in base.stages)
    return replace(base, stages=tuple(stages))


def _with(**options: Any) -> DATConfig:
    return with_layers(lambda layer: replace(layer, **options))


def reference_positions(convention: Convention = Convention.CELL_CENTER) -> str:
    """Return where three keys lie on an axis of 6 pixels, in pixels; the middle of the first one is 0.

    >>> reference_positions()
    '0.5, 2.5, 4.5'
    """
    pixels = to_pixels(reference_points((3, 3), convention), (6, 6), convention)
    return ", ".join(f"{position:.3g}" for position in pixels[:, 0, 0])


def variants() -> dict[str, Variant]:
    """Return all networks by name, the small one first."""
    base = base_config()
    networks = {
        BASE: Variant("base", "deformable attention: s = 2, 2 groups, bias from a table, cell centers", base),
        NO_OFFSETS: Variant("offsets", "points stay where they are at rest", _with(offset_bound=OffsetBound.NONE)),
        "zero start": Variant("offsets", "offsets begin at exactly 0", base, "zero_offset"),
    }
    for offset_range in (1.0, 4.0):
        name = f"s = {offset_range:g}"
        networks[name] = Variant(
            "offsets", f"points move by {offset_range / 2:g} key cells at most", _with(offset_range=offset_range)
        )
    clamped = _with(offset_bound=OffsetBound.CLAMP)
    networks["clamp"] = Variant("offsets", "points move anywhere on the map, cut off at its border (DAT++)", clamped)
    networks["1 group"] = Variant("groups", "all heads share their points", _with(groups=1))
    per_head = with_layers(lambda layer: replace(layer, groups=layer.heads))
    networks["a group a head"] = Variant("groups", "every head has points of its own", per_head)
    for bias, description in (
        (BiasKind.NONE, "no position bias"),
        (BiasKind.FIXED, "a number for every pair of cells, wherever the points went"),
        (BiasKind.LOG_CPB, "a small network of the displacement"),
        (BiasKind.DEPTHWISE, "a 3 × 3 depthwise convolution of the queries instead"),
    ):
        networks[f"bias: {bias.value}"] = Variant("bias", description, _with(bias=bias))
    for convention in (Convention.CVPR2022, Convention.DATPP2023, Convention.PAPER):
        positions = f"{reference_positions(convention)}; with cell centers {reference_positions()}"
        description = f"keys of an axis of 6 pixels at rest: {positions}"
        networks[convention.name.lower()] = Variant("conventions", description, _with(convention=convention))
    for kind in REPLACEMENTS:
        networks[kind] = Variant("peers", "in the place of every deformable layer", replace_attention(base, kind))
    return networks
