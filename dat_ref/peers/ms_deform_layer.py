"""Deformable DETR's attention as the attention of a block: one level, every pixel is a query and a value.

The reference point of a pixel is its own center. See `dat_ref.peers.ms_deform_attn` for the equations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from .._checks import Array, ConfigError, Tree, check_map
from ..config import DeformableAttentionConfig
from ..ops.basic import linear_macs
from ..ops.grid import Size
from ..ops.sampling import bilinear_sample_macs
from .attention import (
    Attention,
    Candidate,
    Pixel,
    check_traced_size,
    point_counts,
    sampled_pixels,
    sampling_term,
    with_remainder,
)
from .memory import Macs, Tape
from .ms_deform_attn import (
    MultiScaleDeformableConfig,
    MultiScaleDeformableTrace,
    Scoring,
    multi_scale_deformable,
    multi_scale_deformable_init,
    multi_scale_deformable_macs,
    multi_scale_deformable_names,
    multi_scale_deformable_shapes,
    multi_scale_deformable_vjp,
)
from .multi_scale import sample_tokens_memory


def cell_centers(size: Size) -> Array:
    """Return the pixel centers of a map, its own reference points: (H·W, 1, 2), (x, y) in [0, 1]."""
    rows, columns = ((np.arange(length) + 0.5) / length for length in size)
    return np.stack(np.meshgrid(columns, rows, indexing="xy"), axis=-1).reshape(-1, 1, 2)


def _require_one_level(config: MultiScaleDeformableConfig) -> None:
    if config.levels != 1:
        raise ConfigError(f"levels: expected 1, a block attends to its own map, got {config.levels}")


def multi_scale_deformable_layer(
    x: Array, params: Tree, config: MultiScaleDeformableConfig
) -> tuple[Array, MultiScaleDeformableTrace]:
    """Attend from every pixel of a map to points around it.

    Args:
        x: input map (B, C, H, W), any H and W, used as queries and as values (without DETR's position embedding).
        params: parameter tree with the shapes of `multi_scale_deformable_shapes` for one level.

    Returns:
        The output (B, C, H, W) and the trace.
    """
    _require_one_level(config)
    x = check_map("x", x, config.dim)
    size: Size = x.shape[2:]
    tokens = x.reshape(len(x), config.dim, size[0] * size[1]).swapaxes(1, 2)
    centers = cell_centers(size).astype(np.result_type(x.dtype, np.float32))
    references = np.broadcast_to(centers, (len(x), *centers.shape))
    y, trace = multi_scale_deformable(tokens, tokens, references, [size], params, config)
    return y.swapaxes(1, 2).reshape(x.shape), trace


def multi_scale_deformable_layer_vjp(
    cotangent: Array, trace: MultiScaleDeformableTrace, params: Tree, config: MultiScaleDeformableConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params); the map receives gradient as query and as value."""
    batch, dim, height, width = cotangent.shape
    grad_tokens = cotangent.reshape(batch, dim, height * width).swapaxes(1, 2)
    grads = multi_scale_deformable_vjp(grad_tokens, trace, params, config)
    return (grads.query + grads.value).swapaxes(1, 2).reshape(cotangent.shape), grads.params


def multi_scale_deformable_layer_macs(batch: int, size: Size, config: MultiScaleDeformableConfig) -> int:
    """Return the multiply-adds of the layer on a map of `size`: H·W queries, one level."""
    _require_one_level(config)
    return multi_scale_deformable_macs(batch, size[0] * size[1], [size], config)


# ------------------------------------------------------------------------------------------------ the row


def _terms(batch: int, size: Size, config: MultiScaleDeformableConfig) -> Macs:
    pixels, by_dot_product = batch * math.prod(size), config.scoring == "dot_product"
    projections = linear_macs(pixels, config.dim, config.dim) * (2 if by_dot_product else 1)
    parts = {
        "query and output": projections,
        "key and value": projections,
        "offset network": linear_macs(pixels, config.dim, 2 * config.samples),
        "sampling": bilinear_sample_macs(pixels * config.points, config.dim) * (2 if by_dot_product else 1),
    }
    return with_remainder("attention", multi_scale_deformable_layer_macs(batch, size, config), parts)


def _memory(tape: Tape, batch: int, size: Size, config: MultiScaleDeformableConfig) -> None:
    pixels = batch * math.prod(size)
    elements, points = pixels * config.dim, pixels * config.samples
    tape.step("offset network", 3 * 2 * points + 2 * math.prod(size))  # offsets, locations, pixels; reference points
    tape.step("key and value", elements)
    sample_tokens_memory(tape, batch, size, config.dim, config.heads, config.points)
    if config.scoring == "dot_product":
        tape.step("query and output", elements)
        tape.step("key and value", elements)
        sample_tokens_memory(tape, batch, size, config.dim, config.heads, config.points)
    tape.step("attention", points, 3 * points)
    tape.step("attention", elements)
    tape.step("query and output", elements)


def _receptive_field(
    query: Pixel, size: Size, config: MultiScaleDeformableConfig, trace: MultiScaleDeformableTrace, image: int
) -> Array:
    check_traced_size(trace.spatial_shapes[0], size)
    return sampled_pixels(trace.points_px[image, query[0] * size[1] + query[1], :, 0], size)


def _candidates(layer: DeformableAttentionConfig, size: Size, scoring: Scoring) -> Iterator[Candidate]:
    for points in point_counts(size):
        yield Candidate(MultiScaleDeformableConfig(layer.dim, layer.heads, points, scoring=scoring), points)


ATTENTION = Attention(
    MultiScaleDeformableConfig,
    multi_scale_deformable_shapes,
    multi_scale_deformable_layer,
    multi_scale_deformable_layer_vjp,
    multi_scale_deformable_layer_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=_receptive_field,
    module="dat_ref.torch.peers.ms_deform_attn:MultiScaleDeformableAttention",
    needs_trace=True,
    init=multi_scale_deformable_init,
    replacements={
        "ms_deform": partial(_candidates, scoring="query"),
        "ms_deform_dot": partial(_candidates, scoring="dot_product"),
    },
    released_names=multi_scale_deformable_names,
    parameter_terms={"offset": "offset network", "weights": "attention"},
    interpolated=sampling_term,
)
