"""Figures of attention on photographs. They use matplotlib without pyplot; the inputs are arrays or traces."""

from .._deprecation import deprecated_names
from .figures import draw_attention, draw_key_importance, draw_offset_field, draw_points
from .geometry import (
    QueryAttention,
    attention_map,
    deformable_query_attention,
    key_importance,
    neighborhood_query_attention,
    to_image_px,
    window_query_attention,
)
from .scenes import ScenePanel, draw_scenes
from .style import save

__all__ = [
    "QueryAttention",
    "ScenePanel",
    "attention_map",
    "deformable_query_attention",
    "draw_attention",
    "draw_key_importance",
    "draw_offset_field",
    "draw_points",
    "draw_scenes",
    "key_importance",
    "neighborhood_query_attention",
    "save",
    "to_image_px",
    "window_query_attention",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "Attended": "QueryAttention",
        "deformable_attended": "deformable_query_attention",
        "neighborhood_attended": "neighborhood_query_attention",
        "window_attended": "window_query_attention",
        "window_attention_map": "attention_map",
    },
)
