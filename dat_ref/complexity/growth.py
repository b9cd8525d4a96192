"""Growth exponents: power of the map side with which a count grows, fitted over doubling sizes.

A count proportional to sideᵖ grows by a factor 2ᵖ when the side doubles. A sum of terms has no single exponent. Its
exponent rises from that of the dominant term on small maps to that of the dominant term on large maps; `Growth.steps`
gives the exponent of each doubling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Growth:
    """Counts at sides that double.

    Args:
        sides: sides of the map, in pixels.
        counts: count at each side, positive.
    """

    sides: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.sides) < 2 or len(self.sides) != len(self.counts):
            raise ValueError(f"counts: expected one for each of at least two sides, got {self.counts} at {self.sides}")
        if any(following != 2 * previous for previous, following in zip(self.sides, self.sides[1:])):
            raise ValueError(f"sides: expected each to be twice the one before, got {self.sides}")
        if min(self.counts) <= 0:
            raise ValueError(f"counts: expected positive numbers, got {self.counts}")

    @property
    def exponent(self) -> float:
        """Least-squares slope of log(count) against log(side)."""
        slope, _ = np.polyfit(np.log2(self.sides), [math.log2(count) for count in self.counts], 1)
        return float(slope)

    @property
    def steps(self) -> tuple[float, ...]:
        """Exponent of each doubling: log₂ of the growth factor of the count."""
        return tuple(math.log2(following / previous) for previous, following in zip(self.counts, self.counts[1:]))


def doubling(first: int, times: int) -> tuple[int, ...]:
    """Return `first` and its next `times` doublings.

    >>> doubling(7, 3)
    (7, 14, 28, 56)
    """
    return tuple(first * 2**index for index in range(times + 1))


def growth(counts: Callable[[int], int] | Mapping[int, int], sides: Sequence[int] | None = None) -> Growth:
    """Return the growth of a count.

    Args:
        counts: function of the side, or a mapping from side to count.
        sides: sides at which to call the function; 7, 14, …, 112 by default.

    >>> growth(lambda side: 3 * side**2, doubling(7, 3)).steps
    (2.0, 2.0, 2.0)
    """
    if isinstance(counts, Mapping):
        return Growth(tuple(counts), tuple(counts.values()))
    sides = tuple(doubling(7, 4) if sides is None else sides)
    return Growth(sides, tuple(counts(side) for side in sides))
