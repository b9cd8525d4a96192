"""Training: selection of the best weights, and random numbers of each step; each with a run that gets it wrong."""

from contextlib import nullcontext
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from helpers.runs import CONFIG, Noise, run, tiny_model  # noqa: E402

from dat_ref.torch.train import DistributedContext, Scores, evaluate, fit, loop  # noqa: E402

ACCURACIES = (0.5, 0.9, 0.7)  # accuracies of three epochs: the second is the best


def kept(folder):
    """Return a model with the weights of best.safetensors."""
    from safetensors.torch import load_file

    model = tiny_model()
    model.load_state_dict(load_file(folder / "best.safetensors"))
    return model


def test_best_is_the_average_that_was_evaluated(tmp_path, monkeypatch):
    config = replace(CONFIG, epochs=1, ema=0.9)
    result = fit(config, Noise(), Noise(7), tmp_path / "right", model=tiny_model(), quiet=True)
    assert evaluate(kept(tmp_path / "right"), Noise(7)).loss == pytest.approx(result.scores.loss, rel=1e-6)
    monkeypatch.setattr(loop._Run, "ema_weights", lambda self: nullcontext())  # the last weights, not their average
    fit(config, Noise(), Noise(7), tmp_path / "wrong", model=tiny_model(), quiet=True)
    assert evaluate(kept(tmp_path / "wrong"), Noise(7)).loss != pytest.approx(result.scores.loss, rel=1e-4)


def best_of(folder, monkeypatch, stop=None):
    """Run three epochs of given accuracies; return the epochs whose weights were saved, and the best accuracy."""
    epochs = []
    monkeypatch.setattr(loop._Run, "evaluate", lambda self, data: Scores(1.0, ACCURACIES[self.step // 3 - 1], 7))
    monkeypatch.setattr(loop, "_write_weights", lambda *arguments: not epochs.append(None))

    def on_step(step, loss):
        if step == stop:
            raise KeyboardInterrupt

    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            run(folder, on_step=on_step)
    return run(folder).best, len(epochs)


@pytest.mark.parametrize("stop", [None, 7])
def test_only_better_weights_are_saved_also_after_a_stop(stop, tmp_path, monkeypatch):
    """A run stopped in its third epoch, worse than the second, remembers the best accuracy."""
    assert best_of(tmp_path, monkeypatch, stop) == (0.9, 2)


def test_a_forgotten_best_accuracy_is_detected(tmp_path, monkeypatch):
    load = loop._Run.load
    monkeypatch.setattr(loop._Run, "load", lambda self, state: load(self, {**state, "best": -1.0}))
    assert best_of(tmp_path, monkeypatch, 7) == (0.7, 3)


def drawn(folder, monkeypatch):
    """Return the first number that each step draws."""
    numbers = []
    monkeypatch.setattr(
        loop, "mix_batch", lambda images, *alphas: numbers.append(float(torch.rand(()))) or (images, 1.0)
    )
    run(folder, replace(CONFIG, epochs=1))
    return numbers


def test_each_step_draws_its_own_numbers(tmp_path, monkeypatch):
    assert len(set(drawn(tmp_path / "right", monkeypatch))) == 3
    derive_seed = loop._derive_seed  # from the seed and the process only, without the step
    monkeypatch.setattr(
        loop, "_derive_seed", lambda *numbers: derive_seed(numbers[0], numbers[-1]) if len(numbers) > 2 else 0
    )
    assert len(set(drawn(tmp_path / "wrong", monkeypatch))) == 1


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_loss_scale_of_half_precision_is_resumed(forgotten, tmp_path, monkeypatch):
    """The loss scale is resumed; the test lowers it, as an overflow would."""
    scales, unscale = [], torch.amp.GradScaler.unscale_

    def mark_as_data(self, optimizer):
        scales.append(self.get_scale())
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", mark_as_data)
    load = loop._Run.load

    def loaded(self, state):
        load(self, {**state, "scaler": {**state["scaler"], "scale": 64.0}})

    monkeypatch.setattr(loop._Run, "load", loaded)
    if forgotten:
        monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda self, state: None)

    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    config = replace(CONFIG, amp="float16")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, on_step=stop)
    before = len(scales)
    run(tmp_path, config)
    assert (scales[before] == 64.0) is not forgotten


def test_a_substitute_image_has_no_weight(monkeypatch):
    """For a batch of one image, the second process computes a substitute image with weight zero."""
    found = []
    monkeypatch.setattr(
        DistributedContext, "all_reduce_sum", lambda self, sums: found.append(sums.tolist()) or sums + 1
    )
    evaluate(tiny_model(), Noise(1), context=DistributedContext(0, 2))
    evaluate(tiny_model(), Noise(1), context=DistributedContext(1, 2))
    assert found[0][0] > 0
    assert found[0][2] == 1
    assert found[1] == [0, 0, 0]
