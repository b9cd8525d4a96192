"""How closed forms of memory are written: a tape that goes through the steps of a pass, and what operations need.

Two numbers come out, both of arrays alone:

- **kept**: the bytes of the distinct arrays that a pass makes and its trace holds on to, with its output; views of
  one array count once, the input and the parameters not at all. An integer, equal to what
  `dat_ref.complexity.retained_bytes` measures.
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
    >>> tape.step("attention", saved=10, workspace=20)
    >>> with tape.temporary(5):
    ...     tape.step("output", saved=1)
    >>> dict(tape.saved_bytes), tape.live, tape.peak
    ({'attention': 40, 'output': 4}, 44, 120)
    """

    itemsize: int
    saved_bytes: Counter[str] = field(default_factory=Counter)  # bytes by term
    live: int = 0  # bytes there are now: kept, or borrowed for more than one step
    peak: int = 0

    def step(self, term: str, saved: int, workspace: int = 0, *, itemsize: int | None = None) -> None:
        """Make an array of `saved` numbers that stays, with `workspace` numbers beside it that do not."""
        result = saved * (itemsize or self.itemsize)
        self.peak = max(self.peak, self.live + result + workspace * self.itemsize)
        self.saved_bytes[term] += result
        self.live += result

    def attend(self, logits: int) -> None:
        """Take the step of `ops.attention.attend` that makes the weights, what softmax needs beside them."""
        self.step("attention", logits, 2 * logits)

    @contextmanager
    def temporary(self, elements: int, workspace: int = 0) -> Iterator[None]:
        """Take numbers that outlive a step but are not kept, made with `workspace` numbers beside them."""
        self.live += elements * self.itemsize
        self.peak = max(self.peak, self.live + workspace * self.itemsize)
        yield
        self.live -= elements * self.itemsize


def padded_pixels(size: Size, padding: Padding) -> int:
    """Pixels of a map with its padding."""
    return math.prod(length + sum(pad) for length, pad in zip(size, padding, strict=True))


def depthwise_workspace(maps: int, size: Size, kernel: int, stride: int, padding: Padding) -> int:
    """Numbers beside the result of `depthwise_conv2d` over `maps` = B·C: the padded map, and one tap's products."""
    return maps * (padded_pixels(size, padding) + math.prod(conv_size(size, kernel, stride, padding)))


def conv_workspace(
    batch: int, channels: tuple[int, int], size: Size, kernel: int, stride: int, padding: Padding
) -> int:
    """Numbers beside the result of `conv2d`: the padded map, and one tap's pixels with what becomes of them."""
    outputs = math.prod(conv_size(size, kernel, stride, padding))
    return batch * (channels[0] * (padded_pixels(size, padding) + outputs) + channels[1] * outputs)


def sampling_workspace(points: int, channels: int, itemsize: int) -> int:
    """Numbers beside the result of `bilinear_sample`, but for the map as rows.

    A point has its two coordinates clipped, their floors and distances, both rows and both columns with their
    weights (10 numbers). Then either a corner is being made while the last one is still there (another 7, and two
    indices), or its pixel has been found (4, and an index), and each channel has the value gathered and its product
    with the weight.
    """
    index = INDEX // itemsize
    return points * max(17 + 2 * index, 14 + index + 2 * channels)
