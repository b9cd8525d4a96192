"""Data to train on: items follow from (seed, epoch, number) alone; what is wrong with a folder is named and counted."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from dat_ref import ConfigError  # noqa: E402
from dat_ref.data import PIXEL_DEVIATION, PIXEL_MEAN  # noqa: E402
from dat_ref.pictures import read_picture  # noqa: E402
from dat_ref.scenes import KINDS, Scenes  # noqa: E402
from dat_ref.torch.train import data as train_data  # noqa: E402
from dat_ref.torch.train.data import ImageFolder, SceneImages, normalised, train_and_val  # noqa: E402


def picture(path, seed=0, size=(30, 21)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path):
    """Two classes with three pictures each to train on, one each to look at."""
    for number, (split, many) in enumerate((("train", 3), ("val", 1))):
        for place, name in enumerate(("cat", "dog")):
            for one in range(many):
                picture(tmp_path / split / name / f"{one}.png", seed=100 * number + 10 * place + one)
    return tmp_path


def test_pixels_are_normalised_by_channel():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = [(image[..., c] / 255 - PIXEL_MEAN[c]) / PIXEL_DEVIATION[c] for c in range(3)]
    np.testing.assert_allclose(normalised(image), np.stack(expected), atol=1e-6)


def test_normalising_takes_read_only_and_mirrored_pixels():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    image.flags.writeable = False
    np.testing.assert_array_equal(normalised(image[:, ::-1]), normalised(image).flip(2))


# ------------------------------------------------------------------------------------------------ scenes


@pytest.mark.parametrize("task", ["which", "which_all"])
def test_items_are_the_scenes(task):
    scenes = Scenes(task, "held_out", size=24, length=5)
    data = SceneImages(scenes)
    data.set_epoch(3)  # means nothing without `fresh`
    assert (len(data), data.classes, data.multi) == (5, KINDS, task == "which_all")
    for number in range(5):
        image, target = data[number]
        np.testing.assert_array_equal(image, normalised(scenes[number].image))
        np.testing.assert_array_equal(target, scenes[number].label)
        assert target.dtype == (torch.float32 if data.multi else torch.int64)
    assert sum(1 for _ in data) == 5  # a loop ends, though scenes do not


def test_fresh_scenes_in_every_epoch():
    scenes = Scenes(size=24, length=4)
    data = SceneImages(scenes, fresh=True)
    seen = []
    for epoch in range(3):
        data.set_epoch(epoch)
        seen += [data[number][0].numpy().tobytes() for number in range(4)]
    assert len(set(seen)) == 12
    assert seen[9] == normalised(scenes.scene(9).image).numpy().tobytes()


# ------------------------------------------------------------------------------------------------ folders


def test_classes_are_folders_by_name_and_pictures_are_whole(tree):
    _, val = train_and_val(tree, 21, seed=0)
    assert val.classes == ("cat", "dog")
    image, target = val[1]
    assert (tuple(image.shape), int(target)) == ((3, 21, 21), 1)
    path, _ = val.samples[1]
    side = 0.875 * 21
    box = (15 - side / 2, 10.5 - side / 2, 15 + side / 2, 10.5 + side / 2)
    middle = Image.open(path).resize((21, 21), Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(image, normalised(np.asarray(middle)))


def test_chance_follows_from_seed_epoch_and_number(tree):
    pytest.importorskip("kornia")
    first, _ = train_and_val(tree, 16, seed=5)
    again, _ = train_and_val(tree, 16, seed=5)
    other, _ = train_and_val(tree, 16, seed=6)
    for data in (first, again, other):
        data.set_epoch(2)
    state = torch.get_rng_state()
    ahead = [first[number][0] for number in range(6)]
    assert torch.equal(state, torch.get_rng_state())  # torch's own numbers are left alone
    back = [again[number][0] for number in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(ahead, back, strict=True))
    assert not torch.equal(ahead[0], other[0][0])
    first.set_epoch(3)
    assert not torch.equal(ahead[0], first[0][0])
    assert all(torch.isfinite(image).all() and image.shape == (3, 16, 16) for image in ahead)


def test_crops_lie_within_the_picture_and_have_the_area_asked_for(monkeypatch):
    boxes = []
    monkeypatch.setattr(
        train_data, "_resize_box", lambda pil_image, box, size: boxes.append(box) or np.zeros((2, 2, 3))
    )
    for seed in range(200):
        train_data._random_resized_crop(Image.new("RGB", (37, 90)), 8, np.random.default_rng(seed))
    left, top, right, bottom = np.array(boxes).T
    assert min(left.min(), top.min()) >= 0
    assert right.max() <= 37 + 1e-9
    assert bottom.max() <= 90 + 1e-9
    share = (right - left) * (bottom - top) / (37 * 90)
    assert share.max() <= 1 + 1e-9
    assert share.min() < 0.15  # some are small
    assert np.median(share) > 0.2


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path):
    picture(tmp_path / "cat" / "plain.jpg")
    opened = Image.open(tmp_path / "cat" / "plain.jpg")
    exif = opened.getexif()
    exif[0x0112] = 6  # turned by a quarter
    opened.save(tmp_path / "cat" / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "cat" / "turned.jpg").size == opened.size[::-1]


# ------------------------------------------------------------------------------------------------ what is wrong


def test_a_folder_that_is_absent_or_has_no_classes(tmp_path):
    with pytest.raises(ConfigError, match="none: expected a folder with a folder for each class, and there is none"):
        ImageFolder(tmp_path / "none")
    picture(tmp_path / "loose.png")
    with pytest.raises(ConfigError, match="expected a folder for each class, and it has no folders"):
        ImageFolder(tmp_path)


def test_classes_without_pictures_are_named_and_counted(tree):
    for name in ("ant", "bee"):
        (tree / "train" / name).mkdir()
    with pytest.raises(ConfigError, match=r"no pictures in 2 classes: ant, bee; expected \.jpg"):
        train_and_val(tree, 16, seed=0)


def test_pictures_that_cannot_be_read_are_named_and_counted(tree):
    (tree / "train" / "cat" / "empty.jpg").touch()
    (tree / "train" / "dog" / "text.png").write_text("no picture")
    with pytest.raises(ConfigError) as error:
        train_and_val(tree, 16, seed=0)
    assert "cannot read 2 pictures" in str(error.value)
    assert "empty.jpg (it is empty)" in str(error.value)
    assert "text.png (UnidentifiedImageError)" in str(error.value)


def test_a_picture_that_ends_early_is_named_when_it_is_read(tree):
    path = tree / "val" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:-700])
    _, val = train_and_val(tree, 16, seed=0)
    with pytest.raises(ConfigError, match=r"cannot read .*cat/0\.png: .*truncated"):
        val[0]


def test_other_classes_than_those_trained_on_are_named_and_counted(tree):
    picture(tree / "val" / "fox" / "0.png")
    with pytest.raises(ConfigError, match="val: has 1 class: fox that training has not"):
        train_and_val(tree, 16, seed=0)


def test_classes_that_are_not_looked_at_are_told(tree):
    (tree / "val" / "dog" / "0.png").unlink()
    (tree / "val" / "dog").rmdir()
    with pytest.warns(UserWarning, match="val: has no picture of 1 class: dog"):
        _, val = train_and_val(tree, 16, seed=0)
    assert [int(val[number][1]) for number in range(len(val))] == [0]


def test_files_with_other_endings_are_told(tree):
    (tree / "val" / "dog" / "notes.txt").write_text("seen from behind")
    with pytest.warns(UserWarning, match=r"left out 1 file: dog/notes\.txt with other endings"):
        train_and_val(tree, 16, seed=0)


def test_of_many_only_some_are_named():
    names = [f"c{number}" for number in range(11)]
    assert train_data._list_some(names, "class", "classes") == "11 classes: " + ", ".join(names[:8]) + " and 3 more"
