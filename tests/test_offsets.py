"""Offset network and the bound on its output."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.checks import example_config, example_input
from helpers.layers import random_params
from hypothesis import given
from hypothesis import strategies as st
from oracle import deformable as loops
from strategies import conventions, layer_cases, map_sizes, numbers, seeds

from dat_ref import BiasKind, ConfigError, Convention, DeformableAttentionConfig, OffsetBound, config, init_params
from dat_ref.layer import deformable_layer, deformable_layer_vjp, deformable_shapes
from dat_ref.ops.grid import reference_points
from dat_ref.ops.offsets import bound_offsets, bound_offsets_vjp, offset_limit, share_at_bound
from dat_ref.params import flatten, map_tree

MOVING = [OffsetBound.TANH_CELLS, OffsetBound.TANH_COORDINATES, OffsetBound.CLAMP, OffsetBound.RAW]


def bounding(convention, offset_range=3.0):
    return {"offset_range": offset_range, "convention": convention}


@given(conventions, map_sizes(smallest=2), st.sampled_from(list(OffsetBound)), seeds)
def test_bounds_equal_scalar_formulas(convention, keys, bound, seed):
    """Every bound equals the oracle's, for small and huge raw offsets."""
    raw = 3 * numbers(seed, 1, 2, *keys, 2) ** 3
    reference = reference_points(keys, convention)
    _, points = bound_offsets(raw, reference, bound, **bounding(convention))
    options = {"offset_bound": bound.value, "convention": convention.name.lower(), "offset_range": 3.0}
    for b, g, i, j, axis in np.ndindex(*raw.shape):
        moved = 0.0 if bound is OffsetBound.NONE else float(raw[b, g, i, j, axis])
        expected = loops.bound(float(reference[i, j, axis]), moved, keys[axis], options)
        assert_agree(points[b, g, i, j, axis], expected, 1e-13)


@given(layer_cases(bounds=[OffsetBound.TANH_CELLS], biases=[BiasKind.NONE]), st.sampled_from([1.0, 1e3]))
def test_tanh_keeps_points_within_half_the_range(case, gain):
    """With TANH_CELLS points stay in the s × s key cells around their reference, measured in pixels of the map."""
    params = case.params()
    params["offset_network"]["pointwise"]["weight"] *= gain
    _, trace = deformable_layer(case.x(), params, case.config)
    convention = case.config.convention
    if convention is Convention.DATPP2023 and 1 in case.keys:
        return  # drawn with a clamp
    for axis in range(2):
        pitch = (case.size[axis] - convention.align_corners) / max(case.keys[axis] - convention.reference.gap, 1)
        moved = np.abs(trace.points_px - trace.reference_px)[..., axis]
        assert (moved <= case.config.offset_range / 2 * pitch + 1e-12).all()


@given(layer_cases(bounds=[OffsetBound.TANH_COORDINATES, OffsetBound.CLAMP], biases=[BiasKind.NONE]))
def test_clamp_and_tanh_of_coordinates_keep_points_on_the_map(case):
    """With TANH_COORDINATES and CLAMP points stay in [-1, 1] for any output of the network."""
    params = case.params()
    params["offset_network"]["pointwise"]["weight"] *= 50
    _, trace = deformable_layer(case.x(), params, case.config)
    assert (np.abs(trace.points) <= 1).all()


@given(layer_cases(bounds=[OffsetBound.RAW], biases=[BiasKind.NONE], among=list(Convention)[:3]))
def test_raw_offsets_are_added_as_they_are(case):
    """With RAW point = reference + network output, also outside the map."""
    params = case.params()
    params["offset_network"]["pointwise"]["weight"] *= 1e3
    _, trace = deformable_layer(case.x(), params, case.config)
    assert_agree(trace.points, trace.reference + trace.raw_offsets, 1e-12)


@given(conventions, map_sizes(smallest=2), seeds)
def test_huge_offsets_reach_the_limit_and_not_beyond(convention, keys, seed):
    """tanh saturates at exactly (s/2) · pitch."""
    raw = 1e6 * numbers(seed, 2, 1, *keys, 2)
    offsets, _ = bound_offsets(raw, reference_points(keys, convention), OffsetBound.TANH_CELLS, **bounding(convention))
    limit = offset_limit(3.0, keys, convention)
    assert_agree(np.abs(offsets), np.broadcast_to(limit, offsets.shape), 1e-15)
    spacing = reference_points(keys, convention)
    pitch = [spacing[1, 0, 0] - spacing[0, 0, 0], spacing[0, 1, 1] - spacing[0, 0, 1]]
    assert_agree(limit, 1.5 * np.array(pitch), 1e-14)


@given(layer_cases(bounds=MOVING, biases=[BiasKind.NONE]))
def test_zero_activations_give_zero_offsets(case):
    """With a zero norm the last convolution, which has no bias, returns zero: points stay on the reference."""
    params = case.params()
    norm = params["offset_network"]["norm"]
    norm["weight"][:], norm["bias"][:] = 0, 0
    _, trace = deformable_layer(case.x(), params, case.config)
    assert not trace.raw_offsets.any()
    assert not trace.offsets.any()
    if case.config.offset_bound in (OffsetBound.TANH_CELLS, OffsetBound.RAW):
        np.testing.assert_array_equal(trace.points, trace.reference)


@pytest.mark.parametrize("bound", MOVING)
@pytest.mark.parametrize("convention", [Convention.CELL_CENTER, Convention.PAPER, Convention.CVPR2022])
def test_zero_offset_initialisation_starts_on_the_reference(bound, convention):
    """With offsets="zero_offset" initial points equal the reference bit for bit, unless tanh is applied to them."""
    layer = example_config(convention, offset_bound=bound)
    x, _ = example_input(layer)
    _, trace = deformable_layer(x, init_params(layer, 0, offsets="zero_offset", dtype=np.float64), layer)
    expected = np.tanh(trace.reference) if bound is OffsetBound.TANH_COORDINATES else trace.reference
    np.testing.assert_array_equal(trace.points, expected)


def test_one_network_serves_all_groups():
    """Groups with equal queries have equal offsets."""
    layer = example_config(Convention.CELL_CENTER)
    x, params = example_input(layer)
    for name in ("weight", "bias"):
        params["query"][name][layer.group_dim :] = params["query"][name][: layer.group_dim]
    _, trace = deformable_layer(x, params, layer)
    assert_agree(trace.points[:, 1], trace.points[:, 0], 1e-13)


@given(layer_cases(bounds=MOVING, biases=[BiasKind.NONE]))
def test_network_equals_scalar_loops(case):
    """Raw offsets equal convolution, norm, GELU and projection written as loops; channel 0 is y."""
    _, trace = deformable_layer(case.x(), case.params(), case.config)
    options = {"groups": case.config.groups, "stride": case.config.stride, "kernel_size": case.config.kernel_size}
    options["convention"] = case.config.convention.name.lower()
    expected = loops.raw_offsets(trace.query, options, case.params())
    expected = expected.reshape(case.batch, case.config.groups, 2, *case.keys)
    assert_agree(trace.raw_offsets.transpose(0, 1, 4, 2, 3), expected, 1e-10)


# ------------------------------------------------------------------------------------------------ the clamp's rule


def test_clamp_stops_the_gradient_outside_only():
    """Gradient passes where -1 <= p + Δ <= 1, the ends included, and is exactly zero outside."""
    reference = np.array([[[0.5, -0.5]]])
    raw = np.array([[0.25, 0.25], [0.5, -0.5], [0.75, 0.0], [0.0, -0.75]]).reshape(4, 1, 1, 1, 2)
    grads = bound_offsets_vjp(np.ones(raw.shape), raw, reference, OffsetBound.CLAMP, **bounding(Convention.PAPER))
    assert grads.reshape(4, 2).tolist() == [[1, 1], [1, 1], [0, 1], [1, 0]]


@pytest.mark.parametrize("bound", [OffsetBound.CLAMP, OffsetBound.TANH_COORDINATES])
def test_a_single_key_of_the_2023_release_never_moves(bound):
    """At stride 7 on 7 × 7 the key is at +1 for any offset, and the offset network gets no gradient."""
    layer = example_config(Convention.DATPP2023, stride=7, kernel_size=7, offset_bound=bound, size=(7, 7))
    params = random_params(deformable_shapes(layer), np.random.default_rng(0))
    x = numbers(4, 2, 8, 7, 7)
    y, trace = deformable_layer(x, params, layer)
    assert (trace.points == 1).all()
    assert (trace.points_px == 6).all()
    assert np.isfinite(y).all()
    _, grads = deformable_layer_vjp(np.ones_like(y), trace, params, layer)
    assert not any(grad.any() for grad in flatten(grads["offset_network"]).values())
    larger = map_tree(lambda leaf: 3 * leaf, params["offset_network"])
    moved, _ = deformable_layer(x, {**params, "offset_network": larger}, layer)
    np.testing.assert_array_equal(moved, y)


@pytest.mark.parametrize("bound", [OffsetBound.TANH_CELLS, OffsetBound.RAW])
def test_a_single_key_of_the_2023_release_needs_a_bound_on_coordinates(bound):
    """A bound on the offset alone is rejected with a remedy, instead of the division by zero in the release."""
    layer = example_config(Convention.DATPP2023, stride=7, kernel_size=7, offset_bound=bound, size=(7, 7))
    params = init_params(layer, 0)
    with pytest.raises(ConfigError, match=r"offset_bound: DATPP2023 puts a single key at infinity.*got " + bound.name):
        deformable_layer(numbers(4, 2, 8, 7, 7, dtype=np.float32), params, layer)


def clamped_share(layer, size, seed):
    """Return the share of offset components without gradient, over all keys and of the y of the last key row."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, layer.dim, *size))
    _, trace = deformable_layer(x, init_params(layer, rng, dtype=np.float64), layer)
    reference = trace.reference[0, 0]
    options = bounding(layer.convention, layer.offset_range)
    grads = bound_offsets_vjp(np.ones(trace.points.shape), trace.raw_offsets, reference, layer.offset_bound, **options)
    held = share_at_bound(trace.offsets, reference, layer.offset_bound, **options)
    assert held == pytest.approx(float((grads == 0).mean()))
    return held, float((grads[:, :, -1, :, 0] == 0).mean())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_share_of_offsets_without_gradient_at_the_released_start(stage):
    """Initially about a fifth of DAT++'s offset components has no gradient, and most of y in the last key row."""
    reduction = 4 << stage
    layer = next(b.attention for b in config("dat_pp_tiny").stages[stage] if b.attention.kind == "deformable")
    layer = replace(layer, bias=BiasKind.NONE)  # irrelevant here, and slow
    size = (224 // reduction, 224 // reduction)
    shares, last = np.mean([clamped_share(layer, size, seed) for seed in range(6)], axis=0)
    assert 0.19 < shares < 0.25
    assert 0.5 < last < 0.9


@pytest.mark.parametrize("bound", list(OffsetBound))
def test_share_at_bound_counts_saturated_components(bound):
    """Two of eight components far outside give a share of a quarter; without a bound the share is zero."""
    reference = reference_points((2, 2), Convention.CELL_CENTER)
    raw = np.zeros((1, 1, 2, 2, 2))
    raw[0, 0, 0, 0, 0], raw[0, 0, 1, 1, 1] = -40, 40
    offsets, _ = bound_offsets(raw, reference, bound, **bounding(Convention.CELL_CENTER))
    expected = 0.0 if bound in (OffsetBound.RAW, OffsetBound.NONE) else 0.25
    assert share_at_bound(offsets, reference, bound, **bounding(Convention.CELL_CENTER)) == expected
    assert share_at_bound(offsets[:0], reference, bound, **bounding(Convention.CELL_CENTER)) == 0.0


def test_range_zero_fixes_every_point():
    """With s = 0 all offsets are multiplied by zero, as in the 2023 code."""
    layer = DeformableAttentionConfig(
        4, 2, offset_range=0.0, bias=BiasKind.NONE, convention=Convention.DATPP2023, kernel_size=3
    )
    _, trace = deformable_layer(numbers(1, 1, 4, 5, 3), init_params(layer, 0, dtype=np.float64), layer)
    np.testing.assert_array_equal(trace.points, trace.reference)
