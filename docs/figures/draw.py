"""Draw the site's diagrams and the tables of released names, all from numbers of the spec.

    python docs/figures/draw.py

writes the files into this folder; a test fails if they differ from the output of this script. The pages include the
SVG as text, so that its colors follow the page: currentColor, and --fig-blue, --fig-orange, --fig-green.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from dat_ref import Convention, OffsetBound, config, official
from dat_ref.backbone import dat_shapes
from dat_ref.ops.bias import table_positions
from dat_ref.ops.grid import reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets
from dat_ref.params import flatten

Rows = tuple[Sequence[float], Sequence[float], Sequence[float]]  # points, targets, the numbers below them
FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN = "var(--fig-blue, #0072b2)", "var(--fig-orange, #d55e00)", "var(--fig-green, #009e73)"
RELEASED_BOUND = {Convention.DATPP2023: OffsetBound.CLAMP}

# ------------------------------------------------------------------------------------------------ SVG, line by line


def svg(width: int, height: int, title: str, body: Sequence[str]) -> str:
    """Return an SVG document with an accessible title."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{title}" font-family="inherit" font-size="13" fill="currentColor">'
    )
    return "\n".join([head, f"<title>{title}</title>", *body, "</svg>"]) + "\n"


def text(
    x: float,
    y: float,
    label: str,
    *,
    anchor: str = "middle",
    size: float = 13,
    opacity: float = 1,
    attributes: str = "",
) -> str:
    """Return a text element."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}" fill-opacity="{opacity:g}"{attributes}>'
        f"{label}</text>"
    )


def sub(letter: str) -> str:
    """Return a subscript inside a text element."""
    return f"<tspan dy='4' font-size='10'>{letter}</tspan>"


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    *,
    color: str = "currentColor",
    width: float = 1,
    opacity: float = 1,
) -> str:
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="{width:g}" '
        f'stroke-opacity="{opacity:g}"/>'
    )


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    color: str = "currentColor",
    fill: float = 0,
    opacity: float = 1,
    radius: float = 0,
) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{color}" '
        f'fill-opacity="{fill:g}" stroke="{color}" stroke-opacity="{opacity:g}"/>'
    )


def circle(x: float, y: float, radius: float, *, color: str = "currentColor", opacity: float = 1) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{color}" fill-opacity="{opacity:g}"/>'


def arrow(points: Sequence[tuple[float, float]], color: str = "currentColor") -> list[str]:
    """Draw a polyline along the axes with an arrowhead on its last segment."""
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = np.sign(x1 - x0), np.sign(y1 - y0)
    shaft_end = (x1 - 7 * dx, y1 - 7 * dy)
    path = " ".join(f"{x:g},{y:g}" for x, y in [*points[:-1], shaft_end])
    sides = [(shaft_end[0] - 4 * dy, shaft_end[1] - 4 * dx), (shaft_end[0] + 4 * dy, shaft_end[1] + 4 * dx)]
    head = " ".join(f"{x:g},{y:g}" for x, y in [(x1, y1), *sides])
    return [
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>',
        f'<polygon points="{head}" fill="{color}"/>',
    ]


def box(
    x: float, y: float, width: float, height: float, lines: Sequence[str], color: str = "currentColor"
) -> list[str]:
    """Draw a rounded box around (x, y); the first line of its text is in the color."""
    elements = [rect(x - width / 2, y - height / 2, width, height, color=color, fill=0.07, opacity=0.75, radius=5)]
    for index, label in enumerate(lines):
        baseline = y + 18 * (index - (len(lines) - 1) / 2) + 4.5
        elements.append(text(x, baseline, label, size=13 if index == 0 else 11, opacity=1 if index == 0 else 0.75))
    return elements


# ------------------------------------------------------------------------------------------------ one layer


def layer_flow() -> str:
    """Draw the data flow of one layer: blue steps determine positions, orange steps sample features."""
    top, middle, low = 44, 140, 236
    body = [
        text(26, top - 2, "x", size=17, attributes=' font-style="italic"'),
        text(28, top + 16, "C × H × W", size=10, opacity=0.7),
        *arrow([(42, top - 5), (88, top - 5)]),
        *box(112, top - 5, 46, 34, ["W" + sub("q")]),
        line(136, top - 5, 170, top - 5, width=1.6),
        text(184, top, "q", size=17, attributes=' font-style="italic"'),
        *arrow([(198, top - 5), (708, top - 5)]),
        # positions
        *arrow([(184, top + 12), (184, middle - 25)], BLUE),
        *box(184, middle, 126, 48, ["offset network θ", "one for all groups"], BLUE),
        *arrow([(248, middle), (322, middle)], BLUE),
        text(283, middle - 8, "Δ", size=15, attributes=' font-style="italic"'),
        *box(388, middle, 130, 48, ["bound, add to p", "p: reference grid"], BLUE),
        *arrow([(454, middle), (540, middle)], BLUE),
        text(494, middle - 8, "p̃", size=15, attributes=' font-style="italic"'),
        text(494, middle + 17, "G × Ns × 2", size=10, opacity=0.7),
        *box(610, middle, 140, 48, ["read the bias table", "at q − p̃, bilinear"], BLUE),
        *arrow([(681, middle), (708, middle)], BLUE),
        # features
        *arrow([(26, top + 24), (26, low), (322, low)], ORANGE),
        *arrow([(388, middle + 25), (388, low - 25)], BLUE),
        text(402, (middle + low) / 2 + 5, "p̃", size=15, attributes=' font-style="italic"'),
        *box(388, low, 130, 48, ["sample x at p̃", "bilinear φ"], ORANGE),
        *arrow([(454, low), (540, low)], ORANGE),
        text(494, low - 8, "x̃", size=15, attributes=' font-style="italic"'),
        text(494, low + 17, "C × Ns", size=10, opacity=0.7),
        *box(
            610,
            low,
            140,
            48,
            [
                f"W{sub('k')}<tspan dy='-4'>, W</tspan>{sub('v')}",
                "keys k̃, values ṽ",
            ],
            ORANGE,
        ),
        *arrow([(681, low), (708, low)], ORANGE),
        # attention
        *box(776, middle, 134, 240, ["attention"], GREEN),
        text(776, middle + 24, "softmax(q k̃ᵀ/√d + B) ṽ", size=10.5, opacity=0.8),
        *arrow([(844, middle), (866, middle)]),
        *box(890, middle, 46, 34, ["W" + sub("o")]),
        *arrow([(914, middle), (936, middle)]),
        text(950, middle + 5, "y", size=17, attributes=' font-style="italic"'),
    ]
    return svg(966, 272, "Data flow of one deformable-attention layer", body)


# ------------------------------------------------------------------------------------------------ strips


def strip(
    y: float,
    name: str,
    note: str,
    cells: int,
    points: Sequence[float],
    targets: Sequence[float],
    labels: Sequence[float],
) -> list[str]:
    """Draw a row of cells with a point for each target, a line between them if they differ, and a number below."""
    left, pitch = 108, 560 / cells
    body = [
        text(0, y + 5, name, anchor="start", size=12.5),
        text(0, y + 20, note, anchor="start", size=10, opacity=0.7),
    ]
    body += [rect(left + pitch * i, y - 12, pitch, 24, opacity=0.3) for i in range(cells)]
    for point, target, label in zip(points, targets, labels, strict=True):
        x, target_x = left + pitch * (point + 0.5), left + pitch * (target + 0.5)
        is_moved = abs(point - target) > 1e-9
        color = ORANGE if is_moved else BLUE
        body.append(line(target_x, y - 4, target_x, y + 4, opacity=0.8))
        if is_moved:
            body.append(line(target_x, y, x, y, color=color, width=2.5))
        body += [
            circle(x, y, 4.5, color=color),
            text(x, y + 27, f"{label:.2f}".rstrip("0").rstrip("."), size=10, opacity=0.85),
        ]
    return body


def strips(title: str, cells: int, convention_rows: Callable[[Convention], Rows], notes: tuple[str, str]) -> str:
    """Draw four strips, one for each convention.

    Args:
        notes: text for a strip in which every point is at its target, and for one in which some are not.
    """
    body: list[str] = []
    for row, convention in enumerate(Convention):
        points, targets, labels = convention_rows(convention)
        note = notes[0] if np.allclose(points, targets) else notes[1]
        body += strip(22 + 62 * row, convention.name, note, cells, points, targets, labels)
    return svg(690, 258, title, body)


def sampled_pixels(length: int, keys: int, convention: Convention) -> list[float]:
    """Return the pixel that each key of an axis samples with zero offset, under the convention's own bound."""
    reference = reference_points((keys, keys), convention)
    bound = RELEASED_BOUND.get(convention, OffsetBound.TANH_CELLS)
    raw = np.zeros((1, 1, keys, keys, 2))
    points = bound_offsets(raw, reference, bound, offset_range=2, convention=convention)[1]
    return _plain(to_pixels(points, (length, length), convention)[0, 0, :, 0, 0])


def _plain(numbers: Iterable[float]) -> list[float]:
    """Round off the last bits and remove the sign of zero, so that every machine draws the same file."""
    return [round(float(number), 9) + 0.0 for number in numbers]


def identity() -> str:
    """Draw the positions that seven keys sample on seven pixels, at stride 1 with zero offset."""

    def convention_rows(convention: Convention) -> Rows:
        points = sampled_pixels(7, 7, convention)
        return points, range(7), points

    title = "Zero offset at stride 1: the pixel that each of seven keys samples"
    return strips(title, 7, convention_rows, ("the map itself", "another map"))


def stride_eight() -> str:
    """Draw 56 pixels and seven keys: in key cells of eight pixels, labeled in pixels."""

    def convention_rows(convention: Convention) -> Rows:
        points = sampled_pixels(56, 7, convention)
        return [(point - 3.5) / 8 for point in points], range(7), points

    title = "Zero offset at stride 8: sampling positions against the centers of the key cells"
    return strips(title, 7, convention_rows, ("cell centers", "off the cell centers"))


def table_reading() -> str:
    """Draw the table positions of the displacements of seven queries from seven keys, in a table of 13 rows."""

    def convention_rows(convention: Convention) -> Rows:
        reference = np.clip(reference_points((7, 7), convention), -1, 1)
        positions = table_positions(reference.reshape(1, 1, -1, 2), (13, 13), (7, 7), convention)
        positions = positions.reshape(7, 7, 7, 7, 2)[:, 0, :, 0, 0]  # [query row, key row]
        # query 0 with keys 6 … 0, then query 6 with keys 5 … 0
        points = _plain([*positions[0, ::-1], *positions[6, -2::-1]])
        return points, range(13), points

    title = "Table positions of displacements of -6 to 6 pixels, in a table of 13 entries"
    return strips(title, 13, convention_rows, ("on the entries", "between entries"))


# ------------------------------------------------------------------------------------------------ released names


def names_table(preset: str, stage: int, block: int, *, rest: bool = False) -> str:
    """Return a Markdown table of names here and in the released state dict.

    Args:
        rest: list the names outside the blocks instead of those of one block.
    """
    model = config(preset)
    shapes = flatten(dat_shapes(model))
    prefix, released_prefix = f"stages.{stage}.blocks.{block}.", "" if rest else f"stages.{stage}."
    rows = ["| dat_ref | released | shape in dat_ref | released layout |", "|---|---|---|---|"]
    for ours, released in official.backbone_names(model).items():
        selected = not ours.startswith("stages.") if rest else ours.startswith(prefix)
        if selected:
            here, there = ours.removeprefix(prefix), released.name.removeprefix(released_prefix)
            rows.append(f"| `{here}` | `{there}` | {shapes[ours]} | {LAYOUTS[released.layout]} |")
    return "\n".join(rows) + "\n"


LAYOUTS = {"same": "same", "conv1x1": "(O, C, 1, 1)", "flat_table": "((2w−1)², heads)"}


def outputs() -> dict[str, str]:
    """Return the files of this script by name."""
    return {
        "layer.svg": layer_flow(),
        "identity.svg": identity(),
        "stride_eight.svg": stride_eight(),
        "table_reading.svg": table_reading(),
        "names_deformable.md": names_table("dat_tiny", 2, 1),
        "names_window.md": names_table("dat_tiny", 2, 0),
        "names_neighborhood.md": names_table("dat_pp_tiny", 0, 0),
        "names_around.md": names_table("dat_pp_tiny", 0, 0, rest=True),
    }


if __name__ == "__main__":
    for name, content in outputs().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
