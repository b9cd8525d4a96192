"""Four figures of a deformable-attention layer on a photograph.

Each function takes a photograph and a layer's trace (or an object with the same attributes). It returns a matplotlib
`Figure`; `save` writes it to a file. The photograph may have any size: it and the map cover the same region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from .artists import (
    View,
    color_bar,
    color_norm,
    dim,
    draw_circles,
    draw_components,
    draw_heatmap,
    draw_offsets,
    show_photo,
    size_legend,
    style_frame,
    uniform_share_area,
)
from .geometry import QueryAttention, Size, item_points, item_references, key_importance, to_image_px, trace_map_size
from .style import DARK, FIELD, INK, QUERY, QUIET, as_photo, blend_toward, group_color, make_layout, with_style

MAX_SHARED_PANEL_POINTS = 150  # with more points, each group gets its own panel


@with_style
def draw_points(photo: ArrayLike, trace: Any, *, label: str = "", batch: int = 0) -> Figure:
    """Draw reference points, sampling points and offsets on the photograph, with one color per group.

    The groups share a panel if there are few points. Otherwise each group has its own panel.

    Args:
        photo: (H, W, 3) or (H, W), bytes or values in [0, 1].
        trace: trace of a deformable layer.
        label: name of the layer, for the title.
        batch: index of the image in the batch.
    """
    picture = as_photo(photo)
    size = picture.shape[:2]
    references = to_image_px(item_references(trace, batch), trace_map_size(trace), size)  # (G, Hk, Wk, 2)
    points = to_image_px(item_points(trace, batch), trace_map_size(trace), size)
    groups, rows, columns, _ = points.shape
    view = View.around(size, np.concatenate([references, points]))

    separate_panels = groups > 1 and groups * rows * columns > MAX_SHARED_PANEL_POINTS
    layout = make_layout(
        groups if separate_panels else 1,
        view.aspect,
        title=_title(label, trace),
        caption=_points_caption(trace, batch),
        footer=0.42,
        titled=separate_panels,
    )
    background = blend_toward(picture, 1.0, 0.42, 0.45)
    pitch = view.pitch(layout, (rows, columns))
    for index, axes in enumerate(layout.axes):
        show_photo(axes, background, view)
        shown = [index] if separate_panels else range(groups)
        for group in shown:
            draw_offsets(
                axes, references[group].reshape(-1, 2), points[group].reshape(-1, 2), view, pitch, group_color(group)
            )
        if separate_panels:
            axes.set_title(f"Group {group + 1}", color=group_color(group))
    handles = [
        Line2D([], [], ls="", marker="o", mfc="white", mec=QUIET, mew=0.8, ms=5, label="reference"),
        Line2D(
            [], [], ls="", marker="$\u2192$", color=QUIET, mew=0.3, ms=13, label="offset, tip at the sampling point"
        ),
    ]
    if groups > 1 and not separate_panels:
        handles += [
            Line2D([], [], ls="", marker="o", color=group_color(g), ms=6, label=f"group {g + 1}") for g in range(groups)
        ]
    if view.within(points)[1].any():
        handles.append(
            Line2D([], [], ls="", marker="D", mfc="white", mec=QUIET, mew=0.9, ms=5, label="outside the margin")
        )
    layout.figure.legend(
        handles=handles, loc="lower center", borderaxespad=0.6, ncols=len(handles), handletextpad=0.5, columnspacing=1.8
    )
    return layout.figure


@with_style
def draw_key_importance(
    photo: ArrayLike, trace: Any, *, per_group: bool = False, label: str = "", batch: int = 0
) -> Figure:
    """Draw a circle at each sampling point. Its area is the attention that the key receives from all queries.

    Args:
        photo: (H, W, 3) or (H, W), bytes or values in [0, 1].
        trace: trace of a deformable layer.
        per_group: draw one panel per group.
        label: name of the layer, for the title.
        batch: index of the image in the batch.
    """
    picture = as_photo(photo)
    size = picture.shape[:2]
    points = item_points(trace, batch)
    groups, rows, columns, _ = points.shape
    keys_on_photo = to_image_px(points, trace_map_size(trace), size).reshape(groups, -1, 2)
    importance = key_importance(trace.attention, groups)[batch]  # (G, Ns)
    relative_weights = importance * importance.shape[1] / np.maximum(importance.sum(axis=1, keepdims=True), 1e-300)
    view = View.around(size, keys_on_photo, rim=0.04)

    caption = (
        "Circle area: attention that the key receives, summed over all queries, in multiples of a uniform "
        f"share. Largest {relative_weights.max():.2f}×, smallest {relative_weights.min():.2f}×."
    )
    layout = make_layout(
        groups if per_group else 1,
        view.aspect,
        title=_title(label, trace),
        caption=caption,
        footer=1.0,
        titled=per_group,
    )
    overlap = 1 if per_group else groups
    area = uniform_share_area(relative_weights, view.pitch(layout, (rows, columns)) / overlap**0.5)
    norm = color_norm(relative_weights)
    for index, axes in enumerate(layout.axes):
        show_photo(axes, dim(picture), view, DARK)
        shown = slice(index, index + 1) if per_group else slice(None)
        draw_circles(axes, keys_on_photo[shown].reshape(-1, 2), relative_weights[shown].reshape(-1), area, norm, view)
        if per_group:
            axes.set_title(f"Group {index + 1}")
    size_legend(layout, relative_weights, area, norm)
    return layout.figure


@with_style
def draw_attention(
    photo: ArrayLike,
    queries: ArrayLike,
    deformable_maps: Sequence[QueryAttention],
    window_maps: Sequence[QueryAttention],
    *,
    map_size: Size,
    label: str = "",
    names: tuple[str, str] = ("Deformable attention", "Window attention"),
) -> Figure:
    """Draw for each query (star) its attention in a deformable layer, and in a window or neighborhood.

    Args:
        photo: (H, W, 3) or (H, W), bytes or values in [0, 1].
        queries: (n, 2), order (y, x), in pixels of the map.
        deformable_maps: one `QueryAttention` per query.
        window_maps: one `QueryAttention` per query, or empty for no third column.
        map_size: (H, W) of the map.
        label: name of the layer, for the title.
        names: titles of the second and the third column.
    """
    picture = as_photo(photo)
    size = picture.shape[:2]
    stars = to_image_px(np.asarray(queries).reshape(-1, 2), map_size, size)
    if not len(stars) or len(deformable_maps) != len(stars) or len(window_maps) not in (0, len(stars)):
        raise ValueError(
            f"queries, deformable_maps, window_maps: expected one of each for every query, "
            f"got {len(stars)}, {len(deformable_maps)} and {len(window_maps)}"
        )
    keys_on_photo = [to_image_px(each.keys_px, map_size, size) for each in deformable_maps]
    relative_weights = [each.weights * len(each.weights) for each in deformable_maps]  # in multiples of a uniform share
    view = View.around(size, np.concatenate(keys_on_photo), rim=0.04)

    columns = 3 if window_maps else 2
    layout = make_layout(
        columns * len(stars),
        view.aspect,
        columns=columns,
        title=_join_label(label, f"{_size_text(map_size)} map"),
        caption="Attention of the query (star). Circle area and color: attention in multiples of a uniform share "
        "among the query's keys.",
        footer=0.55,
    )
    grid_side = (
        int(max(len(each) for each in keys_on_photo) ** 0.5) + 1
    )  # side of a square grid with at least as many points
    area = uniform_share_area(np.concatenate(relative_weights), view.pitch(layout, (grid_side, grid_side)))
    points_norm = color_norm(np.concatenate(relative_weights))
    if window_maps:
        window_norm = color_norm(np.concatenate([each.weights * len(each.weights) for each in window_maps]))
        color_bar(layout, layout.axes[2], window_norm)
    for index, star in enumerate(stars):
        row = layout.axes[columns * index : columns * (index + 1)]
        photo_axes, points = row[:2]
        show_photo(photo_axes, picture, view)
        show_photo(points, dim(picture), view, DARK)
        draw_circles(points, keys_on_photo[index], relative_weights[index], area, points_norm, view)
        if window_maps:
            show_photo(row[2], dim(picture), view, DARK)
            draw_heatmap(row[2], window_maps[index], map_size, size, window_norm)
            row[2].set_title(names[1])
        for axes in row:
            axes.scatter(
                star[1], star[0], marker="*", s=150, c=QUERY, edgecolors="white", linewidths=0.9, zorder=6, gid="query"
            )
        y, x = np.asarray(queries).reshape(-1, 2)[index]
        photo_axes.set_title(f"Query at y {y:g}, x {x:g}")
        points.set_title(names[0])
    color_bar(layout, layout.axes[1], points_norm)
    return layout.figure


@with_style
def draw_offset_field(
    photo: ArrayLike,
    trace: Any,
    *,
    bound_px: float | tuple[float, float] | None = None,
    label: str = "",
    batch: int = 0,
) -> Figure:
    """Draw the offset of each key (color: length, arrow: direction) and histograms of the two components.

    Args:
        photo: (H, W, 3) or (H, W), bytes or values in [0, 1].
        trace: trace of a deformable layer.
        bound_px: maximum offset per component, one number or (y, x), in pixels of the map.
        label: name of the layer, for the title.
        batch: index of the image in the batch.
    """
    picture = as_photo(photo)
    height, width = trace_map_size(trace)
    offsets = item_points(trace, batch) - item_references(trace, batch)  # (G, Hk, Wk, 2)
    groups, rows, columns, _ = offsets.shape
    length = np.linalg.norm(offsets, axis=-1)
    step = -(-max(rows, columns) // 24)  # at most 24 arrows per axis, so that they do not overlap
    arrow_scale = _round_down(step * min(height / rows, width / columns) / max(length.max(), 1e-12))

    shown = f"Arrows: direction, drawn {_scale_text(arrow_scale)}" if length.max() > 0 else "All offsets are zero"
    layout = make_layout(
        groups + 1,
        height / width,
        title=_title(label, trace),
        footer=2.35,
        caption=f"Color: length of the offset in pixels of the {_size_text((height, width))} map. {shown}"
        + (f"; every {step}th key in each direction." if step > 1 else "."),
    )
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    photograph, *fields = layout.axes
    style_frame(photograph)
    photograph.imshow(picture, extent=extent, aspect="auto")
    photograph.set_title("Photograph")
    norm = Normalize(0, max(length.max(), 1e-12))
    at_y, at_x = np.meshgrid(
        (np.arange(0, rows, step) + 0.5) * height / rows - 0.5,
        (np.arange(0, columns, step) + 0.5) * width / columns - 0.5,
        indexing="ij",
    )
    shaft = float(np.clip(0.055 * step * layout.panel[1] / columns, 0.005, 0.014))  # in inches
    for group, axes in enumerate(fields):
        style_frame(axes)
        axes.imshow(length[group], extent=extent, cmap=FIELD, norm=norm, aspect="auto", interpolation="nearest")
        dy, dx = np.moveaxis(offsets[group, ::step, ::step] * arrow_scale, -1, 0)
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
    draw_components(layout, offsets, bound_px, norm)
    return layout.figure


# ------------------------------------------------------------------------------------------------ texts


def _title(label: str, trace: Any) -> str:
    groups, rows, columns = trace.points_px.shape[1:4]
    facts = (
        f"{_size_text(trace_map_size(trace))} map",
        _count_text(rows * columns, "key"),
        _count_text(groups, "group"),
    )
    return _join_label(label, " · ".join(facts))


def _join_label(label: str, facts: str) -> str:
    return f"{label} · {facts}" if label else facts


def _size_text(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _count_text(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _scale_text(factor: float) -> str:
    return "to scale" if factor == 1 else f"{factor:g} times as long"


def _round_down(factor: float) -> float:
    """Round down to one significant digit, or to 1.5."""
    power = 10.0 ** np.floor(np.log10(factor))
    digit = max(step for step in (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9) if step == 1 or step * power <= factor)
    return float(f"{digit * power:.2g}")


def _points_caption(trace: Any, batch: int) -> str:
    points = item_points(trace, batch)
    length = np.linalg.norm(points - item_references(trace, batch), axis=-1)
    border = np.subtract(trace_map_size(trace), 0.5)
    outside = int(np.any((points < -0.5) | (points > border), axis=-1).sum())
    where = f"{outside} of {_count_text(length.size, 'point')}" if outside else "no point"
    return (
        f"Offset {length.mean():.2f} pixels of the map on average, {length.max():.2f} at most; {where} outside the map."
    )
