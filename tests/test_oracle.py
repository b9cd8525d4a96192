"""Scalar loops of tests/oracle against torch, outputs of the released modules, and known values."""

import math
from typing import Any

import numpy as np
import pytest
from helpers.golden import golden_names, load_golden, under
from oracle import basic, bias, deformable, geometry, neighborhood, released, sampling, windows

AGREEMENT = 1e-9

# ---------------------------------------------------------------------- the released modules


def run_deformable(name: str, changes: dict[str, Any]) -> tuple[deformable.Result, dict[str, np.ndarray]]:
    """Return the oracle's result on a fixture's input under a changed configuration, and the fixture."""
    meta, arrays = load_golden(name)
    config = released.deformable_config(meta["release"], meta["ctor"]) | changes
    params = released.deformable_params(under("state", arrays))
    return deformable.deformable_attention(arrays["x"], config, params), arrays


@pytest.mark.parametrize("name", golden_names("module"))
def test_deformable_layer_is_the_released_one(name: str) -> None:
    result, expected = run_deformable(name, {})
    np.testing.assert_allclose(result.reference, expected["ref"], rtol=0, atol=AGREEMENT)
    np.testing.assert_allclose(result.points, expected["pos"], rtol=0, atol=AGREEMENT)
    np.testing.assert_allclose(result.output, expected["y"], rtol=0, atol=AGREEMENT)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("module22_rect", {"convention": "paper"}),
        ("module22_rect", {"convention": "cell_center"}),
        ("module22_rect", {"offset_range": 2.002}),
        ("module22_tanh", {"offset_bound": "clamp"}),
        ("module22_tanh", {"bias": "none"}),
        ("module22_dwc_bias", {"heads": 3}),
        ("module23_fixed_bias", {"convention": "cvpr2022"}),
        ("module23_fixed_bias", {"bias": "none"}),
        ("module23_bounded", {"offset_bound": "clamp"}),
        ("module23_log_cpb", {"bias": "none"}),
        ("module23_dwc_bias", {"bias": "none"}),
        ("module23_no_offset", {"average_pool": False}),
    ],
)
def test_fixtures_reject_a_wrong_reading(name: str, changes: dict[str, Any]) -> None:
    result, expected = run_deformable(name, changes)
    assert np.abs(result.output - expected["y"]).max() > 1e-6


@pytest.mark.parametrize("name", ["peer_window", "peer_shifted_window"])
def test_window_attention_is_the_released_one(name: str) -> None:
    meta, arrays = load_golden(name)
    params = released.window_params(under("state", arrays))
    sizes = {"heads": meta["heads"], "window": meta["window"], "shift": meta.get("shift", 0)}
    result = windows.window_attention(arrays["x"], params, **sizes)
    np.testing.assert_allclose(result.output, arrays["y"], rtol=0, atol=AGREEMENT)
    if sizes["shift"]:
        half = windows.shifted_window_attention(arrays["x"], params, heads=2, window=4)
        np.testing.assert_array_equal(half.output, result.output)


def run_neighborhood(name: str, small_map: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs of the oracle and of the fixture."""
    meta, arrays = load_golden(name)
    params = released.neighborhood_params(under("state", arrays))
    sizes = {"heads": meta["heads"], "kernel_size": meta["kernel_size"]}
    result = neighborhood.neighborhood_attention(arrays["x"], params, **sizes, small_map=small_map)
    return result.output, arrays["y"]


@pytest.mark.parametrize("name", ["peer_neighborhood", "peer_neighborhood_small_map"])
def test_neighborhood_attention_is_the_released_one(name: str) -> None:
    actual, expected = run_neighborhood(name, "pad")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=AGREEMENT)


def test_small_map_rules_differ_only_on_small_maps() -> None:
    actual, expected = run_neighborhood("peer_neighborhood_small_map", "shrink")
    assert np.abs(actual - expected).max() > 1e-3
    actual, expected = run_neighborhood("peer_neighborhood", "shrink")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=AGREEMENT)


# ---------------------------------------------------------------------- elementary layers and sampling


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20220103)


@pytest.mark.parametrize(
    ("shape", "out", "kernel", "stride", "pad", "groups"),
    [
        ((2, 6, 5, 7), 4, (3, 2), 1, ((1, 0), (2, 1)), 2),
        ((1, 6, 9, 4), 6, (5, 5), 3, ((0, 3), (1, 4)), 6),
        ((3, 2, 1, 3), 5, (1, 1), 2, ((0, 0), (0, 0)), 1),
        ((0, 2, 4, 3), 5, (3, 3), 1, ((1, 1), (1, 1)), 1),
    ],
)
def test_conv2d(rng: np.random.Generator, shape, out, kernel, stride, pad, groups) -> None:
    torch = pytest.importorskip("torch")
    x, weight = rng.standard_normal(shape), rng.standard_normal((out, shape[1] // groups, *kernel))
    shift = rng.standard_normal(out)
    (top, bottom), (left, right) = pad
    padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right, top, bottom))
    expected = torch.nn.functional.conv2d(
        padded, torch.from_numpy(weight), torch.from_numpy(shift), stride=stride, groups=groups
    )
    actual = basic.conv2d(x, weight, shift, stride=stride, padding=pad, groups=groups)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-13)


def test_linear_norm_gelu_softmax_pool(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, weight, shift = rng.standard_normal((2, 5, 3, 4)), rng.standard_normal((7, 5)), rng.standard_normal(7)
    scale, center = rng.standard_normal(5), rng.standard_normal(5)
    tx = torch.from_numpy(x)
    last = tx.permute(0, 2, 3, 1)
    linear = functional.linear(last, torch.from_numpy(weight), torch.from_numpy(shift)).permute(0, 3, 1, 2)
    norm = functional.layer_norm(last, (5,), torch.from_numpy(scale), torch.from_numpy(center), 1e-5)
    pairs = [
        (basic.linear(x, weight, shift), linear),
        (basic.layer_norm(x, scale, center), norm.permute(0, 3, 1, 2)),
        (basic.gelu(x), functional.gelu(tx)),
        (np.array(basic.softmax(x[0, :, 1, 2].tolist())), tx[0, :, 1, 2].softmax(0)),
        (basic.average_pool(x, 2), functional.avg_pool2d(tx, 2, 2)),
    ]
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("align_corners", [True, False])
def test_bilinear_and_slopes(rng: np.random.Generator, align_corners: bool) -> None:
    """Values equal grid_sample and slopes its gradient, for points on, near and off the lattice, and outside."""
    torch = pytest.importorskip("torch")
    height, width = 5, 3  # H - 1 a power of two: pixel = (n + 1) / 2 (H - 1) is exact
    plane = rng.standard_normal((height, width))
    lattice = [[i, j] for i in range(-1, height + 1) for j in range(-1, width + 1)]
    pixels = np.array(lattice + rng.uniform(-1.75, 6.0, (60, 2)).tolist())
    sizes = np.array([height, width])
    if align_corners:
        n = 2.0 * pixels / (sizes - 1) - 1.0
    else:
        pixels = pixels[len(lattice) :]  # n is rounded here, which could change the side of the slope on the lattice
        n = (2.0 * pixels + 1.0) / sizes - 1.0
    grid = torch.tensor(n[None, None, :, ::-1].copy(), requires_grad=True)
    image = torch.tensor(plane[None, None], requires_grad=True)
    values = torch.nn.functional.grid_sample(image, grid, mode="bilinear", align_corners=align_corners)
    values.sum().backward()
    extent = (sizes - 1) / 2.0 if align_corners else sizes / 2.0
    slopes = grid.grad.numpy()[0, 0, :, ::-1] / extent
    convention = "paper" if align_corners else "cell_center"
    values = values.detach().numpy()[0, 0, 0]
    spread = np.zeros((height, width))
    for index, (n_y, n_x) in enumerate(n.tolist()):
        y, x = geometry.to_pixel(convention, n_y, height), geometry.to_pixel(convention, n_x, width)
        np.testing.assert_allclose([y, x], pixels[index], rtol=0, atol=1e-14)
        assert sampling.bilinear(plane, y, x) == pytest.approx(values[index], abs=1e-13)
        np.testing.assert_allclose(sampling.bilinear_slopes(plane, y, x), slopes[index], rtol=0, atol=1e-12)
        spread += np.array(sampling.bilinear_spread(1.0, (height, width), y, x))
    np.testing.assert_allclose(spread, image.grad.numpy()[0, 0], rtol=0, atol=1e-12)


def test_slopes_are_right_hand_differences(rng: np.random.Generator) -> None:
    """A step of 1/8 to the right measures the slope exactly, because the map is linear between lattice lines."""
    plane, step = rng.standard_normal((4, 3)), 0.125
    for y in np.arange(-2.0, 5.0, 0.25).tolist():
        for x in np.arange(-2.0, 4.0, 0.25).tolist():
            here = sampling.bilinear(plane, y, x)
            ahead = sampling.bilinear(plane, y + step, x), sampling.bilinear(plane, y, x + step)
            measured = [(value - here) / step for value in ahead]
            np.testing.assert_allclose(sampling.bilinear_slopes(plane, y, x), measured, rtol=0, atol=1e-13)
    assert sampling.bilinear_slopes(plane, -1e-20, 0.0)[0] == plane[0, 0]
    assert math.isnan(sampling.bilinear(plane, math.nan, 0.0))


# ---------------------------------------------------------------------- geometry


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_identity_where_it_should_hold(size: int) -> None:
    for i in range(size):
        for convention in ("cell_center", "paper"):
            n = geometry.reference(convention, i, size)
            assert geometry.to_pixel(convention, n, size) == pytest.approx(i, abs=1e-13)
            assert geometry.query(convention, i, size) == n
        assert geometry.query("cvpr2022", i, size) == geometry.reference("cvpr2022", i, size)
        corner = geometry.to_pixel("datpp2023", geometry.query("datpp2023", i, size), size)
        assert corner == pytest.approx(i, abs=1e-13)


@pytest.mark.parametrize(
    ("convention", "pixels"),
    [
        ("cell_center", [3.5, 11.5, 19.5, 27.5, 35.5, 43.5, 51.5]),
        ("paper", [0, 55 / 6, 55 / 3, 27.5, 110 / 3, 275 / 6, 55]),
        ("cvpr2022", [55 * (i + 0.5) / 7 for i in range(7)]),
        ("datpp2023", [55 * (i + 0.5) / 6 for i in range(7)]),
    ],
)
def test_references_in_pixels(convention: str, pixels: list[float]) -> None:
    actual = [geometry.to_pixel(convention, geometry.reference(convention, i, 7), 56) for i in range(7)]
    np.testing.assert_allclose(actual, pixels, rtol=0, atol=1e-12)


def test_single_key() -> None:
    assert [geometry.reference(c, 0, 1) for c in geometry.CONVENTIONS] == [0.0, 0.0, 0.0, math.inf]
    assert [geometry.query(c, 0, 1) for c in geometry.CONVENTIONS] == [0.0, 0.0, 0.0, 0.0]
    assert [geometry.to_pixel(c, 0.0, 1) for c in geometry.CONVENTIONS] == [0.0] * 4
    with pytest.raises(ZeroDivisionError):
        geometry.offset_range("datpp2023", 1, 2.0)
    clamp = {"offset_bound": "clamp", "convention": "datpp2023"}
    assert deformable.bound(math.inf, -3.0, 1, clamp) == 1.0


@pytest.mark.parametrize(
    ("convention", "size", "kernel", "stride", "pad", "count"),
    [
        ("cell_center", 7, 5, 1, (2, 2), 7),
        ("cell_center", 8, 5, 2, (1, 2), 4),
        ("cell_center", 9, 5, 4, (2, 2), 3),
        ("paper", 5, 3, 4, (1, 1), 2),
        ("paper", 16, 3, 8, (0, 0), 2),
        ("cell_center", 15, 9, 8, (1, 1), 2),
        ("cvpr2022", 8, 3, 2, (1, 1), 4),
        ("cvpr2022", 8, 4, 4, (2, 2), 3),
        ("datpp2023", 8, 4, 4, (0, 0), 2),
        ("datpp2023", 25, 9, 8, (4, 4), 4),
    ],
)
def test_padding_and_key_count(
    convention: str, size: int, kernel: int, stride: int, pad: tuple[int, int], count: int
) -> None:
    assert geometry.padding(convention, size, kernel, stride) == pad
    assert geometry.key_count(convention, size, kernel, stride) == count


def test_same_padding_always_gives_ceil() -> None:
    for size in range(1, 20):
        for kernel in range(1, 10):
            for stride in range(1, 9):
                expected = -(-size // stride)
                assert geometry.key_count("cell_center", size, kernel, stride) == expected


# ---------------------------------------------------------------------- biases


@pytest.mark.parametrize("convention", ["paper", "cvpr2022", "datpp2023"])
def test_table_bias_is_grid_sample_of_half_the_displacement(rng: np.random.Generator, convention: str) -> None:
    """The table bias equals grid_sample for its own map size and for another."""
    torch = pytest.importorskip("torch")
    grid_sample = torch.nn.functional.grid_sample
    table = rng.standard_normal((9, 5))
    for size in ((5, 3), (4, 7), (1, 6)):
        for i, j in np.ndindex(*size):
            q_n = geometry.query(convention, i, size[0]), geometry.query(convention, j, size[1])
            p_n = tuple(rng.uniform(-1.3, 1.3, 2).tolist())
            half = [(q - p) * 0.5 for q, p in zip(q_n, p_n, strict=True)]
            grid = torch.tensor([half[::-1]], dtype=torch.float64)[None, None]
            expected = grid_sample(torch.from_numpy(table)[None, None], grid, align_corners=True)
            actual = bias.table_bias(table, q_n, p_n, convention=convention, size=size)
            assert actual == pytest.approx(float(expected), abs=1e-13)


@pytest.mark.parametrize("convention", geometry.CONVENTIONS)
def test_both_resolutions_agree_at_the_tables_own_size(rng: np.random.Generator, convention: str) -> None:
    table = rng.standard_normal((9, 5))
    for i, j in np.ndindex(5, 3):
        q_n = geometry.query(convention, i, 5), geometry.query(convention, j, 3)
        p_n = tuple(rng.uniform(-1.3, 1.3, 2).tolist())
        readings = [
            bias.table_bias(table, q_n, p_n, convention=convention, size=(5, 3), resolution=resolution)
            for resolution in ("fractions", "pixels")
        ]
        assert readings[0] == pytest.approx(readings[1], abs=1e-13)


@pytest.mark.parametrize("convention", ["cell_center", "paper"])
def test_table_bias_of_undeformed_points_is_the_entry_of_their_displacement(convention: str) -> None:
    table = np.arange(7.0 * 9.0).reshape(7, 9)
    for i, j, ik, jk in np.ndindex(4, 5, 4, 5):
        q_n = geometry.query(convention, i, 4), geometry.query(convention, j, 5)
        p_n = geometry.reference(convention, ik, 4), geometry.reference(convention, jk, 5)
        read = bias.table_bias(table, q_n, p_n, convention=convention, size=(4, 5))
        assert read == pytest.approx(table[i - ik + 3, j - jk + 4], abs=1e-12)


def test_log_distance() -> None:
    expected = [1.0, -1.0, math.log2(3.0) / 3.0, 0.0]
    assert [bias.log_distance(d) for d in (1.75, -1.75, 0.5, 0.0)] == pytest.approx(expected, abs=1e-15)


# ---------------------------------------------------------------------- cases without fixtures


def random_params(rng: np.random.Generator, dim: int, heads: int, groups: int, size: tuple[int, int]) -> dict[str, Any]:
    def projection() -> dict[str, np.ndarray]:
        return {"weight": rng.standard_normal((dim, dim)) / dim**0.5, "bias": rng.standard_normal(dim)}

    part = dim // groups
    return {
        "query": projection(),
        "key": projection(),
        "value": projection(),
        "output": projection(),
        "offset_network": {
            "depthwise": {"weight": rng.standard_normal((part, 1, 3, 3)), "bias": rng.standard_normal(part)},
            "norm": {"weight": rng.standard_normal(part), "bias": rng.standard_normal(part)},
            "pointwise": {"weight": rng.standard_normal((2, part))},
        },
        "position_bias": {"table": rng.standard_normal((heads, 2 * size[0] - 1, 2 * size[1] - 1))},
    }


@pytest.mark.parametrize("convention", geometry.CONVENTIONS)
@pytest.mark.parametrize("size", [(5, 3), (1, 4), (1, 1)])
def test_core_equals_the_core_of_the_layer(rng: np.random.Generator, convention: str, size: tuple[int, int]) -> None:
    """With the layer's points the core gives its output, for any map size and tables built for another."""
    batch, dim, heads, groups = 1, 6, 3, 3
    params = random_params(rng, dim, heads, groups, (4, 4))
    config = {"heads": heads, "groups": groups, "stride": 2, "kernel_size": 3, "convention": convention}
    config["offset_bound"] = "clamp"
    x = rng.standard_normal((batch, dim, *size))
    layer = deformable.deformable_attention(x, config, params)
    n_keys = layer.points.shape[2] * layer.points.shape[3]

    def split(y: np.ndarray) -> np.ndarray:
        return y.reshape(batch, heads, dim // heads, -1).swapaxes(2, 3)

    core = deformable.deformable_core(
        split(basic.linear(x, **params["query"])),
        split(basic.linear(layer.sampled, **params["key"])),
        split(basic.linear(layer.sampled, **params["value"])),
        layer.points.reshape(batch, groups, n_keys, 2),
        params["position_bias"]["table"],
        query_size=size,
        convention=convention,
    )
    merged = core.swapaxes(2, 3).reshape(x.shape)
    np.testing.assert_allclose(basic.linear(merged, **params["output"]), layer.output, rtol=0, atol=1e-12)
    np.testing.assert_allclose(layer.attention.sum(-1), 1.0, rtol=0, atol=1e-13)


@pytest.mark.parametrize("convention", ["cell_center", "paper"])
def test_no_offsets_at_stride_1_sample_the_map_itself(rng: np.random.Generator, convention: str) -> None:
    params = random_params(rng, 4, 2, 2, (3, 5))
    config = {"heads": 2, "groups": 2, "kernel_size": 3, "convention": convention, "offset_bound": "none"}
    x = rng.standard_normal((2, 4, 3, 5))
    result = deformable.deformable_attention(x, config, params)
    np.testing.assert_allclose(result.sampled, x, rtol=0, atol=1e-13)


def test_empty_batch(rng: np.random.Generator) -> None:
    params = random_params(rng, 4, 2, 2, (3, 5))
    config = {"heads": 2, "groups": 2, "kernel_size": 3}
    result = deformable.deformable_attention(np.zeros((0, 4, 3, 5)), config, params)
    assert result.output.shape == (0, 4, 3, 5)
    assert result.points.shape == (0, 2, 3, 5, 2)


@pytest.mark.parametrize(("size", "window", "shift"), [((5, 7), 4, 2), ((6, 3), 3, 2), ((2, 9), 4, 2), ((4, 5), 4, 0)])
def test_windows_against_padding_rolling_and_partition(
    rng: np.random.Generator, size: tuple[int, int], window: int, shift: int
) -> None:
    """The rule for visible keys equals the usual construction with padding, rolling and masks of minus infinity."""
    dim, heads = 4, 2
    params = qkv_and_output(rng, dim) | {"table": rng.standard_normal(((2 * window - 1) ** 2, heads))}
    x = rng.standard_normal((1, dim, *size))
    expected = rolled_windows(x, params, heads, window, shift)
    result = windows.window_attention(x, params, heads=heads, window=window, shift=shift)
    np.testing.assert_allclose(result.output, expected, rtol=0, atol=1e-12)


def qkv_and_output(rng: np.random.Generator, dim: int) -> dict[str, Any]:
    return {
        "qkv": {"weight": rng.standard_normal((3 * dim, dim)), "bias": rng.standard_normal(3 * dim)},
        "output": {"weight": rng.standard_normal((dim, dim)), "bias": rng.standard_normal(dim)},
    }


def rolled_windows(x: np.ndarray, params: dict, heads: int, window: int, shift: int) -> np.ndarray:
    batch, dim, height, width = x.shape
    padding = [(0, 0), (0, 0), (0, -height % window), (0, -width % window)]
    real = np.pad(np.ones((1, 1, height, width)), padding)
    x = np.pad(x, padding)
    rows, columns = x.shape[2:]
    region = np.where(np.arange(rows) < shift, 2, 0)[:, None] + np.where(np.arange(columns) < shift, 1, 0)

    def cut(maps: np.ndarray) -> np.ndarray:  # (B, C, H, W) -> (B, windows, w w, C)
        maps = np.roll(maps, (-shift, -shift), (2, 3))
        maps = maps.reshape(*maps.shape[:2], rows // window, window, columns // window, window)
        return maps.transpose(0, 2, 4, 3, 5, 1).reshape(len(maps), -1, window**2, maps.shape[1])

    qkv = cut(x) @ params["qkv"]["weight"].T + params["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(*qkv.shape[:3], 3, heads, dim // heads), (3, 4), (0, 2))
    place = np.stack(np.divmod(np.arange(window**2), window), -1)
    d = place[:, None] - place[None] + window - 1
    logits = q @ k.swapaxes(-1, -2) / (dim // heads) ** 0.5
    logits = logits + params["table"][d[..., 0] * (2 * window - 1) + d[..., 1]].transpose(2, 0, 1)[:, None]
    regions, keys_real = cut(region[None, None])[..., 0], cut(real)[..., 0]
    hidden = (regions[:, :, :, None] != regions[:, :, None, :]) | (keys_real[:, :, None, :] == 0)
    # An added query may see only padding; its row is cropped later and left unmasked, so that values stay finite.
    hidden = hidden & (keys_real[:, :, :, None] == 1)
    logits = np.where(hidden[:, None], -np.inf, logits)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v  # (B, heads, windows, w w, d)
    out = out.reshape(batch, heads, rows // window, columns // window, window, window, dim // heads)
    out = out.transpose(0, 1, 6, 2, 4, 3, 5).reshape(batch, dim, rows, columns)
    out = np.roll(out, (shift, shift), (2, 3))[:, :, :height, :width]
    out = np.einsum("oc,bchw->bohw", params["output"]["weight"], out)
    return out + params["output"]["bias"][:, None, None]


def test_neighbors() -> None:
    assert [neighborhood.neighbors(i, 5, 3)[0] for i in range(5)] == [0, 0, 1, 2, 2]
    assert [neighborhood.neighbors(i, 5, 5)[0] for i in range(5)] == [0] * 5
    assert list(neighborhood.neighbors(1, 2, 7)) == [0, 1]


def test_neighborhood_of_the_whole_map_is_the_window_of_the_whole_map(rng: np.random.Generator) -> None:
    """For K = w = H = W both attentions are equal; the tables differ by the sign of the displacement."""
    size, dim, heads = 3, 4, 2
    projections = qkv_and_output(rng, dim)
    table = rng.standard_normal((heads, 5, 5))
    x = rng.standard_normal((2, dim, size, size))
    of_key = {**projections, "rpb": table}
    around = neighborhood.neighborhood_attention(x, of_key, heads=heads, kernel_size=size)
    flipped = {**projections, "table": table[:, ::-1, ::-1].reshape(heads, -1).T}
    inside = windows.window_attention(x, flipped, heads=heads, window=size)
    np.testing.assert_allclose(around.output, inside.output, rtol=0, atol=1e-13)
    np.testing.assert_allclose(around.attention, inside.attention, rtol=0, atol=1e-13)
