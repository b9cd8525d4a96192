"""Neighborhood attention with a relative bias: `dat_ref.peers.neighborhood` on tensors, with selectable backends.

================  ================================================================================================
``"eager"``       keys gathered for each query: every key is copied K² times. For comparison
``"matmul"``      tiles of queries, each with the rectangle of keys that it needs, and torch's fused attention: plain
                  operations, for exporters and for dropout of attention weights
``"blockwise"``   the same tiles, some at a time, with a backward pass that stores no logits
``"cpu"``         Numba kernels, for CPUs
``"triton"``      Triton kernels, for CUDA devices
``"auto"``        the last of these that supports the call
================  ================================================================================================
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import ShapeError
from ...peers.neighborhood import axis_kernel
from .._checks import check_tensor
from .attention import attend
from .fused import FusedAttention
from .grid import Size
from .neighborhood_tiles import first_key, submap_length, tiled_attention
from .registry import Call, NeighborhoodGeometry, check_backend, choose_backend


def axis_neighbors(length: int, kernel: int, dilation: int = 1, device: torch.device | None = None) -> Tensor:
    """Return the keys in the neighborhood of each query of an axis, (length, `axis_kernel`).

    >>> axis_neighbors(5, 3).tolist()
    [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    """
    num_keys = axis_kernel(length, kernel, dilation)
    query = torch.arange(length, device=device)
    position, submap = query // dilation, query % dilation
    first = first_key(position, submap_length(length, submap, dilation), num_keys)
    return submap[:, None] + dilation * (first[:, None] + torch.arange(num_keys, device=device))


def neighbor_index(
    size: Size, kernel: int, dilation: int = 1, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return the keys of each query, and their displacements' indices into the (2K-1)² table; both (H·W, K_y·K_x)."""
    rows, columns = (axis_neighbors(length, kernel, dilation, device) for length in size)
    row_shift = (rows - torch.arange(size[0], device=device)[:, None]) // dilation + kernel - 1
    column_shift = (columns - torch.arange(size[1], device=device)[:, None]) // dilation + kernel - 1
    keys = rows[:, None, :, None] * size[1] + columns[None, :, None, :]  # (H, W, K_y, K_x)
    table_index = row_shift[:, None, :, None] * (2 * kernel - 1) + column_shift[None, :, None, :]
    count = size[0] * size[1]
    return keys.reshape(count, -1), table_index.reshape(count, -1)


# ------------------------------------------------------------------------------------------------ attention


def neighborhood_attention(
    qkv: Tensor,
    table: Tensor,
    *,
    scale: float,
    dilation: int = 1,
    dropout: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend to the K × K keys around each query; at the border the neighborhood slides inwards.

        z = softmax(scale · q kᵀ + B̂[d + K - 1]) v        with d = key - query, in steps of δ

    Args:
        qkv: (B, H, W, 3C), the projected map, channels last.
        table: B̂, (heads, 2K-1, 2K-1).
        scale: factor of the dot products.
        dilation: δ, distance in pixels between neighbors.
        dropout: probability of dropping an attention weight, for training.
        return_weights: whether to gather each query's keys and return ``q`` (B, heads, H·W, 1, d), ``k``, ``v`` (B,
            heads, H·W, K_y·K_x, d), ``attention`` (B, heads, H·W, 1, K_y·K_x) and ``neighbors`` (H·W, K_y·K_x).
        backend: one of the names above; `backends()` lists those that run on this machine.

    Returns:
        (B, H, W, C), and a dict with the intermediates (empty without `return_weights`). With K at least
        2 max(H, W) - 1 this is plain attention with a relative bias.

    Raises:
        ShapeError: if the shapes do not match.
        ValueError: for an unknown backend.
        BackendError: if the requested backend cannot compute the call on this machine.
    """
    _check(qkv, table)
    if return_weights:
        return _gather_attention(qkv, table, scale, dilation)
    heads, kernel, size = table.shape[0], (table.shape[1] + 1) // 2, (qkv.shape[1], qkv.shape[2])
    q, k, v = (_split_heads(part, heads) for part in qkv.split(qkv.shape[3] // 3, dim=3))
    selected = choose_backend(backend, Call(q, k, v, None, table, dropout, "neighborhood"))
    run = selected.operations["neighborhood"].run
    if run is not None:
        attended = run(q, k, v, table, NeighborhoodGeometry(size, kernel, dilation, scale, dropout))
    else:
        kernels = selected.kernels_for("neighborhood", backend)
        attended = NEIGHBORHOOD(q, k, v, table, geometry=(size, kernel, dilation, scale), kernels=kernels)
    return attended.transpose(1, 2).flatten(2).unflatten(1, size), {}


def _check(qkv: Tensor, table: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    check_tensor("qkv", qkv, {"B": None, "H": None, "W": None, "3C": None})
    check_tensor("table", table, {"heads": None, "2K-1": None, "2K-1 ": None})
    heads, rows, columns = table.shape
    if rows != columns or rows % 2 == 0:
        raise ShapeError(f"table: expected (heads, 2K-1, 2K-1), got {tuple(table.shape)}")
    if heads == 0 or qkv.shape[3] % (3 * heads) or 0 in qkv.shape[1:]:
        expected = f"(B, H, W, 3C) with H, W >= 1 and C divisible by heads={heads}"
        raise ShapeError(f"qkv: expected {expected}, got {tuple(qkv.shape)}")


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the channels into heads, as a view: (B, H, W, C) → (B, heads, H·W, d)."""
    return x.unflatten(3, (heads, x.shape[3] // heads)).flatten(1, 2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ gathered keys


def _gather_attention(qkv: Tensor, table: Tensor, scale: float, dilation: int) -> tuple[Tensor, dict[str, Tensor]]:
    batch, height, width, channels = qkv.shape
    heads, kernel = table.shape[0], (table.shape[1] + 1) // 2
    split = qkv.reshape(batch, height * width, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4)
    neighbors, table_index = neighbor_index((height, width), kernel, dilation, qkv.device)
    q, k, v = split[0][:, :, :, None], split[1][:, :, neighbors], split[2][:, :, neighbors]
    bias = table.flatten(1)[:, table_index][:, :, None]  # (heads, H·W, 1, K²)
    attended, weights = attend(q, k, v, bias, scale)
    merged = attended[:, :, :, 0].transpose(1, 2).reshape(batch, height, width, channels // 3)
    return merged, {"q": q, "k": k, "v": v, "attention": weights, "neighbors": neighbors}


def eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor, geometry: NeighborhoodGeometry) -> Tensor:
    """Gather the keys of each query, then compute einsum and softmax."""
    size, kernel, dilation, scale, dropout = geometry
    neighbors, table_index = neighbor_index(size, kernel, dilation, q.device)
    logits = torch.einsum("bhmd,bhmnd->bhmn", q * scale, k[:, :, neighbors]) + table.flatten(1)[:, table_index]
    weights = F.dropout(torch.softmax(logits, dim=-1).to(v.dtype), dropout)
    return torch.einsum("bhmn,bhmnd->bhmd", weights, v[:, :, neighbors])


# ------------------------------------------------------------------------------------------------ the operation


def _options(size: Size, kernel: int, dilation: int, scale: float) -> dict[str, Any]:
    return {"size": tuple(size), "kernel": kernel, "dilation": dilation, "scale": scale}


def _plain(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options: Any) -> Tensor:
    return tiled_attention(q, k, v, table, NeighborhoodGeometry(**options, dropout=0.0))


def _flops(shapes: Any, options: dict[str, Any]) -> int:
    q, _, v, _ = shapes
    keys = math.prod(axis_kernel(length, options["kernel"], options["dilation"]) for length in options["size"])
    return int(2 * keys * (math.prod(q) + math.prod(v)))


NEIGHBORHOOD = FusedAttention(
    "neighborhood",
    ("q", "k", "v", "table"),
    "SymInt[2] size, int kernel, int dilation, Scalar scale",
    options=_options,
    plain=_plain,
    flops=_flops,
)


def check_neighborhood_backend(name: str) -> None:
    """Raise `ConfigError` unless `name` is ``"auto"`` or the name of a backend of `neighborhood_attention`."""
    check_backend(name, "neighborhood")
