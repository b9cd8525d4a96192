"""Registry of attention layers by configuration type: the deformable layer and its peers.

A new layer needs a configuration derived from `PeerConfig`, the four functions of `Attention`, and a rule in
`dat_ref.peers.receptive_field`. To replace deformable layers in a backbone it also needs a rule in
`dat_ref.peers.matching`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._checks import Array, Tree
from ..config import DeformableAttentionConfig, NeighborhoodAttentionConfig, WindowAttentionConfig
from ..layer import LayerTrace, deformable_layer, deformable_layer_macs, deformable_layer_vjp, deformable_shapes
from .dat_dcn import (
    DATDCNAttentionConfig,
    DATDCNTrace,
    dat_dcn_attention,
    dat_dcn_attention_macs,
    dat_dcn_attention_vjp,
    dat_dcn_init,
    dat_dcn_shapes,
)
from .deform_conv import (
    DeformableConvConfig,
    DeformableConvTrace,
    deformable_conv,
    deformable_conv_init,
    deformable_conv_macs,
    deformable_conv_shapes,
    deformable_conv_vjp,
)
from .mhsa import (
    MultiHeadAttentionConfig,
    MultiHeadTrace,
    multi_head_attention,
    multi_head_attention_macs,
    multi_head_attention_vjp,
    multi_head_shapes,
)
from .ms_deform_attn import (
    MultiScaleDeformableConfig,
    MultiScaleDeformableTrace,
    multi_scale_deformable_init,
    multi_scale_deformable_layer,
    multi_scale_deformable_layer_macs,
    multi_scale_deformable_layer_vjp,
    multi_scale_deformable_shapes,
)
from .neighborhood import (
    NeighborhoodTrace,
    neighborhood_attention,
    neighborhood_attention_macs,
    neighborhood_attention_vjp,
    neighborhood_shapes,
)
from .per_query import (
    PerQueryAttentionConfig,
    PerQueryTrace,
    per_query_attention,
    per_query_attention_macs,
    per_query_attention_vjp,
    per_query_shapes,
)
from .pyramid import (
    PyramidAttentionConfig,
    PyramidTrace,
    pyramid_attention,
    pyramid_attention_macs,
    pyramid_attention_vjp,
    pyramid_shapes,
)
from .window import (
    WindowTrace,
    window_attention,
    window_attention_macs,
    window_attention_vjp,
    window_shapes,
)

AttentionTrace = (
    LayerTrace
    | WindowTrace
    | NeighborhoodTrace
    | MultiHeadTrace
    | PyramidTrace
    | DeformableConvTrace
    | MultiScaleDeformableTrace
    | PerQueryTrace
    | DATDCNTrace
)


class Attention(NamedTuple):
    """Functions of an attention: parameter shapes, forward, gradient, cost, and optionally its initialization."""

    shapes: Callable[[Any], Tree]
    forward: Callable[..., tuple[Array, Any]]
    vjp: Callable[..., tuple[Array, Tree]]
    macs: Callable[..., int]
    init: Callable[[Tree, Any, np.random.Generator], None] | None = None


def _deformable_macs(batch: int, size: tuple[int, int], config: DeformableAttentionConfig) -> int:
    return sum(deformable_layer_macs(batch, size, config).values())


ATTENTIONS: dict[type, Attention] = {
    DeformableAttentionConfig: Attention(deformable_shapes, deformable_layer, deformable_layer_vjp, _deformable_macs),
    WindowAttentionConfig: Attention(window_shapes, window_attention, window_attention_vjp, window_attention_macs),
    NeighborhoodAttentionConfig: Attention(
        neighborhood_shapes, neighborhood_attention, neighborhood_attention_vjp, neighborhood_attention_macs
    ),
    MultiHeadAttentionConfig: Attention(
        multi_head_shapes, multi_head_attention, multi_head_attention_vjp, multi_head_attention_macs
    ),
    PyramidAttentionConfig: Attention(pyramid_shapes, pyramid_attention, pyramid_attention_vjp, pyramid_attention_macs),
    DeformableConvConfig: Attention(
        deformable_conv_shapes, deformable_conv, deformable_conv_vjp, deformable_conv_macs, deformable_conv_init
    ),
    MultiScaleDeformableConfig: Attention(
        multi_scale_deformable_shapes,
        multi_scale_deformable_layer,
        multi_scale_deformable_layer_vjp,
        multi_scale_deformable_layer_macs,
        multi_scale_deformable_init,
    ),
    PerQueryAttentionConfig: Attention(
        per_query_shapes, per_query_attention, per_query_attention_vjp, per_query_attention_macs
    ),
    DATDCNAttentionConfig: Attention(
        dat_dcn_shapes, dat_dcn_attention, dat_dcn_attention_vjp, dat_dcn_attention_macs, dat_dcn_init
    ),
}
