"""Argument checks and their errors. A message names the argument, the expected shape, the actual shape and the rule."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tree = Any  # nested dicts and lists whose leaves are arrays (or, for a tree of shapes, tuples)
Rule = Callable[[str, Any], Any]  # (field name, value) → converted value; raises `ConfigError`
E = TypeVar("E", bound=Enum)


class ShapeError(ValueError):
    """Wrong shape or dtype of an array."""


class ConfigError(ValueError):
    """Incompatible sizes or options."""


class CheckpointError(ValueError):
    """Parameter tree or state dict that does not fit the model. The message contains the full report."""


class HyperparameterWarning(UserWarning):
    """Hyperparameters with which offsets are hard to learn. The message names the value to use instead."""


def pattern(axes: Mapping[str, int | None]) -> str:
    """Format named axes as a shape: ``{"B": None, "C": 96}`` becomes ``(B, C=96)``."""
    return "(" + ", ".join(name if size is None else f"{name}={size}" for name, size in axes.items()) + ")"


def check_array(
    name: str, value: Array, axes: Mapping[str, int | None], rule: str = "", *, integers: bool = False
) -> Array:
    """Return `value` as an array after a check of its shape and dtype.

    Args:
        name: argument name for the error message.
        value: array to check; it must be floating point.
        axes: expected length of each axis, by axis name; ``None`` allows any length.
        rule: additional rule to print in the error message.
        integers: accept integers too.

    Raises:
        ShapeError: if the shape does not match `axes` or the dtype is not floating point.

    >>> check_array("x", np.zeros((2, 64, 7, 9)), {"B": None, "C": 96, "H": None, "W": None})
    Traceback (most recent call last):
        ...
    dat_ref._checks.ShapeError: x: expected (B, C=96, H, W), got (2, 64, 7, 9)
    """
    value = np.asarray(value)
    fits = value.ndim == len(axes) and all(
        size is None or size == actual for size, actual in zip(axes.values(), value.shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"{name}: expected {_expected(axes, rule)}, got {value.shape}")
    check_dtype(name, value, _expected(axes, rule), integers=integers)
    return value


def _expected(axes: Mapping[str, int | None], rule: str) -> str:
    return pattern(axes) + (f" with {rule}" if rule else "")


def check_dtype(name: str, value: Array, expected: str = "", *, integers: bool = False) -> None:
    """Raise `ShapeError` unless `value` is a floating-point array; with `integers`, integers are accepted too."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "f" or (integers and kind in ("i", "u")):
        return
    accepted = "real" if integers else "floating-point"
    found = value.dtype if kind else type(value).__name__
    raise ShapeError(" ".join(filter(None, [f"{name}: expected {accepted} numbers", expected])) + f", got {found}")


def check_same_shape(name: str, value: Array, shape: Sequence[int], of: str) -> None:
    """Raise `ShapeError` unless `value` is a floating-point array with the shape of another array, `of`."""
    check_dtype(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ShapeError(f"{name}: expected the shape of {of}, {tuple(shape)}, got {tuple(value.shape)}")


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


# ------------------------------------------------------------------------------------------------ options


def _reject(name: str, expected: str, value: object) -> NoReturn:
    raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _listed(choices: Sequence[object]) -> str:
    """Format choices as ``'a', 'b' or 'c'``."""
    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}" if first else last


def integer(minimum: int | None = None, rule: str = "", *, odd: bool = False) -> Rule:
    """Return the rule for an integer, optionally with a minimum, or odd. NumPy integers are converted."""
    expected = "an odd integer" if odd else "an integer"
    expected += f" >= {minimum}" if minimum is not None else ""
    expected += f" ({rule})" if rule else ""

    def convert(name: str, value: Any) -> int:
        if not _is_integer(value) or (minimum is not None and value < minimum) or (odd and value % 2 == 0):
            _reject(name, expected, value)
        return int(value)

    return convert


def real(minimum: float | None = None, below: float | None = None, rule: str = "") -> Rule:
    """Return the rule for a finite real number in [`minimum`, `below`). The result is a float."""
    bounds = [f">= {minimum:g}"] if minimum is not None else []
    bounds += [f"< {below:g}"] if below is not None else []
    expected = " ".join(filter(None, ["a finite number", " and ".join(bounds), f"({rule})" if rule else ""]))

    def convert(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            _reject(name, expected, value)
        try:
            number = float(value)
        except OverflowError:
            _reject(name, expected, value)
        too_small = minimum is not None and number < minimum
        if not math.isfinite(number) or too_small or (below is not None and number >= below):
            _reject(name, expected, value)
        return number

    return convert


RATE = real(0, 1)  # dropout rates and the rate of stochastic depth


def boolean(name: str, value: Any) -> bool:
    """Rule for a boolean."""
    if not isinstance(value, (bool, np.bool_)):
        _reject(name, "True or False", value)
    return bool(value)


def choice(choices: Sequence[str]) -> Rule:
    """Return the rule for one of several strings."""

    def convert(name: str, value: Any) -> str:
        if isinstance(value, str):
            for each in choices:
                if each == value:
                    return each
        _reject(name, _listed(choices), value)

    return convert


def member(kind: type[E], names: bool = False) -> Rule:
    """Return the rule for a member of an enumeration. A string is converted.

    Args:
        kind: the enumeration.
        names: strings are names of members, in upper or lower case, instead of values.
    """
    known = [each.name.lower() if names else each.value for each in kind]

    def convert(name: str, value: Any) -> E:
        if isinstance(value, kind):
            return value
        if isinstance(value, str):
            try:
                return kind[value.upper()] if names else kind(value)
            except (KeyError, ValueError):
                pass
        _reject(name, f"{kind.__name__}, or one of {_listed(known)}", value)

    return convert


def size_pair(name: str, value: Any) -> tuple[int, int]:
    """Rule for the size of a map or an image, (H, W). A list or an array becomes a tuple."""
    sides = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(sides, (tuple, list)) and len(sides) == 2 and all(_is_integer(side) and side >= 1 for side in sides):
        return int(sides[0]), int(sides[1])
    _reject(name, "(H, W), two integers >= 1", value)


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def optional(rule: Rule) -> Rule:
    """Return the rule that also accepts None."""
    return lambda name, value: None if value is None else rule(name, value)


def check_fields(config: Any, **rules: Rule) -> None:
    """Check the fields of a frozen dataclass and store the converted values.

    Raises:
        ConfigError: with the name of the field, the rule and the value.
    """
    for name, rule in rules.items():
        object.__setattr__(config, name, rule(name, getattr(config, name)))


def printable(text: str) -> str:
    r"""Escape control characters, such as a line break in a file name.

    >>> print(printable("first\nsecond.png"))
    first\nsecond.png
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
