"""Hand-written kernels of the core, found by name and imported when first used.

============  ===================  ====================================================================
name          needs                what
============  ===================  ====================================================================
``"cpu"``     extra ``cpu``        Numba: compiled at first use for this processor, one readable source
``"triton"``  extra ``triton``     Triton: fused, for CUDA devices; elsewhere in Triton's interpreter
============  ===================  ====================================================================

A module of kernels has two functions, and works from the bias in canonical form: query (i, j) reads the bias of key n
at row origin[n, 0] + i·step[0] and column origin[n, 1] + j·step[1] of the table (`functional.bias.table_index`)::

    deformable_forward(q, k, v, origin, table, *, query_size, step, scale) -> (out, lse)
    deformable_backward(grad_out, q, k, v, origin, table, out, lse, *, query_size, step, scale, deterministic)
        -> (grad_q, grad_k, grad_v, grad_origin, grad_table)

with q, out and grad_out (B, heads, H·W, d), k and v (B, heads, Ns, d), origin (B, G, Ns, 2), table (heads, T_y, T_x),
and lse (B, heads, H·W), the log-sum-exp of each row's logits. Values may come with any strides; outputs and gradients
lie in memory as what they belong to.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

_MODULES = {"cpu": "cpu", "triton": "gpu"}


@cache
def load(name: str) -> ModuleType:
    """Import the module of kernels of that name.

    Raises:
        ImportError: if what it is written in is not installed.
    """
    return importlib.import_module(f".{_MODULES[name]}", __name__)


@cache
def missing(name: str) -> str:
    """Return why this machine cannot run the kernels of that name, or nothing if it can."""
    if name == "triton" and not (torch.cuda.is_available() or triton_is_interpreted()):
        return "there is no CUDA device"
    try:
        load(name)
    except ImportError as error:
        return f"{error}; pip install 'dat-ref[{name}]'"
    return ""


def triton_is_interpreted() -> bool:
    """Return whether Triton runs its kernels in Python, on tensors of any device, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
