"""Tensors in memory, and copies of their rows to scratch memory and back: in the type to compute in, or in bfloat16."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import uint16

from .tiles import copy_rows
from .vectors import NARROW, compiled, filled, load, load_bfloat16, numbers_at, store, store_bfloat16


class Rows(NamedTuple):
    """A tensor (image, head, row, channel) in memory: its numbers, and the strides of all axes but the last."""

    numbers: Any
    image: int
    head: int
    row: int
    bits: Any  # the same memory as halves of numbers, and whether that is what it holds
    narrow: int


@compiled
def rows_of(call: Any, operand: Any) -> Rows:
    """Return an operand of a call, see `launch.Fields`."""
    bits = numbers_at(operand[0], uint16(0))
    return Rows(numbers_at(operand[0], call.number), operand[1], operand[2], operand[3], bits, operand[4])


@compiled
def read_rows(
    target: Any, to: int, target_row: int, source: Rows, at: int, source_row: int, rows: int, length: int, factor: float
) -> None:
    """`tiles.copy_rows` from a tensor."""
    if not source.narrow:
        copy_rows(target, to, target_row, source.numbers, at, source_row, rows, length, factor)
        return
    like, one = filled(source.numbers.dtype.type(0), NARROW), filled(source.numbers.dtype.type(0), 1)
    whole = length - length % NARROW
    for i in range(rows):
        into, out_of = to + i * target_row, at + i * source_row
        for j in range(0, whole, NARROW):
            store(target, into + j, factor * load_bfloat16(source.bits, out_of + j, like))
        for j in range(whole, length):
            store(target, into + j, factor * load_bfloat16(source.bits, out_of + j, one))


@compiled
def write_rows(
    target: Rows, to: int, target_row: int, source: Any, at: int, source_row: int, rows: int, length: int, factor: float
) -> None:
    """`tiles.copy_rows` into a tensor."""
    if not target.narrow:
        copy_rows(target.numbers, to, target_row, source, at, source_row, rows, length, factor)
        return
    like, one = filled(source.dtype.type(0), NARROW), filled(source.dtype.type(0), 1)
    whole = length - length % NARROW
    for i in range(rows):
        into, out_of = to + i * target_row, at + i * source_row
        for j in range(0, whole, NARROW):
            store_bfloat16(target.bits, into + j, factor * load(source, out_of + j, like))
        for j in range(whole, length):
            store_bfloat16(target.bits, into + j, factor * load(source, out_of + j, one))
