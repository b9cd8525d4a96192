"""The gradient checker: a VJP against finite differences along random directions, in float64.

For a scalar loss L = <cotangent, f(inputs)> and a direction d of one input, the VJP promises <∂L/∂input, d>; the
five-point rule measures it with an error of order h^4:

    dL/dh = (L(-2h) - 8 L(-h) + 8 L(h) - L(2h)) / 12h

It holds away from kinks only: whoever calls keeps its points that far from them (`helpers.layers.kink_distance`). On a
kink, `one_sided` measures with steps forward only, along directions the caller gives.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dat_ref.params import flatten, unflatten

Array = np.ndarray
Tree = Any
Inputs = Mapping[str, Array]
STEP = 2e-6
TOLERANCE = 1e-7  # of the size of a typical projection; a factor of 1.001 is ten thousand times more


class WrongGradient(AssertionError):
    """A VJP that finite differences contradict."""


def slope(loss: Callable[[float], float], step: float, *, one_sided: bool = False) -> float:
    """Return dL/dh at 0, measured from both sides or from the right."""
    if one_sided:  # exact for cubics
        return (-11 * loss(0) + 18 * loss(step) - 9 * loss(2 * step) + 2 * loss(3 * step)) / (6 * step)
    return (loss(-2 * step) - 8 * loss(-step) + 8 * loss(step) - loss(2 * step)) / (12 * step)


def unit(direction: Array) -> Array:
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
    step: float = STEP,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare every gradient of a VJP with finite differences.

    Args:
        function: ``function(**inputs)`` -> array.
        vjp: ``vjp(cotangent, **inputs)`` -> a gradient for each name to be checked, none missing.
        inputs: float64 arrays by name.
        directions: makes a direction from a name and an array; standard normal by default.
        one_sided: measure from the right: along +direction only.
        jointly: move all inputs at once, instead of one after the other. Faster where there are many.
        projections: number of cotangents and of directions.
        step: h.

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
            moves = {name: unit(draw(name, inputs[name])) / np.sqrt(len(names)) for name in names}

            def loss(h: float, moves: Inputs = moves, cotangent: Array = cotangent) -> float:
                moved = {name: array + h * moves[name] if name in moves else array for name, array in inputs.items()}
                return float(np.vdot(cotangent, function(**moved)))

            promised = sum(float(np.vdot(grads[name], moves[name])) for name in names)
            squares = [np.square(grads[name]).sum() / max(grads[name].size, 1) for name in names]
            typical = np.sqrt(np.sum(squares) / len(names))
            measured = slope(loss, step, one_sided=one_sided)
            # Rounding of the loss itself, divided by the step, is the floor below which nothing can be measured.
            floor = 1e-15 * (1 + np.abs(cotangent * output).sum()) / step
            if not abs(promised - measured) <= tolerance * typical + floor:
                raise WrongGradient(f"{', '.join(names)[:200]}: promised {promised:.12g}, measured {measured:.12g}")


def check_module(
    forward: Callable[[Array, Tree], tuple[Array, Any]],
    vjp: Callable[[Array, Any, Tree], tuple[Array, Tree]],
    x: Array,
    params: Tree,
    rng: np.random.Generator,
    **options: Any,
) -> None:
    """Check a composite: ``forward(x, params)`` -> (y, trace), ``vjp(cotangent, trace, params)`` -> (grad_x, grads)."""

    def function(x: Array, **leaves: Array) -> Array:
        return forward(x, unflatten(leaves))[0]

    def gradients(cotangent: Array, x: Array, **leaves: Array) -> dict[str, Array]:
        params = unflatten(leaves)
        grad_x, grads = vjp(cotangent, forward(x, params)[1], params)
        return {"x": grad_x, **flatten(grads)}

    check_vjp(function, gradients, {"x": x, **flatten(params)}, rng, **options)
