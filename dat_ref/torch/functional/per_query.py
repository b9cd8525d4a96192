"""Attention with separate sampled keys for each query: `dat_ref.peers.per_query` on tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._checks import check_tensors
from .attention import attend, split_heads
from .grid import Size
from .sampling import Sampler, sample_tokens


def lattice(size: Size, kernel: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Return the key positions without offsets, in pixels: (H·W, kernel², 2), around every pixel."""
    axes = [
        torch.arange(length, dtype=dtype, device=device)[:, None]
        + (torch.arange(kernel, dtype=dtype, device=device) - kernel // 2)
        for length in size
    ]
    shape = (*size, kernel, kernel)
    rows, columns = axes[0][:, None, :, None].expand(shape), axes[1][None, :, None, :].expand(shape)
    return torch.stack((rows, columns), dim=-1).flatten(2, 3).flatten(0, 1)


def attend_at_points(
    query: Tensor,
    x: Tensor,
    points_px: Tensor,
    params: Mapping[str, Mapping[str, Tensor]],
    heads: int,
    bias: Tensor | None = None,
    *,
    sampler: Sampler = "gather",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend from every query to the keys sampled at its own points.

    Args:
        query: (B, C, M).
        x: (B, C, H, W), the sampled map.
        points_px: (B, G, M, N, 2), (y, x), in pixels; group g samples channels [g·C/G, (g+1)·C/G) of x.
        params: ``key`` and ``value``, each weight (C, C) and bias (C,).
        heads: number of heads.
        bias: (B or 1, heads, M, N), or None.
        sampler: see `bilinear_sample`.

    Returns:
        (B, C, M), before any output projection; and the intermediates ``projected`` (B, G, 2C, H, W), ``q`` (B, heads,
        M, 1, d), ``k`` and ``v`` (B, heads, M, N, d) and ``attention`` (B, heads, M, 1, N).
    """
    check_tensors(query=query, x=x, points_px=points_px, bias=bias)
    batch, dim, queries = query.shape
    groups, count, depth = points_px.shape[1], points_px.shape[3], dim // heads
    kv_weight, kv_bias = (torch.cat((params["key"][leaf], params["value"][leaf])) for leaf in ("weight", "bias"))
    tokens = x.permute(0, 2, 3, 1).unflatten(3, (groups, dim // groups))
    projected = torch.einsum("byxgc,ogc->byxgo", tokens, kv_weight.unflatten(1, (groups, dim // groups)))
    # One group at a time: the samples of a group have all 2C channels and are large.
    sampled = kv_bias
    for group in range(groups):
        group_slice = slice(group, group + 1)
        group_points = points_px[:, group_slice].flatten(2, 3)
        values = sample_tokens(projected[:, :, :, group_slice], group_points, sampler=sampler)  # (B, 1, M·N, 2C)
        sampled = sampled + values[:, 0]
    sampled = sampled.to(query.dtype).reshape(batch, queries, count, 2 * heads, depth).permute(0, 3, 1, 2, 4)
    k, v = sampled.chunk(2, dim=1)
    q = split_heads(query, heads)[:, :, :, None]
    pair_bias = None if bias is None else bias[:, :, :, None]
    attended, attention = attend(q, k, v, pair_bias, depth**-0.5)
    merged = attended[:, :, :, 0].transpose(2, 3).reshape(batch, dim, queries)
    return merged, {"projected": projected.permute(0, 3, 4, 1, 2), "q": q, "k": k, "v": v, "attention": attention}
