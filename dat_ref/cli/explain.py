"""``dat-ref explain``: draw where a backbone looks, on scenes and on a photograph."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import DAT, ConfigError, DATConfig
from .. import config as preset
from .._checks import Array
from ..backbone import Step
from ..config import DeformableAttentionConfig, OffsetBound
from ..data import NETWORK
from ..layer import LayerTrace
from ..ops.grid import pixels_per_unit
from ..ops.offsets import offset_limit
from ..scenes import OBJECTS
from . import spot
from .explanation import BlockReport, Cell, Explanation, check_request, choose_backend, explain, walk
from .output import make_folder
from .photo import DEFAULT_MODEL, add_photo_arguments, input_size, load_photo, normalise, parse_seed, resize
from .weights import select_weights

PICTURE_SIDE = 896  # short side at which figures show the photograph


DESCRIPTION = f"""\
Show where a backbone looks. Without options: first {NETWORK}, the trained network that ships, on
held-out scenes, with its offsets and with zero offsets; then an untrained backbone on a
photograph: a table of its deformable blocks, and four figures of one of them."""
EXAMPLE = f"""example:
  dat-ref explain --out figures                             scenes, then the photograph that ships
  dat-ref explain --scene 12 --scene 40                     {NETWORK} on scenes of your choice
  dat-ref explain photo.jpg --place giraffe@120,200         {NETWORK} on your photograph
  dat-ref explain photo.jpg --model dat_pp_tiny --stage 2   where an untrained DAT++ looks
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "explain",
        help="draw where a backbone looks, trained on scenes or untrained on a photograph",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained = parser.add_argument_group("Trained network", f"{NETWORK} names small objects on photographs")
    trained.add_argument(
        "--scene",
        type=parse_seed,
        action="append",
        metavar="N",
        help="number of a held-out scene; repeatable (default: six scenes, and then the photograph)",
    )
    trained.add_argument(
        "--place",
        type=spot.parse_place,
        action="append",
        metavar="NAME@Y,X[,R]",
        help="object to place on PHOTO, its center at pixel y,x and its radius R in pixels; repeatable. NAME: "
        f"{', '.join(OBJECTS['pictures'].kinds)} (default R: 6%% of the short side)",
    )
    photograph = parser.add_argument_group("Backbone on a photograph")
    add_photo_arguments(photograph)
    photograph.add_argument(
        "--query",
        type=parse_query,
        action="append",
        metavar="Y,X",
        help="pixel of PHOTO whose attention is drawn; repeatable (default: three on the center line)",
    )
    photograph.add_argument(
        "--stage", type=int, default=3, metavar="N", help="stage whose last deformable block is drawn (default: 3)"
    )
    photograph.add_argument(
        "--backend",
        choices=("auto", "numpy", "torch"),
        default="auto",
        help="implementation; auto: torch if it is installed. The figures are the same (default: auto)",
    )
    output = parser.add_argument_group("Output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("explained"),
        metavar="DIR",
        help="output folder of the figures (default: explained)",
    )
    output.add_argument("--json", action="store_true", help="print JSON instead of text")
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


# ------------------------------------------------------------------------------------------------ figures


def default_queries(photo: Cell) -> list[tuple[float, float]]:
    """Return three pixels on the center line of the longer side."""
    height, width = photo
    fractions = (0.25, 0.5, 0.75)
    return [
        (height / 2, width * fraction) if width >= height else (height * fraction, width / 2) for fraction in fractions
    ]


def draw(explanation: Explanation, photo: Array, cells: list[Cell], stage: int, folder: Path) -> list[Path]:
    """Write the four figures of the drawn block, with the attention of its map's `cells`, and return their paths."""
    from .. import viz

    trace, config = explanation.trace, explanation.config
    label = f"Stage {stage}, block {explanation.block}"
    map_size: Cell = trace.x.shape[2:]
    deformable = [viz.deformable_query_attention(trace, cell) for cell in cells]
    query_attention = {"neighborhood": viz.neighborhood_query_attention}.get(
        explanation.local_kind or "", viz.window_query_attention
    )
    local = [query_attention(explanation.local_trace, cell) for cell in cells] if explanation.local_kind else []
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


def _query_cell(query: tuple[float, float], photo: Cell, map_size: Cell) -> Cell:
    """Return the map cell that holds a pixel of the photograph."""
    y, x = (
        min(int(coordinate * cells / pixels), cells - 1) for coordinate, pixels, cells in zip(query, photo, map_size)
    )
    return y, x


def _bound_px(config: DeformableAttentionConfig, trace: LayerTrace) -> tuple[float, float] | None:
    """Return the largest offset component in pixels, for bounds on the offset itself."""
    if config.offset_bound is not OffsetBound.TANH_CELLS:
        return None
    limit = offset_limit(config.offset_range, trace.points.shape[2:4], config.convention)
    y, x = limit * pixels_per_unit(trace.x.shape[2:], config.convention)
    return float(y), float(x)


# ------------------------------------------------------------------------------------------------ the command


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.scene and (options.place or options.photo):
        raise ConfigError("--scene: expected no PHOTO and no --place with it")
    request = None if options.scene or options.place else read_request(options)  # raises before any output
    sightings = look_at_objects(options)
    results: dict[str, Any] = {}
    if sightings:
        make_folder(options.out)
        figures = spot.draw(sightings, options.out)
        results["trained"] = {"model": NETWORK, "pictures": [spot.facts(each) for each in sightings]}
        results["trained"]["figures"] = [str(path) for path in figures]
        if not options.json:
            print(f"{spot.text(sightings)}\n")
            print("\n".join(str(path) for path in figures))
    if request is not None:
        if sightings and not options.json:
            print()
        results |= explain_photo(request, options)
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


def look_at_objects(options: argparse.Namespace) -> list[spot.Sighting]:
    """Run the trained network: on a photograph with placed objects, on chosen scenes, or by default on six scenes."""
    if options.place:
        photo = load_photo(options.photo)
        return [spot.look_at_photo(_name(options), photo, options.place, options.seed)]
    if options.scene:
        return [spot.look_at_scene(number) for number in options.scene]
    by_default = options.photo is None and options.model == DEFAULT_MODEL
    by_default = by_default and options.checkpoint is None and options.prefix is None
    return [spot.look_at_scene(number) for number in spot.SCENES] if by_default else []


def _name(options: argparse.Namespace) -> str:
    return "the photograph that ships" if options.photo is None else str(options.photo)


class Request(NamedTuple):
    """Checked input of a run on a photograph."""

    photo: Array  # (H, W, 3) in [0, 1]
    queries: list[tuple[float, float]]  # y, x in pixels of the photograph
    image_size: Cell
    backend: str
    model: DAT
    weights: str  # a line for people


def read_request(options: argparse.Namespace) -> Request:
    """Read and check everything that a run on a photograph needs.

    Raises:
        ConfigError: for an option, a photograph or a folder that cannot be used.
    """
    photo = load_photo(options.photo)
    height, width = photo.shape[:2]
    queries = options.query or default_queries((height, width))
    image_size = input_size((height, width), options.size)
    check_request(preset(options.model), options.stage, image_size, (height, width), queries)
    backend = choose_backend(options.backend)
    config, params, weights = select_weights(options)
    if options.checkpoint is None:
        weights += ": the figures show the geometry only"
    make_folder(options.out)
    return Request(photo, queries, image_size, backend, DAT(config, params), weights)


def explain_photo(request: Request, options: argparse.Namespace) -> dict[str, Any]:
    """Run a backbone on a photograph, print its blocks, write its figures, and return the results."""
    photo, queries, image_size, backend, model, weights = request
    height, width = photo.shape[:2]
    image = normalise(resize(photo, image_size))

    start = time.perf_counter()
    explanation = explain(
        _with_progress(walk(model, image, backend), model.config, options.json), model.config, options.stage
    )
    seconds = time.perf_counter() - start
    cells = [_query_cell(query, (height, width), explanation.trace.x.shape[2:]) for query in queries]
    figures = draw(explanation, _limit_size(photo), cells, options.stage, options.out)
    if not options.json:
        sizes = f"{height}×{width} resized to {image_size[0]}×{image_size[1]}"
        print(f"{options.model} on {_name(options)}, {sizes}, {backend}, {seconds:.1f} s")
        print(f"{weights}\n")
        print(table(explanation.reports))
        print("\noffsets: in pixels of the block's map; at bound: share of offset components at their bound;")
        print("outside: share of sampling points outside the map\n")
        print("\n".join(str(path) for path in figures))
    return {
        "model": options.model,
        "backend": backend,
        "weights": weights,
        "photograph": _name(options),
        "photograph_size": [height, width],
        "image_size": list(image_size),
        "seconds": seconds,
        "blocks": [asdict(report) for report in explanation.reports],
        "figures": [str(path) for path in figures],
    }


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


def _limit_size(photo: Array) -> Array:
    """Return the photograph no larger than figures can show."""
    height, width = photo.shape[:2]
    factor = min(PICTURE_SIDE / min(height, width), 1.0)
    return photo if factor == 1.0 else resize(photo, (max(round(height * factor), 1), max(round(width * factor), 1)))
