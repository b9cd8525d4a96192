"""Data sets: items depend on (seed, epoch, index) alone; problems of a folder and of pictures are named and counted."""

import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from PIL import ImageOps  # noqa: E402

from dat_ref import ConfigError  # noqa: E402
from dat_ref.cli.photo import load_photo  # noqa: E402
from dat_ref.data import PIXEL_DEVIATION, PIXEL_MEAN, photograph_path  # noqa: E402
from dat_ref.pictures import MAX_PIXELS, read_picture  # noqa: E402
from dat_ref.scenes import KINDS, Scenes  # noqa: E402
from dat_ref.torch.train import data as train_data  # noqa: E402
from dat_ref.torch.train import loop  # noqa: E402
from dat_ref.torch.train.data import ImageFolder, SceneImages, normalised, train_and_val  # noqa: E402


def picture(path, seed=0, size=(30, 21)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path):
    """Return a folder with two classes: three pictures each for training, one each for validation."""
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
    data.set_epoch(3)  # no effect without `fresh`
    assert (len(data), data.classes, data.multi) == (5, KINDS, task == "which_all")
    for number in range(5):
        image, target = data[number]
        np.testing.assert_array_equal(image, normalised(scenes[number].image))
        np.testing.assert_array_equal(target, scenes[number].label)
        assert target.dtype == (torch.float32 if data.multi else torch.int64)
    assert sum(1 for _ in data) == 5  # a loop ends, although the scenes are unlimited


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
    assert torch.equal(state, torch.get_rng_state())  # torch's global generator is unchanged
    back = [again[number][0] for number in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(ahead, back, strict=True))
    assert not torch.equal(ahead[0], other[0][0])
    first.set_epoch(3)
    assert not torch.equal(ahead[0], first[0][0])
    assert all(torch.isfinite(image).all() and image.shape == (3, 16, 16) for image in ahead)


def test_crops_are_inside_the_picture_with_the_requested_area(monkeypatch):
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


def test_exif_orientation_is_applied(tmp_path):
    picture(tmp_path / "cat" / "plain.jpg")
    opened = Image.open(tmp_path / "cat" / "plain.jpg")
    exif = opened.getexif()
    exif[0x0112] = 6  # a quarter turn
    opened.save(tmp_path / "cat" / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "cat" / "turned.jpg").size == opened.size[::-1]


# ------------------------------------------------------------------------------------------------ damaged data


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


def test_classes_without_validation_pictures_are_reported(tree):
    (tree / "val" / "dog" / "0.png").unlink()
    (tree / "val" / "dog").rmdir()
    with pytest.warns(UserWarning, match="val: has no picture of 1 class: dog"):
        _, val = train_and_val(tree, 16, seed=0)
    assert [int(val[number][1]) for number in range(len(val))] == [0]


def test_files_with_other_extensions_are_reported(tree):
    (tree / "val" / "dog" / "notes.txt").write_text("seen from behind")
    with pytest.warns(UserWarning, match=r"left out 1 file: dog/notes\.txt with other endings"):
        train_and_val(tree, 16, seed=0)


def test_long_lists_of_problems_are_shortened():
    names = [f"c{number}" for number in range(11)]
    assert train_data._list_some(names, "class", "classes") == "11 classes: " + ", ".join(names[:8]) + " and 3 more"


# ------------------------------------------------------------------------------------------------ links


def test_links_to_folders_and_files_are_followed(tree, tmp_path):
    picture(tmp_path / "elsewhere" / "deep" / "7.png", seed=7)
    (tree / "val" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tree / "val" / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "deep" / "7.png")
    _, val = train_and_val(tree, 16, seed=0)
    names = [path.relative_to(tree / "val").as_posix() for path, _ in val.samples]
    assert names == ["cat/0.png", "cat/linked.png", "cat/more/deep/7.png", "dog/0.png"]


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("cat/gone.png", "nowhere.png", r"left out 1 symbolic link: cat/gone\.png without a target"),
        ("cat/folder", "nowhere", "left out 1 symbolic link: cat/folder without a target"),
        ("emu", "nowhere", "left out 1 symbolic link: emu without a target"),
        ("cat/loop", "val/cat", "left out 1 symbolic link: cat/loop to a folder above"),
    ],
)
def test_links_that_lead_nowhere_are_named(link, target, message, tree):
    (tree / "val" / link).symlink_to(tree / target)
    with pytest.warns(UserWarning, match=message):
        _, val = train_and_val(tree, 16, seed=0)
    assert len(val) == 2


def test_links_from_folder_to_folder_end(tree, tmp_path):
    picture(tmp_path / "other" / "0.png")
    (tree / "val" / "cat" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tree / "val" / "cat")
    with pytest.warns(UserWarning, match="cat/other/back to a folder above"):
        _, val = train_and_val(tree, 16, seed=0)
    assert len(val) == 3


def test_pictures_outside_the_classes_are_named(tree):
    picture(tree / "val" / "loose.png")
    with pytest.warns(UserWarning, match=r"left out 1 picture: loose\.png outside the folders of the classes"):
        train_and_val(tree, 16, seed=0)


# ------------------------------------------------------------------------------------------------ fingerprints


def replaced(tree):
    picture(tree / "train" / "cat" / "1.png", seed=99)


def edited_at_equal_size(tree):
    path = tree / "train" / "cat" / "1.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def renamed(tree):
    (tree / "train" / "cat" / "1.png").rename(tree / "train" / "cat" / "11.png")


def moved(tree):
    (tree / "train" / "cat" / "1.png").rename(tree / "train" / "dog" / "9.png")


def swapped(tree):
    first, second = (tree / "train" / name / "1.png" for name in ("cat", "dog"))
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (replaced, ["train/cat: other file contents"]),
        (edited_at_equal_size, ["train/cat: other file contents"]),
        (renamed, ["train/cat: other file names"]),
        (moved, ["train/cat: 3 pictures, 2", "train/dog: 3 pictures, 4"]),
        (swapped, [f"train/{name}: other file contents" for name in ("cat", "dog")]),
    ],
)
def test_a_fingerprint_shows_the_change(change, changed, tree):
    before = loop._data_summary(*folders(tree))
    change(tree)
    assert loop._data_changes(before, loop._data_summary(*folders(tree))) == changed


def folders(tree):
    train = ImageFolder(tree / "train", 32)
    return train, ImageFolder(tree / "val", 32, classes=train.classes)


def test_a_copy_has_the_same_fingerprint(tree, tmp_path):
    before = loop._data_summary(*folders(tree))
    shutil.copytree(tree / "train", tmp_path / "copy" / "train")
    shutil.copytree(tree / "val", tmp_path / "copy" / "val")
    os.utime(tmp_path / "copy" / "val" / "cat" / "0.png", (1, 1))
    assert loop._data_changes(before, loop._data_summary(*folders(tmp_path / "copy"))) == []


# ------------------------------------------------------------------------------------------------ reader of pictures

GRAY = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)


def kinds():
    """Return pictures of every kind that show the same gray values, by file name."""
    wide = GRAY.astype(np.uint16) * 257
    rgba = np.dstack([GRAY, GRAY, GRAY, np.full_like(GRAY, 255)])
    return {
        "gray.png": Image.fromarray(GRAY),
        "color.png": Image.fromarray(rgba).convert("RGB"),
        "opaque.png": Image.fromarray(rgba),
        "palette.png": Image.fromarray(GRAY).convert("P"),
        "16_bits.png": Image.fromarray(wide),
        "16_bits.tif": Image.fromarray(wide),
        "16_bits_big_endian.tif": Image.fromarray(wide.astype(">u2")),
        "32_bits.tif": Image.fromarray(wide.astype(np.int32)),
        "float.tif": Image.fromarray((GRAY / 255).astype(np.float32)),
        "float_to_1000.tif": Image.fromarray((GRAY / 255 * 1000).astype(np.float32)),
    }


@pytest.mark.parametrize("name", kinds())
def test_every_kind_of_picture_shows_its_values(name, tmp_path):
    """The same values in `explain`, in a data set, and by the reader itself."""
    path = tmp_path / "val" / "cat" / name
    path.parent.mkdir(parents=True)
    kinds()[name].save(path)
    read = read_picture(path)
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), np.repeat(GRAY[..., None], 3, axis=2))
    np.testing.assert_allclose(load_photo(path) * 255, np.asarray(read), rtol=1e-12)
    item, _ = ImageFolder(tmp_path / "val", 5)[0]
    np.testing.assert_array_equal(item, normalised(train_data._center_crop(read, 5)))


def test_an_ordinary_photograph_is_read_as_pillow_reads_it():
    np.testing.assert_array_equal(read_picture(photograph_path()), Image.open(photograph_path()).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_on_white(mode, tmp_path):
    image = Image.fromarray(np.dstack([GRAY // 2] * 3 + [np.full_like(GRAY, 255)]))
    image.putpixel((0, 0), (10, 20, 30, 0))
    image = image.convert("LA") if mode == "LA" else image
    if mode == "P":
        image = Image.fromarray(GRAY // 2 + 1).convert("P")
        image.putpixel((0, 0), 0)
        image.info["transparency"] = 0
    image.save(tmp_path / "clear.png")
    read = read_picture(tmp_path / "clear.png")
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert max(read.getpixel((3, 3))) < 128


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    values = (GRAY / 255).astype(np.float32)
    values[2, 3] = value
    path = tmp_path / "val" / "cat" / "hole.tif"
    path.parent.mkdir(parents=True)
    Image.fromarray(values).save(path)
    for read in (load_photo, lambda path: ImageFolder(path.parents[1])[0]):
        with pytest.raises(ConfigError, match=r"cannot read .*hole\.tif: it has values that are not finite"):
            read(path)


def oriented(path, orientation):
    """Write a picture with this orientation in its EXIF block."""
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    Image.fromarray(np.dstack([GRAY] * 3)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_all_orientations_are_those_of_pillow(suffix, tmp_path):
    for orientation in range(10):
        path = oriented(tmp_path / f"turned.{suffix}", orientation)
        expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        np.testing.assert_array_equal(read_picture(path), expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_that_cannot_be_read_means_no_rotation(suffix, tmp_path):
    """An orientation of a wrong type, and 60 blocks with changed bytes: each picture is read."""
    path, exif = tmp_path / f"typed.{suffix}", Image.Exif()
    exif[0x0112] = 6
    as_text = exif.tobytes().replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x02")  # type ASCII in place of SHORT
    assert as_text != exif.tobytes()
    Image.fromarray(np.dstack([GRAY] * 3)).save(path, exif=as_text)
    with pytest.warns(UserWarning, match=rf"typed\.{suffix}: not rotated, its EXIF data cannot be read"):
        assert read_picture(path).size == (8, 6)
    exif.update({0x010F: "maker", 0x011A: 72.0})
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    block, generator, sizes = exif.tobytes(), np.random.default_rng(0), set()
    for _ in range(60):
        changed = bytearray(block)
        for place in generator.integers(6, len(block), generator.integers(1, 7)):
            changed[place] = generator.integers(256)
        Image.fromarray(np.dstack([GRAY] * 3)).save(path, exif=bytes(changed))
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            sizes.add(read_picture(path).size)
    assert sizes == {(8, 6), (6, 8)}


def claim_size(path, width, height):
    """Write a PNG file whose header has this size."""
    Image.fromarray(GRAY).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@pytest.mark.parametrize("size", [(11_586, 11_586), (1, MAX_PIXELS + 1), (100_000, 100_000)])
def test_pictures_above_the_limit_are_refused_before_they_are_decoded(size, tree):
    path = tree / "val" / "cat" / "large.png"
    claim_size(path, *size)
    for read in (load_photo, lambda path: ImageFolder(path.parents[1])):
        with pytest.raises(ConfigError, match=rf"large\.png.*it is too large: expected at most {MAX_PIXELS} pixels"):
            read(path)


def test_large_photographs_are_scaled_before_the_conversion(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)).save(path)
    with pytest.warns(UserWarning, match=r"photo\.png: scaled down by 3 to 21 × 14 pixels"):
        small = read_picture(path, scaled_above=300)
    np.testing.assert_array_equal(small, Image.open(path).reduce(3))
    assert read_picture(path, scaled_above=40 * 61).size == (61, 40)


MEMORY = """
import sys, warnings
from pathlib import Path
from dat_ref.cli.photo import load_photo
warnings.simplefilter("ignore")
shape = load_photo(Path(sys.argv[1])).shape
# Not getrusage: its maximum survives exec, so that it would count the process that started this one.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(shape, status["VmHWM"].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_the_memory_for_a_large_photograph(tmp_path):
    """10 000 × 10 000 pixels in a file of 12 kB: below 1 GiB, where values of all pixels would take 6 GiB."""
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000)).save(path)
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    shape, _, kibibytes = done.stdout.strip().rpartition(" ")
    assert shape == "(3334, 3334, 3)"
    assert int(kibibytes) < 2**20


def test_a_missing_pillow_is_named_once(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"pillow is needed to read pictures: pip install 'dat-ref\[viz\]'"):
        train_and_val(tree, 16, seed=0)
    with pytest.raises(ConfigError, match="pillow is needed"):
        load_photo(photograph_path())
