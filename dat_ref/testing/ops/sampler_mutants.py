"""Mutants of ``sampler``: each has one mistake and names the first check that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..._checks import Array
from ..op_spec import Function, Mutant


def sample_at(move: Callable[[Array, Array, Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation that samples at ``move(points, size, last)``, with last = max(size - 1, 1)."""

    def mutate(fn: Function) -> Function:
        def sample(x: Array, points_px: Array) -> Any:
            size = np.asarray(x.shape[2:], dtype=points_px.dtype)
            return fn(x, move(points_px, size, np.maximum(size - 1, 1)).astype(points_px.dtype))

        return sample

    return mutate


def scaled_by(factor: Callable[[Array, Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation that multiplies the samples by ``factor(points, last)`` (N, P), with last = size - 1."""

    def mutate(fn: Function) -> Function:
        def sample(x: Array, points_px: Array) -> Any:
            weight = factor(points_px, np.asarray(x.shape[2:]) - 1)
            return fn(x, points_px) * weight[:, None].astype(points_px.dtype)

        return sample

    return mutate


def round_to_bits(array: Array, count: int) -> Array:
    """Round to `count` significant bits: 8 for bfloat16, 11 for float16.

    >>> round_to_bits(np.array([290.75, 0.1]), 8).tolist()
    [290.0, 0.10009765625]
    """
    mantissa, exponent = np.frexp(array)
    rounded: Array = np.ldexp(np.round(np.ldexp(mantissa, count)), exponent - count)
    return rounded


def truncated(fn: Function) -> Function:
    """Truncate positions instead of flooring them: between -1 and 0, pixel 0 gets a weight greater than one."""

    def sample(x: Array, points_px: Array) -> Any:
        base = np.trunc(points_px)
        dy, dx = np.moveaxis(points_px - base, -1, 0)
        total: Any = 0
        for i, weight_y in ((0, 1 - dy), (1, dy)):
            for j, weight_x in ((0, 1 - dx), (1, dx)):
                corner = base + np.array([i, j], dtype=base.dtype)
                total = total + (weight_y * weight_x)[:, None] * fn(x, corner)
        return total

    return sample


def wrapped(fn: Function) -> Function:
    """Let negative indices count from the end, as in Python."""

    def sample(x: Array, points_px: Array) -> Any:
        tiled = np.tile(x, (1, 1, 2, 2))[:, :, : 2 * x.shape[2], : 2 * x.shape[3]]
        return fn(tiled, points_px + np.asarray(x.shape[2:], dtype=points_px.dtype))

    return sample


def first_map_points(fn: Function) -> Function:
    return lambda x, points_px: fn(x, np.broadcast_to(points_px[:1], points_px.shape))


def channels_reversed(fn: Function) -> Function:
    return lambda x, points_px: fn(x[:, ::-1], points_px)


def stored_column_by_column(fn: Function) -> Function:
    return lambda x, points_px: fn(np.ascontiguousarray(x.swapaxes(2, 3)).reshape(x.shape), points_px)


def change_gradients(change: Callable[..., dict[str, Array]]) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that replaces the gradients by ``change(grads, x, points_px)``."""

    def mutate(fn: Function) -> Function:
        def vjp(cotangent: Array, x: Array, points_px: Array) -> dict[str, Array]:
            return change(dict(fn(cotangent, x, points_px)), x, points_px)

        return vjp

    return mutate


def change_gradient(name: str, change: Callable[[Array, Array, Array], Array]) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that replaces one gradient by ``change(grad, x, points_px)``."""
    return change_gradients(lambda grads, x, points: {**grads, name: change(grads[name], x, points)})


def last_point_wins(fn: Function) -> Function:
    """Assign instead of accumulating: a pixel gets the gradient of the last point that reads it."""

    def vjp(cotangent: Array, x: Array, points_px: Array) -> dict[str, Array]:
        grads = dict(fn(cotangent, x, points_px))
        grad_x = np.zeros_like(grads["x"])
        for p in range(points_px.shape[1]):
            point = np.s_[:, p : p + 1]
            point_grad = fn(cotangent[:, :, p : p + 1], x, points_px[point])["x"]
            grad_x = np.where(point_grad != 0, point_grad, grad_x)
        return {**grads, "x": grad_x}

    return vjp


def _inside(points: Array, last: Array) -> Array:
    return np.asarray(((points >= 0) & (points <= last)).all(axis=-1))


def from_the_left(fn: Function) -> Function:
    """Return the left-sided derivative at pixel centers."""

    def vjp(cotangent: Array, x: Array, points_px: Array) -> dict[str, Array]:
        grads = dict(fn(cotangent, x, points_px))
        on_pixel = points_px == np.round(points_px)
        left = np.where(on_pixel, points_px - 2.0**-20, points_px)
        for axis in range(2):
            moved = points_px.copy()
            moved[..., axis] = left[..., axis]
            grads["points_px"][..., axis] = fn(cotangent, x, moved)["points_px"][..., axis]
        return grads

    return vjp


MUTANTS = (
    Mutant("positions are shifted by half a pixel up and left", "first_pixel",
           sample_at(lambda p, size, last: p - 0.5)),
    Mutant("positions are shifted by half a pixel down and right", "first_pixel",
           sample_at(lambda p, size, last: p + 0.5)),
    Mutant(
        "positions are normalized with align_corners=True but sampled with align_corners=False",
        "first_pixel", sample_at(lambda p, size, last: p * size / last - 0.5),
    ),
    Mutant(
        "positions are normalized with align_corners=False but sampled with align_corners=True",
        "first_pixel", sample_at(lambda p, size, last: (p + 0.5) * (size - 1) / size),
    ),
    Mutant("H instead of H - 1: positions are multiplied by H/(H - 1)", "last_pixel",
           sample_at(lambda p, size, last: p * size / last)),
    Mutant("H - 1 instead of H: positions are multiplied by (H - 1)/H", "last_pixel",
           sample_at(lambda p, size, last: p * (size - 1) / size)),
    Mutant("x and y swapped", "rows_before_columns", sample_at(lambda p, size, last: p[..., ::-1])),
    Mutant(
        "x is normalized by the height", "not_square",
        sample_at(lambda p, size, last: p * np.array([1, last[1] / last[0]])),
    ),
    Mutant(
        "y is normalized by the width", "not_square",
        sample_at(lambda p, size, last: p * np.array([last[0] / last[1], 1])),
    ),
    Mutant(
        "x is normalized by the height, and y by the width", "not_square",
        sample_at(lambda p, size, last: p * last / last[::-1]),
    ),
    Mutant("the map is stored column by column", "rows_before_columns", stored_column_by_column),
    Mutant("nearest neighbor instead of bilinear interpolation", "between_pixels",
           sample_at(lambda p, size, last: np.floor(p + 0.5))),
    Mutant("the border is replicated outside the map", "zeros_outside",
           sample_at(lambda p, size, last: np.clip(p, 0, size - 1))),
    Mutant("the map wraps around: negative indices count from the end", "zeros_outside", wrapped),
    Mutant("points outside the outermost pixel centers read zero", "border_fades", scaled_by(_inside)),
    Mutant("positions are truncated towards zero instead of floored", "border_fades", truncated),
    Mutant("division by zero on an axis of one pixel", "single_row", sample_at(
        lambda p, size, last: np.where(size == 1, np.nan, p)
    )),
    Mutant("all maps use the first map's points", "channels_and_maps", first_map_points),
    Mutant("channels in reverse order", "channels_and_maps", channels_reversed),
    Mutant("positions are stored in bfloat16", "fine_positions", sample_at(lambda p, size, last: round_to_bits(p, 8))),
    Mutant("the map's gradient is 0.1 % too large", "gradient_of_the_map",
           vjp=change_gradient("x", lambda g, x, p: 1.001 * g)),
    Mutant("the gradient is assigned instead of accumulated", "gradient_adds_up", vjp=last_point_wins),
    Mutant(
        "the points' gradient is 0.1 % too large", "gradient_of_the_points",
        vjp=change_gradient("points_px", lambda g, x, p: 1.001 * g),
    ),
    Mutant(
        "the points' gradient is in (x, y) order", "gradient_of_the_points",
        vjp=change_gradient("points_px", lambda g, x, p: g[..., ::-1]),
    ),
    Mutant("the points get no gradient", "gradient_of_the_points",
           vjp=change_gradient("points_px", lambda g, x, p: 0 * g)),
    Mutant(
        "the points' gradient is taken in normalized coordinates instead of pixels", "gradient_of_the_points",
        vjp=change_gradient("points_px", lambda g, x, p: g * (np.asarray(x.shape[2:]) - 1) / 2),
    ),
    Mutant(
        "the points' gradient is zero outside the outermost pixel centers", "gradient_at_the_border",
        vjp=change_gradient("points_px", lambda g, x, p: g * _inside(p, np.asarray(x.shape[2:]) - 1)[..., None]),
    ),
    Mutant("the derivative at a pixel center is taken from the left", "gradient_on_the_lattice", vjp=from_the_left),
)  # fmt: skip
