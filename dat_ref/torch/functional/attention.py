"""Attention over sampled keys, the core: `dat_ref.ops.attention` on tensors, with backends to choose from.

    z = softmax(q k̃ᵀ / √d + B) ṽ        for each head

================  ================================================================================================
``"eager"``       the formulation of the releases: every displacement written out, the table sampled at each of them,
                  einsum, softmax. For comparison.
``"dense"``       the table sampled with coordinates computed an axis at a time (`bias.GridReader`), then torch's fused
                  attention; a few query rows at a time, so that the (H·W × Ns) matrices of all heads need not be in
                  memory at once (while training they are kept).
``"matmul"``      the same with the bias as two matrix products (`bias.HatReader`): plain operations for compilers,
                  exporters and accelerators.
``"auto"``        ``"matmul"`` where a graph is being captured; otherwise the available and suitable backend of the
                  highest priority.
================  ================================================================================================

Kernels register here with `register_backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import BiasResolution
from ...conventions import Convention
from ...ops.attention import check_core
from .._checks import check_tensor
from .bias import GridReader, HatReader, sampled_table_bias
from .grid import Size

# ------------------------------------------------------------------------------------------------ pieces


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Cut the channels of a map into heads: (B, C, H, W) or (B, C, N) → (B, heads, N, C/heads)."""
    return x.unflatten(1, (heads, x.shape[1] // heads)).flatten(3).transpose(2, 3)


def merge_heads(x: Tensor, size: Size) -> Tensor:
    """Lay heads back into a map: (B, heads, H·W, d) → (B, heads·d, H, W)."""
    return x.transpose(2, 3).unflatten(3, size).flatten(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention with an additive bias, written out.

    Args:
        q: (..., M, d).
        k, v: (..., N, d).
        bias: broadcasts to (..., M, N), or None; -inf hides a key.

    Returns:
        output (..., M, d) and attention weights (..., M, N), whose rows sum to one.
    """
    logits = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    weights = torch.softmax(logits, dim=-1)
    return weights.to(v.dtype) @ v, weights


# ------------------------------------------------------------------------------------------------ backends


class CoreFunction(Protocol):
    """What a backend computes: the arguments of `deformable_attention`, checked, with the scale filled in."""

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


@dataclass(frozen=True)
class Backend:
    """One way to compute the core."""

    name: str
    run: CoreFunction
    what: str  # one line for people
    priority: int  # "auto" tries higher ones first
    available: Callable[[], bool]  # on this machine
    suits: Callable[[Tensor, Tensor, Tensor | None, float], bool]  # these (q, points, bias_table, dropout)


_BACKENDS: dict[str, Backend] = {}


def register_backend(
    name: str,
    run: CoreFunction,
    what: str,
    *,
    priority: int = 0,
    available: Callable[[], bool] = lambda: True,
    suits: Callable[[Tensor, Tensor, Tensor | None, float], bool] = lambda q, points, bias_table, dropout: True,
) -> None:
    """Add a backend, or replace the one of that name.

    Args:
        name: what callers pass as ``backend=``.
        run: the computation, see `CoreFunction`.
        what: one line about it.
        priority: ``"auto"`` takes the available and suitable backend of the highest priority (``"dense"`` has 0).
        available: whether this machine can run it.
        suits: whether it can take ``(q, points, bias_table, dropout)``: device, dtype, head width, gradients.
    """
    if name == "auto":
        raise ValueError("name: expected any name but 'auto', which chooses among the others")
    _BACKENDS[name] = Backend(name, run, what, priority, available, suits)


def backends() -> dict[str, str]:
    """Return the backends that this machine can run, by name, each with a line about it."""
    return {backend.name: backend.what for backend in _BACKENDS.values() if backend.available()}


def _choose(name: str, q: Tensor, points: Tensor, bias_table: Tensor | None, dropout: float) -> Backend:
    if name == "auto":
        if torch.compiler.is_compiling():
            return _BACKENDS["matmul"]
        able = [one for one in _BACKENDS.values() if one.available() and one.suits(q, points, bias_table, dropout)]
        return max(able, key=lambda one: one.priority)
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(_BACKENDS)}, got {name!r}")
    return _BACKENDS[name]


# ------------------------------------------------------------------------------------------------ the core


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Tensor,
    bias_table: Tensor | None,
    *,
    query_size: Size,
    convention: Convention,
    scale: float | None = None,
    resolution: BiasResolution = "fractions",
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Attend to sampled keys, with a relative position bias read at their continuous positions.

    Args:
        q: (B, heads, H·W, d).
        k, v: (B, heads, Ns, d), projected from the features sampled at `points`.
        points: (B, G, Ns, 2), (y, x), normalised by the convention; heads [g·heads/G, (g+1)·heads/G) belong to group g.
        bias_table: (heads, 2H-1, 2W-1), or None for no bias. A table of another size is read as `resolution` says.
        query_size: (H, W).
        scale: of the dot products, d^(-1/2) if None.
        backend: one of `backends()`, or ``"auto"``.
        dropout: share of the attention weights to drop, for training.

    Returns:
        (B, heads, H·W, d), in the dtype of `v`.

    Raises:
        ShapeError, ConfigError: if the shapes do not go together.
        ValueError: for an unknown backend.
    """
    if not torch.compiler.is_compiling():
        check_core(check_tensor, q, k, v, points, bias_table, query_size)
    run = _choose(backend, q, points, bias_table, dropout).run
    return run(
        q,
        k,
        v,
        points,
        bias_table,
        query_size=query_size,
        convention=convention,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        resolution=resolution,
        dropout=dropout,
    )


# ------------------------------------------------------------------------------------------------ "eager"


def _eager(
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
) -> Tensor:
    logits = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    if bias_table is not None:
        geometry = {"query_size": query_size, "convention": convention, "resolution": resolution}
        logits = logits + sampled_table_bias(bias_table, points, **geometry)  # type: ignore[arg-type]
    weights = F.dropout(torch.softmax(logits, dim=-1).to(v.dtype), dropout)
    return torch.einsum("bhmn,bhnd->bhmd", weights, v)


# ------------------------------------------------------------------------------------------------ "dense" and "matmul"

# Logits computed at once: on a CPU so few that they stay in cache, on an accelerator enough to keep it busy.
_LOGITS_AT_ONCE = {"cpu": 1 << 21}
_LOGITS_AT_ONCE_ELSEWHERE = 1 << 28


def _dense(
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
) -> Tensor:
    if bias_table is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
    reader = GridReader(bias_table, points, query_size, convention, resolution)
    return _attend_by_rows(q, k, v, reader, query_size, scale, dropout)


def _matmul(
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
) -> Tensor:
    if bias_table is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
    reader = HatReader(bias_table, points, query_size, convention, resolution)
    return _attend_by_rows(q, k, v, reader, query_size, scale, dropout)


def _attend_by_rows(
    q: Tensor, k: Tensor, v: Tensor, reader: GridReader | HatReader, size: Size, scale: float, dropout: float
) -> Tensor:
    height, width = size
    whole = torch.compiler.is_compiling()  # a graph would be pinned to how often a loop runs
    rows = height if whole else _rows_at_once(q, k, width)
    if whole or rows >= height:
        mask = reader.read(0, height).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)
    parts = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        mask = reader.read(start, stop).to(q.dtype)
        queries = q[:, :, start * width : stop * width]
        parts.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale, dropout_p=dropout))
    return torch.cat(parts, dim=2)


def _rows_at_once(q: Tensor, k: Tensor, width: int) -> int:
    budget = _LOGITS_AT_ONCE.get(q.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    return max(budget // max(q.shape[0] * q.shape[1] * width * k.shape[2], 1), 1)


register_backend("eager", _eager, "the releases' formulation: every displacement sampled, einsum", priority=-1)
register_backend("dense", _dense, "plain PyTorch: coordinates an axis at a time, fused attention, a few rows at a time")
register_backend(
    "matmul",
    _matmul,
    "plain PyTorch: the bias as two matrix products; for compilers, exporters and accelerators",
    priority=1,
    suits=lambda q, points, bias_table, dropout: q.device.type != "cpu",
)
