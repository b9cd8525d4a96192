"""Weights cut over the processes, FSDP2: for models whose weights, gradients and averages do not fit one device.

Each process keeps a slice of every tensor; a block's weights are brought together while it computes. Checkpoints hold
whole tensors, so that a run may go on with its weights cut otherwise or not at all.
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
    """Cut a model's weights over all processes, block by block, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(context.device.type, (context.world_size,))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # also the outermost, so that evaluation leaves slices


def gather_full(values: Any) -> Any:
    """Return a state with every cut tensor put together. All processes must take part."""
    if isinstance(values, dict):
        return {name: gather_full(value) for name, value in values.items()}
    return values.full_tensor() if _is_sharded(values) else values


def shard_like(value: Any, leaf: Tensor) -> Any:
    """Return this process's slice of a tensor that goes with a parameter, if the parameter is cut."""
    if not _is_sharded(leaf) or value.shape != leaf.shape:  # AdamW's count of steps is a number
        return value
    # Every process has read the whole: each takes its own part, and nothing is sent.
    return distribute_tensor(value.to(leaf.device), leaf.device_mesh, leaf.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _is_sharded(value: Any) -> bool:
    return torch.distributed.is_available() and isinstance(value, DTensor)
