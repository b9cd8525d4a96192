"""The backbones in timm's registry: import this module, then ``timm.create_model("dat_tiny", ...)``.

The released weights are not published in a place that timm can download from. ``pretrained=True`` therefore needs a
local file, which is passed in timm's usual way::

    import timm, dat_ref.torch.timm

    overlay = {"file": "dat_tiny_in1k_224.pth"}
    model = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)

timm's other sources work too: a ``state_dict`` in the overlay, and the names ``local-dir:FOLDER`` and ``hf-hub:ID``.
``dat_spot`` has its weights in the package. A head for another number of classes keeps its random initialization.

``features_only=True`` returns a `DATFeatures` with timm's `FeatureInfo`. timm's own extractors are used for
``feature_cls="getter"``, ``"hook"`` and ``"fx"``. ``"list"`` and ``"dict"`` run the children of a model in order, which
is not the order of these models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import CheckpointError
from ..checkpoints import Fit, fit_state
from ..data import NETWORK, network_card, network_path
from ..presets import PRESETS
from ..state_files import select_backbone
from .backbone import DAT, Embed, Stage, data_settings
from .bridge import as_numpy
from .features import DATFeatures
from .models import create_model

try:
    from timm.models import (  # type: ignore[import-not-found, import-untyped]
        FeatureInfo,
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
        register_notrace_module,
    )
except ImportError as error:
    raise ImportError(
        f"timm 1.0 or newer is needed to register the models, and cannot be imported ({error}): pip install timm; "
        "dat_ref.torch.create_model needs no timm and has the same options"
    ) from error

__all__ = ["checkpoint_filter_fn", "default_cfgs"]

_STEM = "patch_embedding.0.projection.weight"


def _settings(name: str) -> dict[str, Any]:
    """Return timm's default configuration of a model."""
    settings = data_settings(PRESETS[name])
    if name.endswith("_384"):  # for this size, whatever size its tables are built for
        settings |= {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
    if name.startswith("dat_pp"):
        settings["paper_ids"] = "arXiv:2309.01430"
    elif name not in ("dat_nano", "dat_spot"):
        settings["paper_ids"] = "arXiv:2201.00520"
    if name == NETWORK:
        classes = tuple(network_card()["classes"])
        settings |= {"file": str(network_path()), "num_classes": len(classes), "label_names": classes, "crop_pct": 1.0}
    return {**settings, "custom_load": True}  # files are read by `DAT.load_pretrained`, in every format, safely


default_cfgs = generate_default_cfgs({name: _settings(name) for name in PRESETS})


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: DAT) -> dict[str, Tensor]:
    """Convert a state dict of this project or of either release to our names, and resize its bias tables to the model.

    The signature is timm's: ``timm.models.load_checkpoint(model, path, filter_fn=checkpoint_filter_fn)``. A head of
    another size is omitted. A first convolution for another number of channels is left to timm, which converts it.

    Raises:
        CheckpointError: if the state dict belongs to another model, or ``pretrained_cfg`` has another number of classes
            than a head that fits.
    """
    state, _ = select_backbone(as_numpy(dict(state_dict)))
    stem = state.get(_STEM, state.get("patch_proj.0.weight"))
    fit = _fit(state, model, model.in_chans if stem is None else stem.shape[1], new_head=True)
    classes = model.default_cfg.get("num_classes", model.num_classes)
    if "head.weight" in fit.arrays and classes != model.num_classes:
        raise CheckpointError(
            f"state_dict: expected a head for {classes} classes as pretrained_cfg says, got {model.num_classes}; "
            f"pass pretrained_cfg_overlay={{'num_classes': {model.num_classes}}}"
        )
    return _tensors(fit)


def _fit(state: Mapping[str, Any], model: DAT, channels: int, **options: bool) -> Fit:
    config = replace(model.config, num_classes=model.num_classes, in_channels=channels)
    return fit_state(state, config, wanted=dict(model.named_parameters()), source="state_dict", **options)


def _tensors(fit: Fit) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in fit.arrays.items()}


def _rename_released(model: DAT, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict with released names to our names, in place, before it is loaded."""
    if prefix or not any(name.startswith("patch_proj.") for name in state_dict):
        return
    ours = _tensors(_fit(select_backbone(as_numpy(state_dict))[0], model, model.in_chans, strict=False))
    state_dict.clear()
    state_dict.update(ours)


def _keep_stages(model: DATFeatures, out_indices: int | Sequence[int], output_fmt: str = "NCHW") -> DATFeatures:
    """Select the maps of a features-only model; a ``feature_cls`` of timm."""
    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
    model.keep_stages(out_indices)
    model.feature_info = FeatureInfo([dict(entry) for entry in model.feature_info.info], model.out_indices)
    return model


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """Return the function that timm calls to build a model."""

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        features = {"feature_cls": _keep_stages, "out_indices": tuple(range(len(PRESETS[name].stages)))}
        features |= options.pop("feature_cfg", {})
        features["feature_cls"] = options.pop("feature_cls", features["feature_cls"])
        ours = options.get("features_only", False) and features["feature_cls"] is _keep_stages
        if overlay := options.get("pretrained_cfg_overlay"):
            options["pretrained_cfg_overlay"] = {"custom_load": True, **overlay}
        model: nn.Module = build_model_with_cfg(
            partial(_create, name, ours),
            name,
            pretrained,
            feature_cfg=features,
            pretrained_filter_fn=checkpoint_filter_fn,
            **options,
        )
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name}. The options are the same as for `dat_ref.torch.create_model`."
    return build


def _create(name: str, features_only: bool, **options: Any) -> DAT:
    model = create_model(name, features_only=features_only, **options)
    model.register_load_state_dict_pre_hook(_rename_released)
    return model


# The extractors of torch.fx return maps of stages, and their steps depend on the size of the map.
register_notrace_module(Embed)
register_notrace_module(Stage)
for _name in PRESETS:
    globals()[_name] = register_model(_entrypoint(_name))
