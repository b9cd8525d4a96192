"""Position bias: `dat_ref.ops.bias` on tensors.

The bias is read at the table position i = (q - p̃)·scale + center. The table row depends only on the query's row, the
table column only on the query's column, and both advance by a constant from query to query. So `table_index` returns
the position of the first query and the step.

`SeparableInterp` interpolates with one matrix product per axis, B[n] = Y[n] B̂ X[n]ᵀ. Each row of Y[n] (H × T_y) and
X[n] (W × T_x) has two neighboring weights (1 - f, f). All exporters and devices support these operations, and they have
derivatives of any order. `bias_windows` and the kernels are faster.

On lattice points all implementations return the right derivative, as the spec does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import ShapeError
from ...config import BiasResolution
from ...conventions import Convention
from .._checks import check_tensors
from ._dtypes import autocast_disabled, wide_dtype, wide_linear
from ._sdpa import is_recording
from .grid import Size, pixels_per_unit, query_points
from .sampling import Sampler, bilinear_sample

# ------------------------------------------------------------------------------------------------ table positions


def table_scale(
    table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution
) -> tuple[float, float]:
    """Return table cells per pixel of displacement on each axis: 1 if the table was built for the size of the map."""
    if resolution == "pixels":
        return 1.0, 1.0
    aligned = int(convention.value.align_corners)
    y, x = (
        ((cells + 1) / 2 - aligned) / max(length - aligned, 1)
        for cells, length in zip(table_size, query_size, strict=True)
    )
    return y, x


class AffineIndex(NamedTuple):
    """Index into a table, affine in the query position.

    Query (i, j) reads the bias of key n at row origin[n, 0] + i·step[0] and column origin[n, 1] + j·step[1].
    """

    origin: Tensor  # (B, G, Ns, 2), (y, x), in cells of the table, float32 or wider
    step: tuple[float, float]  # cells between neighboring queries, (y, x); exactly 1 for a table of the map's size


def table_index(
    points: Tensor,
    table_size: Size,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> AffineIndex:
    """Return the table positions of all displacements between queries and points, in affine form.

    With s cells per unit of normalized displacement, i = (q - p̃) s + center, and q advances by a constant from query to
    query. So the position of query (0, 0) and the step define all positions. The step is exactly 1 for a table of the
    map's size, except in ``CVPR2022``, where the distance between queries is (H-1)/H pixels.

    Args:
        points: p̃ (B, G, Ns, 2), normalized.
        table_size: (2H₀-1, 2W₀-1).
        query_size: (H, W).
        convention: geometry of points and queries.
        resolution: see `table_scale`.
    """
    check_tensors(points=points)
    wide = points.to(wide_dtype(points))
    geometry = (table_size[0], table_size[1]), (query_size[0], query_size[1]), convention, resolution
    is_symbolic = torch.compiler.is_compiling() or is_recording() or {*map(type, geometry[0] + geometry[1])} != {int}
    if is_symbolic or wide.device.type != "cpu":
        firsts, cells, step = _affine_coefficients(*geometry)
        axes = zip(wide.unbind(-1), firsts, cells, strict=True)
        return AffineIndex(torch.stack([torch.rsub(axis, first, alpha=cell) for axis, first, cell in axes], -1), step)
    # On the CPU one operation does the same. Other devices would have to wait for a copy of the constants.
    firsts, cells, step = _cached_coefficients(*geometry)
    first, cell = torch.tensor((firsts, cells), dtype=wide.dtype).unbind()
    return AffineIndex(torch.addcmul(first, wide, cell, value=-1), step)


def _affine_coefficients(
    table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, float]]:
    """Return the table position of query (0, 0) for a point at 0, the cells per unit, and the step, of both axes."""
    spacing = convention.value.query
    scale = table_scale(table_size, query_size, convention, resolution)
    units = pixels_per_unit(query_size, convention)
    firsts, cells, steps = [], [], []
    for axis, length in enumerate(query_size):
        cells.append(scale[axis] * units[axis])
        firsts.append(spacing.coordinate(0, length) * cells[axis] + (table_size[axis] - 1) // 2)
        # The step of a single query has no effect; 1 selects the common case.
        steps.append(1.0 if length == 1 else cells[axis] / ((length - spacing.gap) / 2))
    return tuple(firsts), tuple(cells), (steps[0], steps[1])


_cached_coefficients = lru_cache(maxsize=256)(_affine_coefficients)


def table_positions(
    points: Tensor,
    table_size: Size,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> Tensor:
    """Return the table position of the displacement between each query and each point, as a full tensor.

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
    """Return the table rows of all query rows, (…, Ns, H), and the table columns of all query columns, (…, Ns, W)."""
    origin, step = index
    rows, columns = (
        origin[..., axis, None] + torch.arange(query_size[axis], dtype=origin.dtype, device=origin.device) * step[axis]
        for axis in (0, 1)
    )
    return rows, columns


def interp_matrix(positions: Tensor, length: int) -> Tensor:
    """Return the linear interpolation weights of positions on an axis of `length` cells: (…) → (…, length).

    Cells outside the axis are zero.

    >>> interp_matrix(torch.tensor([0.25, 2.0, -0.5]), 3).tolist()
    [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]]
    """
    check_tensors(positions=positions)
    clamped = positions.clamp(-1, length)  # all weights are 0 one cell outside and farther
    floor = clamped.detach().floor()
    fraction = (clamped - floor)[..., None]  # with the right derivative
    cell = torch.nan_to_num(floor).long()[..., None] + 1  # the fraction stays NaN
    # One padding cell at the start and two at the end take the weights outside the axis.
    weights = torch.zeros((*positions.shape, length + 3), dtype=positions.dtype, device=positions.device)
    weights = weights.scatter(-1, torch.cat((cell, cell + 1), -1), torch.cat((1 - fraction, fraction), -1))
    return weights[..., 1 : length + 1]


# ------------------------------------------------------------------------------------------------ bias table


def table_bias(
    table: Tensor,
    points: Tensor,
    *,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> Tensor:
    """Interpolate the relative position bias at continuous displacements.

    Args:
        table: B̂ (heads, 2H₀-1, 2W₀-1); heads of group g are [g·heads/G, (g+1)·heads/G).
        points: p̃ (B, G, Ns, 2), in the convention's normalized coordinates.
        query_size: (H, W).
        convention: geometry of points and queries.
        resolution: see `table_scale`.

    Returns:
        (B, heads, H·W, Ns), float32 or wider.
    """
    check_tensors(table=table, points=points)
    size = (table.shape[1], table.shape[2])
    index = table_index(points, size, query_size, convention, resolution)
    return SeparableInterp(table, index, query_size).read(0, query_size[0])


class SeparableInterp:
    """Bias of a table at given points, for any range of query rows, by matrix products.

    >>> index = table_index(torch.zeros(2, 1, 6, 2), (9, 13), (5, 7), Convention.PAPER)
    >>> interp = SeparableInterp(torch.zeros(4, 9, 13), index, (5, 7))
    >>> interp.read(1, 3).shape
    torch.Size([2, 4, 14, 6])
    """

    def __init__(self, table: Tensor, index: AffineIndex, query_size: Size) -> None:
        check_tensors(table=table)
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
    """Compute `table_bias` as the released code does: build the grid of all displacements, and sample the table."""
    check_tensors(table=table, points=points)
    positions = table_positions(points, (table.shape[1], table.shape[2]), query_size, convention, resolution)
    batch, groups, queries, samples, _ = positions.shape
    heads = table.shape[0] // groups
    grouped = table.reshape(1, groups, heads, *table.shape[1:]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    flat = positions.reshape(batch * groups, queries * samples, 2)
    return bilinear_sample(grouped, flat, sampler=sampler).reshape(batch, groups * heads, queries, samples)


# ------------------------------------------------------------------------------------------------ other kinds of bias


def log_bias(
    points: Tensor, params: Mapping[str, Mapping[str, Tensor]], *, query_size: Size, convention: Convention
) -> Tensor:
    """Compute a position bias from the log-scaled displacement with a small network (2023 code, after Swin V2).

    Args:
        points: p̃ (B, G, Ns, 2), normalized.
        params: ``hidden`` weight (32, 2) and bias; ``out`` weight (heads/G, 32).
        query_size: (H, W).
        convention: geometry of points and queries.

    Returns:
        (B, heads, H·W, Ns), float32 or wider.
    """
    check_tensors(points=points)
    hidden, out = (partial(wide_linear, **params[layer]) for layer in ("hidden", "out"))
    return predict_log_bias(points, hidden, out, query_size=query_size, convention=convention)[0]


def predict_log_bias(
    points: Tensor,
    hidden: Callable[[Tensor], Tensor],
    out: Callable[[Tensor], Tensor],
    *,
    query_size: Size,
    convention: Convention,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `log_bias` from the two layers of its network, which project the last axis in float32 or wider.

    Returns:
        the bias (B, heads, H·W, Ns), and the intermediates of the spec's `LogBiasTrace`, (B·G, …, H·W·Ns).
    """
    batch, groups, samples, _ = points.shape
    with autocast_disabled(points):
        displacement, scaled = _log_displacement(points, query_size, convention)
        projected = hidden(scaled)
        bias = out(F.relu(projected))  # (B, G, H·W, Ns, heads/G)
    fields = {"displacement": displacement, "scaled": scaled, "hidden": projected}
    trace = {name: part.flatten(2, 3).flatten(0, 1).transpose(1, 2) for name, part in fields.items()}
    return bias.permute(0, 1, 4, 2, 3).reshape(batch, groups * bias.shape[-1], scaled.shape[2], samples), trace


def _log_displacement(points: Tensor, query_size: Size, convention: Convention) -> tuple[Tensor, Tensor]:
    """Return four times the displacements, and their log-scaled values: (B, G, H·W, Ns, 2), (y, x)."""
    dtype = wide_dtype(points)
    queries = query_points(query_size, convention, dtype=dtype, device=points.device).flatten(0, 1)
    displacement = 4 * (queries[:, None] - points.to(dtype)[:, :, None])
    # sign(d) log₂(1 + |d|) / log₂ 8, in a form whose derivative at 0 is correct, 1/(3 ln 2).
    return displacement, (torch.log2(1 + displacement.clamp(min=0)) - torch.log2(1 + F.relu(-displacement))) / 3


def fixed_bias(table: Tensor, *, query_size: Size, samples: int) -> Tensor:
    """Return the learned bias of every pair of query and key cell, (1, heads, H·W, Ns), independent of the offsets.

    Args:
        table: (heads, H·W, Ns).
        query_size: (H, W).
        samples: Ns.

    Raises:
        ShapeError: if the table was built for a map of another size.
    """
    check_tensors(table=table)
    height, width = query_size
    if tuple(table.shape[1:]) != (height * width, samples):
        raise ShapeError(
            f"x: expected the map that the fixed bias table was built for, {table.shape[1]} queries × "
            f"{table.shape[2]} keys, got H={height}, W={width}: {height * width} × {samples}"
        )
    return table[None]
