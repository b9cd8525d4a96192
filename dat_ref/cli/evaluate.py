"""``dat-ref evaluate``: how good trained weights are, on held-out scenes or on a folder of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .._checks import ConfigError
from ..train_config import TrainConfig, config_path
from .train import format_scores, import_torch


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="how good trained weights are",
        description="Evaluate weights on what their run held out, or on another folder with val/CLASS/*.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="best.safetensors of a run")
    parser.add_argument(
        "--config", "--recipe", type=Path, metavar="FILE", help="of the run (train_config.json beside the weights)"
    )
    parser.add_argument("--data", metavar="DIR", help="another folder of images")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    path = options.config or config_path(options.weights.parent)
    if not path.is_file():
        raise ConfigError(f"--config: expected the config of the run, and there is none at {path}")
    config = TrainConfig.from_json(path.read_text(encoding="utf-8"))
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: expected 1 or more, got {options.batch_size}")
    import_torch()
    from ..torch.checkpoints import load_checkpoint
    from ..torch.train import ImageFolder, build_datasets, build_model, evaluate

    if options.data:
        held_out = ImageFolder(Path(options.data) / "val", config.image_size, classes=classes_of(options.weights))
    else:
        _, held_out = build_datasets(config)
    model = build_model(config, len(held_out.classes))
    load_checkpoint(model, options.weights)  # type: ignore[arg-type]
    print(format_scores(evaluate(model, held_out, batch_size=options.batch_size)))
    return 0


def classes_of(weights: Path) -> list[str]:
    """Return the names of the classes that weights were trained on, which their run wrote beside them.

    Raises:
        ConfigError: if the file does not tell.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "np") as file:
            classes = (file.metadata() or {}).get("classes")
    except SafetensorError as error:
        raise ConfigError(f"{weights}: cannot be read: {error}") from error
    if classes is None:
        raise ConfigError(f"{weights}: does not name its classes, so they cannot be compared with those of --data")
    return list(json.loads(classes))
