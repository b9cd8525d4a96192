"""Claims about space: what it takes to hold sampled features when every query has its own, and when all share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .._checks import Array, Tree
from ..config import DeformableAttentionConfig
from ..initialization import init_params
from ..layer import LayerTrace, deformable_layer
from ..ops.grid import Size
from ..ops.sampling import bilinear_sample
from ..params import map_tree
from ..peers.deform_conv import DeformableConvConfig, deformable_conv, deformable_conv_shapes
from ..peers.ms_deform_attn import (
    MultiScaleDeformableConfig,
    multi_scale_deformable_layer,
    multi_scale_deformable_layer_macs,
    multi_scale_deformable_shapes,
)
from ..peers.per_query import attend_at_points
from ..presets import PRESETS
from .claim import HOLDS, REFUTED, Claim, Figure, Figures, Source, SourceAccess, Verdict

ELEMENTS = "numbers"
SUMMARY = "a summary of the DAT article's appendix, from which this project started"
MOTIVATION = "DAT article, the opening of the section on deformable attention"


def random_params(shapes: Tree, seed: int = 0) -> Tree:
    """Return parameters of these shapes that are nowhere zero, as trained ones are not."""
    rng = np.random.default_rng(seed)
    return map_tree(lambda shape: 0.2 * rng.standard_normal(shape), shapes)


def noise(dim: int, size: Size, seed: int = 0) -> Array:
    """Return one map of normal noise, (1, C, H, W)."""
    return np.random.default_rng(seed).standard_normal((1, dim, *size))


def exponent(amount: Callable[[int], int], side: int) -> float:
    """Return the power of the side with which an amount grows: log₂ of its ratio at twice the side."""
    return math.log2(amount(2 * side) / amount(side))


# --------------------------------------------------------------------------------------------- deformable convolution


def _columns(dim: int, size: Size) -> int:
    """Return how many numbers a 3 × 3 deformable convolution samples."""
    config = DeformableConvConfig(dim, modulated=False)
    x = noise(dim, size)
    _, trace = deformable_conv(x, random_params(deformable_conv_shapes(config)), config)
    return bilinear_sample(x, trace.points_px.reshape(1, -1, 2)).size


def measure_convolution() -> Figures:
    """Sample at the points of a deformable convolution on maps of odd sizes, and compare with 9 HWC."""
    cases = [(4, (5, 7)), (6, (8, 3)), (10, (9, 11))]
    equal = sum(_columns(dim, size) == 9 * size[0] * size[1] * dim for dim, size in cases)
    return {
        "cases": Figure(len(cases), "maps sampled"),
        "equal": Figure(equal, "of these, with exactly 9HWC sampled numbers"),
        "columns": Figure(_columns(384, (14, 14)), "sampled at C = 384 on 14 × 14", ELEMENTS),
        "map": Figure(384 * 14 * 14, "the map itself", ELEMENTS),
        "offsets": Figure(2 * 9 * 14 * 14, "its offsets, 18HW, not in the count", ELEMENTS),
    }


def judge_convolution(figures: Figures) -> Verdict:
    """Equal for every map."""
    return HOLDS if figures["equal"].value == figures["cases"].value else REFUTED


# ------------------------------------------------------------------------------------------------ keys of one's own


def _per_query_keys(side: int, dim: int = 8) -> int:
    """Return how many numbers the keys take if every query samples as many as the map has pixels."""
    pixels = side * side
    x = noise(dim, (side, side))
    points = np.random.default_rng(1).uniform(0, side - 1, (1, 1, pixels, pixels, 2))
    names = {name: {"weight": (dim, dim), "bias": (dim,)} for name in ("key", "value")}
    _, trace = attend_at_points(x.reshape(1, dim, pixels), x, points, random_params(names), heads=2)
    return trace.k.size


def measure_per_query_keys() -> Figures:
    """Give every query as many keys of its own as there are pixels, on maps of 3², 6² and 12²."""
    pixels, dim = 14 * 14, 384
    return {
        "keys": Figure(_per_query_keys(6), "keys at C = 8 on 6 × 6, as they ran", ELEMENTS),
        "product": Figure(36 * 36 * 8, "N_q·N_k·C there", ELEMENTS),
        "power": Figure(exponent(_per_query_keys, 6), "power of the side with which they grow, 6² to 12²"),
        "power_small": Figure(exponent(_per_query_keys, 3), "the same, 3² to 6²"),
        "stage3": Figure(pixels * pixels * dim, "N_q·N_k·C at C = 384 on 14 × 14", ELEMENTS),
        "shared": Figure(pixels * dim, "N_s·C there, for shared keys", ELEMENTS),
    }


def judge_per_query_keys(figures: Figures) -> Verdict:
    """The product exactly, and the fourth power."""
    fourth = figures["power"].value == figures["power_small"].value == 4
    return HOLDS if fourth and figures["keys"].value == figures["product"].value else REFUTED


# ------------------------------------------------------------------------------------------------ four keys


def _four_keys(side: int) -> int:
    config = MultiScaleDeformableConfig(dim=16, heads=4, points=4)
    params = random_params(multi_scale_deformable_shapes(config))
    return multi_scale_deformable_layer(noise(16, (side, side)), params, config)[1].sampled.size


def measure_four_keys() -> Figures:
    """Run Deformable DETR's attention with four points on maps of 7², 14² and 28²."""
    config = MultiScaleDeformableConfig(dim=384, heads=12, points=4)

    def macs(side: int) -> int:
        return multi_scale_deformable_layer_macs(1, (side, side), config)

    return {
        "sampled": Figure(_four_keys(14), "sampled at C = 16 on 14 × 14, as they ran", ELEMENTS),
        "product": Figure(14 * 14 * 4 * 16, "N_q·4·C there", ELEMENTS),
        "power": Figure(exponent(_four_keys, 14), "power of the side with which they grow, 14² to 28²"),
        "power_small": Figure(exponent(_four_keys, 7), "the same, 7² to 14²"),
        "macs": Figure(macs(14), "multiply-adds at C = 384 on 14 × 14"),
        "macs_power": Figure(exponent(macs, 14), "power of the side with which multiply-adds grow"),
    }


def judge_four_keys(figures: Figures) -> Verdict:
    """Linear in the pixels: the second power of the side."""
    second = all(figures[key].value == 2 for key in ("power", "power_small", "macs_power"))
    return HOLDS if second and figures["sampled"].value == figures["product"].value else REFUTED


# ------------------------------------------------------------------------------------------------ shared keys


def _shared_keys_trace(side: int, stride: int = 1) -> LayerTrace:
    """Run dat_tiny's first deformable layer on a map of another side."""
    released = PRESETS["dat_tiny"].stages[2][1].attention
    assert isinstance(released, DeformableAttentionConfig)
    config = replace(released, stride=stride)
    x = noise(config.dim, (side, side)).astype(np.float32)
    return deformable_layer(x, init_params(config, 0), config)[1]


def measure_shared_keys() -> Figures:
    """Run DAT's layer with shared keys on maps of 7² and 14², and look what its arrays take."""
    stride1, stride2 = _shared_keys_trace(14), _shared_keys_trace(14, stride=2)
    half_side = _shared_keys_trace(7)
    return {
        "sampled": Figure(stride1.sampled.size, "sampled at C = 384 on 14 × 14, stride 1", ELEMENTS),
        "coarse": Figure(stride2.sampled.size, "the same with stride 2", ELEMENTS),
        "product": Figure(196 * 384, "N_s·C at stride 1", ELEMENTS),
        "coarse_product": Figure(49 * 384, "N_s·C at stride 2", ELEMENTS),
        "power": Figure(
            math.log2(stride1.sampled.size / half_side.sampled.size), "power of the side with which they grow"
        ),
        "weights": Figure(stride1.attention.size, "attention weights of the 12 heads, stride 1", ELEMENTS),
        "weights_power": Figure(
            math.log2(stride1.attention.size / half_side.attention.size),
            "power of the side with which the weights grow",
        ),
    }


def judge_shared_keys(figures: Figures) -> Verdict:
    """N_s·C exactly, for both strides."""
    exact = figures["sampled"].value == figures["product"].value
    return HOLDS if exact and figures["coarse"].value == figures["coarse_product"].value else REFUTED


# ------------------------------------------------------------------------------------------------ the rows

CLAIMS = (
    Claim(
        number=1,
        title="A deformable convolution takes 9HWC",
        statement="A 3 × 3 deformable convolution on a map of H × W × C takes 9HWC space.",
        sources=(Source(f"{MOTIVATION}, by way of a summary", SourceAccess.SUMMARY),),
        measure=measure_convolution,
        judge=judge_convolution,
        verdict=HOLDS,
        reason=(
            "Every pixel samples nine points of C channels: {columns} numbers at C = 384 on 14 × 14, nine times the "
            "map's {map}. That is what an implementation holds that writes sampled features down; offsets come on "
            "top ({offsets})."
        ),
    ),
    Claim(
        number=2,
        title="Deforming each query's keys takes N_q·N_k·C",
        statement=(
            "Giving every query of an attention its own shifted keys in the same way takes N_q·N_k·C space; with as "
            "many keys as queries that is biquadratic in the side of the map."
        ),
        sources=(Source(MOTIVATION, SourceAccess.QUOTED),),
        measure=measure_per_query_keys,
        judge=judge_per_query_keys,
        verdict=HOLDS,
        reason=(
            "The keys take {keys} numbers on a small map, N_q·N_k·C exactly, and grow with power {power} of the "
            "side. On dat_tiny's stage 3 they would be {stage3}; shared ones are {shared}. Values take as much "
            "again."
        ),
    ),
    Claim(
        number=3,
        title="Deformable DETR with four keys is linear",
        statement="Deformable DETR brings the cost down by giving each query only N_k = 4 keys a scale.",
        sources=(
            Source(MOTIVATION, SourceAccess.QUOTED),
            Source("Deformable DETR's code", SourceAccess.READ),
        ),
        measure=measure_four_keys,
        judge=judge_four_keys,
        verdict=HOLDS,
        reason=(
            "With four points a query, sampled numbers ({sampled}, N_q·4·C exactly) and multiply-adds both grow "
            "with power {power} of the side: linear in the number of pixels."
        ),
    ),
    Claim(
        number=4,
        title="Sharing the shifted keys takes N_s·C",
        statement="If all queries share the shifted keys, they take N_s·C.",
        sources=(Source(MOTIVATION, SourceAccess.QUOTED),),
        measure=measure_shared_keys,
        judge=judge_shared_keys,
        verdict=HOLDS,
        reason=(
            "dat_tiny's stage 3 samples {sampled} numbers, N_s·C exactly ({coarse} at stride 2), growing with power "
            "{power} of the side. What is not saved are the attention weights: {weights} numbers for 12 heads, "
            "which at a fixed stride still grow with power {weights_power}."
        ),
    ),
)
