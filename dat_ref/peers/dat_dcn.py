"""DAT-DCN layer: Deformable DETR's attention as a replacement for DAT's deformable layer.

    y = W_o Σ_p a[m, p] φ(W_v x; p̃[m, p]),   a = softmax(W_a x[m]),   p̃[m, p] = r_m + W_Δ x[m] + b_Δ   for each head

Weights and offsets are predicted from the query's features. There are no keys. The layer follows the code that DAT's
authors published in their detection and segmentation repositories. It differs from Deformable DETR
(`dat_ref.peers.ms_deform_attn`) in two ways:

- Offsets are (y, x) in units of half the map. Deformable DETR's are (x, y) in pixels. The initial ring of ±1 … ±P is
  the same, so most points start outside the map, where they read zero and get no gradient.
- The reference point of a pixel follows the 2023 release: half a pixel below and to the right of the pixel's center.
  It is undefined on a map of one row or column.

With ``convention=CELL_CENTER`` the reference points are the pixel centers. The layer then equals Deformable DETR's with
offset weights scaled by half the map. It is not known whether the article's own comparison used this code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .._checks import Array, ConfigError, Tree, check_divides, check_fields, check_map, integer
from ..config import CHECK_CONVENTION, DeformableAttentionConfig, PeerConfig
from ..conventions import Convention
from ..official import NameMapping, ReleasedName
from ..ops.basic import linear, linear_macs, linear_vjp, softmax, softmax_vjp
from ..ops.grid import Size, reference_points, to_pixels, to_pixels_vjp
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
from .ms_deform_attn import ring_offsets
from .multi_scale import (
    sample_tokens,
    sample_tokens_memory,
    sample_tokens_vjp,
    weighted_sum,
    weighted_sum_vjp,
)


@dataclass(frozen=True)
class DATDCNAttentionConfig(PeerConfig):
    """Configuration of Deformable DETR's attention as a block of DAT.

    Args:
        points: number P of sampled points per query and head.
        convention: geometry of reference points and offsets; ``DATPP2023`` is the geometry of the released code.
    """

    heads: int
    points: int = 4
    convention: Convention = Convention.DATPP2023

    kind = "dat_dcn"

    def __post_init__(self) -> None:
        check_fields(self, dim=integer(1), heads=integer(), points=integer(1), convention=CHECK_CONVENTION)
        check_divides("heads", self.heads, "dim", self.dim)


def dat_dcn_shapes(config: DATDCNAttentionConfig) -> Tree:
    """Return the parameter shapes as a tree."""
    dim, samples = config.dim, config.heads * config.points
    rows = {"offset": 2 * samples, "weights": samples, "value": dim, "output": dim}
    return {name: {"weight": (count, dim), "bias": (count,)} for name, count in rows.items()}


def dat_dcn_names(config: DATDCNAttentionConfig) -> NameMapping:
    """Return the released names of the parameters (``DAttentionDCN``)."""
    released = {
        "offset": ("proj_off", "same"),
        "weights": ("proj_att", "same"),
        "value": ("proj_v", "conv1x1"),
        "output": ("proj_out", "conv1x1"),
    }
    names: NameMapping = {}
    for ours, (theirs, layout) in released.items():
        names[f"{ours}.weight"] = ReleasedName(f"{theirs}.weight", layout)
        names[f"{ours}.bias"] = ReleasedName(f"{theirs}.bias")
    return names


def dat_dcn_init(params: Tree, config: DATDCNAttentionConfig, rng: np.random.Generator) -> None:
    """Initialize as released: Deformable DETR's ring with (x, y) read as (y, x), and equal weights."""
    for leaf in ("weight", "bias"):
        params["offset"][leaf][:] = params["weights"][leaf][:] = 0
    params["offset"]["bias"][:] = ring_offsets(config.heads, 1, config.points).ravel()


@dataclass(frozen=True)
class DATDCNTrace:
    """Intermediates of `dat_dcn_attention`; queries are the H·W pixels."""

    x: Array  # (B, C, H, W)
    value: Array  # (B, H·W, heads, d)
    points: Array  # (B, H·W, heads, 1, P, 2), (y, x), normalized by the convention
    points_px: Array  # the same points in pixels of the map
    sampled: Array  # (B, H·W, heads, 1, P, d)
    attention: Array  # (B, H·W, heads, 1, P)
    merged: Array  # (B, C, H, W), before the output projection


def dat_dcn_attention(x: Array, params: Tree, config: DATDCNAttentionConfig) -> tuple[Array, DATDCNTrace]:
    """Attend from every pixel of a map to points around it.

    Args:
        x: input map (B, C, H, W).
        params: parameter tree with the shapes of `dat_dcn_shapes`.

    Returns:
        The output (B, C, H, W) and the trace.

    Raises:
        ConfigError: for a map of one row or column with ``DATPP2023``, which has no reference points there.
    """
    x = check_map("x", x, config.dim)
    batch, dim, height, width = x.shape
    size: Size = (height, width)
    per_point = (batch, height * width, config.heads, 1, config.points)
    reference = reference_points(size, config.convention).reshape(-1, 1, 1, 1, 2)
    if not np.isfinite(reference).all():
        raise ConfigError(
            f"convention: {config.convention.name} has no reference points on a map of one row or column, got {size}; "
            "use CELL_CENTER"
        )
    offsets = _to_tokens(linear(x, **params["offset"])).reshape(*per_point, 2)
    offsets = offsets.astype(np.result_type(x.dtype, np.float32), copy=False)
    points = reference.astype(offsets.dtype) + offsets
    points_px = to_pixels(points, size, config.convention)
    attention = softmax(_to_tokens(linear(x, **params["weights"])).reshape(per_point))
    value = _to_tokens(linear(x, **params["value"])).reshape(*per_point[:3], dim // config.heads)
    sampled = sample_tokens(value, points_px, [size])
    merged = weighted_sum(sampled, attention).swapaxes(1, 2).reshape(x.shape)
    return linear(merged, **params["output"]), DATDCNTrace(x, value, points, points_px, sampled, attention, merged)


def _to_tokens(x: Array) -> Array:
    """Reshape (B, N, H, W) → (B, H·W, N)."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]).swapaxes(1, 2)


def dat_dcn_attention_vjp(
    cotangent: Array, trace: DATDCNTrace, params: Tree, config: DATDCNAttentionConfig
) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params); x receives gradient through the values, the weights and the offsets."""
    x = trace.x
    size: Size = x.shape[2:]
    output = linear_vjp(cotangent, trace.merged, **params["output"])
    grad_sampled, grad_attention = weighted_sum_vjp(_to_tokens(output.x), trace.sampled, trace.attention)
    grad_logits = softmax_vjp(grad_attention, trace.attention)
    grad_value, grad_points_px = sample_tokens_vjp(grad_sampled, trace.value, trace.points_px, [size])
    grad_offsets = to_pixels_vjp(grad_points_px, size, config.convention)
    grad_params: dict[str, Tree] = {"output": output.params}
    grad_x = np.zeros_like(output.x)
    for name, grad in (("offset", grad_offsets), ("weights", grad_logits), ("value", grad_value)):
        grad_map = grad.reshape(*grad.shape[:2], len(params[name]["bias"])).swapaxes(1, 2)
        grads = linear_vjp(grad_map.reshape(len(x), grad_map.shape[1], *size), x, **params[name])
        grad_x, grad_params[name] = grad_x + grads.x, grads.params
    return grad_x, grad_params


def dat_dcn_attention_macs(batch: int, size: Size, config: DATDCNAttentionConfig) -> int:
    """Return multiply-adds: 2 HW C² + 3 HW C · heads P for offsets and weights + 5 HW P C to sample and sum."""
    pixels, dim = batch * size[0] * size[1], config.dim
    predictor = linear_macs(pixels, dim, 3 * config.heads * config.points)
    samples = pixels * config.points
    return linear_macs(pixels, dim, 2 * dim) + predictor + bilinear_sample_macs(samples, dim) + samples * dim


# ------------------------------------------------------------------------------------------------ the row


def _terms(batch: int, size: Size, config: DATDCNAttentionConfig) -> Macs:
    pixels = batch * math.prod(size)
    parts = {
        "query and output": linear_macs(pixels, config.dim, config.dim),
        "key and value": linear_macs(pixels, config.dim, config.dim),
        "offset network": linear_macs(pixels, config.dim, 2 * config.heads * config.points),
        "sampling": bilinear_sample_macs(pixels * config.points, config.dim),
    }
    return with_remainder("attention", dat_dcn_attention_macs(batch, size, config), parts)


def _memory(tape: Tape, batch: int, size: Size, config: DATDCNAttentionConfig) -> None:
    pixels = batch * math.prod(size)
    elements, points = pixels * config.dim, pixels * config.heads * config.points
    with tape.temporary(2 * points):  # offsets
        tape.step("offset network", 2 * 2 * points)
        tape.step("attention", points, 2 * points)
        tape.step("key and value", elements)
        sample_tokens_memory(tape, batch, size, config.dim, config.heads, config.points)
        tape.step("attention", elements)
        tape.step("query and output", elements)


def _receptive_field(query: Pixel, size: Size, config: DATDCNAttentionConfig, trace: DATDCNTrace, image: int) -> Array:
    check_traced_size(trace.x.shape[2:], size)
    return sampled_pixels(trace.points_px[image, query[0] * size[1] + query[1]], size)


def _candidates(layer: DeformableAttentionConfig, size: Size) -> Iterator[Candidate]:
    # The released references do not exist on a map of one row or column.
    convention = Convention.DATPP2023 if min(size) > 1 else Convention.CELL_CENTER
    for points in point_counts(size):
        yield Candidate(DATDCNAttentionConfig(layer.dim, layer.heads, points, convention), points)


ATTENTION = Attention(
    DATDCNAttentionConfig,
    dat_dcn_shapes,
    dat_dcn_attention,
    dat_dcn_attention_vjp,
    dat_dcn_attention_macs,
    terms=_terms,
    memory=_memory,
    receptive_field=_receptive_field,
    module="dat_ref.torch.peers.dat_dcn:DATDCNAttention",
    needs_trace=True,
    init=dat_dcn_init,
    replacements={"dat_dcn": _candidates},
    released_names=dat_dcn_names,
    parameter_terms={"offset": "offset network", "weights": "attention"},
    interpolated=sampling_term,
)
