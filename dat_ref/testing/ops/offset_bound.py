"""Operation ``offset_bound``: offsets of the key points, bounded to s/2 key cells by a tanh."""

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

SMALL = 2.0**-12  # raw offsets in the linear range of the tanh
RANGES = (3.0, 2.0, 1.0, 4.5)


def bounded_offsets(raw: Array, offset_range: float, convention: Convention) -> Array:
    """Return the normalized offsets (N, Hk, Wk, 2) for raw offsets: s/2 · spacing of the key grid · tanh(raw)."""
    return bound_offsets(raw[:, None], *_bound_arguments(raw), offset_range=offset_range, convention=convention)[0][
        :, 0
    ]


def bounded_offsets_vjp(cotangent: Array, raw: Array, offset_range: float, convention: Convention) -> dict[str, Array]:
    """Return the gradient of `bounded_offsets`."""
    options: dict[str, Any] = {"offset_range": offset_range, "convention": convention}
    return {"raw": bound_offsets_vjp(cotangent[:, None], raw[:, None], *_bound_arguments(raw), **options)[:, 0]}


def _bound_arguments(raw: Array) -> tuple[Array, OffsetBound]:
    """Return reference points and the kind of bound. The reference points do not affect the offsets."""
    return np.zeros((*raw.shape[1:3], 2)), OffsetBound.TANH_CELLS


# ------------------------------------------------------------------------------------------------ cases


def example(raw: Array, name: str = "", offset_range: float = 3.0) -> Case:
    """Return a named case."""
    return Case({"raw": raw, "offset_range": offset_range}, name)


def equal_components(key_size: Size, seed: int, size: float) -> Array:
    """Return raw offsets (1, Hk, Wk, 2) of magnitude `size` or less, equal in y and x, which hides their order."""
    values = integers(seed, 1, *key_size, 1)
    return np.repeat(values * (size / np.abs(values).max(initial=1)), 2, axis=-1)


def random_raw(key_size: Size, seed: int, count: int = 1) -> Array:
    """Return raw offsets (N, Hk, Wk, 2) between -4 and 4."""
    values = integers(seed, count, *key_size, 2)
    return values * (4 / np.abs(values).max(initial=1))


def equal_component_strategy(size: float) -> Any:
    """Return a strategy for square key grids with equal offsets in y and x."""
    values = st.builds(equal_components, square_sizes(), seeds, st.just(size))
    return lambda setting: st.builds(example, values, st.just(""), st.sampled_from(RANGES))


def raw_strategy(sizes: st.SearchStrategy[Size], ranges: tuple[float, ...] = RANGES) -> Any:
    """Return a strategy for key grids of these sizes, with any offsets."""
    values = st.builds(random_raw, sizes, seeds)
    return lambda setting: st.builds(example, values, st.just(""), st.sampled_from(ranges))


def any_batch(setting: Setting) -> st.SearchStrategy[Case]:
    """Draw any number of key grids, including zero."""
    values = st.builds(random_raw, map_sizes(smallest=2), seeds, st.integers(0, 3))
    return st.builds(example, values, st.just(""), st.sampled_from(RANGES))


# ------------------------------------------------------------------------------------------------ tests


def single_key(ctx: CheckContext, case: Case) -> None:
    if ctx.setting.convention.reference.gap:
        raise Skip(f"{ctx.setting.convention.name} divides by Hk - 1, so the range of a single key is undefined")
    ctx.compare(case)


def compare_gradient(ctx: CheckContext, case: Case) -> None:
    ctx.compare_gradient("raw", integers(0, *ctx.expected(case).shape), case)


def odd(ctx: CheckContext, case: Case) -> None:
    mirrored = case.with_arrays({"raw": -case.arguments["raw"]})
    ctx.require_close(ctx.got(mirrored), -ctx.got(case), case=mirrored)


def stays_in_its_region(ctx: CheckContext, case: Case) -> None:
    """Require that large raw offsets give exactly s/2 key cells."""
    far = case.with_arrays({"raw": np.sign(case.arguments["raw"]) * 1e3})
    ctx.require_close(np.abs(ctx.got(far)), np.abs(ctx.expected(far)), case=far)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    got, with_nan = ctx.got(case), np.isnan(case.arguments["raw"])
    if got.shape != with_nan.shape or not (np.isnan(got) == with_nan).all():
        raise Mismatch("expected NaN in the offsets of NaN inputs, and nowhere else", None, got)


# ------------------------------------------------------------------------------------------------ checks

TYPICAL = example(random_raw((2, 3), 0), "2 × 3 keys, a range of 3 key cells")

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
        "shapes", Stage.SHAPES, "Offsets have the shape of the raw offsets, for any batch size, including 0.",
        "Axes are swapped or squeezed, or an empty batch is not handled.",
        [example(np.zeros((0, 2, 3, 2)), "no images")], any_batch, shape,
    ),
    Check(
        "limit", Stage.VALUES,
        "A small raw offset x gives an offset of x · s/2 key cells, in normalized coordinates.",
        "The limit is wrong: s or s/4 key cells instead of s/2, Hk - 1 instead of Hk, or another unit.",
        [example(equal_components((3, 3), 0, SMALL), "very small offsets, 3 × 3 keys"),
         example(equal_components((7, 7), 3, SMALL), "very small offsets, 7 × 7 keys", 4.0)],
        equal_component_strategy(SMALL),
    ),
    Check(
        "bounded", Stage.VALUES,
        "Larger raw offsets are bounded by a tanh, which is applied before the multiplication by the limit.",
        "The bound is missing, or is another function: points leave the region around their reference point.",
        [example(equal_components((3, 3), 0, 4.0), "offsets up to 4, 3 × 3 keys")], equal_component_strategy(4.0),
    ),
    Check(
        "rows_before_columns", Stage.VALUES, "An offset is (y, x): row first, column second.",
        "x and y are swapped.", [example(random_raw((2, 2), 0), "2 × 2 keys")], raw_strategy(square_sizes()),
    ),
    Check(
        "not_square", Stage.VALUES,
        "On a non-square key grid, each axis has its own limit.",
        "One axis is normalized by the length of the other, e.g. x by the height. Square maps hide this mistake.",
        [TYPICAL, example(random_raw((5, 3), 1), "5 × 3 keys", 2.0)], raw_strategy(map_sizes(smallest=2)),
    ),
    Check(
        "single_key", Stage.VALUES, "A single row or column of keys has a limit like any other.",
        "The function divides by Hk - 1 = 0.", [example(random_raw((1, 4), 0), "one row of keys")],
        raw_strategy(st.sampled_from([(1, 3), (5, 1), (1, 1)])), single_key,
    ),
    Check(
        "anywhere", Stage.VALUES, "Offsets equal the reference for any raw offsets and any range, including 0.",
        "A mistake that no earlier check isolates.",
        [example(random_raw((3, 5), 2), "a range of zero: no offset at all", 0.0)],
        raw_strategy(map_sizes(smallest=2), (*RANGES, 0.0, 0.5)),
    ),
    Check(
        "gradient", Stage.GRADIENTS, "The gradient is s/2 · spacing of the key grid · (1 - tanh²).",
        "A factor is wrong, or the derivative of a step is missing.",
        [example(random_raw((2, 3), 0) / 4, "2 × 3 keys")], raw_strategy(map_sizes(smallest=2, largest=4)),
        compare_gradient,
    ),
    Check(
        "odd", Stage.IDENTITIES, "Raw offsets of opposite sign give offsets of opposite sign.",
        "Up and down, or left and right, are treated differently.", [TYPICAL], raw_strategy(map_sizes(smallest=2)), odd,
    ),
    Check(
        "stays_in_its_region", Stage.IDENTITIES,
        "For large raw offsets, the offset is s/2 key cells.",
        "Points leave their region, or cannot reach its border.", [TYPICAL], raw_strategy(map_sizes(smallest=2)),
        stays_in_its_region,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "NaN inputs give NaN outputs, and other outputs are not affected.",
        "NaN is clamped or replaced, which hides a diverged training run.",
        [example(np.array([[[[0.5, np.nan], [1.0, 2.0]], [[np.nan, 1.0], [0.0, 0.5]]]]), "two NaNs")],
        test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch, convention: Convention) -> str:
    """List a few keys with raw, expected and actual offsets."""
    raw = case.arguments["raw"]
    lines = [f"{raw.shape[1]} × {raw.shape[2]} keys, a range of {case.arguments['offset_range']} key cells"]
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.shape != raw.shape or got.shape != raw.shape:
        return lines[0]
    wrong = ~(np.abs(got - expected) <= 1e-9).all(axis=-1)
    for index in [tuple(index) for index in np.argwhere(wrong)[:4]]:
        pairs = [f"({each[index][0]:.6g}, {each[index][1]:.6g})" for each in (raw, expected, got)]
        lines.append(f"key ({index[1]}, {index[2]}): raw (y, x) = {pairs[0]}, expected {pairs[1]}, got {pairs[2]}")
    return "\n".join(lines)


OFFSET_BOUND = OpSpec(
    name="offset_bound",
    title="offsets of the key points, bounded to s/2 key cells",
    function="bounded_offsets",
    arguments=(
        Argument("raw", "Nhw2", "output of the offset network, (y, x)", differentiable=True),
        Argument("offset_range", "", "s; a point moves at most s/2 key cells in each direction"),
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
