"""Gradient checks by finite differences in float64.

For a scalar loss L = <cotangent, f(inputs)>, the gradient gives the slope of L in every direction of the inputs. The
five-point rule measures the slope with an error of order h⁴. It is valid only if there is no kink within 2h, which is
the caller's responsibility:

    dL/dh = (L(-2h) - 8 L(-h) + 8 L(h) - L(2h)) / 12h

At a kink, a one-sided rule is used. It is exact for cubic polynomials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .._checks import Array

STEP = 2.0**-10  # 2h is far less than a quarter pixel, the distance of cases to the lattice
FINE_STEP = 2e-6  # for random inputs, which can be closer to a kink
FINE_TOLERANCE = 1e-7  # relative to a typical projection; a factor of 1.001 exceeds it ten thousand times

Inputs = Mapping[str, Array]


class WrongGradient(AssertionError):
    """Gradient that disagrees with finite differences."""


def slope(loss: Callable[[float], float], step: float, *, one_sided: bool = False) -> float:
    """Return dL/dh at 0 by a central rule, or by a one-sided rule on the side of the step, which may be negative."""
    if one_sided:
        return (-11 * loss(0) + 18 * loss(step) - 9 * loss(2 * step) + 2 * loss(3 * step)) / (6 * step)
    return (loss(-2 * step) - 8 * loss(-step) + 8 * loss(step) - loss(2 * step)) / (12 * step)


def numerical_gradient(
    function: Callable[[Array], Array], array: Array, cotangent: Array, *, one_sided: bool = False, step: float = STEP
) -> Array:
    """Return d<cotangent, function(array)>/d array, computed element by element, for small arrays."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):

        def loss(h: float, index: tuple[int, ...] = index) -> float:
            perturbed = array.copy()
            perturbed[index] += h
            return float(np.vdot(cotangent, function(perturbed)))

        gradient[index] = slope(loss, step, one_sided=one_sided)
    return gradient


def normalize(direction: Array) -> Array:
    """Return a direction of length one. An empty or zero direction is returned unchanged."""
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
        vjp: ``vjp(cotangent, **inputs)`` -> gradients by name, for all inputs.
        inputs: float64 arrays by name.
        rng: generator for cotangents and directions.
        directions: returns a direction for a name and an array; standard normal by default.
        one_sided: use steps along +direction only.
        jointly: perturb all inputs at once instead of one after the other. Faster with many inputs.
        projections: number of cotangents and of directions.
        step: h.
        tolerance: relative to a typical projection.

    Raises:
        WrongGradient: if a gradient disagrees; the message names the input.
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
            # The joint direction has length one, so that many inputs are not closer to kinks than a single one.
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
            # The rounding error of the loss, divided by the step, limits the accuracy of the measured slope.
            floor = 1e-15 * (1 + np.abs(cotangent * output).sum()) / step
            if not abs(analytic - numerical) <= tolerance * gradient_scale + floor:
                message = f"slope from the gradient is {analytic:.12g}, measured slope is {numerical:.12g}"
                raise WrongGradient(f"{', '.join(names)[:200]}: {message}")
