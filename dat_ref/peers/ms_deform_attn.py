"""Multi-scale deformable attention (Deformable DETR): each query sums weighted samples around a reference point.

    y = W_o Σ_l Σ_p a[l, p] φ(W_v v_l; p̃[l, p]),       a = softmax(W_a q) over the levels l and points p of a head

    p̃[l, p] = r_l + Δ[l, p]/(W_l, H_l)                  reference points: offsets in pixels of the level
    p̃[l, p] = r_l + Δ[l, p] · (w, h)/(2 P)              reference boxes (x, y, w, h): offsets in fractions of the box

for each head, with Δ = W_Δ q. The weights a are predicted from the query alone, without keys. Only values are sampled,
N_q·L·P·C elements. DAT's authors criticize these weights. The variant with ``scoring="dot_product"`` uses keys: it also
samples W_k v at the same points, and a = softmax(W_q q · k̃/√d).

Tokens are (B, tokens, C) and locations are (x, y) in [0, 1], as in the released code; see `dat_ref.peers.multi_scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from .._checks import (
    Array,
    ConfigError,
    ShapeError,
    Tree,
    check_array,
    check_divides,
    check_fields,
    choice,
    integer,
)
from ..config import PeerConfig
from ..official import NameMapping, ReleasedName
from ..ops.basic import linear, linear_macs, linear_vjp, softmax, softmax_vjp
from ..ops.grid import Size
from ..ops.sampling import bilinear_sample_macs
from .multi_scale import (
    level_sizes,
    location_gradient,
    location_pixels,
    sample_tokens,
    sample_tokens_vjp,
    weighted_sum,
    weighted_sum_vjp,
)

Scoring = Literal["query", "dot_product"]

# ------------------------------------------------------------------------------------------------ the module


@dataclass(frozen=True)
class MultiScaleDeformableConfig(PeerConfig):
    """Configuration of Deformable DETR's attention.

    As a block's attention it has one level, and every pixel is a query with its own center as reference point.

    Args:
        points: number P of sampled points per query, head and level.
        levels: number L of maps.
        scoring: source of the weights: the ``"query"`` alone (as released), or the ``"dot_product"`` with sampled keys.
    """

    heads: int
    points: int = 4
    levels: int = 1
    scoring: Scoring = "query"

    kind = "multi_scale_deformable"

    def __post_init__(self) -> None:
        check_fields(
            self,
            dim=integer(1),
            heads=integer(),
            points=integer(1),
            levels=integer(1),
            scoring=choice(get_args(Scoring)),
        )
        check_divides("heads", self.heads, "dim", self.dim)

    @property
    def scale(self) -> float:
        """Scale of the dot products, d^(-1/2)."""
        return (self.dim // self.heads) ** -0.5

    @property
    def samples(self) -> int:
        """Number of points per query over all heads and levels."""
        return self.heads * self.levels * self.points


def multi_scale_deformable_shapes(config: MultiScaleDeformableConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    dim = config.dim
    outputs = {"offset": 2 * config.samples, "value": dim, "output": dim}
    outputs |= {"weights": config.samples} if config.scoring == "query" else {"query": dim, "key": dim}
    return {name: {"weight": (rows, dim), "bias": (rows,)} for name, rows in outputs.items()}


def multi_scale_deformable_names(config: MultiScaleDeformableConfig) -> NameMapping:
    """Return the released names of the parameters (Deformable DETR's ``MSDeformAttn``)."""
    if config.scoring != "query":
        raise ConfigError(f"scoring: expected 'query', the only released variant, got {config.scoring!r}")
    released = {
        "offset": "sampling_offsets",
        "weights": "attention_weights",
        "value": "value_proj",
        "output": "output_proj",
    }
    return {
        f"{ours}.{leaf}": ReleasedName(f"{released[ours]}.{leaf}") for ours in released for leaf in ("weight", "bias")
    }


def ring_offsets(heads: int, levels: int, points: int) -> Array:
    """Return the initial offsets of a query, (heads, levels, points, 2), (x, y), in pixels.

    Head h has the direction 2π h/heads. Its points are 1, 2, … P pixels away, measured along the longer axis; with 8
    heads they form concentric squares.
    """
    angles = np.arange(heads) * (2 * np.pi / heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(axis=-1, keepdims=True)
    distances = np.arange(1, points + 1)
    return np.broadcast_to(directions[:, None, None] * distances[:, None], (heads, levels, points, 2))


def multi_scale_deformable_init(params: Tree, config: MultiScaleDeformableConfig, rng: np.random.Generator) -> None:
    """Initialize as released: a ring of offsets and equal weights for every query, Xavier-uniform projections."""
    for name, leaf in params.items():
        leaf["bias"][:] = 0
        if name in ("offset", "weights"):
            leaf["weight"][:] = 0
        else:
            leaf["weight"][:] = rng.uniform(-1, 1, leaf["weight"].shape) * np.sqrt(3 / config.dim)
    params["offset"]["bias"][:] = ring_offsets(config.heads, config.levels, config.points).ravel()


@dataclass(frozen=True)
class MultiScaleDeformableTrace:
    """Intermediates of `multi_scale_deformable`."""

    query: Array  # (B, Q, C)
    value_input: Array  # (B, S, C)
    reference_points: Array  # (B, Q, L, 2) or (B, Q, L, 4)
    spatial_shapes: list[Size]
    value: Array  # (B, S, heads, d)
    keys: Array | None  # (B, S, heads, d), for dot products
    projected_query: Array | None  # (B, Q, heads, d), for dot products
    offsets: Array  # (B, Q, heads, L, P, 2), (x, y)
    locations: Array  # (B, Q, heads, L, P, 2), (x, y) in [0, 1]
    points_px: Array  # (B, Q, heads, L, P, 2), (y, x), in pixels of the level
    sampled: Array  # (B, Q, heads, L, P, d), values
    sampled_keys: Array | None
    attention: Array  # (B, Q, heads, L, P)
    merged: Array  # (B, Q, C), before the output projection


def _linear_tokens(tokens: Array, weight: Array, bias: Array) -> Array:
    """Apply `linear` to tokens (B, tokens, C)."""
    return linear(tokens.swapaxes(1, 2), weight, bias).swapaxes(1, 2)


def _linear_tokens_vjp(cotangent: Array, tokens: Array, weight: Array, bias: Array) -> tuple[Array, Tree]:
    grads = linear_vjp(cotangent.swapaxes(1, 2), tokens.swapaxes(1, 2), weight, bias)
    return grads.x.swapaxes(1, 2), grads.params


def _split_heads(tokens: Array, heads: int) -> Array:
    return tokens.reshape(*tokens.shape[:2], heads, tokens.shape[2] // heads)


def _merge_heads(per_head: Array) -> Array:
    return per_head.reshape(*per_head.shape[:2], int(np.prod(per_head.shape[2:])))


def _offset_scale(reference_points: Array, shapes: Sequence[Size], points: int) -> Array:
    """Return the change of location per unit of offset, (x, y), broadcastable to (B, Q, heads, L, P, 2)."""
    if reference_points.shape[-1] == 4:
        return reference_points[:, :, None, :, None, 2:] / (2 * points)
    extent = np.asarray(shapes, dtype=reference_points.dtype)[:, ::-1]  # (L, 2), (W, H)
    return (1 / extent)[None, None, None, :, None]


def multi_scale_deformable(
    query: Array,
    value: Array,
    reference_points: Array,
    spatial_shapes: Sequence[Size] | Array,
    params: Tree,
    config: MultiScaleDeformableConfig,
) -> tuple[Array, MultiScaleDeformableTrace]:
    """Attend from queries to maps.

    Args:
        query: query tokens (B, Q, C).
        value: tokens of all levels, concatenated, (B, S, C), S = Σ H_l W_l.
        reference_points: points (B, Q, L, 2), (x, y), or boxes (B, Q, L, 4), (x, y, w, h), in [0, 1] of each level.
        spatial_shapes: size (H_l, W_l) of each level, (L, 2).
        params: parameter tree with the shapes of `multi_scale_deformable_shapes`.

    Returns:
        The output (B, Q, C) and the trace.
    """
    shapes = _check_module(query, value, reference_points, spatial_shapes, config)
    batch, queries, _ = query.shape
    per_point = (batch, queries, config.heads, config.levels, config.points)
    wide = np.result_type(query.dtype, np.float32)
    offsets = _linear_tokens(query, **params["offset"]).reshape(*per_point, 2).astype(wide, copy=False)
    centers = reference_points[:, :, None, :, None, :2]
    locations = centers + offsets * _offset_scale(reference_points, shapes, config.points)
    points_px = location_pixels(locations, shapes)
    projected = _split_heads(_linear_tokens(value, **params["value"]), config.heads)
    sampled = sample_tokens(projected, points_px, shapes)

    keys = sampled_keys = projected_query = None
    if config.scoring == "query":
        logits = _linear_tokens(query, **params["weights"]).reshape(per_point)
    else:
        projected_query = _split_heads(_linear_tokens(query, **params["query"]), config.heads)
        keys = _split_heads(_linear_tokens(value, **params["key"]), config.heads)
        sampled_keys = sample_tokens(keys, points_px, shapes)
        logits = np.einsum("bqhd,bqhlpd->bqhlp", projected_query, sampled_keys) * query.dtype.type(config.scale)
    attention = _joint_softmax(logits)
    merged = weighted_sum(sampled, attention)
    trace = MultiScaleDeformableTrace(
        query, value, reference_points, shapes, projected, keys, projected_query, offsets, locations, points_px,
        sampled, sampled_keys, attention, merged,
    )  # fmt: skip
    return _linear_tokens(merged, **params["output"]), trace


def _joint_softmax(logits: Array) -> Array:
    """Apply softmax over levels and points jointly, (B, Q, heads, L, P)."""
    levels, points = logits.shape[3:]
    return softmax(logits.reshape(*logits.shape[:3], levels * points)).reshape(logits.shape)


def _check_module(
    query: Array,
    value: Array,
    reference_points: Array,
    spatial_shapes: Sequence[Size] | Array,
    config: MultiScaleDeformableConfig,
) -> list[Size]:
    shapes = level_sizes(spatial_shapes)
    if len(shapes) != config.levels:
        raise ShapeError(f"spatial_shapes: expected levels={config.levels} pairs (H, W), got {shapes}")
    check_array("query", query, {"B": None, "Q": None, "C": config.dim})
    total = sum(height * width for height, width in shapes)
    check_array("value", value, {"B": len(query), "S": total, "C": config.dim}, "S = Σ H_l·W_l")
    coordinates = 4 if np.shape(reference_points)[-1:] == (4,) else 2
    axes: dict[str, int | None] = {
        "B": len(query),
        "Q": query.shape[1],
        "L": config.levels,
        "(x, y) or box": coordinates,
    }
    check_array("reference_points", reference_points, axes)
    return shapes


class MultiScaleDeformableGradients(NamedTuple):
    """Gradients of `multi_scale_deformable`."""

    query: Array
    value: Array
    reference_points: Array
    params: Tree


def multi_scale_deformable_vjp(
    cotangent: Array, trace: MultiScaleDeformableTrace, params: Tree, config: MultiScaleDeformableConfig
) -> MultiScaleDeformableGradients:
    """Return the gradients of `multi_scale_deformable`.

    If the weights are predicted from the query, the maps receive gradient through the values only.
    """
    shapes = trace.spatial_shapes
    grad_merged, output = _linear_tokens_vjp(cotangent, trace.merged, **params["output"])
    grad_params: dict[str, Tree] = {"output": output}
    grad_sampled, grad_attention = weighted_sum_vjp(grad_merged, trace.sampled, trace.attention)
    grad_logits = _joint_softmax_vjp(grad_attention, trace.attention)
    grad_projected, grad_points = sample_tokens_vjp(grad_sampled, trace.value, trace.points_px, shapes)
    grad_value, grad_params["value"] = _linear_tokens_vjp(
        _merge_heads(grad_projected), trace.value_input, **params["value"]
    )

    if trace.keys is None:
        grad_query, grad_params["weights"] = _linear_tokens_vjp(
            _merge_heads(grad_logits), trace.query, **params["weights"]
        )
    else:
        assert trace.sampled_keys is not None
        assert trace.projected_query is not None
        grad_dot = grad_logits * trace.query.dtype.type(config.scale)
        grad_q = np.einsum("bqhlp,bqhlpd->bqhd", grad_dot, trace.sampled_keys)
        grad_query, grad_params["query"] = _linear_tokens_vjp(_merge_heads(grad_q), trace.query, **params["query"])
        grad_sampled_keys = grad_dot[..., None] * trace.projected_query[:, :, :, None, None]
        grad_keys, grad_points_keys = sample_tokens_vjp(grad_sampled_keys, trace.keys, trace.points_px, shapes)
        grad_value_keys, grad_params["key"] = _linear_tokens_vjp(
            _merge_heads(grad_keys), trace.value_input, **params["key"]
        )
        grad_value, grad_points = grad_value + grad_value_keys, grad_points + grad_points_keys

    grad_locations = location_gradient(grad_points, shapes)
    grad_offsets = grad_locations * _offset_scale(trace.reference_points, shapes, config.points)
    grad_query_offsets, grad_params["offset"] = _linear_tokens_vjp(
        _merge_heads(grad_offsets), trace.query, **params["offset"]
    )
    grad_reference = grad_locations.sum(axis=(2, 4))  # over heads and points: (B, Q, L, 2)
    if trace.reference_points.shape[-1] == 4:
        grad_extent = (grad_locations * trace.offsets).sum(axis=(2, 4)) / (2 * config.points)
        grad_reference = np.concatenate([grad_reference, grad_extent], axis=-1)
    return MultiScaleDeformableGradients(grad_query + grad_query_offsets, grad_value, grad_reference, grad_params)


def _joint_softmax_vjp(cotangent: Array, attention: Array) -> Array:
    flat = (*attention.shape[:3], attention.shape[3] * attention.shape[4])
    return softmax_vjp(cotangent.reshape(flat), attention.reshape(flat)).reshape(attention.shape)


def multi_scale_deformable_macs(
    batch: int, queries: int, spatial_shapes: Sequence[Size], config: MultiScaleDeformableConfig
) -> int:
    """Return multiply-adds.

    They are (Q + S) C² to project, 3 Q C · heads L P for offsets and weights, and 5 Q L P C to sample and sum. The
    variant with dot products spends (Q + S) C² on queries and keys instead of Q C · heads L P on the weights, and
    another 5 Q L P C to sample and score the keys.
    """
    dim, tokens = config.dim, batch * sum(height * width for height, width in spatial_shapes)
    queries *= batch
    samples = queries * config.levels * config.points  # all heads together have C channels
    sampling = bilinear_sample_macs(samples, dim) + samples * dim
    macs = linear_macs(queries + tokens, dim, dim) + linear_macs(queries, dim, 2 * config.samples) + sampling
    if config.scoring == "query":
        return macs + linear_macs(queries, dim, config.samples)
    return macs + linear_macs(queries + tokens, dim, dim) + sampling
