"""Select the backbone and the weights that a command line names."""

from __future__ import annotations

import argparse
from typing import Any

from .. import DATConfig, init_params
from .. import config as preset
from .._checks import ConfigError, Tree
from ..checkpoints import read_checkpoint, with_channels_and_classes


def add_prefix_option(group: Any, metavar: str) -> None:
    """Add the option for the prefix of a backbone in a checkpoint."""
    group.add_argument(
        "--prefix",
        metavar="P",
        help=f"prefix of the backbone's names in {metavar}, such as student.backbone. (default: the only one)",
    )


def select_weights(options: argparse.Namespace) -> tuple[DATConfig, Tree, str]:
    """Return configuration, parameters, and a line that states the origin of the parameters.

    With a checkpoint, the configuration has the checkpoint's number of classes and of image channels.
    """
    config = preset(options.model)
    if options.checkpoint is None:
        if options.prefix is not None:
            raise ConfigError("--prefix: expected --checkpoint as well, got a prefix without a file")
        return config, init_params(config, options.seed), f"random weights (seed {options.seed}), untrained"
    checkpoint = read_checkpoint(options.checkpoint, options.prefix)
    config = with_channels_and_classes(config, checkpoint.state)
    params, report = checkpoint.params(config)
    prefix = f", prefix {report.prefix}" if report.prefix else ""
    return config, params, f"weights from {options.checkpoint} ({report.release}{prefix})"
