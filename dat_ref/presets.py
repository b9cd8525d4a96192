"""Backbones by name: the eight released ones, DAT (2022) ``dat_*`` and DAT++ (2023) ``dat_pp_*``, and two small ones.

The small ones are new work, in the default convention. ``dat_spot`` ships with its weights: one stage, one deformable
layer of stride 10, which reads 4 % of the map without offsets and misses most objects. ``dat_nano`` has three stages;
its deformable layers have stride 1, read the whole map, and do not need offsets (see `dat_ref.ops.coverage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ._checks import ConfigError
from .config import BiasKind, BlockConfig, DATConfig, DeformableAttentionConfig, Init, WindowAttentionConfig


def _preset_2022(
    dim: int, depth: int, heads: int, groups: int, drop_path: float, image_size: int = 224, window: int = 7
) -> DATConfig:
    released = {
        "img_size": image_size,
        "dims": [dim << i for i in range(4)],
        "depths": [2, 2, depth, 2],
        "stage_spec": [["L", "S"], ["L", "S"], ["L", "D"] * (depth // 2), ["L", "D"]],
        "heads": [heads << i for i in range(4)],
        "window_sizes": [window] * 4,
        "groups": [-1, -1, groups, 2 * groups],
        "strides": [-1, -1, 1, 1],
        "offset_range_factor": [-1, -1, 2, 2],
        "use_pes": [False, False, True, True],
        "dwc_pes": [False] * 4,
        "drop_path_rate": drop_path,
    }
    return DATConfig.from_official(released, release="cvpr2022")


def _preset_2023(dim: int, heads: int, groups: Sequence[int], drop_path: float) -> DATConfig:
    released = {
        "img_size": 224,
        "dims": [dim << i for i in range(4)],
        "depths": [2, 4, 18, 2],
        "stage_spec": [["N", "D"], ["N", "D"] * 2, ["N", "D"] * 9, ["D", "D"]],
        "heads": [heads << i for i in range(4)],
        "window_sizes": [7] * 4,
        "groups": list(groups),
        "strides": [8, 4, 2, 1],
        "offset_range_factor": [-1] * 4,
        "use_pes": [True] * 4,
        "dwc_pes": [False] * 4,
        "use_dwc_mlps": [True] * 4,
        "use_lpus": [True] * 4,
        "use_conv_patches": True,
        "ksizes": [9, 7, 5, 3],
        "nat_ksizes": [7] * 4,
        "drop_path_rate": drop_path,
    }
    return DATConfig.from_official(released, release="datpp2023")


def _nano() -> DATConfig:
    def windows(dim: int, heads: int, shift: int = 0) -> BlockConfig:
        return BlockConfig(WindowAttentionConfig(dim, heads, 4, shift=shift), local_perception=True)

    def deformable(dim: int, heads: int, groups: int, side: int) -> BlockConfig:
        attention = DeformableAttentionConfig(
            dim, heads, groups=groups, kernel_size=3, offset_range=4.0, size=(side, side)
        )
        return BlockConfig(attention, local_perception=True)

    return DATConfig(
        stages=(
            (windows(32, 2), windows(32, 2, shift=2)),
            (windows(64, 4), deformable(64, 4, 2, 8), windows(64, 4), deformable(64, 4, 2, 8)),
            (deformable(112, 8, 4, 4),),
        ),
        patch_embedding="conv",
        image_size=(64, 64),
    )


def _spot() -> DATConfig:
    """Recognize, then find: one block without mixing of positions, one deformable block.

    Before the deformable layer a position sees 15 × 15 pixels of the image (7 from the stem, 8 more from the local
    perception unit), and key cells are 40 × 40 pixels: a key knows what is at its point and little else. There is no
    position bias, since the answer does not depend on where the object is.
    """
    windows = WindowAttentionConfig(32, heads=4, window_size=1)  # windows of one pixel: a projection of each position
    deformable = DeformableAttentionConfig(32, heads=4, groups=2, stride=10, kernel_size=11, bias=BiasKind.NONE)
    return DATConfig(
        stages=((BlockConfig(windows, mlp_ratio=3, local_perception=True), BlockConfig(deformable, mlp_ratio=3)),),
        patch_embedding="conv",
        image_size=(160, 160),
        global_pool="",
    )


# dat_pp_base_384 is dat_pp_base at 384²: its tables are built for 224² and read in fractions of the map.
PRESETS: dict[str, DATConfig] = {
    "dat_tiny": _preset_2022(96, 6, 3, 3, 0.2),
    "dat_small": _preset_2022(96, 18, 3, 3, 0.3),
    "dat_base": _preset_2022(128, 18, 4, 4, 0.5),
    "dat_base_384": _preset_2022(128, 18, 4, 4, 0.5, image_size=384, window=12),
    "dat_pp_tiny": _preset_2023(64, 2, (1, 2, 4, 8), 0.2),
    "dat_pp_small": _preset_2023(96, 3, (1, 2, 3, 6), 0.4),
    "dat_pp_base": _preset_2023(128, 4, (2, 4, 8, 16), 0.7),
    "dat_pp_base_384": _preset_2023(128, 4, (2, 4, 8, 16), 0.6),
    "dat_nano": _nano(),
    "dat_spot": _spot(),
}
# Initialization of the offsets. Where s/2 · stride exceeds a pixel, a random one moves points by several pixels, which
# is further than a target can pull them back (`dat_ref.ops.coverage.capture_radius`): there they start at zero. The
# other presets start as released.
OFFSET_INIT: dict[str, Init] = {"dat_spot": "zero_offset"}


def config(name: str, *, num_classes: int = 1000, in_channels: int = 3) -> DATConfig:
    """Return a preset by name, for a number of classes and of image channels.

    Raises:
        ConfigError: for an unknown name, listing those that exist.

    >>> config("dat_tiny").dims
    (96, 192, 384, 768)
    """
    if name not in PRESETS:
        raise ConfigError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
    return replace(PRESETS[name], num_classes=num_classes, in_channels=in_channels)
