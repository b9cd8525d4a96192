"""Experiments: measures against loops and cases by hand, wrong ones rejected; offsets that are really exchanged."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("PIL")

from dat_ref.experiments import measures, page
from dat_ref.scenes import share_on_mask

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS = DOCS / "experiments" / "knock_out.json"


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
    knock_out = pytest.importorskip("dat_ref.experiments.knock_out", exc_type=ImportError)
    return np.array(knock_out.group_rows(trace, mask, 1.0))


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


def test_offsets_are_exchanged_and_given_back(model):
    import torch

    from dat_ref.experiments.knock_out import CHANGES, changed, deformable, mean_offsets

    assert list(deformable(model)) == ["stage 2, block 2", "stage 2, block 4", "stage 3, block 1"]
    layer = deformable(model)["stage 2, block 2"]
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before, mean = traced(model, images), mean_offsets(model, images)["stage 2, block 2"]
    assert before.raw_offsets.abs().max() > 0
    found = {}
    for what, change in CHANGES.items():
        with changed(layer, change, mean):
            found[what] = traced(model, images)
    torch.testing.assert_close(found["none"].points_px, before.reference_px, rtol=0, atol=0)
    torch.testing.assert_close(found["another scene's"].points_px, before.points_px.roll(1, 0), rtol=0, atol=0)
    means = before.raw_offsets.mean((0, 2, 3), keepdim=True).expand_as(before.raw_offsets)
    torch.testing.assert_close(found["one shift"].raw_offsets, means)
    torch.testing.assert_close(traced(model, images).points_px, before.points_px, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_is_what_was_measured():
    """`python -m dat_ref.experiments.page docs/experiments/knock_out.json` prints it anew."""
    found = json.loads(NUMBERS.read_text(encoding="utf-8"))
    written = (DOCS / "experiments" / "index.md").read_text(encoding="utf-8")
    assert written == page.page(found)
    other = copy.deepcopy(found)
    other["accuracy"]["with_offsets"]["all"]["none"]["change"]["mean"] += 0.01
    assert written != page.page(other)


def test_the_measured_network_is_the_one_that_ships():
    """New weights need new numbers: accuracy as trained is that of the network's card, to a few scenes' rounding."""
    from dat_ref.cli.scene import card

    found = json.loads(NUMBERS.read_text(encoding="utf-8"))
    assert found["scenes"] == card()["held_out_scenes"]
    assert found["accuracy"]["as_trained"]["mean"] == pytest.approx(card()["accuracy"], abs=2 / found["scenes"])


def verdict(none, shift, other):
    rows = {"none": none, "one shift": shift, "another scene's": other}
    everywhere = {what: {"change": {"mean": mean, "half_width": 0.01}} for what, mean in rows.items()}
    return page.uses({"accuracy": {"with_offsets": {"all": everywhere}}})


def test_verdicts_follow_from_the_intervals():
    assert "was not shown**" in verdict(-0.01, -0.5, -0.5)
    assert "harm" in verdict(0.02, 0, 0)
    all_it_takes, follows = verdict(-0.5, -0.05, 0.005), verdict(-0.5, -0.4, -0.2)
    assert "brings back 90% of" in all_it_takes
    assert "was not shown to matter: with another scene's it changes by +0.5 ± 1.0" in all_it_takes
    assert "brings back 20% of" in follows
    assert "loses 20.0 ± 1.0 points" in follows
    nearer, same = ({"points_minus_at_rest": {"mean": mean, "half_width": 0.1}} for mean in (0.2, 0.0))
    assert "in every group" in page.gathers({"groups": {"a": [nearer, nearer]}})
    assert "not reproduced" in page.gathers({"groups": {"a": [nearer], "b": [same]}})
