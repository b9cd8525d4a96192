"""Receptive field of a query, checked by the gradient of its output; peers in place of deformable layers."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.backbones import tiny
from helpers.layers import random_params
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, layer_cases, map_sizes, numbers, seeds

from dat_ref import (
    DAT,
    BiasKind,
    ConfigError,
    Convention,
    DATConfig,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    ShapeError,
    WindowAttentionConfig,
    config,
    init_params,
)
from dat_ref.backbone import dat_macs, dat_shapes
from dat_ref.ops.grid import key_grid_size
from dat_ref.params import flatten, map_tree
from dat_ref.peers import (
    ATTENTIONS,
    REPLACEMENTS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
    matched_peer,
    receptive_field,
    replace_attention,
)

# ------------------------------------------------------------------------------------------------ receptive field

CONFIGS = (
    WindowAttentionConfig(6, 3, 3),
    WindowAttentionConfig(6, 3, 4, shift=2),
    NeighborhoodAttentionConfig(6, 3, 3),
    NeighborhoodAttentionConfig(6, 3, 3, dilation=2),
    NeighborhoodAttentionConfig(6, 3, 3, dilation=3, small_map="pad"),
    MultiHeadAttentionConfig(6, 3),
    MultiHeadAttentionConfig(6, 3, (3, 5)),
    PyramidAttentionConfig(6, 3, 2),
    DeformableConvConfig(6, 3, offset_groups=2),
    DeformableConvConfig(6, 3, modulated=False),
    MultiScaleDeformableConfig(6, 3, 2),
    MultiScaleDeformableConfig(6, 3, 2, scoring="dot_product"),
    PerQueryAttentionConfig(6, 3, 3),
    DATDCNAttentionConfig(6, 3, 2),
)
# Parameters that determine points and weights: the first rows of a stacked projection, or a name.
DECIDERS = ("query", "offset", "modulation", "weights", "offset_network")


def parameters_with_fixed_points(case):
    """Return parameters under which queries, offsets and weights do not depend on the map.

    Only the weights of these projections are zero; their biases stay, so that points move, each tap differently. The
    output then depends on the map only through keys and values.
    """
    params = map_tree(np.array, case.params())
    for name in DECIDERS:
        if name in params:
            part = params[name]
            for leaf in [part] if "weight" in part else [part["depthwise"]]:
                leaf["weight"][:] = 0
    if "qkv" in params:
        params["qkv"]["weight"][: case.config.dim] = 0
    if "offset_network" in params:  # a norm of equal channels would make all offsets equal
        bias = params["offset_network"]["depthwise"]["bias"]
        bias[:] = 1.5 * np.random.default_rng(case.seed).standard_normal(bias.shape)
    return params


def depends_on(case, params, query):
    """Return a boolean map (H, W) of the pixels on which the output at a query depends, by its gradient."""
    attention = ATTENTIONS[type(case.config)]
    y, trace = attention.forward(case.x(), params, case.config)
    cotangent = np.zeros_like(y)
    cotangent[0, :, query[0], query[1]] = np.random.default_rng(3).standard_normal(case.config.dim)
    grad_x, _ = attention.vjp(cotangent, trace, params, case.config)
    assert not grad_x[1:].any()
    return np.abs(grad_x[0]).max(axis=0) > 1e-14, trace


def check_receptive_field(case, query, receptive_field=receptive_field):
    params = parameters_with_fixed_points(case)
    expected, trace = depends_on(case, params, query)
    seen = receptive_field(query, case.size, case.config, trace)
    assert seen.shape == case.size
    assert seen.dtype == bool
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-{CONFIGS.index(config)}")
@given(seed=seeds, size=map_sizes(smallest=2), data=st.data())
def test_receptive_field_is_what_the_output_depends_on(config, seed, size, data):
    """For every peer, query and map, a pixel is in the receptive field exactly if the output depends on it."""
    query = tuple(data.draw(st.integers(0, side - 1)) for side in size)
    check_receptive_field(Case(config, size, 2, seed), query)


@given(layer_cases(batches=(2,)), st.data())
def test_receptive_field_of_the_deformable_layer(case, data):
    """The same for the deformable layer; a depthwise bias adds the pixels around the query."""
    query = tuple(data.draw(st.integers(0, side - 1)) for side in case.size)
    if case.config.bias is BiasKind.DEPTHWISE:  # its input is the query map, which must not be zero
        config = replace(case.config, offset_bound=OffsetBound.NONE)
        case = replace(case, config=config)
        params = case.params()
        params["key"]["weight"][:] = 0  # weights no longer depend on queries
        params["key"]["bias"][:] = 0
        expected, trace = depends_on(case, params, query)
        np.testing.assert_array_equal(receptive_field(query, case.size, case.config, trace), expected)
    else:
        check_receptive_field(case, query)


def test_receptive_field_checker_rejects_wrong_maps():
    """Rejected: a map off by a pixel, transposed, or of another query or image."""
    case = Case(MultiScaleDeformableConfig(6, 3, 2), (5, 5), 2, 1)
    check_receptive_field(case, (1, 3))
    wrong = (
        lambda query, *rest: np.roll(receptive_field(query, *rest), 1, axis=0),
        lambda query, *rest: receptive_field(query, *rest).T,
        lambda query, *rest: receptive_field(query[::-1], *rest),
        lambda query, *rest: np.zeros((5, 5), dtype=bool),
        lambda query, *rest: np.ones((5, 5), dtype=bool),
    )
    for other in wrong:
        with pytest.raises(AssertionError):
            check_receptive_field(case, (1, 3), other)


def test_receptive_field_by_hand():
    """Known values: neighborhoods at borders and with dilation, windows at the border, pixels around a point."""
    around = receptive_field((0, 3), (4, 7), NeighborhoodAttentionConfig(2, 1, 3))
    assert np.argwhere(around).tolist() == [[y, x] for y in range(3) for x in (2, 3, 4)]
    dilated = receptive_field((0, 3), (6, 7), NeighborhoodAttentionConfig(2, 1, 3, dilation=2))
    assert np.argwhere(dilated).tolist() == [[y, x] for y in (0, 2, 4) for x in (1, 3, 5)]
    shifted = receptive_field((0, 5), (4, 7), WindowAttentionConfig(2, 1, 4, shift=2))
    assert np.argwhere(shifted).tolist() == [[y, x] for y in (0, 1) for x in (2, 3, 4, 5)]


def test_receptive_field_of_another_image_of_the_batch():
    config = DeformableConvConfig(4, 3)
    params = random_params(ATTENTIONS[DeformableConvConfig].shapes(config), np.random.default_rng(0))
    x = numbers(0, 2, 4, 5, 7)
    _, both = ATTENTIONS[DeformableConvConfig].forward(x, params, config)
    _, second = ATTENTIONS[DeformableConvConfig].forward(x[1:], params, config)
    expected = receptive_field((2, 3), (5, 7), config, second)
    np.testing.assert_array_equal(receptive_field((2, 3), (5, 7), config, both, image=1), expected)
    assert (receptive_field((2, 3), (5, 7), config, both) != expected).any()


def test_receptive_field_rejects_invalid_queries():
    config = DeformableConvConfig(4, 3)
    x = numbers(0, 1, 4, 5, 7)
    _, trace = ATTENTIONS[DeformableConvConfig].forward(x, init_params(config, 0, dtype=np.float64), config)
    with pytest.raises(ShapeError, match=r"query: expected a pixel \(y, x\) of a map of \(5, 7\), got \(5, 0\)"):
        receptive_field((5, 0), (5, 7), config, trace)
    with pytest.raises(ShapeError, match="expected the trace of a forward pass, needed for deformable_convolution"):
        receptive_field((0, 0), (5, 7), config)
    with pytest.raises(ShapeError, match=r"trace: expected a trace of a map of size \(7, 5\), got \(5, 7\)"):
        receptive_field((0, 0), (7, 5), config, trace)


# ------------------------------------------------------------------------------------------------ in a backbone


def small():
    """Return a backbone of two stages with deformable layers of two kinds, for an image of 24 x 40."""
    base = config("dat_tiny", num_classes=3)
    deformable = DeformableAttentionConfig(8, 4, 2, stride=2, kernel_size=3, size=(3, 5))
    plainer = DeformableAttentionConfig(6, 2, kernel_size=3, bias=BiasKind.NONE, convention=Convention.DATPP2023)
    block = base.stages[2][1]
    stages = (
        (replace(block, attention=WindowAttentionConfig(6, 2, 3)), replace(block, attention=plainer)),
        (replace(block, attention=deformable),),
    )
    return DATConfig(stages, image_size=(24, 40), num_classes=3)


@pytest.mark.parametrize("match", ["keys", "macs"])
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_a_swapped_backbone_runs_forward_and_backward(kind, match):
    """All deformable layers are replaced, the rest is unchanged, and every parameter gets a gradient."""
    swapped = replace_attention(small(), kind, match)
    attentions = [block.attention for blocks in swapped.stages for block in blocks]
    assert attentions[0] == WindowAttentionConfig(6, 2, 3)
    assert not any(isinstance(attention, DeformableAttentionConfig) for attention in attentions)
    params = init_params(swapped, 0, dtype=np.float64)
    model = DAT(swapped, params)
    logits, pullback = model.vjp(numbers(0, 2, 3, 24, 40))
    grad_x, grads = pullback(np.ones_like(logits))
    assert logits.shape == (2, 3)
    assert grad_x.shape == (2, 3, 24, 40)
    found = flatten(grads)
    assert {name: grad.shape for name, grad in found.items()} == flatten(dat_shapes(swapped))
    assert all(np.isfinite(grad).all() for grad in found.values())
    assert dat_macs(2, (24, 40), swapped) > 0
    with pytest.raises(ConfigError):
        model.to_official(params) if kind not in ("window", "shifted_window", "neighborhood") else replace_attention(
            small(), "dat"
        )


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_other_sizes_than_the_built_one_can_be_fed(kind):
    swapped = replace_attention(small(), kind)
    model = DAT(swapped, init_params(swapped, 0, dtype=np.float64))
    assert model(numbers(0, 1, 3, 33, 21)).shape == (1, 3)


def keys_of(peer, size):
    """Return the number of keys per query of a peer, from its trace."""
    x = numbers(0, 1, peer.dim, *size)
    _, trace = ATTENTIONS[type(peer)].forward(x, init_params(peer, 0, dtype=np.float64), peer)
    if isinstance(peer, DeformableConvConfig):
        return trace.points_px.shape[2]
    return trace.attention.shape[-1] if trace.attention.ndim < 5 or trace.attention.shape[-2] == 1 else None


def test_keys_are_matched():
    """A layer of 49 keys on 14 x 14 is matched by peers with 49: reduction 2, 7 x 7 windows and kernels, 49 points."""
    layer = DeformableAttentionConfig(12, 6, 3, stride=2, kernel_size=5, size=(14, 14))
    peers = {kind: matched_peer(layer, (14, 14), kind) for kind in REPLACEMENTS}
    assert {kind: keys_of(peer, (14, 14)) for kind, peer in peers.items()} == {
        **dict.fromkeys(REPLACEMENTS, 49),
        "multi_head": 196,
    }
    assert peers["shifted_window"].shift == 4
    assert peers["multi_head"].size == (14, 14)


@given(layer_cases(smallest=2, batches=(1,)), st.sampled_from([kind for kind in REPLACEMENTS if kind != "multi_head"]))
def test_matches_are_the_nearest(case, kind):
    """No other value of the searched parameter is nearer, in keys or in multiply-adds."""
    size, layer = case.size, case.config
    wanted = np.prod(key_grid_size(size, layer.kernel_size, layer.stride, layer.convention))
    candidates = list(REPLACEMENTS[kind](layer, size))
    chosen = matched_peer(layer, size, kind)
    gap = {candidate.config: abs(candidate.keys - wanted) for candidate in candidates}
    assert gap[chosen] == min(gap.values())
    if type(chosen) is not NeighborhoodAttentionConfig:
        assert keys_of(chosen, size) == next(c.keys for c in candidates if c.config == chosen)

    def cost(attention):
        return ATTENTIONS[type(attention)].macs(1, size, attention)

    chosen = matched_peer(layer, size, kind, "macs")
    assert abs(cost(chosen) - cost(layer)) == min(abs(cost(c.config) - cost(layer)) for c in candidates)


def test_released_backbones_can_be_swapped():
    """Released backbones are matched in keys and cost; in dat_tiny a deformable layer becomes a window over the map."""
    swapped = replace_attention(config("dat_tiny"), "window")
    assert [block.attention.window_size for block in swapped.stages[2]] == [7, 14] * 3
    assert [block.attention.window_size for block in swapped.stages[3]] == [7, 7]
    cost, goal = (
        dat_macs(1, (224, 224), c)
        for c in (replace_attention(config("dat_tiny"), "ms_deform", "macs"), config("dat_tiny"))
    )
    assert abs(cost - goal) < 0.01 * goal
    latest = replace_attention(config("dat_pp_tiny"), "pyramid")
    assert [blocks[-1].attention.reduction for blocks in latest.stages] == [8, 4, 2, 1]


def test_an_attention_without_released_form_has_no_released_names():
    model_config = replace_attention(tiny("cvpr2022"), "pyramid")
    model = DAT(model_config, init_params(model_config, 0))
    with pytest.raises(ConfigError, match="expected an attention of the released backbones, got pyramid"):
        model.to_official(model.params)


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match=r"kind: expected one of multi_head, window, .*, got 'linear'"):
        replace_attention(small(), "linear")
    with pytest.raises(ConfigError, match="match: expected 'keys' or 'macs', got 'time'"):
        replace_attention(small(), "window", "time")


def test_sizes_follow_a_resized_backbone():
    """A relative bias of plain attention is rebuilt for another image size, as the deformable layer's is."""
    resized = replace_attention(small(), "multi_head").resized((48, 40))
    assert resized.stages[1][0].attention.size == (6, 5)
    assert_agree(resized.stages[1][0].attention.scale, 2**-0.5, 1e-15)
