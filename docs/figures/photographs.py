"""Draw the site's photographs with the figures of `dat-ref explain`, as small files.

    python docs/figures/photographs.py

The figures of the cat use random, untrained weights: they show the geometry of points and windows, not the attention of
a trained model. The figure of the scenes uses the trained network of the package.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dat_ref import (
    DAT,
    Convention,
    DATConfig,
    DeformableAttentionConfig,
    OffsetBound,
    config,
    init_params,
    viz,
)
from dat_ref.backbone import Step
from dat_ref.cli import spot
from dat_ref.cli.photo import load_photo, prepare
from dat_ref.config import AttentionConfig

IMAGES = Path(__file__).parents[1] / "images"
COLORS = 128


def last_blocks(model: DAT, photo: np.ndarray, stage: int) -> tuple[Step, Step | None]:
    """Return the last deformable step of a stage, and the last local one if there is one."""
    steps = [step for step in model.walk(prepare(photo, 224)) if step.stage == stage]
    kinds = [model.config.stages[stage][step.block].attention.kind for step in steps]
    last_by_kind = {kind == "deformable": step for kind, step in zip(kinds, steps, strict=True)}
    return last_by_kind[True], last_by_kind.get(False)


def with_bounded_offsets(model: DATConfig) -> DATConfig:
    """Return the backbone with this project's own geometry: cell centers, and offsets of at most one key cell."""

    def bounded(attention: AttentionConfig, stage: int) -> AttentionConfig:
        if not isinstance(attention, DeformableAttentionConfig):
            return attention
        return replace(
            attention, convention=Convention.CELL_CENTER, offset_bound=OffsetBound.TANH_CELLS, offset_range=2.0
        )

    return model.map_attention(bounded)


def save_png(figure: Figure, name: str, width: int) -> None:
    """Save as a PNG of `width` pixels and COLORS colors, which keeps lines sharp and the file small."""
    path = viz.save(figure, IMAGES / f"{name}.png")
    with Image.open(path) as picture:
        size = (width, round(picture.height * width / picture.width))
        small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    small.quantize(COLORS, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Draw the scenes and the three photographs."""
    objects = spot.draw([spot.look_at_scene(number) for number in spot.SCENES], IMAGES)
    with Image.open(objects[0]) as picture:
        size = (1120, round(picture.height * 1120 / picture.width))
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(IMAGES / "objects.jpg", quality=78)
    for path in objects:
        path.unlink()
    photo = load_photo(None)
    large = np.asarray(Image.fromarray((photo * 255).astype(np.uint8)).resize((1347, 896))) / 255

    tiny = config("dat_tiny")
    deformable, window = last_blocks(DAT(tiny, init_params(tiny, 0)), photo, stage=3)
    assert window is not None
    trace, cell = deformable.trace.attention, (2, 4)
    figure = viz.draw_attention(
        large,
        np.array([cell], dtype=float),
        [viz.deformable_query_attention(trace, cell)],
        [viz.window_query_attention(window.trace.attention, cell)],
        map_size=trace.x.shape[2:],
        label="dat_tiny, stage 4",
    )
    save_png(figure, "attention", 1120)

    plus = config("dat_pp_tiny")
    with_offsets, _ = last_blocks(DAT(with_bounded_offsets(plus), init_params(plus, 0)), photo, stage=0)
    save_png(viz.draw_points(large, with_offsets.trace.attention), "points", 760)
    no_offsets, _ = last_blocks(DAT(plus, init_params(plus, 0, offsets="zero_offset")), photo, stage=0)
    save_png(viz.draw_points(large, no_offsets.trace.attention, label="dat_pp_tiny, stage 1"), "reference_2023", 760)


if __name__ == "__main__":
    main()
