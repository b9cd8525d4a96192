"""SIMD vector type for Numba. All CPU kernels are written with it.

    query = load(queries, start, zero)              # consecutive elements, as many as `zero` has lanes
    total += load_broadcast(keys, n, zero) * query  # one element in all lanes; * and + fuse to a multiply-add
    store(logits, start, total)

LLVM maps a vector to the registers of the host CPU: 16 float32 lanes are one AVX-512 register, two AVX2 registers or
four NEON registers. Scalar loops would depend on LLVM's loop vectorizer. It must prove that arrays do not overlap and
indices are not negative, and a small edit can silently cost a factor of ten. Explicit vectors need no such proof, and
accumulators stay in registers during a loop.

`load`, `load_broadcast` and `store` do not check bounds. Negative indices are not supported.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from numba.np.arrayobj import populate_array

# Feature of the CPU that Numba compiles for. The CPU is part of Numba's cache key.
_HAS_AVX512 = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]

# Numbers of lanes. Four wide accumulators take 16 of the 32 registers of AVX-512 or NEON, or 8 of the 16 of AVX2.
NARROW = 16 if _HAS_AVX512 else 8
PAIR = 2 * NARROW
WIDE = 4 * NARROW if _HAS_AVX512 else 2 * NARROW

FUSED = ("contract",)  # LLVM may fuse a multiplication and an addition

# No fast-math flag that assumes finite values: NaN must propagate.
compiled = njit(error_model="numpy", fastmath={"contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Vector(types.Type):
    """Numba type of a vector: element type and number of lanes."""

    def __init__(self, dtype: types.Type, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


# ------------------------------------------------------------------------------------------------ arithmetic


def _broadcast_value(context: Any, builder: Any, value: Any, value_type: types.Type, vector: Vector) -> Any:
    """Return a vector with a scalar, converted to the element type, in all lanes. A vector is returned unchanged."""
    if isinstance(value_type, Vector):
        return value
    scalar = context.cast(builder, value, value_type, vector.dtype)
    empty = ir.Constant(context.get_value_type(vector), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), None))


def _define_operator(symbol: Any, instruction: str) -> None:
    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
            vectors = [kind for kind in args if isinstance(kind, Vector)]
            if not vectors or any(kind != vectors[0] and not isinstance(kind, types.Number) for kind in args):
                return None
            return signature(vectors[0], *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right = (_broadcast_value(context, builder, *pair, sig.return_type) for pair in zip(args, sig.args))
        return getattr(builder, instruction)(left, right, flags=FUSED)

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *pair)(lower)


for _name, _instruction in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _define_operator(getattr(operator, _name), _instruction)
    _define_operator(getattr(operator, f"i{_name}"), _instruction)


@intrinsic(prefer_literal=True)
def broadcast(typing: Any, value: Any, lanes: Any) -> Any:
    """Return a vector with a scalar in all lanes. The number of lanes must be a compile-time constant."""
    vector = Vector(types.unliteral(value), lanes.literal_value)
    return vector(value, lanes), lambda context, builder, sig, args: _broadcast_value(
        context, builder, args[0], value, vector
    )


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """Return the elementwise maximum, and b in lanes where a or b is NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, b), lower


@intrinsic
def where_not_negative(typing: Any, condition: Any, a: Any, b: Any) -> Any:
    """Return a in lanes where `condition` ≥ 0, and b in the others."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_ordered(">=", args[0], zero), args[1], args[2])

    return a(condition, a, b), lower


@intrinsic
def lane_indices(typing: Any, like: Any) -> Any:
    """Return the vector 0, 1, 2, …"""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(args[0].type, [float(lane) for lane in range(like.lanes)])

    return like(like), lower


@intrinsic
def mask_lanes(typing: Any, vector: Any, first: Any, last: Any) -> Any:
    """Return the vector with zeros in all lanes outside first ≤ lane < last, even where it is NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lane_ids = ir.Constant(ir.VectorType(ir.IntType(64), vector.lanes), list(range(vector.lanes)))
        indices = Vector(types.int64, vector.lanes)
        start, stop = (
            _broadcast_value(context, builder, arg, kind, indices) for arg, kind in zip(args[1:], (first, last))
        )
        inside = builder.and_(builder.icmp_signed(">=", lane_ids, start), builder.icmp_signed("<", lane_ids, stop))
        return builder.select(inside, args[0], ir.Constant(args[0].type, None))

    return vector(vector, first, last), lower


@intrinsic
def lane_sum(typing: Any, vector: Any) -> Any:
    """Return the sum of all lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, lanes = args[0], vector.lanes
        while lanes > 1:  # add the upper half to the lower half
            lanes //= 2
            low, high = (
                ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(start, start + lanes)))
                for start in (0, lanes)
            )
            total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), lower


# ------------------------------------------------------------------------------------------------ memory


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, pointee: Any) -> Any:
    """Return the address of array[index] as a pointer to `pointee`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _alignment(context: Any, dtype: types.Type) -> int:
    return context.get_abi_sizeof(context.get_value_type(dtype))  # alignment of an element, not of a vector


@intrinsic
def array_at(typing: Any, address: Any, like: Any) -> Any:
    """Return the memory at an address as a 1D array of unknown length, with elements of the type of `like`."""
    kind = types.Array(like, 1, "C")

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        size, itemsize = (context.get_constant(types.intp, n) for n in (2**60, _alignment(context, like)))
        pointer = builder.inttoptr(args[0], context.get_value_type(like).as_pointer())
        populate_array(array, data=pointer, shape=[size], strides=[itemsize], itemsize=itemsize, meminfo=None)
        return array._getvalue()

    return kind(types.int64, like), lower


@intrinsic
def load(typing: Any, array: Any, index: Any, like: Any) -> Any:
    """Return array[index : index + lanes], with as many lanes as `like`. The array must be 1D and contiguous."""
    vector = Vector(array.dtype, like.lanes)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, array, args[0], args[1], context.get_value_type(vector))
        return builder.load(address, align=_alignment(context, array.dtype))

    return vector(array, types.int64, like), lower


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Store a vector to array[index : index + lanes]."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, array, args[0], args[1], context.get_value_type(vector))
        builder.store(args[2], address, align=_alignment(context, array.dtype))
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), lower


def _bfloat16_types(lanes: int) -> Any:
    """Return three LLVM vector types: bfloat16 as 16-bit integers, float32 as 32-bit integers, float32."""
    return (ir.VectorType(kind, lanes) for kind in (ir.IntType(16), ir.IntType(32), ir.FloatType()))


@intrinsic
def load_bfloat16(typing: Any, array: Any, index: Any, like: Any) -> Any:
    """Return array[index : index + lanes], an array of bfloat16 bit patterns, converted to the type of `like`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        narrow, wide, single = _bfloat16_types(like.lanes)
        address = _address(context, builder, array, args[0], args[1], narrow)
        bits = builder.zext(builder.load(address, align=2), wide)  # bfloat16 is the upper half of a float32
        value = builder.bitcast(builder.shl(bits, ir.Constant(wide, [16] * like.lanes)), single)
        return value if like.dtype == types.float32 else builder.fpext(value, args[2].type)

    return like(array, types.int64, like), lower


@intrinsic
def store_bfloat16(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Store a vector to array[index : index + lanes] as bfloat16 bit patterns, rounded to nearest even."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = vector.lanes
        narrow, wide, single = _bfloat16_types(lanes)

        def constant(bits: int) -> Any:
            return ir.Constant(wide, [bits] * lanes)

        value = args[2] if vector.dtype == types.float32 else builder.fptrunc(args[2], single)
        bits = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(builder.add(bits, constant(0x7FFF)), odd)
        # Handle NaN separately, because rounding could turn it into infinity.
        result_bits = builder.select(builder.fcmp_unordered("uno", value, value), constant(0x7FC00000), rounded)
        address = _address(context, builder, array, args[0], args[1], narrow)
        builder.store(builder.trunc(builder.lshr(result_bits, constant(16)), narrow), address, align=2)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), lower


@intrinsic
def load_broadcast(typing: Any, array: Any, index: Any, like: Any) -> Any:
    """Return array[index] in all lanes."""
    vector = Vector(array.dtype, like.lanes)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, array, args[0], args[1], context.get_value_type(array.dtype))
        return _broadcast_value(context, builder, builder.load(address), array.dtype, vector)

    return vector(array, types.int64, like), lower


@intrinsic
def transpose_block(
    typing: Any, target: Any, target_start: Any, target_stride: Any, source: Any, source_start: Any, source_stride: Any
) -> Any:
    """Transpose a block: target[target_start + i·target_stride + j] = source[source_start + j·source_stride + i].

    For i, j < NARROW. The algorithm has log₂ NARROW rounds. Each round swaps the off-diagonal quarters of square
    blocks. The block size halves from round to round.
    """
    vector = Vector(source.dtype, NARROW)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = context.get_value_type(vector)
        align = _alignment(context, source.dtype)

        def row(array: int, i: int) -> Any:
            index = builder.add(args[array + 1], builder.mul(args[array + 2], ir.Constant(ir.IntType(64), i)))
            return _address(context, builder, sig.args[array], args[array], index, kind)

        rows = [builder.load(row(3, i), align=align) for i in range(NARROW)]
        block = NARROW // 2
        while block:
            lanes = range(NARROW)
            upper = [lane if not lane & block else lane - block + NARROW for lane in lanes]
            lower_ = [lane + block if not lane & block else lane + NARROW for lane in lanes]
            for first in (lane for lane in lanes if not lane & block):
                pair = rows[first], rows[first + block]
                for i, mask in ((first, upper), (first + block, lower_)):
                    rows[i] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(ir.IntType(32), NARROW), mask))
            block //= 2
        for i, value in enumerate(rows):
            builder.store(value, row(0, i), align=align)
        return context.get_dummy_value()

    index = types.int64
    return types.void(target, index, index, source, index, index), lower


# ------------------------------------------------------------------------------------------------ exp2 and log2


@intrinsic
def exp2(typing: Any, x: Any) -> Any:
    """Return 2ˣ in each lane, for x ≤ 100; 2^-126 for x < -126; NaN for NaN.

    With the nearest integer n and f = x - n, 2ˣ = 2ⁿ · Σ (f ln 2)ᵏ / k!. The factor 2ⁿ is applied by adding n to the
    exponent bits of the sum.
    """
    # For |f| ≤ ½ the first omitted term is 5e-9 (float32) or 4e-18 (float64), below the rounding error.
    degree, bits, mantissa = (7, 32, 23) if x.dtype == types.float32 else (13, 64, 52)
    series = [math.log(2) ** k / math.factorial(k) for k in range(degree + 1)]

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, integers = args[0].type, ir.VectorType(ir.IntType(bits), x.lanes)

        def constant(value: float) -> Any:
            return ir.Constant(kind, [value] * x.lanes)

        lowest = constant(-126.0)
        power = builder.select(builder.fcmp_ordered(">", lowest, args[0]), lowest, args[0])
        # Adding 1.5·2^mantissa rounds x to an integer, and the lowest bits of the result are n.
        shift = constant(1.5 * 2.0**mantissa)
        shifted = builder.fadd(power, shift)
        f = builder.fsub(power, builder.fsub(shifted, shift))
        total = constant(series[-1])
        for coefficient in reversed(series[:-1]):
            total = builder.fadd(builder.fmul(total, f, flags=FUSED), constant(coefficient), flags=FUSED)
        n = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [mantissa] * x.lanes))
        return builder.bitcast(builder.add(builder.bitcast(total, integers), n), kind)

    return x(x), lower


@intrinsic
def log2(typing: Any, x: Any) -> Any:
    """Return log₂ x in each lane, for normal x > 0; NaN for NaN.

    With x = 2ⁿ m, √½ ≤ m < √2, and z = (m - 1)/(m + 1): log₂ x = n + 2/ln 2 · Σ z^(2k+1) / (2k+1).
    """
    # For |z| ≤ 0.172 the first omitted term is 4e-10 (float32) or 3e-19 (float64).
    terms, bits, mantissa = (5, 32, 23) if x.dtype == types.float32 else (12, 64, 52)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, integers = args[0].type, ir.VectorType(ir.IntType(bits), x.lanes)

        def constant(value: Any, kind: Any = kind) -> Any:
            return ir.Constant(kind, [value] * x.lanes)

        one, width = constant(1.0), constant(mantissa, integers)
        number = builder.bitcast(args[0], integers)
        root_half = builder.bitcast(constant(math.sqrt(0.5)), integers)
        n = builder.ashr(builder.sub(number, root_half), width)
        m = builder.bitcast(builder.sub(number, builder.shl(n, width)), kind)
        z = builder.fdiv(builder.fsub(m, one), builder.fadd(m, one))
        square, total = builder.fmul(z, z), constant(0.0)
        for k in reversed(range(terms)):
            total = builder.fadd(
                builder.fmul(total, square, flags=FUSED), constant(2 / math.log(2) / (2 * k + 1)), flags=FUSED
            )
        result = builder.fadd(builder.fmul(total, z, flags=FUSED), builder.sitofp(n, kind), flags=FUSED)
        return builder.fadd(result, builder.fsub(args[0], args[0]))  # x - x is NaN if x is NaN or infinite

    return x(x), lower


# ------------------------------------------------------------------------------------------------ threads


@intrinsic(prefer_literal=True)
def fetch_add(typing: Any, record: Any, field: Any) -> Any:
    """Return an integer field of a record, given by its index, and atomically add 1 to it."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        counters = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        counter = builder.gep(counters, [ir.Constant(ir.IntType(64), field.literal_value)])
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(record, field), lower
