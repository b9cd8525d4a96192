"""Figure of the time and memory of the core against the size of the map, log-log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .style import GROUP_COLORS, HAIRLINE, INK, make_layout, save, with_style

__all__ = ["draw_speed", "save"]

BLUE, VERMILION, GREEN, PINK, _, _, BROWN, GRAY = GROUP_COLORS
TICKS = 0.5  # space for the tick labels on the left of a panel, inches


class LineStyle(NamedTuple):
    """Style and name of a line."""

    name: str
    color: str
    width: float = 1.4
    dashes: tuple[float, ...] = ()


LINE_STYLES = {
    "eager": LineStyle("eager, as released", INK),
    "matmul": LineStyle("matmul", BROWN),
    "blockwise": LineStyle("blockwise", GREEN),
    "cpu": LineStyle("cpu (Numba)", BLUE, 2.2),
    "triton": LineStyle("triton", VERMILION, 2.2),
    "sdpa": LineStyle("torch's attention, no bias", PINK, 1.4, (3.2, 1.4)),
}


@with_style
def draw_speed(results: Mapping[str, Any]) -> Figure:
    """Draw the measurements of `dat-ref bench` on maps of increasing size.

    Args:
        results: results of the benchmark, as written with ``--json``; ``resolutions`` has at least two maps.

    Raises:
        ValueError: if there are fewer than two maps.
    """
    maps, machine = results["resolutions"], results["machine"]
    if len(maps) < 2:
        raise ValueError(f"resolutions: expected at least two maps, got {len(maps)}")
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    layout = make_layout(
        2,
        0.8,
        columns=2,
        title="Time and memory of the core against the size of the map",
        caption=f"Forward pass, one image, 12 heads of 32 channels, one key per pixel, {maps[0]['dtype']}. "
        f"{machine['hardware']}{threads}, torch {machine['versions']['torch']}, {machine['date']}. "
        "A line ends where its backend needs more memory than available.",
        footer=0.68,
    )
    time, memory = layout.axes
    lines = [_panel(time, maps, "Time", "seconds", "s"), _panel(memory, maps, "Memory", "bytes", "B")]
    layout.figure.legend(handles=lines[0], loc="lower center", ncols=len(lines[0]), handlelength=2.2)
    return layout.figure


def _panel(axes: Axes, maps: list[Mapping[str, Any]], title: str, field: str, symbol: str) -> list[Any]:
    _reserve_margins(axes)
    names = list(dict.fromkeys(row["name"] for each in maps for row in each["rows"]))
    lines = []
    for name in names:
        amounts = {
            each["side"]: row[field]["forward"]
            for each in maps
            for row in each["rows"]
            if row["name"] == name and row[field]["forward"]
        }
        line_style = LINE_STYLES.get(name, LineStyle(name, GRAY))
        (line,) = axes.plot(
            list(amounts),
            list(amounts.values()),
            color=line_style.color,
            lw=line_style.width,
            dashes=line_style.dashes or (None, None),
            marker="o",
            ms=2.8,
            mec="white",
            mew=0.5,
            label=line_style.name,
        )
        lines.append(line)
    sides = [each["side"] for each in maps]
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sides[0] * 0.93, sides[-1] * 1.07)
    axes.set_xlabel("side of the map, pixels")
    axes.xaxis.set_major_locator(FixedLocator(sides))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda side, _: f"{side:.0f}"))
    axes.yaxis.set_major_locator(LogLocator(10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda amount, _: _format_amount(amount, symbol)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=HAIRLINE, lw=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    return lines


def _reserve_margins(axes: Axes) -> None:
    box, figure = axes.get_position(), axes.figure
    assert figure is not None
    share = TICKS / figure.get_size_inches()[0]  # type: ignore[union-attr]
    axes.set_position((box.x0 + share, box.y0, box.width - share, box.height))


def _format_amount(amount: float, unit: str) -> str:
    """Format an amount with a unit prefix.

    >>> _format_amount(2e6, "B"), _format_amount(1e-4, "s")
    ('2 MB', '100 µs')
    """
    prefixes = {1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "µ"}
    factor = next((factor for factor in prefixes if amount >= factor * 0.999), 1e-6)
    return f"{amount / factor:g} {prefixes[factor]}{unit}"
