"""Sizes may be symbols: `torch.compile` with dynamic shapes and `torch.export` run the code once for all sizes.

A Python ``if`` on a symbol would pin the graph to the side that the example takes, and the next size would compile
again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statically_zero(*values: int) -> bool:
    """Return whether all amounts are 0; of symbols, whether they are for whatever they may stand for.

    >>> statically_zero(0, 0), statically_zero(0, 1)
    (True, False)
    """
    if not torch.compiler.is_compiling():
        return not any(values)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(value == 0) for value in values)


def ceil_div(length: int, cell: int) -> int:
    """Return ⌈length/cell⌉. The dividend is never negative: an exported graph may divide towards zero.

    >>> ceil_div(7, 3)
    3
    """
    return (length + cell - 1) // cell


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the first rows and columns of a map (B, H', W', C), laid out anew as the next linear layer wants it."""
    height, width = size
    if not torch.compiler.is_compiling():
        return x[:, :height, :width].contiguous()
    # The strides of a slice would tell a compiler whether anything was cut off, and it would keep to that.
    x = x.index_select(1, torch.arange(height, device=x.device))
    return x.index_select(2, torch.arange(width, device=x.device))
