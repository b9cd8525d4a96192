"""Old names: each returns the new object and warns; new names do not warn."""

import importlib
import subprocess
import sys
import warnings

import pytest

import dat_ref
from dat_ref import ConfigError, DeformableAttentionConfig, OffsetBound

MODULES = {
    "dat_ref.recipe": {
        "AMP": "dat_ref.train_config.AMP_DTYPES",
        "FREE": "dat_ref.train_config.NON_SEMANTIC_FIELDS",
        "LAPTOP": "dat_ref.train_config.LAPTOP",
        "PRESETS": "dat_ref.train_config.PRESETS",
        "RELEASED": "dat_ref.train_config.RELEASED",
        "Recipe": "dat_ref.train_config.TrainConfig",
        "preset": "dat_ref.train_config.preset",
    },
    "dat_ref.torch.functional": {
        "HatReader": "dat_ref.torch.functional.SeparableInterp",
        "TableLookup": "dat_ref.torch.functional.AffineIndex",
        "cut_windows": "dat_ref.torch.functional.window_partition",
        "hat_matrix": "dat_ref.torch.functional.interp_matrix",
        "lay_windows": "dat_ref.torch.functional.window_reverse",
        "table_lookup": "dat_ref.torch.functional.table_index",
    },
    "dat_ref.torch.train": {
        "Recipe": "dat_ref.torch.train.TrainConfig",
        "Team": "dat_ref.torch.train.DistributedContext",
        "gathered": "dat_ref.torch.train.init_distributed",
    },
}
CASES = [(module, old, new) for module, names in MODULES.items() for old, new in names.items()]


def load(module):
    if module.startswith("dat_ref.torch"):
        pytest.importorskip("torch")
    return importlib.import_module(module)


@pytest.mark.parametrize(("module", "old", "new"), CASES)
def test_an_old_name_returns_the_new_object_and_warns(module, old, new):
    owner, _, name = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"^{module}.{old} is deprecated, use {new}$") as caught:
        found = getattr(load(module), old)
    assert found is getattr(load(owner), name)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("module", MODULES)
def test_old_names_are_not_public_and_unknown_ones_are_errors(module):
    loaded = load(module)
    assert not set(MODULES[module]) & set(getattr(loaded, "__all__", ()))
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Nothing'"):
        _ = loaded.Nothing


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("leads", "is_main"),
        ("size", "world_size"),
        ("spread", "broadcast"),
        ("total", "all_reduce_sum"),
        ("wait", "barrier"),
    ],
)
def test_old_attributes_of_the_distributed_context(old, new):
    context = load("dat_ref.torch.train").DistributedContext()
    with pytest.warns(DeprecationWarning, match=f"^DistributedContext.{old} is deprecated, use {new}$"):
        assert getattr(context, old) == getattr(context, new)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = context.nothing


def test_old_keywords_are_passed_on_and_warn():
    train, functional = load("dat_ref.torch.train"), load("dat_ref.torch.functional")
    config = train.TrainConfig(model="dat_nanoo")
    with pytest.warns(DeprecationWarning, match="recipe= is deprecated, use config="), pytest.raises(ConfigError):
        train.build_model(recipe=config, classes=3)
    with (
        pytest.warns(DeprecationWarning, match="is deprecated, use") as caught,
        pytest.raises(ConfigError, match="expected images"),
    ):
        train.fit(recipe=config, train=[], held_out=[], out="", team=None)
    assert [str(each.message) for each in caught] == [
        "fit: recipe= is deprecated, use config=",
        "fit: team= is deprecated, use context=",
    ]
    with pytest.warns(DeprecationWarning, match="team= is deprecated"), pytest.raises(ValueError, match="one image"):
        train.evaluate(None, [], team=None)
    with pytest.warns(DeprecationWarning, match="what= is deprecated"), pytest.raises(ValueError, match="'auto'"):
        functional.register_backend("auto", None, what="")


def test_tanh_pixels_is_tanh_cells():
    with pytest.warns(DeprecationWarning, match="OffsetBound.TANH_PIXELS is deprecated, use TANH_CELLS") as by_name:
        assert OffsetBound.TANH_PIXELS is OffsetBound.TANH_CELLS
    with pytest.warns(DeprecationWarning, match="'tanh_pixels' is deprecated, use 'tanh_cells'") as by_value:
        assert OffsetBound("tanh_pixels") is OffsetBound.TANH_CELLS
    assert {warning[0].filename for warning in (by_name, by_value)} == {__file__}


def test_tanh_pixels_is_no_member():
    names = ["TANH_CELLS", "TANH_COORDINATES", "CLAMP", "RAW", "NONE"]
    assert [bound.name for bound in OffsetBound] == list(OffsetBound.__members__) == names
    assert OffsetBound.TANH_CELLS.value == "tanh_cells"
    with pytest.raises(ValueError, match="'tanh_pixel' is not a valid OffsetBound"):
        OffsetBound("tanh_pixel")


def test_new_names_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OffsetBound("tanh_cells") is OffsetBound.TANH_CELLS
        assert DeformableAttentionConfig(4, 2, size=(3, 3)).offset_bound is OffsetBound.TANH_CELLS
        assert list(dat_ref.PRESETS)


def test_the_package_uses_no_old_name():
    pytest.importorskip("torch")
    program = """
import dat_ref, dat_ref.torch, dat_ref.torch.train, dat_ref.train_config, dat_ref.recipe
for module in (dat_ref, dat_ref.torch, dat_ref.torch.functional, dat_ref.torch.train):
    for name in module.__all__:
        getattr(module, name)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:dat_ref", "-W", "error::DeprecationWarning:__main__"]
        + ["-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
