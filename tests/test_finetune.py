"""Fine-tuning: prefixes, other sizes and classes, layer decay, frozen stages, refused files, exact resumption."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_ref import CheckpointError, ConfigError, init_params
from dat_ref.checkpoints import fit_state, official_state, read_checkpoint, resize_table
from dat_ref.config import BlockConfig, DATConfig, DeformableAttentionConfig, WindowAttentionConfig
from dat_ref.params import flatten
from dat_ref.state_files import backbone_prefix, save_state, select_backbone
from dat_ref.train_config import TrainConfig

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from helpers.runs import CONFIG, Noise  # noqa: E402

from dat_ref.cli import main  # noqa: E402
from dat_ref.torch import DAT, create_model  # noqa: E402
from dat_ref.torch.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from dat_ref.torch.train import checkpoint, fit, optimizer  # noqa: E402
from dat_ref.torch.train.finetune import freeze_stages, layer_depths  # noqa: E402

PREFIXES = ["net.", "encoder.", "student.backbone.", "module.", "model.", "_orig_mod.module.", "stages.0.", "x.y-z.0."]
HEAD = ("head.weight", "head.bias")


def two_stages(size=(32, 32), classes=3, drop_path=0.0):
    """Return a backbone of two stages, with a window table and two tables of the image size."""
    first = DeformableAttentionConfig(8, 2, groups=2, stride=2, kernel_size=3, size=(8, 8))
    second = DeformableAttentionConfig(16, 2, stride=1, kernel_size=3, size=(4, 4))
    window = WindowAttentionConfig(8, 2, window_size=4)
    stages = ((BlockConfig(window), BlockConfig(first)), (BlockConfig(second),))
    config = DATConfig(stages, num_classes=classes, image_size=(32, 32), drop_path_rate=drop_path)
    return config.resized(size)


CONFIG_ = two_stages()
STATES = {
    "ours": flatten(init_params(CONFIG_, seed=1)),
    "released": official_state(init_params(CONFIG_, seed=1), replace(CONFIG_, num_classes=3)),
}


def with_prefix(state, prefix, **others):
    return {**{prefix + name: array for name, array in state.items()}, **others}


def model_for(config=CONFIG_, seed=5):
    torch.manual_seed(seed)
    return DAT(config)


@pytest.fixture
def file(tmp_path):
    """Return a file of weights under a prefix, with a projection that the backbone does not have."""
    path = tmp_path / "pretrained.safetensors"
    save_state(path, with_prefix(STATES["ours"], "student.backbone.", **{"student.head.weight": np.zeros(2)}))
    return path


# ------------------------------------------------------------------------------------------------ prefixes

parts = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="_-"), min_size=1, max_size=8)


@given(names=st.sampled_from(list(STATES)), path=st.lists(parts, max_size=4), given=st.booleans())
def test_any_prefix_is_found_and_removed(names, path, given):
    state, prefix = STATES[names], "".join(f"{part}." for part in path)
    file = with_prefix(state, prefix, **{"neck.weight": 1, "teacher.stages.0.weight": 2})
    found, others = select_backbone(file, prefix=prefix if given else None)
    assert found.keys() - {"neck.weight", "teacher.stages.0.weight"} == state.keys()
    assert set(others) == (set() if not prefix else {"neck.weight", "teacher.stages.0.weight"})
    assert backbone_prefix(file, prefix=prefix.removesuffix(".")) == prefix
    assert fit_state({name: found[name] for name in state}, CONFIG_).report.complete


def test_the_prefix_test_rejects_a_wrong_prefix():
    with pytest.raises(CheckpointError, match=r"w\.pth: prefix: expected the prefix of a backbone \('a\.'\), got 'b'"):
        backbone_prefix(with_prefix(STATES["ours"], "a."), "w.pth", "b")
    other = {"b.conv.weight": 1, "clip.embeddings.patch_embedding.weight": 2}  # not the first layer of a DAT
    with pytest.raises(CheckpointError, match=r"prefix of a backbone \(none\), got 'b'"):
        backbone_prefix(other, prefix="b")
    assert backbone_prefix(with_prefix(STATES["ours"], "a.") | other) == "a."


@pytest.mark.parametrize(
    ("first", "second"),
    [("student.", "teacher."), ("", "ema."), ("model.", "model.teacher."), ("model.", "model_ema.")],
)
def test_one_of_two_backbones_has_to_be_selected(first, second):
    names = STATES["ours"]
    twice = with_prefix(dict.fromkeys(names, 1), first) | with_prefix(dict.fromkeys(names, 2), second)
    with pytest.raises(
        CheckpointError, match=r"expected one backbone, found 2, under the prefixes .*; select one with"
    ):
        select_backbone(twice)
    for prefix, value in ((first, 1), (second, 2)):
        found, others = select_backbone(twice, prefix=prefix)
        assert found == dict.fromkeys(names, value)
        assert len(others) == len(found)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_reader_of_files_takes_any_prefix(prefix, tmp_path):
    path = tmp_path / "w.npz"
    save_state(path, with_prefix(STATES["released"], prefix))
    model = model_for()
    report = load_checkpoint(model, path)
    assert (report.complete, report.prefix, len(report.loaded)) == (True, prefix, len(STATES["ours"]))
    assert f"names under the prefix {prefix!r}: {len(report.loaded)} arrays loaded" in str(report)
    _, same = read_checkpoint(path, prefix).params(CONFIG_)
    assert same == report
    for name, leaf in model.named_parameters():
        np.testing.assert_array_equal(leaf.detach().numpy(), STATES["ours"][name])


def test_commands_take_a_prefix(tmp_path, capsys):
    """One of two backbones is converted, and a wrong prefix is refused with the right ones."""
    model, path = create_model("dat_spot", num_classes=4), tmp_path / "two.safetensors"
    state = {name: leaf.detach().numpy() for name, leaf in model.state_dict().items()}
    save_state(
        path, with_prefix(state, "student.") | with_prefix({name: 0 * state[name] for name in state}, "teacher.")
    )
    command = ["convert", str(path), str(tmp_path / "one.npz"), "--model", "dat_spot"]
    assert main(command) == 2
    assert "found 2, under the prefixes 'student.', 'teacher.'" in capsys.readouterr().err
    assert main([*command, "--prefix", "studnt"]) == 2
    assert "expected the prefix of a backbone ('student.', 'teacher.'), got 'studnt'" in capsys.readouterr().err
    assert main([*command, "--prefix", "student"]) == 0
    assert "dat_ref names under the prefix 'student.'" in capsys.readouterr().out
    found = read_checkpoint(tmp_path / "one.npz").state
    assert all(np.array_equal(found[name], state[name]) for name in state)
    for name in ("agree", "explain"):
        assert main([name, "--prefix", "student"]) == 2
        assert "--prefix: expected --checkpoint as well" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ sizes and classes


@given(
    names=st.sampled_from(list(STATES)),
    size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    classes=st.integers(1, 9),
    has_head=st.booleans(),
)
def test_weights_fit_any_size_and_number_of_classes(names, size, classes, has_head):
    heads = ("head.", "cls_head.")
    state = {name: array for name, array in STATES[names].items() if has_head or not name.startswith(heads)}
    target = two_stages(size, classes)
    fit, report = (found := fit_state(state, target, new_head=True)).arrays, found.report
    assert report.complete
    new = not has_head or classes != 3
    assert [(name.removeprefix("cls_"), shape, old is None) for name, shape, old in report.initialized] == (
        [("head.weight", (classes, 16), not has_head), ("head.bias", (classes,), not has_head)] if new else []
    )
    assert STATES["ours"].keys() - fit.keys() == (set(HEAD) if new else set())
    sizes = {"stages.0.blocks.1.": (size[0] // 4, size[1] // 4), "stages.1.blocks.0.": (size[0] // 8, size[1] // 8)}
    for prefix, (height, width) in sizes.items():
        name = f"{prefix}attention.position_bias.table"
        expected = resize_table(STATES["ours"][name], (2 * height - 1, 2 * width - 1))
        np.testing.assert_array_equal(fit[name], expected)
    for name in STATES["ours"].keys() - set(HEAD):
        if "position_bias" not in name:
            np.testing.assert_array_equal(fit[name], STATES["ours"][name])


def test_a_report_lists_what_was_loaded_resized_and_initialized(file):
    model = model_for(two_stages((64, 48), classes=5))
    before = model.head.weight.detach().clone()
    text = str(load_checkpoint(model, file, new_head=True))
    assert text.splitlines() == [
        f"dat_ref names under the prefix 'student.backbone.': {len(STATES['ours']) - 2} arrays loaded",
        "  resized (2):",
        "    stages.0.blocks.1.attention.position_bias.table: (2, 15, 15) → (2, 31, 23)",
        "    stages.1.blocks.0.attention.position_bias.table: (2, 7, 7) → (2, 15, 11)",
        "  newly initialized (2):",
        "    head.weight: (5, 16), (3, 16) in the file",
        "    head.bias: (5,), (3,) in the file",
        "  ignored (1):",
        "    student.head.weight",
    ]
    assert torch.equal(model.head.weight, before)
    model(torch.zeros(1, 3, 64, 48))


def test_a_new_head_hides_no_other_mismatch(tmp_path):
    state = dict(STATES["ours"])
    del state["stages.1.blocks.0.norm1.bias"]
    save_state(tmp_path / "w.npz", state)
    model = model_for(two_stages(classes=5))
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing \(1\):\n    stages\.1\.blocks\.0\.norm1\.bias"):
        load_checkpoint(model, tmp_path / "w.npz", new_head=True)
    with pytest.raises(CheckpointError, match=r"mis-shaped \(2\):(\n.*)*hint: new_head=True"):
        load_checkpoint(model, save(tmp_path / "whole.npz", STATES["ours"]))
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


def save(path, state):
    save_state(path, state)
    return path


def test_create_model_fine_tunes_in_one_call(tmp_path):
    path = tmp_path / "wrapped.pth"
    trained = create_model("dat_nano", num_classes=7)
    torch.save({"state_dict": {f"net.{name}": leaf for name, leaf in trained.state_dict().items()}}, path)
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias are for another number of classes"):
        tuned = create_model("dat_nano", checkpoint=path, num_classes=4, img_size=(96, 64))
    assert tuned(torch.zeros(1, 3, 96, 64)).shape == (1, 4)
    headless = {f"a.{name}": leaf for name, leaf in trained.state_dict().items() if not name.startswith("head.")}
    torch.save(headless | {f"b.{name}": leaf for name, leaf in trained.state_dict().items()}, path)
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias are not in the file"):
        create_model("dat_nano", checkpoint=path, num_classes=7, prefix="a")
    create_model("dat_nano", checkpoint=path, num_classes=7, prefix="b")


# ------------------------------------------------------------------------------------------------ layers


def test_depths_follow_the_layers():
    depths = layer_depths(DAT(two_stages()))
    order = ["patch_embedding.0.norm", "stages.0.blocks.0.norm1", "stages.0.blocks.1.mlp.linear1", "downsamples.0.norm"]
    order += ["stages.1.blocks.0.norm2", "head"]
    assert [depths[f"{name}.weight"] for name in order] == [0, 1, 2, 3, 4, 5]
    assert depths["norm.weight"] == depths["stages.1.blocks.0.norm2.weight"]
    assert depths.keys() == dict(DAT(two_stages()).named_parameters()).keys()


@given(decay=st.floats(0.05, 0.99), weight_decay=st.floats(0, 1))
def test_the_learning_rate_falls_with_the_distance_from_the_head(decay, weight_decay):
    model = DAT(two_stages())
    names, depths = {leaf: name for name, leaf in model.named_parameters()}, layer_depths(model)
    groups = optimizer.parameter_groups(model, weight_decay, decay)
    assert sorted(names[leaf] for group in groups for leaf in group["params"]) == sorted(names.values())
    for group in groups:
        for leaf in group["params"]:
            name = names[leaf]
            assert group["lr_scale"] == pytest.approx(decay ** (5 - depths[name]))
            assert group["weight_decay"] == (0 if leaf.ndim == 1 or "table" in name else weight_decay)


def test_layer_decay_and_frozen_stages_need_a_backbone():
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"layer_decay: expected a model with group_matcher\(\), got Linear"):
        optimizer.parameter_groups(plain, 0.1, 0.5)
    with pytest.raises(ConfigError, match=r"frozen_stages: expected a dat_ref\.torch\.DAT, got Linear"):
        freeze_stages(plain, 1)
    with pytest.raises(ConfigError, match="frozen_stages: expected at most 2, the stages of the model, got 3"):
        freeze_stages(DAT(two_stages()), 3)
    assert freeze_stages(plain, 0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay: expected 0 < layer_decay ≤ 1, got 0.0"),
        ({"layer_decay": 1.1}, "layer_decay: expected 0 < layer_decay ≤ 1, got 1.1"),
        ({"layer_decay": 10**400}, "layer_decay: expected a finite number, got 1000"),
        ({"frozen_stages": -1}, "frozen_stages: expected 0 or more, got -1"),
        ({"init_prefix": "net"}, "init_prefix: expected init_from as well, got 'net' alone"),
        ({"init_from": "w.pth", "init": "zero_offset"}, "init: expected '' with init_from, .*, got 'zero_offset'"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


# ------------------------------------------------------------------------------------------------ runs

TUNED = replace(CONFIG, layer_decay=0.5, frozen_stages=1, epochs=2, amp="bfloat16")


def tune(folder, file, config=TUNED, **options):
    """Fine-tune on an image size and a number of classes that the file does not have."""
    model = model_for(two_stages((32, 40), drop_path=config.drop_path))
    config = replace(config, init_from=str(file))
    return fit(config, Noise(), Noise(7), folder, model=model, quiet=True, **options)


def test_a_run_starts_from_a_file_and_reports_it(file, tmp_path):
    reports = []
    result = tune(tmp_path / "run", file, on_init=reports.append)
    (report,) = reports
    assert report.complete
    assert (report.prefix, len(report.resized)) == ("student.backbone.", 2)
    weights = {name: leaf.detach().numpy() for name, leaf in result.model.named_parameters()}
    frozen = ("patch_embedding.", "stages.0.")
    for name, leaf in weights.items():
        if name.startswith(frozen):
            expected = STATES["ours"][name]
            if "position_bias" in name:
                expected = resize_table(expected, leaf.shape[1:])
            np.testing.assert_array_equal(leaf, expected, err_msg=name)
        elif not name.endswith("key.bias"):  # its gradient is zero
            assert not np.array_equal(leaf, STATES["ours"][name]), name


def test_frozen_stages_stay_in_eval_mode(file, tmp_path):
    """Also after an evaluation, which restores the mode of the whole model; so their stochastic depth is off."""
    model, modes = model_for(two_stages(drop_path=0.5)), []
    model.stages[0].blocks[1].register_forward_hook(lambda block, *_: modes.append((block.training, model.training)))
    fit(replace(TUNED, init_from=str(file)), Noise(), Noise(7), tmp_path / "run", model=model, quiet=True)
    assert set(modes) == {(False, True), (False, False)}
    assert modes.count((False, True)) == 6


def test_a_tuned_run_that_was_stopped_goes_on_bit_for_bit(file, tmp_path):
    """Without the file, which a resumed run does not read."""

    def stop(step, loss):
        if step == 3:
            raise RuntimeError("stop")

    whole = tune(tmp_path / "whole", file)
    with pytest.raises(RuntimeError, match="stop"):
        tune(tmp_path / "run", file, on_step=stop)
    file.unlink()
    reports = []
    result = tune(tmp_path / "run", file, on_init=reports.append)
    assert (result.steps, reports) == (6, [])
    assert (tmp_path / "run" / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()
    weights = dict(whole.model.named_parameters())
    for name, leaf in result.model.named_parameters():
        assert torch.equal(leaf, weights[name]), name


def test_a_run_without_layer_decay_resumes_from_an_earlier_version(tmp_path):
    """Its checkpoints have no factors on the learning rate and no settings of fine-tuning."""
    from helpers.runs import run

    def stop(step, loss):
        if step == 4:
            raise RuntimeError("stop")

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path / "run", on_step=stop)
    for path in checkpoint.list_checkpoints(tmp_path / "run"):
        state = checkpoint.load(path)
        for group in state["optimizer"]["param_groups"]:
            del group["lr_scale"]
        for name in ("init_from", "init_prefix", "layer_decay", "frozen_stages"):
            del state["config"][name]
        checkpoint.save(tmp_path / "run", state["step"], state)
    weights = dict(whole.model.named_parameters())
    for name, leaf in run(tmp_path / "run").model.named_parameters():
        assert torch.equal(leaf, weights[name]), name


def damaged(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("suffix", "edit", "message"),
    [
        (".npz", damaged, "cannot be read as .npz: damaged"),
        (".pth", lambda content: content[:-500], "cannot be read as .pth: damaged"),
        (".pth", lambda content: b"", "is empty"),
        (".pth", lambda content: b"<!doctype html><html>", "is a web page"),
        (
            ".ckpt",
            lambda content: b"dat_ref run 1\n" + content,
            "is the training state of a run; the weights are in best",
        ),
    ],
)
def test_a_damaged_file_is_refused_before_the_folder_is_written(suffix, edit, message, tmp_path):
    path = tmp_path / f"w{suffix}"
    save_state(written := tmp_path / f"w{suffix.replace('.ckpt', '.pth')}", STATES["ours"])
    path.write_bytes(edit(written.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        tune(tmp_path / "run", path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1.weight": (8, 3, 7, 7)}, r"expected the names of a DAT"),
        (dict.fromkeys(STATES["ours"], (1,)), "expected the parameters of this configuration"),
    ],
)
def test_a_file_of_another_model_is_refused_before_the_folder_is_written(changes, message, tmp_path):
    path = save(tmp_path / "w.npz", {name: np.zeros(shape, np.float32) for name, shape in changes.items()})
    with pytest.raises(CheckpointError, match=message):
        tune(tmp_path / "run", path)
    with pytest.raises(OSError, match=r"absent\.npz"):
        tune(tmp_path / "run", tmp_path / "absent.npz")
    with pytest.raises(CheckpointError, match=r"prefix of a backbone \(.*\), got 'student'"):
        tune(tmp_path / "run", path, replace(TUNED, init_from=str(path), init_prefix="student"))
    assert not (tmp_path / "run").exists()


COMMAND = ["train", "--model", "dat_spot", "--image-size", "64", "--epochs", "1", "--scenes-per-epoch", "8"]
COMMAND += ["--batch-size", "8", "--quiet", "--task", "find"]


def test_the_command_starts_from_a_file_and_prints_the_report(tmp_path, capsys, monkeypatch):
    path = tmp_path / "pretrained.safetensors"
    save_checkpoint(create_model("dat_spot", num_classes=2), path)
    # An evaluation of all held-out scenes takes too long for a test.
    monkeypatch.setattr(
        "dat_ref.torch.train.loop.evaluate", lambda *_, **__: __import__("dat_ref").torch.train.Scores(1, 0.5, 1)
    )
    command = [*COMMAND, "--out", str(tmp_path / "run"), "--init-from", str(path), "--frozen-stages", "1"]
    command += ["--layer-decay", "0.7", "--ema", "0.9", "--amp", "bfloat16"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"initial weights: {path}\ndat_ref names: ")
    assert "newly initialized (2):\n    head.weight: (9, 32), (2, 32) in the file\n" in printed
    config = TrainConfig.from_json((tmp_path / "run" / "train_config.json").read_text(encoding="utf-8"))
    assert (config.init_from, config.layer_decay, config.frozen_stages) == (str(path), 0.7, 1)
    path.unlink()
    assert main(command) == 0  # the run is finished, and does not need the file
    assert "initial weights" not in capsys.readouterr().out


def test_the_command_refuses_what_cannot_be_tuned(tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    save_checkpoint(create_model("dat_nano", num_classes=2), path)
    for arguments, message in (
        (["--init-from", str(path)], "hint: the file contains dat_nano"),
        (["--init-from", str(tmp_path / "absent.pth")], "absent.pth"),
        (["--frozen-stages", "1"], "frozen_stages: expected init_from as well, got 1 alone"),
    ):
        assert main([*COMMAND, "--out", str(tmp_path / "run"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
