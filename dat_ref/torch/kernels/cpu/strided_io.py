"""Strided tensors: load rows to scratch memory and store them back, in the compute dtype or in bfloat16."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import uint16

from .tiles import copy_rows
from .vectors import NARROW, array_at, broadcast, compiled, load, load_bfloat16, store, store_bfloat16


class StridedTensor(NamedTuple):
    """A tensor (image, head, row, channel) in memory, with unit stride in the last dimension."""

    elements: Any
    image_stride: int
    head_stride: int
    row_stride: int
    bfloat16_bits: Any  # the same memory as 16-bit integers, valid if is_bfloat16
    is_bfloat16: int


@compiled
def strided_tensor(call: Any, operand: Any) -> StridedTensor:
    """Return an operand of the argument record, see `launch.ArgumentLayout`."""
    bfloat16_bits = array_at(operand[0], uint16(0))
    return StridedTensor(array_at(operand[0], call.zero), operand[1], operand[2], operand[3], bfloat16_bits, operand[4])


@compiled
def load_rows(
    target: Any,
    target_start: int,
    target_stride: int,
    source: StridedTensor,
    source_start: int,
    source_stride: int,
    rows: int,
    length: int,
    factor: float,
) -> None:
    """Load rows of a tensor: `tiles.copy_rows` with conversion from bfloat16."""
    if not source.is_bfloat16:
        copy_rows(
            target, target_start, target_stride, source.elements, source_start, source_stride, rows, length, factor
        )
        return
    like, one = broadcast(source.elements.dtype.type(0), NARROW), broadcast(source.elements.dtype.type(0), 1)
    vectorized = length - length % NARROW
    for i in range(rows):
        dst, src = target_start + i * target_stride, source_start + i * source_stride
        for j in range(0, vectorized, NARROW):
            store(target, dst + j, factor * load_bfloat16(source.bfloat16_bits, src + j, like))
        for j in range(vectorized, length):
            store(target, dst + j, factor * load_bfloat16(source.bfloat16_bits, src + j, one))


@compiled
def store_rows(
    target: StridedTensor,
    target_start: int,
    target_stride: int,
    source: Any,
    source_start: int,
    source_stride: int,
    rows: int,
    length: int,
    factor: float,
) -> None:
    """Store rows to a tensor: `tiles.copy_rows` with conversion to bfloat16."""
    if not target.is_bfloat16:
        copy_rows(
            target.elements, target_start, target_stride, source, source_start, source_stride, rows, length, factor
        )
        return
    like, one = broadcast(source.dtype.type(0), NARROW), broadcast(source.dtype.type(0), 1)
    vectorized = length - length % NARROW
    for i in range(rows):
        dst, src = target_start + i * target_stride, source_start + i * source_stride
        for j in range(0, vectorized, NARROW):
            store_bfloat16(target.bfloat16_bits, dst + j, factor * load(source, src + j, like))
        for j in range(vectorized, length):
            store_bfloat16(target.bfloat16_bits, dst + j, factor * load(source, src + j, one))
