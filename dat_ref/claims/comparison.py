"""Claims that compare DAT with Deformable DETR's attention, deformable convolution and Swin."""

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
    multi_scale_deformable,
    multi_scale_deformable_shapes,
)
from ..peers.ms_deform_layer import cell_centers
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
    """Change the map, and then the queries, and measure the change of the attention weights."""
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
        "other_map": Figure(change("query", query, other), "largest change of a weight with another map"),
        "other_query": Figure(change("query", other, value), "with other queries", digits=2),
        "dot_product": Figure(change("dot_product", query, other), "with dot products and another map", digits=2),
    }


def judge_predicted_weights(figures: Figures) -> Verdict:
    """Verdict: holds if the weights depend on the query and not on the map, and depend on the map with dot products."""
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
    shared_kernel = np.repeat(output[:, :, None, None], taps, axis=3)  # the same matrix for every tap
    separate_kernels = shared_kernel + rng.standard_normal(shared_kernel.shape)

    def error(kernel: Array) -> float:
        return float(np.abs(deform_conv2d(value, offset, kernel, padding=(0, taps // 2), mask=mask) - detr).max())

    return {
        "same": Figure(error(shared_kernel) < 1e-10, "equal with one matrix for all taps, one offset group per head"),
        "apart": Figure(error(separate_kernels) > 0.1, "different if each tap has its own matrix"),
        "largest": Figure(float(weights[0].sum(axis=-1).max()), "largest sum of a query's sigmoid weights", digits=2),
    }


def judge_sigmoid(figures: Figures) -> Verdict:
    """Verdict: holds if all taps share one matrix. In general, a deformable convolution has a matrix per tap."""
    if not figures["same"].value:
        return REFUTED
    if not figures["apart"].value:
        return HOLDS
    return holds_if("all taps of the kernel share one matrix, with one offset group per head")


# ------------------------------------------------------------------------------------------------ memory limit

ACCELERATOR_BYTES = 80 * GIB  # the memory of one large accelerator
TRAINING_BATCH = 128  # images per accelerator, 4096 over 32


def _key_bytes(queries: int, keys: int, dim: int) -> int:
    """Return the bytes of the keys and values of one layer and image: float32, separate keys for each query."""
    return 2 * queries * keys * dim * 4


def measure_memory_limit() -> Figures:
    """Count the bytes of per-query keys and values on a small map, and compute them at realistic sizes."""
    x, points = noise(8, (3, 5)), np.random.default_rng(0).uniform(0, 4, (1, 1, 15, 6, 2))
    names = {name: {"weight": (8, 8), "bias": (8,)} for name in ("key", "value")}
    _, trace = attend_at_points(x.reshape(1, 8, 15), x, points, random_params(names), heads=2)
    counted = (trace.k.nbytes + trace.v.nbytes) // 2  # half of the bytes in float64
    detection = (800 // 16) * (1333 // 16 + 1)  # stage 3 of an image of 800 × 1333

    def training(keys3: int, keys4: int) -> int:
        return TRAINING_BATCH * (3 * _key_bytes(196, keys3, 384) + _key_bytes(49, keys4, 768))

    return {
        "exact": Figure(counted == _key_bytes(15, 6, 8), "the formula equals the memory of a small layer"),
        "detection": Figure(
            _key_bytes(detection, detection, 384) / GIB, "one layer, 800 × 1333, one key per pixel", "GiB"
        ),
        "detection_all": Figure(3 * _key_bytes(detection, detection, 384) / GIB, "dat_tiny's three layers", "GiB"),
        "detection_few": Figure(
            3 * _key_bytes(detection, 16, 384) / GIB, "the three layers with 16 keys per query", "GiB"
        ),
        "training": Figure(
            training(196, 49) / GIB, f"dat_tiny, 224², batch {TRAINING_BATCH}, one key per pixel", "GiB"
        ),
        "training_few": Figure(training(16, 16) / GIB, "the same with 16 keys per query", "GiB"),
        "accelerator": Figure(ACCELERATOR_BYTES // GIB, "memory of one accelerator", "GiB"),
    }


def judge_memory_limit(figures: Figures) -> Verdict:
    """Verdict: holds if memory is exceeded at every size; conditional if only at detection with one key per pixel."""
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
    """Return the mean attention distance in pixels, weighted by attention, over heads and queries."""
    cells = trace.cells.astype(np.float64)  # (nW, w², 2); no padding, so all cells are inside the map
    distances = np.linalg.norm(cells[:, :, None] - cells[:, None], axis=-1)  # (nW, w², w²)
    return float((trace.attention * distances[:, None]).sum(axis=-1).mean())


def _deformable_distance(trace: LayerTrace) -> float:
    """Return the mean attention distance of a deformable layer, whose keys are at its sampling points."""
    _, groups, rows, columns, _ = trace.points_px.shape
    height, width = trace.x.shape[2:]
    queries = np.stack(np.divmod(np.arange(height * width), width), axis=-1)  # (HW, 2)
    points = trace.points_px.reshape(len(trace.x), groups, 1, rows * columns, 2)
    distances = np.linalg.norm(queries[:, None] - points, axis=-1)  # (B, G, HW, Ns)
    heads = trace.attention.shape[1] // groups
    return float((trace.attention * distances.repeat(heads, axis=1)).sum(axis=-1).mean())


def measure_locality() -> Figures:
    """Measure the receptive field and the attention distance in each stage of dat_tiny (seeded weights, noise)."""
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
        "window_3": Figure(max(visible["window_3"]), "largest receptive field: window, stage 3 (196 pixels)"),
        "shifted_2": Figure(max(visible["shifted_window_2"]), "the same: shifted window, stage 2 (784 pixels)"),
        "window_4": Figure(max(visible["window_4"]), "the same: window, stage 4 (49 pixels)"),
        "deformable_3": Figure(min(visible["deformable_3"]), "smallest receptive field: DAT, stage 3"),
        "deformable_4": Figure(min(visible["deformable_4"]), "the same: DAT, stage 4"),
        "near": Figure(float(np.mean(distance["window_3"])), "mean attention distance, window, stage 3", "pixels", 2),
        "far": Figure(float(np.mean(distance["deformable_3"])), "mean attention distance, DAT, stage 3", "pixels", 2),
        "near_4": Figure(float(np.mean(distance["window_4"])), "mean attention distance, window, stage 4", "pixels", 2),
        "far_4": Figure(float(np.mean(distance["deformable_4"])), "mean attention distance, DAT, stage 4", "pixels", 2),
    }


def judge_locality(figures: Figures) -> Verdict:
    """Verdict: holds if DAT's receptive field is nearly the whole map and a window's is smaller.

    Conditional if the window covers the map of stage 4.
    """
    value = {key: float(figure.value) for key, figure in figures.items()}
    whole = value["deformable_3"] > 0.9 * 196 and value["deformable_4"] > 0.9 * 49
    if not (whole and value["window_3"] < 0.5 * 196 and value["near"] < value["far"]):
        return REFUTED
    return holds_if("the map is larger than the window") if value["window_4"] == 49 else HOLDS


# ------------------------------------------------------------------------------------------------ accuracy


def measure_accuracy() -> Figures:
    """Compute the cost of a test of the accuracy, and its statistical error."""
    cost = backbone_cost(1, (224, 224), PRESETS["dat_tiny"])
    images, epochs, validation = 1_281_167, 300, 50_000
    return {
        "training": Figure(
            3 * cost.total.products * images * epochs // 10**12,
            "one training, 300 epochs of ImageNet-1K",
            "·10¹² multiply-adds",
        ),
        "affordable": Figure(10, "budget of the ledger for a claim", "·10¹² multiply-adds"),
        "error": Figure(
            100 * float(np.sqrt(0.82 * 0.18 / validation)), "standard error of an accuracy of 82 %", "points", 2
        ),
    }


def judge_accuracy(figures: Figures) -> Verdict:
    """Not testable: the ledger trains nothing."""
    if float(figures["training"].value) > float(figures["affordable"].value):
        return not_testable("it requires training on ImageNet-1K, and the ledger trains nothing")
    return not_testable("the required training has not been run")


# ------------------------------------------------------------------------------------------------ the rows

CLAIMS = (
    Claim(
        number=13,
        title="Deformable DETR predicts its weights from the query alone",
        statement="Deformable DETR's attention weights are a projection of the query; they do not depend on keys.",
        sources=(Source("Deformable DETR's code", SourceAccess.READ), Source(SUMMARY, SourceAccess.SUMMARY)),
        measure=measure_predicted_weights,
        judge=judge_predicted_weights,
        verdict=HOLDS,
        reason=(
            "With the same queries, another map changes no weight (largest change {other_map}); other queries change "
            "the weights ({other_query}). With dot products, another map changes them too ({dot_product})."
        ),
    ),
    Claim(
        number=14,
        title="With a sigmoid, it is a modulated deformable convolution",
        statement=(
            "If a sigmoid replaces the softmax over a query's weights, the attention is a modulated deformable "
            "convolution."
        ),
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_sigmoid,
        judge=judge_sigmoid,
        verdict=holds_if("all taps of the kernel share one matrix, with one offset group per head"),
        reason=(
            "Deformable DETR with sigmoid weights equals deform_conv2d on the projected values, with the weights as "
            "mask, W_o for every tap, and one offset group per head. In general, a deformable convolution has a "
            "different matrix for each tap; then the two differ. Softmax weights are also valid as a mask. With the "
            "sigmoid, their sum need not be one (here up to {largest})."
        ),
    ),
    Claim(
        number=15,
        title="Dot products with separate keys for each query exceed the memory",
        statement=(
            "Dot-product attention with separate sampled keys for every query needs more memory than is available."
        ),
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_memory_limit,
        judge=judge_memory_limit,
        verdict=holds_if("queries have as many keys as the map has pixels, on images as large as in detection"),
        reason=(
            "In that case the keys and values of dat_tiny's three layers in stage 3 need {detection_all} GiB per "
            "image, and a large accelerator has {accelerator}. With 16 keys per query they need {detection_few}. "
            "Training at 224² with a batch of 128 needs {training} GiB for keys and values alone, or {training_few} "
            "with 16 keys. This fits the large accelerator, but not one with half its memory."
        ),
    ),
    Claim(
        number=19,
        title="Swin's attention is local, DAT's is not",
        statement="A window limits the pixels that a query can attend to; DAT's keys are spread over the whole map.",
        sources=(
            Source("DAT article, introduction and the figures of attention maps", SourceAccess.QUOTED),
            Source("code of both releases", SourceAccess.READ),
        ),
        measure=measure_locality,
        judge=judge_locality,
        verdict=holds_if("the map is larger than the window"),
        reason=(
            "In stage 3 the receptive field of a query has {window_3} of 196 pixels with a window, and at least "
            "{deformable_3} with DAT. The mean attention distances are {near} and {far} pixels. The weights are "
            "seeded and the attention is nearly uniform, so these distances show the structure and not the effect of "
            "training. In stage 4 a 7 × 7 window is the whole map ({window_4} of 49 pixels), and there is no large "
            "difference ({near_4} and {far_4} pixels)."
        ),
    ),
    Claim(
        number=20,
        title="Sixteen keys per query cost 1.4 points of accuracy",
        statement="With Deformable DETR's attention and 16 keys per query, ImageNet-1K accuracy falls by 1.4 points.",
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_accuracy,
        judge=judge_accuracy,
        verdict=not_testable("it requires training on ImageNet-1K, and the ledger trains nothing"),
        reason=(
            "One training of dat_tiny needs {training}·10¹² multiply-adds, and a comparison needs several. The "
            "difference would be significant: an accuracy measured on 50,000 images has a standard error of {error} "
            "points. The code in DAT's repository for such a comparison initializes most of its points outside the "
            "map, which would overstate the gap. It is not known whether this code was used."
        ),
    ),
)
