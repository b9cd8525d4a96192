"""Deformable layer: agreement with scalar loops, symmetries, limiting cases, precision."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.agreement import assert_agree, assert_within_budget
from helpers.checks import LAYER_CHECKS, example_config, example_input, layer_matches_oracle
from helpers.layers import mirror, random_params, transpose, transposed_config
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import layer_cases, non_contiguous, numbers

from dat_ref import BiasKind, Convention, DeformableAttention, DeformableAttentionConfig, OffsetBound, init_params
from dat_ref.layer import deformable_layer, deformable_layer_vjp, deformable_shapes
from dat_ref.ops.grid import offset_padding
from dat_ref.params import flatten, map_tree, unflatten

CC, PAPER, CVPR, PP = Convention.CELL_CENTER, Convention.PAPER, Convention.CVPR2022, Convention.DATPP2023


@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_named_checks(check):
    """The layer passes every check that the mutants must fail."""
    check(deformable_layer)


@pytest.mark.parametrize("convention", list(Convention), ids=lambda convention: convention.name)
@given(data=st.data())
def test_equals_scalar_loops(convention, data):
    """Every intermediate and the output equal the oracle's, for all bounds, biases, groups and strides."""
    case = data.draw(layer_cases(among=[convention]))
    layer_matches_oracle(deformable_layer, case.x(), case.params(), case.config)


# ------------------------------------------------------------------------------------------------ symmetries


def windows_are_symmetric(case, axis):
    """Return whether the windows of the offset network are symmetric about the center of an axis."""
    config = case.config
    before = offset_padding(case.size, config.kernel_size, config.stride, config.convention)[axis][0]
    reach = (case.keys[axis] - 1) * config.stride + config.kernel_size
    return before == reach - case.size[axis] - before


@given(layer_cases(among=[CC, PAPER, CVPR], strides=(1, 2, 3)), st.integers(0, 1))
def test_flips_commute_where_windows_are_symmetric(case, axis):
    """Flipping map, kernels, table and the sign of the offsets flips the output.

    In CELL_CENTER, PAPER and CVPR2022 this holds if the windows of the offset network are symmetric about the center
    of the map: for odd kernels at stride 1, and for any kernel and stride if windows extend equally past both ends.
    """
    moves = case.config.offset_bound is not OffsetBound.NONE
    assume(not moves or windows_are_symmetric(case, axis))
    x, params = case.x(), case.params()
    mirrored = mirror(params, axis, case.config, case.size, case.keys)
    flipped, _ = deformable_layer(np.flip(x, 2 + axis), mirrored, case.config)
    assert_agree(np.flip(flipped, 2 + axis), deformable_layer(x, params, case.config)[0], 1e-10)


def flip_error(config, size):
    """Return the largest difference between the flipped output and the output of the flipped input."""
    x = numbers(0, 1, config.dim, *size)
    params = random_params(deformable_shapes(config), np.random.default_rng(1))
    flipped, trace = deformable_layer(x, params, config)
    mirrored = mirror(params, 0, config, size, trace.points.shape[2:4])
    back, _ = deformable_layer(np.flip(x, 2), mirrored, config)
    return np.abs(np.flip(back, 2) - flipped).max()


def test_flips_do_not_commute_with_the_2023_release():
    """The references of the 2023 release are shifted down and right, so the flip fails even without offsets."""
    no_offsets = {"offset_bound": OffsetBound.NONE, "size": (5, 3)}
    assert flip_error(example_config(PP, **no_offsets), (5, 3)) > 0.1
    assert flip_error(example_config(CVPR, **no_offsets), (5, 3)) < 1e-12


@pytest.mark.parametrize(
    ("convention", "stride", "kernel", "size", "commutes"),
    [
        (CVPR, 2, 3, (9, 5), True),  # (H - 1) is a multiple of the stride: windows extend equally past both ends
        (CVPR, 2, 3, (8, 6), False),  # windows start at pixel -1 and end at pixel 7, the last one
        (CC, 2, 4, (8, 6), True),  # even kernel on whole cells: windows centered on the cells
        (CC, 2, 3, (8, 6), False),  # odd kernel on even cells: half a pixel too early
        (CC, 1, 2, (5, 3), False),  # even kernel at stride 1: likewise
        (PAPER, 2, 3, (9, 5), True),
        (CC, 3, 2, (6, 3), False),  # kernel smaller than the stride: the last pixel is in no window
    ],
)
def test_flips_commute_exactly_where_windows_are_symmetric(convention, stride, kernel, size, commutes):
    """The flip commutes exactly if the offset network treats both ends of the map equally."""
    config = example_config(convention, stride=stride, kernel_size=kernel, size=size)
    assert bool(flip_error(config, size) < 1e-11) == commutes


@given(layer_cases())
def test_transposition_commutes_in_every_convention(case):
    """Exchanging y and x everywhere exchanges them in the output, in every convention."""
    x, params = case.x(), case.params()
    turned = transpose(params, case.config, case.size, case.keys)
    y, _ = deformable_layer(x.swapaxes(2, 3), turned, transposed_config(case.config))
    assert_agree(y.swapaxes(2, 3), deformable_layer(x, params, case.config)[0], 1e-10)


@given(layer_cases(batches=(2,)))
def test_images_of_a_batch_are_independent(case):
    """The output of a batch equals the outputs of its images one by one."""
    x, params = case.x(), case.params()
    y, _ = deformable_layer(x, params, case.config)
    for image in range(2):
        assert_agree(y[image : image + 1], deformable_layer(x[image : image + 1], params, case.config)[0], 1e-12)


def test_dense_projections_mix_groups():
    """Moving the points of group 1 changes the keys of group 0's heads, because W_k and W_v are dense."""
    config = example_config(CC)
    x, params = example_input(config)
    _, before = deformable_layer(x, params, config)
    params["query"]["weight"][config.group_dim :] *= -1.5
    _, after = deformable_layer(x, params, config)
    assert_agree(after.points[:, 0], before.points[:, 0], 1e-13)
    assert np.abs(after.k[:, 0] - before.k[:, 0]).max() > 1e-3


# ------------------------------------------------------------------------------------------------ extremes

TINY_MAPS = [(1, 5), (5, 1), (1, 1), (2, 1), (1, 2)]


@pytest.mark.parametrize("size", TINY_MAPS, ids=str)
@pytest.mark.parametrize("convention", list(Convention), ids=lambda convention: convention.name)
@pytest.mark.parametrize("bound", list(OffsetBound), ids=lambda bound: bound.name)
def test_maps_of_height_or_width_one(size, convention, bound):
    """Maps one pixel high or wide give the usual shapes and finite values and gradients, for every bias."""
    if convention is PP and bound in (OffsetBound.TANH_CELLS, OffsetBound.RAW):
        return  # rejected, see test_offsets
    for bias in BiasKind:
        config = example_config(convention, offset_bound=bound, bias=bias, size=size)
        x, params = numbers(0, 2, 8, *size), random_params(deformable_shapes(config), np.random.default_rng(1))
        y, trace = deformable_layer(x, params, config)
        assert y.shape == x.shape
        assert np.isfinite(y).all()
        assert np.isfinite(trace.points_px).all()
        assert_agree(trace.attention.sum(axis=-1), np.ones(trace.attention.shape[:3]), 1e-13)
        grad_x, grad_params = deformable_layer_vjp(np.ones_like(y), trace, params, config)
        assert np.isfinite(grad_x).all()
        assert all(np.isfinite(grad).all() for grad in flatten(grad_params).values())


@pytest.mark.parametrize("convention", [CC, PAPER, CVPR], ids=lambda convention: convention.name)
def test_one_key(convention):
    """A stride as large as the map gives a single key, which gets all attention."""
    config = example_config(convention, stride=5, size=(5, 6), bias=BiasKind.TABLE, offset_bound=OffsetBound.NONE)
    x, params = numbers(0, 2, 8, 5, 5), random_params(deformable_shapes(config), np.random.default_rng(1))
    y, trace = deformable_layer(x, params, config)
    assert trace.attention.shape == (2, 4, 25, 1)
    assert (trace.attention == 1).all()
    assert_agree(y, np.broadcast_to(y[:, :, :1, :1], y.shape), 1e-13)


@given(layer_cases(batches=(0,)))
def test_empty_batch(case):
    """An empty batch gives an empty output, a trace of the right shapes, and zero gradients."""
    x, params = case.x(), case.params()
    y, trace = deformable_layer(x, params, case.config)
    assert y.shape == x.shape
    assert trace.points.shape == (0, case.config.groups, *case.keys, 2)
    grad_x, grad_params = deformable_layer_vjp(y, trace, params, case.config)
    assert grad_x.shape == x.shape
    grads = flatten(grad_params)
    assert {name: grad.shape for name, grad in grads.items()} == {n: p.shape for n, p in flatten(params).items()}
    assert not any(grad.any() for grad in grads.values())


def test_trace_has_the_documented_shapes():
    """The trace holds every intermediate by its public name, geometry as (B, G, Hk, Wk, 2)."""
    config = example_config(CC, stride=2)
    x, params = example_input(config)
    _, trace = DeformableAttention(config, params)(x, return_trace=True)
    for name in ("raw_offsets", "offsets", "reference", "points", "reference_px", "points_px"):
        assert getattr(trace, name).shape == (2, 2, 3, 2, 2), name
    shapes = {"sampled": (2, 8, 3, 2), "q": (2, 4, 15, 2), "k": (2, 4, 6, 2), "v": (2, 4, 6, 2)}
    shapes |= {"bias": (2, 4, 15, 6), "attention": (2, 4, 15, 6), "x": (2, 8, 5, 3)}
    for name, shape in shapes.items():
        assert getattr(trace, name).shape == shape, name


# ------------------------------------------------------------------------------------------------ numbers


@given(layer_cases())
def test_non_contiguous_inputs_are_accepted_and_left_alone(case):
    """Read-only, strided and reversed maps and parameters give the same result and are not modified."""
    x, params = case.x(), case.params()
    odd = map_tree(non_contiguous, params)
    layer = DeformableAttention(case.config, odd)
    y, pullback = layer.vjp(non_contiguous(x))
    assert_agree(y, DeformableAttention(case.config, params)(x), 1e-11)
    pullback(non_contiguous(y))
    for name, leaf in flatten(odd).items():
        np.testing.assert_array_equal(leaf, flatten(params)[name])


@given(layer_cases(), st.sampled_from([np.float32, np.float64]))
def test_precision_is_kept(case, dtype):
    """Output, trace and all gradients have the dtype of the input, float32 or float64."""
    x, params = case.x(dtype), case.params(dtype)
    y, trace = deformable_layer(x, params, case.config)
    assert y.dtype == dtype
    for name in ("points", "points_px", "reference", "sampled", "attention"):
        assert getattr(trace, name).dtype == dtype, name
    grad_x, grad_params = deformable_layer_vjp(y, trace, params, case.config)
    assert grad_x.dtype == dtype
    for name, grad in flatten(grad_params).items():
        assert grad.dtype == dtype, name


@given(layer_cases(batches=(2,)))
def test_nan_is_never_dropped(case):
    """A NaN pixel makes the output of its own query NaN, and never the output of another image."""
    x = case.x()
    x[0, 0, -1, 0] = np.nan
    y, _ = deformable_layer(x, case.params(), case.config)
    assert np.isnan(y[0, :, -1, 0]).all()
    assert np.isfinite(y[1]).all()


def float32_run(config, size, seed):
    """Return the result of the layer in float32, and in float64 on the same rounded values."""
    x = numbers(seed, 1, config.dim, *size, dtype=np.float32)
    params = random_params(deformable_shapes(config), np.random.default_rng([seed, 1]), np.float32)
    exact = map_tree(lambda leaf: leaf.astype(np.float64), params)
    return x, params, deformable_layer(x, params, config)[0], deformable_layer(x.astype(np.float64), exact, config)[0]


@pytest.mark.parametrize("convention", list(Convention), ids=lambda convention: convention.name)
@pytest.mark.parametrize("bias", list(BiasKind), ids=lambda bias: bias.name)
def test_float32_stays_within_the_error_budget(convention, bias):
    """In float32 the layer is elementwise as accurate as a composition of torch's operators."""
    pytest.importorskip("torch")
    from helpers.torch_layers import torch_layer

    config = example_config(convention, bias=bias, offset_bound=OffsetBound.CLAMP, size=(7, 5))
    x, params, result, truth = float32_run(config, (7, 5), 3)
    yardstick = torch_layer(x, params, config).numpy()
    assert_within_budget(result, truth, yardstick, what=f"{convention} {bias}")


def test_parameters_come_back_from_their_flat_names():
    """A layer built from flattened and unflattened parameters is the same layer."""
    config = example_config(CC)
    x, params = example_input(config)
    again = DeformableAttention(config, unflatten(flatten(params)))
    np.testing.assert_array_equal(again(x), DeformableAttention(config, params)(x))


def test_default_convention_is_cell_center():
    """The defaults are cell centers, a bounded offset and a table."""
    config = DeformableAttentionConfig(dim=4, heads=2, size=(3, 5))
    assert (config.convention, config.offset_bound, config.bias) == (CC, OffsetBound.TANH_CELLS, BiasKind.TABLE)
    layer = DeformableAttention(config, init_params(config, 0))
    assert layer(numbers(0, 1, 4, 9, 4, dtype=np.float32)).shape == (1, 4, 9, 4)
    assert replace(config, size=(9, 4)).size == (9, 4)
