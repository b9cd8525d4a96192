"""Backbones in torch: against the NumPy and released ones, and features that users of timm expect."""

import re
from dataclasses import replace

import numpy as np
import pytest
from helpers.golden import golden_names, load_golden, official_state_dicts, under
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from helpers.tensors import assert_close, assert_trees_close, rejects, seeds, tensor  # noqa: E402

import dat_ref  # noqa: E402
import dat_ref.torch as dt  # noqa: E402
from dat_ref import DATConfig, official  # noqa: E402
from dat_ref.backbone import dat_shapes  # noqa: E402
from dat_ref.official import backbone_names  # noqa: E402
from dat_ref.params import flatten, map_tree  # noqa: E402
from dat_ref.torch.features import FeatureInfo  # noqa: E402

RELEASES = ["model22_mini", "model23_mini"]


def mini(name: str, **changes) -> DATConfig:
    """Return the small backbone of a fixture, with fields of its configuration changed."""
    meta, _ = load_golden(name)
    return replace(DATConfig.from_official(meta["cfg"], release=meta["release"]), **changes)


def mini_model(name: str, **options) -> dt.DAT:
    torch.manual_seed(0)
    return dt.DAT(mini(name), **options).eval()


# ------------------------------------------------------------------------------------------------ releases and spec


@pytest.mark.parametrize("backend", ["blockwise", "matmul", "eager"])
@pytest.mark.parametrize("name", golden_names("model"))
def test_backbone_is_the_released_one(name, backend):
    meta, arrays = load_golden(name)
    model = dt.DAT.from_official(meta["cfg"], under("state", arrays), release=meta["release"], backend=backend).eval()
    x = torch.from_numpy(arrays["x"])
    assert_close(model(x), arrays["logits"])
    final, maps = model.forward_intermediates(x)
    for index, each in enumerate(maps):
        assert_close(each, arrays[f"stage{index}"], what=f"stage {index}")
    assert torch.equal(final, model.forward_features(x))
    logits, trace = model(x, return_trace=True)
    assert_close(logits, arrays["logits"])
    points = [key for key in arrays if key.startswith("pos.")]
    assert points
    for key in points:
        stage, block = map(int, key.split(".")[1:])
        assert_close(trace.stages[stage].blocks[block].attention.points.reshape(arrays[key].shape), arrays[key])


@pytest.mark.parametrize("name", RELEASES)
def test_the_fixtures_reject_a_wrong_backbone(name):
    meta, arrays = load_golden(name)
    model = dt.DAT.from_official(meta["cfg"], under("state", arrays), release=meta["release"]).eval()
    blocks = [block for stage in model.stages for block in stage.blocks]
    deformable = [block.attention for block in blocks if isinstance(block.attention, dt.DeformableAttention)]
    assert deformable
    table = deformable[-1].position_bias.table.data
    table.copy_(table.flip(1))
    assert rejects(lambda: assert_close(model(torch.from_numpy(arrays["x"])), arrays["logits"]))


@settings(max_examples=6)
@given(
    st.sampled_from(RELEASES),
    st.integers(33, 75),
    st.integers(33, 75),
    seeds,
    st.sampled_from(["blockwise", "matmul"]),
    st.sampled_from(["avg", ""]),
)
def test_backbone_equals_the_spec_at_any_size(name, height, width, seed, backend, global_pool):
    config = mini(name, global_pool=global_pool)
    rng = np.random.default_rng(seed)
    params = map_tree(
        lambda shape: rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 4)), dat_shapes(config)
    )
    x = rng.standard_normal((1, 3, height, width))
    spec = dat_ref.DAT(config, params)
    logits, pullback = spec.vjp(x)
    cotangent = rng.standard_normal(logits.shape)
    grad_x, grad_params = pullback(cotangent)
    model = dt.DAT(config, backend=backend).double().eval()
    model.load_numpy(params)
    leaf = tensor(x)
    actual = model(leaf)
    assert_close(actual, logits, 1e-8)
    actual.backward(torch.from_numpy(cotangent))
    assert_close(leaf.grad, grad_x, 1e-7, "x")
    assert_trees_close(model.to_numpy(grad=True), grad_params, 1e-7)


@pytest.mark.parametrize("name", RELEASES)
def test_walk_and_trace_equal_the_spec(name):
    config = mini(name)
    params = dat_ref.init_params(config, 0, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((2, 3, 48, 72))
    model = dt.DAT(config).double().eval()
    model.load_numpy(params)
    spec = dat_ref.DAT(config, params)
    with torch.no_grad():
        for ours, theirs in zip(model.walk(torch.from_numpy(x)), spec.walk(x), strict=True):
            assert (ours.stage, ours.block, len(ours.embeddings)) == (
                theirs.stage,
                theirs.block,
                len(theirs.embeddings),
            )
            assert_close(ours.output, theirs.output)
            assert_close(ours.trace.mlp.activated, theirs.trace.mlp.activated)
            for mine, other in zip(ours.embeddings, theirs.embeddings, strict=True):
                assert_close(mine.projected, other.projected)
        logits, trace = model(torch.from_numpy(x), return_trace=True)
        assert_close(logits, spec(x))
        assert_close(trace.pooled, spec(x, return_trace=True)[1].pooled)
        assert [len(stage.blocks) for stage in trace.stages] == [len(blocks) for blocks in config.stages]
        assert_close(logits, model(torch.from_numpy(x)).numpy())


# ------------------------------------------------------------------------------------------------ the presets


@pytest.mark.parametrize("name", dt.list_models())
def test_presets_have_the_names_of_the_spec_and_of_the_releases(name):
    with torch.device("meta"):
        model = dt.create_model(name)
    shapes = {key: tuple(leaf.shape) for key, leaf in model.state_dict().items()}
    assert shapes == flatten(dat_shapes(dat_ref.config(name)))
    if name not in ("dat_nano", "dat_spot"):  # new in this project
        key = f"datpp2023/{name.replace('dat_pp', 'dat')}" if "pp" in name else f"cvpr2022/{name}"
        released = official_state_dicts()[key]["state"]
        theirs = {each for each in released if not each.endswith(("relative_position_index", "attn_mask"))}
        assert {place.name for place in backbone_names(model.config).values()} == theirs
    cfg = model.default_cfg
    assert model.pretrained_cfg is cfg
    assert {cfg["classifier"] + ".weight", cfg["first_conv"] + ".weight"} <= shapes.keys()
    assert cfg["input_size"] == (3, *model.config.image_size)


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
@pytest.mark.parametrize(
    "size",
    [(32, 32), (97, 130), (224, 224), (200, 333), (400, 667), pytest.param((800, 1333), marks=pytest.mark.slow)],
)
def test_four_finite_maps_at_any_size(name, size):
    model = dt.create_model(name, features_only=True).eval()
    with torch.inference_mode():
        maps = model(torch.randn(1, 3, *size))
    assert len(maps) == 4
    for each, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert each.shape == (1, channels, *(-(-length // reduction) for length in size))
        assert each.isfinite().all()


def test_names_and_near_matches():
    assert dt.list_models() == sorted(dat_ref.PRESETS)
    assert dt.list_models("*_384") == ["dat_base_384", "dat_pp_base_384"]
    with pytest.raises(dat_ref.ConfigError, match="name: unknown model 'dat_tinny'; did you mean dat_tiny"):
        dt.create_model("dat_tinny")
    with pytest.raises(dat_ref.ConfigError, match="unknown argument 'drop_paths'; did you mean drop_path_rate"):
        dt.create_model("dat_tiny", drop_paths=0.1)
    with pytest.raises(dat_ref.ConfigError, match="out_indices: expected features_only=True"):
        dt.create_model("dat_tiny", out_indices=(1,))
    with pytest.raises(dat_ref.ConfigError, match=r"global_pool: expected one of 'avg', 'max', .*, '', got 'mean'"):
        dt.create_model("dat_tiny", global_pool="mean")
    with pytest.raises(dat_ref.ConfigError, match="output_stride: expected 32, got 16; the stages cannot be dilated"):
        dt.create_model("dat_tiny", output_stride=16)


@pytest.mark.parametrize(
    ("out_indices", "message"),
    [
        (-1, r"a number of stages from 1 to 4, or indices, got -1"),
        (0, r"a number of stages from 1 to 4, or indices, got 0"),
        (5, r"a number of stages from 1 to 4, or indices, got 5"),
        ((4,), r"stages from -4 to 3, got \(4,\)"),
        ((0, -5), r"stages from -4 to 3, got \(0, -5\)"),
        ((-1, 3), r"each stage once, got \(-1, 3\)"),
        ((), r"at least one stage, got \(\)"),
    ],
)
def test_stages_that_do_not_exist_are_refused(out_indices, message):
    with torch.device("meta"), pytest.raises(dat_ref.ConfigError, match=f"out_indices: expected {message}"):
        dt.create_model("dat_tiny", features_only=True, out_indices=out_indices)


@pytest.mark.parametrize(
    ("out_indices", "stages"), [(2, (2, 3)), ((-1,), (3,)), ((2, 0), (0, 2)), (None, (0, 1, 2, 3))]
)
def test_stages_are_counted_from_both_ends(out_indices, stages):
    with torch.device("meta"):
        model = dt.create_model("dat_tiny", features_only=True, out_indices=out_indices)
    assert model.out_indices == stages
    assert len(model.stages) == stages[-1] + 1


def test_overrides_reach_the_configuration():
    with torch.device("meta"):
        model = dt.create_model(
            "dat_pp_tiny",
            num_classes=7,
            in_chans=5,
            drop_path_rate=0.4,
            img_size=(96, 128),
            drop_rate=0.1,
            attn_drop_rate=0.2,
            proj_drop_rate=0.3,
            backend="matmul",
            init=None,
        )
    assert model.head.weight.shape == (7, 512)
    assert model.patch_embedding[0].projection.weight.shape[1] == 5
    assert model.config.drop_path_rate == 0.4
    attention = model.stages[0].blocks[1].attention
    assert attention.position_bias.table.shape == (2, 2 * 24 - 1, 2 * 32 - 1)
    assert (attention.config.attention_dropout, attention.config.projection_dropout) == (0.2, 0.3)
    assert attention.backend == "matmul"
    assert model.stages[0].blocks[0].mlp.dropout.p == 0.1
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, len(rates)))


# ------------------------------------------------------------------------------------------------ in the idiom of timm


def test_head_pooling_and_classifier():
    model, x = mini_model("model22_mini"), torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 3)
    assert torch.equal(model(x), model.forward_head(features))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.head
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == 5
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(4, "")
    assert model(x).shape == (2, 4, 2, 3)
    bare = dt.create_model("dat_tiny", num_classes=0, global_pool="").eval()
    assert bare(torch.randn(1, 3, 64, 64)).shape == (1, 768, 2, 2)


@pytest.mark.parametrize(
    ("indices", "stages"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, -1], [0, 3]), ((1,), [1]), ([-2, 0], [0, 2])]
)
def test_intermediates(indices, stages):
    model, x = mini_model("model23_mini"), torch.randn(1, 3, 64, 96)
    every = model.forward_intermediates(x, intermediates_only=True)
    for stop_early in (False, True):
        maps = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
        assert len(maps) == len(stages)
        assert all(torch.equal(each, every[stage]) for each, stage in zip(maps, stages, strict=True))
    final, maps = model.forward_intermediates(x, indices, norm=True, output_fmt="NHWC")
    assert torch.equal(final, model.forward_features(x))
    if 3 in stages:
        assert torch.equal(maps[-1].permute(0, 3, 1, 2), final)
    else:
        assert torch.equal(maps[-1].permute(0, 3, 1, 2), every[stages[-1]])
    for wrong in (-5, 4):
        with pytest.raises(dat_ref.ConfigError, match="indices: expected stages from -4 to 3"):
            model.forward_intermediates(x, [wrong])
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_features_only_and_pruning():
    full = dt.create_model("dat_tiny").eval()
    features = dt.create_model("dat_tiny", features_only=True, out_indices=(0, 2)).eval()
    missing = features.load_state_dict(full.state_dict(), strict=False)
    assert not missing.missing_keys
    x = torch.randn(1, 3, 64, 96)
    maps = features(x)
    expected = full.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert all(map(torch.equal, maps, expected))
    info = features.feature_info
    assert isinstance(info, FeatureInfo)
    assert (info.channels(), info.reduction(), info.module_name()) == ([96, 384], [4, 16], ["stages.0", "stages.2"])
    assert (len(info), info[1]["num_chs"], info.out_indices) == (4, 192, (0, 2))
    assert info.get_dicts()[0] == {"num_chs": 96, "reduction": 4, "module": "stages.0", "index": 0}
    assert len(features.stages) == 3
    assert not any(name.startswith(("norm", "head", "stages.3")) for name in features.state_dict())
    assert full.feature_info == [
        {"num_chs": 96 << i, "reduction": 4 << i, "module": f"stages.{i}", "index": i} for i in range(4)
    ]
    assert full.prune_intermediate_layers([1], prune_norm=False, prune_head=False) == [1]
    assert torch.equal(full.forward_features(x), full.forward_intermediates(x, [1], intermediates_only=True)[0])
    assert (full.num_features, full(x).shape) == (192, (1, 192, 8, 12))  # norm and head belong to the last stage
    full.reset_classifier(5, "avg")
    assert full(x).shape == (1, 5)


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "catavgmax", ""])
def test_pooling_of_timm(kind):
    model, x = mini_model("model22_mini", global_pool=kind), torch.randn(2, 3, 64, 96)
    maps = model.forward_features(x)
    mean, peak = maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))
    expected = {
        "avg": mean,
        "max": peak,
        "avgmax": (mean + peak) / 2,
        "catavgmax": torch.cat((mean, peak), dim=1),
        "": maps,
    }[kind]
    pooled = model.forward_head(maps, pre_logits=True)
    assert torch.equal(pooled, expected)
    assert pooled.shape[1] == model.head_hidden_size
    logits, trace = model(x, return_trace=True)
    torch.testing.assert_close(trace.pooled, pooled)
    torch.testing.assert_close(logits, model(x))
    model.reset_classifier(5)
    assert model(x).shape[:2] == (2, 5)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


def test_intermediate_layers_as_tokens():
    """The interface of DINO: a number of last stages or a list, as tokens or as maps."""
    model, x = mini_model("model23_mini"), torch.randn(2, 3, 64, 96)
    maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(model.get_intermediate_layers(x, reshape=True, norm=True)[0], maps[3])
    tokens = model.get_intermediate_layers(x, n=[0, 2])
    assert [tuple(each.shape[:2]) for each in tokens] == [(2, 16 * 24), (2, 4 * 6)]
    assert torch.equal(tokens[1].transpose(1, 2).unflatten(2, (4, 6)), maps[2])


@pytest.mark.parametrize("name", RELEASES)
def test_tables_for_another_size(name, tmp_path):
    """As if the checkpoint was loaded into a model of that size."""
    from dat_ref.torch.checkpoints import load_checkpoint, save_checkpoint

    model, x = mini_model(name), torch.randn(1, 3, 96, 64)
    save_checkpoint(model, tmp_path / "weights.npz")
    expected = dt.DAT(model.config.resized((96, 64))).eval()
    load_checkpoint(expected, tmp_path / "weights.npz")
    kept = {key: leaf for key, leaf in model.named_parameters() if not key.endswith("position_bias.table")}
    before = model(x)
    model.set_input_size((96, 64))
    assert torch.equal(model(x), expected(x))
    assert not torch.equal(model(x), before)
    assert model.config == expected.config
    after = dict(model.named_parameters())
    assert all(after[key] is leaf for key, leaf in kept.items())  # an optimizer keeps its parameters
    with pytest.raises(dat_ref.ConfigError, match="image_size: expected at least"):
        model.set_input_size(8)
    assert model.config == expected.config


def test_a_fixed_bias_has_one_size():
    attention = dat_ref.DeformableAttentionConfig(dim=8, heads=2, bias="fixed", size=(8, 8))
    config = DATConfig(stages=((dat_ref.BlockConfig(attention),),), image_size=(32, 32))
    model = dt.DAT(config)
    with pytest.raises(dat_ref.ConfigError, match="img_size: expected a position bias that is a function"):
        model.set_input_size(64)
    assert model.config == config


@pytest.mark.parametrize("name", RELEASES)
def test_chain_of_stages(name):
    """Networks that collect the outputs of a model's children in order see every stage."""
    model, x = mini_model(name), torch.randn(1, 3, 45, 70)
    chain = model.sequential()
    assert [key for key, _ in chain.named_children()] == ["stem", *(f"stage{i}" for i in range(4))]
    maps = []
    for child in chain:
        maps.append(child(maps[-1] if maps else x))
    for actual, expected in zip(maps[1:], model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(actual, expected)
    assert {id(leaf) for leaf in chain.parameters()} == {
        id(leaf) for key, leaf in model.named_parameters() if not key.startswith(("norm.", "head."))
    }


def test_device_and_dtype():
    model = dt.create_model("dat_nano", device="meta", dtype=torch.float16, output_stride=16)
    assert {(leaf.device.type, leaf.dtype) for leaf in model.parameters()} == {("meta", torch.float16)}
    assert {leaf.dtype for leaf in dt.create_model("dat_nano", dtype=torch.float64).parameters()} == {torch.float64}


def test_no_weight_decay_lists_the_tables():
    with torch.device("meta"):
        model = dt.create_model("dat_pp_tiny")
    names = model.no_weight_decay()
    assert names == {name for name in model.state_dict() if name.endswith("table")}
    assert len(names) == 26
    assert "stages.0.blocks.0.attention.neighborhood_bias.table" in names


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_orders_by_depth(coarse):
    """Groups sort as in timm: by the numbers in the match, then by the suffix."""
    with torch.device("meta"):
        model = dt.create_model("dat_tiny")
    matcher = model.group_matcher(coarse)
    end = (99999,)

    def depth(name):
        if re.match(matcher["stem"], name):
            return (-1,)
        for pattern, suffix in matcher["blocks"]:
            found = re.match(pattern, name)
            if found:
                return tuple(int(each) for each in found.groups()) + (suffix or ())
        return end

    groups = [depth(name) for name in model.state_dict() if not name.startswith("downsamples")]
    assert groups == sorted(groups)
    assert groups[0] == (-1,)
    assert all(group == end for name, group in ((n, depth(n)) for n in ("norm.weight", "head.weight")) if name)
    for index in range(3):
        before = max(depth(name) for name in model.state_dict() if name.startswith(f"stages.{index}."))
        after = min(depth(name) for name in model.state_dict() if name.startswith(f"stages.{index + 1}."))
        assert before < depth(f"downsamples.{index}.projection.weight") < after


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", RELEASES)
def test_checkpointing_gives_the_same_gradients(name):
    model, x = mini_model(name).double().train(), torch.randn(2, 3, 64, 48, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [leaf.grad.clone() for leaf in model.parameters() if leaf.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.numel()) or saved, lambda s: s):
        model(x)
    saved_with = sum(kept)
    assert all(map(torch.equal, plain, gradients()))
    model.set_grad_checkpointing(False)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.numel()) or saved, lambda s: s):
        model(x)
    assert saved_with < sum(kept) / 2


def test_stochastic_depth_is_for_training():
    torch.manual_seed(0)
    model, x = dt.DAT(mini("model22_mini", drop_path_rate=0.5)), torch.randn(4, 3, 64, 48)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", RELEASES)
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    model = dt.DAT(mini(name)).train()
    x, target = torch.randn(4, 3, 64, 96), torch.tensor([1, 4, 2, 9])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    unused = [key for key, leaf in model.named_parameters() if leaf.grad is None]
    assert not unused


def test_a_training_step_of_dat_tiny_lowers_the_loss():
    torch.manual_seed(0)
    model = dt.create_model("dat_tiny", num_classes=10, drop_path_rate=0.0).train()
    x, target = torch.randn(2, 3, 224, 224), torch.tensor([3, 7])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = torch.nn.functional.cross_entropy(model(x), target)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.nn.functional.cross_entropy(model(x), target) < before


@pytest.mark.parametrize("name", RELEASES)
def test_state_dict_round_trip_is_bit_equal(name, tmp_path):
    model, x = mini_model(name), torch.randn(1, 3, 64, 96)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = dt.DAT(mini(name)).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(x), other(x))
    released = {key: torch.as_tensor(leaf) for key, leaf in model.to_official().items()}
    third = dt.DAT(mini(name)).eval()
    third.load_official(released)
    assert torch.equal(model(x), third(x))
    assert released.keys() == {place.name for place in official.backbone_names(model.config).values()}


# ------------------------------------------------------------------------------------------------ precision and graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RELEASES)
def test_half_precision_is_finite_and_close(name, dtype):
    model, x = mini_model(name), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        exact, truth = model(x, return_trace=True)
        with torch.autocast("cpu", dtype=dtype):
            logits, trace = model(x, return_trace=True)
            fused = model(x)
        pure = mini_model(name).to(dtype)(x.to(dtype))
    for y in (logits, fused, pure):
        assert y.isfinite().all()
        assert (y.float() - exact).abs().max() < 30 * torch.finfo(dtype).eps * exact.abs().max()
    for ours, theirs in zip(trace.stages, truth.stages, strict=True):
        for mine, other in zip(ours.blocks, theirs.blocks, strict=True):
            if hasattr(other.attention, "points_px"):
                assert mine.attention.points_px.dtype is torch.float32
                error_px = (mine.attention.points_px - other.attention.points_px).abs().max()
                assert error_px < (0.25 if dtype is torch.bfloat16 else 0.03)


@pytest.mark.parametrize("name", RELEASES)
def test_layouts_and_empty_batches(name):
    model, x = mini_model(name), torch.randn(2, 3, 64, 96)
    expected = model(x)
    assert_close(model(x.to(memory_format=torch.channels_last)), expected.detach().numpy(), 1e-5)
    last = mini_model(name).to(memory_format=torch.channels_last)
    assert_close(last(x), expected.detach().numpy(), 1e-5)
    assert model(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RELEASES)
def test_one_graph_captures_the_whole_backbone(name, dynamic):
    """Tracing without code generation raises an error on a graph break."""
    torch._dynamo.reset()
    model = mini_model(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    with torch.no_grad():
        for size in ((64, 96), (96, 64)) if dynamic else ((61, 90),):
            x = torch.randn(2, 3, *size)
            assert_close(compiled(x), model(x).numpy(), 1e-5)
    torch._dynamo.reset()


def test_a_wrong_image_is_refused_before_any_work():
    model = mini_model("model22_mini")
    with pytest.raises(dat_ref.ShapeError, match=re.escape("x: expected (B, C=3, H, W), got (2, 4, 64, 64)")):
        model(torch.zeros(2, 4, 64, 64))
    with pytest.raises(dat_ref.ShapeError, match=r"x: expected floating-point numbers .* got torch.uint8"):
        model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
