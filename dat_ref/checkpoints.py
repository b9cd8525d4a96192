"""Checkpoints: from a file of either release, or of our own, to the parameter tree of a configuration, and back.

Which release a file is from, and which model, is read from its names and shapes. Bias tables of another size are
resized as the released loader does it. Nothing is left out in silence: a `LoadReport` names every array that was
loaded, resized, missing, left over, or of another shape.
"""

from __future__ import annotations

import math
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
from .official import RELEASED_BUFFERS, backbone_names, to_official
from .params import flatten, unflatten
from .peers.window import relative_index, window_cells, window_visibility
from .presets import PRESETS
from .state_files import read_arrays, read_state, save_state, select_backbone

__all__ = [
    "Fit",
    "LoadReport",
    "detect_preset",
    "detect_release",
    "fit_state",
    "load_params",
    "official_buffers",
    "official_state",
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
Shape = tuple[int, ...]

# The released code lowers hidden logits by this much.
_MASK_VALUE = -100.0
# What the 2023 code has and the 2022 code has not.
_MARKERS_2023 = (".rpb", ".linear1.0.", "local_perception_units.", "layer_scales.", ".rpe_table.0.", "patch_proj.3.")


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class LoadReport:
    """What became of every array, by its name in the file (by our name where it is missing in a file of ours).

    Attributes:
        release: ``"cvpr2022"``, ``"datpp2023"``, or ``"dat_ref"`` for a file with our names.
        loaded: taken over.
        missing: asked for by the configuration, not in the file.
        unexpected: in the file, unknown to the configuration.
        misshaped: (name, expected shape, shape in the file), not taken over.
        resized: (name, shape in the file, new shape), tables that were taken over at another size.
        ignored: passed over by rule: buffers, other parts of a detector, a head where none is asked for.
        hints: what may be wrong, and how to mend it.
    """

    release: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[tuple[str, Shape, Shape], ...] = ()
    resized: tuple[tuple[str, Shape, Shape], ...] = ()
    ignored: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the file and the configuration have the same parameters, tables of another size allowed."""
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        misshaped = [f"{name}: expected {want}, got {got}" for name, want, got in self.misshaped]
        resized = [f"{name}: {old} → {new}" for name, old, new in self.resized]
        lines = [f"{self.release} names: {len(self.loaded)} arrays loaded"]
        lines += _section("missing", self.missing) + _section("unexpected", self.unexpected)
        lines += _section("mis-shaped", misshaped) + _section("resized", resized)
        lines += _section("ignored", self.ignored, most=3)
        return "\n".join(lines + [f"  hint: {hint}" for hint in self.hints])


def _section(title: str, items: list[str] | tuple[str, ...], most: int = 8) -> list[str]:
    if not items:
        return []
    rest = [f"    … and {len(items) - most} more"] if len(items) > most else []
    return [f"  {title} ({len(items)}):", *(f"    {item}" for item in items[:most]), *rest]


# ------------------------------------------------------------------------------------------------ which file


def detect_release(state: Mapping[str, Any]) -> str:
    """Return whose names a state dict has: ``"cvpr2022"``, ``"datpp2023"`` or ``"dat_ref"``.

    The two releases share most names; one that has nothing that only the 2023 code has counts as 2022.

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
    """Return the preset that a state dict is of, with as many classes and image channels; None if it is of none.

    The head and the final norm may be missing, as in a detector. Where two presets differ in nothing but the
    size of their tables the one with the tables' own size is taken, and where they do not differ at all the first.
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
    """Return a configuration with the image channels and the classes of a state dict (no head where it has none)."""
    head = state.get("head.weight", state.get("cls_head.weight"))
    stem = state.get("patch_embedding.0.projection.weight", state.get("patch_proj.0.weight"))
    return replace(
        config,
        num_classes=0 if head is None else len(head),
        in_channels=config.in_channels if stem is None or stem.ndim != 4 else stem.shape[1],
    )


def _is_norm_or_head(name: str) -> bool:
    """Whether a name, ours or released, is of the final norm or of the classifier."""
    return name.startswith(("norm.", "head.", "cls_norm.", "cls_head."))


# ------------------------------------------------------------------------------------------------ fitting


@dataclass(frozen=True)
class Fit:
    """The arrays of a state dict that fit a configuration, by our flattened names, and the report."""

    arrays: dict[str, Array]
    report: LoadReport


def load_params(
    path: str | os.PathLike[str], config: DATConfig, *, strict: bool = True, start: Tree | None = None
) -> tuple[Tree, LoadReport]:
    """Return the parameter tree of `config` from a checkpoint of either release or of ours, and the report.

    float16 arrays come as float32. A head is ignored where ``config.num_classes == 0``.

    Args:
        path: see `read_state`.
        strict: whether a missing, unexpected or mis-shaped array is an error. If not, what the file does not
            give keeps its value in `start`: for fine-tuning with other classes, or a detector's backbone.
        start: parameter tree (default: ``init_params(config, seed=0)``).

    Raises:
        CheckpointError: if the file cannot be read, is of another model, or holds NaN or infinity; the message
            is the report.
    """
    state, others = select_backbone(read_arrays(path), os.fspath(path))
    fit = fit_state(state, config, strict=strict, source=os.fspath(path))
    report = replace(fit.report, ignored=fit.report.ignored + others)
    arrays = {name: _at_least_float32(array) for name, array in fit.arrays.items()}
    if not report.complete:
        arrays = {**flatten(init_params(config, seed=0) if start is None else start), **arrays}
    return unflatten({name: arrays[name] for name in flatten(dat_shapes(config))}), report


def _at_least_float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def fit_state(
    state: Mapping[str, Array],
    config: DATConfig,
    *,
    strict: bool = True,
    wanted: Collection[str] | None = None,
    source: str = "state",
) -> Fit:
    """Return the arrays of a state dict (of either release or ours) that fit a configuration, and the report.

    Args:
        strict: as in `load_params`; if not, more than half of what is wanted must still be there.
        wanted: our names of the parameters to look for, all of the configuration's if None.
        source: what the error message calls the state dict.

    Raises:
        CheckpointError: as in `load_params`.
    """
    fit = _compare(state, config, wanted)
    report = replace(fit.report, hints=_hints(fit.report, state, config))
    if not report.complete and strict:
        raise CheckpointError(f"{source}: expected the parameters of this configuration\n{report}")
    if len(report.loaded) <= len(report.missing) + len(report.misshaped):
        raise CheckpointError(f"{source}: expected this configuration, most of it is missing\n{report}")
    for name, array in fit.arrays.items():
        if not np.isfinite(array).all():
            wrong = int((~np.isfinite(array)).sum())
            raise CheckpointError(
                f"{source}: expected finite numbers, got {wrong} NaN or inf of {array.size} in {name}"
            )
    return Fit(fit.arrays, report)


def _compare(state: Mapping[str, Array], config: DATConfig, wanted: Collection[str] | None = None) -> Fit:
    """Sort the arrays of a state dict by what becomes of them."""
    release = detect_release(state)
    shapes: dict[str, Shape] = flatten(dat_shapes(config))
    tables = _resizable_tables(config)
    released_names = {name: (name, "same") for name in shapes} if release == OURS else dict(backbone_names(config))
    wanted_names = {name: released_names[name] for name in shapes if wanted is None or name in wanted}
    arrays: dict[str, Array] = {}
    loaded, missing = [], []
    misshaped: list[tuple[str, Shape, Shape]] = []
    resized: list[tuple[str, Shape, Shape]] = []
    for name, (key, layout) in wanted_names.items():
        if key not in state:
            missing.append(key)
            continue
        shape, array = shapes[name], _to_our_layout(state[key], layout)
        if name in tables and array.shape != shape and array.ndim == 3 and array.shape[0] == shape[0]:
            resized.append((key, array.shape, shape))
            array = resize_table(array, (shape[1], shape[2]))
        if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
            misshaped.append((key, shape, array.shape))
            continue
        arrays[name] = array
        loaded.append(key)
    wanted_keys, known_keys = ({key for key, _ in found.values()} for found in (wanted_names, released_names))
    others = [key for key in state if key not in wanted_keys]
    patterns = _ignored_patterns(config, wanted_names)
    ignored = [key for key in others if key in known_keys or any(pattern in key for pattern in patterns)]
    unexpected = [key for key in others if key not in ignored]
    report = LoadReport(
        release, tuple(loaded), tuple(missing), tuple(unexpected), tuple(misshaped), tuple(resized), tuple(ignored)
    )
    return Fit(arrays, report)


def _ignored_patterns(config: DATConfig, wanted_names: Collection[str]) -> list[str]:
    """Return parts of names that a file may have and the configuration has no use for."""
    patterns = list(RELEASED_BUFFERS)
    if "norm.weight" not in wanted_names:
        patterns.append("norms.")  # a detector's, one for each map, in place of the final norm
    if not config.num_classes:
        patterns += ["head.weight", "head.bias"]
    # A released module without offsets keeps an offset network that it never uses.
    if all(layer.offset_bound is OffsetBound.NONE for layer in _deformable_layers(config)):
        patterns.append(".conv_offset.")
    return patterns


def _deformable_layers(config: DATConfig) -> list[DeformableAttentionConfig]:
    layers = [block.attention for blocks in config.stages for block in blocks]
    return [layer for layer in layers if isinstance(layer, DeformableAttentionConfig)]


def _to_our_layout(array: Array, layout: str) -> Array:
    """Undo a layout of `official.ReleasedName` at whatever size the array has; one that does not fit stays as it is."""
    if layout == "conv1x1" and array.ndim == 4 and array.shape[2:] == (1, 1):
        return array[:, :, 0, 0]
    if layout == "flat_table" and array.ndim == 2:
        side = math.isqrt(len(array))
        if side * side == len(array):
            return array.T.reshape(-1, side, side)
    return array


def _hints(report: LoadReport, state: Mapping[str, Array], config: DATConfig) -> tuple[str, ...]:
    if report.complete:
        releases = {layer.convention.release for layer in _deformable_layers(config)}
        if report.release == OURS or releases != {None}:
            return ()
        return (f"learned in the geometry of {report.release}; this configuration samples elsewhere",)
    detected = detect_preset(state)
    if detected is not None and detected[0] not in _presets_of(config):
        return (f"the file holds {detected[0]}: dat_ref.config({detected[0]!r})",)
    hints = []
    if any(name.startswith("norms.") for name in report.unexpected):
        hints.append("a detector's backbone: it has a norm for each stage (norms.*), no final norm and no classifier")
    if all(_is_norm_or_head(name) for name in _mismatched(report)):
        hints.append("strict=False loads all but what is listed, which keeps its values (fine-tuning)")
    return tuple(hints)


def _mismatched(report: LoadReport) -> list[str]:
    """Return the names that do not fit, but for a detector's norms."""
    expected = [*report.missing, *(name for name, _, _ in report.misshaped)]
    return expected + [name for name in report.unexpected if not name.startswith("norms.")]


def _presets_of(config: DATConfig) -> list[str]:
    """Return the presets with the same parameters as a configuration, but for its head, tables and image channels."""

    def stripped(config: DATConfig) -> dict[str, Shape]:
        shapes = flatten(dat_shapes(replace(config, num_classes=0, in_channels=1)))
        return {name: shape for name, shape in shapes.items() if not name.endswith(".table")}

    return [name for name, preset in PRESETS.items() if stripped(preset) == stripped(config)]


# ------------------------------------------------------------------------------------------------ tables


def _resizable_tables(config: DATConfig) -> set[str]:
    """Return the names of the tables that are a function of displacement, which can be read at another size."""
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
    """Return a table (heads, h, w) at another size (heads, H, W), bicubic, as the released loader resizes tables.

    The corners of the outer cells are kept in place (torch's ``align_corners=False``), values beyond the border
    are those of the border, and nothing is smoothed when a table shrinks.
    """
    rows, columns = (_cubic_weights(old, new) for old, new in zip(table.shape[1:], size, strict=True))
    return (rows @ table.astype(np.float64) @ columns.T).astype(table.dtype)


def _cubic_weights(old: int, new: int, sharpness: float = -0.75) -> Array:
    """Return the matrix (new, old) that reads `old` cells at the centers of `new` cells over the same length.

    Keys' kernel with a = -3/4, at distance t of a cell: (a+2)t³ - (a+3)t² + 1 for t ≤ 1, a(t³ - 5t² + 8t - 4)
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
    """Return a parameter tree as a released state dict with its buffers, which the released code loads strictly."""
    return {**to_official(params, backbone_names(config)), **official_buffers(config)}


def official_buffers(config: DATConfig) -> dict[str, Array]:
    """Return the buffers that the released modules keep in their state dicts.

    Window attention registers ``relative_position_index`` (w², w²), its shifted form also ``attn_mask`` (nW, w²,
    w²), which is 0 or -100. The deformable and neighborhood layers register none.

    Raises:
        CheckpointError: if a map is not a whole number of windows at ``config.image_size``, as the released code needs.
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
        raise CheckpointError(f"config: expected maps of whole windows of {window}, as the release needs, got {size}")
    _, cells = window_cells(size, window, config.shift)
    visible = window_visibility(cells, size, window, config.shift)
    return {**buffers, RELEASED_BUFFERS[1]: np.where(visible, np.float32(0), np.float32(_MASK_VALUE))}
