"""``dat-ref train``: train any model or peer, on scenes or on a folder of images, in one process or many."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .._checks import ConfigError
from ..train_config import PRESETS, TrainConfig, preset

METAVARS = {int: "N", float: "X", str: "NAME"}


DESCRIPTION = """\
Train a model on scenes or on a folder of images. The same command resumes an interrupted run
from its last checkpoint, with identical steps. On several GPUs or machines:
torchrun --nproc_per_node=N -m dat_ref.torch.train with the same options.

The defaults below are those of the laptop preset; another --preset or --config replaces them."""
EXAMPLE = """example:
  dat-ref train --out run --preset dat_spot              the network that ships, from nothing
  dat-ref train --out run --data pictures --model dat_tiny --image-size 224 --epochs 100 --workers 4
  dat-ref train --out tuned --data pictures --model dat_tiny --init-from dat_tiny_in1k_224.pth
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "train",
        help="train a model, or resume a run",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_group = parser.add_argument_group("Run")
    run_group.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder of the run")
    start = run_group.add_mutually_exclusive_group()
    start.add_argument(
        "--preset", choices=PRESETS, default="laptop", help="training config to start from (default: laptop)"
    )
    start.add_argument(
        "--config", "--recipe", type=Path, metavar="FILE", help="train_config.json to start from (default: the preset)"
    )
    run_group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    run_group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    run_group.add_argument("--quiet", action="store_true", help="disable the progress bar")
    add_config_options(parser)
    parser.set_defaults(run=run)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of a training config. An omitted option keeps the value of the preset."""
    group: Any = parser
    for field in fields(TrainConfig):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        name, default = "--" + field.name.replace("_", "-"), getattr(PRESETS["laptop"], field.name)
        text = field.metadata["help"].replace("%", "%%") + (f" (default: {default})" if default != "" else "")
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": field.name}
        if isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, **how)
        else:
            group.add_argument(name, type=type(field.default), metavar=METAVARS[type(field.default)], **how)


def selected_config(options: argparse.Namespace) -> TrainConfig:
    """Return the training config of the options."""
    start = (
        TrainConfig.from_json(options.config.read_text(encoding="utf-8")) if options.config else preset(options.preset)
    )
    given = {each.name: getattr(options, each.name) for each in fields(TrainConfig) if hasattr(options, each.name)}
    return replace(start, **given)


def run(options: argparse.Namespace) -> int:
    """Run the command; return 1 if the loss is not finite or the last steps are not saved."""
    config = selected_config(options)
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads: expected 1 or more, got {options.threads}")
    torch = import_torch()
    from ..torch.train import build_datasets, fit, init_distributed

    if options.threads:
        torch.set_num_threads(options.threads)
    with init_distributed() as context:
        train, held_out = build_datasets(config)
        try:
            result = fit(
                config,
                train,
                held_out,
                options.out,
                context=context,
                on_init=lambda report: print(f"initial weights: {config.init_from}\n{report}"),
                quiet=options.quiet,
                tensorboard=options.tensorboard,
            )
        except FloatingPointError as error:
            print(f"dat-ref train: {error}", file=sys.stderr)
            return 1
        if context.is_main:
            print(format_scores(result.scores))
            best = options.out / "best.safetensors"
            if result.best >= 0 and best.is_file():
                print(f"best weights: {best} ({100 * result.best:.1f} %)")
            else:
                print("best weights: none could be saved")
            if result.saved_steps < result.steps:
                print(
                    f"dat-ref train: {options.out} is saved up to step {result.saved_steps} of {result.steps} only; "
                    "free disk space and give the same command again",
                    file=sys.stderr,
                )
                return 1
    return 0


def import_torch() -> Any:
    """Return torch, or raise an error that names the extra to install."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError("torch is needed to train: pip install 'dat-ref[train]'") from error
    return torch


def format_scores(scores: Any) -> str:
    """Return scores as a line of text."""
    return f"held out, {scores.images} images: {100 * scores.accuracy:.1f} % right, loss {scores.loss:.4f}"
