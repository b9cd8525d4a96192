"""``dat-ref convert IN OUT``: lossless conversion of a checkpoint between formats and naming schemes."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._checks import CheckpointError
from ..checkpoints import (
    Checkpoint,
    LoadReport,
    detect_preset,
    official_state,
    read_checkpoint,
    with_channels_and_classes,
)
from ..config import DATConfig
from ..params import unflatten
from ..presets import PRESETS
from ..presets import config as preset
from ..state_files import check_writable_suffix, save_state
from .output import HelpFormatter
from .weights import add_prefix_option


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint to another format and naming scheme",
        description="Read a checkpoint of either release, or of dat_ref, and write it under the names of dat_ref or of "
        "the releases. Every value is kept bit by bit. Code in the file is never executed.",
        epilog="example:\n  dat-ref convert dat_tiny_in1k_224.pth dat_tiny.safetensors",
        formatter_class=HelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument("source", type=Path, metavar="IN", help="checkpoint to read: .pth, .safetensors or .npz")
    files.add_argument(
        "target",
        type=Path,
        metavar="OUT",
        help="checkpoint to write; the suffix (.safetensors, .npz or .pth) selects the format",
    )
    files.add_argument("--force", action="store_true", help="overwrite OUT (default: refuse)")
    naming = parser.add_argument_group("model and names")
    naming.add_argument(
        "--model",
        choices=tuple(PRESETS),
        metavar="NAME",
        help="preset, such as dat_tiny (default: detected from shapes)",
    )
    add_prefix_option(naming, "IN")
    naming.add_argument(
        "--to", choices=("dat_ref", "official"), default="dat_ref", help="naming scheme of OUT (default: dat_ref)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert the file and print the report."""
    source, target = options.source, options.target
    if target.exists() and (not options.force or target.samefile(source)):
        remedy = "choose another name" if target.samefile(source) else "choose another name, or --force to replace it"
        raise CheckpointError(f"{target}: exists already; {remedy}")
    name, report = convert(source, target, options.model, options.to, options.prefix)
    print(f"{source}: {name}, {report}")
    print(f"{target}: written with {'the released' if options.to == 'official' else 'our'} names")
    return 0


def convert(
    source: Path, target: Path, model: str | None, naming: str, prefix: str | None = None
) -> tuple[str, LoadReport]:
    """Convert a file. Return the model's name and the report.

    Raises:
        CheckpointError: if the source cannot be read or belongs to another model, or the target has another suffix.
            Nothing is written.
        OSError: if the target cannot be written. An existing target is unchanged.
    """
    check_writable_suffix(target)
    found = read_checkpoint(source, prefix)
    if model is not None:
        config = with_channels_and_classes(preset(model), found.state)
    else:
        model, config = _detect_model(found)
    fit = found.fit(config)
    params = unflatten(fit.arrays)
    save_state(target, official_state(params, config) if naming == "official" else fit.arrays)
    return model, fit.report


def _detect_model(checkpoint: Checkpoint) -> tuple[str, DATConfig]:
    try:
        detected = detect_preset(checkpoint.state)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {str(error).removeprefix('state: ')}") from error
    if detected is None:
        raise CheckpointError(
            f"{checkpoint.source}: its shapes fit none of {', '.join(PRESETS)}; name the preset with --model"
        )
    return detected
