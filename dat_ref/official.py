"""Released names and shapes ↔ ours, both ways.

A mapping lists, for each of our flattened names, the released name and how its array is laid out there:

- ``same``: as ours;
- ``conv1x1``: a linear layer that the release keeps as a 1×1 convolution, (O, C, 1, 1);
- ``flat_table``: a window's bias table, ((2w-1)², heads) instead of (heads, 2w-1, 2w-1).

Released state dicts also hold buffers that follow from the configuration (``relative_position_index``,
``attn_mask``), and a module without offsets keeps an offset network that it never uses. Both are passed over
when loading.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from .params import flatten, mismatch_report, unflatten


class ReleasedName(NamedTuple):
    """Where one of our arrays lives in a released state dict."""

    name: str
    layout: str = "same"


NameMapping = dict[str, ReleasedName]

# In released state dicts, but no parameters: they follow from the configuration.
RELEASED_BUFFERS = ("relative_position_index", "attn_mask")
_UNUSED_WITHOUT_OFFSETS = "conv_offset."


# ------------------------------------------------------------------------------------------------ names


def _affine(ours: str, theirs: str, layout: str = "same") -> NameMapping:
    return {f"{ours}.weight": ReleasedName(f"{theirs}.weight", layout), f"{ours}.bias": ReleasedName(f"{theirs}.bias")}


def _norm(ours: str, theirs: str) -> NameMapping:
    return _affine(ours, f"{theirs}.norm")  # the release wraps every layer norm


def attention_names(config: AttentionConfig) -> NameMapping:
    """Return the mapping of one attention layer.

    Raises:
        ConfigError: for a peer that no released backbone uses; some have a mapping of their own, in `dat_ref.peers`.
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
    # The convolutional stem is a list of convolution, norm, GELU, convolution, norm: the GELU takes number 2.
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


# ------------------------------------------------------------------------------------------------ arrays


def _released_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    if layout == "conv1x1":
        return (*shape, 1, 1)
    if layout == "flat_table":
        return (shape[1] * shape[2], shape[0])
    return tuple(shape)


def _from_layout(array: Array, layout: str, shape: tuple[int, ...]) -> Array:
    return (array.T if layout == "flat_table" else array).reshape(shape)


def _to_layout(array: Array, layout: str) -> Array:
    theirs = _released_shape(array.shape, layout)
    return array.reshape(len(array), -1).T if layout == "flat_table" else array.reshape(theirs)


def to_ours(state: Mapping[str, Any], names: NameMapping, shapes: Tree) -> Tree:
    """Return our parameter tree from a released state dict.

    Args:
        state: released names to arrays (NumPy, or anything ``np.asarray`` takes).
        names: of `attention_names` or `backbone_names`.
        shapes: our tree of shapes.

    Raises:
        CheckpointError: with a report of missing, unexpected and mis-shaped keys.
    """
    ours = flatten(shapes)
    offsets_used = any(".pointwise." in name or name.startswith("offset_network") for name in names)
    arrays = {
        name: np.asarray(value)
        for name, value in state.items()
        if not name.endswith(RELEASED_BUFFERS) and (offsets_used or _UNUSED_WITHOUT_OFFSETS not in name)
    }
    expected = {released.name: _released_shape(ours[name], released.layout) for name, released in names.items()}
    problems = mismatch_report(expected, {name: value.shape for name, value in arrays.items()})
    if problems:
        raise CheckpointError(f"state: expected the released parameters of this configuration\n  {problems}")
    leaves = {
        name: _from_layout(arrays[released.name], released.layout, ours[name]) for name, released in names.items()
    }
    return unflatten(leaves)


def to_official(params_or_grads: Tree, names: NameMapping) -> dict[str, Array]:
    """Return parameters or gradients of a tree under their released names and in their released shapes."""
    leaves = flatten(params_or_grads)
    return {released.name: _to_layout(leaves[name], released.layout) for name, released in names.items()}
