"""Offset network θ and offset bounds: `dat_ref.ops.offsets` on tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import ConfigError
from ...config import OffsetBound
from ...conventions import Convention
from .._checks import check_tensors
from ._dtypes import wide_layer_norm, wide_linear
from ._symbolic import statically_zero
from .grid import Padding, Size

LAYER_NORM_EPSILON = 1e-5


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: Padding = ((0, 0), (0, 0))
) -> Tensor:
    """Convolve each channel with its own kernel.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k).
        bias: (C,) or None.
        stride: stride in pixels.
        padding: zero padding, ((top, bottom), (left, right)).
    """
    check_tensors(x=x, weight=weight, bias=bias)
    (top, bottom), (left, right) = padding
    if statically_zero(top - bottom, left - right):
        return F.conv2d(x, weight, bias, stride=stride, padding=(top, left), groups=x.shape[1])
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride=stride, groups=x.shape[1])


def offset_network(
    queries: Tensor, params: dict[str, dict[str, Tensor]], *, stride: int, padding: Padding, groups: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict raw offsets Δ from the queries around each key cell.

    The depthwise convolution is computed in the queries' dtype. The other steps are computed in float32 or wider: they
    are cheap, and they define the sampling positions.

    Args:
        queries: (B·G, C/G, H, W); or (B, C, H, W) with ``groups=G``.
        params: ``depthwise`` weight (C/G, 1, k, k) and bias; ``norm`` weight and bias; ``pointwise`` weight (2, C/G),
            or (2N, C/G) for N points per key cell.
        stride: stride of the depthwise convolution in pixels.
        padding: its zero padding, see `offset_padding`.
        groups: G if `queries` is (B, C, H, W).

    Returns:
        raw offsets (B·G, 2 or 2N, Hk, Wk), channel 0 is y, float32 or wider; and the intermediates ``queries``
        (B·G, C/G, H, W) and ``windows``, ``normed``, ``activated``, each (B·G, C/G, Hk, Wk).
    """
    check_tensors(queries=queries)
    return predict_offsets(
        queries,
        partial(depthwise_conv2d, **params["depthwise"], stride=stride, padding=padding),
        partial(wide_layer_norm, **params["norm"], epsilon=LAYER_NORM_EPSILON),
        partial(wide_linear, **params["pointwise"]),
        groups=groups,
    )


Layer = Callable[[Tensor], Tensor]


def predict_offsets(
    queries: Tensor, depthwise: Layer, norm: Layer, pointwise: Layer, *, groups: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `offset_network` from its layers.

    Args:
        queries: (B, C, H, W) with G groups of channels.
        depthwise: convolution with padding, (B·G, C/G, H, W) → (B·G, C/G, Hk, Wk).
        norm: layer norm over the last axis, in float32 or wider.
        pointwise: projection of the last axis, in float32 or wider.
        groups: G.
    """
    grouped = split_groups(queries, groups)
    windows = depthwise(grouped)
    normed = norm(windows.permute(0, 2, 3, 1))  # (B·G, Hk, Wk, C/G)
    activated = F.gelu(normed)
    raw = pointwise(activated).permute(0, 3, 1, 2)
    maps = {"normed": normed.permute(0, 3, 1, 2), "activated": activated.permute(0, 3, 1, 2)}
    return raw, {"queries": grouped, "windows": windows, **maps}


def split_groups(x: Tensor, groups: int) -> Tensor:
    """Move the groups of channels to the batch axis: (B, C, H, W) → (B·G, C/G, H, W), in channels_last layout."""
    if groups == 1:
        return x
    split = x.permute(0, 2, 3, 1).unflatten(3, (groups, x.shape[1] // groups))  # (B, H, W, G, C/G)
    return split.permute(0, 3, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


def offset_limit(offset_range: float, key_size: Size, convention: Convention) -> tuple[float, float]:
    """Return the maximum offset of ``TANH_CELLS`` on each axis, normalized: s/2 times the spacing of the key grid."""
    gap = convention.value.reference.gap
    return offset_range / max(key_size[0] - gap, 1), offset_range / max(key_size[1] - gap, 1)


def bound_offsets(
    raw: Tensor, reference: Tensor, bound: OffsetBound, *, offset_range: float, convention: Convention
) -> tuple[Tensor, Tensor]:
    """Move the reference points by bounded offsets.

    Args:
        raw: raw offsets Δ (B, G, Hk, Wk, 2), the network's output.
        reference: p (Hk, Wk, 2), normalized.
        bound: see `OffsetBound`.
        offset_range: s; with ``TANH_CELLS`` a point moves at most s/2 key cells in each direction.
        convention: geometry of the key grid.

    Returns:
        (offsets, points), both (B, G, Hk, Wk, 2), normalized.

    Raises:
        ConfigError: if a reference is infinite (a single key in ``DATPP2023``) and the bound does not make it finite.
    """
    check_tensors(raw=raw, reference=reference)
    reference = reference.to(raw.dtype)
    key_size = (reference.shape[0], reference.shape[1])
    if bound in (OffsetBound.TANH_CELLS, OffsetBound.RAW):
        _check_finite(key_size, bound, convention)
    if bound is OffsetBound.TANH_CELLS:
        limit_y, limit_x = offset_limit(offset_range, key_size, convention)
        y, x = torch.tanh(raw).unbind(-1)
        offsets = torch.stack((limit_y * y, limit_x * x), dim=-1)
        return offsets, reference + offsets
    if bound is OffsetBound.TANH_COORDINATES:
        return raw, torch.tanh(reference + raw)
    if bound is OffsetBound.CLAMP:
        return raw, torch.clamp(reference + raw, -1, 1)
    if bound is OffsetBound.RAW:
        return raw, reference + raw
    if bound is not OffsetBound.NONE:
        raise ConfigError(f"bound: expected OffsetBound, got {bound!r}")
    return torch.zeros_like(raw), torch.clamp(reference.expand(raw.shape), -1, 1)


def _check_finite(key_size: Size, bound: OffsetBound, convention: Convention) -> None:
    spacing = convention.value.reference
    if spacing.degenerate == float("inf") and spacing.gap in key_size:
        raise ConfigError(
            f"offset_bound: {convention.name} puts a single key at infinity (the release divides by zero), and only a "
            f"bound on coordinates brings it back, got {bound.name}; use a smaller stride or another convention"
        )
