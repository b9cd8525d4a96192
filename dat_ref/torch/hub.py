"""Backbones in the Hugging Face Hub's format: a folder or repository with ``config.json`` and ``model.safetensors``.

    >>> import tempfile
    >>> from dat_ref.torch import create_model
    >>> model = HubDAT.from_model(create_model("dat_spot", num_classes=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     same = HubDAT.from_pretrained(folder)
    >>> same.config == model.config
    True

``push_to_hub("user/name")`` uploads such a folder, and ``from_pretrained("user/name")`` downloads it. Weights are read
from safetensors only, and the configuration is checked like one that is written in Python.

Needs huggingface_hub, the extra ``hub``. `dat_ref.torch.transformers` has the counterpart for transformers' detectors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._checks import CheckpointError, ConfigError
from ..config import DATConfig
from ..config_json import from_mapping, to_mapping
from .backbone import DAT
from .checkpoints import load_checkpoint, save_checkpoint

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
except ImportError as error:
    raise ImportError(
        f"huggingface_hub is needed and cannot be imported ({error}): pip install 'dat-ref[hub]'"
    ) from error

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "HubDAT"]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class HubDAT(  # type: ignore[call-arg]
    DAT,
    PyTorchModelHubMixin,
    library_name="dat-ref",
    tags=["deformable-attention", "image-classification"],
):
    """A backbone with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    ``from_pretrained(name, num_classes=…, img_size=…)`` is for fine-tuning: a head for another number of classes is
    newly initialized, and bias tables are resized. Further options are those of `DAT`.
    """

    @classmethod
    def from_model(cls, model: DAT) -> HubDAT:
        """Return a copy of a backbone, for example one that `dat_ref.torch.create_model` built.

        Raises:
            ConfigError: if the backbone is not complete, for example a features-only model.
        """
        if type(model).forward is not DAT.forward:
            raise ConfigError(f"model: expected a complete dat_ref.torch.DAT, got {type(model).__name__}")
        weight = next(model.parameters())
        copy = cls(_current_config(model)).to(weight.device, weight.dtype)
        copy.load_state_dict(model.state_dict())
        return copy.train(model.training)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write configuration and weights."""
        text = json.dumps({"config": to_mapping(_current_config(self))}, indent=1)
        save_checkpoint(self, save_directory / WEIGHTS_FILE)
        (save_directory / CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Any = None,
        num_classes: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        map_location: Any = "cpu",
        strict: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> HubDAT:
        """Build the model and load its weights.

        Raises:
            ConfigError: if the configuration is missing or invalid.
            CheckpointError: if the weights are missing, damaged or do not fit.
        """
        if config is None:
            raise ConfigError(f"{model_id}: expected {CONFIG_FILE} with the configuration of a backbone, found none")
        config = config if isinstance(config, DATConfig) else from_mapping(config, f"{model_id}/{CONFIG_FILE}: config")
        target = config if num_classes is None else replace(config, num_classes=num_classes)
        if img_size is not None:
            target = target.resized((img_size, img_size) if isinstance(img_size, int) else img_size)
        model = cls(target, **options)
        downloads = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
        downloads |= {"local_files_only": local_files_only, "token": token}
        load_checkpoint(model, _weights(model_id, downloads), strict=strict, new_head=num_classes is not None)
        return model.to(map_location).eval()


def _current_config(model: DAT) -> DATConfig:
    """Return the configuration with the classes and the pooling that `reset_classifier` may have changed."""
    pooling: Any = model.global_pool
    return replace(model.config, num_classes=model.num_classes, global_pool=pooling)


def _weights(model_id: str, downloads: dict[str, Any]) -> str | Path:
    """Return the file of weights in a folder, or downloaded from a repository."""
    try:
        local = Path(model_id) / WEIGHTS_FILE
        path = local if Path(model_id).is_dir() else hf_hub_download(model_id, WEIGHTS_FILE, **downloads)
    except EntryNotFoundError as error:
        raise CheckpointError(f"{model_id}: expected the weights in {WEIGHTS_FILE}, found none") from error
    if not Path(path).is_file():
        raise CheckpointError(f"{model_id}: expected the weights in {WEIGHTS_FILE}, found none")
    return path
