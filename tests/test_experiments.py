"""Experiments: intervals against cases by hand, arms that differ in one thing, and the published results."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats

pytest.importorskip("PIL")
pytest.importorskip("torch")

from dat_ref.data import network_card
from dat_ref.scenes import Scenes
from dat_ref.train_config import TrainConfig
from experiments import discs, load_results, objects
from experiments.statistics import interval, welch_difference

# ------------------------------------------------------------------------------------------------ intervals


def test_interval_by_hand():
    found = interval(np.array([1.0, 2.0, 3.0, 6.0]))  # s = √(14/3), t(0.975; 3) = 3.18245
    assert found["mean"] == 3
    assert found["half_width"] == pytest.approx(3.182446 * (14 / 3) ** 0.5 / 2, rel=1e-6)


def test_difference_by_hand():
    """Variances 4e-4 and 4e-4, three values each: e² = 8e-4/3, ν = 4, t(0.975; 4) = 2.776445."""
    ours, theirs = np.array([0.58, 0.60, 0.62]), np.array([0.68, 0.70, 0.72])
    found = welch_difference(ours, theirs)
    assert found == pytest.approx({"mean": -0.1, "half_width": 2.776445 * (8e-4 / 3) ** 0.5}, rel=1e-6)


def test_an_interval_of_a_difference_contains_it_in_95_percent():
    """2000 draws with unequal numbers and spreads; an interval that assumes equal spreads contains it less often."""
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(1, 3, (2000, 3)), generator.normal(0, 0.5, (2000, 8))
    found = [welch_difference(*pair) for pair in zip(ours, theirs)]
    assert np.mean([abs(each["mean"] - 1) <= each["half_width"] for each in found]) == pytest.approx(0.95, abs=0.015)
    pooled = [scipy.stats.ttest_ind(*pair).confidence_interval() for pair in zip(ours, theirs)]
    assert np.mean([each.low <= 1 <= each.high for each in pooled]) < 0.85


def test_equal_values_have_an_interval_of_width_0():
    assert welch_difference(np.ones(3), np.zeros(2)) == {"mean": 1.0, "half_width": 0.0}


# ------------------------------------------------------------------------------------------------ objects


def test_arms_differ_in_their_attention_alone():
    plain = asdict(objects.config_of("offsets", 3))
    for arm in objects.ARMS:
        changed = {name for name, value in asdict(objects.config_of(arm, 3)).items() if value != plain[name]}
        assert changed == (set() if arm == "offsets" else {"attention"})


@pytest.mark.parametrize("stride", [5, 10])
def test_grid_views_against_a_loop_over_image_pixels(stride):
    """A key sees an image pixel at most 5.5 pixels from the 4 × 4 pixels of a position that its point reads."""
    scenes = Scenes("find", "held_out", 160, length=40, objects="pictures")
    half = (stride - 1) / 2
    centers = [half + stride * key for key in range(40 // stride)]
    seen = [
        any(4 * math.floor(c) - 5.5 < pixel + 1 and pixel < 4 * math.ceil(c) + 4 + 5.5 for c in centers)
        for pixel in range(160)
    ]
    both = np.outer(seen, seen)
    with_object = [scene for scene in scenes if scene.objects]
    boxes = np.zeros((len(with_object), 160, 160), bool)
    for box, scene in zip(boxes, with_object):
        y, x = np.nonzero(scene.masks[0])
        box[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
    expected = np.mean([(box & both).any() for box in boxes])
    assert objects.grid_views(stride, scenes)["touching"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ published results


@pytest.fixture(scope="module")
def found():
    return load_results("objects")


def accuracies(found, arm):
    return np.array([run["accuracy"] for run in found["runs"][arm].values()])


def test_network_that_ships_is_seed_0(found):
    card = network_card()
    assert card["accuracy"] == pytest.approx(found["runs"]["offsets"]["0"]["accuracy"])
    assert card["config"] == found["config"]
    assert card["accuracies"] == {arm: pytest.approx(accuracies(found, arm)) for arm in found["runs"]}


def test_results_are_of_the_present_training_configuration(found):
    assert TrainConfig.from_json(json.dumps(found["config"])) == objects.config_of("offsets", 0)
    assert all(set(runs) <= set(map(str, range(objects.SEEDS[arm]))) for arm, runs in found["runs"].items())
    assert set(found["runs"]) == set(objects.ARMS)


def test_results_meet_what_the_pages_say_of_them(found):
    """Every seed, not only the mean."""
    ours = accuracies(found, "offsets")
    assert len(ours) >= 5
    assert ours.mean() >= 0.90
    assert ours.min() > accuracies(found, "more keys").max()
    assert abs(ours.mean() - accuracies(found, "average pooling").mean()) < 0.05
    assert ours.min() - accuracies(found, "no offsets").max() > 0.3
    for run in found["runs"]["offsets"].values():
        assert all(run["with_object"] - ablated >= 0.3 for ablated in run["ablations"].values())
        assert run["points"]["any_on_object"] >= 0.8
        assert run["points"]["any_reference"] <= 0.3
    bound = found["views"]["no offsets"]["touching"]
    assert accuracies(found, "no offsets").max() <= bound + (1 - bound) / 9


# ------------------------------------------------------------------------------------------------ coloured discs


def test_arms_of_the_discs_differ_in_their_attention_alone():
    plain = asdict(discs.network("offsets"))
    for arm in discs.ARMS:
        other = asdict(discs.network(arm))
        attention, others = plain["stages"][0][1]["attention"], other["stages"][0][1]["attention"]
        changed = {name for name in attention if others[name] != attention[name]}
        assert changed <= {"stride", "kernel_size", "offset_bound", "average_pool"}
        assert bool(changed) == bool(discs.ARMS[arm].kind)
        other["stages"][0][1]["attention"] = attention
        assert other == plain


def test_results_of_the_discs_meet_what_the_page_says_of_them():
    found = load_results("discs")
    found["runs"] = {arm: found["runs"][arm] for arm in discs.ARMS}
    accuracy = {arm: accuracies(found, arm) for arm in discs.ARMS}
    assert {arm: len(values) for arm, values in accuracy.items()} == {
        arm: each.seeds for arm, each in discs.ARMS.items()
    }
    assert (accuracy["offsets"] > accuracy["average pooling"]).all()
    ours, pooled = accuracy["offsets long"], accuracy["average pooling long"]
    assert ((ours > 0.98).sum(), (ours < 0.6).sum()) == (4, 1)
    assert ((pooled > 0.89).sum(), (pooled < 0.6).sum()) == (2, 3)
    assert (ours > pooled)[ours > 0.98].all()
    assert accuracy["more keys long"].max() < 0.88
    assert (accuracy["offsets"] < 0.6).sum() == 2
    assert accuracy["average pooling"].max() < 0.7
    for arm in ("no offsets", "more keys"):
        bound = found["views"][arm]["touching"]
        assert max(accuracy[arm].max(), accuracy.get(f"{arm} long", accuracy[arm]).max()) <= bound + (1 - bound) / 7
    for run in found["runs"]["offsets long"].values():
        if run["accuracy"] < 0.6:
            continue
        assert all(run["with_object"] - ablated >= 0.3 for ablated in run["ablations"].values())
        assert run["points"]["any_on_object"] >= 0.8
        assert run["points"]["any_reference"] <= 0.3
