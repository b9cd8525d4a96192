"""Per-query attention equals deformable attention if all queries share one set of points."""

from dataclasses import replace

import numpy as np
from helpers.agreement import assert_agree
from helpers.layers import random_params
from hypothesis import given
from strategies import layer_cases, numbers

from dat_ref import BiasKind, DeformableAttentionConfig, OffsetBound
from dat_ref.layer import deformable_layer, deformable_layer_vjp
from dat_ref.ops.attention import attend_vjp, merge_heads, split_heads
from dat_ref.ops.basic import linear, linear_vjp
from dat_ref.ops.sampling import bilinear_sample_vjp
from dat_ref.peers import ATTENTIONS
from dat_ref.peers.per_query import attend_at_points, attend_at_points_vjp


@given(layer_cases(biases=[BiasKind.TABLE, BiasKind.NONE, BiasKind.LOG_CPB]))
def test_per_query_attention_at_shared_points_is_deformable_attention(case):
    """With DAT's points for every query, output and gradients are equal in all conventions, groups and bounds.

    The gradients of the points, summed over queries, equal the gradients of the shared points.
    """
    config, params = replace(case.config, average_pool=False), case.params()
    x = case.x()
    y, trace = deformable_layer(x, params, config)
    merged, at_points = attend_shared(trace, params, config)
    assert_agree(linear(merged.reshape(x.shape), **params["output"]), y, 1e-10)

    cotangent = numbers(case.seed + 5, *y.shape)
    grad_merged = linear(cotangent, params["output"]["weight"].T).reshape(merged.shape)
    grads = attend_at_points_vjp(grad_merged, at_points, params, config.heads)
    _, expected = deformable_layer_vjp(cotangent, trace, params, config)
    for name in ("key", "value"):
        for leaf in ("weight", "bias"):
            assert_agree(grads.params[name][leaf], expected[name][leaf], 1e-9, f"{name}.{leaf}")
    if config.bias is BiasKind.NONE and config.offset_bound is OffsetBound.NONE:
        query = linear(grads.query.reshape(x.shape), params["query"]["weight"].T)
        assert_agree(grads.x + query, deformable_layer_vjp(cotangent, trace, params, config)[0], 1e-9, "x")


def attend_shared(trace, params, config, points_px=None):
    """Attend at a deformable layer's points, one copy for every query."""
    batch, groups = trace.points_px.shape[:2]
    points = (trace.points_px if points_px is None else points_px).reshape(batch, groups, 1, -1, 2)
    queries = trace.q.shape[2]
    own = np.broadcast_to(points, (batch, groups, queries, *points.shape[3:]))
    flat = merge_heads(trace.q, (queries, 1))[..., 0]
    return attend_at_points(flat, trace.x, own, params, config.heads, trace.bias)


def test_per_query_points_that_differ_are_not_deformable_attention():
    """Points of another group, or one query's points moved by a tenth of a pixel, change the output."""
    config = DeformableAttentionConfig(8, 4, 2, kernel_size=3, size=(3, 5))
    params = random_params(ATTENTIONS[DeformableAttentionConfig].shapes(config), np.random.default_rng(0))
    _, trace = deformable_layer(numbers(0, 1, 8, 3, 5), params, config)
    right, _ = attend_shared(trace, params, config)
    assert_agree(right.reshape(trace.merged.shape), trace.merged, 1e-12)
    swapped, _ = attend_shared(trace, params, config, trace.points_px[:, ::-1])
    moved, _ = attend_shared(trace, params, config, trace.points_px + 0.1)
    assert np.abs(swapped - right).max() > 0.01
    assert np.abs(moved - right).max() > 0.01


@given(layer_cases(biases=[BiasKind.NONE], bounds=[OffsetBound.RAW, OffsetBound.TANH_CELLS]))
def test_gradients_of_queries_points_add_up_to_the_shared_points(case):
    """Finite differences: moving a shared point moves the copies of all queries."""
    config, params, x = case.config, case.params(), case.x()
    _, trace = deformable_layer(x, params, config)
    merged, at_points = attend_shared(trace, params, config)
    cotangent = numbers(case.seed + 5, *merged.shape)
    shared = attend_at_points_vjp(cotangent, at_points, params, config.heads).points_px.sum(axis=2)
    keys, values = ({leaf: params[name][leaf] for leaf in ("weight", "bias")} for name in ("key", "value"))
    core = split_heads(cotangent, config.heads)
    grads = attend_vjp(core, trace.q, trace.k, trace.v, trace.attention, config.scale)
    size = trace.sampled.shape[2:]
    through = linear_vjp(merge_heads(grads.k, size), trace.sampled, **keys).x
    through = through + linear_vjp(merge_heads(grads.v, size), trace.sampled, **values).x
    batch, groups = trace.points_px.shape[:2]
    maps = x.reshape(batch * groups, config.group_dim, *x.shape[2:])
    flat = trace.points_px.reshape(batch * groups, -1, 2)
    expected = bilinear_sample_vjp(through.reshape(batch * groups, config.group_dim, -1), maps, flat).points_px
    assert_agree(shared, expected.reshape(shared.shape), 1e-9)
