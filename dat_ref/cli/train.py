"""``dat-ref train``: train any model or peer, on scenes or on a folder of images, in one process or many."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .._checks import ConfigError
from ..recipe import PRESETS, Recipe, preset


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
    start.add_argument("--preset", choices=PRESETS, default="laptop", help="recipe to start from (laptop)")
    start.add_argument("--recipe", type=Path, metavar="FILE", help="recipe.json to start from")
    add_recipe_options(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="on a CPU (torch's own choice)")
    parser.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard as well")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of a recipe; without it the field keeps its value."""
    group = parser.add_argument_group("recipe", "what to change of it")
    for field in fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"], "dest": field.name}
        if isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, **how)
        else:
            group.add_argument(name, type=type(field.default), metavar=type(field.default).__name__.upper(), **how)


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe that the options ask for."""
    start = Recipe.from_json(options.recipe.read_text(encoding="utf-8")) if options.recipe else preset(options.preset)
    given = {each.name: getattr(options, each.name) for each in fields(Recipe) if hasattr(options, each.name)}
    return replace(start, **given)


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if the loss is no number any more."""
    recipe = chosen_recipe(options)
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads: expected 1 or more, got {options.threads}")
    torch = import_torch()
    from ..torch.train import fit, gathered

    if options.threads:
        torch.set_num_threads(options.threads)
    with gathered() as team:
        train, held_out = data_sets(recipe)
        try:
            result = fit(
                recipe, train, held_out, options.out, team=team, quiet=options.quiet, tensorboard=options.tensorboard
            )
        except FloatingPointError as error:
            print(f"dat-ref train: {error}", file=sys.stderr)
            return 1
        if team.leads:
            print(told(result.scores))
            print(f"best weights: {options.out / 'best.safetensors'} ({100 * result.best:.1f} %)")
    return 0


def import_torch() -> Any:
    """Return torch, or say how to get it."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError("torch is needed to train: pip install 'dat-ref[train]'") from error
    return torch


def data_sets(recipe: Recipe) -> tuple[Any, Any]:
    """Return what a recipe trains on, and what is held out."""
    from ..scenes import Scenes
    from ..torch.train import SceneImages, train_and_val

    if recipe.data != "scenes":
        return train_and_val(recipe.data, recipe.image_size, recipe.seed)
    train = Scenes(recipe.task, "train", recipe.image_size, recipe.seed, recipe.scenes_per_epoch)
    return SceneImages(train, fresh=True), SceneImages(Scenes(recipe.task, "held_out", recipe.image_size))


def told(scores: Any) -> str:
    """Return scores for people."""
    return f"held out, {scores.images} images: {100 * scores.accuracy:.1f} % right, loss {scores.loss:.4f}"
