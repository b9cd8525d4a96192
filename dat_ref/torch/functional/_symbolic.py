"""Functions for symbolic sizes: `torch.compile` with dynamic shapes and `torch.export` trace the code once.

A Python ``if`` on a symbol would specialize the graph to the branch of the example input. The next size would then
trigger recompilation.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Before torch 2.8, `torch.compile` and strict export cannot trace `statically_known_true`. A guard takes its place, so
# that a graph with symbolic sizes holds for the sizes of one branch only.
_IS_TRACEABLE = torch.__version__ >= "2.8"


def statically_zero(*values: int) -> bool:
    """Return whether all values are 0. Symbolic values must be 0 for all inputs.

    >>> statically_zero(0, 0), statically_zero(0, 1)
    (True, False)
    """
    if not torch.compiler.is_compiling():
        return not any(values)
    from torch.fx.experimental import symbolic_shapes

    if _IS_TRACEABLE or not torch.compiler.is_dynamo_compiling():
        return all(symbolic_shapes.statically_known_true(value == 0) for value in values)
    return all(symbolic_shapes.guard_size_oblivious(value == 0) for value in values)


def ceil_div(length: int, cell: int) -> int:
    """Return ⌈length/cell⌉. The dividend is never negative, because an exported graph may divide toward zero.

    >>> ceil_div(7, 3)
    3
    """
    return (length + cell - 1) // cell


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the first rows and columns of a map (B, H', W', C) as a contiguous tensor."""
    height, width = size
    if not torch.compiler.is_compiling():
        return x[:, :height, :width].contiguous()
    # The strides of a slice depend on whether anything was cut off; a compiler would specialize on them.
    x = x.index_select(1, torch.arange(height, device=x.device))
    return x.index_select(2, torch.arange(width, device=x.device))
