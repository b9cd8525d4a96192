"""Deformable attention in PyTorch: modules and backbones that load the released checkpoints and accept any input size.

Function names, coordinate conventions and parameter names are the same as in the NumPy spec::

    import dat_ref.torch

    model = dat_ref.torch.create_model("dat_tiny", num_classes=10)
    layer = dat_ref.torch.DeformableAttention(dim=96, heads=3, stride=4, init="zero_offset")

===============  ========================================================================================
`functional`     tensor operations
`layer`          the deformable-attention layer
`peers`          the attention modules it is compared with: ``create_model("dat_tiny", attention="pyramid")``
`block`          the Transformer block
`backbone`       `DAT`
`features`       `DATFeatures`, a backbone that returns feature maps
`checkpoints`    loading and saving of weights; a file is loaded completely or not at all
`models`         `create_model` and `list_models`
`inference`      `optimize_for_inference`, for CPUs
`offset_report`  size, bound and use of a model's offsets, with a verdict
`offset_log`     the same during training, as scalars for a log
`bridge`         conversion to and from NumPy parameters and released names
===============  ========================================================================================

Run programs in `dat_ref` with ``python -m`` only. A file in ``dat_ref/`` that is run as a script imports this folder as
``torch``.
"""

from .._checks import HyperparameterWarning
from . import functional, peers
from .backbone import DAT
from .block import Block
from .bridge import as_numpy
from .features import DATFeatures
from .functional import backends, deformable_attention
from .inference import optimize_for_inference
from .layer import DeformableAttention
from .models import create_model, list_models
from .offset_findings import LayerOffsets, OffsetReport
from .offset_log import OffsetLog
from .offset_report import offset_report
from .peers import NeighborhoodAttention, WindowAttention

__all__ = [
    "DAT",
    "Block",
    "DATFeatures",
    "DeformableAttention",
    "HyperparameterWarning",
    "LayerOffsets",
    "NeighborhoodAttention",
    "OffsetLog",
    "OffsetReport",
    "WindowAttention",
    "as_numpy",
    "backends",
    "create_model",
    "deformable_attention",
    "functional",
    "list_models",
    "offset_report",
    "optimize_for_inference",
    "peers",
]
