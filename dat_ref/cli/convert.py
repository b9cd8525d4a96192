"""``dat-ref convert IN OUT``: a checkpoint from one format and naming to another, every bit of it kept."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .._checks import CheckpointError
from ..checkpoints import LoadReport, detect_preset, fit_state, official_state, with_channels_and_classes
from ..params import unflatten
from ..presets import PRESETS
from ..presets import config as preset
from ..state_files import read_arrays, save_state, select_backbone


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "convert",
        help="a checkpoint to another format and naming",
        description="Read a checkpoint of either release, or of ours, and write it under our names or the released "
        "ones. The suffix of OUT says the format. Nothing in the file is executed.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help=".pth, .safetensors or .npz")
    parser.add_argument("target", type=Path, metavar="OUT", help=".safetensors, .npz or .pth")
    parser.add_argument("--model", choices=tuple(PRESETS), metavar="NAME", help="preset (default: told by the shapes)")
    parser.add_argument("--to", choices=("dat_ref", "official"), default="dat_ref", help="names to write (dat_ref)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, and print what became of every array."""
    source, target = options.source, options.target
    if target.exists() and (not options.force or target.samefile(source)):
        advice = "choose another name" if target.samefile(source) else "choose another name, or --force to replace it"
        raise CheckpointError(f"{target}: is there already; {advice}")
    name, report = convert(source, target, options.model, options.to)
    print(f"{source}: {name}, {report}")
    print(f"{target}: written with {'the released' if options.to == 'official' else 'our'} names")
    return 0


def convert(source: Path, target: Path, model: str | None, naming: str) -> tuple[str, LoadReport]:
    """Convert a file; return the model's name and the report.

    Raises:
        CheckpointError: if a file cannot be read or written, or is not of the model; nothing is written then.
    """
    state, ignored = select_backbone(read_arrays(source), str(source))
    detected = detect_preset(state) if model is None else (model, with_channels_and_classes(preset(model), state))
    if detected is None:
        raise CheckpointError(f"{source}: its shapes are of none of {', '.join(PRESETS)}; name one with --model")
    name, config = detected
    fit = fit_state(state, config, source=str(source))
    params = unflatten(fit.arrays)
    save_state(target, official_state(params, config) if naming == "official" else fit.arrays)
    return name, replace(fit.report, ignored=fit.report.ignored + ignored)
