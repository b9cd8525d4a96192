"""Layers that are wrong in one way each, and the first check that sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..._checks import Array
from ...conventions import Convention
from ...layer import deformable_layer, deformable_layer_vjp
from ...params import flatten, unflatten
from ..subject import Function, Mutant
from .attention_mutants import over_queries
from .layer_cases import Weights, config_of
from .layer_steps import (
    GEOMETRY_MISTAKES,
    LayerSteps,
    biases_missing,
    bounded_by,
    clamp_missing,
    finer_norm,
    gelu_by_tanh,
    groups_in_turn,
    kernel_flipped,
    merge_in_turn,
    network_of,
    offsets_swapped,
    padded_otherwise,
    run_layer,
    split_in_turn,
    unnormalised,
    weights_transposed,
)
from .steps import BIAS_MISTAKES, dropped, exchange, read_at, wrapped


def core(change: Callable[..., Any]) -> dict[str, Function]:
    """Return a mistake in the core: ``change(right_attend, q, k, v, bias, scale)``."""
    return {"attend": lambda right: lambda *arguments: change(right, *arguments)}


# Each mistake with the first check that sees it, in the order of the checks.
MISTAKES: dict[str, tuple[str, dict[str, Function]]] = {
    "weight matrices are used transposed": ("projections", {"linear": weights_transposed}),
    "the projections lack their biases": ("projections", {"linear": biases_missing}),
    "features are sampled from the queries": ("projections", {"sample_from": lambda right: lambda x, query: query}),
    "keys and values exchanged": (
        "projections", core(lambda right, q, k, v, bias, scale: right(q, v, k, bias, scale))),
    "softmax over the queries instead of the keys": ("projections", core(over_queries)),
    "the scale is missing": ("scale", {"scale": lambda right: lambda depth: 1.0}),
    "dot products are divided by d, not by its root": ("scale", {"scale": lambda right: lambda depth: 1 / depth}),
    "channels are dealt to the heads in turn": ("heads", {"split": split_in_turn, "merge": merge_in_turn}),
    **{
        name: (check, GEOMETRY_MISTAKES[name])
        for name, check in {
            "half a pixel up and left": "middle",
            "half a pixel down and right": "middle",
            "H for H - 1: positions times H/(H - 1)": "middle",
            "-1 and 1 are edges where pixel centers are meant, or the reverse (align_corners)": "spread",
        }.items()
    },
    "nearest pixel instead of linear": (
        "between_pixels", {"sample": read_at(lambda p, size: np.floor(p + p.dtype.type(0.5)))}),
    "no bound: the tanh is missing": ("offset_bound", {"bound": bounded_by(lambda raw, limit: limit * raw)}),
    "clipped instead of tanh": (
        "offset_bound", {"bound": bounded_by(lambda raw, limit: limit * np.clip(raw, -1, 1))}),
    "the region is 2s key cells wide, not s: s·tanh where s/2·tanh is meant": (
        "offset_bound", {"bound": bounded_by(lambda raw, limit: 2 * limit * np.tanh(raw))}),
    "the tanh comes after the range: the offset is bounded by the map": (
        "offset_bound", {"bound": bounded_by(lambda raw, limit: np.tanh(limit * raw))}),
    "x and y of the offsets swapped": ("rows_before_columns", {"bound": offsets_swapped}),
    "x and y swapped": ("rows_before_columns", GEOMETRY_MISTAKES["x and y swapped"]),
    "x and y swapped, in pixels": ("rows_before_columns", GEOMETRY_MISTAKES["x and y swapped, in pixels"]),
    **{
        name: ("not_square", GEOMETRY_MISTAKES[name])
        for name in ("x is normalised by the height", "y is normalised by the width",
                     "x is normalised by the height, and y by the width")
    },
    "the range of x is that of y": (
        "not_square", {"bound": bounded_by(lambda raw, limit: limit[[0, 0]] * np.tanh(raw))}),
    "the border of the map is repeated outside": (
        "zero_outside", {"sample": read_at(lambda p, size: np.clip(p, 0, size.astype(p.dtype) - 1))}),
    "the map wraps around: a negative index counts from the end": ("zero_outside", {"sample": wrapped}),
    "points outside the pixel centers are dropped": ("border_fades", {"sample": dropped}),
    "positions are kept in bfloat16": ("fine_positions", GEOMETRY_MISTAKES["positions are kept in bfloat16"]),
    "the bias is subtracted": (
        "bias_middle", core(lambda right, q, k, v, bias, scale: right(q, k, v, -bias, scale))),
    **{
        name: (check, BIAS_MISTAKES[name])
        for name, check in {
            "H for H - 1 in the middle of the table: off by one": "bias_middle",
            "displacements are twice as long: the half is missing": "bias_distance",
            "queries and keys exchanged": "bias_of_queries_and_keys",
            "the displacement has the wrong sign: from query to key": "bias_direction",
            "the table is transposed": "bias_rows_before_columns",
            "queries are numbered column by column": "bias_middle",
            "nearest entry instead of linear": "bias_between_entries",
            "what the table does not cover wholly is dropped": "bias_border_fades",
            "heads in reverse order": "bias_of_heads",
        }.items()
    },
    "the bias is scaled with the dot products": (
        "bias_is_added",
        core(lambda right, q, k, v, bias, scale: right(q, k, v, bias * bias.dtype.type(scale), scale))),
    "the border of the table is repeated outside": (
        "bias_zero_outside", BIAS_MISTAKES["the border is repeated outside"]),
    "the table wraps around: a negative index counts from the end": (
        "bias_zero_outside", BIAS_MISTAKES["the table wraps around: a negative index counts from the end"]),
    "offsets are predicted from the map, not from the queries": (
        "offset_network", {"look_at": lambda right: lambda x, query: x}),
    "the depthwise kernel is flipped: a convolution, not a correlation": (
        "offset_network", {"predict": kernel_flipped}),
    "GELU by its tanh approximation": ("offset_network", {"predict": network_of(activation=gelu_by_tanh)}),
    "ReLU for GELU": ("offset_network", {"predict": network_of(activation=lambda x: np.maximum(x, 0))}),
    "a layer norm with an epsilon of 1e-6": ("offset_network", {"predict": network_of(norm=finer_norm)}),
    "no layer norm but for its weight and bias": ("offset_network", {"predict": network_of(norm=unnormalised)}),
    "the padding of another convention": ("stride", {"padding": padded_otherwise}),
    **{
        name: ("groups", GEOMETRY_MISTAKES[name])
        for name in ("all groups use the first group's points", "groups in reverse order")
    },
    "channels are dealt to the groups in turn": ("groups", {"into_groups": groups_in_turn}),
    "heads are dealt to the groups in turn": ("groups", BIAS_MISTAKES["heads are dealt to the groups in turn"]),
    "all images use the first image's points": ("images", GEOMETRY_MISTAKES["all images use the first image's points"]),
    "the clamp is missing": ("other_bounds", {"bound": clamp_missing}),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ gradients


def scaled(chosen: str, factor: float) -> Callable[[Function], Function]:
    """Return a VJP in which the gradients whose names start so are multiplied."""

    def wrong(right: Function) -> Function:
        def vjp(*arguments: Any, **options: Any) -> dict[str, Array]:
            grads = right(*arguments, **options)
            return {name: factor * grad if name.startswith(chosen) else grad for name, grad in grads.items()}

        return vjp

    return wrong


def as_if(*zeros: str, lost: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Return a VJP whose backward pass takes some weights for zero, and so cuts what flows back through them.

    Args:
        lost: weights whose own gradients are lost as well.
    """

    def wrong(right: Function) -> Function:
        def vjp(
            cotangent: Array, x: Array, weights: Weights, options: dict[str, Any], convention: Convention
        ) -> dict[str, Array]:
            config = config_of(x, weights, options, convention)
            trace = deformable_layer(x, unflatten(weights), config)[1]
            cut = {name: 0 * leaf if name in zeros else leaf for name, leaf in weights.items()}
            grad_x, grads = deformable_layer_vjp(cotangent, trace, unflatten(cut), config)
            leaves = {name: 0 * grad if name in lost else grad for name, grad in flatten(grads).items()}
            return {"x": grad_x, **{f"weights.{name}": grad for name, grad in leaves.items()}}

        return vjp

    return wrong


POINTWISE = "offset_network.pointwise.weight"

MUTANTS = (
    *(Mutant(name, check, exchange(run_layer, LayerSteps(), **steps)) for name, (check, steps) in MISTAKES.items()),
    Mutant("the weights' gradients are 0.1 % too large", "gradient_of_the_projections", vjp=scaled("weights", 1.001)),
    Mutant("the table's gradient is 0.1 % too large", "gradient_of_the_table",
           vjp=scaled("weights.position_bias", 1.001)),
    Mutant("the points get no gradient: they are detached", "gradient_through_the_samples",
           vjp=as_if(POINTWISE, lost=(POINTWISE,))),
    Mutant("the position gradient through the bias is forgotten", "gradient_through_the_bias",
           vjp=as_if("position_bias.table")),
    Mutant("the queries' gradient is 0.1 % too large", "gradient_of_the_queries",
           vjp=scaled("weights.query", 1.001)),
    Mutant("the map's gradient is 0.1 % too large", "gradient_of_the_map", vjp=scaled("x", 1.001)),
)  # fmt: skip
