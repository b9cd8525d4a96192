"""Models in timm's registry, tested with a stand-in, because timm needs torchvision, which may be absent."""

import importlib
import sys
import types
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest

import dat_ref
from dat_ref import CheckpointError
from dat_ref.state_files import read_state, save_state

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from dat_ref.torch import DATFeatures, create_model  # noqa: E402
from dat_ref.torch.checkpoints import save_checkpoint  # noqa: E402

MODULE = "dat_ref.torch.timm"


@dataclass
class PretrainedCfg:
    """Stand-in for timm's model settings, with the fields that are used; others raise an error, as in timm."""

    url: str | None = None
    file: str | None = None
    hf_hub_id: str | None = None
    architecture: str | None = None
    tag: str | None = None
    custom_load: bool = False
    input_size: tuple[int, int, int] = (3, 224, 224)
    fixed_input_size: bool = False
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    num_classes: int = 1000
    pool_size: tuple[int, ...] | None = None
    first_conv: str | None = None
    classifier: str | None = None
    license: str | None = None
    paper_ids: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def stand_in():
    """Return modules with a registry as in timm: entry points by name, settings from their module."""
    models = types.ModuleType("timm.models")
    entrypoints, settings = {}, {}

    def register_model(function):
        module = sys.modules[function.__module__]
        name = function.__name__
        module.__all__.append(name)
        entrypoints[name] = function
        settings[name] = replace(module.default_cfgs[name], architecture=name)
        return function

    def generate_default_cfgs(configurations):
        return {name: PretrainedCfg(**values) for name, values in configurations.items()}

    def resolve_pretrained_cfg(variant, pretrained_cfg=None, pretrained_cfg_overlay=None):
        if isinstance(pretrained_cfg, dict):
            pretrained_cfg = PretrainedCfg(**pretrained_cfg)
        elif pretrained_cfg and isinstance(pretrained_cfg, str):
            raise RuntimeError(f"Invalid pretrained tag ({pretrained_cfg}) for {variant}.")
        return replace(pretrained_cfg or settings[variant], **(pretrained_cfg_overlay or {}))

    def create_timm_model(
        name, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, checkpoint_path=None, **kwargs
    ):
        name, _, tag = name.partition(".")
        if name not in entrypoints:
            raise RuntimeError(f"Unknown model ({name})")
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        model = entrypoints[name](
            pretrained=pretrained,
            pretrained_cfg=pretrained_cfg or tag,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=None,
            **kwargs,
        )
        if checkpoint_path:
            load_timm_checkpoint(model, checkpoint_path)
        return model

    def load_timm_checkpoint(model, path, strict=True, filter_fn=None):
        state = torch.load(path, weights_only=True)["model"]
        state = {name.removeprefix("module."): value for name, value in state.items()}
        return model.load_state_dict(filter_fn(state, model) if filter_fn else state, strict=strict)

    models.register_model = register_model
    models.generate_default_cfgs = generate_default_cfgs
    models.resolve_pretrained_cfg = resolve_pretrained_cfg
    models.load_checkpoint = load_timm_checkpoint
    timm = types.ModuleType("timm")
    timm.models, timm.create_model, timm.list_models = models, create_timm_model, lambda: sorted(entrypoints)
    return timm, models


@pytest.fixture
def timm(monkeypatch):
    """Return the stand-in, with the models registered."""
    package, models = stand_in()
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    importlib.import_module(MODULE)
    yield package
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a dat_tiny and two files of its weights: with released names and with ours."""
    folder = tmp_path_factory.mktemp("weights")
    model = create_model("dat_tiny")
    save_checkpoint(model, folder / "released.pth", official=True)
    save_checkpoint(model, folder / "ours.safetensors")
    return model, folder / "released.pth", folder / "ours.safetensors"


def assert_same_weights(model, expected, but=()):
    own = dict(model.named_parameters())
    for name, leaf in expected.named_parameters():
        if not name.startswith(tuple(but)):
            assert torch.equal(own[name], leaf), name


def test_without_timm_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r"pip install timm; dat_ref.torch.create_model needs no timm"):
        importlib.import_module(MODULE)


def test_all_models_are_registered(timm):
    assert timm.list_models() == sorted(dat_ref.PRESETS)
    module = sys.modules[MODULE]
    assert set(dat_ref.PRESETS) <= set(module.__all__)
    assert module.dat_tiny.__name__ == "dat_tiny"


def test_options_go_through(timm):
    model = timm.create_model("dat_tiny", num_classes=10, in_chans=4, drop_path_rate=0.3, drop_rate=None)
    assert model.get_classifier().out_features == 10
    assert model(torch.zeros(2, 4, 64, 64)).shape == (2, 10)
    assert model.config.drop_path_rate == 0.3
    unpooled = timm.create_model("dat_tiny", num_classes=0, global_pool="")
    assert unpooled(torch.zeros(1, 3, 64, 96)).shape == (1, 768, 2, 3)


def test_features_only(timm):
    model = timm.create_model("dat_pp_tiny", features_only=True, out_indices=(1, 3))
    assert isinstance(model, DATFeatures)
    assert model.feature_info.channels() == [128, 512]
    assert [tuple(each.shape) for each in model(torch.zeros(1, 3, 64, 96))] == [(1, 128, 8, 12), (1, 512, 2, 3)]


def test_unknown_options_are_refused(timm):
    with pytest.raises(ValueError, match="window"):
        timm.create_model("dat_tiny", window=7)


def test_settings_have_the_form_of_timm(timm):
    model = timm.create_model("dat_tiny")
    assert model.pretrained_cfg is model.default_cfg
    cfg = model.default_cfg
    assert cfg["architecture"] == "dat_tiny"
    assert (cfg["input_size"], cfg["pool_size"], cfg["num_classes"]) == ((3, 224, 224), (7, 7), 1000)
    names = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in names
    assert f"{cfg['classifier']}.weight" in names
    for name, entry in sys.modules[MODULE].default_cfgs.items():
        assert entry.input_size[1] == (384 if name.endswith("384") else 224)


def test_settings_may_come_from_outside(timm):
    model = timm.create_model("dat_tiny", pretrained_cfg_overlay={"num_classes": 21, "input_size": (1, 224, 224)})
    assert (model.num_classes, model.in_chans) == (21, 1)
    assert model.default_cfg["num_classes"] == 21


@pytest.mark.parametrize("name", dat_ref.PRESETS)
def test_pretrained_without_weights_is_refused(timm, name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name} .* pretrained=False"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("which", [1, 2])
def test_pretrained_from_a_file(timm, weights, which):
    overlay = {"file": str(weights[which])}
    assert_same_weights(timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay), weights[0])
    fine = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert fine.num_classes == 5
    assert_same_weights(fine, weights[0], but=["head."])
    features = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert_same_weights(features, weights[0], but=["head.", "norm."])


def test_pretrained_of_another_model_is_refused(timm, weights, tmp_path):
    with pytest.raises(CheckpointError, match="the file contains dat_tiny"):
        timm.create_model("dat_small", pretrained=True, pretrained_cfg_overlay={"file": str(weights[1])})
    longer = tmp_path / "longer.npz"
    extra = {"stages.3.blocks.2.norm1.bias": np.zeros(768, np.float32)}
    save_state(longer, {**read_state(weights[2]), **extra})
    with pytest.raises(CheckpointError, match=r"expected the parameters of this model\n(.*\n)*.*blocks\.2\.norm1"):
        timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(longer)})


def test_released_names_load_through_timms_own_loader(timm, weights):
    model = timm.create_model("dat_tiny", checkpoint_path=weights[1])
    assert_same_weights(model, weights[0])
    for leaf in model.parameters():
        torch.nn.init.zeros_(leaf)
    from dat_ref.torch.timm import checkpoint_filter_fn

    timm.models.load_checkpoint(model, weights[1], filter_fn=checkpoint_filter_fn)
    assert_same_weights(model, weights[0])
    model.load_state_dict(weights[0].state_dict())
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32))
    assert torch.equal(model.eval()(x), weights[0].eval()(x))


def test_tables_of_another_size_are_resized_while_loading(timm, weights):
    model = timm.create_model("dat_tiny", checkpoint_path=weights[1], img_size=(160, 256))
    assert model.stages[2].blocks[1].attention.position_bias.table.shape == (12, 19, 31)
    assert_same_weights(model.patch_embedding, weights[0].patch_embedding)
