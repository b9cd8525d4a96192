"""Adapter of ONNX's GridSample and DeformConv, run by the standard's reference evaluator (``onnx.reference``).

To check a runtime, run the same two models with it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..._checks import Array
from ...ops.grid import Size
from . import require

onnx = require("onnx")
reference = require("onnx.reference", "onnx")

OPSET = 22


def bilinear_sample(x: Array, points_px: Array) -> Array:
    """Sample with GridSample. Its coordinates are (x, y), and -1 and 1 are the edges of the map."""
    size = np.array(x.shape[2:], dtype=points_px.dtype)
    grid = ((2 * points_px + 1) / size - 1)[:, :, None, ::-1]  # (N, P, 1, 2)
    options = {"mode": "linear", "padding_mode": "zeros", "align_corners": 0}
    return _run("GridSample", options, X=x, grid=grid)[..., 0]


def deform_conv2d(
    x: Array, offset: Array, weight: Array, bias: Array | None, stride: Size, padding: Size, dilation: Size,
    mask: Array | None,
) -> Array:  # fmt: skip
    """Convolve with DeformConv, whose offsets and masks have torchvision's layout."""
    taps = weight.shape[2] * weight.shape[3]
    options = {
        "strides": list(stride),
        "pads": [*padding, *padding],  # top, left, bottom, right
        "dilations": list(dilation),
        "kernel_shape": list(weight.shape[2:]),
        "group": x.shape[1] // weight.shape[1],
        "offset_group": offset.shape[1] // (2 * taps),
    }
    return _run("DeformConv", options, X=x, W=weight, offset=offset, B=bias, mask=mask)


def _run(operator: str, options: dict[str, Any], **inputs: Array | None) -> Array:
    """Run one operator. A missing input has an empty name."""
    present = {name: np.ascontiguousarray(array) for name, array in inputs.items() if array is not None}
    names = tuple(name if name in present else "" for name in inputs)
    frozen = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in options.items())
    (result,) = _evaluator(operator, names, frozen, str(next(iter(present.values())).dtype)).run(None, present)
    return np.asarray(result)


@cache
def _evaluator(operator: str, names: tuple[str, ...], options: tuple[tuple[str, Any], ...], dtype: str) -> Any:
    """Return an evaluator for a model with one operator."""
    helper = onnx.helper
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node(operator, list(names), ["Y"], **dict(options))
    inputs = [helper.make_tensor_value_info(name, kind, None) for name in names if name]
    graph = helper.make_graph([node], operator, inputs, [helper.make_tensor_value_info("Y", kind, None)])
    return reference.ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))
