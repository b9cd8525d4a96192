"""Hand-written kernels for deformable and neighborhood attention, imported by name on first use.

============  ===================  ======================================================================
name          requires             implementation
============  ===================  ======================================================================
``"cpu"``     extra ``cpu``        Numba, compiled just in time for the host CPU
``"triton"``  extra ``triton``     Triton, fused, for CUDA devices; on other devices Triton's interpreter
============  ===================  ======================================================================

A kernel module has the two functions below. They take the index into the bias table in affine form: query (i, j) reads
the bias of key n at row origin[n, 0] + i·step[0] and column origin[n, 1] + j·step[1] (`functional.bias.table_index`)::

    deformable_forward(q, k, v, origin, table, *, query_size, step, scale) -> (out, lse)
    deformable_backward(grad_out, q, k, v, origin, table, out, lse, *, query_size, step, scale, deterministic)
        -> (grad_q, grad_k, grad_v, grad_origin, grad_table)

Shapes: q, out and grad_out (B, heads, H·W, d); k and v (B, heads, Ns, d); origin (B, G, Ns, 2); table
(heads, T_y, T_x); lse (B, heads, H·W), the log-sum-exp of each query's logits. Inputs may have any strides. The output
has the memory layout of q, and each gradient that of its input.

Its submodule `neighborhood` has the counterparts for neighborhood attention, with k and v (B, heads, H·W, d), table
(heads, 2K-1, 2K-1), size (H, W), kernel K and dilation δ::

    neighborhood_forward(q, k, v, table, *, size, kernel, dilation, scale) -> (out, lse)
    neighborhood_backward(grad_out, q, k, v, table, out, lse, *, size, kernel, dilation, scale, deterministic)
        -> (grad_q, grad_k, grad_v, grad_table)
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from . import triton_support

_MODULES = {"cpu": "cpu", "triton": "gpu"}


@cache
def load(name: str) -> ModuleType:
    """Import a kernel module.

    Args:
        name: ``"cpu"`` or ``"triton"``.

    Raises:
        ImportError: if Numba or Triton is not installed.
    """
    return importlib.import_module(f".{_MODULES[name]}", __name__)


@cache
def missing(name: str) -> str:
    """Return the reason why this machine cannot run the named kernels, or ``""`` if it can."""
    if name == "triton":
        reason = triton_support.absent_reason() or triton_support.old_version_reason(triton_support.installed_version())
        if reason:
            return reason if reason == "no CUDA device" else f"{reason}; pip install 'dat-ref[triton]'"
    try:
        load(name)
    except Exception as error:  # a shared library or a driver that cannot be loaded raises more than ImportError
        return f"{error}; pip install 'dat-ref[{name}]'"
    return ""


triton_is_interpreted = triton_support.is_interpreted
