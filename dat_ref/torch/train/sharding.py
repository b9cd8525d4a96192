"""Sharded weights (FSDP2), for models whose weights, gradients and moments do not fit on one device.

Each process stores a shard of every tensor. The weights of a block are gathered while it computes. Checkpoints contain
full tensors, so a run can resume with another sharding or without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..block import Block
from .distributed import DistributedContext

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, context: DistributedContext) -> None:
    """Shard the weights of a model over all processes, block by block, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(context.device.type, (context.world_size,))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # also the root, so that evaluation leaves shards


def gather_full(values: Any) -> Any:
    """Return a state with full tensors in place of sharded ones. All processes must take part."""
    if isinstance(values, dict):
        return {name: gather_full(value) for name, value in values.items()}
    return values.full_tensor() if _is_sharded(values) else values


def shard_like(value: Any, leaf: Tensor) -> Any:
    """Return this process's shard of a tensor that belongs to a parameter, if the parameter is sharded."""
    if not _is_sharded(leaf) or value.shape != leaf.shape:  # AdamW's step count is a scalar
        return value
    # Every process has read the full tensor, so each takes its shard without communication.
    return distribute_tensor(value.to(leaf.device), leaf.device_mesh, leaf.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _is_sharded(value: Any) -> bool:
    return torch.distributed.is_available() and isinstance(value, DTensor)
