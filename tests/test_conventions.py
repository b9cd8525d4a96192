"""The four coordinate conventions: key positions, pixel coordinates, sampling at zero offset."""

import itertools
import math

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.checks import example_config, example_input, zero_offset_is_the_identity
from hypothesis import given
from hypothesis import strategies as st
from oracle import geometry
from strategies import conventions, layer_cases, map_sizes, numbers, seeds

from dat_ref import BiasKind, Convention, DeformableAttentionConfig, OffsetBound, init_params
from dat_ref.layer import deformable_layer
from dat_ref.ops.grid import (
    from_pixels,
    key_grid_size,
    offset_padding,
    pixels_per_unit,
    query_points,
    reference_points,
    to_pixels,
    to_pixels_vjp,
)

CC, PAPER, CVPR, PP = Convention.CELL_CENTER, Convention.PAPER, Convention.CVPR2022, Convention.DATPP2023


@given(conventions, map_sizes(), map_sizes())
def test_grids_equal_scalar_formulas(convention, keys, size):
    """Reference and query grids, in normalised coordinates and in pixels, equal the formulas of their sources."""
    name = convention.name.lower()
    references, queries = reference_points(keys, convention), query_points(size, convention)
    assert references.dtype == queries.dtype == np.float64
    for i, j in np.ndindex(*keys):
        expected = [geometry.reference(name, i, keys[0]), geometry.reference(name, j, keys[1])]
        np.testing.assert_allclose(references[i, j], expected, rtol=0, atol=1e-14)
    for i, j in np.ndindex(*size):
        expected = [geometry.query(name, i, size[0]), geometry.query(name, j, size[1])]
        np.testing.assert_allclose(queries[i, j], expected, rtol=0, atol=1e-14)
    pixels = to_pixels(queries, size, convention)
    for i, j in np.ndindex(*size):
        expected = [geometry.to_pixel(name, float(queries[i, j, axis]), size[axis]) for axis in range(2)]
        assert_agree(pixels[i, j], expected, 1e-13)


@given(conventions, map_sizes(), seeds)
def test_pixels_and_back(convention, size, seed):
    """from_pixels undoes to_pixels, except on an axis that has one position only."""
    points = np.random.default_rng(seed).uniform(-2, 2, (3, 4, 2))
    back = from_pixels(to_pixels(points, size, convention), size, convention)
    for axis in range(2):
        lone = size[axis] == 1 and convention.align_corners
        assert_agree(back[..., axis], np.zeros((3, 4)) if lone else points[..., axis], 1e-13)


@given(conventions, map_sizes())
def test_pixel_slope(convention, size):
    """One normalised unit is (H - a)/2 pixels; the gradient is multiplied by this factor."""
    step = to_pixels(np.ones((1, 2)), size, convention) - to_pixels(np.zeros((1, 2)), size, convention)
    assert_agree(step[0], pixels_per_unit(size, convention), 1e-14)
    assert_agree(to_pixels_vjp(np.array([2.0, -3.0]), size, convention), np.array([2, -3]) * step[0], 1e-13)


@pytest.mark.parametrize(
    ("convention", "edges"), [(CC, [-0.5, 6.5]), (PAPER, [0.0, 6.0]), (CVPR, [0.0, 6.0]), (PP, [0.0, 6.0])]
)
def test_plus_and_minus_one(convention, edges):
    """±1 are the outer edges of the map for cell centers, the outermost pixel centers otherwise."""
    assert to_pixels(np.array([[-1.0, -1.0], [1.0, 1.0]]), (7, 7), convention)[:, 0].tolist() == edges


@pytest.mark.parametrize(
    ("convention", "pixels"),
    [
        (CC, [3.5, 11.5, 19.5, 27.5, 35.5, 43.5, 51.5]),
        (PAPER, [55 * i / 6 for i in range(7)]),
        (CVPR, [55 * (i + 0.5) / 7 for i in range(7)]),
        (PP, [55 * (i + 0.5) / 6 for i in range(7)]),
    ],
)
def test_seven_keys_on_fifty_six_pixels(convention, pixels):
    """Reference points of the first stage of DAT++; the last one of DATPP2023 is outside the map."""
    reference = to_pixels(reference_points((7, 7), convention), (56, 56), convention)
    np.testing.assert_allclose(reference[:, 3, 0], pixels, rtol=0, atol=1e-12)
    np.testing.assert_allclose(reference[3, :, 1], pixels, rtol=0, atol=1e-12)


@given(st.sampled_from([CC, PAPER, CVPR]), map_sizes())
def test_reference_grid_is_symmetric(convention, keys):
    """Rotation by 180° changes the sign of the reference grid and nothing else."""
    reference = reference_points(keys, convention)
    assert_agree(-reference[::-1, ::-1], reference, 1e-14)


@given(map_sizes(smallest=2))
def test_datpp2023_reference_grid_is_shifted(keys):
    """DATPP2023's grid is the paper's, moved down and right by half a key pitch."""
    shift = np.array([1 / (count - 1) for count in keys])
    assert_agree(reference_points(keys, PP), reference_points(keys, PAPER) + shift, 1e-14)


@given(conventions, map_sizes(), st.integers(1, 9), st.integers(1, 4))
def test_key_grid_and_padding_equal_scalar_count(convention, size, kernel, stride):
    """Padding and number of windows equal a count of the windows that fit."""
    if convention is PP and kernel == stride > min(size):
        return  # no padding, and a kernel larger than the map
    name = convention.name.lower()
    assert offset_padding(size, kernel, stride, convention) == geometry.padding_2d(name, size, kernel, stride)
    counts = tuple(geometry.key_count(name, length, kernel, stride) for length in size)
    assert key_grid_size(size, kernel, stride, convention) == counts
    if convention in (CC, PAPER):
        assert counts == tuple(-(-length // stride) for length in size)


@pytest.mark.parametrize("convention", Convention)
def test_every_odd_kernel_gives_one_key_for_each_started_cell(convention):
    """⌈H/r⌉ keys, also on a map smaller than the stride, unless the 2023 code drops the padding (k = r)."""
    for kernel, stride, side in itertools.product(range(1, 12, 2), range(1, 12), range(1, 41)):
        if not (convention is Convention.DATPP2023 and kernel == stride):
            count = math.ceil(side / stride)
            assert key_grid_size((side, 1), kernel, stride, convention) == (count, 1)


@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 5), st.sampled_from([1, 3, 5, 7, 9]))
def test_centered_windows_look_where_cell_centers_are(stride, keys, kernel):
    """On a map of whole cells the windows of the offset network are centered on the references to half a pixel."""
    length = stride * keys
    ((before, after), _) = offset_padding((length, length), kernel, stride, CC)
    if kernel < stride:  # no padding: some pixels are between two windows
        assert (before, after) == (0, 0)
        return
    window_centers = np.arange(keys) * stride - before + (kernel - 1) / 2
    reference = to_pixels(reference_points((keys, keys), CC), (length, length), CC)[:, 0, 0]
    distance = window_centers - reference
    assert (np.abs(distance) <= 0.5 + 1e-12).all()
    if (kernel - stride) % 2 == 0:
        assert_agree(distance, np.zeros(keys), 1e-12)


# ------------------------------------------------------------------------------------------------ the identity


def test_zero_offset_is_the_identity():
    """Zero offset at stride 1 samples the map itself, for cell centers and for the paper."""
    zero_offset_is_the_identity(deformable_layer)


@given(layer_cases(among=[CC, PAPER], strides=(1,), batches=(1,), bounds=[OffsetBound.NONE, OffsetBound.RAW]))
def test_zero_offset_is_the_identity_on_any_map(case):
    """The same on maps of any size, with or without an offset network: exact to rounding."""
    if case.config.kernel_size % 2 == 0 and case.keys != case.size:
        return
    params = case.params()
    if "offset_network" in params:
        params["offset_network"]["pointwise"]["weight"][:] = 0
    _, trace = deformable_layer(case.x(), params, case.config)
    assert_agree(trace.sampled, case.x(), 1e-12)


def sampled_ramp(convention, size):
    """Return the column coordinates that a layer without offsets samples on a map of `size`, along its first row."""
    config = DeformableAttentionConfig(
        1, 1, kernel_size=3, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE, convention=convention
    )
    ramp = np.broadcast_to(np.arange(float(size[1])), (1, 1, *size))
    _, trace = deformable_layer(ramp, init_params(config, 0, dtype=np.float64), config)
    return trace.sampled[0, 0, 0]


@pytest.mark.parametrize(
    ("convention", "expected"), [(CC, [0.0, 1.0]), (PAPER, [0.0, 1.0]), (CVPR, [0.25, 0.75]), (PP, [0.5, 1.0])]
)
def test_minimal_counter_example_of_the_releases(convention, expected):
    """Two pixels [0, 1] are enough: the 2022 release samples [0.25, 0.75], the 2023 one [0.5, 1]."""
    np.testing.assert_allclose(sampled_ramp(convention, (2, 2)), expected, rtol=0, atol=1e-15)


def test_counter_example_on_a_wider_map():
    """On a ramp of ten columns 2022 contracts to the center, 2023 shifts by half a pixel and clamps the last key."""
    np.testing.assert_allclose(sampled_ramp(CVPR, (6, 10)), 0.45 + 0.9 * np.arange(10), rtol=0, atol=1e-12)
    shifted = [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.0]
    np.testing.assert_allclose(sampled_ramp(PP, (6, 10)), shifted, rtol=0, atol=1e-12)
    for convention in (CC, PAPER):
        np.testing.assert_allclose(sampled_ramp(convention, (6, 10)), np.arange(10), rtol=0, atol=1e-12)


@given(st.sampled_from([CVPR, PP]), map_sizes(smallest=2), seeds)
def test_zero_offset_is_not_the_identity_of_either_release(convention, size, seed):
    """On any map of two pixels or more, some sample of a release is off by at least a quarter of a pixel."""
    config = DeformableAttentionConfig(
        2, 1, kernel_size=3, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE, convention=convention
    )
    x = numbers(seed, 1, 2, *size)
    _, trace = deformable_layer(x, init_params(config, 0, dtype=np.float64), config)
    lattice = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    assert np.abs(trace.points_px - lattice).max() >= 0.25
    assert np.abs(trace.sampled - x).max() > 1e-3


def test_resolution_independence_of_cell_centers():
    """At twice the resolution, a cell-center layer has the same points as fractions of the map."""
    coarse = (to_pixels(reference_points((3, 5), CC), (6, 10), CC) + 0.5) / (6, 10)
    fine = (to_pixels(reference_points((3, 5), CC), (12, 20), CC) + 0.5) / (12, 20)
    assert_agree(coarse, fine, 1e-14)


# ------------------------------------------------------------------------------------------------ the single key


@pytest.mark.parametrize(("convention", "pixel"), [(CC, 3.0), (PAPER, 3.0), (CVPR, 3.0), (PP, 6.0)])
def test_a_single_key_sits_at_the_center_but_for_the_2023_release(convention, pixel):
    """A single key on seven pixels is at pixel 3, the center; DATPP2023 divides by 0 and clamps to the last pixel."""
    config = DeformableAttentionConfig(
        2, 1, stride=7, kernel_size=7, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE, convention=convention
    )
    x = numbers(0, 1, 2, 7, 7)
    _, trace = deformable_layer(x, init_params(config, 0, dtype=np.float64), config)
    assert trace.points_px.shape == (1, 1, 1, 1, 2)
    assert trace.points_px.ravel().tolist() == [pixel, pixel]


def test_unknown_release_is_named():
    """For an unknown release the error names the two known ones; None does not match conventions without a release."""
    assert Convention.of_release("cvpr2022") is CVPR
    assert Convention.of_release("datpp2023") is PP
    for wrong in ("dat2022", None, "CVPR2022"):
        with pytest.raises(ValueError, match=r"release: expected 'cvpr2022' or 'datpp2023', got"):
            Convention.of_release(wrong)


def test_trace_reports_what_was_used():
    """reference + offsets equals points for additive bounds; pixel forms are the converted normalised ones."""
    config = example_config(CC)
    x, params = example_input(config)
    _, trace = deformable_layer(x, params, config)
    assert_agree(trace.reference + trace.offsets, trace.points, 1e-14)
    assert_agree(to_pixels(trace.points, (5, 3), CC), trace.points_px, 1e-14)
    assert_agree(to_pixels(trace.reference, (5, 3), CC), trace.reference_px, 1e-14)
