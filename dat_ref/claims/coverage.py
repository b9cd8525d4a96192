"""Claims about coverage: the share of a map that the reference points read, and its consequences for offsets."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from ..config import BiasKind, DeformableAttentionConfig, OffsetBound
from ..conventions import Convention
from ..initialization import init_params
from ..layer import DeformableAttention
from ..ops.coverage import capture_radius, coverage, fixed_grid_bound, hit_rate
from ..ops.sampling import bilinear_sample_vjp
from .claim import HOLDS, REFUTED, Claim, Figure, Figures, Source, SourceAccess, Verdict, holds_if

SIDE = 24  # pixels of the maps: every stride used here divides it
LAW = (Source("this project, docs/experiments/index.md", SourceAccess.READ),)
EXACT = 1e-12


def _names(conventions: list[Convention]) -> str:
    return ", ".join(convention.name for convention in conventions) or "none"


# ------------------------------------------------------------------------------------------------ coverage


def measure_coverage() -> Figures:
    """Measure the share of a 24 × 24 map that the reference points read, by stride and convention."""
    figures: dict[str, Figure] = {}
    complete = []
    for convention in Convention:
        shares = {stride: coverage((SIDE, SIDE), stride, convention) for stride in (1, 2, 3, 4, 8)}
        text = ", ".join(f"{share:.1%}" for share in shares.values())
        figures[convention.name] = Figure(text, f"{convention.name}: strides 1, 2, 3, 4, 8")
        if shares[1] == shares[2] == 1:
            complete.append(convention)
    figures["complete"] = Figure(_names(complete), "every pixel at strides 1 and 2")
    return figures


def judge_coverage(figures: Figures) -> Verdict:
    """Verdict: holds for the conventions in which every pixel is read at strides 1 and 2."""
    complete = str(figures["complete"].value)
    if complete == _names(list(Convention)):
        return HOLDS
    return REFUTED if complete == "none" else holds_if(f"the convention is one of {complete}")


# ------------------------------------------------------------------------------------------------ average pooling


def _fixed(stride: int, convention: Convention) -> DeformableAttentionConfig:
    return DeformableAttentionConfig(
        6, 2, stride=stride, kernel_size=3, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE, convention=convention
    )


def _difference_from_pooling(stride: int, convention: Convention) -> float:
    config = _fixed(stride, convention)
    params = init_params(config, seed=0, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((1, 6, SIDE, SIDE))
    fixed, pooled = (DeformableAttention(each, params)(x) for each in (config, replace(config, average_pool=True)))
    return float(np.abs(fixed - pooled).max())


def measure_pooling() -> Figures:
    """Compare the layer without offsets with the layer with average-pooled keys: same weights, float64."""
    figures = {
        f"stride{stride}": Figure(
            _difference_from_pooling(stride, Convention.CELL_CENTER), f"CELL_CENTER, stride {stride}: difference"
        )
        for stride in (1, 2, 3)
    }
    equal = [
        convention
        for convention in Convention
        if max(_difference_from_pooling(stride, convention) for stride in (1, 2)) < EXACT
    ]
    figures["equal"] = Figure(_names(equal), "equal at strides 1 and 2")
    return figures


def judge_pooling(figures: Figures) -> Verdict:
    """Verdict: holds for the conventions in which the layers are equal at strides 1 and 2 but not at stride 3."""
    equal = str(figures["equal"].value)
    if equal == "none" or float(figures["stride3"].value) < EXACT:
        return REFUTED
    return HOLDS if equal == _names(list(Convention)) else holds_if(f"the convention is {equal}")


# ------------------------------------------------------------------------------------------------ the bound

STRIDE, TARGET, KINDS = 6, 3, 4


def measure_bound() -> Figures:
    """Compute the best possible accuracy from the keys of a fixed grid, by enumerating all scenes, and the bound."""
    config = _fixed(STRIDE, Convention.CELL_CENTER)
    layer = DeformableAttention(config, init_params(config, seed=0, dtype=np.float64))
    kinds = np.random.default_rng(1).standard_normal((KINDS, 6, TARGET, TARGET))
    keys: dict[bytes, list[int]] = {}
    positions = 2 * STRIDE - TARGET + 1
    for top in range(positions):
        for left in range(positions):
            for kind in range(KINDS):
                x = np.zeros((1, 6, 2 * STRIDE, 2 * STRIDE))
                x[0, :, top : top + TARGET, left : left + TARGET] = kinds[kind]
                seen = layer(x, return_trace=True)[1].k.round(9).tobytes()
                keys.setdefault(seen, []).append(kind)
    correct = sum(max(Counter(each).values()) for each in keys.values())
    h = hit_rate((2 * STRIDE, 2 * STRIDE), STRIDE, (TARGET, TARGET))
    return {
        "hit_rate": Figure(h, "h: share of positions at which a reference point reads the target"),
        "bound": Figure(fixed_grid_bound(h, KINDS), "h + (1 - h)/K"),
        "best": Figure(correct / (positions**2 * KINDS), "accuracy of the best classifier of the keys"),
    }


def judge_bound(figures: Figures) -> Verdict:
    """Verdict: holds if the best classifier reaches the bound exactly."""
    best, bound = (float(figures[key].value) for key in ("best", "bound"))
    return HOLDS if abs(best - bound) < EXACT else REFUTED


# ------------------------------------------------------------------------------------------------ the capture radius


def measure_capture() -> Figures:
    """Find the largest distance at which a target of 3 pixels gives a point a gradient, over all positions of both."""
    side, length = 3.0, 25
    pixels, farthest = np.arange(length), 0.0
    for center in 12 + np.linspace(-0.5, 0.5, 41):
        covered = np.minimum(pixels + 0.5, center + side / 2) - np.maximum(pixels - 0.5, center - side / 2)
        x = (covered >= 0.5).astype(float).reshape(1, 1, 1, length)
        away = np.linspace(0, 4, 801)
        points = np.stack([np.zeros_like(away), center + away], axis=-1)[None]
        slope = bilinear_sample_vjp(np.ones((1, 1, len(away))), x, points).points_px[0, :, 1]
        farthest = max(farthest, float(away[np.abs(slope) > 0].max()))
    return {
        "radius": Figure(capture_radius(side), "half the target's side plus one pixel", "pixels"),
        "farthest": Figure(farthest, "farthest point with a gradient", "pixels", digits=4),
    }


def judge_capture(figures: Figures) -> Verdict:
    """Verdict: holds if there is no gradient outside the radius, and a gradient just inside it."""
    radius, farthest = (float(figures[key].value) for key in ("radius", "farthest"))
    return HOLDS if radius - 0.02 < farthest <= radius else REFUTED


CLAIMS = (
    Claim(
        number=22,
        title="Coverage: the undeformed grid reads every pixel at strides 1 and 2",
        statement=(
            "Without offsets the keys read every pixel of the map at strides 1 and 2, and a small share of the pixels "
            "at larger strides."
        ),
        sources=LAW,
        measure=measure_coverage,
        judge=judge_coverage,
        verdict=holds_if("the convention is one of CELL_CENTER, CVPR2022"),
        reason=(
            "At strides 1, 2, 3, 4, 8 the grid reads {CELL_CENTER} of a 24 × 24 map with cell centers, {CVPR2022} in "
            "released DAT, and {DATPP2023} in released DAT++. DAT's deformable layers have stride 1; DAT++'s have 8, "
            "4, 2 and 1."
        ),
    ),
    Claim(
        number=23,
        title="At strides 1 and 2, a layer without offsets equals average pooling",
        statement="At strides 1 and 2 a layer without offsets equals the layer with average pooling of its key cells.",
        sources=LAW,
        measure=measure_pooling,
        judge=judge_pooling,
        verdict=holds_if("the convention is CELL_CENTER"),
        reason=(
            "The largest difference of the outputs is {stride1} at stride 1, {stride2} at stride 2 and {stride3} at "
            "stride 3. At strides 1 and 2 the grid misses no pixel, so offsets cannot recover anything."
        ),
    ),
    Claim(
        number=24,
        title="Accuracy bound of a fixed grid on small targets",
        statement="Of K kinds of target, keys at the reference points allow an accuracy of h + (1 - h)/K at most.",
        sources=LAW,
        measure=measure_bound,
        judge=judge_bound,
        verdict=HOLDS,
        reason=(
            "For targets of 3 × 3 pixels at stride 6, h = {hit_rate} and the bound is {bound}; the best classifier of "
            "the keys, found by enumerating every scene, is right in {best} of them."
        ),
    ),
    Claim(
        number=25,
        title="A target attracts a point from half its size plus one pixel",
        statement="A point gets a gradient from a target only within half the target's side plus one pixel of the map.",
        sources=LAW,
        measure=measure_capture,
        judge=judge_capture,
        verdict=HOLDS,
        reason=(
            "The radius is {radius} pixels; the farthest point with a gradient is at {farthest} pixels. If the "
            "initialization scatters the points by more than that, the target gives them no gradient."
        ),
    ),
)
