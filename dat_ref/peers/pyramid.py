"""Spatial-reduction attention (PVT): each query attends to the whole map, reduced by a factor r on both axes.

    x̄ = LayerNorm(Conv_r×r, stride r (x))                  r = 1: x̄ = x
    z = softmax(q k̄ᵀ / √d_head) v̄,   [k̄, v̄] = x̄ W_kv       for each head

A key represents a whole r × r cell. There is no position bias, so the scores do not depend on the positions of cells.
If r does not divide the map size, the map is padded with zeros at the bottom and right, as in the patch embedding. The
released code drops the incomplete cells instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .._checks import RATE, Array, Tree, check_divides, check_fields, check_map, integer
from ..config import DeformableAttentionConfig, PeerConfig
from ..official import NameMapping, ReleasedName
from ..ops.attention import attend, attend_macs, attend_vjp, merge_heads, split_heads
from ..ops.basic import (
    Padding,
    conv2d,
    conv2d_macs,
    conv2d_vjp,
    layer_norm,
    layer_norm_vjp,
    linear,
    linear_macs,
    linear_vjp,
)
from ..ops.grid import Size
from .attention import Attention, Candidate, dropout_rates, whole_map, with_remainder
from .memory import Macs, Tape, conv_workspace


@dataclass(frozen=True)
class PyramidAttentionConfig(PeerConfig):
    """Configuration of attention to a map that is `reduction` times coarser.

    Args:
        reduction: number r of map pixels per key on each axis.
        attention_dropout, projection_dropout: dropout rates during training, used by `dat_ref.torch` only.
    """

    heads: int
    reduction: int = 1
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0

    kind = "pyramid"

    def __post_init__(self) -> None:
        check_fields(
            self,
            dim=integer(1),
            heads=integer(),
            reduction=integer(1),
            attention_dropout=RATE,
            projection_dropout=RATE,
        )
        check_divides("heads", self.heads, "dim", self.dim)

    @property
    def scale(self) -> float:
        """Scale of the dot products, d^(-1/2)."""
        return (self.dim // self.heads) ** -0.5


def pyramid_shapes(config: PyramidAttentionConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    dim, cell = config.dim, config.reduction
    shapes: dict[str, Tree] = {
        "query": {"weight": (dim, dim), "bias": (dim,)},
        "key_value": {"weight": (2 * dim, dim), "bias": (2 * dim,)},
        "output": {"weight": (dim, dim), "bias": (dim,)},
    }
    if cell > 1:
        shapes["reduction"] = {"weight": (dim, dim, cell, cell), "bias": (dim,)}
        shapes["norm"] = {"weight": (dim,), "bias": (dim,)}
    return shapes


def pyramid_names(config: PyramidAttentionConfig) -> NameMapping:
    """Return the released names of the parameters (``PyramidAttention`` in DAT's own repositories)."""
    names: NameMapping = {}
    for ours, theirs in (("query", "q"), ("key_value", "kv"), ("output", "proj")):
        names[f"{ours}.weight"] = ReleasedName(f"{theirs}.weight", "conv1x1")
        names[f"{ours}.bias"] = ReleasedName(f"{theirs}.bias")
    if config.reduction > 1:
        for ours, theirs in (("reduction", "proj_ds.0"), ("norm", "proj_ds.1.norm")):
            names |= {f"{ours}.{leaf}": ReleasedName(f"{theirs}.{leaf}") for leaf in ("weight", "bias")}
    return names


@dataclass(frozen=True)
class PyramidTrace:
    """Intermediates of `pyramid_attention`; H̄ × W̄ = ⌈H/r⌉ × ⌈W/r⌉ is the size of the key map."""

    x: Array  # (B, C, H, W)
    convolved: Array  # (B, C, H̄, W̄), before the norm; `x` itself if r = 1
    reduced: Array  # (B, C, H̄, W̄)
    q: Array  # (B, heads, H·W, d)
    k: Array  # (B, heads, H̄·W̄, d)
    v: Array
    attention: Array  # (B, heads, H·W, H̄·W̄)
    merged: Array  # (B, C, H, W), before the output projection


def _padding(size: Size, reduction: int) -> Padding:
    bottom, right = (-length % reduction for length in size)
    return (0, bottom), (0, right)


def pyramid_attention(x: Array, params: Tree, config: PyramidAttentionConfig) -> tuple[Array, PyramidTrace]:
    """Attend to the reduced map.

    Args:
        x: input map (B, C, H, W), any H and W.
        params: parameter tree with the shapes of `pyramid_shapes`.

    Returns:
        The output (B, C, H, W) and the trace. With r = 1 this is plain multi-head attention.
    """
    x = check_map("x", x, config.dim)
    convolved = reduced = x
    if config.reduction > 1:
        padding = _padding(x.shape[2:], config.reduction)
        convolved = conv2d(x, **params["reduction"], stride=config.reduction, padding=padding)
        reduced = layer_norm(convolved, **params["norm"])
    q = split_heads(linear(x, **params["query"]), config.heads)
    k, v = np.split(split_heads(linear(reduced, **params["key_value"]), 2 * config.heads), 2, axis=1)
    attended, attention = attend(q, k, v, None, config.scale)
    merged = merge_heads(attended, x.shape[2:])
    y = linear(merged, **params["output"])
    return y, PyramidTrace(x, convolved, reduced, q, k, v, attention, merged)


def pyramid_attention_vjp(
    cotangent: Array, trace: PyramidTrace, params: Tree, config: PyramidAttentionConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params); x receives gradient through the queries and through the reduced map."""
    size = trace.x.shape[2:]
    output = linear_vjp(cotangent, trace.merged, **params["output"])
    grad_attended = split_heads(output.x, config.heads)
    grads = attend_vjp(grad_attended, trace.q, trace.k, trace.v, trace.attention, config.scale)
    query = linear_vjp(merge_heads(grads.q, size), trace.x, **params["query"])
    grad_kv = merge_heads(np.concatenate([grads.k, grads.v], axis=1), trace.reduced.shape[2:])
    key_value = linear_vjp(grad_kv, trace.reduced, **params["key_value"])
    grad_params = {"output": output.params, "query": query.params, "key_value": key_value.params}
    if config.reduction == 1:
        return query.x + key_value.x, grad_params
    norm = layer_norm_vjp(key_value.x, trace.convolved, **params["norm"])
    padding = _padding(size, config.reduction)
    reduction = conv2d_vjp(norm.x, trace.x, **params["reduction"], stride=config.reduction, padding=padding)
    return query.x + reduction.x, {**grad_params, "reduction": reduction.params, "norm": norm.params}


def pyramid_attention_macs(batch: int, size: Size, config: PyramidAttentionConfig) -> int:
    """Return multiply-adds: 2 HW C² + 2 Nk C² + 2 HW Nk C, plus r² Nk C² to reduce, with Nk = ⌈H/r⌉ ⌈W/r⌉."""
    dim, cell, pixels = config.dim, config.reduction, size[0] * size[1]
    keys = -(-size[0] // cell) * -(-size[1] // cell)
    projections = linear_macs(batch * (pixels + keys), dim, 2 * dim)
    reduction = conv2d_macs(batch * keys, dim, dim, cell) if cell > 1 else 0
    return projections + reduction + attend_macs(batch, pixels, keys, dim)


# ------------------------------------------------------------------------------------------------ the row


def _reduced(size: Size, cell: int) -> int:
    return math.prod(-(-length // cell) for length in size)


def _terms(batch: int, size: Size, config: PyramidAttentionConfig) -> Macs:
    cell = config.reduction
    pixels, keys = batch * math.prod(size), batch * _reduced(size, cell)
    parts = {
        "query and output": 2 * linear_macs(pixels, config.dim, config.dim),
        "key and value": 2 * linear_macs(keys, config.dim, config.dim),
    }
    if cell > 1:
        parts["reduction"] = conv2d_macs(keys, config.dim, config.dim, cell)
    return with_remainder("attention", pyramid_attention_macs(batch, size, config), parts)


def _memory(tape: Tape, batch: int, size: Size, config: PyramidAttentionConfig) -> None:
    cell, pixels, keys = config.reduction, math.prod(size), _reduced(size, config.reduction)
    elements, reduced = batch * pixels * config.dim, batch * keys * config.dim
    if cell > 1:
        workspace = conv_workspace(batch, (config.dim, config.dim), size, cell, cell, _padding(size, cell))
        tape.step("reduction", reduced, workspace)
        tape.step("reduction", reduced, reduced)  # layer norm
    tape.step("query and output", elements)
    tape.step("key and value", 2 * reduced)
    tape.attend(batch * config.heads * pixels * keys)
    with tape.temporary(elements):
        tape.step("attention", elements)
        tape.step("query and output", elements)


def _candidates(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    for reduction in range(1, max(size) + 1):
        config = PyramidAttentionConfig(layer.dim, layer.heads, reduction, **dropout_rates(layer))
        yield Candidate(config, _reduced(size, reduction))


ATTENTION = Attention(
    PyramidAttentionConfig,
    pyramid_shapes,
    pyramid_attention,
    pyramid_attention_vjp,
    pyramid_attention_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=whole_map,
    module="dat_ref.torch.peers.pyramid:PyramidAttention",
    replacements={"pyramid": _candidates},
    released_names=pyramid_names,
    parameter_terms={"key_value": "key and value", "norm": "reduction"},
)
