"""Deformable attention, explained by code that runs: the NumPy reference of DAT (CVPR 2022) and DAT++ (2023).

Reading order, which is also the import order (a module imports only from those above it):

==========================  ====================================================================================
`dat_ref.conventions`       four coordinate conventions, as data
`dat_ref.config`            what a layer or a backbone is; the released argument names
`dat_ref.presets`           the eight released backbones
`dat_ref.params`            parameter trees: names and checks
`dat_ref.official`          released parameter names and shapes, both ways
`dat_ref.ops.basic`         linear, convolution, layer norm, GELU, softmax
`dat_ref.ops.grid`          reference and query grids, coordinates and pixels
`dat_ref.ops.offsets`       the offset network and the bound on its output
`dat_ref.ops.sampling`      bilinear sampling
`dat_ref.ops.bias`          the position bias and its siblings
`dat_ref.ops.attention`     attention over sampled keys
`dat_ref.layer`             the deformable-attention layer
`dat_ref.peers`             the systems that it is compared with; two of them serve in the backbones' local blocks
`dat_ref.block`             the Transformer block
`dat_ref.backbone`          the whole backbone
`dat_ref.initialization`    parameter initialization
==========================  ====================================================================================

Beyond the trail, each imported when it is first used:

==========================  ====================================================================================
`dat_ref.complexity`        what each part costs, by formula and by counting
`dat_ref.claims`            what the articles say, checked
`dat_ref.checkpoints`       files of weights, of either release and our own
`dat_ref.train`             training in NumPy
`dat_ref.viz`               figures (needs matplotlib)
`dat_ref.torch`             the same in PyTorch (needs torch)
`dat_ref.bench`             how long it takes and how much memory, as ratios (needs torch)
`dat_ref.testing`           the conformance kit: what is wrong with an implementation (needs hypothesis)
==========================  ====================================================================================
"""

from importlib import import_module
from typing import Any

from ._checks import CheckpointError, ConfigError, ShapeError
from .backbone import DAT
from .config import (
    BiasKind,
    BlockConfig,
    DATConfig,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
)
from .conventions import Convention
from .initialization import init_params
from .layer import DeformableAttention, LayerTrace
from .ops.attention import deformable_attention
from .presets import PRESETS, config

__version__ = "0.1.0"

__all__ = [
    "DAT",
    "PRESETS",
    "BiasKind",
    "BlockConfig",
    "CheckpointError",
    "ConfigError",
    "Convention",
    "DATConfig",
    "DeformableAttention",
    "DeformableAttentionConfig",
    "LayerTrace",
    "NeighborhoodAttentionConfig",
    "OffsetBound",
    "ShapeError",
    "WindowAttentionConfig",
    "config",
    "deformable_attention",
    "init_params",
]

_ON_DEMAND = ("bench", "checkpoints", "claims", "complexity", "testing", "torch", "train", "viz")


def __getattr__(name: str) -> Any:
    """Import what lies beyond the trail when it is first asked for."""
    if name in _ON_DEMAND:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
