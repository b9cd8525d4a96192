"""The processes of a run: one, or as many as ``torchrun`` has started, on one machine or several."""

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
    """Which process this is, of how many, and on which device it computes."""

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
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Add up over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, model: nn.Module) -> None:
        """Give all processes the weights of the first."""
        if self.world_size > 1:
            for leaf in (*model.parameters(), *model.buffers()):
                dist.broadcast(leaf.detach(), 0)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the processes that ``torchrun`` started, if it did, and part in the end."""
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


# The group outlives its destruction where a mesh is still known (cut weights), and gloo's threads let go of the last
# tensors some time after whoever waited for them has gone on. That takes the interpreter's lock: if the interpreter has
# ended by then, the process aborts ("terminate called without an active exception"), and a finished run counts as
# failed. No call waits for it, so there is time for it here.
_GLOO_SHUTDOWN_SECONDS = 1.0  # seconds
_ENVIRONMENT = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
