"""Report on offsets: each illness gets its verdict, the measures equal loops by hand, `dat-ref diagnose` prints it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402

from dat_ref import DeformableAttentionConfig  # noqa: E402
from dat_ref._checks import ConfigError, ShapeError  # noqa: E402
from dat_ref.cli import main  # noqa: E402
from dat_ref.data import network_path  # noqa: E402
from dat_ref.scenes import Scenes  # noqa: E402
from dat_ref.torch import DeformableAttention, OffsetReport, create_model, offset_report  # noqa: E402
from dat_ref.torch import offset_findings as rules  # noqa: E402
from dat_ref.torch.checkpoints import load_checkpoint  # noqa: E402
from dat_ref.torch.train import build_datasets, build_model  # noqa: E402
from dat_ref.train_config import preset  # noqa: E402

SIZE, KEYS, GROUPS = (12, 16), (3, 4), 2
CONFIG = DeformableAttentionConfig(8, 2, groups=GROUPS, stride=4, kernel_size=5, bias="none", offset_range=2.0)


class Given(torch.nn.Module):
    """Offset network that returns given raw offsets (N, G, 2, Hk, Wk), batch after batch."""

    def __init__(self, raw):
        super().__init__()
        self.raw, self.start = raw, 0

    def forward(self, query, padding):
        batch = self.raw[self.start : self.start + len(query)]
        self.start = (self.start + len(query)) % len(self.raw)
        return batch.flatten(0, 1), {}


def layer_with(raw=None, **changes):
    layer = DeformableAttention(replace(CONFIG, **changes), init="zero_offset")
    if raw is not None:
        layer.offset_network = Given(raw)
    return layer


def report_of(layer, count=6, **options):
    images = torch.randn(count, 8, *SIZE, generator=torch.Generator().manual_seed(0))
    (found,) = offset_report(layer, images, **options).layers
    return found


def names(layer):
    return [finding.name for finding in layer.findings]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FULL = (6, GROUPS, 2, *KEYS)
SHIFT = (0.4 * torch.ones(1, GROUPS, 2, 1, 1)).expand(FULL)
PATTERN = random(1, *FULL[1:], seed=1).sign().mul(0.4).expand(FULL)
IMAGE = 0.4 * random(*FULL, seed=2)
ILL = {
    "not finite": layer_with(torch.full(FULL, torch.nan)),
    "kernel below stride": layer_with(None, kernel_size=3),
    "does nothing": layer_with(),
    "a hundredth of a pixel": layer_with(0.01 / 4 * torch.ones(FULL)),
    "outside the map": layer_with(IMAGE + 50, offset_bound="raw"),
    "at the bound, tanh": layer_with(10 * IMAGE.sign(), offset_range=1.0),  # with s = 2 border points leave the map
    "at the bound, clamp": layer_with(10 * IMAGE.sign(), offset_bound="clamp"),
    "one shift": layer_with(SHIFT + 0.01 * IMAGE),
    "fixed pattern": layer_with(PATTERN + 0.01 * IMAGE),
    "healthy": layer_with(IMAGE),
}
EXPECTED = {
    "kernel below stride": ["kernel below stride", "does nothing"],
    "a hundredth of a pixel": ["does nothing"],
    "outside the map": ["outside the map", "one shift"],
    "at the bound, tanh": ["at the bound"],
    "at the bound, clamp": ["at the bound"],
}


@pytest.mark.parametrize("illness", ILL)
def test_each_illness_gets_its_verdict(illness):
    assert names(report_of(ILL[illness])) == EXPECTED.get(illness, [illness])


@pytest.mark.parametrize("stride", [1, 2])
def test_offsets_cannot_matter_where_the_grid_reads_everything(stride):
    keys = (SIZE[0] // stride, SIZE[1] // stride)
    found = report_of(layer_with(0.4 * random(6, GROUPS, 2, *keys), stride=stride))
    assert found.coverage == 1
    assert names(found) == ["cannot matter"]


def test_every_rule_is_tested():
    shown = {name for layer in map(report_of, ILL.values()) for name in names(layer)} | {"cannot matter"}
    assert shown == {rule.name for rule in rules.LAYER_RULES} | {"healthy"}


def layer_offsets(**changes):
    """Return a healthy layer's measures with changes."""
    return replace(report_of(ILL["healthy"]), **changes)


@pytest.mark.parametrize(
    ("name", "field", "threshold", "above"),
    [
        ("does nothing", "mean", rules.STILL, False),
        ("outside the map", "outside", rules.OUTSIDE, True),
        ("at the bound", "at_bound", rules.AT_BOUND, True),
        ("cannot matter", "coverage", rules.FULL_COVERAGE - 1e-9, True),
        ("one shift", "image", rules.IMAGE_DEPENDENT, False),
    ],
)
def test_rules_change_at_their_thresholds(name, field, threshold, above):
    step = 1e-6
    common = {"shift": 0.9, "pattern": 0.0}
    assert (name in names(layer_offsets(**common | {field: threshold + step}))) == above
    assert (name in names(layer_offsets(**common | {field: threshold - step}))) != above


def test_reasons_of_the_thresholds():
    """Zeros at one pixel outside, 2 % of the gradient at 99 % of the limit, a third of the typical offset."""
    from dat_ref.ops.sampling import bilinear_sample

    grid = np.ones((1, 1, *SIZE))
    for point, value in (((-1.0, 3.0), 0), ((SIZE[0], 3.0), 0), ((-0.9, 3.0), 0.1)):
        np.testing.assert_allclose(bilinear_sample(grid, np.array([[point]], float)).item(), value, atol=1e-12)
    assert 1 - 0.99**2 < 0.02
    assert math.sqrt(rules.IMAGE_DEPENDENT) < 1 / 3


def test_measures_equal_loops_by_hand():
    raw = 0.7 * random(*FULL, seed=3) + 0.8 * random(1, GROUPS, 2, 1, 1, seed=4)
    found = report_of(layer_with(raw, offset_bound="raw"), batch_size=4)
    pixels = raw.double().numpy() * np.array([size / 2 for size in SIZE])[:, None, None]  # cell centers
    lengths, outside = [], []
    for image in pixels:
        for group in image:
            for row in range(KEYS[0]):
                for column in range(KEYS[1]):
                    dy, dx = group[:, row, column]
                    lengths.append(math.hypot(dy, dx))
                    y, x = (4 * (index + 0.5) - 0.5 + d for index, d in ((row, dy), (column, dx)))
                    outside.append(not (-1 < y < SIZE[0] and -1 < x < SIZE[1]))
    assert found.mean == pytest.approx(np.mean(lengths))
    assert found.max == pytest.approx(max(lengths))
    assert found.outside == pytest.approx(np.mean(outside))
    assert 0 < found.outside < 1
    parts = np.zeros(3)
    for group in range(GROUPS):
        for axis in range(2):
            values = pixels[:, group, axis].reshape(len(pixels), -1)  # (N, positions)
            at_position = [np.mean(values[:, i]) for i in range(values.shape[1])]
            spread = np.mean([np.var(values[:, i]) for i in range(values.shape[1])])
            parts += np.mean(values) ** 2, np.var(at_position), spread
    np.testing.assert_allclose([found.shift, found.pattern, found.image], parts / parts.sum())
    np.testing.assert_allclose(parts.sum(), 2 * GROUPS * np.mean(pixels**2))


@pytest.mark.parametrize("illness", [name for name in ILL if name not in ("not finite", "does nothing")])
def test_parts_add_up(illness):
    found = report_of(ILL[illness])
    if found.mean:
        assert found.shift + found.pattern + found.image == pytest.approx(1)


def test_share_at_the_bound_equals_a_loop():
    raw = 3 * random(*FULL, seed=5)
    found = report_of(layer_with(raw), batch_size=4)
    assert found.at_bound == pytest.approx(np.mean([abs(math.tanh(value)) >= 0.99 for value in raw.flatten()]))
    assert found.max <= math.hypot(4, 4)  # s/2 cells of 4 pixels


def test_one_batch_or_many():
    one, many = (report_of(ILL["healthy"], batch_size=size) for size in (6, 1))
    for name in ("mean", "max", "shift", "pattern", "image", "outside"):
        assert getattr(one, name) == pytest.approx(getattr(many, name))


# ------------------------------------------------------------------------------------------------ accuracy


def outcome(zero, shift, other, error=0.01):
    accuracies = {"own": 0.9, "zero": zero, "shift": shift, "other": other}
    return OffsetReport((), 100, accuracies, dict.fromkeys(("zero", "shift", "other"), error)).finding.name


def test_verdicts_on_the_accuracy():
    assert outcome(0.885, 0.5, 0.5) == "offsets unused"
    assert outcome(0.5, 0.885, 0.5) == "a shift is enough"
    assert outcome(0.5, 0.5, 0.885) == "any image's are enough"
    assert outcome(0.5, 0.5, 0.5) == "offsets used"
    at = 0.9 - rules.NOTICEABLE * 0.01
    assert (outcome(at + 1e-6, 0.5, 0.5), outcome(at - 1e-6, 0.5, 0.5)) == ("offsets unused", "offsets used")


@pytest.fixture(scope="module")
def shipped():
    config = preset("dat_spot")
    _, held_out = build_datasets(config)
    model = build_model(config, len(held_out.classes))
    load_checkpoint(model, network_path())
    images, targets = map(torch.stack, zip(*(held_out[index] for index in range(24))))
    return model.train(), images, targets


def test_the_network_that_ships_is_healthy(shipped):
    model, images, targets = shipped
    report = offset_report(model, images, targets, batch_size=12)
    assert names(report.layers[0]) == ["healthy"]
    assert report.finding.name == "offsets used"
    assert report.accuracies["own"] > 0.8
    assert model.training
    assert not model.stages[0].blocks[1].attention.offset_network._forward_hooks
    text = str(report)
    for part in ("stages.0.blocks.1.attention", "40×40", "zero offsets", "healthy", "offsets used"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["finding"]["name"] == "offsets used"


def test_zero_offsets_cost_nothing_where_offsets_are_zero(shipped):
    _, images, targets = shipped
    model = build_model(preset("dat_spot"), classes=9)  # initialized with zero offsets
    report = offset_report(model, images[:4], targets[:4])
    assert len(set(report.accuracies.values())) == 1
    assert set(report.errors.values()) == {0.0}
    assert (names(report.layers[0]), report.finding.name) == (["does nothing"], "offsets unused")


def test_class_indices():
    model = create_model("dat_nano", num_classes=8)
    report = offset_report(model, random(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]), batch_size=2)
    assert [layer.stride for layer in report.layers] == [1, 1, 1]
    assert set(report.accuracies) == {"own", "zero", "shift", "other"}


def test_numbers_that_are_not_finite_are_null_in_json():
    images = random(2, 8, *SIZE)
    found = offset_report(layer_with(torch.full((2, *FULL[1:]), torch.nan)), images)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][0]["mean"] is None
    assert "not finite" in str(found)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (random(1, 3, 64, 64), None, "images: expected at least 2"),
        (random(2, 3, 64, 64), torch.zeros(3, dtype=torch.int64), r"labels: expected \(N=2,\)"),
        (random(2, 3, 64, 64), torch.zeros(2, 9, 4, 4), "labels: expected class indices or targets of the shape"),
        (random(2, 3, 64, 64), torch.zeros(2), "labels: expected class indices"),
    ],
)
def test_wrong_images_and_labels(images, labels, message):
    with pytest.raises(ConfigError, match=message):
        offset_report(create_model("dat_nano", num_classes=8), images, labels)


def test_wrong_models_and_shapes():
    with pytest.raises(ConfigError, match=r"model: expected a DAT .* got DAT without one"):
        offset_report(create_model("dat_spot", attention="no_offsets"), random(2, 3, 64, 64))
    with pytest.raises(ShapeError, match="images: expected"):
        offset_report(ILL["healthy"], random(8, *SIZE))


# ------------------------------------------------------------------------------------------------ command


def test_command_on_the_network_that_ships(capsys):
    assert main(["diagnose", "--images", "16"]) == 0
    text = capsys.readouterr().out
    assert "healthy" in text
    assert "offsets used" in text
    assert main(["diagnose", "--images", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["layers"][0]["stride"]) == (4, 10)


def test_command_on_a_folder(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(preset("dat_spot").to_json(), encoding="utf-8")
    scenes = Scenes("find", "held_out", 160, objects="pictures")
    for name in scenes.classes:
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(scenes[len(name)].image).save(tmp_path / "val" / name / "0.png")
    assert main(["diagnose", str(network_path()), "--config", str(config), "--data", str(tmp_path)]) == 0
    assert "offsets on 9 images" in capsys.readouterr().out


def test_command_refuses_a_network_without_offsets(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(preset("dat_spot", attention="no_offsets").to_json(), encoding="utf-8")
    assert main(["diagnose", str(network_path()), "--config", str(config)]) == 2
    assert "model: expected a DAT" in capsys.readouterr().err


def test_command_refuses_a_checkpoint_without_its_config(tmp_path, capsys):
    weights = tmp_path / "best.safetensors"
    weights.write_bytes(network_path().read_bytes())
    assert main(["diagnose", str(weights)]) == 2
    error = capsys.readouterr().err
    assert "--config: expected the training config of the run" in error
    assert error.count("\n") == 1
