"""Every peer against scalar loops, and common properties: gradients, precision, empty batches, cost."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.gradients import WrongGradient, check_vjp
from helpers.layers import lattice_distance, random_params
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import peers as loops
from strategies import Case, map_sizes, non_contiguous, numbers, seeds

from dat_ref import ConfigError, Convention, NeighborhoodAttentionConfig, ShapeError, init_params
from dat_ref.complexity.counter import count
from dat_ref.params import flatten, map_tree, unflatten
from dat_ref.peers import (
    ATTENTIONS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
)
from dat_ref.peers.ms_deform_attn import ring_offsets
from dat_ref.peers.neighborhood import axis_neighbors

HEADS = st.sampled_from([(2, 3), (4, 1), (1, 3), (3, 2)])
CC, PP = Convention.CELL_CENTER, Convention.DATPP2023


def divisors(dim):
    return st.sampled_from([n for n in (2, 1, 3) if dim % n == 0])


# One strategy per peer, given its dim and heads.
PEERS = {
    "multi_head": lambda dim, heads: st.builds(
        MultiHeadAttentionConfig, dim, heads, st.sampled_from([(3, 5), None, (2, 1), (5, 3)])
    ),
    "pyramid": lambda dim, heads: st.builds(PyramidAttentionConfig, dim, heads, st.sampled_from([2, 3, 1])),
    "neighborhood": lambda dim, heads: st.builds(
        NeighborhoodAttentionConfig,
        dim,
        heads,
        st.sampled_from([3, 5, 1]),
        dilation=st.sampled_from([2, 3, 1]),
        small_map=st.sampled_from(["shrink", "pad"]),
    ),
    "deform_conv": lambda dim, heads: dim.flatmap(
        lambda channels: st.builds(
            DeformableConvConfig, dim, st.sampled_from([3, 1]), divisors(channels), divisors(channels), st.booleans()
        )
    ),
    "ms_deform": lambda dim, heads: st.builds(MultiScaleDeformableConfig, dim, heads, st.sampled_from([2, 3, 1])),
    "ms_deform_dot": lambda dim, heads: st.builds(
        MultiScaleDeformableConfig, dim, heads, st.sampled_from([2, 3, 1]), scoring=st.just("dot_product")
    ),
    "per_query": lambda dim, heads: heads.flatmap(
        lambda count: st.builds(
            PerQueryAttentionConfig, dim, heads, divisors(count), st.sampled_from([3, 1]), st.sampled_from([3, 5])
        )
    ),
    "dat_dcn": lambda dim, heads: st.builds(
        DATDCNAttentionConfig, dim, heads, st.sampled_from([2, 3, 1]), st.sampled_from([PP, CC])
    ),
}
each_peer = pytest.mark.parametrize("kind", PEERS)


@st.composite
def peer_cases(draw, kind, batches=(1, 2), largest=5):
    """Draw a peer of a kind, the size of a valid map, and a seed for the elements."""
    heads, head_dim = draw(HEADS)
    config = draw(PEERS[kind](st.just(heads * head_dim), st.just(heads)))
    undefined = isinstance(config, DATDCNAttentionConfig) and config.convention is PP
    size = draw(map_sizes(smallest=2 if undefined else 1, largest=largest))
    return Case(config, size, draw(st.sampled_from(list(batches))), draw(seeds))


def run(case, x=None, params=None):
    """Return output and trace."""
    forward = ATTENTIONS[type(case.config)].forward
    return forward(case.x() if x is None else x, case.params() if params is None else params, case.config)


def loops_of(case):
    """Return the output of the scalar loops."""
    config, x, params = case.config, case.x(), case.params()
    if isinstance(config, MultiHeadAttentionConfig):
        return loops.multi_head(x, params, heads=config.heads)
    if isinstance(config, PyramidAttentionConfig):
        return loops.pyramid(x, params, heads=config.heads, reduction=config.reduction)
    if isinstance(config, NeighborhoodAttentionConfig):
        options = {"heads": config.heads, "kernel_size": config.kernel_size, "dilation": config.dilation}
        height, width = case.size
        if config.small_map == "pad":
            grow = [(0, max(config.kernel_size * config.dilation - side, 0)) for side in case.size]
            x = np.pad(x, [(0, 0), (0, 0), *grow])
        return loops.dilated_neighborhood(x, params, **options)[:, :, :height, :width]
    if isinstance(config, DeformableConvConfig):
        same = (config.kernel_size // 2,) * 2
        offset = loops.conv2d(x, **params["offset"], padding=(same, same))
        mask = None
        if config.modulated:
            mask = 1 / (1 + np.exp(-loops.conv2d(x, **params["modulation"], padding=(same, same))))
        return loops.deform_conv2d(x, offset, **params["convolution"], padding=same, mask=mask)
    if isinstance(config, MultiScaleDeformableConfig):
        dots = config.scoring == "dot_product"
        return loops.ms_deform(x, params, heads=config.heads, points=config.points, dot_product=dots)
    if isinstance(config, PerQueryAttentionConfig):
        options = {"heads": config.heads, "groups": config.groups, "kernel_size": config.kernel_size}
        return loops.per_query(x, params, **options)
    convention = config.convention.name.lower()
    return loops.dat_dcn(x, params, heads=config.heads, points=config.points, convention=convention)


@each_peer
@given(data=st.data())
def test_equals_scalar_loops(kind, data):
    """Every peer equals the loops, on maps of all sizes."""
    case = data.draw(peer_cases(kind, batches=(1,)))
    assert_agree(run(case)[0], loops_of(case), 1e-10)


WRONG = {
    "bias left out": (MultiHeadAttentionConfig(6, 3, (3, 5)), MultiHeadAttentionConfig(6, 3)),
    "one head": (PyramidAttentionConfig(6, 3, 2), PyramidAttentionConfig(6, 1, 2)),
    "no dilation": (NeighborhoodAttentionConfig(6, 3, 3, dilation=2), NeighborhoodAttentionConfig(6, 3, 3)),
    "no mask": (DeformableConvConfig(6, 3), DeformableConvConfig(6, 3, modulated=False)),
    "half a pixel": (DATDCNAttentionConfig(6, 3, 2, PP), DATDCNAttentionConfig(6, 3, 2, Convention.CVPR2022)),
}


@pytest.mark.parametrize("name", WRONG)
def test_loops_reject_another_configuration(name):
    """The comparison fails if the loops follow another configuration than the layer."""
    right, wrong = (Case(config, (3, 5), 1, 0) for config in WRONG[name])
    assert_agree(run(right)[0], loops_of(right), 1e-10)
    with pytest.raises(AssertionError):
        assert_agree(run(wrong, params=right.params())[0], loops_of(right), 1e-3)


@each_peer
@given(data=st.data())
def test_costs_equal_counts(kind, data):
    """Multiply-adds of the formula equal the counted ones as integers."""
    case = data.draw(peer_cases(kind))
    attention = ATTENTIONS[type(case.config)]
    counted = count(attention.forward, case.x(), case.params(), case.config)
    assert counted.macs == attention.macs(case.batch, case.size, case.config)


# ------------------------------------------------------------------------------------------------ gradients


def away_from_kinks(trace):
    """Return whether all moved points are away from pixel rows and columns, where sampling has no derivative."""
    return not hasattr(trace, "points_px") or lattice_distance(trace.points_px) > 1e-3


def check_gradients(case, vjp=None):
    """Compare the VJP of a peer with finite differences in x and in all parameters at once."""
    attention = ATTENTIONS[type(case.config)]
    vjp = vjp or attention.vjp
    inputs = {"x": case.x(), **flatten(case.params())}

    def function(x, **leaves):
        return attention.forward(x, unflatten(leaves), case.config)[0]

    def pull_back(cotangent, x, **leaves):
        params = unflatten(leaves)
        grad_x, grads = vjp(cotangent, attention.forward(x, params, case.config)[1], params, case.config)
        return {"x": grad_x, **flatten(grads)}

    check_vjp(function, pull_back, inputs, np.random.default_rng(case.seed), jointly=True, projections=3)


@each_peer
@given(data=st.data())
def test_gradients_equal_finite_differences(kind, data):
    """Gradients of every peer to the map and all parameters equal finite differences, away from kinks."""
    case = data.draw(peer_cases(kind))
    assume(away_from_kinks(run(case)[1]))
    check_gradients(case)


EXAMPLES = (
    MultiHeadAttentionConfig(6, 3, (3, 5)),
    PyramidAttentionConfig(6, 3, 2),
    NeighborhoodAttentionConfig(6, 3, 3, dilation=2),
    DeformableConvConfig(6, 3, 3, 2),
    MultiScaleDeformableConfig(6, 3, 2),
    MultiScaleDeformableConfig(6, 3, 2, scoring="dot_product"),
    PerQueryAttentionConfig(6, 3, 3),
    DATDCNAttentionConfig(6, 3, 2),
)


def example_id(config):
    return config.kind + ("_dot" if getattr(config, "scoring", "") == "dot_product" else "")


def generic_case(config, size=(3, 5)):
    """Return a case whose points are away from kinks."""
    for seed in range(100):
        case = Case(config, size, 2, seed)
        if away_from_kinks(run(case)[1]):
            return case
    raise AssertionError("no example away from kinks")


@pytest.mark.parametrize("config", EXAMPLES, ids=example_id)
def test_gradient_checker_rejects_wrong_gradients(config):
    """Rejected: a gradient of x with a relative error of 1e-3, and one without the bias of a parameter."""
    case, right = generic_case(config), ATTENTIONS[type(config)].vjp
    check_gradients(case)

    def scaled(*arguments):
        grad_x, grads = right(*arguments)
        return grad_x * 1.001, grads

    def forgetful(*arguments):
        grad_x, grads = right(*arguments)
        name = max(flatten(grads), key=lambda leaf: np.abs(flatten(grads)[leaf]).max())
        return grad_x, unflatten({leaf: grad * (leaf != name) for leaf, grad in flatten(grads).items()})

    for wrong in (scaled, forgetful):
        with pytest.raises(WrongGradient):
            check_gradients(case, wrong)


# ------------------------------------------------------------------------------------------------ common properties


@each_peer
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64]))
def test_precision_and_non_contiguous_inputs(kind, data, dtype):
    """Read-only and strided inputs are accepted and not modified; outputs and gradients have the input's precision."""
    case = data.draw(peer_cases(kind))
    x, params = case.x(dtype), case.params(dtype)
    odd = map_tree(non_contiguous, params)
    y, trace = run(case, non_contiguous(x), odd)
    assert y.dtype == dtype
    assert_agree(y, run(case, x, params)[0], 1e-4 if dtype == np.float32 else 1e-11)
    grad_x, grads = ATTENTIONS[type(case.config)].vjp(non_contiguous(y), trace, odd, case.config)
    assert grad_x.dtype == dtype
    assert flatten(grads).keys() == flatten(params).keys()
    for name, grad in flatten(grads).items():
        assert grad.dtype == dtype, name
        assert grad.shape == flatten(params)[name].shape, name
        np.testing.assert_array_equal(flatten(odd)[name], flatten(params)[name])


@each_peer
@given(data=st.data())
def test_empty_batch(kind, data):
    """An empty batch gives an empty output and zero gradients."""
    case = data.draw(peer_cases(kind, batches=(0,)))
    y, trace = run(case)
    assert y.shape == (0, case.config.dim, *case.size)
    grad_x, grads = ATTENTIONS[type(case.config)].vjp(y, trace, case.params(), case.config)
    assert grad_x.shape == y.shape
    assert not any(grad.any() for grad in flatten(grads).values())
    assert ATTENTIONS[type(case.config)].macs(0, case.size, case.config) in (0, _bias_macs(case))


def _bias_macs(case):
    """Return the multiply-adds of reading a table, which do not depend on the batch."""
    pixels = case.size[0] * case.size[1]
    return 4 * case.config.heads * pixels**2 if isinstance(case.config, MultiHeadAttentionConfig) else 0


@each_peer
@given(data=st.data())
def test_images_of_a_batch_do_not_affect_each_other(kind, data):
    """The output for two images equals the outputs for each alone."""
    case = data.draw(peer_cases(kind, batches=(2,)))
    x, params = case.x(), case.params()
    together = run(case, x, params)[0]
    alone = np.concatenate([run(case, x[i : i + 1], params)[0] for i in range(2)])
    assert_agree(together, alone, 1e-11)


@pytest.mark.parametrize("config", EXAMPLES, ids=example_id)
def test_wrong_channels_are_refused_by_name(config):
    params = random_params(ATTENTIONS[type(config)].shapes(config), np.random.default_rng(0))
    with pytest.raises(ShapeError, match=r"x: expected \(B, C=6, H, W\), got \(1, 5, 3, 4\)"):
        ATTENTIONS[type(config)].forward(np.zeros((1, 5, 3, 4)), params, config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHeadAttentionConfig(6, 4), "heads: expected a divisor of dim=6, got 4"),
        (lambda: PyramidAttentionConfig(6, 3, 0), "reduction: expected an integer >= 1, got 0"),
        (lambda: NeighborhoodAttentionConfig(6, 3, 3, dilation=0), "dilation: expected an integer >= 1, got 0"),
        (lambda: DeformableConvConfig(6, 4), "kernel_size: expected an odd integer"),
        (lambda: DeformableConvConfig(6, 3, offset_groups=4), "offset_groups: expected a divisor of dim=6, got 4"),
        (lambda: MultiScaleDeformableConfig(6, 3, 0), "points: expected an integer >= 1"),
        (lambda: MultiScaleDeformableConfig(6, 3, scoring="keys"), "scoring: expected 'query' or 'dot_product'"),
        (lambda: PerQueryAttentionConfig(6, 3, 2), "groups: expected a divisor of heads=3, got 2"),
        (lambda: PerQueryAttentionConfig(6, 3, 3, 2), "kernel_size: expected an odd integer"),
        (lambda: DATDCNAttentionConfig(6, 3, 0), "points: expected an integer >= 1, got 0"),
    ],
)
def test_impossible_configurations_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_dat_dcn_has_no_references_on_a_single_row():
    config = DATDCNAttentionConfig(6, 3)
    with pytest.raises(ConfigError, match="convention: DATPP2023 has no reference points on a map of one row"):
        ATTENTIONS[DATDCNAttentionConfig].forward(np.zeros((1, 6, 1, 5)), init_params(config, 0), config)


# ------------------------------------------------------------------------------------------------ initialization


def test_ring_is_the_released_one():
    """Eight heads have eight directions; point p is p pixels away, measured along the longer axis."""
    offsets = ring_offsets(8, 2, 3)
    assert offsets.shape == (8, 2, 3, 2)
    assert_agree(offsets[0, :, :, :], np.broadcast_to([[1, 0], [2, 0], [3, 0]], (2, 3, 2)), 1e-12)
    assert_agree(offsets[1, 0], [[1, 1], [2, 2], [3, 3]], 1e-12)
    assert_agree(offsets[6, 1], [[0, -1], [0, -2], [0, -3]], 1e-12)
    assert_agree(np.abs(offsets).max(axis=-1), np.broadcast_to([1, 2, 3], (8, 2, 3)), 1e-12)


def test_initialization_equals_the_released_one():
    """Deformable convolution starts on its lattice with weights 1/2, Deformable DETR on a ring with equal weights."""
    x = numbers(0, 1, 12, 5, 7)
    convolution = DeformableConvConfig(12)
    _, trace = ATTENTIONS[DeformableConvConfig].forward(x, init_params(convolution, 0, dtype=np.float64), convolution)
    assert not trace.offset.any()
    assert (trace.mask == 0.5).all()
    for config in (MultiScaleDeformableConfig(12, 4, 3), DATDCNAttentionConfig(12, 4, 3)):
        params = init_params(config, 0, dtype=np.float64)
        _, trace = ATTENTIONS[type(config)].forward(x, params, config)
        assert_agree(trace.attention, np.full(trace.attention.shape, 1 / 3), 1e-15)
        assert_agree(params["offset"]["bias"], ring_offsets(4, 1, 3).ravel(), 1e-15)
        assert params["value"]["weight"].any()


def test_dat_dcn_starts_mostly_outside_the_map():
    """The initial ring is in units of half maps: for 4 points, 14 x 14, 12 heads, most samples are outside and zero."""
    config = DATDCNAttentionConfig(24, 12, 4)
    _, trace = ATTENTIONS[DATDCNAttentionConfig].forward(numbers(0, 1, 24, 14, 14), init_params(config, 0), config)
    assert (trace.sampled == 0).all(axis=-1).mean() == pytest.approx(0.86, abs=0.01)


# ------------------------------------------------------------------------------------------------ dilation


@given(st.integers(1, 13), st.sampled_from([1, 3, 5]), st.integers(1, 4))
def test_dilated_neighbors_are_those_of_the_sub_map(length, kernel, dilation):
    """In a sub-map that is long enough the neighbors equal those of plain neighborhood attention."""
    neighbors = axis_neighbors(length, kernel, dilation)
    assert neighbors.shape == (length, min(kernel, max(length // dilation, 1)))
    for first in range(min(dilation, length)):
        submap = np.arange(first, length, dilation)
        if len(submap) >= kernel and length // dilation >= kernel:
            np.testing.assert_array_equal(neighbors[submap], submap[axis_neighbors(len(submap), kernel)])
    for i, seen in enumerate(neighbors):
        assert i in seen
        assert (seen % dilation == i % dilation).all()
        assert seen.min() >= 0
        assert seen.max() < length
