"""Attention with separate sampled keys for every query: the naive form that DAT avoids by sharing keys.

    p̃[m, n] = m + t_n + Δ[m, n],   Δ = θ(q)               key n of query m: displaced lattice tap around m
    z[m] = softmax_n(q[m] · k̃[m, n] / √d) ṽ[m, n],        k̃ = φ(x; p̃) W_k,  ṽ = φ(x; p̃) W_v

The layer combines the sampling of a deformable convolution with attention weights. θ is DAT's offset network at stride
1, with two output channels per tap instead of two in total. The sampled keys have N_q·N_k·C elements; DAT's have N_k·C.
With as many keys as queries this number grows with the fourth power of the map's side. If all queries share one set of
points, the result equals DAT's.

Sampling and projection are both linear and commute, so the projections run once on the map (2 HW C²) instead of on
every sample. As in DAT, they mix the samples of all G groups: group g contributes W[:, g] x_g, sampled at its points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._checks import Array, Tree, check_divides, check_fields, check_map, integer
from ..config import DeformableAttentionConfig, PeerConfig
from ..ops.attention import attend, attend_macs, attend_vjp, split_heads
from ..ops.basic import Padding, depthwise_conv2d_macs, linear, linear_macs, linear_vjp
from ..ops.grid import Size
from ..ops.offsets import OffsetNetworkTrace, offset_network, offset_network_vjp
from ..ops.sampling import bilinear_sample, bilinear_sample_macs, bilinear_sample_vjp
from .attention import (
    Attention,
    Candidate,
    Pixel,
    check_traced_size,
    odd_sizes,
    sampled_pixels,
    sampling_term,
    with_remainder,
)
from .memory import Macs, Tape, depthwise_workspace, sampling_workspace

# ------------------------------------------------------------------------------------------------ at given points


@dataclass(frozen=True)
class PointsTrace:
    """Intermediates of `attend_at_points`; N keys per query."""

    x: Array  # (B, C, H, W)
    points_px: Array  # (B, G, M, N, 2), (y, x), in pixels of the map
    projected: Array  # (B, G, 2C, H, W), contribution of each group's channels to keys and values
    q: Array  # (B, heads, M, 1, d)
    k: Array  # (B, heads, M, N, d)
    v: Array
    attention: Array  # (B, heads, M, 1, N)


def attend_at_points(
    query: Array, x: Array, points_px: Array, params: Tree, heads: int, bias: Array | None = None
) -> tuple[Array, PointsTrace]:
    """Attend from every query to keys sampled at its own points.

    Args:
        query: queries (B, C, M).
        x: sampled map (B, C, H, W).
        points_px: points (B, G, M, N, 2), (y, x), in pixels; group g samples channels [g·C/G, (g+1)·C/G) of x.
        params: ``key`` and ``value``, each with weight (C, C) and bias (C,).
        bias: position bias (B or 1, heads, M, N), or None.

    Returns:
        The output (B, C, M) without output projection, and the trace.
    """
    batch, dim, queries = query.shape
    num_keys = points_px.shape[3]
    projected = _project_groups(x, params, points_px.shape[1])
    sampled = np.concatenate([params["key"]["bias"], params["value"]["bias"]])[:, None]
    for group in range(points_px.shape[1]):
        sampled = sampled + bilinear_sample(projected[:, group], _flat_points(points_px[:, group]))  # (B, 2C, M·N)
    sampled = sampled.reshape(batch, 2 * heads, dim // heads, queries, num_keys).transpose(0, 1, 3, 4, 2)
    k, v = sampled[:, :heads], sampled[:, heads:]
    q = split_heads(query, heads)[:, :, :, None]
    pair_bias = None if bias is None else bias[:, :, :, None]
    attended, attention = attend(q, k, v, pair_bias, (dim // heads) ** -0.5)
    merged = attended[:, :, :, 0].swapaxes(2, 3).reshape(batch, dim, queries)
    return merged, PointsTrace(x, points_px, projected, q, k, v, attention)


def _kv_weight(params: Tree) -> Array:
    return np.concatenate([params["key"]["weight"], params["value"]["weight"]])  # (2C, C)


def _project_groups(x: Array, params: Tree, groups: int) -> Array:
    """Return W[:, g] x_g for each group, keys and values: (B, G, 2C, H, W)."""
    weights = np.split(_kv_weight(params), groups, axis=1)
    parts = np.split(x, groups, axis=1)
    return np.stack([linear(part, weight) for part, weight in zip(parts, weights, strict=True)], axis=1)


def _flat_points(points: Array) -> Array:
    """Reshape (B, M, N, 2) → (B, M·N, 2)."""
    return points.reshape(len(points), points.shape[1] * points.shape[2], 2)


class PointsGradients(NamedTuple):
    """Gradients of `attend_at_points`; ``bias`` (B, heads, M, N) is not yet summed over broadcast axes."""

    query: Array
    x: Array
    points_px: Array
    params: Tree
    bias: Array


def attend_at_points_vjp(cotangent: Array, trace: PointsTrace, params: Tree, heads: int) -> PointsGradients:
    """Return the gradients of `attend_at_points` for a cotangent (B, C, M)."""
    batch, dim, queries = cotangent.shape
    groups, num_keys = trace.points_px.shape[1], trace.points_px.shape[3]
    grad_attended = split_heads(cotangent, heads)[:, :, :, None]
    attention_grads = attend_vjp(grad_attended, trace.q, trace.k, trace.v, trace.attention, (dim // heads) ** -0.5)
    grad_query = attention_grads.q[:, :, :, 0].swapaxes(2, 3).reshape(batch, dim, queries)
    grad_sampled = np.concatenate([attention_grads.k, attention_grads.v], axis=1).transpose(0, 1, 4, 2, 3)
    grad_sampled = grad_sampled.reshape(batch, 2 * dim, queries * num_keys)

    grad_points = np.empty_like(trace.points_px)
    grad_parts, grad_weights = [], []
    parts, weights = (np.split(array, groups, axis=1) for array in (trace.x, _kv_weight(params)))
    for group in range(groups):
        points = _flat_points(trace.points_px[:, group])
        sampling = bilinear_sample_vjp(grad_sampled, trace.projected[:, group], points)
        grad_points[:, group] = sampling.points_px.reshape(grad_points[:, group].shape)
        projection = linear_vjp(sampling.x, parts[group], weights[group])
        grad_parts.append(projection.x)
        grad_weights.append(projection.params["weight"])
    grad_weight, grad_bias = np.concatenate(grad_weights, axis=1), grad_sampled.sum(axis=(0, 2))
    grad_params = {
        name: {"weight": grad_weight[rows], "bias": grad_bias[rows]}
        for name, rows in (("key", slice(0, dim)), ("value", slice(dim, None)))
    }
    return PointsGradients(
        grad_query, np.concatenate(grad_parts, axis=1), grad_points, grad_params, attention_grads.bias[:, :, :, 0]
    )


# ------------------------------------------------------------------------------------------------ the layer


@dataclass(frozen=True)
class PerQueryAttentionConfig(PeerConfig):
    """Configuration of attention with `kernel_size`² separate keys for every query.

    Args:
        groups: number G of offset groups, as in a deformable layer.
        kernel_size: side of the lattice of keys around a query, odd.
        offset_kernel_size: kernel size k of the offset network's depthwise convolution, odd.
    """

    heads: int
    groups: int = 1
    kernel_size: int = 3
    offset_kernel_size: int = 5

    kind = "per_query"

    def __post_init__(self) -> None:
        odd = integer(1, "it has a center", odd=True)
        check_fields(self, dim=integer(1), heads=integer(), groups=integer(), kernel_size=odd, offset_kernel_size=odd)
        check_divides("heads", self.heads, "dim", self.dim)
        check_divides("groups", self.groups, "heads", self.heads)

    @property
    def keys(self) -> int:
        """Number N of keys per query."""
        return self.kernel_size**2


def per_query_shapes(config: PerQueryAttentionConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    dim, group, kernel = config.dim, config.dim // config.groups, config.offset_kernel_size
    shapes: dict[str, Tree] = {
        name: {"weight": (dim, dim), "bias": (dim,)} for name in ("query", "key", "value", "output")
    }
    shapes["offset_network"] = {
        "depthwise": {"weight": (group, 1, kernel, kernel), "bias": (group,)},
        "norm": {"weight": (group,), "bias": (group,)},
        "pointwise": {"weight": (2 * config.keys, group)},
    }
    return shapes


@dataclass(frozen=True)
class PerQueryTrace:
    """Intermediates of `per_query_attention`."""

    x: Array  # (B, C, H, W)
    query: Array  # (B, C, H, W)
    offset_network: OffsetNetworkTrace
    offsets: Array  # (B, G, H·W, N, 2), (y, x), in pixels
    points_px: Array  # (B, G, H·W, N, 2), (y, x), in pixels of the map
    at_points: PointsTrace
    merged: Array  # (B, C, H, W), before the output projection

    @property
    def attention(self) -> Array:
        """Attention weights (B, heads, H·W, N)."""
        return self.at_points.attention[:, :, :, 0]


def lattice(size: Size, kernel: int) -> Array:
    """Return the key positions around every pixel without offsets, in pixels: (H·W, kernel², 2), (y, x)."""
    pixels = np.stack(np.divmod(np.arange(size[0] * size[1]), size[1]), axis=-1)
    taps = np.stack(np.divmod(np.arange(kernel * kernel), kernel), axis=-1) - kernel // 2
    return (pixels[:, None] + taps).astype(np.float64)


def _padding(config: PerQueryAttentionConfig) -> Padding:
    half = config.offset_kernel_size // 2
    return (half, half), (half, half)


def per_query_attention(x: Array, params: Tree, config: PerQueryAttentionConfig) -> tuple[Array, PerQueryTrace]:
    """Attend from every pixel to its own sampled keys.

    Args:
        x: input map (B, C, H, W), any H and W.
        params: parameter tree with the shapes of `per_query_shapes`.

    Returns:
        The output (B, C, H, W) and the trace. Without offsets a query away from the border attends to its neighborhood.
    """
    x = check_map("x", x, config.dim)
    batch, dim, height, width = x.shape
    query = linear(x, **params["query"])
    grouped = query.reshape(batch * config.groups, dim // config.groups, height, width)
    raw, network = offset_network(grouped, params["offset_network"], stride=1, padding=_padding(config))
    raw = raw.reshape(batch, config.groups, config.keys, 2, height * width)
    offsets = raw.transpose(0, 1, 4, 2, 3).astype(np.result_type(raw.dtype, np.float32), copy=False)
    points_px = offsets + lattice((height, width), config.kernel_size).astype(offsets.dtype)
    flat_query = query.reshape(batch, dim, height * width)
    merged, at_points = attend_at_points(flat_query, x, points_px, params, config.heads)
    merged = merged.reshape(x.shape)
    y = linear(merged, **params["output"])
    return y, PerQueryTrace(x, query, network, offsets, points_px, at_points, merged)


def per_query_attention_vjp(
    cotangent: Array, trace: PerQueryTrace, params: Tree, config: PerQueryAttentionConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params); x receives gradient through the samples, the offsets and the queries."""
    batch, dim, height, width = trace.x.shape
    output = linear_vjp(cotangent, trace.merged, **params["output"])
    grads = attend_at_points_vjp(output.x.reshape(batch, dim, height * width), trace.at_points, params, config.heads)
    grad_raw = grads.points_px.transpose(0, 1, 3, 4, 2)  # (B, G, N, 2, H·W)
    grad_raw = grad_raw.reshape(batch * config.groups, 2 * config.keys, height, width)
    grad_groups, network = offset_network_vjp(
        grad_raw, trace.offset_network, params["offset_network"], stride=1, padding=_padding(config)
    )
    grad_query = grads.query.reshape(trace.query.shape) + grad_groups.reshape(trace.query.shape)
    query = linear_vjp(grad_query, trace.x, **params["query"])
    grad_params = {**grads.params, "query": query.params, "output": output.params, "offset_network": network}
    return grads.x + query.x, grad_params


def per_query_attention_macs(batch: int, size: Size, config: PerQueryAttentionConfig) -> int:
    """Return multiply-adds: 4 HW C² + 2 HW N C + (k² + 2N) HW C, plus 8 G HW N C to sample keys and values."""
    dim, pixels, keys = config.dim, batch * size[0] * size[1], config.keys
    offsets = depthwise_conv2d_macs(pixels, dim, config.offset_kernel_size) + linear_macs(pixels, dim, 2 * keys)
    sampling = config.groups * bilinear_sample_macs(pixels * keys, 2 * dim)
    return linear_macs(pixels, dim, 4 * dim) + offsets + sampling + attend_macs(pixels, 1, keys, dim)


# ------------------------------------------------------------------------------------------------ the row


def _terms(batch: int, size: Size, config: PerQueryAttentionConfig) -> Macs:
    pixels = batch * math.prod(size)
    projections = 2 * linear_macs(pixels, config.dim, config.dim)
    offsets = depthwise_conv2d_macs(pixels, config.dim, config.offset_kernel_size)
    parts = {
        "query and output": projections,
        "key and value": projections,
        "offset network": offsets + linear_macs(pixels, config.dim, 2 * config.keys),
        "sampling": config.groups * bilinear_sample_macs(pixels * config.keys, 2 * config.dim),
    }
    return with_remainder("attention", per_query_attention_macs(batch, size, config), parts)


def _memory(tape: Tape, batch: int, size: Size, config: PerQueryAttentionConfig) -> None:
    """Record the memory steps; N keys and values are saved for every pixel."""
    pixels = batch * math.prod(size)
    elements, points = pixels * config.dim, pixels * config.keys
    tape.step("query and output", elements)
    workspace = depthwise_workspace(batch * config.dim, size, config.offset_kernel_size, 1, _padding(config))
    tape.step("offset network", elements, workspace)
    tape.step("offset network", elements, elements)  # layer norm
    tape.step("offset network", elements, elements)  # GELU
    tape.step("offset network", 2 * 2 * points * config.groups)  # offsets, points
    projected = 2 * elements
    tape.step("key and value", config.groups * projected, config.groups * projected)  # workspace: before stacking
    sampled = 2 * elements * config.keys
    partial_sum = sampled if config.groups > 1 else 0  # partial sum over the groups
    workspace = projected + partial_sum + sampling_workspace(points, 2 * config.dim, tape.itemsize)
    tape.step("sampling", sampled, workspace)
    tape.attend(points * config.heads)
    with tape.temporary(elements):
        tape.step("attention", elements)
        tape.step("query and output", elements)


def _receptive_field(
    query: Pixel, size: Size, config: PerQueryAttentionConfig, trace: PerQueryTrace, image: int
) -> Array:
    check_traced_size(trace.x.shape[2:], size)
    return sampled_pixels(trace.points_px[image, :, query[0] * size[1] + query[1]], size)


def _candidates(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    offset_kernel_size = layer.kernel_size + (layer.kernel_size + 1) % 2  # the next odd size
    for side in odd_sizes(size):
        config = PerQueryAttentionConfig(layer.dim, layer.heads, layer.groups, side, offset_kernel_size)
        yield Candidate(config, side**2)


ATTENTION = Attention(
    PerQueryAttentionConfig,
    per_query_shapes,
    per_query_attention,
    per_query_attention_vjp,
    per_query_attention_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=_receptive_field,
    module="dat_ref.torch.peers.per_query:PerQueryAttention",
    needs_trace=True,
    replacements={"per_query": _candidates},
    parameter_terms={"offset_network": "offset network"},
    interpolated=sampling_term,
)
