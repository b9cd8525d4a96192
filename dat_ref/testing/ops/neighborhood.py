"""Operation ``neighborhood``: attention of each query to the K × K keys around it, with a relative position bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...ops.attention import attend, attend_vjp
from ...ops.basic import scatter_add, softmax
from ...ops.grid import Size
from ...peers.neighborhood import axis_neighbors, neighbor_index, scatter_neighbors
from ..common import leaves_inputs_alone, runs, shape, slopes
from ..context import CheckContext
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Setting, Stage
from ..strategies import integers, map_sizes, seeds, square_sizes
from .neighborhood_mutants import MUTANTS

# ------------------------------------------------------------------------------------------------ the reference


def attend_neighborhood(
    q: Array, k: Array, v: Array, bias_table: Array, query_size: Size, kernel_size: int, dilation: int
) -> Array:
    """Return softmax(q kᵀ/√d + B̂) v over each query's neighborhood, as in `dat_ref.peers.neighborhood`.

    Args:
        q, k, v: (N, M, H·W, d), row by row.
        bias_table: (M, 2K - 1, 2K - 1); the center belongs to zero displacement.
        query_size: (H, W).
        kernel_size: K, odd.
        dilation: distance in pixels between neighbors.

    Returns:
        (N, M, H·W, d).
    """
    return _attended(q, k, v, bias_table, query_size, kernel_size, dilation)[0][:, :, :, 0]


def _attended(
    q: Array, k: Array, v: Array, bias_table: Array, query_size: Size, kernel_size: int, dilation: int
) -> tuple[Array, Array]:
    neighbors, table_index = neighbor_index(query_size, kernel_size, dilation)
    bias = bias_table.reshape(len(bias_table), -1)[:, table_index][:, :, None]  # (M, H·W, 1, K²)
    return attend(q[:, :, :, None], k[:, :, neighbors], v[:, :, neighbors], bias, q.shape[-1] ** -0.5)


def attend_neighborhood_vjp(
    cotangent: Array, q: Array, k: Array, v: Array, bias_table: Array, query_size: Size, kernel_size: int, dilation: int
) -> dict[str, Array]:
    """Return the gradients of `attend_neighborhood`."""
    neighbors, table_index = neighbor_index(query_size, kernel_size, dilation)
    _, weights = _attended(q, k, v, bias_table, query_size, kernel_size, dilation)
    near = k[:, :, neighbors], v[:, :, neighbors]
    grads = attend_vjp(cotangent[:, :, :, None], q[:, :, :, None], *near, weights, q.shape[-1] ** -0.5)
    grad_pairs = grads.bias.sum(axis=0).reshape(len(bias_table), -1)  # (M, H·W·K²)
    grad_table = scatter_add(grad_pairs.T, table_index.ravel(), bias_table[0].size).T.reshape(bias_table.shape)
    return {
        "q": grads.q[:, :, :, 0],
        "k": scatter_neighbors(grads.k, neighbors),
        "v": scatter_neighbors(grads.v, neighbors),
        "bias_table": grad_table,
    }


# ------------------------------------------------------------------------------------------------ cases


def window_case(
    size: Size,
    kernel: int,
    *,
    dilation: int = 1,
    images: int = 1,
    heads: int = 1,
    depth: int = 1,
    random_scores: bool = False,
    table: str = "none",
    seed: int = 0,
    name: str = "",
) -> Case:
    """Return a case.

    Args:
        size: (H, W).
        kernel: K.
        dilation: distance in pixels between neighbors.
        images, heads, depth: N, M and d.
        random_scores: whether queries and keys are random; otherwise queries are zero, and keys equal values.
        table: ``"none"`` (zeros), ``"symmetric"`` (equal to its transpose), or ``"any"``.
        seed: seed of the elements; values are 1, 2, 3 … for 0.
        name: name of the case.
    """
    shape = (images, heads, size[0] * size[1], depth)
    rng = np.random.default_rng(seed)
    v = integers(seed, *shape)
    q, k = (rng.integers(-4, 5, shape) / 4 if random_scores else None for _ in range(2))
    side = 2 * kernel - 1
    entries = rng.integers(-8, 9, (heads, side, side)) / 4 if table != "none" else np.zeros((heads, side, side))
    if table == "symmetric":
        entries = np.triu(entries) + np.triu(entries, 1).swapaxes(1, 2)
    return Case(
        {
            "q": np.zeros(shape) if q is None else q,
            "k": v.copy() if k is None else k,
            "v": v,
            "bias_table": entries,
            "query_size": size,
            "kernel_size": kernel,
            "dilation": dilation,
        },
        name,
    )


@st.composite
def draw_window_case(
    draw: st.DrawFn, sizes: st.SearchStrategy[Size], kernels: Sequence[int], kernel_fits: bool, options: Any
) -> Case:
    """Draw a map and a kernel. With `kernel_fits` each sub-map is at least as large as the kernel."""
    drawn_options = {
        name: draw(each) if isinstance(each, st.SearchStrategy) else each for name, each in options.items()
    }
    kernel, (height, width) = draw(st.sampled_from(kernels)), draw(sizes)
    if kernel_fits:
        extra = kernel * drawn_options.get("dilation", 1) - 1
        height, width = height + extra, width + extra
    return window_case((height, width), kernel, seed=draw(seeds), **drawn_options)


def window_strategy(
    sizes: st.SearchStrategy[Size], kernels: Sequence[int] = (3, 5), *, kernel_fits: bool = True, **options: Any
) -> Callable[[Setting], st.SearchStrategy[Case]]:
    """Return the strategy of a check. An option may be a strategy. With `kernel_fits`, sizes are added to K·δ - 1."""
    return lambda setting: draw_window_case(sizes, kernels, kernel_fits, options)


SQUARES = square_sizes(smallest=1, largest=4)
UNEQUAL = map_sizes(largest=4)
SMALL_MAPS = st.sampled_from([(2, 5), (5, 2), (1, 4), (2, 1), (3, 2)])

# ------------------------------------------------------------------------------------------------ tests


def compare_inside(ctx: CheckContext, case: Case) -> None:
    """Compare the queries whose window is not clamped at the border."""
    radius = case.arguments["kernel_size"] // 2
    height, width = case.arguments["query_size"]
    rows, columns = np.arange(radius, height - radius), np.arange(radius, width - radius)
    ctx.compare(case, np.s_[:, :, (rows[:, None] * width + columns).ravel()])


def means_of_ones(ctx: CheckContext, case: Case) -> None:
    ones = case.with_arrays({"v": np.ones_like(case.arguments["v"])})
    got = ctx.got(ones)
    ctx.require_close(got, np.ones_like(got), case=ones)


def constant_bias(ctx: CheckContext, case: Case) -> None:
    shifted = case.with_arrays({"bias_table": case.arguments["bias_table"] + 3.0})
    ctx.require_close(ctx.got(shifted), ctx.got(case), case=shifted)


def whole_map(ctx: CheckContext, case: Case) -> None:
    """Require plain attention with the bias of each displacement if the window covers the whole map."""
    q, k, v, table = (ctx.cast(case, np.float64).arguments[name] for name in ("q", "k", "v", "bias_table"))
    height, width = case.arguments["query_size"]
    center = case.arguments["kernel_size"] - 1
    y, x = np.divmod(np.arange(height * width), width)
    bias = table[:, y - y[:, None] + center, x - x[:, None] + center]  # [query, key]: key minus query
    weights = softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3]) + bias)
    ctx.require_close(ctx.got(case), weights @ v)


def flips(ctx: CheckContext, case: Case) -> None:
    """Require that flipped maps and a flipped table give the flipped result."""
    size = case.arguments["query_size"]

    def mirrored(tokens: Array, axis: int) -> Array:
        return np.flip(tokens.reshape(*tokens.shape[:2], *size, -1), 2 + axis).reshape(tokens.shape)

    for axis in range(2):
        tokens = {name: mirrored(case.arguments[name], axis) for name in ("q", "k", "v")}
        table = np.flip(case.arguments["bias_table"], 1 + axis).copy()
        flipped = case.with_arrays({**tokens, "bias_table": table})
        ctx.require_close(ctx.got(flipped), mirrored(ctx.got(case), axis), case=flipped)


# ------------------------------------------------------------------------------------------------ checks

TYPICAL = window_case(
    (5, 7), 3, images=2, heads=2, depth=3, random_scores=True, table="any", seed=1, name="5 × 7 queries"
)
DILATED = window_case(
    (7, 8), 3, dilation=2, heads=2, depth=3, random_scores=True, table="any", seed=2, name="with dilation"
)

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "The result is finite and has the dtype of the inputs.",
        "The function raised an error, returned another dtype, or returned NaN or infinity.", [TYPICAL, DILATED],
        test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and inputs are not modified.",
        "The function assumes contiguous memory, writes to its inputs, or is not deterministic.", [TYPICAL],
        test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES, "Tokens (N, M, H·W, D) give (N, M, H·W, D); N may be 0.",
        "Axes are swapped or squeezed, or an empty batch is not handled.",
        [window_case((3, 5), 3, images=0, heads=2, depth=3, name="no images")],
        window_strategy(UNEQUAL, images=st.integers(0, 2), heads=st.integers(1, 3), depth=st.integers(1, 3)), shape,
    ),
    Check(
        "inside", Stage.VALUES, "Away from the border, a query attends to the K × K keys around it.",
        "Windows are not centered on their queries, or have another size.",
        [window_case((5, 5), 3, name="equal weights: the mean of 3 × 3 values")], window_strategy(SQUARES),
        compare_inside,
    ),
    Check(
        "at_the_border", Stage.VALUES,
        "At the border, the window is shifted inward: each query has K × K keys inside the map.",
        "Windows are truncated, or extend over the border, so that queries attend to zeros, or to replicated or "
        "wrapped "
        "pixels.",
        [window_case((4, 4), 3, name="equal weights: the mean of 3 × 3 values")], window_strategy(SQUARES),
    ),
    Check(
        "not_square", Stage.VALUES, "On a non-square map, windows are clamped to the length of each axis.",
        "One axis is clamped to the length of the other, or the height is used as the length of a row. Square maps "
        "hide "
        "these mistakes.",
        [window_case((3, 5), 3, name="3 × 5 queries"), window_case((6, 4), 3, name="6 × 4 queries")],
        window_strategy(UNEQUAL),
    ),
    Check(
        "dilation", Stage.VALUES,
        "With dilation δ, a query attends to every δ-th pixel, in its own sub-map, also at the border.",
        "The dilation is ignored, or windows at the border leave the sub-map or miss its last pixels.",
        [window_case((7, 8), 3, dilation=2, name="every second of 7 × 8"),
         window_case((10, 9), 3, dilation=3, seed=1, name="every third of 10 × 9")],
        window_strategy(UNEQUAL, (3,), dilation=st.sampled_from([2, 3])),
    ),
    Check(
        "small_map", Stage.VALUES, "On an axis shorter than K, a query attends to all pixels.",
        "The map is padded, and queries attend to the padding, as in the released DAT++. If this is intended, list "
        "this "
        "check, bias_small_map and whole_map as expected failures.",
        [window_case((2, 4), 3, name="2 rows, a window of 3"), window_case((3, 4), 5, name="a window of 5")],
        window_strategy(SMALL_MAPS, kernel_fits=False),
    ),
    Check(
        "scores", Stage.VALUES, "The attention weights are softmax(q · k/√d) over the neighborhood.",
        "The scale is missing or wrong, or keys and values are swapped.",
        [window_case((3, 5), 3, depth=4, random_scores=True, seed=1, name="four channels")],
        window_strategy(UNEQUAL, (3,), depth=st.integers(2, 4), random_scores=True),
    ),
    Check(
        "bias_direction", Stage.VALUES,
        "The bias of a key is the table entry at its displacement from the query, with zero displacement at the "
        "center. "
        "It is added without scaling.",
        "The bias is ignored, has the wrong sign, is scaled with the dot products, or belongs to the opposite "
        "displacement.",
        [window_case((5, 5), 3, depth=2, table="symmetric", seed=1, name="a table equal to its transpose")],
        window_strategy(SQUARES, (3,), depth=st.integers(2, 3), table="symmetric"), compare_inside,
    ),
    Check(
        "bias_rows_before_columns", Stage.VALUES, "Rows of the table belong to displacements in y.",
        "The table is transposed.",
        [window_case((5, 5), 3, table="any", seed=1, name="queries away from the border")],
        window_strategy(SQUARES, (3,), table="any"), compare_inside,
    ),
    Check(
        "bias_at_the_border", Stage.VALUES,
        "At the border, displacements are up to K - 1, and the bias belongs to them.",
        "The bias belongs to the position in the window, which differs from the displacement at the border.",
        [window_case((4, 5), 3, table="any", seed=1, name="4 × 5 queries")],
        window_strategy(UNEQUAL, (3,), table="any"),
    ),
    Check(
        "bias_dilated", Stage.VALUES, "With dilation δ, the unit of displacements is δ pixels.",
        "The unit is pixels, so that displacements are outside the table.",
        [window_case((7, 8), 3, dilation=2, table="any", seed=1, name="every second of 7 × 8")],
        window_strategy(UNEQUAL, (3,), dilation=st.sampled_from([2, 3]), table="any"),
    ),
    Check(
        "bias_small_map", Stage.VALUES, "On a small map, the center of the table is still entry (K - 1, K - 1).",
        "The center is computed from the number of visible keys.",
        [window_case((2, 4), 3, table="any", seed=1, name="2 rows, a window of 3")],
        window_strategy(SMALL_MAPS, (3,), kernel_fits=False, table="any"),
    ),
    Check(
        "heads", Stage.VALUES, "Each head has its own queries, keys, values and table.", "Heads are mixed up.",
        [window_case((3, 4), 3, heads=3, depth=2, random_scores=True, table="any", seed=1, name="three heads")],
        window_strategy(UNEQUAL, (3,), heads=st.integers(2, 3), random_scores=True, table="any"),
    ),
    Check(
        "images", Stage.VALUES, "Each image attends to itself.", "All images attend to the first one.",
        [window_case((3, 4), 3, images=3, random_scores=True, table="any", seed=1, name="three images")],
        window_strategy(UNEQUAL, (3,), images=st.integers(2, 3), random_scores=True, table="any"),
    ),
    Check(
        "anywhere", Stage.VALUES, "Results equal the reference for any map, kernel and dilation.",
        "A mistake that no earlier check isolates, perhaps on a map smaller than K·δ, where the neighborhood has the "
        "length of the shortest sub-map.",
        [TYPICAL, DILATED],
        window_strategy(map_sizes(), (1, 3, 5), kernel_fits=False, dilation=st.integers(1, 3), images=st.integers(1, 2),
                        heads=st.integers(1, 2), depth=st.integers(1, 3), random_scores=True, table="any"),
    ),
    Check(
        "gradient_of_q_k_v", Stage.GRADIENTS,
        "Gradients of queries, keys and values are correct; a key receives a gradient from each query that attends to "
        "it.",
        "A factor is wrong, most likely the scale, or contributions of queries are missing.", [TYPICAL],
        window_strategy(map_sizes(smallest=3, largest=5), (3,), kernel_fits=False, dilation=st.integers(1, 2), depth=2,
                        random_scores=True, table="any"),
        slopes("q", "k", "v"),
    ),
    Check(
        "gradient_of_the_table", Stage.GRADIENTS,
        "An entry receives the gradients of all pairs with its displacement, in all images.",
        "A factor is wrong, or contributions of pairs or images are missing.", [TYPICAL],
        window_strategy(map_sizes(smallest=3, largest=5), (3,), kernel_fits=False, images=st.integers(1, 2),
                        random_scores=True, table="any"),
        slopes("bias_table"),
    ),
    Check(
        "means_of_ones", Stage.IDENTITIES, "Values of one give one.", "The weights do not sum to one.",
        [TYPICAL, DILATED],
        window_strategy(map_sizes(), kernel_fits=False, depth=2, random_scores=True, table="any"), means_of_ones,
    ),
    Check(
        "constant_bias", Stage.IDENTITIES, "A constant added to the table does not change the result.",
        "The bias is not added before the softmax, or not for all keys.", [TYPICAL, DILATED],
        window_strategy(map_sizes(), kernel_fits=False, random_scores=True, table="any"), constant_bias,
    ),
    Check(
        "whole_map", Stage.IDENTITIES, "With a window as large as the map, the result is plain attention.",
        "The window does not cover the whole map.",
        [window_case((3, 3), 3, heads=2, depth=2, random_scores=True, table="any", seed=1, name="3 × 3 queries")],
        window_strategy(map_sizes(largest=5), (5, 7), kernel_fits=False, depth=2, random_scores=True, table="any"),
        whole_map,
    ),
    Check(
        "flips", Stage.IDENTITIES, "A flipped map with a flipped table gives the flipped result.",
        "Left and right, or top and bottom, are treated differently.", [TYPICAL],
        window_strategy(map_sizes(), kernel_fits=False, random_scores=True, table="any"), flips,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch) -> str:
    """Draw the values, the query with the largest error (Q), and its expected keys (#; @ on the query itself)."""
    size, kernel, dilation = (case.arguments[name] for name in ("query_size", "kernel_size", "dilation"))
    v = case.arguments["v"]
    caption = f"{size[0]} × {size[1]} queries, K = {kernel}, dilation {dilation}"
    if not v.size:
        return caption
    n, head, query = _worst(mismatch)
    row, column = divmod(query, size[1])
    rows, columns = (
        axis_neighbors(length, kernel, dilation)[index] for length, index in zip(size, (row, column), strict=True)
    )
    lines = [
        caption,
        f"values of image {n}, head {head}, channel 0; keys of query Q: #, {len(rows)} × {len(columns)}",
    ]
    for i in range(size[0]):
        cells = []
        for j in range(size[1]):
            visible, is_query = i in rows and j in columns, (i, j) == (row, column)
            mark = "@" if visible and is_query else "Q" if is_query else "#" if visible else " "
            cells.append(f"{v[n, head, i * size[1] + j, 0]:>6.4g}{mark}")
        lines.append("".join(cells).rstrip())
    return "\n".join(lines)


def _worst(mismatch: Mismatch) -> tuple[int, int, int]:
    """Return the (image, head, query) with the largest error in a result (N, M, Q, D)."""
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.ndim != 4 or expected.shape != got.shape or not expected.size:
        return 0, 0, 0
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf).max(axis=-1)
    n, head, query = np.unravel_index(int(error.argmax()), error.shape)
    return int(n), int(head), int(query)


NEIGHBORHOOD = OpSpec(
    name="neighborhood",
    title="attention of each query to the K × K keys around it, with a relative position bias",
    function="attend_neighborhood",
    arguments=(
        Argument("q", "NMQD", "queries of M heads, row by row", differentiable=True),
        Argument("k", "NMQD", "keys", differentiable=True),
        Argument("v", "NMQD", "values", differentiable=True),
        Argument("bias_table", "MYX", "(2K - 1) × (2K - 1) entries per head", differentiable=True),
        Argument("query_size", "", "(H, W)"),
        Argument("kernel_size", "", "K, odd"),
        Argument("dilation", "", "distance in pixels between neighbors"),
    ),
    returns="NMQD",
    reference=Implementation(
        "dat_ref.testing.ops.neighborhood:attend_neighborhood", attend_neighborhood, attend_neighborhood_vjp
    ),
    draw=draw,
    checks=CHECKS,
    mutants=MUTANTS,
)
