"""Checkpoints: recognition, loading, resizing and reports; rejection of unsafe or unusable files."""

import pickle
import sys
import types
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.golden import load_golden, official_state_dicts, under
from hypothesis import given
from hypothesis import strategies as st

import dat_ref
from dat_ref import DAT, CheckpointError, Convention, DATConfig, DeformableAttentionConfig
from dat_ref.backbone import dat_shapes
from dat_ref.checkpoints import (
    LoadReport,
    detect_preset,
    detect_release,
    fit_state,
    load_params,
    official_buffers,
    official_state,
    resize_table,
)
from dat_ref.params import flatten, unflatten
from dat_ref.state_files import WRAPPERS, read_state, save_state, select_backbone

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
import dat_ref.torch.checkpoints  # noqa: E402

FIXTURE = {"cvpr2022": "model22_mini", "datpp2023": "model23_mini"}
RELEASES = list(FIXTURE)
PRESET_OF = {
    f"{release}/{name}": name if release == "cvpr2022" else name.replace("dat_", "dat_pp_")
    for release in RELEASES
    for name in ("dat_tiny", "dat_small", "dat_base", "dat_base_384")
}


def mini(release, dtype=np.float32):
    """Return a small configuration and a state dict in the format of its release, with buffers."""
    meta, arrays = load_golden(FIXTURE[release])
    config = DATConfig.from_official(meta["cfg"], release=release)
    state = {name: array.astype(dtype) for name, array in under("state", arrays).items()}
    return config, {**state, **official_buffers(config)}


def tensors(state):
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def hollow(shapes):
    """Return arrays of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def released(name):
    return hollow(official_state_dicts()[name]["state"])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(params=RELEASES)
def release(request):
    return request.param


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_format_gives_back_every_bit(tmp_path, suffix, dtype):
    _, state = mini("cvpr2022", dtype)
    state["stages.0.scalar"] = np.array(3, dtype=np.int64)
    path = tmp_path / f"weights{suffix}"
    save_state(path, state)
    assert_same(read_state(path), state)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_arrays_of_any_memory_layout_are_written(tmp_path):
    table = np.arange(12.0).reshape(3, 4)
    table.flags.writeable = False
    for suffix in (".pth", ".safetensors", ".npz"):
        save_state(tmp_path / f"w{suffix}", {"stages.0.x": table.T, "stages.0.y": table[::2, ::-1]})
        assert_same(read_state(tmp_path / f"w{suffix}"), {"stages.0.x": table.T, "stages.0.y": table[::2, ::-1]})


def test_bfloat16_comes_as_float32_of_the_same_values(tmp_path):
    values = torch.tensor([1.0, -0.0, 3.140625, 1e-38, float("inf")]).bfloat16()
    safetensors_torch.save_file({"stages.x": values, "stages.flag": torch.tensor([True])}, tmp_path / "w.safetensors")
    torch.save({"stages.x": values}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        found = read_state(tmp_path / name)["stages.x"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values.float().numpy())
    assert read_state(tmp_path / "w.safetensors")["stages.flag"].dtype == bool


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_inside_containers(tmp_path, wrapper):
    _, state = mini("datpp2023")
    torch.save({"epoch": 3, "optimizer": {"state": {}}, wrapper: tensors(state)}, tmp_path / "w.pth")
    assert_same(read_state(tmp_path / "w.pth"), state)


def test_averaged_weights_are_preferred(tmp_path):
    one, two = {"stages.x": torch.ones(1)}, {"stages.x": torch.full((1,), 2.0)}
    torch.save({"model": one, "model_ema": two}, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth")["stages.x"] == 2
    torch.save({"model": one, "model_ema": None, "state_dict": {"model": one}}, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth")["stages.x"] == 1


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "_orig_mod.module.", "module.model.backbone."])
def test_prefixes_are_removed(prefix):
    _, state = mini("cvpr2022")
    found, others = select_backbone({prefix + name: array for name, array in state.items()})
    assert_same(found, state)
    assert others == ()


def test_two_backbones_in_one_file_are_rejected():
    with pytest.raises(CheckpointError, match="expected one backbone, found 2, under the prefixes"):
        select_backbone({"backbone.stages.0.x": 0, "model.stages.0.x": 0})


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("writer", ["pickle", "torch", "npz"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, writer):
    marker, path = tmp_path / "was_run", tmp_path / ("w.npz" if writer == "npz" else "w.pth")
    loot = {"model": {"stages.x": Evil(marker)}}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(loot, protocol=2))
    elif writer == "torch":
        torch.save(loot, path)
    else:
        np.savez(path, stages=np.array([Evil(marker)], dtype=object))
    with pytest.raises(CheckpointError, match="Object arrays cannot" if writer == "npz" else r"refused: .* could run"):
        read_state(path)
    assert not marker.exists()


def test_a_whole_model_object_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"refused: it needs torch\.nn\.modules\.linear\.Linear"):
        read_state(tmp_path / "w.pth")


def test_trainer_settings_in_a_checkpoint_are_dropped(tmp_path, monkeypatch):
    """The released training script stores its yacs configuration in the checkpoint; yacs need not be installed."""

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = CfgNode(TRAIN=CfgNode(EPOCHS=300), NAME="dat_tiny")
    node.__dict__["__immutable__"] = True
    node.__dict__["__deprecated_keys__"] = {"OLD"}
    options = __import__("argparse").Namespace(lr=1e-3, node=node)
    everything = {"max_accuracy": np.float64(81.9), "config": node, "args": options}
    torch.save({"model": {"stages.x": torch.ones(2)}, **everything}, tmp_path / "w.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert_same(read_state(tmp_path / "w.pth"), {"stages.x": np.ones(2, np.float32)})


DAMAGED = {
    "empty": (b"", "is empty"),
    "page": (b"<!DOCTYPE html><html>quota exceeded</html>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
    "text": (b"this is not a checkpoint at all, whatever its name says", "cannot be read as"),
    "zeros": (bytes(4096), "cannot be read as"),
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("what", DAMAGED)
def test_files_that_are_no_checkpoint_are_rejected(tmp_path, what, suffix):
    content, message = DAMAGED[what]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("kept", [0.2, 0.7, 0.99])
def test_a_truncated_file_is_rejected(tmp_path, suffix, kept):
    path = tmp_path / f"w{suffix}"
    save_state(path, mini("cvpr2022")[1])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match="damaged, cut short"):
        read_state(path)


def test_a_safetensors_header_that_looks_like_html_is_accepted(tmp_path):
    """The first bytes of safetensors are the header's length: 15392 reads ' <' in ASCII."""
    for length in range(15000, 15500):
        save_state(tmp_path / "w.safetensors", {f"stages.{'x' * length}": np.ones(1)})
        if (tmp_path / "w.safetensors").read_bytes().startswith(b" <"):
            break
    assert (tmp_path / "w.safetensors").read_bytes().startswith(b" <")
    assert list(read_state(tmp_path / "w.safetensors").values()) == [np.ones(1)]


def test_a_zip_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / "w.pth")


def test_paths_that_are_no_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"ends in one of \.safetensors"):
        read_state(tmp_path / "weights.h5")
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors, \.npz or \.pth"):
        save_state(tmp_path / "weights.onnx", {})
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match="got a folder"):
        read_state(tmp_path / "folder.pth")


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"epoch": 3}])
def test_a_torch_file_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="expected"):
        read_state(tmp_path / "w.pth")


@pytest.mark.parametrize(("module", "suffix"), [("torch", ".pth"), ("safetensors", ".safetensors")])
def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, module, suffix):
    path = tmp_path / f"w{suffix}"
    save_state(path, {"stages.x": np.ones(1)})
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    for use in (lambda: read_state(path), lambda: save_state(path, {})):
        with pytest.raises(CheckpointError, match=rf"{module} is needed to (read|write).*pip install"):
            use()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_failed_writing_leaves_the_file_that_was_there(tmp_path, suffix, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"precious")
    for owner, name in ((np, "savez"), (torch, "save"), (safetensors_numpy, "save")):
        monkeypatch.setattr(owner, name, disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"x": np.ones(3)})
    with pytest.raises(CheckpointError, match="expected numeric arrays, got objects in x"):
        save_state(path, {"x": np.array([object()])})
    assert path.read_bytes() == b"precious"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------------------ recognition


@pytest.mark.parametrize("name", PRESET_OF)
def test_released_files_are_recognised(name):
    state = released(name)
    assert detect_release(state) == name.split("/")[0]
    found, config = detect_preset(state)
    # The state dicts of the two DAT++-B models have the same names and shapes.
    assert found == PRESET_OF[name].replace("dat_pp_base_384", "dat_pp_base")
    assert {key: tuple(array.shape) for key, array in official_state(hollow_tree(config), config).items()} == {
        key: tuple(shape) for key, shape in official_state_dicts()[name]["state"].items()
    }


def hollow_tree(config):
    return unflatten(hollow(flatten(dat_shapes(config))))


@pytest.mark.parametrize("name", dat_ref.PRESETS)
def test_files_of_ours_are_recognised(name):
    config = dat_ref.config(name, num_classes=7, in_channels=5)
    state = hollow(flatten(dat_shapes(config)))
    assert detect_release(state) == "dat_ref"
    found, found_config = detect_preset(state)
    assert found == name.replace("dat_pp_base_384", "dat_pp_base")
    assert (found_config.num_classes, found_config.in_channels) == (7, 5)


def test_a_detector_of_another_size_is_recognised():
    state = {name: array for name, array in released("cvpr2022/dat_small").items() if "cls_" not in name}
    state |= hollow({f"norms.{i}.norm.weight": (96 << i,) for i in range(4)})
    state["stages.2.attns.1.rpe_table"] = np.zeros((12, 39, 63), np.float32)
    name, config = detect_preset(state)
    assert (name, config.num_classes) == ("dat_small", 0)


def test_other_models_are_not_recognised(release):
    assert detect_preset(mini(release)[1]) is None
    with pytest.raises(CheckpointError, match=r"found 2 others: conv1.weight, fc.bias"):
        detect_release(hollow({"conv1.weight": (1,), "fc.bias": (1,)}))


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_released_file_gives_the_released_logits(tmp_path, release, suffix):
    config, state = mini(release, np.float64)
    _, arrays = load_golden(FIXTURE[release])
    save_state(tmp_path / f"w{suffix}", {f"module.{name}": array for name, array in state.items()})
    params, report = load_params(tmp_path / f"w{suffix}", config)
    assert report.complete
    assert report.release == release
    assert report.hints == ()
    assert len(report.loaded) == len(flatten(params))
    assert_agree(DAT(config, params)(arrays["x"]), arrays["logits"], 1e-9, "logits")


def test_our_own_file_is_loaded(tmp_path, release):
    config, state = mini(release)
    tree = unflatten(fit_state(state, config).arrays)
    save_state(tmp_path / "w.safetensors", flatten(tree))
    found, report = load_params(tmp_path / "w.safetensors", config)
    assert report.release == "dat_ref"
    assert_same(flatten(found), flatten(tree))


def test_half_precision_comes_as_float32(tmp_path):
    config, state = mini("cvpr2022", np.float16)
    save_state(tmp_path / "w.npz", state)
    params, _ = load_params(tmp_path / "w.npz", config)
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(np.float32)}


def test_released_to_ours_and_back_is_bit_equal(tmp_path, release):
    config, state = mini(release)
    there_and_back(tmp_path, config, state)


def test_a_preset_to_ours_and_back_is_bit_equal(tmp_path):
    rng = np.random.default_rng(5)
    shapes = official_state_dicts()["cvpr2022/dat_tiny"]["state"]
    config = dat_ref.config("dat_tiny")
    state = {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    there_and_back(tmp_path, config, {**state, **official_buffers(config)})


def there_and_back(folder, config, state):
    torch.save({"model": tensors(state), "epoch": 299}, folder / "released.pth")
    ours, _ = load_params(folder / "released.pth", config)
    save_state(folder / "ours.safetensors", flatten(ours))
    back, _ = load_params(folder / "ours.safetensors", config)
    save_state(folder / "back.pth", official_state(back, config))
    loaded = torch.load(folder / "back.pth", weights_only=True)
    assert loaded.keys() == {"model"}
    assert_same({name: tensor.numpy() for name, tensor in loaded["model"].items()}, state)


# ------------------------------------------------------------------------------------------------ mismatches


def test_missing_unexpected_and_misshaped_are_listed(release):
    config, state = mini(release)
    del state["stages.2.attns.1.proj_k.bias"]
    state["stages.1.layer_norms.0.norm.weight"] = np.zeros(3, np.float32)
    state["something.else"] = np.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        fit_state(state, config, source="w.pth")
    text = str(caught.value)
    assert text.startswith("w.pth: expected the parameters of this configuration")
    assert "missing (1):\n    stages.2.attns.1.proj_k.bias" in text
    assert "unexpected (1):\n    something.else" in text
    assert "stages.1.layer_norms.0.norm.weight: expected" in text
    assert "got (3,)\n" in text + "\n"


def test_mismatched_parameters_keep_their_values_if_not_strict(tmp_path, release):
    config, state = mini(release)
    config = replace(config, num_classes=4)
    save_state(tmp_path / "w.npz", state)
    with pytest.raises(CheckpointError, match=r"cls_head.weight: expected \(4, (.*\n)*.*hint: new_head=True"):
        load_params(tmp_path / "w.npz", config)
    start = dat_ref.init_params(config, seed=3)
    found, report = load_params(tmp_path / "w.npz", config, strict=False, start=start)
    assert [name for name, _, _ in report.misshaped] == ["cls_head.weight", "cls_head.bias"]
    assert_same(found["head"], start["head"])
    np.testing.assert_array_equal(found["norm"]["weight"], state["cls_norm.norm.weight"])
    found, _ = load_params(tmp_path / "w.npz", config, strict=False)
    assert found["head"]["weight"].shape == start["head"]["weight"].shape


def test_a_head_is_skipped_by_a_headless_model(release):
    config, state = mini(release)
    report = fit_state(state, replace(config, num_classes=0)).report
    assert report.complete
    assert {"cls_head.weight", "cls_head.bias"} <= set(report.ignored)


def test_report_of_a_detector(tmp_path):
    config, state = mini("cvpr2022")
    detector = {f"backbone.{name}": array for name, array in state.items() if not name.startswith("cls_")}
    detector |= {f"backbone.norms.{i}.norm.weight": np.ones(6 << i, np.float32) for i in range(4)}
    detector |= {"neck.lateral_convs.0.conv.weight": np.ones(3, np.float32)}
    torch.save({"meta": {"epoch": 36}, "state_dict": tensors(detector)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="a detector's backbone: it has a norm for each stage") as caught:
        load_params(tmp_path / "w.pth", config)
    assert "missing (4):\n    cls_norm.norm.weight" in str(caught.value)
    params, report = load_params(tmp_path / "w.pth", config, strict=False)
    assert "neck.lateral_convs.0.conv.weight" in report.ignored
    assert len(report.unexpected) == 4
    DAT(config, params)


def test_another_model_is_named(tmp_path):
    small, tiny = released("cvpr2022/dat_small"), released("cvpr2022/dat_tiny")
    with pytest.raises(CheckpointError, match=r"the file contains dat_small: dat_ref.config\('dat_small'\)"):
        fit_state(small, dat_ref.config("dat_tiny"))
    with pytest.raises(CheckpointError, match="the file contains dat_tiny"):
        fit_state(tiny, dat_ref.config("dat_small"))
    with pytest.raises(CheckpointError, match="the file contains dat_pp_tiny"):
        fit_state(released("datpp2023/dat_tiny"), dat_ref.config("dat_tiny"))
    with pytest.raises(CheckpointError, match="most of it is missing"):
        fit_state(released("cvpr2022/dat_base"), dat_ref.config("dat_tiny"), strict=False)


def test_report_hints_at_weights_for_another_geometry():
    config, state = mini("cvpr2022")

    def to_cells(block):
        if not isinstance(block.attention, DeformableAttentionConfig):
            return block
        return replace(block, attention=replace(block.attention, convention=Convention.CELL_CENTER))

    cells = replace(config, stages=tuple(tuple(map(to_cells, blocks)) for blocks in config.stages))
    assert fit_state(state, cells).report.hints == (
        "trained in the geometry of cvpr2022; this configuration samples at other points",
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    config, state = mini("datpp2023")
    state["stages.3.attns.0.proj_v.weight"][1, 2] = bad
    with pytest.raises(CheckpointError, match=r"got 1 NaN or inf of 4096 in stages.3.blocks.0.attention.value.weight"):
        fit_state(state, config, strict=False)


def test_text_of_a_report():
    report = LoadReport(
        "cvpr2022", loaded=("a", "b"), unexpected=tuple("cdefghijklm"), resized=(("t", (1, 3, 3), (1, 5, 5)),)
    )
    assert str(report).splitlines()[:3] == ["cvpr2022 names: 2 arrays loaded", "  unexpected (11):", "    c"]
    assert "    … and 3 more" in str(report)
    assert "    t: (1, 3, 3) → (1, 5, 5)" in str(report)


# ------------------------------------------------------------------------------------------------ tables

sides = st.integers(1, 14)


@given(heads=st.integers(1, 3), old=st.tuples(sides, sides), new=st.tuples(sides, sides), seed=st.integers(0, 99))
def test_tables_are_resized_as_by_torch(heads, old, new, seed):
    table = np.random.default_rng(seed).standard_normal((heads, *old))
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        resized = resize_table(table.astype(dtype), new)
        expected = torch.nn.functional.interpolate(torch.from_numpy(table.astype(dtype))[None], new, mode="bicubic")[0]
        assert resized.dtype == dtype
        np.testing.assert_allclose(resized, expected.numpy(), rtol=0, atol=tolerance)
    np.testing.assert_array_equal(resize_table(table, old), table)


def test_the_resizing_test_rejects_another_kernel():
    table = np.random.default_rng(0).standard_normal((1, 5, 7))
    wrong = torch.nn.functional.interpolate(torch.from_numpy(table)[None], (9, 4), mode="bicubic", align_corners=True)
    assert np.abs(resize_table(table, (9, 4)) - wrong[0].numpy()).max() > 0.1


def test_a_file_of_another_image_size_is_resized_as_by_the_released_loader():
    """From 224 to 384, bias tables grow from 27² to 47², and window tables (window 7 to 12) from 13² to 23²."""
    small, large = dat_ref.config("dat_base"), dat_ref.config("dat_base_384")
    rng = np.random.default_rng(2)
    state = released("cvpr2022/dat_base")
    for name in state:
        if "table" in name:
            state[name] = rng.standard_normal(state[name].shape).astype(np.float32)
    fit = fit_state(state, large)
    assert fit.report.complete
    assert len(fit.report.resized) == sum(name.endswith("table") for name in state)
    released_table = torch.from_numpy(state["stages.2.attns.0.relative_position_bias_table"])  # (13², heads)
    square = released_table.reshape(1, 13, 13, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, (23, 23), mode="bicubic")[0].numpy()
    found = fit.arrays["stages.2.blocks.0.attention.window_bias.table"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert fit_state(state, small).report.resized == ()


def test_tables_of_images_that_are_not_square_are_resized():
    config, state = mini("datpp2023")
    fit = fit_state(state, config.resized((96, 160)))
    assert fit.arrays["stages.0.blocks.1.attention.position_bias.table"].shape == (1, 47, 79)


def test_a_neighborhood_table_is_not_resized():
    """Displacements in it are whole pixels, so a table for another kernel belongs to another model."""
    config, state = mini("datpp2023")
    state["stages.0.attns.0.rpb"] = np.zeros((1, 9, 9), np.float32)
    with pytest.raises(CheckpointError, match=r"stages.0.attns.0.rpb: expected \(1, 13, 13\), got \(1, 9, 9\)"):
        fit_state(state, config)


def test_a_window_table_that_is_not_square_is_misshaped():
    config, state = mini("cvpr2022")
    state["stages.0.attns.0.relative_position_bias_table"] = np.zeros((48, 1), np.float32)
    with pytest.raises(CheckpointError, match=r"relative_position_bias_table: expected \(1, 7, 7\), got \(48, 1\)"):
        fit_state(state, config)


# ------------------------------------------------------------------------------------------------ buffers


def test_buffers_are_those_of_the_released_modules():
    """Index (dy + w - 1)(2w - 1) + dx + w - 1; mask -100 between positions of the rolled map in different zones."""
    config, _ = mini("cvpr2022")
    buffers = official_buffers(config)
    index = buffers["stages.0.attns.0.relative_position_index"]
    mask = buffers["stages.1.attns.1.attn_mask"]  # map 16², windows of 4, shift 2
    assert (index.dtype, mask.dtype, mask.shape) == (np.int64, np.float32, (16, 16, 16))
    places = [(y, x) for y in range(4) for x in range(4)]
    for i, (qy, qx) in enumerate(places):
        for j, (ky, kx) in enumerate(places):
            assert index[i, j] == (qy - ky + 3) * 7 + (qx - kx + 3)

    def zone(at):
        return 0 if at < 16 - 4 else 1 if at < 16 - 2 else 2

    for number in range(16):
        top, left = 4 * (number // 4), 4 * (number % 4)
        zones = [(zone(top + y), zone(left + x)) for y, x in places]
        for i in range(16):
            for j in range(16):
                assert mask[number, i, j] == (0 if zones[i] == zones[j] else -100)


def test_buffers_need_whole_windows():
    with pytest.raises(CheckpointError, match=r"maps of whole windows of 7, as the release requires, got \(60, 56\)"):
        official_buffers(dat_ref.config("dat_tiny").resized((240, 224)))


def test_a_checkpoint_for_other_classes_starts_a_new_head(tmp_path):
    """`create_model` loads all but the head and warns; any other mismatch is an error."""
    torch = pytest.importorskip("torch")
    from dat_ref.torch import create_model
    from dat_ref.torch.checkpoints import save_checkpoint

    trained = create_model("dat_pp_tiny", num_classes=7)
    save_checkpoint(trained, tmp_path / "trained.safetensors")
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias are for another number of classes"):
        tuned = create_model("dat_pp_tiny", checkpoint=tmp_path / "trained.safetensors", num_classes=3)
    assert tuned.head.weight.shape == (3, 512)
    for name, leaf in trained.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(leaf, tuned.state_dict()[name])
    with pytest.raises(CheckpointError, match="hint: the file contains dat_pp_tiny"):
        create_model("dat_pp_small", checkpoint=tmp_path / "trained.safetensors", num_classes=3)


# ------------------------------------------------------------------------------------------------ image channels


@pytest.mark.parametrize("release", [*RELEASES, "dat_ref"])
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_rgb_weights_are_converted_to_other_images(release, channels, tmp_path):
    """Images whose channels are equal keep their output; the report names the converted array."""
    config, state = mini("datpp2023" if release == "dat_ref" else release)
    if release == "dat_ref":
        params, _ = load_params(saved(state, tmp_path / "released.npz"), config)
        state = flatten(params)
    path = saved(state, tmp_path / "rgb.npz")
    target = replace(config, in_channels=channels)
    params, report = load_params(path, target)
    name = "patch_embedding.0.projection.weight" if release == "dat_ref" else "patch_proj.0.weight"
    old = state[name]
    assert report.converted == ((name, old.shape, (len(old), channels, *old.shape[2:])),)
    assert report.complete
    assert "converted from RGB to the channels of the images (1)" in str(report)
    new = params["patch_embedding"][0]["projection"]["weight"]
    if channels % 3:
        assert channels == 1 or np.allclose(new[:, 0], old[:, 0] * 3 / channels)
    if channels in (1, 6):
        np.testing.assert_allclose(new.sum(1), old.sum(1), atol=1e-6)

    model = dat_ref.torch.DAT(target)
    assert dat_ref.torch.checkpoints.load_checkpoint(model, path).converted == report.converted
    np.testing.assert_array_equal(model.patch_embedding[0].projection.weight.detach().numpy(), new)


def test_a_stem_of_other_images_than_rgb_is_refused(tmp_path):
    config, state = mini("cvpr2022")
    state["patch_proj.0.weight"] = state["patch_proj.0.weight"][:, :2]
    with pytest.raises(
        CheckpointError, match=r"patch_proj\.0\.weight: expected \(\d+, 4, 4, 4\), got \(\d+, 2, 4, 4\)"
    ):
        load_params(saved(state, tmp_path / "two.npz"), replace(config, in_channels=4))


def saved(state, path):
    save_state(path, state)
    return path


# ------------------------------------------------------------------------------------------------ shared modules


def with_shared_parameters():
    """Return a model with an MLP that two blocks use and a parameter that two layers share."""
    model = dat_ref.torch.DAT(mini("datpp2023")[0])
    first, second = model.stages[0].blocks[:2]
    second.mlp = first.mlp
    second.norm1.weight = first.norm1.weight
    return model


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth"])
def test_shared_parameters_are_written_under_each_name(suffix, tmp_path):
    model, path = with_shared_parameters(), tmp_path / f"weights.{suffix}"
    save, load = dat_ref.torch.checkpoints.save_checkpoint, dat_ref.torch.checkpoints.load_checkpoint
    save(model, path)
    x = torch.randn(1, 3, 64, 96)
    for other in (dat_ref.torch.DAT(model.config), with_shared_parameters()):
        report = load(other, path)
        assert report.complete
        assert not report.ignored
        assert torch.equal(other.eval()(x), model.eval()(x))
    assert set(flatten(model.to_numpy())) == set(model.state_dict())
    save(model, tmp_path / "released.pth", official=True)
    load(dat_ref.torch.DAT(model.config), tmp_path / "released.pth")


def test_a_file_with_shared_parameters_once_loads_into_a_model_that_shares_them(tmp_path):
    """Files of version 0.1 have one name of a shared parameter only."""
    model = with_shared_parameters()
    once = {name: leaf.detach().numpy() for name, leaf in model.named_parameters()}
    assert len(once) < len(model.state_dict())
    other = with_shared_parameters()
    dat_ref.torch.checkpoints.load_checkpoint(other, saved(once, tmp_path / "once.npz"))
    for name, leaf in model.state_dict().items():
        assert torch.equal(leaf, other.state_dict()[name])


def test_different_arrays_of_one_shared_parameter_are_refused(tmp_path):
    separate = dat_ref.torch.DAT(mini("datpp2023")[0])
    with torch.no_grad():
        separate.stages[0].blocks[1].norm1.weight.add_(1)
    dat_ref.torch.checkpoints.save_checkpoint(separate, tmp_path / "weights.npz")
    with pytest.raises(CheckpointError, match=r"expected equal arrays for .* and .*, which share one parameter"):
        dat_ref.torch.checkpoints.load_checkpoint(with_shared_parameters(), tmp_path / "weights.npz")
