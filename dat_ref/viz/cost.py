"""Figure of the cost of each attention against the size of the image: multiply-adds and memory, log-log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .style import GROUP_COLORS, HAIRLINE, INK, QUIET, make_layout, save, with_style

__all__ = ["CurveLike", "draw_cost", "save"]

BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, BROWN, GRAY = GROUP_COLORS


class LineStyle(NamedTuple):
    """Style and name of a line."""

    name: str
    color: str
    width: float = 1.3
    dashes: tuple[float, ...] = ()


LINE_STYLES = {
    "deformable": LineStyle("DAT, fixed stride", BLUE, 2.2, (3.2, 1.4)),
    "deformable_fixed": LineStyle("DAT, fixed keys", BLUE, 2.2),
    "multi_head": LineStyle("multi-head", INK),
    "pyramid": LineStyle("spatial reduction", BROWN),
    "window": LineStyle("window", GREEN),
    "neighborhood": LineStyle("neighborhood", GREEN, 1.3, (3.2, 1.4)),
    "per_query": LineStyle("keys of each query", VERMILION),
    "ms_deform": LineStyle("Deformable DETR", ORANGE),
    "ms_deform_dot": LineStyle("DETR, dot products", ORANGE, 1.3, (3.2, 1.4)),
    "deform_conv": LineStyle("deformable conv.", PINK),
}
PREFIXES = {0: "", 3: " k", 6: " M", 9: " G", 12: " T", 15: " P", 18: " E"}
LABEL_WIDTH, TICK_WIDTH = 1.68, 0.42  # space for labels on the right and for ticks on the left, inches
LABEL_PITCH = 0.155  # minimum vertical distance of two labels, inches


class CurveLike(Protocol):
    """Interface of a curve: `dat_ref.complexity.Curve`, or an object with the same attributes."""

    @property
    def kind(self) -> str:
        """Name of the attention."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the maps."""

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds at each side."""

    @property
    def saved_bytes(self) -> tuple[int, ...]:
        """Bytes stored for the backward pass at each side."""


@with_style
def draw_cost(curves: Sequence[CurveLike], *, reduction: int, label: str = "", keys: int | None = None) -> Figure:
    """Draw multiply-adds and memory against the side of the image.

    Args:
        curves: one curve per attention, all at the same sides, with positive values.
        reduction: image pixels per map pixel.
        label: name of the layer, for the title.
        keys: number of keys per query at the first side, for the caption.
    """
    if not curves or any(curve.sides != curves[0].sides or len(curve.sides) < 2 for curve in curves):
        raise ValueError("curves: expected at least one, all at the same two or more sides")
    first = reduction * curves[0].sides[0]
    unchanged = "windows, kernels and strides do not change"
    matched_caption = (
        f"All have {keys} keys per query at {first} × {first}, or the closest possible number; {unchanged}"
    )
    layout = make_layout(
        2,
        1.02,
        columns=2,
        title=f"{label or 'One layer'}: cost against the size of the image",
        caption=f"One image, float32. {unchanged.capitalize() if keys is None else matched_caption}. Next to each "
        "name: growth exponent over the last two sides; 2 is linear in the number of pixels. Deformable convolution "
        "stores no samples: its backward pass samples again.",
        footer=0.42,
    )
    panels = (
        ("Multiply-adds", "", [curve.macs for curve in curves]),
        ("Memory for the backward pass", "B", [curve.saved_bytes for curve in curves]),
    )
    for axes, (title, unit, amounts) in zip(layout.axes, panels, strict=True):
        _reserve_margins(axes)
        axes.set_title(title)
        for curve, values in zip(curves, amounts, strict=True):
            line_style = _line_style(curve.kind)
            axes.plot(
                [reduction * side for side in curve.sides],
                values,
                color=line_style.color,
                lw=line_style.width,
                dashes=line_style.dashes or (None, None),
                marker="o",
                ms=2.6,
                mec="white",
                mew=0.5,
                zorder=3 if line_style.width > 2 else 2,
                solid_capstyle="round",
            )
        _set_scales(axes, [reduction * side for side in curves[0].sides], amounts, unit)
        _label_lines(axes, curves, amounts)
    return layout.figure


def _line_style(kind: str) -> LineStyle:
    return LINE_STYLES.get(kind, LineStyle(kind.replace("_", " "), GRAY))


def _reserve_margins(axes: Axes) -> None:
    """Narrow a panel, to leave space for the ticks on the left and the labels on the right."""
    box, page_width = axes.get_position(), _figure_size(axes)[0]
    axes.set_position(
        (box.x0 + TICK_WIDTH / page_width, box.y0, box.width - (TICK_WIDTH + LABEL_WIDTH) / page_width, box.height)
    )


def _figure_size(axes: Axes) -> tuple[float, float]:
    figure: Any = axes.figure
    width, height = figure.get_size_inches()
    return float(width), float(height)


def _set_scales(axes: Axes, sides: list[int], amounts: list[tuple[int, ...]], unit: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sides[0] * 0.93, sides[-1] * 1.07)
    axes.xaxis.set_major_locator(FixedLocator(sides))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda side, _: f"{side:.0f}"))
    low, high = min(map(min, amounts)), max(map(max, amounts))
    axes.set_ylim(low / 1.8, high * 1.8)
    decades = range(math.ceil(math.log10(low / 1.8)), math.floor(math.log10(high * 1.8)) + 1)
    axes.yaxis.set_major_locator(FixedLocator([10.0**decade for decade in decades]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda amount, _: _format_amount(amount, unit)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=HAIRLINE, lw=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("side of the image, pixels")


def _format_amount(amount: float, unit: str) -> str:
    """Format an amount with a unit prefix: 2 000 000 B as 2 MB."""
    if amount <= 0:
        return "0"
    power = min(max(3 * math.floor(math.log10(amount) / 3 + 1e-9), 0), max(PREFIXES))
    prefix = PREFIXES[power] or (" " if unit else "")
    return f"{amount / 10**power:g}{prefix}{unit}"


def _label_lines(axes: Axes, curves: Sequence[CurveLike], amounts: list[tuple[int, ...]]) -> None:
    """Label each line at its right end. Labels that would overlap are moved vertically and connected to their line."""
    height = axes.get_position().height * _figure_size(axes)[1]
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    ends = [(math.log10(values[-1]) - low) / (high - low) * height for values in amounts]
    order = sorted(range(len(curves)), key=lambda index: ends[index])
    positions = _spread_labels([ends[index] for index in order], LABEL_PITCH)
    width = axes.get_position().width * _figure_size(axes)[0]
    for index, position in zip(order, positions, strict=True):
        line_style, values = _line_style(curves[index].kind), amounts[index]
        exponent = math.log2(values[-1] / values[-2]) / math.log2(curves[index].sides[-1] / curves[index].sides[-2])
        axes.plot(
            [1.0, 1 + 0.05 / width, 1 + 0.15 / width, 1 + 0.19 / width],
            [ends[index] / height, ends[index] / height, position / height, position / height],
            transform=axes.transAxes,
            color=line_style.color,
            lw=0.5,
            alpha=0.7,
            clip_on=False,
        )
        axes.annotate(
            f"{line_style.name} ",
            (1 + 0.22 / width, position / height),
            xycoords="axes fraction",
            color=line_style.color,
            size=8,
            va="center",
            weight="bold" if line_style.width > 2 else "normal",
        )
        axes.annotate(
            f"{exponent:.1f}",
            (1 + (LABEL_WIDTH - 0.02) / width, position / height),
            xycoords="axes fraction",
            color=QUIET,
            size=7.5,
            va="center",
            ha="right",
        )


def _spread_labels(targets: list[float], pitch: float) -> list[float]:
    """Return ordered positions at least `pitch` apart, as close as possible to the targets.

    Labels that would overlap form a group, which is centered on the mean of its targets.

    >>> _spread_labels([0.0, 0.5, 1.0, 5.0], 1.0)
    [-0.5, 0.5, 1.5, 5.0]
    """
    groups: list[list[float]] = []  # for each group, the targets of its members minus their offsets in the group
    group_starts: list[float] = []
    for target in targets:
        groups.append([target])
        group_starts.append(target)
        while len(groups) > 1 and group_starts[-2] + pitch * len(groups[-2]) > group_starts[-1]:
            last_group = groups.pop()
            group_starts.pop()
            groups[-1] += [member - pitch * len(groups[-1]) for member in last_group]
            group_starts[-1] = sum(groups[-1]) / len(groups[-1])
    return [start + pitch * rank for start, group in zip(group_starts, groups) for rank in range(len(group))]
