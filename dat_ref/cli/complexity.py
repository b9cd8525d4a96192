"""``dat-ref complexity``: cost of a backbone, term by term, and growth of each attention's cost with the image."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import ConfigError, DATConfig
from .. import config as preset
from ..complexity import (
    PUBLISHED,
    BackboneCost,
    BlockCost,
    Curve,
    Published,
    Term,
    backbone_cost,
    curves,
    doubling,
    total,
)
from ..complexity.curves import keys_at
from ..config import DeformableAttentionConfig
from ..peers.matching import REPLACEMENTS, replace_attention, resolve_kind
from ..presets import PRESETS
from ..state_files import atomic_write
from .output import HelpFormatter, make_folder
from .photo import parse_size

LARGEST_SIDE = 4096  # of an image in the curves, in pixels
MIN_SIDE, MAX_SIDE = 32, 65536  # of an image on the command line, in pixels
DEFAULT_FOLDER = Path("complexity")

Size = tuple[int, int]


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "complexity",
        help="count parameters, multiply-adds, gathers and memory",
        description="Print the cost of a backbone, term by term, next to the numbers of the papers, and plot the "
        "growth of each attention's cost with the image.",
        epilog="example:\n  dat-ref complexity --model dat_small --size 512x768 --json",
        formatter_class=HelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="dat_tiny",
        choices=PRESETS,
        metavar="NAME",
        help="preset, such as dat_small (default: dat_tiny)",
    )
    model.add_argument(
        "--size", type=parse_size, metavar="S", help="image size in pixels, S or HxW (default: the size of the preset)"
    )
    model.add_argument(
        "--attention",
        type=resolve_kind,
        choices=REPLACEMENTS,
        metavar="NAME",
        help=f"attention that replaces deformable attention, with as many keys: {', '.join(REPLACEMENTS)}",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for the figure, which needs matplotlib (default: {DEFAULT_FOLDER})",
    )
    output.add_argument("--json", action="store_true", help="print JSON with exact integers (default: tables)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    can_draw = _matplotlib_is_installed()
    if options.out is not None and not can_draw:
        raise ConfigError("--out: matplotlib is needed to draw the figure: pip install 'dat-ref[viz]'")
    reference = PUBLISHED.get(options.model)
    original = preset(options.model)
    size = _image_size(options.size or (original.image_size if reference is None else reference.side))
    config = original if options.attention is None else replace_attention(original, options.attention)
    cost = backbone_cost(1, size, config)
    comparable = options.attention is None and reference is not None and size == (reference.side, reference.side)
    published = reference if comparable else None
    growth_curves = _curves(original)
    figure = _draw(growth_curves, options) if can_draw else None

    if options.json:
        print(json.dumps(_report(cost, options, published, growth_curves, figure), indent=2))
    else:
        print(f"{_title(options)} on one image of {size[0]}×{size[1]}, float32\n")
        print(table(cost))
        print("\nM: 10⁶ elements or multiply-adds; MB: 10⁶ bytes. multiply-adds: matrix products and convolutions;")
        print("interpolating: bilinear sampling, which the papers do not count; gathers: data-dependent reads;")
        print("saved: for the backward pass; peak: most memory in use at once, one block after the other\n")
        print(verdict(cost, published))
        if figure is not None:
            print(f"\n{figure}")
    if figure is None:
        print("no figure: matplotlib is needed to draw it: pip install 'dat-ref[viz]'", file=sys.stderr)
    return 0


def _matplotlib_is_installed() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _image_size(size: Size | int) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < MIN_SIDE:
        raise ConfigError(f"--size: expected at least {MIN_SIDE} pixels on each side, got {height}×{width}")
    if max(height, width) > MAX_SIDE:
        raise ConfigError(f"--size: expected at most {MAX_SIDE} pixels on each side")
    return height, width


def _title(options: argparse.Namespace) -> str:
    replacement = "" if options.attention is None else f" with {options.attention} attention for deformable"
    return f"{options.model}{replacement}"


# ------------------------------------------------------------------------------------------------ the table

Row = tuple[str, ...]
HEADER: Row = ("", "map", "parameters", "multiply-adds", "interpolating", "gathers", "saved", "peak")


def table(cost: BackboneCost) -> str:
    """Return the cost as text: parts in execution order, equal blocks of a stage in one row, and sums."""
    rows: list[Row] = [HEADER]
    stage = 0
    for part, times in _merge_repeats(cost.parts):
        if part.stage > stage:
            rows += [(), (f"stage {part.stage}",)]
            stage = part.stage
        elif part.stage == 0:
            rows.append(())
        part_total = total([part.total] * times)
        name = part.kind.replace("_", " ") + (f" ×{times}" if times > 1 else "")
        map_size = "{}×{}".format(*part.size)
        rows.append((f"  {name}", map_size, *_format_amounts(part_total), _megabytes(part.peak)))
        if len(part.terms) > 1:
            rows += [
                (f"    {term}", "", *_format_amounts(total([amount] * times))) for term, amount in part.terms.items()
            ]
    rows += [(), ("all, by term",)]
    rows += [(f"    {term}", "", *_format_amounts(amount)) for term, amount in cost.terms.items()]
    rows += [("all", "{}×{}".format(*cost.image_size), *_format_amounts(cost.total), _megabytes(cost.peak))]
    return _align_columns(rows)


def _merge_repeats(parts: Iterable[BlockCost]) -> list[tuple[BlockCost, int]]:
    """Return the parts without repetitions, each with its number of occurrences in its stage."""
    times: dict[str, tuple[BlockCost, int]] = {}
    for part in parts:
        key = repr(replace(part, block=0))
        times[key] = (part, times.get(key, (part, 0))[1] + 1)
    return list(times.values())


def _format_amounts(term: Term) -> Row:
    return (
        _millions(term.parameters),
        _millions(term.products),
        _millions(term.interpolated),
        _millions(term.gathers),
        _megabytes(term.saved_bytes),
    )


def _millions(amount: int) -> str:
    return f"{amount / 1e6:,.3f} M" if amount else "·"


def _megabytes(amount: int) -> str:
    return f"{amount / 1e6:,.2f} MB" if amount else "·"


def _align_columns(rows: list[Row]) -> str:
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(len(HEADER))]
    lines = []
    for row in rows:
        name, *numbers = row or ("",)
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def verdict(cost: BackboneCost, published: Published | None) -> str:
    """Return one line with the totals, and with the paper's numbers if it has them."""
    summary = f"{cost.total.parameters / 1e6:.2f} M parameters, {cost.total.products / 1e9:.3f} G multiply-adds"
    if published is None:
        return summary
    return f"{summary} (published: {published.parameters} M, {published.macs} G)"


# ------------------------------------------------------------------------------------------------ the figure


def _layer(config: DATConfig) -> tuple[DeformableAttentionConfig, int]:
    """Return the deformable layer for the curves, and the index of its stage.

    It is the last deformable layer of the third stage, or of the last stage with one. It gets stride 2, the setting of
    the paper. With the released stride 1, it has a key for every pixel.
    """
    layers = {
        stage: block.attention
        for stage, blocks in enumerate(config.stages)
        for block in blocks
        if isinstance(block.attention, DeformableAttentionConfig)
    }
    stage = 2 if 2 in layers else max(layers)
    return replace(layers[stage], stride=2), stage


def _curves(config: DATConfig) -> list[Curve]:
    layer, stage = _layer(config)
    first = 14
    times = (LARGEST_SIDE // (first * config.reductions[stage])).bit_length() - 1
    return curves(layer, doubling(first, times))


def _draw(growth_curves: list[Curve], options: argparse.Namespace) -> Path:
    """Draw the figure and return its path. A failed write leaves no partial file and no new folder."""
    from ..viz.cost import draw_cost, save

    config = preset(options.model)
    layer, stage = _layer(config)
    label = f"One layer of {options.model}, stage {stage + 1} (C = {layer.dim}, {layer.heads} heads)"
    figure = draw_cost(
        growth_curves,
        reduction=config.reductions[stage],
        label=label,
        keys=keys_at(layer, growth_curves[0].sides[0]),
    )
    folder: Path = DEFAULT_FOLDER if options.out is None else options.out
    make_folder(folder)
    path = folder / f"{options.model}_growth.png"
    with atomic_write(path, suffix=".png") as partial:
        save(figure, partial)
    return path


# ------------------------------------------------------------------------------------------------ JSON


def _report(
    cost: BackboneCost,
    options: argparse.Namespace,
    published: Published | None,
    growth_curves: list[Curve],
    figure: Path | None,
) -> dict[str, Any]:
    return {
        "model": options.model,
        "attention": options.attention or "deformable",
        "image_size": list(cost.image_size),
        "batch": cost.batch,
        "total": _to_json(cost.total),
        "peak": cost.peak,
        "published": None if published is None else published._asdict(),
        "terms": {name: _to_json(term) for name, term in cost.terms.items()},
        "parts": [
            {
                "stage": part.stage,
                "block": part.block,
                "kind": part.kind,
                "map_size": list(part.size),
                "peak": part.peak,
                "terms": {name: _to_json(term) for name, term in part.terms.items()},
            }
            for part in cost.parts
        ],
        "curves": [asdict(curve) for curve in growth_curves],
        "figures": [] if figure is None else [str(figure)],
    }


def _to_json(term: Term) -> dict[str, int]:
    return {**asdict(term), "products": term.products}
