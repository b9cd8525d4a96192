"""The kit's gradient checker, and the same check for composites with a trace and a tree of parameters."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dat_ref.params import flatten, unflatten
from dat_ref.testing.gradients import FINE_STEP as STEP
from dat_ref.testing.gradients import WrongGradient, check_vjp

__all__ = ["STEP", "WrongGradient", "check_module", "check_vjp"]

Array = np.ndarray
Tree = Any


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
