"""Peers against torch functions and autograd in float64, and against other packages where installed."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.layers import random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import map_sizes, numbers, seeds, shown_by_shape

from dat_ref import NeighborhoodAttentionConfig
from dat_ref.params import flatten, unflatten
from dat_ref.peers import (
    ATTENTIONS,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PyramidAttentionConfig,
    deform_conv2d,
    multi_scale_deformable_attention,
)
from dat_ref.peers.deform_conv import deform_conv2d_vjp
from dat_ref.peers.ms_deform_attn import multi_scale_deformable, multi_scale_deformable_shapes
from dat_ref.peers.multi_scale import multi_scale_deformable_attention_vjp

torch = pytest.importorskip("torch")
F = torch.nn.functional


def leaves(arrays):
    """Return tensors that require gradients, by name."""
    return {name: torch.tensor(np.ascontiguousarray(array), requires_grad=True) for name, array in arrays.items()}


def same_gradients(y, cotangent, tensors, grads, tolerance=1e-10):
    """Assert that autograd gives the same gradients."""
    y.backward(torch.tensor(np.ascontiguousarray(cotangent)))
    for name, tensor in tensors.items():
        assert_agree(grads[name], tensor.grad.numpy(), tolerance, name)


def read(maps, points_px):
    """Sample maps (N, C, H, W) at points (N, P, 2), (y, x), with torch's own sampler."""
    extent = torch.tensor(maps.shape[:1:-1], dtype=maps.dtype)  # (W, H)
    grid = (2 * points_px.flip(-1) + 1) / extent - 1
    sampled = F.grid_sample(maps, grid[:, :, None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[..., 0]


def torch_deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask):
    """Compute a deformable convolution: grid_sample per tap, then one grouped 1 × 1 convolution."""
    batch, channels, height, width = x.shape
    k_y, k_x = weight.shape[2:]
    taps, (out_h, out_w) = k_y * k_x, offset.shape[2:]
    groups = offset.shape[1] // (2 * taps)
    maps = x.reshape(batch * groups, -1, height, width)
    rows, columns = (torch.arange(n, dtype=x.dtype) for n in (out_h, out_w))
    found = []
    for tap in range(taps):
        move = offset.reshape(batch * groups, taps, 2, out_h, out_w)[:, tap]
        y = rows[:, None] * stride[0] - padding[0] + tap // k_x * dilation[0] + move[:, 0]
        across = columns * stride[1] - padding[1] + tap % k_x * dilation[1] + move[:, 1]
        sampled = read(maps, torch.stack([y, across], dim=-1).flatten(1, 2)).reshape(*maps.shape[:2], out_h, out_w)
        if mask is not None:
            sampled = sampled * mask.reshape(batch * groups, taps, 1, out_h, out_w)[:, tap]
        found.append(sampled.reshape(batch, channels, out_h, out_w))
    columns_of_taps = torch.stack(found, dim=2).flatten(1, 2)
    return F.conv2d(columns_of_taps, weight.reshape(len(weight), -1, 1, 1), bias, groups=channels // weight.shape[1])


@shown_by_shape
@st.composite
def convolutions(draw):
    """Draw arguments of `deform_conv2d` and its geometry."""
    groups, offset_groups = draw(st.sampled_from([(2, 3), (3, 2), (1, 1), (1, 6)]))
    kernel, stride, padding, dilation = draw(
        st.sampled_from(
            [((3, 2), (2, 1), (1, 0), (2, 1)), ((3, 3), (1, 2), (1, 2), (1, 1)), ((1, 3), (1, 1), (0, 1), (1, 2))]
        )
    )
    size, seed = draw(map_sizes(smallest=5)), draw(seeds)
    out = [(size[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(2)]
    taps = kernel[0] * kernel[1]
    arrays = {
        "x": numbers(seed, 2, 6, *size),
        "offset": 1.5 * numbers(seed + 1, 2, 2 * offset_groups * taps, *out),
        "weight": numbers(seed + 2, 2 * groups, 6 // groups, *kernel),
        "bias": numbers(seed + 3, 2 * groups),
        "mask": numbers(seed + 4, 2, offset_groups * taps, *out),
    }
    if draw(st.booleans()):
        del arrays["mask"]
    return arrays, {"stride": stride, "padding": padding, "dilation": dilation}, numbers(seed + 5, 2, 2 * groups, *out)


@given(convolutions())
def test_deformable_convolution_against_grid_sample(drawn):
    """Output and all gradients agree, with groups, offset groups, strides, padding and dilation."""
    arrays, geometry, cotangent = drawn
    tensors = leaves(arrays)
    y = torch_deform_conv2d(**{"mask": None, **tensors}, **geometry)
    assert_agree(deform_conv2d(**arrays, **geometry), y.detach().numpy(), 1e-11)
    same_gradients(y, cotangent, tensors, deform_conv2d_vjp(cotangent, **arrays, **geometry)._asdict())


@given(convolutions())
def test_deformable_convolution_against_torchvision(drawn):
    ops = pytest.importorskip("torchvision.ops")
    arrays, geometry, cotangent = drawn
    tensors = leaves(arrays)
    x, offset, weight, bias = (tensors[name] for name in ("x", "offset", "weight", "bias"))
    y = ops.deform_conv2d(x, offset, weight, bias, **geometry, mask=tensors.get("mask"))  # x is its `input`
    assert_agree(deform_conv2d(**arrays, **geometry), y.detach().numpy(), 1e-11)
    same_gradients(y, cotangent, tensors, deform_conv2d_vjp(cotangent, **arrays, **geometry)._asdict())


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_zero_offsets_equal_torch_convolution(stride, groups):
    """With zero offsets and a unit mask the result equals torch's convolution, for non-square kernels and geometry."""
    x, weight = numbers(0, 2, 4, 7, 9), numbers(1, 6, 4 // groups, 3, 2)
    geometry = {"stride": stride, "padding": (1, 2), "dilation": (2, 1)}
    expected = F.conv2d(torch.tensor(x), torch.tensor(weight), groups=groups, **geometry).numpy()
    size = expected.shape[2:]
    y = deform_conv2d(x, np.zeros((2, 24, *size)), weight, mask=np.ones((2, 12, *size)), **geometry)
    assert_agree(y, expected, 1e-12)


# ------------------------------------------------------------------------------------------------ modules


def run(config, x, params, cotangent):
    """Return output and gradients by name, including the gradient of the map."""
    attention = ATTENTIONS[type(config)]
    y, trace = attention.forward(x, params, config)
    grad_x, grads = attention.vjp(cotangent, trace, params, config)
    return y, {**flatten(grads), "x": grad_x}


def split(tokens, heads):
    """Reshape (B, C, H, W) to (B, heads, H·W, d)."""
    return tokens.flatten(2).reshape(len(tokens), heads, tokens.shape[1] // heads, -1).transpose(2, 3)


def join(attended, like):
    return attended.transpose(2, 3).reshape(like.shape)


def project(x, module):
    return F.conv2d(x, module["weight"][:, :, None, None], module["bias"])


def torch_multi_head(x, params, config):
    q, k, v = project(x, params["qkv"]).chunk(3, dim=1)
    bias = None
    if config.size is not None:
        height, width = x.shape[2:]
        y, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        y, across = y.flatten(), across.flatten()
        table = params["position_bias"]["table"]
        bias = table[:, y[:, None] - y + height - 1, across[:, None] - across + width - 1]
    heads = (split(part, config.heads) for part in (q, k, v))
    return project(join(F.scaled_dot_product_attention(*heads, attn_mask=bias), x), params["output"])


def torch_pyramid(x, params, config):
    reduced, cell = x, config.reduction
    if cell > 1:
        filled = F.pad(x, (0, -x.shape[3] % cell, 0, -x.shape[2] % cell))
        reduced = F.conv2d(filled, **params["reduction"], stride=cell).permute(0, 2, 3, 1)
        reduced = F.layer_norm(reduced, reduced.shape[-1:], **params["norm"]).permute(0, 3, 1, 2)
    k, v = project(reduced, params["key_value"]).chunk(2, dim=1)
    heads = (split(part, config.heads) for part in (project(x, params["query"]), k, v))
    return project(join(F.scaled_dot_product_attention(*heads), x), params["output"])


def torch_convolution(x, params, config):
    pad = config.kernel_size // 2
    offset = F.conv2d(x, **params["offset"], padding=pad)
    mask = torch.sigmoid(F.conv2d(x, **params["modulation"], padding=pad)) if config.modulated else None
    geometry = {"stride": (1, 1), "padding": (pad, pad), "dilation": (1, 1)}
    return torch_deform_conv2d(x, offset, **params["convolution"], mask=mask, **geometry)


def torch_multi_scale(value, shapes, locations, weights):
    """Compute multi-scale attention as a sum over levels of sampled maps."""
    batch, _, heads, depth = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    total = 0
    for level, (maps, (height, width)) in enumerate(zip(value.split([h * w for h, w in shapes], dim=1), shapes)):
        maps = maps.permute(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B·heads, Q, P, 2)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        of_level = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (sampled * of_level).sum(-1)
    return total.reshape(batch, heads * depth, queries).transpose(1, 2)


def torch_ms_deform(x, params, config):
    batch, dim, height, width = x.shape
    per_point = (batch, height * width, config.heads, 1, config.points)
    y, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    extent = torch.tensor([width, height])
    centers = (torch.stack([across, y], dim=-1).reshape(1, -1, 1, 1, 1, 2) + 0.5) / extent.to(x.dtype)

    def tokens(name):
        return project(x, params[name]).flatten(2).transpose(1, 2)

    locations = centers + tokens("offset").reshape(*per_point, 2) / extent
    depth = dim // config.heads
    value = tokens("value").reshape(batch, -1, config.heads, depth)
    if config.scoring == "query":
        logits = tokens("weights").reshape(per_point)
    else:
        keys = tokens("key").reshape(batch, -1, config.heads, depth)
        channels = []
        for point in range(config.points):  # a single point with weight one samples the key there
            alone = locations[:, :, :, :, point : point + 1]
            ones = torch.ones(alone.shape[:-1], dtype=x.dtype)
            channels.append(torch_multi_scale(keys, [(height, width)], alone, ones))
        sampled = torch.stack(channels, dim=-2).reshape(batch, -1, config.points, config.heads, depth)
        queries = tokens("query").reshape(batch, -1, 1, config.heads, depth)
        logits = (queries * sampled).sum(-1).transpose(2, 3).reshape(per_point) / depth**0.5
    weights = logits.flatten(3).softmax(-1).reshape(per_point)
    summed = torch_multi_scale(value, [(height, width)], locations, weights)
    return project(summed.transpose(1, 2).reshape(x.shape), params["output"])


def torch_neighborhood(x, params, config):
    """Compute attention to the whole map with a mask of the visible keys, for each sub-map."""
    height, width = x.shape[2:]
    kernel, dilation = config.kernel_size, config.dilation
    seen, shift = [], []
    for length in (height, width):
        place = torch.arange(length)
        count = torch.tensor([len(range(i % dilation, length, dilation)) for i in range(length)])
        least = min(kernel, max(length // dilation, 1))
        start = torch.minimum((place // dilation - least // 2).clamp(min=0), count - least)
        step = place // dilation
        inside = (step >= start[:, None]) & (step < start[:, None] + least)
        seen.append(inside & (place % dilation == (place % dilation)[:, None]))
        shift.append((step - step[:, None] + kernel - 1).clamp(0, 2 * kernel - 2))
    visible = seen[0][:, None, :, None] & seen[1][None, :, None, :]
    table = params["neighborhood_bias"]["table"]
    bias = table[:, shift[0][:, None, :, None], shift[1][None, :, None, :]]
    bias = bias.masked_fill(~visible, -torch.inf).reshape(len(table), height * width, -1)
    heads = (split(part, config.heads) for part in project(x, params["qkv"]).chunk(3, dim=1))
    return project(join(F.scaled_dot_product_attention(*heads, attn_mask=bias), x), params["output"])


MODULES = {
    MultiHeadAttentionConfig(6, 3, (5, 7)): torch_multi_head,
    MultiHeadAttentionConfig(6, 2): torch_multi_head,
    PyramidAttentionConfig(6, 3, 1): torch_pyramid,
    PyramidAttentionConfig(6, 3, 2): torch_pyramid,
    NeighborhoodAttentionConfig(6, 3, 3, dilation=1): torch_neighborhood,
    NeighborhoodAttentionConfig(6, 3, 3, dilation=2): torch_neighborhood,
    NeighborhoodAttentionConfig(6, 3, 5, dilation=2): torch_neighborhood,
    DeformableConvConfig(6, 3, groups=2, offset_groups=3): torch_convolution,
    DeformableConvConfig(6, 3, modulated=False): torch_convolution,
    MultiScaleDeformableConfig(6, 3, 4): torch_ms_deform,
    MultiScaleDeformableConfig(6, 3, 4, scoring="dot_product"): torch_ms_deform,
}


@pytest.mark.parametrize("config", MODULES, ids=lambda config: f"{config.kind}-{list(MODULES).index(config)}")
def test_modules_against_torch(config):
    """Output and the gradients of the map and of every parameter equal torch's functions and autograd."""
    rng = np.random.default_rng(0)
    params = random_params(ATTENTIONS[type(config)].shapes(config), rng)
    x, cotangent = rng.standard_normal((2, 6, 5, 7)), rng.standard_normal((2, 6, 5, 7))
    y, grads = run(config, x, params, cotangent)
    tensors = leaves({**flatten(params), "x": x})
    tree = unflatten({name: tensor for name, tensor in tensors.items() if name != "x"})
    expected = MODULES[config](tensors["x"], tree, config)
    assert_agree(y, expected.detach().numpy(), 1e-11)
    same_gradients(expected, cotangent, tensors, grads)


# ------------------------------------------------------------------------------------------------ other packages


@shown_by_shape
@st.composite
def multi_scale_inputs(draw):
    """Draw value, shapes, locations and weights."""
    shapes = draw(st.sampled_from([[(5, 2), (1, 3)], [(3, 5)], [(4, 3), (2, 1), (1, 1)]]))
    heads, rng = draw(st.sampled_from([2, 3])), np.random.default_rng(draw(seeds))
    locations = rng.uniform(-0.3, 1.3, (2, 5, heads, len(shapes), 3, 2))
    value = rng.standard_normal((2, sum(h * w for h, w in shapes), heads, 4))
    return value, shapes, locations, rng.uniform(size=locations.shape[:-1])


def check_multi_scale(function, inputs):
    """Compare a function of the shared signature, and its gradients, with ours."""
    value, shapes, locations, weights = inputs
    tensors = leaves({"value": value, "sampling_locations": locations, "attention_weights": weights})
    y = function(tensors["value"], shapes, tensors["sampling_locations"], tensors["attention_weights"])
    assert_agree(multi_scale_deformable_attention(*inputs), y.detach().numpy(), 1e-12)
    cotangent = numbers(7, *y.shape)
    grads = multi_scale_deformable_attention_vjp(cotangent, *inputs)._asdict()
    same_gradients(y, cotangent, tensors, grads)


@given(multi_scale_inputs())
def test_multi_scale_against_grid_sample(inputs):
    check_multi_scale(torch_multi_scale, inputs)


def test_multi_scale_checker_rejects_other_geometries():
    """Rejected: locations as (y, x), corners instead of edges at 0 and 1, repeated borders instead of zeros."""
    rng = np.random.default_rng(0)
    locations = rng.uniform(-0.3, 1.3, (2, 5, 2, 1, 3, 2))
    inputs = (rng.standard_normal((2, 15, 2, 4)), [(3, 5)], locations, rng.uniform(size=locations.shape[:-1]))
    check_multi_scale(torch_multi_scale, inputs)
    wrong = (
        lambda value, shapes, places, weights: torch_multi_scale(value, shapes, places.flip(-1), weights),
        lambda value, shapes, places, weights: torch_multi_scale(value, shapes, places.clamp(0, 1), weights),
        lambda value, shapes, places, weights: torch_multi_scale(value, shapes, places * 0.8 + 0.1, weights),
    )
    for function in wrong:
        with pytest.raises(AssertionError):
            check_multi_scale(function, inputs)


@settings(max_examples=10)
@given(multi_scale_inputs())
def test_multi_scale_against_transformers(inputs):
    """The function of Mask2Former in transformers gives the same output and gradients."""
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    check_multi_scale(module.multi_scale_deformable_attention, inputs)


@settings(max_examples=10)
@given(multi_scale_inputs())
def test_multi_scale_against_transformers_deformable_detr(inputs):
    """The function of Deformable DETR in transformers gives the same output."""
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    attention = module.MultiScaleDeformableAttention()

    def function(value, shapes, locations, weights):
        sizes = torch.tensor(shapes)
        first = torch.cat([torch.zeros(1, dtype=torch.long), sizes.prod(1).cumsum(0)[:-1]])
        return attention(value, sizes, shapes, first, locations, weights, 64)

    check_multi_scale(function, inputs)


def test_module_against_transformers_deformable_detr():
    """The attention module of Deformable DETR gives the same output on two levels, with boxes and with points."""
    detr = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    transformers = pytest.importorskip("transformers")
    settings_of = transformers.DeformableDetrConfig(d_model=12, num_feature_levels=2)
    theirs = detr.DeformableDetrMultiscaleDeformableAttention(settings_of, num_heads=3, n_points=4).double()
    config = MultiScaleDeformableConfig(12, 3, points=4, levels=2)
    params = random_params(multi_scale_deformable_shapes(config), np.random.default_rng(0))
    places = {
        "offset": "sampling_offsets",
        "weights": "attention_weights",
        "value": "value_proj",
        "output": "output_proj",
    }
    state = {f"{places[n.split('.')[0]]}.{n.split('.')[1]}": torch.tensor(a) for n, a in flatten(params).items()}
    theirs.load_state_dict(state)
    shapes = [(5, 3), (2, 4)]
    query, value = numbers(1, 2, 6, 12), numbers(2, 2, 23, 12)
    for last in (2, 4):
        references = np.random.default_rng(3).uniform(0.1, 0.9, (2, 6, 2, last))
        y, _ = multi_scale_deformable(query, value, references, shapes, params, config)
        sizes = torch.tensor(shapes)
        expected, _ = theirs(
            hidden_states=torch.tensor(query),
            encoder_hidden_states=torch.tensor(value),
            reference_points=torch.tensor(references),
            spatial_shapes=sizes,
            spatial_shapes_list=shapes,
            level_start_index=torch.tensor([0, 15]),
        )
        assert_agree(y, expected.detach().numpy(), 1e-12, f"references of {last}")


@pytest.mark.filterwarnings("ignore")  # the unfused implementation, which runs on a CPU
@pytest.mark.parametrize(
    ("size", "kernel", "dilation"), [((7, 9), 3, 1), ((7, 9), 3, 2), ((11, 6), 3, 2), ((13, 15), 5, 2)]
)
def test_dilated_neighborhoods_against_natten(size, kernel, dilation):
    """NATTEN gives the same output in float32, its only dtype on a CPU, without a relative bias."""
    natten = pytest.importorskip("natten")
    config = NeighborhoodAttentionConfig(64, 2, kernel, dilation=dilation)
    params = random_params(ATTENTIONS[NeighborhoodAttentionConfig].shapes(config), np.random.default_rng(0), np.float32)
    params["neighborhood_bias"]["table"][:] = 0
    x = numbers(0, 1, 64, *size, dtype=np.float32)
    _, trace = ATTENTIONS[NeighborhoodAttentionConfig].forward(x, params, config)
    qkv = project(torch.tensor(x), {name: torch.tensor(leaf) for name, leaf in params["qkv"].items()})
    q, k, v = (part.reshape(1, 2, 32, *size).permute(0, 3, 4, 1, 2).contiguous() for part in qkv.chunk(3, dim=1))
    attended = natten.na2d(q, k, v, kernel_size=kernel, dilation=dilation)
    assert_agree(attended.permute(0, 3, 4, 1, 2).reshape(1, 64, *size).numpy(), trace.merged, 1e-5)
