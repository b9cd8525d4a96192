"""Transformer blocks and whole backbones at any size, and their cost."""

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.backbones import RELEASES, tiny, tiny_params
from helpers.counting import count_multiplications, counting_array
from helpers.layers import random_params, run_oracle
from hypothesis import given
from hypothesis import strategies as st
from oracle import basic as loops
from strategies import layer_cases, map_sizes, numbers, seeds

import dat_ref._checks
import dat_ref.backbone
import dat_ref.block
import dat_ref.layer
import dat_ref.ops.offsets
import dat_ref.peers.neighborhood
import dat_ref.peers.window
from dat_ref import (
    DAT,
    BiasKind,
    BlockConfig,
    Convention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
    config,
    init_params,
)
from dat_ref.backbone import dat_macs, dat_shapes, embed, embed_macs
from dat_ref.block import ATTENTIONS, MLPTrace, block, block_macs, block_shapes, mlp
from dat_ref.layer import deformable_layer, deformable_layer_macs
from dat_ref.ops import basic
from dat_ref.ops.grid import key_grid_size
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_macs
from dat_ref.params import flatten

SAME = ((1, 1), (1, 1))
MLPS = ["linear", "depthwise", "depthwise_residual"]


# ------------------------------------------------------------------------------------------------ basic operations


@given(st.integers(1, 4), st.integers(1, 3), st.tuples(*[st.integers(0, 2)] * 4), map_sizes(largest=5), seeds)
def test_convolutions_equal_scalar_loops(kernel, stride, pads, size, seed):
    """Both convolutions equal the loops for any kernel, stride and one-sided padding."""
    padding = ((pads[0], pads[1]), (pads[2], pads[3]))
    if min(basic.conv_size(size, kernel, stride, padding)) < 1:
        return
    x, options = numbers(seed, 2, 3, *size), {"stride": stride, "padding": padding}
    weight, bias = numbers(seed + 1, 5, 3, kernel, kernel), numbers(seed + 2, 5)
    assert_agree(basic.conv2d(x, weight, bias, **options), loops.conv2d(x, weight, bias, **options), 1e-12)
    assert_agree(basic.conv2d(x, weight, **options), loops.conv2d(x, weight, **options), 1e-12)
    weight, bias = numbers(seed + 3, 3, 1, kernel, kernel), numbers(seed + 4, 3)
    expected = loops.conv2d(x, weight, bias, **options, groups=3)
    assert_agree(basic.depthwise_conv2d(x, weight, bias, **options), expected, 1e-12)


@given(map_sizes(largest=4), seeds)
def test_linear_norm_and_gelu_equal_scalar_loops(size, seed):
    """Linear, layer norm and GELU equal the loops."""
    x, weight, bias = numbers(seed, 2, 3, *size), numbers(seed + 1, 5, 3), numbers(seed + 2, 5)
    assert_agree(basic.linear(x, weight, bias), loops.linear(x, weight, bias), 1e-13)
    scale, shift = numbers(seed + 3, 3), numbers(seed + 4, 3)
    assert_agree(basic.layer_norm(x, scale, shift), loops.layer_norm(x, scale, shift), 1e-11)
    assert_agree(basic.gelu(4 * x), loops.gelu(4 * x), 1e-13)


# ------------------------------------------------------------------------------------------------ blocks


def oracle_block(x, params, block_config):
    """Return the output of a block with deformable attention, computed by the scalar loops."""
    if block_config.local_perception:
        x = x + loops.conv2d(x, **params["local_perception"], padding=SAME, groups=x.shape[1])
    scale1, scale2 = (
        params[name]["weight"][:, None, None] if name in params else 1.0 for name in ("layer_scale1", "layer_scale2")
    )
    attn_out = run_oracle(loops.layer_norm(x, **params["norm1"]), params["attention"], block_config.attention).output
    x = x + scale1 * attn_out
    hidden = loops.linear(loops.layer_norm(x, **params["norm2"]), **params["mlp"]["linear1"])
    if block_config.mlp != "linear":
        mixed = loops.conv2d(hidden, **params["mlp"]["depthwise"], padding=SAME, groups=hidden.shape[1])
        hidden = hidden + mixed if block_config.mlp == "depthwise_residual" else mixed
    return x + scale2 * loops.linear(loops.gelu(hidden), **params["mlp"]["linear2"])


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize("extras", [False, True])
def test_block_equals_scalar_loops(kind, extras):
    """Local perception, norms, residual branches, layer scale and all three MLPs equal the equations."""
    attention = DeformableAttentionConfig(4, 2, 2, kernel_size=3, size=(3, 5), convention=Convention.DATPP2023)
    block_config = BlockConfig(attention, kind, 3, local_perception=extras, layer_scale=0.1 if extras else None)
    params = random_params(block_shapes(block_config), np.random.default_rng(1))
    x = numbers(0, 2, 4, 3, 5)
    y, trace = block(x, params, block_config)
    assert_agree(y, oracle_block(x, params, block_config), 1e-11)
    assert (trace.lpu_out is x) is not extras
    assert isinstance(trace.mlp, MLPTrace)


def test_block_with_silent_branches_is_the_identity():
    """With zero output layers a block returns its input."""
    block_config = BlockConfig(WindowAttentionConfig(4, 2, 3))
    params = random_params(block_shapes(block_config), np.random.default_rng(1))
    for module in (params["attention"]["output"], params["mlp"]["linear2"]):
        module["weight"][:], module["bias"][:] = 0, 0
    x = numbers(0, 2, 4, 3, 5)
    np.testing.assert_array_equal(block(x, params, block_config)[0], x)


# ------------------------------------------------------------------------------------------------ backbones


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", [(64, 96), (37, 51), (33, 128), (70, 33)], ids=str)
def test_any_image_size(release, size):
    """Odd, non-square images, and maps smaller than a window: four finite maps of ⌈H/4⌉ … ⌈H/32⌉, and logits."""
    model = DAT(tiny(release), tiny_params(tiny(release), 0))
    x = numbers(0, 2, 3, *size)
    features = model.forward_intermediates(x)
    assert [f.shape for f in features] == [
        (2, dim, -(-size[0] // r), -(-size[1] // r)) for dim, r in zip((4, 6, 8, 12), (4, 8, 16, 32))
    ]
    logits = model(x)
    assert logits.shape == (2, 5)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", dat_ref.presets.PRESETS)
def test_every_preset_has_keys_for_every_small_image(name):
    """At least one key in every deformable layer, for images of 1 to 40 pixels."""
    config = dat_ref.config(name)
    for side in range(1, 41):
        for blocks, reduction in zip(config.stages, config.reductions, strict=True):
            size = (math.ceil(side / reduction), math.ceil(40 / reduction))
            for each in (part.attention for part in blocks):
                if isinstance(each, DeformableAttentionConfig):
                    keys = key_grid_size(size, each.kernel_size, each.stride, each.convention)
                    assert keys == tuple(math.ceil(length / each.stride) for length in size)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", [(1, 1), (7, 40), (28, 5), (29, 29)])
def test_small_images(release, size):
    """Images smaller than the strides 8, 4, 2, 1 of DAT++: finite logits, the same in NumPy and torch."""
    strides = {"strides": [8, 4, 2, 1], "ksizes": [9, 7, 5, 3]} if release == "datpp2023" else {}
    config = tiny(release, **strides)
    params = tiny_params(config, 0)
    x = numbers(0, 2, 3, *size)
    logits = DAT(config, params)(x)
    assert np.isfinite(logits).all()
    torch = pytest.importorskip("torch")
    module = importlib.import_module("dat_ref.torch").DAT(config).double().eval()
    module.load_numpy(params)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), logits, atol=1e-9)


@pytest.mark.parametrize("release", RELEASES)
def test_trace_walk_and_intermediates_agree(release):
    """model(x), the trace, walk, forward_intermediates and vjp give the same results."""
    model = DAT(tiny(release), tiny_params(tiny(release), 0))
    x = numbers(0, 1, 3, 64, 40)
    logits, trace = model(x, return_trace=True)
    np.testing.assert_array_equal(logits, model(x))
    np.testing.assert_array_equal(logits, model.vjp(x)[0])
    for stage, features in zip(trace.stages, model.forward_intermediates(x), strict=True):
        np.testing.assert_array_equal(stage.output, features)
    steps = list(model.walk(x))
    assert [(step.stage, step.block) for step in steps] == [
        (stage, index) for stage, blocks in enumerate(model.config.stages) for index in range(len(blocks))
    ]
    assert_agree(model.classify(model.pool(steps[-1].output)), logits, 1e-14)
    assert_agree(trace.pooled, trace.normed.mean(axis=(2, 3)), 1e-15)


@pytest.mark.parametrize("release", RELEASES)
def test_headless_backbone_returns_pooled_features(release):
    """With num_classes=0 there is no head, and the output is the pooled features."""
    headless = tiny(release, num_classes=0)
    params = tiny_params(headless, 0)
    assert "head" not in params
    y, trace = DAT(headless, params)(numbers(0, 2, 3, 64, 33), return_trace=True)
    np.testing.assert_array_equal(y, trace.pooled)
    assert y.shape == (2, 12)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_every_position_is_classified_by_the_same_head(release, num_classes):
    """global_pool="": the head is linear, so the mean of the logits equals the logits of the averaged map."""
    averaged = tiny(release, num_classes=num_classes)
    params, x = tiny_params(averaged, 0), numbers(0, 2, 3, 64, 40)
    dense = DAT(replace(averaged, global_pool=""), params)
    logits, trace = dense(x, return_trace=True)
    assert trace.pooled is trace.normed
    assert logits.shape == (2, num_classes or 12, 2, 2)
    assert_agree(logits.mean(axis=(2, 3)), DAT(averaged, params)(x), 1e-13)
    assert dense(x[:0]).shape == (0, num_classes or 12, 2, 2)


@pytest.mark.parametrize("release", RELEASES)
def test_backbone_precision_and_empty_batch(release):
    """float32 input gives float32 outputs and gradients; an empty batch gives empty logits."""
    backbone = tiny(release)
    model = DAT(backbone, tiny_params(backbone, 0, np.float32))
    logits, pullback = model.vjp(numbers(0, 1, 3, 64, 40, dtype=np.float32))
    grad_x, grads = pullback(np.ones_like(logits))
    assert logits.dtype == grad_x.dtype == np.float32
    assert {grad.dtype for grad in flatten(grads).values()} == {np.dtype(np.float32)}
    assert model(np.zeros((0, 3, 64, 40), np.float32)).shape == (0, 5)


@pytest.mark.parametrize("release", RELEASES)
def test_nan_pixel_reaches_the_logits(release):
    """A NaN pixel makes its image's logits NaN, and no other image's."""
    x = numbers(0, 2, 3, 64, 40)
    x[1, 0, 63, 39] = np.nan
    logits = DAT(tiny(release), tiny_params(tiny(release), 0))(x)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


def test_images_are_padded_with_zeros():
    """An image that is not a whole number of patches equals the image padded with zeros at bottom and right."""
    model = DAT(tiny("cvpr2022"), tiny_params(tiny("cvpr2022"), 0))
    x = numbers(0, 1, 3, 62, 94)
    filled = np.pad(x, ((0, 0), (0, 0), (0, 2), (0, 2)))
    np.testing.assert_array_equal(model(x), model(filled))


def test_resized_tables():
    """`resized` changes the biases that depend on the image size, and nothing else."""
    resized = config("dat_tiny").resized((384, 320))
    assert [blocks[1].attention.size for blocks in resized.stages[2:]] == [(24, 20), (12, 10)]
    assert resized.resized((224, 224)) == config("dat_tiny")


# ------------------------------------------------------------------------------------------------ cost

C, H, W, K, R = 6, 5, 7, 3, 2


def test_costs_of_basic_operations_are_counts(monkeypatch):
    """The formulas equal the multiplications of the code, run on elements that count them."""
    for module in (dat_ref._checks, basic):  # the elements are Python objects, which the operations refuse
        monkeypatch.setattr(module, "check_dtype", lambda *args, **options: None)
    x = counting_array(numbers(0, 2, C, H, W))
    weight = numbers(1, 4, C)
    assert count_multiplications(lambda: basic.linear(x, weight)) == basic.linear_macs(2 * H * W, C, 4)
    padding = ((1, 1), (1, 1))
    out = np.prod(basic.conv_size((H, W), K, R, padding))
    options = {"stride": R, "padding": padding}
    counted = count_multiplications(lambda: basic.conv2d(x, counting_array(numbers(1, 4, C, K, K)), **options))
    assert counted == basic.conv2d_macs(2 * out, C, 4, K)
    counted = count_multiplications(
        lambda: basic.depthwise_conv2d(x, counting_array(numbers(1, C, 1, K, K)), **options)
    )
    assert counted == basic.depthwise_conv2d_macs(2 * out, C, K)
    points = np.random.default_rng(0).uniform(0, 4, (2, 9, 2))
    assert count_multiplications(lambda: bilinear_sample(x, points)) == bilinear_sample_macs(2 * 9, C)


def test_the_papers_worked_example():
    """For 14 × 14, 49 keys, 384 channels, k = 5: 79 629 312 multiply-adds, 508 032 of them in the offset network."""
    layer = DeformableAttentionConfig(384, 12, 3, stride=2, kernel_size=5, bias=BiasKind.NONE)
    macs = deformable_layer_macs(1, (14, 14), layer)
    assert macs["attention"] + macs["query and output"] + macs["key and value"] == 79_629_312
    assert macs["offset network"] == 508_032
    pixels, samples, channels = 196, 49, 384
    formula = 2 * pixels * samples * channels + 2 * pixels * channels**2 + 2 * samples * channels**2
    assert formula == 79_629_312
    assert (5**2 + 2) * samples * channels == 508_032


class Ledger:
    """Counts multiply-adds from the shapes that the operations of a forward pass are called with."""

    MODULES = (
        dat_ref.layer,
        dat_ref.block,
        dat_ref.backbone,
        dat_ref.ops.offsets,
        dat_ref.ops.bias,
        dat_ref.peers.window,
        dat_ref.peers.neighborhood,
    )

    def __init__(self, monkeypatch):
        self.total = 0
        for name, cost in (
            ("linear", lambda y, x, weight, *rest: y.size * weight.shape[1]),
            ("conv2d", lambda y, x, weight, *rest: y.size * weight[0].size),
            ("depthwise_conv2d", lambda y, x, weight, *rest: y.size * weight[0].size),
            ("attend", lambda y, q, k, v, *rest: 2 * int(np.prod(q.shape)) * k.shape[-2]),
            ("bilinear_sample", lambda y, x, points: 4 * y.size),
        ):
            for module in self.MODULES:
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, self.counted(getattr(module, name), cost))

    def counted(self, operation, cost):
        def run(*args, **kwargs):
            result = operation(*args, **kwargs)
            named = {name: kwargs[name] for name in ("weight",) if name in kwargs}
            self.total += int(cost(result[0] if isinstance(result, tuple) else result, *args, *named.values()))
            return result

        return run


@given(layer_cases(bounds=[b for b in OffsetBound if b is not OffsetBound.NONE]))
def test_layer_cost_is_what_a_pass_multiplies(case):
    """deformable_layer_macs equals the count over the operations of a forward pass, for every bias and stride."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        ledger = Ledger(monkeypatch)
        deformable_layer(case.x(), case.params(), case.config)
    assert sum(deformable_layer_macs(case.batch, case.size, case.config).values()) == ledger.total


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", [(64, 96), (37, 51)], ids=str)
def test_backbone_cost_is_what_a_pass_multiplies(release, size, monkeypatch):
    """dat_macs equals the count over the operations of a forward pass, at any size."""
    model = DAT(tiny(release), tiny_params(tiny(release), 0))
    ledger = Ledger(monkeypatch)
    model(numbers(0, 2, 3, *size))
    assert ledger.total == dat_macs(2, size, model.config)


def test_costs_of_windows_and_neighborhoods():
    """4 HW C² for the projections; 2 w² HW C in windows, 2 K² HW C in neighborhoods."""
    window = WindowAttentionConfig(C, 2, 5)
    assert ATTENTIONS[WindowAttentionConfig].macs(3, (10, 15), window) == 3 * 150 * C * (4 * C + 2 * 25)
    around = NeighborhoodAttentionConfig(C, 2, 3)
    assert ATTENTIONS[NeighborhoodAttentionConfig].macs(3, (10, 15), around) == 3 * 150 * C * (4 * C + 2 * 9)


def test_cost_of_dat_tiny_adds_up():
    """At 224² the multiply-adds of dat_tiny are the sum over embeddings, blocks and head; the paper prints 4.6 G."""
    tiny_config = config("dat_tiny")
    dims, total, size = (96, 192, 384, 768), 0, 56
    total += 56 * 56 * 3 * 96 * 16
    for stage, depth in enumerate((2, 2, 6, 2)):
        pixels, dim = size * size, dims[stage]
        mlp_macs = 2 * pixels * dim * 4 * dim
        windows = 4 * pixels * dim**2 + 2 * 49 * pixels * dim
        kernel = (9, 7, 5, 3)[stage]
        heads = (3, 6, 12, 24)[stage]
        deformable = 2 * pixels * pixels * dim + 4 * pixels * dim**2 + (kernel**2 + 2) * pixels * dim
        deformable += 4 * pixels * dim + 4 * pixels * pixels * heads  # sampling and bias
        moving = depth // 2 if stage >= 2 else 0
        total += depth * mlp_macs + (depth - moving) * windows + moving * deformable
        if stage < 3:
            size //= 2
            total += size * size * dim * dims[stage + 1] * 4
    total += 768 * 1000
    assert dat_macs(1, (224, 224), tiny_config) == total
    assert 4.4e9 < total < 4.7e9


def test_embedding_cost_and_size():
    """The cost of an embedding is its convolution's; the size of its output map is returned too."""
    assert embed_macs(2, (37, 51), 3, 8, 4) == (2 * 10 * 13 * 8 * 3 * 16, (10, 13))
    assert embed_macs(1, (37, 51), 3, 8, 3) == (19 * 26 * 8 * 3 * 9, (19, 26))
    part = dat_shapes(tiny("datpp2023"))["patch_embedding"][0]
    params = random_params(part, np.random.default_rng(0))
    assert embed(numbers(0, 1, 3, 37, 51), **params)[0].shape == (1, 2, 19, 26)


def test_block_cost_adds_up():
    """The cost of a block is the sum over attention, MLP and depthwise convolutions."""
    attention = WindowAttentionConfig(C, 2, 5)
    plain = block_macs(1, (5, 5), BlockConfig(attention))
    assert plain == ATTENTIONS[WindowAttentionConfig].macs(1, (5, 5), attention) + 2 * 25 * C * 4 * C
    assert block_macs(1, (5, 5), BlockConfig(attention, "depthwise", local_perception=True)) - plain == 25 * 9 * 5 * C


def test_mlp_kinds_differ():
    """The three kinds of MLP are different functions of the same parameters."""
    shapes = {"linear1": {"weight": (8, 4), "bias": (8,)}, "linear2": {"weight": (4, 8), "bias": (4,)}}
    shapes["depthwise"] = {"weight": (8, 1, 3, 3), "bias": (8,)}
    params = random_params(shapes, np.random.default_rng(0))
    results = [mlp(numbers(0, 1, 4, 3, 5), params, kind)[0] for kind in MLPS]
    assert min(np.abs(results[i] - results[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_seeded_weights_run():
    """A backbone with initial weights gives finite logits."""
    backbone = tiny("datpp2023")
    assert np.isfinite(DAT(backbone, init_params(backbone, 0))(numbers(0, 1, 3, 64, 64, dtype=np.float32))).all()
