"""Hugging Face's and torch's hubs, without a network: folders, wrong files, transformers' registry, ``hubconf.py``."""

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from dat_ref import CheckpointError, ConfigError  # noqa: E402
from dat_ref.torch import DAT, create_model, list_models  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hub():
    """Return the module for the Hugging Face Hub."""
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("jinja2")
    from dat_ref.torch import hub

    return hub


@pytest.fixture
def saved(hub, tmp_path):
    """Return a model and the folder that it was saved to."""
    torch.manual_seed(0)
    model = hub.HubDAT.from_model(create_model("dat_nano", num_classes=4, in_chans=2).eval())
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def images(channels=2, size=(64, 48)):
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ Hugging Face's Hub


def test_a_saved_folder_gives_the_same_model(hub, saved):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    same = hub.HubDAT.from_pretrained(folder)
    assert same.config == model.config
    assert not same.training
    with torch.no_grad():
        assert torch.equal(same(images()), model(images()))
    again = folder.with_name("again")
    same.save_pretrained(again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


def test_a_changed_head_is_saved(hub, saved):
    model, folder = saved
    model.reset_classifier(9, "")
    model.save_pretrained(folder)
    same = hub.HubDAT.from_pretrained(folder)
    assert (same.num_classes, same.global_pool) == (9, "")
    assert same(images()).shape == (1, 9, 4, 3)


def test_a_saved_model_is_fine_tuned_at_another_size(hub, saved):
    model, folder = saved
    tuned = hub.HubDAT.from_pretrained(folder, num_classes=7, img_size=(96, 64), backend="eager")
    assert tuned.config.image_size == (96, 64)
    assert tuned(images(size=(96, 64))).shape == (1, 7)
    assert torch.equal(tuned.norm.weight, model.norm.weight)
    with pytest.raises(ConfigError, match="image_size: expected"):
        hub.HubDAT.from_pretrained(folder, img_size=(96, 0))


def test_a_copy_is_independent_and_complete(hub):
    model = create_model("dat_spot", num_classes=3).double().eval()
    copy = hub.HubDAT.from_model(model)
    x = images(3).double()
    assert torch.equal(copy(x), model(x))
    with torch.no_grad():
        copy.head.bias.add_(1)
    assert not torch.equal(copy.head.bias, model.head.bias)
    with pytest.raises(ConfigError, match=r"expected a complete dat_ref\.torch\.DAT, got DATFeatures"):
        hub.HubDAT.from_model(create_model("dat_nano", features_only=True))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("config.json", None, ConfigError, "expected config.json with the configuration of a backbone, found none"),
        (
            "config.json",
            b"{}",
            ConfigError,
            r"config: expected the fields of DATConfig, got missing stages",
        ),
        ("config.json", b'{"config": {"stages": [], "x": 1}}', ConfigError, "config: expected .* unknown x"),
        ("model.safetensors", None, CheckpointError, "expected the weights in model.safetensors, found none"),
        ("model.safetensors", b"\0" * 64, CheckpointError, r"cannot be read as \.safetensors: damaged"),
    ],
)
def test_wrong_folders_are_refused(name, content, error, message, hub, saved):
    _, folder = saved
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(error, match=message):
        hub.HubDAT.from_pretrained(folder)


def test_pickled_weights_are_not_read(hub, saved):
    _, folder = saved
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected the weights in model\.safetensors, found none"):
        hub.HubDAT.from_pretrained(folder)


def test_weights_that_do_not_fit_the_configuration_are_refused(hub, saved):
    _, folder = saved
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["config"]["num_classes"] = 5
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"head\.weight: expected \(5, 112\), got \(4, 112\)"):
        hub.HubDAT.from_pretrained(folder)


def test_a_repository_is_uploaded_and_downloaded(hub, saved, monkeypatch):
    """With a folder in the place of the server."""
    import huggingface_hub.hub_mixin

    model, folder = saved
    server, requested = folder.with_name("server"), []

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **_):
            Path(folder_path).rename(server)
            return "commit"

    def download(repo_id, filename, **options):
        requested.append((repo_id, filename, options["revision"]))
        if not (server / filename).is_file():
            raise hub.EntryNotFoundError("404")
        return str(server / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", lambda **options: download(**options))
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert model.push_to_hub("somebody/dat") == "commit"
    same = hub.HubDAT.from_pretrained("somebody/dat", revision="v1")
    assert requested == [("somebody/dat", name, "v1") for name in ("config.json", "model.safetensors")]
    assert torch.equal(same.head.weight, model.head.weight)
    (server / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"somebody/dat: expected the weights in model\.safetensors"):
        hub.HubDAT.from_pretrained("somebody/dat")


@pytest.mark.parametrize(("module", "package"), [("hub", "huggingface_hub"), ("transformers", "transformers")])
def test_a_missing_package_is_named_with_the_extra(module, package, monkeypatch):
    for name in [name for name in sys.modules if name == f"dat_ref.torch.{module}" or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.* is needed .*pip install 'dat-ref\[hub\]'"):
        __import__(f"dat_ref.torch.{module}")


# ------------------------------------------------------------------------------------------------ transformers


@pytest.fixture
def adapter():
    """Return the module for transformers."""
    pytest.importorskip("transformers", minversion="5.10")
    from dat_ref.torch import transformers

    return transformers


def test_a_backbone_returns_the_maps_of_the_selected_stages(adapter):
    from transformers import AutoBackbone

    config = adapter.DATBackboneConfig.from_name("dat_nano", out_features=["stage1", "stage3"])
    backbone = AutoBackbone.from_config(config).eval()
    assert isinstance(backbone, adapter.DATBackbone)
    assert (backbone.channels, backbone.out_indices) == ([32, 112], [0, 2])
    x = images(3)
    with torch.no_grad():
        output = backbone(x, output_hidden_states=True)
        expected = backbone.model.forward_intermediates(x, intermediates_only=True)
        (as_tuple,) = backbone(x, return_dict=False)
    for found in (output.feature_maps, as_tuple):
        assert len(found) == 2
        assert all(torch.equal(a, b) for a, b in zip(found, expected[::2], strict=True))
    assert len(output.hidden_states) == 3
    with pytest.raises(ConfigError, match="output_attentions: expected False"):
        backbone(x, output_attentions=True)


def test_a_backbone_is_saved_and_loaded(adapter, tmp_path):
    from transformers import AutoBackbone, AutoConfig

    config = adapter.DATBackboneConfig.from_name("dat_nano", out_features=["stage2"])
    backbone = AutoBackbone.from_config(config).eval()
    backbone.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert AutoConfig.from_pretrained(tmp_path).backbone == config.backbone
    same = adapter.DATBackbone.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(same(images(3)).feature_maps[0], backbone(images(3)).feature_maps[0])
    assert adapter.DATBackbone.from_pretrained(tmp_path, out_indices=[0, 1]).channels == [32, 64]


def test_a_backbone_gets_released_weights(adapter, tmp_path):
    from dat_ref.torch.checkpoints import save_checkpoint

    model = create_model("dat_nano", num_classes=5)
    save_checkpoint(model, tmp_path / "w.safetensors")
    backbone = adapter.DATBackbone(adapter.DATBackboneConfig.from_name("dat_nano")).eval()
    report = backbone.load_checkpoint(tmp_path / "w.safetensors")
    assert report.complete
    with torch.no_grad():
        expected = model.eval().forward_intermediates(images(3), intermediates_only=True)[-1]
        assert torch.equal(backbone(images(3)).feature_maps[0], expected)


def test_wrong_configurations_are_refused(adapter):
    with pytest.raises(ConfigError, match="backbone: expected the fields of DATConfig, got unknown depth"):
        adapter.DATBackboneConfig(backbone={"depth": 3, "stages": []})
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        adapter.DATBackboneConfig.from_name("dat_nano", out_features=["stage9"])


# ------------------------------------------------------------------------------------------------ torch.hub


def test_torch_hub_builds_every_model_of_a_clone():
    if not (ROOT / "hubconf.py").is_file():
        pytest.skip("no repository around the tests")
    load = torch.hub.load
    model = load(str(ROOT), "dat_nano", source="local", num_classes=3)
    assert isinstance(model, DAT)
    assert model.num_classes == 3
    trained = load(str(ROOT), "dat_spot", source="local", pretrained=True).eval()
    assert trained.num_classes == 9
    from dat_ref.data import network_path

    assert torch.equal(
        trained.norm.weight, create_model("dat_spot", checkpoint=network_path(), num_classes=9).norm.weight
    )
    with pytest.raises(ValueError, match="pretrained: dat_tiny has no weights that ship; pass the downloaded file"):
        load(str(ROOT), "dat_tiny", source="local", pretrained=True)


def test_torch_hub_lists_the_models():
    if not (ROOT / "hubconf.py").is_file():
        pytest.skip("no repository around the tests")
    names: dict = {}
    exec(compile((ROOT / "hubconf.py").read_text(encoding="utf-8"), "hubconf.py", "exec"), names)
    found = [name for name, value in names.items() if callable(value) and not name.startswith("_")]
    assert {"partial", "update_wrapper"} | set(list_models()) >= set(found) >= set(list_models())
    assert names["dat_tiny"].__doc__.startswith("Build a backbone")
