"""Operation ``attention``: attention over sampled keys with a relative position bias looked up at their positions.

The checks of the bias lookup are those of operation ``bias``. To observe the bias through attention, the dot products
are zero, and one far key has zero bias: the weights of the other keys then determine their biases.
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

LARGEST_BIAS = 2.0  # small enough that no attention weight vanishes
CORNERS = np.s_[:, [0, 0, -1, -1], [0, -1, 0, -1]]

# ------------------------------------------------------------------------------------------------ cases


def via_attention(setting: Setting, case: Case) -> Case:
    """Convert a case of operation ``bias`` to a case of ``attention``, with an added last key that has zero bias.

    The added key is far away. The corners of the table are zero, so its bias is zero even if the border is replicated.
    """
    table, points, size = (case.arguments[name] for name in ("table", "points", "query_size"))
    table = table * (LARGEST_BIAS / np.abs(table).max(initial=1))
    table[CORNERS] = 0
    far_point = from_pixels(np.full(2, -3.0 * max(size) - 5), size, setting.convention)
    if points.shape[2] == size[0] * size[1]:
        points = points[:, :, :-1]  # the far key replaces the last key: as many keys as queries in this case
    points = np.concatenate([points, np.broadcast_to(far_point, (*points.shape[:2], 1, 2))], axis=2)
    images, _, keys, _ = points.shape
    v = np.zeros((images, len(table), keys, 1))
    v[:, :, :-1, 0] = np.arange(1, keys)
    q, k = np.zeros((images, len(table), size[0] * size[1], 1)), np.zeros_like(v)
    arguments = {"q": q, "k": k, "v": v, "points": points, "bias_table": table, "query_size": size}
    return Case(arguments, case.name)


def attention_case(
    setting: Setting, query_size: Size, points_px: Any, name: str = "", *, heads: int = 1, depth: int = 1, seed: int = 1
) -> Case:
    """Return a case with values of order one, drawn from a seed."""
    case = bias_case(setting, query_size, points_px, heads=heads, seed=seed)
    points = case.arguments["points"]
    images, _, keys, _ = points.shape
    shapes = [(images, heads, count, depth) for count in (query_size[0] * query_size[1], keys, keys)]
    q, k, v = (integers(seed + 1 + i, *each) / 8 for i, each in enumerate(shapes))
    table = case.arguments["table"] / 8
    return Case({"q": q, "k": k, "v": v, "points": points, "bias_table": table, "query_size": query_size}, name)


@dataclass(frozen=True)
class AttentionStrategy:
    """Strategy of a check: the distributions that `draw_attention` draws a case from.

    Args:
        coordinate: axis length -> strategy for a point's coordinate, in pixels.
        keys, heads, groups, images, depth: possible numbers; `heads` per group, `depth` channels per head.
        sizes: strategy for (H, W); None for non-square maps with sides 2 … 4.
        change: function applied to each case.
    """

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
        return draw_attention(setting, self)


@st.composite
def draw_attention(draw: st.DrawFn, setting: Setting, options: AttentionStrategy) -> Case:
    """Draw a case of ``attention``."""
    size = draw(map_sizes(smallest=2, largest=4) if options.sizes is None else options.sizes)
    shape = [draw(st.sampled_from(counts)) for counts in (options.images, options.groups, options.keys)]
    points = [[draw(options.coordinate(length)) for length in size] for _ in range(int(np.prod(shape)))]
    heads, depth = shape[1] * draw(st.sampled_from(options.heads)), draw(st.sampled_from(options.depth))
    points_px = np.array(points, dtype=np.float64).reshape(*shape, 2)
    return options.change(attention_case(setting, size, points_px, heads=heads, depth=depth, seed=1 + draw(seeds)))


def zeroed(*names: str) -> Callable[[Case], Case]:
    """Return a function that sets some arrays of a case to zero."""
    return lambda case: case.with_arrays({name: np.zeros_like(case.arguments[name]) for name in names})


equal_logits = zeroed("q", "k", "bias_table")
no_bias = zeroed("bias_table")


def uniform_bias(case: Case) -> Case:
    """Change a case to a table of ones with zero corners: all keys but a far one have a bias of 1."""
    table = np.ones_like(case.arguments["bias_table"])
    table[CORNERS] = 0
    q, k, v = (np.zeros_like(case.arguments[name]) for name in "qkv")
    v[:, :, :-1] = 1
    points, size = case.arguments["points"].copy(), case.arguments["query_size"]
    points[:, :, :-1] = 0  # the center of the map
    points[:, :, -1] = 3.0 * max(size) + 5
    return case.with_arrays({"q": q, "k": k, "v": v, "points": points, "bias_table": table})


def large_logits(case: Case) -> Case:
    """Change a case to integer dot products in the hundreds and thousands, without bias."""
    return no_bias(case.with_arrays({"q": case.arguments["q"] * 512, "k": np.round(case.arguments["k"] * 8)}))


THREE_KEYS = [(0, 0), (1, 2), (0, 1)]


def typical(setting: Setting) -> Sequence[Case]:
    """Return a case with two groups of two heads and two images."""
    points = np.array([0.25, 1.75, 1.25, 0.5, 0.0, 1.0, 1.5, 2.25]).reshape(2, 2, 1, 2)
    points = np.concatenate([points, points[::-1] + 0.5], axis=2)
    return [attention_case(setting, (2, 3), points, "two images, two groups of two heads, two keys", heads=4, depth=4)]


def keys_between_pixels(setting: Setting) -> Sequence[Case]:
    """Return a case with two groups and keys between pixel centers."""
    points = np.array([0.25, 1.5, 1.75, 3.25, 0.5, 2.25, 1.25, 0.75]).reshape(1, 2, 2, 2)
    return [attention_case(setting, (3, 5), points, "two groups, two keys between pixels", heads=2, depth=4)]


def keys_on_pixels(setting: Setting) -> Sequence[Case]:
    """Return a case with keys exactly on pixel centers."""
    size = (3, 5) if setting.convention.align_corners else (4, 2)
    return [attention_case(setting, size, [(1, 1), (0, 1)], "two keys on pixels", depth=2)]


smooth_cases = AttentionStrategy(
    lambda length: quarters(-0.75, length - 0.25), (2, 3), (1, 2), (1, 2), depth=(2, 3), sizes=SLOPE_SIZES
)

# ------------------------------------------------------------------------------------------------ tests


def gradient_on_the_lattice(ctx: CheckContext, case: Case) -> None:
    """Compare one-sided derivatives; a step to the right in the table is a step to the left of the point."""
    if ctx.setting.convention is Convention.CVPR2022:
        raise Skip("queries of CVPR2022 are not on pixel centers")
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
    """Require that flipped queries, points and tables give the flipped result."""
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
        raise Mismatch("expected NaN in the heads of the point's group, and nowhere else", None, got, with_nan)


def memory(ctx: CheckContext, case: Case) -> None:
    q, keys = case.arguments["q"], case.arguments["k"].shape[2]
    narrow = case.with_arrays({name: case.arguments[name][..., :1].copy() for name in "qkv"})
    memory_grows_by_at_most(ctx, narrow, case, 8 * (q.shape[2] + keys) * q.shape[3])


# ------------------------------------------------------------------------------------------------ checks


def via_attention_examples(examples: Callable[[Setting], Sequence[Case]]) -> Callable[[Setting], Sequence[Case]]:
    """Convert the examples of a check of ``bias`` to ``attention``."""
    return lambda setting: [via_attention(setting, case) for case in examples(setting)]


def via_attention_strategy(strategy: Strategy) -> Strategy:
    """Convert the strategy of a check of ``bias`` to ``attention``."""
    return lambda setting: strategy(setting).map(lambda case: via_attention(setting, case))


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
        "Queries (N, M, H·W, D) and keys (N, M, K, D) give a result (N, M, H·W, D); N may be 0.",
        "Axes are swapped or squeezed, or an empty batch is not handled.",
        lambda setting: [attention_case(setting, (2, 3), np.zeros((0, 2, 3, 2)), "no images", heads=4, depth=2)],
        AttentionStrategy(anywhere, (1, 4), (1, 2), (1, 3), (1, 2), (1, 3), map_sizes()), shape,
    ),
    Check(
        "equal_shares", Stage.VALUES, "If all logits are equal, the result is the mean of the values.",
        "Softmax runs along another axis, so weights do not sum to one over the keys, or keys and values are swapped.",
        lambda setting: [equal_logits(attention_case(setting, (2, 3), THREE_KEYS, "three keys, all logits zero"))],
        AttentionStrategy(keys=(3, 1, 2), depth=(1, 3), change=equal_logits),
    ),
    Check(
        "dot_products", Stage.VALUES, "In a head with one channel, the logits are the products q·k.",
        "Queries and keys are multiplied in another way.",
        lambda setting: [no_bias(attention_case(setting, (2, 3), THREE_KEYS, "three keys, a table of zeros"))],
        AttentionStrategy(change=no_bias),
    ),
    Check(
        "scale", Stage.VALUES, "Dot products are divided by √d, where d is the number of channels per head.",
        "The scale is missing or wrong.",
        lambda setting: [no_bias(attention_case(setting, (2, 3), THREE_KEYS, "four channels per head", depth=4))],
        AttentionStrategy(depth=(4, 2, 3), change=no_bias),
    ),
    Check(
        "bias_is_added", Stage.VALUES, "The bias is added to the scaled dot products.",
        "The bias is subtracted, or it is multiplied by the scale too.",
        lambda setting: [
            uniform_bias(attention_case(setting, (3, 3), THREE_KEYS, "a bias of 1 for all but the last key", depth=4))
        ],
        AttentionStrategy(sizes=st.sampled_from([(3, 3), (5, 5)]), keys=(2, 3), depth=(4, 2), change=uniform_bias),
        lambda ctx, case: ctx.compare(case, np.s_[:, :, [case.arguments["q"].shape[2] // 2]]),
    ),
    *(
        Check(each.name, Stage.VALUES, each.property, each.explanation, via_attention_examples(each.examples),
              via_attention_strategy(each.strategy), each.test)
        for each in LOOKUP_CHECKS
    ),
    Check(
        "large_logits", Stage.VALUES, "Logits in the hundreds do not overflow.",
        "The maximum logit is not subtracted before the exponential.",
        lambda setting: [large_logits(attention_case(setting, (2, 3), THREE_KEYS, "logits in the hundreds"))],
        AttentionStrategy(change=large_logits),
    ),
    Check(
        "anywhere", Stage.VALUES, "The result equals the reference for any queries, keys, points and tables.",
        "A mistake that no earlier check isolates.", typical,
        AttentionStrategy(anywhere, (1, 3), (1, 2), (1, 2), (1, 2), (1, 3)),
    ),
    Check(
        "gradient_of_the_values", Stage.GRADIENTS,
        "The gradient of a value is the sum over the queries of attention weight times output gradient.",
        "A factor is wrong, or queries are missing.", keys_between_pixels, smooth_cases, slopes("v"),
    ),
    Check(
        "gradient_of_the_queries", Stage.GRADIENTS, "The gradient of the queries agrees with finite differences.",
        "A factor is wrong, most likely the scale, or the softmax gradient lacks the subtracted weighted mean.",
        keys_between_pixels, smooth_cases, slopes("q"),
    ),
    Check(
        "gradient_of_the_keys", Stage.GRADIENTS, "The gradient of the keys agrees with finite differences.",
        "A factor is wrong, most likely the scale, or the softmax gradient lacks the subtracted weighted mean.",
        keys_between_pixels, smooth_cases, slopes("k"),
    ),
    Check(
        "gradient_of_the_table", Stage.GRADIENTS,
        "The gradient of an entry is summed over all images and all query-key pairs that read it.",
        "A factor is wrong, or pairs, images or heads are missing.", keys_between_pixels, smooth_cases,
        slopes("bias_table"),
    ),
    Check(
        "gradient_of_the_points", Stage.GRADIENTS,
        "The points receive a gradient through the bias lookup, in normalized coordinates.",
        "The gradient is missing (ports often omit it), or its factor or sign is wrong. The displacement is query "
        "minus point.", keys_between_pixels, smooth_cases, slopes("points"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "At a table entry, where the derivative jumps, the gradient uses the derivative to the right and below.",
        "The derivative is taken from the other side, or averaged over both. Training works with any choice; PyTorch "
        "uses this one.",
        keys_on_pixels, lambda setting: AttentionStrategy(sizes=dyadic_sizes(setting), keys=(1, 2))(setting),
        gradient_on_the_lattice,
    ),
    Check(
        "weights_sum_to_one", Stage.IDENTITIES, "If all values are one, the result is one.",
        "The attention weights do not sum to one over the keys.", typical,
        AttentionStrategy(anywhere, (1, 3), (1, 2), (1, 2)), weights_sum_to_one,
    ),
    Check(
        "order_of_keys", Stage.IDENTITIES, "The result does not depend on the order of the keys.",
        "The bias depends on the index of a key instead of its position.", typical,
        AttentionStrategy(anywhere, (3, 2), (1, 2), (1, 2)), order_of_keys,
    ),
    Check(
        "flips", Stage.IDENTITIES, "Flipped queries, points and tables give the flipped result.",
        "Left and right, or top and bottom, are treated differently.", typical,
        AttentionStrategy(lambda length: quarters(-0.75, length - 0.25), depth=(1, 2)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A NaN in a point gives NaN in the heads of its group, and nowhere else.",
        "NaN is clamped to the border or ignored, which hides a diverged training run.", typical, test=nan_comes_out,
    ),
    Check(
        "memory", Stage.COST, "Memory per channel grows with queries plus keys, not with queries times keys.",
        "Products of queries and keys are stored for every channel before they are summed.",
        lambda setting: [
            attention_case(setting, (6, 8), np.full((1, 1, 40, 2), 2.25), "48 queries, 40 keys, 64 channels", depth=64)
        ],
        test=memory,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw the queries and the keys, and list the shapes of the other arguments."""
    table, size = case.arguments["bias_table"], case.arguments["query_size"]
    arguments = ", ".join(f"{name} {case.arguments[name].shape}" for name in ("q", "k", "bias_table"))
    note = "" if table.shape[1:] == table_shape(size) else " (size of another map)"
    return f"{arguments}{note}\n{draw_keys(case, mismatch, convention)}"


ATTENTION = OpSpec(
    name="attention",
    title="attention over sampled keys, with a relative position bias looked up at their positions",
    function="deformable_attention",
    arguments=(
        Argument("q", "NMQD", "queries, one per pixel", differentiable=True),
        Argument("k", "NMKD", "keys", differentiable=True),
        Argument("v", "NMKD", "values", differentiable=True),
        Argument("points", "NGK2", "positions (y, x) of the keys in the convention's coordinates", differentiable=True),
        Argument("bias_table", "MYX", "(2H - 1) × (2W - 1) entries per head", differentiable=True),
        Argument("query_size", "", "(H, W) of the map, with one query per pixel"),
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
