"""Argument checks and their errors. A message names the argument, the expected shape, the actual shape and the rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tree = Any  # nested dicts and lists whose leaves are arrays (or, for a tree of shapes, tuples)


class ShapeError(ValueError):
    """Wrong shape or dtype of an array."""


class ConfigError(ValueError):
    """Incompatible sizes or options."""


class CheckpointError(ValueError):
    """Parameter tree or state dict that does not fit the model. The message contains the full report."""


def pattern(axes: Mapping[str, int | None]) -> str:
    """Format named axes as a shape: ``{"B": None, "C": 96}`` becomes ``(B, C=96)``."""
    return "(" + ", ".join(name if size is None else f"{name}={size}" for name, size in axes.items()) + ")"


def check_array(name: str, value: Array, axes: Mapping[str, int | None], rule: str = "") -> Array:
    """Return `value` as an array after a check of its shape and dtype.

    Args:
        name: argument name for the error message.
        value: array to check; it must be floating point.
        axes: expected length of each axis, by axis name; ``None`` allows any length.
        rule: additional rule to print in the error message.

    Raises:
        ShapeError: if the shape does not match `axes` or the dtype is not floating point.

    >>> check_array("x", np.zeros((2, 64, 7, 9)), {"B": None, "C": 96, "H": None, "W": None})
    Traceback (most recent call last):
        ...
    dat_ref._checks.ShapeError: x: expected (B, C=96, H, W), got (2, 64, 7, 9)
    """
    value = np.asarray(value)
    expected = pattern(axes) + (f" with {rule}" if rule else "")
    matches = value.ndim == len(axes) and all(
        size is None or size == actual for size, actual in zip(axes.values(), value.shape, strict=True)
    )
    if not matches:
        raise ShapeError(f"{name}: expected {expected}, got {value.shape}")
    if not np.issubdtype(value.dtype, np.floating):
        raise ShapeError(f"{name}: expected floating-point numbers {expected}, got {value.dtype}")
    return value


def check_map(name: str, x: Array, channels: int) -> Array:
    """Return `x` as an array after a check that it is a floating-point feature map (B, channels, H ≥ 1, W ≥ 1)."""
    x = check_array(name, x, {"B": None, "C": channels, "H": None, "W": None})
    if 0 in x.shape[2:]:
        raise ShapeError(f"{name}: expected (B, C={channels}, H, W) with H >= 1 and W >= 1, got {x.shape}")
    return x


def check_divides(name: str, divisor: int, of: str, number: int) -> None:
    """Raise `ConfigError` if `divisor` does not divide `number`."""
    if divisor < 1 or number % divisor:
        raise ConfigError(f"{name}: expected a divisor of {of}={number}, got {divisor}")
