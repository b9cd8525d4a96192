"""Training of any model or peer, on scenes or image folders: single- or multi-process, resumable.

=============  ===================================================================================
`data`         data sets: scenes and image folders
`optimizer`    AdamW as in the releases, moving average of the weights
`finetune`     initial weights from a checkpoint, frozen stages, layer-wise learning rates
`mixup`        mixup and CutMix
`checkpoint`   atomic checkpoint files with checksums
`run_folder`   the folder of a run and its lock
`distributed`  the processes of a run
`sharding`     weights sharded over the processes
`evaluate`     loss and accuracy on held-out images
`log`          CSV log of the steps, TensorBoard events
`loop`         the training loop
=============  ===================================================================================

`dat_ref.train_config` describes a run as data. ``dat-ref train`` and ``torchrun -m dat_ref.torch.train`` take the same
arguments.
"""

from ..._deprecation import deprecated_names
from ...train_config import LAPTOP, RELEASED, TrainConfig, preset
from .data import ImageFolder, SceneImages, build_datasets, train_and_val
from .distributed import DistributedContext, init_distributed
from .evaluate import Scores, evaluate
from .loop import Result, build_model, fit

__all__ = [
    "LAPTOP",
    "RELEASED",
    "DistributedContext",
    "ImageFolder",
    "Result",
    "SceneImages",
    "Scores",
    "TrainConfig",
    "build_datasets",
    "build_model",
    "evaluate",
    "fit",
    "init_distributed",
    "preset",
    "train_and_val",
]

__getattr__ = deprecated_names(
    __name__, {"Recipe": "TrainConfig", "Team": "DistributedContext", "gathered": "init_distributed"}
)
