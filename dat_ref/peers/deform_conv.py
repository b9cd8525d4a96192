"""Deformable convolution: kernel taps displaced by predicted offsets (DCN v1) and modulated (DCN v2).

    y[o, u] = Σ_c Σ_k W[o, c, k] m[u, k] φ(x[c]; p[u, k]) + b[o],     p[u, k] = r u - pad + δ t_k + Δ[u, k]

t_k = (i, j) is tap k of the kernel, r the stride, δ the dilation, φ bilinear sampling with zeros outside; m = 1 in v1.
Every output pixel has its own points, so k² HW C elements are sampled. DAT's article starts from this cost. The weights
W do not depend on the sampled features; attention weights would.

`deform_conv2d` has torchvision's argument names, argument order and offset layout. The module below it predicts
offsets and modulation from the map with zero-initialized convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from .._checks import Array, ShapeError, Tree, boolean, check_array, check_divides, check_fields, check_map, integer
from ..config import DeformableAttentionConfig, PeerConfig
from ..ops.basic import Padding, conv2d, conv2d_macs, conv2d_vjp
from ..ops.grid import Size
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
from .memory import Macs, Tape, conv_workspace, sampling_workspace

Pair = int | tuple[int, int]  # one value for both axes, or (y, x)

# ------------------------------------------------------------------------------------------------ the operation


class ConvGeometry(NamedTuple):
    """Geometry of a convolution; every field is (y, x)."""

    kernel: Size
    stride: Size
    padding: Size
    dilation: Size

    def output_size(self, size: Size) -> Size:
        """Return (H', W') with H' = ⌊(H + 2 pad - δ (k - 1) - 1)/r⌋ + 1, and W' likewise."""
        height, width = (
            (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, pad, dilation in zip(size, *self, strict=True)
        )
        return height, width

    def lattice(self, output_size: Size) -> Array:
        """Return the tap positions without offsets, in pixels: (k_y·k_x, H', W', 2), (y, x)."""
        axes = [
            np.arange(count)[None, :] * stride - pad + np.arange(kernel)[:, None] * dilation
            for count, kernel, stride, pad, dilation in zip(output_size, *self, strict=True)
        ]
        rows, columns = axes[0][:, None, :, None], axes[1][None, :, None, :]
        points = np.stack(np.broadcast_arrays(rows, columns), axis=-1)  # (k_y, k_x, H', W', 2)
        return points.reshape(-1, *output_size, 2).astype(np.float64)


def _pair(value: Pair) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def deform_points(offset: Array, geometry: ConvGeometry) -> Array:
    """Return the sampling points of the taps, in pixels.

    Args:
        offset: offsets (B, G_o·K·2, H', W') in pixels; channels ordered by group, then tap, then (dy, dx), as in
            torchvision.

    Returns:
        Points (B, G_o, K, H', W', 2), (y, x), with K = k_y·k_x.
    """
    batch, _, height, width = offset.shape
    taps = geometry.kernel[0] * geometry.kernel[1]
    displacements = offset.reshape(batch, offset.shape[1] // (2 * taps), taps, 2, height, width).transpose(
        0, 1, 2, 4, 5, 3
    )
    displacements = displacements.astype(np.result_type(offset.dtype, np.float32), copy=False)
    return displacements + geometry.lattice((height, width)).astype(displacements.dtype)


def deform_conv2d(
    x: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Array | None = None,
) -> Array:
    """Convolve with displaced and, with a mask, modulated taps.

    Args:
        x: input map (B, C, H, W).
        offset: offsets (B, 2·G_o·k_y·k_x, H', W') in pixels, see `deform_points`; each of the G_o offset groups has
            C/G_o channels.
        weight: kernel (O, C/G, k_y, k_x) with G groups.
        bias: (O,) or None.
        stride, padding, dilation: one value for both axes, or (y, x).
        mask: modulation m, (B, G_o·k_y·k_x, H', W'), for version 2; None for version 1.

    Returns:
        The output (B, O, H', W'). With zero offsets and without a mask it is a plain convolution.

    Raises:
        ShapeError, ConfigError: if the shapes are inconsistent.
    """
    geometry = _check(x, offset, weight, bias, mask, stride, padding, dilation)
    columns = _columns(x, deform_points(offset, geometry), mask)  # (B, C, K, H'·W')
    y = _group_weight(weight, x) @ _by_group(columns, x.shape[1] // weight.shape[1])  # (B, G, O/G, H'·W')
    y = y.reshape(len(x), len(weight), *offset.shape[2:])
    return y if bias is None else y + bias[:, None, None]


def _check(
    x: Array,
    offset: Array,
    weight: Array,
    bias: Array | None,
    mask: Array | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> ConvGeometry:
    check_array("x", x, {"B": None, "C": None, "H": None, "W": None})
    check_array("weight", weight, {"O": None, "C/G": None, "k_y": None, "k_x": None})
    geometry = ConvGeometry((weight.shape[2], weight.shape[3]), _pair(stride), _pair(padding), _pair(dilation))
    height, width = geometry.output_size((x.shape[2], x.shape[3]))
    if min(height, width) < 1:
        raise ShapeError(f"weight: expected a kernel that fits into the padded map, got {weight.shape} on {x.shape}")
    check_divides("weight.shape[1] (channels per group)", weight.shape[1], "C", x.shape[1])
    check_divides("groups", x.shape[1] // weight.shape[1], "O", len(weight))
    taps = weight.shape[2] * weight.shape[3]
    check_array("offset", offset, {"B": len(x), "2·G_o·k_y·k_x": None, "H'": height, "W'": width})
    if offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ShapeError(f"offset: expected a multiple of 2·k_y·k_x={2 * taps} channels, got {offset.shape}")
    groups = offset.shape[1] // (2 * taps)
    check_divides("offset groups", groups, "C", x.shape[1])
    if bias is not None:
        check_array("bias", bias, {"O": len(weight)})
    if mask is not None:
        check_array("mask", mask, {"B": len(x), "G_o·k_y·k_x": groups * taps, "H'": height, "W'": width})
    return geometry


def _sample(x: Array, points: Array) -> Array:
    """Sample each offset group's channels at its points: (B, C, H, W) → (B, G_o, C/G_o, K, H'·W')."""
    batch, groups, taps = points.shape[:3]
    maps = x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])
    pixels = points.shape[3] * points.shape[4]
    sampled = bilinear_sample(maps, points.reshape(batch * groups, taps * pixels, 2))
    return sampled.reshape(batch, groups, x.shape[1] // groups, taps, pixels)


def _apply_mask(sampled: Array, mask: Array | None) -> Array:
    if mask is None:
        return sampled
    batch, groups, _, taps, pixels = sampled.shape
    return sampled * mask.reshape(batch, groups, 1, taps, pixels)


def _columns(x: Array, points: Array, mask: Array | None) -> Array:
    """Return the modulated sample of each tap: (B, C, K, H'·W')."""
    modulated = _apply_mask(_sample(x, points), mask)
    return modulated.reshape(len(x), x.shape[1], *modulated.shape[3:])


def _by_group(columns: Array, groups: int) -> Array:
    """Reshape (B, C, K, H'·W') → (B, G, C/G·K, H'·W')."""
    batch, channels, taps, pixels = columns.shape
    return columns.reshape(batch, groups, channels // groups * taps, pixels)


def _group_weight(weight: Array, x: Array) -> Array:
    """Reshape (O, C/G, k_y, k_x) → (G, O/G, C/G·K)."""
    groups = x.shape[1] // weight.shape[1]
    return weight.reshape(groups, len(weight) // groups, -1)


class DeformConvGradients(NamedTuple):
    """Gradients of `deform_conv2d`; None for a missing bias or mask."""

    x: Array
    offset: Array
    weight: Array
    bias: Array | None
    mask: Array | None


def deform_conv2d_vjp(
    cotangent: Array,
    x: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Array | None = None,
) -> DeformConvGradients:
    """Return the gradients of `deform_conv2d`.

    With the samples s and the columns c = m s: ∂L/∂W = Σ ∂L/∂y cᵀ, ∂L/∂c = Wᵀ ∂L/∂y, and ∂L/∂m = Σ s ∂L/∂c over the
    channels. The VJP of the sampling turns ∂L/∂s = m ∂L/∂c into the gradients of the map and of the offsets.
    """
    geometry = _check(x, offset, weight, bias, mask, stride, padding, dilation)
    points = deform_points(offset, geometry)
    batch, groups, taps, height, width, _ = points.shape
    sampled = _sample(x, points)
    weight_groups = x.shape[1] // weight.shape[1]

    grad_y = cotangent.reshape(batch, weight_groups, len(weight) // weight_groups, height * width)
    columns = _by_group(_apply_mask(sampled, mask).reshape(batch, x.shape[1], taps, height * width), weight_groups)
    grad_weight = np.einsum("bgop,bgcp->goc", grad_y, columns, optimize=True).reshape(weight.shape)
    grad_columns = (_group_weight(weight, x).swapaxes(1, 2) @ grad_y).reshape(sampled.shape)
    grad_mask = None
    if mask is not None:
        grad_mask = (grad_columns * sampled).sum(axis=2).reshape(mask.shape)

    maps = x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])
    grads = bilinear_sample_vjp(
        _apply_mask(grad_columns, mask).reshape(batch * groups, maps.shape[1], taps * height * width),
        maps,
        points.reshape(batch * groups, taps * height * width, 2),
    )
    grad_offset = grads.points_px.reshape(points.shape).transpose(0, 1, 2, 5, 3, 4).reshape(offset.shape)
    grad_bias = None if bias is None else cotangent.sum(axis=(0, 2, 3))
    return DeformConvGradients(grads.x.reshape(x.shape), grad_offset, grad_weight, grad_bias, grad_mask)


def deform_conv2d_macs(pixels: int, channels_in: int, channels_out: int, taps: int, groups: int = 1) -> int:
    """Return multiply-adds for `pixels` = B·H'·W' outputs, each 4 K C to sample and K C O/G to convolve.

    Products with the mask are not counted.
    """
    return bilinear_sample_macs(pixels * taps, channels_in) + pixels * taps * channels_in * channels_out // groups


# ------------------------------------------------------------------------------------------------ the module


@dataclass(frozen=True)
class DeformableConvConfig(PeerConfig):
    """Configuration of a deformable convolution that predicts its own offsets and replaces an attention layer.

    Args:
        kernel_size: odd kernel size k of the deformable convolution and of the offset and modulation predictors.
        groups: number of groups of the kernel.
        offset_groups: number of channel groups with separate offsets.
        modulated: whether to predict a modulation m = σ(convolution) as well (version 2).
    """

    kernel_size: int = 3
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True

    kind = "deformable_convolution"

    def __post_init__(self) -> None:
        check_fields(
            self,
            dim=integer(1),
            kernel_size=integer(1, "the map keeps its size", odd=True),
            groups=integer(),
            offset_groups=integer(),
            modulated=boolean,
        )
        check_divides("groups", self.groups, "dim", self.dim)
        check_divides("offset_groups", self.offset_groups, "dim", self.dim)

    @property
    def taps(self) -> int:
        """Number K = k² of points per output pixel and offset group."""
        return self.kernel_size**2


def deformable_conv_shapes(config: DeformableConvConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    dim, kernel = config.dim, config.kernel_size
    points = config.offset_groups * config.taps
    shapes: dict[str, Tree] = {
        "convolution": {"weight": (dim, dim // config.groups, kernel, kernel), "bias": (dim,)},
        "offset": {"weight": (2 * points, dim, kernel, kernel), "bias": (2 * points,)},
    }
    if config.modulated:
        shapes["modulation"] = {"weight": (points, dim, kernel, kernel), "bias": (points,)}
    return shapes


def deformable_conv_init(params: Tree, config: DeformableConvConfig, rng: np.random.Generator) -> None:
    """Initialize as released: zero offsets, and modulation σ(0) = 1/2."""
    for name in ("offset", "modulation"):
        for leaf in params.get(name, {}).values():
            leaf[:] = 0


@dataclass(frozen=True)
class DeformableConvTrace:
    """Intermediates of `deformable_conv`."""

    x: Array  # (B, C, H, W)
    offset: Array  # (B, 2·G_o·K, H, W), in pixels
    mask: Array | None  # (B, G_o·K, H, W), in (0, 1)
    points_px: Array  # (B, G_o, K, H, W, 2), (y, x), in pixels of the map


def _same_padding(config: DeformableConvConfig) -> Padding:
    half = config.kernel_size // 2
    return (half, half), (half, half)


def deformable_conv(x: Array, params: Tree, config: DeformableConvConfig) -> tuple[Array, DeformableConvTrace]:
    """Predict offsets (and modulation) from a map (B, C, H, W) and convolve it.

    Returns:
        The output (B, C, H, W) and the trace.
    """
    x = check_map("x", x, config.dim)
    offset = conv2d(x, **params["offset"], padding=_same_padding(config))
    mask = None
    if config.modulated:
        mask = expit(conv2d(x, **params["modulation"], padding=_same_padding(config)))
    half = config.kernel_size // 2
    y = deform_conv2d(x, offset, **params["convolution"], padding=half, mask=mask)
    geometry = ConvGeometry((config.kernel_size, config.kernel_size), (1, 1), (half, half), (1, 1))
    return y, DeformableConvTrace(x, offset, mask, deform_points(offset, geometry))


def deformable_conv_vjp(
    cotangent: Array, trace: DeformableConvTrace, params: Tree, config: DeformableConvConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params); x receives gradient through samples, offsets and modulation (σ' = σ (1 - σ))."""
    grads = deform_conv2d_vjp(
        cotangent, trace.x, trace.offset, **params["convolution"], padding=config.kernel_size // 2, mask=trace.mask
    )
    offset = conv2d_vjp(grads.offset, trace.x, **params["offset"], padding=_same_padding(config))
    grad_x = grads.x + offset.x
    grad_params: dict[str, Tree] = {
        "convolution": {"weight": grads.weight, "bias": grads.bias},
        "offset": offset.params,
    }
    if trace.mask is not None:
        grad_logits = grads.mask * trace.mask * (1 - trace.mask)
        modulation = conv2d_vjp(grad_logits, trace.x, **params["modulation"], padding=_same_padding(config))
        grad_x, grad_params["modulation"] = grad_x + modulation.x, modulation.params
    return grad_x, grad_params


def deformable_conv_macs(batch: int, size: Size, config: DeformableConvConfig) -> int:
    """Return multiply-adds: K HW C (C/G + 4), plus K HW C · (2 or 3) G_o K to predict offsets (and modulation)."""
    pixels, dim = batch * size[0] * size[1], config.dim
    predicted = (3 if config.modulated else 2) * config.offset_groups * config.taps
    predictor = conv2d_macs(pixels, dim, predicted, config.kernel_size)
    return predictor + deform_conv2d_macs(pixels, dim, dim, config.taps, config.groups)


# ------------------------------------------------------------------------------------------------ the row


def _terms(batch: int, size: Size, config: DeformableConvConfig) -> Macs:
    pixels = batch * math.prod(size)
    channels = (3 if config.modulated else 2) * config.offset_groups * config.taps
    parts = {
        "offset network": conv2d_macs(pixels, config.dim, channels, config.kernel_size),
        "sampling": bilinear_sample_macs(pixels * config.taps, config.dim),
    }
    return with_remainder("convolution", deformable_conv_macs(batch, size, config), parts)


def _memory(tape: Tape, batch: int, size: Size, config: DeformableConvConfig) -> None:
    """Record the memory steps; the K samples per map element are temporary."""
    pixels = batch * math.prod(size)
    points = pixels * config.offset_groups * config.taps
    for number in (2, 1) if config.modulated else (2,):  # offsets, modulation
        channels = (config.dim, number * config.offset_groups * config.taps)
        workspace = conv_workspace(batch, channels, size, config.kernel_size, 1, _same_padding(config))
        tape.step("offset network", number * points, workspace)
    elements, gathered = pixels * config.dim, pixels * config.taps * config.dim
    sampling = elements + gathered + sampling_workspace(points, config.dim // config.offset_groups, tape.itemsize)
    weighting = (3 if config.modulated else 2) * gathered
    with tape.temporary(2 * points, max(sampling, weighting)):
        tape.step("convolution", elements, elements)
    tape.step("offset network", 2 * points)


def _receptive_field(
    query: Pixel, size: Size, config: DeformableConvConfig, trace: DeformableConvTrace, image: int
) -> Array:
    check_traced_size(trace.x.shape[2:], size)
    return sampled_pixels(trace.points_px[image][:, :, query[0], query[1]], size)


def _candidates(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for side in odd_sizes(size):
        yield Candidate(DeformableConvConfig(layer.dim, side, offset_groups=layer.groups), side**2)


ATTENTION = Attention(
    DeformableConvConfig,
    deformable_conv_shapes,
    deformable_conv,
    deformable_conv_vjp,
    deformable_conv_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=_receptive_field,
    module="dat_ref.torch.peers.deform_conv:DeformableConv",
    needs_trace=True,
    init=deformable_conv_init,
    replacements={"deform_conv": _candidates},
    parameter_terms={"offset": "offset network", "modulation": "offset network"},
    interpolated=sampling_term,
)
