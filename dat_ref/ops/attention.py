"""Scaled dot-product attention, and attention over sampled keys with a position bias.

    z = softmax(q k̃ᵀ / √d + B) ṽ        for each head

Fast implementations compute `deformable_attention` in one pass. It has five gradients: with respect to the queries,
keys, values, bias table and points. The gradient of the points in this file comes from the bias alone. Their gradient
through the keys and values comes from `bilinear_sample`, one step earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._checks import (
    Array,
    ConfigError,
    ShapeError,
    check_array,
    check_divides,
    check_dtype,
    check_same_shape,
    integer,
    size_pair,
)
from ..config import CHECK_RESOLUTION, BiasResolution
from ..conventions import Convention
from .basic import softmax, softmax_vjp
from .bias import table_bias, table_bias_vjp
from .grid import Size, check_convention


def split_heads(x: Array, heads: int) -> Array:
    """Split channels into heads: (B, C, H, W) or (B, C, N) → (B, heads, N, C/heads)."""
    check_dtype("x", x)
    if x.ndim not in (3, 4):
        raise ShapeError(f"x: expected (B, C, H, W) or (B, C, N), got {x.shape}")
    check_divides("heads", integer()("heads", heads), "C", x.shape[1])
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, math.prod(x.shape[2:])).swapaxes(2, 3)


def merge_heads(x: Array, size: Size) -> Array:
    """Merge heads into a feature map: (B, heads, H·W, d) → (B, heads·d, H, W)."""
    check_array("x", x, {"B": None, "heads": None, "H·W": math.prod(size), "d": None})
    return x.swapaxes(2, 3).reshape(x.shape[0], x.shape[1] * x.shape[3], *size)


def attend(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> tuple[Array, Array]:
    """Scaled dot-product attention with an additive bias.

    Args:
        q: queries (..., M, d).
        k, v: keys and values (..., N, d).
        bias: additive bias of the logits, broadcastable to (..., M, N), or None; -inf masks a key.
        scale: factor on the dot products, usually d^(-1/2).

    Returns:
        output (..., M, d) and attention weights (..., M, N). Each row of weights sums to one.

    Raises:
        ShapeError: if a shape or a dtype is wrong.
    """
    _check_attend(q, k, v)
    if bias is not None:
        check_dtype("bias", bias)
        logits_shape = (*q.shape[:-1], k.shape[-2])
        if not _broadcasts(bias.shape, logits_shape):
            raise ShapeError(
                f"bias: expected a shape that broadcasts to (..., M, N) = {logits_shape}, got {bias.shape}"
            )
    logits = (q * q.dtype.type(scale)) @ k.swapaxes(-1, -2)
    if bias is not None:
        logits = logits + bias
    weights = softmax(logits)
    return weights @ v, weights


def _check_attend(q: Array, k: Array, v: Array) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, value)
        if value.ndim < 2 or value.shape[:-2] != q.shape[:-2]:
            raise ShapeError(
                f"{name}: expected at least two axes and the leading axes of q, {q.shape}, got {value.shape}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ShapeError(f"k: expected (..., N, d={q.shape[-1]}), got {k.shape}")
    if v.shape[-2] != k.shape[-2]:
        raise ShapeError(f"v: expected (..., N={k.shape[-2]}, d), got {v.shape}")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    return all(size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False))


class AttendGradients(NamedTuple):
    """Gradients of `attend`."""

    q: Array
    k: Array
    v: Array
    bias: Array  # (..., M, N), not summed over the broadcast axes of the bias


def attend_vjp(cotangent: Array, q: Array, k: Array, v: Array, weights: Array, scale: float) -> AttendGradients:
    """Compute the gradients of `attend`.

    With A the attention weights and S the logits:

        ∂L/∂V = Aᵀ ∂L/∂Z,      ∂L/∂A = ∂L/∂Z Vᵀ,         ∂L/∂S = softmax_vjp(∂L/∂A, A),
        ∂L/∂Q = ∂L/∂S K/√d,    ∂L/∂K = (∂L/∂S)ᵀ Q/√d,    ∂L/∂B = ∂L/∂S.
    """
    _check_attend(q, k, v)
    check_same_shape("weights", weights, (*q.shape[:-1], k.shape[-2]), "the logits")
    check_same_shape("cotangent", cotangent, (*q.shape[:-1], v.shape[-1]), "the output")
    grad_logits = softmax_vjp(cotangent @ v.swapaxes(-1, -2), weights)
    return AttendGradients(
        q=(grad_logits @ k) * q.dtype.type(scale),
        k=(grad_logits.swapaxes(-1, -2) @ q) * q.dtype.type(scale),
        v=weights.swapaxes(-1, -2) @ cotangent,
        bias=grad_logits,
    )


def attend_macs(batch: int, queries: int, keys: int, channels: int) -> int:
    """Multiply-adds of q kᵀ and A v over all heads: 2 · M · N · C per image."""
    return 2 * batch * queries * keys * channels


def deformable_attention(
    q: Array,
    k: Array,
    v: Array,
    points: Array,
    bias_table: Array | None,
    *,
    query_size: Size,
    convention: Convention,
    scale: float | None = None,
    resolution: BiasResolution = "fractions",
) -> Array:
    """Attend to sampled keys, with a relative position bias sampled at their continuous positions.

    Args:
        q: queries (B, heads, H·W, d).
        k, v: keys and values (B, heads, Ns, d), projected from the features sampled at `points`.
        points: sampling points (B, G, Ns, 2), order (y, x), normalized coordinates of the convention. Group g serves
            the heads [g·heads/G, (g+1)·heads/G).
        bias_table: (heads, 2H-1, 2W-1), or None for no bias. A table for another map size is rescaled by `resolution`.
        query_size: (H, W) of the query map.
        convention: coordinate convention.
        scale: factor on the dot products, d^(-1/2) if None.
        resolution: see `DeformableAttentionConfig.bias_resolution`.

    Returns:
        output (B, heads, H·W, d).

    Raises:
        ShapeError, ConfigError: if the shapes do not match, or an option is wrong.
    """
    query_size = size_pair("query_size", query_size)
    check_core(check_array, q, k, v, points, bias_table, query_size)
    check_options(convention, resolution)
    bias = None
    if bias_table is not None:
        bias = table_bias(bias_table, points, query_size=query_size, convention=convention, resolution=resolution)
    return attend(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)[0]


class CoreGradients(NamedTuple):
    """Gradients of `deformable_attention`. Without a bias table, `bias_table` is None and `points` is zero."""

    q: Array
    k: Array
    v: Array
    points: Array
    bias_table: Array | None


def deformable_attention_vjp(
    cotangent: Array,
    q: Array,
    k: Array,
    v: Array,
    points: Array,
    bias_table: Array | None,
    *,
    query_size: Size,
    convention: Convention,
    scale: float | None = None,
    resolution: BiasResolution = "fractions",
) -> CoreGradients:
    """Return the five gradients of `deformable_attention`."""
    query_size = size_pair("query_size", query_size)
    check_core(check_array, q, k, v, points, bias_table, query_size)
    check_options(convention, resolution)
    check_same_shape("cotangent", cotangent, (*q.shape[:-1], v.shape[-1]), "the output")
    geometry: dict[str, Any] = {"query_size": query_size, "convention": convention, "resolution": resolution}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias_table is None else table_bias(bias_table, points, **geometry)
    _, weights = attend(q, k, v, bias, scale)
    grads = attend_vjp(cotangent, q, k, v, weights, scale)
    if bias_table is None:
        return CoreGradients(grads.q, grads.k, grads.v, np.zeros_like(points), None)
    through_bias = table_bias_vjp(grads.bias, bias_table, points, **geometry)
    return CoreGradients(grads.q, grads.k, grads.v, through_bias.points, through_bias.table)


def check_options(convention: Convention, resolution: BiasResolution) -> None:
    """Raise `ConfigError` if an option of `deformable_attention` is wrong."""
    check_convention(convention)
    CHECK_RESOLUTION("resolution", resolution)


def check_core(
    check: Callable[..., Any], q: Any, k: Any, v: Any, points: Any, bias_table: Any, query_size: Size
) -> None:
    """Raise if the shapes of the arguments of `deformable_attention` do not match.

    Args:
        check: `check_array`, or its counterpart for tensors.
    """
    height, width = query_size
    check("q", q, {"B": None, "heads": None, "H·W": height * width, "d": None})
    batch, heads, _, depth = q.shape
    check("k", k, {"B": batch, "heads": heads, "Ns": None, "d": depth})
    samples = k.shape[2]
    check("v", v, {"B": batch, "heads": heads, "Ns": samples, "d": depth})
    check("points", points, {"B": batch, "groups": None, "Ns": samples, "(y, x)": 2})
    if samples == 0:
        raise ShapeError(f"k: expected (B, heads, Ns, d) with Ns >= 1, got {tuple(k.shape)}")
    if points.shape[1] == 0 or heads % points.shape[1]:
        raise ConfigError(f"points: expected groups that divide heads={heads}, got {tuple(points.shape)}")
    if bias_table is not None:
        check("bias_table", bias_table, {"heads": heads, "2H-1": None, "2W-1": None})
        if bias_table.shape[1] % 2 == 0 or bias_table.shape[2] % 2 == 0:
            raise ShapeError(
                f"bias_table: expected ({heads}, 2H-1={2 * height - 1}, 2W-1={2 * width - 1}), odd on both axes, "
                f"got {tuple(bias_table.shape)}"
            )
