"""Small backbones of both kinds, with every block type of the released ones."""

from typing import Any

import numpy as np

from dat_ref import DATConfig
from dat_ref.backbone import dat_shapes

from .layers import random_params

TINY_2022 = {
    "img_size": [64, 96],
    "dims": [4, 6, 8, 12],
    "depths": [2, 1, 2, 1],
    "stage_spec": [["L", "S"], ["S"], ["L", "D"], ["D"]],
    "heads": [2, 3, 4, 6],
    "window_sizes": [3, 3, 3, 3],
    "groups": [-1, -1, 2, 3],
    "strides": [-1, -1, 1, 1],
    "offset_range_factor": [-1, -1, 2, 2],
    "use_pes": [False, False, True, True],
    "dwc_pes": [False] * 4,
    "expansion": 2,
    "num_classes": 5,
}
TINY_2023 = {
    "img_size": [64, 96],
    "dims": [4, 6, 8, 12],
    "depths": [2, 2, 2, 1],
    "stage_spec": [["N", "D"], ["N", "D"], ["D", "N"], ["D"]],
    "heads": [2, 3, 4, 6],
    "window_sizes": [3, 3, 3, 3],
    "groups": [1, 3, 2, 3],
    "strides": [4, 2, 1, 1],
    "ksizes": [5, 3, 3, 3],
    "nat_ksizes": [3, 3, 3, 3],
    "offset_range_factor": [-1] * 4,
    "use_pes": [True] * 4,
    "dwc_pes": [False, True, False, False],
    "log_cpb": [False, False, True, False],
    "use_dwc_mlps": [True] * 4,
    "use_lpus": [True] * 4,
    "use_conv_patches": True,
    "layer_scale_values": [1e-1, -1.0, 1e-1, -1.0],
    "expansion": 2,
    "num_classes": 5,
}
RELEASES = {"cvpr2022": TINY_2022, "datpp2023": TINY_2023}


def tiny(release: str, **changes: Any) -> DATConfig:
    """Return the configuration of a small backbone of a release."""
    return DATConfig.from_official({**RELEASES[release], **changes}, release=release)


def tiny_params(config: DATConfig, seed: int, dtype: Any = np.float64) -> Any:
    """Return random parameters for a configuration."""
    return random_params(dat_shapes(config), np.random.default_rng(seed), dtype)
