"""Data sets for training: scenes, and trees of image folders.

A data set has a length, items by index, ``classes`` (their names), ``multi`` (whether an item can have several
classes) and ``set_epoch``. It may have ``fingerprint``, see `ImageFolder.fingerprint`.

An item is a pair of image and target. The image is (3, H, W), float32, normalized. The target is a class, int64, or
(classes,) zeros and ones, float32; or a map of weights, see `SceneImages`. The random choices for an item depend on
(seed, epoch, index) alone. So the order of requests, the number of workers, and a stop and resume change nothing.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..._checks import Array, ConfigError, printable
from ...data import PIXEL_DEVIATION, PIXEL_MEAN
from ...pictures import header_problem, import_pillow, read_picture
from ...scenes import Scenes, position_targets
from ...train_config import TrainConfig
from ..models import preset_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_LISTED = 8  # names in a message; it counts the others
CROP_FRACTION = 0.875  # side of the center crop, relative to the shorter side of the picture
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # ranges of the random crops: share of the area, width / height
FINGERPRINT_BYTES = 4096  # bytes at the start and at the end of a file that enter its fingerprint


def normalised(image: Array) -> Tensor:
    """Convert pixels (H, W, 3) uint8 to network input (3, H, W) float32 with ImageNet's mean and deviation."""
    return _standardised(_in_unit_range(image))


def _in_unit_range(image: Array) -> Tensor:
    """(H, W, 3) uint8 → (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1).float().div_(255)


def _standardised(values: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (PIXEL_MEAN, PIXEL_DEVIATION))
    return ((values - mean) / deviation).contiguous()


# ------------------------------------------------------------------------------------------------ scenes


ON_OBJECTS = 0.5  # share of the loss on the positions of the objects if every position is classified


class SceneImages(Dataset[tuple[Tensor, Tensor]]):
    """Scenes as a data set.

    Args:
        scenes: sequence of scenes.
        fresh: use new scenes in every epoch.
        reduction: image pixels per position of the model's last map, for a model that classifies every position; the
            targets are then maps, see `dat_ref.scenes.position_targets`. None: the model classifies images.
        on_objects: total weight of the positions of the objects in a target map.

    >>> data = SceneImages(Scenes("which_all", "held_out", size=32))
    >>> image, target = data[3]
    >>> tuple(image.shape), tuple(target.shape)
    ((3, 32, 32), (8,))
    """

    def __init__(
        self, scenes: Scenes, fresh: bool = False, reduction: int | None = None, on_objects: float = ON_OBJECTS
    ) -> None:
        self.scenes, self.fresh, self.epoch = scenes, fresh, 0
        self.reduction, self.on_objects = reduction, on_objects
        self.classes, self.multi = scenes.classes, scenes.multi

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):  # ends a loop over the data set
            raise IndexError(f"index: expected 0 ≤ index < {len(self)}, got {index}")
        return self._item(index + self.fresh * self.epoch * len(self.scenes))

    def _item(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the item of a scene number; numbers count through all epochs."""
        scene = self.scenes.scene(index)
        if self.reduction is None:
            return normalised(scene.image), torch.as_tensor(scene.label)
        targets = position_targets(scene.label, len(self.classes), scene.masks, self.reduction, self.on_objects)
        return normalised(scene.image), torch.from_numpy(targets)


# ------------------------------------------------------------------------------------------------ folders


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Data set of a tree ROOT/CLASS/picture; the classes are the folders in the order of their names.

    Pictures are read by the rules of `dat_ref.pictures`. Symbolic links to folders and files are followed. Links
    without a target, links to a folder above, and files with other suffixes are left out with a warning.

    Args:
        root: folder with one folder for each class.
        size: side of the square crops, pixels.
        augment: random crops, mirroring, RandAugment and random erasing, for training; otherwise center crops.
        seed: random seed of the augmentation.
        classes: expected classes, e.g. the classes of the training data; None: the folders that are found.

    Raises:
        ConfigError: if the folder does not exist or has no folders, a class has no pictures, pictures cannot be read,
            or a class is not one of `classes`. The message counts the classes or pictures and names the first ones.
    """

    multi = False

    def __init__(
        self,
        root: Path | str,
        size: int = 224,
        augment: bool = False,
        seed: int = 0,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.root, self.size, self.augment, self.seed, self.epoch = Path(root), size, augment, seed, 0
        found = _image_paths(self.root)
        self.classes = tuple(sorted(found) if classes is None else classes)
        self._check_classes(found)
        self.samples = [(path, label) for label, name in enumerate(self.classes) for path in found.get(name, [])]
        self._digests = _check_files([path for path, _ in self.samples])
        self._transform = _augmentation() if augment else None

    def _check_classes(self, found: dict[str, list[Path]]) -> None:
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ConfigError(f"{self.root}: has {_list_some(unknown, 'class', 'classes')} that training has not")
        absent = [name for name in self.classes if name not in found]
        if absent:
            warnings.warn(f"{self.root}: has no picture of {_list_some(absent, 'class', 'classes')}", stacklevel=3)

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch."""
        self.epoch = epoch

    def fingerprint(self) -> dict[str, list[Any]]:
        """Return the number of pictures, a digest of their names, and a digest of their contents, for each class.

        The digest of the contents covers the size, the first and the last 4 KiB of each file. So a copy of the data set
        has the same fingerprint, and large data sets are not read as a whole.
        """
        members: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in self.classes}
        for (path, label), digest in zip(self.samples, self._digests, strict=True):
            name = self.classes[label]
            members[name].append((os.fsencode(path.relative_to(self.root / name).as_posix()), digest))
        return {
            name: [len(files), _digest(*(file for file, _ in files)).hex(), _digest(*(each for _, each in files)).hex()]
            for name, files in members.items()
        }

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.samples[index]
        try:
            pil_image = read_picture(path)
        except OSError as error:
            raise ConfigError(f"cannot read {printable(str(path))}: {error.strerror or error}") from error
        if self._transform is None:
            return normalised(_center_crop(pil_image, self.size)), torch.tensor(label)
        generator = np.random.default_rng([self.seed, self.epoch, index])
        image = _in_unit_range(_random_resized_crop(pil_image, self.size, generator))
        with torch.random.fork_rng(devices=[]):  # kornia draws from torch's own generator
            torch.manual_seed(int(generator.integers(1 << 62)))
            image = self._transform(image[None])[0].clamp(0, 1)
        return _standardised(image), torch.tensor(label)


def train_and_val(root: Path | str, size: int, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """Return the data sets of ROOT/train, with augmentation, and of ROOT/val, without.

    Raises:
        ConfigError: like `ImageFolder`, and if ``val`` has a class that ``train`` does not have.
    """
    train = ImageFolder(Path(root) / "train", size, augment=True, seed=seed)
    return train, ImageFolder(Path(root) / "val", size, classes=train.classes)


def build_datasets(config: TrainConfig) -> tuple[Any, Any]:
    """Return the training data set and the held-out data set of a run.

    A model that classifies every position is trained on all positions. It is evaluated on the positions off the objects
    only: these receive information about the objects through attention alone.
    """
    if config.data != "scenes":
        return train_and_val(config.data, config.image_size, config.seed)
    model = preset_of(config.model)
    reduction = None if model.global_pool else model.reductions[-1]
    common: dict[str, Any] = {"task": config.task, "size": config.image_size, "objects": config.objects}
    train = Scenes(split="train", seed=config.seed, length=config.scenes_per_epoch, copies=config.copies, **common)
    held_out = SceneImages(Scenes(split="held_out", **common), reduction=reduction, on_objects=0.0)
    return SceneImages(train, fresh=True, reduction=reduction), held_out


class _Found(NamedTuple):
    """Files of a class, and the paths that were left out."""

    pictures: list[Path]
    other: list[Path]  # files with other suffixes
    dangling: list[Path]  # symbolic links without a target
    loops: list[Path]  # symbolic links to a folder above


def _image_paths(root: Path) -> dict[str, list[Path]]:
    """Return the pictures of each class, sorted. Warn about what is left out.

    Raises:
        ConfigError: if there are no classes, or classes without pictures.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: expected a folder with a folder for each class, and there is none")
    entries = sorted(each for each in root.iterdir() if not each.name.startswith("."))
    folders = [each for each in entries if each.is_dir()]
    if not folders:
        raise ConfigError(f"{root}: expected a folder for each class, and it has no folders")
    found = {folder.name: _walk(folder) for folder in folders}
    empty = [name for name, files in found.items() if not files.pictures]
    if empty:
        raise ConfigError(
            f"{root}: no pictures in {_list_some(empty, 'class', 'classes')}; expected {', '.join(SUFFIXES)}"
        )
    other = [path for files in found.values() for path in files.other]
    dangling = [path for path in entries if _is_dangling(path)]
    dangling += [path for files in found.values() for path in files.dangling]
    loops = [path for files in found.values() for path in files.loops]
    loose = [path for path in entries if path.is_file() and path.suffix.lower() in SUFFIXES]
    for paths, one, many, rest in (
        (other, "file", "files", "with other endings"),
        (dangling, "symbolic link", "symbolic links", "without a target"),
        (loops, "symbolic link", "symbolic links", "to a folder above"),
        (loose, "picture", "pictures", "outside the folders of the classes"),
    ):
        if paths:
            names = [str(path.relative_to(root)) for path in paths]
            warnings.warn(f"{root}: left out {_list_some(names, one, many)} {rest}", stacklevel=4)
    return {name: files.pictures for name, files in found.items()}


def _walk(folder: Path) -> _Found:
    """Return the files in a folder and its subfolders, sorted. Follow symbolic links."""
    found = _Found([], [], [], [])

    def visit(current: Path, above: frozenset[str]) -> None:
        above |= {os.path.realpath(current)}
        for path in current.iterdir():
            if path.is_dir():
                if path.is_symlink() and os.path.realpath(path) in above:
                    found.loops.append(path)
                else:
                    visit(path, above)
            elif path.name.startswith("."):
                continue
            elif path.is_file():
                (found.pictures if path.suffix.lower() in SUFFIXES else found.other).append(path)
            elif _is_dangling(path):
                found.dangling.append(path)

    visit(folder, frozenset())
    return _Found(*(sorted(paths) for paths in found))


def _is_dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _check_files(paths: Sequence[Path]) -> list[bytes]:
    """Read the header of every picture; return a digest of each file.

    Raises:
        ConfigError: if some cannot be read. The message counts them and names the first ones.
    """
    if paths:
        import_pillow()  # a missing package is one error, not one for each picture
    with ThreadPoolExecutor(16) as pool:
        checked = list(pool.map(_check_file, paths))
    wrong = [f"{path} ({problem})" for path, (problem, _) in zip(paths, checked, strict=True) if problem]
    if wrong:
        raise ConfigError(f"cannot read {_list_some(wrong, 'picture', 'pictures')}")
    return [digest for _, digest in checked]


def _check_file(path: Path) -> tuple[str, bytes]:
    """Return the problem of a picture file, empty if there is none, and a digest of its size, start and end."""
    try:
        with path.open("rb") as file:
            head = file.read(FINGERPRINT_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - FINGERPRINT_BYTES, 0))
            tail = file.read(FINGERPRINT_BYTES)
            file.seek(0)
            return header_problem(file), _digest(str(size).encode(), head, tail)
    except OSError as error:
        return error.strerror or type(error).__name__, b""


def _digest(*parts: bytes) -> bytes:
    """Return a digest of a sequence of byte strings."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _list_some(names: Sequence[str], one: str, many: str) -> str:
    """Count names and list the first ones.

    >>> _list_some(["a", "b"], "class", "classes")
    '2 classes: a, b'
    """
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{len(names)} {one if len(names) == 1 else many}: {', '.join(map(printable, names[:MAX_LISTED]))}{rest}"


# ------------------------------------------------------------------------------------------------ pictures


def _center_crop(pil_image: Any, size: int) -> Array:
    """Return the center of a picture, a square of `CROP_FRACTION` of its shorter side, as (size, size, 3) uint8."""
    side = CROP_FRACTION * min(pil_image.size)
    left, top = ((length - side) / 2 for length in pil_image.size)
    return _resize_box(pil_image, (left, top, left + side, top + side), size)


def _random_resized_crop(pil_image: Any, size: int, generator: np.random.Generator) -> Array:
    """Return a crop of random area, aspect ratio and position, mirrored with probability 1/2: (size, size, 3) uint8."""
    width, height = pil_image.size
    area = generator.uniform(*CROP_AREA) * width * height
    ratio = np.exp(generator.uniform(*np.log(CROP_RATIO)))
    crop_width, crop_height = min(np.sqrt(area * ratio), width), min(np.sqrt(area / ratio), height)
    left, top = generator.uniform(0, width - crop_width), generator.uniform(0, height - crop_height)
    image = _resize_box(pil_image, (left, top, left + crop_width, top + crop_height), size)
    return np.ascontiguousarray(image[:, ::-1]) if generator.integers(2) else image


def _resize_box(pil_image: Any, box: tuple[float, float, float, float], size: int) -> Array:
    from PIL import Image

    return np.array(pil_image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _augmentation() -> Any:
    """Return kornia's RandAugment with the strength of the released recipe, followed by random erasing."""
    try:
        from kornia import augmentation as kornia
    except ImportError as error:
        raise ConfigError("kornia is needed to augment pictures: pip install 'dat-ref[train]'") from error
    return torch.nn.Sequential(kornia.auto.RandAugment(n=2, m=9), kornia.RandomErasing(p=0.25))


# ------------------------------------------------------------------------------------------------ worker processes


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise errors of data loading processes with a message of one line.

    Raises:
        ConfigError: for an item that cannot be read; without the traceback that torch puts into the message.
        ChildProcessError: if a data loading process was killed.
    """
    try:
        yield
    except ConfigError as error:
        message = str(error)
        if not message.startswith("Caught ConfigError in DataLoader worker"):
            raise
        raise ConfigError(message.rstrip().rpartition("ConfigError: ")[2]) from error
    except RuntimeError as error:
        message = str(error)
        if not message.startswith("DataLoader worker (pid"):
            raise
        first = " ".join(message.split()).partition(". ")[0].rstrip(".")
        raise ChildProcessError(f"{first}; if memory is short, lower --workers or --batch-size") from error
