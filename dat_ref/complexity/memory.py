"""How closed forms of memory are written: a tape that goes through the steps of a pass, and what operations need.

Two numbers come out, both of arrays alone:

- **kept**: the bytes of the distinct arrays that a pass makes and its trace holds on to, with its output; views of
  one array count once, the input and the parameters not at all. An integer, equal to what
  `dat_ref.complexity.held_bytes` measures.
- **peak**: the most bytes that arrays take at any moment of the pass, kept ones included. What a step needs beside
  its result is written with the step. Small index and grid arrays are left out, so tracemalloc agrees within a few
  percent where maps are large, not to the byte.

Both are of *this* code, which writes every intermediate down; a fused kernel keeps neither logits nor weights. All
floating-point arrays have the itemsize of the input, at least 4 bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..ops.basic import Padding, conv_size
from ..ops.grid import Size

Macs = dict[str, int]  # multiply-adds by term

INDEX = 8  # bytes of an index


@dataclass
class Tape:
    """Adds up a pass, step by step: what each keeps, by term, and the most that is held at once.

    >>> tape = Tape(itemsize=4)
    >>> tape.step("attention", keeps=10, needs=20)
    >>> with tape.borrowed(5):
    ...     tape.step("output", keeps=1)
    >>> dict(tape.kept), tape.held, tape.peak
    ({'attention': 40, 'output': 4}, 44, 120)
    """

    itemsize: int
    kept: Counter[str] = field(default_factory=Counter)  # bytes by term
    held: int = 0  # bytes there are now: kept, or borrowed for more than one step
    peak: int = 0

    def step(self, term: str, keeps: int, needs: int = 0, *, itemsize: int | None = None) -> None:
        """Make an array of `keeps` numbers that stays, with `needs` numbers beside it that do not."""
        result = keeps * (itemsize or self.itemsize)
        self.peak = max(self.peak, self.held + result + needs * self.itemsize)
        self.kept[term] += result
        self.held += result

    def attend(self, logits: int) -> None:
        """Take the step of `ops.attention.attend` that makes the weights, what softmax needs beside them."""
        self.step("attention", logits, 2 * logits)

    @contextmanager
    def borrowed(self, numbers: int, needs: int = 0) -> Iterator[None]:
        """Take numbers that outlive a step but are not kept, made with `needs` numbers beside them."""
        self.held += numbers * self.itemsize
        self.peak = max(self.peak, self.held + needs * self.itemsize)
        yield
        self.held -= numbers * self.itemsize


def padded_pixels(size: Size, padding: Padding) -> int:
    """Pixels of a map with its padding."""
    return math.prod(length + sum(pad) for length, pad in zip(size, padding, strict=True))


def depthwise_needs(maps: int, size: Size, kernel: int, stride: int, padding: Padding) -> int:
    """Numbers beside the result of `depthwise_conv2d` over `maps` = B·C: the padded map, and one tap's products."""
    return maps * (padded_pixels(size, padding) + math.prod(conv_size(size, kernel, stride, padding)))


def conv_needs(batch: int, channels: tuple[int, int], size: Size, kernel: int, stride: int, padding: Padding) -> int:
    """Numbers beside the result of `conv2d`: the padded map, and one tap's pixels with what becomes of them."""
    made = math.prod(conv_size(size, kernel, stride, padding))
    return batch * (channels[0] * (padded_pixels(size, padding) + made) + channels[1] * made)


def sampling_needs(points: int, channels: int, itemsize: int) -> int:
    """Numbers beside the result of `bilinear_sample`, but for the map as rows.

    A point has its two coordinates clipped, their floors and distances, both rows and both columns with their
    weights (10 numbers). Then either a corner is being made while the last one is still there (another 7, and two
    indices), or its pixel has been found (4, and an index), and each channel has the value gathered and its product
    with the weight.
    """
    index = INDEX // itemsize
    return points * max(17 + 2 * index, 14 + index + 2 * channels)
