"""Position bias: the table at continuous displacements, tables of other sizes, the other kinds of bias."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.checks import zero_offset_bias_is_a_gather
from hypothesis import given
from hypothesis import strategies as st
from oracle import bias as loops
from oracle import geometry
from strategies import consistent_conventions, conventions, map_sizes, non_contiguous, numbers, seeds

from dat_ref import Convention, ShapeError
from dat_ref.layer import deformable_layer
from dat_ref.ops.bias import fixed_bias, log_bias, table_bias, table_bias_vjp, table_positions, table_scale
from dat_ref.ops.grid import from_pixels, query_points, reference_points, to_pixels
from dat_ref.testing.ops.bias import gather_table

RESOLUTIONS = st.sampled_from(["fractions", "pixels"])


def table_of(seed, heads, size):
    return numbers(seed, heads, 2 * size[0] - 1, 2 * size[1] - 1)


def somewhere(seed, batch, groups, samples):
    """Return normalised points, a few of them outside the map."""
    return np.random.default_rng(seed).uniform(-1.3, 1.3, (batch, groups, samples, 2))


@given(conventions, map_sizes(smallest=2), map_sizes(), RESOLUTIONS, seeds)
def test_table_equals_scalar_loops(convention, size, built, resolution, seed):
    """The table read at every pair of query and point equals the oracle, for tables of this and of other sizes."""
    table, points = table_of(seed, 4, built), somewhere(seed, 2, 2, 3)
    read = table_bias(table, points, query_size=size, convention=convention, resolution=resolution)
    name = convention.name.lower()
    for b, h, i, j, n in np.ndindex(2, 4, *size, 3):
        query = geometry.query(name, i, size[0]), geometry.query(name, j, size[1])
        point = tuple(points[b, h // 2, n].tolist())
        expected = loops.table_bias(table[h], query, point, convention=name, size=size, resolution=resolution)
        assert_agree(read[b, h, i * size[1] + j, n], expected, 1e-11)


def test_zero_offset_bias_is_an_integer_gather():
    """At stride 1 and zero offset CELL_CENTER and PAPER read Swin's gather through the whole layer."""
    zero_offset_bias_is_a_gather(deformable_layer)


@given(consistent_conventions, map_sizes(), seeds)
def test_zero_offset_bias_is_an_integer_gather_on_any_map(convention, size, seed):
    """The same for the bias alone, on maps of any size."""
    table = table_of(seed, 2, size)
    points = reference_points(size, convention).reshape(1, 1, -1, 2)
    read = table_bias(table, points, query_size=size, convention=convention)
    assert_agree(read[0], gather_table(table, size), 1e-11)


def test_the_releases_read_between_the_entries():
    """Example of seven keys: 2022 reads at multiples of 6/7 of an entry from 6/7 on, 2023 half an entry too early."""
    size = (7, 7)
    positions = {}
    for convention in (Convention.CVPR2022, Convention.DATPP2023):
        points = reference_points(size, convention).reshape(1, 1, -1, 2)
        positions[convention] = table_positions(points, (13, 13), size, convention)[0, 0, :, :, 0]
    rows = positions[Convention.CVPR2022][::7, ::7]  # queries and keys of the first column
    difference = np.arange(7)[:, None] - np.arange(7)
    assert_agree(rows, 6 + difference * 6 / 7, 1e-12)
    assert_agree(positions[Convention.DATPP2023][::7, ::7], 6 + difference - 0.5, 1e-12)


@given(conventions, map_sizes(smallest=2), map_sizes(smallest=2), seeds)
def test_fractions_mean_the_same_part_of_any_map(convention, size, built, seed):
    """With `fractions`, a displacement stored relative to the table's map is read relative to the input map."""
    full = np.asarray(built) - convention.align_corners
    entries = (np.arange(2 * built[0] - 1)[:, None] - built[0] + 1) / full[0] + np.zeros(2 * built[1] - 1)
    points = np.random.default_rng(seed).uniform(-0.4, 0.4, (1, 1, 5, 2))
    read = table_bias(entries[None], points, query_size=size, convention=convention)[0, 0]
    queries_px = to_pixels(query_points(size, convention).reshape(-1, 2), size, convention)
    points_px = to_pixels(points[0, 0], size, convention)
    fraction = (queries_px[:, None] - points_px)[..., 0] / (size[0] - convention.align_corners)
    inside = (np.abs(fraction) <= (built[0] - 1) / full[0]) & _covered(queries_px, points_px, size, built, convention)
    assert_agree(read[inside], fraction[inside], 1e-12)


def _covered(queries_px, points_px, size, built, convention):
    """Return a mask of the displacements in x inside the table."""
    a = convention.align_corners
    across = np.abs(queries_px[:, None] - points_px)[..., 1] / (size[1] - a) * (built[1] - a)
    return across <= built[1] - 1


@given(conventions, map_sizes(), map_sizes(), seeds)
def test_pixels_mean_the_same_distance_on_any_map(convention, size, built, seed):
    """With `pixels`, a table of displacements gives q - p in pixels inside the table, and zero outside."""
    entries = np.arange(2 * built[1] - 1) - built[1] + 1.0 + np.zeros((2 * built[0] - 1, 1))
    points = somewhere(seed, 1, 1, 5)
    read = table_bias(entries[None], points, query_size=size, convention=convention, resolution="pixels")[0, 0]
    queries_px = to_pixels(query_points(size, convention).reshape(-1, 2), size, convention)
    distance = queries_px[:, None] - to_pixels(points[0, 0], size, convention)
    inside = (np.abs(distance) <= np.asarray(built) - 1.0).all(axis=-1)
    outside = (np.abs(distance) >= np.asarray(built)).any(axis=-1)
    assert_agree(read[inside], distance[inside][:, 1], 1e-11)
    assert not read[outside].any()


@given(conventions, map_sizes(), seeds)
def test_both_rules_agree_at_the_tables_own_size(convention, size, seed):
    """On the map that a table was built for, both rules have scale one."""
    if convention.align_corners and 1 in size:
        return  # a map of one pixel has no extent to take fractions of; both rules read the center
    table, points = table_of(seed, 2, size), somewhere(seed, 1, 2, 4)
    options = {"query_size": size, "convention": convention}
    fractions = table_bias(table, points, **options, resolution="fractions")
    assert_agree(fractions, table_bias(table, points, **options, resolution="pixels"), 1e-11)
    assert_agree(table_scale(table.shape[1:], size, convention, "fractions"), np.ones(2), 1e-15)


@given(conventions, seeds)
def test_heads_follow_their_own_groups_points(convention, seed):
    """Head h reads at the points of group h // (heads / G) and does not depend on other groups."""
    size, table = (3, 5), table_of(seed, 6, (3, 5))
    points = somewhere(seed, 1, 3, 4)
    read = table_bias(table, points, query_size=size, convention=convention)
    moved = points.copy()
    moved[:, 1] += 0.125
    other = table_bias(table, moved, query_size=size, convention=convention)
    assert_agree(other[:, [0, 1, 4, 5]], read[:, [0, 1, 4, 5]], 1e-13)
    assert (np.abs(other - read)[:, 2:4].max(axis=(0, 2, 3)) > 1e-4).all()


@given(map_sizes(smallest=2), seeds)
def test_table_gradient_counts_every_pair_once(size, seed):
    """Each pair inside adds bilinear weights that sum to one, so the gradient of the sum counts the pairs."""
    queries = size[0] * size[1]
    table, points = table_of(seed, 2, size), np.random.default_rng(seed).uniform(-0.9, 0.9, (2, 1, 3, 2))
    inside = from_pixels(
        np.clip(to_pixels(points, size, Convention.PAPER), 0, np.asarray(size) - 1.0), size, Convention.PAPER
    )
    grads = table_bias_vjp(np.ones((2, 2, queries, 3)), table, inside, query_size=size, convention=Convention.PAPER)
    assert_agree(grads.table.sum(axis=(1, 2)), np.full(2, 2.0 * queries * 3), 1e-12)


@given(conventions, map_sizes(), seeds)
def test_log_bias_equals_scalar_loops(convention, size, seed):
    """The network on log-scaled displacements equals the oracle; all groups share it."""
    params = {
        "hidden": {"weight": numbers(seed, 32, 2), "bias": numbers(seed + 1, 32)},
        "out": {"weight": numbers(9, 2, 32)},
    }
    points = somewhere(seed, 2, 2, 3)
    read, trace = log_bias(points, params, query_size=size, convention=convention)
    name = convention.name.lower()
    for b, g, i, j, n in np.ndindex(2, 2, *size, 3):
        query = geometry.query(name, i, size[0]), geometry.query(name, j, size[1])
        expected = loops.log_cpb_bias(params, query, tuple(points[b, g, n].tolist()))
        assert_agree(read[b, 2 * g : 2 * g + 2, i * size[1] + j, n], expected, 1e-11)
    assert trace.hidden.shape == (4, 32, size[0] * size[1] * 3)


def test_fixed_bias_is_its_table_on_one_map_size():
    """The fixed table is used unchanged; for a map of another size the error names both sizes."""
    table = numbers(0, 2, 15, 6)
    np.testing.assert_array_equal(fixed_bias(table, query_size=(3, 5), samples=6)[0], table)
    with pytest.raises(ShapeError, match=r"x: expected the map.*15 queries × 6 keys.*got H=4, W=5: 20 × 6"):
        fixed_bias(table, query_size=(4, 5), samples=6)
    with pytest.raises(ShapeError, match=r"15 × 4"):
        fixed_bias(table, query_size=(3, 5), samples=4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_and_non_contiguous_inputs(dtype):
    """Read-only and strided tables and points are accepted; outputs and gradients have the input's precision."""
    table, points = numbers(0, 4, 5, 9, dtype=dtype), numbers(1, 2, 2, 3, 2, dtype=dtype)
    options = {"query_size": (3, 5), "convention": Convention.CELL_CENTER}
    read = table_bias(non_contiguous(table), non_contiguous(points), **options)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, table_bias(table, points, **options))
    grads = table_bias_vjp(non_contiguous(read), non_contiguous(table), non_contiguous(points), **options)
    assert grads.table.dtype == grads.points.dtype == dtype


def test_nan_point_gives_nan_bias():
    """A NaN point makes its own column NaN for the heads of its group, and nothing else."""
    points = np.zeros((1, 2, 3, 2))
    points[0, 1, 2, 0] = np.nan
    read = table_bias(numbers(0, 4, 5, 9), points, query_size=(3, 5), convention=Convention.PAPER)
    expected = np.zeros((1, 4, 15, 3), dtype=bool)
    expected[0, 2:, :, 2] = True
    np.testing.assert_array_equal(np.isnan(read), expected)


@pytest.mark.parametrize(("batch", "samples"), [(0, 3), (2, 0)])
def test_empty_batch(batch, samples):
    """No images or no points: an empty bias of the right shape, and a zero table gradient."""
    table, points = numbers(0, 4, 5, 9), np.zeros((batch, 2, samples, 2))
    options = {"query_size": (3, 5), "convention": Convention.CELL_CENTER}
    read = table_bias(table, points, **options)
    assert read.shape == (batch, 4, 15, samples)
    grads = table_bias_vjp(read, table, points, **options)
    assert grads.points.shape == points.shape
    assert not grads.table.any()
