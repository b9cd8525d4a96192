"""Deformable layers for the tests: the kit's, and the oracle with the package's names."""

from typing import Any

import numpy as np
from oracle.deformable import Result
from oracle.deformable import deformable_attention as oracle_layer

from dat_ref import DeformableAttentionConfig
from dat_ref.testing.layers import (
    kink_distance,
    lattice_distance,
    mirror,
    random_params,
    transpose,
    transposed_config,
)

__all__ = [
    "kink_distance",
    "lattice_distance",
    "mirror",
    "random_params",
    "run_oracle",
    "transpose",
    "transposed_config",
]

Array = np.ndarray
Tree = Any


def run_oracle(x: Array, params: Tree, config: DeformableAttentionConfig) -> Result:
    """Run the scalar loops on a configuration of the package."""
    options = {
        "heads": config.heads,
        "groups": config.groups,
        "stride": config.stride,
        "kernel_size": config.kernel_size,
        "convention": config.convention.name.lower(),
        "offset_bound": config.offset_bound.value,
        "offset_range": config.offset_range,
        "bias": config.bias.value,
        "bias_resolution": config.bias_resolution,
        "average_pool": config.average_pool,
    }
    return oracle_layer(np.asarray(x, dtype=np.float64), options, params)
