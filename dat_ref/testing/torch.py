"""Wrapper of torch functions as functions of NumPy arrays, with the gradient from autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from .._checks import Array
from .op_spec import Function


class from_torch:
    """Torch function as a function of arrays: ``sample = from_torch(my_sample)``, with its gradient ``sample.vjp``.

    Args:
        function: takes tensors instead of the protocol's arrays, and dicts of tensors instead of dicts of arrays. Other
            arguments are not converted.
        device: device of the tensors.

    >>> import torch
    >>> double = from_torch(lambda x: 2 * x)
    >>> double(np.array([1.0, 3.0])), double.vjp(np.array([1.0, 1.0]), np.array([1.0, 3.0]))[0]
    (array([2., 6.]), array([2., 2.]))
    """

    numpy_memory = False  # torch's allocations cannot be traced from Python

    def __init__(self, function: Function, device: str = "cpu") -> None:
        self.function, self.device = function, device
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        with suppress(TypeError, ValueError):  # written in another language
            self.__signature__ = inspect.signature(function)  # shows convention= and keyword-only arguments

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return the function's result."""
        import torch

        with torch.no_grad():
            return _map_values(self._arrays, self.function(*self._tensors(arguments), **options))

    def vjp(self, cotangent: Array, *arguments: Any, **options: Any) -> list[Any]:
        """Return the gradients of all array arguments, in order. The gradient of a dict is a dict.

        A gradient that autograd does not find is zero. If the function returns several results, the cotangent belongs
        to the first.
        """
        import torch

        tensors = self._tensors(arguments)
        leaves = [leaf.requires_grad_() for value in tensors for leaf in _leaves(value)]
        output = self.function(*tensors, **options)
        first = output if isinstance(output, torch.Tensor) else output[0]
        (weights,) = self._tensors([cotangent])
        grads = iter(torch.autograd.grad(first, leaves, weights, allow_unused=True, materialize_grads=True))
        return [_map_values(lambda leaf: self._arrays(next(grads)), value) for value in tensors if _leaves(value)]

    def _tensors(self, arguments: Any) -> list[Any]:
        """Convert arrays to tensors. They are copied, because a tensor that shares a read-only array is writable."""
        import torch

        def tensor(value: Any) -> Any:
            return torch.from_numpy(np.array(value)).to(self.device) if isinstance(value, np.ndarray) else value

        return [_map_values(tensor, value) for value in arguments]

    @staticmethod
    def _arrays(value: Any) -> Any:
        return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _map_values(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to a value, or to each value of a dict or tuple."""
    if isinstance(value, Mapping):
        return {name: function(entry) for name, entry in value.items()}
    return tuple(function(entry) for entry in value) if type(value) is tuple else function(value)


def _leaves(value: Any) -> list[Any]:
    """Return the tensors in an argument."""
    values = value.values() if isinstance(value, Mapping) else [value]
    return [entry for entry in values if hasattr(entry, "requires_grad_")]
