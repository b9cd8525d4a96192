"""Checkpoints: from a file of either release, or of our own, to the parameter tree of a configuration, and back.

Release and model are detected from the names and shapes in the file. Bias tables of another size are resized as in the
released loader. The first convolution of an RGB model is converted to another number of image channels. A `LoadReport`
lists every array: loaded, resized, converted, newly initialized, missing, unexpected, mis-shaped or ignored.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ._checks import Array, CheckpointError, Tree
from ._deprecation import deprecated_names
from .backbone import dat_shapes
from .config import BiasKind, DATConfig, DeformableAttentionConfig, OffsetBound, WindowAttentionConfig
from .initialization import init_params
from .official import (
    RELEASED_BUFFERS,
    Fit,
    LoadReport,
    ReleasedName,
    Shape,
    backbone_names,
    match_state,
    to_official,
)
from .params import flatten, unflatten
from .peers.window import relative_index, window_cells, window_visibility
from .presets import PRESETS
from .state_files import backbone_prefix, read_arrays, read_state, save_state, select_backbone

__all__ = [
    "Checkpoint",
    "Fit",
    "LoadReport",
    "convert_image_channels",
    "detect_preset",
    "detect_release",
    "fit_state",
    "load_params",
    "official_buffers",
    "official_state",
    "read_checkpoint",
    "read_state",
    "resize_table",
    "save_state",
    "with_channels_and_classes",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "recognise": "detect_release",
        "recognise_model": "detect_preset",
        "with_ends_of": "with_channels_and_classes",
    },
)

OURS = "dat_ref"
_STEM = "patch_embedding.0.projection.weight"

# The released code adds this to masked logits.
_MASK_VALUE = -100.0
# Parts of names that only the 2023 code has.
_MARKERS_2023 = (".rpb", ".linear1.0.", "local_perception_units.", "layer_scales.", ".rpe_table.0.", "patch_proj.3.")


# ------------------------------------------------------------------------------------------------ detection


def detect_release(state: Mapping[str, Any]) -> str:
    """Return the naming scheme of a state dict: ``"cvpr2022"``, ``"datpp2023"`` or ``"dat_ref"``.

    The two releases share most names. A state dict without any name that only the 2023 code has counts as 2022.

    Raises:
        CheckpointError: if the names are of none of them.
    """
    if any(name.startswith("patch_embedding.") for name in state):
        return OURS
    if not any(name.startswith("patch_proj.") for name in state):
        examples = ", ".join(sorted(state)[:4]) or "none"
        raise CheckpointError(
            "state: expected the names of a DAT: patch_proj.* (released) or patch_embedding.* (ours); found "
            f"{len(state)} others: {examples} …"
        )
    latest = any(pattern in name for name in state for pattern in _MARKERS_2023)
    return "datpp2023" if latest else "cvpr2022"


def detect_preset(state: Mapping[str, Array]) -> tuple[str, DATConfig] | None:
    """Return the preset of a state dict, with its number of classes and image channels; None if no preset fits.

    The head and the final norm may be missing, as in a detector. If two presets differ only in the size of their
    tables, the one with the sizes of the file is returned. If they do not differ, the first one is returned.
    """
    fallback = None
    for name, preset in PRESETS.items():
        candidate = with_channels_and_classes(preset, state)
        report = _compare(state, candidate).report
        if report.misshaped or [name for name in report.missing if not _is_norm_or_head(name)]:
            continue
        if [name for name in report.unexpected if not name.startswith("norms.")]:
            continue
        if not report.resized:
            return name, candidate
        fallback = fallback or (name, candidate)
    return fallback


def with_channels_and_classes(config: DATConfig, state: Mapping[str, Array]) -> DATConfig:
    """Return a configuration with the image channels and the classes of a state dict (no head if the state has none).

    Arrays of another rank than a head or a stem leave the configuration as it is; loading then reports them.
    """
    head = state.get("head.weight", state.get("cls_head.weight"))
    stem = state.get("patch_embedding.0.projection.weight", state.get("patch_proj.0.weight"))
    has_classes = head is not None and head.ndim == 2 and len(head) > 0
    has_channels = stem is not None and stem.ndim == 4 and stem.shape[1] > 0
    return replace(
        config,
        num_classes=0 if head is None else len(head) if has_classes else config.num_classes,
        in_channels=stem.shape[1] if stem is not None and has_channels else config.in_channels,
    )


def _is_norm_or_head(name: str) -> bool:
    """Return True for a parameter of the final norm or the classifier, under our name or its released name."""
    return _is_head(name) or name.startswith(("norm.", "cls_norm."))


def _is_head(name: str) -> bool:
    """Return True for a parameter of the classifier, under our name or its released name."""
    return name.startswith(("head.", "cls_head."))


# ------------------------------------------------------------------------------------------------ fitting


@dataclass(frozen=True)
class Checkpoint:
    """Backbone in a checkpoint.

    Attributes:
        source: file name, for error messages.
        state: named arrays of the backbone, without their prefix.
        prefix: prefix of the backbone's names in the file.
        others: names of the other arrays in the file.
    """

    source: str
    state: dict[str, Array]
    prefix: str
    others: tuple[str, ...]

    def fit(
        self, config: DATConfig, *, strict: bool = True, new_head: bool = False, wanted: Collection[str] | None = None
    ) -> Fit:
        """Return the arrays that fit a configuration, and the report on the whole file; see `fit_state`."""
        fit = fit_state(self.state, config, strict=strict, new_head=new_head, wanted=wanted, source=self.source)
        return Fit(fit.arrays, replace(fit.report, prefix=self.prefix, ignored=fit.report.ignored + self.others))

    def params(
        self, config: DATConfig, *, strict: bool = True, new_head: bool = False, start: Tree | None = None
    ) -> tuple[Tree, LoadReport]:
        """Return the parameter tree of a configuration, and the report; see `load_params`."""
        fit = self.fit(config, strict=strict, new_head=new_head)
        arrays = {name: _at_least_float32(array) for name, array in fit.arrays.items()}
        names = flatten(dat_shapes(config))
        if len(arrays) < len(names):
            arrays = {**flatten(init_params(config, seed=0) if start is None else start), **arrays}
        return unflatten({name: arrays[name] for name in names}), fit.report


def read_checkpoint(path: str | os.PathLike[str], prefix: str | None = None) -> Checkpoint:
    """Read the backbone in a checkpoint of either release or of ours.

    Args:
        path, prefix: as in `read_state`.

    Raises:
        CheckpointError, OSError: as in `read_state`.
    """
    source, arrays = os.fspath(path), read_arrays(path)
    state, others = select_backbone(arrays, source, prefix)
    return Checkpoint(source, state, backbone_prefix(arrays, source, prefix), others)


def load_params(
    path: str | os.PathLike[str],
    config: DATConfig,
    *,
    strict: bool = True,
    start: Tree | None = None,
    new_head: bool = False,
    prefix: str | None = None,
) -> tuple[Tree, LoadReport]:
    """Return the parameter tree of `config` from a checkpoint of either release or of ours, and the report.

    float16 arrays become float32. A head is ignored if ``config.num_classes == 0``. The first convolution of an RGB
    model is converted to ``config.in_channels``, see `convert_image_channels`.

    Args:
        path: checkpoint, see `read_state`.
        config: configuration of the backbone.
        strict: whether a missing, unexpected or mis-shaped array is an error. If False, parameters without a fitting
            array keep their value in `start`; use it for the backbone of a detector.
        start: parameter tree (default: ``init_params(config, seed=0)``).
        new_head: whether a head that the file lacks, or has for another number of classes, keeps its value in `start`;
            for fine-tuning.
        prefix: prefix of the backbone's names in the file, see `backbone_prefix`.

    Raises:
        CheckpointError: if the file cannot be read, belongs to another model, or contains NaN or infinity; with the
            report.
    """
    return read_checkpoint(path, prefix).params(config, strict=strict, new_head=new_head, start=start)


def _at_least_float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def fit_state(
    state: Mapping[str, Array],
    config: DATConfig,
    *,
    strict: bool = True,
    new_head: bool = False,
    wanted: Collection[str] | None = None,
    source: str = "state",
) -> Fit:
    """Return the arrays of a state dict (of either release or ours) that fit a configuration, and the report.

    Args:
        state: named arrays.
        config: configuration of the backbone.
        strict: as in `load_params`. If False, more than half of the wanted parameters must still be found.
        new_head: as in `load_params`.
        wanted: our names of the parameters to load; all if None.
        source: name of the state dict for error messages.

    Raises:
        CheckpointError: as in `load_params`.
    """
    try:
        fit = _compare(state, config, wanted)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {str(error).removeprefix('state: ')}") from error
    report = _with_new_head(fit.report, config) if new_head else fit.report
    report = replace(report, hints=report.hints + _hints(report, state, config))
    if strict:
        report.check(source)
    if len(report.loaded) <= len(report.missing) + len(report.misshaped):
        raise CheckpointError(f"{source}: expected this configuration, most of it is missing\n{report}")
    for name, array in fit.arrays.items():
        if not np.isfinite(array).all():
            wrong = int((~np.isfinite(array)).sum())
            raise CheckpointError(
                f"{source}: expected finite numbers, got {wrong} NaN or inf of {array.size} in {name}"
            )
    return Fit(fit.arrays, report)


def _with_new_head(report: LoadReport, config: DATConfig) -> LoadReport:
    """Return the report with a missing or mis-shaped head as newly initialized."""
    shapes: dict[str, Shape] = {name: shape for name, shape, _ in report.misshaped}
    in_file: dict[str, Shape] = {name: shape for name, _, shape in report.misshaped}
    own = flatten(dat_shapes(config))
    shapes |= {name: own[f"head.{name.rpartition('.')[2]}"] for name in report.missing if _is_head(name)}
    return replace(
        report,
        missing=tuple(name for name in report.missing if not _is_head(name)),
        misshaped=tuple(each for each in report.misshaped if not _is_head(each[0])),
        initialized=tuple((name, shape, in_file.get(name)) for name, shape in shapes.items() if _is_head(name)),
    )


def _compare(state: Mapping[str, Array], config: DATConfig, wanted: Collection[str] | None = None) -> Fit:
    """Compare a state dict under any naming scheme with a configuration."""
    release = detect_release(state)
    shapes: dict[str, Shape] = flatten(dat_shapes(config))
    names = {name: ReleasedName(name) for name in shapes} if release == OURS else backbone_names(config)
    stem = names[_STEM].name
    weight, shape = state.get(stem), shapes[_STEM]
    converted: tuple[tuple[str, Shape, Shape], ...] = ()
    if weight is not None and _is_rgb_stem(weight, shape):
        state = {**state, stem: convert_image_channels(weight, shape[1])}
        converted = ((stem, weight.shape, shape),)
    fit = match_state(
        state,
        names,
        shapes,
        release=release,
        wanted=wanted,
        ignored=_ignored_patterns(config, shapes if wanted is None else wanted),
        resizable=_resizable_tables(config),
        resize=resize_table,
    )
    return Fit(fit.arrays, replace(fit.report, converted=converted))


def _ignored_patterns(config: DATConfig, wanted: Collection[str]) -> list[str]:
    """Return parts of names that a file may contain although the configuration has no use for them."""
    patterns = list(RELEASED_BUFFERS)
    if "norm.weight" not in wanted:
        patterns.append("norms.")  # a detector's norms, one for each map, instead of the final norm
    if not config.num_classes:
        patterns += ["head.weight", "head.bias"]
    # A released module without offsets has an offset network that it never uses.
    if all(layer.offset_bound is OffsetBound.NONE for layer in _deformable_layers(config)):
        patterns.append(".conv_offset.")
    return patterns


def _deformable_layers(config: DATConfig) -> list[DeformableAttentionConfig]:
    layers = [block.attention for blocks in config.stages for block in blocks]
    return [layer for layer in layers if isinstance(layer, DeformableAttentionConfig)]


def _hints(report: LoadReport, state: Mapping[str, Array], config: DATConfig) -> tuple[str, ...]:
    if report.complete:
        releases = {layer.convention.release for layer in _deformable_layers(config)}
        if report.release == OURS or releases != {None}:
            return ()
        return (f"trained in the geometry of {report.release}; this configuration samples at other points",)
    detected = detect_preset(state)
    if detected is not None and detected[0] not in _presets_of(config):
        return (f"the file contains {detected[0]}: dat_ref.config({detected[0]!r})",)
    hints = []
    if any(name.startswith("norms.") for name in report.unexpected):
        hints.append("a detector's backbone: it has a norm for each stage (norms.*), no final norm and no classifier")
    if all(_is_norm_or_head(name) for name in _mismatched(report)):
        loose = "new_head=True" if all(map(_is_head, _mismatched(report))) else "strict=False"
        hints.append(f"{loose} loads all other arrays; the listed parameters keep their values (fine-tuning)")
    return tuple(hints)


def _mismatched(report: LoadReport) -> list[str]:
    """Return the names that do not fit, without a detector's norms."""
    expected = [*report.missing, *(name for name, _, _ in report.misshaped)]
    return expected + [name for name in report.unexpected if not name.startswith("norms.")]


def _presets_of(config: DATConfig) -> list[str]:
    """Return the presets with the parameters of a configuration, up to its head, tables and image channels."""

    def stripped(config: DATConfig) -> dict[str, Shape]:
        shapes = flatten(dat_shapes(replace(config, num_classes=0, in_channels=1)))
        return {name: shape for name, shape in shapes.items() if not name.endswith(".table")}

    return [name for name, preset in PRESETS.items() if stripped(preset) == stripped(config)]


# ------------------------------------------------------------------------------------------------ image channels


def _is_rgb_stem(weight: Array, shape: Shape) -> bool:
    """Return True if a weight fits a first convolution of this shape except that it is for three image channels."""
    fits = weight.ndim == 4 and weight.shape[0] == shape[0] and weight.shape[2:] == shape[2:]
    return fits and weight.shape[1] == 3 != shape[1] and np.issubdtype(weight.dtype, np.floating)


def convert_image_channels(weight: Array, channels: int) -> Array:
    """Convert the weight of a first convolution to another number of image channels, as timm does.

    One channel gets the sum of all kernels: the output for a gray image is the output of the old weight for the same
    image in RGB. Other numbers of channels repeat the kernels in order and scale them, so that an image whose channels
    are all equal keeps its output on average.

    Args:
        weight: (O, C, k, k).
        channels: new number of channels C'.

    Returns:
        (O, C', k, k), in the dtype of `weight`.
    """
    old, wide = weight.shape[1], weight.astype(np.float64)
    if channels == 1:
        return wide.sum(axis=1, keepdims=True).astype(weight.dtype)
    return (wide[:, np.arange(channels) % old] * (old / channels)).astype(weight.dtype)


# ------------------------------------------------------------------------------------------------ tables


def _resizable_tables(config: DATConfig) -> set[str]:
    """Return the names of the bias tables that are functions of displacement and can be resized."""
    names = set()
    for stage, blocks in enumerate(config.stages):
        for index, block in enumerate(blocks):
            attention = block.attention
            if isinstance(attention, WindowAttentionConfig):
                names.add(f"stages.{stage}.blocks.{index}.attention.window_bias.table")
            elif isinstance(attention, DeformableAttentionConfig) and attention.bias is BiasKind.TABLE:
                names.add(f"stages.{stage}.blocks.{index}.attention.position_bias.table")
    return names


def resize_table(table: Array, size: tuple[int, int]) -> Array:
    """Resize a table (heads, h, w) to (heads, H, W) by bicubic interpolation, as in the released loader.

    The outer edges of the table stay fixed (torch's ``align_corners=False``). Values outside the table equal the
    nearest border value. A table that shrinks is not smoothed.

    Args:
        table: bias table (heads, h, w) with h and w at least 1.
        size: new (H, W).
    """
    rows, columns = (_cubic_weights(old, new) for old, new in zip(table.shape[1:], size, strict=True))
    return (rows @ table.astype(np.float64) @ columns.T).astype(table.dtype)


def _cubic_weights(old: int, new: int, sharpness: float = -0.75) -> Array:
    """Return the matrix (new, old) that interpolates `old` cells at the centers of `new` cells over the same length.

    Keys' kernel with a = -3/4, at distance t from a cell: (a+2)t³ - (a+3)t² + 1 for t ≤ 1, a(t³ - 5t² + 8t - 4)
    for t < 2.
    """
    a = sharpness
    positions = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(positions).astype(int)[:, None] + np.arange(-1, 3)  # (new, 4)
    t = np.abs(positions[:, None] - taps)
    near, far = ((a + 2) * t - (a + 3)) * t**2 + 1, a * (((t - 5) * t + 8) * t - 4)
    weights = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    np.add.at(weights, (rows, taps.clip(0, old - 1)), np.where(t <= 1, near, far))
    return weights


# ------------------------------------------------------------------------------------------------ released form


def official_state(params: Tree, config: DATConfig) -> dict[str, Array]:
    """Return a parameter tree as a released state dict with buffers. The released code can load it strictly."""
    return {**to_official(params, backbone_names(config)), **official_buffers(config)}


def official_buffers(config: DATConfig) -> dict[str, Array]:
    """Return the buffers in the state dicts of the released modules.

    Window attention registers ``relative_position_index`` (w², w²). Shifted window attention also registers
    ``attn_mask`` (nW, w², w²) with values 0 and -100. The deformable and neighborhood layers register none.

    Raises:
        CheckpointError: if windows do not partition a map at ``config.image_size``, as the released code requires.
    """
    buffers: dict[str, Array] = {}
    for stage, (blocks, reduction) in enumerate(zip(config.stages, config.reductions, strict=True)):
        size = (config.image_size[0] // reduction, config.image_size[1] // reduction)
        for index, block in enumerate(blocks):
            if isinstance(block.attention, WindowAttentionConfig):
                name = f"stages.{stage}.attns.{index}"
                buffers |= {f"{name}.{leaf}": array for leaf, array in _window_buffers(block.attention, size).items()}
    return buffers


def _window_buffers(config: WindowAttentionConfig, size: tuple[int, int]) -> dict[str, Array]:
    window, area = config.window_size, config.window_size**2
    buffers: dict[str, Array] = {RELEASED_BUFFERS[0]: relative_index(window).reshape(area, area).astype(np.int64)}
    if not config.shift:
        return buffers
    if size[0] % window or size[1] % window:
        raise CheckpointError(
            f"config: expected maps of whole windows of {window}, as the release requires, got {size}"
        )
    _, cells = window_cells(size, window, config.shift)
    visible = window_visibility(cells, size, window, config.shift)
    return {**buffers, RELEASED_BUFFERS[1]: np.where(visible, np.float32(0), np.float32(_MASK_VALUE))}
