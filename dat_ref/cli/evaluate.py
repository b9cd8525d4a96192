"""``dat-ref evaluate``: evaluate a trained checkpoint on held-out scenes or on a folder of images."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._checks import ConfigError
from ..state_files import read_metadata
from ..train_config import TrainConfig, config_path
from .output import HelpFormatter, read_text
from .train import format_scores, import_torch
from .weights import add_prefix_option


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate a trained checkpoint",
        description="Evaluate a trained checkpoint on the validation set of its run, or on another folder with "
        "val/CLASS/*.",
        epilog="example:\n  dat-ref evaluate runs/first/best.safetensors --data imagenette",
        formatter_class=HelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("weights", type=Path, metavar="WEIGHTS", help="checkpoint of a run: best.safetensors")
    model.add_argument(
        "--config",
        "--recipe",
        type=Path,
        metavar="FILE",
        help="training config of the run (default: train_config.json in the folder of WEIGHTS)",
    )
    add_prefix_option(model, "WEIGHTS")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="folder with val/CLASS/* (default: validation set of the run)")
    data.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per batch (default: 128)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    path = config_file(options.weights, options.config)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: expected 1 or more, got {options.batch_size}")
    config = read_config(path)
    import_torch()
    from ..torch.checkpoints import load_checkpoint
    from ..torch.train import evaluate

    model, held_out = build_run(config, options.weights, options.data)
    load_checkpoint(model, options.weights, prefix=options.prefix)
    print(format_scores(evaluate(model, held_out, batch_size=options.batch_size)))
    return 0


def config_file(weights: Path, config: Path | None) -> Path:
    """Return the training config of a checkpoint: the given file, or the one in its folder.

    Raises:
        ConfigError: if there is no checkpoint or no config.
    """
    if not weights.is_file():
        raise ConfigError(f"WEIGHTS: expected the checkpoint of a run, found no file {weights}")
    path = config or config_path(weights.parent)
    if not path.is_file():
        raise ConfigError(f"--config: expected the training config of the run, found no file {path}")
    return path


def build_run(config: TrainConfig, weights: Path, data: str | None) -> tuple[Any, Any]:
    """Return the model of a run, with its initial weights, and its held-out data set or the one in a folder."""
    from ..torch.train import ImageFolder, build_datasets, build_model

    if data:
        config = replace(config, data=data)  # a folder has one class per image
        held_out: Any = ImageFolder(Path(data) / "val", config.image_size, classes=classes_of(weights))
    else:
        _, held_out = build_datasets(config)
    return build_model(config, len(held_out.classes)), held_out


def read_config(path: Path) -> TrainConfig:
    """Read a training config.

    Raises:
        ConfigError: if the file is not a training config.
    """
    try:
        return TrainConfig.from_json(read_text(path, "--config"))
    except RecursionError as error:
        raise ConfigError(f"--config: expected JSON, {path} is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"--config: cannot use {path}: {error}") from error


def classes_of(weights: Path) -> list[str]:
    """Return the class names in the metadata of a trained checkpoint.

    Raises:
        CheckpointError: if the file cannot be read.
        ConfigError: if it has no class names.
    """
    classes = read_metadata(weights).get("classes")
    if classes is None:
        raise ConfigError(f"{weights}: does not name its classes, so they cannot be compared with those in --data")
    try:
        names = json.loads(classes)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{weights}: its list of classes is not JSON") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{weights}: expected a list of class names, got {classes[:80]}")
    return names
