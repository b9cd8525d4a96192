"""How fast a cost grows with the side of the map: exponents fitted on counts over doubling sizes.

A count that goes as sideᵖ is multiplied by 2ᵖ when the side doubles. Sums of terms have no one exponent: theirs
climbs from that of the term that leads on small maps to that of the term that leads on large ones, which
`Growth.steps` shows.
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
        sides: of the map.
        counts: at each side, positive.
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
        """Slope of the straight line through the logarithms, by least squares."""
        slope, _ = np.polyfit(np.log2(self.sides), [math.log2(count) for count in self.counts], 1)
        return float(slope)

    @property
    def steps(self) -> tuple[float, ...]:
        """Exponent of each doubling: log₂ of how many times the count grew."""
        return tuple(math.log2(following / previous) for previous, following in zip(self.counts, self.counts[1:]))


def doubling(first: int, times: int) -> tuple[int, ...]:
    """Return a side and its doubles.

    >>> doubling(7, 3)
    (7, 14, 28, 56)
    """
    return tuple(first * 2**index for index in range(times + 1))


def growth(counts: Callable[[int], int] | Mapping[int, int], sides: Sequence[int] | None = None) -> Growth:
    """Return the growth of a count: a function of the side with the sides, or the counts by side.

    >>> growth(lambda side: 3 * side**2, doubling(7, 3)).steps
    (2.0, 2.0, 2.0)
    """
    if isinstance(counts, Mapping):
        return Growth(tuple(counts), tuple(counts.values()))
    sides = tuple(doubling(7, 4) if sides is None else sides)
    return Growth(sides, tuple(counts(side) for side in sides))
