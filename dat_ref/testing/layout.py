"""Wrappers for implementations that keep their axes in another order, or take one image at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import numpy as np

from .._checks import Array
from .subject import Argument, Function
from .target import subject_named


def with_layout(function: Function, subject: str, returns: str | None = None, **axes: str) -> Function:
    """Return a function that takes and returns the protocol's layouts.

    Args:
        function: takes its arguments in the protocol's order, in its own layouts.
        subject: name of the subject.
        returns: axes of its result, a string of the protocol's letters; None where they are the protocol's.
        axes: the same by the protocol's argument names. Where the batch's letter N is missing from all of them, the
            function is called once for each image.

    Raises:
        ValueError: for an argument that the subject does not have, or letters that are not its own.

    >>> def one_image_channels_last(image, points):  # (H, W, C), (P, 2) -> (P, C)
    ...     return np.zeros((len(points), image.shape[2]))
    >>> sample = with_layout(one_image_channels_last, "sampler", "PC", x="HWC", points_px="P2")
    >>> sample(np.zeros((2, 3, 4, 5)), np.zeros((2, 7, 2))).shape
    (2, 3, 7)
    """
    chosen = subject_named(subject)
    known = {argument.name: argument for argument in chosen.arguments}
    for name, letters in axes.items():
        if name not in known:
            raise ValueError(f"axes: expected names among {', '.join(known)}, got {name!r}")
        _check_letters(name, letters, known[name].axes)
    own_returns = chosen.returns if returns is None else returns
    _check_letters("returns", own_returns, chosen.returns)
    single = "N" in chosen.returns and "N" not in own_returns

    @wraps(function)
    def adapted(*arguments: Any, **options: Any) -> Array:
        if not single:
            moved = [_move(value, known_argument, axes) for value, known_argument in zip(arguments, chosen.arguments)]
            return transpose(np.asarray(function(*moved, **options)), own_returns, chosen.returns)
        images = len(next(value for value, each in zip(arguments, chosen.arguments) if "N" in each.axes))
        results = []
        for n in range(images):
            one = [value[n] if "N" in each.axes else value for value, each in zip(arguments, chosen.arguments)]
            moved = [_move(value, each, axes, drop="N") for value, each in zip(one, chosen.arguments)]
            results.append(
                transpose(np.asarray(function(*moved, **options)), own_returns, chosen.returns.replace("N", ""))
            )
        return np.stack(results) if results else _nothing(arguments, chosen.arguments, chosen.returns)

    return adapted


def _check_letters(name: str, letters: str, expected: str) -> None:
    if sorted(letters) not in (sorted(expected), sorted(expected.replace("N", ""))):
        raise ValueError(
            f"{name}: expected the axes of {expected!r} in some order (N may be left out), got {letters!r}"
        )


def _move(value: Any, argument: Argument, axes: Mapping[str, str], drop: str = "") -> Any:
    if not isinstance(value, np.ndarray) or argument.name not in axes:
        return value
    return transpose(value, argument.axes.replace(drop, "") if drop else argument.axes, axes[argument.name])


def transpose(array: Array, have: str, want: str) -> Array:
    """Return an array with its axes in another order: ``transpose(x, "NCHW", "NHWC")``."""
    return array.transpose([have.index(letter) for letter in want])


def _nothing(arguments: Any, declared: Any, returns: str) -> Array:
    """The result for no images: its other axes are those that the arguments have."""
    sizes = {
        letter: length
        for value, argument in zip(arguments, declared)
        if isinstance(value, np.ndarray)
        for letter, length in zip(argument.axes, value.shape)
    }
    return np.zeros([sizes.get(letter, 0) for letter in returns])
