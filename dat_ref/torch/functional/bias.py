"""Position bias: `dat_ref.ops.bias` on tensors.

The table is read at i = (q - p̃)·scale + center, whose row depends on the query's row alone and whose column on its
column alone, and which advances by a constant from query to query: `table_index` says from where, and by how much.

`SeparableInterp` reads it with two matrix products of hat weights, one an axis, B[n] = Y[n] B̂ X[n]ᵀ, where Y[n]
(H × T_y) and X[n] (W × T_x) have two neighbouring weights (1 - f, f) a row: with operators that all exporters and
devices have, and with derivatives of any order. Faster ones are `bias_windows`, and the kernels.

All take the derivative on the lattice from the right, as the spec does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import ShapeError
from ...config import BiasResolution
from ...conventions import Convention
from ._dtypes import autocast_disabled, wide_dtype
from .grid import Size, pixels_per_unit, query_points
from .sampling import Sampler, bilinear_sample

# ------------------------------------------------------------------------------------------------ where


def table_scale(
    table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution
) -> tuple[float, float]:
    """Return table cells per pixel of displacement on each axis: 1 for a table built for this very map."""
    if resolution == "pixels":
        return 1.0, 1.0
    aligned = int(convention.value.align_corners)
    y, x = (
        ((cells + 1) / 2 - aligned) / max(length - aligned, 1)
        for cells, length in zip(table_size, query_size, strict=True)
    )
    return y, x


class AffineIndex(NamedTuple):
    """Where a table is read: query (i, j) reads the bias of key n at row origin[n, 0] + i·step[0], column likewise."""

    origin: Tensor  # (B, G, Ns, 2), (y, x), in cells of the table, float32 or wider
    step: tuple[float, float]  # cells from one query to the next; exactly 1 where table and map have one lattice


def table_index(
    points: Tensor,
    table_size: Size,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> AffineIndex:
    """Return where in the table the displacements of the queries from each point are read, in canonical form.

    With s cells per unit of normalised displacement, i = (q - p̃) s + center, and q advances by a constant from query to
    query. So all there is to know are the position of query (0, 0) and the step, which is exactly 1 for a table of the
    map's size, except for ``CVPR2022``, whose queries stand (H-1)/H pixels apart.

    Args:
        points: p̃ (B, G, Ns, 2), normalised.
        table_size: (2H₀-1, 2W₀-1).
        query_size: (H, W).
    """
    spacing = convention.value.query
    scale = table_scale(table_size, query_size, convention, resolution)
    units = pixels_per_unit(query_size, convention)
    origins, steps = [], []
    for axis, coordinates in enumerate(points.to(wide_dtype(points)).unbind(-1)):
        length = query_size[axis]
        cells = scale[axis] * units[axis]  # per unit
        first = spacing.coordinate(0, length) * cells + (table_size[axis] - 1) // 2
        origins.append(torch.rsub(coordinates, first, alpha=cells))  # first - cells · coordinates
        # A single query takes no step; 1 keeps it on the common path.
        steps.append(1.0 if length == 1 else cells / ((length - spacing.gap) / 2))
    return AffineIndex(torch.stack(origins, dim=-1), (steps[0], steps[1]))


def table_positions(
    points: Tensor,
    table_size: Size,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> Tensor:
    """Return where in the table the displacement of each query from each point is read, written out.

    Returns:
        (B, G, H·W, Ns, 2), (y, x), in cells of the table.
    """
    index = table_index(points, table_size, query_size, convention, resolution)
    rows, columns = axis_positions(index, query_size)  # (B, G, Ns, H) and (B, G, Ns, W)
    rows, columns = (each.transpose(2, 3) for each in (rows, columns))
    shape = (*rows.shape[:3], query_size[1], rows.shape[3])  # (B, G, H, W, Ns)
    grid = torch.stack((rows[:, :, :, None].expand(shape), columns[:, :, None].expand(shape)), dim=-1)
    return grid.flatten(2, 3)


def axis_positions(index: AffineIndex, query_size: Size) -> tuple[Tensor, Tensor]:
    """Return the rows of the table that query rows read, (…, Ns, H), and the columns, (…, Ns, W)."""
    origin, step = index
    rows, columns = (
        origin[..., axis, None] + torch.arange(query_size[axis], dtype=origin.dtype, device=origin.device) * step[axis]
        for axis in (0, 1)
    )
    return rows, columns


def interp_matrix(positions: Tensor, length: int) -> Tensor:
    """Return the weights with which each position reads an axis of `length` cells, zeros outside: (…) → (…, length).

    >>> interp_matrix(torch.tensor([0.25, 2.0, -0.5]), 3).tolist()
    [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]]
    """
    clamped = positions.clamp(-1, length)  # one cell outside there is nothing left
    floor = clamped.detach().floor()
    fraction = (clamped - floor)[..., None]  # its derivative is that from the right
    cell = torch.nan_to_num(floor).long()[..., None] + 1  # NaN stays in the fraction
    # Two cells of room behind and one in front take what falls outside.
    weights = torch.zeros((*positions.shape, length + 3), dtype=positions.dtype, device=positions.device)
    weights = weights.scatter(-1, torch.cat((cell, cell + 1), -1), torch.cat((1 - fraction, fraction), -1))
    return weights[..., 1 : length + 1]


# ------------------------------------------------------------------------------------------------ the table


def table_bias(
    table: Tensor,
    points: Tensor,
    *,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> Tensor:
    """Read the relative position bias at continuous displacements.

    Args:
        table: B̂ (heads, 2H₀-1, 2W₀-1); heads of group g are [g·heads/G, (g+1)·heads/G).
        points: p̃ (B, G, Ns, 2), normalised by the convention.
        query_size: (H, W).

    Returns:
        (B, heads, H·W, Ns), float32 or wider.
    """
    size = (table.shape[1], table.shape[2])
    index = table_index(points, size, query_size, convention, resolution)
    return SeparableInterp(table, index, query_size).read(0, query_size[0])


class SeparableInterp:
    """A table and the points that read it, ready to give the bias for any run of query rows: by matrix products.

    >>> index = table_index(torch.zeros(2, 1, 6, 2), (9, 13), (5, 7), Convention.PAPER)
    >>> interp = SeparableInterp(torch.zeros(4, 9, 13), index, (5, 7))
    >>> interp.read(1, 3).shape
    torch.Size([2, 4, 14, 6])
    """

    def __init__(self, table: Tensor, index: AffineIndex, query_size: Size) -> None:
        heads, height, width = table.shape
        groups = index.origin.shape[1]
        dtype = wide_dtype(table, index.origin)
        origin = index.origin.transpose(0, 1).to(dtype)  # (G, B, Ns, 2)
        self.row_positions, columns = axis_positions(AffineIndex(origin, index.step), query_size)  # (G, B, Ns, H or W)
        self.column_weights = interp_matrix(columns, width).flatten(0, 2)  # (G·B·Ns, W, T_x)
        grouped_table = table.to(dtype).reshape(groups, heads // groups, height, width)
        self.table = grouped_table.transpose(1, 2).flatten(2)  # (G, T_y, heads/G · T_x)
        self.table_height = height

    def read(self, start: int, stop: int) -> Tensor:
        """Return the bias of query rows [start, stop): (B, heads, rows·W, Ns)."""
        positions = self.row_positions[..., start:stop]
        groups, batch, samples, rows = positions.shape
        pairs, width, table_width = self.column_weights.shape
        heads = self.table.shape[2] // table_width  # of one group
        with autocast_disabled(positions):
            row_weights = interp_matrix(positions, self.table_height).flatten(1, 3)  # (G, B·Ns·rows, T_y)
            bias = torch.bmm(row_weights, self.table).reshape(pairs, rows * heads, table_width)
            bias = torch.bmm(bias, self.column_weights.transpose(1, 2))  # (G·B·Ns, rows·heads/G, W)
        bias = bias.reshape(groups, batch, samples, rows, heads, width).permute(1, 0, 4, 3, 5, 2)
        return bias.reshape(batch, groups * heads, rows * width, samples)


def sampled_table_bias(
    table: Tensor,
    points: Tensor,
    *,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
    sampler: Sampler = "grid_sample",
) -> Tensor:
    """`table_bias` as the releases compute it: the grid of all displacements, sampled point by point."""
    positions = table_positions(points, (table.shape[1], table.shape[2]), query_size, convention, resolution)
    batch, groups, queries, samples, _ = positions.shape
    heads = table.shape[0] // groups
    grouped = table.reshape(1, groups, heads, *table.shape[1:]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    flat = positions.reshape(batch * groups, queries * samples, 2)
    return bilinear_sample(grouped, flat, sampler=sampler).reshape(batch, groups * heads, queries, samples)


# ------------------------------------------------------------------------------------------------ the others


def log_bias(
    points: Tensor, params: Mapping[str, Mapping[str, Tensor]], *, query_size: Size, convention: Convention
) -> Tensor:
    """Position bias as a small network of the log-scaled displacement (2023 code, after Swin V2).

    Args:
        points: p̃ (B, G, Ns, 2), normalised.
        params: ``hidden`` weight (32, 2) and bias; ``out`` weight (heads/G, 32).

    Returns:
        (B, heads, H·W, Ns), float32 or wider.
    """
    batch, groups, samples, _ = points.shape
    dtype = wide_dtype(points)
    with autocast_disabled(points):
        _, scaled = _log_displacement(points, query_size, convention)
        first, second = params["hidden"], params["out"]
        hidden = F.relu(F.linear(scaled, first["weight"].to(dtype), first["bias"].to(dtype)))
        bias = F.linear(hidden, second["weight"].to(dtype))  # (B, G, H·W, Ns, heads/G)
    return bias.movedim(-1, 2).reshape(batch, groups * bias.shape[-1], scaled.shape[2], samples)


def _log_displacement(points: Tensor, query_size: Size, convention: Convention) -> tuple[Tensor, Tensor]:
    """Return the displacements, times four, and the same log-scaled: (B, G, H·W, Ns, 2), (y, x)."""
    dtype = wide_dtype(points)
    queries = query_points(query_size, convention, dtype=dtype, device=points.device).flatten(0, 1)
    displacement = 4 * (queries[:, None] - points.to(dtype)[:, :, None])
    # sign(d) log₂(1 + |d|) / log₂ 8, written so that its derivative at 0 is that from both sides, 1/(3 ln 2).
    return displacement, (torch.log2(1 + displacement.clamp(min=0)) - torch.log2(1 + F.relu(-displacement))) / 3


def log_bias_trace(
    points: Tensor, params: Mapping[str, Mapping[str, Tensor]], *, query_size: Size, convention: Convention
) -> dict[str, Tensor]:
    """Return the intermediates of `log_bias` that the spec's `LogBiasTrace` has, in its layout (B·G, …, H·W·Ns)."""
    dtype = wide_dtype(points)
    with autocast_disabled(points):
        displacement, scaled = _log_displacement(points, query_size, convention)
        hidden = F.linear(scaled, params["hidden"]["weight"].to(dtype), params["hidden"]["bias"].to(dtype))
    fields = {"displacement": displacement, "scaled": scaled, "hidden": hidden}
    return {name: part.flatten(2, 3).flatten(0, 1).transpose(1, 2) for name, part in fields.items()}


def fixed_bias(table: Tensor, *, query_size: Size, samples: int) -> Tensor:
    """Return the learned number of every pair of query and key cell, (1, heads, H·W, Ns), whatever the offsets.

    Raises:
        ShapeError: if the map is not the one the table was built for.
    """
    height, width = query_size
    if tuple(table.shape[1:]) != (height * width, samples):
        raise ShapeError(
            f"x: expected the map that the fixed bias table was built for, {table.shape[1]} queries × "
            f"{table.shape[2]} keys, got H={height}, W={width}: {height * width} × {samples}"
        )
    return table[None]
