"""Built-in backends: one row each, with its implementations of deformable and neighborhood attention.

A row has the kernels or the function, the reasons for which it refuses a call or fails, and its priority. The
refusals do not depend on the values of tensors, because `torch.compile` traces them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch

from .. import kernels
from ..kernels import self_check, triton_support
from ..kernels.self_check import Checked
from . import attention, blockwise, neighborhood, neighborhood_tiles
from ._sdpa import is_recording
from .fused import is_transformed
from .registry import Backend, Call, Implementation, add_backend, constant, warn_once

# ------------------------------------------------------------------------------------------------ refusals


def _unsupported_by_kernels(call: Call) -> str:
    """Return the reason why no kernel module supports a call, or ``""``."""
    if call.dropout:
        return "it has no dropout of attention weights"
    if is_recording():
        return "an exported or traced program has plain operations only"
    if is_transformed(call.q, call.k, call.v, call.points, call.bias_table):
        return "torch.func and forward-mode derivatives need plain operations"
    return ""


def _untransformable(call: Call) -> str:
    if is_transformed(call.q, call.k, call.v, call.points, call.bias_table):
        return "torch.func and forward-mode derivatives need plain operations, and torch's fused attention is not one"
    return ""


def _unsupported_by_blockwise(call: Call) -> str:
    if call.q.device.type not in ("cpu", "meta") and torch.are_deterministic_algorithms_enabled():
        return f"on {call.q.device.type!r} the order of summation of the table's gradient is not deterministic"
    return _unsupported_by_kernels(call)


def _unsupported_by_cpu(call: Call) -> str:
    if call.q.device.type != "cpu":
        return f"it runs on CPUs, and the tensors are on {call.q.device.type!r}"
    return _unsupported_by_kernels(call)


_MAX_TRITON_KERNEL = 32  # `MAX_KERNEL` of the Triton kernels, which cannot be imported without Triton


def _unsupported_by_triton(call: Call) -> str:
    if call.operation == "neighborhood":
        assert call.bias_table is not None
        if call.bias_table.shape[1] > 2 * _MAX_TRITON_KERNEL - 1:
            return f"its neighborhoods have at most {_MAX_TRITON_KERNEL}² keys"
    if call.q.device.type != "cuda" and not kernels.triton_is_interpreted():
        return f"it runs on CUDA devices, and the tensors are on {call.q.device.type!r}"
    return _unsupported_by_kernels(call)


@constant
def _dtype_under_autocast(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype of q, k and v under autocast, see `fused`."""
    if dtype is torch.float64 or not torch.is_autocast_enabled(device_type):
        return dtype
    return torch.get_autocast_dtype(device_type)


def _triton_failure(checked: Checked, *, always_float32: bool = False) -> Callable[[Call, bool], str]:
    """Return the function `fails` of Triton kernels: see `register_backend`.

    Args:
        checked: the operation.
        always_float32: whether it has float32 products for every dtype.
    """

    # A constant of compiled graphs: the self-check runs while the compiler traces, on real tensors.
    @constant
    def reason(dtype: torch.dtype, depth: int, device: torch.device, requested: bool) -> str:
        if triton_support.absent_reason():
            return ""  # the backend is missing
        facts = (triton_support.capability(device), torch.version.hip, triton_support.installed_version())
        unsupported = triton_support.unsupported_reason(dtype, depth, *facts, always_float32=always_float32)
        if unsupported:
            return unsupported
        cause = self_check.failure(checked, device, dtype)
        if cause and not requested and cause is not self_check.CAPTURING:
            _warn_of_kernels(self_check.report(checked, device, dtype, cause))
        return cause

    def fails(call: Call, requested: bool) -> str:
        if call.bias_table is None:
            return ""  # torch's own attention runs instead
        q, k, v = (_dtype_under_autocast(each.dtype, each.device.type) for each in (call.q, call.k, call.v))
        if q is not k or q is not v:
            return f"q, k and v have different dtypes, {q}, {k} and {v}"
        depth = call.q.shape[-1]
        if torch.compiler.is_compiling():  # a symbolic depth is no constant, its comparison is
            limit = _max_depth(q)
            depth = limit + 1 if depth > limit else limit
        return reason(q, depth, call.q.device, requested)

    return fails


@constant
def _max_depth(dtype: torch.dtype) -> int:
    return triton_support.MAX_DEPTH.get(dtype, 0)


def _warn_of_kernels(message: str) -> None:
    """Warn that kernels fail, once per message."""
    warn_once(message, RuntimeWarning)


# ------------------------------------------------------------------------------------------------ kernels


@cache
def _load_neighborhood(name: str) -> ModuleType:
    return importlib.import_module(f"{kernels.load(name).__name__}.neighborhood")


TRITON = {
    "deformable": Checked(
        "deformable",
        partial(kernels.load, "triton"),
        blockwise,
        self_check.deformable_examples,
        attention.DEFORMABLE.tensors,
    ),
    "neighborhood": Checked(
        "neighborhood",
        partial(_load_neighborhood, "triton"),
        neighborhood_tiles,
        self_check.neighborhood_examples,
        neighborhood.NEIGHBORHOOD.tensors,
    ),
}


def _triton(operation: str, *, always_float32: bool = False) -> Implementation:
    checked = TRITON[operation]
    return Implementation(
        kernels=lambda: checked.load(),
        safe_kernels=partial(self_check.with_fallback, checked, _warn_of_kernels),
        refuses=_unsupported_by_triton,
        fails=_triton_failure(checked, always_float32=always_float32),
    )


# ------------------------------------------------------------------------------------------------ rows

add_backend(
    Backend(
        "eager",
        "formulation of the released code: table sampled at all displacements, einsum",
        priority=0,
        operations={
            "deformable": Implementation(run=attention.eager),
            "neighborhood": Implementation(run=neighborhood.eager),
        },
    )
)
add_backend(
    Backend(
        "matmul",
        "plain operations for exporters: bias as two matrix products, fused attention",
        priority=10,
        operations={
            "deformable": Implementation(run=attention.matmul),
            "neighborhood": Implementation(run=neighborhood_tiles.tiled_attention, refuses=_untransformable),
        },
    )
)
add_backend(
    Backend(
        "blockwise",
        "plain PyTorch, one tile of logits at a time, on any device",
        priority=20,
        operations={
            "deformable": Implementation(kernels=lambda: blockwise, refuses=_unsupported_by_blockwise),
            "neighborhood": Implementation(kernels=lambda: neighborhood_tiles, refuses=_unsupported_by_kernels),
        },
    )
)
add_backend(
    Backend(
        "cpu",
        "Numba, compiled for the host CPU: bias, softmax and products in one pass",
        priority=30,
        missing=partial(kernels.missing, "cpu"),
        operations={
            "deformable": Implementation(kernels=partial(kernels.load, "cpu"), refuses=_unsupported_by_cpu),
            "neighborhood": Implementation(kernels=partial(_load_neighborhood, "cpu"), refuses=_unsupported_by_cpu),
        },
    )
)
add_backend(
    Backend(
        "triton",
        "Triton, fused, for CUDA devices",
        priority=40,
        missing=partial(kernels.missing, "triton"),
        operations={
            "deformable": _triton("deformable"),
            # The sums of the table's gradient are float32 products.
            "neighborhood": _triton("neighborhood", always_float32=True),
        },
    )
)
