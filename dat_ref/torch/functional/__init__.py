"""Operations of `dat_ref.ops` and `dat_ref.peers` on tensors, under the same names.

Autograd computes the gradients. Geometry is float32 or wider, also under autocast.
"""

from ..._deprecation import deprecated_names
from . import builtin_backends  # noqa: F401 (registers them)
from .attention import attend, deformable_attention, merge_heads, split_heads
from .bias import (
    AffineIndex,
    SeparableInterp,
    fixed_bias,
    interp_matrix,
    log_bias,
    sampled_table_bias,
    table_bias,
    table_index,
    table_positions,
    table_scale,
)
from .deform_conv import deform_conv2d, deform_points
from .grid import (
    from_pixels,
    key_grid_size,
    offset_padding,
    pixels_per_unit,
    query_points,
    reference_points,
    to_pixels,
)
from .multi_scale import level_sizes, location_pixels, multi_scale_deformable_attention
from .neighborhood import axis_neighbors, neighbor_index, neighborhood_attention
from .offsets import bound_offsets, depthwise_conv2d, offset_limit, offset_network
from .per_query import attend_at_points
from .registry import Backend, BackendError, BackendWarning, Call, backends, register_backend
from .sampling import bilinear_sample, sample_tokens
from .windows import (
    attend_in_windows,
    relative_index,
    split_windows,
    window_attention,
    window_cells,
    window_mask,
    window_partition,
    window_reverse,
    window_visibility,
)

__all__ = [
    "AffineIndex",
    "Backend",
    "BackendError",
    "BackendWarning",
    "Call",
    "SeparableInterp",
    "attend",
    "attend_at_points",
    "attend_in_windows",
    "axis_neighbors",
    "backends",
    "bilinear_sample",
    "bound_offsets",
    "deform_conv2d",
    "deform_points",
    "deformable_attention",
    "depthwise_conv2d",
    "fixed_bias",
    "from_pixels",
    "interp_matrix",
    "key_grid_size",
    "level_sizes",
    "location_pixels",
    "log_bias",
    "merge_heads",
    "multi_scale_deformable_attention",
    "neighbor_index",
    "neighborhood_attention",
    "offset_limit",
    "offset_network",
    "offset_padding",
    "pixels_per_unit",
    "query_points",
    "reference_points",
    "register_backend",
    "relative_index",
    "sample_tokens",
    "sampled_table_bias",
    "split_heads",
    "split_windows",
    "table_bias",
    "table_index",
    "table_positions",
    "table_scale",
    "to_pixels",
    "window_attention",
    "window_cells",
    "window_mask",
    "window_partition",
    "window_reverse",
    "window_visibility",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "HatReader": "SeparableInterp",
        "TableLookup": "AffineIndex",
        "cut_windows": "window_partition",
        "hat_matrix": "interp_matrix",
        "lay_windows": "window_reverse",
        "table_lookup": "table_index",
    },
)
