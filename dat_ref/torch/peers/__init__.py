"""The systems that deformable attention is compared with, as modules: `dat_ref.peers` in PyTorch.

Each takes a map (B, C, H, W) of any size to one of the same shape, has the parameter names of the spec, and stands in a
block's place for attention: ``create_model("dat_tiny", attention="pyramid")``.
"""

from ..functional import deform_conv2d, multi_scale_deformable_attention
from .deform_conv import DeformableConv
from .mhsa import MultiHeadAttention
from .ms_deform_attn import MultiScaleDeformableAttention
from .neighborhood import NeighborhoodAttention
from .per_query import PerQueryAttention
from .pyramid import PyramidAttention
from .registry import PEER_MODULES
from .swap_in import SwapInAttention
from .window import WindowAttention

__all__ = [
    "PEER_MODULES",
    "DeformableConv",
    "MultiHeadAttention",
    "MultiScaleDeformableAttention",
    "NeighborhoodAttention",
    "PerQueryAttention",
    "PyramidAttention",
    "SwapInAttention",
    "WindowAttention",
    "deform_conv2d",
    "multi_scale_deformable_attention",
]
