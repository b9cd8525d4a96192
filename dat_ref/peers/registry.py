"""Every attention that a block can use, by the type of its configuration: the deformable layer and its peers.

A new one needs a configuration derived from `PeerConfig`, the four functions of `Attention`, a rule in
`dat_ref.peers.visibility`, and, to take a deformable layer's place in a backbone, one in `dat_ref.peers.swap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._checks import Array, Tree
from ..config import DeformableAttentionConfig, NeighborhoodAttentionConfig, WindowAttentionConfig
from ..layer import LayerTrace, deformable_layer, deformable_layer_macs, deformable_layer_vjp, deformable_shapes
from .deform_conv import (
    DeformableConvConfig,
    DeformableConvTrace,
    deformable_conv,
    deformable_conv_macs,
    deformable_conv_shapes,
    deformable_conv_start,
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
    multi_scale_deformable_layer,
    multi_scale_deformable_layer_macs,
    multi_scale_deformable_layer_vjp,
    multi_scale_deformable_shapes,
    multi_scale_deformable_start,
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
from .swap_in import (
    SwapInAttentionConfig,
    SwapInTrace,
    swap_in_attention,
    swap_in_attention_macs,
    swap_in_attention_vjp,
    swap_in_shapes,
    swap_in_start,
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
    | SwapInTrace
)


class Attention(NamedTuple):
    """The functions of an attention: parameter shapes, forward, gradient, cost; and first values of its own, if any."""

    shapes: Callable[[Any], Tree]
    forward: Callable[..., tuple[Array, Any]]
    vjp: Callable[..., tuple[Array, Tree]]
    macs: Callable[..., int]
    start: Callable[[Tree, Any, np.random.Generator], None] | None = None


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
        deformable_conv_shapes, deformable_conv, deformable_conv_vjp, deformable_conv_macs, deformable_conv_start
    ),
    MultiScaleDeformableConfig: Attention(
        multi_scale_deformable_shapes,
        multi_scale_deformable_layer,
        multi_scale_deformable_layer_vjp,
        multi_scale_deformable_layer_macs,
        multi_scale_deformable_start,
    ),
    PerQueryAttentionConfig: Attention(
        per_query_shapes, per_query_attention, per_query_attention_vjp, per_query_attention_macs
    ),
    SwapInAttentionConfig: Attention(
        swap_in_shapes, swap_in_attention, swap_in_attention_vjp, swap_in_attention_macs, swap_in_start
    ),
}
