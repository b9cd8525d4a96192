"""Deformable convolutions that are wrong in one way each, and the first check that sees it.

The reference is cut into steps that can be exchanged one by one; with none exchanged its numbers are the reference's.
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
from ...peers.deform_conv import Sliding, deform_points
from ..subject import Function, Mutant
from .sampler_mutants import bits, truncated
from .steps import dropped, exchange, groups_of_heads, read_at, wrapped

# ------------------------------------------------------------------------------------------------ the steps


def lattice(sliding: Sliding, output_size: Size) -> Array:
    """Return where the taps stand, (K, H', W', 2)."""
    return sliding.lattice(output_size)


def moves(offset: Array, sliding: Sliding, size: Array) -> Array:
    """Return how far each tap is moved, (N, G_o, K, H', W', 2)."""
    taps = sliding.kernel[0] * sliding.kernel[1]
    batch, channels, height, width = offset.shape
    return offset.reshape(batch, channels // (2 * taps), taps, 2, height, width).transpose(0, 1, 2, 4, 5, 3)


def as_it_is(array: Array, *others: Any) -> Array:
    return array


def plus_bias(y: Array, bias: Array) -> Array:
    return y + bias[:, None, None]


@dataclass(frozen=True)
class Steps:
    """The steps, with what they take.

    Args:
        stand: (sliding, output size) -> where the taps stand.
        move: (offset, sliding, size of the map) -> how far they are moved.
        place: points (N, G_o, K, H', W', 2) -> the same.
        gather: (channels, groups) -> which offset group each channel belongs to.
        read: (maps, points_px) -> samples.
        modulate: mask (N, G_o, K, H', W') -> the same.
        weigh: weight (O, C/G, k_y, k_x) -> the same.
        share: (channels, groups) -> which group of the weights each channel belongs to.
        add: (y, bias) -> y.
    """

    stand: Function = lattice
    move: Function = moves
    place: Function = as_it_is
    gather: Function = groups_of_heads
    read: Function = bilinear_sample
    modulate: Function = as_it_is
    weigh: Function = as_it_is
    share: Function = groups_of_heads
    add: Function = plus_bias


def convolve(
    steps: Steps, x: Array, offset: Array, weight: Array, bias: Array | None, stride: Size, padding: Size,
    dilation: Size, mask: Array | None,
) -> Array:  # fmt: skip
    """Return y (N, O, H', W')."""
    batch, channels = x.shape[:2]
    sliding = Sliding((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    output_size = (offset.shape[2], offset.shape[3])
    stand = steps.stand(sliding, output_size).astype(offset.dtype)
    points = steps.place(stand + steps.move(offset, sliding, np.asarray(x.shape[2:])))
    group = steps.gather(channels, points.shape[1])
    maps = x.reshape(batch * channels, 1, *x.shape[2:])
    read = steps.read(maps, points[:, group].reshape(batch * channels, int(np.prod(points.shape[2:5])), 2))
    columns = read.reshape(batch, channels, *points.shape[2:5])  # (N, C, K, H', W')
    if mask is not None:
        columns = columns * steps.modulate(mask.reshape(points.shape[:5]))[:, group]
    y = np.einsum("nckhw,ock->nohw", columns, full_weight(steps, weight, channels), optimize=True)
    return y if bias is None else np.asarray(steps.add(y, bias))


def full_weight(steps: Steps, weight: Array, channels: int) -> Array:
    """Return the weights (O, C, K), zero where an output does not see a channel."""
    groups = channels // weight.shape[1]
    full = np.zeros((len(weight), channels, weight[0, 0].size), dtype=weight.dtype)
    group_of = steps.share(channels, groups)
    for output, rows in enumerate(steps.weigh(weight).reshape(*weight.shape[:2], -1)):
        full[output, group_of == output // (len(weight) // groups)] = rows
    return full


# ------------------------------------------------------------------------------------------------ mistakes


def changed(change: Callable[..., Array]) -> Function:
    """A step's result is changed: ``change(result, *what the step takes)``."""
    return lambda right: lambda *arguments: change(right(*arguments), *arguments)


def stands(change: Callable[[Sliding], Sliding]) -> Function:
    """The taps stand where another sliding puts them."""
    return lambda right: lambda sliding, output_size: right(change(sliding), output_size)


def all_y_then_all_x(right: Function) -> Function:
    """The offset's channels are taken for dy of all taps, then dx of all taps."""

    def move(offset: Array, sliding: Sliding, size: Array) -> Array:
        taps = sliding.kernel[0] * sliding.kernel[1]
        batch, channels, height, width = offset.shape
        split = offset.reshape(batch, channels // (2 * taps), 2, taps, height, width).swapaxes(2, 3)
        return right(split.reshape(offset.shape), sliding, size)

    return move


def taps_before_groups(right: Function) -> Function:
    """The offset's channels are taken for tap, group, (dy, dx)."""

    def move(offset: Array, sliding: Sliding, size: Array) -> Array:
        taps = sliding.kernel[0] * sliding.kernel[1]
        batch, channels, height, width = offset.shape
        split = offset.reshape(batch, taps, channels // (2 * taps), 2, height, width).swapaxes(1, 2)
        return right(split.reshape(offset.shape), sliding, size)

    return move


def taps_column_by_column(moved: Array, offset: Array, sliding: Sliding, size: Array) -> Array:
    """The offset's taps are numbered column by column."""
    batch, groups, _, *rest = moved.shape
    return moved.reshape(batch, groups, *sliding.kernel[::-1], *rest).swapaxes(2, 3).reshape(moved.shape)


def of_taps(mask: Array) -> Array:
    return softmax(np.moveaxis(mask, 2, -1)).transpose(0, 1, 4, 2, 3)


def in_turn(channels: int, groups: int) -> Array:
    return np.arange(channels) % groups


def turned(groups: Array, *others: int) -> Array:
    return groups[::-1]


def first_along(axis: int) -> Callable[..., Array]:
    """Return what repeats the first one along an axis."""
    return lambda array, *others: np.broadcast_to(np.take(array, [0], axis=axis), array.shape) if array.size else array


def axes_swapped(sliding: Sliding) -> Sliding:
    height, width = sliding.kernel
    turned = Sliding(*(each[::-1] for each in sliding))
    return turned._replace(kernel=(height, width))


def centered(sliding: Sliding) -> Sliding:
    """The kernel's middle stands on the pixel, whatever the padding."""
    reach = [dilation * (kernel - 1) // 2 for kernel, dilation in zip(sliding.kernel, sliding.dilation, strict=True)]
    return sliding._replace(padding=(reach[0], reach[1]))


def widened_about_the_middle(sliding: Sliding) -> Sliding:
    """Dilation leaves the kernel's middle where it is."""
    (height, width), (down, across), (top, left) = sliding.kernel, sliding.dilation, sliding.padding
    return sliding._replace(padding=(top + (down - 1) * (height - 1) // 2, left + (across - 1) * (width - 1) // 2))


STAND: dict[str, tuple[str, Function]] = {
    "half a pixel down and right": ("one_tap", changed(lambda stand, *others: stand + 0.5)),
    "half a pixel up and left": ("one_tap", changed(lambda stand, *others: stand - 0.5)),
    "the kernel's middle stands on the pixel, whatever the padding": ("without_offsets", stands(centered)),
    "padding makes the result larger, but moves nothing": ("padding", stands(lambda s: s._replace(padding=(0, 0)))),
    "the stride is ignored": ("stride", stands(lambda s: s._replace(stride=(1, 1)))),
    "the dilation is ignored": ("dilation", stands(lambda s: s._replace(dilation=(1, 1)))),
    "dilation leaves the kernel's middle where it is": ("dilation", stands(widened_about_the_middle)),
    "stride, padding and dilation are taken as (x, y)": ("pairs_are_y_x", stands(axes_swapped)),
}
MOVE: dict[str, tuple[str, Function]] = {
    "offsets are ignored": ("offset_direction", changed(lambda moved, *others: 0 * moved)),
    "offsets have the wrong sign": ("offset_direction", changed(lambda moved, *others: -moved)),
    "offsets are taken for normalised ones, of half a map": (
        "offset_direction", changed(lambda moved, offset, sliding, size: moved * size / 2)
    ),
    "offsets are (dx, dy)": ("offset_is_y_x", changed(lambda moved, *others: moved[..., ::-1])),
    "the offset's channels are all dy, then all dx": ("offset_channels", all_y_then_all_x),
    "the offset's taps are numbered column by column": ("offset_channels", changed(taps_column_by_column)),
    "all taps are moved by the first tap's offset": ("offset_channels", changed(first_along(2))),
    "offsets are multiplied by the dilation": (
        "offset_channels", changed(lambda moved, offset, sliding, size: moved * np.asarray(sliding.dilation))
    ),
    "the offset's channels are numbered by tap first, then by group": ("offset_groups", taps_before_groups),
    "all groups are moved by the first group's offsets": ("offset_groups", changed(first_along(1))),
    "all images are moved by the first image's offsets": ("images", changed(first_along(0))),
}  # fmt: skip
OTHER: dict[str, tuple[str, dict[str, Function]]] = {
    "H for H - 1: positions times H/(H - 1)": ("one_tap", {"read": read_at(lambda p, s: p * s / np.maximum(s - 1, 1))}),
    "x is normalised by the height": ("not_square", {"read": read_at(lambda p, s: (p + 0.5) * s / s[0] - 0.5)}),
    "x is normalised by the height, and y by the width": (
        "not_square", {"read": read_at(lambda p, s: (p + 0.5) * s / s[::-1] - 0.5)}
    ),
    "an axis of one pixel is divided by zero": (
        "single_row", {"read": read_at(lambda p, s: np.where(s == 1, p.dtype.type(np.nan), p))}
    ),
    "the kernel is flipped": ("without_offsets", {"weigh": changed(lambda w, _: w[:, :, ::-1, ::-1])}),
    "the kernel is transposed": (
        "without_offsets", {"weigh": changed(lambda w, _: w.swapaxes(2, 3) if w.shape[2] == w.shape[3] else w)}
    ),
    "nearest pixel instead of linear": (
        "between_pixels", {"read": read_at(lambda p, s: np.floor(p + p.dtype.type(0.5)))}
    ),
    "the border is repeated outside": (
        "zeros_outside", {"read": read_at(lambda p, s: np.clip(p, 0, s.astype(p.dtype) - 1))}
    ),
    "the map wraps around: a negative index counts from the end": ("zeros_outside", {"read": wrapped}),
    "points outside the pixel centers are dropped": ("border_fades", {"read": dropped}),
    "positions are rounded towards zero instead of down": ("border_fades", {"read": truncated}),
    "the mask is ignored": ("modulation", {"modulate": changed(lambda m, _: np.ones_like(m))}),
    "a sigmoid is taken of the mask once more": ("modulation", {"modulate": changed(lambda m, _: expit(m))}),
    "a softmax over the taps is taken of the mask": ("modulation", {"modulate": changed(lambda m, _: of_taps(m))}),
    "the mask is (1 + m)": ("modulation", {"modulate": changed(lambda m, _: 1 + m)}),
    "the mask's taps are in reverse order": ("modulation", {"modulate": changed(lambda m, _: m[:, :, ::-1])}),
    "the bias is ignored": ("bias", {"add": lambda right: as_it_is}),
    "input and output channels of the weights are exchanged": (
        "channels", {"weigh": changed(lambda w, _: w.swapaxes(0, 1) if w.shape[0] == w.shape[1] else w)}
    ),
    "channels are averaged, not summed": ("channels", {"weigh": changed(lambda w, _: w / w.shape[1])}),
    "groups of the weights are in reverse order": ("weight_groups", {"share": changed(turned)}),
    "channels are dealt to the groups of the weights in turn": ("weight_groups", {"share": lambda right: in_turn}),
    "offset groups are in reverse order": ("offset_groups", {"gather": changed(turned)}),
    "channels are dealt to the offset groups in turn": ("offset_groups", {"gather": lambda right: in_turn}),
    "positions are kept in bfloat16": ("fine_positions", {"place": changed(lambda points, _: bits(points, 8))}),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ wrong gradients


def gradient(name: str, change: Callable[..., Array]) -> Callable[[Function], Function]:
    """Return a VJP of which one gradient is changed: ``change(grad, arguments)``."""

    def wrong(right: Function) -> Function:
        def vjp(cotangent: Array, *arguments: Any) -> dict[str, Any]:
            grads = dict(right(cotangent, *arguments))
            return grads if grads[name] is None else {**grads, name: change(grads[name], arguments)}

        return vjp

    return wrong


def inside(grad: Array, arguments: tuple[Any, ...]) -> Array:
    """Offsets that lead beyond the outermost pixel centers get no gradient."""
    x, offset, weight, _, *rest = arguments
    points = deform_points(offset, Sliding((weight.shape[2], weight.shape[3]), *rest[:3]))
    within = np.asarray(((points >= 0) & (points <= np.asarray(x.shape[2:]) - 1)).all(axis=-1))  # (N, G_o, K, H', W')
    both = np.repeat(within[:, :, :, None], 2, axis=3)
    return grad * both.reshape(grad.shape)


def unmodulated(grad: Array, arguments: tuple[Any, ...]) -> Array:
    """The mask is forgotten in the gradient of the offset."""
    mask = arguments[-1]
    return grad if mask is None else grad / np.repeat(mask, 2, axis=1)


def from_the_left(right: Function) -> Function:
    """On a pixel, the slope of the offset is the one from the left and from above."""

    def vjp(cotangent: Array, x: Array, offset: Array, *others: Any) -> dict[str, Any]:
        before = right(cotangent, x, offset - 2.0**-30, *others)
        return {**right(cotangent, x, offset, *others), "offset": before["offset"]}

    return vjp


def swapped(grad: Array, arguments: tuple[Any, ...]) -> Array:
    batch, channels, height, width = grad.shape
    return grad.reshape(batch, channels // 2, 2, height, width)[:, :, ::-1].reshape(grad.shape)


MUTANTS = (
    *(Mutant(name, check, exchange(convolve, Steps(), stand=mistake)) for name, (check, mistake) in STAND.items()),
    *(Mutant(name, check, exchange(convolve, Steps(), move=mistake)) for name, (check, mistake) in MOVE.items()),
    *(Mutant(name, check, exchange(convolve, Steps(), **mistake)) for name, (check, mistake) in OTHER.items()),
    *(
        Mutant(f"the gradient of the {name} is 0.1 % too large", check, vjp=gradient(key, lambda g, _: 1.001 * g))
        for name, key, check in (
            ("map", "x", "gradient_of_the_map"),
            ("weights", "weight", "gradient_of_the_weights"),
            ("bias", "bias", "gradient_of_the_weights"),
            ("mask", "mask", "gradient_of_the_mask"),
            ("offset", "offset", "gradient_of_the_offset"),
        )
    ),
    Mutant("the offset gets no gradient", "gradient_of_the_offset", vjp=gradient("offset", lambda g, _: 0 * g)),
    Mutant("the offset's gradient is (x, y)", "gradient_of_the_offset", vjp=gradient("offset", swapped)),
    Mutant(
        "the mask is forgotten in the offset's gradient", "gradient_of_the_offset", vjp=gradient("offset", unmodulated)
    ),
    Mutant("the offset's gradient stops at the border", "gradient_at_the_border", vjp=gradient("offset", inside)),
    Mutant("the slope on a pixel is taken from the left", "gradient_on_the_lattice", vjp=from_the_left),
)
