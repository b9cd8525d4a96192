"""Renamed public names: the old name returns the same object, with a warning that gives the new name."""

import importlib
import warnings

import pytest

MODULES = {
    "dat_ref.checkpoints": {
        "recognise": "detect_release",
        "recognise_model": "detect_preset",
        "with_ends_of": "with_channels_and_classes",
    },
    "dat_ref.claims": {"Sure": "SourceAccess"},
    "dat_ref.complexity": {
        "allocated": "measure_allocation",
        "held_bytes": "retained_bytes",
        "lineup": "compared_systems",
        "watched": "mark_as_data",
    },
    "dat_ref.peers": {
        "SWAPS": "REPLACEMENTS",
        "SwapInAttentionConfig": "DATDCNAttentionConfig",
        "reach": "receptive_field",
        "swap_attention": "replace_attention",
    },
    "dat_ref.testing": {
        "SUBJECTS": "OPS",
        "Subject": "OpSpec",
        "check_subject": "check_op",
        "choose": "find_ops",
        "text": "format_report",
    },
    "dat_ref.testing.strategies": {"awkward": "non_contiguous", "numbers": "integers"},
    "dat_ref.torch.peers": {"SwapInAttention": "DATDCNAttention"},
    "dat_ref.train": {"decays": "has_weight_decay", "enlarge": "upsample"},
    "dat_ref.viz": {
        "Attended": "QueryAttention",
        "deformable_attended": "deformable_query_attention",
        "neighborhood_attended": "neighborhood_query_attention",
        "window_attended": "window_query_attention",
        "window_attention_map": "attention_map",
    },
}
NEEDS = {"dat_ref.torch.peers": "torch", "dat_ref.viz": "matplotlib"}
CASES = [(module, old, new) for module, names in MODULES.items() for old, new in names.items()]


def load(module):
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    return importlib.import_module(module)


@pytest.mark.parametrize(("module", "old", "new"), CASES)
def test_an_old_name_is_the_new_object_and_warns(module, old, new):
    loaded = load(module)
    with pytest.warns(DeprecationWarning, match=f"^{module}.{old} is deprecated, use {module}.{new}$"):
        found = getattr(loaded, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found is getattr(loaded, new)
    assert old not in getattr(loaded, "__all__", ())


@pytest.mark.parametrize("module", MODULES)
def test_an_unknown_name_is_an_error(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        _ = load(module).nothing


def test_the_old_kind_of_a_replacement_is_accepted():
    from dat_ref import config
    from dat_ref.peers import replace_attention

    with pytest.warns(DeprecationWarning, match="the kind 'swap_in' is deprecated, use 'dat_dcn'"):
        old = replace_attention(config("dat_tiny"), "swap_in")
    assert old == replace_attention(config("dat_tiny"), "dat_dcn")


def test_create_model_accepts_the_old_kind():
    pytest.importorskip("torch")
    from dat_ref.torch import create_model

    with pytest.warns(DeprecationWarning, match="the kind 'swap_in' is deprecated, use 'dat_dcn'"):
        model = create_model("dat_nano", attention="swap_in", num_classes=2)
    assert {type(block.attention).__name__ for stage in model.stages for block in stage.blocks} >= {"DATDCNAttention"}


def test_old_keywords_of_the_conformance_suite_are_passed_on():
    from dat_ref import testing

    def sampler(x, points_px):
        raise NotImplementedError

    with pytest.warns(DeprecationWarning, match="subjects= is deprecated, use ops="):
        (report,) = testing.check(sampler, subjects=["sampler"])
    assert report.context.op.name == "sampler"
