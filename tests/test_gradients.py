"""The hand-written gradients of the operations: against finite differences away from kinks, one-sided ones on them."""

from itertools import count

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.gradients import WrongGradient, check_module, check_vjp
from helpers.layer_gradients import MARGIN, affine, off_lattice, rng_of, sample_vjp
from helpers.layers import lattice_distance, random_params
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import conventions, map_sizes, numbers, seeds

from dat_ref import Convention, OffsetBound
from dat_ref.block import layer_scale, layer_scale_vjp, mlp, mlp_vjp
from dat_ref.ops import attention, basic, bias, grid, offsets
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.params import flatten, unflatten

# ------------------------------------------------------------------------------------------------ basic operations


@given(map_sizes(), seeds, st.booleans())
def test_linear(size, seed, biased):
    """Linear layer, with and without a bias, on maps and on rows."""
    inputs = {"x": numbers(seed, 2, 3, *size), "weight": numbers(seed + 1, 4, 3)}
    if biased:
        inputs["bias"] = numbers(seed + 2, 4)
    check_vjp(basic.linear, lambda g, **i: affine(basic.linear_vjp(g, **i)), inputs, rng_of(seed))


@pytest.mark.parametrize("depthwise", [False, True])
@given(
    map_sizes(largest=5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.tuples(*[st.integers(0, 2)] * 4),
    seeds,
    st.booleans(),
)
def test_convolutions(depthwise, size, kernel, stride, pads, seed, biased):
    """Both convolutions, any kernel, stride and one-sided padding, pixels that no window covers included."""
    options = {"stride": stride, "padding": ((pads[0], pads[1]), (pads[2], pads[3]))}
    assume(min(basic.conv_size(size, kernel, **options)) >= 1)
    name = "depthwise_conv2d" if depthwise else "conv2d"
    function, vjp = getattr(basic, name), getattr(basic, f"{name}_vjp")
    shape = (3, 1, kernel, kernel) if depthwise else (2, 3, kernel, kernel)
    inputs = {"x": numbers(seed, 2, 3, *size), "weight": numbers(seed + 1, *shape)}
    if biased:
        inputs["bias"] = numbers(seed + 2, shape[0])
    check_vjp(lambda **i: function(**i, **options), lambda g, **i: affine(vjp(g, **i, **options)), inputs, rng_of(seed))


@given(map_sizes(), seeds, st.integers(2, 5))
def test_layer_norm(size, seed, channels):
    """Layer norm over the channels."""
    inputs = {"x": numbers(seed, 2, channels, *size), "weight": numbers(seed + 1, channels)}
    inputs["bias"] = numbers(seed + 2, channels)
    check_vjp(basic.layer_norm, lambda g, **i: affine(basic.layer_norm_vjp(g, **i)), inputs, rng_of(seed))


@given(map_sizes(), seeds)
def test_gelu_softmax_layer_scale(size, seed):
    """GELU, softmax over the last axis, layer scale."""
    x, rng = 2 * numbers(seed, 2, 3, *size), rng_of(seed)
    check_vjp(basic.gelu, lambda g, x: {"x": basic.gelu_vjp(g, x)}, {"x": x}, rng)
    check_vjp(
        basic.softmax, lambda g, logits: {"logits": basic.softmax_vjp(g, basic.softmax(logits))}, {"logits": x}, rng
    )

    def scaled_vjp(g, x, weight):
        grad_x, grads = layer_scale_vjp(g, x, weight)
        return {"x": grad_x, **grads}

    check_vjp(layer_scale, scaled_vjp, {"x": x, "weight": numbers(seed, 3)}, rng)


@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_scatter_add_is_the_transpose_of_a_gather(seed, rows, size):
    """<scatter(values), table> = <values, table[rows]>, rows hit many times or never."""
    where = np.random.default_rng(seed).integers(0, size, rows)
    values, table = numbers(seed, rows, 3), numbers(seed + 1, size, 3)
    assert_agree(np.vdot(basic.scatter_add(values, where, size), table), np.vdot(values, table[where]), 1e-12)


@given(map_sizes(largest=4), seeds, st.sampled_from(["linear", "depthwise", "depthwise_residual"]))
def test_mlp(size, seed, kind):
    """The three MLPs."""
    shapes = {"linear1": {"weight": (6, 3), "bias": (6,)}, "linear2": {"weight": (3, 6), "bias": (3,)}}
    if kind != "linear":
        shapes["depthwise"] = {"weight": (6, 1, 3, 3), "bias": (6,)}
    check_module(
        lambda x, params: mlp(x, params, kind),
        lambda g, trace, params: mlp_vjp(g, trace, params, kind),
        numbers(seed, 2, 3, *size),
        random_params(shapes, np.random.default_rng(seed)),
        rng_of(seed),
    )


# ------------------------------------------------------------------------------------------------ sampling


@given(map_sizes(), seeds)
def test_sampling(size, seed):
    """Bilinear sampling, to the map and to the points, inside, on the fading border and outside."""
    inputs = {"x": numbers(seed, 2, 3, *size), "points_px": off_lattice(seed, (2, 5, 2), -1.9, max(size) + 0.9)}
    check_vjp(bilinear_sample, sample_vjp, inputs, rng_of(seed))


@given(map_sizes(), seeds)
def test_sampling_on_the_lattice_is_right_handed(size, seed):
    """At integer positions, including the border, the gradient of the points is one-sided, towards larger y and x."""
    rng = rng_of(seed)
    points = rng.integers(-2, np.asarray(size) + 2, (2, 6, 2)).astype(np.float64)
    inputs = {"x": numbers(seed, 2, 3, *size), "points_px": points}

    def ahead(name, array):
        direction = rng.standard_normal(array.shape)
        return np.abs(direction) if name == "points_px" else direction

    check_vjp(bilinear_sample, sample_vjp, inputs, rng, directions=ahead, one_sided=True)


def test_on_the_lattice_the_left_hand_slope_differs():
    """At pixel 1 of [0, 1, 3] the slope is 2 to the right and 1 to the left; the rule gives 2."""
    x, point = np.array([0.0, 1.0, 3.0]).reshape(1, 1, 1, 3), np.array([[[0.0, 1.0]]])
    grads = bilinear_sample_vjp(np.ones((1, 1, 1)), x, point)
    assert grads.points_px[0, 0, 1] == 2.0
    step = np.array([0.0, 0.25])
    before, here, after = (bilinear_sample(x, point + s * step).item() for s in (-1, 0, 1))
    assert ((here - before) / 0.25, (after - here) / 0.25) == (1.0, 2.0)


# ------------------------------------------------------------------------------------------------ geometry


@given(conventions, map_sizes(), seeds)
def test_to_pixels(convention, size, seed):
    """Normalised coordinates to pixels."""
    check_vjp(
        lambda points: grid.to_pixels(points, size, convention),
        lambda g, points: {"points": grid.to_pixels_vjp(g, size, convention)},
        {"points": numbers(seed, 2, 3, 2)},
        rng_of(seed),
    )


@given(conventions, map_sizes(smallest=2), st.sampled_from(list(OffsetBound)), seeds)
def test_bounds(convention, keys, bound, seed):
    """Every bound of the offsets; the clamp with points well inside and well outside."""
    reference = grid.reference_points(keys, convention)
    raw = numbers(seed, 2, 2, *keys, 2)
    raw[np.abs(np.abs(reference + raw) - 1) < MARGIN] += 5 * MARGIN
    options = {"offset_range": 3.0, "convention": convention}
    check_vjp(
        lambda raw: offsets.bound_offsets(raw, reference, bound, **options)[1],
        lambda g, raw: {"raw": offsets.bound_offsets_vjp(g, raw, reference, bound, **options)},
        {"raw": raw},
        rng_of(seed),
    )


def test_clamp_on_its_edge_has_the_inner_slope():
    """Exactly at ±1 the clamp passes the gradient, as torch does: inward differences agree, outward ones are zero."""
    reference = np.zeros((1, 1, 2))
    options = {"offset_range": 0.0, "convention": Convention.PAPER}
    raw = np.array([1.0, -1.0]).reshape(1, 1, 1, 1, 2)

    def points(raw):
        return offsets.bound_offsets(raw, reference, OffsetBound.CLAMP, **options)[1]

    def gradient(g, raw):
        return {"raw": offsets.bound_offsets_vjp(g, raw, reference, OffsetBound.CLAMP, **options)}

    inwards, rng = np.array([-1.0, 1.0]).reshape(raw.shape), rng_of(0)
    check_vjp(points, gradient, {"raw": raw}, rng, directions=lambda *_: inwards, one_sided=True)
    with pytest.raises(WrongGradient):
        check_vjp(points, gradient, {"raw": raw}, rng, directions=lambda *_: -inwards, one_sided=True)


@given(map_sizes(largest=5), st.integers(1, 3), seeds)
def test_offset_network(size, stride, seed):
    """Depthwise convolution, norm, GELU, projection."""
    assume(stride <= min(size))
    shapes = {"depthwise": {"weight": (3, 1, 3, 3), "bias": (3,)}, "norm": {"weight": (3,), "bias": (3,)}}
    shapes["pointwise"] = {"weight": (2, 3)}
    options = {"stride": stride, "padding": grid.offset_padding(size, 3, stride, Convention.CELL_CENTER)}
    check_module(
        lambda x, params: offsets.offset_network(x, params, **options),
        lambda g, trace, params: offsets.offset_network_vjp(g, trace, params, **options),
        numbers(seed, 2, 3, *size),
        random_params(shapes, np.random.default_rng(seed)),
        rng_of(seed),
    )


# ------------------------------------------------------------------------------------------------ bias and core


def table_inputs(seed, size, built, convention, resolution, samples=3):
    """Return a table and points whose displacements keep clear of the table's lattice."""
    shape = (2 * built[0] - 1, 2 * built[1] - 1)
    for attempt in count():
        points = np.random.default_rng([seed, attempt]).uniform(-1.2, 1.2, (2, 2, samples, 2))
        positions = bias.table_positions(points, shape, size, convention, resolution)
        moves = [axis for axis in range(2) if np.ptp(positions[..., axis]) > 0]
        if lattice_distance(positions[..., moves]) > MARGIN:
            break
    return {"table": numbers(seed, 4, *shape), "points": points}


@given(conventions, map_sizes(), map_sizes(), st.sampled_from(["fractions", "pixels"]), seeds)
def test_table(convention, size, built, resolution, seed):
    """The table bias, to its entries and to the points, for this and other map sizes, also outside the table."""
    options = {"query_size": size, "convention": convention, "resolution": resolution}
    check_vjp(
        lambda **i: bias.table_bias(**i, **options),
        lambda g, **i: bias.table_bias_vjp(g, **i, **options)._asdict(),
        table_inputs(seed, size, built, convention, resolution),
        rng_of(seed),
    )


@given(st.sampled_from([Convention.CELL_CENTER, Convention.PAPER]), st.sampled_from([(2, 3), (3, 5), (5, 2)]), seeds)
def test_table_on_the_lattice_is_left_handed_in_the_points(convention, size, seed):
    """The rule is right-handed in the displacement q - p̃, so on the lattice towards smaller y and x in the points.

    Pixels have no exact normalised coordinates: the points start a rounding error before the lattice, far less than
    the steps of 1e-5 of the finite differences.
    """
    points = grid.reference_points(size, convention).reshape(1, 1, -1, 2) - 1e-13
    inputs = {"table": numbers(seed, 2, 2 * size[0] - 1, 2 * size[1] - 1), "points": points}
    rng = rng_of(seed)

    def behind(name, array):
        direction = rng.standard_normal(array.shape)
        return -np.abs(direction) if name == "points" else direction

    check_vjp(
        lambda **i: bias.table_bias(**i, query_size=size, convention=convention),
        lambda g, **i: bias.table_bias_vjp(g, **i, query_size=size, convention=convention)._asdict(),
        inputs,
        rng,
        directions=behind,
        one_sided=True,
        tolerance=1e-5,
    )


@given(conventions, st.sampled_from([(1, 2), (2, 1), (2, 3)]), seeds)
def test_log_bias(convention, size, seed):
    """The log-CPB network, to its weights and to the points."""
    shapes = {"hidden": {"weight": (32, 2), "bias": (32,)}, "out": {"weight": (2, 32)}}
    params = flatten(random_params(shapes, np.random.default_rng(seed)))
    options = {"query_size": size, "convention": convention}
    for attempt in count():
        points = np.random.default_rng([seed, attempt]).uniform(-1.2, 1.2, (1, 2, 2, 2))
        trace = bias.log_bias(points, unflatten(params), **options)[1]
        if min(np.abs(trace.hidden).min(), np.abs(trace.displacement).min()) > MARGIN / 4:
            break

    def vjp(g, points, **leaves):
        tree = unflatten(leaves)
        grad_points, grads = bias.log_bias_vjp(g, bias.log_bias(points, tree, **options)[1], tree, groups=2)
        return {"points": grad_points, **flatten(grads)}

    check_vjp(
        lambda points, **leaves: bias.log_bias(points, unflatten(leaves), **options)[0],
        vjp,
        {"points": points, **params},
        rng_of(seed),
    )


@given(seeds, st.booleans())
def test_attend(seed, hidden):
    """Scaled dot-product attention, to queries, keys, values and bias; hidden keys get no gradient."""
    inputs = {"q": numbers(seed, 2, 3, 5, 2), "k": numbers(seed + 1, 2, 3, 4, 2), "v": numbers(seed + 2, 2, 3, 4, 2)}
    inputs["bias"] = numbers(seed + 3, 2, 3, 5, 4)
    mask = np.zeros((5, 4))
    if hidden:
        mask[:, 2], mask[1, 0] = -np.inf, -np.inf

    def vjp(g, q, k, v, bias):
        _, weights = attention.attend(q, k, v, bias + mask, 0.7)
        return attention.attend_vjp(g, q, k, v, weights, 0.7)._asdict()

    check_vjp(lambda q, k, v, bias: attention.attend(q, k, v, bias + mask, 0.7)[0], vjp, inputs, rng_of(seed))


@given(conventions, st.sampled_from([(2, 3), (3, 5), (5, 2)]), st.sampled_from([None, 0.3]), seeds, st.booleans())
def test_core(convention, size, scale, seed, biased):
    """deformable_attention, in all five arguments."""
    inputs = table_inputs(seed, size, size, convention, "fractions")
    for offset, (name, length) in enumerate((("q", size[0] * size[1]), ("k", 3), ("v", 3))):
        inputs[name] = numbers(seed + 10 + offset, 2, 4, length, 2)
    inputs["bias_table"] = inputs.pop("table")
    options = {"query_size": size, "convention": convention, "scale": scale}
    if not biased:
        options["bias_table"] = inputs.pop("bias_table")
        options["bias_table"] = None

    def vjp(g, **i):
        grads = attention.deformable_attention_vjp(g, **i, **options)._asdict()
        return {name: grads[name] for name in i}

    check_vjp(lambda **i: attention.deformable_attention(**i, **options), vjp, inputs, rng_of(seed))
