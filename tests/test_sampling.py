"""Bilinear sampling: against scipy and scalar loops; properties inside, on and outside the map."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.checks import SAMPLER_CHECKS, sampling_matches_loops, sampling_matches_map_coordinates
from hypothesis import given
from hypothesis import strategies as st
from oracle import sampling as loops
from strategies import map_sizes, non_contiguous, numbers, points_px, seeds, shown_by_shape

from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp


@shown_by_shape
@st.composite
def samplings(draw, maps=2, points=4):
    """Draw maps (N, C, H, W) and points (N, P, 2)."""
    size = draw(map_sizes())
    positions = np.stack([draw(points_px(size, points)) for _ in range(maps)])
    return numbers(draw(seeds), maps, 3, *size), positions


@pytest.mark.parametrize("check", SAMPLER_CHECKS, ids=lambda check: check.__name__)
def test_named_checks(check):
    """The sampler passes every check that the mutants must fail."""
    check(bilinear_sample)


@given(samplings())
def test_equals_map_coordinates(case):
    """Sampling equals scipy.ndimage.map_coordinates(order=1, prefilter=False, mode="grid-constant")."""
    sampling_matches_map_coordinates(bilinear_sample, *case)


@given(samplings())
def test_equals_scalar_loops(case):
    """Sampling equals the sum over all pixels, one scalar at a time."""
    sampling_matches_loops(bilinear_sample, *case)


@given(samplings(maps=1))
def test_gradients_equal_scalar_loops(case):
    """The gradients equal the right-hand slopes and weights of the loops, also on the lattice."""
    x, points = case
    cotangent = numbers(7, 1, x.shape[1], points.shape[1])
    grads = bilinear_sample_vjp(cotangent, x, points)
    spread = np.zeros(x.shape[1:])
    for p, (y_px, x_px) in enumerate(points[0].tolist()):
        slopes = np.zeros(2)
        for c, weight in enumerate(cotangent[0, :, p].tolist()):
            slopes += weight * np.array(loops.bilinear_slopes(x[0, c], y_px, x_px))
            spread[c] += loops.bilinear_spread(weight, x.shape[2:], y_px, x_px)
        assert_agree(grads.points_px[0, p], slopes, 1e-12, "points")
    assert_agree(grads.x[0], spread, 1e-12, "map")


@given(map_sizes(), seeds)
def test_weights_sum_to_one_inside_the_map(size, seed):
    """Samples of a map of ones are one everywhere between the first and the last pixel centers."""
    points = np.random.default_rng(seed).uniform(0, np.asarray(size) - 1.0, (1, 20, 2))
    assert_agree(bilinear_sample(np.ones((1, 2, *size)), points), np.ones((1, 2, 20)), 1e-14)


@given(map_sizes(), seeds)
def test_on_a_pixel_center_the_pixel_itself(size, seed):
    """At integer positions sampling returns the pixel bit for bit."""
    x = numbers(seed, 1, 2, *size)
    lattice = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1).reshape(1, -1, 2)
    np.testing.assert_array_equal(bilinear_sample(x, lattice.astype(np.float64)), x.reshape(1, 2, -1))


@given(samplings(maps=1))
def test_zeros_outside_are_the_zeros_of_a_padded_map(case):
    """Padding the map with zeros shifts the origin and changes nothing else."""
    x, points = case
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    assert_agree(bilinear_sample(padded, points + 1), bilinear_sample(x, points), 1e-12)


@given(samplings(), st.floats(-3, 3))
def test_linear_in_the_map(case, factor):
    """φ(a·x + x'; p) = a·φ(x; p) + φ(x'; p)."""
    x, points = case
    other = numbers(3, *x.shape)
    combined = factor * bilinear_sample(x, points) + bilinear_sample(other, points)
    assert_agree(bilinear_sample(factor * x + other, points), combined, 1e-12)


@given(samplings())
def test_map_gradient_is_the_transpose(case):
    """<cotangent, φ(x)> = <φᵀ(cotangent), x>."""
    x, points = case
    sampled = bilinear_sample(x, points)
    cotangent = numbers(11, *sampled.shape)
    grads = bilinear_sample_vjp(cotangent, x, points)
    assert_agree(np.vdot(grads.x, x), np.vdot(cotangent, sampled), 1e-12)


def test_nan_point_gives_nan_and_no_other():
    """A NaN coordinate gives NaN in all channels of its own sample and does not affect the others."""
    x = numbers(0, 1, 2, 3, 5)
    points = np.array([[[1.0, 1.5], [np.nan, 1.0], [0.5, np.nan], [2.0, 2.0]]])
    sampled = bilinear_sample(x, points)
    assert np.isnan(sampled).tolist() == [[[False, True, True, False]] * 2]
    assert np.isnan(bilinear_sample_vjp(np.ones_like(sampled), x, points).points_px[0, 1]).any()


def test_nan_pixel_reaches_all_samples_that_read_it():
    """A sample with a nonzero weight on a NaN pixel is NaN; samples two pixels away are not."""
    x = numbers(0, 1, 1, 5, 7)
    x[0, 0, 2, 3] = np.nan
    points = np.array([[[2.0, 3.0], [1.5, 3.5], [2.9, 2.1], [2.5, 0.5], [0.0, 3.0]]])
    assert np.isnan(bilinear_sample(x, points))[0, 0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_and_non_contiguous_inputs(dtype):
    """Read-only, strided and reversed inputs are accepted and not modified; the output has the input's precision."""
    x, points = numbers(1, 2, 3, 5, 4, dtype=dtype), numbers(2, 2, 6, 2, dtype=dtype) + 2
    odd_x, odd_points = non_contiguous(x), non_contiguous(points)
    sampled = bilinear_sample(odd_x, odd_points)
    assert sampled.dtype == dtype
    np.testing.assert_array_equal(sampled, bilinear_sample(x, points))
    np.testing.assert_array_equal(odd_x, x)
    np.testing.assert_array_equal(odd_points, points)
    grads = bilinear_sample_vjp(non_contiguous(sampled), odd_x, odd_points)
    assert grads.x.dtype == grads.points_px.dtype == dtype


@pytest.mark.parametrize(("maps", "points"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_sample(maps, points):
    """No maps or no points: empty results of the right shape, gradients too."""
    x, positions = np.zeros((maps, 3, 5, 4)), np.zeros((maps, points, 2))
    sampled = bilinear_sample(x, positions)
    assert sampled.shape == (maps, 3, points)
    grads = bilinear_sample_vjp(sampled, x, positions)
    assert grads.x.shape == x.shape
    assert grads.points_px.shape == positions.shape
    assert not grads.x.any()


def test_infinite_points_are_outside():
    """A point at infinity reads zero."""
    points = np.array([[[np.inf, 1.0], [-np.inf, 1.0], [1.0, np.inf]]])
    assert not bilinear_sample(np.ones((1, 1, 3, 4)), points).any()


def test_a_nan_elsewhere_in_the_map_stays_where_it_is():
    """Points that do not read a NaN pixel are not affected by it, inside, on the border or outside."""
    x = np.ones((1, 2, 3, 3))
    x[0, 0, 0, 0] = np.nan
    points = np.array([[[2.0, 2.0], [1.5, 1.25], [2.5, 0.5], [9.0, 9.0], [0.5, 0.5]]])
    sampled = bilinear_sample(x, points)
    assert np.isnan(sampled[0, 0]).tolist() == [False, False, False, False, True]
    assert np.isfinite(sampled[0, 1]).all()
    grads = bilinear_sample_vjp(np.ones_like(sampled), x, points)
    assert np.isnan(grads.points_px[0, :, 0]).tolist() == [False, False, False, False, True]
    assert np.isfinite(grads.x).all()


def test_integer_maps_and_points_are_accepted():
    """Integer maps and points are converted to floats, for outputs and gradients."""
    x, points = np.arange(12).reshape(1, 1, 3, 4), np.array([[[1, 2], [2, 3], [5, 0]]])
    assert bilinear_sample(x, points).tolist() == [[[6.0, 11.0, 0.0]]]
    whole = bilinear_sample_vjp(np.ones((1, 1, 3)), x, points)
    real = bilinear_sample_vjp(np.ones((1, 1, 3)), x.astype(float), points.astype(float))
    assert_agree(whole.points_px, real.points_px)
    assert_agree(whole.x, real.x)
