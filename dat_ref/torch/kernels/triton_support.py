"""Requirements of the Triton kernels: dtype, head depth, device and version of Triton. Importable without Triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from functools import cache

import torch

# Maximum head dimension. With more channels the tiles do not fit into the registers.
MAX_DEPTH = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}
MIN_CAPABILITY = (8, 0)  # Triton has no tensor cores for older devices; plain PyTorch is faster there
MIN_VERSION = (3, 3)  # the compiler of Triton 3.2 ends the process with a segmentation fault at one of the kernels


def unsupported_reason(
    dtype: torch.dtype,
    depth: int,
    capability: tuple[int, int] | None,
    hip: str | None,
    version: str | None,
    *,
    always_float32: bool = False,
) -> str:
    """Return the reason why the kernels cannot compute a call, or ``""``.

    Args:
        dtype: dtype of q, k and v, after autocast.
        depth: head dimension.
        capability: CUDA capability of the device, or None for Triton's interpreter.
        hip: `torch.version.hip`, None unless PyTorch was built for ROCm.
        version: version of Triton, or None if unknown.
        always_float32: whether the operation has float32 products for every dtype.
    """
    if reason := old_version_reason(version):
        return reason
    if dtype not in MAX_DEPTH:
        return f"its kernels have no {dtype}"
    if depth > MAX_DEPTH[dtype]:
        return f"its heads have at most {MAX_DEPTH[dtype]} channels in {dtype}, and these have {depth}"
    if hip is not None:  # capabilities are numbers of CUDA
        has_float32_products = dtype is torch.float32 or always_float32
        return "on ROCm Triton has no float32 products out of three TF32 products" if has_float32_products else ""
    if capability is not None and capability < MIN_CAPABILITY:
        needed, present = (".".join(map(str, each)) for each in (MIN_CAPABILITY, capability))
        return f"it needs a device of compute capability {needed} or newer, and this one has {present}"
    return ""


def old_version_reason(version: str | None) -> str:
    """Return the reason why a version of Triton is too old, or ``""``. An unknown version is accepted."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    if match is None or tuple(map(int, match.groups())) >= MIN_VERSION:
        return ""
    return f"it needs Triton {'.'.join(map(str, MIN_VERSION))} or newer, and {version} is installed"


# ------------------------------------------------------------------------------------------------ this machine


def is_interpreted() -> bool:
    """Return whether Triton interprets kernels in Python. The interpreter accepts CPU tensors; tests use it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def absent_reason() -> str:
    """Return the reason why this machine has no device for Triton or no Triton, or ``""``."""
    if not (torch.cuda.is_available() or is_interpreted()):
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "No module named 'triton'"
    return ""


@cache
def installed_version() -> str | None:
    """Return the version of Triton, or None if it cannot be imported."""
    try:
        # Distributions have several names; only the module knows its version.
        return str(importlib.import_module("triton").__version__)
    except Exception:  # a broken installation can raise anything
        return None


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the capability of a CUDA device, or None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
