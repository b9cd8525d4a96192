"""Peers: the attention and convolution layers that deformable attention is compared with.

Each peer has a forward pass, a hand-written gradient (VJP), a cost formula and a receptive field.

===============================  ====================================================================================
`dat_ref.peers.mhsa`             plain multi-head self-attention over the whole map
`dat_ref.peers.window`           window and shifted-window attention (Swin)
`dat_ref.peers.neighborhood`     attention to the pixels around each query, optionally dilated (DAT++, NATTEN)
`dat_ref.peers.pyramid`          spatial-reduction attention: the whole map at a lower resolution (PVT)
`dat_ref.peers.deform_conv`      deformable convolution v1 and v2
`dat_ref.peers.multi_scale`      multi-scale deformable sampling (Deformable DETR), in its usual signature
`dat_ref.peers.ms_deform_attn`   Deformable DETR's attention module, and a variant with dot products
`dat_ref.peers.ms_deform_layer`  the same attention in a block
`dat_ref.peers.per_query`        separate sampled keys for every query, the design that DAT avoids
`dat_ref.peers.dat_dcn`          Deformable DETR's attention as a block of DAT
`dat_ref.peers.attention`        row of an attention: its functions, cost, receptive field, module, …
`dat_ref.peers.memory`           memory formulas: record of the allocations of a forward pass
`dat_ref.peers.deformable`       row of the deformable layer itself
`dat_ref.peers.registry`         rows of all attention systems by configuration type
`dat_ref.peers.receptive_field`  the pixels that a query attends to
`dat_ref.peers.matching`         replacement of a backbone's deformable layers, matched in keys or cost
===============================  ====================================================================================
"""

from .._deprecation import deprecated_names
from .attention import Attention
from .dat_dcn import DATDCNAttentionConfig
from .deform_conv import DeformableConvConfig, deform_conv2d
from .matching import CONTROLS, REPLACEMENTS, matched_peer, replace_attention
from .mhsa import MultiHeadAttentionConfig
from .ms_deform_attn import MultiScaleDeformableConfig
from .multi_scale import multi_scale_deformable_attention
from .per_query import PerQueryAttentionConfig
from .pyramid import PyramidAttentionConfig
from .receptive_field import receptive_field
from .registry import ATTENTIONS, register

__all__ = [
    "ATTENTIONS",
    "CONTROLS",
    "REPLACEMENTS",
    "Attention",
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
    "register",
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
