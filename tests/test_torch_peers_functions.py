"""Torch functions of the peers against the spec, the released modules and other packages; identities; mutants."""

import numpy as np
import pytest
from helpers.golden import load_golden, under
from hypothesis import given
from hypothesis import strategies as st
from strategies import map_sizes, numbers, seeds

torch = pytest.importorskip("torch")
from helpers.tensors import assert_close, pull_back, rejects, tensor  # noqa: E402
from helpers.torch_peers import ScaledGradient, build_peer  # noqa: E402

from dat_ref import (  # noqa: E402
    BiasKind,
    ConfigError,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    ShapeError,
    WindowAttentionConfig,
    peers,
)
from dat_ref.params import map_tree  # noqa: E402
from dat_ref.peers import (  # noqa: E402
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PyramidAttentionConfig,
)
from dat_ref.torch import functional  # noqa: E402
from dat_ref.torch.block import attention_module  # noqa: E402
from dat_ref.torch.functional import multi_scale as torch_multi_scale  # noqa: E402

# ------------------------------------------------------------------------------------------------ the released ones


@pytest.mark.parametrize("name", ["peer_dcn_v1", "peer_dcn_v2"])
def test_deformable_convolution_is_torchvisions(name):
    meta, arrays = load_golden(name)
    leaves = {key: tensor(arrays[key]) for key in ("x", "offset", "weight", "bias", "mask") if key in arrays}
    y = functional.deform_conv2d(**leaves, **{key: meta[key] for key in ("stride", "padding", "dilation")})
    assert_close(y, arrays["y"])
    for key, grad in zip(leaves, pull_back(y, arrays["cot"], list(leaves.values()))):
        assert_close(grad, arrays[f"grad.{key}"], what=key)


@pytest.mark.parametrize("name", ["single", "multi", "boxes"])
def test_multi_scale_deformable_attention_is_deformable_detrs(name):
    meta, arrays = load_golden(f"peer_ms_deform_attn_{name}")
    config = MultiScaleDeformableConfig(
        arrays["query"].shape[2], meta["n_heads"], meta["n_points"], levels=len(meta["shapes"])
    )
    module = attention_module(config).double()
    module.load_official(under("state", arrays))
    inputs = [tensor(arrays[key]) for key in ("query", "value", "reference_points")]
    y, _ = module.attend(*inputs, torch.tensor(meta["shapes"]))
    assert_close(y, arrays["y"])
    y.backward(torch.from_numpy(arrays["cot"]))
    found = module.to_official(module.to_numpy(grad=True))
    found |= {key: leaf.grad for key, leaf in zip(("query", "value", "reference_points"), inputs)}
    expected = under("grad", arrays)
    assert expected.keys() == found.keys()
    for key, grad in expected.items():
        assert_close(found[key], grad, what=key)


def test_spatial_reduction_attention_is_the_released_one():
    meta, arrays = load_golden("peer_pyramid")
    module = attention_module(PyramidAttentionConfig(arrays["x"].shape[1], meta["heads"], meta["sr_ratio"])).double()
    module.load_official(under("state", arrays))
    x = tensor(arrays["x"])
    y = module(x)
    assert_close(y, arrays["y"])
    y.backward(torch.from_numpy(arrays["cot"]))
    found = {**module.to_official(module.to_numpy(grad=True)), "x": x.grad}
    for key, grad in under("grad", arrays).items():
        assert_close(found[key], grad, what=key)


# ------------------------------------------------------------------------------------------------ the two functions


def multi_scale_inputs(seed, shapes):
    """Return value, locations (also outside the maps) and weights for 2 heads."""
    rng = np.random.default_rng(seed)
    locations = rng.uniform(-0.3, 1.3, (2, 5, 2, len(shapes), 3, 2))
    value = rng.standard_normal((2, sum(h * w for h, w in shapes), 2, 4))
    return value, locations, rng.uniform(size=locations.shape[:-1])


def check_multi_scale(function, seed=0, shapes=((3, 5), (1, 2))):
    """Compare a function of the shared signature with the spec, with gradients."""
    arrays = multi_scale_inputs(seed, shapes)
    value, locations, weights = (tensor(array) for array in arrays)
    y = function(value, list(shapes), locations, weights)
    assert_close(y, peers.multi_scale_deformable_attention(arrays[0], shapes, *arrays[1:]))
    cotangent = numbers(seed + 1, *y.shape)
    expected = peers.multi_scale.multi_scale_deformable_attention_vjp(cotangent, arrays[0], shapes, *arrays[1:])
    for grad, known in zip(pull_back(y, cotangent, (value, locations, weights)), expected):
        assert_close(grad, known)


@given(seed=seeds, shapes=st.lists(map_sizes(largest=5), min_size=1, max_size=3))
def test_multi_scale_function(seed, shapes):
    check_multi_scale(functional.multi_scale_deformable_attention, seed, tuple(shapes))


@pytest.mark.parametrize("family", ["mask2former", "deformable_detr"])
def test_multi_scale_function_equals_transformers(family):
    """The pure-PyTorch function of transformers has the same output and gradients."""
    pytest.importorskip("transformers")
    shapes = [(3, 5), (4, 2), (1, 1)]
    if family == "mask2former":
        module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
        theirs = module.multi_scale_deformable_attention
    else:
        module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")

        def theirs(value, shapes, locations, weights):
            sizes = torch.tensor(shapes)
            first = torch.cat([torch.zeros(1, dtype=torch.long), sizes.prod(1).cumsum(0)[:-1]])
            return module.MultiScaleDeformableAttention()(value, sizes, shapes, first, locations, weights, 64)

    leaves = [tensor(array) for array in multi_scale_inputs(0, shapes)]
    results = []
    for function in (functional.multi_scale_deformable_attention, theirs):
        y = function(leaves[0], shapes, *leaves[1:])
        results.append([y, *pull_back(y, numbers(1, *y.shape), leaves)])
    for ours, known in zip(*results):
        assert_close(ours, known.detach().numpy(), 1e-12)


@pytest.mark.parametrize("groups", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("reference", ["numpy", "torchvision"])
def test_deformable_convolution_with_strides_and_groups(groups, reference):
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    arrays = {
        "x": numbers(0, 2, 6, 7, 8),
        "offset": 1.5 * numbers(1, 2, 2 * groups[1] * 6, 4, 10),
        "weight": numbers(2, 12, 6 // groups[0], 3, 2),
        "bias": numbers(3, 12),
        "mask": numbers(4, 2, groups[1] * 6, 4, 10),
    }
    leaves = {name: tensor(array) for name, array in arrays.items()}
    y, cotangent = functional.deform_conv2d(**leaves, **geometry), numbers(5, 2, 12, 4, 10)
    if reference == "numpy":
        expected = peers.deform_conv2d(**arrays, **geometry)
        grads = peers.deform_conv.deform_conv2d_vjp(cotangent, **arrays, **geometry)._asdict()
    else:
        known = pytest.importorskip("torchvision.ops").deform_conv2d(
            *list(leaves.values())[:4], **geometry, mask=leaves["mask"]
        )
        expected = known.detach().numpy()
        grads = dict(zip(leaves, (g.numpy() for g in pull_back(known, cotangent, list(leaves.values())))))
    assert_close(y, expected)
    for name, grad in zip(leaves, pull_back(y, cotangent, list(leaves.values()))):
        assert_close(grad, grads[name], what=name)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"offset": (2, 17, 5, 7)}, "offset: expected a multiple of 2·k_y·k_x=18"),
        ({"offset": (2, 18, 5, 6)}, "offset: expected"),
        ({"weight": (4, 5, 3, 3)}, "weight.shape"),
        ({"mask": (2, 10, 5, 7)}, "mask: expected"),
        ({"x": (2, 6, 5)}, "x: expected"),
    ],
)
def test_bad_arguments_are_named(change, argument):
    shapes = {"x": (2, 6, 5, 7), "offset": (2, 18, 5, 7), "weight": (4, 6, 3, 3), "mask": (2, 9, 5, 7)} | change
    arrays = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=argument):
        functional.deform_conv2d(**arrays, padding=1)
    with pytest.raises(ShapeError, match="sampling_locations"):
        functional.multi_scale_deformable_attention(
            torch.zeros(1, 6, 2, 3), [(2, 3)], torch.zeros(1, 4, 2, 2, 3, 2), torch.zeros(1, 4, 2, 1, 3)
        )
    with pytest.raises(ConfigError, match="levels"):
        attention_module(MultiScaleDeformableConfig(6, 3, levels=2))(torch.zeros(1, 6, 3, 4))


def test_checker_rejects_wrong_functions():
    right = functional.multi_scale_deformable_attention
    wrong = (
        lambda value, shapes, places, weights: right(value, shapes, places.flip(-1), weights),
        lambda value, shapes, places, weights: right(value, shapes, places.clamp(0, 1), weights),
        lambda value, shapes, places, weights: right(value, shapes, places, weights.flip(3)),
        lambda value, shapes, places, weights: right(ScaledGradient.apply(value), shapes, places, weights),
    )
    check_multi_scale(right)
    for function in wrong:
        assert rejects(lambda function=function: check_multi_scale(function))
    assert torch_multi_scale.level_sizes(torch.tensor([[3, 5]])) == [(3, 5)]


# ------------------------------------------------------------------------------------------------ identities


def multi_head(dim=6, heads=3, seed=0):
    module, params = build_peer(MultiHeadAttentionConfig(dim, heads), seed)
    return module, params


@given(size=map_sizes(), seed=seeds)
def test_special_cases_equal_plain_attention(size, seed):
    """Equal to plain attention: one window or neighborhood over the map, reduction 1, no offsets and bias."""
    module, params = multi_head(seed=seed)
    x = torch.from_numpy(numbers(seed, 2, 6, *size))
    expected = module(x).detach().numpy()
    q, k, v = (map_tree(lambda leaf, part=part: np.split(leaf, 3)[part], params["qkv"]) for part in range(3))
    side = max(size) + (max(size) + 1) % 2
    table = {"table": np.zeros((3, 2 * side - 1, 2 * side - 1))}
    output = params["output"]
    disguises = [
        (WindowAttentionConfig(6, 3, side), {"qkv": params["qkv"], "window_bias": table, "output": output}),
        (NeighborhoodAttentionConfig(6, 3, 2 * side - 1), None),
        (
            PyramidAttentionConfig(6, 3, 1),
            {"query": q, "key_value": map_tree(lambda a, b: np.concatenate([a, b]), k, v), "output": output},
        ),
        (
            DeformableAttentionConfig(6, 3, offset_bound=OffsetBound.NONE, bias=BiasKind.NONE),
            {"query": q, "key": k, "value": v, "output": output},
        ),
    ]
    for config, tree in disguises:
        other = attention_module(config).double()
        if tree is None:
            wide = np.zeros((3, 4 * side - 3, 4 * side - 3))
            tree = {"qkv": params["qkv"], "neighborhood_bias": {"table": wide}, "output": output}
        other.load_numpy(tree)
        assert_close(other(x), expected, what=config.kind)


def test_deformable_convolution_without_offsets_is_a_convolution():
    """With a unit mask version 2 equals version 1; with offsets of one pixel it is a convolution of the shifted map."""
    x, weight = torch.from_numpy(numbers(0, 2, 4, 7, 9)), torch.from_numpy(numbers(1, 6, 2, 3, 2))
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}
    expected = torch.nn.functional.conv2d(x, weight, groups=2, **geometry)
    offset = torch.zeros(2, 12, *expected.shape[2:], dtype=x.dtype)
    ones = torch.ones(2, 6, *expected.shape[2:], dtype=x.dtype)
    assert_close(functional.deform_conv2d(x, offset, weight, **geometry), expected.numpy())
    assert_close(functional.deform_conv2d(x, offset, weight, mask=ones, **geometry), expected.numpy())
    offset[:, ::2] = 1  # dy
    shifted = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x[:, :, 1:], (0, 0, 0, 1)), weight, groups=2, **geometry
    )
    moved = functional.deform_conv2d(x, offset, weight, **geometry)
    assert_close(moved[:, :, 1:], shifted.numpy()[:, :, 1:])


@given(size=map_sizes(smallest=2), seed=seeds)
def test_per_query_attention_at_shared_points_equals_dat(size, seed):
    """Per-query attention with equal points for all queries equals attention to shared keys."""
    config = DeformableAttentionConfig(12, 4, 2, offset_bound=OffsetBound.RAW, bias=BiasKind.NONE, kernel_size=3)
    layer, params = build_peer(config, seed)
    x = torch.from_numpy(numbers(seed, 2, 12, *size))
    y, trace = layer(x, return_trace=True)
    shared = trace.points_px.flatten(2, 3)[:, :, None].expand(-1, -1, size[0] * size[1], -1, -1)
    tensors = map_tree(torch.from_numpy, {name: params[name] for name in ("key", "value")})
    merged, _ = functional.attend_at_points(trace.query.flatten(2), x, shared, tensors, config.heads)
    assert_close(layer.output(merged.transpose(1, 2)).transpose(1, 2).reshape(x.shape), y.detach().numpy())
