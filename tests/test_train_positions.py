"""Training on every position: weighted targets, loss and accuracy against loops, data sets and models of the preset."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from dat_ref import ConfigError  # noqa: E402
from dat_ref.cli import main  # noqa: E402
from dat_ref.data import network_path  # noqa: E402
from dat_ref.scenes import Scenes  # noqa: E402
from dat_ref.torch.train import TrainConfig, build_datasets, build_model, preset  # noqa: E402
from dat_ref.torch.train.evaluate import correct_predictions, per_sample_loss  # noqa: E402


def drawn(seed, batch=3, classes=4, height=2, width=5):
    """Return logits and weighted targets; each position has one class with a weight, or two that share it."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(batch, classes, height, width))
    targets = np.zeros_like(logits)
    weights = generator.uniform(size=(batch, height, width))
    for image, row, column in np.ndindex(batch, height, width):
        named = generator.choice(classes, size=1 + image % 2, replace=False)
        targets[image, named, row, column] = weights[image, row, column] / len(named)
    targets /= targets.sum((1, 2, 3), keepdims=True)
    return logits, targets


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3]))
def test_loss_of_positions_equals_loops(seed, smoothing):
    logits, targets = drawn(seed)
    expected = np.zeros(len(logits))
    for image, row, column in np.ndindex(logits.shape[0], *logits.shape[2:]):
        z, t = logits[image, :, row, column], targets[image, :, row, column]
        t = (1 - smoothing) * t + smoothing * t.sum() / len(t)
        expected[image] -= (t * (z - np.log(np.exp(z).sum()))).sum()
    found = per_sample_loss(torch.from_numpy(logits), torch.from_numpy(targets), smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@given(st.integers(0, 10_000))
def test_accuracy_of_positions_equals_loops(seed):
    """The share of the weight at positions whose largest logit is a class that the target names."""
    logits, targets = drawn(seed)
    expected = np.zeros(len(logits))
    for image, row, column in np.ndindex(logits.shape[0], *logits.shape[2:]):
        t = targets[image, :, row, column]
        expected[image] += t.sum() * (t[logits[image, :, row, column].argmax()] > 0)
    found = correct_predictions(torch.from_numpy(logits), torch.from_numpy(targets))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_positions_without_a_weight_do_not_count():
    logits, targets = drawn(0)
    targets[:, :, 0] = 0
    changed = logits.copy()
    changed[:, :, 0] += np.random.default_rng(1).normal(size=changed[:, :, 0].shape)
    for measure in (per_sample_loss, correct_predictions):
        before, after = (measure(torch.from_numpy(each), torch.from_numpy(targets)) for each in (logits, changed))
        np.testing.assert_array_equal(before, after)


def test_preset_trains_on_all_positions_and_counts_those_off_the_objects():
    config = preset("dat_spot")
    train, held_out = build_datasets(config)
    assert train.classes == held_out.classes
    assert train.classes[-1] == "nothing"
    number = next(number for number in range(20) if held_out.scenes[number].objects)
    scene, (_, targets) = held_out.scenes[number], held_out[number]
    assert targets.shape == (9, 40, 40)
    assert targets[scene.label].sum() == pytest.approx(1)
    on = np.asarray(scene.masks.any(0)).reshape(40, 4, 40, 4).any((1, 3))
    assert (targets[scene.label].numpy()[on] == 0).all()
    assert (targets[scene.label].numpy()[~on] > 0).all()
    number = next(number for number in range(20) if train.scenes[number].objects)
    scene, (_, targets) = train.scenes[number], train[number]
    on = np.asarray(scene.masks.any(0)).reshape(40, 4, 40, 4).any((1, 3))
    assert targets[scene.label].numpy()[on].sum() == pytest.approx(0.5)


def test_preset_starts_with_zero_offsets_and_another_start_can_be_chosen():
    weights = {}
    for init in ("", "zero_offset", "released"):
        model = build_model(preset("dat_spot", init=init), classes=9)
        weights[init] = model.stages[0].blocks[1].attention.offset_network.pointwise.weight
    assert not weights[""].any()
    assert not weights["zero_offset"].any()
    assert weights["released"].any()


def test_images_of_a_folder_are_classified_as_a_whole():
    model = build_model(TrainConfig(model="dat_spot", data="folder", image_size=64), classes=5)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_unknown_model_is_refused_before_any_work():
    with pytest.raises(ConfigError, match=r"unknown model 'dat_spott'; did you mean dat_spot"):
        build_datasets(TrainConfig(model="dat_spott"))


def test_evaluation_on_a_folder_classifies_whole_images(tmp_path, capsys):
    """The network that ships, trained on positions of scenes, on one picture of each class."""
    (tmp_path / "config.json").write_text(preset("dat_spot").to_json(), encoding="utf-8")
    scenes, found = Scenes("find", "held_out", 160, objects="pictures"), set()
    for scene in scenes:
        folder = tmp_path / "val" / scenes.classes[scene.label]
        folder.mkdir(parents=True, exist_ok=True)
        if scene.label not in found:
            Image.fromarray(scene.image).save(folder / "0.png")
        found.add(scene.label)
        if len(found) == len(scenes.classes):
            break
    options = ["--config", str(tmp_path / "config.json"), "--data", str(tmp_path)]
    assert main(["evaluate", str(network_path()), *options]) == 0
    assert "held out, 9 images" in capsys.readouterr().out
