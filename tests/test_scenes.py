"""Scenes: reproducible by number, masks that match the picture, disjoint splits, correct labels."""

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
from dat_ref.scenes import (
    KINDS,
    OBJECTS,
    SPLITS,
    TASKS,
    Placed,
    Scenes,
    backgrounds,
    paint,
    pictures,
    position_targets,
    scenes,
    shapes,
    share_on_mask,
)
from dat_ref.scenes.measures import points_on_mask

TASK = st.sampled_from(sorted(TASKS))
SPLIT = st.sampled_from(SPLITS)
OBJECT_SET = st.sampled_from(sorted(OBJECTS))


def digest(scene):
    label = np.asarray(scene.label)
    return hashlib.sha256(scene.image.tobytes() + scene.masks.tobytes() + label.tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ reproducibility


@pytest.mark.parametrize("objects", OBJECTS)
def test_another_process_makes_the_same_scenes_in_another_order(objects):
    numbers = [5, 0, 3, 3, 11]
    arguments = {"task": "find_all", "split": "held_out", "size": 40, "seed": 2, "objects": objects}
    code = (
        "import sys, json, hashlib, numpy as np\n"
        "from dat_ref.scenes import Scenes\n"
        "numbers, arguments = json.loads(sys.argv[1])\n"
        "found = {}\n"
        "for n in reversed(numbers):\n"
        "    s = Scenes(**arguments)[n]\n"
        "    data = s.image.tobytes() + s.masks.tobytes() + np.asarray(s.label).tobytes()\n"
        "    found[n] = hashlib.sha256(data).hexdigest()\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", code, json.dumps([numbers, arguments])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = Scenes(**arguments)
    assert json.loads(printed) == {str(number): digest(ours[number]) for number in numbers}


@given(TASK, SPLIT, OBJECT_SET, st.integers(0, 1000))
def test_seed_split_and_number_make_another_scene(task, split, objects, number):
    common = {"size": 24, "objects": objects}
    first = digest(Scenes(task, split, **common).scene(number))
    others = [
        Scenes(task, split, seed=1, **common).scene(number),
        Scenes(task, split, **common).scene(number + 1),
        Scenes(task, SPLITS[1 - SPLITS.index(split)], **common).scene(number),
    ]
    assert first not in {digest(each) for each in others}
    assert first == digest(Scenes(task, split, **common).scene(number))


def test_parts_of_a_photograph_have_no_pixel_in_common():
    """Side by side, the two parts are the whole photograph."""
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


def mistakes_of_masks(task, split, size, number, masks, objects="shapes"):
    """Return the number of changed pixels far from every mask, and of unchanged pixels on a mask."""
    image, plain = (
        Scenes(task, split, size, objects=objects).scene(number).image,
        without_objects(task, split, size, number),
    )
    changed = (image != plain).any(-1)
    any_mask = masks.any(0) if len(masks) else np.zeros_like(changed)
    # An object covers less than half of some pixels outside its mask, at its tips two in a row.
    near = ndimage.binary_dilation(any_mask, np.ones((3, 3)), iterations=2)
    return int((changed & ~near).sum()), int((any_mask & ~changed).sum())


@given(TASK, SPLIT, OBJECT_SET, st.integers(33, 71), st.integers(0, 200))
def test_masks_are_where_the_picture_was_changed(task, split, objects, size, number):
    scene = Scenes(task, split, size, objects=objects).scene(number)
    stray, missed = mistakes_of_masks(task, split, size, number, scene.masks, objects)
    few = 0.02 * max(scene.masks.sum(), 50)
    # Tips thinner than half a pixel: of a moon, and more of them on a picture of few pixels, whose hair and legs are
    # thin. Twice the share for those.
    assert stray <= (few if objects != "pictures" else 2 * few + 4)
    assert missed <= (few if objects != "pictures" else 2 * few)  # a grain may hit the very value that was there
    assert scene.masks.sum((1, 2)).all()
    assert (scene.masks.sum(0) <= 1).all()


@pytest.mark.parametrize("mistake", [lambda masks: masks.transpose(0, 2, 1), lambda masks: np.roll(masks, 4, axis=2)])
def test_wrong_mask_is_noticed(mistake):
    scene = Scenes("which", size=51).scene(8)
    stray, missed = mistakes_of_masks("which", "train", 51, 8, mistake(scene.masks))
    assert stray > 0.02 * scene.masks.sum()
    assert missed > 0.02 * scene.masks.sum()


@given(st.integers(0, 300))
def test_center_of_a_mask_is_the_center_of_the_object(number):
    """For the kinds whose center is their center of mass; a moon's and a heart's is not."""
    scene = Scenes("which_all", size=72).scene(number)
    for placed, mask in zip(scene.objects, scene.masks, strict=True):
        assert isinstance(placed, Placed)
        if placed.kind not in ("moon", "heart"):
            np.testing.assert_allclose(np.argwhere(mask).mean(0), placed.center, atol=0.6)


# ------------------------------------------------------------------------------------------------ labels


@given(TASK, SPLIT, st.integers(0, 500))
def test_labels_are_correct(task, split, number):
    data = Scenes(task, split, size=40)
    scene = data.scene(number)
    kinds = [placed.kind for placed in scene.objects]
    if task == "which":
        assert [data.classes[scene.label]] == kinds
    elif task == "which_all":
        assert {name for name, there in zip(data.classes, scene.label, strict=True) if there} == set(kinds)
        assert len(set(kinds)) == len(kinds) in (1, 2, 3, 4)
    elif task == "find":
        assert [data.classes[scene.label]] == (kinds or ["nothing"])
    elif task == "find_all":
        named = {name for name, there in zip(data.classes, scene.label, strict=True) if there}
        assert named == (set(kinds) or {"nothing"})
        assert len(set(kinds)) == len(kinds) <= 6
    elif task == "count":
        assert data.classes[scene.label] == str(len(kinds))
    else:
        (y, x), cell = scene.objects[0].center, 40 / 4
        row, column = divmod(scene.label, 4)
        assert row * cell <= y + 0.5 <= (row + 1) * cell
        assert column * cell <= x + 0.5 <= (column + 1) * cell


def test_every_class_is_as_frequent_as_any_other():
    for task in ("which", "count", "find"):
        data = Scenes(task, size=16)
        counts = Counter(data.scene(number).label for number in range(1600))
        expected = 1600 / len(data.classes)
        assert len(counts) == len(data.classes)
        chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_squared < 30  # with 4 to 8 degrees of freedom, exceeded once in five thousand times


@given(st.integers(1, 6), st.integers(0, 300), OBJECT_SET)
def test_copies_are_objects_of_one_kind(copies, number, objects):
    placed = Scenes("find", size=40, objects=objects, copies=copies).scene(number).objects
    assert len(placed) <= copies
    assert len({each.kind for each in placed}) <= 1


def test_one_to_copies_objects_are_equally_frequent():
    data = Scenes("find", size=16, copies=3)
    counts = Counter(len(data.scene(number).objects) for number in range(900))
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts[n] for n in (1, 2, 3)) < 1.3 * min(counts[n] for n in (1, 2, 3))
    assert counts[0] < 0.5 * counts[1]


def test_colour_of_flat_shapes_is_independent_of_the_kind():
    """The mean colours of the kinds differ no more than by chance."""
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
    """Compared with the nearest of many points on the outline."""
    corners = shapes._corners(kind)
    steps = np.linspace(0, 1, 200, endpoint=False)[:, None, None]
    outline = (corners + steps * (np.roll(corners, -1, 0) - corners)).reshape(-1, 2)
    nearest = np.hypot(*(outline - (x, y)).T).min()
    assert abs(shapes.depth(kind, np.array(x), np.array(y))) == pytest.approx(nearest, abs=0.01)


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("kind", pictures.PICTURES)
def test_picture_fills_its_square_and_has_transparent_corners(kind):
    picture = pictures.picture(kind)
    alpha = picture[..., 3]
    assert (picture[..., :3] <= alpha[..., None] + 1e-6).all()  # colours times alpha
    assert 0.3 < (alpha > 0.5).mean() < 0.95
    assert (alpha > 0.5).any(0).mean() > 0.6
    assert (alpha > 0.5).any(1).mean() > 0.6


@given(st.floats(-np.pi, np.pi), st.floats(0, 1))
def test_hue_rotation_keeps_grey_and_lengths(angle, value):
    matrix = pictures.hue_rotation(angle)
    np.testing.assert_allclose(matrix @ np.full(3, value), np.full(3, value), atol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("kind", pictures.PICTURES)
def test_object_painted_at_a_place_covers_it(kind):
    canvas, mask = np.full((64, 64, 3), 0.5), np.zeros((64, 64), bool)
    paint(canvas, mask, Placed(kind, (20.0, 40.0), 12.0, 0.3), "pictures", np.random.default_rng(0))
    rows, columns = np.nonzero(mask)
    assert 8 < rows.min() < 20 < rows.max() < 33
    assert 28 < columns.min() < 40 < columns.max() < 53
    y, x = np.mgrid[:64, :64]
    assert (canvas[np.maximum(abs(y - 20), abs(x - 40)) > 14] == 0.5).all()  # 1.1 radii and interpolation
    assert canvas.min() >= 0
    assert canvas.max() <= 1


@given(OBJECT_SET, st.floats(-20, 60), st.floats(-20, 60), st.integers(0, 99))
def test_object_over_the_edge_is_cut_off(name, y, x, seed):
    """The part on the picture equals the same part of a larger picture on which the object is whole."""
    kind = OBJECTS[name].kinds[0]
    background = np.random.default_rng(1).uniform(size=(120, 120, 3))
    whole, whole_mask = background.copy(), np.zeros((120, 120), bool)
    part, part_mask = background[40:80, 40:80].copy(), np.zeros((40, 40), bool)
    paint(whole, whole_mask, Placed(kind, (y + 40, x + 40), 8.0, 0.5), name, np.random.default_rng(seed))
    paint(part, part_mask, Placed(kind, (y, x), 8.0, 0.5), name, np.random.default_rng(seed))
    np.testing.assert_array_equal(part_mask, whole_mask[40:80, 40:80])
    if name == "pictures":  # the other sets draw grain for each visible pixel
        np.testing.assert_allclose(part, whole[40:80, 40:80], atol=1e-12)


def test_unknown_kind_is_refused():
    canvas, mask = np.zeros((20, 20, 3)), np.zeros((20, 20), bool)
    with pytest.raises(ConfigError, match=r"kind: expected one of giraffe, .*, got 'unicorn'"):
        paint(canvas, mask, Placed("unicorn", (9.0, 9.0), 5.0, 0.0), "pictures", np.random.default_rng(0))
    assert not canvas.any()


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
    "all weights equal": lambda points, mask, reduction, weights: share_on_mask(points, mask, reduction),
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
def test_share_on_a_mask_equals_loops(seed):
    ours, expected = measured(share_on_mask, seed)
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shares_are_noticed(wrong):
    theirs, expected = measured(WRONG[wrong], 3)
    assert theirs != pytest.approx(expected, rel=1e-3)


def targets_by_loops(label, classes, masks, reduction, on_objects):
    """Return weighted targets for every position, with loops over positions."""
    height, width = masks.shape[1:]
    rows, columns = -(-height // reduction), -(-width // reduction)
    named = np.eye(classes)[label] if np.ndim(label) == 0 else label / label.sum()
    touched = np.zeros((rows, columns), bool)
    for y, x in np.argwhere(masks.any(0)):
        touched[y // reduction, x // reduction] = True
    count, size = touched.sum(), touched.size
    share = on_objects if 0 < count < size else count / size
    weights = np.zeros((rows, columns))
    for y in range(rows):
        for x in range(columns):
            weights[y, x] = share / count if touched[y, x] else (1 - share) / (size - count)
    return named[:, None, None] * weights


@given(
    st.integers(0, 6), st.integers(1, 23), st.integers(1, 23), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99)
)
def test_position_targets_equal_loops(count, height, width, reduction, on_objects, seed):
    generator = np.random.default_rng(seed)
    masks = generator.uniform(size=(count, height, width)) < 0.05
    label = int(generator.integers(4)) if seed % 2 else (generator.uniform(size=4) < 0.5) + np.eye(4)[0]
    ours = position_targets(label, 4, masks, reduction, on_objects)
    np.testing.assert_allclose(ours, targets_by_loops(label, 4, masks, reduction, on_objects), atol=1e-6)
    assert ours.sum() == pytest.approx(1, abs=1e-5)


def test_points_on_a_mask_one_by_one():
    mask = np.zeros((8, 8), bool)
    mask[4:, :4] = True
    points = np.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [-1.0, 0.0]]])
    assert points_on_mask(points, mask, 4).tolist() == [[True, False], [False, False]]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "why"}, "task: expected one of which, which_all, where, count, find, find_all, got 'why'"),
        ({"split": "test"}, "split: expected one of train, held_out, got 'test'"),
        ({"size": 15}, "size: expected 16 pixels or more, got 15"),
        ({"length": -1}, "no negative numbers, got -1"),
        ({"seed": -1}, "no negative numbers"),
        ({"radius": (0.2, 0.1)}, "radius: expected 0 < smallest ≤ largest ≤ 0.4 for task 'which', got"),
        ({"radius": (0.0, 0.1)}, "radius: expected 0 < smallest"),
        ({"radius": (0.1, 0.41)}, "largest ≤ 0.4"),
        ({"task": "count", "radius": (0.1, 0.18)}, "largest ≤ 0.17 for task 'count'"),
        ({"task": "find", "copies": 2, "radius": (0.1, 0.18)}, "largest ≤ 0.17 for task 'find'"),
        ({"objects": "cats"}, "objects: expected one of shapes, discs, pictures, got 'cats'"),
        ({"copies": 0}, "copies: expected 1, or up to 6 with task 'find', got 0"),
        ({"copies": 2}, "copies: expected 1"),
        ({"task": "find", "copies": 7}, "copies: expected 1, or up to 6 with task 'find', got 7"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Scenes(**arguments)


@given(st.sampled_from(["which", "where"]), st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.integers(0, 1000))
def test_radius_is_in_the_range_given(task, one, other, number):
    smallest, largest = sorted((one, other))
    (placed,) = Scenes(task, size=40, radius=(smallest, largest)).scene(number).objects
    assert smallest * 40 <= placed.radius <= largest * 40
    assert all(placed.radius <= place <= 39 - placed.radius for place in placed.center)


def test_loop_ends_and_further_scenes_exist():
    few = Scenes(size=16, length=3)
    assert len(list(few)) == len(few) == 3
    with pytest.raises(IndexError, match="number: expected 0 ≤ number < 3, got 3"):
        few[3]
    assert few.scene(3).image.shape == (16, 16, 3)
    assert scenes.LENGTHS["train"] == len(Scenes())
