"""Operation ``sampler``: bilinear sampling of maps at points, with zeros outside the map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...ops.grid import Size
from ...ops.sampling import bilinear_sample, bilinear_sample_vjp
from ..common import leaves_inputs_alone, runs, shape
from ..context import CheckContext
from ..cost import memory_grows_by_at_most
from ..drawing import draw_map
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Setting, Stage
from ..strategies import anywhere, integers, map_sizes, on_pixel, points_in, quarters, seeds, square_sizes
from .sampler_mutants import MUTANTS

# ------------------------------------------------------------------------------------------------ cases

ONE = st.just(1)


def example(
    size: Size, *points: tuple[float, float], name: str, maps: int = 1, channels: int = 1, seed: int = 0
) -> Case:
    """Return a named case: maps with numbered pixels, and the same points for every map."""
    points_px = np.broadcast_to(np.array(points, dtype=np.float64).reshape(-1, 2), (maps, len(points), 2))
    return Case({"x": integers(seed, maps, channels, *size), "points_px": points_px.copy()}, name)


@st.composite
def draw_sampling(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[Size],
    coordinate: Callable[[int], st.SearchStrategy[float]],
    maps: st.SearchStrategy[int],
    channels: st.SearchStrategy[int],
    counts: tuple[int, ...],
) -> Case:
    """Draw maps and points."""
    size, n, c, count = draw(sizes), draw(maps), draw(channels), draw(st.sampled_from(counts))
    points = [draw(points_in(size, coordinate, (count,))) for _ in range(n)]
    return Case({"x": integers(draw(seeds), n, c, *size), "points_px": np.array(points).reshape(n, count, 2)})


def sampling_strategy(
    sizes: st.SearchStrategy[Size],
    coordinate: Callable[[int], st.SearchStrategy[float]] = on_pixel,
    maps: st.SearchStrategy[int] = ONE,
    channels: st.SearchStrategy[int] = ONE,
    counts: tuple[int, ...] = (1, 3),
) -> Callable[[Setting], st.SearchStrategy[Case]]:
    """Return the strategy of a check; one map with one channel by default."""
    return lambda setting: draw_sampling(sizes, coordinate, maps, channels, counts)


def inside(length: int) -> st.SearchStrategy[float]:
    return quarters(0, length - 1) if length > 1 else st.just(0.0)


def just_outside(length: int) -> st.SearchStrategy[float]:
    return st.sampled_from([-0.5, length - 0.5, -0.25, length - 0.75])


def far_outside(length: int) -> st.SearchStrategy[float]:
    # Negative coordinates are integers: truncation instead of floor goes wrong at -1.5, which `border_fades` tests.
    return st.sampled_from([-1.0, float(length), -2.0, length + 1.0, length + 0.5, 1e6, -1e6])


# ------------------------------------------------------------------------------------------------ tests


def gradient_of(name: str, *, one_sided: bool = False) -> Callable[[CheckContext, Case], None]:
    """Return the test of one gradient; the elements of the cotangent are 1, 2, 3 …."""

    def test(ctx: CheckContext, case: Case) -> None:
        cotangent = integers(0, *ctx.expected(case).shape)
        ctx.compare_gradient(name, cotangent, case, one_sided=one_sided)

    return test


def weights_sum_to_one(ctx: CheckContext, case: Case) -> None:
    ones = case.with_arrays({"x": np.ones_like(case.arguments["x"])})
    got = ctx.got(ones)
    ctx.require_close(got, np.ones_like(got), case=ones)


def zero_frame(ctx: CheckContext, case: Case) -> None:
    """Require the same samples after padding the map by (1, 2) pixels and shifting the points by (1, 2)."""
    x, points = case.arguments["x"], case.arguments["points_px"]
    padded = case.with_arrays({"x": np.pad(x, ((0, 0), (0, 0), (1, 1), (2, 2))), "points_px": points + [1.0, 2.0]})
    ctx.require_close(ctx.got(padded), ctx.got(case), case=padded)


def flips(ctx: CheckContext, case: Case) -> None:
    x, points = case.arguments["x"], case.arguments["points_px"]
    for axis in range(2):
        mirrored = points.copy()
        mirrored[..., axis] = x.shape[2 + axis] - 1 - points[..., axis]
        flipped = case.with_arrays({"x": np.flip(x, 2 + axis).copy(), "points_px": mirrored})
        ctx.require_close(ctx.got(flipped), ctx.got(case), case=flipped)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    got = ctx.got(case)
    with_nan = np.isnan(case.arguments["points_px"]).any(axis=-1)[:, None]
    if got.shape != (got.shape[0], got.shape[1], with_nan.shape[2]) or not (np.isnan(got) == with_nan).all():
        raise Mismatch("expected NaN in the samples of NaN points, and nowhere else", None, got)


def memory(ctx: CheckContext, case: Case) -> None:
    small = case.with_arrays({"x": case.arguments["x"][:, :, :8, :8].copy()})
    memory_grows_by_at_most(ctx, small, case, 8 * case.arguments["x"].size)


# ------------------------------------------------------------------------------------------------ checks

CHECKS = (
    Check(
        "runs", Stage.SMOKE,
        "The result is finite and has the dtype of the inputs.",
        "The function raised an error, returned another dtype, or returned NaN or infinity.",
        [example((3, 5), (1, 2), (0.5, 3.25), name="two points on a map of 3 × 5", channels=2)], test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE,
        "Read-only and strided arrays are accepted, and inputs are not modified.",
        "The function assumes contiguous memory, writes to its inputs, or is not deterministic.",
        [example((3, 5), (1, 2), (0.5, 3.25), name="two points on a map of 3 × 5", channels=2)],
        test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "Maps (N, C, H, W) and points (N, P, 2) give samples (N, C, P); N and P may be 0.",
        "Axes are swapped or squeezed, or an empty batch or a map of one pixel is not handled.",
        [
            example((3, 5), (1, 2), name="no maps", maps=0, channels=2),
            example((3, 5), name="no points", maps=2, channels=4),
            example((1, 1), (0, 0), name="a map of one pixel", maps=2, channels=3),
        ],
        sampling_strategy(map_sizes(), anywhere, st.integers(0, 3), st.sampled_from([1, 4]), (1, 0, 5)), shape,
    ),
    Check(
        "first_pixel", Stage.VALUES,
        "Position (0, 0) is the center of the first pixel.",
        "All positions are shifted, most likely by half a pixel: 0 is taken as the edge of the map, or align_corners "
        "is wrong.",
        [example((2, 3), (0, 0), name="the first pixel")],
        sampling_strategy(map_sizes(smallest=2), lambda length: st.just(0.0), counts=(1,)),
    ),
    Check(
        "last_pixel", Stage.VALUES,
        "Position (H - 1, W - 1) is the center of the last pixel.",
        "Positions are stretched: H is used instead of H - 1, or the reverse.",
        [example((3, 3), (2, 2), name="the last pixel of a square")],
        sampling_strategy(square_sizes(), lambda length: st.just(length - 1.0), counts=(1,)),
    ),
    Check(
        "rows_before_columns", Stage.VALUES,
        "A point is (y, x): row first, column second.",
        "x and y are swapped, in the points or in the map.",
        [example((2, 2), (0, 1), name="first row, second column of a square")],
        sampling_strategy(square_sizes(), on_pixel, counts=(1,)),
    ),
    Check(
        "not_square", Stage.VALUES,
        "On a non-square map, each axis uses its own length.",
        "One axis is normalized by the length of the other, e.g. x by the height. Square maps hide this mistake.",
        [example((3, 5), (2, 4), (0, 4), (1, 3), name="integer positions on 3 × 5")],
        sampling_strategy(map_sizes(smallest=2), on_pixel, counts=(1,)),
    ),
    Check(
        "between_pixels", Stage.VALUES,
        "Between pixels, interpolation is bilinear: the four neighbors have weights (1 - dy)(1 - dx), and so on.",
        "Another interpolation is used (nearest, bicubic), or weights are assigned to the wrong neighbors.",
        [example((2, 3), (0.25, 1.5), name="a quarter down, a half to the right", seed=1)],
        sampling_strategy(map_sizes(smallest=2), inside, counts=(1,)),
    ),
    Check(
        "zeros_outside", Stage.VALUES,
        "A point one pixel or more outside the outermost pixel centers reads zero.",
        "The border is replicated, reflected or wrapped around (a negative index reads the last row).",
        [example((2, 3), (-1, 0), (2, 1), (1, 3), (1, -2), (0, 1e6), name="one, two and many pixels outside")],
        sampling_strategy(map_sizes(smallest=2), far_outside, counts=(1,)),
    ),
    Check(
        "border_fades", Stage.VALUES,
        "From the outermost pixel center to one pixel outside it, the sample decreases linearly to zero.",
        "Points in this strip read zero, or positions are truncated instead of floored. A neighbor outside the map "
        "counts as zero, but a neighbor inside still contributes.",
        [example((2, 3), (-0.25, 0), (1.5, 1), (0, 2.75), (-0.5, -0.5), name="within a pixel of the border")],
        sampling_strategy(map_sizes(smallest=2), just_outside, counts=(1,)),
    ),
    Check(
        "single_row", Stage.VALUES,
        "A map with a single row or column is sampled like any other.", "The function divides by H - 1 = 0.",
        [example((1, 4), (0, 2), (0.5, 1.25), name="a map of one row"), example((3, 1), (1, 0), name="one column")],
        sampling_strategy(st.sampled_from([(1, 4), (5, 1), (1, 1)]), anywhere, counts=(1,)), degenerate=True,
    ),
    Check(
        "channels_and_maps", Stage.VALUES,
        "Every channel of a map is sampled at the points of that map.",
        "Channels or maps are mixed up, or all maps use the points of one map.",
        [
            Case(
                {"x": integers(0, 2, 3, 2, 4), "points_px": np.array([[[0.0, 1.0]], [[1.0, 2.0]]])},
                "two maps of three channels",
            )
        ],
        sampling_strategy(map_sizes(), on_pixel, st.sampled_from([2, 3]), st.sampled_from([1, 3, 2]), (1, 2)),
    ),
    Check(
        "fine_positions", Stage.VALUES,
        "On a large map, positions keep their fractional part.",
        "Positions are stored in half precision. bfloat16 has 8 significant bits and loses half pixels above 128.",
        [example((2, 301), (0, 290.75), (1, 153.25), name="far along a map of 2 × 301")],
        sampling_strategy(st.sampled_from([(2, 301), (257, 3)]), inside, counts=(1,)),
    ),
    Check(
        "anywhere", Stage.VALUES,
        "Samples equal the reference at any point of any map.",
        "A mistake that no earlier check isolates.",
        [example((4, 7), (1, 2), (3.5, -0.5), (2.75, 6.5), name="three points on 4 × 7", maps=2, channels=2, seed=3)],
        sampling_strategy(map_sizes(), anywhere, st.sampled_from([1, 2]), st.sampled_from([1, 3])),
    ),
    Check(
        "gradient_of_the_map", Stage.GRADIENTS,
        "Each of the four pixels around a point receives the sample's gradient times its interpolation weight.",
        "A factor is wrong, or one of the four pixels is missing.",
        [example((2, 3), (0.25, 1.5), name="one point between pixels", channels=2)],
        sampling_strategy(map_sizes(largest=4), lambda length: quarters(-0.75, length - 0.25), counts=(1,)),
        gradient_of("x"),
    ),
    Check(
        "gradient_adds_up", Stage.GRADIENTS,
        "Gradients of points that share a pixel are summed.",
        "The gradient is assigned instead of accumulated, so only the last point counts.",
        [example((2, 3), (0.25, 1.5), (0.5, 1.25), name="two points among the same pixels")],
        sampling_strategy(map_sizes(largest=4), lambda length: quarters(-0.75, length - 0.25), counts=(3,)),
        gradient_of("x"),
    ),
    Check(
        "gradient_of_the_points", Stage.GRADIENTS,
        "The gradient of a point is the derivative of its sample with respect to (y, x) in pixels.",
        "A factor is wrong (H/2 or (H - 1)/2 if coordinates are normalized), y and x are swapped, or it is missing.",
        [example((3, 5), (0.25, 1.5), (1.75, 3.25), name="two points between pixels", channels=2, seed=1)],
        sampling_strategy(map_sizes(smallest=2, largest=4), inside, counts=(1, 2)), gradient_of("points_px"),
    ),
    Check(
        "gradient_at_the_border", Stage.GRADIENTS,
        "A point less than one pixel outside the map still has a gradient, because its sample decreases there.",
        "The gradient is set to zero outside the outermost pixel centers, although the sample is not zero.",
        [example((2, 3), (-0.25, 1.25), (1.5, 0.75), name="just above and just below the map", seed=1)],
        sampling_strategy(map_sizes(largest=4), just_outside, counts=(1,)), gradient_of("points_px"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "At a pixel center, where the derivative jumps, the gradient is the derivative towards larger y and x.",
        "The derivative is taken from the other side, or averaged over both. Training works with any choice; PyTorch "
        "uses this one.",
        # With sides of 2, 4 or 8, normalized pixel centers are exact in floating point.
        [example((2, 4), (1, 2), name="on a pixel", seed=1)],
        sampling_strategy(st.sampled_from([(2, 4), (4, 2)]), on_pixel, counts=(1,)),
        gradient_of("points_px", one_sided=True),
    ),
    Check(
        "weights_sum_to_one", Stage.IDENTITIES,
        "Every sample inside a map of ones is one.",
        "The interpolation weights do not sum to one.",
        [example((3, 5), (0, 0), (2, 4), (0.3, 3.9), name="corners and in between")],
        sampling_strategy(map_sizes(), inside), weights_sum_to_one,
    ),
    Check(
        "zeros_around", Stage.IDENTITIES,
        "Samples do not change when the map is padded with zeros and the points are shifted accordingly.",
        "The border is treated differently, or positions are relative to the size of the map.",
        [example((3, 5), (-0.5, 1), (1.25, 4.5), (2, 0), name="at the border")],
        sampling_strategy(map_sizes(), anywhere), zero_frame,
    ),
    Check(
        "flips", Stage.IDENTITIES,
        "Samples do not change when the map and the points are flipped.",
        "Left and right, or top and bottom, are treated differently.",
        [example((3, 5), (0.25, 1), (2.5, 3.75), name="two points")],
        sampling_strategy(map_sizes(), lambda length: quarters(-0.75, length - 0.25)), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES,
        "A NaN in a point gives NaN in the samples of this point, and nowhere else.",
        "NaN is clamped to the border or ignored, which hides a diverged training run.",
        [
            Case(
                {"x": integers(0, 1, 2, 3, 4), "points_px": np.array([[[1.0, 1.5], [np.nan, 1.0], [0.5, np.nan]]])},
                "a NaN in y, a NaN in x",
            )
        ],
        test=nan_comes_out,
    ),
    Check(
        "memory", Stage.COST, "Memory grows with the size of the map, not with pixels times points.",
        "Weights are stored for every pair of pixel and point.",
        [example((64, 64), *((3.5, 1.25),) * 256, name="256 points on 64 × 64")], test=memory,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch) -> str:
    """Draw the map with the largest error (first channel) and its points."""
    x, points = case.arguments["x"], case.arguments["points_px"]
    if not x.size or not points.size:
        return f"maps {x.shape}, points {points.shape}"
    n = _worst_map(mismatch, len(x))
    header = f"map {n}, channel 0, of {x.shape}\n" if x.shape[0] * x.shape[1] > 1 else ""
    return header + draw_map(x[n, 0], points[n])


def _worst_map(mismatch: Mismatch, maps: int) -> int:
    if mismatch.expected is None or mismatch.got is None or mismatch.expected.shape != mismatch.got.shape:
        return 0
    error: Any = np.nan_to_num(np.abs(mismatch.got - mismatch.expected), nan=np.inf)
    return int(error.reshape(maps, -1).max(axis=1).argmax()) if len(error) == maps else 0


def _reference_vjp(cotangent: Array, x: Array, points_px: Array) -> dict[str, Array]:
    return bilinear_sample_vjp(cotangent, x, points_px)._asdict()


SAMPLER = OpSpec(
    name="sampler",
    title="bilinear sampling of maps at points, with zeros outside the map",
    function="bilinear_sample",
    arguments=(
        Argument("x", "NCHW", "maps", differentiable=True),
        Argument(
            "points_px",
            "NP2",
            "points (y, x) in pixels; 0 is the center of the first pixel",
            differentiable=True,
            extent=lambda arguments: max(arguments["x"].shape[2:]),
        ),
    ),
    returns="NCP",
    reference=Implementation("dat_ref.ops.sampling:bilinear_sample", bilinear_sample, _reference_vjp),
    draw=draw,
    checks=CHECKS,
    mutants=MUTANTS,
)
