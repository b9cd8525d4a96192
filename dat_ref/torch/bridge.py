"""Conversion between the NumPy spec and the modules: parameter trees, gradients, traces, released names.

A module's state-dict names are the flattened names of the spec's parameter tree, so only the arrays are converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import CheckpointError, Tree
from ..official import NameMapping, to_official, to_ours
from ..params import flatten, mismatch_report, unflatten


def as_numpy(value: Any) -> Any:
    """Convert tensors to NumPy arrays, also in lists, dicts, tuples and traces. Other values are returned unchanged.

    bfloat16, which NumPy does not have, becomes float32.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    if isinstance(value, Mapping):
        return {name: as_numpy(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_numpy(part) for part in value]
    if isinstance(value, tuple):
        return tuple(as_numpy(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: as_numpy(getattr(value, field.name)) for field in fields(value)})
    return value


class SpecModule(nn.Module):
    """Base class of modules with a counterpart in the spec: imports and exports parameters under both sets of names."""

    def official_names(self) -> NameMapping:
        """Return the released name and layout of each parameter."""
        raise NotImplementedError

    def load_numpy(self, tree: Tree) -> None:
        """Copy a parameter tree of the spec (arrays or tensors) into the module, in the module's dtype and device.

        Raises:
            CheckpointError: if the tree does not fit; with a report of missing, unexpected and mis-shaped names.
                Nothing is copied.
        """
        leaves = flatten(tree)
        own = dict(self.named_parameters(remove_duplicate=False))
        problems = mismatch_report(
            {name: tuple(leaf.shape) for name, leaf in own.items()},
            {name: tuple(leaf.shape) for name, leaf in leaves.items()},
        )
        if problems:
            raise CheckpointError(f"params: expected the parameters of this configuration\n  {problems}")
        with torch.no_grad():
            for name, leaf in own.items():
                source = leaves[name]
                leaf.copy_(source if isinstance(source, Tensor) else torch.from_numpy(np.array(source)))

    def to_numpy(self, *, grad: bool = False) -> Tree:
        """Return the parameters as a tree of the spec, or their gradients (zeros for parameters without a gradient).

        The arrays share memory with the parameters on a CPU: a training step changes them too. Copy what has to stay.
        """
        return unflatten({name: as_numpy(leaf) for name, leaf in self._leaves(grad).items()})

    def to_official(self, params_or_grads: Tree | None = None) -> dict[str, Any]:
        """Return parameters or gradients under their released names and in their released shapes.

        Args:
            params_or_grads: tree of the spec, state dict, or gradients by parameter name; the module's own parameters
                if None. A leaf that is None (a parameter without a gradient) becomes zeros.
        """
        leaves = self._leaves(grad=False) if params_or_grads is None else flatten(params_or_grads)
        own = dict(self.named_parameters(remove_duplicate=False))
        filled = {name: torch.zeros_like(own[name]) if leaf is None else leaf for name, leaf in leaves.items()}
        return to_official(filled, self.official_names())

    def load_official(self, state: Mapping[str, Any]) -> None:
        """Copy a released state dict (tensors or arrays) into the module.

        Raises:
            CheckpointError: if the state dict does not fit; with a report of missing, unexpected and mis-shaped keys.
                Nothing is copied.
        """
        shapes = unflatten({name: tuple(leaf.shape) for name, leaf in self.named_parameters(remove_duplicate=False)})
        self.load_numpy(to_ours(as_numpy(dict(state)), self.official_names(), shapes))

    def _leaves(self, grad: bool) -> dict[str, Tensor]:
        if not grad:
            return {name: leaf.detach() for name, leaf in self.named_parameters(remove_duplicate=False)}
        return {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in self.named_parameters(remove_duplicate=False)
        }


def state_dtype(state: Mapping[str, Any]) -> torch.dtype:
    """Return float64 if any array of a state dict is float64, else float32."""
    double = any(str(getattr(leaf, "dtype", "")).endswith("float64") for leaf in state.values())
    return torch.float64 if double else torch.float32


__all__ = ["SpecModule", "as_numpy", "state_dtype"]
