"""Operation ``multi_scale`` of Deformable DETR: weighted sums of what is sampled from maps of several sizes."""

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
    """Return points (N, Q, M, L, P, 2), (y, x) in pixels of their level, as locations (x, y): the edges are 0 and 1."""
    return ((points_px + 0.5) / np.array(sizes, dtype=np.float64)[:, None])[..., ::-1].copy()


def sampling_case(
    points_px: Array, sizes: Sequence[Size], weights: Array, depth: int = 1, seed: int = 0, name: str = ""
) -> Case:
    """Return a case with numbered tokens."""
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
    """Return a named case: one map, one query that looks at one point, in pixels, with weight one."""
    points_px = np.array([y, x], dtype=np.float64).reshape(1, 1, 1, 1, 1, 2)
    return sampling_case(points_px, [size], np.ones(points_px.shape[:-1]), seed=seed, name=name)


def random_case(
    sizes: Sequence[Size], name: str, images: int = 1, queries: int = 1, heads: int = 1, points: int = 1,
    depth: int = 1, seed: int = 1,
) -> Case:  # fmt: skip
    """Return a named case with points between pixels, some of them outside, and weights of any sum."""
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
    """Return a strategy for a check; one of each (level, image, query, head, point, channel) unless told otherwise."""
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


DYADIC = st.sampled_from([(2, 4), (4, 2), (8, 4)])  # pixel centers are dyadic in [0, 1], so exact

# ------------------------------------------------------------------------------------------------ tests


def gradient_of(name: str, *, one_sided: bool = False) -> Callable[[CheckContext, Case], None]:
    """Return the test of one gradient; the cotangent numbers the results."""

    def test(ctx: CheckContext, case: Case) -> None:
        cotangent = integers(0, *ctx.expected(case).shape)
        # Locations are in maps, not in pixels: 2⁻¹² keeps a step of the five-point rule far below a quarter pixel.
        ctx.compare_gradient(name, cotangent, case, one_sided=one_sided, step=2.0**-12)

    return test


def means_of_ones(ctx: CheckContext, case: Case) -> None:
    """Inside the maps a value of one gives the sum of the weights."""
    ones = case.with_arrays({"value": np.ones_like(case.arguments["value"])})
    weights = case.arguments["attention_weights"]
    depth = case.arguments["value"].shape[3]
    ctx.require_close(ctx.got(ones), np.repeat(weights.sum(axis=(3, 4)), depth, axis=2), case=ones)


def split_points(ctx: CheckContext, case: Case) -> None:
    """Every point twice, each with half the weight."""
    locations, weights = case.arguments["sampling_locations"], case.arguments["attention_weights"]
    twice = case.with_arrays(
        {
            "sampling_locations": np.concatenate([locations, locations], axis=4),
            "attention_weights": np.concatenate([weights, weights], axis=4) / 2,
        }
    )
    ctx.require_close(ctx.got(twice), ctx.got(case), case=twice)


def levels_exchanged(ctx: CheckContext, case: Case) -> None:
    """The levels in reverse order, with their tokens, locations and weights."""
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
    """Mirrored maps, read at mirrored locations."""
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
        raise Mismatch("NaN must come out for the query and head whose location is NaN, and nowhere else", None, got)


def case_with_nan() -> Case:
    case = random_case([(3, 5), (2, 3)], "a NaN among the locations", queries=2, heads=2, points=2, depth=2)
    locations = case.arguments["sampling_locations"].copy()
    locations[0, 1, 0, 1, 0, 0] = np.nan
    return case.with_arrays({"sampling_locations": locations})


# ------------------------------------------------------------------------------------------------ checks

TYPICAL = random_case([(3, 5), (2, 3)], "two levels, two queries", images=2, queries=2, heads=3, points=2, depth=2)
TWO_LEVELS = random_case([(4, 6), (2, 3)], "one query, levels of 4 × 6 and 2 × 3", points=2, seed=3)
SLOPES = random_case([(4, 3), (2, 5)], "two points a level", points=2, heads=2, depth=2, seed=5)

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "It returns finite numbers, in the precision of what it is given.",
        "The function cannot be called as the protocol says, or loses precision on the way.", [TYPICAL], test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and not written to.",
        "It assumes contiguous memory or works in place.", [TYPICAL], test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "Values (N, S, M, D), locations (N, Q, M, L, P, 2) and weights (N, Q, M, L, P) give (N, Q, M·D), for any "
        "number of images and queries, none included.",
        "Axes are exchanged, squeezed, or an empty batch is not thought of.",
        [random_case([(3, 5)], "no images", images=0, queries=2, heads=2),
         random_case([(3, 5)], "no queries", queries=0, depth=3)],
        sampling_strategy(map_sizes(), anywhere, levels=(1, 2), images=(1, 2), queries=(1, 3), heads=(1, 2),
                          depth=(1, 3)), shape,
    ),
    Check(
        "pixel_centers", Stage.VALUES,
        "0 and 1 are the edges of the map: the center of pixel i of n is at (i + ½)/n.",
        "Locations are taken for something else: 0 and 1 for the centers of the first and the last pixel "
        "(align_corners), -1 and 1 for the edges, or the half pixel is forgotten.",
        [single_point_case((3, 3), 1, 1, "the middle of 3 × 3"),
         single_point_case((2, 2), 0, 0, "the first pixel of 2 × 2")],
        lambda setting: diagonal(),
    ),
    Check(
        "columns_before_rows", Stage.VALUES, "A location is (x, y): column first, row second.",
        "x and y are swapped, or the maps are stored column by column.",
        [single_point_case((2, 2), 0, 1, "first row, second column of a square")], sampling_strategy(square_sizes()),
    ),
    Check(
        "not_square", Stage.VALUES, "On a map that is not square each axis has its own length; its size is (H, W).",
        "One axis is scaled with the length of the other: x with the height, say; or sizes are taken for (W, H). "
        "Square maps hide it.",
        [single_point_case((3, 5), 2, 4, "the last pixel of 3 × 5"),
         single_point_case((3, 5), 1, 3, "row 1, column 3 of 3 × 5")],
        sampling_strategy(map_sizes(smallest=2)),
    ),
    Check(
        "single_row", Stage.VALUES, "A map of one row or one column is a map like any other.",
        "A division by H - 1 = 0.",
        [single_point_case((1, 4), 0, 2, "a map of one row"), single_point_case((3, 1), 1, 0, "one column")],
        sampling_strategy(st.sampled_from([(1, 4), (5, 1), (1, 1)])), degenerate=True,
    ),
    Check(
        "between_pixels", Stage.VALUES, "Between pixels the four around are mixed by distance.",
        "Another interpolation (nearest, cubic), or weights that belong to other corners.",
        [single_point_case((2, 3), 0.25, 1.5, "a quarter down, a half to the right", seed=1)],
        sampling_strategy(map_sizes(), inside),
    ),
    Check(
        "zeros_outside", Stage.VALUES, "One pixel outside a map and further, everything is zero.",
        "The border is repeated or wrapped around.",
        [
            single_point_case((2, 3), -1, 0, "a pixel above the map"),
            single_point_case((2, 3), 1, 3, "a pixel right of it"),
            single_point_case((2, 3), 1, -2, "two pixels left of it"),
        ],
        sampling_strategy(map_sizes(), far_outside),
    ),
    Check(
        "border_fades", Stage.VALUES, "Between the last pixel and one pixel outside, the value fades to zero.",
        "Locations there are dropped: a corner outside counts as zero, but the corner inside still counts.",
        [
            single_point_case((2, 3), -0.25, 0, "a quarter above the map"),
            single_point_case((2, 3), 1, 2.75, "just right of it"),
            single_point_case((2, 3), -0.5, -0.5, "on its corner"),
        ],
        sampling_strategy(map_sizes(), just_outside),
    ),
    Check(
        "weights_as_they_are", Stage.VALUES,
        "Every sample counts with its weight, and samples are summed; weights may be negative and of any sum.",
        "Weights are normalised once more (by a softmax, or by their sum), samples are averaged, or weights belong to "
        "other points.",
        [random_case([(3, 5)], "four points of one query", points=4)],
        sampling_strategy(map_sizes(), random_weights=True, points=(2, 3)),
    ),
    Check(
        "levels", Stage.VALUES,
        "Every level has its own tokens, size, locations and weights; the first level comes first, and all are summed.",
        "Levels are taken in another order, cut from the tokens at the wrong place, scaled with another level's size, "
        "or not summed: one overwrites the other.",
        [TWO_LEVELS, random_case([(2, 3), (5, 4), (3, 2)], "three levels", points=2)],
        sampling_strategy(map_sizes(smallest=2), levels=(2, 3), random_weights=True, points=(1, 2)),
    ),
    Check(
        "heads", Stage.VALUES,
        "Every head has its own channels, locations and weights; the result has head by head, each with its channels.",
        "Heads are mixed up, or the result's channels are ordered the other way round: all heads' first channel first.",
        [random_case([(3, 5)], "three heads of two channels", heads=3, depth=2)],
        sampling_strategy(map_sizes(), random_weights=True, heads=(2, 3), depth=(2, 3)),
    ),
    Check(
        "queries_and_images", Stage.VALUES, "Every query of every image has its own locations and weights.",
        "All queries, or all images, use the first one's.",
        [random_case([(3, 5)], "three queries", queries=3), random_case([(3, 5)], "two images", images=2)],
        sampling_strategy(map_sizes(), random_weights=True, queries=(2, 3), images=(1, 2)),
    ),
    Check(
        "fine_positions", Stage.VALUES, "Positions keep their fractions on a large map.",
        "Positions are kept in half precision: bfloat16 has 8 bits, so that beyond pixel 256 halves are lost.",
        [single_point_case((2, 301), 0, 290.75, "far along a map of 2 × 301")],
        sampling_strategy(st.sampled_from([(2, 301), (257, 3)]), inside),
    ),
    Check(
        "anywhere", Stage.VALUES, "The reference's sum for any locations, levels, heads, queries and images.",
        "A mistake that none of the checks above isolates.", [TYPICAL],
        sampling_strategy(map_sizes(), anywhere, levels=(1, 2), random_weights=True, images=(1, 2), queries=(1, 2),
                          heads=(1, 2), points=(1, 2), depth=(1, 2)),
    ),
    Check(
        "gradient_of_the_value", Stage.GRADIENTS, "A token gains weight times interpolation from every sample near it.",
        "A wrong factor, or samples that are forgotten: of several near a token the last one wins.", [SLOPES],
        sampling_strategy(map_sizes(largest=3), just_outside, random_weights=True, points=(1, 2)), gradient_of("value"),
    ),
    Check(
        "gradient_of_the_weights", Stage.GRADIENTS, "A weight's gradient is what was sampled.", "A wrong factor.",
        [SLOPES], sampling_strategy(map_sizes(largest=4), inside, random_weights=True, points=(1, 2)),
        gradient_of("attention_weights"),
    ),
    Check(
        "gradient_of_the_locations", Stage.GRADIENTS,
        "A location's gradient is the slope of its sample times its weight, in fractions of the map, x first.",
        "A wrong factor (of pixels: the map's width and height are missing), x and y swapped, or no gradient at all.",
        [single_point_case((3, 5), 0.25, 1.5, "a point between pixels", seed=1)],
        sampling_strategy(map_sizes(smallest=2, largest=4), inside, random_weights=True, points=(1, 2)),
        gradient_of("sampling_locations"),
    ),
    Check(
        "gradient_at_the_border", Stage.GRADIENTS, "Within a pixel outside the map a location still has a slope.",
        "The gradient is stopped at the border, where the value is not.",
        [
            single_point_case((2, 3), -0.25, 1.25, "just above the map", seed=1),
            single_point_case((2, 3), 1.5, 0.75, "just below it", seed=1),
        ],
        sampling_strategy(map_sizes(largest=4), just_outside), gradient_of("sampling_locations"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "On a pixel center, where the slope jumps, it is the one to the right and below.",
        "The slope is taken from the other side or from between. Any choice trains; this one is the choice of torch.",
        [single_point_case((2, 4), 0, 2, "on a pixel", seed=1)], sampling_strategy(DYADIC),
        gradient_of("sampling_locations", one_sided=True),
    ),
    Check(
        "sums_of_ones", Stage.IDENTITIES, "Inside the maps a value of one gives the sum of the weights.",
        "Something is not summed.", [random_case([(3, 5), (2, 3)], "two levels", points=2).with_arrays(
            {"sampling_locations": to_locations(np.full((1, 1, 1, 2, 2, 2), 0.75), [(3, 5), (2, 3)])})],
        sampling_strategy(map_sizes(smallest=2), inside, levels=(1, 2), random_weights=True, points=(1, 2),
                          heads=(1, 2)), means_of_ones,
    ),
    Check(
        "halves", Stage.IDENTITIES, "A point given twice, with half the weight each, changes nothing.",
        "The number of points enters the result.", [TYPICAL],
        sampling_strategy(map_sizes(), anywhere, levels=(1, 2), random_weights=True, points=(1, 2)), split_points,
    ),
    Check(
        "levels_exchanged", Stage.IDENTITIES, "Levels in another order, tokens and all, give the same.",
        "Levels are told apart by their order.", [TYPICAL],
        sampling_strategy(map_sizes(), anywhere, levels=(2, 3), random_weights=True), levels_exchanged,
    ),
    Check(
        "flips", Stage.IDENTITIES, "Mirrored locations on a mirrored map read the same.",
        "Left and right, or top and bottom, are treated differently.",
        [single_point_case((3, 5), 2.5, 3.75, "a point at the border")],
        sampling_strategy(map_sizes(), lambda length: quarters(-0.75, length - 0.25), heads=(1, 2)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A location that is not a number gives NaN, to its own query and head only.",
        "NaN is clamped to the border or skipped, which hides a diverged training run.", [case_with_nan()],
        test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch) -> str:
    """Draw what the worst query's worst head looks at, level by level, in its first channel."""
    value, locations, weights = (case.arguments[name] for name in ("value", "sampling_locations", "attention_weights"))
    sizes = case.arguments["value_spatial_shapes"]
    if not value.size or not locations.size:
        return f"value {value.shape}, locations {locations.shape}"
    n, query, head = _worst(mismatch, value.shape[3])
    points = np.round(location_pixels(locations, sizes), 12)
    parts = [f"image {n}, query {query}, head {head}; points (y, x) in pixels, weight by weight"]
    start = 0
    for level, (height, width) in enumerate(sizes):
        caption = ", ".join(f"{weight:.4g}" for weight in weights[n, query, head, level])
        parts.append(f"level {level}, {height} × {width}, weights {caption}")
        tokens = value[n, start : start + height * width, head, 0].reshape(height, width)
        parts.append(draw_map(tokens, points[n, query, head, level]))
        start += height * width
    return "\n".join(parts)


def _worst(mismatch: Mismatch, depth: int) -> tuple[int, int, int]:
    """Return (image, query, head) where a result (N, Q, M·D) is furthest off."""
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
        Argument("value", "NSMD", "the levels' pixels, row by row, one level after the other", differentiable=True),
        Argument("value_spatial_shapes", "", "[(H, W), …] of the levels"),
        Argument("sampling_locations", "NQMLP2", "(x, y) in [0, 1]; 0 and 1 are the map's edges", differentiable=True,
                 extent=lambda arguments: 1.0),
        Argument("attention_weights", "NQMLP", "as they are: no softmax is taken", differentiable=True),
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
