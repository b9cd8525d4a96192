"""Layers and blocks in torch against the NumPy and released ones: outputs, traces and gradients."""

import math
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers.golden import golden_names, load_golden, under
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from helpers.tensors import (  # noqa: E402
    assert_close,
    assert_trees_close,
    assert_within_budget,
    conventions,
    rejects,
    resolutions,
    seeds,
    tensor,
)

import dat_ref  # noqa: E402
import dat_ref.torch as dt  # noqa: E402
from dat_ref import (  # noqa: E402
    BiasKind,
    BlockConfig,
    CheckpointError,
    Convention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
    init_params,
)
from dat_ref.block import ATTENTIONS, block, block_shapes, block_vjp  # noqa: E402
from dat_ref.params import flatten, map_tree  # noqa: E402
from dat_ref.torch.block import DropPath, attention_module  # noqa: E402

# ------------------------------------------------------------------------------------------------ helpers


def random_params(shapes, seed):
    """Return random parameters with tables and offsets of order one, so that every path affects the output."""
    rng = np.random.default_rng(seed)
    return map_tree(lambda shape: rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:3]), 1)), shapes)


def run_both(config, params, x, seed=0, **options):
    """Run a layer in NumPy and in torch in float64, with gradients."""
    spec = ATTENTIONS[type(config)]
    y, trace = spec.forward(x, params, config)
    cotangent = np.random.default_rng(seed).standard_normal(y.shape)
    grad_x, grad_params = spec.vjp(cotangent, trace, params, config)
    module = attention_module(config, **options).double()
    module.load_numpy(params)
    return (y, trace, grad_x, grad_params), module, cotangent


def assert_layer(module, x, cotangent, spec, return_trace=False):
    """Check a module's output, trace and gradients against the spec's."""
    y, trace, grad_x, grad_params = spec
    module.zero_grad()
    leaf = tensor(x)
    actual = module(leaf, return_trace=True) if return_trace else module(leaf)
    if return_trace:
        actual, ours = actual
        assert_trace(ours, trace)
    assert_close(actual, y, what="y")
    actual.backward(torch.from_numpy(cotangent))
    assert_close(leaf.grad, grad_x, what="x")
    assert_trees_close(module.to_numpy(grad=True), grad_params)


def assert_trace(ours, theirs):
    """Check every array of a trace against the spec's array of the same name."""
    assert type(ours) is type(theirs)
    for field in fields(theirs):
        actual, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(expected, np.ndarray):
            if np.isfinite(expected).all():
                assert_close(actual, expected, what=field.name)
            else:  # a single key at infinity
                np.testing.assert_array_equal(actual.detach().numpy(), expected)
        elif hasattr(expected, "__dataclass_fields__"):
            assert_trace(actual, expected)
        else:
            assert actual == expected


def shapes_of(config):
    return ATTENTIONS[type(config)].shapes(config)


# ------------------------------------------------------------------------------------------------ the releases


@pytest.mark.parametrize("backend", ["blockwise", "matmul", "eager"])
@pytest.mark.parametrize("name", golden_names("module"))
def test_deformable_attention_is_the_released_one(name, backend):
    meta, arrays = load_golden(name)
    layer = dt.DeformableAttention.from_official(
        meta["ctor"], under("state", arrays), release=meta["release"], backend=backend
    )
    assert next(layer.parameters()).dtype is torch.float64
    x = tensor(arrays["x"])
    y = layer(x)
    assert_close(y, arrays["y"])
    y.backward(torch.from_numpy(arrays["cot"]))
    grads = layer.to_official({key: leaf.grad for key, leaf in layer.named_parameters()})
    expected = under("grad", arrays)
    assert_close(x.grad, expected.pop("x"))
    used = {key: grad for key, grad in expected.items() if key in grads or grad.any()}
    assert used
    for key, grad in used.items():
        assert_close(grads[key], grad, what=key)
    _, trace = layer(x, return_trace=True)
    assert_close(trace.points.reshape(arrays["pos"].shape), arrays["pos"])
    if np.isfinite(arrays["ref"]).all():
        assert_close(trace.reference.reshape(arrays["ref"].shape), arrays["ref"])


PEERS = {
    "peer_window": lambda meta: WindowAttentionConfig(8, meta["heads"], meta["window"]),
    "peer_shifted_window": lambda meta: WindowAttentionConfig(8, meta["heads"], meta["window"], shift=meta["shift"]),
    "peer_neighborhood": lambda meta: NeighborhoodAttentionConfig(8, meta["heads"], meta["kernel_size"]),
    "peer_neighborhood_small_map": lambda meta: NeighborhoodAttentionConfig(
        8, meta["heads"], meta["kernel_size"], small_map="pad"
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_local_attentions_are_the_released_ones(name):
    meta, arrays = load_golden(name)
    config = PEERS[name](meta)
    layer = attention_module(config).double()
    layer.load_official(under("state", arrays))
    x = tensor(arrays["x"])
    y = layer(x)
    assert_close(y, arrays["y"])
    y.backward(torch.from_numpy(arrays["cot"]))
    expected = under("grad", arrays)
    assert_close(x.grad, expected.pop("x"))
    grads = layer.to_official(layer.to_numpy(grad=True))
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        assert_close(grads[key], grad, what=key)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("module22_rect", {"convention": Convention.CELL_CENTER}),
        ("module22_rect", {"offset_range": 2.002}),
        ("module22_tanh", {"offset_bound": OffsetBound.CLAMP}),
        ("module23_square", {"convention": Convention.CVPR2022}),
        ("module23_bounded", {"offset_bound": OffsetBound.RAW}),
    ],
)
def test_the_fixtures_reject_a_wrong_layer(name, change):
    meta, arrays = load_golden(name)
    config = DeformableAttentionConfig.from_official(meta["ctor"], release=meta["release"])
    layer = dt.DeformableAttention(replace(config, **change)).double()
    layer.load_official(under("state", arrays))
    assert rejects(lambda: assert_close(layer(tensor(arrays["x"])), arrays["y"]))


# ------------------------------------------------------------------------------------------------ drawn layers


@st.composite
def deformable_configs(draw):
    """Draw a deformable attention and a map it takes."""
    groups, per_group, depth = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    stride = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(max(stride, 2), 7)) for _ in range(2))
    bound = draw(st.sampled_from(list(OffsetBound)))
    average_pool = bound is OffsetBound.NONE and draw(st.booleans())
    if average_pool:
        size = tuple(stride * draw(st.integers(1, 3)) for _ in range(2))
    bias = draw(st.sampled_from(list(BiasKind)))
    built = size
    if bias is BiasKind.TABLE and draw(st.booleans()):
        built = (draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    config = DeformableAttentionConfig(
        dim=groups * per_group * depth,
        heads=groups * per_group,
        groups=groups,
        stride=stride,
        kernel_size=stride if average_pool else draw(st.sampled_from([3, 5])),
        offset_bound=bound,
        offset_range=draw(st.sampled_from([0.7, 2.0])),
        bias=bias,
        size=built,
        convention=draw(conventions),
        bias_resolution=draw(resolutions),
        average_pool=average_pool,
    )
    return config, size


@settings(max_examples=60)
@given(deformable_configs(), st.integers(0, 2), seeds, st.sampled_from(["matmul", "blockwise", "eager"]))
def test_deformable_attention_equals_the_spec(drawn, batch, seed, backend):
    config, size = drawn
    x = np.random.default_rng(seed).standard_normal((batch, config.dim, *size))
    try:
        params = random_params(shapes_of(config), seed)
        spec, module, cotangent = run_both(config, params, x, backend=backend)
    except ValueError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            attention_module(config).double()(torch.from_numpy(x))
        return
    on_lattice = config.offset_bound is OffsetBound.NONE  # slopes there are compared in "matmul", which is exact
    if on_lattice and backend != "matmul":
        assert_close(module(torch.from_numpy(x)), spec[0])
    else:
        assert_layer(module, x, cotangent, spec)
    assert_layer(module, x, cotangent, spec, return_trace=True)


@pytest.mark.parametrize("kind", BiasKind)
def test_traces_have_the_fields_of_the_spec_for_every_bias(kind):
    """The traces have the same fields, and the same ones are None."""
    config = DeformableAttentionConfig(dim=8, heads=4, groups=2, size=(5, 4), bias=kind)
    x = np.random.default_rng(2).standard_normal((2, 8, 5, 4))
    (_, expected, _, _), module, _ = run_both(config, random_params(shapes_of(config), 2), x)
    _, actual = module(torch.from_numpy(x), return_trace=True)
    present = [
        {field.name for field in fields(each) if getattr(each, field.name) is not None} for each in (actual, expected)
    ]
    assert present[0] == present[1]
    assert ("log_bias" in present[0]) == (kind is BiasKind.LOG_CPB)
    assert_trace(actual, expected)


@given(st.sampled_from([(1, 0), (3, 0), (4, 2), (5, 3)]), st.integers(1, 11), st.integers(1, 11), seeds)
def test_window_attention_equals_the_spec(window, height, width, seed):
    config = WindowAttentionConfig(dim=6, heads=3, window_size=window[0], shift=window[1])
    x = np.random.default_rng(seed).standard_normal((seed % 3, 6, height, width))
    spec, module, cotangent = run_both(config, random_params(shapes_of(config), seed), x)
    assert_layer(module, x, cotangent, spec)
    assert_layer(module, x, cotangent, spec, return_trace=True)


@given(st.sampled_from([1, 3, 5, 7]), st.sampled_from(["shrink", "pad"]), st.integers(1, 16), st.integers(1, 9), seeds)
def test_neighborhood_attention_equals_the_spec(kernel, small_map, height, width, seed):
    config = NeighborhoodAttentionConfig(dim=6, heads=3, kernel_size=kernel, small_map=small_map)
    x = np.random.default_rng(seed).standard_normal((seed % 3, 6, height, width))
    spec, module, cotangent = run_both(config, random_params(shapes_of(config), seed), x)
    assert_layer(module, x, cotangent, spec)
    assert_layer(module, x, cotangent, spec, return_trace=True)


@pytest.mark.parametrize("sampler", ["gather", "grid_sample"])
def test_both_samplers_in_the_layer(sampler):
    config = DeformableAttentionConfig(dim=12, heads=6, groups=3, stride=2, size=(7, 10))
    x = np.random.default_rng(1).standard_normal((2, 12, 7, 10))
    spec, module, cotangent = run_both(config, random_params(shapes_of(config), 1), x, sampler=sampler)
    assert_layer(module, x, cotangent, spec)


WRONG_LAYERS = {
    "scale": lambda layer: setattr(layer, "config", replace(layer.config, offset_range=2.01)),
    "groups swapped": lambda layer: layer.position_bias.table.data.copy_(layer.position_bias.table.data.flip(0)),
    "x and y swapped": lambda layer: layer.offset_network.pointwise.weight.data.copy_(
        layer.offset_network.pointwise.weight.data.flip(0)
    ),
    "key and value swapped": lambda layer: (
        layer.key.weight.data.copy_(layer.value.weight.data),
        layer.key.bias.data.copy_(layer.value.bias.data),
    ),
}


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_a_wrong_layer_is_rejected(name):
    config = DeformableAttentionConfig(dim=12, heads=6, groups=3, size=(4, 7))
    x = np.random.default_rng(1).standard_normal((2, 12, 4, 7))
    spec, module, cotangent = run_both(config, random_params(shapes_of(config), 1), x)
    assert_layer(module, x, cotangent, spec)
    WRONG_LAYERS[name](module)
    assert rejects(lambda: assert_layer(module, x, cotangent, spec))


@pytest.mark.parametrize("mlp", ["linear", "depthwise", "depthwise_residual"])
@pytest.mark.parametrize(("perception", "scale"), [(False, None), (True, 0.3)])
@pytest.mark.parametrize(
    "attention",
    [
        DeformableAttentionConfig(dim=6, heads=3, groups=3, size=(5, 7)),
        WindowAttentionConfig(dim=6, heads=3, window_size=3, shift=1),
        NeighborhoodAttentionConfig(dim=6, heads=3, kernel_size=3),
    ],
)
def test_block_equals_the_spec(attention, mlp, perception, scale):
    config = BlockConfig(attention, mlp=mlp, mlp_ratio=2, local_perception=perception, layer_scale=scale)
    params = random_params(block_shapes(config), 3)
    x = np.random.default_rng(3).standard_normal((2, 6, 5, 7))
    y, trace = block(x, params, config)
    cotangent = np.random.default_rng(4).standard_normal(y.shape)
    grad_x, grad_params = block_vjp(cotangent, trace, params, config)
    module = dt.Block(config).double()
    module.load_state_dict({name: torch.from_numpy(np.array(leaf)) for name, leaf in flatten(params).items()})
    for return_trace in (False, True):
        module.zero_grad()
        leaf = tensor(x)
        actual = module(leaf, return_trace=return_trace)
        if return_trace:
            actual, ours = actual
            assert_trace(ours, trace)
        assert_close(actual, y)
        actual.backward(torch.from_numpy(cotangent))
        assert_close(leaf.grad, grad_x)
        for name, grad in flatten(grad_params).items():
            assert_close(module.get_parameter(name).grad, grad, what=name)


# ------------------------------------------------------------------------------------------------ precision and layout


def small_layer(convention=Convention.DATPP2023, **options):
    bound = OffsetBound.CLAMP if convention is Convention.DATPP2023 else OffsetBound.TANH_CELLS
    config = DeformableAttentionConfig(
        dim=24, heads=6, groups=3, stride=2, offset_bound=bound, size=(14, 20), convention=convention
    )
    torch.manual_seed(0)
    return dt.DeformableAttention(config, **options)


@given(deformable_configs(), seeds, st.sampled_from(["matmul", "blockwise"]))
def test_float32_is_within_the_budget(drawn, seed, backend):
    config, size = drawn
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, config.dim, *size))
    try:
        params = random_params(shapes_of(config), seed)
        truth, exact = dat_ref.DeformableAttention(config, params)(x, return_trace=True)
        narrow = map_tree(lambda leaf: leaf.astype(np.float32), params)
        yardstick, trace = dat_ref.DeformableAttention(config, narrow)(x.astype(np.float32), return_trace=True)
    except ValueError:
        return
    module = dt.DeformableAttention(config, backend=backend)
    module.load_numpy(params)
    actual, ours = module(torch.from_numpy(x).float(), return_trace=True)
    assert actual.dtype is ours.points.dtype is torch.float32
    assert_within_budget(module(torch.from_numpy(x).float()), yardstick, truth, factor=10.0)
    assert_within_budget(actual, yardstick, truth, factor=10.0)
    if np.isfinite(exact.points_px).all():
        assert_within_budget(ours.points_px, trace.points_px, exact.points_px, factor=10.0)


@pytest.mark.parametrize("how", ["autocast bf16", "autocast fp16", "bf16", "fp16"])
@pytest.mark.parametrize("convention", list(Convention))
def test_half_precision_computes_geometry_in_float32(how, convention):
    layer = small_layer(convention)
    x = torch.randn(2, 24, 14, 20)
    exact, truth = layer.double()(x.double(), return_trace=True)
    dtype = torch.bfloat16 if how.endswith("bf16") else torch.float16
    if how.startswith("autocast"):
        with torch.autocast("cpu", dtype=dtype):
            layer = layer.float()
            y, trace = layer(x, return_trace=True)
            fused = layer(x)
    else:
        layer, x = layer.to(dtype), x.to(dtype)
        y, trace = layer(x, return_trace=True)
        fused = layer(x)
    for part in (trace.raw_offsets, trace.reference, trace.points, trace.points_px, trace.reference_px):
        assert part.dtype is torch.float32
    assert y.dtype is fused.dtype is dtype
    assert y.isfinite().all()
    assert fused.isfinite().all()
    # Queries in half precision give offsets of half precision; measured errors: 0.06 px and 0.008 px.
    error_px = (trace.points_px.double() - truth.points_px).abs().max().item()
    assert error_px < (0.1 if dtype is torch.bfloat16 else 0.0125)
    rounding = torch.finfo(dtype).eps
    assert (fused.double() - exact).abs().max() < 8 * rounding * exact.abs().max()
    fused.float().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in layer.parameters())


ALL_ATTENTIONS = [
    DeformableAttentionConfig(dim=12, heads=6, groups=3, stride=2, size=(7, 10)),
    WindowAttentionConfig(dim=12, heads=6, window_size=4, shift=2),
    NeighborhoodAttentionConfig(dim=12, heads=6, kernel_size=5),
]


@pytest.mark.parametrize("config", ALL_ATTENTIONS)
def test_any_memory_layout(config):
    torch.manual_seed(0)
    layer = attention_module(config).double()
    x = torch.randn(2, 12, 7, 10, dtype=torch.float64)
    expected = layer(x)
    last = layer(x.to(memory_format=torch.channels_last))
    assert_close(last, expected.detach().numpy())
    assert last.is_contiguous(memory_format=torch.channels_last)
    spaced = torch.empty(2, 12, 14, 10, dtype=torch.float64)[:, :, ::2].copy_(x)
    assert_close(layer(spaced), expected.detach().numpy())
    assert_close(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), expected.detach().numpy())
    assert layer(x[:0]).shape == (0, 12, 7, 10)
    layer(x[:0].requires_grad_()).sum().backward()


@pytest.mark.parametrize("convention", list(Convention))
def test_one_layer_takes_maps_of_every_size(convention):
    layer = small_layer(convention)
    for size in ((2, 3), (7, 5), (14, 20), (20, 14), (33, 9)):
        y = layer(torch.randn(1, 24, *size))
        assert y.shape == (1, 24, *size)
        assert y.isfinite().all()


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("config", ALL_ATTENTIONS)
@pytest.mark.parametrize("rate", ["attention_dropout", "projection_dropout"])
def test_dropout_is_for_training(config, rate):
    layer = attention_module(replace(config, **{rate: 0.5}))
    x = torch.randn(2, 12, 7, 10)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    drop = DropPath(0.25)
    x = torch.ones(4000, 1, 1, 2)
    torch.manual_seed(0)
    y = drop(x)
    assert torch.equal(y[..., 0], y[..., 1])
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(y.mean().item() - 1) < 0.05
    assert drop.eval()(x) is x
    assert not DropPath(1.0)(x).any()


def test_initialization():
    config = DeformableAttentionConfig(dim=64, heads=8, groups=2, size=(20, 20))
    layer = dt.DeformableAttention(config, init="zero_offset")
    _, trace = layer(torch.randn(2, 64, 20, 20), return_trace=True)
    assert torch.equal(trace.points, trace.reference)
    released = dt.DeformableAttention(config)
    assert released.offset_network.pointwise.weight.any()
    assert 0.008 < released.position_bias.table.std() < 0.012
    assert abs(released.query.weight).max() <= 64**-0.5
    local = attention_module(NeighborhoodAttentionConfig(dim=64, heads=8, kernel_size=7))
    assert 0.017 < local.neighborhood_bias.table.std() < 0.023
    spec = flatten(init_params(config, 0))
    for name, leaf in released.named_parameters():  # the same distribution as the spec's initialization
        if leaf.numel() > 500:
            assert 0.9 < leaf.std().item() / spec[name].std() < 1.1, name
    torch.manual_seed(7)
    first = dt.DeformableAttention(config)
    torch.manual_seed(7)
    assert all(map(torch.equal, first.parameters(), dt.DeformableAttention(config).parameters()))
    with pytest.raises(ValueError, match="init: expected 'released' or 'zero_offset', got 'zeros'"):
        dt.DeformableAttention(config, init="zeros")


# ------------------------------------------------------------------------------------------------ names and errors


@pytest.mark.parametrize("config", ALL_ATTENTIONS)
def test_parameters_convert_to_numpy_and_back(config, tmp_path):
    params = init_params(config, 3)
    layer = attention_module(config)
    layer.load_numpy(params)
    back = flatten(layer.to_numpy())
    assert back.keys() == flatten(params).keys() == layer.state_dict().keys()
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(back[name], leaf)
    released = layer.to_official()
    other = attention_module(config)
    other.load_official(released)
    x = torch.randn(1, 12, 7, 10)
    assert torch.equal(layer(x), other(x))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    third = attention_module(config)
    third.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(layer(x), third(x))


def test_a_wrong_tree_changes_nothing():
    layer = small_layer()
    before = {name: leaf.clone() for name, leaf in layer.state_dict().items()}
    tree = layer.to_numpy()
    tree["query"]["weight"] = np.zeros((3, 3))
    del tree["output"]["bias"]
    with pytest.raises(CheckpointError, match=r"(?s)missing: output.bias.*mis-shaped: query.weight"):
        layer.load_numpy(tree)
    assert all(torch.equal(leaf, before[name]) for name, leaf in layer.state_dict().items())


@pytest.mark.parametrize("config", ALL_ATTENTIONS)
@pytest.mark.parametrize("shape", [(2, 11, 7, 10), (2, 12, 7), (2, 12, 0, 10)])
def test_errors_equal_those_of_the_spec(config, shape):
    params = init_params(config, 0)
    with pytest.raises(ValueError, match="x: expected") as expected:
        ATTENTIONS[type(config)].forward(np.zeros(shape, np.float32), params, config)
    with pytest.raises(type(expected.value)) as caught:
        attention_module(config)(torch.zeros(shape))
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("size", [(1, 9), (9, 3), (3, 2), (1, 1)])
def test_a_map_smaller_than_the_stride_has_one_key(convention, size):
    """Output, points and gradients equal those of the specification."""
    bound = "clamp" if convention is Convention.DATPP2023 else "tanh_cells"
    layer = dt.DeformableAttention(
        dim=24, heads=6, groups=3, stride=8, convention=convention, offset_bound=bound, bias="none"
    ).double()
    spec = dat_ref.DeformableAttention(layer.config, layer.to_numpy())
    x = torch.randn(2, 24, *size, dtype=torch.float64, requires_grad=True)
    y, trace = layer(x, return_trace=True)
    expected, expected_trace = spec(x.detach().numpy(), return_trace=True)
    assert trace.points.shape == (2, 3, math.ceil(size[0] / 8), math.ceil(size[1] / 8), 2)
    np.testing.assert_allclose(trace.points_px.detach(), expected_trace.points_px, atol=1e-12)
    np.testing.assert_allclose(y.detach(), expected, atol=1e-12)
    cotangent = torch.randn_like(y)
    grad_x, _ = spec.vjp(x.detach().numpy())[1](cotangent.numpy())
    np.testing.assert_allclose(torch.autograd.grad(layer(x), x, cotangent)[0], grad_x, atol=1e-12)


def test_as_numpy_turns_a_whole_trace_into_arrays():
    layer = small_layer()
    y, trace = layer(torch.randn(1, 24, 6, 8), return_trace=True)
    arrays = dt.as_numpy((y, [trace]))
    assert isinstance(arrays[0], np.ndarray)
    assert all(isinstance(getattr(arrays[1][0], name), np.ndarray) for name in ("x", "points", "attention", "bias"))
    assert isinstance(arrays[1][0].offset_network.windows, np.ndarray)
    assert dt.as_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
