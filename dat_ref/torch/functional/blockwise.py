"""Kernels ``"blockwise"``: plain PyTorch, one tile of logits at a time, so that memory grows linearly.

    S[n, m] = scale · k[n]·q[m] + B[n, m]        P = exp(S - lse)        z[m] = Σ_n P[n, m] v[n]

The rows of a tile are keys and its columns are queries, as in the windows of the bias table. The forward pass computes
all keys of some queries at a time. The backward pass knows lse, and computes all queries of some keys at a time:

    ∂v = P ∂z      ∂S = P ⊙ (v ∂zᵀ - z·∂z)      ∂k = scale · ∂S q      ∂q = scale · ∂Sᵀ k      ∂B = ∂S.

Logits are in units of log 2: torch computes powers of 2 several times faster than powers of e.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._dtypes import wide_dtype
from .bias import AffineIndex
from .bias_windows import BiasWindows, Tile, narrow_dims
from .grid import Size

LN_2 = math.log(2)
# Maximum number of logits of a tile: they fit into the cache of a CPU, or occupy an accelerator.
FORWARD_MAX_LOGITS = {"cpu": 1 << 21}
BACKWARD_MAX_LOGITS = {"cpu": 1 << 20}
_DEFAULT_MAX_LOGITS = 1 << 26


def deformable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    *,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return z (B, heads, H·W, d) and lse (B, heads, H·W). For the arguments see `dat_ref.torch.kernels`."""
    out = torch.empty_like(q, dtype=v.dtype)
    lse = q.new_empty(q.shape[:3], dtype=wide_dtype(q))
    windows = BiasWindows(table, AffineIndex(origin, step), query_size)
    budget = FORWARD_MAX_LOGITS.get(q.device.type, _DEFAULT_MAX_LOGITS)
    for batch, groups, group_heads in _head_blocks(q, k, windows, budget, split_groups=True):
        heads = _head_slice(groups, group_heads, windows)
        keys, values = (narrow_dims(each, batch, heads).flatten(0, 1) for each in (k, v))  # (B·heads, Ns, d)
        for rows, columns in _query_tiles(query_size, budget // (keys.shape[0] * keys.shape[1])):
            tile = Tile(batch, groups, group_heads, slice(0, k.shape[2]), rows, columns)
            # A tile has complete rows, or a part of one row: in both cases its queries are contiguous.
            first, last = rows.start * query_size[1], (rows.stop - 1) * query_size[1]
            query_slice = slice(first + columns.start, last + columns.stop)
            padded_rows = _PaddedRows(columns.stop - columns.start, windows.pitch(tile))
            queries = padded_rows.pad(narrow_dims(q, batch, heads, query_slice).flatten(0, 1))
            logits = windows.interpolate(windows.gather(tile), tile).flatten(0, 2)  # (B·heads, Ns, queries)
            _bias_to_logits(logits, keys, queries.transpose(1, 2), scale)
            m = logits.amax(1, keepdim=True)
            weights = logits.sub_(m).exp2_()
            l = weights.sum(1, keepdim=True)
            out_tile = torch.bmm(weights.to(v.dtype).transpose(1, 2), values).div_(l.transpose(1, 2))
            padded_rows.unpad(out_tile, narrow_dims(out, batch, heads, query_slice))
            padded_rows.unpad(l.log2_().add_(m).mul_(LN_2)[:, 0], narrow_dims(lse, batch, heads, query_slice))
    return out, lse


def deformable_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    origin: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the five gradients. For the arguments see `dat_ref.torch.kernels`."""
    grad_q, grad_k, grad_v = (torch.empty_like(part) for part in (q, k, v))
    windows = BiasWindows(table, AffineIndex(origin, step), query_size)
    grad_cells = torch.zeros_like(windows.cells)
    grad_origin = torch.zeros_like(origin, dtype=windows.cells.dtype)
    rows, columns = (slice(0, length) for length in query_size)
    budget = BACKWARD_MAX_LOGITS.get(q.device.type, _DEFAULT_MAX_LOGITS)
    for batch, groups, group_heads in _head_blocks(q, k, windows, budget, split_groups=False):
        heads = _head_slice(groups, group_heads, windows)
        full_tile = Tile(batch, groups, group_heads, slice(0, k.shape[2]), rows, columns)
        padded_rows = _PaddedRows(query_size[1], windows.pitch(full_tile))
        row_tensors = [narrow_dims(each, batch, heads).flatten(0, 1) for each in (q, grad_out, out, lse)]
        delta = (row_tensors[1].to(lse.dtype) * row_tensors[2].to(lse.dtype)).sum(-1)
        queries, grad_out_tile = (padded_rows.pad(each) for each in row_tensors[:2])  # (B·heads, queries, d)
        # Padding queries get zero weight, and so no gradient.
        lse_tile, delta = padded_rows.pad(row_tensors[3] / LN_2, math.inf)[:, None], padded_rows.pad(delta)[:, None]
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        for key_slice in _chunks(k.shape[2], budget // (lse_tile.shape[0] * lse_tile.shape[2])):
            tile = full_tile._replace(keys=key_slice)
            keys, values = (narrow_dims(each, batch, heads, key_slice).flatten(0, 1) for each in (k, v))
            cells = windows.gather(tile)
            bias = windows.interpolate(cells, tile)
            logits = bias.flatten(0, 2)  # (B·heads, Ns, queries)
            _bias_to_logits(logits, keys, queries.transpose(1, 2), scale)
            weights = logits.sub_(lse_tile).exp2_()
            _copy_into(narrow_dims(grad_v, batch, heads, key_slice), torch.bmm(weights.to(v.dtype), grad_out_tile))
            grad_weights = torch.bmm(values, grad_out_tile.transpose(1, 2)).to(lse_tile.dtype)
            grad_logits = grad_weights.sub_(delta).mul_(weights)
            grad_logits_cast = grad_logits.to(q.dtype)
            _copy_into(narrow_dims(grad_k, batch, heads, key_slice), torch.bmm(grad_logits_cast, queries).mul_(scale))
            _add_product(grad_queries, grad_logits_cast.transpose(1, 2), keys, scale)
            windows.backward(grad_logits.view(bias.shape), cells, tile, grad_cells, grad_origin)
        padded_rows.unpad(grad_queries, narrow_dims(grad_q, batch, heads))
    grad_table = windows.unpad(grad_cells).to(table.dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_q, grad_k, grad_v, grad_origin.to(origin.dtype), grad_table


def _bias_to_logits(bias: Tensor, keys: Tensor, queries: Tensor, scale: float) -> None:
    """Convert the bias to logits in units of log 2, in place: (B·heads, Ns, queries)."""
    if keys.dtype == bias.dtype:
        bias.baddbmm_(keys, queries, beta=1 / LN_2, alpha=scale / LN_2)
    else:
        bias.add_(torch.bmm(keys, queries), alpha=scale).div_(LN_2)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale · left @ right, (N, rows, columns), to `out`, in its precision."""
    if left.dtype == out.dtype:
        out.baddbmm_(left, right, alpha=scale)
    else:
        out.add_(torch.bmm(left, right), alpha=scale)


def _copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a source (B·heads, …) into a target (B, heads, …)."""
    target.copy_(source.reshape(target.shape))


class _PaddedRows:
    """Conversion between the rows of a map and the padded rows of a tile, see `BiasWindows.pitch`."""

    def __init__(self, width: int, pitch: int) -> None:
        self.width, self.pitch = width, pitch

    def pad(self, queries: Tensor, value: float = 0.0) -> Tensor:
        """Pad the queries of a map for a tile: (N, rows · width, …) → (N, rows · pitch - 1, …)."""
        if self.pitch == self.width:
            return queries
        count, length, *rest = queries.shape
        padded = queries.new_full((count, length // self.width, self.pitch, *rest), value)
        padded[:, :, : self.width].copy_(queries.unflatten(1, (-1, self.width)))
        return padded.flatten(1, 2)[:, :-1]

    def unpad(self, queries: Tensor, target: Tensor) -> None:
        """Copy a tile's queries (B·heads, rows · pitch - 1, …) without padding into (B, heads, rows · width, …)."""
        if self.pitch != self.width:
            rows, head_stride, *strides = target.shape[2] // self.width, queries.stride(0), *queries.stride()[1:]
            shape = (queries.shape[0], rows, self.width, *queries.shape[2:])
            queries = queries.as_strided(shape, (head_stride, self.pitch * strides[0], *strides))
            target = target.unflatten(2, (rows, self.width))
        target.copy_(queries.unflatten(0, target.shape[:2]))


def _chunks(length: int, chunk_size: int) -> Iterator[slice]:
    chunk_size = max(chunk_size, 1)
    for start in range(0, length, chunk_size):
        yield slice(start, min(start + chunk_size, length))


def _query_tiles(size: Size, chunk_size: int) -> Iterator[tuple[slice, slice]]:
    """Split a map into ranges of rows, or into parts of rows if a row has too many pixels."""
    height, width = size
    for rows in _chunks(height, chunk_size // width):
        for columns in _chunks(width, width if chunk_size >= width else chunk_size):
            yield rows, columns


def _head_blocks(
    q: Tensor, k: Tensor, windows: BiasWindows, budget: int, *, split_groups: bool
) -> Iterator[tuple[slice, slice, slice]]:
    """Split the work into ranges of images. An image that is too large is split into groups, or heads."""
    groups, heads_per_group = windows.head_index.shape[:2]
    logits_per_head = q.shape[2] * k.shape[2]
    images_per_block = budget // (groups * heads_per_group * logits_per_head)
    if images_per_block:
        chunk_sizes = (images_per_block, groups, heads_per_group)
    elif not split_groups or heads_per_group * logits_per_head <= budget:
        chunk_sizes = (1, 1, heads_per_group)
    else:
        chunk_sizes = (1, 1, 1)
    lengths = (q.shape[0], groups, heads_per_group)
    yield from itertools.product(*map(_chunks, lengths, chunk_sizes))


def _head_slice(groups: slice, group_heads: slice, windows: BiasWindows) -> slice:
    """Return the range of heads in the heads of all groups."""
    heads_per_group = windows.head_index.shape[1]
    first, last = groups.start * heads_per_group, (groups.stop - 1) * heads_per_group
    return slice(first + group_heads.start, last + group_heads.stop)
