"""Input checks on tensors, with the messages of `dat_ref._checks`.

They are skipped during graph capture, and for the proxies of `torch.fx`, whose sizes are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .._checks import ShapeError, pattern


def check_tensors(**values: Any) -> None:
    """Raise unless each value, by argument name, is a tensor or None. Proxies of symbolic tracing count as tensors.

    Raises:
        ShapeError: with the name of the argument, its type, and the conversion.
    """
    if torch.compiler.is_compiling():
        return
    for name, value in values.items():
        if value is None or isinstance(value, Tensor) or hasattr(type(value), "__torch_function__"):
            continue
        kind = type(value)
        got = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise ShapeError(f"{name}: expected torch.Tensor, got {got}; convert it with torch.as_tensor({name})")


def is_requested(option: object) -> bool:
    """Return the value of an option that is off by default. A proxy, which `torch.fx` makes of it, counts as off."""
    return not _is_proxy(option) and bool(option)


def _is_proxy(value: object) -> bool:
    return isinstance(value, Proxy)


def check_tensor(name: str, value: Any, axes: Mapping[str, int | None], rule: str = "") -> None:
    """Raise unless `value` is a floating-point tensor whose shape fits `axes` (``None`` fits any length).

    Raises:
        ShapeError: with the name of the argument, the expected pattern, the rule, and the actual shape or dtype.
    """
    if torch.compiler.is_compiling() or _is_proxy(value):
        return  # a comparison would specialize the graph to this size
    if not isinstance(value, Tensor):
        check_tensors(**{name: value})
    fits = _fits(value.shape, axes)
    if fits and value.is_floating_point():
        return
    expected = pattern(axes) + (f" with {rule}" if rule else "")
    if not fits:
        raise ShapeError(f"{name}: expected {expected}, got {tuple(value.shape)}")
    raise ShapeError(f"{name}: expected floating-point numbers {expected}, got {value.dtype}")


def _fits(shape: Sequence[int], axes: Mapping[str, int | None]) -> bool:
    if len(shape) != len(axes):
        return False
    for size, actual in zip(axes.values(), shape):  # noqa: SIM110 (a generator costs as much as the whole check)
        if size is not None and size != actual:
            return False
    return True


def check_map(name: str, x: Tensor, channels: int) -> None:
    """Raise unless `x` is a floating-point feature map ``(B, C=channels, H, W)`` with at least one pixel."""
    if torch.compiler.is_compiling() or _is_proxy(x):
        return
    check_tensor(name, x, {"B": None, "C": channels, "H": None, "W": None})
    if 0 in x.shape[2:]:
        raise ShapeError(f"{name}: expected (B, C={channels}, H, W) with H >= 1 and W >= 1, got {tuple(x.shape)}")
