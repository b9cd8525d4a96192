"""Operation ``offset_bound``: how far a key point may leave its reference, s/2 key cells by a tanh."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...config import OffsetBound
from ...conventions import Convention
from ...ops.grid import Size
from ...ops.offsets import bound_offsets, bound_offsets_vjp
from ..common import leaves_inputs_alone, runs, shape
from ..context import CheckContext
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Setting, Skip, Stage
from ..strategies import integers, map_sizes, seeds, square_sizes
from .offset_bound_mutants import MUTANTS

SMALL = 2.0**-12  # raw offsets so small that the bound is hardly felt
RANGES = (3.0, 2.0, 1.0, 4.5)


def bounded_offsets(raw: Array, offset_range: float, convention: Convention) -> Array:
    """Return the normalised offsets (N, Hk, Wk, 2) for what the network says: (s/2) · pitch of the key grid · tanh."""
    return bound_offsets(raw[:, None], *_bound_arguments(raw), offset_range=offset_range, convention=convention)[0][
        :, 0
    ]


def bounded_offsets_vjp(cotangent: Array, raw: Array, offset_range: float, convention: Convention) -> dict[str, Array]:
    """Return the gradient of `bounded_offsets`."""
    options: dict[str, Any] = {"offset_range": offset_range, "convention": convention}
    return {"raw": bound_offsets_vjp(cotangent[:, None], raw[:, None], *_bound_arguments(raw), **options)[:, 0]}


def _bound_arguments(raw: Array) -> tuple[Array, OffsetBound]:
    """A reference that does not matter (offsets are asked for, not points), and the bound."""
    return np.zeros((*raw.shape[1:3], 2)), OffsetBound.TANH_CELLS


# ------------------------------------------------------------------------------------------------ cases


def example(raw: Array, name: str = "", offset_range: float = 3.0) -> Case:
    """Return a named case."""
    return Case({"raw": raw, "offset_range": offset_range}, name)


def equal_components(key_size: Size, seed: int, size: float) -> Array:
    """Return raw offsets (1, Hk, Wk, 2) of at most about `size`, the same in y and x: which is which does not show."""
    values = integers(seed, 1, *key_size, 1)
    return np.repeat(values * (size / np.abs(values).max(initial=1)), 2, axis=-1)


def random_raw(key_size: Size, seed: int, count: int = 1) -> Array:
    """Return raw offsets (N, Hk, Wk, 2) between -4 and 4."""
    values = integers(seed, count, *key_size, 2)
    return values * (4 / np.abs(values).max(initial=1))


def equal_component_strategy(size: float) -> Any:
    """Return a strategy: square key grids, the same offsets in y and x."""
    values = st.builds(equal_components, square_sizes(), seeds, st.just(size))
    return lambda setting: st.builds(example, values, st.just(""), st.sampled_from(RANGES))


def raw_strategy(sizes: st.SearchStrategy[Size], ranges: tuple[float, ...] = RANGES) -> Any:
    """Return a strategy: key grids of some sizes, any offsets."""
    values = st.builds(random_raw, sizes, seeds)
    return lambda setting: st.builds(example, values, st.just(""), st.sampled_from(ranges))


def any_batch(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw any number of key grids, none included."""
    values = st.builds(random_raw, map_sizes(smallest=2), seeds, st.integers(0, 3))
    return st.builds(example, values, st.just(""), st.sampled_from(RANGES))


# ------------------------------------------------------------------------------------------------ tests


def single_key(ctx: CheckContext, case: Case) -> None:
    if ctx.setting.convention.reference.gap:
        raise Skip(f"{ctx.setting.convention.name} divides by Hk - 1, so that the range of a single key is open")
    ctx.compare(case)


def change_gradient(ctx: CheckContext, case: Case) -> None:
    ctx.compare_gradient("raw", integers(0, *ctx.expected(case).shape), case)


def odd(ctx: CheckContext, case: Case) -> None:
    mirrored = case.with_arrays({"raw": -case.arguments["raw"]})
    ctx.require_close(ctx.got(mirrored), -ctx.got(case), case=mirrored)


def stays_in_its_region(ctx: CheckContext, case: Case) -> None:
    """However far the network wants to go, the offset is s/2 key cells at most; and it gets there."""
    far = case.with_arrays({"raw": np.sign(case.arguments["raw"]) * 1e3})
    ctx.require_close(np.abs(ctx.got(far)), np.abs(ctx.expected(far)), case=far)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    got, with_nan = ctx.got(case), np.isnan(case.arguments["raw"])
    if got.shape != with_nan.shape or not (np.isnan(got) == with_nan).all():
        raise Mismatch("NaN must come out where it went in, and nowhere else", None, got)


# ------------------------------------------------------------------------------------------------ checks

TYPICAL = example(random_raw((2, 3), 0), "2 × 3 keys, a range of 3 key cells")

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
        "shapes", Stage.SHAPES, "Offsets have the shape of what the network says, for any batch, none included.",
        "Axes are exchanged, squeezed, or an empty batch is not thought of.",
        [example(np.zeros((0, 2, 3, 2)), "no images")], any_batch, shape,
    ),
    Check(
        "limit", Stage.VALUES,
        "A small number x becomes x times s/2 key cells, in normalised coordinates.",
        "The range has another width: s or s/4 key cells where s/2 is meant, Hk - 1 for Hk, or another unit.",
        [example(equal_components((3, 3), 0, SMALL), "very small offsets, 3 × 3 keys"),
         example(equal_components((7, 7), 3, SMALL), "very small offsets, 7 × 7 keys", 4.0)],
        equal_component_strategy(SMALL),
    ),
    Check(
        "bounded", Stage.VALUES,
        "Larger numbers are bounded by a tanh, before the range is multiplied on.",
        "The bound is missing, or is another function: points leave the region around their reference.",
        [example(equal_components((3, 3), 0, 4.0), "offsets up to 4, 3 × 3 keys")], equal_component_strategy(4.0),
    ),
    Check(
        "rows_before_columns", Stage.VALUES, "An offset is (y, x): row first, column second.",
        "x and y are swapped.", [example(random_raw((2, 2), 0), "2 × 2 keys")], raw_strategy(square_sizes()),
    ),
    Check(
        "not_square", Stage.VALUES,
        "On a key grid that is not square each axis has its own range.",
        "One axis is normalised by the length of the other: x by the height, say. Square maps hide it.",
        [TYPICAL, example(random_raw((5, 3), 1), "5 × 3 keys", 2.0)], raw_strategy(map_sizes(smallest=2)),
    ),
    Check(
        "single_key", Stage.VALUES, "A single row or column of keys has a range like any other.",
        "A division by Hk - 1 = 0.", [example(random_raw((1, 4), 0), "one row of keys")],
        raw_strategy(st.sampled_from([(1, 3), (5, 1), (1, 1)])), single_key,
    ),
    Check(
        "anywhere", Stage.VALUES, "The reference's offset for any numbers, any range, zero included.",
        "A mistake that none of the checks above isolates.",
        [example(random_raw((3, 5), 2), "a range of zero: no offset at all", 0.0)],
        raw_strategy(map_sizes(smallest=2), (*RANGES, 0.0, 0.5)),
    ),
    Check(
        "gradient", Stage.GRADIENTS, "The gradient is (s/2) · pitch · (1 - tanh²).",
        "A wrong factor, or a step that the gradient passes by.",
        [example(random_raw((2, 3), 0) / 4, "2 × 3 keys")], raw_strategy(map_sizes(smallest=2, largest=4)),
        change_gradient,
    ),
    Check(
        "odd", Stage.IDENTITIES, "The opposite number gives the opposite offset.",
        "Up and down, or left and right, are treated differently.", [TYPICAL], raw_strategy(map_sizes(smallest=2)), odd,
    ),
    Check(
        "stays_in_its_region", Stage.IDENTITIES,
        "However large the number, the offset is s/2 key cells, and no more.",
        "Points leave their region, or cannot reach its border.", [TYPICAL], raw_strategy(map_sizes(smallest=2)),
        stays_in_its_region,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "NaN in, NaN out, and only there.",
        "NaN is clamped or skipped, which hides a diverged training run.",
        [example(np.array([[[[0.5, np.nan], [1.0, 2.0]], [[np.nan, 1.0], [0.0, 0.5]]]]), "two NaNs")],
        test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """List a few keys: what the network said, what was expected and what came."""
    raw = case.arguments["raw"]
    lines = [f"{raw.shape[1]} × {raw.shape[2]} keys, a range of {case.arguments['offset_range']} key cells"]
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.shape != raw.shape or got.shape != raw.shape:
        return lines[0]
    mutate = ~(np.abs(got - expected) <= 1e-9).all(axis=-1)
    for index in [tuple(index) for index in np.argwhere(mutate)[:4]]:
        pairs = [f"({each[index][0]:.6g}, {each[index][1]:.6g})" for each in (raw, expected, got)]
        lines.append(f"key ({index[1]}, {index[2]}): raw (y, x) = {pairs[0]}, expected {pairs[1]}, got {pairs[2]}")
    return "\n".join(lines)


OFFSET_BOUND = OpSpec(
    name="offset_bound",
    title="how far a key point may leave its reference",
    function="bounded_offsets",
    arguments=(
        Argument("raw", "Nhw2", "what the offset network says, (y, x)", differentiable=True),
        Argument("offset_range", "", "s, the width of a point's region in key cells"),
    ),
    returns="Nhw2",
    reference=Implementation(
        "dat_ref.testing.ops.offset_bound:bounded_offsets",
        bounded_offsets,
        bounded_offsets_vjp,
        takes_convention=True,
    ),
    draw=draw,
    depends_on_convention=True,
    checks=CHECKS,
    mutants=MUTANTS,
)
