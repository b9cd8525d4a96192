"""The systems that deformable attention is compared with, each with forward, gradient, cost and reach.

==============================  ====================================================================================
`dat_ref.peers.mhsa`            plain multi-head self-attention: every query sees the whole map
`dat_ref.peers.window`          windows and shifted windows (Swin)
`dat_ref.peers.neighborhood`    the pixels around each query, also dilated (DAT++, NATTEN)
`dat_ref.peers.pyramid`         the whole map, made coarser (PVT)
`dat_ref.peers.deform_conv`     deformable convolution v1 and v2
`dat_ref.peers.multi_scale`     Deformable DETR's operation, in its usual signature
`dat_ref.peers.ms_deform_attn`  Deformable DETR's attention, and one with dot products
`dat_ref.peers.per_query`       sampled keys for every query: what DAT's article argues against
`dat_ref.peers.swap_in`         Deformable DETR's attention as a block of DAT
`dat_ref.peers.registry`        all of them by the type of their configuration
`dat_ref.peers.visibility`      which pixels a query sees
`dat_ref.peers.swap`            a peer in the place of a backbone's deformable layers, matched in keys or cost
==============================  ====================================================================================
"""

from .deform_conv import DeformableConvConfig, deform_conv2d
from .mhsa import MultiHeadAttentionConfig
from .ms_deform_attn import MultiScaleDeformableConfig
from .multi_scale import multi_scale_deformable_attention
from .per_query import PerQueryAttentionConfig
from .pyramid import PyramidAttentionConfig
from .registry import ATTENTIONS
from .swap import SWAPS, matched_peer, swap_attention
from .swap_in import SwapInAttentionConfig
from .visibility import reach

__all__ = [
    "ATTENTIONS",
    "SWAPS",
    "DeformableConvConfig",
    "MultiHeadAttentionConfig",
    "MultiScaleDeformableConfig",
    "PerQueryAttentionConfig",
    "PyramidAttentionConfig",
    "SwapInAttentionConfig",
    "deform_conv2d",
    "matched_peer",
    "multi_scale_deformable_attention",
    "reach",
    "swap_attention",
]
