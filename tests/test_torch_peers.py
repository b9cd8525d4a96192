"""Peers as torch modules: against NumPy, the released modules and other packages; in a backbone; mutants."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.backbones import tiny, tiny_params
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import map_sizes, numbers, seeds

torch = pytest.importorskip("torch")
from helpers.tensors import assert_close, assert_trees_close, rejects, tensor  # noqa: E402
from helpers.torch_peers import CONFIGS, ScaledGradient, assert_peer, build_peer  # noqa: E402

import dat_ref  # noqa: E402
import dat_ref.torch as dt  # noqa: E402
from dat_ref import (  # noqa: E402
    DAT,
    ConfigError,
    Convention,
    NeighborhoodAttentionConfig,
    init_params,
)
from dat_ref.backbone import dat_shapes  # noqa: E402
from dat_ref.complexity import torch_counter  # noqa: E402
from dat_ref.complexity.formulas import attention_terms, total  # noqa: E402
from dat_ref.params import flatten  # noqa: E402
from dat_ref.peers import (  # noqa: E402
    ATTENTIONS,
    REPLACEMENTS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    receptive_field,
    replace_attention,
)
from dat_ref.torch import functional  # noqa: E402
from dat_ref.torch.block import attention_module  # noqa: E402
from dat_ref.torch.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from dat_ref.torch.functional import deform_conv as torch_functional_conv  # noqa: E402
from dat_ref.torch.peers import dat_dcn as torch_dat_dcn  # noqa: E402
from dat_ref.torch.peers import deform_conv as torch_deform_conv  # noqa: E402
from dat_ref.torch.peers import ms_deform_attn as torch_ms_deform_attn  # noqa: E402
from dat_ref.torch.peers import per_query as torch_per_query  # noqa: E402

each_peer = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# ------------------------------------------------------------------------------------------------ against NumPy


@each_peer
@settings(max_examples=8)
@given(size=map_sizes(smallest=2), batch=st.sampled_from([1, 2]), seed=seeds)
def test_module_equals_the_spec(config, size, batch, seed):
    """Outputs, intermediates and gradients equal the spec on odd maps of unequal sides."""
    assert_peer(config, size, batch, seed)


@each_peer
def test_one_row_one_column_and_no_image(config):
    for size, batch in [((1, 5), 2), ((7, 1), 1), ((3, 4), 0)]:
        if getattr(config, "convention", None) is Convention.DATPP2023 and 1 in size:
            with pytest.raises(ConfigError, match="one row or column"):
                assert_module_shape(config, size)
            continue
        assert_peer(config, size, batch)


SAMPLING = {name: config for name, config in CONFIGS.items() if hasattr(attention_module(config), "sampler")}


def test_every_peer_that_samples_has_a_choice_of_samplers():
    assert {type(config) for config in SAMPLING.values()} == {
        DeformableConvConfig,
        MultiScaleDeformableConfig,
        PerQueryAttentionConfig,
        DATDCNAttentionConfig,
    }
    model = dt.DAT(replace_attention(tiny("cvpr2022"), "ms_deform"))
    model.set_backend(sampler="grid_sample")
    chosen = [module.sampler for module in model.modules() if hasattr(module, "sampler")]
    assert chosen
    assert set(chosen) == {"grid_sample"}


@pytest.mark.parametrize("config", SAMPLING.values(), ids=SAMPLING)
@settings(max_examples=5)
@given(size=map_sizes(smallest=2), batch=st.sampled_from([0, 2]), seed=seeds)
def test_the_other_sampler_equals_the_spec_too(config, size, batch, seed):
    assert_peer(config, size, batch, seed, sampler="grid_sample")


def assert_module_shape(config, size):
    assert attention_module(config)(torch.zeros(2, config.dim, *size)).shape == (2, config.dim, *size)


@each_peer
def test_names_and_initialization_are_those_of_the_spec(config):
    """Names, shapes and magnitudes equal the spec; so do the values where a rule determines them."""
    wide = replace(config, dim=48)
    module = attention_module(wide)
    shapes = flatten(ATTENTIONS[type(wide)].shapes(wide))
    assert {name: tuple(leaf.shape) for name, leaf in module.state_dict().items()} == shapes
    first, second = (flatten(init_params(wide, seed)) for seed in (0, 1))
    for name, leaf in module.state_dict().items():
        if np.array_equal(first[name], second[name]):
            assert_close(leaf, first[name], 1e-6, name)
        elif leaf.numel() > 100:
            assert leaf.std().item() == pytest.approx(first[name].std(), rel=0.2), name
            assert leaf.abs().max().item() <= 1.2 * np.abs(first[name]).max() or name.endswith("table"), name


@each_peer
def test_receptive_field_of_a_torch_trace(config):
    """The receptive field from a torch trace equals the one from a NumPy trace."""
    module, params = build_peer(config)
    x = numbers(1, 2, config.dim, 5, 7)
    _, trace = ATTENTIONS[type(config)].forward(x, params, config)
    _, ours = module(torch.from_numpy(x), return_trace=True)
    seen = receptive_field((2, 4), (5, 7), config, dt.as_numpy(ours), image=1)
    np.testing.assert_array_equal(seen, receptive_field((2, 4), (5, 7), config, trace, image=1))


@each_peer
def test_no_tensor_is_made_on_another_device(config):
    """On the meta device an operation with a CPU tensor would raise an error."""
    module = attention_module(config).to("meta")
    x = torch.zeros(2, config.dim, 5, 7, device="meta")
    assert module(x).shape == module(x, return_trace=True)[0].shape == x.shape


@each_peer
def test_matrix_products_are_those_of_the_formula(config):
    """The count of torch on the written-out form equals the closed form as integers."""
    if isinstance(config, NeighborhoodAttentionConfig):
        config = replace(config, small_map="shrink")  # the module does not project the outputs of padding
    module = attention_module(config)
    for batch, size in [(1, (6, 9)), (2, (5, 7))]:
        x = torch.zeros(batch, config.dim, *size)
        counted = torch_counter.torch_macs(lambda x=x: module(x, return_trace=True))
        assert counted == total(attention_terms(batch, size, config)).products


@each_peer
def test_one_graph_without_breaks(config):
    module, _ = build_peer(config, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=False)
    x = torch.randn(2, config.dim, 4, 5, requires_grad=True)
    y = compiled(x)
    assert_close(y, module(x).detach().numpy(), 1e-5)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.compiler.reset()


@each_peer
def test_layouts_and_low_precision(config):
    """channels_last and strided maps give the same results; geometry is float32 under autocast and in bfloat16."""
    module, _ = build_peer(config, dtype=torch.float32)
    x = torch.randn(2, config.dim, 5, 7)
    y, expected = module(x), None
    strided = torch.empty(2, 2 * config.dim, 7, 5)[:, ::2].transpose(2, 3).copy_(x)
    for same in (x.contiguous(memory_format=torch.channels_last), strided):
        assert_close(module(same), y.detach().numpy(), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        expected, trace = module(x, return_trace=True)
    assert rms(expected - y) < 0.1 * rms(y)
    for traced in (trace, module.bfloat16()(x.bfloat16(), return_trace=True)[1]):
        for name in ("points", "points_px", "offsets", "locations", "offset"):
            if hasattr(traced, name):
                assert getattr(traced, name).dtype is torch.float32, name


def rms(x):
    return x.detach().float().square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------ in a backbone


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_create_model_with_every_kind(kind):
    """Every kind runs forward and backward, gives features at another image size, and has the names of the spec."""
    match = "macs" if kind == "deform_conv" else "keys"  # as many taps as DAT has keys would need a 13 × 13 kernel
    model = dt.create_model("dat_tiny", attention=kind, match=match, features_only=True)
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(each.shape) for each in maps] == [
        (1, dim, 64 // reduction, 96 // reduction)
        for dim, reduction in zip(model.feature_info.channels(), model.feature_info.reduction())
    ]
    sum(each.mean() for each in maps).backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in model.parameters())
    with torch.device("meta"):
        whole = dt.create_model("dat_tiny", attention=kind, match=match)
    config = replace_attention(dat_ref.config("dat_tiny"), kind, match)
    assert whole.config == config
    assert {name: tuple(leaf.shape) for name, leaf in whole.state_dict().items()} == flatten(dat_shapes(config))
    assert not any(isinstance(module, dt.DeformableAttention) for module in whole.modules())


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("release", ["cvpr2022", "datpp2023"])
def test_swapped_backbone_equals_the_spec(kind, release):
    """Logits and all gradients equal the spec in float64."""
    config = replace_attention(tiny(release), kind, "macs" if kind == "deform_conv" else "keys")
    params = tiny_params(config, 0)
    x, cotangent = numbers(1, 2, 3, 64, 96), numbers(2, 2, 5)
    y, pullback = DAT(config, params).vjp(x)
    model = dt.DAT(config).double()
    model.load_numpy(params)
    leaf = tensor(x)
    logits = model(leaf)
    assert_close(logits, y)
    logits.backward(torch.from_numpy(cotangent))
    grad_x, grad_params = pullback(cotangent)
    assert_close(leaf.grad, grad_x)
    assert_trees_close(model.to_numpy(grad=True), grad_params, 1e-8)
    assert_close(model(leaf, return_trace=True)[0], y)


def test_create_model_names_near_kinds_and_takes_other_options():
    with pytest.raises(ConfigError, match=r"attention: unknown kind 'pyramyd'; did you mean pyramid"):
        dt.create_model("dat_tiny", attention="pyramyd")
    with pytest.raises(ConfigError, match="match"):
        dt.create_model("dat_tiny", attention="pyramid", match="time")
    with torch.device("meta"):
        model = dt.create_model("dat_pp_tiny", attention="multi_head", img_size=(96, 160), attn_drop_rate=0.1)
    attention = model.config.stages[3][0].attention
    assert (attention.size, attention.attention_dropout) == ((3, 5), 0.1)


def test_checkpoint_of_a_swapped_backbone(tmp_path):
    """A checkpoint with our names loads again; a released file is rejected."""
    config = replace_attention(tiny("cvpr2022"), "dat_dcn")
    models = [dt.DAT(config) for _ in range(2)]
    save_checkpoint(models[0], tmp_path / "weights.npz")
    load_checkpoint(models[1], tmp_path / "weights.npz")
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(models[0](x), models[1](x))
    with pytest.raises(ConfigError, match="an attention of the released backbones"):
        save_checkpoint(models[0], tmp_path / "weights.pth", official=True)


def test_zero_offset_start_reaches_the_offset_network():
    config = CONFIGS["per_query"]
    assert not attention_module(config, init="zero_offset", backend="blockwise").offset_network.pointwise.weight.any()
    assert attention_module(config).offset_network.pointwise.weight.any()


# ------------------------------------------------------------------------------------------------ mutants


WRONG = {
    "offsets as (dx, dy)": (
        "deform_conv",
        torch_functional_conv,
        "deform_points",
        lambda right: lambda offset, sliding: right(offset, sliding).flip(-1),
    ),
    "half a pixel": (
        "ms_deform",
        torch_ms_deform_attn,
        "location_pixels",
        lambda right: lambda *args: right(*args) + 0.5,
    ),
    "gradient of points": (
        "ms_deform_dot",
        torch_ms_deform_attn,
        "location_pixels",
        lambda right: lambda *args: ScaledGradient.apply(right(*args)),
    ),
    "border held": (
        "dat_dcn",
        torch_dat_dcn,
        "sample_levels",
        lambda right: (
            lambda value, points, shapes, **options: right(
                value, points.clamp(0, min(shapes[0]) - 1), shapes, **options
            )
        ),
    ),
    "groups in the wrong order": (
        "per_query",
        torch_per_query,
        "attend_at_points",
        lambda right: lambda query, x, points, *rest, **options: right(query, x, points.flip(1), *rest, **options),
    ),
    "offsets of convolution in half pixels": (
        "deform_conv_v1",
        torch_deform_conv.WideConv2d,
        "forward",
        lambda right: lambda *args: right(*args) / 2,
    ),
    "scale missing": ("multi_head", functional, "attend", lambda right: lambda q, k, v, b, scale: right(q, k, v, b, 1)),
    "undilated": (
        "dilated_2",
        functional,
        "neighborhood_attention",
        lambda right: lambda *args, dilation, **rest: right(*args, **rest),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_checker_rejects_wrong_peers(name, monkeypatch):
    kind, module, function, wrong = WRONG[name]
    assert_peer(CONFIGS[kind], (5, 7))
    monkeypatch.setattr(module, function, wrong(getattr(module, function)))
    assert rejects(lambda: assert_peer(CONFIGS[kind], (5, 7)))
