"""Parameter initialization: the rules of `dat_ref.initialization`, with random numbers from torch's generator.

Linear layers and convolutions have PyTorch's default initialization, uniform in ±1/√fan_in, as in the released models.
This module initializes the bias tables and the last layer of the offset network.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..config import Init


def init_table(table: Tensor, sigma: float) -> None:
    """Initialize a bias table from a normal distribution with standard deviation `sigma`, truncated at ±2."""
    nn.init.trunc_normal_(table, std=sigma, a=-2.0, b=2.0)


def init_offsets(pointwise: nn.Linear, init: Init) -> None:
    """Leave an offset network's last layer at its default, as released, or set it to zero."""
    if init == "zero_offset":
        nn.init.zeros_(pointwise.weight)
    elif init != "released":
        raise ValueError(f"init: expected 'released' or 'zero_offset', got {init!r}")
