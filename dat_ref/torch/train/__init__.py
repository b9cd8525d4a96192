"""Training: any model or peer, on scenes or on folders of images, in one process or many, stopped and gone on with.

============  ====================================================================================
`data`        scenes and image folders; what is wrong with a folder is named
`optimizer`   AdamW as the releases use it, the learning rate, the average of the weights
`mix`         mixup and CutMix
`checkpoint`  files that are there whole or not at all
`team`        the processes of a run
`shard`       weights cut over them
`evaluate`    loss and accuracy, every image once
`log`         a table of every step
`loop`        the steps
============  ====================================================================================

What a run is, is data: `dat_ref.recipe`. ``dat-ref train`` and ``torchrun -m dat_ref.torch.train`` take the same
arguments.
"""

from ...recipe import LAPTOP, RELEASED, Recipe, preset
from .data import ImageFolder, SceneImages, train_and_val
from .evaluate import Scores, evaluate
from .loop import Result, build_model, fit
from .team import Team, gathered

__all__ = [
    "LAPTOP",
    "RELEASED",
    "ImageFolder",
    "Recipe",
    "Result",
    "SceneImages",
    "Scores",
    "Team",
    "build_model",
    "evaluate",
    "fit",
    "gathered",
    "preset",
    "train_and_val",
]
