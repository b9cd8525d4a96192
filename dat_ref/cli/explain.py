"""``dat-ref explain``: run a backbone on a photograph and show where it looks."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import DAT, ConfigError, DATConfig, init_params
from .. import config as preset
from .._checks import Array
from ..backbone import Step
from ..config import AttentionConfig, DeformableAttentionConfig, OffsetBound
from ..layer import LayerTrace
from ..ops.grid import key_grid_size, pixels_per_unit
from ..ops.offsets import offset_limit, share_at_bound
from .photo import add_photo_arguments, fed_size, load_photo, normalise, resize

PICTURE_SIDE = 896  # short side at which figures show the photograph
MEMORY_LIMIT = 6 * 2**30  # bytes; the spec materialises attention, which grows with the fourth power of the side
Cell = tuple[int, int]


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "explain",
        help="run a DAT on a photograph and draw where it looks",
        description="Run a backbone on a photograph: a line for every deformable block, four figures of one.",
    )
    add_photo_arguments(parser)
    parser.add_argument(
        "--query",
        type=parse_query,
        action="append",
        metavar="Y,X",
        help="pixel of the photograph whose attention is drawn; repeatable (default: three along its middle)",
    )
    parser.add_argument("--stage", type=int, default=3, help="stage whose last deformable block is drawn (3)")
    parser.add_argument(
        "--out", type=Path, default=Path("explained"), metavar="DIR", help="folder for the figures (explained)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def parse_query(text: str) -> tuple[float, float]:
    """Parse ``y,x``."""
    try:
        y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected y,x in pixels of the photograph, such as 120,200, got {text!r}"
        ) from None
    return y, x


# ------------------------------------------------------------------------------------------------ what is found


@dataclass(frozen=True)
class BlockReport:
    """What the table says of one deformable block; stages and blocks count from one, as people do."""

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
    """The reports of all deformable blocks, and the traces that are drawn."""

    reports: list[BlockReport]
    block: int  # the drawn one, counted from one
    config: DeformableAttentionConfig
    trace: LayerTrace
    local_kind: str | None  # "window", "shifted_window" or "neighborhood": what the deformable block is compared with
    local_trace: Any


def block_report(step: Step, config: DeformableAttentionConfig, seconds: float) -> BlockReport:
    """Measure one deformable block: how far its points moved, in pixels of its map, and where they ended."""
    trace: LayerTrace = step.trace.attention
    map_size, key_grid = trace.x.shape[2:], trace.points.shape[2:4]
    moved = trace.points_px - np.where(np.isfinite(trace.reference_px), trace.reference_px, trace.points_px)
    lengths = np.linalg.norm(moved, axis=-1)
    beyond = (trace.points_px < -0.5) | (trace.points_px > np.asarray(map_size) - 0.5)
    reference = trace.reference[0, 0]
    bound = {"offset_range": config.offset_range, "convention": config.convention}
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
        share_outside=float(beyond.any(axis=-1).mean()),
        seconds=seconds,
    )


def explain(steps: Iterator[Step], config: DATConfig, stage: int) -> Explanation:
    """Run a backbone to its end and keep what is shown of it.

    Args:
        steps: of `DAT.walk`.
        stage: number of the stage to draw, from one.
    """
    reports: list[BlockReport] = []
    drawn: Step | None = None
    local: Step | None = None
    started = time.perf_counter()
    for step in steps:
        seconds, started = time.perf_counter() - started, time.perf_counter()
        attention = _attention(config, step)
        deformable = isinstance(attention, DeformableAttentionConfig)
        if isinstance(attention, DeformableAttentionConfig):
            reports.append(block_report(step, attention, seconds))
        if step.stage + 1 == stage and deformable:
            drawn = step
        elif step.stage + 1 == stage:
            local = step
    assert drawn is not None  # checked before the run
    return Explanation(
        reports=reports,
        block=drawn.block + 1,
        config=_attention(config, drawn),
        trace=drawn.trace.attention,
        local_kind=None if local is None else _attention(config, local).kind,
        local_trace=None if local is None else local.trace.attention,
    )


def _attention(config: DATConfig, step: Step) -> AttentionConfig:
    return config.stages[step.stage][step.block].attention


# ------------------------------------------------------------------------------------------------ before the run


def check_request(config: DATConfig, stage: int, image: Cell, photo: Cell, queries: list[tuple[float, float]]) -> None:
    """Raise before any work if the stage cannot be drawn, a query lies off the photograph, or the run would not fit.

    Raises:
        ConfigError: saying what to change.
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
    needed = max(_attention_bytes(config, number, image) for number in deformable)
    if needed > MEMORY_LIMIT:
        raise ConfigError(
            f"--size: {image[0]}×{image[1]} would need {needed / 2**30:.0f} GiB for the attention of one block, "
            "which the reference materialises; choose a smaller size"
        )


def _attention_bytes(config: DATConfig, number: int, image: Cell) -> int:
    """Bytes of float32 bias positions, bias, logits and weights of the largest deformable block in a stage."""
    size = tuple(-(-side // config.reductions[number - 1]) for side in image)
    needed = 0
    for block in config.stages[number - 1]:
        attention = block.attention
        if isinstance(attention, DeformableAttentionConfig):
            keys = key_grid_size((size[0], size[1]), attention.kernel_size, attention.stride, attention.convention)
            pairs = size[0] * size[1] * keys[0] * keys[1]
            needed = max(needed, 4 * pairs * (6 * attention.groups + 4 * attention.heads))
    return needed


def make_folder(folder: Path) -> None:
    """Make the folder for the figures, if it is not there.

    Raises:
        ConfigError: if a file stands in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"--out: expected a folder, and {error.filename} is a file") from error


def load_model(options: argparse.Namespace) -> tuple[DAT, str]:
    """Return the backbone that the command line asks for, and a line that says where its weights come from."""
    config = preset(options.model)
    if options.checkpoint is None:
        weights = f"seeded weights (seed {options.seed}), untrained: the figures show geometry, not what was learned"
        return DAT(config, init_params(config, options.seed)), weights
    from ..checkpoints import load_params

    params, report = load_params(options.checkpoint, config)
    return DAT(config, params), f"weights from {options.checkpoint} ({report.release})"


# ------------------------------------------------------------------------------------------------ figures


def default_queries(photo: Cell) -> list[tuple[float, float]]:
    """Return three pixels along the middle of the longer side."""
    height, width = photo
    along = (0.25, 0.5, 0.75)
    return [(height / 2, width * at) if width >= height else (height * at, width / 2) for at in along]


def draw(
    explanation: Explanation, photo: Array, queries: list[tuple[float, float]], stage: int, folder: Path
) -> list[Path]:
    """Write the four figures of the drawn block and return their paths."""
    from .. import viz

    trace, config = explanation.trace, explanation.config
    label = f"Stage {stage}, block {explanation.block}"
    map_size: Cell = trace.x.shape[2:]
    cells = [_cell_of(query, photo.shape[:2], map_size) for query in queries]
    deformable = [viz.deformable_attended(trace, cell) for cell in cells]
    attended = {"neighborhood": viz.neighborhood_attended}.get(explanation.local_kind or "", viz.window_attended)
    local = [attended(explanation.local_trace, cell) for cell in cells] if explanation.local_kind else []
    local_name = (explanation.local_kind or "").replace("_", " ").capitalize() + " attention"
    figures = {
        "points": viz.draw_points(photo, trace, label=label),
        "key_importance": viz.draw_key_importance(photo, trace, label=label),
        "attention": viz.draw_attention(
            photo,
            np.array(cells, dtype=float),
            deformable,
            local,
            map_size=map_size,
            label=label,
            names=("Deformable attention", local_name),
        ),
        "offset_field": viz.draw_offset_field(photo, trace, bound_px=_bound_px(config, trace), label=label),
    }
    return [viz.save(figure, folder / f"stage{stage}_{name}.png") for name, figure in figures.items()]


def _cell_of(query: tuple[float, float], photo: Cell, map_size: Cell) -> Cell:
    """Return the map cell that holds a pixel of the photograph."""
    y, x = (min(int(at * cells / pixels), cells - 1) for at, pixels, cells in zip(query, photo, map_size))
    return y, x


def _bound_px(config: DeformableAttentionConfig, trace: LayerTrace) -> tuple[float, float] | None:
    """Return the largest offset component in pixels, for bounds on the offset itself."""
    if config.offset_bound is not OffsetBound.TANH_PIXELS:
        return None
    limit = offset_limit(config.offset_range, trace.points.shape[2:4], config.convention)
    y, x = limit * pixels_per_unit(trace.x.shape[2:], config.convention)
    return float(y), float(x)


# ------------------------------------------------------------------------------------------------ the command


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    photo = load_photo(options.photo)
    height, width = photo.shape[:2]
    queries = options.query or default_queries((height, width))
    image_size = fed_size((height, width), options.size)
    check_request(preset(options.model), options.stage, image_size, (height, width), queries)
    make_folder(options.out)
    model, weights = load_model(options)
    image = normalise(resize(photo, image_size))

    started = time.perf_counter()
    explanation = explain(_with_progress(model.walk(image), model.config, options.json), model.config, options.stage)
    seconds = time.perf_counter() - started
    figures = draw(explanation, _for_figures(photo), _scaled(queries, photo), options.stage, options.out)

    name = "the photograph that ships" if options.photo is None else str(options.photo)
    if options.json:
        facts = {
            "model": options.model,
            "weights": weights,
            "photograph": name,
            "photograph_size": [height, width],
            "image_size": list(image_size),
            "seconds": seconds,
            "blocks": [asdict(report) for report in explanation.reports],
            "figures": [str(path) for path in figures],
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{options.model} on {name}, {height}×{width} fed at {image_size[0]}×{image_size[1]}, {seconds:.1f} s")
    print(f"{weights}\n")
    print(table(explanation.reports))
    print("\noffsets in pixels of the block's map; at bound: share of offset components that the bound holds;")
    print("outside: share of sampling points that left the map\n")
    print("\n".join(str(path) for path in figures))
    return 0


def table(reports: list[BlockReport]) -> str:
    """Return the reports as lines of text."""
    rows = [
        ("stage", "block", "map", "keys", "N_q", "N_s", "groups", "offset mean", "max", "at bound", "outside", "time")
    ]
    rows += [
        (
            str(report.stage),
            str(report.block),
            "{}×{}".format(*report.map_size),
            "{}×{}".format(*report.key_grid),
            str(report.queries),
            str(report.keys),
            str(report.groups),
            f"{report.offset_mean_px:.2f}",
            f"{report.offset_max_px:.2f}",
            f"{report.share_at_bound:.1%}",
            f"{report.share_outside:.1%}",
            f"{report.seconds * 1000:.0f} ms",
        )
        for report in reports
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _with_progress(steps: Iterator[Step], config: DATConfig, quiet: bool) -> Iterator[Step]:
    from tqdm import tqdm

    total = sum(len(blocks) for blocks in config.stages)
    # disable=None: a bar on a terminal, nothing in a pipe or a log.
    return iter(tqdm(steps, total=total, unit="block", leave=False, disable=True if quiet else None))


def _for_figures(photo: Array) -> Array:
    """Return the photograph no larger than figures can show."""
    height, width = photo.shape[:2]
    factor = min(PICTURE_SIDE / min(height, width), 1.0)
    return photo if factor == 1.0 else resize(photo, (max(round(height * factor), 1), max(round(width * factor), 1)))


def _scaled(queries: list[tuple[float, float]], photo: Array) -> list[tuple[float, float]]:
    """Return queries in pixels of the picture that the figures show."""
    shown = _for_figures(photo).shape
    return [(y * shown[0] / photo.shape[0], x * shown[1] / photo.shape[1]) for y, x in queries]
