"""``dat-ref complexity``: what a backbone costs, term by term, and how each attention's cost grows with the image."""

from __future__ import annotations

import argparse
import json
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
from .explain import make_folder
from .photo import parse_size

LARGEST_SIDE = 4096  # pixels of an image in the curves

Size = tuple[int, int]


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "complexity",
        help="count parameters, multiply-adds, gathers and memory",
        description="What a backbone costs, term by term, beside what the articles print; "
        "and, as a figure, how the cost of each attention grows with the image.",
    )
    parser.add_argument("--model", default="dat_tiny", choices=PRESETS, metavar="NAME", help="preset (dat_tiny)")
    parser.add_argument(
        "--size", type=parse_size, metavar="S", help="side of the image, or HxW (what the article's figure is for)"
    )
    parser.add_argument(
        "--attention",
        type=resolve_kind,
        choices=REPLACEMENTS,
        metavar="NAME",
        help=f"in the place of the deformable layers, matched in keys: {', '.join(REPLACEMENTS)}",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("complexity"), metavar="DIR", help="folder for the figure (complexity)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with exact integers, instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    reference = PUBLISHED[options.model]
    size = _image_size(options.size or reference.side)
    original = preset(options.model)
    config = original if options.attention is None else replace_attention(original, options.attention)
    cost = backbone_cost(1, size, config)
    comparable = options.attention is None and size == (reference.side, reference.side)
    published = reference if comparable else None
    make_folder(options.out)
    growth_curves = _curves(original)
    figure = _draw(growth_curves, options)

    if options.json:
        print(json.dumps(_report(cost, options, published, growth_curves, figure), indent=2))
        return 0
    print(f"{_title(options)} on one image of {size[0]}×{size[1]}, float32\n")
    print(table(cost))
    print("\nM: 10⁶ numbers or multiply-adds; MB: 10⁶ bytes. multiply-adds: of matrix products and convolutions;")
    print("interpolating: of bilinear sampling, which the articles leave out; gathers: values read where the data say;")
    print("kept: what the backward needs; peak: the most that is held at once, one block after the other\n")
    print(verdict(cost, published))
    print(f"\n{figure}")
    return 0


def _image_size(size: Size | int) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 32:
        raise ConfigError(f"--size: expected at least 32 pixels on each side, got {height}×{width}")
    return height, width


def _title(options: argparse.Namespace) -> str:
    replacement = "" if options.attention is None else f" with {options.attention} attention for deformable"
    return f"{options.model}{replacement}"


# ------------------------------------------------------------------------------------------------ the table

Row = tuple[str, ...]
HEADER: Row = ("", "map", "parameters", "multiply-adds", "interpolating", "gathers", "kept", "peak")


def table(cost: BackboneCost) -> str:
    """Return the cost as text: parts in the order in which they run, equal blocks of a stage as one, and sums."""
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
    """Return the parts without repetitions, and how often each occurs in its stage."""
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
    """Return one line with the totals, beside the article's where it has any."""
    summary = f"{cost.total.parameters / 1e6:.2f} M parameters, {cost.total.products / 1e9:.3f} G multiply-adds"
    if published is None:
        return summary
    return f"{summary} (the article: {published.parameters} M, {published.macs} G)"


# ------------------------------------------------------------------------------------------------ the figure


def _layer(config: DATConfig) -> tuple[DeformableAttentionConfig, int]:
    """Return the deformable layer whose cost is drawn, the last of the third stage, with the stride of its map.

    It gets stride 2, the article's own setting: released with stride 1, it has a key for every pixel.
    """
    layers = [block.attention for block in config.stages[2] if isinstance(block.attention, DeformableAttentionConfig)]
    return replace(layers[-1], stride=2), config.reductions[2]


def _curves(config: DATConfig) -> list[Curve]:
    layer, reduction = _layer(config)
    first = 14
    times = (LARGEST_SIDE // (first * reduction)).bit_length() - 1
    return curves(layer, doubling(first, times))


def _draw(growth_curves: list[Curve], options: argparse.Namespace) -> Path:
    try:
        from ..viz.cost import draw_cost, save
    except ImportError as error:
        raise ConfigError("matplotlib is needed to draw the curves: pip install 'dat-ref[viz]'") from error
    layer, reduction = _layer(preset(options.model))
    label = f"One layer of {options.model}, stage 3 (C = {layer.dim}, {layer.heads} heads)"
    figure = draw_cost(growth_curves, reduction=reduction, label=label, keys=keys_at(layer, growth_curves[0].sides[0]))
    return save(figure, options.out / f"{options.model}_growth.png")


# ------------------------------------------------------------------------------------------------ JSON


def _report(
    cost: BackboneCost,
    options: argparse.Namespace,
    published: Published | None,
    growth_curves: list[Curve],
    figure: Path,
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
        "figures": [str(figure)],
    }


def _to_json(term: Term) -> dict[str, int]:
    return {**asdict(term), "products": term.products}
