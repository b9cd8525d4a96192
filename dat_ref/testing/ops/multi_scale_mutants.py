"""Mutants of ``multi_scale``: each has one mistake and names the first check that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..._checks import Array
from ...ops.basic import softmax
from ...ops.grid import Size
from ...peers.multi_scale import location_pixels
from ..op_spec import Function, Mutant
from .sampler_mutants import round_to_bits


def with_arguments(change: Callable[..., tuple[Any, ...]]) -> Callable[[Function], Function]:
    """Return a mutation that replaces the arguments by ``change(value, sizes, locations, weights)``."""
    return lambda fn: lambda *arguments: fn(*change(*arguments))


def sample_at(move: Callable[[Array, Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation that samples at ``move(points, sizes)``.

    The points (N, Q, M, L, P, 2) are (y, x) in pixels, the sizes (L, 1, 2).
    """

    def change(value: Array, sizes: Sequence[Size], locations: Array, weights: Array) -> tuple[Any, ...]:
        extent = np.asarray(sizes, dtype=locations.dtype)[:, None]
        moved = (move(location_pixels(locations, sizes), extent) + 0.5) / extent
        return value, sizes, moved[..., ::-1].astype(locations.dtype), weights

    return with_arguments(change)


def with_weights(change: Callable[[Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation that changes the attention weights (N, Q, M, L, P)."""
    return with_arguments(lambda value, sizes, locations, weights: (value, sizes, locations, change(weights)))


def softmax_over_points(weights: Array) -> Array:
    """Apply a softmax over the levels and points of a head."""
    flat = weights.reshape(*weights.shape[:3], weights.shape[3] * weights.shape[4])
    return softmax(flat).reshape(weights.shape)


def normalized(weights: Array) -> Array:
    """Divide by the sum over levels and points."""
    total = weights.sum(axis=(3, 4), keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)


def last_level_only(weights: Array) -> Array:
    """Set the weights of all levels but the last to zero, as if each level overwrote the previous one."""
    return weights * (np.arange(weights.shape[3]) == weights.shape[3] - 1)[:, None]


def dropped(value: Array, sizes: Sequence[Size], locations: Array, weights: Array) -> tuple[Any, ...]:
    """Set the weights of locations outside the outermost pixel centers to zero."""
    points = location_pixels(locations, sizes)
    # Locations on the outermost centers are rounded to either side.
    slack = 1e-9 if locations.dtype == np.float64 else 1e-4
    inside = (points >= -slack) & (points <= np.asarray(sizes)[:, None] - 1 + slack)
    return value, sizes, locations, weights * inside.all(axis=-1)


def split_levels(value: Array, sizes: Sequence[Size]) -> list[Array]:
    """Return the levels' maps (N, H, W, M, D)."""
    ends = np.cumsum([height * width for height, width in sizes])
    level_tokens = np.split(value, ends[:-1], axis=1)
    return [
        tokens.reshape(len(value), *size, *value.shape[2:]) for tokens, size in zip(level_tokens, sizes, strict=True)
    ]


def join_levels(maps: Sequence[Array]) -> Array:
    """Merge the levels' maps: inverse of `split_levels`."""
    tokens = [each.reshape(len(each), each.shape[1] * each.shape[2], *each.shape[3:]) for each in maps]
    return np.concatenate(tokens, axis=1)


def column_by_column(value: Array, sizes: Sequence[Size], *others: Array) -> tuple[Any, ...]:
    """Read the tokens of a level column by column."""
    reversed_levels = [(width, height) for height, width in sizes]
    maps = [each.swapaxes(1, 2) for each in split_levels(value, reversed_levels)]
    return join_levels(maps), sizes, *others


def wrapped(fn: Function) -> Function:
    """Let negative indices count from the end: repeat the maps twice and shift the locations by one period."""

    def mutate(value: Array, sizes: Sequence[Size], locations: Array, weights: Array) -> Any:
        tiled = join_levels([np.tile(each, (1, 2, 2, 1, 1)) for each in split_levels(value, sizes)])
        return fn(tiled, [(2 * height, 2 * width) for height, width in sizes], (locations + 1) / 2, weights)

    return mutate


def channels_first(fn: Function) -> Function:
    """Order the result's channels as first channel of all heads, second channel of all heads, and so on."""

    def mutate(value: Array, *others: Any) -> Any:
        result = fn(value, *others)
        by_head = result.reshape(*result.shape[:2], value.shape[2], value.shape[3])
        return by_head.swapaxes(2, 3).reshape(result.shape)

    return mutate


def share_first(axis: int) -> Callable[[Function], Function]:
    """Return a mutation that uses the first locations along an axis for all others."""

    def change(value: Array, sizes: Sequence[Size], locations: Array, weights: Array) -> tuple[Any, ...]:
        first = np.take(locations, [0] if locations.shape[axis] else [], axis=axis)
        return value, sizes, np.broadcast_to(first, locations.shape), weights

    return with_arguments(change)


def change_gradient(name: str, change: Callable[[Array, Array, Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that replaces one gradient by ``change(grad, locations, extent)``.

    The extent (L, 1, 2) is (W, H) of each level.
    """

    def mutate(fn: Function) -> Function:
        def vjp(cotangent: Array, value: Array, sizes: Sequence[Size], locations: Array, weights: Array) -> Any:
            grads = dict(fn(cotangent, value, sizes, locations, weights))
            extent = np.asarray(sizes, dtype=np.float64)[:, None, ::-1]
            return {**grads, name: change(grads[name], locations, extent)}

        return vjp

    return mutate


def _inside(locations: Array, extent: Array) -> Array:
    """Return whether each location is inside the outermost pixel centers, (N, Q, M, L, P, 1)."""
    pixels = locations * extent - 0.5
    return np.asarray(((pixels >= 0) & (pixels <= extent - 1)).all(axis=-1, keepdims=True))


def reversed_locations(value: Array, sizes: Sequence[Size], locations: Array, weights: Array) -> tuple[Any, ...]:
    """Use the locations and weights of the last level for the first, and so on."""
    return value, sizes, locations[:, :, :, ::-1], weights[:, :, :, ::-1]


def reversed_tokens(value: Array, sizes: Sequence[Size], locations: Array, weights: Array) -> tuple[Any, ...]:
    """Assume that the tokens of the last level come first."""
    return value, sizes[::-1], locations[:, :, :, ::-1], weights[:, :, :, ::-1]


MUTANTS = (
    Mutant(
        "0 and 1 are the centers of the first and last pixel instead of the edges (align_corners=True)",
        "pixel_centers",
        sample_at(lambda p, size: (p + 0.5) * (size - 1) / size),
    ),
    Mutant("positions are shifted by half a pixel down and right: pixel = location · W", "pixel_centers",
           sample_at(lambda p, size: p + 0.5)),
    Mutant("locations are assumed to be in [-1, 1] instead of [0, 1]", "pixel_centers",
           sample_at(lambda p, size: (p + 0.5 + size) / 2 - 0.5)),
    Mutant(
        "locations are taken as (y, x) instead of (x, y)", "columns_before_rows",
        with_arguments(lambda value, sizes, locations, weights: (value, sizes, locations[..., ::-1], weights)),
    ),
    Mutant("the maps are stored column by column", "columns_before_rows", with_arguments(column_by_column)),
    Mutant(
        "sizes are taken as (W, H) instead of (H, W)", "not_square",
        with_arguments(lambda value, sizes, *others: (value, [tuple(size)[::-1] for size in sizes], *others)),
    ),
    Mutant(
        "x is scaled by the height", "not_square",
        sample_at(lambda p, size: (p + 0.5) * size[..., :1] / size - 0.5),
    ),
    Mutant(
        "x is scaled by the height, and y by the width", "not_square",
        sample_at(lambda p, size: (p + 0.5) * size[..., ::-1] / size - 0.5),
    ),
    Mutant("division by zero on an axis of one pixel", "single_row",
           sample_at(lambda p, size: np.where(size == 1, np.nan, p))),
    Mutant("nearest neighbor instead of bilinear interpolation", "between_pixels",
           sample_at(lambda p, size: np.floor(p + 0.5))),
    Mutant("the border is replicated outside the map", "zeros_outside",
           sample_at(lambda p, size: np.clip(p, 0, size - 1))),
    Mutant("the map wraps around: negative indices count from the end", "zeros_outside", wrapped),
    Mutant("locations outside the outermost pixel centers read zero", "border_fades", with_arguments(dropped)),
    Mutant("a softmax is applied to the weights again", "weights_as_they_are", with_weights(softmax_over_points)),
    Mutant("the weights are divided by their sum", "weights_as_they_are", with_weights(normalized)),
    Mutant(
        "samples are averaged over the points instead of summed", "weights_as_they_are",
        with_weights(lambda weights: weights / max(weights.shape[4], 1)),
    ),
    Mutant("the points' weights are in reverse order", "weights_as_they_are",
           with_weights(lambda each: each[..., ::-1])),
    Mutant("locations and weights of the levels are in reverse order", "levels", with_arguments(reversed_locations)),
    Mutant("tokens are assumed to start with the last level", "levels", with_arguments(reversed_tokens)),
    Mutant(
        "every level is scaled by the size of the first level", "levels",
        sample_at(lambda p, size: (p + 0.5) * size[:1] / size - 0.5),
    ),
    Mutant("levels are not summed: the last one overwrites the others", "levels", with_weights(last_level_only)),
    Mutant("levels are averaged instead of summed", "levels", with_weights(lambda weights: weights / weights.shape[3])),
    Mutant("heads in reverse order", "heads", with_arguments(
        lambda value, sizes, locations, weights: (value, sizes, locations[:, :, ::-1], weights[:, :, ::-1])
    )),
    Mutant("all heads use the first head's locations", "heads", share_first(2)),
    Mutant("the result is ordered by channel, then by head", "heads", channels_first),
    Mutant("all queries use the first query's locations", "queries_and_images", share_first(1)),
    Mutant("all images use the first image's locations", "queries_and_images", share_first(0)),
    Mutant("positions are stored in bfloat16", "fine_positions",
           sample_at(lambda p, size: round_to_bits(p, 8))),
    Mutant(
        "the value's gradient is 0.1 % too large", "gradient_of_the_value",
        vjp=change_gradient("value", lambda g, p, e: 1.001 * g),
    ),
    Mutant(
        "the weights' gradient is 0.1 % too large", "gradient_of_the_weights",
        vjp=change_gradient("attention_weights", lambda g, p, e: 1.001 * g),
    ),
    Mutant(
        "the locations' gradient is 0.1 % too large", "gradient_of_the_locations",
        vjp=change_gradient("sampling_locations", lambda g, p, e: 1.001 * g),
    ),
    Mutant(
        "the locations' gradient is taken in pixels: the factor of the map size is missing",
        "gradient_of_the_locations",
        vjp=change_gradient("sampling_locations", lambda g, p, e: g / e),
    ),
    Mutant(
        "the locations' gradient is in (y, x) order", "gradient_of_the_locations",
        vjp=change_gradient("sampling_locations", lambda g, p, e: g[..., ::-1]),
    ),
    Mutant(
        "the locations get no gradient", "gradient_of_the_locations",
        vjp=change_gradient("sampling_locations", lambda g, p, e: 0 * g),
    ),
    Mutant(
        "the locations' gradient is zero outside the outermost pixel centers", "gradient_at_the_border",
        vjp=change_gradient("sampling_locations", lambda g, p, e: g * _inside(p, e)),
    ),
)  # fmt: skip
