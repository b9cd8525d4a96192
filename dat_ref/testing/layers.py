"""Tools for checks of layers: random parameters, mirrored and transposed layers, distance to the nearest kink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .._checks import Array, Tree
from ..config import BiasKind, DeformableAttentionConfig, OffsetBound
from ..layer import LayerTrace
from ..ops.bias import table_positions
from ..ops.grid import Size
from ..params import flatten, map_tree, unflatten


def random_params(shapes: Tree, rng: np.random.Generator, dtype: Any = np.float64) -> Tree:
    """Return random parameters, so large that each one affects the result: tables of order 1, offsets of pixels."""

    def leaf(name: str, shape: tuple[int, ...]) -> Array:
        values = rng.standard_normal(shape)
        if name.endswith("table"):
            return values
        if len(shape) == 1:
            is_scale = name.endswith("weight")  # weight of a norm or a layer scale
            return 1.0 + 0.3 * values if is_scale else 0.3 * values
        return values / np.sqrt(np.prod(shape[1:]))

    return unflatten({name: leaf(name, shape).astype(dtype) for name, shape in flatten(shapes).items()})


# ------------------------------------------------------------------------------------------------ symmetry


def mirror(params: Tree, axis: int, config: DeformableAttentionConfig, size: Size, key_size: Size) -> Tree:
    """Return the parameters of the mirrored layer: it maps a mirrored map to the mirrored result.

    Kernels and tables are flipped along `axis` (0 is y), and offsets along this axis change sign. The queries and keys
    of a fixed table are renumbered. The log-CPB network gets the displacement along this axis with opposite sign.
    """
    mirrored = map_tree(np.array, params)
    if config.offset_bound is not OffsetBound.NONE:
        network = mirrored["offset_network"]
        network["depthwise"]["weight"] = np.flip(network["depthwise"]["weight"], 2 + axis)
        network["pointwise"]["weight"][axis] *= -1
    if config.bias is BiasKind.TABLE:
        mirrored["position_bias"]["table"] = np.flip(mirrored["position_bias"]["table"], 1 + axis)
    elif config.bias is BiasKind.LOG_CPB:
        mirrored["position_bias"]["hidden"]["weight"][:, axis] *= -1
    elif config.bias is BiasKind.DEPTHWISE:
        kernel = mirrored["position_bias"]["depthwise"]
        kernel["weight"] = np.flip(kernel["weight"], 2 + axis)
    elif config.bias is BiasKind.FIXED:
        table = mirrored["position_bias"]["table"]
        grid = table.reshape(len(table), *size, *key_size)
        mirrored["position_bias"]["table"] = np.flip(grid, (1 + axis, 3 + axis)).reshape(table.shape)
    return mirrored


def transpose(params: Tree, config: DeformableAttentionConfig, size: Size, key_size: Size) -> Tree:
    """Return the parameters of the layer with y and x swapped."""
    transposed = map_tree(np.array, params)
    if config.offset_bound is not OffsetBound.NONE:
        network = transposed["offset_network"]
        network["depthwise"]["weight"] = network["depthwise"]["weight"].swapaxes(2, 3)
        network["pointwise"]["weight"] = network["pointwise"]["weight"][::-1]
    if config.bias is BiasKind.TABLE:
        transposed["position_bias"]["table"] = transposed["position_bias"]["table"].swapaxes(1, 2)
    elif config.bias is BiasKind.LOG_CPB:
        transposed["position_bias"]["hidden"]["weight"] = transposed["position_bias"]["hidden"]["weight"][:, ::-1]
    elif config.bias is BiasKind.DEPTHWISE:
        kernel = transposed["position_bias"]["depthwise"]
        kernel["weight"] = kernel["weight"].swapaxes(2, 3)
    elif config.bias is BiasKind.FIXED:
        table = transposed["position_bias"]["table"]
        grid = table.reshape(len(table), *size, *key_size)
        transposed["position_bias"]["table"] = grid.transpose(0, 2, 1, 4, 3).reshape(table.shape)
    return transposed


def transposed_config(config: DeformableAttentionConfig) -> DeformableAttentionConfig:
    """Return the configuration whose bias has the size of the transposed map."""
    return config if config.size is None else replace(config, size=config.size[::-1])


# ------------------------------------------------------------------------------------------------ kinks


def lattice_distance(positions: Array) -> float:
    """Return the smallest distance of a coordinate to an integer; infinity without coordinates."""
    return float(np.abs(positions - np.round(positions)).min(initial=np.inf))


def kink_distance(trace: LayerTrace, config: DeformableAttentionConfig, table_size: Any = None) -> float:
    """Return the distance of a forward pass to the nearest kink, where the layer is not differentiable.

    Kinks are the lattices of the map and of the bias table, the edge of the clamp, and the zeros of log-CPB's ReLU and
    displacement. Clamped coordinates are constant and have no kink at the lattices. The distance is divided by the
    sensitivity of the points: a layer norm over nearly equal channels amplifies small steps.
    """
    if config.offset_bound is OffsetBound.NONE:
        return _log_bias_distance(trace, points_move=False)
    distance = _log_bias_distance(trace, points_move=True)
    moving = np.ones(trace.points.shape, dtype=bool)
    if config.offset_bound is OffsetBound.CLAMP:
        overshoot = np.abs(trace.reference + trace.raw_offsets) - 1
        moving = overshoot < 0
        distance = min(distance, float(np.abs(overshoot).min(initial=np.inf)))
    distance = min(distance, lattice_distance(trace.points_px[moving]))
    if config.bias is BiasKind.TABLE:
        flat = trace.points.reshape(*trace.points.shape[:2], -1, 2)
        size = trace.x.shape[2:]
        positions = table_positions(flat, table_size, size, config.convention, config.bias_resolution)
        moving_entries = np.broadcast_to(moving.reshape(flat.shape)[:, :, None], positions.shape)
        # The table position on an axis with a single entry is constant and has no kink.
        readable = np.array([table_size[axis] > 1 and size[axis] > 1 for axis in range(2)])
        distance = min(distance, lattice_distance(positions[moving_entries & readable]))
    return distance * _norm_deviation(trace)


def _norm_deviation(trace: LayerTrace) -> float:
    """Return the smallest standard deviation in the offset network's norm, at most 1."""
    assert trace.offset_network is not None
    windows = trace.offset_network.windows
    return 1.0 if windows.shape[1] == 1 else float(windows.std(axis=1).min(initial=1.0))


def _log_bias_distance(trace: LayerTrace, points_move: bool) -> float:
    if trace.log_bias is None:
        return np.inf
    distance = float(np.abs(trace.log_bias.hidden).min(initial=np.inf))
    if not points_move:
        return distance
    return min(distance, float(np.abs(trace.log_bias.displacement).min(initial=np.inf)))
