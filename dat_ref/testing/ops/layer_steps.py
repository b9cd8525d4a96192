"""Layer in replaceable steps, and mistakes in them, for the mutants of ``layer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._checks import Array, Tree
from ...config import OffsetBound
from ...conventions import Convention
from ...ops.attention import merge_heads, split_heads
from ...ops.basic import Padding, conv_size, depthwise_conv2d, gelu, layer_norm, linear
from ...ops.grid import Size, offset_padding, reference_points, to_pixels
from ...ops.offsets import bound_offsets, offset_network
from ...ops.sampling import bilinear_sample
from ...params import unflatten
from ..op_spec import Function
from .layer_cases import Weights, config_of
from .steps import PIXEL_MISTAKES, Steps, bias_in_steps


def split_groups(x: Array, groups: int) -> Array:
    """Split the channels of a map into groups: (N, C, H, W) → (N·G, C/G, H, W)."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


def predict(queries: Array, params: Tree, *, stride: int, padding: Padding) -> Array:
    """Return raw offsets (N·G, 2, Hk, Wk)."""
    return offset_network(queries, params, stride=stride, padding=padding)[0]


@dataclass(frozen=True)
class LayerSteps(Steps):
    """Steps of the layer, including the steps of bias and attention.

    Args:
        linear: (x, weight, bias) -> projection.
        offset_input: (x, query) -> input map of the offset network.
        sample_input: (x, query) -> map from which features are sampled.
        split_groups: (map, groups) -> maps of the groups.
        predict: (queries, params, stride=, padding=) -> raw offsets.
        padding: (size, kernel, stride, convention) -> zero padding of the offset network.
        bound: see `bound_offsets`.
        sample_pixels: see `pixels`, for the sampled features.
        sample: (maps, points_px) -> features.
        split: (x, heads) -> channels split into heads.
        merge: (x, size) -> heads merged into channels.
    """

    linear: Function = linear
    offset_input: Function = lambda x, query: query
    sample_input: Function = lambda x, query: x
    split_groups: Function = split_groups
    predict: Function = predict
    padding: Function = offset_padding
    bound: Function = bound_offsets
    sample_pixels: Function = to_pixels
    sample: Function = bilinear_sample
    split: Function = split_heads
    merge: Function = merge_heads


def layer_in_steps(
    steps: LayerSteps, x: Array, weights: Weights, options: dict[str, Any], convention: Convention
) -> Array:
    """Return the layer's result (N, C, H, W)."""
    params, config = unflatten(weights), config_of(x, weights, options, convention)
    images, groups, size = len(x), config.groups, x.shape[2:]
    query = steps.linear(x, **params["query"])

    padding = steps.padding(size, config.kernel_size, config.stride, convention)
    key_size = conv_size(size, config.kernel_size, config.stride, padding)
    network_input = steps.split_groups(steps.offset_input(x, query), groups)
    raw = steps.predict(network_input, params["offset_network"], stride=config.stride, padding=padding)
    raw = raw.reshape(images, groups, 2, *key_size).transpose(0, 1, 3, 4, 2)  # (N, G, Hk, Wk, 2)
    reference = reference_points(key_size, convention)
    bound_options = {"offset_range": config.offset_range, "convention": convention}
    points = steps.bound(raw, reference, config.offset_bound, **bound_options)[1]
    points = points.reshape(images, groups, key_size[0] * key_size[1], 2)

    points_px = steps.sample_pixels(points, size, convention)
    maps = steps.split_groups(steps.sample_input(x, query), groups)
    sampled = steps.sample(maps, points_px.reshape(images * groups, *points.shape[2:])).reshape(
        images, config.dim, *key_size
    )
    features = query, steps.linear(sampled, **params["key"]), steps.linear(sampled, **params["value"])
    q, k, v = (steps.split(each, config.heads) for each in features)
    bias = bias_in_steps(steps, params["position_bias"]["table"], points, size, convention)
    attention_out = steps.attend(q, k, v, bias, steps.scale(config.head_dim))[0]
    return np.asarray(steps.linear(steps.merge(attention_out, size), **params["output"]))


# ------------------------------------------------------------------------------------------------ mistakes


def shared_points_mistake(mistake: Function) -> dict[str, Function]:
    """Return a mistake in the points of both features and bias."""
    return {"pixels": mistake, "sample_pixels": mistake}


def weights_transposed(fn: Function) -> Function:
    return lambda x, weight, bias=None: fn(x, weight.T, bias)


def biases_missing(fn: Function) -> Function:
    return lambda x, weight, bias=None: fn(x, weight)


def interleaved(count: int, channels: int) -> Array:
    """Return the order of channels that puts channels with equal index modulo `count` into the same part."""
    return np.arange(channels).reshape(-1, count).T.ravel()


def split_interleaved(fn: Function) -> Function:
    return lambda x, heads: fn(x[:, interleaved(heads, x.shape[1])], heads)


def merge_interleaved(fn: Function) -> Function:
    def merge(x: Array, size: Size) -> Array:
        merged = fn(x, size)
        back = np.empty_like(merged)
        back[:, interleaved(x.shape[1], merged.shape[1])] = merged
        return back

    return merge


def groups_interleaved(fn: Function) -> Function:
    return lambda x, groups: fn(x[:, interleaved(groups, x.shape[1])], groups)


def bounded_by(change: Any) -> Function:
    """Return a mutation that replaces the offsets by ``change(raw, limit)``."""

    def mistake(fn: Function) -> Function:
        def bound(
            raw: Array, reference: Array, kind: OffsetBound, *, offset_range: float, convention: Convention
        ) -> tuple[Array, Array]:
            options = {"offset_range": offset_range, "convention": convention}
            if kind is not OffsetBound.TANH_CELLS:
                return fn(raw, reference, kind, **options)
            pitch = np.array([convention.reference.pitch(count) for count in raw.shape[2:4]], dtype=raw.dtype)
            offsets = change(raw, raw.dtype.type(offset_range / 2) * pitch)
            return offsets, (reference + offsets).astype(raw.dtype)

        return bound

    return mistake


def offsets_swapped(fn: Function) -> Function:
    return lambda raw, reference, kind, **options: fn(raw[..., ::-1], reference, kind, **options)


def clamp_missing(fn: Function) -> Function:
    def bound(raw: Array, reference: Array, kind: OffsetBound, **options: Any) -> tuple[Array, Array]:
        return fn(raw, reference, OffsetBound.RAW if kind is OffsetBound.CLAMP else kind, **options)

    return bound


def custom_network(norm: Function = layer_norm, activation: Function = gelu) -> Function:
    """Return a mutation that replaces the norm and the activation of the offset network."""

    def mistake(fn: Function) -> Function:
        def predicted(queries: Array, params: Tree, *, stride: int, padding: Padding) -> Array:
            windows = depthwise_conv2d(queries, **params["depthwise"], stride=stride, padding=padding)
            return linear(activation(norm(windows, **params["norm"])), **params["pointwise"])

        return predicted

    return mistake


def smaller_epsilon_norm(x: Array, weight: Array, bias: Array) -> Array:
    """Layer norm with epsilon 1e-6, the default of other frameworks."""
    deviation = np.sqrt(x.var(axis=1, keepdims=True) + x.dtype.type(1e-6))
    return np.asarray(weight[:, None, None] * (x - x.mean(axis=1, keepdims=True)) / deviation + bias[:, None, None])


def affine_only(x: Array, weight: Array, bias: Array) -> Array:
    return np.asarray(weight[:, None, None] * x + bias[:, None, None])


def gelu_by_tanh(x: Array) -> Array:
    """Tanh approximation of GELU, 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), dtype=x.dtype)


def kernel_flipped(fn: Function) -> Function:
    """Use a mathematical convolution instead of a cross-correlation."""

    def predicted(queries: Array, params: Tree, **options: Any) -> Array:
        depthwise = {**params["depthwise"], "weight": params["depthwise"]["weight"][:, :, ::-1, ::-1]}
        return fn(queries, {**params, "depthwise": depthwise}, **options)

    return predicted


def other_padding(fn: Function) -> Function:
    """Use the padding of another convention: k // 2 on every side, or the padding for the key grid."""

    def padding(size: Size, kernel: int, stride: int, convention: Convention) -> Padding:
        other = Convention.CELL_CENTER if convention.offset_padding == "half" else Convention.CVPR2022
        return fn(size, kernel, stride, other)

    return padding


GEOMETRY_MISTAKES = {name: shared_points_mistake(mistake) for name, mistake in PIXEL_MISTAKES.items()}
