"""Figure of several pictures with reference points, sampling points, and the attention that the points receive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from .artists import View, show_photo
from .geometry import item_points, item_references, key_importance, to_image_px, trace_map_size
from .style import INK, QUIET, as_photo, group_color, make_layout, with_style

COLUMNS = 3
SMALLEST, LARGEST = 9.0, 120.0  # area of a point's circle, points²


class ScenePanel(NamedTuple):
    """Picture, and the trace of a layer on it."""

    picture: ArrayLike  # (H, W, 3), bytes or in [0, 1]; covers the same region as the trace's map
    trace: Any  # trace of one image
    title: str


@with_style
def draw_scenes(panels: Sequence[ScenePanel], *, title: str, caption: str, columns: int = COLUMNS) -> Figure:
    """Draw rings at the reference points and circles at the sampling points of each panel.

    The area of a circle is the attention that its key receives. Its color is the offset group.

    Args:
        panels: one panel or more, with pictures of the same aspect ratio.
        title, caption: texts above the figure.
        columns: number of columns.
    """
    pictures = [as_photo(panel.picture) for panel in panels]
    size = pictures[0].shape[:2]
    columns = min(columns, len(panels))
    layout = make_layout(
        len(panels), size[0] / size[1], title=title, caption=caption, footer=0.42, columns=columns, titled=True
    )
    groups = 1
    for axes, picture, panel in zip(layout.axes, pictures, panels):
        map_size = trace_map_size(panel.trace)
        references = to_image_px(item_references(panel.trace, 0), map_size, picture.shape[:2])  # (G, Hk, Wk, 2)
        points = to_image_px(item_points(panel.trace, 0), map_size, picture.shape[:2])
        groups = len(points)
        view = View.around(picture.shape[:2], np.concatenate([references, points]))
        show_photo(axes, picture, view)
        axes.set_title(panel.title, color=INK)
        received = key_importance(panel.trace.attention, groups)[0]  # (G, Ns)
        share = received / np.maximum(received.sum(axis=1, keepdims=True), 1e-300)
        _draw_points(axes, references.reshape(groups, -1, 2), points.reshape(groups, -1, 2), share)
    layout.figure.legend(
        handles=[
            Line2D([], [], ls="", marker="o", mfc="none", mec=QUIET, mew=1.0, ms=6, label="reference point"),
            *(
                Line2D(
                    [],
                    [],
                    ls="",
                    marker="o",
                    mfc=group_color(g),
                    mec="white",
                    ms=8,
                    label=f"sampling point, group {g + 1}",
                )
                for g in range(groups)
            ),
            Line2D([], [], ls="", marker="o", mfc=QUIET, mec="white", ms=12, label="larger: receives more attention"),
        ],
        loc="lower center",
        ncols=groups + 2,
        borderaxespad=0.5,
        handletextpad=0.4,
    )
    return layout.figure


def _draw_points(axes: Any, references: ArrayLike, points: ArrayLike, share: ArrayLike) -> None:
    """Draw points (G, N, 2) and their offsets. The areas of the circles are proportional to `share` (G, N)."""
    references, points, share = np.asarray(references), np.asarray(points), np.asarray(share)
    rings = references[0]  # the same for all groups
    for edge, width in (("white", 2.2), (INK, 0.9)):
        axes.scatter(rings[:, 1], rings[:, 0], s=26, facecolors="none", edgecolors=edge, linewidths=width, zorder=2)
    for group, (tails, heads, weights) in enumerate(zip(references, points, share)):
        segments = np.stack([tails, heads], axis=1)[..., ::-1]
        for color, width in (("white", 2.4), (group_color(group), 1.3)):
            axes.add_collection(LineCollection(list(segments), colors=color, linewidths=width, zorder=3))
        order = np.argsort(-weights, kind="stable")  # the largest circle first, so that none hides another
        axes.scatter(
            heads[order, 1],
            heads[order, 0],
            s=np.clip(LARGEST * weights[order] / max(float(share.max()), 1e-12), SMALLEST, LARGEST),
            c=group_color(group),
            edgecolors="white",
            linewidths=1.0,
            zorder=4 + group,
            gid="points",
        )
