"""Row of the deformable layer: its cost by term, its memory and its receptive field, as for the peers.

The layer itself is `dat_ref.layer`.
"""

from __future__ import annotations

import math

import numpy as np

from .._checks import Array
from ..config import LOG_CPB_HIDDEN, BiasKind, DeformableAttentionConfig, OffsetBound
from ..layer import (
    BIAS_KERNEL,
    LayerTrace,
    deformable_layer,
    deformable_layer_macs,
    deformable_layer_vjp,
    deformable_shapes,
)
from ..official import attention_names
from ..ops.grid import Size, key_grid_size, offset_padding
from .attention import Attention, Pixel, check_traced_size, sampled_pixels
from .memory import Tape, depthwise_workspace, sampling_workspace


def _macs(batch: int, size: Size, config: DeformableAttentionConfig) -> int:
    return sum(deformable_layer_macs(batch, size, config).values())


def _memory(tape: Tape, batch: int, size: Size, config: DeformableAttentionConfig) -> None:
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
            half = BIAS_KERNEL // 2
            padding = ((half, half), (half, half))
            workspace = depthwise_workspace(batch * config.dim, size, BIAS_KERNEL, 1, padding)
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


def _interpolated(config: DeformableAttentionConfig) -> set[str]:
    return {"sampling", "bias"} if config.bias is BiasKind.TABLE else {"sampling"}


def _receptive_field(
    query: Pixel, size: Size, config: DeformableAttentionConfig, trace: LayerTrace, image: int
) -> Array:
    """Return the receptive field; it is equal for all queries unless a depthwise convolution replaces the bias."""
    check_traced_size(trace.x.shape[2:], size)
    if config.average_pool:
        covered = [count * config.stride for count in trace.sampled.shape[2:]]
        visible = np.zeros(size, dtype=bool)
        visible[: covered[0], : covered[1]] = True
    else:
        visible = sampled_pixels(trace.points_px[image], size)
    if config.bias is BiasKind.DEPTHWISE:
        rows, columns = (np.abs(np.arange(size[axis]) - query[axis]) <= BIAS_KERNEL // 2 for axis in range(2))
        visible |= rows[:, None] & columns
    return visible


ATTENTION = Attention(
    DeformableAttentionConfig,
    deformable_shapes,
    deformable_layer,
    deformable_layer_vjp,
    _macs,
    terms=deformable_layer_macs,
    memory=_memory,
    receptive_field=_receptive_field,
    module="dat_ref.torch.layer:DeformableAttention",
    needs_trace=True,
    released_names=attention_names,
    parameter_terms={"offset_network": "offset network", "position_bias": "bias"},
    interpolated=_interpolated,
    data_dependent_points=lambda config: config.offset_bound is not OffsetBound.NONE,
    packed_layers=("query", "key", "value", "output"),
)
