"""Where a relative position bias is read, one property at a time: cases that the bias and the core of attention share.

Each case has points so placed, or a table so filled, that only its own property and those before it can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...conventions import Convention
from ...ops.grid import Size, from_pixels, to_pixels
from ..context import CheckContext
from ..drawing import draw_map
from ..op_spec import Case, Mismatch, Setting, Skip
from ..strategies import anywhere, integers, map_sizes, on_pixel, quarters, seeds, square_sizes

Coordinate = Callable[[int], st.SearchStrategy[float]]
Strategy = Callable[[Setting], st.SearchStrategy[Case]]

# ------------------------------------------------------------------------------------------------ cases


def table_shape(query_size: Size) -> Size:
    """Return (2H - 1, 2W - 1)."""
    return 2 * query_size[0] - 1, 2 * query_size[1] - 1


def bias_case(
    setting: Setting, query_size: Size, points_px: Any, name: str = "", *, heads: int = 1, seed: int = 0,
    table: Array | None = None,
) -> Case:  # fmt: skip
    """Return a case: points in pixels, (K, 2) or (N, G, K, 2), handed over in the convention's coordinates."""
    points = np.asarray(points_px, dtype=np.float64)
    points = points if points.ndim == 4 else points[None, None]
    table = integers(seed, heads, *table_shape(query_size)) if table is None else table
    normalised = from_pixels(points, query_size, setting.convention)
    return Case({"table": table, "points": normalised, "query_size": query_size}, name)


def quadrant_table(side: int, values: Sequence[float] = (1, 2, 3, 4)) -> Array:
    """Return a table (1, 2n - 1, 2n - 1) that says whether a query lies above or below its key, left or right of it."""
    sign = np.sign(np.arange(2 * side - 1) - (side - 1))
    rows, columns = np.meshgrid(sign, sign, indexing="ij")
    conditions = [(rows == y) & (columns == x) for y in (-1, 1) for x in (-1, 1)]
    return np.select(conditions, [np.asarray(values[i], dtype=np.float64) for i in range(4)], 0.0)[None]


odd_sides = st.sampled_from([3, 5])  # with a pixel in the middle


@st.composite
def key_in_the_middle(draw: st.DrawFn, setting: Setting) -> Case:
    """Draw a key on the middle pixel of a square map."""
    side = draw(odd_sides)
    return bias_case(setting, (side, side), [(side // 2, side // 2)], seed=draw(seeds))


@st.composite
def in_the_middle_of_quadrants(draw: st.DrawFn, setting: Setting) -> Case:
    """The same with a table of four values."""
    side = draw(st.sampled_from([5, 7]))
    table = quadrant_table(side, draw(st.permutations([1.0, 2.0, 3.0, 5.0])))
    return bias_case(setting, (side, side), [(side // 2, side // 2)], table=table)


@st.composite
def on_the_diagonal(draw: st.DrawFn, setting: Setting) -> Case:
    """Draw a key on a pixel (i, i) of a square map."""
    size, position = draw(square_sizes(largest=5)), draw(on_pixel(2))
    return bias_case(setting, size, [(position, position)], seed=draw(seeds))


@st.composite
def bias_cases(
    draw: st.DrawFn, setting: Setting, sizes: st.SearchStrategy[Size], coordinate: Coordinate, keys: Sequence[int],
    heads: Sequence[int], groups: Sequence[int], images: Sequence[int],
) -> Case:  # fmt: skip
    """Draw keys for every group of every image."""
    size, shape = draw(sizes), [draw(st.sampled_from(counts)) for counts in (images, groups, keys)]
    points = [[draw(coordinate(length)) for length in size] for _ in range(int(np.prod(shape)))]
    points_px = np.array(points, dtype=np.float64).reshape(*shape, 2)
    return bias_case(setting, size, points_px, heads=shape[1] * draw(st.sampled_from(heads)), seed=draw(seeds))


def bias_strategy(
    sizes: st.SearchStrategy[Size], coordinate: Coordinate, *, keys: Sequence[int] = (1,), heads: Sequence[int] = (1,),
    groups: Sequence[int] = (1,), images: Sequence[int] = (1,),
) -> Strategy:  # fmt: skip
    """Return a strategy; one key, one head a group, one group and one image unless told otherwise."""
    return lambda setting: bias_cases(setting, sizes, coordinate, keys, heads, groups, images)


@cache
def off_lattice(length: int) -> st.SearchStrategy[float]:
    return quarters(0, length - 1)


@cache
def whole_cells_outside(length: int) -> st.SearchStrategy[float]:
    # Whole: what lies within a cell of the border is another check's business.
    return st.sampled_from([-1.0, float(length), -2.0, length + 1.0, 1e4, -1e4])


@cache
def around_the_border(length: int) -> st.SearchStrategy[float]:
    return st.sampled_from([-0.5, length - 0.5, -0.25, length - 0.75])


# ------------------------------------------------------------------------------------------------ which queries


def every_query(query_size: Size) -> Any:
    return slice(None)


def middle_query(query_size: Size) -> Any:
    return [query_size[0] // 2 * query_size[1] + query_size[1] // 2]


def queries_next_to_the_middle(query_size: Size) -> Any:
    """One up and left of it, one down and right."""
    side = query_size[1]
    return [(side // 2 + step) * (side + 1) for step in (-1, 1)]


def diagonal_queries(query_size: Size) -> Any:
    return [i * query_size[1] + i for i in range(min(query_size))]


# ------------------------------------------------------------------------------------------------ the properties


@dataclass(frozen=True)
class LookupCheck:
    """A property of where the bias is read; `queries` are those that it is about."""

    name: str
    property: str
    explanation: str
    examples: Callable[[Setting], Sequence[Case]]
    strategy: Strategy
    queries: Callable[[Size], Any] = every_query

    def test(self, ctx: CheckContext, case: Case) -> None:
        """Compare the results of these queries: axis 2 of (N, M, Q, …)."""
        if self.name == "single_row" and ctx.setting.convention.align_corners:
            raise Skip("±1 are pixel centers, so that an axis of one pixel has no extent")
        ctx.compare(case, np.s_[:, :, self.queries(case.arguments["query_size"])])


SQUARE_MIDDLE = [(1.0, 1.0)]
SIX_KEYS = [(0, 0), (1, 2), (0, 1), (1, 1), (1, 0), (1, 2)]

LOOKUP_CHECKS = (
    LookupCheck(
        "middle", "A key that sits on its query reads the middle of the table, entry (H - 1, W - 1).",
        "The bias is read beside its place: the table's middle is off by one, points are shifted by half a pixel, or "
        "stretched from the corner of the map (H for H - 1).",
        lambda setting: [bias_case(setting, (3, 3), SQUARE_MIDDLE, "the middle query, and a key on it")],
        key_in_the_middle, middle_query,
    ),
    LookupCheck(
        "direction", "A query below its key reads below the middle of the table, one to the right of it to the right.",
        "The displacement has the wrong sign: it is measured from the query to the key.",
        lambda setting: [
            bias_case(setting, (5, 5), [(2, 2)], "a table of four values, one a quadrant", table=quadrant_table(5))
        ],
        in_the_middle_of_quadrants, queries_next_to_the_middle,
    ),
    LookupCheck(
        "distance", "A pixel of displacement is an entry of the table.",
        "Displacements are twice as long as they should be, or half as long: differences of coordinates between -1 and "
        "1 lie between -2 and 2, and the half is missing.",
        lambda setting: [bias_case(setting, (3, 3), SQUARE_MIDDLE, "queries on the diagonal")],
        key_in_the_middle, diagonal_queries,
    ),
    LookupCheck(
        "rows_before_columns", "Rows of the table are for displacements in y, and queries are numbered row by row.",
        "The table is transposed, or the queries are numbered column by column.",
        lambda setting: [bias_case(setting, (3, 3), SQUARE_MIDDLE, "every query, a key in the middle")],
        key_in_the_middle,
    ),
    LookupCheck(
        "spread", "Points keep their distances, as the convention's ±1 say.",
        "-1 and 1 are taken for pixel centers where they are the edges of the map, or the reverse (align_corners).",
        lambda setting: [bias_case(setting, (3, 3), [(2, 2)], "a key in the corner of a square")], on_the_diagonal,
    ),
    LookupCheck(
        "points_are_y_x", "A point is (y, x): row first, column second.", "x and y of the points are swapped.",
        lambda setting: [bias_case(setting, (3, 3), [(0, 1)], "a key in the first row")],
        bias_strategy(square_sizes(largest=5), on_pixel),
    ),
    LookupCheck(
        "not_square", "On a map that is not square each axis has its own length.",
        "One axis is normalised by the length of the other: x by the height, say. Square maps hide it.",
        lambda setting: [bias_case(setting, (3, 5), [(2, 4)], "a key in the last corner of 3 × 5"),
                         bias_case(setting, (4, 2), [(1, 0)], "a key of 4 × 2")],
        bias_strategy(map_sizes(smallest=2, largest=5), on_pixel),
    ),
    LookupCheck(
        "between_entries", "Between entries of the table the bias is linear in each direction.",
        "The displacement is rounded to a whole entry.",
        lambda setting: [bias_case(setting, (2, 3), [(0.25, 1.75)], "a key between pixels")],
        bias_strategy(map_sizes(smallest=2, largest=5), off_lattice),
    ),
    LookupCheck(
        "zero_outside", "A displacement that the table does not cover has no bias.",
        "The border of the table is repeated, or a negative index counts from its end.",
        lambda setting: [bias_case(setting, (2, 3), [point], name) for point, name in
                         (((-1, 1), "a key above the map"), ((0, 3), "a key right of it"),
                          ((-2, 5), "a key above and right of it"))],
        bias_strategy(map_sizes(smallest=2, largest=5), whole_cells_outside),
    ),
    LookupCheck(
        "border_fades", "Within an entry outside the table the bias fades to zero.",
        "Displacements outside the table are dropped at once.",
        lambda setting: [bias_case(setting, (2, 3), [(-0.5, 2.75)], "a key just outside the map")],
        bias_strategy(map_sizes(smallest=2, largest=5), around_the_border),
    ),
    LookupCheck(
        "queries_before_keys", "With several keys, entry [m, n] is that of query m and key n.",
        "Keys are mixed up, or queries and keys are exchanged, which goes unnoticed where there are as many of both.",
        lambda setting: [bias_case(setting, (2, 3), SIX_KEYS, "six keys and six queries")],
        bias_strategy(map_sizes(smallest=2, largest=3), on_pixel, keys=(6, 2)),
    ),
    LookupCheck(
        "heads", "Each head has a table of its own.", "Heads are mixed up.",
        lambda setting: [bias_case(setting, (2, 3), [(0, 1), (1, 2)], "three heads, one group", heads=3)],
        bias_strategy(map_sizes(smallest=2, largest=4), on_pixel, keys=(1, 2), heads=(2, 3)),
    ),
    LookupCheck(
        "groups", "Heads [g·M/G, (g + 1)·M/G) read at the points of group g.",
        "Groups are taken in another order, heads are dealt to them in turn, or all use the first group's points.",
        lambda setting: [bias_case(setting, (2, 3), [[[(0, 1)], [(1, 2)]]], "two groups of two heads", heads=4)],
        bias_strategy(map_sizes(smallest=2, largest=4), on_pixel, keys=(1, 2), heads=(2, 3), groups=(2, 3)),
    ),
    LookupCheck(
        "images", "Each image has points of its own.", "All images use the first image's points.",
        lambda setting: [bias_case(setting, (2, 3), [[[(0, 1)]], [[(1, 2)]]], "two images")],
        bias_strategy(map_sizes(smallest=2, largest=4), on_pixel, keys=(1, 2), images=(2, 3)),
    ),
    LookupCheck(
        "fine_positions", "Displacements keep their fractions on a large map.",
        "Positions are kept in half precision: bfloat16 has 8 bits, so that beyond pixel 256 halves are lost.",
        lambda setting: [bias_case(setting, (2, 301), [(0, 290.75)], "a key far along a map of 2 × 301")],
        bias_strategy(st.sampled_from([(2, 301), (257, 3)]), off_lattice),
    ),
    LookupCheck(
        "single_row", "A map of one row or one column is a map like any other.", "A division by H - 1 = 0.",
        lambda setting: [bias_case(setting, (1, 4), [(0, 2)], "a map of one row")],
        bias_strategy(st.sampled_from([(1, 4), (5, 1), (1, 1)]), anywhere),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ pictures


def draw_keys(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw the queries by number, and the keys of the group and image where the result is worst."""
    points, size = case.arguments["points"], case.arguments["query_size"]
    if not points.size:
        return f"queries {size}, points {points.shape}"
    n, head, query = worst_index(mismatch)
    heads = 1 if mismatch.expected is None else mismatch.expected.shape[1]
    group = head * points.shape[1] // max(heads, 1)
    lines = [f"query {query} at {divmod(query, size[1])} of image {n}, head {head}; queries by number, keys as letters"]
    pixels = np.arange(float(size[0] * size[1])).reshape(size)
    return "\n".join([*lines, draw_map(pixels, to_pixels(points[n, group], size, convention))])


def worst_index(mismatch: Mismatch) -> tuple[int, int, int]:
    """Return (image, head, query) where a result (N, M, Q, …) is furthest off."""
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.ndim != 4 or expected.shape != got.shape or not expected.size:
        return 0, 0, 0
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf).max(axis=-1)
    n, head, query = np.unravel_index(int(error.argmax()), error.shape)
    return int(n), int(head), int(query)
