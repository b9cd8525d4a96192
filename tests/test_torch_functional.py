"""`dat_ref.torch.functional` against the NumPy operations: outputs, and autograd against the hand-written gradients."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from helpers.cores import cores, lattice_distance  # noqa: E402
from helpers.tensors import (  # noqa: E402
    assert_close,
    assert_trees_close,
    conventions,
    lattice_points,
    pull_back,
    rejects,
    seeds,
    tensor,
)

from dat_ref import ConfigError, Convention, OffsetBound, ShapeError  # noqa: E402
from dat_ref.ops import attention as np_attention  # noqa: E402
from dat_ref.ops import bias as np_bias  # noqa: E402
from dat_ref.ops import grid as np_grid  # noqa: E402
from dat_ref.ops import offsets as np_offsets  # noqa: E402
from dat_ref.ops import sampling as np_sampling  # noqa: E402
from dat_ref.peers import neighborhood as np_neighborhood  # noqa: E402
from dat_ref.peers import window as np_window  # noqa: E402
from dat_ref.torch import functional  # noqa: E402

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


# ------------------------------------------------------------------------------------------------ grid


@given(sizes, conventions)
def test_grids_equal_the_spec(size, convention):
    for ours, theirs in (
        (functional.reference_points, np_grid.reference_points),
        (functional.query_points, np_grid.query_points),
    ):
        np.testing.assert_array_equal(ours(size, convention, dtype=torch.float64).numpy(), theirs(size, convention))


@given(sizes, conventions, seeds)
def test_pixel_conversion_equals_the_spec_and_inverts(size, convention, seed):
    points = np.random.default_rng(seed).uniform(-1.5, 1.5, (3, 5, 2))
    actual = functional.to_pixels(torch.from_numpy(points), size, convention)
    np.testing.assert_array_equal(actual.numpy(), np_grid.to_pixels(points, size, convention))
    back = functional.from_pixels(actual, size, convention)
    assert_close(back, np_grid.from_pixels(actual.numpy(), size, convention))
    assert functional.pixels_per_unit(size, convention) == tuple(np_grid.pixels_per_unit(size, convention))


@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(1, 9), st.integers(1, 12), conventions)
def test_padding_and_key_grid_equal_the_spec(size, kernel, stride, convention):
    arguments = (size, kernel, stride, convention)
    assert functional.offset_padding(*arguments) == np_grid.offset_padding(*arguments)
    try:
        expected = np_grid.key_grid_size(*arguments)
    except ConfigError as error:  # no padding, and a kernel larger than the map
        with pytest.raises(ConfigError, match=re.escape(str(error))):
            functional.key_grid_size(*arguments)
        assert kernel == stride > min(size)
    else:
        assert functional.key_grid_size(*arguments) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pixels_are_never_narrower_than_float32(dtype):
    points = torch.rand(4, 2).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert functional.to_pixels(points, (50, 84), Convention.CELL_CENTER).dtype is torch.float32


# ------------------------------------------------------------------------------------------------ offsets


@given(seeds, st.tuples(st.integers(3, 8), st.integers(3, 8)), st.integers(1, 3), st.integers(1, 3), conventions)
def test_offset_network(seed, size, stride, groups, convention):
    rng = np.random.default_rng(seed)
    batch, channels, kernel = 2, 4, 3
    queries = rng.standard_normal((batch * groups, channels, *size))
    params = {
        "depthwise": {
            "weight": rng.standard_normal((channels, 1, kernel, kernel)),
            "bias": rng.standard_normal(channels),
        },
        "norm": {"weight": rng.standard_normal(channels), "bias": rng.standard_normal(channels)},
        "pointwise": {"weight": rng.standard_normal((2, channels))},
    }
    sliding = {"stride": stride, "padding": np_grid.offset_padding(size, kernel, stride, convention)}
    expected, trace = np_offsets.offset_network(queries, params, **sliding)
    cotangent = rng.standard_normal(expected.shape)
    grad_queries, grad_params = np_offsets.offset_network_vjp(cotangent, trace, params, **sliding)

    x = tensor(queries)
    leaves = {part: {name: tensor(leaf) for name, leaf in these.items()} for part, these in params.items()}
    flat = [leaf for these in leaves.values() for leaf in these.values()]
    folded, _ = functional.offset_network(x, leaves, **sliding)
    in_groups, _ = functional.offset_network(x.reshape(batch, -1, *size), leaves, groups=groups, **sliding)
    for actual in (folded, in_groups):
        assert_close(actual, expected)
        grads = pull_back(actual, cotangent, [x, *flat])
        assert_close(grads[0], grad_queries)
        it = iter(grads[1:])
        assert_trees_close({part: {name: next(it) for name in these} for part, these in leaves.items()}, grad_params)


@given(seeds, sizes, conventions, st.sampled_from(list(OffsetBound)), st.sampled_from([0.0, 2.0, 3.5]))
def test_bound_offsets(seed, size, convention, bound, offset_range):
    rng = np.random.default_rng(seed)
    reference = np_grid.reference_points(size, convention)
    raw = rng.standard_normal((2, 3, *size, 2))
    if np.isfinite(reference).all():
        raw[0] = rng.choice([-1.0, 1.0], raw[0].shape) - reference  # exactly on the clamp
    options = {"offset_range": offset_range, "convention": convention}
    x, p = tensor(raw), torch.from_numpy(reference)
    try:
        offsets, points = np_offsets.bound_offsets(raw, reference, bound, **options)
    except ValueError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            functional.bound_offsets(x, p, bound, **options)
        return
    ours, actual = functional.bound_offsets(x, p, bound, **options)
    assert_close(ours, offsets)
    assert_close(actual, points)
    cotangent = rng.standard_normal(raw.shape)
    expected = np_offsets.bound_offsets_vjp(cotangent, raw, reference, bound, **options)
    if actual.requires_grad:
        assert_close(pull_back(actual, cotangent, [x])[0], expected)
    else:
        assert not expected.any()


# ------------------------------------------------------------------------------------------------ sampling


@given(seeds, sizes, st.integers(0, 3), st.integers(1, 4))
def test_bilinear_sample_everywhere(seed, size, maps, channels):
    rng = np.random.default_rng(seed)
    x, points = rng.standard_normal((maps, channels, *size)), lattice_points(rng, (maps, 7), size)
    cotangent = rng.standard_normal((maps, channels, 7))
    expected = np_sampling.bilinear_sample(x, points)
    grads = np_sampling.bilinear_sample_vjp(cotangent, x, points)
    xs, ps = tensor(x), tensor(points)
    actual = functional.bilinear_sample(xs, ps)
    assert_close(actual, expected)
    for ours, theirs in zip(pull_back(actual, cotangent, [xs, ps]), grads, strict=True):
        assert_close(ours, theirs)
    assert_close(functional.bilinear_sample(xs, ps, sampler="grid_sample"), expected)


@given(seeds, sizes)
def test_grid_sample_agrees_off_the_lattice(seed, size):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, *size))
    points = rng.integers(-2, 11, (2, 5, 2)) + rng.uniform(0.01, 0.99, (2, 5, 2))
    cotangent = rng.standard_normal((2, 3, 5))
    xs, ps = tensor(x), tensor(points)
    actual = functional.bilinear_sample(xs, ps, sampler="grid_sample")
    grads = np_sampling.bilinear_sample_vjp(cotangent, x, points)
    for ours, theirs in zip(pull_back(actual, cotangent, [xs, ps]), grads, strict=True):
        assert_close(ours, theirs)


def wrong_samplers():
    right = functional.bilinear_sample
    return {
        "x and y swapped": lambda x, p: right(x, p.flip(-1)),
        "half a pixel": lambda x, p: right(x, p + 0.5),
        "border repeated": lambda x, p: right(
            x, torch.minimum(p.clamp(min=0), torch.tensor(x.shape[2:], dtype=p.dtype) - 1)
        ),
        "nearest": lambda x, p: right(x, p.round()),
    }


@pytest.mark.parametrize("name", wrong_samplers())
def test_a_wrong_sampler_is_rejected(name):
    rng = np.random.default_rng(3)
    x, points = rng.standard_normal((2, 3, 4, 7)), lattice_points(rng, (2, 40), (4, 7))
    expected = np_sampling.bilinear_sample(x, points)
    actual = wrong_samplers()[name](tensor(x), tensor(points))
    assert rejects(lambda: assert_close(actual, expected))


def test_on_the_lattice_the_derivative_is_from_the_right_and_nan_stays():
    ramp = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=torch.float64).reshape(1, 1, 1, 4)
    points = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [0.0, -1.0], [0.0, 3.0]]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(functional.bilinear_sample(ramp, points).sum(), points)
    assert slope[0, :, 1].tolist() == [3.0, 5.0, 0.0, -9.0]
    nan = functional.bilinear_sample(ramp, torch.tensor([[[0.0, float("nan")], [9.0, 0.0]]], dtype=torch.float64))
    assert nan[0, 0].isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="sampler: expected one of gather, grid_sample, got 'nearest'"):
        functional.bilinear_sample(ramp, points, sampler="nearest")


def test_sampling_has_forward_mode_and_passes_gradcheck():
    rng = np.random.default_rng(0)
    x, points = tensor(rng.standard_normal((1, 2, 3, 4))), tensor(rng.uniform(-0.9, 3.9, (1, 5, 2)))
    assert torch.autograd.gradcheck(functional.bilinear_sample, (x, points), check_forward_ad=True)
    _, along = torch.func.jvp(functional.bilinear_sample, (x, points), (torch.zeros_like(x), torch.ones_like(points)))
    step = 1e-6
    shifted = functional.bilinear_sample(x, points + step) - functional.bilinear_sample(x, points)
    assert_close(along, (shifted / step).detach().numpy(), 1e-4)


# ------------------------------------------------------------------------------------------------ bias


@given(cores(), seeds)
def test_table_bias(core, seed):
    inputs, geometry = core
    table, points = inputs["bias_table"], inputs["points"]
    expected = np_bias.table_bias(table, points, **geometry)
    t, p = tensor(table), tensor(points)
    actual = functional.table_bias(t, p, **geometry)
    assert_close(actual, expected)
    assert_close(functional.sampled_table_bias(t, p, **geometry), expected)
    assert_close(functional.sampled_table_bias(t, p, sampler="gather", **geometry), expected)
    cotangent = np.random.default_rng(seed).standard_normal(expected.shape)
    ours, theirs = (
        pull_back(actual, cotangent, [t, p]),
        np_bias.table_bias_vjp(cotangent, table, points, **geometry),
    )
    assert_close(ours[0], theirs[0])
    if lattice_distance(inputs, geometry) > 1e-6:  # there rounding selects the side of the slope
        assert_close(ours[1], theirs[1])
    positions = functional.table_positions(p, table.shape[1:], *geometry.values())
    assert_close(positions, np_bias.table_positions(points, table.shape[1:], *geometry.values()), 1e-14)


@given(cores())
def test_table_index_is_where_the_spec_reads_the_table(core):
    """The canonical form, origin + (i·step_y, j·step_x), equals the grid of all displacements."""
    inputs, (size, convention, resolution) = core[0], core[1].values()
    points, built = torch.from_numpy(inputs["points"]), inputs["bias_table"].shape[1:]
    origin, step = functional.table_index(points, built, size, convention, resolution)
    rows, columns = np.indices(size).reshape(2, -1) * np.asarray(step)[:, None]
    positions = origin.numpy()[:, :, None] + np.stack((rows, columns), axis=-1)[:, None]  # (B, G, H·W, Ns, 2)
    expected = np_bias.table_positions(points.numpy(), built, size, convention, resolution)
    assert_close(torch.from_numpy(positions), expected)
    assert origin.dtype is torch.float64
    assert functional.table_index(points.half(), built, size, convention, resolution).origin.dtype is torch.float32
    if built == tuple(2 * length - 1 for length in size):
        expected = [(length - 1) / length if length > 1 else 1.0 for length in size]
        assert step == (tuple(expected) if convention is Convention.CVPR2022 else (1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_is_the_one_from_the_right_on_the_lattice(dtype):
    """Tables of every odd size, read exactly at their entries, have the slope towards the next entry."""
    size = (1, 33)  # a map whose normalised coordinates are exact
    for built in range(1, 30):
        cells = 2 * built - 1
        values = torch.zeros(200, dtype=dtype)
        values[80 : 80 + cells] = torch.arange(1, cells + 1, dtype=dtype).square()  # zeros around the table
        table = values[80 : 80 + cells].reshape(1, 1, -1)
        points = torch.zeros(1, 1, 1, 2, dtype=dtype, requires_grad=True)  # the center: displacements are integers
        lookup = functional.table_index(points, (1, cells), size, Convention.PAPER, "pixels")
        read = functional.SeparableInterp(table, lookup, size).read(0, 1)[0, 0, :, 0]
        places = 80 + torch.arange(33) - 16 + built - 1
        assert torch.equal(read, values[places])
        slopes = torch.stack([torch.autograd.grad(one, points, retain_graph=True)[0][0, 0, 0, 1] for one in read])
        pixels_per_unit = 16
        assert torch.equal(slopes, -pixels_per_unit * (values[places + 1] - values[places]))


@given(seeds, sizes, conventions, st.integers(1, 3))
def test_log_bias(seed, size, convention, groups):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1.3, 1.3, (2, groups, 3, 2))
    points[0, 0, 0] = np_grid.query_points(size, convention)[0, 0]  # a displacement of zero
    params = {
        "hidden": {"weight": rng.standard_normal((32, 2)), "bias": rng.standard_normal(32)},
        "out": {"weight": rng.standard_normal((2, 32))},
    }
    expected, trace = np_bias.log_bias(points, params, query_size=size, convention=convention)
    cotangent = rng.standard_normal(expected.shape)
    grad_points, grad_params = np_bias.log_bias_vjp(cotangent, trace, params, groups=groups)
    leaves = {part: {name: tensor(leaf) for name, leaf in these.items()} for part, these in params.items()}
    p = tensor(points)
    actual = functional.log_bias(p, leaves, query_size=size, convention=convention)
    assert_close(actual, expected)
    flat = [leaves["hidden"]["weight"], leaves["hidden"]["bias"], leaves["out"]["weight"]]
    grads = pull_back(actual, cotangent, [p, *flat])
    assert_close(grads[0], grad_points)
    ours = {"hidden": {"weight": grads[1], "bias": grads[2]}, "out": {"weight": grads[3]}}
    assert_trees_close(ours, grad_params)


def test_fixed_bias_takes_its_own_map_only():
    table = torch.randn(2, 15, 4)
    assert functional.fixed_bias(table, query_size=(3, 5), samples=4).shape == (1, 2, 15, 4)
    with pytest.raises(ShapeError) as caught:
        functional.fixed_bias(table, query_size=(4, 5), samples=4)
    with pytest.raises(ShapeError) as expected:
        np_bias.fixed_bias(table.numpy(), query_size=(4, 5), samples=4)
    assert str(caught.value) == str(expected.value)


# ------------------------------------------------------------------------------------------------ heads and windows


def test_heads_are_split_and_merged_as_in_the_spec():
    x = np.random.default_rng(0).standard_normal((2, 12, 3, 5))
    cut = functional.split_heads(torch.from_numpy(x), 4)
    np.testing.assert_array_equal(cut.numpy(), np_attention.split_heads(x, 4))
    np.testing.assert_array_equal(functional.merge_heads(cut, (3, 5)).numpy(), x)


@given(st.tuples(st.integers(1, 11), st.integers(1, 11)), st.integers(1, 5), st.data())
def test_window_geometry(size, window, data):
    shift = data.draw(st.integers(0, window - 1))
    grid, cells = functional.window_cells(size, window, shift)
    expected_grid, expected = np_window.window_cells(size, window, shift)
    assert grid == expected_grid
    np.testing.assert_array_equal(cells.numpy(), expected)
    np.testing.assert_array_equal(
        functional.window_visibility(cells, size, window, shift).numpy(),
        np_window.window_visibility(expected, size, window, shift),
    )
    np.testing.assert_array_equal(functional.relative_index(window).numpy(), np_window.relative_index(window))


@given(st.tuples(st.integers(1, 11), st.integers(1, 11)), st.sampled_from([1, 3, 5, 7]))
def test_neighbor_index(size, kernel):
    ours, theirs = functional.neighbor_index(size, kernel), np_neighborhood.neighbor_index(size, kernel)
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(actual.numpy(), expected)
