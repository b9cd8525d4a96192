"""Closed forms of the backbones' attentions: multiply-adds by term, and memory.

The spec has the total multiply-adds of each attention (``*_macs``). This module splits the total into terms, marks the
terms that interpolate, and describes the memory of the forward pass as steps on a `Tape`. `FORMULAS` maps configuration
types to these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..block import ATTENTIONS, SAME_3X3
from ..config import (
    LOG_CPB_HIDDEN,
    BiasKind,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
)
from ..layer import BIAS_KERNEL, deformable_layer_macs
from ..ops.basic import linear_macs
from ..ops.grid import Size, key_grid_size, offset_padding
from ..peers.dat_dcn import DATDCNAttentionConfig
from ..peers.deform_conv import DeformableConvConfig
from ..peers.mhsa import MultiHeadAttentionConfig
from ..peers.ms_deform_attn import MultiScaleDeformableConfig
from ..peers.neighborhood import axis_kernel, padded_size
from ..peers.per_query import PerQueryAttentionConfig
from ..peers.pyramid import PyramidAttentionConfig
from .memory import INDEX, Macs, Tape, depthwise_workspace, sampling_workspace
from .peer_formulas import (
    dat_dcn_memory,
    dat_dcn_terms,
    deformable_conv_memory,
    deformable_conv_terms,
    multi_head_memory,
    multi_head_terms,
    multi_scale_deformable_memory,
    multi_scale_deformable_terms,
    per_query_memory,
    per_query_terms,
    pyramid_memory,
    pyramid_terms,
)


class Formula(NamedTuple):
    """Closed forms of one kind of attention, except its parameters.

    Args:
        macs: function (batch, size, config) → multiply-adds by term.
        memory: function that records the memory steps of the forward pass, without its input, on a tape.
        interpolated: function (config) → names of the terms of `macs` that interpolate.
        data_dependent_points: function (config) → whether the interpolation points depend on the data.
        saves_input: function (config) → whether the trace holds the input itself (otherwise a copy).
    """

    macs: Callable[[int, Size, Any], Macs]
    memory: Callable[[Tape, int, Size, Any], None]
    interpolated: Callable[[Any], set[str]] = lambda config: set()
    data_dependent_points: Callable[[Any], bool] = lambda config: True
    saves_input: Callable[[Any], bool] = lambda config: True


# Term of a parameter, by the first part of its name. A name that is not listed is a separate term.
TERM_OF_PARAMETER = {
    "query": "query and output",
    "output": "query and output",
    "key": "key and value",
    "value": "key and value",
    "offset_network": "offset network",
    "position_bias": "bias",
    "window_bias": "bias",
    "neighborhood_bias": "bias",
    "key_value": "key and value",  # pyramid attention, with its reduction
    "norm": "reduction",
    "offset": "offset network",  # deformable convolution, Deformable DETR
    "modulation": "offset network",
    "weights": "attention",
}


# ------------------------------------------------------------------------------------------------ deformable


def deformable_memory(tape: Tape, batch: int, size: Size, config: DeformableAttentionConfig) -> None:
    """Record the memory steps of `deformable_layer`."""
    key_size = key_grid_size(size, config.kernel_size, config.stride, config.convention)
    pixels, keys = math.prod(size), math.prod(key_size)
    queries, samples = batch * pixels * config.dim, batch * keys * config.dim

    tape.step("query and output", queries)
    _points_memory(tape, batch, size, keys, config)
    if config.average_pool:
        tape.step("sampling", samples)
    else:
        workspace = sampling_workspace(batch * config.groups * keys, config.group_dim, tape.itemsize)
        tape.step("sampling", samples, queries + workspace)  # workspace includes the map as rows
    tape.step("key and value", 2 * samples)
    _bias_memory(tape, batch, pixels * keys, config)
    tape.attend(batch * config.heads * pixels * keys)
    with tape.temporary(queries):  # heads before merging
        if config.bias is BiasKind.DEPTHWISE:
            workspace = depthwise_workspace(batch * config.dim, size, BIAS_KERNEL, 1, SAME_3X3)
            # The workspace also includes the merged heads without the convolution.
            tape.step("attention", queries, queries + workspace)
        else:
            tape.step("attention", queries)
        tape.step("query and output", queries)


def _points_memory(tape: Tape, batch: int, size: Size, keys: int, config: DeformableAttentionConfig) -> None:
    """Record the memory steps of the offset network and of the geometry."""
    samples, coordinates = batch * keys * config.dim, 2 * batch * config.groups * keys
    if config.offset_bound is not OffsetBound.NONE:
        padding = offset_padding(size, config.kernel_size, config.stride, config.convention)
        workspace = depthwise_workspace(batch * config.dim, size, config.kernel_size, config.stride, padding)
        tape.step("offset network", samples, workspace)
        tape.step("offset network", samples, samples)  # layer norm
        tape.step("offset network", samples, samples)  # GELU
    # Network output, offsets, points, and points in pixels. With the other bounds the offsets are the network output.
    separate = config.offset_bound in (OffsetBound.NONE, OffsetBound.TANH_CELLS)
    tape.step("offset network", coordinates * (4 if separate else 3))
    tape.step("offset network", 2 * 2 * keys)  # reference points, normalized and in pixels


def _bias_memory(tape: Tape, batch: int, pairs: int, config: DeformableAttentionConfig) -> None:
    """Record the memory steps of the position bias, for `pairs` = queries · keys."""
    positions = batch * config.groups * pairs
    if config.bias is BiasKind.TABLE:
        contiguous = batch == 1 or config.groups == 1  # otherwise the positions are copied, grouped
        workspace = sampling_workspace(positions, config.heads // config.groups, tape.itemsize)
        tape.step("bias", batch * config.heads * pairs, (2 if contiguous else 4) * positions + workspace)
    elif config.bias is BiasKind.LOG_CPB:
        tape.step("bias", 2 * positions, 2 * positions)  # displacement
        tape.step("bias", 2 * positions, 2 * 2 * positions)  # log-scaled
        tape.step("bias", LOG_CPB_HIDDEN * positions)
        tape.step("bias", batch * config.heads * pairs, LOG_CPB_HIDDEN * positions)  # workspace: the ReLU


def _deformable_interpolated(config: DeformableAttentionConfig) -> set[str]:
    return {"sampling", "bias"} if config.bias is BiasKind.TABLE else {"sampling"}


# ------------------------------------------------------------------------------------------------ local attention


def _projected_macs(pixels: int, batch: int, size: Size, config: Any) -> Macs:
    """Split the cost of an attention with four projections per pixel; the remainder is the term ``"attention"``."""
    projections = 2 * linear_macs(pixels, config.dim, config.dim)
    attention = ATTENTIONS[type(config)].macs(batch, size, config) - 2 * projections
    return {"attention": attention, "query and output": projections, "key and value": projections}


def window_terms(batch: int, size: Size, config: WindowAttentionConfig) -> Macs:
    """Split `window_attention_macs` into terms."""
    return _projected_macs(batch * math.prod(size), batch, size, config)


def window_memory(tape: Tape, batch: int, size: Size, config: WindowAttentionConfig) -> None:
    """Record the memory steps of `window_attention`."""
    window_area = config.window_size**2
    windows = math.prod(-(-length // config.window_size) for length in size)
    pixels, window_elements = batch * math.prod(size) * config.dim, batch * windows * window_area * config.dim
    masked = config.shift > 0 or any(length % config.window_size for length in size)
    logits = batch * windows * config.heads * window_area**2
    pairs = windows * window_area**2

    tape.step("attention", 2 * windows * window_area, itemsize=INDEX)  # the pixel at each position
    tape.step("query and output", window_elements)
    # The workspace is the projected map, and its windows in another order.
    tape.step("key and value", 2 * window_elements, 3 * pixels + 3 * window_elements)
    # With masked keys, each window has its own bias, and there are a float mask and a boolean mask.
    with tape.temporary(pairs // tape.itemsize + (logits + pairs if masked else config.heads * window_area**2)):
        tape.attend(logits)
        with tape.temporary(window_elements):  # heads before merging
            # The workspace is the merged heads, and their pixels inside the map.
            tape.step("attention", pixels, 2 * window_elements)
            tape.step("query and output", pixels)


def neighborhood_terms(batch: int, size: Size, config: NeighborhoodAttentionConfig) -> Macs:
    """Split `neighborhood_attention_macs` into terms, for the padded map if there is padding."""
    size = padded_size(size, config)
    return _projected_macs(batch * math.prod(size), batch, size, config)


def neighborhood_memory(tape: Tape, batch: int, size: Size, config: NeighborhoodAttentionConfig) -> None:
    """Record the memory steps of `neighborhood_attention`."""
    size = padded_size(size, config)
    pixels = math.prod(size)
    keys = math.prod(axis_kernel(length, config.kernel_size, config.dilation) for length in size)
    elements = batch * pixels * config.dim

    if config.small_map == "pad":
        tape.step("query and output", elements)  # the padded map, a copy even without padding
    with tape.temporary(pixels * keys * INDEX // tape.itemsize):  # table indices of the displacements
        tape.step("attention", pixels * keys, itemsize=INDEX)
        tape.step("query and output", elements)
        tape.step("key and value", 2 * elements + 2 * elements * keys)  # projected, then gathered per query
        with tape.temporary(config.heads * pixels * keys):  # bias
            tape.attend(batch * config.heads * pixels * keys)
            with tape.temporary(elements):
                tape.step("attention", elements)
                tape.step("query and output", elements)


# ------------------------------------------------------------------------------------------------ the table


def _samples(config: Any) -> set[str]:
    return {"sampling"}


FORMULAS: dict[type, Formula] = {
    DeformableAttentionConfig: Formula(
        deformable_layer_macs,
        deformable_memory,
        interpolated=_deformable_interpolated,
        data_dependent_points=lambda config: config.offset_bound is not OffsetBound.NONE,
    ),
    WindowAttentionConfig: Formula(window_terms, window_memory),
    NeighborhoodAttentionConfig: Formula(
        neighborhood_terms,
        neighborhood_memory,
        saves_input=lambda config: config.small_map == "shrink",
    ),
    MultiHeadAttentionConfig: Formula(
        multi_head_terms,
        multi_head_memory,
        interpolated=lambda config: {"bias"},
        data_dependent_points=lambda config: False,
    ),
    PyramidAttentionConfig: Formula(pyramid_terms, pyramid_memory),
    DeformableConvConfig: Formula(deformable_conv_terms, deformable_conv_memory, _samples),
    MultiScaleDeformableConfig: Formula(multi_scale_deformable_terms, multi_scale_deformable_memory, _samples),
    DATDCNAttentionConfig: Formula(dat_dcn_terms, dat_dcn_memory, _samples),
    PerQueryAttentionConfig: Formula(per_query_terms, per_query_memory, _samples),
}
