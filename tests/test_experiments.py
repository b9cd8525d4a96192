"""Experiments: measures against loops and cases by hand, wrong ones rejected; offsets that are really exchanged."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

pytest.importorskip("PIL")

from dat_ref.experiments import NAMES, load_results, measures
from dat_ref.experiments.pages import ablations, formatting, overview, pages, peers, points
from dat_ref.experiments.pages import offset_ablation as page
from dat_ref.scenes import share_on_mask

DOCS = Path(__file__).parents[1] / "docs"


# ------------------------------------------------------------------------------------------------ measures


def distance_by_loops(points, mask, reduction):
    """Every point, every pixel: the nearest one's distance."""
    found = np.empty(points.shape[:-1])
    for where in np.ndindex(found.shape):
        y, x = ((value + 0.5) * reduction - 0.5 for value in points[where])
        found[where] = min(
            ((y - row) ** 2 + (x - column) ** 2) ** 0.5
            for row in range(mask.shape[0])
            for column in range(mask.shape[1])
            if mask[row, column]
        )
    return found


def drawn(seed=0):
    generator = np.random.default_rng(seed)
    mask = np.zeros((12, 16), bool)
    mask[2:5, 9:15] = True
    return generator.uniform(-1, [3, 4], (2, 3, 5, 2)), mask


def test_distance_is_that_of_loops():
    points, mask = drawn()
    np.testing.assert_allclose(measures.distance_to_mask(points, mask, 4), distance_by_loops(points, mask, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda points, mask: measures.distance_to_mask(points[..., ::-1], mask, 4),  # y and x exchanged
        lambda points, mask: measures.distance_to_mask(points - 0.5, mask, 4),  # half a cell off
        lambda points, mask: measures.distance_to_mask(points + 0.125, mask, 4),  # half a pixel off
        lambda points, mask: measures.distance_to_mask(points, mask, 4) / 4,  # pixels of the map
    ],
)
def test_wrong_distances_are_noticed(wrong):
    points, mask = drawn()
    assert np.abs(wrong(points, mask) - distance_by_loops(points, mask, 4)).max() > 0.1


def test_distance_to_nothing_is_refused():
    with pytest.raises(ValueError, match="mask: expected a pixel at least"):
        measures.distance_to_mask(np.zeros((1, 2)), np.zeros((4, 4), bool), 1)


def test_interval_by_hand():
    found = measures.interval(np.array([1.0, 2.0, 3.0, 6.0]))  # s = √(14/3), t(0.975; 3) = 3.18245
    assert found["mean"] == 3
    assert found["half_width"] == pytest.approx(3.182446 * (14 / 3) ** 0.5 / 2, rel=1e-6)


# ------------------------------------------------------------------------------------------------ groups, attention


def row_of(trace, mask):
    return np.array(measures.group_metrics(trace, mask, 1.0))


def two_groups():
    """Two groups of two points on a map of 1 × 4; the object is its last two pixels. Two heads in each group."""
    points = np.array([[[[[0, 0], [0, 2]]], [[[0, 3], [0, 2]]]]], float)  # (1, 2, 1, 2, 2)
    reference = np.array([[[[[0, 0], [0, 3]]]]], float)
    attention = np.empty((1, 4, 4, 2))
    attention[0, :, :] = np.array([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.1, 0.9]])[:, None]
    return SimpleNamespace(points_px=points, reference_px=reference, attention=attention), np.array(
        [[0, 0, 1, 1]], bool
    )


def test_groups_by_hand():
    """Group 1: half its points are on it and get (0.1 + 0.3) / 2 of the attention. Group 2: all, and all of it."""
    trace, mask = two_groups()
    expected = [[0.5, 0.5, 0.2, 1.0, 1.0], [1.0, 0.5, 1.0, 0.0, 1.0]]
    np.testing.assert_allclose(row_of(trace, mask), expected)


def test_wrong_groups_and_wrong_attention_are_noticed():
    trace, mask = two_groups()
    right = row_of(trace, mask)[0, 2]
    heads_first = trace.attention[0].mean(1).reshape(2, 2, 2).mean(0)[0]  # as if heads were (heads of a group, groups)
    assert share_on_mask(trace.points_px[0, 0], mask, 1.0, heads_first[None]) != pytest.approx(right)
    not_normalised = trace.attention * np.array([1.0, 2.0])  # its rows do not add up to 1
    assert row_of(SimpleNamespace(**{**vars(trace), "attention": not_normalised}), mask)[0, 2] != pytest.approx(right)
    beside = np.roll(mask, 1)
    assert not np.allclose(row_of(trace, beside), row_of(trace, mask))


# ------------------------------------------------------------------------------------------------ offsets exchanged


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch")
    from dat_ref.torch import create_model

    torch.manual_seed(0)
    return create_model("dat_nano", num_classes=8).eval()


def traced(model, images):
    import torch

    with torch.no_grad():
        return model(images, return_trace=True)[1].stages[1].blocks[1].attention


def test_offsets_are_replaced_and_given_back(model):
    import torch

    from dat_ref.experiments.offset_ablation import ABLATIONS, ablated, deformable_layers, mean_offsets

    assert list(deformable_layers(model)) == ["stage 2, block 2", "stage 2, block 4", "stage 3, block 1"]
    layer = deformable_layers(model)["stage 2, block 2"]
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before, mean = traced(model, images), mean_offsets(model, images)["stage 2, block 2"]
    assert before.raw_offsets.abs().max() > 0
    found = {}
    for kind, ablation in ABLATIONS.items():
        with ablated(layer, ablation, mean):
            found[kind] = traced(model, images)
    torch.testing.assert_close(found["none"].points_px, before.reference_px, rtol=0, atol=0)
    torch.testing.assert_close(found["another scene's"].points_px, before.points_px.roll(1, 0), rtol=0, atol=0)
    means = before.raw_offsets.mean((0, 2, 3), keepdim=True).expand_as(before.raw_offsets)
    torch.testing.assert_close(found["one shift"].raw_offsets, means)
    torch.testing.assert_close(traced(model, images).points_px, before.points_px, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ the baseline


def test_the_baseline_differs_in_its_offsets_alone():
    from dat_ref.data import network_card
    from dat_ref.experiments import no_offset_baseline
    from dat_ref.presets import config
    from dat_ref.torch.train.loop import build_model
    from dat_ref.train_config import TrainConfig

    recipe = TrainConfig.from_mapping(network_card()["recipe"])
    ours, other = build_model(recipe, 8), no_offset_baseline.baseline(recipe, 8)
    assert ours.config == config("dat_nano", num_classes=8)
    first, still = ours.state_dict(), other.state_dict()
    assert first.keys() - still.keys() == {name for name in first if "offset_network" in name}
    assert all(first[name].equal(leaf) for name, leaf in still.items())
    pairs = list(zip(layers_of(ours.config), layers_of(other.config)))
    changed = [{option for option in vars(a) if getattr(a, option) != getattr(b, option)} for a, b in pairs]
    assert changed == [set(), set(), set(), {"offset_bound"}, set(), {"offset_bound"}, {"offset_bound"}]


def layers_of(config):
    return [block.attention for blocks in config.stages for block in blocks]


def test_networks_are_compared_scene_by_scene():
    from dat_ref.experiments.no_offset_baseline import compare

    right, baseline_correct = np.array([1, 1, 1, 1, 0], bool), np.array([1, 0, 0, 1, 1], bool)
    found = compare(right, baseline_correct)
    assert (found["only_model_right"], found["only_baseline_right"]) == (2, 1)
    assert (found["accuracy"]["mean"], found["baseline"]["mean"]) == (0.8, pytest.approx(0.6))
    assert found["difference"] == measures.interval(np.array([0.0, 1, 1, 0, -1]))
    others = compare(right, np.array([1, 1, 1, 0, 0], bool))  # as many right, of other scenes: another width
    assert others["difference"]["mean"] == pytest.approx(found["difference"]["mean"])
    assert others["difference"]["half_width"] < 0.8 * found["difference"]["half_width"]


def test_the_baseline_is_that_of_the_network_that_ships():
    from dat_ref.data import network_card

    found = load_results("no_offset_baseline")
    assert found["recipe"] == network_card()["recipe"]
    assert (found["held_out"], found["parameters"]["model"]) == (
        network_card()["held_out_scenes"],
        network_card()["parameters"],
    )
    assert found["accuracy"]["mean"] == pytest.approx(network_card()["accuracy"], abs=2 / found["held_out"])
    pairs = found["only_model_right"] - found["only_baseline_right"]
    assert found["difference"]["mean"] == pytest.approx(pairs / found["held_out"], abs=1e-6)


# ------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def found():
    return {name: load_results(name) for name in NAMES}


def test_the_pages_are_what_was_measured(found):
    """`python -m dat_ref.experiments.pages docs/experiments` writes them anew."""
    folder = DOCS / "experiments"
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert written == pages(found)
    other = copy.deepcopy(found)
    other["offset_ablation"]["accuracy"]["with_offsets"]["all"]["none"]["change"]["mean"] += 0.01
    other["study"]["runs"]["window"]["0"]["accuracy"] += 0.01
    other["attention_maps"]["attention"]["window"]["0"]["stage 1, block 1"]["from_object"]["foreground"] += 0.01
    changed = pages(other)
    assert {name for name in written if written[name] != changed[name]} >= {"offsets.md", "peers.md", "points.md"}


def test_the_measured_network_is_the_one_that_ships():
    """New weights need new numbers: accuracy as trained is that of the network's card, to a few scenes' rounding."""
    from dat_ref.data import network_card

    found = load_results("offset_ablation")
    assert found["scenes"] == network_card()["held_out_scenes"]
    assert found["accuracy"]["as_trained"]["mean"] == pytest.approx(network_card()["accuracy"], abs=2 / found["scenes"])


def verdict(none, shift, other):
    rows = {"none": none, "one shift": shift, "another scene's": other}
    everywhere = {what: {"change": {"mean": mean, "half_width": 0.01}} for what, mean in rows.items()}
    return page.ablation_verdict({"accuracy": {"with_offsets": {"all": everywhere}}})


def test_verdicts_follow_from_the_intervals():
    assert "was not shown**" in verdict(-0.01, -0.5, -0.5)
    assert "harm" in verdict(0.02, 0, 0)
    all_it_takes, follows = verdict(-0.5, -0.05, 0.005), verdict(-0.5, -0.4, -0.2)
    assert "brings back 90% of" in all_it_takes
    assert "was not shown to matter: with another scene's it changes by +0.5 ± 1.0" in all_it_takes
    assert "brings back 20% of" in follows
    assert "loses 20.0 ± 1.0 points" in follows
    comparisons = [{"model": "m", "difference": {"mean": mean, "half_width": 0.01}} for mean in (0.02, 0.005, -0.02)]
    assert ["more" in page.baseline_verdict(found) for found in comparisons] == [True, True, False]
    assert ["not shown" in page.baseline_verdict(found) for found in comparisons] == [False, True, False]
    assert "+2.0 ± 1.0 points" in page.baseline_verdict(comparisons[0])
    nearer, same = ({"points_minus_reference": {"mean": mean, "half_width": 0.1}} for mean in (0.2, 0.0))
    assert "in every group" in page.gathering_verdict({"groups": {"a": [nearer, nearer]}})
    assert "not reproduced" in page.gathering_verdict({"groups": {"a": [nearer], "b": [same]}})


# ------------------------------------------------------------------------------------------------ verdicts over seeds


def study_of(**accuracies):
    runs = {
        name: {str(seed): {"accuracy": value} for seed, value in enumerate(values)}
        for name, values in accuracies.items()
    }
    about = {
        name: {"part": "peers" if name in ("worse", "better", "same") else "base", "variants": ""} for name in runs
    }
    return {"runs": runs, "variants": about}


STUDY = {
    "deformable": [0.60, 0.62, 0.64],
    "no offsets": [0.61, 0.62, 0.63],
    "worse": [0.50, 0.52, 0.54],
    "better": [0.70, 0.72, 0.74],
    "same": [0.55, 0.70, 0.61],
}


def test_difference_by_hand():
    """Variances 4e-4 and 4e-4, three seeds each: e² = 8e-4/3, ν = 4, t(0.975; 4) = 2.776445."""
    found = formatting.difference(study_of(**STUDY), "worse", "deformable")
    assert found == pytest.approx({"mean": -0.1, "half_width": 2.776445 * (8e-4 / 3) ** 0.5}, rel=1e-6)
    # Twice as many seeds of one: e² = 3.2e-4/6 + 4e-4/3, ν = e⁴ / ((3.2e-4/6)²/5 + (4e-4/3)²/2) = 3.6842, t = 2.8748
    more = study_of(**{**STUDY, "deformable": 2 * STUDY["deformable"]})
    found = formatting.difference(more, "worse", "deformable")
    assert found == pytest.approx({"mean": -0.1, "half_width": 2.8748 * (3.2e-4 / 6 + 4e-4 / 3) ** 0.5}, rel=1e-3)


def test_an_interval_of_a_difference_holds_it_as_often_as_it_says():
    """Of 2000 draws, of unequal numbers and spreads; an interval of one spread for both would hold it less often."""
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(1, 3, (2000, 3)), generator.normal(0, 0.5, (2000, 8))
    found = [measures.welch_difference(*pair) for pair in zip(ours, theirs)]
    assert np.mean([abs(each["mean"] - 1) <= each["half_width"] for each in found]) == pytest.approx(0.95, abs=0.015)
    pooled = [scipy.stats.ttest_ind(*pair).confidence_interval() for pair in zip(ours, theirs)]
    assert np.mean([each.low <= 1 <= each.high for each in pooled]) < 0.85


def test_runs_that_are_all_alike_have_an_interval_of_nothing():
    assert measures.welch_difference(np.ones(3), np.zeros(2)) == {"mean": 1.0, "half_width": 0.0}


def test_peers_are_sorted_by_their_intervals():
    study = study_of(**STUDY)
    assert peers.names(study) == list(STUDY)
    assert peers.sides(study) == {-1: ["`worse`"], 0: ["`same`"], 1: ["`better`"]}
    told = peers.verdict(study)
    assert "`better` is more accurate" in told
    assert "`worse` is less accurate" in told
    assert "`same` is not told apart" in told


def test_offsets_verdict_follows_from_the_interval():
    assert "was not shown" in overview.offsets_verdict(study_of(**STUDY))
    assert "is more accurate than" in overview.offsets_verdict(study_of(**{**STUDY, "no offsets": [0.50, 0.52, 0.54]}))
    assert "is less accurate than" in overview.offsets_verdict(study_of(**{**STUDY, "no offsets": [0.70, 0.72, 0.74]}))


def test_ablations_name_the_significant_changes():
    study = study_of(**STUDY)
    study["variants"]["worse"]["part"] = "bias"
    study["variants"]["same"]["part"] = "groups"
    assert ablations.significant_changes(study, "bias") == "**`worse` is worse.**"
    assert ablations.significant_changes(study, "groups") == "**No difference outside the interval.**"


def layer_of(points_on, reference, by_chance=None):
    return [
        dict.fromkeys(("attention", "distance", "reference_distance", "shift_fraction", "displacement"), 0.0)
        | {"points": points_on, "reference": reference, "by_chance": reference if by_chance is None else by_chance}
    ]


def attention_maps_of(first, second):
    """Three seeds' points on the object in two layers; at rest a tenth are."""
    runs = {
        str(seed): {"stage 1, block 1": layer_of(one, 0.1), "stage 2, block 1": layer_of(two, 0.1)}
        for seed, (one, two) in enumerate(zip(first, second))
    }
    return {"attention_maps": {"points": {"deformable": runs}}}


def test_contraction_and_density_follow_from_the_intervals():
    more, fewer, mixed = [0.20, 0.21, 0.22], [0.05, 0.06, 0.05], [0.05, 0.10, 0.16]
    assert "and than by chance, in every layer.**" in points.contract_verdict(attention_maps_of(more, more))
    told = points.contract_verdict(attention_maps_of(more, fewer))
    assert "is not reproduced" in told
    assert "than at rest, and than by chance, in stage 1, block 1; fewer in stage 2, block 1" in told
    assert "no difference outside the interval in stage 2, block 1" in points.contract_verdict(
        attention_maps_of(more, mixed)
    )
    shifted = attention_maps_of(more, more)  # to where objects are, whatever the scene
    for run in shifted["attention_maps"]["points"]["deformable"].values():
        run["stage 2, block 1"][0] |= {"by_chance": 0.21, "distance": 3.0}
    told = points.contract_verdict(shifted)
    assert "is not reproduced" in told
    assert "no difference outside the interval in stage 2, block 1" in told
    assert "points are farther from it than at rest in stage 2, block 1" in told
    assert "On average" not in points.contract_verdict(attention_maps_of(more, more))
    assert "Denser in the deeper stage:** 0.53" in points.density_verdict(attention_maps_of(fewer, more))
    assert "Thinner" in points.density_verdict(attention_maps_of(more, fewer))
    assert "No difference" in points.density_verdict(attention_maps_of(more, [0.19, 0.21, 0.23]))


def test_separate_groups_follow_from_the_intervals():
    def told(*together):
        groups = {
            str(seed): {"a": {"nearest": {"observed": value, "by_chance": 0.5}}} for seed, value in enumerate(together)
        }
        return points.multi_object_verdict(
            {"attention_maps": {"multi_object_groups": {"deformable (several)": groups}}}
        )

    assert "more often than by chance in a" in told(0.60, 0.61, 0.62)
    assert "Not reproduced" in told(0.45, 0.5, 0.56)
    assert "in a it is less often" in told(0.40, 0.41, 0.42)


def test_attention_from_afar_follows_from_the_intervals():
    def found(ours, still, windows):
        runs = {"deformable": ours, "no offsets": still, "shifted_window": windows}
        attention = {
            name: {str(seed): {"a": {"from_elsewhere": {"foreground": value}}} for seed, value in enumerate(values)}
            for name, values in runs.items()
        }
        return {"attention_maps": {"points": {"deformable": {"0": {"a": []}}}, "attention": attention}}

    low, high = [0.1, 0.11, 0.12], [0.6, 0.61, 0.62]
    told = points.attention_verdict(found(high, low, low))
    assert "more in a (61.0% ± 2.5% against 11.0% ± 2.5%, 11.0% ± 2.5% without offsets)" in told
    assert "less in a" in points.attention_verdict(found(low, low, high))
    assert "no difference outside the interval in a" in points.attention_verdict(found(low, high, low))
