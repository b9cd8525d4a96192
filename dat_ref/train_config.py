"""Training configuration: all fields that determine the result of a run. `dat_ref.torch.train` runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from ._checks import ConfigError
from .config import Init

CONFIG_FILE = "train_config.json"  # in the folder of a run
AMP_DTYPES = ("none", "bfloat16", "float16")
# Fields that may change when a run is resumed: they affect speed and memory, not the result.
NON_SEMANTIC_FIELDS = ("workers", "compile", "grad_checkpointing", "shard", "save_every")


def option(default: Any, help_text: str, group: str = "") -> Any:
    """Return a field whose help text and, for the first of a group, group title `dat-ref train --help` shows."""
    return field(default=default, metadata={"help": help_text, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Batches are global: with several processes each takes its share, and the result equals that of one process.

    >>> config = TrainConfig(model="dat_tiny", epochs=2)
    >>> TrainConfig.from_json(config.to_json()) == config
    True
    """

    model: str = option("dat_nano", "model name, see dat_ref.torch.list_models()", group="Model")
    attention: str = option(
        "", "attention in place of deformable attention (default: none), see dat_ref.peers.matching"
    )
    init: str = option("", "offset initialization: released or zero_offset (default: the model's)")
    init_from: str = option(
        "", "checkpoint of initial weights; a head for other classes is newly initialized", group="Fine-tuning"
    )
    init_prefix: str = option("", "prefix of the backbone's names in init_from (default: the only one)")
    layer_decay: float = option(1.0, "factor on the learning rate per layer, from the head to the image; 1: off")
    frozen_stages: int = option(0, "stages frozen from the first on, with the patch embedding; 0: none")
    data: str = option("scenes", "'scenes', or a folder with train/CLASS/* and val/CLASS/*", group="Data")
    task: str = option("which", "task on scenes: which, which_all, where, count, find or find_all")
    objects: str = option("shapes", "objects on scenes: pictures, discs or shapes")
    copies: int = option(1, "largest number of objects on a training scene of task find, all of one kind")
    image_size: int = option(64, "side of the images, pixels")
    epochs: int = option(40, "number of epochs", group="Optimization")
    scenes_per_epoch: int = option(16384, "scenes per epoch; every epoch has new ones")
    batch_size: int = option(64, "global batch size (summed over processes)")
    learning_rate: float = option(1e-3, "peak learning rate")
    min_learning_rate: float = option(1e-5, "final learning rate of the cosine schedule")
    warmup_epochs: float = option(1.0, "epochs of linear warmup")
    weight_decay: float = option(0.05, "weight decay; none on biases, norms and bias tables")
    clip: float = option(5.0, "maximum gradient norm; 0: no clipping")
    label_smoothing: float = option(0.0, "label smoothing", group="Regularization and augmentation")
    mixup: float = option(0.0, "mixup α; 0: off. With CutMix, each batch draws one of the two")
    cutmix: float = option(0.0, "CutMix α; 0: off")
    drop_path: float = option(0.0, "stochastic depth rate of the last block")
    ema: float = option(0.0, "decay of the exponential moving average of the weights, which is evaluated; 0: off")
    amp: str = option("none", "autocast dtype: none, bfloat16 or float16", group="Precision, speed and memory")
    compile: bool = option(False, "use torch.compile")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    shard: bool = option(False, "shard the weights over the processes (FSDP2)")
    seed: int = option(0, "random seed", group="Reproducibility and checkpoints")
    workers: int = option(0, "data loading processes")
    save_every: int = option(0, "steps between checkpoints, besides one per epoch; 0: off")

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_type(each.name, getattr(self, each.name), type(each.default))
        for name, minimum in (
            ("image_size", 32),
            ("copies", 1),
            ("epochs", 1),
            ("scenes_per_epoch", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name}: expected {minimum} or more, got {getattr(self, name)}")
        not_negative = ("seed", "workers", "save_every", "weight_decay", "clip", "warmup_epochs", "mixup", "cutmix")
        for name in (*not_negative, "frozen_stages"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("label_smoothing", "drop_path", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 0 ≤ {name} < 1, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay: expected 0 < layer_decay ≤ 1, got {self.layer_decay}")
        if self.init_prefix and not self.init_from:
            raise ConfigError(f"init_prefix: expected init_from as well, got {self.init_prefix!r} alone")
        if self.init and self.init_from:
            raise ConfigError(f"init: expected '' with init_from, which contains the offsets, got {self.init!r}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"learning_rate: expected 0 ≤ min_learning_rate ≤ learning_rate, got {self.min_learning_rate} and "
                f"{self.learning_rate}"
            )
        for name, known in (("amp", AMP_DTYPES), ("init", ("", *get_args(Init)))):
            if getattr(self, name) not in known:
                expected = ", ".join(map(repr, known))
                raise ConfigError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if self.shard and self.amp == "float16":
            raise ConfigError("amp: expected none or bfloat16 with shard, got 'float16'")

    def to_json(self) -> str:
        """Return the config as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: if it is no JSON object, or a field is unknown or of another type.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"train config: expected JSON, got {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"train config: expected a JSON object of fields, got a {type(values).__name__}")
        return cls.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from fields by name; the others keep their defaults."""
        unknown = sorted(set(values) - {each.name for each in fields(cls)})
        if unknown:
            raise ConfigError(f"train config: unknown fields {', '.join(unknown)}")
        return cls(**values)

    def changes(self, other: TrainConfig) -> list[str]:
        """Return "name: ours, theirs" for each field that differs and affects the result."""
        pairs = ((each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self))
        return [
            f"{name}: {ours!r}, {theirs!r}"
            for name, ours, theirs in pairs
            if ours != theirs and name not in NON_SEMANTIC_FIELDS
        ]


def config_path(folder: Path) -> Path:
    """Return the config file of a run: ``train_config.json``, or the ``recipe.json`` of a run of an earlier version."""
    path, old = folder / CONFIG_FILE, folder / "recipe.json"
    return old if old.is_file() and not path.is_file() else path


def _check_type(name: str, value: Any, kind: type[Any]) -> None:
    accepted: tuple[type[Any], ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")
    if kind is float and not _is_finite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is larger than every float
        return False


# The network that ships: objects on photographs, an hour or less on two cores.
SPOT = TrainConfig(
    model="dat_spot",
    task="find",
    objects="pictures",
    copies=4,
    image_size=160,
    epochs=3,
    scenes_per_epoch=15000,
    batch_size=32,
    learning_rate=3e-3,
    warmup_epochs=0.2,
    weight_decay=0.01,
)
# Flat shapes on photographs: a network of three stages that does not need its offsets.
LAPTOP = TrainConfig()
# 300 epochs of ImageNet with AdamW, cosine, 20 of them warmup; learning rate for a batch of 1024.
RELEASED = TrainConfig(
    model="dat_tiny",
    data="imagenet",
    image_size=224,
    epochs=300,
    batch_size=1024,
    learning_rate=1e-3,
    min_learning_rate=1e-5,
    warmup_epochs=20,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    drop_path=0.2,
    amp="bfloat16",
    workers=8,
)
PRESETS = {"dat_spot": SPOT, "laptop": LAPTOP, "released": RELEASED}


def preset(name: str, **changes: Any) -> TrainConfig:
    """Return a preset with some fields changed.

    >>> preset("released", batch_size=256).epochs
    300
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return replace(PRESETS[name], **changes)
