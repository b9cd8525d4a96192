"""Mutants of ``attention``: each has one mistake and names the first check that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..._checks import Array
from ..op_spec import Function, Mutant
from .bias_mutants import lookup_mutants, points_mutants, scaled_gradient
from .steps import Steps, attend_in_steps, replace_steps


def with_attend(change: Callable[..., Any]) -> Callable[[Function], Function]:
    """Return a mutation that replaces `attend` by ``change(correct_attend, q, k, v, bias, scale)``."""

    def mistake(fn: Function) -> Function:
        return lambda q, k, v, bias, scale: change(fn, q, k, v, bias, scale)

    return replace_steps(attend_in_steps, Steps(), attend=mistake)


def with_scale(scale: Callable[[int], float]) -> Callable[[Function], Function]:
    """Return a mutation that multiplies the dot products by ``scale(depth)``."""
    return replace_steps(attend_in_steps, Steps(), scale=lambda fn: scale)


def softmax_over_queries(fn: Function, q: Array, k: Array, v: Array, bias: Array, scale: float) -> Any:
    """Normalize the weights over the queries instead of the keys."""
    with np.errstate(over="ignore", invalid="ignore"):
        exponentials = np.exp((q * q.dtype.type(scale)) @ k.swapaxes(-1, -2) + bias)
        weights = exponentials / exponentials.sum(axis=-2, keepdims=True)
        return weights @ v, weights


def overflowing_softmax(fn: Function, q: Array, k: Array, v: Array, bias: Array, scale: float) -> Any:
    """Compute the softmax without subtracting the maximum logit."""
    with np.errstate(over="ignore", invalid="ignore"):
        exponentials = np.exp((q * q.dtype.type(scale)) @ k.swapaxes(-1, -2) + bias)
        weights = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return weights @ v, weights


def without_scale(name: str) -> Callable[[Function], Function]:
    """Return a mutation of the VJP without the scale in one gradient, for heads with four channels."""
    return scaled_gradient(name, 2.0)


MUTANTS = (
    Mutant("softmax over the queries instead of the keys", "equal_shares", with_attend(softmax_over_queries)),
    Mutant(
        "keys and values swapped", "equal_shares",
        with_attend(lambda fn, q, k, v, bias, scale: fn(q, v, k, bias, scale)),
    ),
    Mutant("the scale is missing", "scale", with_scale(lambda depth: 1.0)),
    Mutant("the scale is 1/d instead of 1/√d", "scale", with_scale(lambda depth: 1 / depth)),
    Mutant(
        "the bias is subtracted", "bias_is_added",
        with_attend(lambda fn, q, k, v, bias, scale: fn(q, k, v, -bias, scale)),
    ),
    Mutant(
        "the bias is multiplied by the scale", "bias_is_added",
        with_attend(lambda fn, q, k, v, bias, scale: fn(q, k, v, bias * bias.dtype.type(scale), scale)),
    ),
    *lookup_mutants(attend_in_steps),
    Mutant("softmax overflows: the maximum logit is not subtracted", "large_logits", with_attend(overflowing_softmax)),
    Mutant("the queries' gradient is 0.1 % too large", "gradient_of_the_queries", vjp=scaled_gradient("q", 1.001)),
    Mutant("the scale is missing in the queries' gradient", "gradient_of_the_queries", vjp=without_scale("q")),
    Mutant("the keys' gradient is 0.1 % too large", "gradient_of_the_keys", vjp=scaled_gradient("k", 1.001)),
    Mutant("the scale is missing in the keys' gradient", "gradient_of_the_keys", vjp=without_scale("k")),
    Mutant("the values' gradient is 0.1 % too large", "gradient_of_the_values", vjp=scaled_gradient("v", 1.001)),
    Mutant("the table's gradient is 0.1 % too large", "gradient_of_the_table",
           vjp=scaled_gradient("bias_table", 1.001)),
    *points_mutants("gradient_of_the_points"),
)  # fmt: skip
