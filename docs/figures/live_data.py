"""Write the data of the live figures: a photograph, a map of it, a bias table, sampling points of one pass, accuracies.

    python docs/figures/live_data.py            writes docs/js/figures/data/*.mjs
    python docs/figures/live_data.py --photo    first makes the photograph and its map again (needs pillow)

A test fails if they differ from the output of this script. The photograph and its map are stored as files, because
another version of a JPEG library may write other bytes.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from dat_ref import Convention, DeformableAttentionConfig, init_params
from dat_ref.ops.coverage import coverage, fixed_grid_bound
from dat_ref.peers import (
    ATTENTIONS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    receptive_field,
)
from dat_ref.peers.receptive_field import sampled_pixels

DOCS = Path(__file__).parents[1]
PHOTO, PICTURE = DOCS / "images" / "live_photo.jpg", DOCS / "images" / "live_map.png"
PHOTO_SIZE, MAP_SIZE = (450, 300), (36, 24)  # width, height
TABLE_MAP = (5, 7)  # height, width of the map of the bias table

# ------------------------------------------------------------------------------------------------ photograph


def make_photo() -> None:
    """Crop the photograph to 3 : 2 and average it to the map that the figures sample."""
    from PIL import Image

    from dat_ref.data import photograph_path

    with Image.open(photograph_path("chelsea")) as original:
        cropped = original.convert("RGB").crop((0, 0, *PHOTO_SIZE))
    cropped.save(PHOTO, quality=74, optimize=True, progressive=True)
    cropped.resize(MAP_SIZE, Image.Resampling.BOX).save(PICTURE, optimize=True)


def photo() -> dict[str, Any]:
    """Return the photograph as a data URL, and its map: (H, W, 3) bytes, flat."""
    from PIL import Image

    with Image.open(PICTURE) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    address = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode("ascii")
    return {"address": address, "size": list(pixels.shape[:2]), "pixels": pixels.ravel().tolist()}


# ------------------------------------------------------------------------------------------------ bias


def bias_table() -> dict[str, Any]:
    """Return a table that favors near keys to the lower right: waves times a Gaussian, rounded to two digits."""
    height, width = TABLE_MAP
    y, x = np.mgrid[1 - height : height, 1 - width : width]
    envelope = np.exp(-(y**2 / 9 + x**2 / 22))
    values = 2 * envelope * np.cos(0.75 * x + 0.55 * y + 0.35)
    return {"size": list(TABLE_MAP), "table": np.round(values, 2).ravel().tolist()}


# ------------------------------------------------------------------------------------------------ receptive field

SIZE, DIM, HEADS = (12, 12), 12, 3
SEED = 11  # all points of the plain deformable layer stay inside the map


class SampledSystem(NamedTuple):
    """System whose points move; `shared` if all queries have the same points."""

    config: Any
    shared: bool = False


# Nine points for each query, counted over all heads (nine for each group in the second).
SAMPLED_SYSTEMS = {
    "deformable": SampledSystem(DeformableAttentionConfig(DIM, HEADS, stride=4, kernel_size=5, size=SIZE), shared=True),
    "deformable_groups": SampledSystem(
        DeformableAttentionConfig(DIM, HEADS, 3, stride=4, kernel_size=5, size=SIZE), shared=True
    ),
    "deform_conv": SampledSystem(DeformableConvConfig(DIM, kernel_size=3)),
    "ms_deform": SampledSystem(MultiScaleDeformableConfig(DIM, HEADS, points=3)),
    "per_query": SampledSystem(PerQueryAttentionConfig(DIM, HEADS, kernel_size=3)),
    "dat_dcn": SampledSystem(DATDCNAttentionConfig(DIM, HEADS, points=3, convention=Convention.CELL_CENTER)),
}
# Scale of the offset weights that gives offsets of a pixel or two; the initialization gives almost none.
OFFSET_SCALE = {
    "deformable": 1.1,
    "deformable_groups": 1.1,
    "deform_conv": 1.2,
    "ms_deform": 1.6,
    "per_query": 1.2,
    "dat_dcn": 0.25,
}


def run_layer(name: str, with_offsets: bool = True) -> Any:
    """Run one layer on a smooth random map with seeded weights; its offset network is zero unless `with_offsets`."""
    rng = np.random.default_rng(SEED)
    config = SAMPLED_SYSTEMS[name].config
    params = init_params(config, seed=SEED, dtype=np.float64)
    network = params.get("offset", params.get("offset_network", {}).get("pointwise"))
    assert network is not None
    if not with_offsets:
        for leaf in network.values():
            leaf[:] = 0
    else:
        fan_in = network["weight"][0].size
        network["weight"][:] = rng.normal(scale=OFFSET_SCALE[name] / fan_in**0.5, size=network["weight"].shape)
        if "bias" in network:
            network["bias"][:] = 0
    x = gaussian_filter(rng.normal(size=(1, DIM, *SIZE)), (0, 0, 1.6, 1.6))
    _, trace = ATTENTIONS[type(config)].forward(x / x.std(), params, config)
    return trace


def query_points(name: str, trace: Any) -> np.ndarray:
    """Return the points in pixels: (H·W, N, 2) for every query, or (1, N, 2) if all queries share them."""
    points = trace.points_px[0]
    if SAMPLED_SYSTEMS[name].shared:
        return np.asarray(points.reshape(1, -1, 2))
    if points.shape[-3:-1] == SIZE:  # convolution: (G, K, H, W, 2)
        points = np.moveaxis(points, (-3, -2), (0, 1))
    elif points.shape[0] != SIZE[0] * SIZE[1]:  # (G, H·W, N, 2)
        points = points.swapaxes(0, 1)
    return np.asarray(points.reshape(SIZE[0] * SIZE[1], -1, 2))


def system_points(name: str) -> dict[str, Any]:
    """Return a system's reference points and its sampling points, in hundredths of a pixel, flat.

    Where each query has its own points, the references are relative to the query. A sampling point is stored as the
    lower end of its hundredth and drawn at the center, so that rounding moves no point onto or over a pixel center.
    """
    trace = run_layer(name)
    points, reference = query_points(name, trace), query_points(name, run_layer(name, with_offsets=False))
    hundredths = np.floor(100 * points)
    check_receptive_field(name, trace, (hundredths + 0.5) / 100)
    if not SAMPLED_SYSTEMS[name].shared:
        reference = reference - np.indices(SIZE).reshape(2, -1).T[:, None]
        assert np.allclose(reference, reference[:1]), f"{name}: the relative reference points differ between queries"
    return {
        "shared": SAMPLED_SYSTEMS[name].shared,
        "count": points.shape[1],
        "reference": np.round(100 * reference[0]).astype(int).ravel().tolist(),
        "points": hundredths.astype(int).ravel().tolist(),
    }


def check_receptive_field(name: str, trace: Any, points: np.ndarray) -> None:
    """Check that rounding does not change the receptive field of any query."""
    for index, query in enumerate(np.ndindex(SIZE)):
        actual = sampled_pixels(points[0 if SAMPLED_SYSTEMS[name].shared else index], SIZE)
        expected = receptive_field(query, SIZE, SAMPLED_SYSTEMS[name].config, trace)
        assert np.array_equal(actual, expected), f"{name}: rounding changes the receptive field of query {query}"


# ------------------------------------------------------------------------------------------------ accuracy by keys

RESULTS = DOCS.parent / "experiments" / "results"


class Study(NamedTuple):
    """Side of the map, stride of the layer, and the arms to show; a grid of half the stride has "more keys"."""

    side: int
    stride: int
    classes: int
    arms: dict[str, str]


STUDIES = {
    "discs": Study(
        16,
        8,
        7,
        {
            "offsets": "offsets long",
            "no offsets": "no offsets",
            "more keys": "more keys long",
            "average pooling": "average pooling long",
        },
    ),
    "objects": Study(40, 10, 9, {arm: arm for arm in ("offsets", "no offsets", "more keys", "average pooling")}),
}


def accuracies(name: str) -> dict[str, Any]:
    """Return the accuracies of an experiment, seed by seed, and the bound of a fixed grid of each stride."""
    study = STUDIES[name]
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    seen = {study.stride: found["views"]["no offsets"], study.stride // 2: found["views"]["more keys"]}
    hits = {stride: view["touching"] for stride, view in seen.items()}
    hits |= {stride: coverage((study.side, study.side), stride) for stride in (2, 1)}
    assert hits[2] == hits[1] == 1
    return {
        "side": study.side,
        "classes": study.classes,
        "strides": list(hits),
        "keys": [(study.side // stride) ** 2 for stride in hits],
        "bounds": [round(fixed_grid_bound(hit, study.classes), 4) for hit in hits.values()],
        "runs": {
            arm: [round(run["accuracy"], 4) for run in found["runs"][key].values()] for arm, key in study.arms.items()
        },
    }


# ------------------------------------------------------------------------------------------------ the module

HEAD = """\
/** {about} Written by docs/figures/live_data.py; do not edit. */
"""
ABOUT = {
    "PHOTO": "A photograph, and the map [H, W] of bytes (red, green, blue) that is its average.",
    "BIAS": "A bias table for a map of `size`.",
    "STUDIES": "Accuracies of two experiments, seed by seed, and bounds of fixed grids.",
    "POINTS": "Reference points (n / 100 pixels) and sampling points ((n + 0.5) / 100), [y, x], on a map of `size`.",
}


def module(name: str, content: dict[str, Any]) -> str:
    """Return a JavaScript module that exports the content under its name."""
    return f"{HEAD.format(about=ABOUT[name])}export const {name} = {json.dumps(content, separators=(',', ':'))};\n"


def outputs() -> dict[str, str]:
    """Return the files of this script by path inside docs/."""
    points = {"size": list(SIZE), "systems": {name: system_points(name) for name in SAMPLED_SYSTEMS}}
    return {
        "js/figures/data/photo.mjs": module("PHOTO", photo()),
        "js/figures/data/table.mjs": module("BIAS", bias_table()),
        "js/figures/data/points.mjs": module("POINTS", points),
        "js/figures/data/studies.mjs": module("STUDIES", {name: accuracies(name) for name in STUDIES}),
    }


if __name__ == "__main__":
    if "--photo" in sys.argv:
        make_photo()
    for name, content in outputs().items():
        (DOCS / name).write_text(content, encoding="utf-8")
