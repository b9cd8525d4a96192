"""Operation ``layer``: the whole deformable-attention layer, from a map and named weights to a map."""

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

LAYER_STEP = 2.0**-16  # of a weight, which moves points by more than that


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
        raise Skip("±1 are pixel centers, so that an axis of one pixel has no extent")
    ctx.compare(case)


def returned_points(ctx: CheckContext, case: Case) -> None:
    ctx.got(case)
    returned = ctx.raw_output(ctx.implementation, ctx.cast(case))
    if not isinstance(returned, tuple):
        raise Skip("it returns the result alone")
    expected = ctx.raw_output(ctx.op.reference, ctx.cast(case, np.float64))
    ctx.require_close(np.asarray(returned[1]), expected[1])


def check_slopes(*names: str) -> Callable[[CheckContext, Case], None]:
    """Return the test of the gradients of the arrays whose names start so."""

    def test(ctx: CheckContext, case: Case) -> None:
        chosen = [name for name in ctx.differentiable_arrays(case) if name.startswith(names)]
        ctx.compare_slopes(chosen, case, step=LAYER_STEP)

    return test


def ordinary_attention(ctx: CheckContext, case: Case) -> None:
    """Without offsets and without a table, at stride 1, the layer is multi-head attention."""
    if ctx.setting.convention not in (Convention.CELL_CENTER, Convention.PAPER):
        raise Skip(f"{ctx.setting.convention.name} does not have it: the release mixes two geometries")
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
    """Mirrored kernels, offsets and tables give the mirrored result of a mirrored map."""
    if ctx.setting.convention is Convention.DATPP2023:
        raise Skip("the 2023 release shifts its grid to the lower right")
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
        raise Mismatch("NaN must come out of its image, and of no other", None, ctx.got(with_nan), with_nan)


def memory(ctx: CheckContext, case: Case) -> None:
    x, narrow = case.arguments["x"], cases.random_layer((16, 16), 1, channels=2)
    memory_grows_by_at_most(ctx, narrow, case, 60 * (x.shape[1] - 2) * 2 * 16 * 16)


# ------------------------------------------------------------------------------------------------ checks

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "It returns finite numbers, in the precision of what it is given.",
        "The function cannot be called as the protocol says, or loses precision on the way.", cases.typical, test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and not written to.",
        "It assumes contiguous memory or works in place.", cases.typical, test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES, "A map (N, C, H, W) gives a map of the same shape, for any batch, none included.",
        "Axes are exchanged, squeezed, or an empty batch is not thought of.",
        [cases.random_layer((3, 5), 1, "no images", images=0)], cases.any_batch, shape,
    ),
    Check(
        "projections", Stage.VALUES,
        "Where all pixels are the same, the result is their value projected, then their output.",
        "A weight matrix is used transposed, a bias is missing, keys and values are exchanged, shares do not sum to "
        "one, or features are sampled from the queries and not from the map.",
        [cases.projections(6, 0, "the same pixel everywhere")], builds(cases.projections, cases.square_sides, seeds),
    ),
    Check(
        "dot_products", Stage.VALUES, "In a head one channel wide the shares of the keys follow from q·k.",
        "Queries and keys are multiplied in another way.",
        [cases.content_case(1, 1)(1, "one channel, four constant cells")], builds(cases.content_case(1, 1), seeds),
    ),
    Check(
        "scale", Stage.VALUES, "Dot products are divided by the root of the head's width.",
        "The scale is missing, or is another one.",
        [cases.content_case(4, 1)(1, "one head of four channels")], builds(cases.content_case(4, 1), seeds),
    ),
    Check(
        "heads", Stage.VALUES, "Head m has the channels [m·C/M, (m + 1)·C/M).",
        "Channels are dealt to the heads in turn, or heads are mixed up.",
        [cases.content_case(4, 2)(1, "two heads of two channels")], builds(cases.content_case(4, 2), seeds),
    ),
    Check(
        "middle", Stage.VALUES, "Without offsets the points lie about the middle of the map, as the convention says.",
        "All points are shifted, by half a pixel most likely, or stretched from the corner of the map (H for H - 1).",
        [cases.mean_case(cases.ramp, 3)(6, 0, "a ramp")],
        builds(cases.mean_case(cases.ramp, 3), cases.square_sides, seeds),
    ),
    Check(
        "spread", Stage.VALUES, "The points are as far apart as the convention says.",
        "-1 and 1 are taken for pixel centers where they are the edges of the map, or the reverse (align_corners).",
        [cases.mean_case(cases.symmetric, 3)(6, 1, "a symmetric map")],
        builds(cases.mean_case(cases.symmetric, 3), cases.square_sides, seeds),
    ),
    Check(
        "between_pixels", Stage.VALUES, "Between pixels features are linear in each direction.",
        "The nearest pixel is taken.",
        [cases.mean_case(cases.symmetric, 2)(4, 1, "points between pixels")],
        builds(cases.mean_case(cases.symmetric, 2), st.sampled_from([4, 6]), seeds),
    ),
    Check(
        "offset_bound", Stage.VALUES, "Points move by s/2·tanh of what the network says, in key cells.",
        "The bound is missing or another function, or the range has another width: points leave their region.",
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
        "not_square", Stage.VALUES, "On a map that is not square each axis has its own length.",
        "One axis is normalised by the length of the other: x by the height, say. Square maps hide it.",
        [cases.on_rectangles((6, 9), 2, 0.5, -0.25, "2 × 3 keys on 6 × 9 pixels")],
        builds(cases.on_rectangles, cases.strided_sizes, seeds, cases.bound_fractions, st.sampled_from([0.25, -0.25])),
    ),
    Check(
        "zero_outside", Stage.VALUES, "A whole pixel outside the map there is nothing.",
        "The border is repeated, or a negative index counts from the end and wraps around.",
        [cases.at_the_border((3, 5), 1, 0.5, 0.5, "all points a pixel down and right"),
         cases.at_the_border((3, 5), 1, -0.5, -0.5, "all points a pixel up and left")],
        builds(cases.at_the_border, cases.rectangles, seeds, cases.bound_fractions, cases.bound_fractions),
    ),
    Check(
        "border_fades", Stage.VALUES, "Within a pixel outside the map features fade to zero.",
        "Points outside the outermost pixel centers are dropped.",
        [cases.at_the_border((3, 5), 1, 0.25, -0.25, "all points half a pixel down and left")],
        builds(cases.at_the_border, cases.rectangles, seeds, st.just(0.25), st.just(-0.25)),
    ),
    Check(
        "fine_positions", Stage.VALUES, "Positions keep their fractions on a large map.",
        "Positions are kept in half precision: bfloat16 has 8 bits, so that beyond pixel 128 halves are lost.",
        [cases.long_map((6, 141), 1, "far along a map of 6 × 141")],
    ),
    Check(
        "bias_middle", Stage.VALUES, "A key on its query has the table's middle, entry (H - 1, W - 1), on its logit.",
        "The bias is read beside its place, the table's middle is off by one most likely; or it is subtracted, or "
        "queries are numbered column by column.",
        [cases.with_table(cases.middle_table)(3, 1, "a table of one entry")],
        builds(cases.with_table(cases.middle_table), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_is_added", Stage.VALUES, "The bias is added to the scaled dot products as it is.",
        "It is scaled with them.",
        [cases.with_table(cases.middle_table, channels=4)(3, 1, "a head of four channels")],
        builds(cases.with_table(cases.middle_table, channels=4), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_distance", Stage.VALUES, "A pixel of displacement is an entry of the table.",
        "Displacements are twice as long as they should be, or half as long: differences of coordinates between -1 and "
        "1 lie between -2 and 2, and the half is missing.",
        [cases.with_table(even_table)(3, 1, "a table without direction")],
        builds(cases.with_table(even_table), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_of_queries_and_keys", Stage.VALUES, "Entry [m, n] of the bias is that of query m and key n.",
        "Queries and keys are exchanged, which goes unnoticed where there are as many of both.",
        [cases.with_table(cases.bordered_even_table, y=1, x=1)(4, 1, "all points a pixel down and right")],
        builds(cases.with_table(cases.bordered_even_table, y=1, x=1), st.sampled_from([4, 5]), seeds),
    ),
    Check(
        "bias_direction", Stage.VALUES, "A query below its key reads below the table's middle.",
        "The displacement has the wrong sign: it is measured from the query to the key.",
        [cases.with_table(cases.transposable_table)(3, 1, "a table that is its own transpose")],
        builds(cases.with_table(cases.transposable_table), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_rows_before_columns", Stage.VALUES, "Rows of the table are for y.", "The table is transposed.",
        [cases.with_table(table_for)(3, 1, "any table, a square map")],
        builds(cases.with_table(table_for), cases.small_square_sides, seeds),
    ),
    Check(
        "bias_not_square", Stage.VALUES, "The same on a map that is not square.",
        "One axis of the bias is measured by the length of the other.",
        [cases.with_table(table_for)((3, 5), 1, "any table, a map of 3 × 5")],
        builds(cases.with_table(table_for), cases.rectangles, seeds),
    ),
    Check(
        "bias_between_entries", Stage.VALUES, "Between entries of the table the bias is linear in each direction.",
        "The displacement is rounded to a whole entry.",
        [cases.with_table(cases.bordered_table, y=0.25, x=0.5)((3, 5), 1, "all points by fractions of a pixel")],
        builds(cases.with_table(cases.bordered_table, y=0.25, x=0.5), cases.rectangles, seeds),
    ),
    Check(
        "bias_zero_outside", Stage.VALUES, "A displacement that the table does not cover has no bias.",
        "The border of the table is repeated, or a negative index counts from its end.",
        [cases.with_table(table_for, y=1, x=-1)((3, 5), 1, "all points a pixel down and left")],
        builds(cases.with_table(table_for, y=1, x=-1), cases.rectangles, seeds),
    ),
    Check(
        "bias_border_fades", Stage.VALUES, "Within an entry outside the table the bias fades to zero.",
        "Displacements outside the table are dropped at once.",
        [cases.with_table(table_for, y=0.5, x=-0.5)((3, 5), 1, "all points half a pixel down and left")],
        builds(cases.with_table(table_for, y=0.5, x=-0.5), cases.rectangles, seeds),
    ),
    Check(
        "bias_of_heads", Stage.VALUES, "Each head has a table of its own.", "Heads are mixed up.",
        [cases.with_table(cases.two_tables, channels=2, heads=2)((3, 5), 1, "two heads")],
        builds(cases.with_table(cases.two_tables, channels=2, heads=2), cases.rectangles, seeds),
    ),
    Check(
        "offset_network", Stage.VALUES,
        "Offsets are predicted from the queries: depthwise convolution, layer norm with an epsilon of 1e-5, exact "
        "GELU, a projection without bias.",
        "A step is missing or another: GELU by tanh, another epsilon, a flipped kernel, or the map in place of the "
        "queries.",
        [cases.offsets_only((3, 5), 1, "stride 1")], builds(cases.offsets_only, cases.rectangles, seeds),
    ),
    Check(
        "stride", Stage.VALUES, "With a stride the windows of the depthwise convolution lie as the convention says.",
        "Another padding: k // 2 on every side, or as much as the key grid needs.",
        [cases.offsets_only((4, 6), 1, "stride 2", stride=2),
         cases.offsets_only((6, 4), 2, "stride 2, a kernel of 5 × 5", stride=2, kernel_size=5)],
        builds(cases.offsets_only, st.sampled_from([(4, 6), (6, 4)]), seeds, stride=st.just(2),
               kernel_size=st.sampled_from([3, 5])),
    ),
    Check(
        "groups", Stage.VALUES,
        "Group g has the channels [g·C/G, (g + 1)·C/G) and the heads [g·M/G, (g + 1)·M/G), and points of its own.",
        "Groups are taken in another order, or channels or heads are dealt to them in turn.",
        [cases.grouped((3, 5), 1, "two groups of two heads")], builds(cases.grouped, cases.rectangles, seeds),
    ),
    Check(
        "images", Stage.VALUES, "Each image has points of its own.", "All images use the first image's points.",
        [cases.random_layer((3, 5), 1, "two images", images=2)],
        builds(cases.random_layer, cases.rectangles, seeds, images=st.just(2)),
    ),
    Check(
        "other_bounds", Stage.VALUES,
        "With the bound \"clamp\" points end at -1 and 1; with \"tanh_coordinates\" tanh bounds the sum.",
        "The other bounds of the releases are missing or wrong. Where one is missing, let it raise "
        "NotImplementedError, and it is passed over.",
        [cases.random_layer((3, 5), 1, "clamp", offset_bound="clamp"),
         cases.random_layer((3, 5), 1, "tanh of the sum", offset_bound="tanh_coordinates")],
        builds(cases.random_layer, cases.rectangles, seeds,
               offset_bound=st.sampled_from(["clamp", "tanh_coordinates"])),
    ),
    Check(
        "single_row", Stage.VALUES, "A map of one row or one column is a map like any other.",
        "A division by H - 1 = 0.",
        [cases.random_layer((1, 5), 1, "one row")],
        builds(cases.random_layer, st.sampled_from([(1, 5), (4, 1), (1, 1)]), seeds), single_row,
    ),
    Check(
        "anywhere", Stage.VALUES, "The reference's result for any weights and options.",
        "A mistake that none of the checks above isolates.", cases.typical, lambda setting: cases.any_layer(),
    ),
    Check(
        "points", Stage.VALUES, "Points, where they are returned beside the result, are the reference's.",
        "They are right inside, and returned in another unit or order.", cases.typical,
        lambda setting: cases.any_layer(), returned_points,
    ),
    Check(
        "gradient_of_the_projections", Stage.GRADIENTS, "The gradients of key, value and output projections are right.",
        "A wrong factor, or a sum over images or pixels that is missing.", cases.away_from_kinks(cases.random_layer),
        test=check_slopes("weights.key", "weights.value", "weights.output"),
    ),
    Check(
        "gradient_of_the_table", Stage.GRADIENTS, "Each entry of the table gains from every pair that reads it.",
        "A wrong factor, or pairs, images or heads that are forgotten.", cases.away_from_kinks(cases.random_layer),
        test=check_slopes("weights.position_bias"),
    ),
    Check(
        "gradient_through_the_samples", Stage.GRADIENTS,
        "Without a bias the offset network learns through the features at its points.",
        "The points are detached, or their gradient has a wrong factor: the slope of the normalisation, or of tanh.",
        cases.away_from_kinks(cases.without_table), test=check_slopes("weights.offset_network"),
    ),
    Check(
        "gradient_through_the_bias", Stage.GRADIENTS,
        "With a bias the offset network learns through the table too.",
        "The position gradient through the bias is forgotten: the one that ports forget.",
        cases.away_from_kinks(cases.random_layer), test=check_slopes("weights.offset_network"),
    ),
    Check(
        "gradient_of_the_queries", Stage.GRADIENTS, "The query projection learns through the logits and the offsets.",
        "A wrong factor, the scale most likely, or a path that is forgotten.",
        cases.away_from_kinks(cases.random_layer),
        test=check_slopes("weights.query"),
    ),
    Check(
        "gradient_of_the_map", Stage.GRADIENTS, "The map's gradient sums its three paths: queries, offsets, features.",
        "A path is forgotten, or has a wrong factor.", cases.away_from_kinks(cases.random_layer),
        test=check_slopes("x"),
    ),
    Check(
        "ordinary_attention", Stage.IDENTITIES,
        "Without offsets and without a bias, at stride 1, the layer is multi-head attention over the map.",
        "Keys do not sit on pixels, or something is added.",
        [cases.random_layer((3, 5), 1, "two heads", heads=2)],
        builds(cases.random_layer, cases.rectangles, seeds, heads=st.sampled_from([1, 2])), ordinary_attention,
    ),
    Check(
        "flips", Stage.IDENTITIES, "A mirrored map through the mirrored layer gives the mirrored result.",
        "Left and right, or top and bottom, are treated differently.",
        [cases.grouped((3, 5), 1, "two groups of two heads")], builds(cases.grouped, cases.rectangles, seeds), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A pixel that is not a number gives NaN in its image, and in no other.",
        "NaN is clamped or skipped, which hides a diverged training run.",
        [cases.random_layer((3, 5), 1, "two images", images=2)], test=nan_comes_out,
    ),
    Check(
        "memory", Stage.COST, "More channels cost memory for pixels and keys, not for every pair of them.",
        "Products are kept for each pair and channel before they are summed.",
        [cases.random_layer((16, 16), 1, "34 channels on 16 × 16", channels=34)], test=memory,
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the operation


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw the first channel of the first image with the points of its first group, and say what the weights are."""
    x, weights, options = case.arguments.values()
    lines = [f"a map {x.shape}; " + ", ".join(f"{name} {value}" for name, value in options.items())]
    descriptions = {name: describe_weight(leaf) for name, leaf in weights.items()}
    lines += [f"{name}: {description}" for name, description in descriptions.items() if description != "0"]
    lines.append("every other weight is 0")
    if x.size and np.isfinite(x).all():
        trace = deformable_layer(x, unflatten(weights), config_of(x, weights, options, convention))[1]
        points = trace.points_px[0, 0].reshape(-1, 2)
        lines += ["channel 0 of image 0, and where group 0 samples it", draw_map(x[0, 0], points)]
    return "\n".join(lines)


def describe_weight(leaf: Array) -> str:
    """Say what a weight is: a number if it is the same everywhere, the identity, or its shape."""
    if leaf.size and np.ptp(leaf) == 0:
        return f"{leaf.flat[0]:.9g}"
    if leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1] and np.array_equal(leaf, np.eye(len(leaf))):
        return "the identity"
    return str(leaf.tolist()) if leaf.size <= 6 else f"{leaf.shape}, {leaf.size} numbers"


def output_only(returned: Any) -> Any:
    """Return the result, which may come with the points."""
    return returned[0] if isinstance(returned, tuple) else returned


LAYER = OpSpec(
    name="layer",
    title="the whole layer, from a map and named weights to a map (and the points it sampled, if it likes)",
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
