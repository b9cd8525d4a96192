"""From Python to compiled code: what a kernel is told, where its code is kept, and the threads that it runs on.

A kernel is a function of one argument, a pointer to a record with all that it has to know. It is compiled once for
each dtype, whatever the sizes and strides of a call. Every thread runs it, takes a piece of scratch memory and then one
work item after the other, with `vectors.fetch_add`, until none is left.
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


class ArgumentLayout(NamedTuple):
    """Names of what a record tells. Functions that kernels share are compiled once if their names are the same.

    Besides, each record has ``ticket`` and ``slot``, from which threads take numbers; ``work_items``, how many there
    are; ``scratch_size``, the bytes of scratch memory of a thread, and ``array_offsets``, where its arrays begin there;
    and ``zero``, a zero of the type to compute in.
    """

    module: str  # of the kernels
    integers: tuple[str, ...]
    floats: tuple[str, ...]
    operands: tuple[str, ...]  # tensors of four axes, the last one contiguous, see `strided_io.StridedTensor`
    addresses: tuple[str, ...]  # of contiguous tensors

    def record_dtype(self, dtype: torch.dtype) -> np.dtype:
        """Return the layout of the record, computing in this dtype."""
        fields: list[Any] = [
            (name, np.int64) for name in ("ticket", "slot", "work_items", "scratch_size", *self.integers)
        ]
        fields += [("array_offsets", np.int64, (16,)), *((name, np.float64) for name in self.floats)]
        # Address, three strides, whether it holds bfloat16.
        fields += [(name, np.int64, (5,)) for name in self.operands]
        fields += [(name, np.int64) for name in (*self.addresses, "scratch")]
        fields += [("zero", np.float64 if dtype == torch.float64 else np.float32)]
        # Numba keeps code under the types of its arguments and the age of the file of one function, not of those that
        # are called. With this name among the types, a change to any of them counts.
        fields += [(f"sources_{_source_digest(self.module)}", np.int8)]
        return np.dtype(fields, align=True)


class PackedArguments(NamedTuple):
    """What a call tells that does not depend on where its tensors are: worth keeping from call to call."""

    record: bytes
    address_offset: int  # where in the record addresses begin
    scratch_elements: int  # elements of scratch memory for each thread


def pack_arguments(
    fields: ArgumentLayout,
    dtype: torch.dtype,
    values: Mapping[str, float],
    array_offsets: tuple[int, ...],
    work_items: int,
) -> PackedArguments:
    """Fill the integers and floats of a record.

    Args:
        values: by name; those that are missing are 0.
        array_offsets: where arrays begin in a thread's scratch memory, in elements, and the end.
        work_items: how many there are.
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
    """Run a kernel.

    Args:
        kernel: a plain function at the top of its module, which is compiled here.
        tensors: operands and contiguous tensors, by name; those that are missing are not used.
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
    """Return a digest of the code of a module and of those modules of this folder whose functions it uses."""
    found, digest = [module], hashlib.sha256()
    for name in found:  # which grows meanwhile
        digest.update(inspect.getsource(sys.modules[name]).encode())
        used = {str(getattr(each, "__module__", "")) for each in vars(sys.modules[name]).values()}
        found += sorted(each for each in used if each.startswith(f"{__package__}.") and each not in found)
    return digest.hexdigest()[:16]


def record_type(fields: ArgumentLayout, dtype: torch.dtype) -> Any:
    """Return Numba's type of a record, under a number of its own.

    Numba calls compiled functions by the numbers that types like this one have in a process, in the order in which they
    came up. On disk that would be the same name for code of different types, from different processes.
    """
    record = numba.from_dtype(fields.record_dtype(dtype))
    digest = int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:4], "big")
    record._code = 1 << 29 | digest >> 4  # far from those given in order, and no more than a C integer holds
    return record


@cache
def compile_kernel(kernel: Callable[[Any], None], fields: ArgumentLayout, dtype: torch.dtype) -> int:
    """Compile a kernel for this dtype, or load it from disk, and return its address."""
    function = numba.cfunc(types.void(types.CPointer(record_type(fields, dtype))), cache=True)(kernel)
    _KEEP_ALIVE.append(function)
    return int(function.address)


_KEEP_ALIVE: list[Any] = []  # compiled code is freed with the object that stands for it


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
    """Return the function of torch's own OpenMP library that runs code on its threads, or None where there is none.

    A second pool, as Numba would start one, would have to share the processors with torch's threads, which go on
    spinning for milliseconds after each of torch's operations.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
