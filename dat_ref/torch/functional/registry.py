"""Backend registry. Selects a backend for each call and warns with the reason when it falls back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..._checks import ConfigError
from ..._deprecation import deprecated_keywords
from ...config import BiasResolution
from ...conventions import Convention
from .grid import Size


class BackendWarning(UserWarning):
    """Warning that another backend runs a call than the requested one. It appears once for each reason."""


class BackendError(RuntimeError):
    """Requested backend whose kernels cannot compute the call on this machine. The message contains the reason."""


class CoreFunction(Protocol):
    """Function of a backend. The arguments are the checked arguments of `deformable_attention`, with `scale` set.

    It returns (B, heads, H·W, d) in the dtype of `v`, differentiable in all five tensors. It computes the geometry
    (points and table positions) in float32 or wider, also under autocast.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        points: Tensor,
        bias_table: Tensor | None,
        *,
        query_size: Size,
        convention: Convention,
        scale: float,
        resolution: BiasResolution,
        dropout: float,
    ) -> Tensor: ...


class Call(NamedTuple):
    """Arguments of a call that decide whether a backend supports it."""

    q: Tensor
    k: Tensor
    v: Tensor
    points: Tensor | None  # None for a neighborhood
    bias_table: Tensor | None
    dropout: float


@dataclass(frozen=True)
class Backend:
    """Implementation of attention."""

    name: str
    run: Callable[..., Tensor]  # `CoreFunction`, or the function type of another operation
    description: str  # one line for users
    priority: int  # "auto" prefers higher values
    missing: Callable[[], str]  # returns the reason why this machine cannot run it, or ""
    refuses: Callable[[Call], str]  # returns the reason why it does not support a call, or ""
    fails: Callable[[Call, bool], str] = lambda call, requested: ""  # see `register_backend`
    safe_run: Callable[..., Tensor] | None = None

    def function(self, requested: str) -> Callable[..., Tensor]:
        """Return the function for a call that requested a backend or ``"auto"``."""
        return self.run if self.safe_run is None or requested == self.name else self.safe_run


_BACKENDS: dict[str, Backend] = {}
_WARNED: set[str] = set()


@deprecated_keywords(what="description")
def register_backend(
    name: str,
    run: CoreFunction,
    description: str,
    *,
    priority: int = 0,
    missing: Callable[[], str] = lambda: "",
    refuses: Callable[[Call], str] = lambda call: "",
    fails: Callable[[Call, bool], str] = lambda call, requested: "",
    safe_run: CoreFunction | None = None,
) -> None:
    """Add a backend, or replace the backend with the same name.

    Args:
        name: value of ``backend=``.
        run: the computation, see `CoreFunction`.
        description: one line for users.
        priority: ``"auto"`` selects the backend with the highest priority that is available and supports the call. The
            built-in backends have 40 (``"triton"``), 30 (``"cpu"``), 20 (``"blockwise"``), 10 (``"matmul"``) and 0
            (``"eager"``).
        missing: returns the reason why this machine cannot run it, or ``""``. Called once per call, after `refuses`;
            cache the result.
        refuses: returns the reason why it does not support a call (device, dtype, dropout, …), or ``""``.
            `torch.compile` traces it, so it must not depend on values of tensors.
        fails: called after `refuses`, also if `missing` has a reason, with the call and whether the backend was
            requested by name. Returns the reason why its kernels cannot compute the call here, or ``""``. ``"auto"``
            selects another backend; a request by name raises `BackendError`.
        safe_run: the computation if the backend was not requested by name: where `run` would fail, it does not.

    Raises:
        ValueError: for the name ``"auto"``.
    """
    if name == "auto":
        raise ValueError("name: expected any name but 'auto', which selects one of the others")
    _BACKENDS[name] = Backend(name, run, description, priority, missing, refuses, fails, safe_run)


def backends(*, missing: bool = False) -> dict[str, str]:
    """Return the backends that this machine can run: name → description.

    Args:
        missing: return the other backends instead: name → reason.
    """
    reasons = {name: backend.missing() for name, backend in _BACKENDS.items()}
    if missing:
        return {name: reason for name, reason in reasons.items() if reason}
    return {name: _BACKENDS[name].description for name, reason in reasons.items() if not reason}


def check_backend(name: str, candidates: Mapping[str, Backend] = _BACKENDS) -> None:
    """Raise `ConfigError` unless `name` is ``"auto"`` or the name of a candidate."""
    if name != "auto" and name not in candidates:
        raise ConfigError(f"backend: expected 'auto' or one of {', '.join(candidates)}, got {name!r}")


def choose_backend(name: str, call: Call, candidates: Mapping[str, Backend] = _BACKENDS) -> Backend:
    """Return the named backend if it supports the call, otherwise the best one that does.

    A backend that would fail is never returned.

    Args:
        name: name of a backend, or ``"auto"``.
        call: the arguments of the call.
        candidates: backends by name. Each name must be registered with `register_backend`.

    Raises:
        ValueError: for an unknown name.
        BackendError: if the named backend would fail.
    """
    if name == "auto":
        return _best_supported(call, candidates)
    check_backend(name, candidates)
    requested = candidates[name]
    reason = requested.refuses(call)
    if not reason and (failure := requested.fails(call, True)):
        raise BackendError(f"backend={name!r} cannot compute this call: {failure}")
    reason = reason or _missing_reason(name)
    if not reason:
        return requested
    fallback = _best_supported(call, candidates)
    warn_once(f"backend={name!r} does not support this call: {reason}. Using {fallback.name!r}.")
    return fallback


def _best_supported(call: Call, candidates: Mapping[str, Backend]) -> Backend:
    best = None
    for backend in candidates.values():
        better = best is None or backend.priority > best.priority
        if better and not (backend.refuses(call) or backend.fails(call, False) or _missing_reason(backend.name)):
            best = backend
    if best is None:
        raise ValueError("backend: no registered backend supports this call")
    return best


def constant(function: Any) -> Any:
    """Make compilers run a function once instead of tracing it, as `torch.compiler.assume_constant_result` does.

    `assume_constant_result` would import the compiler, which doubles the import time.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def _missing_reason(name: str) -> str:
    return _BACKENDS[name].missing()


@constant
def warn_once(message: str, category: type[Warning] = BackendWarning) -> None:
    """Warn the caller of `deformable_attention`, once per message."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, category, stacklevel=4)
