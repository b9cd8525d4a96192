"""Basic operations on feature maps: linear, convolution, layer norm, GELU, softmax, each with its gradient and cost.

Maps are ``(B, C, H, W)``. A cotangent is the gradient of a scalar loss L with respect to an output. Each ``*_vjp``
converts it to the gradients with respect to the inputs. Costs are multiply-adds, as integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.special import erf

from .._checks import Array, ConfigError, ShapeError, check_array, check_dtype, check_same_shape, integer

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))
NO_PADDING: Padding = ((0, 0), (0, 0))
LAYER_NORM_EPSILON = 1e-5


class AffineGradients(NamedTuple):
    """Gradients of an operation with a weight and an optional bias."""

    x: Array
    params: dict[str, Array]


def _weight_and_bias(weight: Array, bias: Array | None) -> dict[str, Array]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def pixel_columns(x: Array) -> Array:
    """Flatten the spatial axes of a map: (B, C, H, W) → (B, C, H·W)."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))  # -1 would be ambiguous for an empty batch


def _check_bias(bias: Array | None, outputs: int) -> None:
    if bias is not None:
        check_array("bias", bias, {"O": outputs})


# ------------------------------------------------------------------------------------------------ linear (1 × 1)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Apply a linear map to the channels of each pixel: y[o] = Σ_c W[o, c] x[c] + b[o].

    Args:
        x: (B, C, H, W) or (B, C, N).
        weight: (O, C).
        bias: (O,) or None.

    Returns:
        (B, O, H, W) or (B, O, N).

    Raises:
        ShapeError: if a shape or a dtype is wrong.
    """
    _check_linear(x, weight, bias)
    columns = pixel_columns(x)
    y = weight @ columns
    if bias is not None:
        y += bias[:, None]
    return y.reshape(x.shape[0], weight.shape[0], *x.shape[2:])


def _check_linear(x: Array, weight: Array, bias: Array | None) -> None:
    check_array("weight", weight, {"O": None, "C": None})
    check_dtype("x", x)
    if x.ndim not in (3, 4) or x.shape[1] != weight.shape[1]:
        channels = weight.shape[1]
        raise ShapeError(f"x: expected (B, C={channels}, H, W) or (B, C={channels}, N), got {x.shape}")
    _check_bias(bias, len(weight))


def linear_vjp(cotangent: Array, x: Array, weight: Array, bias: Array | None = None) -> AffineGradients:
    """Compute ∂L/∂x = Wᵀ ∂L/∂y, ∂L/∂W = Σ ∂L/∂y xᵀ and ∂L/∂b = Σ ∂L/∂y, with sums over batch and pixels."""
    _check_linear(x, weight, bias)
    check_same_shape("cotangent", cotangent, (len(x), len(weight), *x.shape[2:]), "the output")
    grad_y, columns = pixel_columns(cotangent), pixel_columns(x)
    grad_weight = np.tensordot(grad_y, columns, axes=([0, 2], [0, 2]))
    grad_bias = None if bias is None else grad_y.sum(axis=(0, 2))
    return AffineGradients((weight.T @ grad_y).reshape(x.shape), _weight_and_bias(grad_weight, grad_bias))


def linear_macs(pixels: int, channels_in: int, channels_out: int) -> int:
    """Multiply-adds of `linear` over `pixels` = B·H·W."""
    return pixels * channels_in * channels_out


# ------------------------------------------------------------------------------------------------ convolution


def conv_size(size: tuple[int, int], kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Return the output size of a convolution: ⌊(H + padding - k)/r⌋ + 1 on each axis."""
    kernel, stride = integer(1)("kernel", kernel), integer(1)("stride", stride)
    height, width = ((length + sum(pad) - kernel) // stride + 1 for length, pad in zip(size, padding, strict=True))
    return height, width


def _pad(x: Array, padding: Padding) -> Array:
    return x if padding == NO_PADDING else np.pad(x, ((0, 0), (0, 0), *padding))


def _crop(x: Array, padding: Padding) -> Array:
    (top, bottom), (left, right) = padding
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def _taps(padded: Array, kernel: int, stride: int, size: tuple[int, int]) -> Iterator[tuple[int, int, Array]]:
    """Yield (i, j, view) for each kernel tap. The view has, for each output pixel, the input pixel under tap (i, j)."""
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + stride * (size[0] - 1) + 1, stride)
            columns = slice(j, j + stride * (size[1] - 1) + 1, stride)
            yield i, j, padded[:, :, rows, columns]


def _check_convolution(x: Array, weight: Array, bias: Array | None, stride: int, padding: Padding) -> tuple[int, int]:
    """Check the arguments of both convolutions, except for the channels of the weight; return the output size."""
    check_array("x", x, {"B": None, "C": None, "H": None, "W": None})
    check_array("weight", weight, {"O": None, "C": None, "k": None, "k'": None})
    kernel = weight.shape[-1]
    if weight.shape[2] != kernel:
        raise ShapeError(f"weight: expected (O, C, k, k), a square kernel, got {weight.shape}")
    _check_bias(bias, len(weight))
    sides = [side for pair in padding for side in pair]
    if len(sides) != 4 or any(integer()("padding", side) < 0 for side in sides):
        raise ConfigError(f"padding: expected ((top, bottom), (left, right)), each >= 0, got {padding}")
    height, width = conv_size(x.shape[2:], kernel, stride, padding)
    if height < 1 or width < 1:
        raise ShapeError(f"x: expected (B, C, H, W) with a padded map of {kernel} × {kernel} or more, got {x.shape}")
    return height, width


def _check_conv2d(x: Array, weight: Array, bias: Array | None, stride: int, padding: Padding) -> tuple[int, int]:
    size = _check_convolution(x, weight, bias, stride, padding)
    if weight.shape[1] != x.shape[1]:
        raise ShapeError(f"weight: expected (O, C={x.shape[1]}, k, k), got {weight.shape}")
    return size


def conv2d(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: Padding = NO_PADDING
) -> Array:
    """Convolve: y[o, u] = Σ_c Σ_ij W[o, c, i, j] x[c, r u + (i, j)] + b[o], with zeros outside the map.

    Args:
        x: (B, C, H, W).
        weight: (O, C, k, k).
        bias: (O,) or None.
        stride: r.
        padding: numbers of zero rows and columns around the map, ((top, bottom), (left, right)).

    Returns:
        (B, O, H', W'), with H' and W' from `conv_size`.

    Raises:
        ShapeError, ConfigError: if a shape, a dtype or an option is wrong.
    """
    size = _check_conv2d(x, weight, bias, stride, padding)
    kernel = weight.shape[-1]
    y = np.zeros((len(x), len(weight), *size), dtype=np.result_type(x, weight))
    for i, j, tap in _taps(_pad(x, padding), kernel, stride, size):
        y += linear(tap, weight[:, :, i, j])
    return y if bias is None else y + bias[:, None, None]


def conv2d_vjp(
    cotangent: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int = 1,
    padding: Padding = NO_PADDING,
) -> AffineGradients:
    """Compute the gradients tap by tap, with `linear_vjp`: each tap is a `linear` map of a shifted view of x."""
    size = _check_conv2d(x, weight, bias, stride, padding)
    check_same_shape("cotangent", cotangent, (len(x), len(weight), *size), "the output")
    kernel = weight.shape[-1]
    padded = _pad(x, padding)
    grad_padded, grad_weight = np.zeros_like(padded, dtype=cotangent.dtype), np.empty_like(weight)
    views = _taps(grad_padded, kernel, stride, size)
    for (i, j, tap), (_, _, grad_tap) in zip(_taps(padded, kernel, stride, size), views, strict=True):
        gradients = linear_vjp(cotangent, tap, weight[:, :, i, j])
        grad_tap += gradients.x
        grad_weight[:, :, i, j] = gradients.params["weight"]
    grad_bias = None if bias is None else cotangent.sum(axis=(0, 2, 3))
    return AffineGradients(_crop(grad_padded, padding), _weight_and_bias(grad_weight, grad_bias))


def conv2d_macs(pixels: int, channels_in: int, channels_out: int, kernel: int) -> int:
    """Multiply-adds of `conv2d` for `pixels` = B·H'·W' output pixels."""
    return pixels * channels_in * channels_out * kernel**2


def _check_depthwise(x: Array, weight: Array, bias: Array | None, stride: int, padding: Padding) -> tuple[int, int]:
    size = _check_convolution(x, weight, bias, stride, padding)
    if weight.shape[:2] != (x.shape[1], 1):
        raise ShapeError(f"weight: expected (C={x.shape[1]}, 1, k, k), got {weight.shape}")
    return size


def depthwise_conv2d(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: Padding = NO_PADDING
) -> Array:
    """Convolve each channel with its own kernel: y[c, u] = Σ_ij W[c, 0, i, j] x[c, r u + (i, j)] + b[c].

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k).
        bias: (C,) or None.
        stride, padding: see `conv2d`.

    Raises:
        ShapeError, ConfigError: if a shape, a dtype or an option is wrong.
    """
    size = _check_depthwise(x, weight, bias, stride, padding)
    kernel = weight.shape[-1]
    y = np.zeros((*x.shape[:2], *size), dtype=np.result_type(x, weight))
    for i, j, tap in _taps(_pad(x, padding), kernel, stride, size):
        y += weight[:, :, i, j, None] * tap
    if bias is not None:
        y += bias[:, None, None]
    return y


def depthwise_conv2d_vjp(
    cotangent: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int = 1,
    padding: Padding = NO_PADDING,
) -> AffineGradients:
    """Compute the gradients tap by tap: ∂L/∂tap = W[i, j] ∂L/∂y, added to ∂L/∂x, and ∂L/∂W[i, j] = Σ ∂L/∂y · tap."""
    size = _check_depthwise(x, weight, bias, stride, padding)
    check_same_shape("cotangent", cotangent, (*x.shape[:2], *size), "the output")
    kernel = weight.shape[-1]
    padded = _pad(x, padding)
    grad_padded, grad_weight = np.zeros_like(padded, dtype=cotangent.dtype), np.empty_like(weight)
    views = _taps(grad_padded, kernel, stride, size)
    for (i, j, tap), (_, _, grad_tap) in zip(_taps(padded, kernel, stride, size), views, strict=True):
        grad_tap += weight[:, :, i, j, None] * cotangent
        grad_weight[:, 0, i, j] = np.einsum("bchw,bchw->c", cotangent, tap)
    grad_bias = None if bias is None else cotangent.sum(axis=(0, 2, 3))
    return AffineGradients(_crop(grad_padded, padding), _weight_and_bias(grad_weight, grad_bias))


def depthwise_conv2d_macs(pixels: int, channels: int, kernel: int) -> int:
    """Multiply-adds of `depthwise_conv2d` for `pixels` = B·H'·W' output pixels."""
    return pixels * channels * kernel**2


# ------------------------------------------------------------------------------------------------ layer norm


def _standardize(x: Array) -> tuple[Array, Array]:
    """Return x standardized to mean 0 and variance 1 over the channels, and the factor 1/√(variance + ε)."""
    centered = x - x.mean(axis=1, keepdims=True)
    variance = np.square(centered).mean(axis=1, keepdims=True)
    inverse_deviation = 1 / np.sqrt(variance + x.dtype.type(LAYER_NORM_EPSILON))
    return centered * inverse_deviation, inverse_deviation


def _check_layer_norm(x: Array, weight: Array, bias: Array) -> None:
    check_array("x", x, {"B": None, "C": None, "H": None, "W": None})
    check_array("weight", weight, {"C": x.shape[1]})
    check_array("bias", bias, {"C": x.shape[1]})


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """Normalize the channels of each pixel: y = γ (x - mean) / √(variance + ε) + β.

    Args:
        x: (B, C, H, W).
        weight: γ (C,).
        bias: β (C,).

    Raises:
        ShapeError: if a shape or a dtype is wrong.
    """
    _check_layer_norm(x, weight, bias)
    return _standardize(x)[0] * weight[:, None, None] + bias[:, None, None]


def layer_norm_vjp(cotangent: Array, x: Array, weight: Array, bias: Array) -> AffineGradients:
    """Compute the gradients of `layer_norm`.

    With x̂ the standardized input, g = γ ∂L/∂y, and sums over batch and pixels:

        ∂L/∂x = (g - mean(g) - x̂ mean(g x̂)) / √(variance + ε),      ∂L/∂γ = Σ x̂ ∂L/∂y,      ∂L/∂β = Σ ∂L/∂y.
    """
    _check_layer_norm(x, weight, bias)
    check_same_shape("cotangent", cotangent, x.shape, "x")
    standardized, inverse_deviation = _standardize(x)
    grad_standardized = cotangent * weight[:, None, None]
    mean = grad_standardized.mean(axis=1, keepdims=True)
    slope = (grad_standardized * standardized).mean(axis=1, keepdims=True)
    grad_x = (grad_standardized - mean - standardized * slope) * inverse_deviation
    grad_weight = (cotangent * standardized).sum(axis=(0, 2, 3))
    return AffineGradients(grad_x, {"weight": grad_weight, "bias": cotangent.sum(axis=(0, 2, 3))})


# ------------------------------------------------------------------------------------------------ pointwise


def gelu(x: Array) -> Array:
    """Exact Gaussian error linear unit: x Φ(x), with Φ the standard normal distribution function."""
    check_dtype("x", x)
    return x * _normal_cdf(x)


def gelu_vjp(cotangent: Array, x: Array) -> Array:
    """Gradient of `gelu`: d/dx x Φ(x) = Φ(x) + x φ(x), with φ the standard normal density."""
    check_dtype("x", x)
    check_same_shape("cotangent", cotangent, x.shape, "x")
    density = np.exp(-x * x / 2) * x.dtype.type(1 / np.sqrt(2 * np.pi))
    return cotangent * (_normal_cdf(x) + x * density)


def _normal_cdf(x: Array) -> Array:
    half = x.dtype.type(0.5)
    return half + half * erf(x * x.dtype.type(np.sqrt(0.5)))


def softmax(logits: Array) -> Array:
    """Softmax over the last axis: exp(l_n) / Σ_m exp(l_m). A logit of -inf gets weight 0."""
    check_dtype("logits", logits)
    if logits.ndim == 0:
        raise ShapeError("logits: expected (..., N), got ()")
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=-1, keepdims=True)


def softmax_vjp(cotangent: Array, weights: Array) -> Array:
    """Gradient of `softmax`: ∂L/∂l_n = a_n (∂L/∂a_n - Σ_m a_m ∂L/∂a_m)."""
    check_dtype("weights", weights)
    check_same_shape("cotangent", cotangent, weights.shape, "weights")
    return weights * (cotangent - (weights * cotangent).sum(axis=-1, keepdims=True))


# ------------------------------------------------------------------------------------------------ gather and scatter


def scatter_add(values: Array, rows: Array, count: int) -> Array:
    """Transpose of a gather: out[r] = Σ values[n] over all n with rows[n] = r.

    ``gathered = table[rows]`` is the product of a 0/1 matrix and the table. Its gradient is the product of the
    transposed matrix and the cotangent.

    Args:
        values: (N, C).
        rows: indices (N,), integers in [0, count).

    Returns:
        (count, C).

    Raises:
        ShapeError: if a shape or a dtype is wrong, or an index is outside [0, count).
    """
    check_array("values", values, {"N": None, "C": None})
    if rows.shape != (len(values),) or rows.dtype.kind not in "iu":
        raise ShapeError(f"rows: expected (N={len(values)},) integers, got {rows.shape} {rows.dtype}")
    if rows.size and not 0 <= rows.min() <= rows.max() < count:
        raise ShapeError(f"rows: expected indices in [0, {count}), got {rows.min()} to {rows.max()}")
    ones, row_starts = np.ones(len(rows), dtype=values.dtype), np.arange(len(rows) + 1)
    gather_matrix = csr_array((ones, rows, row_starts), shape=(len(rows), count))
    return gather_matrix.T @ values
