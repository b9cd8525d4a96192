"""Floats that count their multiplications: a cost measured on the code itself."""

from collections.abc import Callable
from typing import Any

import numpy as np


class CountingFloat(float):
    """A float whose products are counted."""

    multiplications = 0

    def __mul__(self, other: Any) -> Any:
        CountingFloat.multiplications += 1
        return CountingFloat(float(self) * float(other))

    def __add__(self, other: Any) -> Any:
        return CountingFloat(float(self) + float(other))

    __rmul__, __radd__ = __mul__, __add__


def counting_array(array: np.ndarray) -> np.ndarray:
    """Return an object array of counting floats."""
    counting = np.empty(array.shape, dtype=object)
    for index in np.ndindex(*array.shape):
        counting[index] = CountingFloat(array[index])
    return counting


def count_multiplications(function: Callable[[], Any]) -> int:
    """Return the number of products of counting floats in a call."""
    before = CountingFloat.multiplications
    function()
    return CountingFloat.multiplications - before
