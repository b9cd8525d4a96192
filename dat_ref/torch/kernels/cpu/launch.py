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
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor, empty

from .code_cache import compile_cached


class ArgumentLayout(NamedTuple):
    """Field names of an argument record. Kernels with equal layouts share the compiled code of common functions.

    Every record also has these fields: ``ticket``, the counter for work items; ``slot``, the counter for parts of the
    scratch buffer; ``work_items``, the number of work items; ``scratch_size``, bytes of scratch memory per thread;
    ``array_offsets``, offsets of the arrays in it; ``scratch``, address of the scratch buffer; and ``zero``, a zero of
    the compute dtype.
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
        fields += [("array_offsets", np.int64, (16,)), *((name, np.float64) for name in self.floats)]
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
    address_offset: int  # byte offset of the first address in the record
    scratch_elements: int  # elements of scratch memory per thread


def pack_arguments(
    fields: ArgumentLayout,
    dtype: torch.dtype,
    values: Mapping[str, float],
    array_offsets: tuple[int, ...],
    work_items: int,
) -> PackedArguments:
    """Fill the integers and floats of a record.

    Args:
        values: integers and floats by name; missing ones are 0.
        array_offsets: offsets of the arrays in a thread's scratch memory and the total size, in elements.
        work_items: number of work items.
    """
    layout = fields.record_dtype(dtype)
    record = np.zeros((), layout)
    for name, value in values.items():
        record[name] = value
    record["array_offsets"][: len(array_offsets)] = array_offsets
    record["work_items"] = work_items
    record["scratch_size"] = array_offsets[-1] * record["zero"].itemsize
    assert layout.fields is not None
    return PackedArguments(record.tobytes(), layout.fields[fields.operands[0]][1], array_offsets[-1])


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
    scratch = empty(threads * packed.scratch_elements, dtype=dtype)
    addresses: list[int] = []
    for name in fields.operands:
        addresses += _operand_fields(tensors[name]) if name in tensors else (0, 0, 0, 0, 0)
    addresses += [tensors[name].data_ptr() if name in tensors else 0 for name in fields.addresses]
    record = bytearray(packed.record)
    struct.pack_into(f"{len(addresses) + 1}q", record, packed.address_offset, *addresses, scratch.data_ptr())
    _run_on_threads(compile_kernel(kernel, fields, dtype), (ctypes.c_char * len(record)).from_buffer(record), threads)


def _operand_fields(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3], x.dtype == torch.bfloat16)


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
    if threads == 1:
        _function(address)(argument)
    elif (parallel := _openmp()) is not None:
        parallel(address, argument, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            futures = [pool.submit(_function(address), argument) for _ in range(threads - 1)]
            _function(address)(argument)
        for future in futures:
            future.result()


@cache
def _function(address: int) -> Any:
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
