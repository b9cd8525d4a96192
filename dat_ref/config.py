"""Layer and backbone configurations as frozen dataclasses, and conversion from the released argument names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Literal, get_args

import numpy as np

from ._checks import (
    RATE,
    ConfigError,
    boolean,
    check_divides,
    check_fields,
    choice,
    integer,
    member,
    optional,
    real,
    size_pair,
)
from ._deprecation import warn_caller
from .conventions import Convention


class _TanhPixels:
    """Descriptor for ``OffsetBound.TANH_PIXELS``, the deprecated name of ``TANH_CELLS``."""

    def __get__(self, instance: OffsetBound | None, owner: type[OffsetBound]) -> OffsetBound:
        warnings.warn("OffsetBound.TANH_PIXELS is deprecated, use TANH_CELLS", DeprecationWarning, stacklevel=2)
        return owner.TANH_CELLS


class OffsetBound(Enum):
    """Map from a reference point p and the raw offset Δ to the sampling point, in normalized coordinates.

    - ``TANH_CELLS``: p + (s/2) · pitch · tanh(Δ). The point moves at most s/2 key cells in each direction (the
      paper's s·tanh).
    - ``TANH_COORDINATES``: tanh(p + Δ). The point stays inside the map (2022 code with a negative range).
    - ``CLAMP``: clamp(p + Δ, -1, 1). The point stays inside the map; the gradient is zero where the clamp acts
      (2023 code with a negative range).
    - ``RAW``: p + Δ, without a bound.
    - ``NONE``: no offset network. The sampling points are the reference points.
    """

    TANH_CELLS = "tanh_cells"
    TANH_COORDINATES = "tanh_coordinates"
    CLAMP = "clamp"
    RAW = "raw"
    NONE = "none"
    TANH_PIXELS = _TanhPixels()  # a descriptor, so `Enum` does not make it a member

    @classmethod
    def _missing_(cls, value: object) -> OffsetBound | None:
        if value == "tanh_pixels":
            warn_caller("the value 'tanh_pixels' is deprecated, use 'tanh_cells'")
            return cls.TANH_CELLS
        return None


class BiasKind(Enum):
    """Kind of position bias.

    - ``TABLE``: one (2H-1) × (2W-1) table per head, sampled bilinearly at the continuous displacement (the paper's
      choice).
    - ``FIXED``: one learned value for each pair of query and key cell, independent of the offsets.
    - ``LOG_CPB``: a small network of the log-scaled displacement (after Swin V2), in the 2023 code.
    - ``DEPTHWISE``: a 3×3 depthwise convolution of the queries, added to the output instead of the logits.
    - ``NONE``: no bias.
    """

    TABLE = "table"
    FIXED = "fixed"
    LOG_CPB = "log_cpb"
    DEPTHWISE = "depthwise"
    NONE = "none"


BiasResolution = Literal["fractions", "pixels"]
MLPKind = Literal["linear", "depthwise", "depthwise_residual"]
SmallMap = Literal["shrink", "pad"]
GlobalPool = Literal["avg", ""]
PatchEmbedding = Literal["patch", "conv"]
Init = Literal["released", "zero_offset"]  # of the offset network's last layer

CHECK_CONVENTION = member(Convention, names=True)
CHECK_RESOLUTION = choice(get_args(BiasResolution))
CHECK_INIT = choice(get_args(Init))

# Hidden width of the log-CPB network, fixed in the released code.
LOG_CPB_HIDDEN = 32


class _Derived:
    """Default of a field that follows from other fields. It is replaced, so that no configuration contains it."""

    def __repr__(self) -> str:
        return "<follows from other fields>"


_DERIVED: Any = _Derived()


def default_kernel_size(stride: int) -> int:
    """Return the default kernel of the offset network: 5, or the smallest odd number above a larger stride.

    A kernel larger than the stride sees every pixel of a key cell, and an odd one has a center pixel.

    >>> [default_kernel_size(stride) for stride in (1, 2, 4, 5, 8, 10)]
    [5, 5, 5, 7, 9, 11]
    """
    return max(5, stride + 1 + stride % 2)


@dataclass(frozen=True)
class DeformableAttentionConfig:
    """Configuration of a deformable-attention layer.

    Strings are converted: values of enumerations (``bias="log_cpb"``), and names of conventions in upper or lower case
    (``convention="paper"``). A list for `size` becomes a tuple.

    Args:
        dim: number of channels C of the map, a multiple of `heads`.
        heads: number of attention heads M, a multiple of `groups`.
        groups: number of offset groups G. Each group has its own sampling points and samples its own C/G channels.
        stride: r, map pixels per key cell on each axis.
        kernel_size: kernel size k of the offset network's depthwise convolution. By default it follows the stride,
            see `default_kernel_size`.
        offset_bound: bound on the offsets, see `OffsetBound`.
        offset_range: s of ``TANH_CELLS``, at least 0. A point moves at most s/2 key cells in each direction.
        bias: kind of position bias, see `BiasKind`. By default ``TABLE`` if `size` is given. Without a size the default
            is ``DEPTHWISE``, which needs none, costs little and is fast at every size.
        size: (H, W) of the map for which the bias is built; needed by ``TABLE`` and ``FIXED``.
        convention: coordinate convention.
        bias_resolution: unit of displacement on a map of another size: ``"fractions"`` of the map, or ``"pixels"``.
        average_pool: compute keys and values from average-pooled instead of sampled features (2023 code without
            offsets).
        attention_dropout, projection_dropout: dropout rates in training, used only by `dat_ref.torch`.

    Raises:
        ConfigError: if a value is invalid, the sizes are not divisible, or the options are incompatible. The message
            names the field, the rule and the value.

    >>> config = DeformableAttentionConfig(dim=64, heads=4, stride=8)
    >>> config.kernel_size, config.bias
    (9, <BiasKind.DEPTHWISE: 'depthwise'>)
    """

    dim: int
    heads: int
    groups: int = 1
    stride: int = 1
    kernel_size: int = _DERIVED
    offset_bound: OffsetBound = OffsetBound.TANH_CELLS
    offset_range: float = 2.0
    bias: BiasKind = _DERIVED
    size: tuple[int, int] | None = None
    convention: Convention = Convention.CELL_CENTER
    bias_resolution: BiasResolution = "fractions"
    average_pool: bool = False
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0

    kind = "deformable"

    def __post_init__(self) -> None:
        check_fields(self, stride=integer(1), size=optional(size_pair))
        if self.kernel_size is _DERIVED:
            object.__setattr__(self, "kernel_size", default_kernel_size(self.stride))
        if self.bias is _DERIVED:
            object.__setattr__(self, "bias", BiasKind.DEPTHWISE if self.size is None else BiasKind.TABLE)
        check_fields(
            self,
            dim=integer(1),
            heads=integer(),
            groups=integer(),
            kernel_size=integer(1),
            offset_bound=member(OffsetBound),
            offset_range=real(0, rule="a width in key cells"),
            bias=member(BiasKind),
            convention=CHECK_CONVENTION,
            bias_resolution=CHECK_RESOLUTION,
            average_pool=boolean,
            attention_dropout=RATE,
            projection_dropout=RATE,
        )
        check_divides("heads", self.heads, "dim", self.dim)
        check_divides("groups", self.groups, "heads", self.heads)
        if self.bias in (BiasKind.TABLE, BiasKind.FIXED) and self.size is None:
            raise ConfigError(f"size: expected (H, W) of the map for bias={self.bias.value!r}, got None")
        if self.average_pool and self.offset_bound is not OffsetBound.NONE:
            raise ConfigError("average_pool: expected offset_bound=OffsetBound.NONE (average pooling has no offsets)")

    @property
    def head_dim(self) -> int:
        """Channels d of one head."""
        return self.dim // self.heads

    @property
    def group_dim(self) -> int:
        """Channels of one offset group."""
        return self.dim // self.groups

    @property
    def scale(self) -> float:
        """Factor on the dot products, d^(-1/2)."""
        return self.head_dim**-0.5

    @property
    def max_offset_px(self) -> float | None:
        """Largest distance in pixels and on each axis from a key's reference point to its sampling point.

        0 without offsets, s/2 key cells with ``TANH_CELLS``, None without a limit in pixels (the other bounds). If the
        stride does not divide the map, cells are slightly smaller or larger than `stride` pixels.
        """
        if self.offset_bound is OffsetBound.NONE:
            return 0.0
        return self.offset_range / 2 * self.stride if self.offset_bound is OffsetBound.TANH_CELLS else None

    @classmethod
    def from_keywords(
        cls, config: DeformableAttentionConfig | None, options: Mapping[str, Any]
    ) -> DeformableAttentionConfig:
        """Return `config`, or the configuration with the fields `options` if `config` is None.

        Raises:
            ConfigError: if both or neither are given, `config` has another type, or an option is not a field.
        """
        known = [each.name for each in fields(cls)]
        if config is not None:
            if not isinstance(config, DeformableAttentionConfig):
                raise ConfigError(
                    f"config: expected a DeformableAttentionConfig, or its fields by name, got {config!r}"
                )
            if options:
                names = ", ".join(options)
                raise ConfigError(f"config: expected either a configuration or its fields, got both (fields: {names})")
            return config
        for name in options:
            if name not in known:
                raise ConfigError(f"{name}: expected a field of DeformableAttentionConfig, one of {', '.join(known)}")
        for name in ("dim", "heads"):
            if name not in options:
                raise ConfigError(f"{name}: expected an integer, got no value (dim and heads have no default)")
        return cls(**options)

    @classmethod
    def from_official(cls, mapping: Mapping[str, Any], *, release: str) -> DeformableAttentionConfig:
        """Build from the argument names of the released ``DAttentionBaseline``.

        Args:
            mapping: ``q_size, n_heads, n_head_channels, n_groups, stride, offset_range_factor, use_pe, dwc_pe, no_off,
                fixed_pe`` and ``stage_idx`` (2022) or ``ksize, log_cpb`` (2023). Other names are ignored, as in the
                release.
            release: ``"cvpr2022"`` or ``"datpp2023"``.

        Raises:
            ConfigError: if a name is missing.
            ValueError: if the release is unknown.
        """
        convention = Convention.of_release(release)
        latest = convention is Convention.DATPP2023
        needed = ["q_size", "n_heads", "n_head_channels", "n_groups", "stride", "offset_range_factor"]
        needed += ["use_pe", "dwc_pe", "no_off", "fixed_pe", "ksize" if latest else "stage_idx"]
        _require("DAttentionBaseline", mapping, needed)
        no_offset = bool(mapping["no_off"])
        heads, head_dim = (integer(1)(name, mapping[name]) for name in ("n_heads", "n_head_channels"))
        factor = real()("offset_range_factor", mapping["offset_range_factor"])
        return cls(
            dim=heads * head_dim,
            heads=heads,
            groups=mapping["n_groups"],
            stride=mapping["stride"],
            kernel_size=mapping["ksize"] if latest else (9, 7, 5, 3)[mapping["stage_idx"]],
            offset_bound=_released_bound(factor, no_offset, latest),
            offset_range=max(factor, 0.0),
            bias=_released_bias(mapping, no_offset, latest),
            size=_pair("q_size", mapping["q_size"]),
            convention=convention,
            average_pool=no_offset and latest,
            attention_dropout=mapping.get("attn_drop", 0.0),
            projection_dropout=mapping.get("proj_drop", 0.0),
        )


def _released_bound(factor: float, no_offset: bool, latest: bool) -> OffsetBound:
    if no_offset:
        return OffsetBound.NONE
    if latest:
        return OffsetBound.TANH_CELLS if factor >= 0 else OffsetBound.CLAMP
    if factor == 0:
        return OffsetBound.RAW
    return OffsetBound.TANH_CELLS if factor > 0 else OffsetBound.TANH_COORDINATES


def _released_bias(mapping: Mapping[str, Any], no_offset: bool, latest: bool) -> BiasKind:
    # The 2023 code drops the bias together with the offsets, so its "no offsets" is not a clean ablation.
    if not mapping["use_pe"] or (no_offset and latest):
        return BiasKind.NONE
    if mapping["dwc_pe"]:
        return BiasKind.DEPTHWISE
    if mapping["fixed_pe"]:
        return BiasKind.FIXED
    return BiasKind.LOG_CPB if mapping.get("log_cpb") else BiasKind.TABLE


@dataclass(frozen=True)
class WindowAttentionConfig:
    """Configuration of attention inside windows of `window_size`², cyclically shifted by `shift` pixels (Swin).

    A map of any size is padded to whole windows. The padding is masked out.
    """

    dim: int
    heads: int
    window_size: int
    shift: int = 0
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            dim=integer(1),
            heads=integer(),
            window_size=integer(1),
            shift=integer(),
            attention_dropout=RATE,
            projection_dropout=RATE,
        )
        check_divides("heads", self.heads, "dim", self.dim)
        if not 0 <= self.shift < self.window_size:
            raise ConfigError(f"shift: expected 0 <= shift < window_size={self.window_size}, got {self.shift}")

    @property
    def kind(self) -> str:
        """``"window"`` or ``"shifted_window"``."""
        return "shifted_window" if self.shift else "window"

    @property
    def scale(self) -> float:
        """Factor on the dot products, d^(-1/2)."""
        return (self.dim // self.heads) ** -0.5


@dataclass(frozen=True)
class NeighborhoodAttentionConfig:
    """Configuration of neighborhood attention: each pixel attends to the `kernel_size`² pixels around it.

    At the border the neighborhood shifts inwards, so that it stays inside the map.

    Args:
        small_map: rule for an axis shorter than the kernel: ``"shrink"`` the neighborhood to the map, or ``"pad"``
            the map with zeros, which are then also keys (released DAT++, through NATTEN 0.14).
        dilation: distance in pixels between neighbors. It splits the map into `dilation`² interleaved maps.
    """

    dim: int
    heads: int
    kernel_size: int = 7
    small_map: SmallMap = "shrink"
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    dilation: int = 1

    kind = "neighborhood"

    def __post_init__(self) -> None:
        check_fields(
            self,
            dim=integer(1),
            heads=integer(),
            kernel_size=integer(1, "it has a center pixel", odd=True),
            small_map=choice(get_args(SmallMap)),
            attention_dropout=RATE,
            projection_dropout=RATE,
            dilation=integer(1),
        )
        check_divides("heads", self.heads, "dim", self.dim)

    @property
    def scale(self) -> float:
        """Factor on the dot products, d^(-1/2)."""
        return (self.dim // self.heads) ** -0.5


@dataclass(frozen=True)
class PeerConfig:
    """Base class for the configurations of other attention mechanisms; the subclasses are in `dat_ref.peers`."""

    dim: int

    kind = "peer"

    def __post_init__(self) -> None:
        check_fields(self, dim=integer(1))


AttentionConfig = DeformableAttentionConfig | WindowAttentionConfig | NeighborhoodAttentionConfig | PeerConfig


def _attention_config(name: str, value: Any) -> AttentionConfig:
    """Rule for the configuration of an attention layer."""
    if isinstance(value, (DeformableAttentionConfig, WindowAttentionConfig, NeighborhoodAttentionConfig, PeerConfig)):
        return value
    raise ConfigError(f"{name}: expected the configuration of an attention layer, got {value!r}")


@dataclass(frozen=True)
class BlockConfig:
    """Configuration of a Transformer block.

    A block has residual branches: [local perception unit], norm → attention, norm → MLP.

    Args:
        attention: configuration of the attention layer.
        mlp: ``"linear"``; ``"depthwise"`` (3×3 depthwise convolution between its two layers, 2022 code);
            ``"depthwise_residual"`` (the same convolution as a residual branch, 2023 code).
        mlp_ratio: ratio of the MLP's hidden channels to the block's channels.
        local_perception: add a local perception unit, a residual 3×3 depthwise convolution, as the first branch.
        layer_scale: initial value of the learned per-channel scale of both branches, or None for no layer scale.
    """

    attention: AttentionConfig
    mlp: MLPKind = "linear"
    mlp_ratio: int = 4
    local_perception: bool = False
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            attention=_attention_config,
            mlp=choice(get_args(MLPKind)),
            mlp_ratio=integer(1),
            local_perception=boolean,
            layer_scale=optional(real()),
        )

    @property
    def dim(self) -> int:
        """Channels of the block's feature map."""
        return self.attention.dim


def _stages(name: str, value: Any) -> tuple[tuple[BlockConfig, ...], ...]:
    """Rule for the stages of a backbone. Lists become tuples."""
    expected = f"{name}: expected at least one stage, each with at least one block"
    if not isinstance(value, Sequence) or not all(isinstance(blocks, Sequence) for blocks in value):
        raise ConfigError(f"{expected}, as sequences of BlockConfig, got {value!r}")
    if not value or not all(value):
        raise ConfigError(f"{expected}, got {value!r}")
    for number, blocks in enumerate(value, start=1):
        for block in blocks:
            if not isinstance(block, BlockConfig):
                raise ConfigError(f"{name}: expected BlockConfig in stage {number}, got {block!r}")
        dims = [block.dim for block in blocks]
        if len(set(dims)) != 1:
            raise ConfigError(f"{name}: expected one dim in stage {number}, got {dims}")
    return tuple(tuple(blocks) for blocks in value)


@dataclass(frozen=True)
class DATConfig:
    """Configuration of a hierarchical backbone with stages at strides 4, 8, 16 and 32.

    Args:
        stages: blocks of each stage. All blocks of a stage have the same dim.
        patch_embedding: ``"patch"`` (4×4 patches, then 2×2 between stages: 2022) or ``"conv"`` (overlapping 3×3: 2023).
        image_size: (H, W) in pixels for which the position biases are built. The input may have another size.
        in_channels, num_classes: number of image channels; number of classes, 0 for no head.
        drop_path_rate, dropout: rates in training, used only by `dat_ref.torch`.
        global_pool: ``"avg"`` averages the last map before the head; ``""`` classifies every position of it.
    """

    stages: tuple[tuple[BlockConfig, ...], ...]
    patch_embedding: PatchEmbedding = "patch"
    image_size: tuple[int, int] = (224, 224)
    in_channels: int = 3
    num_classes: int = 1000
    drop_path_rate: float = 0.0
    dropout: float = 0.0
    global_pool: GlobalPool = "avg"

    def __post_init__(self) -> None:
        check_fields(
            self,
            stages=_stages,
            patch_embedding=choice(get_args(PatchEmbedding)),
            image_size=size_pair,
            in_channels=integer(1),
            num_classes=integer(0),
            drop_path_rate=RATE,
            dropout=RATE,
            global_pool=choice(get_args(GlobalPool)),
        )

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(blocks[0].dim for blocks in self.stages)

    @property
    def reductions(self) -> tuple[int, ...]:
        """Stride of each stage, in image pixels per map pixel: 4, 8, 16, 32."""
        return tuple(4 * 2**i for i in range(len(self.stages)))

    def resized(self, image_size: tuple[int, int]) -> DATConfig:
        """Return the same backbone with position biases for another image size (H, W).

        Raises:
            ConfigError: if the size is not a pair, or a stage with a position bias would have an empty map.
        """
        image_size = size_pair("image_size", image_size)

        def resize(attention: Any, stage: int) -> AttentionConfig:
            if getattr(attention, "size", None) is None:
                return attention
            reduction = self.reductions[stage]
            if min(image_size) < reduction:
                raise ConfigError(f"image_size: expected at least {reduction} (the stage's stride), got {image_size}")
            return replace(attention, size=tuple(side // reduction for side in image_size))

        return replace(self.map_attention(resize), image_size=image_size)

    def map_attention(self, change: Callable[[AttentionConfig, int], AttentionConfig]) -> DATConfig:
        """Return the same backbone with other attention layers.

        Args:
            change: function (attention, stage) → attention that replaces it; `stage` counts from 0.

        Raises:
            ConfigError: if a stage has several dims then.

        >>> from dataclasses import replace
        >>> from dat_ref import config
        >>> wide = config("dat_tiny").map_attention(
        ...     lambda layer, stage: replace(layer, stride=2) if layer.kind == "deformable" else layer
        ... )
        >>> [layer.stride for stage in wide.stages for layer in (stage[1].attention,) if layer.kind == "deformable"]
        [2, 2]
        """
        stages = tuple(
            tuple(replace(block, attention=change(block.attention, stage)) for block in blocks)
            for stage, blocks in enumerate(self.stages)
        )
        return replace(self, stages=stages)

    @classmethod
    def from_official(cls, mapping: Mapping[str, Any], *, release: str) -> DATConfig:
        """Build from the argument names of the released ``DAT`` class (the ``MODEL.DAT`` section of its yaml files).

        Raises:
            ConfigError: if a name is missing, a list does not have one entry per stage, or a block letter is not L, S,
                N or D.
            ValueError: if the release is unknown.
        """
        latest = Convention.of_release(release) is Convention.DATPP2023
        needed = ["img_size", "dims", "depths", "stage_spec", "heads", "window_sizes", "groups", "strides"]
        needed += ["offset_range_factor", "use_pes", "dwc_pes"] + (["nat_ksizes"] if latest else [])
        _require("DAT", mapping, needed)
        _check_stage_lists(mapping)
        if [len(letters) for letters in mapping["stage_spec"]] != list(mapping["depths"]):
            raise ConfigError(f"stage_spec: expected depths={mapping['depths']} letters, got {mapping['stage_spec']}")
        if mapping.get("patch_size", 4) != 4 or mapping.get("dim_stem", mapping["dims"][0]) != mapping["dims"][0]:
            raise ConfigError("patch_size, dim_stem: expected 4 and dims[0], as in every released configuration")
        size = _pair("img_size", mapping["img_size"])
        return cls(
            stages=tuple(
                _released_stage(mapping, index, (size[0] // (4 << index), size[1] // (4 << index)), release)
                for index in range(len(mapping["dims"]))
            ),
            patch_embedding="conv" if mapping.get("use_conv_patches") else "patch",
            image_size=size,
            num_classes=mapping.get("num_classes", 1000),
            drop_path_rate=mapping.get("drop_path_rate", 0.0),
            dropout=mapping.get("drop_rate", 0.0),
        )


def _released_stage(
    mapping: Mapping[str, Any], index: int, size: tuple[int, int], release: str
) -> tuple[BlockConfig, ...]:
    """Return the blocks of stage `index`; `size` is the (H, W) of its map at the configured image size."""
    latest = release == "datpp2023"

    def stage_option(name: str, default: Any) -> Any:
        return mapping[name][index] if name in mapping else default

    dim, heads = mapping["dims"][index], mapping["heads"][index]
    rates = (mapping.get("attn_drop_rate", 0.0), mapping.get("drop_rate", 0.0))
    dropouts = dict(zip(("attention_dropout", "projection_dropout"), rates))
    window = mapping["window_sizes"][index]

    def attention(letter: str) -> AttentionConfig:
        if letter == "L":
            return WindowAttentionConfig(dim, heads, window, **dropouts)
        if letter == "S":
            return WindowAttentionConfig(dim, heads, window, shift=math.ceil(window / 2), **dropouts)
        if letter == "N":
            return NeighborhoodAttentionConfig(dim, heads, mapping["nat_ksizes"][index], small_map="pad", **dropouts)
        if letter == "D":
            layer = {
                "q_size": size,
                "n_heads": heads,
                "n_head_channels": dim // heads,
                "n_groups": mapping["groups"][index],
                "attn_drop": dropouts["attention_dropout"],
                "proj_drop": dropouts["projection_dropout"],
                "stride": mapping["strides"][index],
                "offset_range_factor": mapping["offset_range_factor"][index],
                "use_pe": mapping["use_pes"][index],
                "dwc_pe": mapping["dwc_pes"][index],
                "no_off": stage_option("no_offs", False),
                "fixed_pe": stage_option("fixed_pes", False),
                "stage_idx": index,
                "ksize": stage_option("ksizes", (9, 7, 5, 3)[index % 4]),
                "log_cpb": stage_option("log_cpb", False),
            }
            return DeformableAttentionConfig.from_official(layer, release=release)
        raise ConfigError(f"stage_spec: expected the letters L, S, N or D, got {letter!r} in stage {index + 1}")

    mlp: MLPKind = "linear"
    if stage_option("use_dwc_mlps", False):
        mlp = "depthwise_residual" if latest else "depthwise"
    layer_scale = stage_option("layer_scale_values", -1.0)
    return tuple(
        BlockConfig(
            attention=attention(letter),
            mlp=mlp,
            mlp_ratio=mapping.get("expansion", 4),
            local_perception=bool(stage_option("use_lpus", False)),
            layer_scale=layer_scale if layer_scale > 0 else None,
        )
        for letter in mapping["stage_spec"][index]
    )


# Arguments of the released `DAT` that have one entry per stage.
_STAGE_LISTS = (
    "dims", "depths", "stage_spec", "heads", "window_sizes", "groups", "strides", "offset_range_factor", "use_pes",
    "dwc_pes", "nat_ksizes", "no_offs", "fixed_pes", "ksizes", "use_dwc_mlps", "use_lpus", "layer_scale_values",
    "log_cpb",
)  # fmt: skip


def _check_stage_lists(mapping: Mapping[str, Any]) -> None:
    for name in filter(mapping.__contains__, _STAGE_LISTS):
        value = mapping[name]
        if not isinstance(value, (Sequence, np.ndarray)):
            raise ConfigError(f"{name}: expected a list with one entry per stage, got {value!r}")
        if len(value) != len(mapping["dims"]):
            raise ConfigError(f"{name}: expected {len(mapping['dims'])} entries, as many as dims, got {value!r}")


def _require(class_name: str, mapping: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ConfigError(f"mapping: expected the released arguments of {class_name}, missing {', '.join(missing)}")


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Return a released size, one integer or two, as (H, W)."""
    return size_pair(name, [value, value] if not isinstance(value, (Sequence, np.ndarray)) else value)
