"""Mutants of ``deform_conv``: each has one mistake and names the first check that fails.

They replace single steps of a reference in steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from ..._checks import Array
from ...ops.basic import softmax
from ...ops.grid import Size
from ...ops.sampling import bilinear_sample
from ...peers.deform_conv import ConvGeometry, deform_points
from ..op_spec import Function, Mutant
from .sampler_mutants import round_to_bits, truncated
from .steps import group_of_head, replace_steps, sample_at, wrap_around, zero_unless_inside

# ------------------------------------------------------------------------------------------------ the steps


def tap_grid(geometry: ConvGeometry, output_size: Size) -> Array:
    """Return the positions of the taps without offsets, (K, H', W', 2)."""
    return geometry.lattice(output_size)


def tap_offsets(offset: Array, geometry: ConvGeometry, size: Array) -> Array:
    """Return the offset of each tap, (N, G_o, K, H', W', 2)."""
    taps = geometry.kernel[0] * geometry.kernel[1]
    batch, channels, height, width = offset.shape
    return offset.reshape(batch, channels // (2 * taps), taps, 2, height, width).transpose(0, 1, 2, 4, 5, 3)


def identity(array: Array, *others: Any) -> Array:
    return array


def add_bias(y: Array, bias: Array) -> Array:
    return y + bias[:, None, None]


@dataclass(frozen=True)
class Steps:
    """Steps of deformable convolution, as functions.

    Args:
        tap_grid: (geometry, output size) -> positions of the taps without offsets.
        tap_offsets: (offset, geometry, size of the map) -> offsets of the taps.
        positions: points (N, G_o, K, H', W', 2) -> points.
        offset_groups: (channels, groups) -> offset group of each channel.
        sample: (maps, points_px) -> samples.
        mask: mask (N, G_o, K, H', W') -> mask.
        weights: weight (O, C/G, k_y, k_x) -> weight.
        weight_groups: (channels, groups) -> weight group of each channel.
        add_bias: (y, bias) -> y.
    """

    tap_grid: Function = tap_grid
    tap_offsets: Function = tap_offsets
    positions: Function = identity
    offset_groups: Function = group_of_head
    sample: Function = bilinear_sample
    mask: Function = identity
    weights: Function = identity
    weight_groups: Function = group_of_head
    add_bias: Function = add_bias


def conv_in_steps(
    steps: Steps, x: Array, offset: Array, weight: Array, bias: Array | None, stride: Size, padding: Size,
    dilation: Size, mask: Array | None,
) -> Array:  # fmt: skip
    """Return y (N, O, H', W')."""
    batch, channels = x.shape[:2]
    geometry = ConvGeometry((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    output_size = (offset.shape[2], offset.shape[3])
    grid = steps.tap_grid(geometry, output_size).astype(offset.dtype)
    points = steps.positions(grid + steps.tap_offsets(offset, geometry, np.asarray(x.shape[2:])))
    group = steps.offset_groups(channels, points.shape[1])
    maps = x.reshape(batch * channels, 1, *x.shape[2:])
    samples = steps.sample(maps, points[:, group].reshape(batch * channels, int(np.prod(points.shape[2:5])), 2))
    columns = samples.reshape(batch, channels, *points.shape[2:5])  # (N, C, K, H', W')
    if mask is not None:
        columns = columns * steps.mask(mask.reshape(points.shape[:5]))[:, group]
    y = np.einsum("nckhw,ock->nohw", columns, full_weight(steps, weight, channels), optimize=True)
    return y if bias is None else np.asarray(steps.add_bias(y, bias))


def full_weight(steps: Steps, weight: Array, channels: int) -> Array:
    """Return the weights (O, C, K), zero for channels of other groups."""
    groups = channels // weight.shape[1]
    full = np.zeros((len(weight), channels, weight[0, 0].size), dtype=weight.dtype)
    channel_group = steps.weight_groups(channels, groups)
    for output, rows in enumerate(steps.weights(weight).reshape(*weight.shape[:2], -1)):
        full[output, channel_group == output // (len(weight) // groups)] = rows
    return full


# ------------------------------------------------------------------------------------------------ mistakes


def change_result(change: Callable[..., Array]) -> Function:
    """Return a mutation that replaces the result of a step by ``change(result, *arguments)``."""
    return lambda fn: lambda *arguments: change(fn(*arguments), *arguments)


def with_geometry(change: Callable[[ConvGeometry], ConvGeometry]) -> Function:
    """Return a mutation that places the taps with another geometry."""
    return lambda fn: lambda geometry, output_size: fn(change(geometry), output_size)


def all_y_then_all_x(fn: Function) -> Function:
    """Read the offset's channels as dy of all taps, then dx of all taps."""

    def tap_offsets(offset: Array, geometry: ConvGeometry, size: Array) -> Array:
        taps = geometry.kernel[0] * geometry.kernel[1]
        batch, channels, height, width = offset.shape
        channels_split = offset.reshape(batch, channels // (2 * taps), 2, taps, height, width).swapaxes(2, 3)
        return fn(channels_split.reshape(offset.shape), geometry, size)

    return tap_offsets


def taps_before_groups(fn: Function) -> Function:
    """Read the offset's channels in the order tap, group, (dy, dx)."""

    def tap_offsets(offset: Array, geometry: ConvGeometry, size: Array) -> Array:
        taps = geometry.kernel[0] * geometry.kernel[1]
        batch, channels, height, width = offset.shape
        channels_split = offset.reshape(batch, taps, channels // (2 * taps), 2, height, width).swapaxes(1, 2)
        return fn(channels_split.reshape(offset.shape), geometry, size)

    return tap_offsets


def taps_column_by_column(offsets: Array, offset: Array, geometry: ConvGeometry, size: Array) -> Array:
    """Number the offset's taps column by column."""
    batch, groups, _, *rest = offsets.shape
    return offsets.reshape(batch, groups, *geometry.kernel[::-1], *rest).swapaxes(2, 3).reshape(offsets.shape)


def softmax_over_taps(mask: Array) -> Array:
    return softmax(np.moveaxis(mask, 2, -1)).transpose(0, 1, 4, 2, 3)


def interleaved(channels: int, groups: int) -> Array:
    return np.arange(channels) % groups


def reversed_groups(groups: Array, *others: int) -> Array:
    return groups[::-1]


def share_first(axis: int) -> Callable[..., Array]:
    """Return a function that repeats the first element along an axis."""
    return lambda array, *others: np.broadcast_to(np.take(array, [0], axis=axis), array.shape) if array.size else array


def axes_swapped(geometry: ConvGeometry) -> ConvGeometry:
    height, width = geometry.kernel
    swapped = ConvGeometry(*(each[::-1] for each in geometry))
    return swapped._replace(kernel=(height, width))


def centered(geometry: ConvGeometry) -> ConvGeometry:
    """Place the center of the kernel on the pixel for any padding."""
    radius = [dilation * (kernel - 1) // 2 for kernel, dilation in zip(geometry.kernel, geometry.dilation, strict=True)]
    return geometry._replace(padding=(radius[0], radius[1]))


def widened_about_the_middle(geometry: ConvGeometry) -> ConvGeometry:
    """Keep the center of the kernel fixed under dilation."""
    (height, width), (down, across), (top, left) = geometry.kernel, geometry.dilation, geometry.padding
    return geometry._replace(padding=(top + (down - 1) * (height - 1) // 2, left + (across - 1) * (width - 1) // 2))


TAP_GRID_MISTAKES: dict[str, tuple[str, Function]] = {
    "positions are shifted by half a pixel down and right": (
        "one_tap",
        change_result(lambda tap_grid, *others: tap_grid + 0.5),
    ),
    "positions are shifted by half a pixel up and left": (
        "one_tap",
        change_result(lambda tap_grid, *others: tap_grid - 0.5),
    ),
    "the kernel is centered on the pixel, and the padding is ignored": ("without_offsets", with_geometry(centered)),
    "padding enlarges the output but does not shift the taps": (
        "padding",
        with_geometry(lambda s: s._replace(padding=(0, 0))),
    ),
    "the stride is ignored": ("stride", with_geometry(lambda s: s._replace(stride=(1, 1)))),
    "the dilation is ignored": ("dilation", with_geometry(lambda s: s._replace(dilation=(1, 1)))),
    "dilation keeps the kernel center fixed instead of the first tap": (
        "dilation",
        with_geometry(widened_about_the_middle),
    ),
    "stride, padding and dilation are taken as (x, y) instead of (y, x)": (
        "pairs_are_y_x",
        with_geometry(axes_swapped),
    ),
}
OFFSET_MISTAKES: dict[str, tuple[str, Function]] = {
    "offsets are ignored": ("offset_direction", change_result(lambda offsets, *others: 0 * offsets)),
    "offsets have the wrong sign": ("offset_direction", change_result(lambda offsets, *others: -offsets)),
    "offsets are taken as normalized coordinates: 1 is half the map": (
        "offset_direction", change_result(lambda offsets, offset, geometry, size: offsets * size / 2)
    ),
    "offsets are taken as (dx, dy) instead of (dy, dx)": (
        "offset_is_y_x", change_result(lambda offsets, *others: offsets[..., ::-1])
    ),
    "offset channels are ordered as all dy, then all dx": ("offset_channels", all_y_then_all_x),
    "offset channels number the taps column by column": ("offset_channels", change_result(taps_column_by_column)),
    "all taps use the first tap's offset": ("offset_channels", change_result(share_first(2))),
    "offsets are multiplied by the dilation": (
        "offset_channels",
        change_result(lambda offsets, offset, geometry, size: offsets * np.asarray(geometry.dilation)),
    ),
    "offset channels are ordered by tap, then by group": ("offset_groups", taps_before_groups),
    "all groups use the first group's offsets": ("offset_groups", change_result(share_first(1))),
    "all images use the first image's offsets": ("images", change_result(share_first(0))),
}  # fmt: skip
OTHER_MISTAKES: dict[str, tuple[str, dict[str, Function]]] = {
    "H instead of H - 1: positions are multiplied by H/(H - 1)": (
        "one_tap", {"sample": sample_at(lambda p, s: p * s / np.maximum(s - 1, 1))}
    ),
    "x is normalized by the height": ("not_square", {"sample": sample_at(lambda p, s: (p + 0.5) * s / s[0] - 0.5)}),
    "x is normalized by the height, and y by the width": (
        "not_square", {"sample": sample_at(lambda p, s: (p + 0.5) * s / s[::-1] - 0.5)}
    ),
    "division by zero on an axis of one pixel": (
        "single_row", {"sample": sample_at(lambda p, s: np.where(s == 1, p.dtype.type(np.nan), p))}
    ),
    "the kernel is flipped": ("without_offsets", {"weights": change_result(lambda w, _: w[:, :, ::-1, ::-1])}),
    "the kernel is transposed": (
        "without_offsets", {"weights": change_result(lambda w, _: w.swapaxes(2, 3) if w.shape[2] == w.shape[3] else w)}
    ),
    "nearest neighbor instead of bilinear interpolation": (
        "between_pixels", {"sample": sample_at(lambda p, s: np.floor(p + p.dtype.type(0.5)))}
    ),
    "the border is replicated outside the map": (
        "zeros_outside", {"sample": sample_at(lambda p, s: np.clip(p, 0, s.astype(p.dtype) - 1))}
    ),
    "the map wraps around: negative indices count from the end": ("zeros_outside", {"sample": wrap_around}),
    "points outside the outermost pixel centers read zero": ("border_fades", {"sample": zero_unless_inside}),
    "positions are truncated towards zero instead of floored": ("border_fades", {"sample": truncated}),
    "the mask is ignored": ("modulation", {"mask": change_result(lambda m, _: np.ones_like(m))}),
    "a sigmoid is applied to the mask again": ("modulation", {"mask": change_result(lambda m, _: expit(m))}),
    "a softmax over the taps is applied to the mask": (
        "modulation", {"mask": change_result(lambda m, _: softmax_over_taps(m))}
    ),
    "the mask factor is 1 + m instead of m": ("modulation", {"mask": change_result(lambda m, _: 1 + m)}),
    "the mask's taps are in reverse order": ("modulation", {"mask": change_result(lambda m, _: m[:, :, ::-1])}),
    "the bias is ignored": ("bias", {"add_bias": lambda fn: identity}),
    "input and output channels of the weights swapped": (
        "channels", {"weights": change_result(lambda w, _: w.swapaxes(0, 1) if w.shape[0] == w.shape[1] else w)}
    ),
    "input channels are averaged instead of summed": (
        "channels", {"weights": change_result(lambda w, _: w / w.shape[1])}
    ),
    "weight groups in reverse order": ("weight_groups", {"weight_groups": change_result(reversed_groups)}),
    "channels are interleaved across the weight groups": (
        "weight_groups", {"weight_groups": lambda fn: interleaved}
    ),
    "offset groups in reverse order": ("offset_groups", {"offset_groups": change_result(reversed_groups)}),
    "channels are interleaved across the offset groups": ("offset_groups", {"offset_groups": lambda fn: interleaved}),
    "positions are stored in bfloat16": (
        "fine_positions", {"positions": change_result(lambda points, _: round_to_bits(points, 8))}
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ wrong gradients


def change_gradient(name: str, change: Callable[..., Array]) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that replaces one gradient by ``change(grad, arguments)``."""

    def mutate(fn: Function) -> Function:
        def vjp(cotangent: Array, *arguments: Any) -> dict[str, Any]:
            grads = dict(fn(cotangent, *arguments))
            return grads if grads[name] is None else {**grads, name: change(grads[name], arguments)}

        return vjp

    return mutate


def stopped_at_border(grad: Array, arguments: tuple[Any, ...]) -> Array:
    """Set the gradient to zero for positions outside the outermost pixel centers."""
    x, offset, weight, _, *rest = arguments
    points = deform_points(offset, ConvGeometry((weight.shape[2], weight.shape[3]), *rest[:3]))
    within = np.asarray(((points >= 0) & (points <= np.asarray(x.shape[2:]) - 1)).all(axis=-1))  # (N, G_o, K, H', W')
    within_components = np.repeat(within[:, :, :, None], 2, axis=3)
    return grad * within_components.reshape(grad.shape)


def without_mask(grad: Array, arguments: tuple[Any, ...]) -> Array:
    """Omit the mask in the gradient of the offset."""
    mask = arguments[-1]
    return grad if mask is None else grad / np.repeat(mask, 2, axis=1)


def slope_from_left(fn: Function) -> Function:
    """Return the left-sided derivative at pixel centers."""

    def vjp(cotangent: Array, x: Array, offset: Array, *others: Any) -> dict[str, Any]:
        left = fn(cotangent, x, offset - 2.0**-30, *others)
        return {**fn(cotangent, x, offset, *others), "offset": left["offset"]}

    return vjp


def swapped_components(grad: Array, arguments: tuple[Any, ...]) -> Array:
    batch, channels, height, width = grad.shape
    return grad.reshape(batch, channels // 2, 2, height, width)[:, :, ::-1].reshape(grad.shape)


MUTANTS = (
    *(
        Mutant(name, check, replace_steps(conv_in_steps, Steps(), tap_grid=mistake))
        for name, (check, mistake) in TAP_GRID_MISTAKES.items()
    ),
    *(
        Mutant(name, check, replace_steps(conv_in_steps, Steps(), tap_offsets=mistake))
        for name, (check, mistake) in OFFSET_MISTAKES.items()
    ),
    *(
        Mutant(name, check, replace_steps(conv_in_steps, Steps(), **mistake))
        for name, (check, mistake) in OTHER_MISTAKES.items()
    ),
    *(
        Mutant(
            f"the gradient of the {name} is 0.1 % too large", check, vjp=change_gradient(key, lambda g, _: 1.001 * g)
        )
        for name, key, check in (
            ("map", "x", "gradient_of_the_map"),
            ("weights", "weight", "gradient_of_the_weights"),
            ("bias", "bias", "gradient_of_the_weights"),
            ("mask", "mask", "gradient_of_the_mask"),
            ("offset", "offset", "gradient_of_the_offset"),
        )
    ),
    Mutant("the offset gets no gradient", "gradient_of_the_offset", vjp=change_gradient("offset", lambda g, _: 0 * g)),
    Mutant(
        "the offset's gradient is in (dx, dy) order",
        "gradient_of_the_offset",
        vjp=change_gradient("offset", swapped_components),
    ),
    Mutant(
        "the mask is missing in the offset's gradient",
        "gradient_of_the_offset",
        vjp=change_gradient("offset", without_mask),
    ),
    Mutant(
        "the offset's gradient is zero outside the outermost pixel centers",
        "gradient_at_the_border",
        vjp=change_gradient("offset", stopped_at_border),
    ),
    Mutant("the derivative at a pixel center is taken from the left", "gradient_on_the_lattice", vjp=slope_from_left),
)
