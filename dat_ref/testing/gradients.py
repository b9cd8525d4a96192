"""Slopes by differences, in float64: what a gradient promises, measured.

For a scalar loss L = <cotangent, f(inputs)> the gradient promises the slope of L in every direction of the inputs. The
five-point rule measures it with an error of order h⁴; it holds away from kinks only, so whoever calls keeps that far
from them:

    dL/dh = (L(-2h) - 8 L(-h) + 8 L(h) - L(2h)) / 12h

On a kink, steps go to one side only: exact for cubics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .._checks import Array

STEP = 2.0**-10  # twice that is far less than the quarter pixel that cases keep from the lattice
FINE_STEP = 2e-6  # where random numbers come nearer to a kink
FINE_TOLERANCE = 1e-7  # of the size of a typical projection; a factor of 1.001 is ten thousand times more

Inputs = Mapping[str, Array]


class WrongGradient(AssertionError):
    """A gradient that finite differences contradict."""


def slope(loss: Callable[[float], float], step: float, *, one_sided: bool = False) -> float:
    """Return dL/dh at 0, measured from both sides or from the side of the step (which may be negative)."""
    if one_sided:
        return (-11 * loss(0) + 18 * loss(step) - 9 * loss(2 * step) + 2 * loss(3 * step)) / (6 * step)
    return (loss(-2 * step) - 8 * loss(-step) + 8 * loss(step) - loss(2 * step)) / (12 * step)


def numerical_gradient(
    function: Callable[[Array], Array], array: Array, cotangent: Array, *, one_sided: bool = False, step: float = STEP
) -> Array:
    """Return d<cotangent, function(array)>/d array, element by element: for small arrays."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):

        def loss(h: float, index: tuple[int, ...] = index) -> float:
            perturbed = array.copy()
            perturbed[index] += h
            return float(np.vdot(cotangent, function(perturbed)))

        gradient[index] = slope(loss, step, one_sided=one_sided)
    return gradient


def normalize(direction: Array) -> Array:
    """Return a direction of length one (an empty one as it is)."""
    length = np.linalg.norm(direction)
    return direction / length if length else direction


def check_vjp(
    function: Callable[..., Array],
    vjp: Callable[..., Mapping[str, Array]],
    inputs: Inputs,
    rng: np.random.Generator,
    *,
    directions: Callable[[str, Array], Array] | None = None,
    one_sided: bool = False,
    jointly: bool = False,
    projections: int = 2,
    step: float = FINE_STEP,
    tolerance: float = FINE_TOLERANCE,
) -> None:
    """Compare every gradient of a VJP with the slope along random directions.

    Args:
        function: ``function(**inputs)`` -> array.
        vjp: ``vjp(cotangent, **inputs)`` -> a gradient for each name to be checked, none missing.
        inputs: float64 arrays by name.
        directions: makes a direction from a name and an array; standard normal by default.
        one_sided: measure from the right: along +direction only.
        jointly: move all inputs at once, instead of one after the other. Faster where there are many.
        projections: number of cotangents and of directions.
        step: h.
        tolerance: of the size of a typical projection.

    Raises:
        WrongGradient: naming the input.
    """
    draw = directions or (lambda name, array: rng.standard_normal(array.shape))
    output = function(**inputs)
    for _ in range(projections):
        cotangent = rng.standard_normal(output.shape)
        grads = vjp(cotangent, **inputs)
        if set(grads) != set(inputs):
            raise WrongGradient(f"expected gradients of {sorted(inputs)}, got {sorted(grads)}")
        for name, array in inputs.items():
            if grads[name].shape != array.shape:
                raise WrongGradient(f"{name}: expected shape {array.shape}, got {grads[name].shape}")
        for names in [list(inputs)] if jointly else [[name] for name in inputs]:
            # The whole move has length one, so that many inputs together stay as clear of kinks as one does.
            deltas = {name: normalize(draw(name, inputs[name])) / np.sqrt(len(names)) for name in names}

            def loss(h: float, deltas: Inputs = deltas, cotangent: Array = cotangent) -> float:
                perturbed = {
                    name: array + h * deltas[name] if name in deltas else array for name, array in inputs.items()
                }
                return float(np.vdot(cotangent, function(**perturbed)))

            analytic = sum(float(np.vdot(grads[name], deltas[name])) for name in names)
            squares = [np.square(grads[name]).sum() / max(grads[name].size, 1) for name in names]
            gradient_scale = np.sqrt(np.sum(squares) / len(names))
            numerical = slope(loss, step, one_sided=one_sided)
            # Rounding of the loss itself, divided by the step, is the floor below which nothing can be measured.
            floor = 1e-15 * (1 + np.abs(cotangent * output).sum()) / step
            if not abs(analytic - numerical) <= tolerance * gradient_scale + floor:
                raise WrongGradient(f"{', '.join(names)[:200]}: promised {analytic:.12g}, measured {numerical:.12g}")
