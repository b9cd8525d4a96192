"""Operation ``layer``: the complete deformable-attention layer, from a map and named weights to a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...conventions import Convention
from ...layer import DeformableAttention, deformable_layer
from ...ops.attention import attend, merge_heads, split_heads
from ...ops.basic import linear
from ...params import flatten, unflatten
from ..common import leaves_inputs_alone, runs, shape
from ..context import CheckContext
from ..cost import memory_grows_by_at_most
from ..drawing import draw_map
from ..layers import mirror
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Skip, Stage
from ..strategies import seeds
from . import layer_cases as cases
from .layer_cases import OPTIONS, WEIGHTS, Weights, builds, config_of, even_table, table_for
from .layer_mutants import MUTANTS

LAYER_STEP = 2.0**-16  # step of a weight; points move by more than this


def deformable_attention_layer(
    x: Array, weights: Weights, options: dict[str, Any], convention: Convention
) -> tuple[Array, Array]:
    """Return the layer's result (N, C, H, W), and its points (N, G, Hk, Wk, 2) in the convention's coordinates."""
    y, trace = deformable_layer(x, unflatten(weights), config_of(x, weights, options, convention))
    return y, trace.points


def deformable_attention_layer_vjp(
    cotangent: Array, x: Array, weights: Weights, options: dict[str, Any], convention: Convention
) -> dict[str, Array]:
    """Return the gradients of the result, by name."""
    layer = DeformableAttention(config_of(x, weights, options, convention), unflatten(weights))
    grad_x, grads = layer.vjp(x)[1](cotangent)
    return {"x": grad_x, **{f"weights.{name}": grad for name, grad in flatten(grads).items()}}


# ------------------------------------------------------------------------------------------------ tests


def single_row(ctx: CheckContext, case: Case) -> None:
    if ctx.setting.convention.align_corners:
        raise Skip("±1 are pixel centers, so an axis of one pixel has no extent")
    ctx.compare(case)


def returned_points(ctx: CheckContext, case: Case) -> None:
    ctx.got(case)
    returned = ctx.raw_output(ctx.implementation, ctx.cast(case))
    if not isinstance(returned, tuple):
        raise Skip("it returns no points")
    expected = ctx.raw_output(ctx.op.reference, ctx.cast(case, np.float64))
    ctx.require_close(np.asarray(returned[1]), expected[1])


def check_slopes(*names: str) -> Callable[[CheckContext, Case], None]:
    """Return the test of the gradients of the arrays whose names have one of these prefixes."""

    def test(ctx: CheckContext, case: Case) -> None:
        chosen = [name for name in ctx.differentiable_arrays(case) if name.startswith(names)]
        ctx.compare_slopes(chosen, case, step=LAYER_STEP)

    return test


def ordinary_attention(ctx: CheckContext, case: Case) -> None:
    """Require multi-head attention with zero offsets and a zero table, at stride 1."""
    if ctx.setting.convention not in (Convention.CELL_CENTER, Convention.PAPER):
        raise Skip(f"not true in {ctx.setting.convention.name}: the release mixes two geometries")
    zero_offsets = case.with_arrays({
        f"weights.{name}": 0 * case.arguments["weights"][name]
        for name in ("offset_network.pointwise.weight", "position_bias.table")
    })  # fmt: skip
    x, params, heads = case.arguments["x"], unflatten(case.arguments["weights"]), case.arguments["options"]["heads"]
    q, k, v = (split_heads(linear(x, **params[name]), heads) for name in ("query", "key", "value"))
    attention_out = attend(q, k, v, None, q.shape[-1] ** -0.5)[0]
    ctx.require_close(
        ctx.got(zero_offsets), linear(merge_heads(attention_out, x.shape[2:]), **params["output"]), case=zero_offsets
    )


def flips(ctx: CheckContext, case: Case) -> None:
    """Require that flipped maps, kernels, offsets and tables give the flipped result."""
    if ctx.setting.convention is Convention.DATPP2023:
        raise Skip("the 2023 release shifts its grid down and to the right")
    x, weights, options = case.arguments.values()
    config = config_of(x, weights, options, ctx.setting.convention)
    for axis in range(2):
        mirrored = flatten(mirror(unflatten(weights), axis, config, x.shape[2:], x.shape[2:]))
        arrays = {"x": np.flip(x, 2 + axis).copy(), **{f"weights.{name}": leaf for name, leaf in mirrored.items()}}
        flipped = case.with_arrays(arrays)
        ctx.require_close(ctx.got(flipped), np.flip(ctx.got(case), 2 + axis), case=flipped)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    x = case.arguments["x"].copy()
    x[0, 0, 1, 2] = np.nan
    with_nan = case.with_arrays({"x": x})
    got = np.isnan(ctx.got(with_nan))
    if not got[0].any() or got[1:].any():
        raise Mismatch("expected NaN in the image with NaN, and in no other", None, ctx.got(with_nan), with_nan)


def memory(ctx: CheckContext, case: Case) -> None:
    x, narrow = case.arguments["x"], cases.random_layer((16, 16), 1, channels=2)
    memory_grows_by_at_most(ctx, narrow, case, 60 * (x.shape[1] - 2) * 2 * 16 * 16)


# ------------------------------------------------------------------------------------------------ checks

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "The result is finite and has the dtype of the inputs.",
        "The function raised an error, returned another dtype, or returned NaN or infinity.", cases.typical, test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and inputs are not modified.",
        "The function assumes contiguous memory, writes to its inputs, or is not deterministic.",
        cases.typical, test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES, "A map (N, C, H, W) gives a map of the same shape; N may be 0.",
        "Axes are swapped or squeezed, or an empty batch is not handled.",
        [cases.random_layer((3, 5), 1, "no images", images=0)], cases.any_batch, shape,
    ),
    Check(
        "projections", Stage.VALUES,
        "If all pixels are equal, the result is the output projection of the value projection of a pixel.",
        "A weight matrix is transposed, a bias is missing, keys and values are swapped, attention weights do not sum "
        "to "
        "one, or features are sampled from the queries instead of the map.",
        [cases.projections(6, 0, "the same pixel everywhere")], builds(cases.projections, cases.square_sides, seeds),
    ),
    Check(
        "dot_products", Stage.VALUES, "In a head with one channel, the logits are the products q·k.",
        "Queries and keys are combined in another way.",
        [cases.content_case(1, 1)(1, "one channel, four constant cells")], builds(cases.content_case(1, 1), seeds),
    ),
    Check(
        "scale", Stage.VALUES, "Dot products are divided by the square root of the channels per head.",
        "The scale is missing or wrong.",
        [cases.content_case(4, 1)(1, "one head of four channels")], builds(cases.content_case(4, 1), seeds),
    ),
    Check(
        "heads", Stage.VALUES, "Head m has the channels [m·C/M, (m + 1)·C/M).",
        "Channels are interleaved across the heads, or heads are mixed up.",
        [cases.content_case(4, 2)(1, "two heads of two channels")], builds(cases.content_case(4, 2), seeds),
    ),
    Check(
        "middle", Stage.VALUES, "With zero offsets, the center of the points is the one of the convention.",
        "All points are shifted, most likely by half a pixel, or scaled from the corner of the map (H instead of H - "
        "1).",
        [cases.mean_case(cases.ramp, 3)(6, 0, "a ramp")],
        builds(cases.mean_case(cases.ramp, 3), cases.square_sides, seeds),
    ),
    Check(
        "spread", Stage.VALUES, "The distances between points are those of the convention.",
        "align_corners is wrong: -1 and 1 are taken as pixel centers instead of the edges of the map, or the reverse.",
        [cases.mean_case(cases.symmetric, 3)(6, 1, "a symmetric map")],
        builds(cases.mean_case(cases.symmetric, 3), cases.square_sides, seeds),
    ),
    Check(
        "between_pixels", Stage.VALUES, "Between pixels, interpolation is bilinear.",
        "Nearest-neighbor interpolation is used.",
        [cases.mean_case(cases.symmetric, 2)(4, 1, "points between pixels")],
        builds(cases.mean_case(cases.symmetric, 2), st.sampled_from([4, 6]), seeds),
    ),
    Check(
        "offset_bound", Stage.VALUES, "Offsets are s/2·tanh(raw) key cells for the network's output raw.",
        "The bound is missing or another function, or the limit is wrong: points leave their region.",
        [cases.bounded(6, 0, 0.5, 0.5, "half the bound")],
        builds(cases.bounded_equally, cases.square_sides, seeds, cases.bound_fractions),
    ),
    Check(
        "rows_before_columns", Stage.VALUES, "Offsets and points are (y, x): row first, column second.",
        "x and y are swapped, in the offsets or in the points.",
        [cases.bounded(6, 0, 0.5, -0.25, "down by half the bound, left by a quarter")],
        builds(cases.bounded, cases.square_sides, seeds, cases.bound_fractions, st.just(0.25)),
    ),
    Check(
        "not_square", Stage.VALUES, "On a non-square map, each axis uses its own length.",
        "One axis is normalized by the length of the other, e.g. x by the height. Square maps hide this mistake.",
        [cases.on_rectangles((6, 9), 2, 0.5, -0.25, "2 × 3 keys on 6 × 9 pixels")],
        builds(cases.on_rectangles, cases.strided_sizes, seeds, cases.bound_fractions, st.sampled_from([0.25, -0.25])),
    ),
    Check(
        "zero_outside", Stage.VALUES, "A point one pixel or more outside the map reads zero.",
        "The border is replicated, or a negative index wraps around.",
        [cases.at_the_border((3, 5), 1, 0.5, 0.5, "all points one pixel down and right"),
         cases.at_the_border((3, 5), 1, -0.5, -0.5, "all points one pixel up and left")],
        builds(cases.at_the_border, cases.rectangles, seeds, cases.bound_fractions, cases.bound_fractions),
    ),
    Check(
        "border_fades", Stage.VALUES,
        "From the outermost pixel center to one pixel outside it, features decrease linearly to zero.",
        "Points outside the outermost pixel centers read zero.",
        [cases.at_the_border((3, 5), 1, 0.25, -0.25, "all points half a pixel down and left")],
        builds(cases.at_the_border, cases.rectangles, seeds, st.just(0.25), st.just(-0.25)),
    ),
    Check(
        "fine_positions", Stage.VALUES, "On a large map, positions keep their fractional part.",
        "Positions are stored in half precision. bfloat16 has 8 significant bits and loses half pixels above 128.",
        [cases.long_map((6, 141), 1, "far along a map of 6 × 141")],
    ),
    Check(
        "bias_middle", Stage.VALUES,
        "At zero displacement, the bias is the center of the table, entry (H - 1, W - 1).",
        "The table position is wrong, most likely because its center is off by one; the bias is subtracted; or queries "
        "are numbered column by column.",
        [cases.with_table(cases.middle_table)(3, 1, "a table of one entry")],
        builds(cases.with_table(cases.middle_table), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_is_added", Stage.VALUES, "The bias is added to the scaled dot products without scaling.",
        "The bias is scaled with the dot products.",
        [cases.with_table(cases.middle_table, channels=4)(3, 1, "a head of four channels")],
        builds(cases.with_table(cases.middle_table, channels=4), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_distance", Stage.VALUES, "One pixel of displacement is one entry of the table.",
        "Displacements are too long or too short by a factor of two: differences of coordinates in [-1, 1] are in "
        "[-2, 2], and the factor 1/2 is missing.",
        [cases.with_table(even_table)(3, 1, "a symmetric table")],
        builds(cases.with_table(even_table), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_of_queries_and_keys", Stage.VALUES, "Entry [m, n] of the bias belongs to query m and key n.",
        "Queries and keys are swapped, which raises no error if their numbers are equal.",
        [cases.with_table(cases.bordered_even_table, y=1, x=1)(4, 1, "all points one pixel down and right")],
        builds(cases.with_table(cases.bordered_even_table, y=1, x=1), st.sampled_from([4, 5]), seeds),
    ),
    Check(
        "bias_direction", Stage.VALUES, "A query below its key reads below the center of the table.",
        "The displacement has the wrong sign: key minus query instead of query minus key.",
        [cases.with_table(cases.transposable_table)(3, 1, "a table equal to its transpose")],
        builds(cases.with_table(cases.transposable_table), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_rows_before_columns", Stage.VALUES, "Rows of the table belong to displacements in y.",
        "The table is transposed.",
        [cases.with_table(table_for)(3, 1, "any table, a square map")],
        builds(cases.with_table(table_for), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_not_square", Stage.VALUES, "On a non-square map, each axis of the bias uses its own length.",
        "One axis of the bias uses the length of the other.",
        [cases.with_table(table_for)((3, 5), 1, "any table, a map of 3 × 5")],
        builds(cases.with_table(table_for), cases.rectangles, seeds),
    ),
    Check(
        "bias_between_entries", Stage.VALUES, "Between entries of the table, interpolation is bilinear.",
        "The displacement is rounded to an entry.",
        [cases.with_table(cases.bordered_table, y=0.25, x=0.5)((3, 5), 1, "offsets of a fraction of a pixel")],
        builds(cases.with_table(cases.bordered_table, y=0.25, x=0.5), cases.rectangles, seeds),
    ),
    Check(
        "bias_zero_outside", Stage.VALUES, "A displacement outside the table has zero bias.",
        "The border of the table is replicated, or a negative index wraps around.",
        [cases.with_table(table_for, y=1, x=-1)((3, 5), 1, "all points one pixel down and left")],
        builds(cases.with_table(table_for, y=1, x=-1), cases.rectangles, seeds),
    ),
    Check(
        "bias_border_fades", Stage.VALUES,
        "From the outermost entry to one entry outside the table, the bias decreases linearly to zero.",
        "All displacements outside the table have zero bias.",
        [cases.with_table(table_for, y=0.5, x=-0.5)((3, 5), 1, "all points half a pixel down and left")],
        builds(cases.with_table(table_for, y=0.5, x=-0.5), cases.rectangles, seeds),
    ),
    Check(
        "bias_of_heads", Stage.VALUES, "Each head has its own table.", "Heads are mixed up.",
        [cases.with_table(cases.two_tables, channels=2, heads=2)((3, 5), 1, "two heads")],
        builds(cases.with_table(cases.two_tables, channels=2, heads=2), cases.rectangles, seeds),
    ),
    Check(
        "offset_network", Stage.VALUES,
        "Offsets are predicted from the queries by a depthwise convolution, layer norm with epsilon 1e-5, exact GELU, "
        "and a projection without bias.",
        "A step is missing or wrong: GELU by tanh, another epsilon, a flipped kernel, or the map instead of the "
        "queries "
        "as input.",
        [cases.offsets_only((3, 5), 1, "stride 1")], builds(cases.offsets_only, cases.rectangles, seeds),
    ),
    Check(
        "stride", Stage.VALUES, "With a stride, the padding of the depthwise convolution is the one of the convention.",
        "The padding is wrong: k // 2 on every side instead of the padding for the key grid, or the reverse.",
        [cases.offsets_only((4, 6), 1, "stride 2", stride=2),
         cases.offsets_only((6, 4), 2, "stride 2, a kernel of 5 × 5", stride=2, kernel_size=5)],
        builds(cases.offsets_only, st.sampled_from([(4, 6), (6, 4)]), seeds, stride=st.just(2),
               kernel_size=st.sampled_from([3, 5])),
    ),
    Check(
        "groups", Stage.VALUES,
        "Group g has channels [g·C/G, (g + 1)·C/G), heads [g·M/G, (g + 1)·M/G), and its own points.",
        "Groups are in another order, or channels or heads are interleaved across the groups.",
        [cases.grouped((3, 5), 1, "two groups of two heads")], builds(cases.grouped, cases.rectangles, seeds),
    ),
    Check(
        "images", Stage.VALUES, "Each image has its own points.", "All images use the first image's points.",
        [cases.random_layer((3, 5), 1, "two images", images=2)],
        builds(cases.random_layer, cases.rectangles, seeds, images=st.just(2)),
    ),
    Check(
        "other_bounds", Stage.VALUES,
        "The bound \"clamp\" clamps points to [-1, 1]; \"tanh_coordinates\" applies tanh to reference + offset.",
        "These bounds of the released code are wrong. If one is not implemented, raise NotImplementedError; its cases "
        "are then skipped.",
        [cases.random_layer((3, 5), 1, "clamp", offset_bound="clamp"),
         cases.random_layer((3, 5), 1, "tanh of the sum", offset_bound="tanh_coordinates")],
        builds(cases.random_layer, cases.rectangles, seeds,
               offset_bound=st.sampled_from(["clamp", "tanh_coordinates"])),
    ),
    Check(
        "single_row", Stage.VALUES, "A map with a single row or column is handled like any other.",
        "The function divides by H - 1 = 0.",
        [cases.random_layer((1, 5), 1, "one row")],
        builds(cases.random_layer, st.sampled_from([(1, 5), (4, 1), (1, 1)]), seeds), single_row,
    ),
    Check(
        "anywhere", Stage.VALUES, "Results equal the reference for any weights and options.",
        "A mistake that no earlier check isolates.", cases.typical, lambda setting: cases.any_layer(),
    ),
    Check(
        "points", Stage.VALUES, "If points are returned with the result, they equal the reference.",
        "The layer returns the points in another unit or order.", cases.typical,
        lambda setting: cases.any_layer(), returned_points,
    ),
    Check(
        "gradient_of_the_projections", Stage.GRADIENTS,
        "The gradients of the key, value and output projections are correct.",
        "A factor is wrong, or a sum over images or pixels is missing.", cases.away_from_kinks(cases.random_layer),
        test=check_slopes("weights.key", "weights.value", "weights.output"),
    ),
    Check(
        "gradient_of_the_table", Stage.GRADIENTS,
        "Each entry of the table receives the gradients of all pairs that read it.",
        "A factor is wrong, or contributions of pairs, images or heads are missing.",
        cases.away_from_kinks(cases.random_layer),
        test=check_slopes("weights.position_bias"),
    ),
    Check(
        "gradient_through_the_samples", Stage.GRADIENTS,
        "Without a bias, the offset network receives gradients through the sampled features.",
        "The points are detached, or a factor of their gradient is wrong: the normalization, or the derivative of "
        "tanh.",
        cases.away_from_kinks(cases.without_table), test=check_slopes("weights.offset_network"),
    ),
    Check(
        "gradient_through_the_bias", Stage.GRADIENTS,
        "With a bias, the offset network also receives gradients through the bias.",
        "The gradient of the points through the bias is missing, a common mistake of ports.",
        cases.away_from_kinks(cases.random_layer), test=check_slopes("weights.offset_network"),
    ),
    Check(
        "gradient_of_the_queries", Stage.GRADIENTS,
        "The query projection receives gradients through the logits and the offsets.",
        "A factor is wrong, most likely the scale, or one of the paths is missing.",
        cases.away_from_kinks(cases.random_layer),
        test=check_slopes("weights.query"),
    ),
    Check(
        "gradient_of_the_map", Stage.GRADIENTS,
        "The gradient of the map is the sum over three paths: queries, offsets, features.",
        "A path is missing, or a factor is wrong.", cases.away_from_kinks(cases.random_layer),
        test=check_slopes("x"),
    ),
    Check(
        "ordinary_attention", Stage.IDENTITIES,
        "With zero offsets and no bias, at stride 1, the layer is multi-head attention over the map.",
        "Keys are not at pixel centers, or an additional term is present.",
        [cases.random_layer((3, 5), 1, "two heads", heads=2)],
        builds(cases.random_layer, cases.rectangles, seeds, heads=st.sampled_from([1, 2])), ordinary_attention,
    ),
    Check(
        "flips", Stage.IDENTITIES, "A flipped map with flipped weights gives the flipped result.",
        "Left and right, or top and bottom, are treated differently.",
        [cases.grouped((3, 5), 1, "two groups of two heads")], builds(cases.grouped, cases.rectangles, seeds), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A NaN pixel gives NaN in its own image, and in no other.",
        "NaN is clamped or replaced, which hides a diverged training run.",
        [cases.random_layer((3, 5), 1, "two images", images=2)], test=nan_comes_out,
    ),
    Check(
        "memory", Stage.COST, "Memory of additional channels grows with queries and keys, not with their pairs.",
        "The products of each pair and channel are stored before they are summed.",
        [cases.random_layer((16, 16), 1, "34 channels on 16 × 16", channels=34)], test=memory,
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the operation


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw the first channel of the first image with the points of its first group, and describe the weights."""
    x, weights, options = case.arguments.values()
    lines = [f"a map {x.shape}; " + ", ".join(f"{name} {value}" for name, value in options.items())]
    descriptions = {name: describe_weight(leaf) for name, leaf in weights.items()}
    lines += [f"{name}: {description}" for name, description in descriptions.items() if description != "0"]
    lines.append("all other weights are 0")
    if x.size and np.isfinite(x).all():
        trace = deformable_layer(x, unflatten(weights), config_of(x, weights, options, convention))[1]
        points = trace.points_px[0, 0].reshape(-1, 2)
        lines += ["channel 0 of image 0, and the points of group 0", draw_map(x[0, 0], points)]
    return "\n".join(lines)


def describe_weight(leaf: Array) -> str:
    """Describe a weight: its value if constant, "the identity", its elements if few, or its shape."""
    if leaf.size and np.ptp(leaf) == 0:
        return f"{leaf.flat[0]:.9g}"
    if leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1] and np.array_equal(leaf, np.eye(len(leaf))):
        return "the identity"
    return str(leaf.tolist()) if leaf.size <= 6 else f"{leaf.shape}, {leaf.size} elements"


def output_only(returned: Any) -> Any:
    """Return the result without the points, if there are any."""
    return returned[0] if isinstance(returned, tuple) else returned


LAYER = OpSpec(
    name="layer",
    title="the complete layer, from a map and named weights to a map (and optionally its sampling points)",
    function="deformable_attention_layer",
    arguments=(
        Argument("x", "NCHW", "the map", differentiable=True),
        Argument("weights", "", WEIGHTS, differentiable=True),
        Argument("options", "", OPTIONS),
    ),
    returns="NCHW",
    reference=Implementation(
        "dat_ref.testing.ops.layer:deformable_attention_layer",
        deformable_attention_layer,
        deformable_attention_layer_vjp,
        takes_convention=True,
    ),
    draw=draw,
    select_output=output_only,
    depends_on_convention=True,
    checks=CHECKS,
    mutants=MUTANTS,
)
