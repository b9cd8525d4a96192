"""``torchvision.ops.deform_conv2d``, whose arguments and layouts are the protocol's."""

from __future__ import annotations

from typing import Any

from ..torch import from_torch
from . import require

operators = require("torchvision.ops")


def _deform_conv2d(x: Any, offset: Any, *others: Any) -> Any:
    # Seen with 0.28.0: a NaN becomes an index outside the map's memory, and the process may end there.
    if offset.isnan().any():
        raise NotImplementedError("torchvision's CPU code reads outside the map where an offset is NaN")
    return operators.deform_conv2d(x, offset, *others)


deform_conv2d = from_torch(_deform_conv2d)
deform_conv2d_vjp = deform_conv2d.vjp
