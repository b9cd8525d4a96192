"""Scenes: the same for whoever asks, masks where the object is, nothing shared between splits, labels that are true."""

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

pytest.importorskip("PIL")

from dat_ref import ConfigError
from dat_ref.scenes import KINDS, SPLITS, TASKS, Placed, Scenes, backgrounds, scenes, shapes, share_on_mask

TASK = st.sampled_from(sorted(TASKS))
SPLIT = st.sampled_from(SPLITS)


def digest(scene):
    label = np.asarray(scene.label)
    return hashlib.sha256(scene.image.tobytes() + scene.masks.tobytes() + label.tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ the same for all


def test_another_process_sees_the_same_scenes_in_another_order():
    numbers, how = [5, 0, 3, 3, 11], {"task": "which_all", "split": "held_out", "size": 40, "seed": 2}
    code = (
        "import sys, json, hashlib, numpy as np\n"
        "from dat_ref.scenes import Scenes\n"
        "numbers, how = json.loads(sys.argv[1])\n"
        "found = {}\n"
        "for n in reversed(numbers):\n"
        "    s = Scenes(**how)[n]\n"
        "    data = s.image.tobytes() + s.masks.tobytes() + np.asarray(s.label).tobytes()\n"
        "    found[n] = hashlib.sha256(data).hexdigest()\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", code, json.dumps([numbers, how])]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = Scenes(**how)
    assert json.loads(told) == {str(number): digest(ours[number]) for number in numbers}


@given(TASK, SPLIT, st.integers(0, 1000))
def test_seed_split_and_number_make_another_scene(task, split, number):
    first = digest(Scenes(task, split, size=24).scene(number))
    others = [
        Scenes(task, split, size=24, seed=1).scene(number),
        Scenes(task, split, size=24).scene(number + 1),
        Scenes(task, SPLITS[1 - SPLITS.index(split)], size=24).scene(number),
    ]
    assert first not in {digest(each) for each in others}
    assert first == digest(Scenes(task, split, size=24).scene(number))


def test_parts_of_a_photograph_have_no_pixel_in_common():
    """They lie side by side, and together are the whole."""
    for name in backgrounds.photographs():
        train, held_out = (backgrounds.part(name, split) for split in SPLITS)
        width = train.shape[1] + held_out.shape[1]
        assert held_out.shape[1] == pytest.approx(width / 3, abs=1)
        from PIL import Image

        with Image.open(backgrounds.photograph_path(name)) as whole:
            np.testing.assert_array_equal(np.concatenate((train, held_out), axis=1), np.asarray(whole.convert("RGB")))


# ------------------------------------------------------------------------------------------------ masks


def without_objects(task, split, size, number):
    """Return the scene's image with nothing on it."""
    generator = np.random.default_rng([0, SPLITS.index(split), number])
    return np.round(255 * backgrounds.background(generator, split, size)).astype(np.uint8)


def mistakes_of_masks(task, split, size, number, masks):
    """Return how many pixels changed that are on no mask or beside one, and how many of a mask did not change."""
    image, plain = Scenes(task, split, size).scene(number).image, without_objects(task, split, size, number)
    changed = (image != plain).any(-1)
    any_mask = masks.any(0) if len(masks) else np.zeros_like(changed)
    # Pixels of which the object has less than half, at its tips two in a row.
    beside = ndimage.binary_dilation(any_mask, np.ones((3, 3)), iterations=2)
    return int((changed & ~beside).sum()), int((any_mask & ~changed).sum())


@given(TASK, SPLIT, st.integers(33, 71), st.integers(0, 200))
def test_masks_are_where_the_picture_was_changed(task, split, size, number):
    scene = Scenes(task, split, size).scene(number)
    stray, missed = mistakes_of_masks(task, split, size, number, scene.masks)
    few = 0.02 * max(scene.masks.sum(), 50)
    assert stray <= few  # the tips of a moon are thinner than half a pixel
    assert missed <= few  # a grain may hit the very value that was there
    assert scene.masks.sum((1, 2)).all()
    assert (scene.masks.sum(0) <= 1).all()


@pytest.mark.parametrize("mistake", [lambda masks: masks.transpose(0, 2, 1), lambda masks: np.roll(masks, 4, axis=2)])
def test_a_wrong_mask_is_noticed(mistake):
    scene = Scenes("which", size=51).scene(8)
    stray, missed = mistakes_of_masks("which", "train", 51, 8, mistake(scene.masks))
    assert stray > 0.02 * scene.masks.sum()
    assert missed > 0.02 * scene.masks.sum()


@given(st.integers(0, 300))
def test_the_middle_of_a_mask_is_the_middle_of_the_object(number):
    """Of the kinds whose middle is their center of mass; a moon's and a heart's is not."""
    scene = Scenes("which_all", size=72).scene(number)
    for placed, mask in zip(scene.objects, scene.masks, strict=True):
        assert isinstance(placed, Placed)
        if placed.kind not in ("moon", "heart"):
            np.testing.assert_allclose(np.argwhere(mask).mean(0), placed.center, atol=0.6)


# ------------------------------------------------------------------------------------------------ labels


@given(TASK, SPLIT, st.integers(0, 500))
def test_labels_are_true(task, split, number):
    data = Scenes(task, split, size=40)
    scene = data.scene(number)
    kinds = [placed.kind for placed in scene.objects]
    if task == "which":
        assert [data.classes[scene.label]] == kinds
    elif task == "which_all":
        assert {name for name, there in zip(data.classes, scene.label, strict=True) if there} == set(kinds)
        assert len(set(kinds)) == len(kinds) in (1, 2, 3, 4)
    elif task == "count":
        assert data.classes[scene.label] == str(len(kinds))
    else:
        (y, x), cell = scene.objects[0].center, 40 / 4
        row, column = divmod(scene.label, 4)
        assert row * cell <= y + 0.5 <= (row + 1) * cell
        assert column * cell <= x + 0.5 <= (column + 1) * cell


def test_every_class_is_as_frequent_as_any_other():
    for task in ("which", "count"):
        data = Scenes(task, size=16)
        counts = Counter(data.scene(number).label for number in range(1600))
        expected = 1600 / len(data.classes)
        assert len(counts) == len(data.classes)
        chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_squared < 30  # with 4 or 7 degrees of freedom this happens once in ten thousand times


def test_colour_does_not_tell_the_kind():
    """The mean colour of the objects of each kind differs no more than chance has it."""
    data = Scenes("which", size=48)
    colours = {kind: [] for kind in KINDS}
    for number in range(800):
        scene = data.scene(number)
        colours[scene.objects[0].kind].append(scene.image[scene.masks[0]].mean(0))
    means = np.array([np.mean(each, axis=0) for each in colours.values()])
    spread = np.mean([np.std(each, axis=0) / np.sqrt(len(each)) for each in colours.values()], axis=0)
    assert (np.abs(means - means.mean(0)) < 4 * spread).all()


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_fill_part_of_their_circle(kind):
    y, x = np.mgrid[-1.2:1.2:97j, -1.2:1.2:97j]
    inside = shapes.depth(kind, x, y) > 0
    assert 0.15 < inside.sum() / (np.hypot(x, y) <= 1).sum() <= 1.02
    assert not inside[np.hypot(x, y) > 1.1].any()
    assert inside.any(0).sum() > 40


@pytest.mark.parametrize("kind", ["square", "triangle", "cross", "star", "heart"])
@given(x=st.floats(-1.5, 1.5), y=st.floats(-1.5, 1.5))
def test_depth_of_polygons_is_the_distance_to_the_outline(kind, x, y):
    """By walking along the outline in small steps."""
    corners = shapes._corners(kind)
    steps = np.linspace(0, 1, 200, endpoint=False)[:, None, None]
    outline = (corners + steps * (np.roll(corners, -1, 0) - corners)).reshape(-1, 2)
    nearest = np.hypot(*(outline - (x, y)).T).min()
    assert abs(shapes.depth(kind, np.array(x), np.array(y))) == pytest.approx(nearest, abs=0.01)


# ------------------------------------------------------------------------------------------------ measures


def share_by_loops(points, mask, reduction, weights):
    total = found = 0.0
    for (y, x), weight in zip(points.reshape(-1, 2), weights.ravel(), strict=True):
        row, column = (math.floor((place + 0.5) * reduction) for place in (y, x))  # the pixel that holds the place
        total += weight
        if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]:
            found += weight
    return found / total


WRONG = {
    "axes swapped": lambda points, mask, reduction, weights: share_on_mask(points[..., ::-1], mask, reduction, weights),
    "half a pixel off": lambda points, mask, reduction, weights: share_on_mask(points - 0.5, mask, reduction, weights),
    "outside counts as the border": lambda points, mask, reduction, weights: share_on_mask(
        np.clip(points, 0, np.array(mask.shape) / reduction - 1), mask, reduction, weights
    ),
    "all alike": lambda points, mask, reduction, weights: share_on_mask(points, mask, reduction),
    "outside left out": lambda points, mask, reduction, weights: share_on_mask(
        points, mask, reduction, weights * (np.abs(points - 2).max(-1) < 3)
    ),
}


def measured(measure, seed):
    """Return what a measure finds, and what loops do, on points in and around a map of 5 × 7."""
    generator = np.random.default_rng(seed)
    mask = generator.uniform(size=(20, 28)) < 0.3
    mask[:, :2] = mask[:1] = True
    points = generator.uniform(-1.7, 7.7, size=(2, 3, 40, 2))
    weights = generator.uniform(size=points.shape[:-1])
    return measure(points, mask, 4, weights), share_by_loops(points, mask, 4, weights)


@given(st.integers(0, 10_000))
def test_shares_on_a_mask_by_loops(seed):
    ours, expected = measured(share_on_mask, seed)
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shares_are_noticed(wrong):
    theirs, expected = measured(WRONG[wrong], 3)
    assert theirs != pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "why"}, "task: expected one of which, which_all, where, count, got 'why'"),
        ({"split": "test"}, "split: expected one of train, held_out, got 'test'"),
        ({"size": 15}, "size: expected 16 pixels or more, got 15"),
        ({"length": -1}, "no negative numbers, got -1"),
        ({"seed": -1}, "no negative numbers"),
        ({"radius": (0.2, 0.1)}, "radius: expected 0 < least ≤ largest ≤ 0.4 for task 'which', got"),
        ({"radius": (0.0, 0.1)}, "radius: expected 0 < least"),
        ({"radius": (0.1, 0.41)}, "largest ≤ 0.4"),
        ({"task": "count", "radius": (0.1, 0.18)}, "largest ≤ 0.17 for task 'count'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Scenes(**arguments)


@given(st.sampled_from(["which", "where"]), st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.integers(0, 1000))
def test_objects_are_as_large_as_was_asked_for(task, one, other, number):
    least, largest = sorted((one, other))
    (placed,) = Scenes(task, size=40, radius=(least, largest)).scene(number).objects
    assert least * 40 <= placed.radius <= largest * 40
    assert all(placed.radius <= place <= 39 - placed.radius for place in placed.center)


def test_there_is_an_end_to_a_loop_and_none_to_scenes():
    few = Scenes(size=16, length=3)
    assert len(list(few)) == len(few) == 3
    with pytest.raises(IndexError, match="number: expected 0 ≤ number < 3, got 3"):
        few[3]
    assert few.scene(3).image.shape == (16, 16, 3)
    assert scenes.LENGTHS["train"] == len(Scenes())
