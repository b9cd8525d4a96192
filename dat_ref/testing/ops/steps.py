"""Reference implementation in replaceable steps, for the mutants of larger operations.

Without replaced steps its results equal the reference's; a test checks this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..._checks import Array
from ...conventions import Convention
from ...ops.attention import attend
from ...ops.grid import Size, query_points, to_pixels
from ...ops.sampling import bilinear_sample
from ..op_spec import Function
from .sampler_mutants import round_to_bits


def table_positions(queries_px: Array, points_px: Array, table_size: Size) -> Array:
    """Return the table position of each pair, (N, G, Q, K, 2), for queries (Q, 2) and points (N, G, K, 2)."""
    middle = (np.asarray(table_size, dtype=points_px.dtype) - 1) / 2
    return queries_px[:, None] - points_px[:, :, None] + middle


def group_of_head(heads: int, groups: int) -> Array:
    """Return the group of each head."""
    return np.arange(heads) // (heads // groups)


def identity(array: Array, *others: Any) -> Array:
    return array


@dataclass(frozen=True)
class Steps:
    """Steps of attention, as functions.

    Args:
        pixels: (points, size, convention) -> points in pixels.
        table_positions: (queries_px, points_px, table_size) -> positions in the table.
        head_groups: (heads, groups) -> group of each head.
        sample_table: (maps, points_px) -> samples.
        reorder: (bias (N, M, Q, K), query_size) -> bias.
        scale: d -> factor of the dot products.
        attend: (q, k, v, bias, scale) -> (output, weights).
    """

    pixels: Function = to_pixels
    table_positions: Function = table_positions
    head_groups: Function = group_of_head
    sample_table: Function = bilinear_sample
    reorder: Function = identity
    scale: Callable[[int], float] = lambda d: d**-0.5
    attend: Function = attend


def bias_in_steps(steps: Steps, table: Array, points: Array, query_size: Size, convention: Convention) -> Array:
    """Return the bias (N, M, Q, K)."""
    images, groups, keys, _ = points.shape
    queries = query_points(query_size, convention).reshape(-1, 2).astype(points.dtype)
    queries_px = to_pixels(queries, query_size, convention)
    points_px = steps.pixels(points, query_size, convention)
    positions = steps.table_positions(queries_px, points_px, table.shape[1:])  # (N, G, Q, K, 2)
    head_positions = positions[:, steps.head_groups(len(table), groups)].swapaxes(0, 1)  # (M, N, Q, K, 2)
    samples = steps.sample_table(
        table[:, None], head_positions.reshape(len(table), images * len(queries) * keys, 2)
    )  # (M, 1, N·Q·K)
    bias = samples.reshape(len(table), images, len(queries), keys).swapaxes(0, 1)
    return np.asarray(steps.reorder(bias, query_size))


def attend_in_steps(
    steps: Steps, q: Array, k: Array, v: Array, points: Array, bias_table: Array, query_size: Size,
    convention: Convention,
) -> Array:  # fmt: skip
    """Return the result of attention (N, M, Q, D)."""
    bias = bias_in_steps(steps, bias_table, points, query_size, convention)
    return np.asarray(steps.attend(q, k, v, bias, steps.scale(q.shape[-1]))[0])


class SteppedFunction:
    """Function composed of steps."""

    def __init__(self, compute: Function, steps: Any) -> None:
        self.compute, self.steps = compute, steps

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Compute the function with its steps."""
        return self.compute(self.steps, *arguments, **options)


def replace_steps(compute: Function, steps: Any, **mistakes: Function) -> Callable[[Function], Function]:
    """Return a mutation that replaces steps of a function.

    Args:
        compute: the function in steps, ``compute(steps, *arguments)``.
        steps: correct steps.
        mistakes: functions that turn a correct step into a wrong one, by name of the step.
    """

    def mutate(fn: Function) -> Function:
        current_steps = fn.steps if isinstance(fn, SteppedFunction) else steps
        replaced = {name: mistake(getattr(current_steps, name)) for name, mistake in mistakes.items()}
        return SteppedFunction(compute, replace(current_steps, **replaced))

    return mutate


# ------------------------------------------------------------------------------------------------ mistakes in `pixels`


def change_pixels(change: Callable[[Array, Array], Array]) -> Function:
    """Return a mutation that replaces points in pixels by ``change(points_px, size)``."""

    def mistake(fn: Function) -> Function:
        def pixels(points: Array, size: Size, convention: Convention) -> Array:
            points_px = fn(points, size, convention)
            return np.asarray(change(points_px, np.asarray(size)), dtype=points_px.dtype)

        return pixels

    return mistake


def with_size(change: Callable[[Size], Size]) -> Function:
    """Return a mutation that normalizes points by another size."""
    return lambda fn: lambda points, size, convention: fn(points, change(size), convention)


def other_alignment(fn: Function) -> Function:
    """Invert align_corners: -1 and 1 are pixel centers instead of edges, or the reverse."""

    def pixels(points: Array, size: Size, convention: Convention) -> Array:
        return fn(points, size, Convention.CELL_CENTER if convention.align_corners else Convention.PAPER)

    return pixels


PIXEL_MISTAKES = {
    "positions are shifted by half a pixel up and left": change_pixels(lambda p, size: p - 0.5),
    "positions are shifted by half a pixel down and right": change_pixels(lambda p, size: p + 0.5),
    "H instead of H - 1: positions are multiplied by H/(H - 1)": change_pixels(
        lambda p, size: p * size / np.maximum(size - 1, 1)
    ),
    "align_corners is inverted: -1 and 1 are edges instead of pixel centers, or the reverse": other_alignment,
    "x and y swapped": lambda fn: lambda points, size, convention: fn(points[..., ::-1], size, convention),
    "x and y swapped after conversion to pixels": change_pixels(lambda p, size: p[..., ::-1]),
    "x is normalized by the height": with_size(lambda size: (size[0], size[0])),
    "y is normalized by the width": with_size(lambda size: (size[1], size[1])),
    "x is normalized by the height, and y by the width": with_size(lambda size: size[::-1]),
    "all groups use the first group's points": change_pixels(lambda p, size: np.broadcast_to(p[:, :1], p.shape)),
    "groups in reverse order": change_pixels(lambda p, size: p[:, ::-1]),
    "all images use the first image's points": change_pixels(lambda p, size: np.broadcast_to(p[:1], p.shape)),
    "positions are stored in bfloat16": change_pixels(lambda p, size: round_to_bits(p, 8)),
}

# ------------------------------------------------------------------------------------------------ mistakes elsewhere


def change_positions(change: Callable[[Array, Array], Array]) -> Function:
    """Return a mutation that replaces table positions by ``change(positions, center)``."""

    def mistake(fn: Function) -> Function:
        def table_positions(queries_px: Array, points_px: Array, table_size: Size) -> Array:
            middle = (np.asarray(table_size, dtype=points_px.dtype) - 1) / 2
            return change(fn(queries_px, points_px, table_size), middle)

        return table_positions

    return mistake


def sample_at(change: Callable[[Array, Array], Array]) -> Function:
    """Return a mutation that samples a map at ``change(points_px, size)``."""
    return lambda fn: lambda maps, points: fn(maps, change(points, np.asarray(maps.shape[2:])))


def zero_unless_inside(fn: Function) -> Function:
    """Set samples to zero outside the outermost pixel centers."""

    def sample_table(maps: Array, points: Array) -> Array:
        inside = np.all((points >= 0) & (points <= np.asarray(maps.shape[2:]) - 1), axis=-1, keepdims=True)
        return np.asarray(fn(maps, points) * inside.swapaxes(1, 2))

    return sample_table


def wrap_around(fn: Function) -> Function:
    """Let negative indices count from the end, as in Python."""

    def sample_table(maps: Array, points: Array) -> Array:
        height, width = maps.shape[2:]
        tiled = np.tile(maps, (1, 1, 2, 2))
        return fn(tiled, points + np.array([height, width], dtype=points.dtype))

    return sample_table


def swap_queries_and_keys(bias: Array, query_size: Size) -> Array:
    """Swap queries and keys if their numbers are equal."""
    return bias.swapaxes(2, 3) if bias.shape[2] == bias.shape[3] else bias


def queries_by_column(bias: Array, query_size: Size) -> Array:
    """Number the queries column by column."""
    images, heads, _, keys = bias.shape
    return bias.reshape(images, heads, *query_size[::-1], keys).swapaxes(2, 3).reshape(bias.shape)


BIAS_MISTAKES: dict[str, dict[str, Function]] = {
    "the center of the table is off by one: H instead of H - 1": {
        "table_positions": change_positions(lambda p, middle: p + 1)
    },
    "the displacement has the wrong sign: key minus query": {
        "table_positions": change_positions(lambda p, middle: 2 * middle - p)
    },
    "displacements are doubled: the factor 1/2 is missing": {
        "table_positions": change_positions(lambda p, middle: 2 * p - middle)
    },
    "the table is transposed": {
        "table_positions": change_positions(lambda p, middle: p[..., ::-1] - middle[::-1] + middle)
    },
    "queries are numbered column by column": {"reorder": lambda fn: queries_by_column},
    "nearest entry instead of bilinear interpolation": {
        "sample_table": sample_at(lambda p, size: np.floor(p + p.dtype.type(0.5)))
    },
    "the border is replicated outside the table": {
        "sample_table": sample_at(lambda p, size: np.clip(p, 0, size.astype(p.dtype) - 1))
    },
    "the table wraps around: negative indices count from the end": {"sample_table": wrap_around},
    "displacements outside the outermost entries have no bias": {"sample_table": zero_unless_inside},
    "queries and keys swapped": {"reorder": lambda fn: swap_queries_and_keys},
    "heads in reverse order": {"sample_table": lambda fn: lambda maps, points: fn(maps[::-1], points)},
    "heads are interleaved across the groups": {
        "head_groups": lambda fn: lambda heads, groups: np.arange(heads) % groups
    },
}
