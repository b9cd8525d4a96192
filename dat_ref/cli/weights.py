"""Select the backbone and the weights that a command line names."""

from __future__ import annotations

import argparse

from .. import DATConfig, init_params
from .. import config as preset
from .._checks import Tree
from ..checkpoints import load_params, read_state, with_channels_and_classes


def select_weights(options: argparse.Namespace) -> tuple[DATConfig, Tree, str]:
    """Return configuration, parameters, and a line that states the origin of the parameters.

    With a checkpoint, the configuration has the checkpoint's number of classes and of image channels.
    """
    config = preset(options.model)
    if options.checkpoint is None:
        return config, init_params(config, options.seed), f"random weights (seed {options.seed}), untrained"
    config = with_channels_and_classes(config, read_state(options.checkpoint))
    params, report = load_params(options.checkpoint, config)
    return config, params, f"weights from {options.checkpoint} ({report.release})"
