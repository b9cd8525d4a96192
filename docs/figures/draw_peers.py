"""Draw the receptive field of each compared system, the identities between the systems, and the growth of their cost.

    python docs/figures/draw_peers.py

writes `receptive_field.svg` and `identity_graph.svg` into this folder; a test fails if they differ from the output of
this script. `cost.png` is the figure of `dat-ref complexity`, in the folder of images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from draw import BLUE, GREEN, ORANGE, box, circle, line, rect, svg, text

from dat_ref import (
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    WindowAttentionConfig,
    config,
    init_params,
)
from dat_ref.peers import (
    ATTENTIONS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
    receptive_field,
)

FOLDER = Path(__file__).parent
SIZE, QUERY = (12, 12), (3, 8)
DIM, HEADS = 12, 3
CELL, ACROSS, DOWN = 10, 146, 184  # drawing units: size of a map pixel, distances between panels

# ------------------------------------------------------------------------------------------------ receptive field


class Panel(NamedTuple):
    """Panel of one system, with grid lines over the map: every `pitch` pixels, from `start` on (0: no lines)."""

    name: str
    attention: Any
    pitch: int = 0
    start: int = 0


# Nine keys for each query wherever a system can choose, counted over all heads.
PANELS = (
    Panel("plain attention", MultiHeadAttentionConfig(DIM, HEADS)),
    Panel("spatial reduction", PyramidAttentionConfig(DIM, HEADS, reduction=4), 4, 4),
    Panel("window", WindowAttentionConfig(DIM, HEADS, window_size=3), 3, 3),
    Panel("shifted window", WindowAttentionConfig(DIM, HEADS, window_size=3, shift=1), 3, 1),
    Panel("neighborhood", NeighborhoodAttentionConfig(DIM, HEADS, kernel_size=3)),
    Panel("deformable attention", DeformableAttentionConfig(DIM, HEADS, stride=4, kernel_size=5, size=SIZE), 4, 4),
    Panel("deformable conv.", DeformableConvConfig(DIM, kernel_size=3)),
    Panel("Deformable DETR", MultiScaleDeformableConfig(DIM, HEADS, points=3)),
    Panel("keys of each query", PerQueryAttentionConfig(DIM, HEADS, kernel_size=3)),
    Panel("DAT-DCN, initial", DATDCNAttentionConfig(DIM, HEADS, points=3)),
)


def run_layer(attention: Any) -> tuple[np.ndarray, np.ndarray]:
    """Run one layer on a noise map; return the query's receptive field and its points (N, 2), if it has any."""
    rng = np.random.default_rng(2)
    params = init_params(attention, seed=2, dtype=np.float64)
    if not isinstance(attention, DATDCNAttentionConfig):  # offsets of some pixels; the initialization gives almost zero
        for leaf in (params.get("offset", {}), params.get("offset_network", {}).get("pointwise", {})):
            if leaf:
                leaf["weight"][:] = rng.normal(scale=0.4, size=leaf["weight"].shape) / leaf["weight"][0, 0].size ** 0.5
    x = rng.normal(size=(1, DIM, *SIZE))
    _, trace = ATTENTIONS[type(attention)].forward(x, params, attention)
    return receptive_field(QUERY, SIZE, attention, trace), query_points(getattr(trace, "points_px", None))


def query_points(points: np.ndarray | None) -> np.ndarray:
    """Return the query's own points (N, 2), from (1, …, 2) with or without an axis of queries."""
    number = QUERY[0] * SIZE[1] + QUERY[1]
    if points is None:
        return np.zeros((0, 2))
    if points.shape[-3:-1] == SIZE:  # convolution: (1, G, K, H, W, 2)
        return points[0, :, :, QUERY[0], QUERY[1]].reshape(-1, 2)
    for axis, length in enumerate(points.shape):
        if length == SIZE[0] * SIZE[1]:
            return np.take(points, number, axis=axis).reshape(-1, 2)
    return points.reshape(-1, 2)


def frame(left: float, top: float, side: float) -> list[str]:
    """Draw a square with thick lines."""
    right, bottom = left + side, top + side
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return [line(*a, *b, width=2.2) for a, b in zip(corners, corners[1:])]


def lattice(left: float, top: float, positions: range, opacity: float) -> str:
    """Draw horizontal and vertical lines over a map at these positions, in pixels of the map."""
    height, width = (CELL * length for length in SIZE)
    down = [f"M{left + CELL * position:g} {top:g}v{height}" for position in positions]
    across = [f"M{left:g} {top + CELL * position:g}h{width}" for position in positions]
    return f'<path d="{"".join(down + across)}" stroke="currentColor" stroke-opacity="{opacity:g}"/>'


def pixels(visible: np.ndarray, left: float, top: float) -> str:
    """Draw the pixels of the receptive field, one square each."""
    squares = [f"M{left + CELL * x:g} {top + CELL * y:g}h{CELL}v{CELL}h-{CELL}z" for y, x in np.argwhere(visible)]
    return f'<path d="{"".join(squares)}" fill="{BLUE}" fill-opacity="0.45"/>'


def draw_panel(panel: Panel, left: float, top: float) -> list[str]:
    """Draw a map with the receptive field in blue, points in orange, and a frame around the query."""
    visible, points = run_layer(panel.attention)
    height, width = (CELL * length for length in SIZE)
    body = [pixels(visible, left, top), lattice(left, top, range(1, SIZE[0]), 0.12)]
    if panel.pitch:
        body.append(lattice(left, top, range(panel.start, SIZE[0], panel.pitch), 0.6))
    body.append(rect(left, top, width, height, opacity=0.6))
    inside = np.all((points >= -0.5) & (points <= np.array(SIZE) - 0.5), axis=-1)
    for y, x in points[inside]:
        body.append(circle(round(left + CELL * (x + 0.5), 1), round(top + CELL * (y + 0.5), 1), 2.6, color=ORANGE))
    body += frame(left + CELL * QUERY[1], top + CELL * QUERY[0], CELL)
    center, bottom = left + width / 2, top + height
    body.append(text(center, top - 8, panel.name, size=12))
    body.append(text(center, bottom + 15, f"{visible.sum()} of {visible.size} pixels", size=10, opacity=0.8))
    if not inside.all():
        note = f"{np.sum(~inside)} of {len(points)} points outside"
        body.append(text(center, bottom + 28, note, size=10, opacity=0.8))
    return body


def receptive_fields() -> str:
    """Draw all panels, five in a row."""
    body: list[str] = []
    for number, panel in enumerate(PANELS):
        row, column = divmod(number, 5)
        body += draw_panel(panel, 10 + ACROSS * column, 24 + DOWN * row)
    title = "Receptive field of one query in each of ten systems"
    return svg(10 + 4 * ACROSS + CELL * SIZE[1] + 10, 24 + DOWN + CELL * SIZE[0] + 34, title, body)


# ------------------------------------------------------------------------------------------------ identities

NODES = {  # name: position, color
    "window": (84, 40, BLUE),
    "spatial reduction": (90, 114, BLUE),
    "neighborhood": (84, 188, BLUE),
    "plain attention": (384, 114, "currentColor"),
    "deformable attention": (668, 114, ORANGE),
    "keys of each query": (384, 236, ORANGE),
    "DAT-DCN": (52, 330, ORANGE),
    "Deformable DETR": (206, 330, ORANGE),
    "deformable conv. v2": (490, 330, GREEN),
    "deformable conv. v1": (490, 406, GREEN),
    "convolution": (700, 330, "currentColor"),
}
EDGES = (  # from, to, condition, shift of the text from the center of the line
    ("window", "plain attention", "as large as the map", 42, -12),
    ("spatial reduction", "plain attention", "r = 1", -20, -7),
    ("neighborhood", "plain attention", "as large as the map", 14, 22),
    ("deformable attention", "plain attention", "stride 1, no offsets", 0, -7),
    ("keys of each query", "deformable attention", "all queries share points", 50, 22),
    ("keys of each query", "neighborhood", "no offsets, interior", -36, 20),
    ("DAT-DCN", "Deformable DETR", "centers", 0, -7),
    ("Deformable DETR", "deformable conv. v2", "sigmoid,|one matrix for all taps", 0, -7),
    ("deformable conv. v2", "convolution", "no offsets,|m = 1", 0, -7),
    ("deformable conv. v1", "deformable conv. v2", "m = 1", -24, 4),
)
HALF_WIDTH = {name: 3.5 * len(name) + 15 for name in NODES}  # half the width of a box
BOX_HEIGHT = 30


def border_point(name: str, target: tuple[float, float]) -> tuple[float, float]:
    """Return the point at which the line from the center of a box to a point leaves the box."""
    x, y, _ = NODES[name]
    dx, dy = target[0] - x, target[1] - y
    scale = min(HALF_WIDTH[name] / abs(dx) if dx else np.inf, BOX_HEIGHT / 2 / abs(dy) if dy else np.inf)
    return x + scale * dx, y + scale * dy


def identity_graph() -> str:
    """Draw the identities between systems: a box for each system, a line for each identity with its condition."""
    body: list[str] = []
    for first, second, condition, dx, dy in EDGES:
        (x1, y1), (x2, y2) = border_point(first, NODES[second][:2]), border_point(second, NODES[first][:2])
        body.append(line(round(x1, 1), round(y1, 1), round(x2, 1), round(y2, 1), width=1.4, opacity=0.7))
        label_lines = condition.split("|")
        for row, part in enumerate(label_lines):
            height = (y1 + y2) / 2 + dy + 13 * (row - len(label_lines) + 1)
            body.append(text(round((x1 + x2) / 2 + dx, 1), round(height, 1), part, size=10.5, opacity=0.85))
    for name, (x, y, color) in NODES.items():
        body += box(x, y, 2 * HALF_WIDTH[name], BOX_HEIGHT, [name], color)
    return svg(776, 430, "Identities between systems, with their conditions", body)


def outputs() -> dict[str, str]:
    """Return the text files of this script by name."""
    return {"receptive_field.svg": receptive_fields(), "identity_graph.svg": identity_graph()}


# ------------------------------------------------------------------------------------------------ cost


def draw_cost_curves() -> None:
    """Draw the figure of `dat-ref complexity`, for a layer of dat_tiny's stage 3 with the worked example's 49 keys."""
    from photographs import save_png  # only this figure needs matplotlib

    from dat_ref.complexity import curves, doubling
    from dat_ref.complexity.curves import keys_at
    from dat_ref.viz.cost import draw_cost

    layer = config("dat_tiny").stages[2][-1].attention
    assert isinstance(layer, DeformableAttentionConfig)
    layer = replace(layer, stride=2)
    growth_curves = curves(layer, doubling(14, 4))
    label = f"One layer of dat_tiny, stage 3 (C = {layer.dim}, {layer.heads} heads)"
    save_png(draw_cost(growth_curves, reduction=16, label=label, keys=keys_at(layer, 14)), "cost", 1120)


if __name__ == "__main__":
    for name, content in outputs().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
    draw_cost_curves()
