"""Cases and checks for the lookup of the relative position bias, shared by operations ``bias`` and ``attention``.

The points and the table of each case are chosen so that the result depends only on the property of its check and of the
checks before it.
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
    """Return a case for points in pixels, (K, 2) or (N, G, K, 2); the case has them in the convention's coordinates."""
    points = np.asarray(points_px, dtype=np.float64)
    points = points if points.ndim == 4 else points[None, None]
    table = integers(seed, heads, *table_shape(query_size)) if table is None else table
    normalised = from_pixels(points, query_size, setting.convention)
    return Case({"table": table, "points": normalised, "query_size": query_size}, name)


def quadrant_table(side: int, values: Sequence[float] = (1, 2, 3, 4)) -> Array:
    """Return a table (1, 2n - 1, 2n - 1) with one value in each quadrant: query above or below, left or right of it."""
    sign = np.sign(np.arange(2 * side - 1) - (side - 1))
    rows, columns = np.meshgrid(sign, sign, indexing="ij")
    conditions = [(rows == y) & (columns == x) for y in (-1, 1) for x in (-1, 1)]
    return np.select(conditions, [np.asarray(values[i], dtype=np.float64) for i in range(4)], 0.0)[None]


odd_sides = st.sampled_from([3, 5])  # with a pixel in the center


@st.composite
def key_in_the_middle(draw: st.DrawFn, setting: Setting) -> Case:
    """Draw a key on the center pixel of a square map."""
    side = draw(odd_sides)
    return bias_case(setting, (side, side), [(side // 2, side // 2)], seed=draw(seeds))


@st.composite
def in_the_middle_of_quadrants(draw: st.DrawFn, setting: Setting) -> Case:
    """Draw a key on the center pixel of a square map, with a table of four values."""
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
    """Return a strategy; by default with one key, one head per group, one group and one image."""
    return lambda setting: bias_cases(setting, sizes, coordinate, keys, heads, groups, images)


@cache
def off_lattice(length: int) -> st.SearchStrategy[float]:
    return quarters(0, length - 1)


@cache
def whole_cells_outside(length: int) -> st.SearchStrategy[float]:
    # Integers only: points within one pixel of the border are the subject of `border_fades`.
    return st.sampled_from([-1.0, float(length), -2.0, length + 1.0, 1e4, -1e4])


@cache
def around_the_border(length: int) -> st.SearchStrategy[float]:
    return st.sampled_from([-0.5, length - 0.5, -0.25, length - 0.75])


# ------------------------------------------------------------------------------------------------ compared queries


def every_query(query_size: Size) -> Any:
    return slice(None)


def middle_query(query_size: Size) -> Any:
    return [query_size[0] // 2 * query_size[1] + query_size[1] // 2]


def queries_next_to_the_middle(query_size: Size) -> Any:
    """Return the query up and left of the center query, and the one down and right of it."""
    side = query_size[1]
    return [(side // 2 + step) * (side + 1) for step in (-1, 1)]


def diagonal_queries(query_size: Size) -> Any:
    return [i * query_size[1] + i for i in range(min(query_size))]


# ------------------------------------------------------------------------------------------------ the properties


@dataclass(frozen=True)
class LookupCheck:
    """Check of one property of the bias lookup.

    Args:
        name, property, explanation, examples, strategy: as in `Check`.
        queries: function of the map's size that returns the index of the queries to compare.
    """

    name: str
    property: str
    explanation: str
    examples: Callable[[Setting], Sequence[Case]]
    strategy: Strategy
    queries: Callable[[Size], Any] = every_query

    def test(self, ctx: CheckContext, case: Case) -> None:
        """Compare the results (N, M, Q, …) of the selected queries."""
        if self.name == "single_row" and ctx.setting.convention.align_corners:
            raise Skip("±1 are pixel centers in this convention, so an axis of one pixel has no extent")
        ctx.compare(case, np.s_[:, :, self.queries(case.arguments["query_size"])])


SQUARE_CENTER = [(1.0, 1.0)]
SIX_KEYS = [(0, 0), (1, 2), (0, 1), (1, 1), (1, 0), (1, 2)]

LOOKUP_CHECKS = (
    LookupCheck(
        "middle", "A key at the position of its query reads the center of the table, entry (H - 1, W - 1).",
        "The lookup is shifted: the center of the table is off by one, points are shifted by half a pixel, or they "
        "are stretched from the corner of the map (H instead of H - 1).",
        lambda setting: [bias_case(setting, (3, 3), SQUARE_CENTER, "the center query, and a key on it")],
        key_in_the_middle, middle_query,
    ),
    LookupCheck(
        "direction", "The displacement is query minus key: a query below its key reads below the table's center.",
        "The displacement has the wrong sign: it is key minus query.",
        lambda setting: [
            bias_case(setting, (5, 5), [(2, 2)], "a table with one value per quadrant", table=quadrant_table(5))
        ],
        in_the_middle_of_quadrants, queries_next_to_the_middle,
    ),
    LookupCheck(
        "distance", "A displacement of one pixel is one entry of the table.",
        "Displacements are doubled or halved. Differences of coordinates in [-1, 1] are in [-2, 2] and need a factor "
        "of 1/2.",
        lambda setting: [bias_case(setting, (3, 3), SQUARE_CENTER, "queries on the diagonal")],
        key_in_the_middle, diagonal_queries,
    ),
    LookupCheck(
        "rows_before_columns", "Rows of the table are displacements in y, and queries are numbered row by row.",
        "The table is transposed, or the queries are numbered column by column.",
        lambda setting: [bias_case(setting, (3, 3), SQUARE_CENTER, "every query, a key in the center")],
        key_in_the_middle,
    ),
    LookupCheck(
        "spread", "Distances between points in pixels follow the convention's align_corners.",
        "align_corners is inverted: -1 and 1 are taken as pixel centers instead of the edges of the map, or the "
        "reverse.",
        lambda setting: [bias_case(setting, (3, 3), [(2, 2)], "a key in the corner of a square")], on_the_diagonal,
    ),
    LookupCheck(
        "points_are_y_x", "A point is (y, x): row first, column second.", "x and y of the points are swapped.",
        lambda setting: [bias_case(setting, (3, 3), [(0, 1)], "a key in the first row")],
        bias_strategy(square_sizes(largest=5), on_pixel),
    ),
    LookupCheck(
        "not_square", "On a non-square map, each axis uses its own length.",
        "One axis is normalized by the length of the other, e.g. x by the height. Square maps hide this mistake.",
        lambda setting: [bias_case(setting, (3, 5), [(2, 4)], "a key in the last corner of 3 × 5"),
                         bias_case(setting, (4, 2), [(1, 0)], "a key of 4 × 2")],
        bias_strategy(map_sizes(smallest=2, largest=5), on_pixel),
    ),
    LookupCheck(
        "between_entries", "Between entries of the table, interpolation is bilinear.",
        "The displacement is rounded to the nearest entry.",
        lambda setting: [bias_case(setting, (2, 3), [(0.25, 1.75)], "a key between pixels")],
        bias_strategy(map_sizes(smallest=2, largest=5), off_lattice),
    ),
    LookupCheck(
        "zero_outside", "A displacement one entry or more outside the table has zero bias.",
        "The border of the table is replicated, or a negative index counts from its end.",
        lambda setting: [bias_case(setting, (2, 3), [point], name) for point, name in
                         (((-1, 1), "a key above the map"), ((0, 3), "a key right of the map"),
                          ((-2, 5), "a key above and right of the map"))],
        bias_strategy(map_sizes(smallest=2, largest=5), whole_cells_outside),
    ),
    LookupCheck(
        "border_fades", "Within one entry outside the table, the bias decreases linearly to zero.",
        "Displacements outside the outermost entries get zero bias.",
        lambda setting: [bias_case(setting, (2, 3), [(-0.5, 2.75)], "a key just outside the map")],
        bias_strategy(map_sizes(smallest=2, largest=5), around_the_border),
    ),
    LookupCheck(
        "queries_before_keys", "With several keys, entry [m, n] of the bias belongs to query m and key n.",
        "Keys are mixed up, or queries and keys are swapped. The swap raises no error if their numbers are equal.",
        lambda setting: [bias_case(setting, (2, 3), SIX_KEYS, "six keys and six queries")],
        bias_strategy(map_sizes(smallest=2, largest=3), on_pixel, keys=(6, 2)),
    ),
    LookupCheck(
        "heads", "Each head uses its own table.", "Heads are mixed up.",
        lambda setting: [bias_case(setting, (2, 3), [(0, 1), (1, 2)], "three heads, one group", heads=3)],
        bias_strategy(map_sizes(smallest=2, largest=4), on_pixel, keys=(1, 2), heads=(2, 3)),
    ),
    LookupCheck(
        "groups", "Heads [g·M/G, (g + 1)·M/G) use the points of group g.",
        "Groups are in another order, heads are interleaved across the groups, or all heads use the first group's "
        "points.",
        lambda setting: [bias_case(setting, (2, 3), [[[(0, 1)], [(1, 2)]]], "two groups of two heads", heads=4)],
        bias_strategy(map_sizes(smallest=2, largest=4), on_pixel, keys=(1, 2), heads=(2, 3), groups=(2, 3)),
    ),
    LookupCheck(
        "images", "Each image uses its own points.", "All images use the first image's points.",
        lambda setting: [bias_case(setting, (2, 3), [[[(0, 1)]], [[(1, 2)]]], "two images")],
        bias_strategy(map_sizes(smallest=2, largest=4), on_pixel, keys=(1, 2), images=(2, 3)),
    ),
    LookupCheck(
        "fine_positions", "On a large map, displacements keep their fractional part.",
        "Positions are stored in half precision. bfloat16 has 8 significant bits and loses half pixels above 128.",
        lambda setting: [bias_case(setting, (2, 301), [(0, 290.75)], "a key far along a map of 2 × 301")],
        bias_strategy(st.sampled_from([(2, 301), (257, 3)]), off_lattice),
    ),
    LookupCheck(
        "single_row", "A map with a single row or column works like any other.", "The function divides by H - 1 = 0.",
        lambda setting: [bias_case(setting, (1, 4), [(0, 2)], "a map of one row")],
        bias_strategy(st.sampled_from([(1, 4), (5, 1), (1, 1)]), anywhere),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ drawing


def draw_keys(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw the queries as numbers, and the keys of the image and group with the largest error as letters."""
    points, size = case.arguments["points"], case.arguments["query_size"]
    if not points.size:
        return f"queries {size}, points {points.shape}"
    n, head, query = worst_index(mismatch)
    heads = 1 if mismatch.expected is None else mismatch.expected.shape[1]
    group = head * points.shape[1] // max(heads, 1)
    lines = [f"query {query} at {divmod(query, size[1])}, image {n}, head {head}; numbers: queries, letters: keys"]
    pixels = np.arange(float(size[0] * size[1])).reshape(size)
    return "\n".join([*lines, draw_map(pixels, to_pixels(points[n, group], size, convention))])


def worst_index(mismatch: Mismatch) -> tuple[int, int, int]:
    """Return the (image, head, query) with the largest error in a result (N, M, Q, …)."""
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.ndim != 4 or expected.shape != got.shape or not expected.size:
        return 0, 0, 0
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf).max(axis=-1)
    n, head, query = np.unravel_index(int(error.argmax()), error.shape)
    return int(n), int(head), int(query)
