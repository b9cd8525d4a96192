"""Models in timm's registry, tested with timm where it can be imported, and with a stand-in."""

import importlib
import json
import sys
import types
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import dat_ref
from dat_ref import CheckpointError, ConfigError
from dat_ref.checkpoints import convert_image_channels
from dat_ref.state_files import read_state, save_state

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

from dat_ref.torch import DATFeatures, create_model  # noqa: E402
from dat_ref.torch.checkpoints import save_checkpoint  # noqa: E402
from dat_ref.torch.features import FeatureInfo  # noqa: E402

MODULE = "dat_ref.torch.timm"


@dataclass
class PretrainedCfg:
    """Stand-in for timm's model settings, with the fields that are used; others raise an error, as in timm."""

    url: str | None = None
    file: str | None = None
    state_dict: dict[str, Any] | None = None
    hf_hub_id: str | None = None
    source: str | None = None
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
    label_names: tuple[str, ...] | None = None
    pool_size: tuple[int, ...] | None = None
    first_conv: str | None = None
    classifier: str | None = None
    license: str | None = None
    paper_ids: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def stand_in():
    """Return modules with a registry and a builder as in timm: entry points by name, settings from their module."""
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
        overlay = dict(pretrained_cfg_overlay or {})
        if "file" in overlay:
            overlay.setdefault("custom_load", False)
        return replace(pretrained_cfg or settings[variant], **overlay)

    def build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        feature_cfg=None,
        pretrained_filter_fn=None,
        pretrained_model_args=None,
        cache_dir=None,
        **kwargs,
    ):
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        kwargs.setdefault("num_classes", cfg.num_classes)
        kwargs.setdefault("in_chans", cfg.input_size[0])
        feature_cfg = dict(feature_cfg or {})
        features_only = kwargs.pop("features_only", False)
        if features_only and "out_indices" in kwargs:
            feature_cfg["out_indices"] = kwargs.pop("out_indices")
        model = model_cls(**kwargs)
        model.pretrained_cfg = model.default_cfg = cfg.to_dict()
        if pretrained:
            load_pretrained(model, cfg, 0 if features_only else model.num_classes, pretrained_filter_fn)
        if features_only:
            model = feature_cfg.pop("feature_cls")(model, output_fmt="NCHW", **feature_cfg)
            model.pretrained_cfg = model.default_cfg = cfg.to_dict()
        return model

    def load_pretrained(model, cfg, num_classes, filter_fn):
        if cfg.source == "local-dir":
            state = load_file(f"{cfg.file}/model.safetensors")
        elif cfg.state_dict:
            state = cfg.state_dict
        elif cfg.file and cfg.custom_load:
            model.load_pretrained(cfg.file)
            return
        elif cfg.file:
            state = torch.load(cfg.file, weights_only=True)
        else:
            raise RuntimeError(f"No pretrained weights exist for {cfg.architecture}. Use `pretrained=False`")
        state = filter_fn(state, model)
        stem = f"{cfg.first_conv}.weight"
        if state[stem].shape[1] != model.in_chans:
            state[stem] = torch.from_numpy(convert_image_channels(state[stem].numpy(), model.in_chans))
        strict = num_classes == cfg.num_classes
        if not strict:
            for part in ("weight", "bias"):
                state.pop(f"{cfg.classifier}.{part}", None)
        model.load_state_dict(state, strict=strict)

    def create_timm_model(
        name, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, checkpoint_path=None, **kwargs
    ):
        source, _, place = name.rpartition(":")
        if source:
            with open(f"{place}/config.json") as file:
                saved = json.load(file)
            name = saved["architecture"]
            pretrained_cfg = {**saved["pretrained_cfg"], "source": source, "file": place}
            kwargs["pretrained_model_args"] = saved["model_args"]
            kwargs = {**saved["model_args"], **kwargs}
        if name not in entrypoints:
            raise RuntimeError(f"Unknown model ({name})")
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        model = entrypoints[name](
            pretrained=pretrained,
            pretrained_cfg=pretrained_cfg,
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

    def save_for_hf(model, folder, safe_serialization):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        settings = {key: value for key, value in model.pretrained_cfg.items() if key not in ("file", "state_dict")}
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "architecture": settings.pop("architecture"),
                    "pretrained_cfg": {**settings, "num_classes": model.num_classes},
                    "model_args": {"num_classes": model.num_classes},
                }
            )
        )

    models.register_model = register_model
    models.register_notrace_module = lambda module: module
    models.generate_default_cfgs = generate_default_cfgs
    models.build_model_with_cfg = build_model_with_cfg
    models.FeatureInfo = lambda info, out_indices: FeatureInfo(tuple(info), tuple(out_indices))
    models.load_checkpoint = load_timm_checkpoint
    models.save_for_hf = save_for_hf
    timm = types.ModuleType("timm")
    timm.models, timm.create_model, timm.list_models = models, create_timm_model, lambda: sorted(entrypoints)
    return timm, models


def real_timm():
    """Return timm with the models registered, or skip the test."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they may be registered already
        importlib.import_module(MODULE)
    return timm


@pytest.fixture(params=["stand-in", "timm"])
def timm(request, monkeypatch):
    """Return the stand-in and timm itself, with the models registered."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    if request.param == "timm":
        yield real_timm()
    else:
        package, models = stand_in()
        monkeypatch.setitem(sys.modules, "timm", package)
        monkeypatch.setitem(sys.modules, "timm.models", models)
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
    assert set(timm.list_models()) >= set(dat_ref.PRESETS)
    module = sys.modules[MODULE]
    assert set(dat_ref.PRESETS) <= set(module.__all__)
    assert module.dat_tiny.__name__ == "dat_tiny"


def test_options_go_through(timm):
    model = timm.create_model("dat_tiny", num_classes=10, in_chans=4, drop_path_rate=0.3, drop_rate=None)
    assert model.get_classifier().out_features == 10
    assert model(torch.zeros(2, 4, 64, 64)).shape == (2, 10)
    assert model.config.drop_path_rate == 0.3
    unpooled = timm.create_model("dat_tiny", num_classes=0, global_pool="", device="meta", dtype=torch.bfloat16)
    output = unpooled(torch.zeros(1, 3, 64, 96, device="meta", dtype=torch.bfloat16))
    assert (output.shape, output.dtype, output.device.type) == ((1, 768, 2, 3), torch.bfloat16, "meta")


def test_features_only(timm):
    """One stage's entry has what transformers and segmentation packages read from timm's class."""
    model = timm.create_model("dat_pp_tiny", features_only=True, out_indices=(1, -1))
    assert isinstance(model, DATFeatures)
    info = model.feature_info
    assert (info.channels(), info.reduction(), info.module_name()) == ([128, 512], [8, 32], ["stages.1", "stages.3"])
    assert tuple(info.out_indices) == (1, 3)
    assert info.get_dicts()[0] == {"num_chs": 128, "reduction": 8, "module": "stages.1", "index": 1}
    assert [entry["module"] for entry in info.info] == [f"stages.{i}" for i in range(4)]
    assert (info.get("index"), info.get("index", [0]), info.get("index", 2), len(info)) == ([1, 3], [0], 2, 4)
    assert info.get_dicts(keys=["index"], idx=[0, 2]) == [{"index": 0}, {"index": 2}]
    assert tuple(info.from_other((0,)).channels()) == (64,)
    x = torch.zeros(1, 3, 64, 96)
    assert [tuple(each.shape) for each in model(x)] == [(1, 128, 8, 12), (1, 512, 2, 3)]
    model.return_layers = {entry["module"]: str(entry["index"]) for entry in info.info}  # as transformers does
    assert [each.shape[1] for each in model(x)] == [64, 128, 256, 512]
    assert "num_classes" not in model.default_cfg or model.num_classes == 0


@pytest.mark.parametrize("out_indices", [5, 0, -1, (4,), (0, -5), ()])
def test_stages_that_do_not_exist_are_refused(timm, out_indices):
    with pytest.raises(ConfigError, match="out_indices: expected"):
        timm.create_model("dat_nano", features_only=True, out_indices=out_indices, device="meta")


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
@pytest.mark.parametrize("out_indices", [None, (1, 2), 1, (-1,)])
def test_extractors_of_timm(feature_cls, out_indices):
    timm = real_timm()
    options = {"features_only": True, "out_indices": out_indices}
    model, ours = (
        timm.create_model("dat_nano", feature_cls=feature_cls, **options),
        timm.create_model("dat_nano", **options),
    )
    assert type(model).__module__.startswith("timm.")
    assert isinstance(ours.feature_info, timm.models.FeatureInfo)
    assert model.feature_info.get_dicts() == ours.feature_info.get_dicts()
    x = torch.randn(1, 3, 45, 64)
    prefix = {"getter": "model.", "hook": "body.", "fx": "graph_module."}[feature_cls]
    ours.load_state_dict({key.removeprefix(prefix): value for key, value in model.state_dict().items()}, strict=False)
    for actual, expected in zip(model.eval()(x), ours.eval()(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("feature_cls", ["list", "dict"])
def test_extractors_that_run_children_in_order_are_refused(feature_cls):
    timm = real_timm()
    with pytest.raises(AssertionError, match=r"Return layers .* are not present in model"):
        timm.create_model("dat_nano", features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize("out_indices", [(1, 2), (-1,), None])
def test_backbone_of_transformers(out_indices):
    timm = real_timm()
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone="dat_nano", out_indices=out_indices)
    backbone = transformers.TimmBackbone(config).eval()
    plain = timm.create_model("dat_nano").eval()
    plain.load_state_dict(backbone._backbone.state_dict(), strict=False)
    stages = (2,) if out_indices is None else tuple(i % 3 for i in out_indices)
    assert backbone.channels == [(32, 64, 112)[i] for i in stages]
    x = torch.randn(1, 3, 45, 64)
    expected = plain.forward_intermediates(x, stages, intermediates_only=True)
    output = backbone(x, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    for maps in (output.feature_maps, backbone(x).feature_maps):
        assert all(torch.equal(actual, each) for actual, each in zip(maps, expected, strict=True))


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


@pytest.mark.parametrize("name", dat_ref.PRESETS)
def test_registry_agrees_with_the_model(timm, name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    maps = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert maps.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.num_classes == cfg["num_classes"] == model.head.out_features
    if not name.startswith(("dat_nano", "dat_spot")):
        assert cfg["input_size"][1] == (384 if name.endswith("384") else 224)
        assert cfg["paper_ids"] == ("arXiv:2309.01430" if name.startswith("dat_pp") else "arXiv:2201.00520")


def test_the_shipped_network_is_pretrained(timm):
    model = timm.create_model("dat_spot", pretrained=True).eval()
    assert_same_weights(model, create_model("dat_spot", num_classes=9, checkpoint=dat_ref.data.network_path()))
    assert (model.default_cfg["input_size"], model.num_classes) == ((3, 160, 160), 9)
    assert model.default_cfg["label_names"][0] == "giraffe"
    features = timm.create_model("dat_spot", pretrained=True, features_only=True, in_chans=1)
    assert_same_weights(features.stages, model.stages)


def test_settings_may_come_from_outside(timm):
    model = timm.create_model("dat_tiny", pretrained_cfg_overlay={"num_classes": 21, "input_size": (1, 224, 224)})
    assert (model.num_classes, model.in_chans) == (21, 1)
    assert model.default_cfg["num_classes"] == 21


@pytest.mark.parametrize("name", sorted(set(dat_ref.PRESETS) - {"dat_spot"}))
def test_pretrained_without_weights_is_refused(timm, name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True, device="meta")


@pytest.mark.parametrize("which", [1, 2])
def test_pretrained_from_a_file(timm, weights, which):
    overlay = {"file": str(weights[which])}
    assert_same_weights(timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay), weights[0])
    with pytest.warns(UserWarning, match=r"head.* are for another number of classes and were not loaded"):
        fine = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert fine.num_classes == 5
    assert_same_weights(fine, weights[0], but=["head."])
    features = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert_same_weights(features, weights[0], but=["head.", "norm."])


def local_file(folder, repo_id, filename, **_):
    """Take the place of a download."""
    return str(folder / filename)


@pytest.fixture(params=["file", "state_dict", "local-dir", "hf-hub"])
def source(request, timm, tmp_path, monkeypatch):
    """Return a dat_nano with random weights, and the arguments that load them from one of timm's sources."""
    torch.manual_seed(0)
    model = timm.create_model("dat_nano", num_classes=7)
    overlay = {"num_classes": 7}
    if request.param == "file":
        save_checkpoint(model, tmp_path / "weights.npz")
        return model, "dat_nano", {"pretrained_cfg_overlay": {**overlay, "file": str(tmp_path / "weights.npz")}}
    if request.param == "state_dict":
        return model, "dat_nano", {"pretrained_cfg_overlay": {**overlay, "state_dict": model.state_dict()}}
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    if request.param == "hf-hub":
        hub = getattr(timm.models, "_hub", None) or pytest.skip("only timm itself has a hub")
        monkeypatch.setattr(hub, "hf_hub_download", partial(local_file, tmp_path / "saved"))
        return model, "hf-hub:someone/some_model", {}
    return model, f"local-dir:{tmp_path / 'saved'}", {}


@pytest.mark.filterwarnings("ignore:checkpoint. head:UserWarning")
def test_pretrained_from_every_source(timm, source):
    """The whole model, other channels, classes and sizes, and the features."""
    model, name, options = source
    x = torch.randn(1, 3, 48, 64)

    def load(**changes):
        return timm.create_model(name, pretrained=True, **options, **changes).eval()

    assert_same_weights(load(), model)
    assert torch.equal(load()(x), model.eval()(x))
    gray, stem = load(in_chans=1), model.patch_embedding[0].projection.weight
    torch.testing.assert_close(gray.patch_embedding[0].projection.weight, stem.sum(1, keepdim=True))
    assert_same_weights(gray.stages, model.stages)
    assert_same_weights(load(num_classes=3), model, but=["head."])
    assert load(num_classes=0)(x).shape == (1, 112)
    larger = load(img_size=(96, 128))
    table = larger.stages[1].blocks[1].attention.position_bias.table
    assert table.shape == (4, 2 * 96 // 8 - 1, 2 * 128 // 8 - 1)
    assert_same_weights(larger.patch_embedding, model.patch_embedding)
    maps = load(features_only=True, out_indices=(0, 2))(x)
    expected = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert all(torch.equal(actual, each) for actual, each in zip(maps, expected, strict=True))


@pytest.mark.parametrize("key", ["file", "state_dict"])
def test_pretrained_of_another_model_is_refused(timm, weights, tmp_path, key):
    def load(name, state):
        save_state(tmp_path / "some.npz", state)
        tensors = {key: torch.from_numpy(array) for key, array in state.items()}
        overlay = {key: tensors if key == "state_dict" else str(tmp_path / "some.npz")}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, device="meta")

    state = read_state(weights[2])
    with pytest.raises(CheckpointError, match="the file contains dat_tiny"):
        load("dat_small", state)
    extra = {"stages.3.blocks.2.norm1.bias": np.zeros(768, np.float32)}
    with pytest.raises(CheckpointError, match=r"expected the parameters of this \w+\n(.*\n)*.*blocks\.2\.norm1"):
        load("dat_tiny", {**state, **extra})


def test_a_head_that_the_settings_do_not_describe_is_refused(timm):
    """timm would drop it without a word, because the settings say 1000 classes."""
    state = timm.create_model("dat_nano", num_classes=7).state_dict()
    with pytest.raises(CheckpointError, match=r"head for 1000 classes .* got 7; pass pretrained_cfg_overlay=.*: 7"):
        timm.create_model("dat_nano", pretrained=True, num_classes=7, pretrained_cfg_overlay={"state_dict": state})


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
