"""Cores of attention that are wrong in one way each, and the first check that sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..._checks import Array
from ..op_spec import Function, Mutant
from .bias_mutants import lookup_mutants, points_mutants, scaled_gradient
from .steps import Steps, attend_in_steps, replace_steps


def with_attend(change: Callable[..., Any]) -> Callable[[Function], Function]:
    """Return an attention whose core is called otherwise: ``change(right_attend, q, k, v, bias, scale)``."""

    def mistake(fn: Function) -> Function:
        return lambda q, k, v, bias, scale: change(fn, q, k, v, bias, scale)

    return replace_steps(attend_in_steps, Steps(), attend=mistake)


def with_scale(of_depth: Callable[[int], float]) -> Callable[[Function], Function]:
    """Return an attention whose dot products have another factor."""
    return replace_steps(attend_in_steps, Steps(), scale=lambda fn: of_depth)


def softmax_over_queries(fn: Function, q: Array, k: Array, v: Array, bias: Array, scale: float) -> Any:
    """The weights of each key sum to one."""
    with np.errstate(over="ignore", invalid="ignore"):
        exponentials = np.exp((q * q.dtype.type(scale)) @ k.swapaxes(-1, -2) + bias)
        weights = exponentials / exponentials.sum(axis=-2, keepdims=True)
        return weights @ v, weights


def overflowing_softmax(fn: Function, q: Array, k: Array, v: Array, bias: Array, scale: float) -> Any:
    """Softmax without the largest logit taken off."""
    with np.errstate(over="ignore", invalid="ignore"):
        exponentials = np.exp((q * q.dtype.type(scale)) @ k.swapaxes(-1, -2) + bias)
        weights = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return weights @ v, weights


def without_scale(name: str) -> Callable[[Function], Function]:
    """Return a VJP that forgets the scale in one gradient, for heads four channels wide."""
    return scaled_gradient(name, 2.0)


MUTANTS = (
    Mutant("softmax over the queries instead of the keys", "equal_shares", with_attend(softmax_over_queries)),
    Mutant(
        "keys and values exchanged", "equal_shares",
        with_attend(lambda fn, q, k, v, bias, scale: fn(q, v, k, bias, scale)),
    ),
    Mutant("the scale is missing", "scale", with_scale(lambda depth: 1.0)),
    Mutant("dot products are divided by d, not by its root", "scale", with_scale(lambda depth: 1 / depth)),
    Mutant(
        "the bias is subtracted", "bias_is_added",
        with_attend(lambda fn, q, k, v, bias, scale: fn(q, k, v, -bias, scale)),
    ),
    Mutant(
        "the bias is scaled with the dot products", "bias_is_added",
        with_attend(lambda fn, q, k, v, bias, scale: fn(q, k, v, bias * bias.dtype.type(scale), scale)),
    ),
    *lookup_mutants(attend_in_steps),
    Mutant("softmax overflows: the largest logit is not taken off", "large_logits", with_attend(overflowing_softmax)),
    Mutant("the queries' gradient is 0.1 % too large", "gradient_of_the_queries", vjp=scaled_gradient("q", 1.001)),
    Mutant("the queries' gradient lacks the scale", "gradient_of_the_queries", vjp=without_scale("q")),
    Mutant("the keys' gradient is 0.1 % too large", "gradient_of_the_keys", vjp=scaled_gradient("k", 1.001)),
    Mutant("the keys' gradient lacks the scale", "gradient_of_the_keys", vjp=without_scale("k")),
    Mutant("the values' gradient is 0.1 % too large", "gradient_of_the_values", vjp=scaled_gradient("v", 1.001)),
    Mutant("the table's gradient is 0.1 % too large", "gradient_of_the_table",
           vjp=scaled_gradient("bias_table", 1.001)),
    *points_mutants("gradient_of_the_points"),
)  # fmt: skip
