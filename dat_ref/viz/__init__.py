"""Figures of where attention looks: matplotlib without pyplot, fed with plain arrays or a layer's trace."""

from .figures import draw_attention, draw_key_importance, draw_offset_field, draw_points
from .geometry import (
    Attended,
    deformable_attended,
    key_importance,
    neighborhood_attended,
    to_image_px,
    window_attended,
    window_attention_map,
)
from .style import save

__all__ = [
    "Attended",
    "deformable_attended",
    "draw_attention",
    "draw_key_importance",
    "draw_offset_field",
    "draw_points",
    "key_importance",
    "neighborhood_attended",
    "save",
    "to_image_px",
    "window_attended",
    "window_attention_map",
]
