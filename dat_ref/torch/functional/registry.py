"""Which backend computes the core: a registry, and a choice that says why when it is not the one that was asked for."""

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
    """The backend that was asked for cannot serve, and another one does; said once for each reason."""


class CoreFunction(Protocol):
    """What a backend computes: the arguments of `deformable_attention`, checked, with the scale filled in.

    It returns (B, heads, H·W, d) in the dtype of `v`, differentiable in all five tensors; the geometry (points, and
    where the table is read) is float32 or wider, under autocast too.
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
    """What a backend is asked to compute, as far as it may want to refuse."""

    q: Tensor
    k: Tensor
    v: Tensor
    points: Tensor | None  # None for a neighborhood
    bias_table: Tensor | None
    dropout: float


@dataclass(frozen=True)
class Backend:
    """One way to compute the core."""

    name: str
    run: Callable[..., Tensor]  # `CoreFunction`, or what another operation asks for
    description: str  # one line for people
    priority: int  # "auto" tries higher ones first
    missing: Callable[[], str]  # why this machine cannot run it, or nothing
    refuses: Callable[[Call], str]  # why it cannot serve this call, or nothing


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
) -> None:
    """Add a backend, or replace the one of that name.

    Args:
        name: what callers pass as ``backend=``.
        run: the computation, see `CoreFunction`.
        description: one line about it.
        priority: ``"auto"`` takes the backend of the highest priority that is not missing and does not refuse. Ours
            have 40 (``"triton"``), 30 (``"cpu"``), 20 (``"blockwise"``), 10 (``"matmul"``) and 0 (``"eager"``).
        missing: returns why this machine cannot run it, ``""`` if it can. Asked only where it does not refuse, once a
            call: it should remember its answer.
        refuses: returns why it cannot serve a call (device, dtype, dropout, …), ``""`` if it can. `torch.compile`
            traces it, so it may look at what tensors are and not at what they hold.
    """
    if name == "auto":
        raise ValueError("name: expected any name but 'auto', which chooses among the others")
    _BACKENDS[name] = Backend(name, run, description, priority, missing, refuses)


def backends(*, missing: bool = False) -> dict[str, str]:
    """Return the backends that this machine can run, by name, each with a line about it.

    Args:
        missing: return those that it cannot run instead, each with the reason.
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
    """Return the backend of that name if it can serve the call, else the best that can.

    Args:
        candidates: the backends, by name; of another operation the names must be among those of the core.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "auto":
        return _best_supported(call, candidates)
    check_backend(name, candidates)
    requested = candidates[name]
    reason = _unsupported_reason(requested, call)
    if not reason:
        return requested
    fallback = _best_supported(call, candidates)
    warn_once(f"backend={name!r} cannot serve: {reason}. {fallback.name!r} does instead.")
    return fallback


def _best_supported(call: Call, candidates: Mapping[str, Backend]) -> Backend:
    best = None
    for backend in candidates.values():
        better = best is None or backend.priority > best.priority
        if better and not _unsupported_reason(backend, call):
            best = backend
    if best is None:
        raise ValueError("backend: none of the registered ones can serve this call")
    return best


def _unsupported_reason(backend: Backend, call: Call) -> str:
    return backend.refuses(call) or _missing_reason(backend.name)


def _constant(function: Any) -> Any:
    """Have compilers run a function once and not look inside, as `torch.compiler.assume_constant_result` does.

    Calling that would import the compiler, which takes as long as all the rest.
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def _missing_reason(name: str) -> str:
    return _BACKENDS[name].missing()


@_constant
def warn_once(message: str) -> None:
    """Say something to whoever called `deformable_attention`, unless it was said before."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, BackendWarning, stacklevel=4)
