"""Window, shifted-window and neighborhood attention: against scalar loops, and independence of hidden pixels."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.layers import random_params
from hypothesis import given
from hypothesis import strategies as st
from oracle import neighborhood as neighborhood_loops
from oracle import windows as window_loops
from strategies import neighborhood_cases, non_contiguous, numbers, window_cases

from dat_ref import NeighborhoodAttentionConfig, WindowAttentionConfig
from dat_ref.block import ATTENTIONS
from dat_ref.ops.attention import attend, merge_heads, split_heads
from dat_ref.ops.basic import linear
from dat_ref.params import flatten, map_tree
from dat_ref.peers.neighborhood import axis_neighbors, neighborhood_attention
from dat_ref.peers.window import window_attention, window_cells, window_visibility

EITHER = st.one_of(window_cases(), neighborhood_cases())


def run(case, x=None, params=None):
    """Return output and trace of either attention."""
    attention = ATTENTIONS[type(case.config)]
    return attention.forward(case.x() if x is None else x, case.params() if params is None else params, case.config)


@given(window_cases(batches=(1,), largest=5))
def test_windows_equal_scalar_loops(case):
    """Windows and shifted windows equal the scalar rule for visible keys, on maps larger and smaller than a window."""
    params = case.params()
    table = params["window_bias"]["table"]
    theirs = {**params, "table": table.reshape(len(table), -1).T}
    options = {"heads": case.config.heads, "window": case.config.window_size, "shift": case.config.shift}
    assert_agree(run(case)[0], window_loops.window_attention(case.x(), theirs, **options).output, 1e-11)


@given(neighborhood_cases(batches=(1,), largest=5))
def test_neighborhoods_equal_scalar_loops(case):
    """Neighborhood attention equals the loops, under both rules for small maps."""
    theirs = {**case.params(), "rpb": case.params()["neighborhood_bias"]["table"]}
    options = {"heads": case.config.heads, "kernel_size": case.config.kernel_size, "small_map": case.config.small_map}
    expected = neighborhood_loops.neighborhood_attention(case.x(), theirs, **options)
    assert_agree(run(case)[0], expected.output, 1e-11)


def plain_attention(x, params, config):
    """Return multi-head attention of all pixels without a bias."""
    q, k, v = np.split(split_heads(linear(x, **params["qkv"]), 3 * config.heads), 3, axis=1)
    return linear(merge_heads(attend(q, k, v, None, config.scale)[0], x.shape[2:]), **params["output"])


@pytest.mark.parametrize("size", [(3, 5), (5, 2), (1, 4)])
@pytest.mark.parametrize(
    "config", [WindowAttentionConfig(4, 2, 5), NeighborhoodAttentionConfig(4, 2, 11)], ids=lambda config: config.kind
)
def test_a_window_over_the_whole_map_is_plain_attention(config, size):
    """With all keys visible and a zero table, both equal multi-head attention; padding has no effect."""
    params = random_params(ATTENTIONS[type(config)].shapes(config), np.random.default_rng(0))
    for name in ("window_bias", "neighborhood_bias"):
        if name in params:
            params[name]["table"][:] = 0
    x = numbers(1, 2, 4, *size)
    assert_agree(ATTENTIONS[type(config)].forward(x, params, config)[0], plain_attention(x, params, config), 1e-12)


@given(window_cases(batches=(1,)), st.data())
def test_windows_do_not_leak(case, data):
    """Changing a pixel by any amount does not change a bit of outputs of queries that do not see it."""
    height, width = case.size
    place = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    x = case.x()
    changed = x.copy()
    changed[0, :, place[0], place[1]] += 1e6
    difference = np.abs(run(case, changed)[0] - run(case, x)[0]).max(axis=1)[0] > 0
    window, shift = case.config.window_size, case.config.shift

    def region(index, length):
        extended = -(-length // window) * window
        return (index - shift) % extended // window, index < shift

    for i, j in np.ndindex(height, width):
        seen = region(i, height) == region(place[0], height) and region(j, width) == region(place[1], width)
        if not seen:
            assert not difference[i, j], f"{place} reached {(i, j)}"
    assert difference[place]


@given(window_cases(batches=(1,)), st.integers(1, 3), st.sampled_from([0, 1]))
def test_padding_keys_are_invisible(case, more, axis):
    """Adding rows or columns outside a window does not change its outputs."""
    config, size = case.config, case.size
    if config.shift:
        return  # the seam moves with the size of the map
    x = case.x()
    padding = [(0, 0)] * 4
    padding[2 + axis] = (0, more * config.window_size)
    larger = np.pad(x, padding, constant_values=1e6)
    whole = size[axis] // config.window_size * config.window_size
    kept = (slice(None), slice(None), *(slice(whole) if axis == other else slice(None) for other in range(2)))
    assert_agree(run(case, larger)[0][:, :, : size[0], : size[1]][kept], run(case, x)[0][kept], 1e-11)


@given(window_cases())
def test_every_pixel_sees_itself_and_every_weight_is_finite(case):
    """Every query has a key, also in the padding, so that no row of the softmax is 0/0."""
    y, trace = run(case)
    assert np.isfinite(y).all()
    assert_agree(trace.attention.sum(axis=-1), np.ones(trace.attention.shape[:3]), 1e-13)
    config = case.config
    _, cells = window_cells(case.size, config.window_size, config.shift)
    visible = window_visibility(cells, case.size, config.window_size, config.shift)
    assert visible.diagonal(axis1=1, axis2=2).all()
    assert (visible == visible.swapaxes(1, 2)).all()


@given(window_cases())
def test_windows_hold_every_pixel_once(case):
    """Every pixel of the map is at one position of one window."""
    _, cells = window_cells(case.size, case.config.window_size, case.config.shift)
    inside = cells[(cells < np.asarray(case.size)).all(axis=-1)]
    assert sorted(map(tuple, inside.tolist())) == sorted(np.ndindex(*case.size))


@given(neighborhood_cases(batches=(1,)), st.data())
def test_neighborhoods_do_not_leak(case, data):
    """Changing a pixel changes only outputs of queries that have it among their K² neighbors."""
    height, width = case.size
    place = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    x, kernel = case.x(), case.config.kernel_size
    changed = x.copy()
    changed[0, :, place[0], place[1]] += 1e6
    difference = np.abs(run(case, changed)[0] - run(case, x)[0]).max(axis=1)[0] > 0
    padded = [max(length, kernel) if case.config.small_map == "pad" else length for length in case.size]
    for i, j in np.ndindex(height, width):
        rows = neighborhood_loops.neighbors(i, padded[0], kernel)
        if not (place[0] in rows and place[1] in neighborhood_loops.neighbors(j, padded[1], kernel)):
            assert not difference[i, j], f"{place} reached {(i, j)}"
    assert difference[place]


@given(st.integers(1, 9), st.sampled_from([1, 3, 5, 7]))
def test_neighbors_are_k_in_a_row_around_each_query(length, kernel):
    """Each query sees min(K, length) consecutive keys, itself among them, centered wherever the border allows."""
    keys = axis_neighbors(length, kernel)
    assert keys.tolist() == [list(neighborhood_loops.neighbors(i, length, kernel)) for i in range(length)]
    for query, seen in enumerate(keys.tolist()):
        assert query in seen
        if kernel // 2 <= query < length - kernel // 2:
            assert seen[kernel // 2] == query


@given(neighborhood_cases())
def test_small_map_rules_agree_on_maps_that_are_not_small(case):
    """If K is at most the map's length, padding and shrinking give the same result."""
    if min(case.size) < case.config.kernel_size:
        return
    shapes = {"dim": case.config.dim, "heads": case.config.heads, "kernel_size": case.config.kernel_size}
    results = [
        neighborhood_attention(case.x(), case.params(), NeighborhoodAttentionConfig(**shapes, small_map=rule))[0]
        for rule in ("pad", "shrink")
    ]
    np.testing.assert_array_equal(*results)


def test_padding_of_a_small_map_takes_part_as_released():
    """Under "pad" the zeros around a small map are keys, so the projection's bias affects the output through them."""
    config = NeighborhoodAttentionConfig(4, 2, 5, small_map="pad")
    params = random_params(ATTENTIONS[NeighborhoodAttentionConfig].shapes(config), np.random.default_rng(0))
    x = numbers(1, 1, 4, 3, 7)
    shrunk = neighborhood_attention(x, params, NeighborhoodAttentionConfig(4, 2, 5, small_map="shrink"))[0]
    assert np.abs(neighborhood_attention(x, params, config)[0] - shrunk).max() > 1e-2


@given(EITHER, st.sampled_from([np.float32, np.float64]))
def test_precision_and_non_contiguous_inputs(case, dtype):
    """Read-only and strided inputs are accepted and not modified; outputs and gradients have the input's precision."""
    x, params = case.x(dtype), case.params(dtype)
    odd = map_tree(non_contiguous, params)
    y, trace = run(case, non_contiguous(x), odd)
    assert y.dtype == dtype
    assert_agree(y, run(case, x, params)[0], 1e-5 if dtype == np.float32 else 1e-11)
    grad_x, grads = ATTENTIONS[type(case.config)].vjp(non_contiguous(y), trace, odd, case.config)
    assert grad_x.dtype == dtype
    for name, grad in flatten(grads).items():
        assert grad.dtype == dtype, name
        np.testing.assert_array_equal(flatten(odd)[name], flatten(params)[name])


@given(st.one_of(window_cases(batches=(0,)), neighborhood_cases(batches=(0,))))
def test_empty_batch(case):
    """An empty batch gives an empty output and zero gradients."""
    y, trace = run(case)
    assert y.shape == (0, case.config.dim, *case.size)
    grad_x, grads = ATTENTIONS[type(case.config)].vjp(y, trace, case.params(), case.config)
    assert grad_x.shape == y.shape
    assert not any(grad.any() for grad in flatten(grads).values())


@given(EITHER)
def test_nan_is_never_dropped(case):
    """A NaN pixel makes its own output NaN, and no output that does not depend on it."""
    x = case.x()
    x[0, 0, -1, 0] = np.nan
    y, _ = run(case, x)
    assert np.isnan(y[0, :, -1, 0]).all()
    assert np.isfinite(y[1:]).all()


def test_shift_zero_is_the_plain_window():
    """The shift determines the kind: zero is plain window attention."""
    assert WindowAttentionConfig(4, 2, 3).kind == "window"
    assert WindowAttentionConfig(4, 2, 3, shift=2).kind == "shifted_window"
    assert NeighborhoodAttentionConfig(4, 2).kind == "neighborhood"
    x = numbers(0, 1, 4, 5, 7)
    config = WindowAttentionConfig(4, 2, 3)
    params = random_params(ATTENTIONS[WindowAttentionConfig].shapes(config), np.random.default_rng(0))
    shifted = window_attention(x, params, WindowAttentionConfig(4, 2, 3, shift=1))[0]
    assert np.abs(shifted - window_attention(x, params, config)[0]).max() > 1e-3
