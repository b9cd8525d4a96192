"""Row of an attention: all that the rest of the package reads of one attention system, in one record.

Each system defines its row at the end of its file, and `dat_ref.peers.registry` lists the rows. Blocks, cost formulas,
replacement in a backbone, receptive fields, initialization, released names and the torch modules read the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .._checks import Array, ShapeError, Tree
from ..config import AttentionConfig, DeformableAttentionConfig
from ..official import NameMapping
from ..ops.basic import linear_macs
from ..ops.grid import Size
from .memory import Macs, Tape

Pixel = tuple[int, int]  # (y, x)


class Candidate(NamedTuple):
    """Candidate replacement of a deformable layer, and its number of keys per query."""

    config: AttentionConfig
    keys: int


Rule = Callable[[DeformableAttentionConfig, Size], Iterator[Candidate]]


@dataclass(frozen=True)
class Attention:
    """Row of one attention system.

    Args:
        config: class of its configuration, the key of the row.
        shapes: (config) → tree of parameter shapes.
        forward: (x, params, config) → output (B, C, H, W) and trace.
        vjp: (cotangent, trace, params, config) → (∂L/∂x, ∂L/∂params).
        macs: (batch, size, config) → multiply-adds.
        terms: (batch, size, config) → the multiply-adds by term; their sum is `macs`.
        memory: (tape, batch, size, config) → None; records the memory of the forward pass, without its input.
        receptive_field: (query, size, config, trace, image) → boolean mask (H, W), see `dat_ref.peers.receptive_field`.
        module: torch module, as ``"package.module:Class"``. It is imported when a model is built.
        needs_trace: whether the receptive field depends on the trace; otherwise the trace may be None.
        init: (params, config, rng) → None; sets parameters whose initialization differs from the common rules.
        replacements: kinds of this system that can replace a deformable layer. A rule (layer, size) yields candidates.
        released_names: (config) → released parameter names, or None without a released module.
        parameter_terms: cost term of a parameter, by the first part of its name; see `parameter_term`.
        interpolated: (config) → names of the terms of `terms` that interpolate.
        data_dependent_points: (config) → whether the interpolation points depend on the data.
        saves_input: (config) → whether the trace holds the input itself (otherwise a copy).
        packed_layers: linear layers of the torch module that inference may pack. A module that predicts positions has
            none, because positions need float32.
    """

    config: type[Any]
    shapes: Callable[[Any], Tree]
    forward: Callable[..., tuple[Array, Any]]
    vjp: Callable[..., tuple[Array, Tree]]
    macs: Callable[[int, Size, Any], int]
    terms: Callable[[int, Size, Any], Macs]
    memory: Callable[[Tape, int, Size, Any], None]
    receptive_field: Callable[[Pixel, Size, Any, Any, int], Array]
    module: str
    needs_trace: bool = False
    init: Callable[[Tree, Any, np.random.Generator], None] | None = None
    replacements: Mapping[str, Rule] = field(default_factory=dict)
    released_names: Callable[[Any], NameMapping] | None = None
    parameter_terms: Mapping[str, str] = field(default_factory=dict)
    interpolated: Callable[[Any], set[str]] = lambda config: set()
    data_dependent_points: Callable[[Any], bool] = lambda config: True
    saves_input: Callable[[Any], bool] = lambda config: True
    packed_layers: tuple[str, ...] = ()

    def parameter_term(self, parameter: str) -> str:
        """Return the cost term of a parameter; a name without an entry is a term of its own."""
        part = parameter.split(".")[0]
        return {**_PROJECTION_TERMS, **self.parameter_terms}.get(part, part.replace("_", " "))


_PROJECTION_TERMS = {
    "query": "query and output",
    "output": "query and output",
    "key": "key and value",
    "value": "key and value",
}


# ------------------------------------------------------------------------------------------------ cost


def with_remainder(name: str, total_macs: int, parts: Macs) -> Macs:
    """Return the parts, preceded by a term `name` with the remaining multiply-adds."""
    return {name: total_macs - sum(parts.values()), **parts}


def projection_terms(pixels: int, dim: int, total_macs: int) -> Macs:
    """Split the multiply-adds of a system with four projections per pixel; the rest is the term ``"attention"``."""
    projections = 2 * linear_macs(pixels, dim, dim)
    return with_remainder("attention", total_macs, {"query and output": projections, "key and value": projections})


def sampling_term(config: Any) -> set[str]:
    """Return the interpolating terms of a system that samples features: ``"sampling"``."""
    return {"sampling"}


# ------------------------------------------------------------------------------------------------ receptive field


def whole_map(query: Pixel, size: Size, config: Any, trace: Any, image: int) -> Array:
    """Return the receptive field of a system in which every query attends to the whole map."""
    return np.ones(size, dtype=bool)


def sampled_pixels(points_px: Array, size: Size) -> Array:
    """Return the pixels that points (..., 2), (y, x), read with nonzero weight, as a boolean mask (H, W)."""
    flat = points_px.reshape(-1, 2)
    near_y, near_x = (np.abs(flat[:, axis, None] - np.arange(size[axis])) < 1 for axis in range(2))  # (P, H), (P, W)
    return np.any(near_y[:, :, None] & near_x[:, None, :], axis=0)


def check_traced_size(traced_size: tuple[int, ...], size: Size) -> None:
    """Raise a `ShapeError` if a trace is of a map of another size."""
    if tuple(traced_size) != tuple(size):
        raise ShapeError(f"trace: expected a trace of a map of size {size}, got {tuple(traced_size)}")


# ------------------------------------------------------------------------------------------------ matching


def dropout_rates(layer: DeformableAttentionConfig) -> dict[str, Any]:
    """Return the dropout rates of a layer as keywords of a configuration."""
    return {"attention_dropout": layer.attention_dropout, "projection_dropout": layer.projection_dropout}


def odd_sizes(size: Size) -> range:
    """Return the odd kernel sizes up to the longer side of a map."""
    return range(1, max(size) + 1, 2)


def point_counts(size: Size) -> range:
    """Return the numbers of points up to the number of pixels."""
    return range(1, size[0] * size[1] + 1)
