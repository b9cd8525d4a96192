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


class CoreGeometry(NamedTuple):
    """Arguments of `deformable_attention` that are not tensors, as backends receive them."""

    query_size: Size
    convention: Convention
    scale: float
    resolution: BiasResolution
    dropout: float


class NeighborhoodGeometry(NamedTuple):
    """Arguments of `neighborhood_attention` that are not tensors, as backends receive them."""

    size: Size  # (H, W)
    kernel: int  # K, keys per axis
    dilation: int  # δ, distance in pixels between neighboring keys
    scale: float
    dropout: float


class Call(NamedTuple):
    """Arguments of a call that decide whether a backend supports it."""

    q: Tensor
    k: Tensor
    v: Tensor
    points: Tensor | None  # None for a neighborhood
    bias_table: Tensor | None
    dropout: float
    operation: str = "deformable"  # or "neighborhood"


@dataclass(frozen=True)
class Implementation:
    """Implementation of one operation by a backend: either a function or kernels, and what it refuses.

    The safe variants serve calls that did not request the backend by name: where the others would fail, they do not.
    """

    run: Callable[..., Tensor] | None = None  # (tensors, geometry) → output
    safe_run: Callable[..., Tensor] | None = None
    kernels: Callable[[], Any] | None = None  # loads the kernel module of the fused operation
    safe_kernels: Callable[[], Any] | None = None
    refuses: Callable[[Call], str] = lambda call: ""  # returns the reason why it does not support a call, or ""
    fails: Callable[[Call, bool], str] = lambda call, requested: ""  # see `register_backend`


@dataclass(frozen=True)
class Backend:
    """Backend of the attention operations."""

    name: str
    description: str  # one line for users
    priority: int  # "auto" prefers higher values
    operations: Mapping[str, Implementation]
    missing: Callable[[], str] = lambda: ""  # returns the reason why this machine cannot run it, or ""

    def kernels_for(self, operation: str, requested: str) -> str:
        """Return the name of the kernels, see `kernel_module`, for a call that requested a backend or ``"auto"``."""
        if requested == self.name or self.operations[operation].safe_kernels is None:
            return self.name
        return self.name + _SAFE_SUFFIX


_BACKENDS: dict[str, Backend] = {}
_SAFE_SUFFIX = "_or_blockwise"
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
    """Add a backend of `deformable_attention`, or replace the backend with the same name.

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
    implementation = Implementation(
        run=_with_keywords(run),
        safe_run=None if safe_run is None else _with_keywords(safe_run),
        refuses=refuses,
        fails=fails,
    )
    others = _BACKENDS[name].operations if name in _BACKENDS else {}
    add_backend(Backend(name, description, priority, {**others, "deformable": implementation}, missing))


def _with_keywords(run: CoreFunction) -> Callable[..., Tensor]:
    """Return the function of a backend that takes a `CoreGeometry` instead of keywords."""

    def with_geometry(
        q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor | None, geometry: CoreGeometry
    ) -> Tensor:
        return run(q, k, v, points, bias_table, **geometry._asdict())

    return with_geometry


def add_backend(backend: Backend) -> None:
    """Add a row to the registry, or replace the row with the same name."""
    _BACKENDS[backend.name] = backend


def kernel_module(operation: str, name: str) -> Any:
    """Return the kernel module of an operation.

    Args:
        operation: name of the operation.
        name: name of a backend. With the suffix ``_or_blockwise``, kernels that hand over where the backend's own fail.
    """
    backend = name.removesuffix(_SAFE_SUFFIX)
    implementation = _BACKENDS[backend].operations[operation]
    load = implementation.kernels if backend == name else implementation.safe_kernels
    assert load is not None
    return load()


def backends(*, missing: bool = False) -> dict[str, str]:
    """Return the backends that this machine can run: name → description.

    Args:
        missing: return the other backends instead: name → reason.
    """
    reasons = {name: backend.missing() for name, backend in _BACKENDS.items()}
    if missing:
        return {name: reason for name, reason in reasons.items() if reason}
    return {name: _BACKENDS[name].description for name, reason in reasons.items() if not reason}


def check_backend(name: str, operation: str = "deformable") -> None:
    """Raise `ConfigError` unless `name` is ``"auto"`` or the name of a backend of the operation."""
    if name != "auto" and (name not in _BACKENDS or operation not in _BACKENDS[name].operations):
        known = ", ".join(each for each, backend in _BACKENDS.items() if operation in backend.operations)
        raise ConfigError(f"backend: expected 'auto' or one of {known}, got {name!r}")


def choose_backend(name: str, call: Call) -> Backend:
    """Return the named backend if it supports the call, otherwise the best one that does.

    A backend that would fail is never returned.

    Raises:
        ValueError: for an unknown name.
        BackendError: if the named backend would fail.
    """
    if name == "auto":
        return _best_supported(call)
    check_backend(name, call.operation)
    requested = _BACKENDS[name].operations[call.operation]
    reason = requested.refuses(call)
    if not reason and (failure := requested.fails(call, True)):
        raise BackendError(f"backend={name!r} cannot compute this call: {failure}")
    reason = reason or _missing_reason(name)
    if not reason:
        return _BACKENDS[name]
    fallback = _best_supported(call)
    warn_once(f"backend={name!r} does not support this call: {reason}. Using {fallback.name!r}.")
    return fallback


def _best_supported(call: Call) -> Backend:
    best = None
    # The built-in rows are in ascending order. In descending order most of them need not be asked.
    for backend in reversed(list(_BACKENDS.values())):
        if call.operation not in backend.operations or (best is not None and backend.priority < best.priority):
            continue
        implementation = backend.operations[call.operation]
        reason = implementation.refuses(call) or implementation.fails(call, False) or _missing_reason(backend.name)
        if not reason:
            best = backend  # of equal priorities the one that was registered first
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
