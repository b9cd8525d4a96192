"""Law of coverage: counts against gradients and loops, and each consequence for the layer."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import geometry

from dat_ref import ConfigError, Convention, DeformableAttention, DeformableAttentionConfig, init_params
from dat_ref.config import BiasKind, OffsetBound
from dat_ref.ops import coverage
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp

CONVENTIONS = st.sampled_from(list(Convention))
# Percent of a 48 × 48 map that is read, by stride.
PERCENT = {
    Convention.CELL_CENTER: {1: 100, 2: 100, 3: 100 / 9, 4: 25, 8: 6.25},
    Convention.CVPR2022: {1: 100, 2: 100, 3: 44.44, 4: 25, 8: 6.25},
    Convention.DATPP2023: {1: 100, 2: 95.88, 3: 41.71, 4: 22.96, 8: 5.25},
    Convention.PAPER: {1: 100, 2: 91.84, 3: 39.06, 4: 21.01, 8: 4.34},
}


# ------------------------------------------------------------------------------------------------ coverage


@pytest.mark.parametrize("convention", Convention)
def test_coverage_by_stride(convention):
    for stride, percent in PERCENT[convention].items():
        assert 100 * coverage.coverage((48, 48), stride, convention) == pytest.approx(percent, abs=0.01)


def test_a_map_smaller_than_the_stride_has_one_key():
    """One key reads the two middle rows of four; two keys read four columns of nine."""
    assert coverage.coverage((4, 9), 5) == pytest.approx((2 / 4) * (4 / 9))


@given(CONVENTIONS, st.integers(1, 9), st.integers(0, 14), st.integers(0, 14))
def test_read_pixels_against_loops(convention, stride, more_rows, more_columns):
    size = (stride + more_rows, stride + more_columns)
    axes = []
    for length in size:
        keys = math.ceil(length / stride)
        read = [False] * length
        for key in range(keys):
            name = convention.name.lower()
            point = geometry.to_pixel(name, max(-1.0, min(1.0, geometry.reference(name, key, keys))), length)
            for pixel in range(length):
                clamped = min(max(point, 0.0), length - 1.0)
                read[pixel] |= 1 - abs(clamped - pixel) > 1e-9
        axes.append(read)
    expected = np.array([[row and column for column in axes[1]] for row in axes[0]])
    np.testing.assert_array_equal(coverage.read_pixels(size, stride, convention), expected)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_pixels_that_are_read_are_those_that_move_the_keys(stride, rows, columns):
    """The gradient of the sampled features to the map is nonzero exactly at the pixels that are read."""
    size = (stride * rows, stride * columns)
    config = DeformableAttentionConfig(4, 2, stride=stride, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE)
    layer = DeformableAttention(config, init_params(config, 0, dtype=np.float64))
    x = np.random.default_rng(0).standard_normal((1, 4, *size))
    _, trace = layer(x, return_trace=True)
    points = trace.points_px[0, 0].reshape(1, -1, 2)
    gradient = bilinear_sample_vjp(np.ones((1, 4, points.shape[1])), x, points).x
    np.testing.assert_array_equal((np.abs(gradient) > 1e-9).all((0, 1)), coverage.read_pixels(size, stride))


def test_a_grid_that_is_half_a_pixel_off_is_rejected():
    """The comparison above rejects footprints that were shifted."""
    read = coverage.read_pixels((12, 20), 4)
    assert (np.roll(read, 1, axis=1) != read).any()
    assert (read.T.shape) != read.shape


# ------------------------------------------------------------------------------------------------ average pooling


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16))
def test_without_offsets_strides_1_and_2_are_average_pooling(stride, rows, columns, seed):
    size = (stride * rows, stride * columns)
    config = DeformableAttentionConfig(6, 2, stride=stride, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE)
    params = init_params(config, seed, dtype=np.float64)
    x = np.random.default_rng(seed).standard_normal((2, 6, *size))
    sampled = DeformableAttention(config, params)(x, return_trace=True)[1].sampled
    pooled = DeformableAttention(replace(config, average_pool=True), params)(x, return_trace=True)[1].sampled
    if stride <= 2:
        np.testing.assert_allclose(sampled, pooled, rtol=0, atol=1e-13)
    else:
        assert np.abs(sampled - pooled).max() > 1e-3


@pytest.mark.parametrize("convention", [Convention.PAPER, Convention.CVPR2022, Convention.DATPP2023])
def test_other_conventions_are_not_average_pooling_at_stride_2(convention):
    config = DeformableAttentionConfig(
        6, 2, stride=2, kernel_size=3, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE, convention=convention
    )
    params = init_params(config, 0, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((1, 6, 8, 12))
    sampled = DeformableAttention(config, params)(x, return_trace=True)[1].sampled
    pooled = DeformableAttention(replace(config, average_pool=True), params)(x, return_trace=True)[1].sampled
    assert np.abs(sampled - pooled).max() > 1e-2


# ------------------------------------------------------------------------------------------------ the bound


@given(CONVENTIONS, st.integers(1, 8), st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
def test_hit_rate_against_a_loop_over_positions(convention, stride, more_rows, more_columns, height, width):
    size = (max(stride, height) + more_rows, max(stride, width) + more_columns)
    read = coverage.read_pixels(size, stride, convention)
    hits = positions = 0
    for top in range(size[0] - height + 1):
        for left in range(size[1] - width + 1):
            positions += 1
            hits += any(read[top + y, left + x] for y in range(height) for x in range(width))
    assert coverage.hit_rate(size, stride, (height, width), convention) == pytest.approx(hits / positions)


@given(st.integers(3, 6), st.integers(1, 3), st.integers(0, 2**16))
def test_a_target_that_no_point_reads_changes_no_key(stride, side, seed):
    """At every position, for any target, keys and values change exactly where `hit_rate` counts a hit."""
    size = (2 * stride, 3 * stride)
    config = DeformableAttentionConfig(4, 2, stride=stride, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE)
    layer = DeformableAttention(config, init_params(config, seed, dtype=np.float64))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 4, *size))
    keys = layer(x, return_trace=True)[1].k
    changed = []
    for top in range(size[0] - side + 1):
        for left in range(size[1] - side + 1):
            other = x.copy()
            other[:, :, top : top + side, left : left + side] = rng.standard_normal((1, 4, side, side))
            changed.append(np.abs(layer(other, return_trace=True)[1].k - keys).max() > 1e-9)
    assert np.mean(changed) == pytest.approx(coverage.hit_rate(size, stride, (side, side)))


@given(st.integers(4, 8), st.integers(1, 4), st.integers(2, 9))
def test_the_best_classifier_of_the_keys_reaches_the_bound_and_no_more(stride, side, classes):
    """The classifier predicts the most frequent kind among all positions and kinds with equal keys."""
    size = (2 * stride, 2 * stride)
    read = coverage.read_pixels(size, stride)
    seen: dict[bytes, list[int]] = {}
    for top in range(size[0] - side + 1):
        for left in range(size[1] - side + 1):
            for kind in range(classes):
                x = np.zeros(size)
                x[top : top + side, left : left + side] = kind + 1
                seen.setdefault((x * read).tobytes(), []).append(kind)
    right = sum(max(map(kinds.count, set(kinds))) for kinds in seen.values())
    total = sum(map(len, seen.values()))
    bound = coverage.fixed_grid_bound(coverage.hit_rate(size, stride, (side, side)), classes)
    assert right / total == pytest.approx(bound)


# ------------------------------------------------------------------------------------------------ the capture radius


@given(st.floats(0.6, 6.0), st.floats(-0.5, 0.5), st.floats(-7.0, 7.0))
def test_no_gradient_from_beyond_the_capture_radius(side, fraction, away):
    """On an empty map, a point gets a gradient from a target only within the radius."""
    length, center = 25, 12 + fraction
    pixels = np.arange(length)
    covered = np.minimum(pixels + 0.5, center + side / 2) - np.maximum(pixels - 0.5, center - side / 2)
    x = (covered >= 0.5).astype(float).reshape(1, 1, 1, length)
    point = np.array([[[0.0, center + away]]])
    slope = bilinear_sample_vjp(np.ones((1, 1, 1)), x, point).points_px[0, 0, 1]
    if abs(away) >= coverage.capture_radius(side):
        assert slope == 0
        assert bilinear_sample(x, point).item() == 0


@given(st.integers(1, 6))
def test_the_capture_radius_is_the_smallest_one(side):
    """Just inside the radius, a target that half covers its outermost pixels gives the point a gradient."""
    length, center = 25, 12 + 0.5 * (side % 2 == 1)  # the target covers exactly half of a pixel at each end
    pixels = np.arange(length)
    covered = np.minimum(pixels + 0.5, center + side / 2) - np.maximum(pixels - 0.5, center - side / 2)
    x = (covered >= 0.5).astype(float).reshape(1, 1, 1, length)
    point = np.array([[[0.0, center + coverage.capture_radius(side) - 1e-6]]])
    assert bilinear_sample_vjp(np.ones((1, 1, 1)), x, point).points_px[0, 0, 1] < 0  # towards the target


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "call",
    [
        lambda: coverage.coverage((4, 9), 0),
        lambda: coverage.hit_rate((8, 8), 4, (9, 1)),
        lambda: coverage.hit_rate((8, 8), 4, (0, 1)),
        lambda: coverage.fixed_grid_bound(1.1, 3),
        lambda: coverage.fixed_grid_bound(float("nan"), 3),
        lambda: coverage.fixed_grid_bound(0.5, 0),
        lambda: coverage.capture_radius(0),
        lambda: coverage.capture_radius(float("nan")),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ConfigError, match="expected"):
        call()
