"""Claims about cost: the formula, its worked example, the offset network, and the totals of the eight models."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np

from ..complexity.counter import Counts
from ..complexity.counter import count as count_run
from ..complexity.formulas import backbone_cost
from ..complexity.published import PUBLISHED
from ..config import AttentionConfig, DATConfig, DeformableAttentionConfig, WindowAttentionConfig
from ..conventions import Convention
from ..initialization import init_params
from ..layer import deformable_layer, deformable_layer_macs, deformable_shapes
from ..ops.grid import Size, key_grid_size
from ..params import count
from ..peers.window import window_attention_macs
from ..presets import PRESETS
from .claim import HOLDS, REFUTED, Claim, Figure, Figures, Source, SourceAccess, Verdict, holds_if

MACS = "multiply-adds"
COMPLEXITY = "DAT article, the paragraph on computational complexity"

# ------------------------------------------------------------------------------------------------ the formula


def omega(size: Size, samples: int, channels: int, kernel: int) -> dict[str, int]:
    """Return the terms of the article's formula: attention, dense projections, key projections, offset network."""
    pixels = size[0] * size[1]
    return {
        "2 HW Ns C": 2 * pixels * samples * channels,
        "2 HW C²": 2 * pixels * channels**2,
        "2 Ns C²": 2 * samples * channels**2,
        "(k² + 2) Ns C": (kernel**2 + 2) * samples * channels,
    }


def _count_layer(config: DeformableAttentionConfig, size: Size) -> Counts:
    """Run one layer and count its operations."""
    x = np.random.default_rng(0).standard_normal((1, config.dim, *size))
    return count_run(deformable_layer, x, init_params(config, 0, dtype=np.float64), config)


# Sides and strides without common divisors: (H, W), C, heads, groups, r, k.
ODD_LAYERS = (
    ((7, 12), 24, 4, 2, 1, 5),
    ((9, 5), 12, 6, 3, 2, 3),
    ((11, 13), 30, 5, 1, 3, 7),
    ((14, 14), 48, 12, 3, 2, 5),
)


def measure_formula() -> Figures:
    """Count the operations of the layer on maps of odd sizes, and compare them with the formula's four terms."""
    equal, uncounted = 0, 0
    for size, dim, heads, groups, stride, kernel in ODD_LAYERS:
        config = DeformableAttentionConfig(dim, heads, groups, stride, kernel, size=size)
        keys = key_grid_size(size, kernel, stride, config.convention)
        counts = _count_layer(config, size)
        sampling_macs = counts.within("bilinear_sample").macs
        equal += counts.macs - sampling_macs == sum(omega(size, keys[0] * keys[1], dim, kernel).values())
        uncounted += sampling_macs
    return {
        "layers": Figure(len(ODD_LAYERS), "layers run and counted"),
        "equal": Figure(equal, "layers whose count equals the formula"),
        "left_out": Figure(uncounted, "bilinear sampling in the same passes", MACS),
    }


def judge_formula(figures: Figures) -> Verdict:
    """Verdict: holds if the counts are equal, except for the bilinear sampling that the formula omits."""
    if figures["equal"].value != figures["layers"].value:
        return REFUTED
    if not figures["left_out"].value:
        return HOLDS
    return holds_if("only matrix products and convolutions are counted, without bilinear sampling")


# ------------------------------------------------------------------------------------------------ the worked example

EXAMPLE = DeformableAttentionConfig(
    dim=384, heads=12, groups=3, stride=2, kernel_size=5, size=(14, 14), convention=Convention.CVPR2022
)


def measure_example() -> Figures:
    """Compute the cost of the article's example by the formula and by counting.

    The example has H = W = 14, Ns = 49, C = 384 and k = 5.
    """
    size = (14, 14)
    terms = omega(size, 49, EXAMPLE.dim, EXAMPLE.kernel_size)
    total = sum(terms.values()) - terms["(k² + 2) Ns C"]
    counts = _count_layer(EXAMPLE, size)
    offset = counts.within("offset_network").macs
    return {
        "total": Figure(total, "the first three terms", MACS),
        "offset": Figure(offset, "the offset network, as it ran", MACS),
        "formula": Figure(terms["(k² + 2) Ns C"], "the offset network, by the formula's last term", MACS),
        "percent": Figure(100 * offset / total, "offset network, relative to the first three terms", "%", digits=2),
        "quoted": Figure(5_080_000, "the offset network, number in the article", MACS),
        "slip": Figure(5_080_000 / offset, "article's number divided by the counted one"),
        "sampling": Figure(counts.within("_sample_groups").macs, "omitted: sampling of the features", MACS),
        "bias": Figure(counts.within("table_bias").macs, "omitted: sampling of the bias table", MACS),
        "window": Figure(
            window_attention_macs(1, size, WindowAttentionConfig(384, 12, 7)), "a 7×7 window attention on the map", MACS
        ),
    }


def judge_example(figures: Figures) -> Verdict:
    """Verdict: holds if both numbers in the article equal the counted ones, in the digits given there."""
    total, offset = float(figures["total"].value) / 1e6, float(figures["offset"].value) / 1e6
    quoted = (round(total, 2) == 79.63, round(offset, 2) == 5.08, round(100 * offset / total) == 6)
    return HOLDS if all(quoted) else REFUTED


# ------------------------------------------------------------------------------------------------ growth in C


def measure_growth_in_channels() -> Figures:
    """Compute multiply-adds and parameters of the offset network at four widths, and its share of a layer."""
    figures: dict[str, Figure] = {}
    for dim in (96, 192, 384, 768):
        config = replace(EXAMPLE, dim=dim, heads=dim // 32)
        macs = deformable_layer_macs(1, (14, 14), config)
        omega_macs = sum(macs.values()) - macs["sampling"] - macs["bias"]
        weights = count(deformable_shapes(config)["offset_network"])
        figures[f"macs_{dim}"] = Figure(macs["offset network"], f"offset network at C = {dim}", MACS)
        figures[f"weights_{dim}"] = Figure(weights, f"parameters at C = {dim}, three groups")
        figures[f"share_{dim}"] = Figure(100 * macs["offset network"] / omega_macs, f"share of Ω at C = {dim}", "%")
    return figures


def judge_growth_in_channels(figures: Figures) -> Verdict:
    """Verdict: holds if twice the channels need exactly twice the cost."""
    doubled = [
        int(figures[f"{kind}_{2 * dim}"].value) == 2 * int(figures[f"{kind}_{dim}"].value)
        for kind in ("macs", "weights")
        for dim in (96, 192, 384)
    ]
    return HOLDS if all(doubled) else REFUTED


# ------------------------------------------------------------------------------------------------ the eight models


TOLERANCE = 3.0  # percent


def measure_models() -> Figures:
    """Compute parameters and multiply-adds of the eight released models and compare them with the printed ones."""
    figures: dict[str, Figure] = {}
    errors: dict[str, list[float]] = {"params": [], "macs": []}
    exact = 0
    for name, printed in PUBLISHED.items():
        cost = backbone_cost(1, (printed.side, printed.side), PRESETS[name]).total
        params, macs = cost.parameters / 1e6, cost.products / 1e9
        figures[f"{name}_params"] = Figure(
            params, f"{name}: parameters (printed: {printed.parameters:g} M)", "M", digits=4
        )
        figures[f"{name}_macs"] = Figure(macs, f"{name}: {MACS} (printed: {printed.macs:g} G)", "G", digits=4)
        errors["params"].append(100 * abs(params / printed.parameters - 1))
        errors["macs"].append(100 * abs(macs / printed.macs - 1))
        exact += (round(params) == printed.parameters) + (round(macs, 1) == printed.macs)
    figures["apart_params"] = Figure(max(errors["params"]), "largest difference, parameters", "%", digits=2)
    figures["apart_macs"] = Figure(max(errors["macs"]), f"largest difference, {MACS}", "%", digits=2)
    figures["to_the_digit"] = Figure(exact, "numbers of the 16 that round to the printed digit")
    return figures


def judge_models(figures: Figures) -> Verdict:
    """Verdict: holds if all sixteen numbers round to the printed digit; conditional if all are close."""
    if figures["to_the_digit"].value == 2 * len(PUBLISHED):
        return HOLDS
    largest = max(float(figures["apart_params"].value), float(figures["apart_macs"].value))
    return holds_if(f"an error of {TOLERANCE:g} % is accepted") if largest <= TOLERANCE else REFUTED


# ------------------------------------------------------------------------------------------------ number of samples


def _samples(config: DATConfig) -> str:
    """Return Ns of each deformable stage of a preset at 224²."""
    descriptions = {}
    for stage, blocks in enumerate(config.stages):
        for block in blocks:
            layer = block.attention
            if isinstance(layer, DeformableAttentionConfig):
                side = 224 // config.reductions[stage]
                keys = key_grid_size((side, side), layer.kernel_size, layer.stride, layer.convention)
                descriptions[stage + 1] = f"stage {stage + 1}: r = {layer.stride}, Ns = {keys[0] * keys[1]}"
    return "; ".join(descriptions.values())


def _macs_with_stage3_stride(stride: int) -> float:
    """Return dat_tiny's multiply-adds, in billions, with another stride in the third stage."""

    def coarser(attention: AttentionConfig, stage: int) -> AttentionConfig:
        if stage == 2 and isinstance(attention, DeformableAttentionConfig):
            return replace(attention, stride=stride)
        return attention

    config = PRESETS["dat_tiny"].map_attention(coarser)
    return backbone_cost(1, (224, 224), config).total.products / 1e9


def measure_samples() -> Figures:
    """Compare Ns with HW/r² for strides r that divide the sides and for others, and list r of the releases."""
    cases = [
        ((height, width), stride, kernel, convention)
        for height in range(8, 25)
        for width in (9, 16, 24)
        for stride in (1, 2, 4, 8)
        for kernel in (3, 5, 7, 9)
        for convention in Convention
    ]
    equal, rounded_up, total = Counter[bool](), Counter[bool](), Counter[bool]()
    for size, stride, kernel, convention in cases:
        keys = key_grid_size(size, kernel, stride, convention)
        divides = size[0] % stride == 0 and size[1] % stride == 0
        total[divides] += 1
        equal[divides] += keys[0] * keys[1] * stride**2 == size[0] * size[1]
        rounded_up[divides] += keys == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    return {
        "cases": Figure(total[True], "layers whose stride divides both sides"),
        "equal": Figure(equal[True], "of these, with Ns = HW/r²"),
        "others": Figure(total[False], "layers whose stride does not divide both sides"),
        "others_equal": Figure(equal[False], "of these, with Ns = HW/r²"),
        "rounded_up": Figure(rounded_up[False], "of these, with ⌈H/r⌉·⌈W/r⌉"),
        "stride_1": Figure(
            _macs_with_stage3_stride(1),
            "dat_tiny, r = 1 in stage 3, as released (printed: 4.6 and 4.59 G)",
            "G",
            digits=4,
        ),
        "stride_2": Figure(_macs_with_stage3_stride(2), "dat_tiny, r = 2 in stage 3", "G", digits=4),
        "dat_2022": Figure(_samples(PRESETS["dat_tiny"]), "dat_tiny at 224², as released"),
        "dat_2023": Figure(_samples(PRESETS["dat_pp_tiny"]), "dat_pp_tiny at 224², as released"),
    }


def judge_samples(figures: Figures) -> Verdict:
    """Verdict: holds if r divides the sides; elsewhere HW/r² is not always an integer."""
    if figures["equal"].value != figures["cases"].value:
        return REFUTED
    return HOLDS if figures["others_equal"].value == figures["others"].value else holds_if("r divides H and W")


# ------------------------------------------------------------------------------------------------ the rows

CLAIMS = (
    Claim(
        number=5,
        title="The formula of the layer's cost",
        statement="Deformable multi-head attention costs Ω = 2HW·Ns·C + 2HW·C² + 2Ns·C² + (k² + 2)·Ns·C.",
        sources=(Source(COMPLEXITY, SourceAccess.QUOTED),),
        measure=measure_formula,
        judge=judge_formula,
        verdict=holds_if("only matrix products and convolutions are counted, without bilinear sampling"),
        reason=(
            "Of {layers} layers of odd sizes, {equal} have exactly the four terms when their operations are counted. "
            "The formula counts multiply-adds, although it calls them FLOPs. The same passes need {left_out} more for "
            "bilinear sampling of features and bias table. The formula omits these, and also norm, GELU and softmax."
        ),
    ),
    Claim(
        number=6,
        title="The worked example: 79.63 M, and 5.08 M for the offsets",
        statement=(
            "With H = W = 14, Ns = 49, C = 384 and k = 5 a block costs 79.63 M. The offset network's part is 5.08 M, "
            "about 6 %."
        ),
        sources=(Source(COMPLEXITY, SourceAccess.QUOTED),),
        measure=measure_example,
        judge=judge_example,
        verdict=REFUTED,
        reason=(
            "The first number is correct: {total}. The second is ten times too large, with a misplaced decimal point: "
            "the offset network costs {offset}, or {percent} %, so the method is cheaper than the article states. The "
            "example also omits the sampling of the bias table, {bias}, about as much as the offset network, and of "
            "the features, {sampling}. In the notes that quote this sentence, 79.63 M is the cost of a Swin block; a "
            "7×7 window attention of that size costs {window}."
        ),
    ),
    Claim(
        number=7,
        title="The offset network grows linearly with C",
        statement="The offset network's cost is linear in the channels, so it is small compared with the attention.",
        sources=(Source(COMPLEXITY, SourceAccess.QUOTED),),
        measure=measure_growth_in_channels,
        judge=judge_growth_in_channels,
        verdict=HOLDS,
        reason=(
            "Twice the channels need exactly twice the multiply-adds ({macs_384} at C = 384, {macs_768} at 768) and "
            "twice the parameters. The projections grow with C², so the offset network's share falls from {share_96} "
            "% at C = 96 to {share_768} % at 768."
        ),
    ),
    Claim(
        number=17,
        title="Parameters and FLOPs of the eight models",
        statement=(
            "DAT-T, S, B and B at 384²: 29 M and 4.6 G, 50 M and 9.0 G, 88 M and 15.8 G, 88 M and 49.8 G. DAT++ T, "
            "S, B and B at 384²: 24 M and 4.3 G, 53 M and 9.4 G, 93 M and 16.6 G, 93 M and 49.7 G."
        ),
        sources=(
            Source("DAT article, table of ImageNet-1K results", SourceAccess.COPIED),
            Source("DAT++ article, the same table, through benchmark listings", SourceAccess.QUOTED),
        ),
        measure=measure_models,
        judge=judge_models,
        verdict=holds_if("an error of 3 % is accepted"),
        reason=(
            "{to_the_digit} of the 16 numbers round to the printed digit. Parameters differ by at most "
            "{apart_params} % (DAT-T has {dat_tiny_params} M, as in the article's ablation table, which does not "
            "round to 29). Multiply-adds of products and convolutions differ by at most {apart_macs} %. The numbers "
            "of parameters equal exactly those of the released state dicts."
        ),
    ),
    Claim(
        number=18,
        title="The number of sampling points",
        statement="A grid coarser than the map by the factor r has Ns = HW/r² points.",
        sources=(
            Source(
                "DAT article, the paragraphs on the deformable attention module and its complexity", SourceAccess.QUOTED
            ),
            Source("released configurations of both releases", SourceAccess.READ),
        ),
        measure=measure_samples,
        judge=judge_samples,
        verdict=holds_if("r divides H and W"),
        reason=(
            "If r divides both sides, {equal} of {cases} layers have exactly HW/r² points. Of the others, "
            "{others_equal} of {others} have HW/r² points, and {rounded_up} have ⌈H/r⌉·⌈W/r⌉. The 2022 release has r = "
            "1 and no coarser grid ({dat_2022}). The printed 4.59 G agree: r = 1 gives {stride_1} G, r = 2 in stage 3 "
            "gives {stride_2} G. Stage 3 therefore does not have the worked example's Ns = 49. DAT++ has coarser "
            "grids ({dat_2023})."
        ),
    ),
)
