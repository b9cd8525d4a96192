"""Claims about geometry: reference points, range of the offsets, displacements that the bias table covers."""

from __future__ import annotations

import numpy as np

from .._checks import Array
from ..config import DeformableAttentionConfig, OffsetBound
from ..conventions import Convention
from ..ops.bias import table_positions
from ..ops.grid import pixels_per_unit, reference_points
from ..ops.offsets import bound_offsets
from ..presets import PRESETS
from .claim import HOLDS, REFUTED, Claim, Figure, Figures, Source, SourceAccess, Verdict, holds_if

SIDE = 14  # side of the map: stage 3 at 224²
RANGE = 2.0  # s in every configuration with a tanh bound
MODULE = "DAT article, the paragraph on the deformable attention module"


def _names(conventions: list[Convention]) -> str:
    return ", ".join(convention.name for convention in conventions) or "none"


# ------------------------------------------------------------------------------------------------ reference points


def measure_references() -> Figures:
    """Compute the normalized coordinates of the first and the last of 7 × 7 reference points."""
    figures: dict[str, Figure] = {}
    inside, corners = [], []
    for convention in Convention:
        points = reference_points((7, 7), convention)
        first, last = float(points[0, 0, 0]), float(points[-1, -1, 0])
        figures[convention.name] = Figure(f"{first:+.4f} to {last:+.4f}", f"{convention.name}: 7 points on an axis")
        if np.abs(points).max() <= 1:
            inside.append(convention)
        if (first, last) == (-1, 1):
            corners.append(convention)
    figures["inside"] = Figure(_names(inside), "all points in [-1, 1]")
    figures["corners"] = Figure(_names(corners), "corners at ±1")
    both = [convention for convention in inside if convention in corners]
    figures["both"] = Figure(_names(both), "both")
    return figures


def judge_references(figures: Figures) -> Verdict:
    """Verdict: holds for the conventions with all points in [-1, 1] and corners at ±1."""
    if figures["both"].value == _names(list(Convention)):
        return HOLDS
    return REFUTED if figures["both"].value == "none" else holds_if(f"the convention is {figures['both']}")


# ------------------------------------------------------------------------------------------------ the offset's range


def _bounded_points(convention: Convention, bound: OffsetBound, offset_range: float = RANGE) -> tuple[Array, Array]:
    """Return the reference points of a 14 × 14 key grid, and the farthest points (2, 14, 14, 2), low and high.

    All coordinates are normalized.
    """
    reference = reference_points((SIDE, SIDE), convention)
    saturated = np.stack([np.full_like(reference, sign * 50.0) for sign in (-1, 1)])
    limits = {"offset_range": offset_range, "convention": convention}
    return reference, bound_offsets(saturated, reference, bound, **limits)[1]  # type: ignore[arg-type]


def measure_range() -> Figures:
    """Measure the width of the region that a point can reach with s = 2, in pixels and in spacings of the key grid."""
    figures: dict[str, Figure] = {}
    matching = []
    for convention in Convention:
        per_unit = float(pixels_per_unit((SIDE, SIDE), convention)[0])
        _, points = _bounded_points(convention, OffsetBound.TANH_CELLS)
        width = float((points[1] - points[0]).max()) * per_unit
        spacing = convention.reference.pitch(SIDE) * per_unit
        figures[convention.name] = Figure(width, f"{convention.name}: width for s = 2", "pixels", digits=4)
        if np.isclose(width / spacing, RANGE, rtol=1e-12):
            matching.append(convention)
    literal = 2 * RANGE * float(pixels_per_unit((SIDE, SIDE), Convention.PAPER)[0])
    datpp_bounds = {
        block.attention.offset_bound.name
        for name, config in PRESETS.items()
        for blocks in config.stages
        for block in blocks
        if name.startswith("dat_pp") and isinstance(block.attention, DeformableAttentionConfig)
    }
    figures["as_wide"] = Figure(_names(matching), "width of exactly s spacings of the key grid")
    figures["literal"] = Figure(
        literal, "width if s·tanh were in normalized coordinates, as in the formula of the text", "pixels"
    )
    figures["latest"] = Figure(", ".join(sorted(datpp_bounds)), "bound in the released DAT++ configurations")
    return figures


def judge_range(figures: Figures) -> Verdict:
    """Verdict: holds if s counts spacings of the key grid; in normalized coordinates the region exceeds the map."""
    if figures["as_wide"].value != _names(list(Convention)):
        return REFUTED
    if float(figures["literal"].value) <= RANGE and OffsetBound.TANH_CELLS.name in str(figures["latest"].value):
        return HOLDS
    return holds_if("s counts spacings of the key grid and the bound is a tanh (released DAT++ has no tanh)")


# ------------------------------------------------------------------------------------------------ the table


def _table_covers(convention: Convention, bound: OffsetBound) -> bool:
    """Return True if a (2H-1) × (2W-1) table contains the displacement of every query and every possible point."""
    _, points = _bounded_points(convention, bound)
    table = (2 * SIDE - 1, 2 * SIDE - 1)
    positions = table_positions(points.reshape(2, 1, -1, 2), table, (SIDE, SIDE), convention)
    tolerance = 1e-9
    return bool(positions.min() >= -tolerance and positions.max() <= table[0] - 1 + tolerance)


def measure_table() -> Figures:
    """Find the conventions and bounds that keep all displacements inside the table: 14 × 14 map, stride 1."""
    figures: dict[str, Figure] = {}
    bounds = {
        "fixed": (OffsetBound.NONE, "no offsets"),
        "tanh": (OffsetBound.TANH_CELLS, "s·tanh with s = 2"),
        "clamp": (OffsetBound.CLAMP, "clamped to [-1, 1]"),
    }
    for key, (bound, label) in bounds.items():
        covered = [convention for convention in Convention if _table_covers(convention, bound)]
        figures[key] = Figure(_names(covered), f"covered: {label}")
    _, points = _bounded_points(Convention.PAPER, OffsetBound.TANH_CELLS)
    positions = table_positions(
        points.reshape(2, 1, -1, 2), (2 * SIDE - 1, 2 * SIDE - 1), (SIDE, SIDE), Convention.PAPER
    )
    overshoot = float(-positions.min())
    figures["beyond"] = Figure(overshoot, "largest distance outside the table, the article's text with s = 2", "cells")
    return figures


def judge_table(figures: Figures) -> Verdict:
    """Verdict: holds if all displacements are covered; conditional if they are in both released configurations."""
    everywhere = _names(list(Convention))
    if all(figures[key].value == everywhere for key in ("fixed", "tanh", "clamp")):
        return HOLDS
    released = "CVPR2022" in str(figures["tanh"].value) and "DATPP2023" in str(figures["clamp"].value)
    if figures["fixed"].value == everywhere and released:
        return holds_if("no point is more than H - 1 pixels from a query, as in both released configurations")
    return REFUTED


CLAIMS = (
    Claim(
        number=8,
        title="Reference points are in [-1, 1], corners at ±1",
        statement=(
            "Reference points are evenly spaced from (0, 0) to (H_G - 1, W_G - 1) and normalized to [-1, 1]: (-1, "
            "-1) is the top left corner, (+1, +1) the bottom right one."
        ),
        sources=(
            Source(MODULE, SourceAccess.QUOTED),
            Source("DAT article, figure 2, which draws cell centers instead", SourceAccess.COPIED),
            Source("code of both releases", SourceAccess.READ),
        ),
        measure=measure_references,
        judge=judge_references,
        verdict=holds_if("the convention is PAPER"),
        reason=(
            "This holds for {corners} only. In the 2022 code ({CVPR2022}), as in figure 2, the outermost points are "
            "half a cell inside the map. In the 2023 code ({DATPP2023}) points are outside the interval, and its clamp "
            "moves them back. So there are three grids: in the text, in the figure and the 2022 code, and in the 2023 "
            "code."
        ),
    ),
    Claim(
        number=9,
        title="s bounds the offset to an s × s region",
        statement="Offsets are scaled by s·tanh, so that each reference point covers a local region of s × s.",
        sources=(
            Source("DAT article, the paragraphs on the module and on offset generation", SourceAccess.QUOTED),
            Source("code of both releases", SourceAccess.READ),
        ),
        measure=measure_range,
        judge=judge_range,
        verdict=holds_if("s counts spacings of the key grid and the bound is a tanh (released DAT++ has no tanh)"),
        reason=(
            "With s = 2 on a 14 × 14 map a point can move in a region {CELL_CENTER} pixels wide (CELL_CENTER), {PAPER} "
            "(PAPER), {CVPR2022} (CVPR2022, with a spacing of 13/14 pixels) or {DATPP2023} (DATPP2023, if s is used): "
            "always s spacings of the key grid. In normalized coordinates, as in the formula, s·tanh would span "
            "{literal} pixels, twice the map. The released DAT++ configurations have no s; their bound is {latest}."
        ),
    ),
    Claim(
        number=12,
        title="A (2H-1) × (2W-1) table covers all displacements",
        statement=(
            "Keys have continuous positions. A table of (2H-1) × (2W-1) entries, sampled bilinearly, covers every "
            "displacement."
        ),
        sources=(Source("DAT article, the paragraph on the deformable relative position bias", SourceAccess.QUOTED),),
        measure=measure_table,
        judge=judge_table,
        verdict=holds_if("no point is more than H - 1 pixels from a query, as in both released configurations"),
        reason=(
            "The table covers all displacements for these conventions: without offsets {fixed}; with s·tanh and s = 2 "
            "{tanh}, whose contracted query grid compensates exactly for the offset; with a clamp {clamp}. In the "
            "article's geometry with s = 2, displacements exceed the table by {beyond} cell on each side. There the "
            "bias decreases to zero, as outside a map."
        ),
    ),
)
