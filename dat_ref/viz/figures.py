"""Four pictures of a deformable-attention layer at work on a photograph.

Each takes the photograph and the layer's trace (anything with its attributes) and returns a matplotlib
Figure, which `save` writes. The photograph may have any size: it and the map cover the same ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from .geometry import Attended, Size, key_importance, map_size_of, points_of, references_of, to_image_px
from .marks import (
    View,
    area_of_even_share,
    color_bar,
    dimmed,
    draw_circles,
    draw_components,
    draw_heat,
    draw_offsets,
    frame,
    norm_of,
    show,
    size_legend,
)
from .style import DARK, FIELD, INK, QUERY, QUIET, as_photo, group_color, sheet, styled, toward

MARKS_IN_ONE_PANEL = 150  # more points than this are told apart only in a panel for each group


@styled
def draw_points(photo: ArrayLike, trace: Any, *, label: str = "", batch: int = 0) -> Figure:
    """Reference grid and moved points over the photograph, the offsets as arrows, one colour a group.

    Groups share a panel while that can be read and have one each when it cannot.
    """
    picture = as_photo(photo)
    size = picture.shape[:2]
    references = to_image_px(references_of(trace, batch), map_size_of(trace), size)  # (G, Hk, Wk, 2)
    points = to_image_px(points_of(trace, batch), map_size_of(trace), size)
    groups, rows, columns, _ = points.shape
    view = View.around(size, np.concatenate([references, points]))

    apart = groups > 1 and groups * rows * columns > MARKS_IN_ONE_PANEL
    page = sheet(
        groups if apart else 1,
        view.aspect,
        title=_title(label, trace),
        caption=_points_caption(trace, batch),
        footer=0.42,
        titled=apart,
    )
    background = toward(picture, 1.0, 0.42, 0.45)
    pitch = view.pitch(page, (rows, columns))
    for index, axes in enumerate(page.axes):
        show(axes, background, view)
        shown = [index] if apart else range(groups)
        for group in shown:
            draw_offsets(
                axes, references[group].reshape(-1, 2), points[group].reshape(-1, 2), view, pitch, group_color(group)
            )
        if apart:
            axes.set_title(f"Group {group + 1}", color=group_color(group))
    handles = [
        Line2D([], [], ls="", marker="o", mfc="white", mec=QUIET, mew=0.8, ms=5, label="reference"),
        Line2D([], [], ls="", marker="$\u2192$", color=QUIET, mew=0.3, ms=13, label="offset, tip at the moved point"),
    ]
    if groups > 1 and not apart:
        handles += [
            Line2D([], [], ls="", marker="o", color=group_color(g), ms=6, label=f"group {g + 1}") for g in range(groups)
        ]
    if view.within(points)[1].any():
        handles.append(Line2D([], [], ls="", marker="D", mfc="white", mec=QUIET, mew=0.9, ms=5, label="further out"))
    page.figure.legend(
        handles=handles, loc="lower center", borderaxespad=0.6, ncols=len(handles), handletextpad=0.5, columnspacing=1.8
    )
    return page.figure


@styled
def draw_key_importance(
    photo: ArrayLike, trace: Any, *, per_group: bool = False, label: str = "", batch: int = 0
) -> Figure:
    """A circle at each moved point, its area the attention the key receives, on the dimmed photograph."""
    picture = as_photo(photo)
    size = picture.shape[:2]
    points = points_of(trace, batch)
    groups, rows, columns, _ = points.shape
    places = to_image_px(points, map_size_of(trace), size).reshape(groups, -1, 2)
    importance = key_importance(trace.attention, groups)[batch]  # (G, Ns)
    times_even = importance * importance.shape[1] / np.maximum(importance.sum(axis=1, keepdims=True), 1e-300)
    view = View.around(size, places, rim=0.04)

    caption = (
        "Circle area: attention the key receives, summed over all queries, in multiples of an even "
        f"share. Largest {times_even.max():.2f}×, smallest {times_even.min():.2f}×."
    )
    page = sheet(
        groups if per_group else 1,
        view.aspect,
        title=_title(label, trace),
        caption=caption,
        footer=1.0,
        titled=per_group,
    )
    crowd = 1 if per_group else groups
    area = area_of_even_share(times_even, view.pitch(page, (rows, columns)) / crowd**0.5)
    norm = norm_of(times_even)
    for index, axes in enumerate(page.axes):
        show(axes, dimmed(picture), view, DARK)
        shown = slice(index, index + 1) if per_group else slice(None)
        draw_circles(axes, places[shown].reshape(-1, 2), times_even[shown].reshape(-1), area, norm, view)
        if per_group:
            axes.set_title(f"Group {index + 1}")
    size_legend(page, times_even, area, norm)
    return page.figure


@styled
def draw_attention(
    photo: ArrayLike,
    queries: ArrayLike,
    deformable_maps: Sequence[Attended],
    window_maps: Sequence[Attended],
    *,
    map_size: Size,
    label: str = "",
    names: tuple[str, str] = ("Deformable attention", "Window attention"),
) -> Figure:
    """For each query (a star): what it attends to through deformed points, and in a window or neighborhood.

    queries: (n, 2), (y, x) in pixels of the map; one `Attended` for each query in both sequences. Without
    `window_maps` (a stage that has deformable blocks only) the third column is left out.
    """
    picture = as_photo(photo)
    size = picture.shape[:2]
    stars = to_image_px(np.asarray(queries).reshape(-1, 2), map_size, size)
    if not len(stars) or len(deformable_maps) != len(stars) or len(window_maps) not in (0, len(stars)):
        raise ValueError(
            f"queries, deformable_maps, window_maps: expected one of each for every query, "
            f"got {len(stars)}, {len(deformable_maps)} and {len(window_maps)}"
        )
    places = [to_image_px(each.cells_px, map_size, size) for each in deformable_maps]
    deformed = [each.weights * len(each.weights) for each in deformable_maps]  # in multiples of an even share
    view = View.around(size, np.concatenate(places), rim=0.04)

    columns = 3 if window_maps else 2
    page = sheet(
        columns * len(stars),
        view.aspect,
        columns=columns,
        title=_join(label, f"{_by(map_size)} map"),
        caption="Where the query (star) looks. Circle area and colour: attention in multiples of an "
        "even share among the query's keys.",
        footer=0.55,
    )
    a_side = int(max(len(each) for each in places) ** 0.5) + 1  # circles, were they on a square grid
    area = area_of_even_share(np.concatenate(deformed), view.pitch(page, (a_side, a_side)))
    deformed_norm = norm_of(np.concatenate(deformed))
    if window_maps:
        window_norm = norm_of(np.concatenate([each.weights * len(each.weights) for each in window_maps]))
        color_bar(page, page.axes[2], window_norm)
    for index, star in enumerate(stars):
        row = page.axes[columns * index : columns * (index + 1)]
        plain, points = row[:2]
        show(plain, picture, view)
        show(points, dimmed(picture), view, DARK)
        draw_circles(points, places[index], deformed[index], area, deformed_norm, view)
        if window_maps:
            show(row[2], dimmed(picture), view, DARK)
            draw_heat(row[2], window_maps[index], map_size, size, window_norm)
            row[2].set_title(names[1])
        for axes in row:
            axes.scatter(
                star[1], star[0], marker="*", s=150, c=QUERY, edgecolors="white", linewidths=0.9, zorder=6, gid="query"
            )
        y, x = np.asarray(queries).reshape(-1, 2)[index]
        plain.set_title(f"Query at y {y:g}, x {x:g}")
        points.set_title(names[0])
    color_bar(page, page.axes[1], deformed_norm)
    return page.figure


@styled
def draw_offset_field(
    photo: ArrayLike,
    trace: Any,
    *,
    bound_px: float | tuple[float, float] | None = None,
    label: str = "",
    batch: int = 0,
) -> Figure:
    """Offsets key by key: length as colour, direction as arrows, and how their two components are spread.

    bound_px: the largest component the layer allows, one number or (y, x), in pixels of the map.
    """
    picture = as_photo(photo)
    height, width = map_size_of(trace)
    offsets = points_of(trace, batch) - references_of(trace, batch)  # (G, Hk, Wk, 2)
    groups, rows, columns, _ = offsets.shape
    length = np.linalg.norm(offsets, axis=-1)
    every = -(-max(rows, columns) // 24)  # arrows beyond this number run into one another
    enlarged = _nice(every * min(height / rows, width / columns) / max(length.max(), 1e-12))

    shown = f"Arrows: direction, drawn {_times(enlarged)}" if length.max() > 0 else "No point is moved"
    page = sheet(
        groups + 1,
        height / width,
        title=_title(label, trace),
        footer=2.35,
        caption=f"Colour: length of the offset in pixels of the {_by((height, width))} map. {shown}"
        + (f"; every {every}th key in each direction." if every > 1 else "."),
    )
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    photograph, *fields = page.axes
    frame(photograph)
    photograph.imshow(picture, extent=extent, aspect="auto")
    photograph.set_title("Photograph")
    norm = Normalize(0, max(length.max(), 1e-12))
    at_y, at_x = np.meshgrid(
        (np.arange(0, rows, every) + 0.5) * height / rows - 0.5,
        (np.arange(0, columns, every) + 0.5) * width / columns - 0.5,
        indexing="ij",
    )
    shaft = float(np.clip(0.055 * every * page.panel[1] / columns, 0.005, 0.014))  # in inches
    for group, axes in enumerate(fields):
        frame(axes)
        axes.imshow(length[group], extent=extent, cmap=FIELD, norm=norm, aspect="auto", interpolation="nearest")
        dy, dx = np.moveaxis(offsets[group, ::every, ::every] * enlarged, -1, 0)
        if length.max() > 0:
            axes.quiver(
                at_x - dx / 2,
                at_y - dy / 2,
                dx,
                dy,
                angles="xy",
                scale_units="xy",
                scale=1,
                units="inches",
                width=shaft,
                color=INK,
                headwidth=4,
                headlength=4.5,
                headaxislength=4,
                minlength=0.3,
            )
        axes.set_title(f"Group {group + 1}", color=group_color(group))
    draw_components(page, offsets, bound_px, norm)
    return page.figure


# Words


def _title(label: str, trace: Any) -> str:
    groups, rows, columns = trace.points_px.shape[1:4]
    facts = (f"{_by(map_size_of(trace))} map", _count(rows * columns, "key"), _count(groups, "group"))
    return _join(label, " · ".join(facts))


def _join(label: str, facts: str) -> str:
    return f"{label} · {facts}" if label else facts


def _by(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _times(factor: float) -> str:
    return "to scale" if factor == 1 else f"{factor:g} times as long"


def _nice(factor: float) -> float:
    """The largest round number (one digit, or 1.5) not above the factor."""
    power = 10.0 ** np.floor(np.log10(factor))
    digit = max(step for step in (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9) if step == 1 or step * power <= factor)
    return float(f"{digit * power:.2g}")


def _points_caption(trace: Any, batch: int) -> str:
    points = points_of(trace, batch)
    length = np.linalg.norm(points - references_of(trace, batch), axis=-1)
    border = np.subtract(map_size_of(trace), 0.5)
    outside = int(np.any((points < -0.5) | (points > border), axis=-1).sum())
    where = f"{outside} of {_count(length.size, 'point')}" if outside else "no point"
    return (
        f"Offset {length.mean():.2f} pixels of the map on average, {length.max():.2f} at most; {where} outside the map."
    )
