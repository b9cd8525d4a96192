"""The systems that deformable attention is compared with, each with forward, gradient, cost and receptive field.

===============================  ====================================================================================
`dat_ref.peers.mhsa`             plain multi-head self-attention: every query sees the whole map
`dat_ref.peers.window`           windows and shifted windows (Swin)
`dat_ref.peers.neighborhood`     the pixels around each query, also dilated (DAT++, NATTEN)
`dat_ref.peers.pyramid`          the whole map, made coarser (PVT)
`dat_ref.peers.deform_conv`      deformable convolution v1 and v2
`dat_ref.peers.multi_scale`      Deformable DETR's operation, in its usual signature
`dat_ref.peers.ms_deform_attn`   Deformable DETR's attention, and one with dot products
`dat_ref.peers.per_query`        sampled keys for every query: what DAT's article argues against
`dat_ref.peers.dat_dcn`          Deformable DETR's attention as a block of DAT
`dat_ref.peers.registry`         all of them by the type of their configuration
`dat_ref.peers.receptive_field`  which pixels a query sees
`dat_ref.peers.matching`         a peer in the place of a backbone's deformable layers, matched in keys or cost
===============================  ====================================================================================
"""

from .._deprecation import deprecated_names
from .dat_dcn import DATDCNAttentionConfig
from .deform_conv import DeformableConvConfig, deform_conv2d
from .matching import CONTROLS, REPLACEMENTS, matched_peer, replace_attention
from .mhsa import MultiHeadAttentionConfig
from .ms_deform_attn import MultiScaleDeformableConfig
from .multi_scale import multi_scale_deformable_attention
from .per_query import PerQueryAttentionConfig
from .pyramid import PyramidAttentionConfig
from .receptive_field import receptive_field
from .registry import ATTENTIONS

__all__ = [
    "ATTENTIONS",
    "CONTROLS",
    "REPLACEMENTS",
    "DATDCNAttentionConfig",
    "DeformableConvConfig",
    "MultiHeadAttentionConfig",
    "MultiScaleDeformableConfig",
    "PerQueryAttentionConfig",
    "PyramidAttentionConfig",
    "deform_conv2d",
    "matched_peer",
    "multi_scale_deformable_attention",
    "receptive_field",
    "replace_attention",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "SWAPS": "REPLACEMENTS",
        "SwapInAttentionConfig": "DATDCNAttentionConfig",
        "reach": "receptive_field",
        "swap_attention": "replace_attention",
    },
)
