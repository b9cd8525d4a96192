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
class Tiles:
    """A tile of queries × keys, and who works on it."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 1  # of a pipeline that loads ahead; above 1, all that is loaded passes through shared memory

    def arguments(self, depth: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel."""
        return {
            "DEPTH": depth,
            "BLOCK_D": _padded(depth),
            "BLOCK_M": self.queries,
            "BLOCK_N": self.keys,
            # Three products of TF32 are as good as one of float32; a single one is not.
            "PRECISION": "tf32x3" if dtype is torch.float32 else "ieee",
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def _padded(depth: int) -> int:
    """Return a power of two, at least the 16 that a tensor core takes."""
    return max(16, 1 << (depth - 1).bit_length())


# By the padded depth. What the compiler says of them for sm_80 and sm_90: registers hardly spill, two programs or more
# fit a multiprocessor, and they need less than the 99 KB of shared memory that every device since sm_80 has.
_HALF: dict[Kernel, dict[int, Tiles]] = {
    "forward": {128: Tiles(64, 32)},
    "grad_queries": {128: Tiles(64, 32)},
    "grad_keys": {64: Tiles(32, 64), 128: Tiles(16, 64)},
}
_FULL: dict[Kernel, dict[int, Tiles]] = {
    "forward": {64: Tiles(64, 32)},
    "grad_queries": {32: Tiles(64, 32), 64: Tiles(64, 16)},
    "grad_keys": {32: Tiles(32, 64), 64: Tiles(16, 64)},
}


def choose_tiles(kernel: Kernel, depth: int, dtype: torch.dtype) -> Tiles:
    """Return tiles that suit heads of this depth."""
    by_depth = (_FULL if dtype is torch.float32 else _HALF)[kernel]
    return next(tiles for largest, tiles in by_depth.items() if _padded(depth) <= largest)


# ------------------------------------------------------------------------------------------------ searching

_FASTEST: dict[tuple[Any, ...], Tiles] = {}


def fastest_tiles(kernel: Kernel, q: Tensor, samples: int, unit: bool, launch: Callable[[Tiles], None]) -> Tiles:
    """Return the tiles for a launch: those of `choose_tiles`, or the fastest of a few.

    They are searched for only where PyTorch is told to try algorithms out, ``torch.backends.cudnn.benchmark = True``,
    once for each device, dtype, depth and order of magnitude of the work; never where deterministic algorithms are
    asked for, because tiles decide the order of summation.

    Args:
        samples: how many keys there are.
        unit: whether queries are one cell of the table apart.
        launch: runs the kernel; may be called again and again.
    """
    usual = choose_tiles(kernel, q.shape[-1], q.dtype)
    wanted = torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    if not wanted or q.device.type != "cuda":
        return usual
    magnitudes = (size.bit_length() for size in (q.shape[0] * q.shape[1], q.shape[2], samples))
    key = (kernel, torch.cuda.get_device_name(q.device), q.dtype, q.shape[3], unit, *magnitudes)
    if key not in _FASTEST:
        _FASTEST[key] = min(_candidates(kernel, usual), key=lambda tiles: _milliseconds(launch, tiles))
    return _FASTEST[key]


def _candidates(kernel: Kernel, usual: Tiles) -> list[Tiles]:
    if kernel == "grad_keys":
        return [usual, replace(usual, queries=2 * usual.queries), replace(usual, keys=2 * usual.keys, warps=8)]
    # The keys of `grad_queries` stay: the workspace of the table's gradient is cut to them.
    wider = replace(usual, queries=2 * usual.queries)
    found = [usual, wider, replace(wider, warps=8)]
    if kernel == "forward":
        found += [replace(usual, keys=2 * usual.keys), replace(wider, keys=2 * usual.keys, warps=8, stages=2)]
    return found


def _milliseconds(launch: Callable[[Tiles], None], tiles: Tiles) -> float:
    try:
        return float(triton.testing.do_bench(lambda: launch(tiles), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:  # shared memory, most likely
        return float("inf")
