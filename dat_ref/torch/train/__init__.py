"""Training: any model or peer, on scenes or on folders of images, in one process or many, stopped and gone on with.

=============  ===================================================================================
`data`         scenes and image folders; what is wrong with a folder is named
`optimizer`    AdamW as the releases use it, the learning rate, the average of the weights
`mixup`        mixup and CutMix
`checkpoint`   files that are there whole or not at all
`distributed`  the processes of a run
`sharding`     weights sharded over them
`evaluate`     loss and accuracy, every image once
`log`          a table of every step
`loop`         the steps
=============  ===================================================================================

What a run is, is data: `dat_ref.train_config`. ``dat-ref train`` and ``torchrun -m dat_ref.torch.train`` take the same
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
