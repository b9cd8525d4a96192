"""Agreement of outputs and gradients with a reference. Only implementations that agree are timed.

The reference is the plain formulation in float32. In the same precision, the allowed error is a few hundred roundings.
In a lower precision, it is a few times the error of the plain formulation in that precision.

Bilinear sampling has no derivative on the lattice. If rounding moves a point to the other side of a pixel's center, its
gradient changes. The inputs of a single attention are therefore drawn off the lattice. In a whole model this is not
possible: its gradient is compared as one vector, by its norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Results = Mapping[str, Tensor]

FACTOR = 4.0  # allowed multiple of the plain formulation's own error in that precision
# Additional error, relative to the tensor's largest value: sums of thousands of terms differ by their rounding.
FLOOR = {torch.float64: 2.0**-42, torch.float32: 2.0**-15, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
WHOLE_GRADIENT = "gradient"  # gradient of all parameters of a model
WHOLE_GRADIENT_FLOOR = 2.0**-8


class Disagreement(Exception):
    """Raised when an implementation does not agree with the reference."""


def check(name: str, actual: Results, expected: Results, yardstick: Results, dtype: torch.dtype) -> float:
    """Compare all outputs and gradients; return the largest relative error.

    Args:
        name: name of the implementation, for the error message.
        actual: results of the implementation.
        expected: results of the reference in float32.
        yardstick: results of the reference's formulation in `dtype`.
        dtype: precision of the implementation.

    Raises:
        Disagreement: if a tensor is missing or its error exceeds the budget.
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
        if not error <= budget:  # NaN exceeds any budget
            violations.append(f"{name_of_tensor} by {error:.1e} (allowed {budget:.1e}, of {scale:.1e})")
        largest_error = max(largest_error, error / scale if scale else 0.0)
    if violations:
        raise Disagreement(f"{name} differs: {'; '.join(violations)}")
    return largest_error


def difference(actual: Tensor, expected: Tensor) -> Tensor:
    """Return actual - expected in the dtype of `expected`."""
    if actual.shape != expected.shape:
        raise Disagreement(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    return actual.to(expected.dtype) - expected


def max_abs(tensor: Tensor) -> float:
    """Return the largest magnitude, 0 if there are no elements."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def l2_norm(tensor: Tensor) -> float:
    """Return the Euclidean norm."""
    return float(torch.linalg.vector_norm(tensor))
