"""Claims about offsets: the missing bias of the last layer, the groups, and the initialization."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .._checks import Array, ConfigError, Tree
from ..backbone import DAT, dat_shapes
from ..config import DeformableAttentionConfig, OffsetBound
from ..initialization import init_params
from ..layer import LayerTrace, deformable_layer
from ..ops.basic import linear
from ..ops.grid import Size, offset_padding, pixels_per_unit
from ..ops.offsets import bound_offsets_vjp, offset_limit, offset_network
from ..ops.sampling import bilinear_sample
from ..params import flatten
from ..presets import PRESETS
from .claim import HOLDS, REFUTED, Claim, Figure, Figures, Source, SourceAccess, Verdict, holds_if

MAP: Size = (14, 14)  # stage 3 at 224²
SEEDS = 20


def _stage3() -> DeformableAttentionConfig:
    """Return the first deformable layer of dat_tiny's third stage."""
    attention = PRESETS["dat_tiny"].stages[2][1].attention
    assert isinstance(attention, DeformableAttentionConfig)
    return attention


def _noise(config: DeformableAttentionConfig, seed: int) -> Array:
    """Return two maps of standard normal noise."""
    return np.random.default_rng(seed).standard_normal((2, config.dim, *MAP))


def _raw_offsets(config: DeformableAttentionConfig, params: Tree, seed: int) -> Array:
    """Return the offset network's output on noise, (points of all groups and maps, 2)."""
    queries = linear(_noise(config, seed), **params["query"]).reshape(2 * config.groups, config.group_dim, *MAP)
    padding = offset_padding(MAP, config.kernel_size, config.stride, config.convention)
    raw, _ = offset_network(queries, params["offset_network"], stride=config.stride, padding=padding)
    return raw.transpose(0, 2, 3, 1).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------ the compulsory shift


def _rms(vectors: Array) -> float:
    return float(np.sqrt(np.square(vectors).mean()))


def measure_compulsory_shift() -> Figures:
    """Measure the mean initial shift of all points with and without a last bias, and construct one without it."""
    config = _stage3()
    limit = offset_limit(config.offset_range, MAP, config.convention) * pixels_per_unit(MAP, config.convention)
    shared_shifts, shared_shifts_with_bias, individual_shifts = [], [], []
    for seed in range(SEEDS):
        raw = _raw_offsets(config, init_params(config, seed, dtype=np.float64), seed)
        offsets_px = limit * np.tanh(raw)
        shared_shifts.append(offsets_px.mean(axis=0))
        individual_shifts.append(offsets_px - shared_shifts[-1])
        # A bias and its negative are equally likely. Using both reduces the variance of the comparison.
        last_bias = np.random.default_rng(1000 + seed).uniform(-1, 1, 2) / np.sqrt(config.group_dim)
        shared_shifts_with_bias += [(limit * np.tanh(raw + sign * last_bias)).mean(axis=0) for sign in (-1, 1)]
    constructed, spread = _constructed_shift(config, limit)
    return {
        "without": Figure(
            _rms(np.array(shared_shifts)), f"mean shift of all points at initialization, {SEEDS} seeds, rms", "pixels"
        ),
        "with_bias": Figure(
            _rms(np.array(shared_shifts_with_bias)), "the same with a bias in the last layer, rms", "pixels"
        ),
        "own": Figure(_rms(np.array(individual_shifts)), "deviation of single points from the mean, rms", "pixels"),
        "built": Figure(constructed, "shift constructed with the other two biases, smaller component", "pixels"),
        "built_alike": Figure(spread < 1e-12, "every point of every map has exactly this shift"),
        "limit": Figure(float(limit[0]), "largest shift that the bound allows", "pixels"),
    }


def _constructed_shift(config: DeformableAttentionConfig, limit: Array) -> tuple[float, float]:
    """Construct parameters for which the offsets depend on the biases of convolution and norm, not on the queries.

    Returns:
        smaller component of the shift in pixels, and largest difference between points.
    """
    params = init_params(config, 0, dtype=np.float64)
    network = params["offset_network"]
    network["depthwise"]["weight"][:] = 0  # the convolution returns its bias for any map
    network["norm"]["bias"][:] = 10 * np.sign(network["pointwise"]["weight"].sum(axis=0))
    offsets_px = limit * np.tanh(_raw_offsets(config, params, seed=0))
    return float(np.abs(offsets_px).min()), float(np.ptp(offsets_px, axis=0).max())


def judge_compulsory_shift(figures: Figures) -> Verdict:
    """Verdict: holds without a mean shift and without a constructed one; conditional if a last bias increases it."""
    without, with_bias = float(figures["without"].value), float(figures["with_bias"].value)
    can_be_built = bool(figures["built_alike"].value) and float(figures["built"].value) > 0.1
    if without < 1e-3 and not can_be_built:
        return HOLDS
    return holds_if("a smaller shift is enough; it does not disappear") if without < with_bias else REFUTED


# ------------------------------------------------------------------------------------------------ groups


def measure_groups() -> Figures:
    """Move the points of the last group, and measure the change of each group's features and keys."""
    config = _stage3()
    params = init_params(config, 0, dtype=np.float64)
    trace = deformable_layer(_noise(config, seed=0), params, config)[1]
    group, heads = config.group_dim, config.heads // config.groups
    moved_points = trace.points_px.copy()
    moved_points[:, -1] += np.random.default_rng(1).uniform(-1, 1, moved_points[:, -1].shape)

    maps = trace.x.reshape(2 * config.groups, group, *MAP)
    moved = bilinear_sample(maps, moved_points.reshape(2 * config.groups, -1, 2)).reshape(trace.sampled.shape)
    others = slice(0, config.dim - group)
    blocks = np.kron(np.eye(config.groups), np.ones((group, group)))  # block mask of a grouped projection

    def change(weight: Array, channels: slice) -> float:
        before, after = (linear(features, weight, params["key"]["bias"]) for features in (trace.sampled, moved))
        difference = np.linalg.norm((after - before)[:, channels])
        return float(difference / np.linalg.norm(before[:, channels]))

    dense = params["key"]["weight"]
    try:
        DeformableAttentionConfig(dim=24, heads=4, groups=3, size=MAP)
        rejected = False
    except ConfigError:
        rejected = True
    features_kept = bool((moved[:, others] == trace.sampled[:, others]).all())
    return {
        "refused": Figure(rejected, "a number of heads that is no multiple of groups is refused"),
        "features_kept": Figure(features_kept, "sampled features of the other groups do not change"),
        "own_keys": Figure(
            100 * change(dense, slice(config.dim - group, None)), "change of the moved group's keys", "%", 2
        ),
        "other_keys": Figure(100 * change(dense, others), "change of the other groups' keys", "%", 2),
        "split_keys": Figure(100 * change(dense * blocks, others), "the same with a grouped W_k", "%", 2),
        "heads": Figure(heads, "heads per group, dat_tiny's stage 3"),
    }


def judge_groups(figures: Figures) -> Verdict:
    """Verdict: holds if features and keys of the other groups do not change and a wrong number of heads is refused."""
    if not (figures["refused"].value and figures["features_kept"].value):
        return REFUTED
    if figures["other_keys"].value == 0:
        return HOLDS
    isolated = figures["split_keys"].value == 0
    return holds_if("W_k and W_v are grouped projections; in both releases they are not") if isolated else REFUTED


# ------------------------------------------------------------------------------------------------ initialization


def measure_initialization() -> Figures:
    """Measure the effect of the released reset, the initial weights, and the offsets without gradient."""
    shapes = flatten(dat_shapes(PRESETS["dat_tiny"]))
    visited = sum(isinstance(leaf, Mapping) for leaf in shapes.values())
    initial = flatten(init_params(PRESETS["dat_tiny"], 0, dtype=np.float64))
    largest, smallest, zero_biases = 0.0, np.inf, 0
    for name, leaf in initial.items():
        layer = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and leaf.ndim > 1:
            scaled_max = float(np.abs(leaf).max() * np.sqrt(np.prod(leaf.shape[1:])))
            largest, smallest = max(largest, scaled_max), min(smallest, scaled_max)
            zero_biases += int(layer in initial and not initial[layer].any())
    return {
        "tensors": Figure(len(shapes), "parameters of dat_tiny that the released loop visits"),
        "visited": Figure(visited, "of these, modules (the loop changes only modules)"),
        "smallest": Figure(smallest, "largest |w|·√fan_in of a weight, the smallest of all weights"),
        "largest": Figure(largest, "the same, the largest of all weights (PyTorch's default: at most 1)"),
        "zero_biases": Figure(zero_biases, "biases of linear layers and convolutions that are initially zero"),
        **_zero_gradient_offsets(),
    }


def _zero_gradient_offsets() -> dict[str, Figure]:
    """Run dat_pp_tiny on noise and count the offset components whose bound blocks the gradient."""
    config = PRESETS["dat_pp_tiny"]
    model = DAT(config, init_params(config, 0))
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    zero_gradient, last_row = [], []
    for step in model.walk(image):
        layer = config.stages[step.stage][step.block].attention
        trace = step.trace.attention
        if isinstance(layer, DeformableAttentionConfig) and isinstance(trace, LayerTrace):
            assert layer.offset_bound is OffsetBound.CLAMP
            gradient = bound_offsets_vjp(
                np.ones_like(trace.raw_offsets),
                trace.raw_offsets,
                trace.reference[0, 0],
                layer.offset_bound,
                offset_range=layer.offset_range,
                convention=layer.convention,
            )
            zero_gradient.append((gradient == 0).ravel())
            last_row.append((gradient[..., -1, :, 0] == 0).ravel())
    whole, row = np.concatenate(zero_gradient), np.concatenate(last_row)
    return {
        "components": Figure(len(whole), "offset components of dat_pp_tiny's 14 deformable blocks, at initialization"),
        "silent": Figure(100 * float(whole.mean()), "of these, without gradient", "%", digits=2),
        "silent_row": Figure(100 * float(row.mean()), "without gradient: y of the last key row", "%", digits=2),
    }


def judge_initialization(figures: Figures) -> Verdict:
    """Verdict: holds if the loop visits no module, weights have PyTorch's bounds, and some offsets get no gradient."""
    untouched = figures["visited"].value == 0 and figures["zero_biases"].value == 0
    default = float(figures["smallest"].value) > 0.9 and float(figures["largest"].value) <= 1
    return HOLDS if untouched and default and float(figures["silent"].value) > 1 else REFUTED


CLAIMS = (
    Claim(
        number=10,
        title="No last bias, no compulsory shift",
        statement=(
            "The last convolution of the offset network has no bias, to alleviate a compulsory shift of all points."
        ),
        sources=(
            Source("code of both releases: the last 1×1 convolution has no bias", SourceAccess.READ),
            Source("DAT article, the paragraph on offset generation: the reason", SourceAccess.SUMMARY),
        ),
        measure=measure_compulsory_shift,
        judge=judge_compulsory_shift,
        verdict=holds_if("a smaller shift is enough; it does not disappear"),
        reason=(
            "At initialization the points of dat_tiny's stage 3 have a mean shift of {without} pixels, and single "
            "points deviate from it by {own}. GELU's output is positive on average, so the last layer has a nonzero "
            "mean output without a bias. With PyTorch's default bias in the last layer the shift would be {with_bias}, "
            "so omitting the bias changes little. A large common shift is also possible: with zero depthwise weights "
            "and a large bias of the norm, every point of every map moves by {built} pixels; the bound is {limit}."
        ),
    ),
    Claim(
        number=11,
        title="The heads of a group use the points of their group",
        statement=(
            "The channels form G offset groups. The number of heads is a multiple of G, and the heads of a group "
            "get their keys and values from that group's points."
        ),
        sources=(
            Source("DAT article, the paragraph on offset groups", SourceAccess.QUOTED),
            Source("code of both releases", SourceAccess.READ),
        ),
        measure=measure_groups,
        judge=judge_groups,
        verdict=holds_if("W_k and W_v are grouped projections; in both releases they are not"),
        reason=(
            "If the points of one of three groups move, the sampled features of the other groups do not change, but "
            "their keys change by {other_keys} % (the moved group's keys by {own_keys} %): dense projections mix the "
            "groups after sampling. With a grouped W_k the change is {split_keys} %. The position bias of a head "
            "depends only on the points of its own group."
        ),
    ),
    Claim(
        number=21,
        title="Initialization: the released reset has no effect, and the clamp blocks gradients of offsets",
        statement=(
            "The released reset_parameters changes no weight, so models have PyTorch's default initialization. The "
            "clamp of the 2023 release leaves a share of the offsets without gradient at initialization."
        ),
        sources=(
            Source("code of both releases, and one run of it: no tensor changed", SourceAccess.READ),
            Source("2023 release, the offset's clamp", SourceAccess.READ),
        ),
        measure=measure_initialization,
        judge=judge_initialization,
        verdict=HOLDS,
        reason=(
            "The reset loops over parameters() and changes those that are linear layers or convolutions. Parameters "
            "are tensors, so it changes {visited} of {tensors}. The initialization here equals the default: every "
            "weight fills the range ±1/√fan_in ({smallest} to {largest} of it), and no bias is zero. Of {components} "
            "offset components in dat_pp_tiny, {silent} % get no gradient through the clamp. Of the y components in "
            "the last key row, {silent_row} % get none; their reference points are already outside the map."
        ),
    ),
)
