"""Operation ``bias``: relative position bias from a table interpolated at continuous displacements."""

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

# Points at quarter pixels are never on table entries in any convention; with a side of 2, they are in CVPR2022.
SLOPE_SIZES = st.sampled_from([(3, 5), (5, 3), (3, 7)])


def typical(setting: Setting) -> Sequence[Case]:
    """Return a case with two groups of two heads and two images."""
    points = np.array([0.25, 1.75, 1.25, 0.5, 0.0, 1.0, 1.5, 2.25]).reshape(2, 2, 1, 2)
    return [bias_case(setting, (2, 3), points, "two images, two groups of two heads", heads=4)]


def dyadic_sizes(setting: Setting) -> st.SearchStrategy[Size]:
    """Draw map sizes for which normalized pixel centers are exact in floating point."""
    sizes = [(3, 5), (5, 3), (2, 5)] if setting.convention.align_corners else [(2, 4), (4, 2), (8, 4)]
    return st.sampled_from(sizes)


def keys_on_pixels(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw a key exactly on a pixel center."""
    return bias_strategy(dyadic_sizes(setting), on_pixel)(setting)


def one_key_per_pixel(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw map sizes; `integer_gather` places one key on each pixel."""
    return bias_strategy(map_sizes(), on_pixel, heads=(2, 1))(setting)


# ------------------------------------------------------------------------------------------------ tests


def gradient_of_points(ctx: CheckContext, case: Case) -> None:
    ctx.compare_gradient("points", integers(0, *ctx.expected(case).shape), case)


def gradient_on_the_lattice(ctx: CheckContext, case: Case) -> None:
    """Compare one-sided derivatives; a step to the right in the table is a step to the left of the point."""
    if ctx.setting.convention is Convention.CVPR2022:
        raise Skip("queries of CVPR2022 are not on pixel centers")
    cotangent = integers(0, *ctx.expected(case).shape)
    ctx.compare_gradient("points", cotangent, case, one_sided=True, step=-STEP)


def integer_gather(ctx: CheckContext, case: Case) -> None:
    """Require that zero offsets give integer displacements, and so table entries, as in Swin."""
    convention = ctx.setting.convention
    if convention not in (Convention.CELL_CENTER, Convention.PAPER):
        raise Skip(f"not true for {convention.name}, because the release mixes two geometries")
    size, table = case.arguments["query_size"], case.arguments["table"]
    zero_offsets = case.with_arrays({"points": reference_points(size, convention).reshape(1, 1, -1, 2)})
    ctx.require_close(ctx.got(zero_offsets), gather_table(table, size)[None], case=zero_offsets)


def gather_table(table: Array, size: Size) -> Array:
    """Return table[head, i - ik + H - 1, j - jk + W - 1] for all queries (i, j) and keys (ik, jk): (heads, HW, HW)."""
    y, x = np.divmod(np.arange(size[0] * size[1]), size[1])
    return np.asarray(table[:, y[:, None] - y + size[0] - 1, x[:, None] - x + size[1] - 1])


def flips(ctx: CheckContext, case: Case) -> None:
    """Require that flipped points and a flipped table give the flipped bias."""
    table, points, size = (case.arguments[name] for name in ("table", "points", "query_size"))
    for axis in range(2):
        sign = np.where(np.arange(2) == axis, -1.0, 1.0)
        mirrored = case.with_arrays({"table": np.flip(table, 1 + axis).copy(), "points": points * sign})
        result = ctx.got(case)
        by_pixel = result.reshape(*result.shape[:2], *size, -1)
        ctx.require_close(ctx.got(mirrored), np.flip(by_pixel, 2 + axis).reshape(result.shape), case=mirrored)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    points = case.arguments["points"].copy()
    points[0, 0, 0, 1] = np.nan
    with_nan = case.with_arrays({"points": points})
    got = ctx.got(with_nan)
    expected = np.zeros(got.shape, dtype=bool)
    expected[0, : got.shape[1] // points.shape[1], :, 0] = True
    if not (np.isnan(got) == expected).all():
        raise Mismatch("expected NaN for the key in the heads of its group, and nowhere else", None, got, with_nan)


# ------------------------------------------------------------------------------------------------ checks

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "The result is finite and has the dtype of the inputs.",
        "The function raised an error, returned another dtype, or returned NaN or infinity.", typical, test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and inputs are not modified.",
        "The function assumes contiguous memory, writes to its inputs, or is not deterministic.", typical,
        test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "A table (M, 2H - 1, 2W - 1) and points (N, G, K, 2) give a bias (N, M, H·W, K); N may be 0.",
        "Axes are swapped or squeezed, or an empty batch is not handled.",
        lambda setting: [bias_case(setting, (2, 3), np.zeros((0, 2, 3, 2)), "no images", heads=4)],
        bias_strategy(map_sizes(), anywhere, keys=(1, 4), heads=(1, 2), groups=(1, 3), images=(1, 2)), shape,
    ),
    *(
        Check(each.name, Stage.VALUES, each.property, each.explanation, each.examples, each.strategy, each.test)
        for each in LOOKUP_CHECKS
    ),
    Check(
        "anywhere", Stage.VALUES, "The bias equals the reference for any points, heads, groups and images.",
        "A mistake that no earlier check isolates.", typical,
        bias_strategy(map_sizes(smallest=2), anywhere, keys=(1, 3), heads=(1, 2), groups=(1, 2), images=(1, 2)),
    ),
    Check(
        "gradient_of_the_table", Stage.GRADIENTS,
        "The gradient of an entry is summed over all images and all query-key pairs that read it.",
        "A factor is wrong, or pairs, images or heads are missing.", typical,
        bias_strategy(map_sizes(smallest=2, largest=4), anywhere, keys=(2,), heads=(2,), groups=(2,), images=(1, 2)),
        slopes("table"),
    ),
    Check(
        "gradient_of_the_points", Stage.GRADIENTS,
        "The gradient of a point is the derivative of its biases, summed over queries and heads, in normalized "
        "coordinates.",
        "The gradient is missing (ports often omit it), or its factor or sign is wrong. The displacement is query "
        "minus point.",
        lambda setting: [bias_case(setting, (3, 5), [(0.25, 1.5), (1.75, 3.25)], "two keys between pixels", seed=1)],
        bias_strategy(SLOPE_SIZES, lambda length: quarters(-0.75, length - 0.25), keys=(1, 2), heads=(1, 2)),
        gradient_of_points,
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "At a table entry, where the derivative jumps, the gradient uses the derivative to the right and below.",
        "The derivative is taken from the other side, or averaged over both. Training works with any choice; PyTorch "
        "uses this one.",
        lambda setting: [bias_case(setting, (3, 5) if setting.convention.align_corners else (4, 2), [(1, 1)],
                                   "a key on a pixel", seed=1)],
        keys_on_pixels, gradient_on_the_lattice,
    ),
    Check(
        "integer_gather", Stage.IDENTITIES,
        "With one key on each pixel, the bias is a gather of table entries, as in Swin.",
        "Displacements between pixel centers are not integers, so entries are interpolated.",
        lambda setting: [bias_case(setting, (2, 3), [(0, 0)], "one key per pixel")], one_key_per_pixel,
        integer_gather,
    ),
    Check(
        "flips", Stage.IDENTITIES, "Flipped points and a flipped table give the flipped bias.",
        "Left and right, or top and bottom, are treated differently.", typical,
        bias_strategy(map_sizes(smallest=2), lambda length: quarters(-0.75, length - 0.25), keys=(2,)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES,
        "A NaN in a point gives NaN for this key in the heads of its group, and nowhere else.",
        "NaN is clamped to the border or ignored, which hides a diverged training run.", typical, test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw queries and keys, and the table of the head with the largest error with its lookup positions."""
    parts = [draw_keys(case, mismatch, convention)]
    table, points, size = (case.arguments[name] for name in ("table", "points", "query_size"))
    n, head, query = worst_index(mismatch)
    if points.size and table.shape[1:] == table_shape(size) and np.isfinite(points).all():
        group = head * points.shape[1] // len(table)
        index = to_pixels(query_points(size, convention), size, convention).reshape(-1, 2)[query]
        positions = index - to_pixels(points[n, group], size, convention) + np.asarray(size) - 1
        parts.append(f"table of head {head}, with the correct lookup positions for query {query}")
        parts.append(draw_map(table[head], positions))
    return "\n".join(parts)


BIAS = OpSpec(
    name="bias",
    title="relative position bias from a table interpolated at continuous displacements",
    function="table_bias",
    arguments=(
        Argument("table", "MYX", "(2H - 1) × (2W - 1) entries per head", differentiable=True),
        Argument("points", "NGK2", "positions (y, x) of the keys in the convention's coordinates", differentiable=True),
        Argument("query_size", "", "(H, W) of the map, with one query per pixel"),
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
