"""Operation counter of torch modules: multiply-adds, bytes saved for the backward pass, peak bytes.

The counter works with any module. `torch.utils.flop_counter` sees every dispatched matrix product and convolution,
`saved_tensors_hooks` sees every tensor that autograd stores, and a dispatch mode sees every tensor that an operation
returns. With fake tensors, which have shapes but no data, multiply-adds are counted without computing anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _fused_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of fused attention: its products q kᵀ and A v."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# Fused attention on the CPU is missing from torch's own table.
FUSED_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}


def torch_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run a function and return the multiply-adds of its matrix products and convolutions.

    They are half the FLOPs that torch counts, and equal `dat_ref.complexity.Term.products`. Kernels of other packages
    are not counted.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        function(*args, **kwargs)
    operations = int(counter.get_total_flops())
    if operations % 2:
        raise ValueError(f"function: expected an even number of FLOPs, two per multiply-add, got {operations}")
    return operations // 2


def torch_macs_of_shapes(module: nn.Module, *shapes: tuple[int, ...], **kwargs: Any) -> int:
    """Return the multiply-adds of a module on inputs of these shapes, without computing anything.

    Args:
        module: module on any device; on ``meta`` it needs no memory either.
        shapes: shapes of the positional inputs.
        kwargs: keyword arguments of the forward method.

    >>> torch_macs_of_shapes(nn.Linear(10, 20, device="meta"), (7, 10))
    1400
    """
    with FakeTensorMode():
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fake = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        return torch_macs(functional_call, module, fake, tuple(map(torch.empty, shapes)), kwargs)


def saved_bytes(function: Callable[..., Any], *args: Any, exclude: Iterable[Tensor] = (), **kwargs: Any) -> int:
    """Run a function and return the bytes of the distinct storages that autograd saves for the backward pass.

    Args:
        exclude: tensors that are not counted, for example the input and the parameters.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in excluded:
            saved[key] = tensor  # a reference keeps the storage from being reused
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*args, **kwargs)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that tracks every storage returned by an operation until it is freed.

    It does not see temporary buffers inside an operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracked: set[int] = set()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        input_storages = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage(), input_storages)
        return result

    def _track(self, storage: Any, input_storages: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.tracked or key in input_storages:
            return
        self.tracked.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.tracked.discard(key)
        self.live -= size


def torch_peak_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run a function and return the peak bytes of the tensors that it creates, on any device.

    >>> torch_peak_bytes(lambda x: (x + 1).sum(), torch.ones(1000))
    4004
    """
    with _LiveStorages() as storages:
        function(*args, **kwargs)
    return storages.peak
