"""Position bias: `dat_ref.ops.bias` on tensors.

The table is read at i = (q - p̃)·scale + center, whose row depends on the query's row alone and whose column on its
column alone. There are two ways to make use of that:

- `HatReader`: two matrix products with hat weights, one an axis, B[n] = Y[n] B̂ X[n]ᵀ, where Y[n] (H × T_y) and X[n]
  (W × T_x) have two neighbouring weights (1 - f, f) a row. Its gradients are matrix products too, where a sampled read
  would scatter; and it uses no operator that exports or devices may lack.
- `GridReader`: torch's grid_sample, with coordinates computed an axis at a time. On a CPU the faster one.

Both take the derivative on the lattice from the right, as the spec does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import ShapeError
from ...config import BiasResolution
from ...conventions import Convention
from ._precision import wide_dtype, without_autocast
from .grid import Size, axis_coordinates, axis_pixels, query_points, to_pixels
from .sampling import Sampler, bilinear_sample

# ------------------------------------------------------------------------------------------------ where


def table_scale(
    table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution
) -> tuple[float, float]:
    """Return table cells per pixel of displacement on each axis: 1 for a table built for this very map."""
    if resolution == "pixels":
        return 1.0, 1.0
    corner = int(convention.value.align_corners)
    y, x = (
        ((cells + 1) / 2 - corner) / max(length - corner, 1)
        for cells, length in zip(table_size, query_size, strict=True)
    )
    return y, x


def table_positions(
    points: Tensor,
    table_size: Size,
    query_size: Size,
    convention: Convention,
    resolution: BiasResolution = "fractions",
) -> Tensor:
    """Return where in the table the displacement of each query from each point is read.

    Args:
        points: p̃ (B, G, Ns, 2), normalised.
        table_size: (2H₀-1, 2W₀-1).
        query_size: (H, W).

    Returns:
        (B, G, H·W, Ns, 2), (y, x), in cells of the table.
    """
    points_px = to_pixels(points, query_size, convention)
    queries = query_points(query_size, convention, dtype=points_px.dtype, device=points.device)
    queries_px = to_pixels(queries, query_size, convention).flatten(0, 1)
    displacement = queries_px[:, None] - points_px[:, :, None]  # (B, G, H·W, Ns, 2)
    scale = table_scale(table_size, query_size, convention, resolution)
    axes = [
        along * cells + (count - 1) // 2
        for along, cells, count in zip(displacement.unbind(-1), scale, table_size, strict=True)
    ]
    return torch.stack(axes, dim=-1)


def _axis_positions(
    points: Tensor, axis: int, table_size: Size, query_size: Size, convention: Convention, resolution: BiasResolution
) -> Tensor:
    """Return the table positions of one axis, (…, Ns, H) for points (…, Ns, 2)."""
    length = query_size[axis]
    points_px = axis_pixels(points[..., axis], length, convention)
    queries = axis_coordinates(length, convention.value.query, points_px.dtype, points.device)
    displacement = axis_pixels(queries, length, convention) - points_px[..., None]
    scale = table_scale(table_size, query_size, convention, resolution)[axis]
    return displacement * scale + (table_size[axis] - 1) // 2


def hat_matrix(positions: Tensor, length: int) -> Tensor:
    """Return the weights with which each position reads an axis of `length` cells, zeros outside: (…) → (…, length).

    >>> hat_matrix(torch.tensor([0.25, 2.0, -0.5]), 3).tolist()
    [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]]
    """
    clamped = positions.clamp(-1, length)  # one cell outside there is nothing left
    before = clamped.detach().floor()
    fraction = (clamped - before)[..., None]  # its derivative is that from the right
    cell = torch.nan_to_num(before).long()[..., None] + 1  # NaN stays in the fraction
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
    return HatReader(table, points, query_size, convention, resolution).read(0, query_size[0])


class HatReader:
    """A table and the points that read it, ready to give the bias for any run of query rows: by matrix products.

    >>> reader = HatReader(torch.zeros(4, 9, 13), torch.zeros(2, 1, 6, 2), (5, 7), Convention.PAPER)
    >>> reader.read(1, 3).shape
    torch.Size([2, 4, 14, 6])
    """

    def __init__(
        self,
        table: Tensor,
        points: Tensor,
        query_size: Size,
        convention: Convention,
        resolution: BiasResolution = "fractions",
    ) -> None:
        heads, height, width = table.shape
        groups = points.shape[1]
        dtype = wide_dtype(table, points)
        moved = points.transpose(0, 1).to(dtype)  # (G, B, Ns, 2)
        geometry = ((height, width), query_size, convention, resolution)
        self.rows = _axis_positions(moved, 0, *geometry)  # (G, B, Ns, H)
        columns = _axis_positions(moved, 1, *geometry)
        self.across = hat_matrix(columns, width).flatten(0, 2)  # (G·B·Ns, W, T_x)
        by_group = table.to(dtype).reshape(groups, heads // groups, height, width)
        self.table = by_group.transpose(1, 2).flatten(2)  # (G, T_y, heads/G · T_x)
        self.height = height

    def read(self, start: int, stop: int) -> Tensor:
        """Return the bias of query rows [start, stop): (B, heads, rows·W, Ns)."""
        positions = self.rows[..., start:stop]
        groups, batch, samples, rows = positions.shape
        many, width, table_width = self.across.shape
        heads = self.table.shape[2] // table_width  # of one group
        with without_autocast(positions):
            down = hat_matrix(positions, self.height).flatten(1, 3)  # (G, B·Ns·rows, T_y)
            read = torch.bmm(down, self.table).reshape(many, rows * heads, table_width)
            read = torch.bmm(read, self.across.transpose(1, 2))  # (G·B·Ns, rows·heads/G, W)
        read = read.reshape(groups, batch, samples, rows, heads, width).permute(1, 0, 4, 3, 5, 2)
        return read.reshape(batch, groups * heads, rows * width, samples)


class GridReader:
    """The same as `HatReader`, by torch's grid_sample.

    The table is filled up with zeros to powers of two, for which the way to grid_sample's normalised coordinates and
    back is exact on the lattice: rounding never takes a point there across it, and its derivative is that from the
    right.
    """

    def __init__(
        self,
        table: Tensor,
        points: Tensor,
        query_size: Size,
        convention: Convention,
        resolution: BiasResolution = "fractions",
    ) -> None:
        heads, height, width = table.shape
        batch, groups = points.shape[:2]
        dtype = wide_dtype(table, points)
        geometry = ((height, width), query_size, convention, resolution)
        filled = (_power_of_two(height), _power_of_two(width))
        wide = points.to(dtype).flatten(0, 1)  # (B·G, Ns, 2)
        rows, columns = (_axis_positions(wide, axis, *geometry).transpose(1, 2) for axis in (0, 1))
        self.rows = (2 * rows + 1) / filled[0] - 1  # (B·G, H, Ns)
        self.columns = (2 * columns + 1) / filled[1] - 1  # (B·G, W, Ns)
        table = F.pad(table.to(dtype), (0, filled[1] - width, 0, filled[0] - height))
        by_group = table.reshape(1, groups, heads // groups, *filled).expand(batch, -1, -1, -1, -1)
        self.table = by_group.reshape(batch * groups, heads // groups, *filled)
        self.batch, self.heads = batch, heads

    def read(self, start: int, stop: int) -> Tensor:
        """Return the bias of query rows [start, stop): (B, heads, rows·W, Ns)."""
        rows = self.rows[:, start:stop]
        many, width, samples = self.columns.shape
        shape = (many, stop - start, width, samples)
        grid = torch.stack((self.columns[:, None].expand(shape), rows[:, :, None].expand(shape)), dim=-1)
        read = F.grid_sample(self.table, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
        return read.reshape(self.batch, self.heads, (stop - start) * width, samples)


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


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
    queries = query_points(query_size, convention, dtype=dtype, device=points.device).flatten(0, 1)
    with without_autocast(points):
        displacement = 4 * (queries[:, None] - points.to(dtype)[:, :, None])  # (B, G, H·W, Ns, 2)
        # sign(d) log₂(1 + |d|) / log₂ 8, written so that its derivative at 0 is that from both sides, 1/(3 ln 2).
        scaled = (torch.log2(1 + displacement.clamp(min=0)) - torch.log2(1 + F.relu(-displacement))) / 3
        first, second = params["hidden"], params["out"]
        hidden = F.relu(F.linear(scaled, first["weight"].to(dtype), first["bias"].to(dtype)))
        bias = F.linear(hidden, second["weight"].to(dtype))  # (B, G, H·W, Ns, heads/G)
    return bias.movedim(-1, 2).reshape(batch, groups * bias.shape[-1], queries.shape[0], samples)


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
