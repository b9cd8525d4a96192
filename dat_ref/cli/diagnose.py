"""``dat-ref diagnose``: report whether the offsets of a trained checkpoint work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .._checks import ConfigError
from ..data import network_path
from ..train_config import preset
from .evaluate import build_run, config_file, read_config
from .output import HelpFormatter
from .train import import_torch
from .weights import add_prefix_option


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "diagnose",
        help="report whether the offsets of a checkpoint work",
        description="Report the size of the offsets of each deformable layer, the shares at their bound and outside "
        "the map, their dependence on the image, and the accuracy with other offsets, with a verdict and a remedy.",
        epilog="example:\n  dat-ref diagnose runs/first/best.safetensors --data imagenette",
        formatter_class=HelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "weights",
        type=Path,
        nargs="?",
        metavar="WEIGHTS",
        help="checkpoint of a run: best.safetensors (default: dat_spot, the network that ships)",
    )
    model.add_argument(
        "--config", type=Path, metavar="FILE", help="training config of the run (default: as for dat-ref evaluate)"
    )
    add_prefix_option(model, "WEIGHTS")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="folder with val/CLASS/* (default: validation set of the run)")
    data.add_argument("--images", type=int, default=256, metavar="N", help="images to use at most (default: 256)")
    data.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    ships = options.weights is None
    weights = network_path() if ships else options.weights
    if ships and options.config:
        raise ConfigError("--config: expected WEIGHTS as well, got a config without a checkpoint")
    path = None if ships else config_file(weights, options.config)
    for name, minimum in (("images", 2), ("batch_size", 1)):
        value = getattr(options, name)
        if value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')}: expected {minimum} or more, got {value}")
    config = preset("dat_spot") if path is None else read_config(path)
    torch = import_torch()
    from ..torch.checkpoints import load_checkpoint
    from ..torch.offset_report import check_deformable, offset_report

    model, held_out = build_run(config, weights, options.data)
    check_deformable(model)
    load_checkpoint(model, weights, prefix=options.prefix)
    # In random order: neighbors in a folder have the same class, and so would "another image".
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: options.images].tolist()
    if len(order) < 2:
        raise ConfigError(f"--data: expected at least 2 images, to compare their offsets, got {len(order)}")
    images, targets = map(torch.stack, zip(*(held_out[index] for index in order)))
    report = offset_report(model, images, targets, batch_size=options.batch_size)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0
