"""Relative position bias, sampled at the continuous displacement between query and key.

The paper has one table B̂ ∈ R^{(2H-1)×(2W-1)} per head. It is sampled at the displacement R between query and key, with
the same bilinear φ as the features. In pixels,

    B[m, n] = φ(B̂; i),        i_y = (q_y[m] - p̃_y[n]) + (H - 1)        and likewise in x.

A table with T rows is built for a map of H₀ = (T + 1)/2 rows. On a map of H rows its index is computed in one of two
ways. In fractions of the map, as in the 2023 code: ``i = (q - p̃) · (H₀ - a)/(H - a) + (H₀ - 1)``, with a = 1 for
``align_corners`` and 0 otherwise. In pixels: ``i = (q - p̃) + (H₀ - 1)``. A displacement outside the table gives zero,
as a point outside a map does.

The points receive two gradients: through the features sampled at them, and through this bias. Ports often omit the
second one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._checks import Array, ConfigError, ShapeError, Tree, check_array, size_pair
from ..config import CHECK_RESOLUTION, BiasResolution
from ..conventions import Convention
from .basic import linear, linear_macs, linear_vjp
from .grid import Size, check_convention, query_points, to_pixels, to_pixels_vjp
from .sampling import bilinear_sample, bilinear_sample_macs, bilinear_sample_vjp

# ------------------------------------------------------------------------------------------------ table


def table_scale(table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution) -> Array:
    """Return the number of table cells per pixel of displacement, (2,). It is 1 for a table built for this map size."""
    CHECK_RESOLUTION("resolution", resolution)
    check_convention(convention)
    table_size, query_size = size_pair("table_size", table_size), size_pair("query_size", query_size)
    if resolution == "pixels":
        return np.ones(2)
    table_span = (np.asarray(table_size, dtype=np.float64) + 1) / 2 - convention.align_corners  # H₀ - a
    map_span = np.asarray(query_size, dtype=np.float64) - convention.align_corners  # H - a
    return table_span / np.maximum(map_span, 1)


def _check_points(points: Array) -> None:
    check_array("points", points, {"B": None, "G": None, "Ns": None, "(y, x)": 2})


def _check_table(table: Array, points: Array) -> None:
    check_array("table", table, {"heads": None, "2H-1": None, "2W-1": None})
    _check_points(points)
    if points.shape[1] == 0 or len(table) % points.shape[1]:
        raise ConfigError(f"points: expected groups that divide heads={len(table)}, got {points.shape}")


def table_positions(
    points: Array, table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution = "fractions"
) -> Array:
    """Return the table index of the displacement between each query and each point.

    Args:
        points: p̃ (B, G, Ns, 2), order (y, x), normalized.
        table_size: (2H₀-1, 2W₀-1).
        query_size: (H, W) of the query map.

    Returns:
        continuous indices (B, G, H·W, Ns, 2), order (y, x), in table cells.

    Raises:
        ShapeError, ConfigError: if a shape, a dtype or an option is wrong.
    """
    _check_points(points)
    if any(length % 2 == 0 for length in size_pair("table_size", table_size)):
        raise ShapeError(f"table_size: expected (2H-1, 2W-1), odd on both axes, got {table_size}")
    points_px = to_pixels(points, query_size, convention)
    queries = query_points(query_size, convention).reshape(-1, 2)
    queries_px = to_pixels(queries.astype(points_px.dtype), query_size, convention)
    scale = table_scale(table_size, query_size, convention, resolution).astype(points_px.dtype)
    center = (np.asarray(table_size) - 1) // 2
    displacement = queries_px[:, None] - points_px[:, :, None]  # (B, G, H·W, Ns, 2)
    return displacement * scale + center.astype(points_px.dtype)


def table_bias(
    table: Array,
    points: Array,
    *,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> Array:
    """Sample the relative position bias at continuous displacements.

    Args:
        table: B̂ (heads, 2H₀-1, 2W₀-1). Group g serves the heads [g·heads/G, (g+1)·heads/G).
        points: p̃ (B, G, Ns, 2), order (y, x), normalized coordinates of the convention.
        query_size: (H, W) of the query map.

    Returns:
        bias (B, heads, H·W, Ns). With points on the pixel grid (``CELL_CENTER`` and ``PAPER``, stride 1, zero
        offset) it equals Swin's lookup with integer indices.

    Raises:
        ShapeError, ConfigError: if a shape, a dtype or an option is wrong.
    """
    _check_table(table, points)
    positions = table_positions(points, table.shape[1:], query_size, convention, resolution)
    bias = bilinear_sample(_grouped_table(table, points.shape[1]), _by_group(positions))  # (G, heads/G, B·H·W·Ns)
    batch, groups, queries, samples, _ = positions.shape
    bias = bias.reshape(groups, len(table) // groups, batch, queries, samples)
    return bias.transpose(2, 0, 1, 3, 4).reshape(batch, len(table), queries, samples)


class TableGradients(NamedTuple):
    """Gradients of `table_bias`."""

    table: Array
    points: Array


def table_bias_vjp(
    cotangent: Array,
    table: Array,
    points: Array,
    *,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> TableGradients:
    """Compute the gradients with respect to the table and the points.

    The table is a sampled map, so `bilinear_sample_vjp` gives its gradient. The index i decreases as p̃ increases, so
    ∂L/∂p̃_px[n] = -scale · Σ_m Σ_heads ∂φ(B̂; i)/∂i · ∂L/∂B[m, n]. `to_pixels_vjp` converts it to normalized
    coordinates.
    """
    _check_table(table, points)
    positions = table_positions(points, table.shape[1:], query_size, convention, resolution)
    batch, groups, queries, samples, _ = positions.shape
    check_array("cotangent", cotangent, {"B": batch, "heads": len(table), "H·W": queries, "Ns": samples})
    grad_bias = cotangent.reshape(batch, groups, len(table) // groups, queries, samples).transpose(1, 2, 0, 3, 4)
    grad_bias = grad_bias.reshape(groups, len(table) // groups, batch * queries * samples)
    grads = bilinear_sample_vjp(grad_bias, _grouped_table(table, groups), _by_group(positions))
    grad_positions = grads.points_px.reshape(groups, batch, queries, samples, 2).sum(axis=2)  # over the queries
    scale = table_scale(table.shape[1:], query_size, convention, resolution).astype(positions.dtype)
    grad_points_px = -scale * grad_positions.transpose(1, 0, 2, 3)  # (B, G, Ns, 2)
    return TableGradients(grads.x.reshape(table.shape), to_pixels_vjp(grad_points_px, query_size, convention))


def _grouped_table(table: Array, groups: int) -> Array:
    return table.reshape(groups, -1, *table.shape[1:])  # (G, heads/G, T_y, T_x)


def _by_group(positions: Array) -> Array:
    return positions.swapaxes(0, 1).reshape(positions.shape[1], -1, 2)  # (G, B·H·W·Ns, 2)


def table_bias_macs(batch: int, heads: int, queries: int, samples: int) -> int:
    """Multiply-adds of `table_bias`: four for each head, query and key. The paper's formula omits them."""
    return bilinear_sample_macs(batch * queries * samples, heads)


# ------------------------------------------------------------------------------------------------ log-CPB


@dataclass(frozen=True)
class LogBiasTrace:
    """Intermediates of `log_bias`, as maps with leading axis B·G and trailing axis H·W·Ns."""

    displacement: Array  # (B·G, 2, H·W·Ns), four times the normalized displacement
    scaled: Array  # (B·G, 2, H·W·Ns), log-scaled
    hidden: Array  # (B·G, 32, H·W·Ns), before the ReLU


def log_bias(points: Array, params: Tree, *, query_size: Size, convention: Convention) -> tuple[Array, LogBiasTrace]:
    """Compute the position bias with a small network of the log-scaled displacement (2023 code, after Swin V2).

    d = 4 (q - p̃) in normalized coordinates; s = sign(d) log₂(1 + |d|) / log₂ 8; B = W₂ ReLU(W₁ s + b₁). The output
    has one value for each head of a group. All groups share the network.

    Args:
        points: p̃ (B, G, Ns, 2), order (y, x), normalized.
        params: ``hidden`` weight (32, 2) and bias; ``out`` weight (heads/G, 32).
        query_size: (H, W) of the query map.

    Returns:
        bias (B, heads, H·W, Ns) and the trace.

    Raises:
        ShapeError, ConfigError: if a shape, a dtype or an option is wrong.
    """
    _check_points(points)
    batch, groups, samples, _ = points.shape
    queries = query_points(query_size, convention).reshape(-1, 2).astype(points.dtype)
    displacement = 4 * (queries[:, None] - points[:, :, None])  # (B, G, H·W, Ns, 2)
    displacement = displacement.reshape(batch * groups, len(queries) * samples, 2).transpose(0, 2, 1)
    scaled = np.sign(displacement) * np.log2(1 + np.abs(displacement)) / 3  # log₂ 8 = 3
    hidden = linear(scaled, **params["hidden"])
    bias = linear(np.maximum(hidden, 0), **params["out"])  # (B·G, heads/G, H·W·Ns)
    bias = bias.reshape(batch, groups * bias.shape[1], len(queries), samples)
    return bias, LogBiasTrace(displacement, scaled, hidden)


def log_bias_vjp(cotangent: Array, trace: LogBiasTrace, params: Tree, *, groups: int) -> tuple[Array, Tree]:
    """Return (∂L/∂points, ∂L/∂params). They use ds/dd = 1 / (3 ln 2 (1 + |d|)) and ∂d/∂p̃ = -4."""
    check_array("cotangent", cotangent, {"B": None, "heads": None, "H·W": None, "Ns": None})
    if groups < 1 or cotangent.shape[1] % groups or cotangent.shape[0] * groups != len(trace.hidden):
        raise ConfigError(f"groups: expected B·groups = {len(trace.hidden)}, got groups={groups}, {cotangent.shape}")
    batch, heads, queries, samples = cotangent.shape
    grad_bias = cotangent.reshape(batch * groups, heads // groups, queries * samples)
    out = linear_vjp(grad_bias, np.maximum(trace.hidden, 0), **params["out"])
    hidden = linear_vjp(out.x * (trace.hidden > 0), trace.scaled, **params["hidden"])
    grad_displacement = hidden.x / (3 * math.log(2) * (1 + np.abs(trace.displacement)))
    grad_points = -4 * grad_displacement.reshape(batch, groups, 2, queries, samples).sum(axis=3)
    return grad_points.transpose(0, 1, 3, 2), {"hidden": hidden.params, "out": out.params}


def log_bias_macs(batch: int, heads: int, groups: int, hidden: int, queries: int, samples: int) -> int:
    """Multiply-adds of `log_bias`: the small network runs once for each group and each pair of query and key."""
    pairs = batch * groups * queries * samples
    return linear_macs(pairs, 2, hidden) + linear_macs(pairs, hidden, heads // groups)


# ------------------------------------------------------------------------------------------------ fixed table


def fixed_bias(table: Array, *, query_size: Size, samples: int) -> Array:
    """Return the learned bias of each pair of query and key cell, (1, heads, H·W, Ns), independent of the offsets.

    Raises:
        ShapeError: if the table was built for another map size.
    """
    check_array("table", table, {"heads": None, "H·W": None, "Ns": None})
    height, width = size_pair("query_size", query_size)
    if table.shape[1:] != (height * width, samples):
        raise ShapeError(
            f"x: expected the map that the fixed bias table was built for, {table.shape[1]} queries × "
            f"{table.shape[2]} keys, got H={height}, W={width}: {height * width} × {samples}"
        )
    return table[None]
