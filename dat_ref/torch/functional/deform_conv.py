"""Deformable convolution, v1 and v2: `dat_ref.peers.deform_conv` on tensors.

The samples of all taps form one tensor, (B, H'·W', K, C), which is multiplied by the weights in one matrix product per
group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import ShapeError, check_divides
from ...peers.deform_conv import ConvGeometry, Pair
from .._checks import check_tensor, check_tensors
from ._dtypes import wide_dtype
from .grid import Size
from .sampling import Sampler, sample_tokens


def _pair(value: Pair) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def deform_points(offset: Tensor, sliding: ConvGeometry) -> Tensor:
    """Return the sampling positions of the taps, in pixels.

    Args:
        offset: (B, G_o·K·2, H', W'), in torchvision's order of channels: group, tap, (dy, dx).
        sliding: kernel size, stride, padding and dilation.

    Returns:
        (B, G_o, K, H', W', 2), (y, x), with K = k_y·k_x; float32 or wider.
    """
    check_tensors(offset=offset)
    batch, channels, height, width = offset.shape
    taps = sliding.kernel[0] * sliding.kernel[1]
    displacements = offset.reshape(batch, channels // (2 * taps), taps, 2, height, width).permute(0, 1, 2, 4, 5, 3)
    displacements = displacements.to(wide_dtype(offset))
    return displacements + _lattice(sliding, (height, width), displacements)


def _lattice(sliding: ConvGeometry, size: Size, like: Tensor) -> Tensor:
    """Return the positions of the taps without offsets, in pixels: (K, H', W', 2)."""
    axes = []
    for count, kernel, stride, padding, dilation in zip(size, *sliding, strict=True):
        output, tap = (torch.arange(length, dtype=like.dtype, device=like.device) for length in (count, kernel))
        axes.append(tap[:, None] * dilation + (output * stride - padding))  # (k, count)
    shape = (*sliding.kernel, *size)
    rows, columns = axes[0][:, None, :, None].expand(shape), axes[1][None, :, None, :].expand(shape)
    return torch.stack((rows, columns), dim=-1).flatten(0, 1)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Tensor | None = None,
    *,
    sampler: Sampler = "gather",
) -> Tensor:
    """Convolve with displaced (and modulated) taps. Argument order and offset layout are torchvision's.

    Args:
        x: (B, C, H, W).
        offset: (B, 2·G_o·k_y·k_x, H', W') in pixels, see `deform_points`; G_o is the number of offset groups, each of
            C/G_o channels.
        weight: (O, C/G, k_y, k_x) with G groups.
        bias: (O,) or None.
        stride, padding, dilation: one integer, or (y, x).
        mask: modulation m, (B, G_o·k_y·k_x, H', W'), for version 2; None for version 1.
        sampler: see `bilinear_sample`.

    Returns:
        (B, O, H', W'). With zero offsets and without a mask this is a convolution.

    Raises:
        ShapeError, ConfigError: if the shapes do not match.
    """
    check_tensors(x=x, offset=offset, weight=weight, bias=bias, mask=mask)
    kernel = (weight.shape[-2], weight.shape[-1])
    sliding = ConvGeometry(kernel, _pair(stride), _pair(padding), _pair(dilation))
    if not torch.compiler.is_compiling():
        _check(x, offset, weight, bias, mask, sliding)
    points = deform_points(offset, sliding)
    batch, offset_groups, taps, height, width, _ = points.shape
    channels, pixels = x.shape[1], height * width
    tokens = x.permute(0, 2, 3, 1).unflatten(3, (offset_groups, channels // offset_groups))
    sampled = sample_tokens(tokens, points.flatten(2, 4), sampler=sampler)
    sampled = sampled.unflatten(2, (taps, pixels))  # (B, G_o, K, H'·W', C/G_o)
    if mask is not None:
        sampled = sampled * mask.reshape(batch, offset_groups, taps, pixels, 1)
    columns = sampled.permute(0, 3, 2, 1, 4).reshape(batch, pixels, taps, channels).to(x.dtype)
    y = _multiply(columns, weight).unflatten(1, (height, width))
    return (y if bias is None else y + bias.to(y.dtype)).permute(0, 3, 1, 2)


def _multiply(columns: Tensor, weight: Tensor) -> Tensor:
    """Multiply samples and weights: (B, H'·W', K, C) and (O, C/G, k_y, k_x) → (B, H'·W', O)."""
    batch, pixels, taps, channels = columns.shape
    outputs, group_channels = weight.shape[:2]
    groups = channels // group_channels
    grouped = columns.reshape(batch * pixels, taps, groups, group_channels).permute(2, 0, 1, 3).flatten(2)
    kernels = weight.reshape(groups, outputs // groups, group_channels, taps).transpose(2, 3).flatten(2)
    y = grouped @ kernels.transpose(1, 2)  # (G, B·H'·W', O/G)
    return y.transpose(0, 1).reshape(batch, pixels, outputs)


def _check(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, sliding: ConvGeometry
) -> None:
    check_tensor("x", x, {"B": None, "C": None, "H": None, "W": None})
    check_tensor("weight", weight, {"O": None, "C/G": None, "k_y": None, "k_x": None})
    batch, channels = x.shape[:2]
    outputs, group_channels, *kernel = weight.shape
    height, width = sliding.output_size((x.shape[2], x.shape[3]))
    if min(height, width) < 1:
        raise ShapeError(
            f"weight: expected a kernel that fits into the padded map, got {tuple(weight.shape)} on {tuple(x.shape)}"
        )
    check_divides("weight.shape[1] (channels a group)", group_channels, "C", channels)
    check_divides("groups", channels // group_channels, "O", outputs)
    taps = kernel[0] * kernel[1]
    check_tensor("offset", offset, {"B": batch, "2·G_o·k_y·k_x": None, "H'": height, "W'": width})
    if offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ShapeError(f"offset: expected a multiple of 2·k_y·k_x={2 * taps} channels, got {tuple(offset.shape)}")
    offset_groups = offset.shape[1] // (2 * taps)
    check_divides("offset groups", offset_groups, "C", channels)
    if bias is not None:
        check_tensor("bias", bias, {"O": outputs})
    if mask is not None:
        check_tensor("mask", mask, {"B": batch, "G_o·k_y·k_x": offset_groups * taps, "H'": height, "W'": width})
