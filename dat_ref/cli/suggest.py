"""``dat-ref suggest``: hyperparameters of a layer for a map and a number of keys, with reasons."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .._checks import ConfigError
from ..suggest import suggest_attention
from .output import HelpFormatter

MAX_DIM, MAX_SIDE = 65536, 4096


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "suggest",
        help="suggest the hyperparameters of a layer for a map and a number of keys",
        description="Suggest stride, kernel size, offset range, groups, initialization and position bias of a "
        "deformable-attention layer, each with a computed reason.",
        epilog="example:\n  dat-ref suggest --dim 64 --size 56 56 --keys 200",
        formatter_class=HelpFormatter,
    )
    layer = parser.add_argument_group("layer")
    layer.add_argument("--dim", type=int, required=True, metavar="C", help="number of channels")
    layer.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"), help="size of the map, pixels")
    layer.add_argument("--keys", type=int, required=True, metavar="N", help="largest number of keys")
    layer.add_argument("--heads", type=int, metavar="N", help="number of heads (default: about 32 channels each)")
    layer.add_argument(
        "--target", type=int, metavar="N", help="side of the smallest object, pixels of the map (default: unknown)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    for name, values, limit in (("dim", [options.dim], MAX_DIM), ("size", options.size, MAX_SIDE)):
        if max(values) > limit:
            raise ConfigError(f"--{name}: expected at most {limit}, got {max(values)}")
    found = suggest_attention(
        options.dim, tuple(options.size), options.keys, heads=options.heads, target=options.target
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0
