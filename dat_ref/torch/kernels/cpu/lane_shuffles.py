"""Vector operations on quads, groups of four lanes. 16 lanes are four queries × four keys, or × four channels.

A dot product multiplies four channels of a key with four channels of four queries in one vector instruction. At the end
only sums within quads remain. So queries and keys need no transposed copy, and no vector is summed over all lanes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .vectors import Vector, maximum
from .vectors import _address as address
from .vectors import _alignment as alignment

QUAD = 4
LANES = QUAD * QUAD
inlined = njit(
    error_model="numpy", fastmath={"contract"}, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
)


def _mask(lanes: Iterable[int]) -> Any:
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


@intrinsic
def load_broadcast_quad(typing: Any, array: Any, index: Any, like: Any) -> Any:
    """Return array[index : index + 4] in every quad."""
    vector = Vector(array.dtype, like.lanes)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(context.get_value_type(array.dtype), QUAD)
        pointer = address(context, builder, array, args[0], args[1], kind)
        quad = builder.load(pointer, align=alignment(context, array.dtype))
        return builder.shuffle_vector(quad, quad, _mask(lane % QUAD for lane in range(like.lanes)))

    return vector(array, types.int64, like), lower


@intrinsic
def broadcast_quads(typing: Any, like: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return a vector with a in all lanes of quad 0, b in quad 1, c in quad 2 and d in quad 3."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = context.get_value_type(like.dtype)
        four = ir.Constant(ir.VectorType(kind, QUAD), ir.Undefined)
        for quad in range(QUAD):
            value = context.cast(builder, args[1 + quad], sig.args[1 + quad], like.dtype)
            four = builder.insert_element(four, value, ir.Constant(ir.IntType(32), quad))
        return builder.shuffle_vector(four, four, _mask(lane // QUAD for lane in range(like.lanes)))

    return like(like, a, b, c, d), lower


@intrinsic
def quad_sums(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return a vector whose lane 4·i + j is the sum over quad i of argument j."""

    def horizontal_add(builder: Any, left: Any, right: Any) -> Any:
        """Return for each quad two sums of neighboring lanes of `left`, then two of `right`."""
        even, odd = (
            builder.shuffle_vector(left, right, _mask(quad + offset + odd for quad in quads for offset in offsets))
            for odd in (0, 1)
        )
        return builder.fadd(even, odd)

    quads, offsets = range(0, a.lanes, QUAD), (0, 2, a.lanes, a.lanes + 2)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return horizontal_add(builder, horizontal_add(builder, *args[:2]), horizontal_add(builder, *args[2:]))

    return a(a, b, c, d), lower


@intrinsic
def interleave(typing: Any, target: Any, start: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Store four vectors interleaved: target[start + 16·k + 4·i + j] = lane 4·k + j of vector i."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for k in range(LANES // QUAD):
            pair = _mask(first + QUAD * k + j for first in (0, LANES) for j in range(QUAD))
            halves = [builder.shuffle_vector(*args[index : index + 2], pair) for index in (2, 4)]
            row = builder.shuffle_vector(*halves, _mask(range(LANES)))
            index = builder.add(args[1], ir.Constant(ir.IntType(64), LANES * k))
            pointer = address(context, builder, target, args[0], index, row.type)
            builder.store(row, pointer, align=alignment(context, target.dtype))
        return context.get_dummy_value()

    return types.void(target, types.int64, a, b, c, d), lower


@intrinsic(prefer_literal=True)
def _swap_lanes(typing: Any, vector: Any, distance: Any) -> Any:
    step = distance.literal_value

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.shuffle_vector(args[0], args[0], _mask(lane ^ step for lane in range(vector.lanes)))

    return vector(vector, distance), lower


@inlined
def quad_maximum(vector: Any) -> Any:
    """Return the maximum of each quad, in all lanes of the quad."""
    vector = maximum(vector, _swap_lanes(vector, 1))
    return maximum(vector, _swap_lanes(vector, 2))


@inlined
def quad_sum(vector: Any) -> Any:
    """Return the sum of each quad, in all lanes of the quad."""
    vector = vector + _swap_lanes(vector, 1)
    return vector + _swap_lanes(vector, 2)
