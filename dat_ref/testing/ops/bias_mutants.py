"""Mutants of ``bias``: each has one mistake and names the first check that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..._checks import Array
from ...conventions import Convention
from ...ops.grid import Size, to_pixels_vjp
from ..op_spec import Function, Mutant
from .steps import BIAS_MISTAKES, PIXEL_MISTAKES, Steps, bias_in_steps, replace_steps

# Mistakes in the table lookup, shared by `bias` and `attention`, with the first check that fails.
FIRST_CHECKS = {
    "positions are shifted by half a pixel up and left": "middle",
    "positions are shifted by half a pixel down and right": "middle",
    "H instead of H - 1: positions are multiplied by H/(H - 1)": "middle",
    "the center of the table is off by one: H instead of H - 1": "middle",
    "the displacement has the wrong sign: key minus query": "direction",
    "displacements are doubled: the factor 1/2 is missing": "distance",
    "the table is transposed": "rows_before_columns",
    "queries are numbered column by column": "rows_before_columns",
    "align_corners is inverted: -1 and 1 are edges instead of pixel centers, or the reverse": "spread",
    "x and y swapped": "points_are_y_x",
    "x and y swapped after conversion to pixels": "points_are_y_x",
    "x is normalized by the height": "not_square",
    "y is normalized by the width": "not_square",
    "x is normalized by the height, and y by the width": "not_square",
    "nearest entry instead of bilinear interpolation": "between_entries",
    "the border is replicated outside the table": "zero_outside",
    "the table wraps around: negative indices count from the end": "zero_outside",
    "displacements outside the outermost entries have no bias": "border_fades",
    "queries and keys swapped": "queries_before_keys",
    "heads in reverse order": "heads",
    "all groups use the first group's points": "groups",
    "groups in reverse order": "groups",
    "heads are interleaved across the groups": "groups",
    "all images use the first image's points": "images",
    "positions are stored in bfloat16": "fine_positions",
}


def lookup_mutants(compute: Function) -> list[Mutant]:
    """Return the mutants of the table lookup.

    Args:
        compute: step-wise function of the operation, ``compute(steps, *arguments)``.
    """
    mistakes = {**{name: {"pixels": mistake} for name, mistake in PIXEL_MISTAKES.items()}, **BIAS_MISTAKES}
    return [
        Mutant(name, check, replace_steps(compute, Steps(), **mistakes[name])) for name, check in FIRST_CHECKS.items()
    ]


def gradients(
    change: Callable[[dict[str, Array], Size, Convention], dict[str, Array]],
) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that updates the gradients with ``change(grads, query_size, convention)``."""

    def mutate(fn: Function) -> Function:
        def vjp(cotangent: Array, *arguments: Any, query_size: Size, convention: Convention) -> dict[str, Array]:
            returned = fn(cotangent, *arguments, query_size=query_size, convention=convention)
            grads = returned if isinstance(returned, dict) else returned._asdict()
            return {**grads, **change(grads, query_size, convention)}

        return vjp

    return mutate


def scaled_gradient(name: str, factor: float) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that multiplies one gradient by a factor."""
    return gradients(lambda grads, size, convention: {name: factor * grads[name]})


def points_mutants(check: str) -> list[Mutant]:
    """Return mutants of the gradient of the points.

    Args:
        check: name of the first check that fails.
    """
    return [
        Mutant("the points' gradient is 0.1 % too large", check, vjp=scaled_gradient("points", 1.001)),
        Mutant("the points' gradient through the bias is missing", check, vjp=scaled_gradient("points", 0.0)),
        Mutant("the points' gradient has the wrong sign", check, vjp=scaled_gradient("points", -1.0)),
        Mutant(
            "the points' gradient is in (x, y) order", check,
            vjp=gradients(lambda grads, size, convention: {"points": grads["points"][..., ::-1]}),
        ),
        Mutant(
            "the points' gradient is taken in pixels instead of normalized coordinates", check,
            vjp=gradients(lambda grads, size, convention: {
                "points": grads["points"] / to_pixels_vjp(grads["points"] * 0 + 1, size, convention)
            }),
        ),
    ]  # fmt: skip


MUTANTS = (
    *lookup_mutants(bias_in_steps),
    Mutant("the table's gradient is 0.1 % too large", "gradient_of_the_table", vjp=scaled_gradient("table", 1.001)),
    *points_mutants("gradient_of_the_points"),
)
