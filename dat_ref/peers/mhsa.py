"""Plain multi-head self-attention: each query attends to every pixel of the map (ViT).

    z = softmax(q kᵀ / √d_head + B̂[query - key]) v        for each head

Its cost grows with the square of the number of pixels; the other attentions avoid this. The relative position bias is
optional. Its table is built for a map of H₀ × W₀. For another map size the table is read as in the deformable layer:
bilinearly, at positions in fractions of the map. For its own size every read hits one table entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import RATE, Array, Tree, check_divides, check_fields, check_map, integer, optional, size_pair
from ..config import BiasKind, DeformableAttentionConfig, PeerConfig
from ..conventions import Convention
from ..ops.attention import attend, attend_macs, attend_vjp, merge_heads, split_heads
from ..ops.basic import linear, linear_macs, linear_vjp
from ..ops.bias import table_bias, table_bias_macs, table_bias_vjp
from ..ops.grid import Size, reference_points
from .attention import Attention, Candidate, dropout_rates, whole_map, with_remainder
from .memory import Macs, Tape, sampling_workspace


@dataclass(frozen=True)
class MultiHeadAttentionConfig(PeerConfig):
    """Configuration of multi-head self-attention over the whole map.

    Args:
        size: map size (H₀, W₀) of the relative bias table, or None for no bias.
        attention_dropout, projection_dropout: dropout rates during training, used by `dat_ref.torch` only.
    """

    heads: int
    size: Size | None = None
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0

    kind = "multi_head"

    def __post_init__(self) -> None:
        check_fields(
            self,
            dim=integer(1),
            heads=integer(),
            size=optional(size_pair),
            attention_dropout=RATE,
            projection_dropout=RATE,
        )
        check_divides("heads", self.heads, "dim", self.dim)

    @property
    def scale(self) -> float:
        """Scale of the dot products, d^(-1/2)."""
        return (self.dim // self.heads) ** -0.5


def multi_head_shapes(config: MultiHeadAttentionConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    shapes: dict[str, Tree] = {"qkv": {"weight": (3 * config.dim, config.dim), "bias": (3 * config.dim,)}}
    if config.size is not None:
        shapes["position_bias"] = {"table": (config.heads, 2 * config.size[0] - 1, 2 * config.size[1] - 1)}
    shapes["output"] = {"weight": (config.dim, config.dim), "bias": (config.dim,)}
    return shapes


@dataclass(frozen=True)
class MultiHeadTrace:
    """Intermediates of `multi_head_attention`."""

    x: Array  # (B, C, H, W)
    q: Array  # (B, heads, H·W, d)
    k: Array
    v: Array
    attention: Array  # (B, heads, H·W, H·W)
    merged: Array  # (B, C, H, W), before the output projection


def multi_head_attention(x: Array, params: Tree, config: MultiHeadAttentionConfig) -> tuple[Array, MultiHeadTrace]:
    """Attend to the whole map.

    Args:
        x: input map (B, C, H, W), any H and W.
        params: parameter tree with the shapes of `multi_head_shapes`.

    Returns:
        The output (B, C, H, W) and the trace.
    """
    x = check_map("x", x, config.dim)
    qkv = split_heads(linear(x, **params["qkv"]), 3 * config.heads)  # (B, 3·heads, H·W, d)
    q, k, v = np.split(qkv, 3, axis=1)
    bias = None
    if config.size is not None:
        points, geometry = _table_points(x)
        bias = table_bias(params["position_bias"]["table"], points, **geometry)  # (1, heads, H·W, H·W)
    attended, attention = attend(q, k, v, bias, config.scale)
    merged = merge_heads(attended, x.shape[2:])
    return linear(merged, **params["output"]), MultiHeadTrace(x, q, k, v, attention, merged)


def _table_points(x: Array) -> tuple[Array, dict[str, Any]]:
    """Return the pixels as points (1, 1, H·W, 2), and the geometry arguments of `table_bias`."""
    size: Size = x.shape[2:]
    points = reference_points(size, Convention.CELL_CENTER).astype(np.result_type(x.dtype, np.float32))
    return points.reshape(1, 1, -1, 2), {"query_size": size, "convention": Convention.CELL_CENTER}


def multi_head_attention_vjp(
    cotangent: Array, trace: MultiHeadTrace, params: Tree, config: MultiHeadAttentionConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params): backward through output projection, attention, bias table and qkv projection."""
    output = linear_vjp(cotangent, trace.merged, **params["output"])
    grad_params: dict[str, Tree] = {"output": output.params}
    grad_attended = split_heads(output.x, config.heads)
    grads = attend_vjp(grad_attended, trace.q, trace.k, trace.v, trace.attention, config.scale)
    if config.size is not None:
        points, geometry = _table_points(trace.x)
        table = params["position_bias"]["table"]
        grad_bias = grads.bias.sum(axis=0, keepdims=True)
        grad_params["position_bias"] = {"table": table_bias_vjp(grad_bias, table, points, **geometry).table}
    grad_qkv = np.concatenate([grads.q, grads.k, grads.v], axis=1)
    qkv = linear_vjp(merge_heads(grad_qkv, trace.x.shape[2:]), trace.x, **params["qkv"])
    return qkv.x, {**grad_params, "qkv": qkv.params}


def multi_head_attention_macs(batch: int, size: Size, config: MultiHeadAttentionConfig) -> int:
    """Return multiply-adds: 4 HW C² + 2 (HW)² C, plus 4 (HW)² heads once per batch to read a bias."""
    pixels = size[0] * size[1]
    bias = 0 if config.size is None else table_bias_macs(1, config.heads, pixels, pixels)
    projections = linear_macs(batch * pixels, config.dim, 4 * config.dim)
    return projections + attend_macs(batch, pixels, pixels, config.dim) + bias


# ------------------------------------------------------------------------------------------------ the row


def _terms(batch: int, size: Size, config: MultiHeadAttentionConfig) -> Macs:
    pixels = math.prod(size)
    projections = 2 * linear_macs(batch * pixels, config.dim, config.dim)
    parts = {"query and output": projections, "key and value": projections}
    if config.size is not None:
        parts["bias"] = table_bias_macs(1, config.heads, pixels, pixels)
    return with_remainder("attention", multi_head_attention_macs(batch, size, config), parts)


def _memory(tape: Tape, batch: int, size: Size, config: MultiHeadAttentionConfig) -> None:
    """Record the memory steps; a bias is shared by all images and not saved."""
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


def _candidates(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    bias_size = size if layer.bias is BiasKind.TABLE else None
    config = MultiHeadAttentionConfig(layer.dim, layer.heads, bias_size, **dropout_rates(layer))
    yield Candidate(config, size[0] * size[1])


ATTENTION = Attention(
    MultiHeadAttentionConfig,
    multi_head_shapes,
    multi_head_attention,
    multi_head_attention_vjp,
    multi_head_attention_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=whole_map,
    module="dat_ref.torch.peers.mhsa:MultiHeadAttention",
    replacements={"multi_head": _candidates},
    parameter_terms={"position_bias": "bias"},
    interpolated=lambda config: {"bias"},
    data_dependent_points=lambda config: False,
    packed_layers=("qkv", "output"),
)
