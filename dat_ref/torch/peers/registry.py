"""Registry of the peers' modules by configuration type: `dat_ref.peers.registry` in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...config import NeighborhoodAttentionConfig, WindowAttentionConfig
from ...peers.dat_dcn import DATDCNAttentionConfig
from ...peers.deform_conv import DeformableConvConfig
from ...peers.mhsa import MultiHeadAttentionConfig
from ...peers.ms_deform_attn import MultiScaleDeformableConfig
from ...peers.per_query import PerQueryAttentionConfig
from ...peers.pyramid import PyramidAttentionConfig
from .dat_dcn import DATDCNAttention
from .deform_conv import DeformableConv
from .mhsa import MultiHeadAttention
from .ms_deform_attn import MultiScaleDeformableAttention
from .neighborhood import NeighborhoodAttention
from .per_query import PerQueryAttention
from .pyramid import PyramidAttention
from .window import WindowAttention

PEER_MODULES: dict[type, Callable[..., nn.Module]] = {
    WindowAttentionConfig: WindowAttention,
    NeighborhoodAttentionConfig: NeighborhoodAttention,
    MultiHeadAttentionConfig: MultiHeadAttention,
    PyramidAttentionConfig: PyramidAttention,
    DeformableConvConfig: DeformableConv,
    MultiScaleDeformableConfig: MultiScaleDeformableAttention,
    PerQueryAttentionConfig: PerQueryAttention,
    DATDCNAttentionConfig: DATDCNAttention,
}
