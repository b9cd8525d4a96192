"""Adapter of ``torchvision.ops.deform_conv2d``, which has the protocol's arguments and layouts."""

from __future__ import annotations

from typing import Any

from ..torch import from_torch
from . import require

operators = require("torchvision.ops")


def _deform_conv2d(x: Any, offset: Any, *others: Any) -> Any:
    # In 0.28.0 a NaN becomes an index outside the map's memory, and the process may crash.
    if offset.isnan().any():
        raise NotImplementedError("torchvision's CPU code reads outside the map if an offset is NaN")
    return operators.deform_conv2d(x, offset, *others)


deform_conv2d = from_torch(_deform_conv2d)
deform_conv2d_vjp = deform_conv2d.vjp
