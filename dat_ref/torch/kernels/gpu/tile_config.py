"""How the kernels cut the work: tiles that suit, and a search for the fastest where one is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

Kernel = Literal["forward", "grad_queries", "grad_keys"]


@dataclass(frozen=True)
class TileConfig:
    """A tile of queries × keys, and who works on it."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1  # of a pipeline that loads ahead; above 1, all that is loaded passes through shared memory

    def arguments(self, depth: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel."""
        return {
            "DEPTH": depth,
            "BLOCK_D": _padded_depth(depth),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            # Three products of TF32 are as good as one of float32; a single one is not.
            "PRECISION": "tf32x3" if dtype is torch.float32 else "ieee",
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _padded_depth(depth: int) -> int:
    """Return a power of two, at least the 16 that a tensor core takes."""
    return max(16, 1 << (depth - 1).bit_length())


# By the padded depth. What the compiler says of them for sm_80 and sm_90: registers hardly spill, two programs or more
# fit a multiprocessor, and they need less than the 99 KB of shared memory that every device since sm_80 has.
_HALF_CONFIGS: dict[Kernel, dict[int, TileConfig]] = {
    "forward": {128: TileConfig(64, 32)},
    "grad_queries": {128: TileConfig(64, 32)},
    "grad_keys": {64: TileConfig(32, 64), 128: TileConfig(16, 64)},
}
_FLOAT32_CONFIGS: dict[Kernel, dict[int, TileConfig]] = {
    "forward": {64: TileConfig(64, 32)},
    "grad_queries": {32: TileConfig(64, 32), 64: TileConfig(64, 16)},
    "grad_keys": {32: TileConfig(32, 64), 64: TileConfig(16, 64)},
}


def default_config(kernel: Kernel, depth: int, dtype: torch.dtype) -> TileConfig:
    """Return the tile config for heads of this depth."""
    configs = (_FLOAT32_CONFIGS if dtype is torch.float32 else _HALF_CONFIGS)[kernel]
    return next(config for max_depth, config in configs.items() if _padded_depth(depth) <= max_depth)


# ------------------------------------------------------------------------------------------------ searching

_AUTOTUNED: dict[tuple[Any, ...], TileConfig] = {}


def autotune(kernel: Kernel, q: Tensor, samples: int, unit: bool, launch: Callable[[TileConfig], None]) -> TileConfig:
    """Return the tile config for a launch: that of `default_config`, or the fastest of a few.

    They are searched for only where PyTorch is told to try algorithms out, ``torch.backends.cudnn.benchmark = True``,
    once for each device, dtype, depth and order of magnitude of the work; never where deterministic algorithms are
    asked for, because tiles decide the order of summation.

    Args:
        samples: how many keys there are.
        unit: whether queries are one cell of the table apart.
        launch: runs the kernel; may be called again and again.
    """
    default = default_config(kernel, q.shape[-1], q.dtype)
    enabled = torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    if not enabled or q.device.type != "cuda":
        return default
    magnitudes = (size.bit_length() for size in (q.shape[0] * q.shape[1], q.shape[2], samples))
    key = (kernel, torch.cuda.get_device_name(q.device), q.dtype, q.shape[3], unit, *magnitudes)
    if key not in _AUTOTUNED:
        _AUTOTUNED[key] = min(_candidates(kernel, default), key=lambda config: _milliseconds(launch, config))
    return _AUTOTUNED[key]


def _candidates(kernel: Kernel, default: TileConfig) -> list[TileConfig]:
    if kernel == "grad_keys":
        return [
            default,
            replace(default, block_m=2 * default.block_m),
            replace(default, block_n=2 * default.block_n, num_warps=8),
        ]
    # The keys of `grad_queries` stay: the workspace of the table's gradient is cut to them.
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
    except OutOfResources:  # shared memory, most likely
        return float("inf")
