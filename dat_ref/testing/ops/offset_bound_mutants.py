"""Mutants of ``offset_bound``: each has one mistake and names the first check that fails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..._checks import Array
from ...conventions import Convention
from ..op_spec import Function, Mutant

SMALL = 2.0**-20  # so small that tanh is the identity


def measured_limit(fn: Function, raw: Array, offset_range: float, convention: Convention) -> Array:
    """Return the limits of a bound, i.e. its slope at zero, with the shape of `raw`."""
    return np.asarray(fn(np.full_like(raw, SMALL), offset_range, convention)) / np.asarray(SMALL, dtype=raw.dtype)


def bounded_by(change: Callable[[Array, Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation that replaces the offsets by ``change(raw, limit)``."""

    def mutate(fn: Function) -> Function:
        def bound(raw: Array, offset_range: float, convention: Convention) -> Array:
            return change(raw, measured_limit(fn, raw, offset_range, convention))

        return bound

    return mutate


def scaled_by(factor: Callable[[Array, float, Convention], Array | float]) -> Callable[[Function], Function]:
    """Return a mutation that multiplies the limits by ``factor(key_size, offset_range, convention)``."""

    def mutate(fn: Function) -> Function:
        def bound(raw: Array, offset_range: float, convention: Convention) -> Array:
            key_size = np.asarray(raw.shape[1:3])
            scaled = fn(raw, offset_range, convention) * np.asarray(factor(key_size, offset_range, convention))
            return np.asarray(scaled, dtype=raw.dtype)

        return bound

    return mutate


def other_pitch(key_size: Array, offset_range: float, convention: Convention) -> Array:
    """Return the factor for Hk - 1 intervals instead of Hk, or the reverse."""
    fewer = np.maximum(key_size - 1, 1)
    return key_size / fewer if convention.reference.gap == 0 else fewer / key_size


def limits_of_axes(axes: tuple[int, int]) -> Callable[[Function], Function]:
    """Return a mutation that uses the limits of the given axes for y and x."""

    def factor(key_size: Array, offset_range: float, convention: Convention) -> Array:
        pitch = np.array([convention.reference.pitch(count) for count in key_size])
        return np.asarray(pitch[list(axes)] / pitch)

    return scaled_by(factor)


def divided_by_zero(key_size: Array, offset_range: float, convention: Convention) -> Array:
    return np.where(key_size == 1, np.inf, 1.0)


def change_gradient(change: Callable[[Array, Array, Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that replaces the gradient by ``change(correct_gradient, cotangent, raw)``."""

    def mutate(fn: Function) -> Function:
        def vjp(cotangent: Array, raw: Array, offset_range: float, convention: Convention) -> dict[str, Array]:
            return {"raw": change(fn(cotangent, raw, offset_range, convention)["raw"], cotangent, raw)}

        return vjp

    return mutate


MUTANTS = (
    Mutant("the offset limit is s key cells instead of s/2", "limit",
           scaled_by(lambda *a: 2.0)),
    Mutant("the offset limit is s/4 key cells instead of s/2", "limit", scaled_by(lambda *a: 0.5)),
    Mutant("the key pitch of another convention: H - 1 instead of H, or the reverse", "limit", scaled_by(other_pitch)),
    Mutant("the offset range s is ignored: 2 is used instead", "limit",
           scaled_by(lambda keys, s, c: 2 / s if s else 1.0)),
    Mutant("offsets are in key cells instead of normalized coordinates", "limit",
           scaled_by(lambda keys, s, c: keys / 2)),
    Mutant("no bound: the tanh is missing", "bounded", bounded_by(lambda raw, limit: limit * raw)),
    Mutant("clipping instead of tanh", "bounded", bounded_by(lambda raw, limit: limit * np.clip(raw, -1, 1))),
    Mutant(
        "tanh is applied after scaling: tanh(limit · x) instead of limit · tanh(x)", "bounded",
        bounded_by(lambda raw, limit: np.tanh(limit * raw)),
    ),
    Mutant(
        "x and y swapped", "rows_before_columns",
        lambda fn: lambda raw, s, convention: fn(raw, s, convention)[..., ::-1],
    ),
    Mutant("the limit of x is computed from the key rows, and the limit of y from the key columns", "not_square",
           limits_of_axes((1, 0))),
    Mutant("the limit of x is computed from the key rows", "not_square", limits_of_axes((0, 0))),
    Mutant("the limit of y is computed from the key columns", "not_square", limits_of_axes((1, 1))),
    Mutant("division by zero for a single key", "single_key", scaled_by(divided_by_zero)),
    Mutant("the gradient is 0.1 % too large", "gradient",
           vjp=change_gradient(lambda grad, cotangent, raw: 1.001 * grad)),
    Mutant(
        "the derivative of tanh is missing in the gradient", "gradient",
        vjp=change_gradient(lambda grad, cotangent, raw: grad / (1 - np.square(np.tanh(raw)))),
    ),
    Mutant(
        "the offset range is missing in the gradient", "gradient",
        vjp=change_gradient(lambda grad, cotangent, raw: cotangent * (1 - np.square(np.tanh(raw)))),
    ),
)  # fmt: skip
