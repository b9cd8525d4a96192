"""Identities: special cases in which two systems have equal outputs and gradients, and counter-examples."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.layers import random_params
from hypothesis import given
from hypothesis import strategies as st
from strategies import consistent_conventions, map_sizes, numbers, seeds, shown_by_shape

from dat_ref import (
    BiasKind,
    Convention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
    init_params,
)
from dat_ref.ops.basic import conv2d, conv2d_vjp, linear
from dat_ref.peers import (
    ATTENTIONS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
    deform_conv2d,
    multi_scale_deformable_attention,
)
from dat_ref.peers.deform_conv import deform_conv2d_vjp
from dat_ref.peers.multi_scale import multi_scale_deformable_attention_vjp
from dat_ref.peers.neighborhood import neighborhood_attention

HEADS = st.sampled_from([(2, 3), (3, 2), (1, 4), (4, 1)])
CONSISTENT = (Convention.CELL_CENTER, Convention.PAPER)

# ------------------------------------------------------------------------------------------------ plain attention


def plain(seed, dim, heads, size, with_bias=True):
    """Return configuration and parameters of multi-head attention."""
    config = MultiHeadAttentionConfig(dim, heads, size if with_bias else None)
    shapes = ATTENTIONS[MultiHeadAttentionConfig].shapes(config)
    return config, random_params(shapes, np.random.default_rng(seed))


def as_window(config, params, size, extra=0):
    """Return the same attention as one window over the map; its table contains the map's table at the center."""
    window = max(size) + extra
    return WindowAttentionConfig(config.dim, config.heads, window), {
        "qkv": params["qkv"],
        "output": params["output"],
        "window_bias": {"table": in_the_middle(params, 2 * window - 1)},
    }


def as_neighborhood(config, params, size, extra=0):
    """Return the same attention as one neighborhood, with a flipped table: displacements are from query to key."""
    kernel = (max(size) + extra) // 2 * 2 + 1
    return NeighborhoodAttentionConfig(config.dim, config.heads, kernel), {
        "qkv": params["qkv"],
        "output": params["output"],
        "neighborhood_bias": {"table": in_the_middle(params, 2 * kernel - 1)[:, ::-1, ::-1]},
    }


def in_the_middle(params, side):
    table = params["position_bias"]["table"]
    grown = np.full((len(table), side, side), 77.0)  # entries around it are never read
    top, left = ((side - length) // 2 for length in table.shape[1:])
    grown[:, top : top + table.shape[1], left : left + table.shape[2]] = table
    return grown


def as_pyramid(config, params, size):
    """Return the same attention as spatial reduction by 1."""
    dim, qkv = config.dim, params["qkv"]
    return PyramidAttentionConfig(dim, config.heads, 1), {
        "query": {name: leaf[:dim] for name, leaf in qkv.items()},
        "key_value": {name: leaf[dim:] for name, leaf in qkv.items()},
        "output": params["output"],
    }


def as_deformable(config, params, size, convention, start="offset network"):
    """Return the same attention as a deformable layer at stride 1, with zero offsets or without an offset network."""
    without_offsets = start == "no offsets"
    layer = DeformableAttentionConfig(
        config.dim,
        config.heads,
        config.heads,
        kernel_size=3,
        offset_bound=OffsetBound.NONE if without_offsets else OffsetBound.TANH_CELLS,
        bias=BiasKind.NONE if config.size is None else BiasKind.TABLE,
        size=size,
        convention=convention,
    )
    tree = init_params(layer, 1, offsets="zero_offset", dtype=np.float64)
    for index, name in enumerate(("query", "key", "value")):
        rows = slice(index * config.dim, (index + 1) * config.dim)
        tree[name] = {leaf: array[rows] for leaf, array in params["qkv"].items()}
    tree["output"] = params["output"]
    if config.size is not None:
        tree["position_bias"] = params["position_bias"]
    return layer, tree


def equals(first, second, x, cotangent, tolerance=1e-11):
    """Assert that two attentions, (configuration, parameters), have the same output and gradient of the map."""
    results = []
    for config, params in (first, second):
        y, trace = ATTENTIONS[type(config)].forward(x, params, config)
        results.append((y, ATTENTIONS[type(config)].vjp(cotangent, trace, params, config)[0]))
    (y, grad_x), (other_y, other_grad_x) = results
    assert_agree(other_y, y, tolerance, "y")
    assert_agree(other_grad_x, grad_x, tolerance, "grad x")


@st.composite
def plain_cases(draw, with_bias=True):
    """Draw plain attention, its map, and a cotangent."""
    heads, depth = draw(HEADS)
    size, seed = draw(map_sizes(largest=5)), draw(seeds)
    shape = (2, heads * depth, *size)
    return (
        *plain(seed, heads * depth, heads, size, with_bias),
        size,
        numbers(seed + 1, *shape),
        numbers(seed + 2, *shape),
    )


@given(plain_cases(), st.integers(0, 2))
def test_window_as_large_as_the_map_is_plain_attention(case, extra):
    """A window over the whole map, or larger, equals plain attention, with the relative bias."""
    config, params, size, x, cotangent = case
    equals((config, params), as_window(config, params, size, extra), x, cotangent)


@given(plain_cases(), st.integers(0, 3))
def test_neighborhood_as_large_as_the_map_is_plain_attention(case, extra):
    """A neighborhood over the whole map equals plain attention, with the flipped relative bias."""
    config, params, size, x, cotangent = case
    equals((config, params), as_neighborhood(config, params, size, extra), x, cotangent)


@given(plain_cases(with_bias=False))
def test_reduction_by_one_is_plain_attention(case):
    config, params, size, x, cotangent = case
    equals((config, params), as_pyramid(config, params, size), x, cotangent)


@given(st.booleans().flatmap(plain_cases), consistent_conventions, st.sampled_from(["offset network", "no offsets"]))
def test_deformable_attention_without_offsets_is_plain_attention(case, convention, start):
    """At stride 1 in CELL_CENTER and PAPER the identity holds with and without a bias, also for the map's gradient.

    With an offset network that outputs zero, the points lie on pixels, where sampling has a kink; the gradient of the
    map does not pass through the points, because the network's last layer is zero.
    """
    config, params, size, x, cotangent = case
    equals((config, params), as_deformable(config, params, size, convention, start), x, cotangent)


def test_the_web_rejects_what_is_not_plain_attention():
    """Rejected: the geometries of the releases, a smaller window, kernel or resolution, and a flipped table."""
    config, params = plain(0, 6, 2, (3, 5))
    without, bare = plain(0, 6, 2, (3, 5), with_bias=False)
    x, cotangent = numbers(1, 2, 6, 3, 5), numbers(2, 2, 6, 3, 5)
    neighborhood, turned = as_neighborhood(config, params, (3, 5))
    table = turned["neighborhood_bias"]["table"]
    window, of_window = as_window(config, params, (3, 5))
    smaller = {**of_window, "window_bias": {"table": of_window["window_bias"]["table"][:, 1:-1, 1:-1]}}
    wrong = [
        ((config, params), as_deformable(config, params, (3, 5), Convention.CVPR2022)),
        ((config, params), as_deformable(config, params, (3, 5), Convention.DATPP2023)),
        ((config, params), (neighborhood, {**turned, "neighborhood_bias": {"table": table[:, ::-1, ::-1]}})),
        ((config, params), (replace(window, window_size=4), {**smaller})),
        ((config, params), (replace(window, shift=1), of_window)),
        ((without, bare), (PyramidAttentionConfig(6, 2, 2), coarse(as_pyramid(without, bare, (3, 5))[1]))),
        ((without, bare), (config, params)),
    ]
    for first, second in wrong:
        with pytest.raises(AssertionError):
            equals(first, second, x, cotangent, tolerance=1e-3)


def coarse(params):
    shapes = ATTENTIONS[PyramidAttentionConfig].shapes(PyramidAttentionConfig(6, 2, 2))
    return {**random_params(shapes, np.random.default_rng(3)), **params}


@given(plain_cases(), st.sampled_from(CONSISTENT))
def test_the_nodes_of_the_web_equal_each_other(case, convention):
    """Window, neighborhood and deformable layer with the same bias agree in pairs."""
    config, params, size, x, cotangent = case
    nodes = [as_window(config, params, size), as_neighborhood(config, params, size)]
    nodes.append(as_deformable(config, params, size, convention))
    for first, second in zip(nodes, nodes[1:]):
        equals(first, second, x, cotangent)


# ------------------------------------------------------------------------------------------------ neighborhoods


@given(seeds, st.sampled_from([(7, 9), (6, 11), (13, 8)]), st.sampled_from([2, 3]))
def test_dilation_is_neighborhood_attention_of_each_sub_map(seed, size, dilation):
    """Dilation equals plain neighborhood attention on every sub-map, if no sub-map is shorter than the kernel."""
    kernel = 3 if min(size) // dilation >= 3 else 1
    config = NeighborhoodAttentionConfig(4, 2, kernel, dilation=dilation)
    params = random_params(ATTENTIONS[NeighborhoodAttentionConfig].shapes(config), np.random.default_rng(seed))
    x = numbers(seed, 2, 4, *size)
    y, _ = neighborhood_attention(x, params, config)
    for first in np.ndindex(dilation, dilation):
        cut = np.s_[:, :, first[0] :: dilation, first[1] :: dilation]
        assert_agree(y[cut], neighborhood_attention(x[cut], params, replace(config, dilation=1))[0], 1e-12)


@given(seeds, st.sampled_from([1, 3]))
def test_per_query_attention_without_offsets_is_neighborhood_attention_away_from_the_border(seed, kernel):
    """Both are equal without a bias away from the border, where one reads zeros and the other moves its windows."""
    config = PerQueryAttentionConfig(6, 3, groups=3, kernel_size=kernel, offset_kernel_size=3)
    shapes = ATTENTIONS[PerQueryAttentionConfig].shapes(config)
    params = random_params(shapes, np.random.default_rng(seed))
    params["offset_network"]["pointwise"]["weight"][:] = 0
    stacked = {
        leaf: np.concatenate([params[name][leaf] for name in ("query", "key", "value")]) for leaf in ("weight", "bias")
    }
    around = NeighborhoodAttentionConfig(6, 3, kernel)
    side = 2 * kernel - 1
    theirs = {"qkv": stacked, "output": params["output"], "neighborhood_bias": {"table": np.zeros((3, side, side))}}
    x = numbers(seed, 2, 6, 5, 7)
    inside = np.s_[:, :, kernel // 2 : 5 - kernel // 2, kernel // 2 : 7 - kernel // 2]
    y = ATTENTIONS[PerQueryAttentionConfig].forward(x, params, config)[0]
    expected = neighborhood_attention(x, theirs, around)[0]
    assert_agree(y[inside], expected[inside], 1e-12)
    assert kernel == 1 or np.abs(y - expected).max() > 1e-3


# ------------------------------------------------------------------------------------------------ convolutions


@shown_by_shape
@st.composite
def convolutions(draw):
    """Draw arguments of a convolution with a square kernel: x, weight, bias, cotangent, geometry, points per tap."""
    kernel, stride, pad = draw(st.sampled_from([(3, 1, 1), (3, 2, 1), (1, 1, 0), (2, 3, 1), (2, 1, 0)]))
    size, seed = draw(map_sizes(smallest=3)), draw(seeds)
    out = [(length + 2 * pad - kernel) // stride + 1 for length in size]
    offset_groups = draw(st.sampled_from([1, 2, 4]))
    arrays = {
        "x": numbers(seed, 2, 4, *size),
        "offset": np.zeros((2, 2 * offset_groups * kernel**2, *out)),
        "weight": numbers(seed + 1, 3, 4, kernel, kernel),
        "bias": numbers(seed + 2, 3),
    }
    mask = np.ones((2, offset_groups * kernel**2, *out))
    return arrays, mask, numbers(seed + 3, 2, 3, *out), {"stride": stride, "padding": pad}


def is_a_convolution(arrays, mask, cotangent, geometry):
    """Assert that a deformable convolution equals the convolution in y, ∂x, ∂weight and ∂bias."""
    pad = geometry["padding"]
    plain_arguments = [arrays[name] for name in ("x", "weight", "bias")]
    plain_geometry = {"stride": geometry["stride"], "padding": ((pad, pad), (pad, pad))}
    assert_agree(deform_conv2d(**arrays, mask=mask, **geometry), conv2d(*plain_arguments, **plain_geometry), 1e-12)
    grads = deform_conv2d_vjp(cotangent, **arrays, mask=mask, **geometry)
    expected = conv2d_vjp(cotangent, *plain_arguments, **plain_geometry)
    assert_agree(grads.x, expected.x, 1e-12, "x")
    assert_agree(grads.weight, expected.params["weight"], 1e-12, "weight")
    assert_agree(grads.bias, expected.params["bias"], 1e-12, "bias")


@given(convolutions())
def test_dcn_v2_with_zero_offsets_and_unit_mask_is_a_convolution(drawn):
    is_a_convolution(*drawn)


@given(convolutions())
def test_dcn_v1_is_v2_with_a_unit_mask(drawn):
    """Version 1 equals version 2 with a unit mask, for any offsets."""
    arrays, mask, cotangent, geometry = drawn
    arrays = {**arrays, "offset": np.random.default_rng(0).uniform(-2, 2, arrays["offset"].shape)}
    assert_agree(deform_conv2d(**arrays, **geometry), deform_conv2d(**arrays, mask=mask, **geometry), 1e-13)
    first = deform_conv2d_vjp(cotangent, **arrays, **geometry)
    second = deform_conv2d_vjp(cotangent, **arrays, mask=mask, **geometry)
    for name in ("x", "offset", "weight", "bias"):
        assert_agree(getattr(first, name), getattr(second, name), 1e-12, name)
    assert first.mask is None


def test_other_masks_and_offsets_are_not_a_convolution():
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((2, 4, 3, 5)), "offset": np.zeros((2, 18, 3, 5))}
    arrays |= {"weight": rng.standard_normal((3, 4, 3, 3)), "bias": rng.standard_normal(3)}
    mask, cotangent = np.ones((2, 9, 3, 5)), rng.standard_normal((2, 3, 3, 5))
    geometry = {"stride": 1, "padding": 1}
    is_a_convolution(arrays, mask, cotangent, geometry)
    for wrong_arrays, wrong_mask in (({**arrays, "offset": arrays["offset"] + 1e-3}, mask), (arrays, 1.001 * mask)):
        with pytest.raises(AssertionError):
            is_a_convolution(wrong_arrays, wrong_mask, cotangent, geometry)


@given(seeds, st.sampled_from([1, 2]))
def test_a_deformable_convolution_starts_as_half_a_convolution(seed, groups):
    """The initial layer, with zero offsets and modulations of 1/2, is half the convolution plus the bias."""
    config = DeformableConvConfig(4, 3, groups=1, offset_groups=groups)
    params = init_params(config, seed, dtype=np.float64)
    x = numbers(seed, 2, 4, 3, 5)
    y, _ = ATTENTIONS[DeformableConvConfig].forward(x, params, config)
    weight, bias = params["convolution"]["weight"], params["convolution"]["bias"]
    assert_agree(y, conv2d(x, weight / 2, bias, padding=((1, 1), (1, 1))), 1e-13)


# ------------------------------------------------------------------------------------------------ Deformable DETR


def sigmoid_detr_and_its_convolution(seed, heads, depth, points, size, tied=True):
    """Return both sides of the identity on one input, each with its gradients of values and weights.

    Left: Deformable DETR on one level with a sigmoid instead of the softmax; every pixel is a query at its own center.
    Right: a modulated deformable convolution of the projected values v = W_v x + b_v with

    - a kernel of 1 × P, one tap per point (P odd, horizontal padding P//2, so that the map keeps its size);
    - one offset group per head, with the head's offsets (dy, dx) minus the horizontal position p - P//2 of the tap;
    - the mask σ(scores) of each head and point;
    - the weight of channel c of every tap W_o[:, c], the same for all taps; the bias b_o.
    """
    rng = np.random.default_rng(seed)
    dim, (height, width) = heads * depth, size
    v = rng.standard_normal((2, dim, height, width))
    moves = rng.uniform(-2, 2, (2, height * width, heads, 1, points, 2))  # (x, y), in pixels
    mask = 1 / (1 + np.exp(-rng.standard_normal((2, height * width, heads, 1, points))))
    output = {"weight": rng.standard_normal((dim, dim)), "bias": rng.standard_normal(dim)}

    tokens = v.reshape(2, heads, depth, -1).transpose(0, 3, 1, 2)
    y, x = np.divmod(np.arange(height * width), width)
    centers = (np.stack([x, y], axis=-1) + 0.5) / (width, height)
    locations = centers[:, None, None, None] + moves / (width, height)
    summed = multi_scale_deformable_attention(tokens, [size], locations, mask)
    left = linear(summed.swapaxes(1, 2).reshape(v.shape), **output)

    offset = moves[:, :, :, 0, :, ::-1] - np.stack([np.zeros(points), np.arange(points) - points // 2], axis=-1)
    offset = offset.transpose(0, 2, 3, 4, 1).reshape(2, heads * points * 2, height, width)
    as_maps = mask[:, :, :, 0].transpose(0, 2, 3, 1).reshape(2, heads * points, height, width)
    weight = np.repeat(output["weight"][:, :, None, None], points, axis=3)
    if not tied:
        weight = weight * rng.uniform(0.5, 1.5, weight.shape)
    arguments = {"x": v, "offset": offset, "weight": weight, "bias": output["bias"], "mask": as_maps}
    arguments["padding"] = (0, points // 2)
    right = deform_conv2d(**arguments)

    cotangent = rng.standard_normal(left.shape)
    grad_summed = linear(cotangent, output["weight"].T).reshape(2, dim, -1).swapaxes(1, 2)
    grads = multi_scale_deformable_attention_vjp(grad_summed, tokens, [size], locations, mask)
    convolved = deform_conv2d_vjp(cotangent, **arguments)
    grad_v = grads.value.transpose(0, 2, 3, 1).reshape(v.shape)
    grad_mask = grads.attention_weights[:, :, :, 0].transpose(0, 2, 3, 1).reshape(as_maps.shape)
    grad_moves = grads.sampling_locations / (width, height)  # of the offsets in pixels, (x, y)
    grad_offset = grad_moves[:, :, :, 0, :, ::-1].transpose(0, 2, 3, 4, 1).reshape(offset.shape)
    return (left, grad_v, grad_mask, grad_offset), (right, convolved.x, convolved.mask, convolved.offset)


@given(seeds, HEADS, st.sampled_from([1, 3, 5]), map_sizes())
def test_sigmoid_deformable_detr_is_a_modulated_deformable_convolution(seed, heads, points, size):
    """Both sides of `sigmoid_detr_and_its_convolution` are equal, also in gradients of values, mask and offsets."""
    left, right = sigmoid_detr_and_its_convolution(seed, *heads, points, size)
    for name, one, other in zip(("y", "values", "mask", "offset"), left, right):
        assert_agree(other, one, 1e-11, name)


def test_the_convolution_that_is_not_deformable_detr():
    """A convolution with different weights for each tap has no equal in Deformable DETR."""
    (left, *_), (right, *_) = sigmoid_detr_and_its_convolution(0, 2, 3, 3, (5, 7), tied=False)
    assert np.abs(left - right).max() > 0.1


@shown_by_shape
@st.composite
def locations_on_one_map(draw):
    """Draw value, size, locations (B, Q, heads, 1, P, 2) and weights on a single level; P is even."""
    heads, depth = draw(HEADS)
    size, rng = draw(map_sizes()), np.random.default_rng(draw(seeds))
    locations = rng.uniform(-0.2, 1.2, (2, 5, heads, 1, 2 * draw(st.integers(1, 3)), 2))
    value = rng.standard_normal((2, size[0] * size[1], heads, depth))
    return value, size, locations, rng.standard_normal(locations.shape[:-1])


@given(locations_on_one_map())
def test_one_level_is_single_scale(drawn):
    """Two levels with equal maps that share the points equal one level with all points; a level may be unused."""
    value, size, locations, weights = drawn
    single = multi_scale_deformable_attention(value, [size], locations, weights)
    half = locations.shape[4] // 2
    shared = [np.concatenate([a[:, :, :, :, :half], a[:, :, :, :, half:]], axis=3) for a in (locations, weights)]
    twice = np.concatenate([value, value], axis=1)
    assert_agree(multi_scale_deformable_attention(twice, [size, size], *shared), single, 1e-12)

    more = np.concatenate([value, numbers(0, 2, 6, *value.shape[2:])], axis=1)
    unused = [np.concatenate([locations] * 2, axis=3), np.concatenate([weights, 0 * weights], axis=3)]
    assert_agree(multi_scale_deformable_attention(more, [size, (2, 3)], *unused), single, 1e-12)
    exchanged = [unused[0], unused[1][:, :, :, ::-1]]
    assert np.abs(multi_scale_deformable_attention(more, [size, (2, 3)], *exchanged) - single).max() > 1e-6


@given(seeds, map_sizes(smallest=2), st.sampled_from([1, 3]))
def test_dat_dcn_between_cell_centers_is_deformable_detr(seed, size, points):
    """Both are equal after changes of units (half maps to pixels) and axis order, but not in the release's geometry."""
    config = DATDCNAttentionConfig(6, 3, points, Convention.CELL_CENTER)
    params = random_params(ATTENTIONS[DATDCNAttentionConfig].shapes(config), np.random.default_rng(seed))
    half = np.array(size[::-1]) / 2
    by_point = {
        leaf: array.reshape(3, points, 2, *array.shape[1:])[:, :, ::-1] for leaf, array in params["offset"].items()
    }
    offset = {"weight": by_point["weight"] * half[:, None], "bias": by_point["bias"] * half}
    shapes = {leaf: array.shape for leaf, array in params["offset"].items()}
    theirs = {**params, "offset": {leaf: array.reshape(shapes[leaf]) for leaf, array in offset.items()}}
    x, cotangent = numbers(seed, 2, 6, *size), numbers(seed + 1, 2, 6, *size)
    equals((config, params), (MultiScaleDeformableConfig(6, 3, points), theirs), x, cotangent, 1e-10)
    released = replace(config, convention=Convention.DATPP2023)
    with pytest.raises(AssertionError):
        equals((released, params), (MultiScaleDeformableConfig(6, 3, points), theirs), x, cotangent, 1e-3)
