"""The eight backbones in timm's registry: import this module, then ``timm.create_model("dat_tiny", ...)``.

The weights are not published in a place that timm can download from. ``pretrained=True`` therefore needs a local file,
which is passed in timm's usual way::

    import timm, dat_ref.torch.timm

    overlay = {"file": "dat_tiny_in1k_224.pth"}
    model = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)

If the file has another number of classes, the head keeps its random initialization. Files with released names can also
be loaded with timm's ``checkpoint_path=`` argument and with ``load_state_dict``.
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
        f"timm 0.9 or newer is needed to register the models, and cannot be imported ({error}): pip install timm; "
        "dat_ref.torch.create_model needs no timm and has the same options"
    ) from error

__all__ = ["checkpoint_filter_fn", "default_cfgs"]


def _data_settings(name: str) -> dict[str, Any]:
    """Return timm's default configuration of a model: preprocessing, and names of the first and last layer."""
    side = 384 if name.endswith("_384") else 224
    paper_id = "2309.01430" if name.startswith("dat_pp") else "2201.00520"
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
        "paper_ids": f"arXiv:{paper_id}",
    }


default_cfgs = generate_default_cfgs({name: _data_settings(name) for name in PRESETS})


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: DAT) -> dict[str, Tensor]:
    """Convert a state dict of this project or of either release to our names, and resize its bias tables to the model.

    The signature is timm's: ``timm.models.load_checkpoint(model, path, filter_fn=checkpoint_filter_fn)``. Arrays that
    do not fit are omitted; ``load_state_dict`` then reports them as missing.

    Raises:
        CheckpointError: if the state dict belongs to another model.
    """
    state, _ = select_backbone(as_numpy(dict(state_dict)))
    config = replace(model.config, num_classes=model.num_classes)
    fit = fit_state(state, config, strict=False, wanted=dict(model.named_parameters()))
    return {name: torch.from_numpy(array.copy()) for name, array in fit.arrays.items()}


def _rename_released(model: DAT, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict with released names to our names, in place, before it is loaded."""
    if prefix or not any(name.startswith("patch_proj.") for name in state_dict):
        return
    ours = checkpoint_filter_fn(state_dict, model)
    state_dict.clear()
    state_dict.update(ours)


def _load(model: DAT, file: str) -> None:
    """Load a file completely, except for a head with another number of classes."""
    report = load_checkpoint(model, file, strict=False)
    mismatched = [*report.missing, *report.unexpected, *(name for name, _, _ in report.misshaped)]
    if any(not name.startswith(("head.", "cls_head.")) for name in mismatched):
        raise CheckpointError(f"{file}: expected the parameters of this model\n{report}")


def _entrypoint(name: str) -> Callable[..., DAT]:
    """Return the function that timm calls to build a model."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,  # unused: nothing is downloaded
        **options: Any,
    ) -> DAT:
        settings = resolve_pretrained_cfg(
            name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay
        )
        if pretrained and not settings.file:
            raise RuntimeError(
                f"No pretrained weights exist for {name} that timm can download. Download the released file and pass "
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
    build.__doc__ = f"Build {name}. The options are the same as for `dat_ref.torch.create_model`."
    return build


for _name in PRESETS:
    globals()[_name] = register_model(_entrypoint(_name))
