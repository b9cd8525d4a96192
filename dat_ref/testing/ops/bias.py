"""Operation ``bias``: the relative position bias, a table read at continuous displacements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...conventions import Convention
from ...ops.bias import table_bias, table_bias_vjp
from ...ops.grid import Size, query_points, reference_points, to_pixels
from ..common import leaves_inputs_alone, runs, shape, slopes
from ..context import CheckContext
from ..drawing import draw_map
from ..gradients import STEP
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Setting, Skip, Stage
from ..strategies import anywhere, integers, map_sizes, on_pixel, quarters
from .bias_mutants import MUTANTS
from .displacements import LOOKUP_CHECKS, bias_case, bias_strategy, draw_keys, table_shape, worst_index

# Quarter pixels lie off the table's lattice for every convention; on a side of 2 those of CVPR2022 do not.
SLOPE_SIZES = st.sampled_from([(3, 5), (5, 3), (3, 7)])


def typical(setting: Setting) -> Sequence[Case]:
    """Two groups of two heads, two images."""
    points = np.array([0.25, 1.75, 1.25, 0.5, 0.0, 1.0, 1.5, 2.25]).reshape(2, 2, 1, 2)
    return [bias_case(setting, (2, 3), points, "two images, two groups of two heads", heads=4)]


def dyadic_sizes(setting: Setting) -> st.SearchStrategy[Size]:
    """Draw sizes whose pixel centers are whole numbers after normalisation, exactly."""
    sizes = [(3, 5), (5, 3), (2, 5)] if setting.convention.align_corners else [(2, 4), (4, 2), (8, 4)]
    return st.sampled_from(sizes)


def keys_on_pixels(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw a key on a pixel, exactly."""
    return bias_strategy(dyadic_sizes(setting), on_pixel)(setting)


def one_key_per_pixel(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw maps; `integer_gather` puts the keys on the pixels."""
    return bias_strategy(map_sizes(), on_pixel, heads=(2, 1))(setting)


# ------------------------------------------------------------------------------------------------ tests


def gradient_of_points(ctx: CheckContext, case: Case) -> None:
    ctx.compare_gradient("points", integers(0, *ctx.expected(case).shape), case)


def gradient_on_the_lattice(ctx: CheckContext, case: Case) -> None:
    """From the right in the table is from the left in the points."""
    if ctx.setting.convention is Convention.CVPR2022:
        raise Skip("its queries do not sit on pixels")
    cotangent = integers(0, *ctx.expected(case).shape)
    ctx.compare_gradient("points", cotangent, case, one_sided=True, step=-STEP)


def integer_gather(ctx: CheckContext, case: Case) -> None:
    """Without offsets the table is read at whole displacements, as Swin's is."""
    convention = ctx.setting.convention
    if convention not in (Convention.CELL_CENTER, Convention.PAPER):
        raise Skip(f"{convention.name} does not have it: the release mixes two geometries")
    size, table = case.arguments["query_size"], case.arguments["table"]
    zero_offsets = case.with_arrays({"points": reference_points(size, convention).reshape(1, 1, -1, 2)})
    ctx.require_close(ctx.got(zero_offsets), gather_table(table, size)[None], case=zero_offsets)


def gather_table(table: Array, size: Size) -> Array:
    """Return table[head, i - ik + H - 1, j - jk + W - 1] for all queries (i, j) and keys (ik, jk): (heads, HW, HW)."""
    y, x = np.divmod(np.arange(size[0] * size[1]), size[1])
    return np.asarray(table[:, y[:, None] - y + size[0] - 1, x[:, None] - x + size[1] - 1])


def flips(ctx: CheckContext, case: Case) -> None:
    """Mirrored points and a mirrored table give mirrored queries."""
    table, points, size = (case.arguments[name] for name in ("table", "points", "query_size"))
    for axis in range(2):
        sign = np.where(np.arange(2) == axis, -1.0, 1.0)
        mirrored = case.with_arrays({"table": np.flip(table, 1 + axis).copy(), "points": points * sign})
        typical = ctx.got(case)
        by_pixel = typical.reshape(*typical.shape[:2], *size, -1)
        ctx.require_close(ctx.got(mirrored), np.flip(by_pixel, 2 + axis).reshape(typical.shape), case=mirrored)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    points = case.arguments["points"].copy()
    points[0, 0, 0, 1] = np.nan
    with_nan = case.with_arrays({"points": points})
    got = ctx.got(with_nan)
    expected = np.zeros(got.shape, dtype=bool)
    expected[0, : got.shape[1] // points.shape[1], :, 0] = True
    if not (np.isnan(got) == expected).all():
        raise Mismatch("NaN must come out for the heads of its group, and nowhere else", None, got, with_nan)


# ------------------------------------------------------------------------------------------------ checks

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "It returns finite numbers, in the precision of what it is given.",
        "The function cannot be called as the protocol says, or loses precision on the way.", typical, test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and not written to.",
        "It assumes contiguous memory or works in place.", typical, test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "A table (M, 2H - 1, 2W - 1) and points (N, G, K, 2) give (N, M, H·W, K), for any batch, none included.",
        "Axes are exchanged, squeezed, or an empty batch is not thought of.",
        lambda setting: [bias_case(setting, (2, 3), np.zeros((0, 2, 3, 2)), "no images", heads=4)],
        bias_strategy(map_sizes(), anywhere, keys=(1, 4), heads=(1, 2), groups=(1, 3), images=(1, 2)), shape,
    ),
    *(
        Check(each.name, Stage.VALUES, each.property, each.explanation, each.examples, each.strategy, each.test)
        for each in LOOKUP_CHECKS
    ),
    Check(
        "anywhere", Stage.VALUES, "The reference's bias for points anywhere, any heads, groups and images.",
        "A mistake that none of the checks above isolates.", typical,
        bias_strategy(map_sizes(smallest=2), anywhere, keys=(1, 3), heads=(1, 2), groups=(1, 2), images=(1, 2)),
    ),
    Check(
        "gradient_of_the_table", Stage.GRADIENTS, "Each entry gains its weight in every displacement that reads it.",
        "A wrong factor, or pairs, images or heads that are forgotten.", typical,
        bias_strategy(map_sizes(smallest=2, largest=4), anywhere, keys=(2,), heads=(2,), groups=(2,), images=(1, 2)),
        slopes("table"),
    ),
    Check(
        "gradient_of_the_points", Stage.GRADIENTS,
        "A point's gradient is the slope of its biases, summed over queries and heads, in normalised coordinates.",
        "It is missing, which is the gradient that ports forget; or it has a wrong factor or sign: the displacement "
        "falls as the point rises.",
        lambda setting: [bias_case(setting, (3, 5), [(0.25, 1.5), (1.75, 3.25)], "two keys between pixels", seed=1)],
        bias_strategy(SLOPE_SIZES, lambda length: quarters(-0.75, length - 0.25), keys=(1, 2), heads=(1, 2)),
        gradient_of_points,
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "On an entry, where the slope jumps, it is the one to the right and below in the table.",
        "The slope is taken from the other side or from between. Any choice trains; this one is the choice of torch.",
        lambda setting: [bias_case(setting, (3, 5) if setting.convention.align_corners else (4, 2), [(1, 1)],
                                   "a key on a pixel", seed=1)],
        keys_on_pixels, gradient_on_the_lattice,
    ),
    Check(
        "integer_gather", Stage.IDENTITIES,
        "With a key on each pixel the bias is the table's own entries: Swin's gather.",
        "Between whole displacements the table is interpolated where nothing is to be interpolated.",
        lambda setting: [bias_case(setting, (2, 3), [(0, 0)], "a key for each pixel")], one_key_per_pixel,
        integer_gather,
    ),
    Check(
        "flips", Stage.IDENTITIES, "Mirrored points and a mirrored table give the mirrored bias.",
        "Left and right, or top and bottom, are treated differently.", typical,
        bias_strategy(map_sizes(smallest=2), lambda length: quarters(-0.75, length - 0.25), keys=(2,)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A point that is not a number gives NaN to its own heads and key only.",
        "NaN is clamped to the border or skipped, which hides a diverged training run.", typical, test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw queries and keys, and the worst head's table with the places that should be read for the worst query."""
    parts = [draw_keys(case, mismatch, convention)]
    table, points, size = (case.arguments[name] for name in ("table", "points", "query_size"))
    n, head, query = worst_index(mismatch)
    if points.size and table.shape[1:] == table_shape(size) and np.isfinite(points).all():
        group = head * points.shape[1] // len(table)
        index = to_pixels(query_points(size, convention), size, convention).reshape(-1, 2)[query]
        positions = index - to_pixels(points[n, group], size, convention) + np.asarray(size) - 1
        parts.append(f"the table of head {head}, and where it is to be read for query {query}")
        parts.append(draw_map(table[head], positions))
    return "\n".join(parts)


BIAS = OpSpec(
    name="bias",
    title="the relative position bias, a table read at continuous displacements",
    function="table_bias",
    arguments=(
        Argument("table", "MYX", "(2H - 1) × (2W - 1) entries a head", differentiable=True),
        Argument("points", "NGK2", "points (y, x), normalised by the convention", differentiable=True),
        Argument("query_size", "", "(H, W) of the map; its pixels are the queries"),
    ),
    returns="NMQK",
    reference=Implementation(
        "dat_ref.ops.bias:table_bias", table_bias, table_bias_vjp, takes_convention=True, keywords=("query_size",)
    ),
    draw=draw,
    depends_on_convention=True,
    checks=CHECKS,
    mutants=MUTANTS,
)
