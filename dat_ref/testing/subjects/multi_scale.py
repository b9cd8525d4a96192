"""Subject ``multi_scale``: Deformable DETR's operation, weighted sums of what is sampled from maps of several sizes."""

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
from ..drawing import draw_map
from ..strategies import anywhere, map_sizes, numbers, quarters, seeds, square_sizes, whole
from ..subject import Argument, Case, Check, Implementation, Mismatch, Setting, Stage, Subject
from ..trial import Trial
from .multi_scale_mutants import MUTANTS

Coordinate = Callable[[int], st.SearchStrategy[float]]

# ------------------------------------------------------------------------------------------------ cases


def located(points_px: Array, sizes: Sequence[Size]) -> Array:
    """Return points (N, Q, M, L, P, 2), (y, x) in pixels of their level, as locations (x, y): the edges are 0 and 1."""
    return ((points_px + 0.5) / np.array(sizes, dtype=np.float64)[:, None])[..., ::-1].copy()


def case_of(
    points_px: Array, sizes: Sequence[Size], weights: Array, depth: int = 1, seed: int = 0, name: str = ""
) -> Case:
    """Return a case with numbered tokens."""
    tokens = sum(height * width for height, width in sizes)
    value = numbers(seed, len(points_px), tokens, points_px.shape[2], depth)
    return Case(
        {
            "value": value,
            "value_spatial_shapes": [tuple(size) for size in sizes],
            "sampling_locations": located(points_px, sizes),
            "attention_weights": weights,
        },
        name,
    )


def one_point(size: Size, y: float, x: float, name: str = "", seed: int = 0) -> Case:
    """Return a named case: one map, one query that looks at one point, in pixels, with weight one."""
    placed = np.array([y, x], dtype=np.float64).reshape(1, 1, 1, 1, 1, 2)
    return case_of(placed, [size], np.ones(placed.shape[:-1]), seed=seed, name=name)


def mixed(
    sizes: Sequence[Size], name: str, images: int = 1, queries: int = 1, heads: int = 1, points: int = 1,
    depth: int = 1, seed: int = 1,
) -> Case:  # fmt: skip
    """Return a named case with points between pixels, some of them outside, and weights of any sum."""
    shape = (images, queries, heads, len(sizes), points)
    rng = np.random.default_rng(seed)
    extent = np.array(sizes)[:, None]
    placed = np.floor(rng.uniform(-0.5, 1.0, (*shape, 2)) * extent * 4 + 1) / 4
    return case_of(placed, sizes, numbers(seed, *shape) / 4, depth, seed, name)


@st.composite
def sums(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[Size],
    coordinate: Coordinate,
    levels: Sequence[int],
    counts: dict[str, Sequence[int]],
    weigh: bool,
) -> Case:
    """Draw tokens, locations and weights."""
    maps = [draw(sizes) for _ in range(draw(st.sampled_from(levels)))]
    numbers_of = {
        name: draw(st.sampled_from(counts.get(name, (1,)))) for name in ("images", "queries", "heads", "points")
    }
    shape = (*(numbers_of[name] for name in ("images", "queries", "heads")), len(maps), numbers_of["points"])
    placed = np.zeros((*shape, 2))
    for place in np.ndindex(shape):
        placed[place] = [draw(coordinate(length)) for length in maps[place[3]]]
    weights = numbers(1 + draw(seeds), *shape) / 4 if weigh else np.ones(shape)
    return case_of(placed, maps, weights, draw(st.sampled_from(counts.get("depth", (1,)))), draw(seeds))


def drawn(
    sizes: st.SearchStrategy[Size],
    coordinate: Coordinate = whole,
    *,
    levels: Sequence[int] = (1,),
    weigh: bool = False,
    **counts: Sequence[int],
) -> Callable[[Setting], st.SearchStrategy[Case]]:
    """Return a strategy for a check; one of each (level, image, query, head, point, channel) unless told otherwise."""
    return lambda setting: sums(sizes, coordinate, levels, counts, weigh)


@st.composite
def diagonal(draw: st.DrawFn) -> Case:
    """Draw a pixel (i, i) of a square map."""
    size = draw(square_sizes())
    position = draw(whole(size[0]))
    return one_point(size, position, position, seed=draw(seeds))


def inside(length: int) -> st.SearchStrategy[float]:
    return quarters(0, length - 1) if length > 1 else st.just(0.0)


def far_outside(length: int) -> st.SearchStrategy[float]:
    return st.sampled_from([-1.0, float(length), -2.0, length + 1.0, 1e4, -1e4])


def just_outside(length: int) -> st.SearchStrategy[float]:
    return st.sampled_from([-0.5, length - 0.5, -0.25, length - 0.75])


DYADIC = st.sampled_from([(2, 4), (4, 2), (8, 4)])  # pixel centers are dyadic in [0, 1], so exact

# ------------------------------------------------------------------------------------------------ tests


def gradient_of(name: str, *, one_sided: bool = False) -> Callable[[Trial, Case], None]:
    """Return the test of one gradient; the cotangent numbers the results."""

    def test(trial: Trial, case: Case) -> None:
        cotangent = numbers(0, *trial.expected(case).shape)
        # Locations are in maps, not in pixels: 2⁻¹² keeps a step of the five-point rule far below a quarter pixel.
        trial.compare_gradient(name, cotangent, case, one_sided=one_sided, step=2.0**-12)

    return test


def means_of_ones(trial: Trial, case: Case) -> None:
    """Inside the maps a value of one gives the sum of the weights."""
    ones = case.with_arrays({"value": np.ones_like(case.arguments["value"])})
    weights = case.arguments["attention_weights"]
    depth = case.arguments["value"].shape[3]
    trial.agree(trial.got(ones), np.repeat(weights.sum(axis=(3, 4)), depth, axis=2), case=ones)


def halves(trial: Trial, case: Case) -> None:
    """Every point twice, each with half the weight."""
    locations, weights = case.arguments["sampling_locations"], case.arguments["attention_weights"]
    twice = case.with_arrays(
        {
            "sampling_locations": np.concatenate([locations, locations], axis=4),
            "attention_weights": np.concatenate([weights, weights], axis=4) / 2,
        }
    )
    trial.agree(trial.got(twice), trial.got(case), case=twice)


def levels_exchanged(trial: Trial, case: Case) -> None:
    """The levels in reverse order, with their tokens, locations and weights."""
    sizes = case.arguments["value_spatial_shapes"]
    ends = np.cumsum([height * width for height, width in sizes])
    cut = np.split(case.arguments["value"], ends[:-1], axis=1)
    turned = case.with_arrays(
        {
            "value": np.concatenate(cut[::-1], axis=1),
            "sampling_locations": case.arguments["sampling_locations"][:, :, :, ::-1].copy(),
            "attention_weights": case.arguments["attention_weights"][:, :, :, ::-1].copy(),
        }
    )
    turned = Case({**turned.arguments, "value_spatial_shapes": sizes[::-1]})
    trial.agree(trial.got(turned), trial.got(case), case=turned)


def flips(trial: Trial, case: Case) -> None:
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
        trial.agree(trial.got(flipped), trial.got(case), case=flipped)


def nan_comes_out(trial: Trial, case: Case) -> None:
    got = trial.got(case)
    unknown = np.isnan(case.arguments["sampling_locations"]).any(axis=(3, 4, 5))
    expected = np.repeat(unknown, case.arguments["value"].shape[3], axis=2)
    if got.shape != expected.shape or not (np.isnan(got) == expected).all():
        raise Mismatch("NaN must come out for the query and head whose location is NaN, and nowhere else", None, got)


def one_unknown() -> Case:
    case = mixed([(3, 5), (2, 3)], "a NaN among the locations", queries=2, heads=2, points=2, depth=2)
    locations = case.arguments["sampling_locations"].copy()
    locations[0, 1, 0, 1, 0, 0] = np.nan
    return case.with_arrays({"sampling_locations": locations})


# ------------------------------------------------------------------------------------------------ checks

PLAIN = mixed([(3, 5), (2, 3)], "two levels, two queries", images=2, queries=2, heads=3, points=2, depth=2)
TWO_LEVELS = mixed([(4, 6), (2, 3)], "one query, levels of 4 × 6 and 2 × 3", points=2, seed=3)
SLOPES = mixed([(4, 3), (2, 5)], "two points a level", points=2, heads=2, depth=2, seed=5)

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "It returns finite numbers, in the precision of what it is given.",
        "The function cannot be called as the protocol says, or loses precision on the way.", [PLAIN], test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and not written to.",
        "It assumes contiguous memory or works in place.", [PLAIN], test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "Values (N, S, M, D), locations (N, Q, M, L, P, 2) and weights (N, Q, M, L, P) give (N, Q, M·D), for any "
        "number of images and queries, none included.",
        "Axes are exchanged, squeezed, or an empty batch is not thought of.",
        [mixed([(3, 5)], "no images", images=0, queries=2, heads=2), mixed([(3, 5)], "no queries", queries=0, depth=3)],
        drawn(map_sizes(), anywhere, levels=(1, 2), images=(1, 2), queries=(1, 3), heads=(1, 2), depth=(1, 3)), shape,
    ),
    Check(
        "pixel_centers", Stage.VALUES,
        "0 and 1 are the edges of the map: the center of pixel i of n is at (i + ½)/n.",
        "Locations are taken for something else: 0 and 1 for the centers of the first and the last pixel "
        "(align_corners), -1 and 1 for the edges, or the half pixel is forgotten.",
        [one_point((3, 3), 1, 1, "the middle of 3 × 3"), one_point((2, 2), 0, 0, "the first pixel of 2 × 2")],
        lambda setting: diagonal(),
    ),
    Check(
        "columns_before_rows", Stage.VALUES, "A location is (x, y): column first, row second.",
        "x and y are swapped, or the maps are stored column by column.",
        [one_point((2, 2), 0, 1, "first row, second column of a square")], drawn(square_sizes()),
    ),
    Check(
        "not_square", Stage.VALUES, "On a map that is not square each axis has its own length; its size is (H, W).",
        "One axis is scaled with the length of the other: x with the height, say; or sizes are taken for (W, H). "
        "Square maps hide it.",
        [one_point((3, 5), 2, 4, "the last pixel of 3 × 5"), one_point((3, 5), 1, 3, "row 1, column 3 of 3 × 5")],
        drawn(map_sizes(smallest=2)),
    ),
    Check(
        "single_row", Stage.VALUES, "A map of one row or one column is a map like any other.",
        "A division by H - 1 = 0.",
        [one_point((1, 4), 0, 2, "a map of one row"), one_point((3, 1), 1, 0, "one column")],
        drawn(st.sampled_from([(1, 4), (5, 1), (1, 1)])), degenerate=True,
    ),
    Check(
        "between_pixels", Stage.VALUES, "Between pixels the four around are mixed by distance.",
        "Another interpolation (nearest, cubic), or weights that belong to other corners.",
        [one_point((2, 3), 0.25, 1.5, "a quarter down, a half to the right", seed=1)], drawn(map_sizes(), inside),
    ),
    Check(
        "zeros_outside", Stage.VALUES, "One pixel outside a map and further, everything is zero.",
        "The border is repeated or wrapped around.",
        [
            one_point((2, 3), -1, 0, "a pixel above the map"), one_point((2, 3), 1, 3, "a pixel right of it"),
            one_point((2, 3), 1, -2, "two pixels left of it"),
        ],
        drawn(map_sizes(), far_outside),
    ),
    Check(
        "border_fades", Stage.VALUES, "Between the last pixel and one pixel outside, the value fades to zero.",
        "Locations there are dropped: a corner outside counts as zero, but the corner inside still counts.",
        [
            one_point((2, 3), -0.25, 0, "a quarter above the map"), one_point((2, 3), 1, 2.75, "just right of it"),
            one_point((2, 3), -0.5, -0.5, "on its corner"),
        ],
        drawn(map_sizes(), just_outside),
    ),
    Check(
        "weights_as_they_are", Stage.VALUES,
        "Every sample counts with its weight, and samples are summed; weights may be negative and of any sum.",
        "Weights are normalised once more (by a softmax, or by their sum), samples are averaged, or weights belong to "
        "other points.",
        [mixed([(3, 5)], "four points of one query", points=4)],
        drawn(map_sizes(), weigh=True, points=(2, 3)),
    ),
    Check(
        "levels", Stage.VALUES,
        "Every level has its own tokens, size, locations and weights; the first level comes first, and all are summed.",
        "Levels are taken in another order, cut from the tokens at the wrong place, scaled with another level's size, "
        "or not summed: one overwrites the other.",
        [TWO_LEVELS, mixed([(2, 3), (5, 4), (3, 2)], "three levels", points=2)],
        drawn(map_sizes(smallest=2), levels=(2, 3), weigh=True, points=(1, 2)),
    ),
    Check(
        "heads", Stage.VALUES,
        "Every head has its own channels, locations and weights; the result has head by head, each with its channels.",
        "Heads are mixed up, or the result's channels are ordered the other way round: all heads' first channel first.",
        [mixed([(3, 5)], "three heads of two channels", heads=3, depth=2)],
        drawn(map_sizes(), weigh=True, heads=(2, 3), depth=(2, 3)),
    ),
    Check(
        "queries_and_images", Stage.VALUES, "Every query of every image has its own locations and weights.",
        "All queries, or all images, use the first one's.",
        [mixed([(3, 5)], "three queries", queries=3), mixed([(3, 5)], "two images", images=2)],
        drawn(map_sizes(), weigh=True, queries=(2, 3), images=(1, 2)),
    ),
    Check(
        "fine_positions", Stage.VALUES, "Positions keep their fractions on a large map.",
        "Positions are kept in half precision: bfloat16 has 8 bits, so that beyond pixel 256 halves are lost.",
        [one_point((2, 301), 0, 290.75, "far along a map of 2 × 301")],
        drawn(st.sampled_from([(2, 301), (257, 3)]), inside),
    ),
    Check(
        "anywhere", Stage.VALUES, "The reference's sum for any locations, levels, heads, queries and images.",
        "A mistake that none of the checks above isolates.", [PLAIN],
        drawn(map_sizes(), anywhere, levels=(1, 2), weigh=True, images=(1, 2), queries=(1, 2), heads=(1, 2),
              points=(1, 2), depth=(1, 2)),
    ),
    Check(
        "gradient_of_the_value", Stage.GRADIENTS, "A token gains weight times interpolation from every sample near it.",
        "A wrong factor, or samples that are forgotten: of several near a token the last one wins.", [SLOPES],
        drawn(map_sizes(largest=3), just_outside, weigh=True, points=(1, 2)), gradient_of("value"),
    ),
    Check(
        "gradient_of_the_weights", Stage.GRADIENTS, "A weight's gradient is what was sampled.", "A wrong factor.",
        [SLOPES], drawn(map_sizes(largest=4), inside, weigh=True, points=(1, 2)), gradient_of("attention_weights"),
    ),
    Check(
        "gradient_of_the_locations", Stage.GRADIENTS,
        "A location's gradient is the slope of its sample times its weight, in fractions of the map, x first.",
        "A wrong factor (of pixels: the map's width and height are missing), x and y swapped, or no gradient at all.",
        [one_point((3, 5), 0.25, 1.5, "a point between pixels", seed=1)],
        drawn(map_sizes(smallest=2, largest=4), inside, weigh=True, points=(1, 2)), gradient_of("sampling_locations"),
    ),
    Check(
        "gradient_at_the_border", Stage.GRADIENTS, "Within a pixel outside the map a location still has a slope.",
        "The gradient is stopped at the border, where the value is not.",
        [
            one_point((2, 3), -0.25, 1.25, "just above the map", seed=1),
            one_point((2, 3), 1.5, 0.75, "just below it", seed=1),
        ],
        drawn(map_sizes(largest=4), just_outside), gradient_of("sampling_locations"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "On a pixel center, where the slope jumps, it is the one to the right and below.",
        "The slope is taken from the other side or from between. Any choice trains; this one is the choice of torch.",
        [one_point((2, 4), 0, 2, "on a pixel", seed=1)], drawn(DYADIC),
        gradient_of("sampling_locations", one_sided=True),
    ),
    Check(
        "sums_of_ones", Stage.IDENTITIES, "Inside the maps a value of one gives the sum of the weights.",
        "Something is not summed.", [mixed([(3, 5), (2, 3)], "two levels", points=2).with_arrays(
            {"sampling_locations": located(np.full((1, 1, 1, 2, 2, 2), 0.75), [(3, 5), (2, 3)])})],
        drawn(map_sizes(smallest=2), inside, levels=(1, 2), weigh=True, points=(1, 2), heads=(1, 2)), means_of_ones,
    ),
    Check(
        "halves", Stage.IDENTITIES, "A point given twice, with half the weight each, changes nothing.",
        "The number of points enters the result.", [PLAIN],
        drawn(map_sizes(), anywhere, levels=(1, 2), weigh=True, points=(1, 2)), halves,
    ),
    Check(
        "levels_exchanged", Stage.IDENTITIES, "Levels in another order, tokens and all, give the same.",
        "Levels are told apart by their order.", [PLAIN],
        drawn(map_sizes(), anywhere, levels=(2, 3), weigh=True), levels_exchanged,
    ),
    Check(
        "flips", Stage.IDENTITIES, "Mirrored locations on a mirrored map read the same.",
        "Left and right, or top and bottom, are treated differently.",
        [one_point((3, 5), 2.5, 3.75, "a point at the border")],
        drawn(map_sizes(), lambda length: quarters(-0.75, length - 0.25), heads=(1, 2)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A location that is not a number gives NaN, to its own query and head only.",
        "NaN is clamped to the border or skipped, which hides a diverged training run.", [one_unknown()],
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
        told = ", ".join(f"{weight:.4g}" for weight in weights[n, query, head, level])
        parts.append(f"level {level}, {height} × {width}, weights {told}")
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


MULTI_SCALE = Subject(
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
