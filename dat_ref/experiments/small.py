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
from ..peers.swap import SWAPS, swap_attention
from ..scenes import KINDS

SIDE = 48  # of the images, pixels
BASE, STILL = "deformable", "no offsets"
SEVERAL = " (several)"  # of the name of a run on scenes with up to four objects


def small() -> DATConfig:
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
    about: str
    config: DATConfig
    init: Init = "released"


def with_layers(change: Callable[[Any], DeformableAttentionConfig]) -> DATConfig:
    """Return the small network with each of its layers changed."""
    base = small()
    stages = (tuple(replace(block, attention=change(block.attention)) for block in blocks) for blocks in base.stages)
    return replace(base, stages=tuple(stages))


def _with(**options: Any) -> DATConfig:
    return with_layers(lambda layer: replace(layer, **options))


def at_rest(convention: Convention = Convention.CELL_CENTER) -> str:
    """Return where three keys lie on an axis of 6 pixels, in pixels; the middle of the first one is 0.

    >>> at_rest()
    '0.5, 2.5, 4.5'
    """
    pixels = to_pixels(reference_points((3, 3), convention), (6, 6), convention)
    return ", ".join(f"{place:.3g}" for place in pixels[:, 0, 0])


def variants() -> dict[str, Variant]:
    """Return all networks by name, the small one first."""
    base = small()
    found = {
        BASE: Variant("base", "deformable attention: s = 2, 2 groups, bias from a table, cell centers", base),
        STILL: Variant("offsets", "points stay where they are at rest", _with(offset_bound=OffsetBound.NONE)),
        "zero start": Variant("offsets", "offsets begin at exactly 0", base, "zero_offset"),
    }
    for reach in (1.0, 4.0):
        name = f"s = {reach:g}"
        found[name] = Variant("offsets", f"points move by {reach / 2:g} key cells at most", _with(offset_range=reach))
    clamped = _with(offset_bound=OffsetBound.CLAMP)
    found["clamp"] = Variant("offsets", "points move anywhere on the map, cut off at its border (DAT++)", clamped)
    found["1 group"] = Variant("groups", "all heads share their points", _with(groups=1))
    each = with_layers(lambda layer: replace(layer, groups=layer.heads))
    found["a group a head"] = Variant("groups", "every head has points of its own", each)
    for bias, about in (
        (BiasKind.NONE, "no position bias"),
        (BiasKind.FIXED, "a number for every pair of cells, wherever the points went"),
        (BiasKind.LOG_CPB, "a small network of the displacement"),
        (BiasKind.DEPTHWISE, "a 3 × 3 depthwise convolution of the queries instead"),
    ):
        found[f"bias: {bias.value}"] = Variant("bias", about, _with(bias=bias))
    for convention in (Convention.CVPR2022, Convention.DATPP2023, Convention.PAPER):
        about = f"keys of an axis of 6 pixels at rest: {at_rest(convention)}; with cell centers {at_rest()}"
        found[convention.name.lower()] = Variant("conventions", about, _with(convention=convention))
    for kind in SWAPS:
        found[kind] = Variant("peers", "in the place of every deformable layer", swap_attention(base, kind))
    return found
