"""Gradient checker for layers whose forward pass stays away from kinks."""

from collections.abc import Callable
from typing import Any

import numpy as np
from strategies import Case

from dat_ref import BiasKind, Convention
from dat_ref.layer import deformable_layer, deformable_layer_vjp
from dat_ref.ops.basic import AffineGradients
from dat_ref.ops.sampling import bilinear_sample_vjp

from .checks import example_config
from .gradients import STEP, check_module
from .layers import kink_distance

Array = np.ndarray
MARGIN = 1e-3  # smallest distance, in pixels, between a point that is moved directly and a kink
LAYER_MARGIN = 1e-4  # the same if the layer moves the points, relative to the speed of the points


def rng_of(seed: int) -> np.random.Generator:
    """Return the generator of cotangents and directions for a seed."""
    return np.random.default_rng([seed, 7])


def affine(result: AffineGradients) -> dict[str, Array]:
    """Return the gradients of an operation with weight and bias, by name."""
    return {"x": result.x, **result.params}


def sample_vjp(cotangent: Array, x: Array, points_px: Array) -> dict[str, Array]:
    """Return the gradients of bilinear sampling, by name."""
    return bilinear_sample_vjp(cotangent, x, points_px)._asdict()


def off_lattice(seed: int, shape: tuple[int, ...], low: float, high: float) -> Array:
    """Return uniform values; values too near to an integer are drawn again."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(low, high, shape)
    while (near := np.abs(values - np.round(values)) < MARGIN).any():
        values[near] = rng.uniform(low, high, near.sum())
    return values


def _step_scale(case: Case) -> float:
    """Return the factor for steps and margins: log-CPB has thousands of rectified units, so both must be smaller."""
    return 0.2 if case.config.bias is BiasKind.LOG_CPB else 1.0


def away_from_kinks(case: Case, margin: float = LAYER_MARGIN) -> Case | None:
    """Return the case with its own or a later seed whose pass is not near a kink; None if no seed is found."""
    table = case.params()["position_bias"]["table"] if case.config.bias is BiasKind.TABLE else None
    for attempt in range(300):
        candidate = Case(case.config, case.size, case.batch, case.seed + 100_003 * attempt)
        _, trace = deformable_layer(candidate.x(), candidate.params(), candidate.config)
        if kink_distance(trace, case.config, None if table is None else table.shape[1:]) > margin * _step_scale(case):
            return candidate
    return None


def check_layer(case: Case, vjp: Callable[..., Any] = deformable_layer_vjp, **options: Any) -> None:
    """Check the gradient of a deformable layer."""
    check_module(
        lambda x, params: deformable_layer(x, params, case.config),
        lambda cotangent, trace, params: vjp(cotangent, trace, params, case.config),
        case.x(),
        case.params(),
        rng_of(case.seed),
        step=STEP * _step_scale(case),
        **options,
    )


def layer_example() -> Case:
    """Return a layer with a table whose pass stays away from kinks."""
    case = away_from_kinks(Case(example_config(Convention.CELL_CENTER), (5, 3), 1, 0))
    assert case is not None
    return case
