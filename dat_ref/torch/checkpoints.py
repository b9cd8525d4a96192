"""Checkpoints of the modules: all of a file goes into a model, or nothing of it."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from .._checks import CheckpointError
from ..checkpoints import LoadReport, fit_state, official_state
from ..config import DATConfig
from ..params import unflatten
from ..state_files import read_arrays, save_state, select_backbone
from .backbone import DAT
from .bridge import as_numpy
from .features import DATFeatures

__all__ = ["load_checkpoint", "save_checkpoint"]


def load_checkpoint(model: DAT, path: str | os.PathLike[str], strict: bool = True) -> LoadReport:
    """Load a checkpoint of either release, or of ours, into a model; dtype and device stay the model's.

    A features-only model has no use for the final norm and the head, so a detector's backbone loads too; the norms
    that a detector applies to each map (``norms.*``) are ignored.

    Args:
        model: what `dat_ref.torch.create_model` returns.
        path: ``.pth``, ``.safetensors`` or ``.npz``, see `dat_ref.checkpoints.read_state`; never executed.
        strict: whether a missing, unexpected or mis-shaped array is an error. If not, the parameters that the
            file does not give keep their values: for fine-tuning with another number of classes.

    Returns:
        What became of every array in the file.

    Raises:
        CheckpointError: with the report; the model is as it was.
    """
    _check_model(model)
    parameters = dict(model.named_parameters())
    state, ignored = select_backbone(read_arrays(path), os.fspath(path))
    optional: tuple[str, ...] = ("norm.", "head.") if isinstance(model, DATFeatures) else ()
    wanted = {name for name in parameters if not name.startswith(optional)}
    fit = fit_state(state, _config_with_head(model), strict=strict, wanted=wanted, source=os.fspath(path))
    # Every copy is made before the first is written: from here on nothing can fail half-way.
    values = {name: torch.from_numpy(array.copy()).to(parameters[name]) for name, array in fit.arrays.items()}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return replace(fit.report, ignored=fit.report.ignored + ignored)


def save_checkpoint(model: DAT, path: str | os.PathLike[str], official: bool = False) -> None:
    """Write a model's parameters; the file is there whole or not at all. bfloat16 is written as float32.

    Args:
        path: ``.safetensors``, ``.npz`` or ``.pth``.
        official: released names, shapes and buffers instead of ours: with ``.pth`` a file that the released code loads.

    Raises:
        CheckpointError: for another suffix; for released names of a model without all its stages, or whose maps
            the released code cannot cut into windows.
    """
    _check_model(model)
    arrays = as_numpy(dict(model.named_parameters()))
    if official:
        if isinstance(model, DATFeatures):
            raise CheckpointError("model: expected a whole one for released names, got a features-only model")
        arrays = official_state(unflatten(arrays), _config_with_head(model))
    save_state(path, arrays)


def _check_model(model: DAT) -> None:
    if not isinstance(model, DAT):
        raise CheckpointError(
            f"model: expected a dat_ref.torch.DAT, got {type(model).__name__}; hand over what it wraps (model.module)"
        )


def _config_with_head(model: DAT) -> DATConfig:
    """Return the configuration with the classes of the present head, which `reset_classifier` may have changed."""
    return replace(model.config, num_classes=model.num_classes)
