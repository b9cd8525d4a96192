"""Mutants of ``layer``: each has one mistake and names the first check that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..._checks import Array
from ...conventions import Convention
from ...layer import deformable_layer, deformable_layer_vjp
from ...params import flatten, unflatten
from ..op_spec import Function, Mutant
from .attention_mutants import softmax_over_queries
from .layer_cases import Weights, config_of
from .layer_steps import (
    GEOMETRY_MISTAKES,
    LayerSteps,
    affine_only,
    biases_missing,
    bounded_by,
    clamp_missing,
    custom_network,
    gelu_by_tanh,
    groups_interleaved,
    kernel_flipped,
    layer_in_steps,
    merge_interleaved,
    offsets_swapped,
    other_padding,
    smaller_epsilon_norm,
    split_interleaved,
    weights_transposed,
)
from .steps import BIAS_MISTAKES, replace_steps, sample_at, wrap_around, zero_unless_inside


def attend_mistake(change: Callable[..., Any]) -> dict[str, Function]:
    """Return a mutation that replaces `attend` by ``change(correct_attend, q, k, v, bias, scale)``."""
    return {"attend": lambda fn: lambda *arguments: change(fn, *arguments)}


# Mistakes by name, in the order of the checks: the first check that fails, and the wrong steps.
MISTAKES: dict[str, tuple[str, dict[str, Function]]] = {
    "weight matrices are transposed": ("projections", {"linear": weights_transposed}),
    "the biases of the projections are missing": ("projections", {"linear": biases_missing}),
    "features are sampled from the queries instead of the input map": (
        "projections", {"sample_input": lambda fn: lambda x, query: query}),
    "keys and values swapped": (
        "projections", attend_mistake(lambda fn, q, k, v, bias, scale: fn(q, v, k, bias, scale))),
    "softmax over the queries instead of the keys": ("projections", attend_mistake(softmax_over_queries)),
    "the scale is missing": ("scale", {"scale": lambda fn: lambda depth: 1.0}),
    "the scale is 1/d instead of 1/√d": ("scale", {"scale": lambda fn: lambda depth: 1 / depth}),
    "channels are interleaved across the heads": ("heads", {"split": split_interleaved, "merge": merge_interleaved}),
    **{
        name: (check, GEOMETRY_MISTAKES[name])
        for name, check in {
            "positions are shifted by half a pixel up and left": "middle",
            "positions are shifted by half a pixel down and right": "middle",
            "H instead of H - 1: positions are multiplied by H/(H - 1)": "middle",
            "align_corners is inverted: -1 and 1 are edges instead of pixel centers, or the reverse": "spread",
        }.items()
    },
    "nearest neighbor instead of bilinear interpolation": (
        "between_pixels", {"sample": sample_at(lambda p, size: np.floor(p + p.dtype.type(0.5)))}),
    "no bound: the tanh is missing": ("offset_bound", {"bound": bounded_by(lambda raw, limit: limit * raw)}),
    "clipping instead of tanh": (
        "offset_bound", {"bound": bounded_by(lambda raw, limit: limit * np.clip(raw, -1, 1))}),
    "the offset limit is s key cells instead of s/2": (
        "offset_bound", {"bound": bounded_by(lambda raw, limit: 2 * limit * np.tanh(raw))}),
    "tanh is applied after scaling: tanh(limit · x) instead of limit · tanh(x)": (
        "offset_bound", {"bound": bounded_by(lambda raw, limit: np.tanh(limit * raw))}),
    "x and y of the offsets swapped": ("rows_before_columns", {"bound": offsets_swapped}),
    "x and y swapped": ("rows_before_columns", GEOMETRY_MISTAKES["x and y swapped"]),
    "x and y swapped after conversion to pixels": (
        "rows_before_columns", GEOMETRY_MISTAKES["x and y swapped after conversion to pixels"]),
    **{
        name: ("not_square", GEOMETRY_MISTAKES[name])
        for name in ("x is normalized by the height", "y is normalized by the width",
                     "x is normalized by the height, and y by the width")
    },
    "the offset limit of y is also used for x": (
        "not_square", {"bound": bounded_by(lambda raw, limit: limit[[0, 0]] * np.tanh(raw))}),
    "the border is replicated outside the map": (
        "zero_outside", {"sample": sample_at(lambda p, size: np.clip(p, 0, size.astype(p.dtype) - 1))}),
    "the map wraps around: negative indices count from the end": ("zero_outside", {"sample": wrap_around}),
    "points outside the outermost pixel centers read zero": ("border_fades", {"sample": zero_unless_inside}),
    "positions are stored in bfloat16": ("fine_positions", GEOMETRY_MISTAKES["positions are stored in bfloat16"]),
    "the bias is subtracted": (
        "bias_middle", attend_mistake(lambda fn, q, k, v, bias, scale: fn(q, k, v, -bias, scale))),
    **{
        name: (check, BIAS_MISTAKES[name])
        for name, check in {
            "the center of the table is off by one: H instead of H - 1": "bias_middle",
            "displacements are doubled: the factor 1/2 is missing": "bias_distance",
            "queries and keys swapped": "bias_of_queries_and_keys",
            "the displacement has the wrong sign: key minus query": "bias_direction",
            "the table is transposed": "bias_rows_before_columns",
            "queries are numbered column by column": "bias_middle",
            "nearest entry instead of bilinear interpolation": "bias_between_entries",
            "displacements outside the outermost entries have no bias": "bias_border_fades",
            "heads in reverse order": "bias_of_heads",
        }.items()
    },
    "the bias is multiplied by the scale": (
        "bias_is_added",
        attend_mistake(lambda fn, q, k, v, bias, scale: fn(q, k, v, bias * bias.dtype.type(scale), scale))),
    "the border is replicated outside the table": (
        "bias_zero_outside", BIAS_MISTAKES["the border is replicated outside the table"]),
    "the table wraps around: negative indices count from the end": (
        "bias_zero_outside", BIAS_MISTAKES["the table wraps around: negative indices count from the end"]),
    "offsets are predicted from the input map instead of the queries": (
        "offset_network", {"offset_input": lambda fn: lambda x, query: x}),
    "the depthwise kernel is flipped: convolution instead of cross-correlation": (
        "offset_network", {"predict": kernel_flipped}),
    "tanh approximation instead of exact GELU": (
        "offset_network", {"predict": custom_network(activation=gelu_by_tanh)}),
    "ReLU instead of GELU": ("offset_network", {"predict": custom_network(activation=lambda x: np.maximum(x, 0))}),
    "layer norm with epsilon 1e-6 instead of 1e-5": (
        "offset_network", {"predict": custom_network(norm=smaller_epsilon_norm)}),
    "layer norm does not normalize: only its weight and bias are applied": (
        "offset_network", {"predict": custom_network(norm=affine_only)}),
    "the convolution padding of another convention": ("stride", {"padding": other_padding}),
    **{
        name: ("groups", GEOMETRY_MISTAKES[name])
        for name in ("all groups use the first group's points", "groups in reverse order")
    },
    "channels are interleaved across the groups": ("groups", {"split_groups": groups_interleaved}),
    "heads are interleaved across the groups": ("groups", BIAS_MISTAKES["heads are interleaved across the groups"]),
    "all images use the first image's points": ("images", GEOMETRY_MISTAKES["all images use the first image's points"]),
    "the clamp is missing": ("other_bounds", {"bound": clamp_missing}),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ gradients


def scaled_gradient(prefix: str, with_scale: float) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that multiplies the gradients whose names have one of these prefixes."""

    def mutate(fn: Function) -> Function:
        def vjp(*arguments: Any, **options: Any) -> dict[str, Array]:
            grads = fn(*arguments, **options)
            return {name: with_scale * grad if name.startswith(prefix) else grad for name, grad in grads.items()}

        return vjp

    return mutate


def detached(*zero_weights: str, zero_gradients: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Return a mutation of the VJP that sets some weights to zero, and so blocks the gradients through them.

    Args:
        zero_weights: names of these weights.
        zero_gradients: names of weights whose own gradients are set to zero.
    """

    def mutate(fn: Function) -> Function:
        def vjp(
            cotangent: Array, x: Array, weights: Weights, options: dict[str, Any], convention: Convention
        ) -> dict[str, Array]:
            config = config_of(x, weights, options, convention)
            trace = deformable_layer(x, unflatten(weights), config)[1]
            detached_weights = {name: 0 * leaf if name in zero_weights else leaf for name, leaf in weights.items()}
            grad_x, grads = deformable_layer_vjp(cotangent, trace, unflatten(detached_weights), config)
            leaves = {name: 0 * grad if name in zero_gradients else grad for name, grad in flatten(grads).items()}
            return {"x": grad_x, **{f"weights.{name}": grad for name, grad in leaves.items()}}

        return vjp

    return mutate


POINTWISE = "offset_network.pointwise.weight"

MUTANTS = (
    *(
        Mutant(name, check, replace_steps(layer_in_steps, LayerSteps(), **steps))
        for name, (check, steps) in MISTAKES.items()
    ),
    Mutant("the weights' gradients are 0.1 % too large", "gradient_of_the_projections",
           vjp=scaled_gradient("weights", 1.001)),
    Mutant("the table's gradient is 0.1 % too large", "gradient_of_the_table",
           vjp=scaled_gradient("weights.position_bias", 1.001)),
    Mutant("the points are detached: they get no gradient", "gradient_through_the_samples",
           vjp=detached(POINTWISE, zero_gradients=(POINTWISE,))),
    Mutant("the points' gradient through the bias is missing", "gradient_through_the_bias",
           vjp=detached("position_bias.table")),
    Mutant("the queries' gradient is 0.1 % too large", "gradient_of_the_queries",
           vjp=scaled_gradient("weights.query", 1.001)),
    Mutant("the map's gradient is 0.1 % too large", "gradient_of_the_map", vjp=scaled_gradient("x", 1.001)),
)  # fmt: skip
