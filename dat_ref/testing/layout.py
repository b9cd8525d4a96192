"""Wrappers for implementations with another order of axes, or without a batch axis."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import numpy as np

from .._checks import Array
from .._deprecation import deprecated_keywords
from .op_spec import Argument, Function
from .target import op_by_name


@deprecated_keywords(subject="op")
def with_layout(function: Function, op: str, returns: str | None = None, **axes: str) -> Function:
    """Return a function that takes and returns arrays in the protocol's layouts.

    Args:
        function: takes its arguments in the protocol's order, in its own layouts.
        op: name of the operation.
        returns: axes of its result as a string of the protocol's letters; None for the protocol's layout.
        axes: axes of the arguments by the protocol's names. If the batch axis N is missing, the function is called once
            per image.

    Raises:
        ValueError: for an unknown argument or wrong letters.

    >>> def one_image_channels_last(image, points):  # (H, W, C), (P, 2) -> (P, C)
    ...     return np.zeros((len(points), image.shape[2]))
    >>> sample = with_layout(one_image_channels_last, "sampler", "PC", x="HWC", points_px="P2")
    >>> sample(np.zeros((2, 3, 4, 5)), np.zeros((2, 7, 2))).shape
    (2, 3, 7)
    """
    op_spec = op_by_name(op)
    arguments_by_name = {argument.name: argument for argument in op_spec.arguments}
    for name, letters in axes.items():
        if name not in arguments_by_name:
            raise ValueError(f"axes: expected names among {', '.join(arguments_by_name)}, got {name!r}")
        _check_letters(name, letters, arguments_by_name[name].axes)
    result_axes = op_spec.returns if returns is None else returns
    _check_letters("returns", result_axes, op_spec.returns)
    image_by_image = "N" in op_spec.returns and "N" not in result_axes

    @wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Array:
        if not image_by_image:
            converted = [_move(value, argument, axes) for value, argument in zip(arguments, op_spec.arguments)]
            return transpose(np.asarray(function(*converted, **options)), result_axes, op_spec.returns)
        images = len(next(value for value, argument in zip(arguments, op_spec.arguments) if "N" in argument.axes))
        results = []
        for n in range(images):
            image_arguments = [
                value[n] if "N" in argument.axes else value for value, argument in zip(arguments, op_spec.arguments)
            ]
            converted = [
                _move(value, argument, axes, drop="N") for value, argument in zip(image_arguments, op_spec.arguments)
            ]
            results.append(
                transpose(np.asarray(function(*converted, **options)), result_axes, op_spec.returns.replace("N", ""))
            )
        return np.stack(results) if results else _empty_result(arguments, op_spec.arguments, op_spec.returns)

    return wrapper


def _check_letters(name: str, letters: str, expected: str) -> None:
    if sorted(letters) not in (sorted(expected), sorted(expected.replace("N", ""))):
        raise ValueError(f"{name}: expected the axes of {expected!r} in any order (N may be omitted), got {letters!r}")


def _move(value: Any, argument: Argument, axes: Mapping[str, str], drop: str = "") -> Any:
    if not isinstance(value, np.ndarray) or argument.name not in axes:
        return value
    return transpose(value, argument.axes.replace(drop, "") if drop else argument.axes, axes[argument.name])


def transpose(array: Array, source: str, target: str) -> Array:
    """Permute the axes of an array: ``transpose(x, "NCHW", "NHWC")``."""
    return array.transpose([source.index(letter) for letter in target])


def _empty_result(arguments: Any, argument_specs: Any, returns: str) -> Array:
    """Return the result for an empty batch, with the other axis lengths from the arguments."""
    sizes = {
        letter: length
        for value, argument in zip(arguments, argument_specs)
        if isinstance(value, np.ndarray)
        for letter, length in zip(argument.axes, value.shape)
    }
    return np.zeros([sizes.get(letter, 0) for letter in returns])
