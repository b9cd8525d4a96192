"""Deformable-attention layer: forward pass, with one function call per step, and its gradient.

    q = x W_q                                      queries, one per pixel
    p̃ = bound(p, θ(q))                             sampling points, one set per group           (ops.offsets)
    x̃ = φ(x; p̃)                                    features at the points                        (ops.sampling)
    k̃ = x̃ W_k,  ṽ = x̃ W_v                          keys and values
    z = softmax(q k̃ᵀ/√d + φ(B̂; R)) ṽ               attention, bias sampled at the points         (ops.bias, attention)
    y = z W_o

The heads form G groups. Each group has its own key grid and samples its own channels. W_k and W_v are dense, as in both
releases: after sampling, they mix the channels of all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from . import official
from ._checks import Array, Tree, check_array, check_map
from .config import LOG_CPB_HIDDEN, BiasKind, DeformableAttentionConfig, OffsetBound
from .ops.attention import attend, attend_macs, attend_vjp, merge_heads, split_heads
from .ops.basic import (
    depthwise_conv2d,
    depthwise_conv2d_macs,
    depthwise_conv2d_vjp,
    linear,
    linear_macs,
    linear_vjp,
)
from .ops.bias import (
    LogBiasTrace,
    fixed_bias,
    log_bias,
    log_bias_macs,
    log_bias_vjp,
    table_bias,
    table_bias_macs,
    table_bias_vjp,
)
from .ops.grid import Size, key_grid_size, offset_padding, reference_points, to_pixels, to_pixels_vjp
from .ops.offsets import (
    OffsetNetworkTrace,
    bound_offsets,
    bound_offsets_vjp,
    offset_network,
    offset_network_macs,
    offset_network_vjp,
)
from .ops.sampling import bilinear_sample, bilinear_sample_macs, bilinear_sample_vjp
from .params import check_params

# Kernel size of the depthwise convolution of ``BiasKind.DEPTHWISE``.
BIAS_KERNEL = 3
BIAS_PADDING = ((1, 1), (1, 1))


def deformable_shapes(config: DeformableAttentionConfig) -> Tree:
    """Return the tree of parameter shapes of the layer."""
    channels, group = config.dim, config.group_dim
    shapes: dict[str, Tree] = {
        name: {"weight": (channels, channels), "bias": (channels,)} for name in ("query", "key", "value", "output")
    }
    if config.offset_bound is not OffsetBound.NONE:
        shapes["offset_network"] = {
            "depthwise": {"weight": (group, 1, config.kernel_size, config.kernel_size), "bias": (group,)},
            "norm": {"weight": (group,), "bias": (group,)},
            "pointwise": {"weight": (2, group)},
        }
    if config.bias is not BiasKind.NONE:
        shapes["position_bias"] = _bias_shapes(config)
    return shapes


def _bias_shapes(config: DeformableAttentionConfig) -> Tree:
    if config.bias is BiasKind.DEPTHWISE:
        return {"depthwise": {"weight": (config.dim, 1, BIAS_KERNEL, BIAS_KERNEL), "bias": (config.dim,)}}
    if config.bias is BiasKind.LOG_CPB:
        return {
            "hidden": {"weight": (LOG_CPB_HIDDEN, 2), "bias": (LOG_CPB_HIDDEN,)},
            "out": {"weight": (config.heads // config.groups, LOG_CPB_HIDDEN)},
        }
    assert config.size is not None  # checked by the configuration
    height, width = config.size
    if config.bias is BiasKind.TABLE:
        return {"table": (config.heads, 2 * height - 1, 2 * width - 1)}
    keys = key_grid_size(config.size, config.kernel_size, config.stride, config.convention)
    return {"table": (config.heads, height * width, keys[0] * keys[1])}


@dataclass(frozen=True)
class LayerTrace:
    """All intermediates of one forward pass. Geometry is (B, G, Hk, Wk, 2), order (y, x), one key grid per group."""

    x: Array  # (B, C, H, W), the input
    query: Array  # (B, C, H, W), x W_q
    offset_network: OffsetNetworkTrace | None
    raw_offsets: Array  # Δ, output of the offset network
    offsets: Array  # term added to the reference point, normalized
    reference: Array  # p, normalized
    points: Array  # p̃, normalized coordinates of the convention
    reference_px: Array  # in pixels of the map; 0 is the center of the first pixel
    points_px: Array
    sampled: Array  # (B, C, Hk, Wk), x̃
    q: Array  # (B, heads, H·W, d)
    k: Array  # (B, heads, Ns, d)
    v: Array
    bias: Array | None  # (B or 1, heads, H·W, Ns)
    log_bias: LogBiasTrace | None
    attention: Array  # (B, heads, H·W, Ns)
    merged: Array  # (B, C, H, W), z


# ------------------------------------------------------------------------------------------------ forward


def deformable_layer(x: Array, params: Tree, config: DeformableAttentionConfig) -> tuple[Array, LayerTrace]:
    """Run the layer.

    Args:
        x: (B, C, H, W), with H and W at least the stride.
        params: parameter tree with the shapes of `deformable_shapes`.
        config: layer configuration.

    Returns:
        y (B, C, H, W) and the trace.

    Raises:
        ShapeError: if `x` has another number of channels, or a fixed bias table is for another map size.
        ConfigError: if a map smaller than the offset network's kernel has no padding, see `key_grid_size`.
    """
    x = check_map("x", x, config.dim)
    size: Size = x.shape[2:]
    key_size = key_grid_size(size, config.kernel_size, config.stride, config.convention)

    query = linear(x, **params["query"])
    raw_offsets, network = _raw_offsets(query, params, config, key_size)
    reference = reference_points(key_size, config.convention).astype(raw_offsets.dtype)
    offsets, points = bound_offsets(raw_offsets, reference, config.offset_bound, **_bound_options(config))
    points_px = to_pixels(points, size, config.convention)
    sampled = _pool(x, config.stride, key_size) if config.average_pool else _sample_groups(x, points_px)

    q = split_heads(query, config.heads)
    k = split_heads(linear(sampled, **params["key"]), config.heads)
    v = split_heads(linear(sampled, **params["value"]), config.heads)
    bias, log_trace = _logit_bias(points, params, config, size)
    attended, attention = attend(q, k, v, bias, config.scale)
    merged = merge_heads(attended, size)
    if config.bias is BiasKind.DEPTHWISE:
        merged = merged + depthwise_conv2d(query, **params["position_bias"]["depthwise"], padding=BIAS_PADDING)
    y = linear(merged, **params["output"])

    trace = LayerTrace(
        x=x,
        query=query,
        offset_network=network,
        raw_offsets=raw_offsets,
        offsets=offsets,
        reference=np.broadcast_to(reference, points.shape),
        points=points,
        reference_px=np.broadcast_to(to_pixels(reference, size, config.convention), points.shape),
        points_px=points_px,
        sampled=sampled,
        q=q,
        k=k,
        v=v,
        bias=bias,
        log_bias=log_trace,
        attention=attention,
        merged=merged,
    )
    return y, trace


def _bound_options(config: DeformableAttentionConfig) -> dict[str, Any]:
    return {"offset_range": config.offset_range, "convention": config.convention}


def _conv_options(config: DeformableAttentionConfig, size: Size) -> dict[str, Any]:
    padding = offset_padding(size, config.kernel_size, config.stride, config.convention)
    return {"stride": config.stride, "padding": padding}


def _raw_offsets(
    query: Array, params: Tree, config: DeformableAttentionConfig, key_size: Size
) -> tuple[Array, OffsetNetworkTrace | None]:
    """Return Δ (B, G, Hk, Wk, 2), at least float32, and the trace of the offset network."""
    batch, _, height, width = query.shape
    shape = (batch, config.groups, 2, *key_size)
    if config.offset_bound is OffsetBound.NONE:
        raw, network = np.zeros(shape, dtype=query.dtype), None
    else:
        grouped = query.reshape(batch * config.groups, config.group_dim, height, width)
        raw, network = offset_network(grouped, params["offset_network"], **_conv_options(config, (height, width)))
    raw = raw.reshape(shape).transpose(0, 1, 3, 4, 2)
    return raw.astype(np.result_type(raw.dtype, np.float32), copy=False), network


def _sample_groups(x: Array, points_px: Array) -> Array:
    """Sample each group's channels at its own points: (B, C, H, W) → (B, C, Hk, Wk)."""
    batch, groups, rows, columns, _ = points_px.shape
    channels, height, width = x.shape[1:]
    maps = x.reshape(batch * groups, channels // groups, height, width)
    sampled = bilinear_sample(maps, points_px.reshape(batch * groups, rows * columns, 2))
    return sampled.reshape(batch, channels, rows, columns)


def _pool(x: Array, stride: int, key_size: Size) -> Array:
    """Average the r × r cells: (B, C, H, W) → (B, C, Hk, Wk)."""
    axes = {"B": None, "C": None, "H": key_size[0] * stride, "W": key_size[1] * stride}
    check_array("x", x, axes, f"H and W multiples of stride={stride}, which average pooling needs")
    return x.reshape(*x.shape[:2], key_size[0], stride, key_size[1], stride).mean(axis=(3, 5))


def _logit_bias(
    points: Array, params: Tree, config: DeformableAttentionConfig, size: Size
) -> tuple[Array | None, LogBiasTrace | None]:
    flat_points = _flatten_points(points)
    if config.bias is BiasKind.TABLE:
        return table_bias(params["position_bias"]["table"], flat_points, **_table_options(config, size)), None
    if config.bias is BiasKind.LOG_CPB:
        return log_bias(flat_points, params["position_bias"], query_size=size, convention=config.convention)
    if config.bias is BiasKind.FIXED:
        return fixed_bias(params["position_bias"]["table"], query_size=size, samples=flat_points.shape[2]), None
    return None, None


def _flatten_points(points: Array) -> Array:
    """Flatten the key grid: (B, G, Hk, Wk, 2) → (B, G, Ns, 2)."""
    return points.reshape(*points.shape[:2], points.shape[2] * points.shape[3], 2)


def _table_options(config: DeformableAttentionConfig, size: Size) -> dict[str, Any]:
    return {"query_size": size, "convention": config.convention, "resolution": config.bias_resolution}


# ------------------------------------------------------------------------------------------------ gradient


def deformable_layer_vjp(
    cotangent: Array, trace: LayerTrace, params: Tree, config: DeformableAttentionConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params): the steps of `deformable_layer` in reverse.

    The gradient reaches x on three paths: through the sampled features; through the points, from features and bias to
    the offset network and the queries; and through the queries in the attention.
    """
    size = trace.x.shape[2:]
    output = linear_vjp(cotangent, trace.merged, **params["output"])
    grad_params: dict[str, Tree] = {"output": output.params}

    grad_attended = split_heads(output.x, config.heads)
    attention_grads = attend_vjp(grad_attended, trace.q, trace.k, trace.v, trace.attention, config.scale)
    key = linear_vjp(merge_heads(attention_grads.k, trace.sampled.shape[2:]), trace.sampled, **params["key"])
    value = linear_vjp(merge_heads(attention_grads.v, trace.sampled.shape[2:]), trace.sampled, **params["value"])
    grad_params["key"], grad_params["value"] = key.params, value.params

    grad_x, grad_points = _sampling_vjp(key.x + value.x, trace, config)
    grad_points_bias, bias_params = _logit_bias_vjp(attention_grads.bias, trace, params, config)
    grad_points = grad_points + grad_points_bias
    if bias_params is not None:
        grad_params["position_bias"] = bias_params

    grad_query = merge_heads(attention_grads.q, size)
    if config.bias is BiasKind.DEPTHWISE:
        kernel = params["position_bias"]["depthwise"]
        depthwise = depthwise_conv2d_vjp(output.x, trace.query, **kernel, padding=BIAS_PADDING)
        grad_query = grad_query + depthwise.x
        grad_params["position_bias"] = {"depthwise": depthwise.params}
    if config.offset_bound is not OffsetBound.NONE:
        grad_query_offsets, grad_params["offset_network"] = _offsets_vjp(grad_points, trace, params, config)
        grad_query = grad_query + grad_query_offsets

    query = linear_vjp(grad_query, trace.x, **params["query"])
    grad_params["query"] = query.params
    return grad_x + query.x, grad_params


def _sampling_vjp(grad_sampled: Array, trace: LayerTrace, config: DeformableAttentionConfig) -> tuple[Array, Array]:
    """Return ∂L/∂x and ∂L/∂p̃ (normalized coordinates) through the sampled features."""
    x, points_px = trace.x, trace.points_px
    if config.average_pool:
        grad_pixels = grad_sampled / config.stride**2
        return grad_pixels.repeat(config.stride, axis=2).repeat(config.stride, axis=3), np.zeros_like(points_px)
    batch, groups, rows, columns, _ = points_px.shape
    maps = x.reshape(batch * groups, config.group_dim, *x.shape[2:])
    grads = bilinear_sample_vjp(
        grad_sampled.reshape(batch * groups, config.group_dim, rows * columns),
        maps,
        points_px.reshape(batch * groups, rows * columns, 2),
    )
    grad_points_px = grads.points_px.reshape(points_px.shape)
    return grads.x.reshape(x.shape), to_pixels_vjp(grad_points_px, x.shape[2:], config.convention)


def _logit_bias_vjp(
    grad_bias: Array, trace: LayerTrace, params: Tree, config: DeformableAttentionConfig
) -> tuple[Array, Tree | None]:
    """Return ∂L/∂p̃ through the bias, and the gradients of the bias parameters (None if the logits have no bias)."""
    points = trace.points
    flat_points = _flatten_points(points)
    if config.bias is BiasKind.TABLE:
        table = params["position_bias"]["table"]
        grads = table_bias_vjp(grad_bias, table, flat_points, **_table_options(config, trace.x.shape[2:]))
        return grads.points.reshape(points.shape), {"table": grads.table}
    if config.bias is BiasKind.LOG_CPB:
        assert trace.log_bias is not None
        grad_points, grad_params = log_bias_vjp(
            grad_bias, trace.log_bias, params["position_bias"], groups=config.groups
        )
        return grad_points.reshape(points.shape), grad_params
    grad_params = {"table": grad_bias.sum(axis=0)} if config.bias is BiasKind.FIXED else None
    return np.zeros_like(points), grad_params


def _offsets_vjp(
    grad_points: Array, trace: LayerTrace, params: Tree, config: DeformableAttentionConfig
) -> tuple[Array, Tree]:
    """Return ∂L/∂query through the offset network, and the gradients of its parameters."""
    assert trace.offset_network is not None
    reference = reference_points(trace.reference.shape[2:4], config.convention)
    grad_raw = bound_offsets_vjp(
        grad_points, trace.raw_offsets, reference, config.offset_bound, **_bound_options(config)
    )
    batch, groups, rows, columns, _ = grad_raw.shape
    grad_raw = grad_raw.transpose(0, 1, 4, 2, 3).reshape(batch * groups, 2, rows, columns)
    grad_groups, grad_params = offset_network_vjp(
        grad_raw, trace.offset_network, params["offset_network"], **_conv_options(config, trace.x.shape[2:])
    )
    return grad_groups.reshape(trace.query.shape), grad_params


# ------------------------------------------------------------------------------------------------ cost


def deformable_layer_macs(batch: int, size: Size, config: DeformableAttentionConfig) -> dict[str, int]:
    """Return the multiply-adds of each part.

    The first four parts are the article's Ω = 2HW·Ns·C + 2HW·C² + 2Ns·C² + (k² + 2)·Ns·C. The article omits the other
    two.
    """
    pixels = size[0] * size[1]
    keys = key_grid_size(size, config.kernel_size, config.stride, config.convention)
    samples = keys[0] * keys[1]
    macs = {
        "attention": attend_macs(batch, pixels, samples, config.dim),
        "query and output": 2 * linear_macs(batch * pixels, config.dim, config.dim),
        "key and value": 2 * linear_macs(batch * samples, config.dim, config.dim),
    }
    if config.offset_bound is not OffsetBound.NONE:
        network = (size, config.group_dim, config.groups, config.kernel_size)
        macs["offset network"] = offset_network_macs(batch, *network, **_conv_options(config, size))
    if not config.average_pool:
        macs["sampling"] = bilinear_sample_macs(batch * samples, config.dim)
    if config.bias is BiasKind.TABLE:
        macs["bias"] = table_bias_macs(batch, config.heads, pixels, samples)
    elif config.bias is BiasKind.LOG_CPB:
        macs["bias"] = log_bias_macs(batch, config.heads, config.groups, LOG_CPB_HIDDEN, pixels, samples)
    elif config.bias is BiasKind.DEPTHWISE:
        macs["bias"] = depthwise_conv2d_macs(batch * pixels, config.dim, BIAS_KERNEL)
    return macs


# ------------------------------------------------------------------------------------------------ class


class DeformableAttention:
    """Deformable-attention layer.

    Args:
        config: layer configuration.
        params: parameter tree with the shapes of `deformable_shapes`, see `dat_ref.init_params`.

    Raises:
        CheckpointError: if the names or shapes of `params` do not fit the configuration, or a value is not finite.

    >>> import dat_ref
    >>> config = dat_ref.DeformableAttentionConfig(dim=12, heads=4, groups=2, size=(5, 7))
    >>> layer = dat_ref.DeformableAttention(config, dat_ref.init_params(config, seed=0))
    >>> y, trace = layer(np.ones((2, 12, 5, 7), np.float32), return_trace=True)
    >>> y.shape, trace.points.shape
    ((2, 12, 5, 7), (2, 2, 5, 7, 2))
    """

    def __init__(self, config: DeformableAttentionConfig, params: Tree) -> None:
        self.config = config
        self.params = check_params(params, deformable_shapes(config))

    @overload
    def __call__(self, x: Array, return_trace: Literal[False] = ...) -> Array: ...

    @overload
    def __call__(self, x: Array, return_trace: Literal[True]) -> tuple[Array, LayerTrace]: ...

    def __call__(self, x: Array, return_trace: bool = False) -> Array | tuple[Array, LayerTrace]:
        """Return y (B, C, H, W) for x (B, C, H, W), and the trace if requested."""
        y, trace = deformable_layer(x, self.params, self.config)
        return (y, trace) if return_trace else y

    def vjp(self, x: Array) -> tuple[Array, Callable[[Array], tuple[Array, Tree]]]:
        """Return y and the pullback: ``pullback(∂L/∂y)`` returns (∂L/∂x, ∂L/∂params).

        The pullback refers to `x` and to the parameters, without copies: change neither before its last call.
        """
        y, trace = deformable_layer(x, self.params, self.config)

        def pullback(cotangent: Array) -> tuple[Array, Tree]:
            cotangent = check_array("cotangent", cotangent, dict(zip("BCHW", y.shape, strict=True)))
            return deformable_layer_vjp(cotangent, trace, self.params, self.config)

        return y, pullback

    @classmethod
    def from_official(
        cls, mapping: Mapping[str, Any], state: Mapping[str, Any], *, release: str
    ) -> DeformableAttention:
        """Build from the arguments and the state dict of the released module.

        Raises:
            CheckpointError: with a report of missing, unexpected and mis-shaped keys.
        """
        config = DeformableAttentionConfig.from_official(mapping, release=release)
        names = official.attention_names(config)
        return cls(config, official.to_ours(state, names, deformable_shapes(config)))

    def to_official(self, params_or_grads: Tree) -> dict[str, Array]:
        """Return parameters or gradients under their released names and shapes."""
        return official.to_official(params_or_grads, official.attention_names(self.config))
