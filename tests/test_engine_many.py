"""Training: sharded weights, custom models, changed data, full disks, and the commands `train` and `evaluate`."""

import json
import resource
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers.processes import torchrun  # noqa: E402
from helpers.runs import CONFIG, Noise, run, tiny_model, two_processes  # noqa: E402
from torch import nn  # noqa: E402

from dat_ref import ConfigError  # noqa: E402
from dat_ref.cli import main  # noqa: E402
from dat_ref.torch.train import DistributedContext, checkpoint, fit, loop  # noqa: E402
from dat_ref.torch.train.log import read_rows  # noqa: E402
from dat_ref.torch.train.mixup import mix_batch  # noqa: E402
from dat_ref.train_config import TrainConfig  # noqa: E402

# ------------------------------------------------------------------------------------------------ sharded weights

CUT = """
import sys
from pathlib import Path
from dataclasses import replace
from helpers import runs
from dat_ref.torch.train import evaluate, fit, init_distributed
from dat_ref.torch.train.sharding import _is_sharded
import torch

class Stop(Exception):
    pass

def stop(step, loss):
    if step == 3:
        raise Stop

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = runs.TWICE
with init_distributed() as context:
    data = runs.Noise(11, torch.float64), runs.Noise(7, torch.float64)
    context = runs.DistributedContext(context.rank, context.world_size)
    for cut, on_step in ((True, stop), (True, None)):
        model = runs.tiny_model(dtype=torch.float64)
        with torch.no_grad():
            model.head.weight += context.rank  # the first process's weights are everyone's
        try:
            options = {"model": model, "context": context, "quiet": True, "on_step": on_step}
            result = fit(replace(config, shard=cut), *data, folder, **options)
        except Stop:
            pass
    assert evaluate(result.model, runs.Noise(1, torch.float64), context=context).images == 1  # one process has none
    leaves = list(result.model.parameters())
    assert all(_is_sharded(leaf) for leaf in leaves)
    assert sum(leaf.to_local().numel() for leaf in leaves) < 0.8 * sum(leaf.numel() for leaf in leaves)
"""


def in_two_processes(code, folder):
    file = folder.parent / "run.py"
    file.write_text(code, encoding="utf-8")
    torchrun(file, folder)


def test_a_run_with_cut_weights_that_was_stopped_is_that_of_one_process(tmp_path):
    """Losses, scores, averages and the unsharded checkpoint equal those of one process, which can resume from it."""
    folder, one = tmp_path / "cut", tmp_path / "one"
    in_two_processes(CUT, folder)
    one.mkdir()
    two_processes(one)
    for row, other in zip(read_rows(folder / "log.csv"), read_rows(one / "log.csv"), strict=True):
        # The offsets are those of the images of the first process.
        ours, theirs = ({name: each[name] for name in each if "/" not in name} for each in (row, other))
        assert ours == pytest.approx(theirs, rel=1e-12)
    ours, theirs = checkpoint.load_latest(folder), checkpoint.load_latest(one)
    assert_same_state(ours, theirs)
    two_processes(folder)  # the run is finished: it only loads and evaluates
    ours["optimizer"]["state"][0]["exp_avg_sq"] *= 1.001
    with pytest.raises(AssertionError):
        assert_same_state(ours, theirs)


LATE = """
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from dat_ref.torch.train import init_distributed

with init_distributed() as context:
    mesh = init_device_mesh("cpu", (context.world_size,))  # keeps the group, as cut weights do
    distributed.all_reduce(torch.ones(1 << 16), async_op=True)  # still under way when the processes part
"""


def test_processes_part_without_a_crash_while_tensors_are_still_held(tmp_path):
    """Without the delay in `init_distributed`, two of three such runs abort."""
    in_two_processes(LATE, tmp_path / "late")


def assert_same_state(ours, theirs):
    for part in ("model", "ema"):
        torch.testing.assert_close(ours[part], dict(theirs[part]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=1e-9, atol=1e-12)


def test_processes_that_see_different_checkpoints_are_an_error(tmp_path, monkeypatch):
    """The processes see different checkpoints, as on machines without a shared disk: the second one sees none."""
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path, on_step=_stop_at_three)
    monkeypatch.setattr(DistributedContext, "all_reduce_sum", lambda self, values: values)
    monkeypatch.setattr(DistributedContext, "broadcast", lambda self, model: None)
    monkeypatch.setattr(loop.nn.parallel, "DistributedDataParallel", lambda model, devices: model)
    with pytest.raises(ConfigError, match="one folder for all processes, and they see different checkpoints"):
        run(tmp_path, context=DistributedContext(0, 2))


def _stop_at_three(step, loss):
    if step == 3:
        raise RuntimeError("stop")


# ------------------------------------------------------------------------------------------------ custom models


def test_a_custom_model_trains_and_saves_its_best(tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    fit(replace(CONFIG, ema=0.0, epochs=1), Noise(), Noise(7), tmp_path, model=model, quiet=True)
    kept = load_file(tmp_path / "best.safetensors")
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(kept[name], leaf) for name, leaf in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 12}, "images: 11, 12"),
        ({"classes": ("a", "c", "b")}, r"classes: \['a', 'b', 'c'\], \['a', 'c', 'b'"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(change, message, tmp_path):
    run(tmp_path)
    data = Noise()
    vars(data).update(change)
    with pytest.raises(ConfigError, match=f"other data .there, here.: {message}"):
        fit(CONFIG, data, Noise(7), tmp_path, model=tiny_model(0.4), quiet=True)


def test_nothing_is_written_for_an_invalid_config(tmp_path):
    with pytest.raises(ConfigError, match="unknown model 'dat_nanoo'"):
        fit(TrainConfig(model="dat_nanoo"), Noise(), Noise(7), tmp_path / "none", quiet=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ full disks


def test_a_whole_run_on_a_disk_that_fills_up(tmp_path):
    """A resource limit keeps all files, the log too, below 300 bytes from step 3 to step 6."""
    expected = run(tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, loss):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 if 3 <= step < 6 else soft, hard))

    try:
        with pytest.warns(UserWarning, match="could not be written") as caught:
            result = run(tmp_path / "full", on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {Path(str(each.message).partition(":")[0]).name for each in caught} >= {"log.csv", "step-00000006.ckpt"}
    assert result.scores == expected.scores
    assert (tmp_path / "full" / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()
    assert not list((tmp_path / "full").glob(".*"))


def test_best_is_what_is_on_disk(tmp_path, monkeypatch):
    """Weights that do not fit on the disk are not reported as saved."""
    monkeypatch.setattr(loop, "_write_weights", lambda *arguments: False)
    assert run(tmp_path).best == -1.0


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("changes", [{"amp": "float16"}, {"grad_checkpointing": True}, {"compile": True}])
def test_other_ways_to_run_are_the_same_run(changes, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)  # else minutes
    config = replace(CONFIG, epochs=1, drop_path=0.0)
    results = []
    for name, each in (("plain", config), ("other", replace(config, **changes))):
        model = tiny_model()
        model.set_grad_checkpointing(each.grad_checkpointing)
        results.append(fit(each, Noise(), Noise(7), tmp_path / name, model=model, quiet=True).scores.loss)
    assert results[1] == pytest.approx(results[0], rel=0.05 if "amp" in changes else 1e-6)
    assert len(compiled) == ("compile" in changes)


def test_events_for_tensorboard(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert (Path(folder), purge_step) == (tmp_path, 0)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run(tmp_path, tensorboard=True)
    assert written.pop() == "closed"
    expected = [(name, row[name], row["step"]) for row in read_rows(tmp_path / "log.csv") for name in list(row)[2:]]
    assert written == expected
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        run(tmp_path / "without", tensorboard=True)


# ------------------------------------------------------------------------------------------------ mixup and cutmix


def test_mixup_blends_an_image_and_its_target_in_the_same_share():
    torch.manual_seed(0)
    images, shares = torch.randn(4, 3, 8, 8), []
    for _ in range(400):
        mixed, share = mix_batch(images, 0.8, 0.0)
        torch.testing.assert_close(mixed, share * images + (1 - share) * images[[3, 2, 1, 0]])
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.15)  # mean and variance of Beta(α, α)


def test_cutmix_pastes_a_box_and_keeps_the_share_of_the_rest():
    torch.manual_seed(0)
    own = torch.stack([torch.zeros(3, 16, 24), torch.ones(3, 16, 24)])
    for _ in range(100):
        mixed, share = mix_batch(own, 0.0, 1.0)
        assert mixed[0].mean() == pytest.approx(1 - share)
        torch.testing.assert_close(mixed[1], 1 - mixed[0])
        rows, columns = mixed[0, 0].any(1), mixed[0, 0].any(0)
        assert mixed[0, 0].sum() == rows.sum() * columns.sum()  # one box
    assert own[0].sum() == 0  # the input images are unchanged


def test_a_coin_decides_between_the_two_and_without_both_nothing_is_drawn():
    torch.manual_seed(0)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    blended = [0 < float(mix_batch(images, 1.0, 1.0)[0][0, 0, 0, 0]) < 1 for _ in range(200)]
    assert np.mean(blended) == pytest.approx(0.5, abs=0.1)
    state = torch.get_rng_state()
    assert mix_batch(images, 0.0, 0.0) == (images, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_of_a_mixed_step_is_that_of_mixed_targets(several, tmp_path, monkeypatch):
    """The loss equals its definition on mixed targets, for softmax and multi-hot losses."""
    monkeypatch.setattr(loop, "mix_batch", lambda images, mixup, cutmix: (images, 0.7))
    data = Noise()
    if several:
        data = [(Noise()[n][0], torch.tensor([n % 2, 1, n % 3 == 0]).float()) for n in range(4)]
        data = type("Several", (list,), {"classes": "abc", "multi": True, "set_epoch": lambda self, epoch: None})(data)
    config = replace(CONFIG, epochs=1, drop_path=0.0, label_smoothing=0.1, batch_size=len(data))
    losses = []
    fit(config, data, data, tmp_path, model=tiny_model(), quiet=True, on_step=lambda step, loss: losses.append(loss))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(loop._derive_seed(0, 0))).tolist()
    images, targets = (torch.stack(each) for each in zip(*(data[number] for number in order), strict=True))
    logits = tiny_model()(images).double()
    targets = targets.double() if several else nn.functional.one_hot(targets, 3).double()
    targets = 0.7 * targets + 0.3 * targets.flip(0)
    if several:
        targets = 0.9 * targets + 0.1 / 2
        expected = -(targets * logits.sigmoid().log() + (1 - targets) * (-logits).sigmoid().log()).mean()
    else:
        expected = -((0.9 * targets + 0.1 / 3) * logits.log_softmax(1)).sum(1).mean()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_with_mixup_is_resumed_exactly(tmp_path):
    config = replace(CONFIG, mixup=0.8, cutmix=1.0)
    run(tmp_path / "whole", config)
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path / "two", config, on_step=_stop_at_three)
    run(tmp_path / "two", config)
    run(tmp_path / "plain")
    whole, two, plain = ((tmp_path / name / "log.csv").read_bytes() for name in ("whole", "two", "plain"))
    assert whole == two != plain


# ------------------------------------------------------------------------------------------------ commands

SMALL = ["--image-size", "32", "--epochs", "1", "--scenes-per-epoch", "16", "--batch-size", "8", "--quiet"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a folder of pictures of two classes, 64 pixels wide."""
    image = pytest.importorskip("PIL.Image")
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, number in (("train", 4), ("val", 3)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", "--out", str(folder), "--data", str(pictures), "--threads", "1", *SMALL]) == 0
    return folder


def test_evaluate_prints_the_scores_of_train(trained, capsys):
    assert main(["evaluate", str(trained / "best.safetensors")]) == 0
    last = read_rows(trained / "log.csv")[-1]
    expected = f"held out, 6 images: {100 * last['held_out_accuracy']:.1f} % right, loss {last['held_out_loss']:.4f}\n"
    assert capsys.readouterr().out == expected


def test_evaluate_on_another_folder_needs_its_val_alone(trained, pictures, tmp_path, capsys):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "dog").symlink_to(pictures / "val" / "dog")
    with pytest.warns(UserWarning, match="no picture of 1 class: cat"):
        assert main(["evaluate", str(trained / "best.safetensors"), "--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("held out, 3 images: ")
    (tmp_path / "val" / "emu").symlink_to(pictures / "val" / "dog")
    assert main(["evaluate", str(trained / "best.safetensors"), "--data", str(tmp_path)]) == 2
    assert "has 1 class: emu that training has not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs", "0"], "epochs: expected 1 or more, got 0"),
        (["--preset", "fast"], "argument --preset: invalid choice: 'fast'"),
        (["--model", "dat_nanoo"], "unknown model 'dat_nanoo'; did you mean dat_nano"),
        (["--task", "why"], "task: expected one of which, which_all, where, count, find, find_all, got 'why'"),
        (["--attention", "foo"], "attention: unknown kind 'foo'"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--config", "{folder}/none.json"], "none.json: No such file or directory"),
        (["--config", "{folder}/typed.json"], "epochs: expected int, got '3'"),
        (["--config", "{folder}/list.json"], "train config: expected a JSON object of fields, got a list"),
        (["--config", "{folder}/text.json"], "train config: expected JSON, got"),
        (["--data", "{folder}/none"], "expected a folder with a folder for each class, and there is none"),
        (["--amp", "float16", "--shard"], "amp: expected none or bfloat16 with shard"),
    ],
)
def test_invalid_training_exits_with_2_and_leaves_nothing(options, message, tmp_path, capsys):
    for name, text in (("typed", json.dumps({"epochs": "3"})), ("list", "[1]"), ("text", "epochs = 3")):
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    try:
        code = main(["train", "--out", str(tmp_path / "out"), *(each.format(folder=tmp_path) for each in options)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{folder}/none.safetensors"], "none.safetensors"),
        (["{folder}/alone.safetensors"], "train_config.json"),
        (["{trained}/best.safetensors", "--batch-size", "0"], "--batch-size: expected 1 or more, got 0"),
        (["{trained}/log.csv"], "log.csv"),
        (["{trained}/log.csv", "--data", "{folder}"], "log.csv: cannot be read"),
    ],
)
def test_invalid_evaluation_exits_with_2(options, message, trained, tmp_path, capsys):
    (tmp_path / "alone.safetensors").write_bytes(b"")
    assert main(["evaluate", *(each.format(folder=tmp_path, trained=trained) for each in options)]) == 2
    assert message in capsys.readouterr().err


def test_a_nan_loss_exits_with_1(pictures, tmp_path, capsys):
    wild = ["--learning-rate", "1e30", "--clip", "0", "--warmup-epochs", "0", "--epochs", "3"]
    assert main(["train", "--out", str(tmp_path), "--data", str(pictures), *SMALL, *wild]) == 1
    assert "the loss is nan; lower the learning rate or clip" in capsys.readouterr().err
