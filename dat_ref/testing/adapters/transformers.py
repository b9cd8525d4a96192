"""Adapter of multi-scale deformable attention in Hugging Face transformers, whose models have four variants of it.

``dat-ref check dat_ref.testing.adapters.transformers`` checks Deformable DETR's. The other variants have names:
``dat_ref.testing.adapters.transformers:mask2former``, ``:rt_detr_v2`` and ``:rt_detr_v2_discrete``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..torch import from_torch
from . import require


def _deformable_detr(value: Any, sizes: Any, locations: Any, weights: Any) -> Any:
    """Function of Deformable DETR, Grounding DINO, RT-DETR and other models, which have copies of this module."""
    torch = require("torch")
    models = require("transformers.models.deformable_detr.modeling_deformable_detr", "transformers")
    shapes = torch.tensor(sizes)
    counts = shapes.prod(dim=1)
    starts = counts.cumsum(0) - counts
    return models.MultiScaleDeformableAttention()(value, shapes, sizes, starts, locations, weights, 64)


def _mask2former(value: Any, sizes: Any, locations: Any, weights: Any) -> Any:
    """Function of Mask2Former and OneFormer."""
    models = require("transformers.models.mask2former.modeling_mask2former", "transformers")
    return models.multi_scale_deformable_attention(value, sizes, locations, weights)


def _rt_detr_v2(value: Any, sizes: Any, locations: Any, weights: Any, method: str = "default") -> Any:
    """Function of RT-DETRv2 and D-FINE, in which levels and points share an axis."""
    models = require("transformers.models.rt_detr_v2.modeling_rt_detr_v2", "transformers")
    points = [locations.shape[4]] * locations.shape[3]
    return models.multi_scale_deformable_attention_v2(
        value, sizes, locations.flatten(3, 4), weights.flatten(3, 4), points, method
    )


def _rt_detr_v2_discrete(value: Any, sizes: Any, locations: Any, weights: Any) -> Any:
    """Function of RT-DETRv2's variant without interpolation."""
    return _rt_detr_v2(value, sizes, locations, weights, "discrete")


def _namespace(function: Any) -> SimpleNamespace:
    """Return an object with the protocol's function and its gradient."""
    wrapped = from_torch(function)
    return SimpleNamespace(multi_scale_deformable_attention=wrapped, multi_scale_deformable_attention_vjp=wrapped.vjp)


require("transformers")
deformable_detr = _namespace(_deformable_detr)
mask2former = _namespace(_mask2former)
rt_detr_v2 = _namespace(_rt_detr_v2)
rt_detr_v2_discrete = _namespace(_rt_detr_v2_discrete)

multi_scale_deformable_attention = deformable_detr.multi_scale_deformable_attention
multi_scale_deformable_attention_vjp = deformable_detr.multi_scale_deformable_attention_vjp
