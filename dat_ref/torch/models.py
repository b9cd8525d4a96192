"""Model registry with timm's interface: `create_model` and `list_models`."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from difflib import get_close_matches
from os import PathLike
from typing import Any

import torch

from .._checks import ConfigError
from ..config import DATConfig
from ..peers.matching import CONTROLS, REPLACEMENTS, Match, replace_attention, resolve_kind
from ..presets import OFFSET_INIT, PRESETS
from .backbone import DAT
from .checkpoints import load_checkpoint
from .features import DATFeatures

# Options of `create_model` that are passed to the module. All others change the configuration.
_MODULE_OPTIONS = ("backend", "sampler", "init")
_ATTENTION_OPTIONS = {"attn_drop_rate": "attention_dropout", "proj_drop_rate": "projection_dropout"}
_CONFIG_ALIASES = {"drop_rate": "dropout", "img_size": "image_size"}


def list_models(filter: str = "") -> list[str]:  # noqa: A002 - timm's name
    """Return the model names, optionally only those that match a pattern with ``*``.

    >>> list_models("dat_pp_*")
    ['dat_pp_base', 'dat_pp_base_384', 'dat_pp_small', 'dat_pp_tiny']
    """
    return sorted(name for name in PRESETS if not filter or fnmatch.fnmatch(name, filter))


def load_weights(model: DAT, checkpoint: str | PathLike[str], prefix: str | None = None) -> None:
    """Load a checkpoint completely, except for a missing head or one of another size, with a warning.

    Raises:
        CheckpointError: if the file does not fit; with a report.
    """
    initialized = load_checkpoint(model, checkpoint, new_head=True, prefix=prefix).initialized
    if initialized:
        names = ", ".join(name for name, _, _ in initialized)
        in_file = any(shape for _, _, shape in initialized)
        reason = "for another number of classes and were not loaded" if in_file else "not in the file"
        warnings.warn(f"checkpoint: {names} are {reason}; the head keeps its random initialization", stacklevel=3)


def create_model(
    name: str,
    checkpoint: str | PathLike[str] | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    global_pool: str | None = None,
    attention: str | None = None,
    match: Match = "keys",
    output_stride: int | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    prefix: str | None = None,
    **overrides: Any,
) -> DAT:
    """Build a released backbone by name.

    Args:
        name: one of `list_models()`.
        checkpoint: a file of weights, see `dat_ref.torch.checkpoints.load_checkpoint`; random initialization if None. A
            head for another number of classes is left out, and a file without a head is accepted, with a warning: for
            fine-tuning.
        num_classes: of the head; 0 for none.
        in_chans: channels of the images.
        features_only: whether to return a `DATFeatures`, whose forward gives a list of maps.
        out_indices: stages of those maps, counted from 0, or from the end if negative; a number n for the last n; all
            four if None.
        drop_path_rate: stochastic depth at the last block, the preset's if None.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` to classify every position; the
            preset's if None.
        attention: another kind in the place of every deformable one, see `dat_ref.peers.matching`: ``"multi_head"``,
            ``"window"``, ``"pyramid"``, ``"deform_conv"``, …; or a control, the same layers without offsets:
            ``"no_offsets"``, ``"average_pool"``, ``"more_keys"``. None leaves them.
        match: what the other kind is brought as near to the deformable one as it can be in, ``"keys"`` or ``"macs"``,
            at the size that bias tables are built for.
        output_stride: stride of the last map, for timm's callers; it has one value, since stages cannot be dilated.
        device, dtype: of the parameters, torch's defaults if None.
        prefix: prefix of the backbone's names in `checkpoint`, such as ``student.backbone.``; found automatically if
            None.
        overrides: ``backend``, ``sampler``, ``init`` of `DAT`; ``drop_rate``, ``attn_drop_rate``, ``proj_drop_rate``;
            ``img_size`` (what bias tables are built for; any size can be fed); or a field of `DATConfig`. None changes
            nothing.

    Raises:
        ConfigError: for an unknown name, kind of attention or override, naming near matches; or for stages that do not
            exist.
        CheckpointError: if the file does not fit, but for its head.

    >>> model = create_model("dat_tiny", num_classes=10, drop_path_rate=0.1)
    >>> model.num_features, model.feature_info[0]["reduction"]
    (768, 4)
    """
    preset = preset_of(name)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    options = {key: overrides.pop(key) for key in _MODULE_OPTIONS if key in overrides}
    options.setdefault("init", OFFSET_INIT.get(name, "released"))
    changes = {"num_classes": num_classes, "in_channels": in_chans, "drop_path_rate": drop_path_rate}
    config = _override(preset, {key: value for key, value in changes.items() if value is not None} | overrides)
    if attention is not None:
        attention = resolve_kind(attention)
        known = [*REPLACEMENTS, *CONTROLS]
        if attention not in known:
            raise ConfigError(f"attention: unknown kind {attention!r}; {_suggest(attention, known)}")
        config = replace_attention(config, attention, match)
    if out_indices is not None and not features_only:
        raise ConfigError("out_indices: expected features_only=True with it")
    stride = config.reductions[-1]
    if output_stride not in (None, stride):
        raise ConfigError(f"output_stride: expected {stride}, got {output_stride}; the stages cannot be dilated")
    with nullcontext() if device is None else torch.device(device):
        model = (DATFeatures if features_only else DAT)(config, global_pool=global_pool, **options)
    model = model.to(dtype=dtype)
    if checkpoint is not None:
        load_weights(model, checkpoint, prefix)
    if isinstance(model, DATFeatures):
        model.keep_stages(range(len(config.dims)) if out_indices is None else out_indices)
    return model


def preset_of(name: str) -> DATConfig:
    """Return the preset of a model name.

    Raises:
        ConfigError: for an unknown name, with the most similar ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"name: unknown model {name!r}; {_suggest(name, list(PRESETS))}")
    return PRESETS[name]


def _override(config: DATConfig, changes: dict[str, Any]) -> DATConfig:
    """Return the configuration with changed fields. The keys are field names or timm's names for them."""
    attention = {ours: changes.pop(theirs) for theirs, ours in _ATTENTION_OPTIONS.items() if theirs in changes}
    changes = {_CONFIG_ALIASES.get(key, key): value for key, value in changes.items()}
    known = [field.name for field in fields(DATConfig)]
    for key in changes:
        if key not in known:
            names = [*known, *_CONFIG_ALIASES, *_ATTENTION_OPTIONS, *_MODULE_OPTIONS]
            raise ConfigError(f"create_model: unknown argument {key!r}; {_suggest(key, names)}")
    size = changes.pop("image_size", None)
    if size is not None:
        config = config.resized((size, size) if isinstance(size, int) else (int(size[0]), int(size[1])))
    if attention:
        config = config.map_attention(lambda layer, stage: replace(layer, **attention))
    return replace(config, **changes)


def _suggest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
