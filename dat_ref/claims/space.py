"""Claims about memory: the size of the sampled features with separate keys for every query and with shared keys."""

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
from ..peers.ms_deform_attn import MultiScaleDeformableConfig, multi_scale_deformable_shapes
from ..peers.ms_deform_layer import multi_scale_deformable_layer, multi_scale_deformable_layer_macs
from ..peers.per_query import attend_at_points
from ..presets import PRESETS
from .claim import HOLDS, REFUTED, Claim, Figure, Figures, Source, SourceAccess, Verdict

ELEMENTS = "elements"
SUMMARY = "a summary of the DAT article's appendix, from which this project started"
MOTIVATION = "DAT article, the opening of the section on deformable attention"


def random_params(shapes: Tree, seed: int = 0) -> Tree:
    """Return random nonzero parameters of these shapes."""
    rng = np.random.default_rng(seed)
    return map_tree(lambda shape: 0.2 * rng.standard_normal(shape), shapes)


def noise(dim: int, size: Size, seed: int = 0) -> Array:
    """Return a map of normal noise, (1, C, H, W)."""
    return np.random.default_rng(seed).standard_normal((1, dim, *size))


def exponent(amount: Callable[[int], int], side: int) -> float:
    """Return the exponent p of growth with side^p: log₂ of the ratio at twice the side."""
    return math.log2(amount(2 * side) / amount(side))


# --------------------------------------------------------------------------------------------- deformable convolution


def _columns(dim: int, size: Size) -> int:
    """Return the number of elements that a 3 × 3 deformable convolution samples."""
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
        "equal": Figure(equal, "of these, with exactly 9HWC sampled elements"),
        "columns": Figure(_columns(384, (14, 14)), "sampled at C = 384 on 14 × 14", ELEMENTS),
        "map": Figure(384 * 14 * 14, "elements of the map", ELEMENTS),
        "offsets": Figure(2 * 9 * 14 * 14, "offsets, 18HW, not included", ELEMENTS),
    }


def judge_convolution(figures: Figures) -> Verdict:
    """Verdict: holds if the numbers are equal for every map."""
    return HOLDS if figures["equal"].value == figures["cases"].value else REFUTED


# ------------------------------------------------------------------------------------------------ separate keys


def _per_query_keys(side: int, dim: int = 8) -> int:
    """Return the number of elements of the keys if every query has as many keys as the map has pixels."""
    pixels = side * side
    x = noise(dim, (side, side))
    points = np.random.default_rng(1).uniform(0, side - 1, (1, 1, pixels, pixels, 2))
    names = {name: {"weight": (dim, dim), "bias": (dim,)} for name in ("key", "value")}
    _, trace = attend_at_points(x.reshape(1, dim, pixels), x, points, random_params(names), heads=2)
    return trace.k.size


def measure_per_query_keys() -> Figures:
    """Give every query as many separate keys as the map has pixels, on maps of 3², 6² and 12² pixels."""
    pixels, dim = 14 * 14, 384
    return {
        "keys": Figure(_per_query_keys(6), "keys at C = 8 on 6 × 6, measured", ELEMENTS),
        "product": Figure(36 * 36 * 8, "N_q·N_k·C there", ELEMENTS),
        "power": Figure(exponent(_per_query_keys, 6), "growth exponent in the side of the map, 6² to 12²"),
        "power_small": Figure(exponent(_per_query_keys, 3), "the same, 3² to 6²"),
        "stage3": Figure(pixels * pixels * dim, "N_q·N_k·C at C = 384 on 14 × 14", ELEMENTS),
        "shared": Figure(pixels * dim, "N_s·C there, for shared keys", ELEMENTS),
    }


def judge_per_query_keys(figures: Figures) -> Verdict:
    """Verdict: holds if the keys have exactly N_q·N_k·C elements and grow with the fourth power of the side."""
    fourth = figures["power"].value == figures["power_small"].value == 4
    return HOLDS if fourth and figures["keys"].value == figures["product"].value else REFUTED


# ------------------------------------------------------------------------------------------------ four keys


def _four_keys(side: int) -> int:
    config = MultiScaleDeformableConfig(dim=16, heads=4, points=4)
    params = random_params(multi_scale_deformable_shapes(config))
    return multi_scale_deformable_layer(noise(16, (side, side)), params, config)[1].sampled.size


def measure_four_keys() -> Figures:
    """Run Deformable DETR's attention with four points on maps of 7², 14² and 28² pixels."""
    config = MultiScaleDeformableConfig(dim=384, heads=12, points=4)

    def macs(side: int) -> int:
        return multi_scale_deformable_layer_macs(1, (side, side), config)

    return {
        "sampled": Figure(_four_keys(14), "sampled at C = 16 on 14 × 14, measured", ELEMENTS),
        "product": Figure(14 * 14 * 4 * 16, "N_q·4·C there", ELEMENTS),
        "power": Figure(exponent(_four_keys, 14), "growth exponent in the side of the map, 14² to 28²"),
        "power_small": Figure(exponent(_four_keys, 7), "the same, 7² to 14²"),
        "macs": Figure(macs(14), "multiply-adds at C = 384 on 14 × 14"),
        "macs_power": Figure(exponent(macs, 14), "growth exponent of the multiply-adds"),
    }


def judge_four_keys(figures: Figures) -> Verdict:
    """Verdict: holds if the cost is linear in the number of pixels, the second power of the side."""
    second = all(figures[key].value == 2 for key in ("power", "power_small", "macs_power"))
    return HOLDS if second and figures["sampled"].value == figures["product"].value else REFUTED


# ------------------------------------------------------------------------------------------------ shared keys


def _shared_keys_trace(side: int, stride: int = 1) -> LayerTrace:
    """Run dat_tiny's first deformable layer on a square map."""
    released = PRESETS["dat_tiny"].stages[2][1].attention
    assert isinstance(released, DeformableAttentionConfig)
    config = replace(released, stride=stride)
    x = noise(config.dim, (side, side)).astype(np.float32)
    return deformable_layer(x, init_params(config, 0), config)[1]


def measure_shared_keys() -> Figures:
    """Run DAT's layer with shared keys on maps of 7² and 14² pixels, and measure the sizes of its arrays."""
    stride1, stride2 = _shared_keys_trace(14), _shared_keys_trace(14, stride=2)
    half_side = _shared_keys_trace(7)
    return {
        "sampled": Figure(stride1.sampled.size, "sampled at C = 384 on 14 × 14, stride 1", ELEMENTS),
        "coarse": Figure(stride2.sampled.size, "the same with stride 2", ELEMENTS),
        "product": Figure(196 * 384, "N_s·C at stride 1", ELEMENTS),
        "coarse_product": Figure(49 * 384, "N_s·C at stride 2", ELEMENTS),
        "power": Figure(
            math.log2(stride1.sampled.size / half_side.sampled.size), "growth exponent in the side of the map"
        ),
        "weights": Figure(stride1.attention.size, "attention weights of the 12 heads, stride 1", ELEMENTS),
        "weights_power": Figure(
            math.log2(stride1.attention.size / half_side.attention.size),
            "growth exponent of the attention weights",
        ),
    }


def judge_shared_keys(figures: Figures) -> Verdict:
    """Verdict: holds if exactly N_s·C elements are sampled, for both strides."""
    exact = figures["sampled"].value == figures["product"].value
    return HOLDS if exact and figures["coarse"].value == figures["coarse_product"].value else REFUTED


# ------------------------------------------------------------------------------------------------ the rows

CLAIMS = (
    Claim(
        number=1,
        title="A deformable convolution needs 9HWC memory",
        statement="A 3 × 3 deformable convolution on a map of H × W × C needs 9HWC memory.",
        sources=(Source(f"{MOTIVATION}, by way of a summary", SourceAccess.SUMMARY),),
        measure=measure_convolution,
        judge=judge_convolution,
        verdict=HOLDS,
        reason=(
            "Every pixel samples nine points of C channels: {columns} elements at C = 384 on 14 × 14, nine times the "
            "map's {map}. An implementation that stores the sampled features needs this memory, and {offsets} more "
            "for the offsets."
        ),
    ),
    Claim(
        number=2,
        title="Separate deformed keys for each query need N_q·N_k·C memory",
        statement=(
            "If every query of an attention has its own deformed keys, they need N_q·N_k·C memory. With as many keys "
            "as queries, this is biquadratic in the side of the map."
        ),
        sources=(Source(MOTIVATION, SourceAccess.QUOTED),),
        measure=measure_per_query_keys,
        judge=judge_per_query_keys,
        verdict=HOLDS,
        reason=(
            "The keys have {keys} elements on a small map, exactly N_q·N_k·C, and grow with power {power} of the "
            "side. In stage 3 of dat_tiny they would have {stage3}; shared keys have {shared}. The values need the "
            "same memory again."
        ),
    ),
    Claim(
        number=3,
        title="Deformable DETR with four keys is linear",
        statement="Deformable DETR lowers the cost: each query has only N_k = 4 keys per scale.",
        sources=(
            Source(MOTIVATION, SourceAccess.QUOTED),
            Source("Deformable DETR's code", SourceAccess.READ),
        ),
        measure=measure_four_keys,
        judge=judge_four_keys,
        verdict=HOLDS,
        reason=(
            "With four points per query, the sampled elements ({sampled}, exactly N_q·4·C) and the multiply-adds both "
            "grow with power {power} of the side: linearly in the number of pixels."
        ),
    ),
    Claim(
        number=4,
        title="Shared deformed keys need N_s·C memory",
        statement="If all queries share the deformed keys, the keys need N_s·C memory.",
        sources=(Source(MOTIVATION, SourceAccess.QUOTED),),
        measure=measure_shared_keys,
        judge=judge_shared_keys,
        verdict=HOLDS,
        reason=(
            "Stage 3 of dat_tiny samples {sampled} elements, exactly N_s·C ({coarse} at stride 2). They grow with "
            "power {power} of the side. Sharing does not reduce the attention weights: {weights} for 12 heads. At a "
            "fixed stride they grow with power {weights_power}."
        ),
    ),
)
