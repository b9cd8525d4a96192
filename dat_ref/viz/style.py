"""Style of the figures: colors, settings, and the layout of panels on a page.

The figures use matplotlib's objects without pyplot. Drawing needs no display and does not change the user's settings.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import style as mpl_style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

# Palette of Okabe and Ito, distinguishable with every kind of color vision; the colors of groups 1, 2, …
GROUP_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F", "#444444")
INK, QUIET, HAIRLINE, MARGIN = "#1f1f1f", "#666666", "#c4c4c4", "#f3f3f1"
QUERY = "#E8262A"
DARK = "#3f3d3b"  # background of HEAT in a legend, similar to the darkened photograph in a panel
# Opacity increases with attention: low attention hides little of the photograph.
HEAT = LinearSegmentedColormap.from_list("dat_ref.heat", ["#D9771A24", "#E8821C66", "#F79A2BCC", "#FFDE85FA"])
FIELD = LinearSegmentedColormap.from_list("dat_ref.field", ["#FBFCFD", "#CFE1F0", "#86B6DA", "#3585BE"])

SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 8.5,
    "axes.edgecolor": HAIRLINE,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
DPI = 140
# In inches: width of the page, minimum width, height of a block of panels with its legends.
WIDTH, MIN_WIDTH, HEIGHT = 9.8, 7.2, 8.4
SIDE, GAP, PANEL_TITLE = 0.28, 0.22, 0.27
TITLE_SIZE, CAPTION_SIZE = 12.5, 9

P = ParamSpec("P")
T = TypeVar("T")


def with_style(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs with matplotlib's defaults and `SETTINGS`, then restores the user's settings."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with mpl_style.context(["default", SETTINGS]):
            return function(*args, **kwargs)

    return run


@with_style
def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file, reproducibly: fixed resolution, no date and no program name."""
    path = Path(path)
    metadata: dict[str, dict[str, None]] = {
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    with mpl_style.context({"svg.hashsalt": "dat_ref"}):
        figure.savefig(path, dpi=DPI, metadata=metadata.get(path.suffix.lower()))
    return path


@dataclass(frozen=True)
class FigureLayout:
    """Page with title and caption at the top, panels of equal size in rows, and a free footer."""

    figure: Figure
    axes: list[Axes]
    panel: tuple[float, float]  # height, width of one panel in inches
    footer: float  # height in inches

    def add_axes(self, left: float, width: float, bottom: float, height: float) -> Axes:
        """Add axes; positions are in inches from the page's left and bottom border."""
        page_width, page_height = self.figure.get_size_inches()
        return self.figure.add_axes((left / page_width, bottom / page_height, width / page_width, height / page_height))


def make_layout(
    count: int,
    aspect: float,
    *,
    title: str,
    caption: str,
    footer: float = 0.0,
    columns: int | None = None,
    titled: bool = True,
) -> FigureLayout:
    """Arrange panels on a page, as large as possible.

    Args:
        count: number of panels.
        aspect: height / width of a panel.
        title, caption: texts above the panels, wrapped to the width of the page.
        footer: free space below the panels, in inches.
        columns: number of columns, chosen automatically if None.
        titled: leave space for a title above each panel.
    """
    panel_title = PANEL_TITLE if titled else 0.0
    max_height = HEIGHT - footer
    columns = columns or _columns(count, aspect, max_height)
    rows = -(-count // columns)
    panel_height, panel_width = _panel(rows, columns, aspect, max_height)
    block_width = columns * panel_width + (columns - 1) * GAP
    page_width = max(MIN_WIDTH, block_width + 2 * SIDE)

    left = (page_width - block_width) / 2
    title_lines = _wrap(title, TITLE_SIZE, page_width - left - SIDE)
    caption_lines = _wrap(caption, CAPTION_SIZE, page_width - left - SIDE)
    caption_top = 0.22 + 0.24 * len(title_lines)
    header = caption_top + 0.17 * len(caption_lines) + 0.12
    page_height = header + rows * (panel_title + panel_height) + (rows - 1) * 0.1 + footer + 0.2

    figure = Figure(figsize=(page_width, page_height))
    figure.text(left / page_width, 1 - 0.2 / page_height, "\n".join(title_lines), size=TITLE_SIZE, va="top")
    figure.text(
        left / page_width,
        1 - caption_top / page_height,
        "\n".join(caption_lines),
        size=CAPTION_SIZE,
        color=QUIET,
        va="top",
        linespacing=1.35,
    )
    layout = FigureLayout(figure, [], (panel_height, panel_width), footer)
    for index in range(count):
        row, column = divmod(index, columns)
        top = page_height - header - row * (panel_title + panel_height + 0.1) - panel_title
        panel_left = left + column * (panel_width + GAP)
        layout.axes.append(layout.add_axes(panel_left, panel_width, top - panel_height, panel_height))
    return layout


def _panel(rows: int, columns: int, aspect: float, max_height: float) -> tuple[float, float]:
    """Return height and width of the largest panel that fits the page's width and height."""
    width = (WIDTH - 2 * SIDE - (columns - 1) * GAP) / columns
    height = min(max(max_height / rows, 1.9), 6.6)  # many rows make a longer page rather than tiny panels
    return min(height, width * aspect), min(width, height / aspect)


def _columns(count: int, aspect: float, max_height: float) -> int:
    """Return the number of columns that gives large panels, with a preference for wide pages and few empty cells."""
    choices = [c for c in (1, 3, 2) if count % c == 0] if count < 4 else [2, 3, 4]
    return max(
        choices,
        key=lambda c: _panel(-(-count // c), c, aspect, max_height)[0] * (1 + 0.05 * c) * (1 - 0.03 * (-count % c)),
    )


def _wrap(text: str, size: float, width: float) -> list[str]:
    """Wrap a text to `width` inches, with a typical letter width of 0.56 of the type size."""
    return textwrap.wrap(text, max(20, int(width * 72 / (0.56 * size))))


def as_photo(photo: ArrayLike) -> NDArray[np.float64]:
    """Convert a photograph, (H, W, 3) or (H, W), bytes or values in [0, 1], to (H, W, 3) in [0, 1]."""
    picture = np.asarray(photo)
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    if picture.ndim != 3 or picture.shape[-1] != 3 or 0 in picture.shape:
        raise ValueError(f"photo: expected (H, W, 3) or (H, W), bytes or values in [0, 1], got {picture.shape}")
    scale = 255.0 if picture.dtype.kind in "iu" else 1.0
    return np.clip(picture.astype(np.float64) / scale, 0, 1)


def blend_toward(photo: NDArray[np.float64], level: float, blend: float, gray: float) -> NDArray[np.float64]:
    """Desaturate a photograph by the factor `gray` and blend it toward white (`level` 1) or black (0)."""
    luma = photo @ np.array([0.299, 0.587, 0.114])
    toned = (1 - gray) * photo + gray * luma[..., None]
    return (1 - blend) * toned + blend * level


def group_color(group: int) -> str:
    """Return the color of an offset group."""
    return GROUP_COLORS[group % len(GROUP_COLORS)]
