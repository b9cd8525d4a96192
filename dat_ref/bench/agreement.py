"""A speed is worth printing only of what computes the same: outputs and gradients against a reference.

The reference is the plain formulation in float32. A result in the same precision may be off by a few hundred roundings;
one in a lower precision by a few times what the plain formulation is off in that precision.

Bilinear reading has no derivative on the lattice. Where another rounding takes a point to the other side of a pixel's
center, its gradient is another one: the inputs of a single attention are drawn off the lattice, and the gradient of a
whole model, which nobody can keep off it, is compared as one vector by its norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Results = Mapping[str, Tensor]

FACTOR = 4.0  # of the plain formulation's own error in that precision
# Beside it, in parts of the largest value of a tensor: sums of thousands of terms are never quite the same.
FLOOR = {torch.float64: 2.0**-42, torch.float32: 2.0**-15, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
WHOLE_GRADIENT = "gradient"  # of all parameters of a model
WHOLE_GRADIENT_FLOOR = 2.0**-8


class Disagreement(Exception):
    """An implementation does not compute what the reference does."""


def check(name: str, actual: Results, expected: Results, yardstick: Results, dtype: torch.dtype) -> float:
    """Compare all outputs and gradients; return the largest error in parts of what it is an error of.

    Args:
        name: of the implementation, for the message.
        expected: the reference, in float32.
        yardstick: what the reference's formulation gives in `dtype`.

    Raises:
        Disagreement: if a tensor is missing or over its budget.
    """
    if actual.keys() != expected.keys():
        raise Disagreement(f"{name}: gives {', '.join(actual)}, expected {', '.join(expected)}")
    largest_error, violations = 0.0, []
    for name_of_tensor, tensor in expected.items():
        norm_of, floor = (
            (l2_norm, WHOLE_GRADIENT_FLOOR) if name_of_tensor == WHOLE_GRADIENT else (max_abs, FLOOR[dtype])
        )
        scale = norm_of(tensor)
        budget = FACTOR * norm_of(difference(yardstick[name_of_tensor], tensor)) + floor * scale
        error = norm_of(difference(actual[name_of_tensor], tensor))
        if not error <= budget:  # NaN is over any budget
            violations.append(f"{name_of_tensor} by {error:.1e} (allowed {budget:.1e}, of {scale:.1e})")
        largest_error = max(largest_error, error / scale if scale else 0.0)
    if violations:
        raise Disagreement(f"{name} differs: {'; '.join(violations)}")
    return largest_error


def difference(actual: Tensor, expected: Tensor) -> Tensor:
    """Return actual - expected in the dtype of the latter."""
    if actual.shape != expected.shape:
        raise Disagreement(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    return actual.to(expected.dtype) - expected


def max_abs(tensor: Tensor) -> float:
    """Return the largest magnitude, 0 if there are no elements."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def l2_norm(tensor: Tensor) -> float:
    """Return the root of the sum of squares."""
    return float(torch.linalg.vector_norm(tensor))
