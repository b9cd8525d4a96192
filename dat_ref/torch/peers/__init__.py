"""Attention modules that deformable attention is compared with: `dat_ref.peers` in PyTorch.

Each module maps (B, C, H, W) of any size to the same shape, has the parameter names of the spec, and can replace the
attention of a block: ``create_model("dat_tiny", attention="pyramid")``.
"""

from ..._deprecation import deprecated_names
from ..functional import deform_conv2d, multi_scale_deformable_attention
from .dat_dcn import DATDCNAttention
from .deform_conv import DeformableConv
from .mhsa import MultiHeadAttention
from .ms_deform_attn import MultiScaleDeformableAttention
from .neighborhood import NeighborhoodAttention
from .per_query import PerQueryAttention
from .pyramid import PyramidAttention
from .registry import PEER_MODULES
from .window import WindowAttention

__all__ = [
    "PEER_MODULES",
    "DATDCNAttention",
    "DeformableConv",
    "MultiHeadAttention",
    "MultiScaleDeformableAttention",
    "NeighborhoodAttention",
    "PerQueryAttention",
    "PyramidAttention",
    "WindowAttention",
    "deform_conv2d",
    "multi_scale_deformable_attention",
]

__getattr__ = deprecated_names(__name__, {"SwapInAttention": "DATDCNAttention"})
