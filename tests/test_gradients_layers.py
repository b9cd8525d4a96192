"""The hand-written gradients of layers, blocks and backbones, to their input and to every parameter."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.backbones import tiny, tiny_params
from helpers.checks import example_config, example_input
from helpers.gradients import WrongGradient, check_module, check_vjp
from helpers.layer_gradients import away_from_kinks, check_layer, rng_of
from helpers.layers import kink_distance, lattice_distance, random_params
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import layer_cases, neighborhood_cases, numbers, window_cases

from dat_ref import DAT, BiasKind, BlockConfig, Convention, OffsetBound
from dat_ref.block import ATTENTIONS, block, block_shapes, block_vjp
from dat_ref.layer import deformable_layer, deformable_layer_vjp
from dat_ref.params import flatten, unflatten


@pytest.mark.parametrize("bias_kind", list(BiasKind), ids=lambda kind: kind.name)
@given(data=st.data())
def test_layer(bias_kind, data):
    """The whole layer, to its input and every parameter: all conventions, bounds, groups and strides."""
    case = away_from_kinks(data.draw(layer_cases(biases=[bias_kind], batches=(1, 2), largest=4)))
    assume(case is not None)
    check_layer(case, projections=1)


@pytest.mark.parametrize("convention", [Convention.CELL_CENTER, Convention.PAPER], ids=lambda c: c.name)
def test_layer_on_the_lattice_is_right_handed(convention):
    """At zero offset, on the lattice, the gradient holds along weights that move every point down and right."""
    config = example_config(convention, bias=BiasKind.NONE, offset_bound=OffsetBound.RAW)
    x, params = example_input(config)
    params["offset_network"]["pointwise"]["weight"][:] = 0
    params["offset_network"]["norm"]["bias"][:] = 6  # all activations positive
    _, trace = deformable_layer(x, params, config)
    assert (trace.offset_network.activated > 0).all()
    assert lattice_distance(trace.points_px) < 1e-14
    fixed = flatten(params)
    name = "offset_network.pointwise.weight"
    # Rounding puts some references slightly before their pixel; the move puts all of them on the same side.
    start = np.full((2, config.group_dim), 1e-13)

    def forward(weight):
        return deformable_layer(x, unflatten({**fixed, name: weight}), config)

    def vjp(cotangent, weight):
        tree = unflatten({**fixed, name: weight})
        grads = deformable_layer_vjp(cotangent, forward(weight)[1], tree, config)[1]
        return {"weight": flatten(grads)[name]}

    rng = rng_of(0)
    directions = {"directions": lambda _, array: np.abs(rng.standard_normal(array.shape)), "one_sided": True}
    check_vjp(lambda weight: forward(weight)[0], vjp, {"weight": start}, rng, **directions)
    backwards = {"directions": lambda _, array: -np.abs(rng.standard_normal(array.shape)), "one_sided": True}
    with pytest.raises(WrongGradient):
        check_vjp(lambda weight: forward(weight)[0], vjp, {"weight": start}, rng, **backwards)


@given(window_cases(batches=(1, 2), largest=5))
def test_windows(case):
    """Window and shifted-window attention, including padding and seams."""
    check_attention(case)


@given(neighborhood_cases(batches=(1, 2), largest=5))
def test_neighborhoods(case):
    """Neighborhood attention, under both rules for small maps."""
    check_attention(case)


def check_attention(case):
    methods = ATTENTIONS[type(case.config)]
    check_module(
        lambda x, params: methods.forward(x, params, case.config),
        lambda g, trace, params: methods.vjp(g, trace, params, case.config),
        case.x(),
        case.params(),
        rng_of(case.seed),
        projections=1,
    )


@given(
    window_cases(batches=(2,), largest=4),
    st.sampled_from(["linear", "depthwise", "depthwise_residual"]),
    st.booleans(),
    st.sampled_from([None, 0.1]),
)
def test_block(case, kind, perception, scale):
    """The Transformer block with every option, around window attention."""
    assume(case.config.dim > 1)
    config = BlockConfig(case.config, kind, 2, local_perception=perception, layer_scale=scale)
    params = random_params(block_shapes(config), np.random.default_rng(case.seed))
    check_module(
        lambda x, params: block(x, params, config),
        lambda g, trace, params: block_vjp(g, trace, params, config),
        case.x(),
        params,
        rng_of(case.seed),
        projections=1,
    )


def deformable_traces(trace):
    """Yield the traces of the deformable layers in a backbone's trace, with their stage and block."""
    for stage, of_stage in enumerate(trace.stages):
        for index, of_block in enumerate(of_stage.blocks):
            if hasattr(of_block.attention, "points_px"):
                yield stage, index, of_block.attention


def backbone_off_kinks(release, size, margin):
    """Return configuration, parameters and image of a small backbone whose forward pass avoids all kinks."""
    changes = {"log_cpb": [False] * 4} if release == "datpp2023" else {}  # too many rectified units
    config = tiny(release, num_classes=3, **changes)
    for seed in range(100):
        params, x = tiny_params(config, seed), numbers(seed, 1, 3, *size)
        _, trace = DAT(config, params)(x, return_trace=True)
        distance = np.inf
        for stage, index, layer_trace in deformable_traces(trace):
            layer = config.stages[stage][index].attention
            table = params["stages"][stage]["blocks"][index]["attention"]["position_bias"].get("table")
            distance = min(distance, kink_distance(layer_trace, layer, None if table is None else table.shape[1:]))
        if distance > margin:
            return config, params, x
    raise AssertionError("no seed away from kinks")


@pytest.mark.parametrize(("release", "size"), [("cvpr2022", (41, 67)), ("datpp2023", (36, 65))])
@pytest.mark.parametrize("global_pool", ["avg", ""])
def test_backbone(release, size, global_pool):
    """A whole small backbone of each release, to the image and to all parameters at once."""
    config, params, x = backbone_off_kinks(release, size, 1e-4)
    config = replace(config, global_pool=global_pool)

    def vjp(cotangent, x, **leaves):
        _, pullback = DAT(config, unflatten(leaves)).vjp(x)
        grad_x, grads = pullback(cotangent)
        return {"x": grad_x, **flatten(grads)}

    check_vjp(
        lambda x, **leaves: DAT(config, unflatten(leaves))(x),
        vjp,
        {"x": x, **flatten(params)},
        rng_of(0),
        jointly=True,
        projections=4,
        tolerance=1e-6,
    )
