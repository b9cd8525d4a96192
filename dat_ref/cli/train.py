"""``dat-ref train``: train any model or peer, on scenes or on a folder of images, in one process or many."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .._checks import ConfigError
from ..train_config import PRESETS, TrainConfig, preset


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "train",
        help="train a model, or go on with a run that was stopped",
        description="Train a model. A run that was stopped goes on from its last checkpoint when the same command is "
        "given again, with the very steps that it would have taken. On several GPUs or machines: "
        "torchrun --nproc_per_node=N -m dat_ref.torch.train with the same options.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, default="laptop", help="config to start from (laptop)")
    start.add_argument("--config", "--recipe", type=Path, metavar="FILE", help="train_config.json to start from")
    add_config_options(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="on a CPU (torch's own choice)")
    parser.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard as well")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of a config; without it the field keeps its value."""
    group = parser.add_argument_group("config", "what to change of it")
    for field in fields(TrainConfig):
        name = "--" + field.name.replace("_", "-")
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"], "dest": field.name}
        if isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, **how)
        else:
            group.add_argument(name, type=type(field.default), metavar=type(field.default).__name__.upper(), **how)


def selected_config(options: argparse.Namespace) -> TrainConfig:
    """Return the config that the options ask for."""
    start = (
        TrainConfig.from_json(options.config.read_text(encoding="utf-8")) if options.config else preset(options.preset)
    )
    given = {each.name: getattr(options, each.name) for each in fields(TrainConfig) if hasattr(options, each.name)}
    return replace(start, **given)


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if the loss is no number any more."""
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
                quiet=options.quiet,
                tensorboard=options.tensorboard,
            )
        except FloatingPointError as error:
            print(f"dat-ref train: {error}", file=sys.stderr)
            return 1
        if context.is_main:
            print(format_scores(result.scores))
            print(f"best weights: {options.out / 'best.safetensors'} ({100 * result.best:.1f} %)")
    return 0


def import_torch() -> Any:
    """Return torch, or say how to get it."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError("torch is needed to train: pip install 'dat-ref[train]'") from error
    return torch


def format_scores(scores: Any) -> str:
    """Return scores for people."""
    return f"held out, {scores.images} images: {100 * scores.accuracy:.1f} % right, loss {scores.loss:.4f}"
