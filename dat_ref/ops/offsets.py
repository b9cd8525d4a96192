"""From queries to points: the offset network θ, and the bound on how far it may move a reference point.

    Δ = θ(q) = W₂ · GELU(LayerNorm(DWConv_k×k, stride r (q)))        one network, shared by the G groups
    p̃ = bound(p, Δ)                                                   see `OffsetBound`

W₂ has no bias: zero activations mean zero offsets (the depthwise convolution and the norm have biases, though). The
article's figure shows no layer norm; both releases have one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._checks import Array, ConfigError, Tree
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
from .grid import Size

# ------------------------------------------------------------------------------------------------ the network


@dataclass(frozen=True)
class OffsetNetworkTrace:
    """Intermediates of `offset_network`, each (B·G, C/G, Hk, Wk) but for the input."""

    queries: Array  # (B·G, C/G, H, W)
    windows: Array
    normed: Array
    activated: Array


def offset_network(queries: Array, params: Tree, *, stride: int, padding: Padding) -> tuple[Array, OffsetNetworkTrace]:
    """Predict raw offsets Δ from the queries around each key cell.

    Args:
        queries: (B·G, C/G, H, W), the query map cut into its groups.
        params: ``depthwise`` weight (C/G, 1, k, k) and bias; ``norm`` weight and bias; ``pointwise`` weight (2, C/G).

    Returns:
        raw offsets (B·G, 2, Hk, Wk), channel 0 is y, and the trace.
    """
    windows = depthwise_conv2d(queries, **params["depthwise"], stride=stride, padding=padding)
    normed = layer_norm(windows, **params["norm"])
    activated = gelu(normed)
    return linear(activated, **params["pointwise"]), OffsetNetworkTrace(queries, windows, normed, activated)


def offset_network_vjp(
    cotangent: Array, trace: OffsetNetworkTrace, params: Tree, *, stride: int, padding: Padding
) -> tuple[Array, Tree]:
    """The four steps backwards: returns (∂L/∂queries, ∂L/∂params)."""
    pointwise = linear_vjp(cotangent, trace.activated, **params["pointwise"])
    grad_normed = gelu_vjp(pointwise.x, trace.normed)
    norm = layer_norm_vjp(grad_normed, trace.windows, **params["norm"])
    depthwise = depthwise_conv2d_vjp(norm.x, trace.queries, **params["depthwise"], stride=stride, padding=padding)
    grads = {"depthwise": depthwise.params, "norm": norm.params, "pointwise": pointwise.params}
    return depthwise.x, grads


def offset_network_macs(
    batch: int, size: Size, group_dim: int, groups: int, kernel: int, stride: int, padding: Padding
) -> int:
    """Multiply-adds: (k² + 2) · Ns · C, the article's last term; norm and GELU are not counted there."""
    height, width = conv_size(size, kernel, stride, padding)
    pixels = batch * groups * height * width
    return depthwise_conv2d_macs(pixels, group_dim, kernel) + linear_macs(pixels, group_dim, 2)


# ------------------------------------------------------------------------------------------------ the bound


def offset_limit(offset_range: float, key_size: Size, convention: Convention) -> Array:
    """Return the largest offset of ``TANH_CELLS`` on each axis, normalised: (s/2) · pitch of the key grid, (2,).

    In pixels that is s/2 key cells: an s × s region around each reference point.
    """
    return np.array([offset_range / 2 * convention.reference.pitch(count) for count in key_size])


def bound_offsets(
    raw: Array, reference: Array, bound: OffsetBound, *, offset_range: float, convention: Convention
) -> tuple[Array, Array]:
    """Move the reference points by bounded offsets.

    Args:
        raw: Δ (B, G, Hk, Wk, 2), the network's output.
        reference: p (Hk, Wk, 2), normalised.
        bound: see `OffsetBound`.
        offset_range: s, the width in key cells of the region that ``TANH_CELLS`` leaves to a point.

    Returns:
        (offsets, points), both (B, G, Hk, Wk, 2), normalised. `offsets` is what is added to the reference:
        bounded already for ``TANH_CELLS``, raw where the bound acts on the sum.

    Raises:
        ConfigError: if a reference is infinite (a single key under ``DATPP2023``) and the bound cannot bring it back.
    """
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

    With tanh' = 1 - tanh². The clamp passes the gradient where -1 ≤ p + Δ ≤ 1 and stops it outside: points that
    it holds on the border do not learn to leave it.
    """
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
    """Return the share of offset components that the bound holds: beyond 99 % of a tanh's limit, or clamped."""
    reference = reference.astype(offsets.dtype)
    if bound is OffsetBound.TANH_CELLS:
        limit = offset_limit(offset_range, reference.shape[:2], convention)
        held = np.abs(offsets) >= 0.99 * limit if offset_range else np.zeros(offsets.shape, dtype=bool)
    elif bound is OffsetBound.TANH_COORDINATES:
        held = np.abs(np.tanh(reference + offsets)) >= 0.99
    elif bound is OffsetBound.CLAMP:
        held = np.abs(reference + offsets) > 1
    else:
        held = np.zeros(offsets.shape, dtype=bool)
    return float(held.mean()) if held.size else 0.0
