"""Kernel launcher: argument records, compilation, threading.

A kernel is a function of one argument, a pointer to a record with all sizes, strides and addresses. It is compiled once
per dtype, for all sizes and strides. Every thread runs the kernel. With `vectors.fetch_add` a thread first takes a
part of the scratch buffer and then one work item after the other, until none is left.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import struct
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor, empty

from .code_cache import compile_cached
from .vectors import compiled


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class ArgumentLayout:
    """Field names of an argument record. Kernels with the same layout share the compiled code of common functions.

    Every record also has these fields: ``ticket``, the counter for work items; ``slot``, the counter for parts of the
    scratch buffer; ``work_items``, the number of work items; ``scratch_size``, bytes of scratch memory per thread;
    ``array_offsets``, offsets of the arrays in it, see `array_reader`; ``scratch``, address of the scratch buffer; and
    ``zero``, a zero of the compute dtype.
    """

    module: str  # name of the module that defines the kernels
    integers: tuple[str, ...]
    floats: tuple[str, ...]
    operands: tuple[str, ...]  # 4D tensors with unit stride in the last dimension, see `strided_io.StridedTensor`
    addresses: tuple[str, ...]  # contiguous tensors

    def record_dtype(self, dtype: torch.dtype) -> np.dtype:
        """Return the NumPy dtype of the record for this compute dtype."""
        fields: list[Any] = [
            (name, np.int64) for name in ("ticket", "slot", "work_items", "scratch_size", *self.integers)
        ]
        fields += [("array_offsets", np.int64, (_MAX_ARRAYS + 1,)), *((name, np.float64) for name in self.floats)]
        # An operand: address, three strides, and 1 if it is bfloat16.
        fields += [(name, np.int64, (5,)) for name in self.operands]
        fields += [(name, np.int64) for name in (*self.addresses, "scratch")]
        fields += [("zero", np.float64 if dtype == torch.float64 else np.float32)]
        # Numba's cache key has the argument types and the time stamp of the file of the compiled function, but not the
        # files of the functions that it calls. A digest of all sources in a field name makes it part of the key.
        fields += [(f"sources_{_source_digest(self.module)}", np.int8)]
        return np.dtype(fields, align=True)


class PackedArguments(NamedTuple):
    """Argument record without strides and addresses. It depends only on dtype and sizes, so callers cache it."""

    record: bytes
    pack_addresses: Callable[..., None]  # (buffer, byte offset, strides and addresses)
    address_offset: int  # byte offset of the first address in the record
    scratch_elements: int  # elements of scratch memory per thread


def pack_arguments(
    fields: ArgumentLayout,
    dtype: torch.dtype,
    values: Mapping[str, float],
    array_sizes: tuple[int, ...],
    work_items: int,
) -> PackedArguments:
    """Fill the integers and floats of a record.

    Args:
        values: integers and floats by name; missing ones are 0.
        array_sizes: elements of each array in a thread's scratch memory, see `array_reader`.
        work_items: number of work items.
    """
    # Arrays start at multiples of 64 elements, so all vectors of one array have the same alignment.
    offsets = list(accumulate((-(-size // 64) * 64 for size in array_sizes), initial=0))
    layout = fields.record_dtype(dtype)
    record = np.zeros((), layout)
    for name, value in values.items():
        record[name] = value
    record["array_offsets"][: len(offsets)] = offsets
    record["work_items"] = work_items
    record["scratch_size"] = offsets[-1] * record["zero"].itemsize
    assert layout.fields is not None
    addresses = struct.Struct(f"{5 * len(fields.operands) + len(fields.addresses) + 1}q")
    return PackedArguments(record.tobytes(), addresses.pack_into, layout.fields[fields.operands[0]][1], offsets[-1])


def run(
    kernel: Callable[[Any], None],
    fields: ArgumentLayout,
    dtype: torch.dtype,
    packed: PackedArguments,
    tensors: Mapping[str, Tensor],
    threads: int,
) -> None:
    """Compile a kernel if necessary and run it on all threads.

    Args:
        kernel: plain Python function at module level.
        fields: layout of the kernel's argument record.
        dtype: compute dtype.
        packed: argument record from `pack_arguments`.
        tensors: operands and contiguous tensors by name; the kernel must not use missing ones.
        threads: number of threads.
    """
    function = compile_kernel(kernel, fields, dtype)
    scratch = empty(threads * packed.scratch_elements, dtype=dtype)
    addresses: list[int] = []
    for name in fields.operands:
        x = tensors.get(name)
        addresses += _NO_OPERAND if x is None else (x.data_ptr(), *x.stride()[:3], x.dtype is torch.bfloat16)
    for name in fields.addresses:
        x = tensors.get(name)
        addresses.append(0 if x is None else x.data_ptr())
    record = bytearray(packed.record)
    packed.pack_addresses(record, packed.address_offset, *addresses, scratch.data_ptr())
    argument = (ctypes.c_char * len(record)).from_buffer(record)
    if threads == 1:
        _callable(function)(argument)
    else:
        _run_on_threads(function, argument, threads)


_NO_OPERAND = (0, 0, 0, 0, 0)


# ------------------------------------------------------------------------------------------------ fields by name

_MAX_ARRAYS = 19


def array_reader(kind: Any) -> Any:
    """Return a compiled function that cuts scratch memory into arrays: (memory, array_offsets) → `kind`, a named tuple.

    The fields of `kind` are the only list of the arrays: a caller passes an instance with their sizes to
    `pack_arguments`, and a kernel reads an instance with the arrays.
    """
    count = len(kind._fields)
    assert count <= _MAX_ARRAYS
    arrays = [f"memory[offsets[{index}] : offsets[{index + 1}]]" for index in range(count)]
    return _compile_constructor(kind, "arrays", "memory, offsets", arrays)


def field_reader(kind: Any) -> Any:
    """Return a compiled function that copies fields of a record to local values: record → `kind`, a named tuple."""
    fields = [f"record.{name}" for name in kind._fields]
    return _compile_constructor(kind, "fields", "record", fields)


def _compile_constructor(kind: Any, what: str, parameters: str, values: list[str]) -> Any:
    # Numba cannot unpack a sequence of computed length into a named tuple, so the values are written out here.
    name = f"{kind.__name__.lower()}_{what}"
    namespace: dict[str, Any] = {"kind": kind, "__name__": kind.__module__}
    exec(f"def {name}({parameters}):\n    return kind({', '.join(values)})", namespace)
    return compiled(namespace[name])


# ------------------------------------------------------------------------------------------------ compiled code


@cache
def _source_digest(module: str) -> str:
    """Return a digest of the source of a module and of all modules of this package that it imports from."""
    found, digest = [module], hashlib.sha256()
    for name in found:  # `found` grows during the loop
        digest.update(inspect.getsource(sys.modules[name]).encode())
        used = {str(getattr(each, "__module__", "")) for each in vars(sys.modules[name]).values()}
        found += sorted(each for each in used if each.startswith(f"{__package__}.") and each not in found)
    return digest.hexdigest()[:16]


def record_type(fields: ArgumentLayout, dtype: torch.dtype) -> Any:
    """Return the Numba type of a record, with a type code that is the same in every process.

    Numba puts type codes into the names of compiled functions. By default it numbers types in order of creation. Then
    code for different types, compiled in different processes, could have the same name in the on-disk cache.
    """
    record = numba.from_dtype(fields.record_dtype(dtype))
    digest = int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:4], "big")
    record._code = 1 << 29 | digest >> 4  # above all codes that Numba assigns, and within a C int
    return record


@cache
def compile_kernel(kernel: Callable[[Any], None], fields: ArgumentLayout, dtype: torch.dtype) -> int:
    """Compile a kernel for this compute dtype, or load it from the on-disk cache. Return its address."""
    function = compile_cached(kernel, types.void(types.CPointer(record_type(fields, dtype))))
    _KEEP_ALIVE.append(function)
    return int(function.address)


_KEEP_ALIVE: list[Any] = []  # Numba frees compiled code together with its Python object


# ------------------------------------------------------------------------------------------------ threads


def _run_on_threads(address: int, argument: Any, threads: int) -> None:
    if (parallel := _openmp()) is not None:
        parallel(address, argument, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            futures = [pool.submit(_callable(address), argument) for _ in range(threads - 1)]
            _callable(address)(argument)
        for future in futures:
            future.result()


@cache
def _callable(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _openmp() -> Any:
    """Return `GOMP_parallel` of torch's OpenMP library, or None if it is not available.

    The kernels use torch's thread pool. A second pool, such as Numba's, would compete with it: after each operation
    torch's threads spin for some milliseconds.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
