"""Errors that come before work: they name the argument, the expected pattern, the actual shape and the rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tree = Any  # nested dicts and lists whose leaves are arrays (or, for a tree of shapes, tuples)


class ShapeError(ValueError):
    """An array has the wrong shape or kind of number."""


class ConfigError(ValueError):
    """Sizes or options that do not go together."""


class CheckpointError(ValueError):
    """A parameter tree or state dict that does not fit the model; the message is the whole report."""


def pattern(axes: Mapping[str, int | None]) -> str:
    """Write axes as people do: ``{"B": None, "C": 96}`` becomes ``(B, C=96)``."""
    return "(" + ", ".join(name if size is None else f"{name}={size}" for name, size in axes.items()) + ")"


def check_array(name: str, value: Array, axes: Mapping[str, int | None], rule: str = "") -> Array:
    """Return `value` if it is a floating-point array whose shape fits `axes` (``None`` fits any length).

    Raises:
        ShapeError: naming the argument, the pattern, the rule and what was found.

    >>> check_array("x", np.zeros((2, 64, 7, 9)), {"B": None, "C": 96, "H": None, "W": None})
    Traceback (most recent call last):
        ...
    dat_ref._checks.ShapeError: x: expected (B, C=96, H, W), got (2, 64, 7, 9)
    """
    value = np.asarray(value)
    expected = pattern(axes) + (f" with {rule}" if rule else "")
    fits = value.ndim == len(axes) and all(
        size is None or size == actual for size, actual in zip(axes.values(), value.shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"{name}: expected {expected}, got {value.shape}")
    if not np.issubdtype(value.dtype, np.floating):
        raise ShapeError(f"{name}: expected floating-point numbers {expected}, got {value.dtype}")
    return value


def check_map(name: str, x: Array, channels: int) -> Array:
    """Return `x` if it is a floating-point feature map ``(B, C=channels, H, W)`` with at least one pixel."""
    x = check_array(name, x, {"B": None, "C": channels, "H": None, "W": None})
    if 0 in x.shape[2:]:
        raise ShapeError(f"{name}: expected (B, C={channels}, H, W) with H >= 1 and W >= 1, got {x.shape}")
    return x


def check_divides(name: str, divisor: int, of: str, number: int) -> None:
    """Raise unless ``number % divisor == 0``."""
    if divisor < 1 or number % divisor:
        raise ConfigError(f"{name}: expected a divisor of {of}={number}, got {divisor}")
