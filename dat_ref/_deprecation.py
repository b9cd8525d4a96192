"""Support for deprecated names. They work for one more version, with a warning that gives the new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def deprecated_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module-level ``__getattr__`` that resolves deprecated names.

    Args:
        module: ``__name__`` of the module.
        names: new name in the same module, or ``"package.module:name"`` for a moved object, by old name.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        owner, _, new = names[name].rpartition(":")
        owner = owner or module
        warnings.warn(f"{module}.{name} is deprecated, use {owner}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(owner), new)

    return __getattr__


def deprecated_keywords(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that accepts deprecated keyword arguments, with a warning.

    Args:
        names: new keyword by old keyword.
    """

    def decorator(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs:
                    message = f"{function.__name__}: {old}= is deprecated, use {new}="
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorator


def warn_caller(message: str, category: type[Warning] = DeprecationWarning) -> None:
    """Emit a warning at the first caller outside this package, `enum` and `dataclasses`."""
    stacklevel = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INTERNAL:
        stacklevel += 1
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=stacklevel)


_INTERNAL = (__name__.split(".")[0], "enum", "dataclasses")
