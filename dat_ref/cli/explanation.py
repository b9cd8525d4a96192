"""Results of `dat-ref explain` on a photograph: a report of each deformable block, and the traces to draw."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from .. import DAT, ConfigError, DATConfig
from .._checks import Array
from ..backbone import Step
from ..config import AttentionConfig, DeformableAttentionConfig
from ..layer import LayerTrace
from ..ops.grid import key_grid_size
from ..ops.offsets import share_at_bound

MEMORY_LIMIT = 6 * 2**30  # bytes; the spec materialises attention, which grows with the fourth power of the side
Cell = tuple[int, int]


# ------------------------------------------------------------------------------------------------ before the run


def check_request(config: DATConfig, stage: int, image: Cell, photo: Cell, queries: list[tuple[float, float]]) -> None:
    """Raise before any work for a stage without deformable blocks, a query outside the photograph, too large a run.

    Raises:
        ConfigError: with the option to change.
    """
    deformable = [
        number
        for number, blocks in enumerate(config.stages, start=1)
        if any(isinstance(block.attention, DeformableAttentionConfig) for block in blocks)
    ]
    if stage not in deformable:
        raise ConfigError(f"--stage: expected one with deformable blocks, {deformable}, got {stage}")
    for y, x in queries:
        if not (0 <= y < photo[0] and 0 <= x < photo[1]):
            raise ConfigError(f"--query: expected y,x inside the {photo[0]}×{photo[1]} photograph, got {y:g},{x:g}")
    if min(image) < 32:
        raise ConfigError(f"--size: expected at least 32 pixels on each side, got {image[0]}×{image[1]}")
    required_bytes = max(_attention_bytes(config, number, image) for number in deformable)
    if required_bytes > MEMORY_LIMIT:
        raise ConfigError(
            f"--size: {image[0]}×{image[1]} would need {required_bytes / 2**30:.0f} GiB for the attention of one "
            "block, whose matrix the spec stores; choose a smaller size"
        )


def _attention_bytes(config: DATConfig, number: int, image: Cell) -> int:
    """Bytes of float32 bias positions, bias, logits and weights of the largest deformable block in a stage."""
    size = tuple(-(-side // config.reductions[number - 1]) for side in image)
    required_bytes = 0
    for block in config.stages[number - 1]:
        attention = block.attention
        if isinstance(attention, DeformableAttentionConfig):
            keys = key_grid_size((size[0], size[1]), attention.kernel_size, attention.stride, attention.convention)
            pairs = size[0] * size[1] * keys[0] * keys[1]
            required_bytes = max(required_bytes, 4 * pairs * (6 * attention.groups + 4 * attention.heads))
    return required_bytes


# ------------------------------------------------------------------------------------------------ the run


def choose_backend(requested: str) -> str:
    """Return ``"numpy"`` or ``"torch"``.

    Raises:
        ConfigError: if torch is requested and not installed.
    """
    installed = find_spec("torch") is not None
    if requested == "torch" and not installed:
        raise ConfigError("--backend: torch is not installed: pip install 'dat-ref[torch]', or choose numpy")
    return "torch" if installed and requested != "numpy" else "numpy"


def walk(model: DAT, image: Array, backend: str) -> Iterator[Step]:
    """Run a backbone block by block, in NumPy or in torch. The steps contain NumPy arrays in both cases."""
    if backend == "numpy":
        yield from model.walk(image)
        return
    import torch

    from .. import torch as dat_torch

    module = dat_torch.DAT(model.config).eval()
    module.load_numpy(model.params)
    with torch.inference_mode():
        for step in module.walk(torch.from_numpy(image)):
            yield step._replace(trace=dat_torch.as_numpy(step.trace), output=dat_torch.as_numpy(step.output))


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True)
class BlockReport:
    """Row of the table: one deformable block. Stages and blocks are numbered from 1."""

    stage: int
    block: int
    map_size: Cell
    key_grid: Cell
    queries: int
    keys: int
    groups: int
    offset_mean_px: float
    offset_max_px: float
    share_at_bound: float
    share_outside: float
    seconds: float


@dataclass(frozen=True)
class Explanation:
    """Reports of all deformable blocks, and the traces to draw."""

    reports: list[BlockReport]
    block: int  # number of the drawn block, from 1
    config: DeformableAttentionConfig
    trace: LayerTrace
    local_kind: str | None  # "window", "shifted_window" or "neighborhood": the block it is compared with
    local_trace: Any


def block_report(step: Step, config: DeformableAttentionConfig, seconds: float) -> BlockReport:
    """Measure one deformable block: how far its points moved, in pixels of its map, and where they ended."""
    trace = step.trace.attention
    assert isinstance(trace, LayerTrace)
    map_size, key_grid = trace.x.shape[2:], trace.points.shape[2:4]
    displacements = trace.points_px - np.where(np.isfinite(trace.reference_px), trace.reference_px, trace.points_px)
    lengths = np.linalg.norm(displacements, axis=-1)
    outside = (trace.points_px < -0.5) | (trace.points_px > np.asarray(map_size) - 0.5)
    reference = trace.reference[0, 0]
    bound: dict[str, Any] = {"offset_range": config.offset_range, "convention": config.convention}
    return BlockReport(
        stage=step.stage + 1,
        block=step.block + 1,
        map_size=map_size,
        key_grid=key_grid,
        queries=map_size[0] * map_size[1],
        keys=key_grid[0] * key_grid[1],
        groups=config.groups,
        offset_mean_px=float(lengths.mean()),
        offset_max_px=float(lengths.max()),
        share_at_bound=share_at_bound(trace.offsets, reference, config.offset_bound, **bound),
        share_outside=float(outside.any(axis=-1).mean()),
        seconds=seconds,
    )


def explain(steps: Iterator[Step], config: DATConfig, stage: int, block: int | None = None) -> Explanation:
    """Run a backbone to its end and keep what is shown of it.

    Args:
        steps: of `DAT.walk`.
        stage: number of the stage to draw, from one.
        block: and of its block, a deformable one; the last of these if None.
    """
    reports: list[BlockReport] = []
    selected: Step | None = None
    local: Step | None = None
    start = time.perf_counter()
    for step in steps:
        seconds, start = time.perf_counter() - start, time.perf_counter()
        attention = _attention_config(config, step)
        deformable = isinstance(attention, DeformableAttentionConfig)
        if isinstance(attention, DeformableAttentionConfig):
            reports.append(block_report(step, attention, seconds))
        if step.stage + 1 == stage and deformable and block in (None, step.block + 1):
            selected = step
        elif step.stage + 1 == stage and not deformable:
            local = step
    assert selected is not None, "check_request has seen to it"
    selected_config, selected_trace = _attention_config(config, selected), selected.trace.attention
    assert isinstance(selected_config, DeformableAttentionConfig)
    assert isinstance(selected_trace, LayerTrace)
    return Explanation(
        reports=reports,
        block=selected.block + 1,
        config=selected_config,
        trace=selected_trace,
        local_kind=None if local is None else _attention_config(config, local).kind,
        local_trace=None if local is None else local.trace.attention,
    )


def _attention_config(config: DATConfig, step: Step) -> AttentionConfig:
    return config.stages[step.stage][step.block].attention
