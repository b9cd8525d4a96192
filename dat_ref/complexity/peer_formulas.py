"""The peers in closed form, as `dat_ref.complexity.attentions` has the attentions of the backbones."""

from __future__ import annotations

import math
from typing import Any

from ..ops.basic import conv2d_macs, depthwise_conv2d_macs, linear_macs
from ..ops.bias import table_bias_macs
from ..ops.grid import Size
from ..ops.sampling import bilinear_sample_macs
from ..peers.deform_conv import DeformableConvConfig, deformable_conv_macs
from ..peers.mhsa import MultiHeadAttentionConfig, multi_head_attention_macs
from ..peers.ms_deform_attn import MultiScaleDeformableConfig, multi_scale_deformable_layer_macs
from ..peers.per_query import PerQueryAttentionConfig, per_query_attention_macs
from ..peers.pyramid import PyramidAttentionConfig, pyramid_attention_macs
from ..peers.swap_in import SwapInAttentionConfig, swap_in_attention_macs
from .memory import Macs, Tape, conv_needs, depthwise_needs, sampling_needs


def _rest(name: str, whole: int, parts: Macs) -> Macs:
    """Return the parts with what is left of the whole as another term, first."""
    return {name: whole - sum(parts.values()), **parts}


# ------------------------------------------------------------------------------------------------ the whole map


def multi_head_terms(batch: int, size: Size, config: MultiHeadAttentionConfig) -> Macs:
    """Cut `multi_head_attention_macs` into terms."""
    pixels = math.prod(size)
    projections = 2 * linear_macs(batch * pixels, config.dim, config.dim)
    parts = {"query and output": projections, "key and value": projections}
    if config.size is not None:
        parts["bias"] = table_bias_macs(1, config.heads, pixels, pixels)
    return _rest("attention", multi_head_attention_macs(batch, size, config), parts)


def multi_head_memory(tape: Tape, batch: int, size: Size, config: MultiHeadAttentionConfig) -> None:
    """Take the steps of `multi_head_attention`; a bias is the same for every image, and not kept."""
    pixels = math.prod(size)
    numbers, pairs = batch * pixels * config.dim, pixels**2
    tape.step("query and output", numbers)
    tape.step("key and value", 2 * numbers)
    bias, needs = 0, 0
    if config.size is not None:
        bias, needs = config.heads * pairs, 2 * pairs + sampling_needs(pairs, config.heads, tape.itemsize)
    with tape.borrowed(bias, needs):
        tape.attend(batch * config.heads * pairs)
        with tape.borrowed(numbers):
            tape.step("attention", numbers)
            tape.step("query and output", numbers)


def pyramid_terms(batch: int, size: Size, config: PyramidAttentionConfig) -> Macs:
    """Cut `pyramid_attention_macs` into terms."""
    cell = config.reduction
    pixels, keys = batch * math.prod(size), batch * _reduced(size, cell)
    parts = {
        "query and output": 2 * linear_macs(pixels, config.dim, config.dim),
        "key and value": 2 * linear_macs(keys, config.dim, config.dim),
    }
    if cell > 1:
        parts["reduction"] = conv2d_macs(keys, config.dim, config.dim, cell)
    return _rest("attention", pyramid_attention_macs(batch, size, config), parts)


def _reduced(size: Size, cell: int) -> int:
    return math.prod(-(-length // cell) for length in size)


def pyramid_memory(tape: Tape, batch: int, size: Size, config: PyramidAttentionConfig) -> None:
    """Take the steps of `pyramid_attention`."""
    cell, pixels, keys = config.reduction, math.prod(size), _reduced(size, config.reduction)
    numbers, reduced = batch * pixels * config.dim, batch * keys * config.dim
    if cell > 1:
        bottom, right = (-length % cell for length in size)
        needs = conv_needs(batch, (config.dim, config.dim), size, cell, cell, ((0, bottom), (0, right)))
        tape.step("reduction", reduced, needs)
        tape.step("reduction", reduced, reduced)  # layer norm
    tape.step("query and output", numbers)
    tape.step("key and value", 2 * reduced)
    tape.attend(batch * config.heads * pixels * keys)
    with tape.borrowed(numbers):
        tape.step("attention", numbers)
        tape.step("query and output", numbers)


# ------------------------------------------------------------------------------------------------ moved taps


def deformable_conv_terms(batch: int, size: Size, config: DeformableConvConfig) -> Macs:
    """Cut `deformable_conv_macs` into terms."""
    pixels = batch * math.prod(size)
    predicted = (3 if config.modulated else 2) * config.offset_groups * config.taps
    parts = {
        "offset network": conv2d_macs(pixels, config.dim, predicted, config.kernel_size),
        "sampling": bilinear_sample_macs(pixels * config.taps, config.dim),
    }
    return _rest("convolution", deformable_conv_macs(batch, size, config), parts)


def deformable_conv_memory(tape: Tape, batch: int, size: Size, config: DeformableConvConfig) -> None:
    """Take the steps of `deformable_conv`: K numbers for each of the map are there for a moment."""
    pixels, half = batch * math.prod(size), config.kernel_size // 2
    points = pixels * config.offset_groups * config.taps
    padding = ((half, half), (half, half))
    for number in (2, 1) if config.modulated else (2,):  # offsets, modulation
        channels = (config.dim, number * config.offset_groups * config.taps)
        needs = conv_needs(batch, channels, size, config.kernel_size, 1, padding)
        tape.step("offset network", number * points, needs)
    numbers, found = pixels * config.dim, pixels * config.taps * config.dim
    sampling = numbers + found + sampling_needs(points, config.dim // config.offset_groups, tape.itemsize)
    weighing = (3 if config.modulated else 2) * found
    with tape.borrowed(2 * points, max(sampling, weighing)):
        tape.step("convolution", numbers, numbers)
    tape.step("offset network", 2 * points)


# ------------------------------------------------------------------------------------------------ points of a query


def multi_scale_deformable_terms(batch: int, size: Size, config: MultiScaleDeformableConfig) -> Macs:
    """Cut `multi_scale_deformable_layer_macs` into terms: one level, every pixel a query and a value."""
    pixels, compared = batch * math.prod(size), config.scoring == "dot_product"
    projections = linear_macs(pixels, config.dim, config.dim) * (2 if compared else 1)
    parts = {
        "query and output": projections,
        "key and value": projections,
        "offset network": linear_macs(pixels, config.dim, 2 * config.samples),
        "sampling": bilinear_sample_macs(pixels * config.points, config.dim) * (2 if compared else 1),
    }
    return _rest("attention", multi_scale_deformable_layer_macs(batch, size, config), parts)


def multi_scale_deformable_memory(tape: Tape, batch: int, size: Size, config: MultiScaleDeformableConfig) -> None:
    """Take the steps of `multi_scale_deformable_layer`."""
    pixels = batch * math.prod(size)
    numbers, points = pixels * config.dim, pixels * config.samples
    tape.step("offset network", 3 * 2 * points + 2 * math.prod(size))  # offsets, locations, pixels; the references
    tape.step("key and value", numbers)
    _sample_tokens(tape, batch, size, config)
    if config.scoring == "dot_product":
        tape.step("query and output", numbers)
        tape.step("key and value", numbers)
        _sample_tokens(tape, batch, size, config)
    tape.step("attention", points, 3 * points)
    tape.step("attention", numbers)
    tape.step("query and output", numbers)


def _sample_tokens(tape: Tape, batch: int, size: Size, config: Any) -> None:
    """Take the step of `sample_tokens`, one level: map and points laid out by head, sampled, and laid back."""
    pixels = batch * math.prod(size)
    points, found = pixels * config.heads * config.points, pixels * config.points * config.dim
    needs = sampling_needs(points, config.dim // config.heads, tape.itemsize)
    tape.step("sampling", found, found + 2 * points + pixels * config.dim + needs)


def swap_in_terms(batch: int, size: Size, config: SwapInAttentionConfig) -> Macs:
    """Cut `swap_in_attention_macs` into terms."""
    pixels = batch * math.prod(size)
    parts = {
        "query and output": linear_macs(pixels, config.dim, config.dim),
        "key and value": linear_macs(pixels, config.dim, config.dim),
        "offset network": linear_macs(pixels, config.dim, 2 * config.heads * config.points),
        "sampling": bilinear_sample_macs(pixels * config.points, config.dim),
    }
    return _rest("attention", swap_in_attention_macs(batch, size, config), parts)


def swap_in_memory(tape: Tape, batch: int, size: Size, config: SwapInAttentionConfig) -> None:
    """Take the steps of `swap_in_attention`."""
    pixels = batch * math.prod(size)
    numbers, points = pixels * config.dim, pixels * config.heads * config.points
    with tape.borrowed(2 * points):  # offsets
        tape.step("offset network", 2 * 2 * points)
        tape.step("attention", points, 2 * points)
        tape.step("key and value", numbers)
        _sample_tokens(tape, batch, size, config)
        tape.step("attention", numbers)
        tape.step("query and output", numbers)


def per_query_terms(batch: int, size: Size, config: PerQueryAttentionConfig) -> Macs:
    """Cut `per_query_attention_macs` into terms."""
    pixels = batch * math.prod(size)
    projections = 2 * linear_macs(pixels, config.dim, config.dim)
    offsets = depthwise_conv2d_macs(pixels, config.dim, config.offset_kernel_size)
    parts = {
        "query and output": projections,
        "key and value": projections,
        "offset network": offsets + linear_macs(pixels, config.dim, 2 * config.keys),
        "sampling": config.groups * bilinear_sample_macs(pixels * config.keys, 2 * config.dim),
    }
    return _rest("attention", per_query_attention_macs(batch, size, config), parts)


def per_query_memory(tape: Tape, batch: int, size: Size, config: PerQueryAttentionConfig) -> None:
    """Take the steps of `per_query_attention`: N keys and values for every pixel are kept."""
    pixels, half = batch * math.prod(size), config.offset_kernel_size // 2
    numbers, points = pixels * config.dim, pixels * config.keys
    padding = ((half, half), (half, half))
    tape.step("query and output", numbers)
    needs = depthwise_needs(batch * config.dim, size, config.offset_kernel_size, 1, padding)
    tape.step("offset network", numbers, needs)
    tape.step("offset network", numbers, numbers)  # layer norm
    tape.step("offset network", numbers, numbers)  # GELU
    tape.step("offset network", 2 * 2 * points * config.groups)  # offsets, points
    projected = 2 * numbers
    tape.step("key and value", config.groups * projected, config.groups * projected)  # beside the parts to be stacked
    sampled = 2 * numbers * config.keys
    before = sampled if config.groups > 1 else 0  # the sum over the groups so far
    needs = projected + before + sampling_needs(points, 2 * config.dim, tape.itemsize)
    tape.step("sampling", sampled, needs)
    tape.attend(points * config.heads)
    with tape.borrowed(numbers):
        tape.step("attention", numbers)
        tape.step("query and output", numbers)
