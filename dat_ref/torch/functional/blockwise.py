"""The kernels ``"blockwise"``: plain PyTorch, a tile of the logits at a time, so that memory grows linearly.

    S[n, m] = scale · k[n]·q[m] + B[n, m]        P = exp(S - lse)        z[m] = Σ_n P[n, m] v[n]

A tile has its keys down and its queries across: so a key's window of the bias table is cut. Going forward it has all
keys of some queries; going backward, where lse is known, all queries of some keys:

    ∂v = P ∂z      ∂S = P ⊙ (v ∂zᵀ - z·∂z)      ∂k = scale · ∂S q      ∂q = scale · ∂Sᵀ k      ∂B = ∂S.

Logits are in units of log 2: torch computes powers of 2 several times as fast as powers of e.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._precision import wide_dtype
from .bias import TableLookup
from .grid import Size
from .table_windows import TableWindows, Tile, part_of

LOG2 = math.log(2)
# Logits of a tile: on a CPU so few that they stay in its cache, elsewhere enough to keep an accelerator busy.
FORWARD_TILE = {"cpu": 1 << 21}
BACKWARD_TILE = {"cpu": 1 << 20}
_TILE_ELSEWHERE = 1 << 26


def deformable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    table: Tensor,
    *,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return z (B, heads, H·W, d) and lse (B, heads, H·W); the arguments are those of all `dat_ref.torch.kernels`."""
    out = torch.empty_like(q, dtype=v.dtype)
    lse = q.new_empty(q.shape[:3], dtype=wide_dtype(q))
    windows = TableWindows(table, TableLookup(base, step), query_size)
    budget = FORWARD_TILE.get(q.device.type, _TILE_ELSEWHERE)
    for batch, groups, members in _blocks(q, k, windows, budget, split_groups=True):
        heads = _heads(groups, members, windows)
        keys, values = (part_of(each, batch, heads).flatten(0, 1) for each in (k, v))  # (B·heads, Ns, d)
        for rows, columns in _rectangles(query_size, budget // (keys.shape[0] * keys.shape[1])):
            tile = Tile(batch, groups, members, slice(0, k.shape[2]), rows, columns)
            # Whole rows, or a part of one: in either case the queries follow each other.
            some = slice(rows.start * query_size[1] + columns.start, (rows.stop - 1) * query_size[1] + columns.stop)
            lines = _Lines(columns.stop - columns.start, windows.pitch(tile))
            queries = lines.spread(part_of(q, batch, heads, some).flatten(0, 1))
            logits = windows.blend(windows.cut(tile), tile).flatten(0, 2)  # (B·heads, Ns, queries)
            _to_logits(logits, keys, queries.transpose(1, 2), scale)
            largest = logits.amax(1, keepdim=True)
            weights = logits.sub_(largest).exp2_()
            total = weights.sum(1, keepdim=True)
            read = torch.bmm(weights.to(v.dtype).transpose(1, 2), values).div_(total.transpose(1, 2))
            lines.gather(read, part_of(out, batch, heads, some))
            lines.gather(total.log2_().add_(largest).mul_(LOG2)[:, 0], part_of(lse, batch, heads, some))
    return out, lse


def deformable_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    query_size: Size,
    step: tuple[float, float],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the five gradients; the arguments are those of all `dat_ref.torch.kernels`."""
    grad_q, grad_k, grad_v = (torch.empty_like(part) for part in (q, k, v))
    windows = TableWindows(table, TableLookup(base, step), query_size)
    grad_cells = torch.zeros_like(windows.cells)
    grad_base = torch.zeros_like(base, dtype=windows.cells.dtype)
    rows, columns = (slice(0, length) for length in query_size)
    budget = BACKWARD_TILE.get(q.device.type, _TILE_ELSEWHERE)
    for batch, groups, members in _blocks(q, k, windows, budget, split_groups=False):
        heads = _heads(groups, members, windows)
        whole = Tile(batch, groups, members, slice(0, k.shape[2]), rows, columns)
        lines = _Lines(query_size[1], windows.pitch(whole))
        of_rows = [part_of(each, batch, heads).flatten(0, 1) for each in (q, grad_out, out, lse)]
        mean = (of_rows[1].to(lse.dtype) * of_rows[2].to(lse.dtype)).sum(-1)
        queries, cotangent = (lines.spread(each) for each in of_rows[:2])  # (B·heads, queries, d)
        # What has no meaning gets no weight, and so no gradient.
        level, mean = lines.spread(of_rows[3] / LOG2, math.inf)[:, None], lines.spread(mean)[:, None]
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        for some in _runs(k.shape[2], budget // (level.shape[0] * level.shape[2])):
            tile = whole._replace(keys=some)
            keys, values = (part_of(each, batch, heads, some).flatten(0, 1) for each in (k, v))
            cells = windows.cut(tile)
            bias = windows.blend(cells, tile)
            logits = bias.flatten(0, 2)  # (B·heads, Ns, queries)
            _to_logits(logits, keys, queries.transpose(1, 2), scale)
            weights = logits.sub_(level).exp2_()
            _put(part_of(grad_v, batch, heads, some), torch.bmm(weights.to(v.dtype), cotangent))
            grad_weights = torch.bmm(values, cotangent.transpose(1, 2)).to(level.dtype)
            grad_logits = grad_weights.sub_(mean).mul_(weights)
            narrow = grad_logits.to(q.dtype)
            _put(part_of(grad_k, batch, heads, some), torch.bmm(narrow, queries).mul_(scale))
            _add_product(grad_queries, narrow.transpose(1, 2), keys, scale)
            windows.pull_back(grad_logits.view(bias.shape), cells, tile, grad_cells, grad_base)
        lines.gather(grad_queries, part_of(grad_q, batch, heads))
    grad_table = windows.without_margins(grad_cells).to(table.dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_q, grad_k, grad_v, grad_base.to(base.dtype), grad_table


def _to_logits(bias: Tensor, keys: Tensor, queries: Tensor, scale: float) -> None:
    """Turn the bias into logits, in units of log 2: (B·heads, Ns, queries)."""
    if keys.dtype == bias.dtype:
        bias.baddbmm_(keys, queries, beta=1 / LOG2, alpha=scale / LOG2)
    else:
        bias.add_(torch.bmm(keys, queries), alpha=scale).div_(LOG2)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale · left @ right, (N, rows, columns); of half precision, in the precision of the total."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right, alpha=scale)
    else:
        total.add_(torch.bmm(left, right), alpha=scale)


def _put(place: Tensor, part: Tensor) -> None:
    """Write (B·heads, …) where (B, heads, …) belongs, whatever it is followed by."""
    place.copy_(part.reshape(place.shape))


class _Lines:
    """Rows of queries as tiles have them: farther apart than a map's, see `TableWindows.pitch`."""

    def __init__(self, width: int, pitch: int) -> None:
        self.width, self.pitch = width, pitch

    def spread(self, queries: Tensor, filling: float = 0.0) -> Tensor:
        """Lay a map's queries out for a tile: (N, rows · width, …) → (N, rows · pitch - 1, …)."""
        if self.pitch == self.width:
            return queries
        count, length, *others = queries.shape
        laid = queries.new_full((count, length // self.width, self.pitch, *others), filling)
        laid[:, :, : self.width].copy_(queries.unflatten(1, (-1, self.width)))
        return laid.flatten(1, 2)[:, :-1]

    def gather(self, queries: Tensor, place: Tensor) -> None:
        """Write a tile's queries (B·heads, rows · pitch - 1, …) where (B, heads, rows · width, …) belong."""
        if self.pitch != self.width:
            rows, first, *steps = place.shape[2] // self.width, queries.stride(0), *queries.stride()[1:]
            shape = (queries.shape[0], rows, self.width, *queries.shape[2:])
            queries = queries.as_strided(shape, (first, self.pitch * steps[0], *steps))
            place = place.unflatten(2, (rows, self.width))
        place.copy_(queries.unflatten(0, place.shape[:2]))


def _runs(length: int, at_once: int) -> Iterator[slice]:
    at_once = max(at_once, 1)
    for start in range(0, length, at_once):
        yield slice(start, min(start + at_once, length))


def _rectangles(size: Size, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Cut a map into runs of rows, or into parts of rows where a row has too many pixels."""
    height, width = size
    for rows in _runs(height, at_once // width):
        for columns in _runs(width, width if at_once >= width else at_once):
            yield rows, columns


def _blocks(
    q: Tensor, k: Tensor, windows: TableWindows, budget: int, *, split_groups: bool
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut batch, groups and their heads: into runs of images; an image that is too large into groups, or heads."""
    groups, members = windows.heads.shape[:2]
    of_head = q.shape[2] * k.shape[2]  # logits
    images = budget // (groups * members * of_head)
    if images:
        at_once = (images, groups, members)
    elif not split_groups or members * of_head <= budget:
        at_once = (1, 1, members)
    else:
        at_once = (1, 1, 1)
    lengths = (q.shape[0], groups, members)
    yield from itertools.product(*map(_runs, lengths, at_once))


def _heads(groups: slice, members: slice, windows: TableWindows) -> slice:
    """Return which heads these are, of all."""
    of_group = windows.heads.shape[1]
    return slice(groups.start * of_group + members.start, (groups.stop - 1) * of_group + members.stop)
