"""Mathematics of the live figures, docs/js/figures/kernel.mjs, against the spec: thousands of cases in Node.js."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.painting import Painting

from dat_ref import Convention, DeformableAttentionConfig, NeighborhoodAttentionConfig, OffsetBound
from dat_ref import WindowAttentionConfig as Window
from dat_ref.complexity import attention_terms, total
from dat_ref.ops.attention import attend
from dat_ref.ops.bias import table_bias, table_positions, table_scale
from dat_ref.ops.coverage import fixed_grid_bound, hit_rate, read_pixels
from dat_ref.ops.grid import from_pixels, pixels_per_unit, query_points, reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets, bound_offsets_vjp, offset_limit
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.peers import (
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
    receptive_field,
)
from dat_ref.peers.receptive_field import sampled_pixels

KERNEL = Path(__file__).parents[1] / "docs" / "js" / "figures" / "kernel.mjs"
RUNNER = Path(__file__).parent / "helpers" / "compare_kernel.mjs"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")

# ------------------------------------------------------------------------------------------------ cases


def plain(value):
    """Return a value in JSON types: conventions by name, non-finite numbers as strings."""
    if isinstance(value, Convention):
        return {"convention": value.name}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (float, np.floating)) and not math.isfinite(value):
        return {"number": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(float(value), "NaN")}
    return value.item() if isinstance(value, np.generic) else value


def case(function, *arguments, expected, exact=False):
    return {"function": function, "arguments": plain(arguments), "expected": plain(expected), "exact": exact}


def draw_size(rng, smallest=1, largest=9):
    """Return two different sides."""
    return tuple(int(side) for side in rng.choice(np.arange(smallest, largest + 1), 2, replace=False))


def draw_convention(rng):
    return list(Convention)[rng.integers(4)]


def draw_point(rng, size):
    """Return a position on, next to or between pixels, or outside the map."""
    whole = [float(rng.integers(-2, length + 2)) for length in size]
    kind = rng.integers(5)
    if kind == 0:
        return whole
    if kind == 1:
        return [place + float(rng.choice([-1e-9, 1e-9, 0.0])) for place in whole]
    if kind == 2:
        return [whole[0], float(rng.uniform(-1.5, size[1] + 0.5))]
    if kind == 3:
        return [float(rng.choice([-1e6, -1.0, size[0], 1e6])), float(rng.uniform(-1.5, size[1] + 0.5))]
    return [float(rng.uniform(-1.5, length + 0.5)) for length in size]


def grid_cases(rng):
    convention, keys, size = draw_convention(rng), draw_size(rng), draw_size(rng)
    yield case("referencePoints", keys, convention, expected=reference_points(keys, convention).reshape(-1, 2))
    queries = to_pixels(query_points(size, convention), size, convention).reshape(-1, 2)
    yield case("queryPixels", size, convention, expected=queries)
    s = rng.uniform(0, 8)
    for axis in range(2):
        limit = offset_limit(s, keys, convention)[axis]
        yield case("offsetLimit", s, keys[axis], convention, expected=limit)
        yield case("pixelsPerUnit", size[axis], convention, expected=pixels_per_unit(size, convention)[axis])
        place = rng.uniform(-2, 2, size=2)
        pixel = to_pixels(place, size, convention)
        yield case("toPixels", place[axis], size[axis], convention, expected=pixel[axis])
        expected = from_pixels(place, size, convention)[axis]
        yield case("fromPixels", place[axis], size[axis], convention, expected=expected)


def bound_cases(rng):
    convention, keys, s = draw_convention(rng), draw_size(rng, smallest=2), rng.uniform(0.5, 8)
    reference = reference_points(keys, convention)
    raw = rng.normal(scale=1.5, size=(1, 1, *keys, 2)) * rng.integers(0, 2, size=(1, 1, *keys, 2))
    limit = offset_limit(s, keys, convention)
    key = tuple(int(rng.integers(length)) for length in keys)
    for bound in OffsetBound:
        options = {"offset_range": s, "convention": convention}
        _, points = bound_offsets(raw, reference, bound, **options)
        slopes = bound_offsets_vjp(np.ones_like(raw), raw, reference, bound, **options)
        for axis in range(2):
            place = (raw[(0, 0, *key, axis)], reference[(*key, axis)], bound.name, limit[axis])
            yield case("boundPoint", *place, expected=points[(0, 0, *key, axis)])
            yield case("boundSlope", *place, expected=slopes[(0, 0, *key, axis)])
    # Inverse: the raw offset of a reachable point, and the largest offset for an unreachable one.
    wanted = rng.uniform(-2, 2)
    _, points = bound_offsets(
        np.full_like(raw, wanted), reference, OffsetBound.TANH_CELLS, offset_range=s, convention=convention
    )
    for axis in range(2):
        there = (points[(0, 0, *key, axis)], reference[(*key, axis)], limit[axis], 3)
        yield case("rawTowards", *there, expected=wanted)
        beyond = (reference[(*key, axis)] - 1.5 * limit[axis], reference[(*key, axis)], limit[axis], 3)
        yield case("rawTowards", *beyond, expected=-3)


def sampling_cases(rng):
    size = draw_size(rng)
    picture = rng.normal(size=(1, 1, *size))
    for _ in range(10):
        point = draw_point(rng, size)
        points = np.array([[point]])
        gradients = bilinear_sample_vjp(np.ones((1, 1, 1)), picture, points)
        expected = {"value": bilinear_sample(picture, points)[0, 0, 0], "slope": gradients.points_px[0, 0]}
        yield case("sample", picture.ravel(), size, point, expected=expected)
        yield case("weightMap", point, size, expected=gradients.x.ravel())
        rounded = np.floor(points + 0.5)  # as JavaScript rounds
        expected = {"value": bilinear_sample(picture, rounded)[0, 0, 0], "slope": [0, 0]}
        yield case("sampleNearest", picture.ravel(), size, point, expected=expected)
    nowhere = {"value": math.nan, "slope": [math.nan] * 2}
    yield case("sample", picture.ravel(), size, [math.nan, 0.5], expected=nowhere)
    for axis in range(2):
        knots = np.arange(-1.0, size[axis] + 1)
        places = np.tile(point, (len(knots), 1))
        places[:, axis] = knots
        values = bilinear_sample(picture, places[None])[0, 0]
        yield case("profile", picture.ravel(), size, point, axis, expected=np.stack([knots, values], axis=1))


def bias_cases(rng):
    """Cases of a table for any map, read by any convention and both resolutions; one point, all queries."""
    convention, size, built = draw_convention(rng), draw_size(rng), draw_size(rng)
    built = size if rng.integers(2) else built
    resolution = ("fractions", "pixels")[rng.integers(2)]
    table_size = tuple(2 * length - 1 for length in built)
    table = rng.normal(size=(1, *table_size))
    point = np.array(draw_point(rng, size)) if min(size) > 1 else np.zeros(2)
    points = from_pixels(point, size, convention).reshape(1, 1, 1, 2)
    # With aligned corners an axis of one pixel has only that pixel: the table is built for the map's own size.
    pixel = to_pixels(points, size, convention).ravel()
    queries = to_pixels(query_points(size, convention), size, convention).reshape(-1, 2)
    scale = table_scale(table_size, size, convention, resolution)
    options = {"query_size": size, "convention": convention, "resolution": resolution}
    read = table_bias(table, points, **options)[0, 0, :, 0]
    yield case("tableBias", table.ravel(), table_size, pixel, queries, scale, expected=read)
    positions = table_positions(points, table_size, **options)[0, 0, :, 0]
    for axis in range(2):
        arguments = (table_size[axis], size[axis], convention, resolution)
        yield case("tableScale", *arguments, expected=scale[axis])
        place = (queries[-1, axis], pixel[axis], table_size[axis], scale[axis])
        yield case("tablePosition", *place, expected=positions[-1, axis])


def window_cases(rng):
    """Cases with queries on whole pixels, where the bias of a key is a weighted sum of four windows of the table."""
    size, convention = draw_size(rng, smallest=2), (Convention.CELL_CENTER, Convention.PAPER)[rng.integers(2)]
    table = rng.normal(size=(1, *(2 * length - 1 for length in size)))
    point = draw_point(rng, size)
    points = from_pixels(np.array(point), size, convention).reshape(1, 1, 1, 2)
    read = table_bias(table, points, query_size=size, convention=convention)[0, 0, :, 0]
    yield case("windowSum", table.ravel(), size, point, expected=read)
    corner = np.floor(np.array(size) - 1 - point).astype(int)
    steps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    yield case("windowPlaces", size, point, expected=[corner + step for step in steps], exact=True)


def cost_cases(rng):
    """Cases of every system at drawn sizes, term by term."""
    size = draw_size(rng, smallest=3, largest=17)
    heads = int(rng.integers(1, 5))
    dim = 2 * heads * int(rng.integers(1, 4))
    groups = int(rng.choice([group for group in range(1, heads + 1) if heads % group == 0]))
    r, w, P = int(rng.integers(2, 4)), int(rng.integers(2, 6)), int(rng.integers(1, 10))
    K, k = 2 * int(rng.integers(0, 3)) + 1, 2 * int(rng.integers(0, 3)) + 1
    kernel = r + int(rng.integers(0, 3))
    dot = MultiScaleDeformableConfig(dim, heads, P, scoring="dot_product")
    systems = {
        "deformable": DeformableAttentionConfig(
            dim, heads, groups, stride=r, kernel_size=kernel, size=size, convention=Convention.CELL_CENTER
        ),
        "multi_head": MultiHeadAttentionConfig(dim, heads, size),
        "pyramid": PyramidAttentionConfig(dim, heads, r),
        "window": Window(dim, heads, w),
        "neighborhood": NeighborhoodAttentionConfig(dim, heads, K),
        "per_query": PerQueryAttentionConfig(dim, heads, groups, K, k),
        "ms_deform": MultiScaleDeformableConfig(dim, heads, P),
        "ms_deform_dot": dot,
        "dat_dcn": DATDCNAttentionConfig(dim, heads, P, Convention.CELL_CENTER),
        "deform_conv": DeformableConvConfig(dim, k, offset_groups=groups),
    }
    numbers = {"C": dim, "M": heads, "G": groups, "r": r, "w": w, "P": P, "K": K, "k": k}
    for kind, config in systems.items():
        own = {**numbers, "k": kernel} if kind == "deformable" else numbers
        found = attention_terms(1, size, config)
        expected = [
            {"name": name, "macs": term.macs, "kept": term.saved_bytes}
            for name, term in found.items()
            if term.macs or term.saved_bytes
        ]
        yield case("terms", kind, size, own, expected=in_order_of_the_kernel(kind, expected), exact=True)
        whole = total(found)
        yield case("cost", kind, size, own, expected={"macs": whole.macs, "kept": whole.saved_bytes}, exact=True)


def in_order_of_the_kernel(kind, terms):
    """Return terms in the order of the kernel, which starts with attention (or convolution); the names must agree."""
    order = (
        "convolution",
        "attention",
        "query and output",
        "key and value",
        "reduction",
        "offset network",
        "sampling",
        "bias",
    )
    return sorted(terms, key=lambda term: order.index(term["name"]))


def receptive_field_cases(rng):
    size = draw_size(rng, smallest=2, largest=13)
    query = tuple(int(rng.integers(length)) for length in size)
    w, K, dilation = int(rng.integers(1, 7)), 2 * int(rng.integers(0, 4)) + 1, int(rng.integers(1, 4))
    shift = int(rng.integers(0, w))
    systems = [
        ({"kind": "whole"}, MultiHeadAttentionConfig(2, 1)),
        ({"kind": "whole"}, PyramidAttentionConfig(2, 1, 3)),
        ({"kind": "window", "w": w, "shift": shift}, Window(2, 1, w, shift=shift)),
        (
            {"kind": "neighborhood", "K": K, "dilation": dilation},
            NeighborhoodAttentionConfig(2, 1, K, dilation=dilation),
        ),
    ]
    for system, config in systems:
        yield case(
            "receptiveField", system, query, size, expected=receptive_field(query, size, config).ravel(), exact=True
        )
    points = [draw_point(rng, size) for _ in range(rng.integers(1, 10))]
    seen = sampled_pixels(np.array(points), size).ravel()
    yield case("receptiveField", {"kind": "points"}, query, size, points, expected=seen, exact=True)


def coverage_cases(rng):
    size, stride = draw_size(rng, smallest=4, largest=17), int(rng.integers(1, 5))
    for axis in range(2):
        seen = read_pixels((size[axis], size[axis]), stride).any(axis=1)
        yield case("readAxis", size[axis], stride, expected=seen, exact=True)
    target = tuple(int(rng.integers(1, length + 1)) for length in size)
    hits = hit_rate(size, stride, target)
    yield case("hitRate", size, stride, target, expected=hits)
    classes = int(rng.integers(1, 10))
    yield case("fixedGridBound", hits, classes, expected=fixed_grid_bound(hits, classes))


def painting_cases(rng):
    size = draw_size(rng, smallest=3, largest=5)
    drawn = rng.uniform(-0.1, 1.1, size=(int(rng.integers(1, 6)), 2)) * (np.array(size) - 1)  # some outside the map
    spec = Painting(rng.integers(0, 256, size=(*size, 3)), rng.uniform(5, 60), rng.uniform(3, 30))
    (queries, read, _, points, table), painted = spec.paint(drawn)
    arguments = (spec.bytes.ravel(), size, spec.sharpness, spec.near)
    errors = spec.errors(painted)
    bias = table_bias(table, points, **spec.options)
    _, weights = attend(queries, read, read, bias, 0.5)
    expected = {
        "colors": painted[0, 0].T[:3],
        "weights": weights[0, 0].ravel(),
        "errors": errors,
        "error": errors.mean(),
    }
    yield case("painted", *arguments, drawn, expected=expected)
    pixel = tuple(int(rng.integers(length)) for length in size)
    row = weights[0, 0, pixel[0] * size[1] + pixel[1]]
    yield case("weightsOf", *arguments, drawn, pixel, expected=row)
    features, through_bias = spec.gradient(drawn)
    yield case("gradientOf", *arguments, drawn, expected={"features": features, "bias": through_bias})


DRAWN = {  # rounds of each kind
    grid_cases: 120,
    bound_cases: 100,
    sampling_cases: 100,
    bias_cases: 120,
    window_cases: 120,
    cost_cases: 40,
    receptive_field_cases: 150,
    coverage_cases: 100,
    painting_cases: 100,
}


def write_cases(path, part=1):
    """Write the cases to a file, or only every so many of them."""
    rng = np.random.default_rng(0)
    drawn = [one for draw, rounds in DRAWN.items() for _ in range(rounds // part) for one in draw(rng)]
    path.write_text(json.dumps(drawn, allow_nan=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Write all cases to a file."""
    return write_cases(tmp_path_factory.mktemp("kernel") / "cases.json")


def compare(cases, *kernels):
    """Return the runner's report on each kernel."""
    command = [NODE, str(RUNNER), str(cases), *map(str, kernels)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# ------------------------------------------------------------------------------------------------ tests


def test_kernel_of_the_figures_equals_the_spec(cases):
    """Several thousand cases agree to 1e-12; counts and sets agree exactly."""
    (report,) = compare(cases, KERNEL)
    assert report["failed"] == 0, json.dumps(report["failures"], indent=1)
    assert sum(report["passed"].values()) > 4000
    assert min(report["passed"].values()) >= 100


# Functions that the cases call only indirectly.
WITHIN = {"coordinate", "pitch", "places", "corners", "biasWindows", "symbols", "evaluate", "clip"}
WITHIN |= {"axisKernel", "axisNeighbors", "axisWindow", "sampledPixels"}
WITHIN |= {"pictureOf", "readings", "axisBias", "queryWeights", "paint", "paintGradient"}
# The network in the page has tests of its own: test_figures_network.py.
WITHIN |= {
    "parameters",
    "gelu",
    "linear",
    "layerNorm",
    "convolve",
    "convolveChannels",
    "spotFeatures",
    "changedFeatures",
    "spotAnswers",
}


def test_no_function_of_the_kernel_is_left_out(cases):
    exported = set(re.findall(r"^export function (\w+)", KERNEL.read_text(encoding="utf-8"), re.MULTILINE))
    called = {one["function"] for one in json.loads(cases.read_text(encoding="utf-8"))}
    assert exported - called == WITHIN


WRONG = {  # changes of the kernel: (before, after, a function whose cases must fail)
    "axes swapped": ("const [y, x] = point.map", "const [x, y] = point.map", "sample"),
    "left-hand derivative": ("[top, 1 - below, -1]", "[top, 1 - below, below ? -1 : 1]", "sample"),
    "border dropped": ("row < size[0] &&", "row < size[0] - 1 &&", "weightMap"),
    "clamped to the border": ("clip(value, -2, size[axis] + 1)", "clip(value, 0, size[axis] - 1)", "sample"),
    "half a pixel off": ("convention.alignCorners ? 0 : 0.5);", "0);", "toPixels"),
    "corners": ("alignCorners ? 1 : 0)) / 2", "alignCorners ? 0 : 1)) / 2", "pixelsPerUnit"),
    "key at infinity": ("degenerate: Infinity", "degenerate: 0", "referencePoints"),
    "whole s each way": ("(range / 2) *", "range *", "offsetLimit"),
    "clamp passes all": ("<= 1 ? 1 : 0", "<= 1 ? 1 : 1", "boundSlope"),
    "displacement negated": ("(query - point) * scale", "(point - query) * scale", "tableBias"),
    "fractions of another map": ("+ 1) / 2 - aligned)", "+ 1) / 2)", "tableScale"),
    "windows one entry up": ("size[axis] - 1 - place", "size[axis] - 2 - place", "windowSum"),
    "windows exchanged": ("(down ? below : 1 - below)", "(down ? 1 - below : below)", "windowSum"),
    "scale of the heads": ('bias: "4 HW Ns M"', 'bias: "4 HW Ns"', "terms"),
    "bytes of one number": ("4 * evaluate(kept", "8 * evaluate(kept", "cost"),
    "neighborhood beyond the border": ("0, submapLength - keys", "0, submapLength", "receptiveField"),
    "seam forgotten": ("&& pixel < shift === query < shift", "", "receptiveField"),
    "coverage beyond the footprint": ("< 1 - 1e-9", "<= 1", "readAxis"),
    "guessing always": ("hits + (1 - hits) / classes", "hits + 1 / classes", "fixedGridBound"),
    "bias stays on entries": ("[share, -1] : [1 - share, 1]", "[0, -1] : [1, 1]", "painted"),
    "bias path negated": ("found.slope += sign * bias", "found.slope -= sign * bias", "gradientOf"),
    "table without a border": ("if (Math.abs(entry) > length - 1) continue;", "", "painted"),
    "reading as value only": (
        "weight * wrong[channel] + 2 * sharpness * onLogit * planes[channel][m]",
        "weight * wrong[channel]",
        "gradientOf",
    ),
    "norm forgotten": ("onRead[n][3] -= sharpness * onLogit", "onRead[n][3] -= 0", "gradientOf"),
    "pixels without weight": ("Math.abs(y - row) < 1", "Math.abs(y - row) <= 1", "receptiveField"),
}


def test_wrong_kernels_of_the_figures_are_detected(tmp_path):
    text = KERNEL.read_text(encoding="utf-8")
    for name, (before, after, _) in WRONG.items():
        assert text.count(before) == 1, f"{name}: {before!r} is in the kernel {text.count(before)} times"
        (tmp_path / f"{name}.mjs").write_text(text.replace(before, after), encoding="utf-8")
    reports = compare(write_cases(tmp_path / "cases.json", part=4), *(tmp_path / f"{name}.mjs" for name in WRONG))
    for (name, (_, _, function)), report in zip(WRONG.items(), reports, strict=True):
        assert function in report["functions"], f"{name}: detected by {report['functions']}"
