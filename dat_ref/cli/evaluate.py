"""``dat-ref evaluate``: how good trained weights are, on held-out scenes or on a folder of images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._checks import ConfigError
from ..recipe import Recipe
from .train import data_sets, import_torch, told


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="how good trained weights are",
        description="Evaluate weights on what their run held out, or on another folder with val/CLASS/*.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="best.safetensors of a run")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="of the run (recipe.json beside the weights)")
    parser.add_argument("--data", metavar="DIR", help="another folder of images")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    path = options.recipe or options.weights.parent / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"--recipe: expected the recipe of the run, and there is none at {path}")
    recipe = Recipe.from_json(path.read_text(encoding="utf-8"))
    if options.data:
        recipe = replace(recipe, data=options.data)
    import_torch()
    from ..torch.checkpoints import load_checkpoint
    from ..torch.train import build_model, evaluate

    _, held_out = data_sets(recipe)
    model = build_model(recipe, len(held_out.classes))
    load_checkpoint(model, options.weights)  # type: ignore[arg-type]
    print(told(evaluate(model, held_out, batch_size=options.batch_size)))
    return 0
