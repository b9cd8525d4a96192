"""Distributed context: a single process, or the processes that ``torchrun`` started on one machine or several."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_OLD_NAMES = {
    "leads": "is_main",
    "size": "world_size",
    "spread": "broadcast",
    "total": "all_reduce_sum",
    "wait": "barrier",
}


@dataclass(frozen=True)
class DistributedContext:
    """Rank of this process, number of processes, and device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Resolve the old name of an attribute."""
            if name not in _OLD_NAMES:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            new = _OLD_NAMES[name]
            warnings.warn(f"DistributedContext.{name} is deprecated, use {new}", DeprecationWarning, stacklevel=2)
            return getattr(self, new)

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and messages."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum values over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, model: nn.Module) -> None:
        """Copy the weights of the first process to all processes."""
        if self.world_size > 1:
            for leaf in (*model.parameters(), *model.buffers()):
                dist.broadcast(leaf.detach(), 0)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Yield the distributed context; inside, this process belongs to the process group of ``torchrun``, if any."""
    world_size, rank, local_rank = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        yield DistributedContext(device=device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield DistributedContext(rank, world_size, device)
    finally:
        dist.destroy_process_group()
        if not cuda:
            time.sleep(_GLOO_SHUTDOWN_SECONDS)


# A device mesh (sharded weights) keeps the process group alive after its destruction, and gloo's threads release their
# last tensors some time after the wait for them has returned. The release takes the lock of the interpreter. If the
# interpreter has ended by then, the process aborts ("terminate called without an active exception"), and a finished run
# counts as failed. No call waits for the release, so this delay does.
_GLOO_SHUTDOWN_SECONDS = 1.0  # seconds
_ENVIRONMENT = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
