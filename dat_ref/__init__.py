"""NumPy reference implementation of deformable attention: DAT (CVPR 2022) and DAT++ (2023).

Reading order. It is also the import order: a module imports only from the modules above it.

==========================  ====================================================================================
`dat_ref.conventions`       four coordinate conventions, as data
`dat_ref.config`            layer and backbone configurations; conversion from the released argument names
`dat_ref.presets`           configurations of the eight released backbones and of two small ones
`dat_ref.params`            parameter trees: names and checks
`dat_ref.official`          conversion to and from the released parameter names and shapes
`dat_ref.ops.basic`         linear, convolution, layer norm, GELU, softmax
`dat_ref.ops.grid`          reference and query grids; normalized and pixel coordinates
`dat_ref.ops.offsets`       offset network and offset bound
`dat_ref.ops.sampling`      bilinear sampling
`dat_ref.ops.bias`          relative position bias and its variants
`dat_ref.ops.attention`     attention over sampled keys
`dat_ref.layer`             deformable-attention layer
`dat_ref.peers`             other attention mechanisms for comparison; two serve as the backbones' local attention
`dat_ref.block`             Transformer block
`dat_ref.backbone`          hierarchical backbone
`dat_ref.initialization`    parameter initialization
==========================  ====================================================================================

Modules outside the reading order. Each is imported on first access:

==========================  ====================================================================================
`dat_ref.complexity`        cost of each part, by formula and by counting
`dat_ref.suggest`           hyperparameters of a layer for a map and a number of keys, with reasons
`dat_ref.claims`            claims of the papers, with checks and verdicts
`dat_ref.checkpoints`       checkpoint files of both releases and of `dat_ref`
`dat_ref.train`             training in NumPy
`dat_ref.viz`               figures (needs matplotlib)
`dat_ref.torch`             PyTorch implementation (needs torch)
`dat_ref.bench`             benchmark of time and memory (needs torch)
`dat_ref.testing`           conformance tests for other implementations (needs hypothesis)
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

__version__ = "0.2.0"

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

_LAZY_MODULES = ("bench", "checkpoints", "claims", "complexity", "suggest", "testing", "torch", "train", "viz")


def __getattr__(name: str) -> Any:
    """Import a module outside the reading order on first access."""
    if name in _LAZY_MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
