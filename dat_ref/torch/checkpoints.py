"""Checkpoints of the modules. A file is loaded into a model completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from .._checks import CheckpointError
from ..checkpoints import LoadReport, official_state, read_checkpoint
from ..config import DATConfig
from ..params import unflatten
from ..state_files import save_state
from .backbone import DAT
from .bridge import as_numpy
from .features import DATFeatures

__all__ = ["load_checkpoint", "save_checkpoint"]


def load_checkpoint(
    model: DAT,
    path: str | os.PathLike[str],
    strict: bool = True,
    *,
    new_head: bool = False,
    prefix: str | None = None,
) -> LoadReport:
    """Load a checkpoint of this project or of either release into a model. The model keeps its dtype and device.

    A features-only model does not use the final norm and the head, so the file may lack them. This allows loading the
    backbone of a detector; the norms that a detector applies to each map (``norms.*``) are ignored.

    A model with another number of image channels gets the converted first convolution of an RGB checkpoint, see
    `dat_ref.checkpoints.convert_image_channels`.

    Args:
        model: model that `dat_ref.torch.create_model` returned.
        path: ``.pth``, ``.safetensors`` or ``.npz`` file, see `dat_ref.checkpoints.read_state`. Code in it is never
            executed.
        strict: whether a missing, unexpected or mis-shaped array is an error. If False, parameters without a fitting
            array keep their values.
        new_head: whether the head keeps its values if the file has none, or one for another number of classes; for
            fine-tuning. All other parameters are still required.
        prefix: prefix of the backbone's names in the file, with or without its last dot. None: found automatically, if
            there is one backbone.

    Returns:
        A report on every array in the file.

    Raises:
        CheckpointError: if the file does not fit; with the report. The model is unchanged.
    """
    _check_model(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases = _aliases(parameters)
    found = read_checkpoint(path, prefix)
    state = found.state
    # A file may contain a shared parameter only once, under the first of its names.
    state.update({name: state[first] for name, first in aliases.items() if name not in state and first in state})
    optional: tuple[str, ...] = ("norm.", "head.") if isinstance(model, DATFeatures) else ()
    wanted = {name for name in parameters if not name.startswith(optional)}
    fit = found.fit(_config_with_head(model), strict=strict, new_head=new_head, wanted=wanted)
    for name, first in aliases.items():
        if not np.array_equal(fit.arrays.get(name, 0), fit.arrays.get(first, 0)):
            raise CheckpointError(
                f"{os.fspath(path)}: expected equal arrays for {first} and {name}, which share one parameter of the "
                "model, got different ones"
            )
    # Convert all arrays before writing the first one, so that an error leaves the model unchanged.
    values = {name: torch.from_numpy(array.copy()).to(parameters[name]) for name, array in fit.arrays.items()}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return fit.report


def save_checkpoint(model: DAT, path: str | os.PathLike[str], official: bool = False) -> None:
    """Write a model's parameters to a file, atomically. bfloat16 is written as float32.

    A parameter that several modules share is written under each of its names, so that any model can load the file.

    Args:
        path: ``.safetensors``, ``.npz`` or ``.pth`` file.
        official: whether to use the released names, shapes and buffers. A ``.pth`` file can then be loaded by the
            released code.

    Raises:
        CheckpointError: if the suffix is unknown. With `official` also for a features-only model, and if the released
            code cannot partition the model's maps into windows.
    """
    _check_model(model)
    arrays = as_numpy(dict(model.named_parameters(remove_duplicate=False)))
    if official:
        if isinstance(model, DATFeatures):
            raise CheckpointError("model: expected a complete model for released names, got a features-only model")
        arrays = official_state(unflatten(arrays), _config_with_head(model))
    save_state(path, arrays)


def _aliases(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return the further names of shared parameters: name → first name."""
    first: dict[nn.Parameter, str] = {}
    return {name: first[leaf] for name, leaf in parameters.items() if first.setdefault(leaf, name) != name}


def _check_model(model: DAT) -> None:
    if not isinstance(model, DAT):
        raise CheckpointError(
            f"model: expected a dat_ref.torch.DAT, got {type(model).__name__}; pass the wrapped model (model.module)"
        )


def _config_with_head(model: DAT) -> DATConfig:
    """Return the configuration with the current number of classes, which `reset_classifier` may have changed."""
    return replace(model.config, num_classes=model.num_classes)
