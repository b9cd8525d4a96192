"""Suggested hyperparameters: their rules for every map, reasons that agree with counts, the command; the warnings."""

import json
import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dat_ref
from dat_ref import DeformableAttentionConfig, OffsetBound
from dat_ref._checks import ConfigError, HyperparameterWarning
from dat_ref.cli import main
from dat_ref.complexity import attention_terms, total
from dat_ref.ops.coverage import coverage, hit_rate, share_of_cell
from dat_ref.ops.grid import key_grid_size
from dat_ref.suggest import suggest_attention

SIDES = st.integers(1, 40)


def keys(config, size):
    return math.prod(key_grid_size(size, config.kernel_size, config.stride, config.convention))


def reason(found, name):
    (choice,) = (each for each in found.choices if each.name == name)
    return choice.reason


@given(dim=st.integers(1, 200), size=st.tuples(SIDES, SIDES), max_keys=st.integers(1, 500))
def test_every_suggestion_keeps_its_rules(dim, size, max_keys):
    found = suggest_attention(dim, size, max_keys)
    config = found.config
    assert keys(config, size) <= max_keys
    assert config.kernel_size >= config.stride
    assert eval(
        found.code,
        {"DeformableAttention": lambda init="released", **options: (DeformableAttentionConfig(**options), init)},
    ) == (config, found.init)
    if coverage(size, config.stride) == 1:
        assert config.offset_bound is OffsetBound.NONE
    else:
        assert (config.offset_bound, found.init) == (OffsetBound.TANH_CELLS, "zero_offset")
        assert config.max_offset_px > 1
    if config.size is not None:
        terms = attention_terms(1, size, config)
        assert terms["bias"].parameters <= total(terms).parameters / 2
    assert config.groups == 1 or config.group_dim >= 64
    assert json.loads(json.dumps(found.to_dict()))["code"] == found.code
    assert max(map(len, str(found).splitlines()[:-1])) <= 110


@given(size=st.tuples(SIDES, SIDES), max_keys=st.integers(1, 500))
def test_a_smaller_stride_exceeds_the_budget_or_reads_less(size, max_keys):
    config = suggest_attention(8, size, max_keys).config
    for stride in range(1, config.stride):
        smaller = DeformableAttentionConfig(8, 1, stride=stride)
        within = keys(smaller, size) <= max_keys
        assert not within or coverage(size, stride) < coverage(size, config.stride)


@pytest.mark.parametrize("stride", [3, 5, 7])
def test_the_next_even_stride_finds_more_targets_with_fewer_keys(stride):
    """On maps that both strides divide: the reason to prefer even strides."""
    size = (stride * (stride + 1),) * 2
    for side in range(1, 2 * stride):
        odd, even = (hit_rate(size, each, (side, side)) for each in (stride, stride + 1))
        assert even >= odd
        assert even > odd or odd == 1
    assert suggest_attention(8, size, max_keys=(stride + 1) ** 2).config.stride == stride + 1


def test_reasons_have_the_counted_numbers():
    found = suggest_attention(128, (40, 48), max_keys=30, target=3)
    config = found.config
    assert (config.stride, config.kernel_size, config.groups, config.heads) == (8, 9, 2, 4)
    assert f"5 × 6 = 30 keys; without offsets they read {coverage((40, 48), 8):.0%}" in reason(found, "stride")
    assert f"{hit_rate((40, 48), 8, (3, 3)):.0%} of its positions" in reason(found, "stride")
    assert f"kernel 5: {share_of_cell(5, 8):.0%}" in reason(found, "kernel_size")
    terms = attention_terms(1, (40, 48), config)
    share = terms["offset network"].macs / total(terms).macs
    assert f"{share:.1%} of the multiply-adds" in reason(found, "kernel_size")
    assert "8 pixels at most" in reason(found, "offset_range")
    assert "attracts a point from 2.5" in reason(found, "init")
    assert f"{total(terms).parameters:,} parameters" in reason(found, "cost")


def test_groups_do_not_change_the_multiply_adds():
    counts = {
        total(attention_terms(1, (16, 16), DeformableAttentionConfig(64, 4, groups, stride=4, bias="none"))).macs
        for groups in (1, 2, 4)
    }
    assert len(counts) == 1


def test_released_models_have_the_channels_that_the_reasons_state():
    layers = {
        block.attention
        for name in dat_ref.PRESETS
        if name not in ("dat_nano", "dat_spot")
        for stage in dat_ref.config(name).stages
        for block in stage
        if isinstance(block.attention, DeformableAttentionConfig)
    }
    assert {layer.head_dim for layer in layers} == {32}
    assert (min(layer.group_dim for layer in layers), max(layer.group_dim for layer in layers)) == (64, 128)


def test_bias_is_a_table_of_the_map_or_of_the_key_grid_or_a_convolution():
    sizes = [suggest_attention(*arguments).config.size for arguments in ((128, (14, 14), 20), (64, (56, 56), 200))]
    assert sizes == [(14, 14), (14, 14)]
    assert suggest_attention(8, (112, 112), 112 * 112 // 9).config.bias is dat_ref.BiasKind.DEPTHWISE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (8, 8), 4), "dim: expected an integer >= 1"),
        ((8, (8, 0), 4), "size: expected"),
        ((8, (8, 8), 0), "max_keys: expected an integer >= 1"),
        ((8, (8, 8), 4, 3), "heads: expected a divisor of dim=8, got 3"),
        ((8, (8, 6), 4, None, 7), "target: expected at most the map, 8 × 6, got 7"),
    ],
)
def test_wrong_arguments(arguments, message):
    names = dict(zip(("heads", "target"), arguments[3:]))
    with pytest.raises(ConfigError, match=message):
        suggest_attention(*arguments[:3], **names)


def test_command(capsys):
    command = ["suggest", "--dim", "64", "--size", "56", "56", "--keys", "100"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{suggest_attention(64, (56, 56), 100)}\n"
    assert main([*command, "--target", "3", "--heads", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == suggest_attention(64, (56, 56), 100, heads=4, target=3).to_dict()
    assert main(["suggest", "--dim", "9" * 9, "--size", "8", "8", "--keys", "4"]) == 2
    assert "--dim: expected at most 65536" in capsys.readouterr().err
    assert main(["suggest", "--dim", "8", "--size", "8", "99999", "--keys", "4"]) == 2
    assert "--size: expected at most 4096" in capsys.readouterr().err
    assert main([*command, "--target", "57"]) == 2
    assert "target: expected at most the map" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ warnings


def warned(build):
    """Return the messages of the warnings of a call, after a check of their category and place."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        build()
    assert all(each.category is HyperparameterWarning and each.filename == __file__ for each in found)
    return [str(each.message) for each in found]


def test_layers_warn_of_a_small_kernel_and_of_a_random_initialization():
    dt = pytest.importorskip("dat_ref.torch")
    (kernel,) = warned(lambda: dt.DeformableAttention(dim=8, heads=2, stride=8, kernel_size=5, init="zero_offset"))
    for part in ("kernel_size=5 is smaller than stride=8", "39%", "kernel_size=9"):
        assert part in kernel
    (init,) = warned(lambda: dt.DeformableAttention(dim=8, heads=2, stride=4))
    assert "by up to 4 pixels" in init
    assert 'init="zero_offset"' in init
    (clamp,) = warned(lambda: dt.DeformableAttention(dim=8, heads=2, offset_bound="clamp"))
    assert "without a limit in pixels" in clamp
    assert len(warned(lambda: dt.DeformableAttention(dim=8, heads=2, stride=8, kernel_size=7))) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1},
        {"stride": 4, "offset_range": 0.5},
        {"stride": 8, "init": "zero_offset"},
        {"stride": 8, "init": "released"},
        {"stride": 8, "kernel_size": 5, "offset_bound": "none"},
    ],
)
def test_other_layers_do_not_warn(options):
    dt = pytest.importorskip("dat_ref.torch")
    assert warned(lambda: dt.DeformableAttention(dim=8, heads=2, **options)) == []


def test_suggested_layers_do_not_warn():
    dt = pytest.importorskip("dat_ref.torch")
    for size in ((7, 9), (56, 56), (80, 33)):
        found = suggest_attention(16, size, max_keys=20)
        assert warned(lambda found=found: dt.DeformableAttention(found.config, init=found.init)) == []


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny", "dat_nano", "dat_spot"])
def test_models_do_not_warn(name):
    dt = pytest.importorskip("dat_ref.torch")
    assert warned(lambda: dt.create_model(name, num_classes=3)) == []
    assert warned(lambda: dt.DAT(dat_ref.config(name))) == []
