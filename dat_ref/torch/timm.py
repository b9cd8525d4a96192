"""The eight backbones in timm's registry: import this module, then ``timm.create_model("dat_tiny", ...)``.

No weights are published under a name that timm could fetch, so ``pretrained=True`` needs a file, given as timm does
it::

    import timm, dat_ref.torch.timm

    overlay = {"file": "dat_tiny_in1k_224.pth"}
    model = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)

With another number of classes than the file's the head keeps its initialization. Files with released names also load
through timm's own ``checkpoint_path=`` and ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._checks import CheckpointError
from ..checkpoints import fit_state
from ..presets import PRESETS
from ..state_files import select_backbone
from .backbone import DAT, IMAGENET_MEAN, IMAGENET_STD
from .bridge import as_numpy
from .checkpoints import load_checkpoint
from .models import create_model

try:
    from timm.models import (  # type: ignore[import-not-found, import-untyped]
        generate_default_cfgs,
        register_model,
        resolve_pretrained_cfg,
    )
except ImportError as error:
    raise ImportError(
        f"timm 0.9 or newer is needed to register the models with it, and does not import ({error}): pip install timm; "
        "dat_ref.torch.create_model needs no timm and takes the same options"
    ) from error

__all__ = ["checkpoint_filter_fn", "default_cfgs"]


def _data_settings(name: str) -> dict[str, Any]:
    """Return timm's settings of a model: what it is fed with, and the layers that depend on the data."""
    side = 384 if name.endswith("_384") else 224
    year = "2309.01430" if name.startswith("dat_pp") else "2201.00520"
    return {
        "num_classes": PRESETS[name].num_classes,
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 1.0 if side == 384 else 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embedding.0.projection",
        "classifier": "head",
        "paper_ids": f"arXiv:{year}",
    }


default_cfgs = generate_default_cfgs({name: _data_settings(name) for name in PRESETS})


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: DAT) -> dict[str, Tensor]:
    """Return a state dict under our names and with tables of the model's size, from one of either release or of ours.

    It has timm's signature: ``timm.models.load_checkpoint(model, path, filter_fn=checkpoint_filter_fn)``. What
    does not fit is left out, for ``load_state_dict`` to report as missing.

    Raises:
        CheckpointError: if the state dict is of another model.
    """
    state, _ = select_backbone(as_numpy(dict(state_dict)))
    config = replace(model.config, num_classes=model.num_classes)
    fit = fit_state(state, config, strict=False, wanted=dict(model.named_parameters()))
    return {name: torch.from_numpy(array.copy()) for name, array in fit.arrays.items()}


def _rename_released(model: DAT, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: put our names into one with released names, in place."""
    if prefix or not any(name.startswith("patch_proj.") for name in state_dict):
        return
    ours = checkpoint_filter_fn(state_dict, model)
    state_dict.clear()
    state_dict.update(ours)


def _load(model: DAT, file: str) -> None:
    """Load a file, all of it but a head for other classes."""
    report = load_checkpoint(model, file, strict=False)
    mismatched = [*report.missing, *report.unexpected, *(name for name, _, _ in report.misshaped)]
    if any(not name.startswith(("head.", "cls_head.")) for name in mismatched):
        raise CheckpointError(f"{file}: expected the parameters of this model\n{report}")


def _entrypoint(name: str) -> Callable[..., DAT]:
    """Return the function that builds a model as timm asks for it."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,  # of downloads, of which there are none
        **options: Any,
    ) -> DAT:
        settings = resolve_pretrained_cfg(
            name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay
        )
        if pretrained and not settings.file:
            raise RuntimeError(
                f"No pretrained weights exist for {name} that could be fetched. Download the released file and pass "
                "pretrained_cfg_overlay={'file': PATH}, or use pretrained=False for random initialization."
            )
        options = {key: value for key, value in options.items() if value is not None}
        options.setdefault("num_classes", settings.num_classes)
        options.setdefault("in_chans", settings.input_size[0])
        model = create_model(name, **options)
        if pretrained:
            _load(model, settings.file)
        model.pretrained_cfg = model.default_cfg = settings.to_dict()
        model.register_load_state_dict_pre_hook(_rename_released)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name}; options are those of `dat_ref.torch.create_model`."
    return build


for _name in PRESETS:
    globals()[_name] = register_model(_entrypoint(_name))
