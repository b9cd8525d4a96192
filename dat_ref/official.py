"""Released parameter names and shapes, converted to ours and back.

A mapping gives, for each of our flattened names, the released name and the layout of the array there:

- ``same``: as ours;
- ``conv1x1``: a linear layer that the release implements as a 1×1 convolution, (O, C, 1, 1);
- ``flat_table``: the bias table of a window, ((2w-1)², heads) instead of (heads, 2w-1, 2w-1).

Released state dicts also contain buffers that follow from the configuration (``relative_position_index``,
``attn_mask``), and a released module without offsets has an offset network that it never uses. Both are ignored when
loading. `match_state` compares a state dict with a configuration. All loaders use it, and all report with a
`LoadReport`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ._checks import Array, CheckpointError, ConfigError, Tree
from .config import (
    AttentionConfig,
    BiasKind,
    BlockConfig,
    DATConfig,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
)
from .params import flatten, unflatten


class ReleasedName(NamedTuple):
    """Name and layout of one of our arrays in a released state dict."""

    name: str
    layout: str = "same"


NameMapping = dict[str, ReleasedName]
Shape = tuple[int, ...]

# Buffers in released state dicts. They follow from the configuration and are not parameters.
RELEASED_BUFFERS = ("relative_position_index", "attn_mask")
_UNUSED_WITHOUT_OFFSETS = "conv_offset."


# ------------------------------------------------------------------------------------------------ names


def _affine(ours: str, theirs: str, layout: str = "same") -> NameMapping:
    return {f"{ours}.weight": ReleasedName(f"{theirs}.weight", layout), f"{ours}.bias": ReleasedName(f"{theirs}.bias")}


def _norm(ours: str, theirs: str) -> NameMapping:
    return _affine(ours, f"{theirs}.norm")  # the release wraps each layer norm


def attention_names(config: AttentionConfig) -> NameMapping:
    """Return the mapping of one attention layer.

    Raises:
        ConfigError: for an attention that no released backbone uses. Some have a mapping of their own in
            `dat_ref.peers`.
    """
    if isinstance(config, DeformableAttentionConfig):
        return _deformable_names(config)
    if isinstance(config, NeighborhoodAttentionConfig):
        table = {"neighborhood_bias.table": ReleasedName("rpb")}
        return {**_affine("qkv", "qkv"), **table, **_affine("output", "proj")}
    if isinstance(config, WindowAttentionConfig):
        table = {"window_bias.table": ReleasedName("relative_position_bias_table", "flat_table")}
        return {**_affine("qkv", "proj_qkv"), **table, **_affine("output", "proj_out")}
    raise ConfigError(f"config: expected an attention of the released backbones, got {config.kind}")


def _deformable_names(config: DeformableAttentionConfig) -> NameMapping:
    names: NameMapping = {}
    for ours, theirs in (("query", "proj_q"), ("key", "proj_k"), ("value", "proj_v"), ("output", "proj_out")):
        names |= _affine(ours, theirs, "conv1x1")
    if config.offset_bound is not OffsetBound.NONE:
        names |= _affine("offset_network.depthwise", "conv_offset.0")
        names |= _norm("offset_network.norm", "conv_offset.1")
        names["offset_network.pointwise.weight"] = ReleasedName("conv_offset.3.weight", "conv1x1")
    if config.bias in (BiasKind.TABLE, BiasKind.FIXED):
        names["position_bias.table"] = ReleasedName("rpe_table")
    elif config.bias is BiasKind.DEPTHWISE:
        names |= _affine("position_bias.depthwise", "rpe_table")
    elif config.bias is BiasKind.LOG_CPB:
        names |= _affine("position_bias.hidden", "rpe_table.0")
        names["position_bias.out.weight"] = ReleasedName("rpe_table.2.weight")
    return names


def _block_names(config: BlockConfig, stage: int, index: int) -> NameMapping:
    ours, theirs = f"stages.{stage}.blocks.{index}", f"stages.{stage}"
    names: NameMapping = {}
    if config.local_perception:
        names |= _affine(f"{ours}.local_perception", f"{theirs}.local_perception_units.{index}")
    names |= _norm(f"{ours}.norm1", f"{theirs}.layer_norms.{2 * index}")
    names |= _norm(f"{ours}.norm2", f"{theirs}.layer_norms.{2 * index + 1}")
    for name, released in attention_names(config.attention).items():
        names[f"{ours}.attention.{name}"] = ReleasedName(f"{theirs}.attns.{index}.{released.name}", released.layout)
    if config.layer_scale is not None:
        names[f"{ours}.layer_scale1.weight"] = ReleasedName(f"{theirs}.layer_scales.{2 * index}.weight")
        names[f"{ours}.layer_scale2.weight"] = ReleasedName(f"{theirs}.layer_scales.{2 * index + 1}.weight")
    mlp = f"{theirs}.mlps.{index}"
    if config.mlp == "linear":
        return (
            names
            | _affine(f"{ours}.mlp.linear1", f"{mlp}.chunk.linear1")
            | _affine(f"{ours}.mlp.linear2", f"{mlp}.chunk.linear2")
        )
    nested = ".0" if config.mlp == "depthwise_residual" else ""  # the 2023 code wraps each linear layer
    names |= _affine(f"{ours}.mlp.linear1", f"{mlp}.linear1{nested}", "conv1x1")
    names |= _affine(f"{ours}.mlp.linear2", f"{mlp}.linear2{nested}", "conv1x1")
    return names | _affine(f"{ours}.mlp.depthwise", f"{mlp}.dwc")


def backbone_names(config: DATConfig) -> NameMapping:
    """Return the mapping of a whole backbone."""
    names: NameMapping = {}
    # The convolutional stem is a list of convolution, norm, GELU, convolution, norm. The GELU has index 2.
    for index, theirs in enumerate((0,) if config.patch_embedding == "patch" else (0, 3)):
        names |= _affine(f"patch_embedding.{index}.projection", f"patch_proj.{theirs}")
        names |= _norm(f"patch_embedding.{index}.norm", f"patch_proj.{theirs + 1}")
    for stage, blocks in enumerate(config.stages):
        for index, block in enumerate(blocks):
            names |= _block_names(block, stage, index)
    for index in range(len(config.stages) - 1):
        names[f"downsamples.{index}.projection.weight"] = ReleasedName(f"down_projs.{index}.0.weight")
        names |= _norm(f"downsamples.{index}.norm", f"down_projs.{index}.1")
    names |= _norm("norm", "cls_norm")
    return names | _affine("head", "cls_head") if config.num_classes else names


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class LoadReport:
    """Result of loading, array by array.

    The names are those of the file. Missing arrays have the name that the file should contain.

    Attributes:
        release: ``"cvpr2022"``, ``"datpp2023"``, ``"released"`` (either), or ``"dat_ref"`` for a file with our names.
        loaded: names of the loaded arrays.
        missing: names that the configuration requires and the file lacks.
        unexpected: names in the file that the configuration does not have.
        misshaped: (name, expected shape, shape in the file) of arrays that were not loaded.
        resized: (name, shape in the file, new shape) of tables that were loaded at another size.
        converted: (name, shape in the file, new shape) of a first convolution that was converted from RGB to another
            number of image channels.
        ignored: names that are skipped by rule: buffers, other parts of a detector, a head if none is wanted.
        hints: possible causes of a mismatch, with remedies.
        initialized: (name, shape, shape in the file or None) of a new head: the file has no head, or one for another
            number of classes. These parameters keep their initialization.
        prefix: prefix of the names in the file, which the other fields omit.
    """

    release: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[tuple[str, Shape, Shape], ...] = ()
    resized: tuple[tuple[str, Shape, Shape], ...] = ()
    ignored: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    converted: tuple[tuple[str, Shape, Shape], ...] = ()
    initialized: tuple[tuple[str, Shape, Shape | None], ...] = ()
    prefix: str = ""

    @property
    def complete(self) -> bool:
        """True if the file and the configuration have the same parameters, up to resized tables, a converted first
        convolution and a new head.
        """
        return not (self.missing or self.unexpected or self.misshaped)

    def check(self, source: str) -> None:
        """Raise `CheckpointError` with the report unless it is complete."""
        if not self.complete:
            raise CheckpointError(f"{source}: expected the parameters of this configuration\n{self}")

    def __str__(self) -> str:
        misshaped = [f"{name}: expected {want}, got {got}" for name, want, got in self.misshaped]
        resized, converted = (
            [f"{name}: {old} → {new}" for name, old, new in changed] for changed in (self.resized, self.converted)
        )
        initialized = [
            f"{name}: {shape}, " + ("not in the file" if old is None else f"{old} in the file")
            for name, shape, old in self.initialized
        ]
        under_prefix = f" under the prefix {self.prefix!r}" if self.prefix else ""
        lines = [f"{self.release} names{under_prefix}: {len(self.loaded)} arrays loaded"]
        lines += _section("missing", self.missing) + _section("unexpected", self.unexpected)
        lines += _section("mis-shaped", misshaped) + _section("resized", resized)
        lines += _section("converted from RGB to the channels of the images", converted)
        lines += _section("newly initialized", initialized)
        lines += _section("ignored", self.ignored, most=3)
        return "\n".join(lines + [f"  hint: {hint}" for hint in self.hints])


def _section(title: str, items: list[str] | tuple[str, ...], most: int = 8) -> list[str]:
    if not items:
        return []
    rest = [f"    … and {len(items) - most} more"] if len(items) > most else []
    return [f"  {title} ({len(items)}):", *(f"    {item}" for item in items[:most]), *rest]


@dataclass(frozen=True)
class Fit:
    """Arrays of a state dict that fit a configuration, by our flattened names, and the report."""

    arrays: dict[str, Array]
    report: LoadReport


# ------------------------------------------------------------------------------------------------ arrays


def match_state(
    state: Mapping[str, Any],
    names: NameMapping,
    shapes: Mapping[str, Shape],
    *,
    release: str = "released",
    wanted: Collection[str] | None = None,
    ignored: Collection[str] = RELEASED_BUFFERS,
    resizable: Collection[str] = (),
    resize: Callable[[Array, tuple[int, int]], Array] | None = None,
) -> Fit:
    """Compare a state dict with the parameters of a configuration, and convert the arrays that fit to our layout.

    Args:
        state: arrays (NumPy, or anything that ``np.asarray`` accepts) by the names in `names`.
        names: name in the state dict and layout of each parameter, by our flattened name.
        shapes: shape of each parameter, by our flattened name.
        release: naming scheme, for the report.
        wanted: our names of the parameters to load; all if None.
        ignored: parts of names; other arrays whose name contains one of them are ignored.
        resizable: our names of the tables (heads, h, w) that may have another size.
        resize: function that resizes such a table to (h, w).
    """
    wanted_names = {ours: names[ours] for ours in shapes if ours in names and (wanted is None or ours in wanted)}
    arrays: dict[str, Array] = {}
    loaded, missing, not_floating = [], [], []
    misshaped: list[tuple[str, Shape, Shape]] = []
    resized: list[tuple[str, Shape, Shape]] = []
    for ours, (theirs, layout) in wanted_names.items():
        if theirs not in state:
            missing.append(theirs)
            continue
        shape, array = shapes[ours], _to_our_layout(np.asarray(state[theirs]), layout)
        if not np.issubdtype(array.dtype, np.floating):
            not_floating.append(f"{theirs} ({array.dtype})")
            misshaped.append((theirs, shape, array.shape))
            continue
        if resize and ours in resizable and array.shape != shape and _is_table(array, heads=shape[0]):
            resized.append((theirs, array.shape, shape))
            array = resize(array, (shape[1], shape[2]))
        if array.shape != shape:
            misshaped.append((theirs, shape, array.shape))
            continue
        arrays[ours] = array
        loaded.append(theirs)
    wanted_keys, known_keys = ({key for key, _ in found.values()} for found in (wanted_names, names))
    ignored_keys: list[str] = []
    unexpected: list[str] = []
    for key in state:
        if key not in wanted_keys:
            is_ignored = key in known_keys or any(part in key for part in ignored)
            (ignored_keys if is_ignored else unexpected).append(key)
    hints = (f"expected floating-point numbers in {', '.join(not_floating[:3])}",) if not_floating else ()
    report = LoadReport(
        release=release,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        misshaped=tuple(misshaped),
        resized=tuple(resized),
        ignored=tuple(ignored_keys),
        hints=hints,
    )
    return Fit(arrays, report)


def _is_table(array: Array, heads: int) -> bool:
    return array.ndim == 3 and array.shape[0] == heads and array.size > 0


def _to_our_layout(array: Array, layout: str) -> Array:
    """Return a released array in our layout, at any size. An array that does not have the layout stays unchanged."""
    if layout == "conv1x1" and array.ndim == 4 and array.shape[2:] == (1, 1):
        return array[:, :, 0, 0]
    if layout == "flat_table" and array.ndim == 2:
        side = math.isqrt(len(array))
        if side * side == len(array):
            return array.T.reshape(array.shape[1], side, side)
    return array


def to_ours(state: Mapping[str, Any], names: NameMapping, shapes: Tree) -> Tree:
    """Return our parameter tree from a released state dict.

    Args:
        state: arrays (NumPy, or anything that ``np.asarray`` accepts) by released name.
        names: mapping from `attention_names` or `backbone_names`.
        shapes: tree of our shapes.

    Raises:
        CheckpointError: with a `LoadReport` if keys are missing, unexpected or mis-shaped.
    """
    ignored = list(RELEASED_BUFFERS)
    if not any(".pointwise." in name or name.startswith("offset_network") for name in names):
        ignored.append(_UNUSED_WITHOUT_OFFSETS)
    fit = match_state(state, names, flatten(shapes), ignored=ignored)
    replace(fit.report, ignored=()).check("state")
    return unflatten({name: fit.arrays[name] for name in names})


def _released_shape(shape: Shape, layout: str) -> Shape:
    if layout == "conv1x1":
        return (*shape, 1, 1)
    if layout == "flat_table":
        return (shape[1] * shape[2], shape[0])
    return tuple(shape)


def _to_layout(array: Array, layout: str) -> Array:
    theirs = _released_shape(array.shape, layout)
    return array.reshape(len(array), -1).T if layout == "flat_table" else array.reshape(theirs)


def to_official(params_or_grads: Tree, names: NameMapping) -> dict[str, Array]:
    """Return parameters or gradients of a tree under their released names and in their released shapes."""
    leaves = flatten(params_or_grads)
    return {released.name: _to_layout(leaves[name], released.layout) for name, released in names.items()}
