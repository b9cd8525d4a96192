"""Deformable attention in PyTorch: modules and backbones that load the released checkpoints and take any input size.

The same names as the NumPy spec, the same conventions, the same parameter names::

    import dat_ref.torch

    model = dat_ref.torch.create_model("dat_tiny", num_classes=10)
    layer = dat_ref.torch.DeformableAttention(dat_ref.DeformableAttentionConfig(dim=96, heads=3, size=(14, 14)))

==============  =========================================================================================
`functional`    the operations, on tensors
`layer`         the deformable-attention layer
`peers`         the systems it is compared with: ``create_model("dat_tiny", attention="pyramid")``
`block`         the Transformer block
`backbone`      `DAT`
`features`      `DATFeatures`, a backbone that gives its maps
`checkpoints`   files of weights, all of one or nothing
`models`        `create_model`, by name
`inference`     `optimize_for_inference`, on a CPU
`bridge`        to the spec and back; released names
==============  =========================================================================================

Run programs in this package with ``python -m`` only: as a script, a file beside this folder would import it for
``torch``.
"""

from . import functional, peers
from .backbone import DAT
from .block import Block
from .bridge import as_numpy
from .features import DATFeatures
from .functional import backends, deformable_attention
from .inference import optimize_for_inference
from .layer import DeformableAttention
from .models import create_model, list_models
from .peers import NeighborhoodAttention, WindowAttention

__all__ = [
    "DAT",
    "Block",
    "DATFeatures",
    "DeformableAttention",
    "NeighborhoodAttention",
    "WindowAttention",
    "as_numpy",
    "backends",
    "create_model",
    "deformable_attention",
    "functional",
    "list_models",
    "optimize_for_inference",
    "peers",
]
