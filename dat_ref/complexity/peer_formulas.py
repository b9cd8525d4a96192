"""Closed forms of the peers: multiply-adds by term, and memory.

`dat_ref.complexity.attentions` has the same for the attentions of the backbones.
"""

from __future__ import annotations

import math
from typing import Any

from ..ops.basic import conv2d_macs, depthwise_conv2d_macs, linear_macs
from ..ops.bias import table_bias_macs
from ..ops.grid import Size
from ..ops.sampling import bilinear_sample_macs
from ..peers.dat_dcn import DATDCNAttentionConfig, dat_dcn_attention_macs
from ..peers.deform_conv import DeformableConvConfig, deformable_conv_macs
from ..peers.mhsa import MultiHeadAttentionConfig, multi_head_attention_macs
from ..peers.ms_deform_attn import MultiScaleDeformableConfig, multi_scale_deformable_layer_macs
from ..peers.per_query import PerQueryAttentionConfig, per_query_attention_macs
from ..peers.pyramid import PyramidAttentionConfig, pyramid_attention_macs
from .memory import Macs, Tape, conv_workspace, depthwise_workspace, sampling_workspace


def _with_remainder(name: str, total_macs: int, parts: Macs) -> Macs:
    """Return the parts, preceded by a term `name` with the remaining multiply-adds."""
    return {name: total_macs - sum(parts.values()), **parts}


# ------------------------------------------------------------------------------------------------ the whole map


def multi_head_terms(batch: int, size: Size, config: MultiHeadAttentionConfig) -> Macs:
    """Split `multi_head_attention_macs` into terms."""
    pixels = math.prod(size)
    projections = 2 * linear_macs(batch * pixels, config.dim, config.dim)
    parts = {"query and output": projections, "key and value": projections}
    if config.size is not None:
        parts["bias"] = table_bias_macs(1, config.heads, pixels, pixels)
    return _with_remainder("attention", multi_head_attention_macs(batch, size, config), parts)


def multi_head_memory(tape: Tape, batch: int, size: Size, config: MultiHeadAttentionConfig) -> None:
    """Record the memory steps of `multi_head_attention`; a bias is shared by all images and not saved."""
    pixels = math.prod(size)
    elements, pairs = batch * pixels * config.dim, pixels**2
    tape.step("query and output", elements)
    tape.step("key and value", 2 * elements)
    bias, workspace = 0, 0
    if config.size is not None:
        bias, workspace = config.heads * pairs, 2 * pairs + sampling_workspace(pairs, config.heads, tape.itemsize)
    with tape.temporary(bias, workspace):
        tape.attend(batch * config.heads * pairs)
        with tape.temporary(elements):
            tape.step("attention", elements)
            tape.step("query and output", elements)


def pyramid_terms(batch: int, size: Size, config: PyramidAttentionConfig) -> Macs:
    """Split `pyramid_attention_macs` into terms."""
    cell = config.reduction
    pixels, keys = batch * math.prod(size), batch * _reduced(size, cell)
    parts = {
        "query and output": 2 * linear_macs(pixels, config.dim, config.dim),
        "key and value": 2 * linear_macs(keys, config.dim, config.dim),
    }
    if cell > 1:
        parts["reduction"] = conv2d_macs(keys, config.dim, config.dim, cell)
    return _with_remainder("attention", pyramid_attention_macs(batch, size, config), parts)


def _reduced(size: Size, cell: int) -> int:
    return math.prod(-(-length // cell) for length in size)


def pyramid_memory(tape: Tape, batch: int, size: Size, config: PyramidAttentionConfig) -> None:
    """Record the memory steps of `pyramid_attention`."""
    cell, pixels, keys = config.reduction, math.prod(size), _reduced(size, config.reduction)
    elements, reduced = batch * pixels * config.dim, batch * keys * config.dim
    if cell > 1:
        bottom, right = (-length % cell for length in size)
        workspace = conv_workspace(batch, (config.dim, config.dim), size, cell, cell, ((0, bottom), (0, right)))
        tape.step("reduction", reduced, workspace)
        tape.step("reduction", reduced, reduced)  # layer norm
    tape.step("query and output", elements)
    tape.step("key and value", 2 * reduced)
    tape.attend(batch * config.heads * pixels * keys)
    with tape.temporary(elements):
        tape.step("attention", elements)
        tape.step("query and output", elements)


# ------------------------------------------------------------------------------------------------ convolution


def deformable_conv_terms(batch: int, size: Size, config: DeformableConvConfig) -> Macs:
    """Split `deformable_conv_macs` into terms."""
    pixels = batch * math.prod(size)
    channels = (3 if config.modulated else 2) * config.offset_groups * config.taps
    parts = {
        "offset network": conv2d_macs(pixels, config.dim, channels, config.kernel_size),
        "sampling": bilinear_sample_macs(pixels * config.taps, config.dim),
    }
    return _with_remainder("convolution", deformable_conv_macs(batch, size, config), parts)


def deformable_conv_memory(tape: Tape, batch: int, size: Size, config: DeformableConvConfig) -> None:
    """Record the memory steps of `deformable_conv`; the K samples per map element are temporary."""
    pixels, half = batch * math.prod(size), config.kernel_size // 2
    points = pixels * config.offset_groups * config.taps
    padding = ((half, half), (half, half))
    for number in (2, 1) if config.modulated else (2,):  # offsets, modulation
        channels = (config.dim, number * config.offset_groups * config.taps)
        workspace = conv_workspace(batch, channels, size, config.kernel_size, 1, padding)
        tape.step("offset network", number * points, workspace)
    elements, gathered = pixels * config.dim, pixels * config.taps * config.dim
    sampling = elements + gathered + sampling_workspace(points, config.dim // config.offset_groups, tape.itemsize)
    weighting = (3 if config.modulated else 2) * gathered
    with tape.temporary(2 * points, max(sampling, weighting)):
        tape.step("convolution", elements, elements)
    tape.step("offset network", 2 * points)


# ------------------------------------------------------------------------------------------------ points per query


def multi_scale_deformable_terms(batch: int, size: Size, config: MultiScaleDeformableConfig) -> Macs:
    """Split `multi_scale_deformable_layer_macs` into terms; one level, every pixel is a query and a value."""
    pixels, by_dot_product = batch * math.prod(size), config.scoring == "dot_product"
    projections = linear_macs(pixels, config.dim, config.dim) * (2 if by_dot_product else 1)
    parts = {
        "query and output": projections,
        "key and value": projections,
        "offset network": linear_macs(pixels, config.dim, 2 * config.samples),
        "sampling": bilinear_sample_macs(pixels * config.points, config.dim) * (2 if by_dot_product else 1),
    }
    return _with_remainder("attention", multi_scale_deformable_layer_macs(batch, size, config), parts)


def multi_scale_deformable_memory(tape: Tape, batch: int, size: Size, config: MultiScaleDeformableConfig) -> None:
    """Record the memory steps of `multi_scale_deformable_layer`."""
    pixels = batch * math.prod(size)
    elements, points = pixels * config.dim, pixels * config.samples
    tape.step("offset network", 3 * 2 * points + 2 * math.prod(size))  # offsets, locations, pixels; reference points
    tape.step("key and value", elements)
    _sample_tokens(tape, batch, size, config)
    if config.scoring == "dot_product":
        tape.step("query and output", elements)
        tape.step("key and value", elements)
        _sample_tokens(tape, batch, size, config)
    tape.step("attention", points, 3 * points)
    tape.step("attention", elements)
    tape.step("query and output", elements)


def _sample_tokens(tape: Tape, batch: int, size: Size, config: Any) -> None:
    """Record the memory step of `sample_tokens` for one level.

    The workspace is the map and the points in head order, and the samples before their final layout.
    """
    pixels = batch * math.prod(size)
    points, gathered = pixels * config.heads * config.points, pixels * config.points * config.dim
    workspace = sampling_workspace(points, config.dim // config.heads, tape.itemsize)
    tape.step("sampling", gathered, gathered + 2 * points + pixels * config.dim + workspace)


def dat_dcn_terms(batch: int, size: Size, config: DATDCNAttentionConfig) -> Macs:
    """Split `dat_dcn_attention_macs` into terms."""
    pixels = batch * math.prod(size)
    parts = {
        "query and output": linear_macs(pixels, config.dim, config.dim),
        "key and value": linear_macs(pixels, config.dim, config.dim),
        "offset network": linear_macs(pixels, config.dim, 2 * config.heads * config.points),
        "sampling": bilinear_sample_macs(pixels * config.points, config.dim),
    }
    return _with_remainder("attention", dat_dcn_attention_macs(batch, size, config), parts)


def dat_dcn_memory(tape: Tape, batch: int, size: Size, config: DATDCNAttentionConfig) -> None:
    """Record the memory steps of `dat_dcn_attention`."""
    pixels = batch * math.prod(size)
    elements, points = pixels * config.dim, pixels * config.heads * config.points
    with tape.temporary(2 * points):  # offsets
        tape.step("offset network", 2 * 2 * points)
        tape.step("attention", points, 2 * points)
        tape.step("key and value", elements)
        _sample_tokens(tape, batch, size, config)
        tape.step("attention", elements)
        tape.step("query and output", elements)


def per_query_terms(batch: int, size: Size, config: PerQueryAttentionConfig) -> Macs:
    """Split `per_query_attention_macs` into terms."""
    pixels = batch * math.prod(size)
    projections = 2 * linear_macs(pixels, config.dim, config.dim)
    offsets = depthwise_conv2d_macs(pixels, config.dim, config.offset_kernel_size)
    parts = {
        "query and output": projections,
        "key and value": projections,
        "offset network": offsets + linear_macs(pixels, config.dim, 2 * config.keys),
        "sampling": config.groups * bilinear_sample_macs(pixels * config.keys, 2 * config.dim),
    }
    return _with_remainder("attention", per_query_attention_macs(batch, size, config), parts)


def per_query_memory(tape: Tape, batch: int, size: Size, config: PerQueryAttentionConfig) -> None:
    """Record the memory steps of `per_query_attention`; N keys and values are saved for every pixel."""
    pixels, half = batch * math.prod(size), config.offset_kernel_size // 2
    elements, points = pixels * config.dim, pixels * config.keys
    padding = ((half, half), (half, half))
    tape.step("query and output", elements)
    workspace = depthwise_workspace(batch * config.dim, size, config.offset_kernel_size, 1, padding)
    tape.step("offset network", elements, workspace)
    tape.step("offset network", elements, elements)  # layer norm
    tape.step("offset network", elements, elements)  # GELU
    tape.step("offset network", 2 * 2 * points * config.groups)  # offsets, points
    projected = 2 * elements
    tape.step("key and value", config.groups * projected, config.groups * projected)  # workspace: before stacking
    sampled = 2 * elements * config.keys
    partial_sum = sampled if config.groups > 1 else 0  # partial sum over the groups
    workspace = projected + partial_sum + sampling_workspace(points, 2 * config.dim, tape.itemsize)
    tape.step("sampling", sampled, workspace)
    tape.attend(points * config.heads)
    with tape.temporary(elements):
        tape.step("attention", elements)
        tape.step("query and output", elements)
