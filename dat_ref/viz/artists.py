"""Parts of the figures: the view of a panel, its marks, and the legends.

Positions are in pixels of the photograph, order (y, x). Sizes of marks are in points (1/72 inch).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .geometry import Array, QueryAttention, Size, attention_map, to_image_px
from .style import DARK, FIELD, GAP, HAIRLINE, HEAT, INK, MARGIN, QUIET, SIDE, FigureLayout, blend_toward, group_color

EDGE = "#FFD9A0A0"  # edge color of a circle
LARGEST_RADIUS = 24  # maximum radius of a circle, in points
WIDEST_MARGIN = 0.2  # maximum margin, relative to the photograph's longer side; points outside are drawn on its edge


@dataclass(frozen=True)
class View:
    """Visible region of a panel: the photograph, with a margin on the sides where points are outside it."""

    size: Size  # size of the photograph
    low: Array  # (y, x) of the top left corner
    high: Array  # (y, x) of the bottom right corner
    inset: float  # minimum distance of a point from the margin's edge

    @classmethod
    def around(cls, size: Size, points: Array, rim: float = 0.03) -> View:
        """Return the view that contains the photograph and the points.

        Args:
            size: (height, width) of the photograph.
            points: (..., 2), in pixels of the photograph.
            rim: space around points at or outside a border, relative to the photograph's longer side. The margin is at
                most `WIDEST_MARGIN`.
        """
        border_low, border_high = np.full(2, -0.5), np.subtract(size, 0.5)
        points = points[np.isfinite(points).all(axis=-1)]
        lowest = np.min(points, axis=0, initial=np.inf) if len(points) else border_low
        highest = np.max(points, axis=0, initial=-np.inf) if len(points) else border_high
        rim, max_margin = rim * max(size), WIDEST_MARGIN * max(size)
        overhang = np.stack([border_low - lowest, highest - border_high])
        margin_before, margin_after = np.where(overhang > -rim / 4, np.clip(overhang + rim, 0, max_margin), 0)
        return cls(size, border_low - margin_before, border_high + margin_after, rim / 2)

    @property
    def aspect(self) -> float:
        """Height divided by width."""
        height, width = self.high - self.low
        return float(height / width)

    def within(self, points: Array) -> tuple[Array, Array]:
        """Clip points to the margin's edge; return them and a mask of the clipped points."""
        low = np.where(self.low < -0.5, self.low + self.inset, self.low)
        high = np.where(self.high > np.subtract(self.size, 0.5), self.high - self.inset, self.high)
        clipped = np.clip(points, low, high)
        return clipped, np.any(clipped != points, axis=-1)

    def pitch(self, layout: FigureLayout, keys: Size) -> float:
        """Return the smaller distance between neighboring keys on the page, in points (1/72 inch)."""
        per_pixel = 72 * layout.panel[1] / (self.high[1] - self.low[1])
        return float(per_pixel * np.divide(self.size, keys).min())


# ------------------------------------------------------------------------------------------------ marks


def dim(picture: Array) -> Array:
    """Darken a photograph, as a background for bright marks."""
    return blend_toward(picture, 0.0, 0.4, 0.7)


def style_frame(axes: Axes) -> None:
    """Remove the ticks and draw a thin frame."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=HAIRLINE, linewidth=0.6)


def show_photo(axes: Axes, picture: Array, view: View, background: str = MARGIN) -> None:
    """Show the photograph in its own pixels, with the view's margin."""
    style_frame(axes)
    axes.set_facecolor(background)
    axes.imshow(picture, aspect="auto")
    (top, left), (bottom, right) = view.low, view.high
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.add_patch(Rectangle((-0.5, -0.5), view.size[1], view.size[0], fill=False, ec=HAIRLINE, lw=0.6))


def draw_offsets(axes: Axes, references: Array, points: Array, view: View, pitch: float, color: str) -> None:
    """Draw a ring at each reference point, an arrow to its sampling point, and a dot at the tip.

    The dot also shows points with zero offset, which have no arrow.
    """
    (tails, _), (heads, clipped) = view.within(references), view.within(points)
    ring_area = float(np.clip(0.17 * pitch, 1.5, 5)) ** 2  # areas in points²
    shaft = float(np.clip(0.055 * pitch, 0.9, 1.5))  # in points
    for ink, line in (("white", 1.4), (INK, 0.5)):
        axes.scatter(
            tails[:, 1],
            tails[:, 0],
            s=ring_area,
            facecolors="none",
            edgecolors=ink,
            linewidths=line,
            zorder=2,
            clip_on=False,
            gid="references",
        )
    for ink, halo in (("white", 0.8), (color, 0.0)):
        axes.quiver(
            tails[:, 1],
            tails[:, 0],
            heads[:, 1] - tails[:, 1],
            heads[:, 0] - tails[:, 0],
            angles="xy",
            scale_units="xy",
            scale=1,
            units="inches",
            width=shaft / 72,
            headwidth=4.6,
            headlength=4.6,
            headaxislength=4.2,
            minlength=0,
            minshaft=1.2,
            color=ink,
            edgecolor=ink,
            linewidth=halo,
            zorder=3,
        )
    axes.scatter(
        heads[~clipped, 1], heads[~clipped, 0], s=(0.9 * shaft) ** 2, c=color, linewidths=0, zorder=3, gid="points"
    )
    axes.scatter(
        heads[clipped, 1],
        heads[clipped, 0],
        s=2 * ring_area,
        marker="D",
        c="white",
        edgecolors=color,
        linewidths=0.9,
        zorder=4,
        clip_on=False,
        gid="clipped points",
    )


def uniform_share_area(relative_weights: Array, pitch: float) -> float:
    """Return the area (points²) of the circle of a uniform share: half a cell wide, or less to limit the largest."""
    radius = min(0.25 * pitch, min(1.1 * pitch, LARGEST_RADIUS) / np.sqrt(max(float(relative_weights.max()), 1.0)))
    return float((2 * max(radius, 0.6)) ** 2)


def color_norm(values: Array) -> Normalize:
    """Return the color scale from the smallest to the largest value; wider if all values are equal."""
    low, high = float(values.min()), float(values.max())
    return Normalize(low, high) if high - low > 1e-9 else Normalize(low - 0.5, high + 0.5)


def draw_circles(axes: Axes, points: Array, relative_weights: Array, area: float, norm: Normalize, view: View) -> None:
    """Draw circles for the keys, the largest first, so that no circle hides another."""
    clipped, _ = view.within(points)
    order = np.argsort(-relative_weights, kind="stable")
    axes.scatter(
        clipped[order, 1],
        clipped[order, 0],
        s=area * relative_weights[order],
        c=HEAT(norm(relative_weights[order])),
        edgecolors=EDGE,
        linewidths=0.5,
        zorder=4,
        clip_on=False,
        gid="keys",
    )


def draw_heatmap(axes: Axes, query_attention: QueryAttention, map_size: Size, size: Size, norm: Normalize) -> None:
    """Color the cells by attention, with an outline around the keys of the query."""
    heat = attention_map(query_attention.weights, query_attention.keys_px, map_size) * len(query_attention.weights)
    keys = attention_map(np.ones(len(query_attention.weights)), query_attention.keys_px, map_size) > 0
    layer = HEAT(norm(heat)) * keys[..., None]
    extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
    axes.imshow(layer, extent=extent, aspect="auto", interpolation="nearest")
    outline = to_image_px(_borders(keys), map_size, size)[..., ::-1]
    axes.add_collection(LineCollection(list(outline), colors="white", linewidths=0.9, capstyle="projecting"))


def _borders(mask: Array) -> Array:
    """Return the unit segments between set and unset cells, (n, 2 ends, 2), order (y, x)."""
    padded = np.pad(mask, 1)
    segments = []
    for axis in (0, 1):
        edges = np.argwhere(np.diff(padded, axis=axis)) - 1.0  # cell before each border, without the padding
        along, across = np.eye(2)[axis] / 2, np.eye(2)[1 - axis] / 2
        segments.append(np.stack([edges + along - across, edges + along + across], axis=1))
    return np.concatenate(segments)


# ------------------------------------------------------------------------------------------------ legends


def size_legend(layout: FigureLayout, relative_weights: Array, area: float, norm: Normalize) -> None:
    """Draw the legend of circle sizes on a dark strip as wide as the panels: smallest, uniform and largest share."""
    low, high = float(relative_weights.min()), float(relative_weights.max())
    candidates = {round(low, 2), 1.0, round((1 + high) / 2, 2) if high > 3 else 1.0, round(high, 2)}
    values = sorted(candidates - {0.0})
    axes = _dark_strip(layout, 0.18, layout.footer - 0.26)
    texts = [f"{value:.2f}×" + (" uniform share" if value == 1 else "") for value in values]
    diameters = np.sqrt(area * np.array(values)) / 72  # inches
    x = 0.16
    axes.text(x, 0, "attention received", color="white", va="center")
    x += 1.45
    for value, text, diameter in zip(values, texts, diameters, strict=True):
        axes.scatter(x + diameter / 2, 0, s=area * value, c=[HEAT(norm(value))], edgecolors=EDGE, linewidths=0.5)
        axes.text(x + diameter + 0.08, 0, text, color="white", va="center")
        x += diameter + 0.08 + 0.072 * len(text) + 0.2


def _dark_strip(layout: FigureLayout, bottom: float, height: float) -> Axes:
    """Add a dark strip as wide as the block of panels. Abscissa in inches, ordinate from -1 to 1."""
    page_width, _ = layout.figure.get_size_inches()
    left = min(axes.get_position().x0 for axes in layout.axes) * page_width
    width = max(axes.get_position().x1 for axes in layout.axes) * page_width - left
    axes = layout.add_axes(left, width, bottom, height)
    axes.set(xlim=(0, width), ylim=(-1, 1), xticks=[], yticks=[], facecolor=DARK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def color_bar(layout: FigureLayout, above: Axes, norm: Normalize) -> None:
    """Add the color bar of the attention below a panel."""
    box = above.get_position()
    page_width, _ = layout.figure.get_size_inches()
    axes = layout.add_axes(box.x0 * page_width, box.width * page_width, 0.42, 0.1)
    axes.set_facecolor(DARK)
    bar = layout.figure.colorbar(ScalarMappable(norm, HEAT), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=4)
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")


def draw_components(
    layout: FigureLayout, offsets: Array, bound_px: float | tuple[float, float] | None, norm: Normalize
) -> None:
    """Draw the histogram of each component, stacked by group, and the color bar of the fields."""
    page_width, _ = layout.figure.get_size_inches()
    panel_width = (page_width - 2 * SIDE - 4 * GAP) / 2
    bounds = np.broadcast_to(np.nan if bound_px is None else bound_px, (2,))
    limit = 1.08 * max(float(np.abs(offsets).max()), float(np.nanmax(np.append(bounds, 0))), 1e-6)
    groups = len(offsets)
    for axis, component in enumerate(("Vertical", "Horizontal")):
        axes = layout.add_axes(SIDE + GAP + axis * (panel_width + 2 * GAP), panel_width, 0.55, 1.15)
        bounded = np.abs(offsets[..., axis]).max() <= bounds[axis]  # then the bound is an edge of a bin
        bins = np.linspace(-1, 1, 40) * (bounds[axis] if bounded else limit)
        axes.hist(
            [offsets[g, ..., axis].reshape(-1) for g in range(groups)],
            bins=list(bins),
            stacked=True,
            color=[group_color(g) for g in range(groups)],
            edgecolor="white",
            linewidth=0.3,
        )
        if np.isfinite(bounds[axis]):
            for side in (-1, 1):
                axes.axvline(side * bounds[axis], color=INK, lw=0.8, ls=(0, (4, 3)))
            axes.text(
                bounds[axis],
                1.0,
                f"bound ±{bounds[axis]:.3g}",
                transform=axes.get_xaxis_transform(),
                ha="right",
                va="bottom",
                size=8,
                color=QUIET,
            )
        axes.set(xlim=(-limit, limit), xlabel=f"{component} component, pixels of the map")
        axes.set_title("Keys" if axis == 0 else "", size=8.5, color=QUIET)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    bar_axes = layout.add_axes(page_width / 2 - 1.6, 3.2, layout.footer - 0.12, 0.08)
    bar = layout.figure.colorbar(ScalarMappable(norm, FIELD), cax=bar_axes, orientation="horizontal")
    bar.outline.set(linewidth=0.4, edgecolor=HAIRLINE)
    bar.ax.locator_params(nbins=5)
