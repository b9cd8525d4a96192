"""Position bias: what the attention knows of where a key lies relative to a query.

The article reads a table B̂ ∈ R^{(2H-1)×(2W-1)} a head at the continuous displacement R of query and key, with the same
bilinear φ that samples the features. In pixels, with T = 2H - 1 rows,

    B[m, n] = φ(B̂; i),        i_y = (q_y[m] - p̃_y[n]) + (H - 1)        and likewise in x.

A table that was built for a map of H₀ = (T + 1)/2 rows and meets one of H is read either in fractions of the
map, ``i = (q - p̃) · (H₀ - a)/(H - a) + (H₀ - 1)``, as the 2023 code does, or in pixels, ``i = (q - p̃) + (H₀ -
1)``; displacements that the table does not cover read zero, as everything outside a map does.

The points get their gradient twice: through the features that they sample, and through this bias. The second
path is the one that ports forget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._checks import Array, ShapeError, Tree
from ..config import BiasResolution
from ..conventions import Convention
from .basic import linear, linear_macs, linear_vjp
from .grid import Size, query_points, to_pixels, to_pixels_vjp
from .sampling import bilinear_sample, bilinear_sample_macs, bilinear_sample_vjp

# ------------------------------------------------------------------------------------------------ the table


def table_scale(table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution) -> Array:
    """Return table cells per pixel of displacement, (2,): 1 for a table built for this very map."""
    if resolution == "pixels":
        return np.ones(2)
    built = (np.asarray(table_size, dtype=np.float64) + 1) / 2 - convention.align_corners  # H₀ - a
    fed = np.asarray(query_size, dtype=np.float64) - convention.align_corners  # H - a
    return built / np.maximum(fed, 1)


def table_positions(
    points: Array, table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution = "fractions"
) -> Array:
    """Return where in the table the displacement of each query from each point is read.

    Args:
        points: p̃ (B, G, Ns, 2), normalised.
        table_size: (2H₀-1, 2W₀-1).
        query_size: (H, W).

    Returns:
        (B, G, H·W, Ns, 2), (y, x), in cells of the table.
    """
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
    """Read the relative position bias at continuous displacements.

    Args:
        table: B̂ (heads, 2H₀-1, 2W₀-1); heads of group g are [g·heads/G, (g+1)·heads/G).
        points: p̃ (B, G, Ns, 2), normalised by the convention.
        query_size: (H, W).

    Returns:
        (B, heads, H·W, Ns). With points on the pixel grid (``CELL_CENTER`` and ``PAPER``, stride 1, zero
        offset) this is Swin's integer gather.
    """
    positions = table_positions(points, table.shape[1:], query_size, convention, resolution)
    read = bilinear_sample(_grouped_table(table, points.shape[1]), _by_group(positions))  # (G, heads/G, B·H·W·Ns)
    batch, groups, queries, samples, _ = positions.shape
    read = read.reshape(groups, len(table) // groups, batch, queries, samples)
    return read.transpose(2, 0, 1, 3, 4).reshape(batch, len(table), queries, samples)


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
    """Gradients with respect to the table and to the points.

    The table's is that of a sampled map. The point's: i falls as p̃ rises, so
    ∂L/∂p̃_px[n] = -scale · Σ_m Σ_heads ∂φ(B̂; i)/∂i · ∂L/∂B[m, n], and then the slope of `to_pixels`.
    """
    positions = table_positions(points, table.shape[1:], query_size, convention, resolution)
    batch, groups, queries, samples, _ = positions.shape
    grad_read = cotangent.reshape(batch, groups, len(table) // groups, queries, samples).transpose(1, 2, 0, 3, 4)
    grad_read = grad_read.reshape(groups, len(table) // groups, batch * queries * samples)
    grads = bilinear_sample_vjp(grad_read, _grouped_table(table, groups), _by_group(positions))
    grad_positions = grads.points_px.reshape(groups, batch, queries, samples, 2).sum(axis=2)  # over the queries
    scale = table_scale(table.shape[1:], query_size, convention, resolution).astype(positions.dtype)
    grad_points_px = -scale * grad_positions.transpose(1, 0, 2, 3)  # (B, G, Ns, 2)
    return TableGradients(grads.x.reshape(table.shape), to_pixels_vjp(grad_points_px, query_size, convention))


def _grouped_table(table: Array, groups: int) -> Array:
    return table.reshape(groups, -1, *table.shape[1:])  # (G, heads/G, T_y, T_x)


def _by_group(positions: Array) -> Array:
    return positions.swapaxes(0, 1).reshape(positions.shape[1], -1, 2)  # (G, B·H·W·Ns, 2)


def table_bias_macs(batch: int, heads: int, queries: int, samples: int) -> int:
    """Multiply-adds: four a head, query and key; the article's formula leaves them out."""
    return bilinear_sample_macs(batch * queries * samples, heads)


# ------------------------------------------------------------------------------------------------ log-CPB


@dataclass(frozen=True)
class LogBiasTrace:
    """Intermediates of `log_bias`; maps with a leading B·G and a trailing H·W·Ns."""

    displacement: Array  # (B·G, 2, H·W·Ns), four times the normalised displacement
    scaled: Array  # (B·G, 2, H·W·Ns), log-scaled
    hidden: Array  # (B·G, 32, H·W·Ns), before the ReLU


def log_bias(points: Array, params: Tree, *, query_size: Size, convention: Convention) -> tuple[Array, LogBiasTrace]:
    """Position bias as a small network of the log-scaled displacement (2023 code, after Swin V2).

    d = 4 (q - p̃) in normalised coordinates; s = sign(d) log₂(1 + |d|) / log₂ 8; B = W₂ ReLU(W₁ s + b₁), one
    number for each head of a group, the network shared by the groups.

    Args:
        points: p̃ (B, G, Ns, 2), normalised.
        params: ``hidden`` weight (32, 2) and bias; ``out`` weight (heads/G, 32).

    Returns:
        (B, heads, H·W, Ns) and the trace.
    """
    batch, groups, samples, _ = points.shape
    queries = query_points(query_size, convention).reshape(-1, 2).astype(points.dtype)
    displacement = 4 * (queries[:, None] - points[:, :, None])  # (B, G, H·W, Ns, 2)
    displacement = displacement.reshape(batch * groups, len(queries) * samples, 2).transpose(0, 2, 1)
    scaled = np.sign(displacement) * np.log2(1 + np.abs(displacement)) / 3  # log₂ 8 = 3
    hidden = linear(scaled, **params["hidden"])
    bias = linear(np.maximum(hidden, 0), **params["out"])  # (B·G, heads/G, H·W·Ns)
    return bias.reshape(batch, groups * bias.shape[1], len(queries), samples), LogBiasTrace(
        displacement, scaled, hidden
    )


def log_bias_vjp(cotangent: Array, trace: LogBiasTrace, params: Tree, *, groups: int) -> tuple[Array, Tree]:
    """Return (∂L/∂points, ∂L/∂params), with ds/dd = 1 / (3 ln 2 (1 + |d|)) and ∂d/∂p̃ = -4."""
    batch, heads, queries, samples = cotangent.shape
    grad_bias = cotangent.reshape(batch * groups, heads // groups, queries * samples)
    out = linear_vjp(grad_bias, np.maximum(trace.hidden, 0), **params["out"])
    hidden = linear_vjp(out.x * (trace.hidden > 0), trace.scaled, **params["hidden"])
    grad_displacement = hidden.x / (3 * math.log(2) * (1 + np.abs(trace.displacement)))
    grad_points = -4 * grad_displacement.reshape(batch, groups, 2, queries, samples).sum(axis=3)
    return grad_points.transpose(0, 1, 3, 2), {"hidden": hidden.params, "out": out.params}


def log_bias_macs(batch: int, heads: int, groups: int, hidden: int, queries: int, samples: int) -> int:
    """Multiply-adds of the small network for every pair of query and key, once a group."""
    pairs = batch * groups * queries * samples
    return linear_macs(pairs, 2, hidden) + linear_macs(pairs, hidden, heads // groups)


# ------------------------------------------------------------------------------------------------ the fixed table


def fixed_bias(table: Array, *, query_size: Size, samples: int) -> Array:
    """Return the learned number of every pair of query and key cell, (1, heads, H·W, Ns), whatever the offsets.

    Raises:
        ShapeError: if the map is not the one the table was built for.
    """
    height, width = query_size
    if table.shape[1:] != (height * width, samples):
        raise ShapeError(
            f"x: expected the map that the fixed bias table was built for, {table.shape[1]} queries × "
            f"{table.shape[2]} keys, got H={height}, W={width}: {height * width} × {samples}"
        )
    return table[None]
