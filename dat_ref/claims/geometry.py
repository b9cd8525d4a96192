"""Claims about geometry: where reference points lie, how far an offset reaches, what the bias table covers."""

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

SIDE = 14  # of the map: stage 3 at 224²
RANGE = 2.0  # s, in every configuration that has one
MODULE = "DAT article, the paragraph on the deformable attention module"


def _names(conventions: list[Convention]) -> str:
    return ", ".join(convention.name for convention in conventions) or "none"


# ------------------------------------------------------------------------------------------------ reference points


def measure_references() -> Figures:
    """Where the first and the last of 7 × 7 reference points lie, normalised."""
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
    """Holds for the conventions that do both."""
    if figures["both"].value == _names(list(Convention)):
        return HOLDS
    return REFUTED if figures["both"].value == "none" else holds_if(f"the convention is {figures['both']}")


# ------------------------------------------------------------------------------------------------ the offset's range


def _bounded_points(convention: Convention, bound: OffsetBound, offset_range: float = RANGE) -> tuple[Array, Array]:
    """Return the references and the farthest points (low, high) of a 14 × 14 key grid, normalised.

    The points are (2, 14, 14, 2).
    """
    reference = reference_points((SIDE, SIDE), convention)
    saturated = np.stack([np.full_like(reference, sign * 50.0) for sign in (-1, 1)])
    limits = {"offset_range": offset_range, "convention": convention}
    return reference, bound_offsets(saturated, reference, bound, **limits)[1]  # type: ignore[arg-type]


def measure_range() -> Figures:
    """How wide a region s = 2 leaves to a point on a 14 × 14 map, in pixels and in spacings of the key grid."""
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
    figures["as_wide"] = Figure(_names(matching), "exactly s spacings of the key grid wide")
    figures["literal"] = Figure(
        literal, "width if s·tanh were normalised coordinates, as the text's formula reads", "pixels"
    )
    figures["latest"] = Figure(", ".join(sorted(datpp_bounds)), "bound in the released DAT++ configurations")
    return figures


def judge_range(figures: Figures) -> Verdict:
    """Holds if s counts spacings of the key grid; read as normalised coordinates, the region exceeds the map."""
    if figures["as_wide"].value != _names(list(Convention)):
        return REFUTED
    if float(figures["literal"].value) <= RANGE and OffsetBound.TANH_CELLS.name in str(figures["latest"].value):
        return HOLDS
    return holds_if("s counts spacings of the key grid, and there is a tanh (DAT++ as released has none)")


# ------------------------------------------------------------------------------------------------ the table


def _table_covers(convention: Convention, bound: OffsetBound) -> bool:
    """Whether every query finds the displacement of every possible point inside a (2H-1) × (2W-1) table."""
    _, points = _bounded_points(convention, bound)
    table = (2 * SIDE - 1, 2 * SIDE - 1)
    positions = table_positions(points.reshape(2, 1, -1, 2), table, (SIDE, SIDE), convention)
    tolerance = 1e-9
    return bool(positions.min() >= -tolerance and positions.max() <= table[0] - 1 + tolerance)


def measure_table() -> Figures:
    """Which conventions and bounds keep all displacements inside the table, on a 14 × 14 map at stride 1."""
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
    figures["beyond"] = Figure(overshoot, "farthest beyond the table, the article's text with s = 2", "cells")
    return figures


def judge_table(figures: Figures) -> Verdict:
    """Covered everywhere, or for the two releases as they are configured, or not."""
    everywhere = _names(list(Convention))
    if all(figures[key].value == everywhere for key in ("fixed", "tanh", "clamp")):
        return HOLDS
    released = "CVPR2022" in str(figures["tanh"].value) and "DATPP2023" in str(figures["clamp"].value)
    if figures["fixed"].value == everywhere and released:
        return holds_if("no point lies more than H - 1 pixels from a query, as in both releases as configured")
    return REFUTED


CLAIMS = (
    Claim(
        number=8,
        title="Reference points lie in [-1, 1], corners at ±1",
        statement=(
            "Reference points are evenly spaced from (0, 0) to (H_G - 1, W_G - 1) and normalised to [-1, 1]: (-1, "
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
            "It is so for {corners} alone. The 2022 code ({CVPR2022}) and the cell centers of figure 2 stay half a "
            "cell inside; the 2023 code ({DATPP2023}) goes out of the interval and relies on its clamp. That makes "
            "three grids: the text's, the figure's and the 2022 code's, and the 2023 code's."
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
        verdict=holds_if("s counts spacings of the key grid, and there is a tanh (DAT++ as released has none)"),
        reason=(
            "With s = 2 on a 14 × 14 map a point can move within {CELL_CENTER} pixels (CELL_CENTER), {PAPER} "
            "(PAPER), {CVPR2022} (CVPR2022, whose spacing is 13/14 pixels) or {DATPP2023} (DATPP2023, where s is "
            "used): s spacings of the key grid each. Taken to the letter, as normalised coordinates, s·tanh would "
            "span {literal} pixels, twice the map. The released DAT++ configurations have no s; their bound is "
            "{latest}."
        ),
    ),
    Claim(
        number=12,
        title="A (2H-1) × (2W-1) table covers all displacements",
        statement=(
            "Keys lie at continuous positions, and a table of (2H-1) × (2W-1), read bilinearly, covers every "
            "displacement."
        ),
        sources=(Source("DAT article, the paragraph on the deformable relative position bias", SourceAccess.QUOTED),),
        measure=measure_table,
        judge=judge_table,
        verdict=holds_if("no point lies more than H - 1 pixels from a query, as in both releases as configured"),
        reason=(
            "Without offsets the table covers {fixed}. With s·tanh and s = 2 it covers {tanh}, where contracted "
            "queries make up for the offset to the digit; with a clamp {clamp}. The article's own geometry with s = "
            "2 runs {beyond} cell over each edge, where the bias fades to zero as it does outside a map."
        ),
    ),
)
