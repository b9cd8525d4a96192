"""Offset network θ, which predicts offsets from the queries, and the bound on the offsets.

    Δ = θ(q) = W₂ · GELU(LayerNorm(DWConv_k×k, stride r (q)))        one network, shared by the G groups
    p̃ = bound(p, Δ)                                                   see `OffsetBound`

W₂ has no bias, so zero activations give zero offsets. The depthwise convolution and the norm have biases. The paper's
figure shows no layer norm; both releases have one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._checks import Array, ConfigError, ShapeError, Tree, check_array, check_dtype, check_same_shape, member, real
from ..config import OffsetBound
from ..conventions import Convention
from .basic import (
    Padding,
    conv_size,
    depthwise_conv2d,
    depthwise_conv2d_macs,
    depthwise_conv2d_vjp,
    gelu,
    gelu_vjp,
    layer_norm,
    layer_norm_vjp,
    linear,
    linear_macs,
    linear_vjp,
)
from .grid import Size, check_convention

# ------------------------------------------------------------------------------------------------ network


@dataclass(frozen=True)
class OffsetNetworkTrace:
    """Intermediates of `offset_network`, (B·G, C/G, Hk, Wk) except for the input."""

    queries: Array  # (B·G, C/G, H, W)
    windows: Array  # output of the depthwise convolution
    normed: Array
    activated: Array


def offset_network(queries: Array, params: Tree, *, stride: int, padding: Padding) -> tuple[Array, OffsetNetworkTrace]:
    """Predict raw offsets Δ from the queries around each key cell.

    Args:
        queries: query map split into groups, (B·G, C/G, H, W).
        params: ``depthwise`` weight (C/G, 1, k, k) and bias; ``norm`` weight and bias; ``pointwise`` weight (2, C/G).

    Returns:
        raw offsets Δ (B·G, 2, Hk, Wk), channel order (y, x), and the trace.

    Raises:
        ShapeError, ConfigError: if a shape, a dtype or an option is wrong.
    """
    check_array("queries", queries, {"B·G": None, "C/G": len(params["depthwise"]["weight"]), "H": None, "W": None})
    windows = depthwise_conv2d(queries, **params["depthwise"], stride=stride, padding=padding)
    normed = layer_norm(windows, **params["norm"])
    activated = gelu(normed)
    return linear(activated, **params["pointwise"]), OffsetNetworkTrace(queries, windows, normed, activated)


def offset_network_vjp(
    cotangent: Array, trace: OffsetNetworkTrace, params: Tree, *, stride: int, padding: Padding
) -> tuple[Array, Tree]:
    """Return (∂L/∂queries, ∂L/∂params), from the four steps in reverse."""
    pointwise = linear_vjp(cotangent, trace.activated, **params["pointwise"])
    grad_normed = gelu_vjp(pointwise.x, trace.normed)
    norm = layer_norm_vjp(grad_normed, trace.windows, **params["norm"])
    depthwise = depthwise_conv2d_vjp(norm.x, trace.queries, **params["depthwise"], stride=stride, padding=padding)
    grads = {"depthwise": depthwise.params, "norm": norm.params, "pointwise": pointwise.params}
    return depthwise.x, grads


def offset_network_macs(
    batch: int, size: Size, group_dim: int, groups: int, kernel: int, stride: int, padding: Padding
) -> int:
    """Multiply-adds of `offset_network`: (k² + 2) · Ns · C, the paper's last term, without norm and GELU."""
    height, width = conv_size(size, kernel, stride, padding)
    pixels = batch * groups * height * width
    return depthwise_conv2d_macs(pixels, group_dim, kernel) + linear_macs(pixels, group_dim, 2)


# ------------------------------------------------------------------------------------------------ bound


_BOUND, _RANGE = member(OffsetBound), real(0, rule="a width in key cells")


def _check_offsets(name: str, offsets: Array, reference: Array, convention: Convention) -> None:
    check_array("reference", reference, {"Hk": None, "Wk": None, "(y, x)": 2})
    check_dtype(name, offsets)
    if offsets.shape[-3:] != reference.shape:
        rows, columns, _ = reference.shape
        raise ShapeError(f"{name}: expected (B, G, Hk={rows}, Wk={columns}, (y, x)=2), got {offsets.shape}")
    check_convention(convention)


def offset_limit(offset_range: float, key_size: Size, convention: Convention) -> Array:
    """Return the maximum offset of ``TANH_CELLS`` on each axis, normalized: (s/2) · pitch of the key grid, (2,).

    In pixels this is s/2 key cells. Each point stays in a region of s × s key cells around its reference point.
    """
    _RANGE("offset_range", offset_range)
    check_convention(convention)
    return np.array([offset_range / 2 * convention.reference.pitch(count) for count in key_size])


def bound_offsets(
    raw: Array, reference: Array, bound: OffsetBound, *, offset_range: float, convention: Convention
) -> tuple[Array, Array]:
    """Move the reference points by bounded offsets.

    Args:
        raw: raw offsets Δ (B, G, Hk, Wk, 2), order (y, x), output of the offset network.
        reference: reference points p (Hk, Wk, 2), order (y, x), normalized.
        bound: see `OffsetBound`.
        offset_range: s of ``TANH_CELLS``, twice the maximum offset in key cells.
        convention: coordinate convention.

    Returns:
        (offsets, points), both (B, G, Hk, Wk, 2), normalized. `offsets` is the term added to the reference point:
        bounded for ``TANH_CELLS``, raw where the bound acts on the sum.

    Raises:
        ShapeError: if a shape or a dtype is wrong.
        ConfigError: if an option is wrong, or a point would be infinite (a single key under ``DATPP2023`` without a
            bound on coordinates).
    """
    _check_offsets("raw", raw, reference, convention)
    bound, offset_range = _BOUND("bound", bound), _RANGE("offset_range", offset_range)
    reference = reference.astype(raw.dtype)
    if bound in (OffsetBound.TANH_CELLS, OffsetBound.RAW) and not np.isfinite(reference).all():
        raise ConfigError(
            f"offset_bound: {convention.name} puts a single key at infinity (the release divides by zero), and only a "
            f"bound on coordinates brings it back, got {bound.name}; use a smaller stride or another convention"
        )
    if bound is OffsetBound.TANH_CELLS:
        limit = offset_limit(offset_range, reference.shape[:2], convention).astype(raw.dtype)
        offsets = limit * np.tanh(raw)
        return offsets, reference + offsets
    if bound is OffsetBound.TANH_COORDINATES:
        return raw, np.tanh(reference + raw)
    if bound is OffsetBound.CLAMP:
        return raw, np.clip(reference + raw, -1, 1)
    if bound is OffsetBound.RAW:
        return raw, reference + raw
    return np.zeros_like(raw), np.clip(np.broadcast_to(reference, raw.shape), -1, 1)


def bound_offsets_vjp(
    cotangent: Array,
    raw: Array,
    reference: Array,
    bound: OffsetBound,
    *,
    offset_range: float,
    convention: Convention,
) -> Array:
    """Return ∂L/∂Δ from ∂L/∂p̃.

    The derivative of tanh is 1 - tanh². The clamp passes the gradient where -1 ≤ p + Δ ≤ 1 and blocks it elsewhere:
    a clamped point cannot learn to leave the border.
    """
    _check_offsets("raw", raw, reference, convention)
    check_same_shape("cotangent", cotangent, raw.shape, "raw")
    bound, offset_range = _BOUND("bound", bound), _RANGE("offset_range", offset_range)
    reference = reference.astype(raw.dtype)
    if bound is OffsetBound.TANH_CELLS:
        limit = offset_limit(offset_range, reference.shape[:2], convention).astype(raw.dtype)
        return cotangent * limit * (1 - np.square(np.tanh(raw)))
    if bound is OffsetBound.TANH_COORDINATES:
        return cotangent * (1 - np.square(np.tanh(reference + raw)))
    if bound is OffsetBound.CLAMP:
        return cotangent * (np.abs(reference + raw) <= 1)
    if bound is OffsetBound.RAW:
        return cotangent
    return np.zeros_like(cotangent)


def share_at_bound(
    offsets: Array, reference: Array, bound: OffsetBound, *, offset_range: float, convention: Convention
) -> float:
    """Return the fraction of offset components at their bound: at least 99 % of a tanh's limit, or clamped."""
    _check_offsets("offsets", offsets, reference, convention)
    bound, offset_range = _BOUND("bound", bound), _RANGE("offset_range", offset_range)
    reference = reference.astype(offsets.dtype)
    if bound is OffsetBound.TANH_CELLS:
        limit = offset_limit(offset_range, reference.shape[:2], convention)
        at_bound = np.abs(offsets) >= 0.99 * limit if offset_range else np.zeros(offsets.shape, dtype=bool)
    elif bound is OffsetBound.TANH_COORDINATES:
        at_bound = np.abs(np.tanh(reference + offsets)) >= 0.99
    elif bound is OffsetBound.CLAMP:
        at_bound = np.abs(reference + offsets) > 1
    else:
        at_bound = np.zeros(offsets.shape, dtype=bool)
    return float(at_bound.mean()) if at_bound.size else 0.0
