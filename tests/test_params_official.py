"""Parameter trees, conversion to and from released names, initialization."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.backbones import RELEASES, tiny, tiny_params
from helpers.golden import golden_names, load_golden
from helpers.layers import random_params
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import layer_cases, neighborhood_cases, numbers, window_cases

from dat_ref import (
    DAT,
    BiasKind,
    CheckpointError,
    Convention,
    DATConfig,
    DeformableAttention,
    DeformableAttentionConfig,
    OffsetBound,
    config,
    init_params,
    official,
)
from dat_ref.backbone import dat_shapes
from dat_ref.block import ATTENTIONS
from dat_ref.layer import deformable_shapes
from dat_ref.params import check_params, count, flatten, map_tree, mismatch_report, unflatten

TREES = st.recursive(
    st.integers(),
    lambda branches: st.one_of(
        st.dictionaries(st.sampled_from(["query", "weight", "bias", "norm1"]), branches, min_size=1),
        st.lists(branches, min_size=1, max_size=3),
    ),
    max_leaves=12,
)


# ------------------------------------------------------------------------------------------------ trees


@given(TREES)
def test_unflatten_undoes_flatten(tree):
    """unflatten(flatten(tree)) equals the tree."""
    assert unflatten(flatten(tree)) == tree


def test_lists_longer_than_ten_keep_their_order():
    """Numbered levels are sorted as numbers: 10 comes after 9."""
    tree = {"blocks": [{"weight": index} for index in range(12)]}
    assert unflatten(flatten(tree)) == tree
    assert list(flatten(tree))[10] == "blocks.10.weight"


@given(TREES)
def test_map_tree_keeps_the_structure(tree):
    """map_tree changes only leaves, and accepts several trees of the same structure."""
    doubled = map_tree(lambda leaf: 2 * leaf, tree)
    assert flatten(doubled) == {name: 2 * leaf for name, leaf in flatten(tree).items()}
    assert map_tree(lambda a, b: b - a, tree, doubled) == tree


def test_count_of_shapes_and_arrays():
    """The count from shapes equals the count from arrays."""
    shapes = {"a": {"weight": (3, 5), "bias": (3,)}, "b": [{"weight": (2, 1, 3, 3)}]}
    assert count(shapes) == count(random_params(shapes, np.random.default_rng(0))) == 36


# ------------------------------------------------------------------------------------------------ names


@given(st.one_of(layer_cases(), window_cases(), neighborhood_cases()))
def test_to_official_and_back_is_the_identity_for_attentions(case):
    """Conversion to released names and shapes and back returns the same elements, for every attention."""
    names, shapes = official.attention_names(case.config), ATTENTIONS[type(case.config)].shapes(case.config)
    params = case.params()
    assert set(names) == set(flatten(shapes))
    state = official.to_official(params, names)
    assert len(state) == len(names), "two of our names share a released one"
    again = official.to_ours(state, names, shapes)
    for name, leaf in flatten(again).items():
        np.testing.assert_array_equal(leaf, flatten(params)[name])


@pytest.mark.parametrize("release", RELEASES)
def test_to_official_and_back_is_the_identity_for_backbones(release):
    """A backbone rebuilt from its own released state has the same parameters."""
    backbone = tiny(release)
    model = DAT(backbone, tiny_params(backbone, 0))
    state = model.to_official(model.params)
    assert len(state) == len(flatten(model.params))
    again = DAT.from_official(RELEASES[release], state, release=release)
    assert again.config == backbone
    for name, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, flatten(model.params)[name])


def test_buffers_and_unused_parameters_are_passed_over():
    """Buffers that follow from the configuration and parameters unused without offsets are not required."""
    meta, arrays = load_golden("module23_no_offset")
    state = {key[6:]: value for key, value in arrays.items() if key.startswith("state.")}
    assert any("conv_offset" in key for key in state)
    layer = DeformableAttention.from_official(meta["ctor"], state, release=meta["release"])
    assert "offset_network" not in layer.params
    model = DAT(tiny("cvpr2022"), tiny_params(tiny("cvpr2022"), 0))
    state = model.to_official(model.params) | {"stages.0.attns.0.relative_position_index": np.zeros((9, 9), int)}
    DAT.from_official(RELEASES["cvpr2022"], state, release="cvpr2022")


def test_layouts():
    """In the release, linear layers are 1 × 1 convolutions, and a window's table is flat with the heads last."""
    case_config = tiny("cvpr2022").stages[0][0].attention
    params = random_params(ATTENTIONS[type(case_config)].shapes(case_config), np.random.default_rng(0))
    state = official.to_official(params, official.attention_names(case_config))
    table = params["window_bias"]["table"]
    assert state["relative_position_bias_table"].shape == (25, 2)
    assert state["relative_position_bias_table"][1 * 5 + 3, 1] == table[1, 1, 3]
    layer = DeformableAttentionConfig(4, 2, size=(3, 5))
    state = official.to_official(init_params(layer, 0), official.attention_names(layer))
    assert state["proj_q.weight"].shape == (4, 4, 1, 1)
    assert state["conv_offset.3.weight"].shape == (2, 4, 1, 1)


@pytest.mark.parametrize("name", golden_names("module"))
def test_released_arguments_read_both_ways(name):
    """A layer configuration built from released arguments has the shapes of the released state."""
    meta, arrays = load_golden(name)
    layer = DeformableAttentionConfig.from_official(meta["ctor"], release=meta["release"])
    found = sum(v.size for k, v in arrays.items() if k.startswith("state.") and k.partition(".")[2] in {
        place.name for place in official.attention_names(layer).values()
    })  # fmt: skip
    assert count(deformable_shapes(layer)) == found


@pytest.mark.parametrize(
    ("release", "factor", "no_off", "expected"),
    [
        ("cvpr2022", 2, False, OffsetBound.TANH_CELLS),
        ("cvpr2022", 0, False, OffsetBound.RAW),
        ("cvpr2022", -1, False, OffsetBound.TANH_COORDINATES),
        ("datpp2023", 2, False, OffsetBound.TANH_CELLS),
        ("datpp2023", 0, False, OffsetBound.TANH_CELLS),
        ("datpp2023", -1, False, OffsetBound.CLAMP),
        ("cvpr2022", 2, True, OffsetBound.NONE),
        ("datpp2023", -1, True, OffsetBound.NONE),
    ],
)
def test_released_offset_range_factor(release, factor, no_off, expected):
    """The sign of offset_range_factor selects a different bound in each release."""
    arguments = {
        "q_size": (5, 3), "n_heads": 4, "n_head_channels": 2, "n_groups": 2, "stride": 1,
        "offset_range_factor": factor, "use_pe": True, "dwc_pe": False, "no_off": no_off, "fixed_pe": False,
        "stage_idx": 3, "ksize": 3,
    }  # fmt: skip
    layer = DeformableAttentionConfig.from_official(arguments, release=release)
    assert layer.offset_bound is expected
    assert layer.average_pool == (no_off and release == "datpp2023")
    assert layer.bias is (BiasKind.NONE if no_off and release == "datpp2023" else BiasKind.TABLE)
    assert layer.convention is Convention.of_release(release)


# ------------------------------------------------------------------------------------------------ checks


def test_report_names_everything_that_is_wrong():
    """One message lists all missing, unexpected and mis-shaped keys with their shapes."""
    lines = mismatch_report({"a": (2,), "b": (3, 4)}, {"b": (4, 3), "c": (5,)}).split("\n  ")
    assert lines == ["missing: a (2,)", "unexpected: c (5,)", "mis-shaped: b: expected (3, 4), got (4, 3)"]
    assert mismatch_report({"a": (2,)}, {"a": (2,)}) == ""


def test_long_reports_are_cut():
    """A report has twenty lines and the number of omitted ones."""
    lines = mismatch_report({f"p{i}": (1,) for i in range(50)}, {}).split("\n  ")
    assert len(lines) == 21
    assert lines[-1] == "… and 30 more"


def test_check_params_returns_matching_parameters():
    """Matching parameters are returned without a copy."""
    layer = DeformableAttentionConfig(4, 2, size=(3, 5))
    params = init_params(layer, 0)
    checked = check_params(params, deformable_shapes(layer))
    assert all(a is b for a, b in zip(flatten(checked).values(), flatten(params).values(), strict=True))


def test_wrong_checkpoint_leaves_the_caller_s_state_alone():
    """A mismatched state raises an error, and neither the state nor an existing model is changed."""
    backbone = tiny("cvpr2022")
    model = DAT(backbone, tiny_params(backbone, 0))
    before = {name: leaf.copy() for name, leaf in flatten(model.params).items()}
    state = model.to_official(model.params)
    state["cls_head.weight"] = state["cls_head.weight"][:3]
    del state["cls_norm.norm.bias"]
    expected = r"missing \(1\):\n +cls_norm.norm.bias\n  mis-shaped \(1\):\n +cls_head.weight"
    with pytest.raises(CheckpointError, match=expected):
        DAT.from_official(RELEASES["cvpr2022"], state, release="cvpr2022")
    for name, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, before[name])


# ------------------------------------------------------------------------------------------------ initialization


def uniform_probability(values, bound):
    """Return the p-value of a sample under the uniform distribution in ±bound."""
    return stats.kstest(values.ravel(), stats.uniform(-bound, 2 * bound).cdf).pvalue


@pytest.mark.parametrize("release", RELEASES)
def test_initialization_follows_the_rule(release):
    """Weights are uniform ±1/√fan_in, norms 1 and 0, tables normal (σ 0.01, neighborhoods 0.02), scales constant."""
    backbone = replace(tiny(release), num_classes=50)
    params, shapes = flatten(init_params(backbone, 0, dtype=np.float64)), flatten(dat_shapes(backbone))
    tables = {}
    for name, values in params.items():
        module, leaf = name.rsplit(".", 1)
        last = module.rsplit(".", 1)[-1]
        assert values.shape == shapes[name]
        if leaf == "table":
            tables.setdefault(last, []).append(values.ravel())
        elif last.startswith("norm"):
            assert (values == (leaf == "weight")).all(), name
        elif last.startswith("layer_scale"):
            assert (values == 0.1).all(), name
        else:
            bound = 1 / np.sqrt(np.prod(shapes[f"{module}.weight"][1:]))
            assert (np.abs(values) <= bound).all(), name
            assert values.size < 30 or uniform_probability(values, bound) > 1e-4, name
    for kind, parts in tables.items():
        entries, sigma = np.concatenate(parts), 0.02 if kind == "neighborhood_bias" else 0.01
        assert stats.kstest(entries, stats.norm(0, sigma).cdf).pvalue > 1e-4, kind


def test_every_layer_has_its_own_initialization():
    """Two weights of the same shape differ, because one generator serves all leaves."""
    leaves = [leaf for leaf in flatten(init_params(tiny("datpp2023"), 0)).values() if leaf.ndim > 1]
    firsts = [float(leaf.flat[0]) for leaf in leaves]
    assert len(set(firsts)) == len(firsts)


def test_seeds_repeat_and_differ():
    """Equal seeds give equal values, different seeds different ones; a passed generator advances."""
    layer = DeformableAttentionConfig(4, 2, size=(3, 5))
    first, again, other = (flatten(init_params(layer, seed)) for seed in (3, 3, 4))
    assert all((first[name] == again[name]).all() for name in first)
    assert not (first["query.weight"] == other["query.weight"]).all()
    rng = np.random.default_rng(3)
    assert (init_params(layer, rng)["query"]["weight"] == first["query.weight"]).all()
    assert not (init_params(layer, rng)["query"]["weight"] == first["query.weight"]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_initialization_has_the_requested_precision(dtype):
    """Every leaf has the requested dtype, float32 by default."""
    leaves = flatten(init_params(tiny("datpp2023"), 0, dtype=dtype)).values()
    assert {leaf.dtype for leaf in leaves} == {np.dtype(dtype)}
    assert init_params(DeformableAttentionConfig(4, 2, size=(3, 5)), 0)["query"]["weight"].dtype == np.float32


@pytest.mark.parametrize("release", RELEASES)
def test_zero_offset_start_of_a_backbone(release):
    """With offsets="zero_offset" the points of deformable blocks equal the (clamped) references; as released, not."""
    backbone, x = tiny(release), numbers(0, 1, 3, 64, 96)
    for offsets in ("zero_offset", "released"):
        _, trace = DAT(backbone, init_params(backbone, 0, offsets=offsets, dtype=np.float64))(x, return_trace=True)
        layers = [b.attention for stage in trace.stages for b in stage.blocks if hasattr(b.attention, "points")]
        assert len(layers) == {"cvpr2022": 2, "datpp2023": 4}[release]
        for layer in layers:
            expected = layer.reference if release == "cvpr2022" else np.clip(layer.reference, -1, 1)
            on_reference = (layer.points == expected).all()
            assert on_reference == (offsets == "zero_offset")


# ------------------------------------------------------------------------------------------------ presets


def test_preset_of_other_classes_and_channels():
    """num_classes and in_channels change the head and the first convolution, and nothing else."""
    usual, other = (
        flatten(dat_shapes(c)) for c in (config("dat_tiny"), config("dat_tiny", num_classes=7, in_channels=1))
    )
    changed = {name for name in usual if usual[name] != other[name]}
    assert changed == {"head.weight", "head.bias", "patch_embedding.0.projection.weight"}
    assert other["head.weight"] == (7, 768)


def test_released_base_384_differs_by_tables_and_windows():
    """dat_base_384 is dat_base with windows of 12 and tables for 384²; dat_pp_base_384 has dat_pp_base's tables."""
    assert config("dat_base_384").stages[2][1].attention.size == (24, 24)
    assert config("dat_base_384").stages[0][0].attention.window_size == 12
    assert config("dat_pp_base_384").stages == config("dat_pp_base").stages
    assert isinstance(config("dat_tiny"), DATConfig)
