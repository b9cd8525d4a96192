"""Claims about the systems that DAT is compared with: Deformable DETR's attention, deformable convolution, Swin."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from .._checks import Array
from ..backbone import DAT
from ..complexity.formulas import backbone_cost
from ..config import DeformableAttentionConfig, WindowAttentionConfig
from ..initialization import init_params
from ..layer import LayerTrace
from ..ops.basic import linear
from ..ops.grid import Size
from ..peers.deform_conv import ConvGeometry, deform_conv2d
from ..peers.ms_deform_attn import (
    MultiScaleDeformableConfig,
    cell_centers,
    multi_scale_deformable,
    multi_scale_deformable_shapes,
)
from ..peers.multi_scale import multi_scale_deformable_attention
from ..peers.per_query import attend_at_points
from ..peers.receptive_field import receptive_field
from ..peers.window import WindowTrace
from ..presets import PRESETS
from .claim import HOLDS, REFUTED, Claim, Figure, Figures, Source, SourceAccess, Verdict, holds_if, not_testable
from .space import SUMMARY, noise, random_params

GIB = 2**30

# ----------------------------------------------------------------------------------------------- predicted weights


def measure_predicted_weights() -> Figures:
    """Change what is looked at, and then who looks, and see whether the weights change."""
    size: Size = (5, 7)
    rng = np.random.default_rng(0)
    query, value, other = (rng.standard_normal((1, 35, 16)) for _ in range(3))
    references = cell_centers(size)[None]

    def weights(scoring: Any, query: Array, value: Array) -> Array:
        config = MultiScaleDeformableConfig(dim=16, heads=4, points=4, scoring=scoring)
        params = random_params(multi_scale_deformable_shapes(config))
        return multi_scale_deformable(query, value, references, [size], params, config)[1].attention

    def change(scoring: Any, query_after: Array, value_after: Array) -> float:
        difference = weights(scoring, query_after, value_after) - weights(scoring, query, value)
        return float(np.abs(difference).max())

    return {
        "other_map": Figure(change("query", query, other), "largest change of a weight, another map"),
        "other_query": Figure(change("query", other, value), "the same, other queries", digits=2),
        "dot_product": Figure(change("dot_product", query, other), "the same with dot products, another map", digits=2),
    }


def judge_predicted_weights(figures: Figures) -> Verdict:
    """The map must not matter, the query must; and the measure must see it where keys are compared."""
    sensitive = figures["dot_product"].value != 0 and figures["other_query"].value != 0
    return HOLDS if sensitive and figures["other_map"].value == 0 else REFUTED


# ------------------------------------------------------------------------------------------------ sigmoid


def measure_sigmoid() -> Figures:
    """Compute Deformable DETR's sum with sigmoid weights as a modulated deformable convolution."""
    (height, width), heads, depth, taps = (5, 8), 3, 4, 5
    dim, pixels = heads * depth, height * width
    rng = np.random.default_rng(0)
    x, output = rng.standard_normal((1, dim, height, width)), rng.standard_normal((dim, dim))
    value = linear(x, rng.standard_normal((dim, dim)))
    points = rng.uniform(-2, 9, (1, pixels, heads, 1, taps, 2))  # (y, x), in pixels
    weights = expit(rng.standard_normal((1, pixels, heads, 1, taps)))

    tokens = value.reshape(1, heads, depth, pixels).transpose(0, 3, 1, 2)
    locations = ((points + 0.5) / (height, width))[..., ::-1]
    attention_out = multi_scale_deformable_attention(tokens, [(height, width)], locations, weights)
    detr = linear(attention_out.swapaxes(1, 2).reshape(x.shape), output)

    geometry = ConvGeometry((1, taps), (1, 1), (0, taps // 2), (1, 1))
    tap_points = points[0, :, :, 0].transpose(1, 2, 0, 3).reshape(heads, taps, height, width, 2)
    offset = (tap_points - geometry.lattice((height, width))).transpose(0, 1, 4, 2, 3).reshape(1, -1, height, width)
    mask = weights[0, :, :, 0].transpose(1, 2, 0).reshape(1, heads * taps, height, width)
    shared_kernel = np.repeat(output[:, :, None, None], taps, axis=3)  # every tap the same matrix
    separate_kernels = shared_kernel + rng.standard_normal(shared_kernel.shape)

    def error(kernel: Array) -> float:
        return float(np.abs(deform_conv2d(value, offset, kernel, padding=(0, taps // 2), mask=mask) - detr).max())

    return {
        "same": Figure(error(shared_kernel) < 1e-10, "equal with one matrix for all taps, an offset group a head"),
        "apart": Figure(error(separate_kernels) > 0.1, "different once taps have matrices of their own"),
        "largest": Figure(float(weights[0].sum(axis=-1).max()), "largest sum of a query's sigmoid weights", digits=2),
    }


def judge_sigmoid(figures: Figures) -> Verdict:
    """An identity for tied taps; a deformable convolution in general has more matrices."""
    if not figures["same"].value:
        return REFUTED
    if not figures["apart"].value:
        return HOLDS
    return holds_if("all taps of the kernel share one matrix, with one offset group a head")


# ------------------------------------------------------------------------------------------------ memory limit

ACCELERATOR_BYTES = 80 * GIB  # the memory of one large accelerator
TRAINING_BATCH = 128  # images on each, 4096 over 32


def _key_bytes(queries: int, keys: int, dim: int) -> int:
    """Bytes of the keys and values of one layer and image, float32, if each query has its own."""
    return 2 * queries * keys * dim * 4


def measure_memory_limit() -> Figures:
    """Bytes of per-query keys and values: counted on a small map, and by the same product at the sizes of use."""
    x, points = noise(8, (3, 5)), np.random.default_rng(0).uniform(0, 4, (1, 1, 15, 6, 2))
    names = {name: {"weight": (8, 8), "bias": (8,)} for name in ("key", "value")}
    _, trace = attend_at_points(x.reshape(1, 8, 15), x, points, random_params(names), heads=2)
    counted = (trace.k.nbytes + trace.v.nbytes) // 2  # of float64
    detection = (800 // 16) * (1333 // 16 + 1)  # stage 3 of an image of 800 × 1333

    def training(keys3: int, keys4: int) -> int:
        return TRAINING_BATCH * (3 * _key_bytes(196, keys3, 384) + _key_bytes(49, keys4, 768))

    return {
        "exact": Figure(counted == _key_bytes(15, 6, 8), "the product is what a small layer takes"),
        "detection": Figure(
            _key_bytes(detection, detection, 384) / GIB, "one layer, 800 × 1333, keys as pixels", "GiB"
        ),
        "detection_all": Figure(3 * _key_bytes(detection, detection, 384) / GIB, "dat_tiny's three layers", "GiB"),
        "detection_few": Figure(
            3 * _key_bytes(detection, 16, 384) / GIB, "the three layers with 16 keys a query", "GiB"
        ),
        "training": Figure(training(196, 49) / GIB, f"dat_tiny, 224², batch {TRAINING_BATCH}, keys as pixels", "GiB"),
        "training_few": Figure(training(16, 16) / GIB, "the same with 16 keys a query", "GiB"),
        "accelerator": Figure(ACCELERATOR_BYTES // GIB, "memory of one accelerator", "GiB"),
    }


def judge_memory_limit(figures: Figures) -> Verdict:
    """Out of reach everywhere, or only where keys are as many as pixels and the image is large, or nowhere."""
    if not figures["exact"].value:
        return REFUTED
    limit = float(figures["accelerator"].value)
    exceeds = {
        key: float(figures[key].value) > limit for key in ("detection_all", "detection_few", "training", "training_few")
    }
    if all(exceeds.values()):
        return HOLDS
    if exceeds == {"detection_all": True, "detection_few": False, "training": False, "training_few": False}:
        return holds_if("queries have as many keys as the map has pixels, on images as large as in detection")
    return REFUTED


# ------------------------------------------------------------------------------------------------ local and global


def _window_distance(trace: WindowTrace) -> float:
    """Return the mean distance in pixels between a query and what it attends to, over heads and queries."""
    cells = trace.cells.astype(np.float64)  # (nW, w², 2); whole windows, so all of them in the map
    distances = np.linalg.norm(cells[:, :, None] - cells[:, None], axis=-1)  # (nW, w², w²)
    return float((trace.attention * distances[:, None]).sum(axis=-1).mean())


def _deformable_distance(trace: LayerTrace) -> float:
    """The same for a deformable layer, whose keys stand at its points."""
    _, groups, rows, columns, _ = trace.points_px.shape
    height, width = trace.x.shape[2:]
    queries = np.stack(np.divmod(np.arange(height * width), width), axis=-1)  # (HW, 2)
    points = trace.points_px.reshape(len(trace.x), groups, 1, rows * columns, 2)
    distances = np.linalg.norm(queries[:, None] - points, axis=-1)  # (B, G, HW, Ns)
    heads = trace.attention.shape[1] // groups
    return float((trace.attention * distances.repeat(heads, axis=1)).sum(axis=-1).mean())


def measure_locality() -> Figures:
    """How many pixels queries see in each stage of dat_tiny, and how far they attend (seeded weights, noise)."""
    config = PRESETS["dat_tiny"]
    model = DAT(config, init_params(config, 0))
    visible: dict[str, list[int]] = {}
    distance: dict[str, list[float]] = {}
    for step in model.walk(noise(3, (224, 224)).astype(np.float32)):
        layer, trace = config.stages[step.stage][step.block].attention, step.trace.attention
        size: Size = step.output.shape[2:]
        key = f"{layer.kind}_{step.stage + 1}"
        corners = [(row, column) for row in (0, size[0] // 2, size[0] - 1) for column in (0, size[1] // 2)]
        visible.setdefault(key, []).extend(int(receptive_field(pixel, size, layer, trace).sum()) for pixel in corners)
        if isinstance(layer, WindowAttentionConfig) and isinstance(trace, WindowTrace):
            distance.setdefault(key, []).append(_window_distance(trace))
        elif isinstance(layer, DeformableAttentionConfig) and isinstance(trace, LayerTrace):
            distance.setdefault(key, []).append(_deformable_distance(trace))
    return {
        "window_3": Figure(max(visible["window_3"]), "most pixels that a query sees: window, stage 3 (196 pixels)"),
        "shifted_2": Figure(max(visible["shifted_window_2"]), "the same: shifted window, stage 2 (784 pixels)"),
        "window_4": Figure(max(visible["window_4"]), "the same: window, stage 4 (49 pixels)"),
        "deformable_3": Figure(min(visible["deformable_3"]), "fewest pixels that a query sees: DAT, stage 3"),
        "deformable_4": Figure(min(visible["deformable_4"]), "the same: DAT, stage 4"),
        "near": Figure(float(np.mean(distance["window_3"])), "mean attention distance, window, stage 3", "pixels", 2),
        "far": Figure(float(np.mean(distance["deformable_3"])), "mean attention distance, DAT, stage 3", "pixels", 2),
        "near_4": Figure(float(np.mean(distance["window_4"])), "mean attention distance, window, stage 4", "pixels", 2),
        "far_4": Figure(float(np.mean(distance["deformable_4"])), "mean attention distance, DAT, stage 4", "pixels", 2),
    }


def judge_locality(figures: Figures) -> Verdict:
    """DAT must see nearly the whole map, and windows less; where a window is the map there is no difference."""
    value = {key: float(figure.value) for key, figure in figures.items()}
    whole = value["deformable_3"] > 0.9 * 196 and value["deformable_4"] > 0.9 * 49
    if not (whole and value["window_3"] < 0.5 * 196 and value["near"] < value["far"]):
        return REFUTED
    return holds_if("the map is larger than the window") if value["window_4"] == 49 else HOLDS


# ------------------------------------------------------------------------------------------------ accuracy


def measure_accuracy() -> Figures:
    """What it would take to test a difference in accuracy, and how large its error would be."""
    cost = backbone_cost(1, (224, 224), PRESETS["dat_tiny"])
    images, epochs, validation = 1_281_167, 300, 50_000
    return {
        "training": Figure(
            3 * cost.total.products * images * epochs // 10**12,
            "one training, 300 epochs of ImageNet-1K",
            "·10¹² multiply-adds",
        ),
        "affordable": Figure(10, "what the ledger may spend on a claim", "·10¹² multiply-adds"),
        "error": Figure(
            100 * float(np.sqrt(0.82 * 0.18 / validation)), "standard error of an accuracy of 82 %", "points", 2
        ),
    }


def judge_accuracy(figures: Figures) -> Verdict:
    """Nothing is trained here."""
    if float(figures["training"].value) > float(figures["affordable"].value):
        return not_testable("it takes training runs on ImageNet-1K, and the ledger trains nothing")
    return not_testable("the training that it takes has not been run")


# ------------------------------------------------------------------------------------------------ the rows

CLAIMS = (
    Claim(
        number=13,
        title="Deformable DETR predicts its weights from the query alone",
        statement="Deformable DETR's attention weights are a projection of the query; keys take no part.",
        sources=(Source("Deformable DETR's code", SourceAccess.READ), Source(SUMMARY, SourceAccess.SUMMARY)),
        measure=measure_predicted_weights,
        judge=judge_predicted_weights,
        verdict=HOLDS,
        reason=(
            "Another map under the same queries changes no weight ({other_map}); other queries do ({other_query}). "
            "With dot products another map changes them as well ({dot_product})."
        ),
    ),
    Claim(
        number=14,
        title="With a sigmoid, it is modulated deformable convolution",
        statement=(
            "If the softmax over a query's weights is replaced by a sigmoid, what is left is modulated deformable "
            "convolution."
        ),
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_sigmoid,
        judge=judge_sigmoid,
        verdict=holds_if("all taps of the kernel share one matrix, with one offset group a head"),
        reason=(
            "Deformable DETR with sigmoid weights equals deform_conv2d on the projected values, the weights as its "
            "mask, W_o repeated for every tap, one offset group a head. A deformable convolution in general has a "
            "matrix for each tap, and then the two differ. Softmax weights would do as a mask too; the sigmoid lets "
            "them sum to other than one (here up to {largest})."
        ),
    ),
    Claim(
        number=15,
        title="Dot products with each query's own keys are out of memory reach",
        statement=(
            "Dot-product attention in which every query has its own sampled keys takes more memory than can be had."
        ),
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_memory_limit,
        judge=judge_memory_limit,
        verdict=holds_if("queries have as many keys as the map has pixels, on images as large as in detection"),
        reason=(
            "There the keys and values of dat_tiny's three layers of stage 3 take {detection_all} GiB an image, "
            "against {accelerator} on a large accelerator; with 16 keys a query, {detection_few}. Training at 224² "
            "with a batch of 128 would need {training} GiB for keys and values alone, or {training_few} with 16 keys: "
            "dear, and out of reach of an accelerator half as large, but not of this one."
        ),
    ),
    Claim(
        number=19,
        title="Swin's attention is local, DAT's is not",
        statement="A window confines what a query can attend to; DAT's keys lie all over the map.",
        sources=(
            Source("DAT article, introduction and the figures of attention maps", SourceAccess.QUOTED),
            Source("code of both releases", SourceAccess.READ),
        ),
        measure=measure_locality,
        judge=judge_locality,
        verdict=holds_if("the map is larger than the window"),
        reason=(
            "In stage 3 a query sees {window_3} of 196 pixels through a window and at least {deformable_3} through "
            "DAT; attention lies {near} and {far} pixels away on average (seeded weights, so nearly uniform: this "
            "is what the structure allows, not what training makes of it). In stage 4 a 7 × 7 window is the whole "
            "map ({window_4} of 49 pixels), and the difference is gone ({near_4} and {far_4} pixels)."
        ),
    ),
    Claim(
        number=20,
        title="Sixteen keys a query cost 1.4 points of accuracy",
        statement="With Deformable DETR's attention and 16 keys a query, ImageNet-1K accuracy falls by 1.4 points.",
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_accuracy,
        judge=judge_accuracy,
        verdict=not_testable("it takes training runs on ImageNet-1K, and the ledger trains nothing"),
        reason=(
            "One training of dat_tiny is {training}·10¹² multiply-adds, and a comparison needs several. The "
            "difference itself would be plain to see: an accuracy measured on 50,000 images has a standard error of "
            "{error} points. The code that DAT's authors left for such a comparison starts with most of its points "
            "outside the map, which would overstate the gap; whether it was used is not known."
        ),
    ),
)
