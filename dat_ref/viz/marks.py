"""What the figures are put together from: the view of a panel, the marks in it, the legends around it.

Places are in pixels of the photograph, (y, x); sizes of marks in points (1/72 inch).
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

from .geometry import Array, Attended, Size, to_image_px, window_attention_map
from .style import DARK, FIELD, GAP, HAIRLINE, HEAT, INK, MARGIN, QUIET, SIDE, Sheet, group_color, toward

EDGE = "#FFD9A0A0"  # of a circle
LARGEST_RADIUS = 24  # of a circle, in points
WIDEST_MARGIN = 0.2  # of the photograph's longer side; points further out are drawn on the margin's edge


@dataclass(frozen=True)
class View:
    """The part of the plane that a panel shows: the photograph, and room where points lie outside it."""

    size: Size  # of the photograph
    low: Array  # (y, x) of the top left corner
    high: Array  # (y, x) of the bottom right corner
    inset: float  # distance kept from the margin's edge

    @classmethod
    def around(cls, size: Size, places: Array, rim: float = 0.03) -> View:
        """places: (..., 2). Where they reach a side, room there for those beyond it and a rim (a share of the
        longer side) around them; WIDEST_MARGIN at most.
        """
        border_low, border_high = np.full(2, -0.5), np.subtract(size, 0.5)
        places = places[np.isfinite(places).all(axis=-1)]
        least = np.min(places, axis=0, initial=np.inf) if len(places) else border_low
        most = np.max(places, axis=0, initial=-np.inf) if len(places) else border_high
        rim, widest = rim * max(size), WIDEST_MARGIN * max(size)
        beyond = np.stack([border_low - least, most - border_high])
        room_before, room_after = np.where(beyond > -rim / 4, np.clip(beyond + rim, 0, widest), 0)
        return cls(size, border_low - room_before, border_high + room_after, rim / 2)

    @property
    def aspect(self) -> float:
        height, width = self.high - self.low
        return float(height / width)

    def within(self, places: Array) -> tuple[Array, Array]:
        """Places brought onto the margin's edge where they lie beyond it, and which those are."""
        low = np.where(self.low < -0.5, self.low + self.inset, self.low)
        high = np.where(self.high > np.subtract(self.size, 0.5), self.high - self.inset, self.high)
        kept = np.clip(places, low, high)
        return kept, np.any(kept != places, axis=-1)

    def pitch(self, page: Sheet, keys: Size) -> float:
        """Distance between neighboring keys on the page, in points, along the axis where they are closest."""
        per_pixel = 72 * page.panel[1] / (self.high[1] - self.low[1])
        return float(per_pixel * np.divide(self.size, keys).min())


# Marks


def dimmed(picture: Array) -> Array:
    return toward(picture, 0.0, 0.4, 0.7)


def frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=HAIRLINE, linewidth=0.6)


def show(axes: Axes, picture: Array, view: View, ground: str = MARGIN) -> None:
    """The photograph in its own pixels, with the view's room around it."""
    frame(axes)
    axes.set_facecolor(ground)
    axes.imshow(picture, aspect="auto")
    (top, left), (bottom, right) = view.low, view.high
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.add_patch(Rectangle((-0.5, -0.5), view.size[1], view.size[0], fill=False, ec=HAIRLINE, lw=0.6))


def draw_offsets(axes: Axes, references: Array, points: Array, view: View, pitch: float, color: str) -> None:
    """Rings at the references, arrows from them, and a dot in each tip: all there is of no offset."""
    (tails, _), (heads, far) = view.within(references), view.within(points)
    ring = float(np.clip(0.17 * pitch, 1.5, 5)) ** 2  # areas in points²
    shaft = float(np.clip(0.055 * pitch, 0.9, 1.5))  # in points
    for ink, line in (("white", 1.4), (INK, 0.5)):
        axes.scatter(
            tails[:, 1],
            tails[:, 0],
            s=ring,
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
    axes.scatter(heads[~far, 1], heads[~far, 0], s=(0.9 * shaft) ** 2, c=color, linewidths=0, zorder=3, gid="points")
    axes.scatter(
        heads[far, 1],
        heads[far, 0],
        s=2 * ring,
        marker="D",
        c="white",
        edgecolors=color,
        linewidths=0.9,
        zorder=4,
        clip_on=False,
        gid="far points",
    )


def area_of_even_share(times_even: Array, pitch: float) -> float:
    """Area (points²) of an even share's circle: half a cell wide, less where others would be too large."""
    radius = min(0.25 * pitch, min(1.1 * pitch, LARGEST_RADIUS) / np.sqrt(max(float(times_even.max()), 1.0)))
    return float((2 * max(radius, 0.6)) ** 2)


def norm_of(values: Array) -> Normalize:
    """From least to most; a little wider where all are equal, as an even spread needs some colour too."""
    low, high = float(values.min()), float(values.max())
    return Normalize(low, high) if high - low > 1e-9 else Normalize(low - 0.5, high + 0.5)


def draw_circles(axes: Axes, places: Array, times_even: Array, area: float, norm: Normalize, view: View) -> None:
    """Largest first, so that none hides another."""
    kept, _ = view.within(places)
    order = np.argsort(-times_even, kind="stable")
    axes.scatter(
        kept[order, 1],
        kept[order, 0],
        s=area * times_even[order],
        c=HEAT(norm(times_even[order])),
        edgecolors=EDGE,
        linewidths=0.5,
        zorder=4,
        clip_on=False,
        gid="keys",
    )


def draw_heat(axes: Axes, attended: Attended, map_size: Size, size: Size, norm: Normalize) -> None:
    """Cells coloured by attention, and a line around those that are keys of this query."""
    heat = window_attention_map(attended.weights, attended.cells_px, map_size) * len(attended.weights)
    keys = window_attention_map(np.ones(len(attended.weights)), attended.cells_px, map_size) > 0
    layer = HEAT(norm(heat)) * keys[..., None]
    extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
    axes.imshow(layer, extent=extent, aspect="auto", interpolation="nearest")
    outline = to_image_px(_borders(keys), map_size, size)[..., ::-1]
    axes.add_collection(LineCollection(list(outline), colors="white", linewidths=0.9, capstyle="projecting"))


def _borders(mask: Array) -> Array:
    """The unit segments between cells that are set and cells that are not: (n, 2 ends, 2), (y, x)."""
    padded = np.pad(mask, 1)
    segments = []
    for axis in (0, 1):
        edges = np.argwhere(np.diff(padded, axis=axis)) - 1.0  # the cells before a border, half a cell before
        along, across = np.eye(2)[axis] / 2, np.eye(2)[1 - axis] / 2
        segments.append(np.stack([edges + along - across, edges + along + across], axis=1))
    return np.concatenate(segments)


# Legends


def size_legend(page: Sheet, times_even: Array, area: float, norm: Normalize) -> None:
    """Circles as they are drawn, on a dark strip as wide as the panels: least, even and largest share."""
    low, high = float(times_even.min()), float(times_even.max())
    values = {round(low, 2), 1.0, round((1 + high) / 2, 2) if high > 3 else 1.0, round(high, 2)}
    shown = sorted(values - {0.0})
    axes = _dark_strip(page, 0.18, page.footer - 0.26)
    texts = [f"{value:.2f}×" + (" even share" if value == 1 else "") for value in shown]
    diameters = np.sqrt(area * np.array(shown)) / 72  # inches
    x = 0.16
    axes.text(x, 0, "attention received", color="white", va="center")
    x += 1.45
    for value, text, diameter in zip(shown, texts, diameters, strict=True):
        axes.scatter(x + diameter / 2, 0, s=area * value, c=[HEAT(norm(value))], edgecolors=EDGE, linewidths=0.5)
        axes.text(x + diameter + 0.08, 0, text, color="white", va="center")
        x += diameter + 0.08 + 0.072 * len(text) + 0.2


def _dark_strip(page: Sheet, bottom: float, height: float) -> Axes:
    """A strip in inches, as wide as the block of panels, ordinate from -1 to 1."""
    page_width, _ = page.figure.get_size_inches()
    left = min(axes.get_position().x0 for axes in page.axes) * page_width
    width = max(axes.get_position().x1 for axes in page.axes) * page_width - left
    axes = page.strip(left, width, bottom, height)
    axes.set(xlim=(0, width), ylim=(-1, 1), xticks=[], yticks=[], facecolor=DARK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def color_bar(page: Sheet, above: Axes, norm: Normalize) -> None:
    box = above.get_position()
    page_width, _ = page.figure.get_size_inches()
    axes = page.strip(box.x0 * page_width, box.width * page_width, 0.42, 0.1)
    axes.set_facecolor(DARK)
    bar = page.figure.colorbar(ScalarMappable(norm, HEAT), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=4)
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")


def draw_components(page: Sheet, offsets: Array, bound_px: float | tuple[float, float] | None, norm: Normalize) -> None:
    """Histogram of each component, the groups stacked in their colours, and the colour bar of the fields."""
    page_width, _ = page.figure.get_size_inches()
    half = (page_width - 2 * SIDE - 4 * GAP) / 2
    bounds = np.broadcast_to(np.nan if bound_px is None else bound_px, (2,))
    reach = 1.08 * max(float(np.abs(offsets).max()), float(np.nanmax(np.append(bounds, 0))), 1e-6)
    groups = len(offsets)
    for axis, word in enumerate(("Vertical", "Horizontal")):
        axes = page.strip(SIDE + GAP + axis * (half + 2 * GAP), half, 0.55, 1.15)
        bounded = np.abs(offsets[..., axis]).max() <= bounds[axis]  # then the bound is a border of the bins
        bins = np.linspace(-1, 1, 40) * (bounds[axis] if bounded else reach)
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
        axes.set(xlim=(-reach, reach), xlabel=f"{word} component, pixels of the map")
        axes.set_title("Keys" if axis == 0 else "", size=8.5, color=QUIET)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    bar_axes = page.strip(page_width / 2 - 1.6, 3.2, page.footer - 0.12, 0.08)
    bar = page.figure.colorbar(ScalarMappable(norm, FIELD), cax=bar_axes, orientation="horizontal")
    bar.outline.set(linewidth=0.4, edgecolor=HAIRLINE)
    bar.ax.locator_params(nbins=5)
