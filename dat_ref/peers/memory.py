"""Memory formulas: a tape that records the allocations of a forward pass, and the workspace of basic operations.

The tape gives two numbers, both for arrays only:

- **saved**: bytes of the distinct arrays that a forward pass allocates and that its trace and output hold. Views of one
  array count once; the input and the parameters do not count. This is exactly what
  `dat_ref.complexity.retained_bytes` measures.
- **peak**: largest number of bytes in use at any time of the forward pass, including saved arrays. Each step gives its
  temporary workspace. Small index and grid arrays are left out, so on large maps tracemalloc agrees within a few
  percent, not exactly.

Both describe *this* code, which stores every intermediate; a fused kernel stores neither logits nor weights. All
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
    """Memory record of a forward pass: saved bytes by term, and peak bytes.

    >>> tape = Tape(itemsize=4)
    >>> tape.step("attention", saved=10, workspace=20)
    >>> with tape.temporary(5):
    ...     tape.step("output", saved=1)
    >>> dict(tape.saved_bytes), tape.live, tape.peak
    ({'attention': 40, 'output': 4}, 44, 120)
    """

    itemsize: int
    saved_bytes: Counter[str] = field(default_factory=Counter)  # by term
    live: int = 0  # bytes currently in use: saved, or temporary for more than one step
    peak: int = 0

    def step(self, term: str, saved: int, workspace: int = 0, *, itemsize: int | None = None) -> None:
        """Record a saved array of `saved` elements, computed with `workspace` temporary elements."""
        result = saved * (itemsize or self.itemsize)
        self.peak = max(self.peak, self.live + result + workspace * self.itemsize)
        self.saved_bytes[term] += result
        self.live += result

    def attend(self, logits: int) -> None:
        """Record the attention weights of `ops.attention.attend`, with the workspace of softmax."""
        self.step("attention", logits, 2 * logits)

    @contextmanager
    def temporary(self, elements: int, workspace: int = 0) -> Iterator[None]:
        """Hold `elements` temporary elements inside this context, computed with `workspace` more elements."""
        self.live += elements * self.itemsize
        self.peak = max(self.peak, self.live + workspace * self.itemsize)
        yield
        self.live -= elements * self.itemsize


def padded_pixels(size: Size, padding: Padding) -> int:
    """Return the number of pixels of a padded map."""
    return math.prod(length + sum(pad) for length, pad in zip(size, padding, strict=True))


def depthwise_workspace(maps: int, size: Size, kernel: int, stride: int, padding: Padding) -> int:
    """Return the workspace elements of `depthwise_conv2d` over `maps` = B·C: padded map, and one tap's products."""
    return maps * (padded_pixels(size, padding) + math.prod(conv_size(size, kernel, stride, padding)))


def conv_workspace(
    batch: int, channels: tuple[int, int], size: Size, kernel: int, stride: int, padding: Padding
) -> int:
    """Return the workspace elements of `conv2d`: the padded map, and one tap's pixels and products."""
    outputs = math.prod(conv_size(size, kernel, stride, padding))
    return batch * (channels[0] * (padded_pixels(size, padding) + outputs) + channels[1] * outputs)


def sampling_workspace(points: int, channels: int, itemsize: int) -> int:
    """Return the workspace elements of `bilinear_sample`, without the map as rows.

    Each point needs its two clipped coordinates, their floors and distances, and both rows and columns with their
    weights: 10 elements. While one corner is computed and the previous one is still in memory, it needs 7 more and two
    indices. After that it needs 4 more, one index, and per channel the gathered value and its weighted product.
    """
    index = INDEX // itemsize
    return points * max(17 + 2 * index, 14 + index + 2 * channels)
