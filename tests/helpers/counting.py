"""Numbers that count how often they are multiplied: a cost measured on the code itself."""

from collections.abc import Callable
from typing import Any

import numpy as np


class CountingArray(float):
    """A float whose products are counted."""

    multiplications = 0

    def __mul__(self, other: Any) -> Any:
        CountingArray.multiplications += 1
        return CountingArray(float(self) * float(other))

    def __add__(self, other: Any) -> Any:
        return CountingArray(float(self) + float(other))

    __rmul__, __radd__ = __mul__, __add__


def numbers_that_count(array: np.ndarray) -> np.ndarray:
    """Return an object array of counting numbers."""
    counting = np.empty(array.shape, dtype=object)
    for index in np.ndindex(*array.shape):
        counting[index] = CountingArray(array[index])
    return counting


def count_multiplications(function: Callable[[], Any]) -> int:
    """Return how many products of counting numbers a call makes."""
    before = CountingArray.multiplications
    function()
    return CountingArray.multiplications - before
