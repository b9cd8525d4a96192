"""Operation ``multi_scale`` of Deformable DETR: weighted sums of samples from maps of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...ops.grid import Size
from ...peers.multi_scale import (
    location_pixels,
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_vjp,
)
from ..common import leaves_inputs_alone, runs, shape
from ..context import CheckContext
from ..drawing import draw_map
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Setting, Stage
from ..strategies import anywhere, integers, map_sizes, on_pixel, quarters, seeds, square_sizes
from .multi_scale_mutants import MUTANTS

Coordinate = Callable[[int], st.SearchStrategy[float]]

# ------------------------------------------------------------------------------------------------ cases


def to_locations(points_px: Array, sizes: Sequence[Size]) -> Array:
    """Convert points (N, Q, M, L, P, 2), (y, x) in pixels of their level, to locations (x, y) with edges 0 and 1."""
    return ((points_px + 0.5) / np.array(sizes, dtype=np.float64)[:, None])[..., ::-1].copy()


def sampling_case(
    points_px: Array, sizes: Sequence[Size], weights: Array, depth: int = 1, seed: int = 0, name: str = ""
) -> Case:
    """Return a case; for seed 0 the tokens are 1, 2, 3 …."""
    tokens = sum(height * width for height, width in sizes)
    value = integers(seed, len(points_px), tokens, points_px.shape[2], depth)
    return Case(
        {
            "value": value,
            "value_spatial_shapes": [tuple(size) for size in sizes],
            "sampling_locations": to_locations(points_px, sizes),
            "attention_weights": weights,
        },
        name,
    )


def single_point_case(size: Size, y: float, x: float, name: str = "", seed: int = 0) -> Case:
    """Return a named case: one map, and one query with one point, in pixels, of weight one."""
    points_px = np.array([y, x], dtype=np.float64).reshape(1, 1, 1, 1, 1, 2)
    return sampling_case(points_px, [size], np.ones(points_px.shape[:-1]), seed=seed, name=name)


def random_case(
    sizes: Sequence[Size], name: str, images: int = 1, queries: int = 1, heads: int = 1, points: int = 1,
    depth: int = 1, seed: int = 1,
) -> Case:  # fmt: skip
    """Return a named case with points between pixels, some of them outside, and weights with any sum."""
    shape = (images, queries, heads, len(sizes), points)
    rng = np.random.default_rng(seed)
    extent = np.array(sizes)[:, None]
    points_px = np.floor(rng.uniform(-0.5, 1.0, (*shape, 2)) * extent * 4 + 1) / 4
    return sampling_case(points_px, sizes, integers(seed, *shape) / 4, depth, seed, name)


@st.composite
def draw_sampling(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[Size],
    coordinate: Coordinate,
    levels: Sequence[int],
    counts: dict[str, Sequence[int]],
    random_weights: bool,
) -> Case:
    """Draw tokens, locations and weights."""
    maps = [draw(sizes) for _ in range(draw(st.sampled_from(levels)))]
    axis_sizes = {
        name: draw(st.sampled_from(counts.get(name, (1,)))) for name in ("images", "queries", "heads", "points")
    }
    shape = (*(axis_sizes[name] for name in ("images", "queries", "heads")), len(maps), axis_sizes["points"])
    points_px = np.zeros((*shape, 2))
    for index in np.ndindex(shape):
        points_px[index] = [draw(coordinate(length)) for length in maps[index[3]]]
    weights = integers(1 + draw(seeds), *shape) / 4 if random_weights else np.ones(shape)
    return sampling_case(points_px, maps, weights, draw(st.sampled_from(counts.get("depth", (1,)))), draw(seeds))


def sampling_strategy(
    sizes: st.SearchStrategy[Size],
    coordinate: Coordinate = on_pixel,
    *,
    levels: Sequence[int] = (1,),
    random_weights: bool = False,
    **counts: Sequence[int],
) -> Callable[[Setting], st.SearchStrategy[Case]]:
    """Return the strategy of a check; by default with one level, image, query, head, point and channel."""
    return lambda setting: draw_sampling(sizes, coordinate, levels, counts, random_weights)


@st.composite
def diagonal(draw: st.DrawFn) -> Case:
    """Draw a pixel (i, i) of a square map."""
    size = draw(square_sizes())
    position = draw(on_pixel(size[0]))
    return single_point_case(size, position, position, seed=draw(seeds))


def inside(length: int) -> st.SearchStrategy[float]:
    return quarters(0, length - 1) if length > 1 else st.just(0.0)


def far_outside(length: int) -> st.SearchStrategy[float]:
    return st.sampled_from([-1.0, float(length), -2.0, length + 1.0, 1e4, -1e4])


def just_outside(length: int) -> st.SearchStrategy[float]:
    return st.sampled_from([-0.5, length - 0.5, -0.25, length - 0.75])


DYADIC = st.sampled_from([(2, 4), (4, 2), (8, 4)])  # pixel centers in [0, 1] are exact in floating point

# ------------------------------------------------------------------------------------------------ tests


def gradient_of(name: str, *, one_sided: bool = False) -> Callable[[CheckContext, Case], None]:
    """Return the test of one gradient; the elements of the cotangent are 1, 2, 3 …."""

    def test(ctx: CheckContext, case: Case) -> None:
        cotangent = integers(0, *ctx.expected(case).shape)
        # The unit of locations is the map: with 2⁻¹², steps of the five-point rule are far below a quarter pixel.
        ctx.compare_gradient(name, cotangent, case, one_sided=one_sided, step=2.0**-12)

    return test


def means_of_ones(ctx: CheckContext, case: Case) -> None:
    """Require that, inside the maps, values of one give the sum of the weights."""
    ones = case.with_arrays({"value": np.ones_like(case.arguments["value"])})
    weights = case.arguments["attention_weights"]
    depth = case.arguments["value"].shape[3]
    ctx.require_close(ctx.got(ones), np.repeat(weights.sum(axis=(3, 4)), depth, axis=2), case=ones)


def split_points(ctx: CheckContext, case: Case) -> None:
    """Require the same result if each point is duplicated with half the weight."""
    locations, weights = case.arguments["sampling_locations"], case.arguments["attention_weights"]
    twice = case.with_arrays(
        {
            "sampling_locations": np.concatenate([locations, locations], axis=4),
            "attention_weights": np.concatenate([weights, weights], axis=4) / 2,
        }
    )
    ctx.require_close(ctx.got(twice), ctx.got(case), case=twice)


def levels_exchanged(ctx: CheckContext, case: Case) -> None:
    """Require the same result for levels in reverse order, with their tokens, locations and weights."""
    sizes = case.arguments["value_spatial_shapes"]
    ends = np.cumsum([height * width for height, width in sizes])
    level_tokens = np.split(case.arguments["value"], ends[:-1], axis=1)
    reversed_levels = case.with_arrays(
        {
            "value": np.concatenate(level_tokens[::-1], axis=1),
            "sampling_locations": case.arguments["sampling_locations"][:, :, :, ::-1].copy(),
            "attention_weights": case.arguments["attention_weights"][:, :, :, ::-1].copy(),
        }
    )
    reversed_levels = Case({**reversed_levels.arguments, "value_spatial_shapes": sizes[::-1]})
    ctx.require_close(ctx.got(reversed_levels), ctx.got(case), case=reversed_levels)


def flips(ctx: CheckContext, case: Case) -> None:
    """Require the same result for flipped maps and flipped locations."""
    (size,) = case.arguments["value_spatial_shapes"]
    value, locations = case.arguments["value"], case.arguments["sampling_locations"]
    for axis in range(2):  # 0: top and bottom, 1: left and right
        mirrored = locations.copy()
        mirrored[..., 1 - axis] = 1 - locations[..., 1 - axis]
        maps = value.reshape(len(value), *size, *value.shape[2:])
        flipped = case.with_arrays(
            {"value": np.flip(maps, 1 + axis).reshape(value.shape), "sampling_locations": mirrored}
        )
        ctx.require_close(ctx.got(flipped), ctx.got(case), case=flipped)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    got = ctx.got(case)
    with_nan = np.isnan(case.arguments["sampling_locations"]).any(axis=(3, 4, 5))
    expected = np.repeat(with_nan, case.arguments["value"].shape[3], axis=2)
    if got.shape != expected.shape or not (np.isnan(got) == expected).all():
        raise Mismatch("expected NaN for the query and head of a NaN location, and nowhere else", None, got)


def case_with_nan() -> Case:
    case = random_case([(3, 5), (2, 3)], "one NaN location", queries=2, heads=2, points=2, depth=2)
    locations = case.arguments["sampling_locations"].copy()
    locations[0, 1, 0, 1, 0, 0] = np.nan
    return case.with_arrays({"sampling_locations": locations})


# ------------------------------------------------------------------------------------------------ checks

TYPICAL = random_case([(3, 5), (2, 3)], "two levels, two queries", images=2, queries=2, heads=3, points=2, depth=2)
TWO_LEVELS = random_case([(4, 6), (2, 3)], "one query, levels of 4 × 6 and 2 × 3", points=2, seed=3)
SLOPES = random_case([(4, 3), (2, 5)], "two points per level", points=2, heads=2, depth=2, seed=5)

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "The result is finite and has the dtype of the inputs.",
        "The function raised an error, returned another dtype, or returned NaN or infinity.", [TYPICAL], test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and inputs are not modified.",
        "The function assumes contiguous memory, writes to its inputs, or is not deterministic.", [TYPICAL],
        test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "Values (N, S, M, D), locations (N, Q, M, L, P, 2) and weights (N, Q, M, L, P) give (N, Q, M·D); N and Q may "
        "be 0.",
        "Axes are swapped or squeezed, or an empty batch is not handled.",
        [random_case([(3, 5)], "no images", images=0, queries=2, heads=2),
         random_case([(3, 5)], "no queries", queries=0, depth=3)],
        sampling_strategy(map_sizes(), anywhere, levels=(1, 2), images=(1, 2), queries=(1, 3), heads=(1, 2),
                          depth=(1, 3)), shape,
    ),
    Check(
        "pixel_centers", Stage.VALUES,
        "0 and 1 are the edges of the map: the center of pixel i of n is at (i + ½)/n.",
        "Locations are in other coordinates: 0 and 1 are the centers of the first and the last pixel (align_corners), "
        "-1 and 1 are the edges, or the half pixel is missing.",
        [single_point_case((3, 3), 1, 1, "the center of 3 × 3"),
         single_point_case((2, 2), 0, 0, "the first pixel of 2 × 2")],
        lambda setting: diagonal(),
    ),
    Check(
        "columns_before_rows", Stage.VALUES, "A location is (x, y): column first, row second.",
        "x and y are swapped, or the maps are stored column by column.",
        [single_point_case((2, 2), 0, 1, "first row, second column of a square")], sampling_strategy(square_sizes()),
    ),
    Check(
        "not_square", Stage.VALUES, "On a non-square map, each axis uses its own length, and sizes are (H, W).",
        "One axis is scaled by the length of the other, e.g. x by the height, or sizes are taken as (W, H). Square "
        "maps "
        "hide these mistakes.",
        [single_point_case((3, 5), 2, 4, "the last pixel of 3 × 5"),
         single_point_case((3, 5), 1, 3, "row 1, column 3 of 3 × 5")],
        sampling_strategy(map_sizes(smallest=2)),
    ),
    Check(
        "single_row", Stage.VALUES, "A map with a single row or column is handled like any other.",
        "The function divides by H - 1 = 0.",
        [single_point_case((1, 4), 0, 2, "a map of one row"), single_point_case((3, 1), 1, 0, "one column")],
        sampling_strategy(st.sampled_from([(1, 4), (5, 1), (1, 1)])), degenerate=True,
    ),
    Check(
        "between_pixels", Stage.VALUES, "Between pixels, interpolation is bilinear.",
        "Another interpolation is used (nearest, bicubic), or weights are assigned to the wrong neighbors.",
        [single_point_case((2, 3), 0.25, 1.5, "a quarter down, a half to the right", seed=1)],
        sampling_strategy(map_sizes(), inside),
    ),
    Check(
        "zeros_outside", Stage.VALUES, "A location one pixel or more outside the map reads zero.",
        "The border is replicated or wrapped around.",
        [
            single_point_case((2, 3), -1, 0, "a pixel above the map"),
            single_point_case((2, 3), 1, 3, "a pixel right of it"),
            single_point_case((2, 3), 1, -2, "two pixels left of it"),
        ],
        sampling_strategy(map_sizes(), far_outside),
    ),
    Check(
        "border_fades", Stage.VALUES,
        "From the outermost pixel center to one pixel outside it, the sample decreases linearly to zero.",
        "Locations in this strip read zero. A neighbor outside the map counts as zero, but a neighbor inside still "
        "contributes.",
        [
            single_point_case((2, 3), -0.25, 0, "a quarter above the map"),
            single_point_case((2, 3), 1, 2.75, "just right of it"),
            single_point_case((2, 3), -0.5, -0.5, "on its corner"),
        ],
        sampling_strategy(map_sizes(), just_outside),
    ),
    Check(
        "weights_as_they_are", Stage.VALUES,
        "The result is the sum of samples times weights. Weights may be negative and have any sum.",
        "Weights are normalized again (by a softmax, or by their sum), samples are averaged, or weights are assigned "
        "to "
        "other points.",
        [random_case([(3, 5)], "four points of one query", points=4)],
        sampling_strategy(map_sizes(), random_weights=True, points=(2, 3)),
    ),
    Check(
        "levels", Stage.VALUES,
        "Each level has its own tokens, size, locations and weights. The tokens are in order of levels, and the result "
        "is "
        "the sum over levels.",
        "Levels are in another order, split at the wrong token, or scaled by another level's size; or a level "
        "overwrites "
        "the previous one.",
        [TWO_LEVELS, random_case([(2, 3), (5, 4), (3, 2)], "three levels", points=2)],
        sampling_strategy(map_sizes(smallest=2), levels=(2, 3), random_weights=True, points=(1, 2)),
    ),
    Check(
        "heads", Stage.VALUES,
        "Each head has its own channels, locations and weights. The result has all channels of the first head first.",
        "Heads are mixed up, or the result has the first channel of all heads first.",
        [random_case([(3, 5)], "three heads of two channels", heads=3, depth=2)],
        sampling_strategy(map_sizes(), random_weights=True, heads=(2, 3), depth=(2, 3)),
    ),
    Check(
        "queries_and_images", Stage.VALUES, "Each query of each image has its own locations and weights.",
        "All queries, or all images, use the locations or weights of the first one.",
        [random_case([(3, 5)], "three queries", queries=3), random_case([(3, 5)], "two images", images=2)],
        sampling_strategy(map_sizes(), random_weights=True, queries=(2, 3), images=(1, 2)),
    ),
    Check(
        "fine_positions", Stage.VALUES, "On a large map, positions keep their fractional part.",
        "Positions are stored in half precision. bfloat16 has 8 significant bits and loses half pixels above 128.",
        [single_point_case((2, 301), 0, 290.75, "far along a map of 2 × 301")],
        sampling_strategy(st.sampled_from([(2, 301), (257, 3)]), inside),
    ),
    Check(
        "anywhere", Stage.VALUES, "Results equal the reference for any locations, levels, heads, queries and images.",
        "A mistake that no earlier check isolates.", [TYPICAL],
        sampling_strategy(map_sizes(), anywhere, levels=(1, 2), random_weights=True, images=(1, 2), queries=(1, 2),
                          heads=(1, 2), points=(1, 2), depth=(1, 2)),
    ),
    Check(
        "gradient_of_the_value", Stage.GRADIENTS,
        "A token receives the gradient of each sample that reads it, times attention weight and interpolation weight.",
        "A factor is wrong, or contributions are missing because a sample overwrites another one.", [SLOPES],
        sampling_strategy(map_sizes(largest=3), just_outside, random_weights=True, points=(1, 2)), gradient_of("value"),
    ),
    Check(
        "gradient_of_the_weights", Stage.GRADIENTS, "The gradient of a weight is its sample.", "A factor is wrong.",
        [SLOPES], sampling_strategy(map_sizes(largest=4), inside, random_weights=True, points=(1, 2)),
        gradient_of("attention_weights"),
    ),
    Check(
        "gradient_of_the_locations", Stage.GRADIENTS,
        "The gradient of a location is the derivative of its sample times its weight, per map width and height, x "
        "first.",
        "A factor is wrong (the map's width and height are missing if it is per pixel), x and y are swapped, or the "
        "gradient is missing.",
        [single_point_case((3, 5), 0.25, 1.5, "a point between pixels", seed=1)],
        sampling_strategy(map_sizes(smallest=2, largest=4), inside, random_weights=True, points=(1, 2)),
        gradient_of("sampling_locations"),
    ),
    Check(
        "gradient_at_the_border", Stage.GRADIENTS,
        "A location less than one pixel outside the map still has a gradient, because its sample decreases there.",
        "The gradient is set to zero outside the outermost pixel centers, although the sample is not zero.",
        [
            single_point_case((2, 3), -0.25, 1.25, "just above the map", seed=1),
            single_point_case((2, 3), 1.5, 0.75, "just below it", seed=1),
        ],
        sampling_strategy(map_sizes(largest=4), just_outside), gradient_of("sampling_locations"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "At a pixel center, where the derivative jumps, it is the right-sided one.",
        "The left-sided or a central derivative is used. Any choice works for training; torch uses this one.",
        [single_point_case((2, 4), 0, 2, "on a pixel", seed=1)], sampling_strategy(DYADIC),
        gradient_of("sampling_locations", one_sided=True),
    ),
    Check(
        "sums_of_ones", Stage.IDENTITIES, "Inside the maps, values of one give the sum of the weights.",
        "Contributions are missing from the sum.", [random_case([(3, 5), (2, 3)], "two levels", points=2).with_arrays(
            {"sampling_locations": to_locations(np.full((1, 1, 1, 2, 2, 2), 0.75), [(3, 5), (2, 3)])})],
        sampling_strategy(map_sizes(smallest=2), inside, levels=(1, 2), random_weights=True, points=(1, 2),
                          heads=(1, 2)), means_of_ones,
    ),
    Check(
        "halves", Stage.IDENTITIES, "Duplicating each point with half the weight does not change the result.",
        "The result depends on the number of points.", [TYPICAL],
        sampling_strategy(map_sizes(), anywhere, levels=(1, 2), random_weights=True, points=(1, 2)), split_points,
    ),
    Check(
        "levels_exchanged", Stage.IDENTITIES,
        "Reordering the levels, with tokens, locations and weights, does not change the result.",
        "The result depends on the order of levels.", [TYPICAL],
        sampling_strategy(map_sizes(), anywhere, levels=(2, 3), random_weights=True), levels_exchanged,
    ),
    Check(
        "flips", Stage.IDENTITIES, "Flipped locations on a flipped map give the same result.",
        "Left and right, or top and bottom, are treated differently.",
        [single_point_case((3, 5), 2.5, 3.75, "a point at the border")],
        sampling_strategy(map_sizes(), lambda length: quarters(-0.75, length - 0.25), heads=(1, 2)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A NaN location gives NaN for its own query and head only.",
        "NaN is clamped to the border or replaced, which hides a diverged training run.", [case_with_nan()],
        test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch) -> str:
    """Draw the points of the query and head with the largest error on the first channel of each level."""
    value, locations, weights = (case.arguments[name] for name in ("value", "sampling_locations", "attention_weights"))
    sizes = case.arguments["value_spatial_shapes"]
    if not value.size or not locations.size:
        return f"value {value.shape}, locations {locations.shape}"
    n, query, head = _worst(mismatch, value.shape[3])
    points = np.round(location_pixels(locations, sizes), 12)
    parts = [f"image {n}, query {query}, head {head}; points (y, x) in pixels"]
    start = 0
    for level, (height, width) in enumerate(sizes):
        caption = ", ".join(f"{weight:.4g}" for weight in weights[n, query, head, level])
        parts.append(f"level {level}, {height} × {width}, weights {caption}")
        tokens = value[n, start : start + height * width, head, 0].reshape(height, width)
        parts.append(draw_map(tokens, points[n, query, head, level]))
        start += height * width
    return "\n".join(parts)


def _worst(mismatch: Mismatch, depth: int) -> tuple[int, int, int]:
    """Return the (image, query, head) with the largest error in a result (N, Q, M·D)."""
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.shape != got.shape or expected.ndim != 3 or not expected.size:
        return 0, 0, 0
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf)
    n, query, channel = np.unravel_index(int(error.argmax()), error.shape)
    return int(n), int(query), int(channel) // depth


MULTI_SCALE = OpSpec(
    name="multi_scale",
    title="weighted sums of samples from maps of several sizes, as in Deformable DETR",
    function="multi_scale_deformable_attention",
    arguments=(
        Argument("value", "NSMD", "pixels of all levels, row by row, concatenated", differentiable=True),
        Argument("value_spatial_shapes", "", "[(H, W), …] of the levels"),
        Argument("sampling_locations", "NQMLP2", "(x, y) in [0, 1]; 0 and 1 are the map's edges", differentiable=True,
                 extent=lambda arguments: 1.0),
        Argument("attention_weights", "NQMLP", "after the softmax", differentiable=True),
    ),
    returns="NQE",
    reference=Implementation(
        "dat_ref.peers.multi_scale:multi_scale_deformable_attention",
        multi_scale_deformable_attention,
        lambda *arguments: multi_scale_deformable_attention_vjp(*arguments)._asdict(),
    ),
    draw=draw,
    checks=CHECKS,
    mutants=MUTANTS,
)  # fmt: skip
