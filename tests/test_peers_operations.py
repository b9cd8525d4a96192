"""`deform_conv2d` and `multi_scale_deformable_attention` against scalar loops and finite differences."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.gradients import check_vjp
from helpers.layers import lattice_distance, random_params
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import peers as loops
from strategies import map_sizes, numbers, seeds, shown_by_shape

from dat_ref import ShapeError
from dat_ref.peers import MultiScaleDeformableConfig, deform_conv2d, multi_scale_deformable_attention
from dat_ref.peers.deform_conv import deform_conv2d_vjp
from dat_ref.peers.ms_deform_attn import multi_scale_deformable, multi_scale_deformable_shapes
from dat_ref.peers.multi_scale import multi_scale_deformable_attention_vjp

HEADS = st.sampled_from([(2, 3), (4, 1), (1, 3), (3, 2)])

# ------------------------------------------------------------------------------------------ deformable convolution


@shown_by_shape
@st.composite
def convolutions(draw):
    """Draw the arguments of `deform_conv2d`, with all axes different."""
    groups, offset_groups = draw(st.sampled_from([(1, 1), (2, 3), (3, 2), (6, 1), (1, 6)]))
    kernel = draw(st.sampled_from([(3, 2), (1, 3), (2, 2), (1, 1)]))
    stride, padding, dilation = (
        draw(st.sampled_from(pairs)) for pairs in ([(1, 1), (2, 1), (1, 3)], [(0, 0), (1, 0), (1, 2)], [(1, 1), (2, 1)])
    )
    size, batch, seed = draw(map_sizes(smallest=5)), draw(st.sampled_from([1, 2])), draw(seeds)
    out = [(size[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(2)]
    taps = kernel[0] * kernel[1]
    arguments = {
        "x": numbers(seed, batch, 6, *size),
        "offset": 1.5 * numbers(seed + 1, batch, 2 * offset_groups * taps, *out),
        "weight": numbers(seed + 2, 2 * groups, 6 // groups, *kernel),
    }
    if draw(st.booleans()):
        arguments["bias"] = numbers(seed + 3, 2 * groups)
    if draw(st.booleans()):
        arguments["mask"] = numbers(seed + 4, batch, offset_groups * taps, *out)
    return arguments, {"stride": stride, "padding": padding, "dilation": dilation}


@given(convolutions())
def test_deform_conv2d_equals_scalar_loops(drawn):
    """Equal for groups, offset groups, strides, padding, dilation, non-square kernels and points far outside."""
    arguments, geometry = drawn
    assert_agree(deform_conv2d(**arguments, **geometry), loops.deform_conv2d(**arguments, **geometry), 1e-11)


@given(convolutions())
def test_deform_conv2d_gradients(drawn):
    """Gradients of map, offsets, weights, bias and mask equal finite differences."""
    arguments, geometry = drawn
    assume(lattice_distance(arguments["offset"]) > 1e-3)

    def vjp(cotangent, **inputs):
        grads = deform_conv2d_vjp(cotangent, **inputs, **geometry)._asdict()
        return {name: grads[name] for name in inputs}

    rng = np.random.default_rng(0)
    check_vjp(lambda **inputs: deform_conv2d(**inputs, **geometry), vjp, arguments, rng, projections=1)


def test_deform_conv2d_accepts_integers_for_pairs():
    x, offset, weight = numbers(0, 1, 2, 7, 5), numbers(1, 1, 18, 4, 3), numbers(2, 3, 2, 3, 3)
    pairs = deform_conv2d(x, offset, weight, None, (2, 2), (1, 1), (1, 1))
    assert_agree(deform_conv2d(x, offset, weight, stride=2, padding=1, dilation=1), pairs, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"offset": np.zeros((1, 17, 5, 3))},
            r"offset: expected a multiple of 2·k_y·k_x=18 channels, got \(1, 17, 5, 3\)",
        ),
        ({"offset": np.zeros((1, 18, 7, 5))}, r"offset: expected \(B=1, 2·G_o·k_y·k_x, H'=5, W'=3\)"),
        ({"mask": np.zeros((1, 8, 5, 3))}, r"mask: expected \(B=1, G_o·k_y·k_x=9, H'=5, W'=3\)"),
        (
            {"weight": np.zeros((3, 4, 3, 3))},
            r"weight.shape\[1\] \(channels per group\): expected a divisor of C=6, got 4",
        ),
        ({"weight": np.zeros((3, 3, 3, 3))}, "groups: expected a divisor of O=3, got 2"),
        ({"offset": np.zeros((1, 72, 5, 3))}, "offset groups: expected a divisor of C=6, got 4"),
        ({"weight": np.zeros((3, 6, 9, 3))}, "weight: expected a kernel that fits into the padded map"),
        ({"bias": np.zeros(2)}, r"bias: expected \(O=3\), got \(2,\)"),
    ],
)
def test_deform_conv2d_rejects_invalid_arguments(changes, message):
    arguments = {"x": np.zeros((1, 6, 7, 5)), "offset": np.zeros((1, 18, 5, 3)), "weight": np.zeros((3, 6, 3, 3))}
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**{**arguments, **changes})


# ------------------------------------------------------------------------------------------------ Deformable DETR


@shown_by_shape
@st.composite
def multi_scale_inputs(draw):
    """Draw the arguments of `multi_scale_deformable_attention`; some locations are outside."""
    shapes = draw(st.sampled_from([[(3, 5)], [(5, 2), (1, 3)], [(4, 3), (2, 1), (1, 1)]]))
    heads, depth = draw(HEADS)
    batch, queries, points, seed = draw(st.sampled_from([1, 2])), 3, draw(st.integers(1, 3)), draw(seeds)
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((batch, sum(h * w for h, w in shapes), heads, depth))
    locations = rng.uniform(-0.3, 1.3, (batch, queries, heads, len(shapes), points, 2))
    return value, shapes, locations, rng.standard_normal(locations.shape[:-1])


@given(multi_scale_inputs())
def test_multi_scale_equals_scalar_loops(inputs):
    assert_agree(multi_scale_deformable_attention(*inputs), loops.multi_scale(*inputs), 1e-12)


@given(multi_scale_inputs())
def test_multi_scale_gradients(inputs):
    """Gradients of values, locations and weights equal finite differences."""
    value, shapes, locations, weights = inputs
    extent = np.array(shapes)[:, None, ::-1]
    assume(lattice_distance(locations * extent - 0.5) > 1e-3)

    def function(value, sampling_locations, attention_weights):
        return multi_scale_deformable_attention(value, shapes, sampling_locations, attention_weights)

    def vjp(cotangent, value, sampling_locations, attention_weights):
        arguments = (value, shapes, sampling_locations, attention_weights)
        return multi_scale_deformable_attention_vjp(cotangent, *arguments)._asdict()

    named = {"value": value, "sampling_locations": locations, "attention_weights": weights}
    check_vjp(function, vjp, named, np.random.default_rng(0), projections=1)


def test_boxes_scale_offsets_by_half_their_size_over_the_number_of_points():
    """With a box of size 2 P pixels, offsets move points as far as with a reference point."""
    config = MultiScaleDeformableConfig(6, 3, points=4)
    params = random_params(multi_scale_deformable_shapes(config), np.random.default_rng(0))
    query, value, centers = (
        numbers(1, 2, 3, 6),
        numbers(2, 2, 35, 6),
        np.random.default_rng(3).uniform(size=(2, 3, 1, 2)),
    )
    sides = np.broadcast_to([8 / 7, 8 / 5], centers.shape)
    boxes = np.concatenate([centers, sides], axis=-1)
    of_points, _ = multi_scale_deformable(query, value, centers, [(5, 7)], params, config)
    of_boxes, _ = multi_scale_deformable(query, value, boxes, [(5, 7)], params, config)
    assert_agree(of_boxes, of_points, 1e-12)


def test_multi_scale_rejects_invalid_arguments():
    value, locations, weights = np.zeros((1, 15, 2, 3)), np.zeros((1, 4, 2, 1, 3, 2)), np.zeros((1, 4, 2, 1, 3))
    with pytest.raises(ShapeError, match=r"value: expected \(B, S=12, heads, d\) with S = Σ H_l·W_l, got"):
        multi_scale_deformable_attention(value, [(3, 4)], locations, weights)
    with pytest.raises(ShapeError, match=r"attention_weights: expected \(B=1, Q=4, heads=2, L=1, P=3\)"):
        multi_scale_deformable_attention(value, [(3, 5)], locations, weights[:, :3])
