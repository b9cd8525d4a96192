"""Runs that cannot go right: a folder in use, data that changed, nothing saved, damaged files, killed processes."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from dataclasses import replace  # noqa: E402

from helpers.runs import CONFIG, Noise, run, tiny_model  # noqa: E402

from dat_ref import CheckpointError, ConfigError  # noqa: E402
from dat_ref.cli import main  # noqa: E402
from dat_ref.torch.train import ImageFolder, checkpoint, evaluate, fit, loop  # noqa: E402
from dat_ref.torch.train.log import read_rows  # noqa: E402
from dat_ref.torch.train.run_folder import LOCK_FILE  # noqa: E402

SHORT = replace(CONFIG, epochs=1, save_every=0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped_run(folder):
    """Return the folder of a run that was stopped after step 4, with checkpoints of steps 3 and 4."""

    def stop(step, loss):
        if step == 4:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(folder, on_step=stop)
    return folder


@pytest.fixture
def stopped(tmp_path):
    return stopped_run(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ the lock


def test_a_second_run_of_the_process_in_the_folder_is_refused(tmp_path):
    refused = []

    def second(step, loss):
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match="another run of this process uses the folder"):
            run(tmp_path / ".." / tmp_path.name)
        assert contents(tmp_path) == before
        refused.append(step)

    run(tmp_path, SHORT, on_step=second)
    assert refused == [0, 1, 2]
    assert LOCK_FILE not in contents(tmp_path)


HOLD = """
import os, sys, time
from pathlib import Path
from dat_ref.torch.train.run_folder import locked_folder

with locked_folder(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data loading process
        time.sleep(60)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_folder_of_another_process_is_refused_until_that_is_dead(stopped):
    before = contents(stopped)
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, stopped], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=rf"run: another run uses the folder \(process {owner.pid} on .*\); wait"):
            run(stopped)
        assert {name: content for name, content in contents(stopped).items() if name != LOCK_FILE} == before
        owner.kill()  # its child lives on
        owner.wait()
        assert (stopped / LOCK_FILE).exists()
        assert run(stopped).steps == 9
        assert LOCK_FILE not in contents(stopped)
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.stdout.close()


@pytest.mark.parametrize("name", ["file", "file/run", "file/runs/1"])
def test_a_file_in_the_place_of_the_folder_is_named(name, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match=rf"{name}: expected a folder, and .*/file is a file"):
        run(tmp_path / name)
    assert (tmp_path / "file").read_text() == "text"


# ------------------------------------------------------------------------------------------------ other data


def test_a_run_on_changed_pictures_is_refused_and_the_change_named(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("train/cat/0", "train/dog/0", "train/emu/0", "val/cat/0", "val/dog/0", "val/emu/0"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)

    def run_on_folders():
        train, val = (ImageFolder(tmp_path / part, 32) for part in ("train", "val"))
        return fit(SHORT, train, val, tmp_path / "run", model=tiny_model(0.4), quiet=True)

    run_on_folders()
    run_on_folders()
    shutil.copy(tmp_path / "val" / "dog" / "0.png", tmp_path / "val" / "cat" / "0.png")
    (tmp_path / "train" / "emu" / "0.png").rename(tmp_path / "train" / "emu" / "1.png")
    with pytest.raises(ConfigError) as error:
        run_on_folders()
    assert str(error.value).endswith(
        "run: holds a run on other data (there, here): train/emu: other file names; held_out/cat: other file contents"
    )


def test_another_number_of_held_out_images_is_named(stopped):
    with pytest.raises(ConfigError, match=r"other data .there, here.: held_out_images: 7, 8"):
        fit(CONFIG, Noise(), Noise(8), stopped, model=tiny_model(0.4), quiet=True)


def test_a_checkpoint_without_fingerprints_is_resumed(stopped):
    """A checkpoint of an earlier version has only the number of images and the classes."""
    for path in checkpoint.list_checkpoints(stopped):
        state = checkpoint.load(path)
        state["data"] = {name: state["data"][name] for name in ("images", "classes")}
        checkpoint.save(stopped, state["step"], state)
    assert run(stopped).steps == 9


# ------------------------------------------------------------------------------------------------ nothing saved


def test_a_run_whose_folder_is_removed_ends_with_an_error(tmp_path):
    """It warns at each file; the folder is not made again."""

    def remove(step, loss):
        if step == 1:
            shutil.rmtree(tmp_path / "run")

    with (
        pytest.warns(UserWarning, match="could not be written"),
        pytest.raises(OSError, match="run: nothing of the run is saved: the folder was removed, or the disk is full"),
    ):
        run(tmp_path / "run", SHORT, on_step=remove)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path):
    """For real: no file may grow beyond 10 bytes. The error names the file, not its temporary name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError) as error:
            run(tmp_path / "runs" / "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "runs" / "1" / "train_config.json")
    assert not list(tmp_path.iterdir())


COMMAND = ["train", "--image-size", "32", "--epochs", "1", "--scenes-per-epoch", "8", "--batch-size", "8", "--quiet"]


def test_the_command_says_that_nothing_was_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: False)
    monkeypatch.setattr(loop, "_write_weights", lambda *arguments: False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    monkeypatch.setattr(loop, "build_model", lambda *arguments: model)
    assert main([*COMMAND, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith("nothing of the run is saved: the folder was removed, or the disk is full\n")
    assert "best weights" not in printed.out


def test_the_command_says_that_the_last_steps_are_not_saved(tmp_path, monkeypatch, capsys):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    monkeypatch.setattr(loop, "build_model", lambda *arguments: model)
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, state: step < 2 and save(folder, step, state))
    monkeypatch.setattr(loop, "_write_weights", lambda *arguments: False)
    command = [*COMMAND, "--scenes-per-epoch", "16", "--save-every", "1", "--out", str(tmp_path)]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("best weights: none could be saved\n")
    assert "is saved up to step 1 of 2 only; free disk space" in printed.err
    monkeypatch.undo()
    monkeypatch.setattr(loop, "build_model", lambda *arguments: model)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"best weights: {tmp_path / 'best.safetensors'} (")


def test_a_result_says_how_much_is_saved(tmp_path, monkeypatch):
    assert run(tmp_path / "whole", SHORT).saved_steps == 3
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, state: step < 5 and save(folder, step, state))
    assert run(tmp_path / "full").saved_steps == 4


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, "tensorboard is needed"),
        ("tqdm", {}, "tqdm is needed for the progress bar: pip install tqdm"),
        ("safetensors", {}, "safetensors is needed to save weights: pip install safetensors"),
    ],
)
def test_a_missing_package_leaves_nothing(module, options, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message):
        fit(SHORT, Noise(), Noise(7), tmp_path / "run", model=tiny_model(), **options)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: None}, f"missing: {name}") for name in loop.STATE_FIELDS),
        ({"data": None, "optimizer": None, "step": None}, "missing: data, step, optimizer"),
        ({"step": "3", "data": {"images": 11}}, r"invalid: step, data\.classes"),
    ],
)
def test_a_checkpoint_without_a_field_is_refused_by_name(changes, message, stopped):
    state = checkpoint.load_latest(stopped) | changes
    checkpoint.save(stopped, 5, {name: value for name, value in state.items() if value is not None})
    before = contents(stopped)
    with pytest.raises(CheckpointError, match=rf"the last checkpoint is no state of a training run \({message}\)"):
        run(stopped)
    assert contents(stopped) == before


@pytest.mark.parametrize("part", ["model", "optimizer", "ema", "scaler"])
def test_a_checkpoint_that_does_not_fit_the_model_is_refused_in_one_line(part, stopped):
    state = checkpoint.load_latest(stopped)
    config = replace(CONFIG, amp="float16") if part == "scaler" else CONFIG
    state |= {part: {"other": 1}, "config": state["config"] | {"amp": config.amp}}
    checkpoint.save(stopped, 5, state)
    with pytest.raises(CheckpointError, match=r"run: the checkpoint of step 4 does not fit the model: \w+: ") as error:
        run(stopped, config)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_no_mapping_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, [1, 2])
    (path,) = checkpoint.list_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000001\.ckpt: expected a mapping of fields, got list"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda text: text.replace("\n2,0,", "\n2,zero,"),
            "expected numbers in line 4, one for each column, got '2,zero,",
        ),
        (lambda text: text.replace("\n2,0,", "\n,0,"), "expected numbers in line 4"),
        (lambda text: text.replace("\n2,0,", "\n2,0,1,2,3,4,5,"), "expected numbers in line 4"),
        (lambda text: text.replace(",", ";"), r"expected the columns step,epoch,.*, got 'step;epoch"),
        (lambda text: text.replace("loss,", "cost,", 1), r"expected the columns step,epoch,.*, got 'step,epoch,cost,"),
        (lambda text: text.replace("\n2,", "\n\udcff,"), "expected UTF-8 text"),
    ],
)
def test_an_edited_log_is_refused_by_name_and_stays(edit, message, stopped):
    path = stopped / "log.csv"
    text = edit(path.read_text(encoding="utf-8"))
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = contents(stopped)
    with pytest.raises(ConfigError, match=rf"log\.csv: {message}"):
        run(stopped)
    assert contents(stopped) == before


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),  # saved by a spreadsheet program
        lambda text: "",
    ],
)
def test_an_edited_log_that_can_be_read_is_repaired(edit, stopped):
    path = stopped / "log.csv"
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8", newline="")
    run(stopped)
    assert [row["step"] for row in read_rows(path)][-5:] == [4, 5, 6, 7, 8]
    assert b"\r" not in path.read_bytes()


def test_the_initialization_is_part_of_the_config(stopped):
    """Another one is refused, and a run of a version without the field goes on."""
    with pytest.raises(ConfigError, match="init: '', 'zero_offset'"):
        run(stopped, replace(CONFIG, init="zero_offset"))
    state = checkpoint.load_latest(stopped)
    del state["config"]["init"]
    assert checkpoint.save(stopped, state["step"], state)
    assert run(stopped).steps == 9


def test_the_log_has_the_offsets_of_each_layer(tmp_path, monkeypatch):
    """Every 50 steps, here 2, and after each epoch; a resumed run writes the same."""
    monkeypatch.setattr(loop, "OFFSET_STEPS", 2)
    run(tmp_path / "whole")
    rows = read_rows(tmp_path / "whole" / "log.csv")
    names = [name for name in rows[0] if "/" in name]
    layers = [f"offsets/stages.0.blocks.{block}.attention" for block in (0, 1)]
    assert names == [f"{layer}/{name}" for layer in layers for name in ("mean", "at_bound", "outside", "image")]
    assert [row["step"] for row in rows if names[0] in row] == [0, 2, 4, 5, 6, 8]  # epochs have three steps
    assert all(0 < row[f"{layer}/mean"] < 3 for row in rows if names[0] in row for layer in layers)
    assert len({row[names[0]] for row in rows if names[0] in row}) == 6
    stopped_run(tmp_path / "two")
    run(tmp_path / "two")
    assert (tmp_path / "two" / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()


def test_a_run_goes_on_with_the_log_of_an_earlier_version(stopped):
    """Logs had no columns for offsets: the rows stay, and later ones have offsets."""
    path = stopped / "log.csv"
    old = [line.split(",")[:6] for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(",".join(line) + "\n" for line in old), encoding="utf-8")
    kept = [row for row in read_rows(path) if row["step"] < 4]
    run(stopped)
    rows = read_rows(path)
    assert rows[: len(kept)] == kept
    assert "offsets/stages.0.blocks.1.attention/mean" in rows[-1]


# ------------------------------------------------------------------------------------------------ data loading


class Deadly(Noise):
    """Images whose loading kills the process, but not the one that made the data set."""

    def __init__(self):
        super().__init__()
        self.parent = os.getpid()

    def __getitem__(self, number):
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


def test_a_killed_data_loading_process_ends_the_run_in_one_line(tmp_path):
    for action in (
        lambda: fit(replace(SHORT, workers=1), Deadly(), Noise(7), tmp_path, model=tiny_model(0.4), quiet=True),
        lambda: evaluate(tiny_model(), Deadly(), workers=1),
    ):
        with pytest.raises(ChildProcessError, match=r"DataLoader worker .*; if memory is short, lower") as error:
            action()
        assert "\n" not in str(error.value)
    assert LOCK_FILE not in contents(tmp_path)


def test_a_picture_that_cannot_be_read_by_another_process_is_named_in_one_line(tmp_path):
    path = tmp_path / "cat" / "short.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-700])
    data = ImageFolder(tmp_path, 32)
    for workers in (0, 1):
        model = tiny_model().train()
        with pytest.raises(ConfigError, match=r"^cannot read \S*cat/short\.png: [^\n]*truncated[^\n]*$") as error:
            evaluate(model, data, workers=workers)
        assert model.training
        assert "\n" not in str(error.value)
