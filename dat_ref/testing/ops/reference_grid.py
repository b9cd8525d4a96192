"""Operation ``reference_grid``: reference points of the keys, in pixels of the map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...conventions import Convention
from ...ops.grid import Size, from_pixels, reference_points, to_pixels
from ..common import runs, shape
from ..context import CheckContext
from ..drawing import draw_axis
from ..op_spec import Argument, Case, Check, Function, Implementation, Mismatch, Mutant, OpSpec, Setting, Skip, Stage
from ..strategies import SIDES, map_sizes

CONSISTENT = (Convention.CELL_CENTER, Convention.PAPER)


def reference_pixels(key_size: Size, size: Size, convention: Convention) -> Array:
    """Return the reference points of a key grid (Hk, Wk) over a map (H, W): (Hk, Wk, 2), (y, x), in pixels."""
    return to_pixels(reference_points(key_size, convention), size, convention)


# ------------------------------------------------------------------------------------------------ cases


def example(key_size: Size, size: Size, name: str = "") -> Case:
    """Return a named case."""
    return Case({"key_size": key_size, "size": size}, name)


def square_grids(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw n × n keys on an m × m map."""
    keys = st.sampled_from([2, 3, 5, 7])
    return st.builds(lambda n, m: example((n, n), (m, m)), keys, st.sampled_from([2, 3, 5, 8, 14]))


def rectangular_grids(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw key grids of at least two on maps, neither square."""
    return st.builds(example, map_sizes(smallest=2), map_sizes(smallest=2))


@st.composite
def single_key_grids(draw: st.DrawFn) -> Case:
    """Draw a key grid with a single row, a single column, or both."""
    key_size = draw(st.sampled_from([(1, 1), (1, 3), (5, 1)]))
    return example(key_size, draw(map_sizes()))


def one_key_per_pixel(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw maps with one key per pixel."""
    return st.builds(lambda size: example(size, size), map_sizes())


# ------------------------------------------------------------------------------------------------ tests


def mean_agrees(ctx: CheckContext, case: Case) -> None:
    got, expected = ctx.got(case), ctx.expected(case)
    if got.shape != expected.shape:
        raise Mismatch(f"expected shape {expected.shape}, got {got.shape}")
    try:
        ctx.require_close(got.mean(axis=(0, 1)), expected.mean(axis=(0, 1)))
    except Mismatch as mismatch:
        raise Mismatch(f"center of the grid: {mismatch.message}", expected, got) from None


def single_key(ctx: CheckContext, case: Case) -> None:
    if ctx.setting.convention is Convention.DATPP2023:
        raise Skip("the 2023 release divides by zero for a single key")
    ctx.compare(case)


def identity(ctx: CheckContext, case: Case) -> None:
    if ctx.setting.convention not in CONSISTENT:
        raise Skip(f"not true in {ctx.setting.convention.name}: the release mixes two geometries")
    pixels = np.stack(np.meshgrid(*map(np.arange, case.arguments["size"]), indexing="ij"), axis=-1)
    ctx.require_close(ctx.got(case), pixels.astype(np.float64))


def flips(ctx: CheckContext, case: Case) -> None:
    if ctx.setting.convention is Convention.DATPP2023:
        raise Skip("the 2023 release shifts its grid to the lower right")
    got, last = ctx.got(case), np.asarray(case.arguments["size"]) - 1
    ctx.require_close(got[::-1, ::-1], last - got)


# ------------------------------------------------------------------------------------------------ mistakes


def change_points(change: Callable[[Array, Any, Any], Array]) -> Callable[[Function], Function]:
    """Return a mutation that replaces the grid by ``change(points, key_size, size)``, with both sizes as arrays."""

    def mutate(fn: Function) -> Function:
        def grid(key_size: Size, size: Size, convention: Convention) -> Array:
            return change(fn(key_size, size, convention), np.asarray(key_size), np.asarray(size))

        return grid

    return mutate


def with_sizes(change: Callable[..., tuple[Size, Size]]) -> Callable[[Function], Function]:
    """Return a mutation that replaces the arguments by ``change(key_size, size)``."""
    return lambda fn: lambda key_size, size, convention: fn(*change(key_size, size), convention)


def stretched(points: Array, keys: Any, size: Any) -> Array:
    """Stretch the grid around its center, to the pitch of Hk - 1 intervals instead of Hk."""
    center = points.mean(axis=(0, 1))
    return np.asarray(center + (points - center) * keys / np.maximum(keys - 1, 1))


def normalized_by_other_axis(fn: Function) -> Function:
    """Use the number of column intervals for rows, and the number of row intervals for columns."""

    def grid(key_size: Size, size: Size, convention: Convention) -> Array:
        intervals = np.maximum(np.asarray(key_size) - convention.reference.gap, 1)
        normalized = from_pixels(fn(key_size, size, convention), size, convention)
        return to_pixels((normalized + 1) * intervals / intervals[::-1] - 1, size, convention)

    return grid


def divided_by_zero(points: Array, keys: Any, size: Any) -> Array:
    return np.where(keys == 1, np.nan, points)


def meshgrid_xy(fn: Function) -> Function:
    """Swap rows and columns of the grid, but keep the shape of the result."""

    def grid(key_size: Size, size: Size, convention: Convention) -> Array:
        return np.ascontiguousarray(fn(key_size, size, convention).swapaxes(0, 1)).reshape(*key_size, 2)

    return grid


MUTANTS = (
    Mutant("the grid is shifted by half a key cell down and right", "middle",
           change_points(lambda p, keys, size: p + size / keys / 2)),
    Mutant("the grid is shifted by half a key cell up and left", "middle",
           change_points(lambda p, keys, size: p - size / keys / 2)),
    Mutant("the grid is shifted by half a pixel down and right", "middle",
           change_points(lambda p, keys, size: p + 0.5)),
    Mutant("the grid is shifted by half a pixel up and left", "middle", change_points(lambda p, keys, size: p - 0.5)),
    Mutant("the grid has the pitch of Hk - 1 intervals instead of Hk", "pitch", change_points(stretched)),
    Mutant(
        "positions are normalized with align_corners=True but sampled with align_corners=False", "pitch",
        change_points(lambda p, keys, size: p * size / np.maximum(size - 1, 1) - 0.5),
    ),
    Mutant(
        "positions are normalized with align_corners=False but sampled with align_corners=True", "pitch",
        change_points(lambda p, keys, size: (p + 0.5) * (size - 1) / size),
    ),
    Mutant("x and y swapped", "rows_before_columns", change_points(lambda p, keys, size: p[..., ::-1])),
    Mutant("meshgrid with indexing='xy' instead of 'ij': rows and columns swapped", "rows_before_columns", meshgrid_xy),
    Mutant(
        "x is normalized by the height, and y by the width", "not_square",
        with_sizes(lambda key_size, size: (key_size, size[::-1])),
    ),
    Mutant(
        "x is normalized by the number of key rows, and y by the number of key columns", "not_square",
        normalized_by_other_axis,
    ),
    Mutant("x is normalized by the height", "not_square", with_sizes(lambda keys, size: (keys, (size[0], size[0])))),
    Mutant("y is normalized by the width", "not_square", with_sizes(lambda keys, size: (keys, (size[1], size[1])))),
    Mutant("division by zero for a single key", "single_key", change_points(divided_by_zero)),
    Mutant("a single key is placed in the corner", "single_key",
           change_points(lambda p, keys, size: np.where(keys == 1, 0.0, p))),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ checks

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "The result is finite.", "The function raised an error, or returned NaN or infinity.",
        [example((2, 3), (4, 6), "2 × 3 keys on 4 × 6 pixels")], test=runs,
    ),
    Check(
        "shapes", Stage.SHAPES, "A key grid (Hk, Wk) gives (Hk, Wk, 2).", "Axes are swapped or flattened.",
        [example((2, 3), (4, 6), "2 × 3 keys"), example((1, 5), (3, 7), "a single row")], rectangular_grids, shape,
    ),
    Check(
        "middle", Stage.VALUES,
        "The center of the grid is the one of the convention: the center of the map, except in the 2023 release.",
        "The whole grid is shifted, most likely by half a key cell or half a pixel.",
        [example((2, 2), (4, 4), "2 × 2 keys on 4 × 4 pixels"), example((7, 7), (56, 56), "7 × 7 keys on 56 × 56")],
        square_grids, mean_agrees,
    ),
    Check(
        "pitch", Stage.VALUES,
        "The distance between neighboring points is the one of the convention.",
        "Hk is used instead of Hk - 1, or the reverse; or align_corners is wrong: -1 and 1 are taken as pixel centers "
        "instead of the edges of the map.",
        [example((3, 3), (6, 6), "the first row"), example((7, 7), (7, 7), "one key per pixel")],
        square_grids, lambda ctx, case: rows_only(ctx, case),
    ),
    Check(
        "rows_before_columns", Stage.VALUES,
        "Entry [i, j] is (y of row i, x of column j).",
        "x and y are swapped, or the two axes of the grid are (indexing='xy' instead of 'ij' in meshgrid).",
        [example((3, 3), (6, 6), "a square")], square_grids,
    ),
    Check(
        "not_square", Stage.VALUES,
        "On a non-square map, each axis uses its own length.",
        "One axis is normalized by the length of the other, e.g. x by the height. Square maps hide this mistake.",
        [example((2, 3), (4, 9), "2 × 3 keys on 4 × 9 pixels"), example((3, 5), (3, 5), "one key per pixel")],
        rectangular_grids,
    ),
    Check(
        "single_key", Stage.VALUES,
        "A single row or column of keys is at the center.",
        "The function divides by Hk - 1 = 0, or avoids this by placing the key in a corner.",
        [example((1, 1), (5, 3), "one key"), example((1, 4), (5, 8), "one row of keys")],
        lambda setting: single_key_grids(), single_key, degenerate=True,
    ),
    Check(
        "identity", Stage.IDENTITIES,
        "With one key per pixel, key (i, j) is at the center of pixel (i, j).",
        "The grid is shifted or stretched, so that the layer without offsets samples between pixels.",
        [example((3, 5), (3, 5), "one key per pixel")], one_key_per_pixel, identity,
    ),
    Check(
        "flips", Stage.IDENTITIES,
        "The grid is symmetric about the center of the map.",
        "Left and right, or top and bottom, are treated differently. A flipped image does not give a flipped result.",
        [example((2, 3), (5, 7), "2 × 3 keys on 5 × 7 pixels")], rectangular_grids, flips,
    ),
)  # fmt: skip


def rows_only(ctx: CheckContext, case: Case) -> None:
    """Compare the sorted y and x coordinates, because `rows_before_columns` tests their order."""
    got, expected = ctx.got(case), ctx.expected(case)
    try:
        ctx.require_close(np.sort(got, axis=None), np.sort(expected, axis=None))
    except Mismatch as mismatch:
        raise Mismatch(mismatch.message, expected, got) from None


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """Draw the rows and the columns of the grid along rulers."""
    key_size, size = case.arguments["key_size"], case.arguments["size"]
    lines = [f"{key_size[0]} × {key_size[1]} keys on a map of {size[0]} × {size[1]}"]
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.shape != (*key_size, 2) or got.shape != expected.shape:
        return lines[0]
    for name, axis, line in (("y", 0, np.s_[:, 0, 0]), ("x", 1, np.s_[0, :, 1])):
        if size[axis] <= max(SIDES) + 7:
            lines.append(draw_axis(name, size[axis], expected[line], got[line]))
    return "\n".join(lines)


def describe_difference(case: Case, expected: Array, got: Array) -> str:
    """Describe the distance of a grid from the convention's, in key cells."""
    key_size, size = np.asarray(case.arguments["key_size"]), np.asarray(case.arguments["size"])
    where = f"for {' × '.join(map(str, key_size))} keys on {' × '.join(map(str, size))} pixels,"
    displacement = got - expected
    shift = displacement.mean(axis=(0, 1))
    if np.abs(displacement - shift).max() < 1e-6:
        cells = shift * key_size / size
        vertical, horizontal = ("down" if shift[0] > 0 else "up"), ("right" if shift[1] > 0 else "left")
        caption = [
            f"{abs(move):.3g} pixels ({abs(cell):.3g} key cells)" for move, cell in zip(shift, cells, strict=True)
        ]
        return f"{where} all points are shifted {caption[0]} {vertical} and {caption[1]} {horizontal}"
    return f"{where} points differ by up to {np.abs(displacement * key_size / size).max():.3g} key cells"


REFERENCE_GRID = OpSpec(
    name="reference_grid",
    title="reference points of the keys, in pixels of the map",
    function="reference_pixels",
    arguments=(
        Argument("key_size", "", "(Hk, Wk), two integers"),
        Argument("size", "", "(H, W) of the map"),
    ),
    returns="hw2",
    reference=Implementation(
        "dat_ref.testing.ops.reference_grid:reference_pixels", reference_pixels, takes_convention=True
    ),
    draw=draw,
    depends_on_convention=True,
    describe_difference=describe_difference,
    checks=CHECKS,
    mutants=MUTANTS,
)
