"""Training: exact resumption after a kill at any moment, two processes equal one, saved files are never lost."""

import errno
import math
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers.processes import torchrun  # noqa: E402
from helpers.runs import CONFIG, Noise, run, tiny_model, two_processes  # noqa: E402
from torch import nn  # noqa: E402

from dat_ref import CheckpointError, ConfigError  # noqa: E402
from dat_ref.torch import create_model  # noqa: E402
from dat_ref.torch.train import checkpoint, evaluate, fit, loop, optimizer  # noqa: E402
from dat_ref.torch.train.evaluate import correct_predictions, per_sample_loss  # noqa: E402
from dat_ref.torch.train.log import read_rows  # noqa: E402
from dat_ref.train import scheduled_rate  # noqa: E402
from dat_ref.train_config import PRESETS, TrainConfig, config_path, preset  # noqa: E402

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the log of an uninterrupted run of nine steps, and its last weights."""
    folder = tmp_path_factory.mktemp("whole")
    result = run(folder)
    return (folder / "log.csv").read_text(encoding="utf-8"), dict(result.model.named_parameters())


def is_that_run(folder, result, whole):
    """Return whether the losses (to the last digit) and weights (bit for bit) equal those of the uninterrupted run."""
    log, weights = whole
    same = (folder / "log.csv").read_text(encoding="utf-8") == log
    return same and all(torch.equal(leaf, weights[name]) for name, leaf in result.model.named_parameters())


# ------------------------------------------------------------------------------------------------ resumption

KILLED = """
import os, signal, sys
from helpers import runs
from dat_ref.torch.train import checkpoint

where, number, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if where == "fsync":
    calls = iter(range(1000))
    fsync = os.fsync
    os.fsync = lambda file: kill() if next(calls) == number else fsync(file)
if where == "move":
    moves, replace = iter(range(1000)), checkpoint.Path.replace
    checkpoint.Path.replace = lambda *args: kill() if next(moves) == number else replace(*args)
runs.torch.set_num_threads(1)
runs.run(folder, on_step=lambda step, loss: kill() if where == "step" and step == number else None)
"""


@pytest.mark.parametrize(("where", "number"), [("step", 0), ("step", 6), ("fsync", 5), ("move", 6)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(where, number, tmp_path, whole):
    """The kill is after a step and before its checkpoint, during the write, or between the write and the rename."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(number), str(tmp_path)], cwd=TESTS, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list(tmp_path.glob(".*"))) == (where != "step")  # the partial file
    assert is_that_run(tmp_path, run(tmp_path), whole)
    assert not list(tmp_path.glob(".*"))


class Stop(Exception):
    pass


def stopped_after(folder, last):
    def stop(step, loss):
        if step == last:
            raise Stop

    with pytest.raises(Stop):
        run(folder, on_step=stop)


@pytest.mark.parametrize("forgotten", ["chance", "optimizer", "ema", "epoch"])
def test_state_that_is_not_restored_is_detected(forgotten, tmp_path, whole, monkeypatch):
    stopped_after(tmp_path, 5)
    if forgotten == "chance":  # does not restore torch's random state
        monkeypatch.setattr(loop, "_derive_seed", lambda *numbers: 5)
    elif forgotten == "epoch":
        monkeypatch.setattr(Noise, "set_epoch", lambda self, epoch: None)
    else:
        name = {"optimizer": torch.optim.AdamW, "ema": optimizer.ModelEma}[forgotten]
        monkeypatch.setattr(name, "load_state_dict" if forgotten == "optimizer" else "load", lambda self, state: None)
    assert not is_that_run(tmp_path, run(tmp_path), whole)


def test_a_truncated_line_of_the_log_is_rewritten(tmp_path, whole):
    stopped_after(tmp_path, 4)
    path = tmp_path / "log.csv"
    path.write_text(path.read_text(encoding="utf-8") + "5,1,0.12", encoding="utf-8")
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    assert is_that_run(tmp_path, run(tmp_path), whole)


def test_a_finished_run_is_left_as_it_is(tmp_path, whole):
    first = run(tmp_path)
    again = run(tmp_path, on_step=lambda step, loss: pytest.fail("took a step"))
    assert is_that_run(tmp_path, again, whole)
    assert again.scores == first.scores


def test_a_run_of_an_earlier_version_is_resumed(tmp_path, whole):
    """A run of an earlier version has "recipe" and "average" in its checkpoints, and its file is recipe.json."""
    stopped_after(tmp_path, 5)
    old = {"config": "recipe", "ema": "average"}
    state = checkpoint.load_latest(tmp_path)
    assert set(old) < set(state)
    for path in checkpoint.list_checkpoints(tmp_path):
        path.unlink()
    checkpoint.save(tmp_path, state["step"], {old.get(name, name): value for name, value in state.items()})
    (tmp_path / "train_config.json").rename(tmp_path / "recipe.json")
    assert TrainConfig.from_json(config_path(tmp_path).read_text(encoding="utf-8")) == CONFIG
    assert is_that_run(tmp_path, run(tmp_path), whole)
    assert config_path(tmp_path) == tmp_path / "train_config.json"


# ------------------------------------------------------------------------------------------------ checkpoints


def damaged(place, how):
    content = place.read_bytes()
    middle = len(content) // 2
    place.write_bytes(
        {
            "cut": content[:middle],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "other": b"PK" + content[2:],
        }[how]
    )


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "other"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(how, tmp_path, whole):
    stopped_after(tmp_path, 5)
    before, last = checkpoint.list_checkpoints(tmp_path)
    damaged(last, how)
    with pytest.warns(UserWarning, match=rf"{last.name}: damaged or cut short.*the one before it is used"):
        result = run(tmp_path)
    assert is_that_run(tmp_path, result, whole)
    assert before.name < last.name


def test_damaged_checkpoints_are_not_overwritten_by_a_new_run(tmp_path):
    stopped_after(tmp_path, 5)
    for place in checkpoint.list_checkpoints(tmp_path):
        damaged(place, "cut")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match=r"none of its 2 .* is whole"):
        run(tmp_path)


class Evil:
    def __reduce__(self):
        return (os.system, ("echo executed",))


def test_a_checkpoint_is_never_executed(tmp_path):
    checkpoint.save(tmp_path, 1, {"step": Evil()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.load_latest(tmp_path)


def test_the_last_two_checkpoints_are_stored(tmp_path):
    for step in (2, 5, 30, 100):
        assert checkpoint.save(tmp_path, step, {"step": step})
    assert [place.name for place in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000030.ckpt",
        "step-00000100.ckpt",
    ]
    assert checkpoint.load_latest(tmp_path) == {"step": 100}
    assert checkpoint.load_latest(tmp_path / "none") is None


def test_a_disk_that_is_full_loses_nothing(tmp_path):
    """A resource limit keeps every file at a few bytes for a while, as a full disk would."""
    checkpoint.save(tmp_path, 1, {"weights": torch.ones(5)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.warns(UserWarning, match="could not be written .*; the checkpoint before it stays"):
            assert not checkpoint.save(tmp_path, 2, {"weights": torch.ones(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000001.ckpt"]
    assert torch.equal(checkpoint.load_latest(tmp_path)["weights"], torch.ones(5))


def test_a_run_goes_on_while_the_disk_is_full(tmp_path, whole, monkeypatch):
    write = checkpoint.write_atomic

    def full(place, *parts):
        if place.suffix == ".ckpt" and not place.name.endswith("2.ckpt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(place, *parts)

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        result = run(tmp_path)
    assert is_that_run(tmp_path, result, whole)
    monkeypatch.undo()
    assert checkpoint.load_latest(tmp_path)["step"] == 2
    assert is_that_run(tmp_path, run(tmp_path), whole)


def test_another_config_is_refused_and_what_differs_named(tmp_path):
    stopped_after(tmp_path, 5)
    other = replace(CONFIG, learning_rate=2e-3, epochs=4, workers=1)
    with pytest.raises(ConfigError) as error:
        run(tmp_path, other)
    assert "another config (there, here): epochs: 3, 4; learning_rate: 0.001, 0.002" in str(error.value)
    assert "workers" not in str(error.value)


# ------------------------------------------------------------------------------------------------ two processes


def in_two_processes(folder):
    torchrun("-m", "helpers.runs", folder)
    return torch.load(folder / "left.pt"), read_rows(folder / "log.csv")


def test_two_processes_are_one(tmp_path, monkeypatch):
    """For batches of 5, 5 and 1 image a process has 3, 2, 1 or 0 of them; evaluation reads each image once."""
    left, log = in_two_processes(tmp_path)
    (tmp_path / "one").mkdir()
    two_processes(tmp_path / "one")
    expected, expected_log = torch.load(tmp_path / "one" / "left.pt"), read_rows(tmp_path / "one" / "log.csv")
    assert left["images"] == expected["images"] == 7
    assert len(log) == 6
    for row, other in zip(log, expected_log, strict=True):
        # The offsets are those of the images of the first process.
        ours, theirs = ({name: each[name] for name in each if "/" not in name} for each in (row, other))
        assert ours == pytest.approx(theirs, rel=1e-12)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(left["weights"][name], weight, rtol=1e-10, atol=1e-12)
    # A mean over the images of each process, instead of over all, gives another run.
    monkeypatch.setattr(loop, "per_sample_loss", lambda *arguments: per_sample_loss(*arguments) * 3 / len(arguments[0]))
    (tmp_path / "wrong").mkdir()
    two_processes(tmp_path / "wrong")
    assert read_rows(tmp_path / "wrong" / "log.csv")[3]["loss"] != pytest.approx(log[3]["loss"], rel=1e-3)


def test_every_image_is_used_once_per_epoch(tmp_path):
    data, held_out = Noise(), Noise(7)
    fit(CONFIG, data, held_out, tmp_path, model=tiny_model(), quiet=True)
    epochs = [data.requested[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(held_out.requested) == sorted(list(range(7)) * 3)


# ------------------------------------------------------------------------------------------------ formulas


def test_weight_decay_applies_as_in_the_releases():
    model = create_model("dat_pp_tiny", num_classes=3)
    decaying, exempt = optimizer.parameter_groups(model, 0.05)
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    names = {id(leaf): name for name, leaf in model.named_parameters()}
    spared = {names[id(leaf)] for leaf in exempt["params"]}
    for name, leaf in model.named_parameters():
        assert (name in spared) == (leaf.ndim == 1 or "table" in name), name
    assert len(decaying["params"]) + len(exempt["params"]) == len(names)


def test_the_learning_rate_rises_and_falls():
    rates = [scheduled_rate(step, 100, 2.0, 10, 0.5) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 2 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], [0.5 + 0.75 * (1 + math.cos(math.pi * t / 90)) for t in range(90)])
    assert rates[55] == pytest.approx(1.25)


def test_a_step_is_adamw_with_clipping_and_average(tmp_path):
    """A step equals the plain formulas applied to every parameter."""
    config = replace(CONFIG, epochs=1, drop_path=0.0, clip=0.1, label_smoothing=0.1, learning_rate=1e-2)
    data = Noise()
    result = fit(config, data, Noise(7), tmp_path, model=tiny_model(), quiet=True)
    model = tiny_model()
    leaves = dict(model.named_parameters())
    first, second, mean = ({name: torch.zeros_like(leaf) for name, leaf in leaves.items()} for _ in range(3))
    mean = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    for step in range(3):
        numbers = data.requested[4 * step : 4 * step + 4]
        images, targets = (torch.stack(each) for each in zip(*(Noise()[number] for number in numbers), strict=True))
        logits = model(images)
        smooth = 0.9 * nn.functional.one_hot(targets, 3) + 0.1 / 3
        grads = torch.autograd.grad(-(smooth * logits.log_softmax(1)).sum(1).mean(), list(leaves.values()))
        norm = torch.sqrt(sum((grad**2).sum() for grad in grads))
        rate = 1e-2 * (step + 1) / 3
        decay = min(0.5, (1 + step) / (10 + step))
        with torch.no_grad():
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
                grad = grad * min(1.0, 0.1 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad**2
                if leaf.ndim > 1 and "table" not in name:
                    leaf -= rate * 0.05 * leaf
                up, down = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                leaf -= rate * up / (down.sqrt() + 1e-8)
                mean[name] = decay * mean[name] + (1 - decay) * leaf
    for name, leaf in result.model.named_parameters():
        torch.testing.assert_close(leaf, mean[name], rtol=1e-3, atol=2e-5)
    assert norm > 0.1  # the gradient was clipped


def test_losses_and_answers():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    one, several = torch.tensor([0, 2]), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    expected = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(logits.tolist(), one, strict=True)]
    np.testing.assert_allclose(per_sample_loss(logits, one), expected, rtol=1e-6)
    cells = [
        [math.log1p(math.exp(-x if y else x)) for x, y in zip(*rows, strict=True)]
        for rows in ((logits[0], several[0]), (logits[1], several[1]))
    ]
    np.testing.assert_allclose(per_sample_loss(logits, several), np.mean(cells, axis=1), rtol=1e-6)
    assert correct_predictions(logits, one).tolist() == [True, False]
    assert correct_predictions(logits, several).tolist() == [True, False]


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_model(drop_path=0.5).train()
    first, second = (evaluate(model, Noise(7), batch_size=size) for size in (3, 7))
    assert model.training
    assert first == pytest.approx(second)
    with pytest.raises(ValueError, match="data: expected at least one image, got none"):
        evaluate(model, Noise(0))


def test_a_nan_loss_stops_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0: the loss is nan"):
        fit(CONFIG, Noise(), Noise(7), tmp_path, model=model, quiet=True)
    with pytest.raises(ConfigError, match="data: expected images, got 0 to train on and 7 held out"):
        fit(CONFIG, Noise(0), Noise(7), tmp_path, model=model, quiet=True)


def test_half_precision_and_checkpointing_train_too(tmp_path):
    plain = run(tmp_path / "plain", replace(CONFIG, epochs=1, drop_path=0.0))
    half = run(tmp_path / "half", replace(CONFIG, epochs=1, drop_path=0.0, amp="bfloat16"))
    assert half.scores.loss == pytest.approx(plain.scores.loss, rel=0.05)
    assert half.scores.loss != plain.scores.loss


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected 1 or more, got 0"),
        ({"image_size": 16}, "image_size: expected 32 or more, got 16"),
        ({"clip": -1.0}, "clip: expected 0 or more, got -1.0"),
        ({"ema": 1.0}, "ema: expected 0 ≤ ema < 1, got 1.0"),
        (
            {"min_learning_rate": 1.0},
            "learning_rate: expected 0 ≤ min_learning_rate ≤ learning_rate, got 1.0 and 0.001",
        ),
        ({"amp": "float8"}, "amp: expected one of 'none', 'bfloat16', 'float16', got 'float8'"),
    ],
)
def test_invalid_configs(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_configs_are_data():
    for config in PRESETS.values():
        assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="train config: unknown fields colour"):
        TrainConfig.from_json('{"colour": 1}')
    with pytest.raises(ConfigError, match="preset: expected one of dat_spot, laptop, released, got 'fast'"):
        preset("fast")
    assert preset("released").epochs == 300
