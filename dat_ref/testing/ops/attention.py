"""Operation ``attention``: the core, attention over sampled keys with a bias that is read at their positions.

Where the bias is read is seen through attention as in operation ``bias``: dot products are zero, and one key lies so
far away that it has no bias, so that the others' weights tell theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...conventions import Convention
from ...ops.attention import deformable_attention, deformable_attention_vjp
from ...ops.grid import Size, from_pixels
from ..common import leaves_inputs_alone, runs, shape, slopes
from ..context import CheckContext
from ..cost import memory_grows_by_at_most
from ..gradients import STEP
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Setting, Skip, Stage
from ..strategies import anywhere, integers, map_sizes, on_pixel, quarters, seeds
from .attention_mutants import MUTANTS
from .bias import SLOPE_SIZES, dyadic_sizes
from .displacements import LOOKUP_CHECKS, Coordinate, Strategy, bias_case, draw_keys, table_shape

LARGEST_BIAS = 2.0  # where weights still differ visibly
CORNERS = np.s_[:, [0, 0, -1, -1], [0, -1, 0, -1]]

# ------------------------------------------------------------------------------------------------ cases


def via_attention(setting: Setting, case: Case) -> Case:
    """Return a case of operation ``bias`` as one of attention: with a last key that has no bias.

    That key lies far away. The table's corners are zero, so that it has none even where the border is repeated.
    """
    table, points, size = (case.arguments[name] for name in ("table", "points", "query_size"))
    table = table * (LARGEST_BIAS / np.abs(table).max(initial=1))
    table[CORNERS] = 0
    far_point = from_pixels(np.full(2, -3.0 * max(size) - 5), size, setting.convention)
    if points.shape[2] == size[0] * size[1]:
        points = points[:, :, :-1]  # it takes the last key's place where there are as many as queries
    points = np.concatenate([points, np.broadcast_to(far_point, (*points.shape[:2], 1, 2))], axis=2)
    images, _, keys, _ = points.shape
    v = np.zeros((images, len(table), keys, 1))
    v[:, :, :-1, 0] = np.arange(1, keys)
    q, k = np.zeros((images, len(table), size[0] * size[1], 1)), np.zeros_like(v)
    arguments = {"q": q, "k": k, "v": v, "points": points, "bias_table": table, "query_size": size}
    return Case(arguments, case.name)


def core_case(
    setting: Setting, query_size: Size, points_px: Any, name: str = "", *, heads: int = 1, depth: int = 1, seed: int = 1
) -> Case:
    """Return a case with numbers of order one, from a seed."""
    case = bias_case(setting, query_size, points_px, heads=heads, seed=seed)
    points = case.arguments["points"]
    images, _, keys, _ = points.shape
    shapes = [(images, heads, count, depth) for count in (query_size[0] * query_size[1], keys, keys)]
    q, k, v = (integers(seed + 1 + i, *each) / 8 for i, each in enumerate(shapes))
    table = case.arguments["table"] / 8
    return Case({"q": q, "k": k, "v": v, "points": points, "bias_table": table, "query_size": query_size}, name)


@dataclass(frozen=True)
class CoreStrategy:
    """What a strategy draws cores from."""

    coordinate: Coordinate = on_pixel
    keys: Sequence[int] = (3, 1)
    heads: Sequence[int] = (1,)
    groups: Sequence[int] = (1,)
    images: Sequence[int] = (1,)
    depth: Sequence[int] = (1,)
    sizes: st.SearchStrategy[Size] | None = None
    change: Callable[[Case], Case] = lambda case: case

    def __call__(self, setting: Setting) -> st.SearchStrategy[Case]:
        """Return the strategy."""
        return draw_core(setting, self)


@st.composite
def draw_core(draw: st.DrawFn, setting: Setting, options: CoreStrategy) -> Case:
    """Draw a core."""
    size = draw(map_sizes(smallest=2, largest=4) if options.sizes is None else options.sizes)
    shape = [draw(st.sampled_from(counts)) for counts in (options.images, options.groups, options.keys)]
    points = [[draw(options.coordinate(length)) for length in size] for _ in range(int(np.prod(shape)))]
    heads, depth = shape[1] * draw(st.sampled_from(options.heads)), draw(st.sampled_from(options.depth))
    points_px = np.array(points, dtype=np.float64).reshape(*shape, 2)
    return options.change(core_case(setting, size, points_px, heads=heads, depth=depth, seed=1 + draw(seeds)))


def zeroed(*names: str) -> Callable[[Case], Case]:
    """Return what sets some arrays to zero."""
    return lambda case: case.with_arrays({name: np.zeros_like(case.arguments[name]) for name in names})


equal_logits = zeroed("q", "k", "bias_table")
no_bias = zeroed("bias_table")


def uniform_bias(case: Case) -> Case:
    """A table that is constant but for its corners, which a key far away reads at most: it has no bias."""
    table = np.ones_like(case.arguments["bias_table"])
    table[CORNERS] = 0
    q, k, v = (np.zeros_like(case.arguments[name]) for name in "qkv")
    v[:, :, :-1] = 1
    points, size = case.arguments["points"].copy(), case.arguments["query_size"]
    points[:, :, :-1] = 0  # the middle of the map
    points[:, :, -1] = 3.0 * max(size) + 5
    return case.with_arrays({"q": q, "k": k, "v": v, "points": points, "bias_table": table})


def large_logits(case: Case) -> Case:
    """Dot products of hundreds and thousands, whole numbers."""
    return no_bias(case.with_arrays({"q": case.arguments["q"] * 512, "k": np.round(case.arguments["k"] * 8)}))


THREE_KEYS = [(0, 0), (1, 2), (0, 1)]


def typical(setting: Setting) -> Sequence[Case]:
    """Two groups of two heads, two images."""
    points = np.array([0.25, 1.75, 1.25, 0.5, 0.0, 1.0, 1.5, 2.25]).reshape(2, 2, 1, 2)
    points = np.concatenate([points, points[::-1] + 0.5], axis=2)
    return [core_case(setting, (2, 3), points, "two images, two groups of two heads, two keys", heads=4, depth=4)]


def keys_between_pixels(setting: Setting) -> Sequence[Case]:
    """Two groups, keys off the lattice."""
    points = np.array([0.25, 1.5, 1.75, 3.25, 0.5, 2.25, 1.25, 0.75]).reshape(1, 2, 2, 2)
    return [core_case(setting, (3, 5), points, "two groups, two keys between pixels", heads=2, depth=4)]


def keys_on_pixels(setting: Setting) -> Sequence[Case]:
    """Keys on the lattice, exactly."""
    size = (3, 5) if setting.convention.align_corners else (4, 2)
    return [core_case(setting, size, [(1, 1), (0, 1)], "two keys on pixels", depth=2)]


smooth_cores = CoreStrategy(
    lambda length: quarters(-0.75, length - 0.25), (2, 3), (1, 2), (1, 2), depth=(2, 3), sizes=SLOPE_SIZES
)

# ------------------------------------------------------------------------------------------------ tests


def gradient_on_the_lattice(ctx: CheckContext, case: Case) -> None:
    """From the right in the table is from the left in the points."""
    if ctx.setting.convention is Convention.CVPR2022:
        raise Skip("its queries do not sit on pixels")
    cotangent = integers(1, *ctx.expected(case).shape)
    ctx.compare_gradient("points", cotangent, case, one_sided=True, step=-STEP)


def weights_sum_to_one(ctx: CheckContext, case: Case) -> None:
    ones = case.with_arrays({"v": np.ones_like(case.arguments["v"])})
    got = ctx.got(ones)
    ctx.require_close(got, np.ones_like(got), case=ones)


def order_of_keys(ctx: CheckContext, case: Case) -> None:
    reversed_keys = {name: case.arguments[name][:, :, ::-1].copy() for name in ("k", "v", "points")}
    reordered = case.with_arrays(reversed_keys)
    ctx.require_close(ctx.got(reordered), ctx.got(case), case=reordered)


def flips(ctx: CheckContext, case: Case) -> None:
    """Mirrored queries, points and tables give the mirrored result."""
    size = case.arguments["query_size"]

    def mirrored(queries: Array, axis: int) -> Array:
        return np.flip(queries.reshape(*queries.shape[:2], *size, -1), 2 + axis).reshape(queries.shape)

    for axis in range(2):
        points = case.arguments["points"] * np.where(np.arange(2) == axis, -1.0, 1.0)
        table = np.flip(case.arguments["bias_table"], 1 + axis).copy()
        q = mirrored(case.arguments["q"], axis)
        flipped = case.with_arrays({"q": q, "points": points, "bias_table": table})
        ctx.require_close(ctx.got(flipped), mirrored(ctx.got(case), axis), case=flipped)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    points = case.arguments["points"].copy()
    points[0, 0, 0, 1] = np.nan
    with_nan = case.with_arrays({"points": points})
    got = ctx.got(with_nan)
    expected = np.zeros(got.shape, dtype=bool)
    expected[0, : got.shape[1] // points.shape[1]] = True
    if not (np.isnan(got) == expected).all():
        raise Mismatch("NaN must come out for the heads of its group, and nowhere else", None, got, with_nan)


def memory(ctx: CheckContext, case: Case) -> None:
    q, keys = case.arguments["q"], case.arguments["k"].shape[2]
    narrow = case.with_arrays({name: case.arguments[name][..., :1].copy() for name in "qkv"})
    memory_grows_by_at_most(ctx, narrow, case, 8 * (q.shape[2] + keys) * q.shape[3])


# ------------------------------------------------------------------------------------------------ checks


def via_attention_examples(examples: Callable[[Setting], Sequence[Case]]) -> Callable[[Setting], Sequence[Case]]:
    """Return examples of operation ``bias`` as those of attention."""
    return lambda setting: [via_attention(setting, case) for case in examples(setting)]


def via_attention_strategy(strategy: Strategy) -> Strategy:
    """Return a strategy of operation ``bias`` as one of attention."""
    return lambda setting: strategy(setting).map(lambda case: via_attention(setting, case))


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
        "Queries (N, M, H·W, D) and keys (N, M, K, D) give (N, M, H·W, D), for any batch, none included.",
        "Axes are exchanged, squeezed, or an empty batch is not thought of.",
        lambda setting: [core_case(setting, (2, 3), np.zeros((0, 2, 3, 2)), "no images", heads=4, depth=2)],
        CoreStrategy(anywhere, (1, 4), (1, 2), (1, 3), (1, 2), (1, 3), map_sizes()), shape,
    ),
    Check(
        "equal_shares", Stage.VALUES, "Where no logit differs, every key has the same share: the mean of the values.",
        "The weights do not sum to one over the keys: softmax runs along another axis; or keys stand for values.",
        lambda setting: [equal_logits(core_case(setting, (2, 3), THREE_KEYS, "three keys, all logits zero"))],
        CoreStrategy(keys=(3, 1, 2), depth=(1, 3), change=equal_logits),
    ),
    Check(
        "dot_products", Stage.VALUES, "The logits of a head one channel wide are q·k.",
        "Queries and keys are multiplied in another way.",
        lambda setting: [no_bias(core_case(setting, (2, 3), THREE_KEYS, "three keys, an empty table"))],
        CoreStrategy(change=no_bias),
    ),
    Check(
        "scale", Stage.VALUES, "Dot products are divided by the root of the head's width.",
        "The scale is missing, or is another one.",
        lambda setting: [no_bias(core_case(setting, (2, 3), THREE_KEYS, "heads four channels wide", depth=4))],
        CoreStrategy(depth=(4, 2, 3), change=no_bias),
    ),
    Check(
        "bias_is_added", Stage.VALUES, "The bias is added to the logits as it is.",
        "It is subtracted, or scaled with the dot products.",
        lambda setting: [uniform_bias(core_case(setting, (3, 3), THREE_KEYS, "a bias of 1 for all but the last key",
                                                depth=4))],
        CoreStrategy(sizes=st.sampled_from([(3, 3), (5, 5)]), keys=(2, 3), depth=(4, 2), change=uniform_bias),
        lambda ctx, case: ctx.compare(case, np.s_[:, :, [case.arguments["q"].shape[2] // 2]]),
    ),
    *(
        Check(each.name, Stage.VALUES, each.property, each.explanation, via_attention_examples(each.examples),
              via_attention_strategy(each.strategy), each.test)
        for each in LOOKUP_CHECKS
    ),
    Check(
        "large_logits", Stage.VALUES, "Logits of hundreds do not overflow.",
        "The largest logit is not taken off before the exponential.",
        lambda setting: [large_logits(core_case(setting, (2, 3), THREE_KEYS, "logits of hundreds"))],
        CoreStrategy(change=large_logits),
    ),
    Check(
        "anywhere", Stage.VALUES, "The reference's result for any queries, keys, points and tables.",
        "A mistake that none of the checks above isolates.", typical,
        CoreStrategy(anywhere, (1, 3), (1, 2), (1, 2), (1, 2), (1, 3)),
    ),
    Check(
        "gradient_of_the_values", Stage.GRADIENTS, "A value gains the gradient of each query times its weight.",
        "A wrong factor, or queries that are forgotten.", keys_between_pixels, smooth_cores, slopes("v"),
    ),
    Check(
        "gradient_of_the_queries", Stage.GRADIENTS, "The queries' gradient is right.",
        "A wrong factor, the scale most likely; or the softmax's gradient without its mean.", keys_between_pixels,
        smooth_cores, slopes("q"),
    ),
    Check(
        "gradient_of_the_keys", Stage.GRADIENTS, "The keys' gradient is right.",
        "A wrong factor, the scale most likely; or the softmax's gradient without its mean.", keys_between_pixels,
        smooth_cores, slopes("k"),
    ),
    Check(
        "gradient_of_the_table", Stage.GRADIENTS, "Each entry gains from every pair that reads it, in all images.",
        "A wrong factor, or pairs, images or heads that are forgotten.", keys_between_pixels, smooth_cores,
        slopes("bias_table"),
    ),
    Check(
        "gradient_of_the_points", Stage.GRADIENTS,
        "The points get their gradient through the bias, in normalised coordinates.",
        "It is missing, which is the gradient that ports forget; or it has a wrong factor or sign: the displacement "
        "falls as the point rises.", keys_between_pixels, smooth_cores, slopes("points"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "On an entry, where the slope jumps, it is the one to the right and below in the table.",
        "The slope is taken from the other side or from between. Any choice trains; this one is the choice of torch.",
        keys_on_pixels, lambda setting: CoreStrategy(sizes=dyadic_sizes(setting), keys=(1, 2))(setting),
        gradient_on_the_lattice,
    ),
    Check(
        "weights_sum_to_one", Stage.IDENTITIES, "Values of one give one.", "The weights do not sum to one.", typical,
        CoreStrategy(anywhere, (1, 3), (1, 2), (1, 2)), weights_sum_to_one,
    ),
    Check(
        "order_of_keys", Stage.IDENTITIES, "Keys, values and points in another order change nothing.",
        "A key's place among the keys matters, where its position should.", typical,
        CoreStrategy(anywhere, (3, 2), (1, 2), (1, 2)), order_of_keys,
    ),
    Check(
        "flips", Stage.IDENTITIES, "A mirrored map with a mirrored table gives the mirrored result.",
        "Left and right, or top and bottom, are treated differently.", typical,
        CoreStrategy(lambda length: quarters(-0.75, length - 0.25), depth=(1, 2)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A point that is not a number gives NaN to the heads of its group only.",
        "NaN is clamped to the border or skipped, which hides a diverged training run.", typical, test=nan_comes_out,
    ),
    Check(
        "memory", Stage.COST, "A wider head costs memory for its queries, keys and values, not for every pair of them.",
        "Products are kept for each pair and channel before they are summed.",
        lambda setting: [core_case(setting, (6, 8), np.full((1, 1, 40, 2), 2.25), "48 queries, 40 keys, 64 channels",
                                   depth=64)],
        test=memory,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw queries and keys, with the sizes of the rest."""
    table, size = case.arguments["bias_table"], case.arguments["query_size"]
    arguments = ", ".join(f"{name} {case.arguments[name].shape}" for name in ("q", "k", "bias_table"))
    note = "" if table.shape[1:] == table_shape(size) else " (of another size)"
    return f"{arguments}{note}\n{draw_keys(case, mismatch, convention)}"


ATTENTION = OpSpec(
    name="attention",
    title="the core: attention over sampled keys, with a bias read at their positions",
    function="deformable_attention",
    arguments=(
        Argument("q", "NMQD", "queries, one a pixel", differentiable=True),
        Argument("k", "NMKD", "keys", differentiable=True),
        Argument("v", "NMKD", "values", differentiable=True),
        Argument("points", "NGK2", "where the keys are (y, x), normalised by the convention", differentiable=True),
        Argument("bias_table", "MYX", "(2H - 1) × (2W - 1) entries a head", differentiable=True),
        Argument("query_size", "", "(H, W) of the map; its pixels are the queries"),
    ),
    returns="NMQD",
    reference=Implementation(
        "dat_ref.ops.attention:deformable_attention",
        deformable_attention,
        deformable_attention_vjp,
        takes_convention=True,
        keywords=("query_size",),
    ),
    draw=draw,
    depends_on_convention=True,
    checks=CHECKS,
    mutants=MUTANTS,
)
