"""Tile configurations of the Triton kernels, and autotuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

Kernel = Literal[
    "forward",
    "grad_queries",
    "grad_queries_atomic",
    "grad_keys",
    "neighborhood_forward",
    "neighborhood_grad_queries",
    "neighborhood_grad_keys",
]


@dataclass(frozen=True)
class TileConfig:
    """Tile of queries × keys, and the launch options of its program."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int = 4
    num_stages: int = 1  # stages of software pipelining; above 1, all loads pass through shared memory

    def arguments(self, depth: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel."""
        return {
            "DEPTH": depth,
            "BLOCK_D": _padded_depth(depth),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            # Three TF32 products are as accurate as one float32 product; a single one is not.
            "PRECISION": "tf32x3" if dtype is torch.float32 else "ieee",
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _padded_depth(depth: int) -> int:
    """Return the next power of two, at least 16, the minimum for tensor cores."""
    return max(16, 1 << (depth - 1).bit_length())


_Choices = dict[int, TileConfig]

# By kernel and padded depth: for devices with `wgmma` (9.0 and newer), and for older ones where these spill registers
# that the newer ones do not. According to the compiler: next to no spills in half precision with at most 64 channels,
# few otherwise, and less than the 99 KB of shared memory that every device since sm_80 has. The table of all resources
# is in docs/performance/triton.
_HALF: dict[Kernel, _Choices] = {
    "forward": {128: TileConfig(64, 32)},
    "grad_queries": {128: TileConfig(64, 32)},
    "grad_queries_atomic": {32: TileConfig(64, 32), 64: TileConfig(64, 16), 128: TileConfig(64, 32)},
    "grad_keys": {32: TileConfig(32, 64), 128: TileConfig(16, 64)},
    "neighborhood_forward": {128: TileConfig(64, 32)},
    "neighborhood_grad_queries": {32: TileConfig(64, 32), 128: TileConfig(64, 16)},
    "neighborhood_grad_keys": {64: TileConfig(32, 64), 128: TileConfig(16, 64)},
}
_HALF_BEFORE_HOPPER: dict[Kernel, _Choices] = {
    "forward": {64: TileConfig(64, 32), 128: TileConfig(32, 32)},
    "grad_queries": {64: TileConfig(64, 32), 128: TileConfig(32, 32)},
    "grad_queries_atomic": {32: TileConfig(64, 32), 128: TileConfig(32, 32)},
    "grad_keys": {32: TileConfig(32, 64), 64: TileConfig(16, 64), 128: TileConfig(32, 64, num_warps=8)},
}
_FLOAT32: dict[Kernel, _Choices] = {
    "forward": {32: TileConfig(64, 32), 64: TileConfig(64, 16)},
    "grad_queries": {32: TileConfig(64, 16), 64: TileConfig(16, 32)},
    "grad_queries_atomic": {32: TileConfig(64, 16), 64: TileConfig(16, 32)},
    "grad_keys": {64: TileConfig(16, 64)},
    "neighborhood_forward": {32: TileConfig(64, 32), 64: TileConfig(64, 16)},
    "neighborhood_grad_queries": {64: TileConfig(64, 16)},
    "neighborhood_grad_keys": {32: TileConfig(32, 64), 64: TileConfig(16, 64)},
}
_FLOAT32_BEFORE_HOPPER: dict[Kernel, _Choices] = {
    "grad_keys": {32: TileConfig(16, 64), 64: TileConfig(32, 32, num_warps=8)},
}


def default_config(kernel: Kernel, q: Tensor) -> TileConfig:
    """Return the tile config for heads of this depth, in this dtype and on this device."""
    configs, older = (_FLOAT32, _FLOAT32_BEFORE_HOPPER) if q.dtype is torch.float32 else (_HALF, _HALF_BEFORE_HOPPER)
    choices = configs[kernel] if has_wgmma(q) or kernel not in older else older[kernel]
    return next(config for max_depth, config in choices.items() if _padded_depth(q.shape[-1]) <= max_depth)


def has_wgmma(q: Tensor) -> bool:
    """Return whether the device has the matrix products of compute capability 9.0."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)


# ------------------------------------------------------------------------------------------------ autotuning

_AUTOTUNED: dict[tuple[Any, ...], TileConfig] = {}


def autotune(kernel: Kernel, q: Tensor, samples: int, unit: bool, launch: Callable[[TileConfig], None]) -> TileConfig:
    """Return the tile config for a launch: the default, or the fastest of several candidates.

    Candidates are timed only with ``torch.backends.cudnn.benchmark = True``, once for each device, dtype, depth and
    order of magnitude of the work. They are never timed with deterministic algorithms, because the tile size determines
    the order of summation, nor while a CUDA graph is captured.

    Args:
        kernel: name of the kernel.
        q: (B, heads, H·W, d).
        samples: number of keys.
        unit: whether the step is 1.
        launch: runs the kernel with a tile config; may be called many times.
    """
    default = default_config(kernel, q)
    enabled = torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    if not enabled or q.device.type != "cuda":
        return default
    if torch.cuda.is_current_stream_capturing():  # timing synchronizes, which ends the capture of a CUDA graph
        return default
    magnitudes = (size.bit_length() for size in (q.shape[0] * q.shape[1], q.shape[2], samples))
    key = (kernel, torch.cuda.get_device_name(q.device), q.dtype, q.shape[3], unit, *magnitudes)
    if key not in _AUTOTUNED:
        _AUTOTUNED[key] = min(_candidates(kernel, default), key=lambda config: _milliseconds(launch, config))
    return _AUTOTUNED[key]


def _candidates(kernel: Kernel, default: TileConfig) -> list[TileConfig]:
    # `block_n` of `grad_queries` must not change: the workspace of the table's gradient has whole tiles of keys.
    wider = replace(default, block_m=2 * default.block_m)
    candidates = [default, wider, replace(wider, num_warps=8)]
    if kernel == "forward":
        candidates += [
            replace(default, block_n=2 * default.block_n),
            replace(wider, block_n=2 * default.block_n, num_warps=8, num_stages=2),
        ]
    return candidates


def _milliseconds(launch: Callable[[TileConfig], None], config: TileConfig) -> float:
    try:
        return float(triton.testing.do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:  # usually shared memory
        return float("inf")
