"""Position biases that are wrong in one way each, and the first check that sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..._checks import Array
from ...conventions import Convention
from ...ops.grid import Size, to_pixels_vjp
from ..op_spec import Function, Mutant
from .steps import BIAS_MISTAKES, PIXEL_MISTAKES, Steps, bias_in_steps, replace_steps

# The first check that sees each of the mistakes that all readers of the table can make.
FIRST_CHECKS = {
    "half a pixel up and left": "middle",
    "half a pixel down and right": "middle",
    "H for H - 1: positions times H/(H - 1)": "middle",
    "H for H - 1 in the middle of the table: off by one": "middle",
    "the displacement has the wrong sign: from query to key": "direction",
    "displacements are twice as long: the half is missing": "distance",
    "the table is transposed": "rows_before_columns",
    "queries are numbered column by column": "rows_before_columns",
    "-1 and 1 are edges where pixel centers are meant, or the reverse (align_corners)": "spread",
    "x and y swapped": "points_are_y_x",
    "x and y swapped, in pixels": "points_are_y_x",
    "x is normalised by the height": "not_square",
    "y is normalised by the width": "not_square",
    "x is normalised by the height, and y by the width": "not_square",
    "nearest entry instead of linear": "between_entries",
    "the border is repeated outside": "zero_outside",
    "the table wraps around: a negative index counts from the end": "zero_outside",
    "what the table does not cover wholly is dropped": "border_fades",
    "queries and keys exchanged": "queries_before_keys",
    "heads in reverse order": "heads",
    "all groups use the first group's points": "groups",
    "groups in reverse order": "groups",
    "heads are dealt to the groups in turn": "groups",
    "all images use the first image's points": "images",
    "positions are kept in bfloat16": "fine_positions",
}


def lookup_mutants(compute: Function) -> list[Mutant]:
    """Return the mutants that all readers of the table share.

    Args:
        compute: the operation's function in steps.
    """
    mistakes = {**{name: {"pixels": mistake} for name, mistake in PIXEL_MISTAKES.items()}, **BIAS_MISTAKES}
    return [
        Mutant(name, check, replace_steps(compute, Steps(), **mistakes[name])) for name, check in FIRST_CHECKS.items()
    ]


def gradients(
    change: Callable[[dict[str, Array], Size, Convention], dict[str, Array]],
) -> Callable[[Function], Function]:
    """Return a VJP whose gradients are changed: ``change(grads, query_size, convention)``."""

    def mutate(fn: Function) -> Function:
        def vjp(cotangent: Array, *arguments: Any, query_size: Size, convention: Convention) -> dict[str, Array]:
            returned = fn(cotangent, *arguments, query_size=query_size, convention=convention)
            grads = returned if isinstance(returned, dict) else returned._asdict()
            return {**grads, **change(grads, query_size, convention)}

        return vjp

    return mutate


def scaled_gradient(name: str, with_scale: float) -> Callable[[Function], Function]:
    """Return a VJP of which one gradient is multiplied."""
    return gradients(lambda grads, size, convention: {name: with_scale * grads[name]})


def points_mutants(check: str) -> list[Mutant]:
    """Return the mutants of the gradient of the points, which the named check is to reject."""
    return [
        Mutant("the points' gradient is 0.1 % too large", check, vjp=scaled_gradient("points", 1.001)),
        Mutant("the position gradient through the bias is forgotten", check, vjp=scaled_gradient("points", 0.0)),
        Mutant("the points' gradient has the wrong sign", check, vjp=scaled_gradient("points", -1.0)),
        Mutant(
            "the points' gradient is (x, y)", check,
            vjp=gradients(lambda grads, size, convention: {"points": grads["points"][..., ::-1]}),
        ),
        Mutant(
            "the points' gradient is that of pixels, not of normalised coordinates", check,
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
