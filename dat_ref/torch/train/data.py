"""What a network is trained on: scenes, or a tree of image folders.

A data set has a length, an item for each number, the names of its ``classes``, whether it is ``multi`` (several can be
right at once), and ``set_epoch``. Items are (image (3, H, W) float32, normalised; target), the target a class, int64,
or float32 (classes,) of zeros and ones. What chance decides about an item follows from (seed, epoch, number) alone: the
order in which items are asked for, workers, and a run that was stopped and goes on change nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..._checks import Array, ConfigError
from ...data import PIXEL_DEVIATION, PIXEL_MEAN
from ...scenes import Scenes, position_targets
from ...train_config import TrainConfig
from ..models import preset_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_LISTED = 8  # files or classes that a message names; of the rest it says how many
CROP_FRACTION = 0.875  # share of the shorter side that is looked at when nothing is drawn by chance
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the crops to train on


def normalised(image: Array) -> Tensor:
    """Turn pixels (H, W, 3) uint8 into what networks take: (3, H, W) float32 with ImageNet's mean and deviation."""
    return _standardised(_in_unit_range(image))


def _in_unit_range(image: Array) -> Tensor:
    """(H, W, 3) uint8 → (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1).float().div_(255)


def _standardised(values: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (PIXEL_MEAN, PIXEL_DEVIATION))
    return ((values - mean) / deviation).contiguous()


# ------------------------------------------------------------------------------------------------ scenes


ON_OBJECTS = 0.5  # share of the loss on the positions of the objects, where every position is classified


class SceneImages(Dataset[tuple[Tensor, Tensor]]):
    """Scenes as a data set.

    Args:
        scenes: which ones.
        fresh: whether every epoch has scenes of its own.
        reduction: image pixels per position of the model's last map, if it classifies every position; the targets are
            then those of `dat_ref.scenes.position_targets`. None for a model that classifies images.
        on_objects: weight of the positions of the objects in such a target.

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
        """Say which epoch comes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):  # so that a loop over all of them ends
            raise IndexError(f"index: expected 0 ≤ index < {len(self)}, got {index}")
        return self._item(index + self.fresh * self.epoch * len(self.scenes))

    def _item(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the scene of a number that counts through all epochs."""
        scene = self.scenes.scene(index)
        if self.reduction is None:
            return normalised(scene.image), torch.as_tensor(scene.label)
        targets = position_targets(scene.label, len(self.classes), scene.masks, self.reduction, self.on_objects)
        return normalised(scene.image), torch.from_numpy(targets)


# ------------------------------------------------------------------------------------------------ folders


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """A tree ROOT/CLASS/picture: classes are the folders, in the order of their names.

    Args:
        root: the folder with a folder for each class.
        size: side of the squares that are cut out, pixels.
        augment: whether to cut, mirror and alter them by chance, for training.
        seed: of chance.
        classes: that there must be, as those of the data trained on; those that are found if None.

    Raises:
        ConfigError: for a folder that is absent or empty, classes without pictures, pictures that cannot be read, and
            classes that are not among those that there must be. They are counted, and the first of them named.
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
        _check_readable([path for path, _ in self.samples])
        self._transform = _augmentation() if augment else None

    def _check_classes(self, found: dict[str, list[Path]]) -> None:
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ConfigError(f"{self.root}: has {_list_some(unknown, 'class', 'classes')} that training has not")
        absent = [name for name in self.classes if name not in found]
        if absent:
            warnings.warn(f"{self.root}: has no picture of {_list_some(absent, 'class', 'classes')}", stacklevel=3)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.samples[index]
        try:
            pil_image = _read(path)
        except (OSError, SyntaxError, ValueError) as error:  # after its first bytes
            raise ConfigError(f"{path}: cannot be read to its end: {error}") from error
        if self._transform is None:
            return normalised(_center_crop(pil_image, self.size)), torch.tensor(label)
        generator = np.random.default_rng([self.seed, self.epoch, index])
        image = _in_unit_range(_random_resized_crop(pil_image, self.size, generator))
        with torch.random.fork_rng(devices=[]):  # kornia draws from torch's own generator
            torch.manual_seed(int(generator.integers(1 << 62)))
            image = self._transform(image[None])[0].clamp(0, 1)
        return _standardised(image), torch.tensor(label)


def train_and_val(root: Path | str, size: int, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """Return the data sets of ROOT/train, altered by chance, and of ROOT/val, as it is.

    Raises:
        ConfigError: as `ImageFolder`, and if ``val`` has a class that ``train`` has not.
    """
    train = ImageFolder(Path(root) / "train", size, augment=True, seed=seed)
    return train, ImageFolder(Path(root) / "val", size, classes=train.classes)


def build_datasets(config: TrainConfig) -> tuple[Any, Any]:
    """Return the training and the held-out data set of a run.

    A model that classifies every position learns from all of them. Held out, only the positions off the objects count,
    which know what is on the scene through attention alone.
    """
    if config.data != "scenes":
        return train_and_val(config.data, config.image_size, config.seed)
    model = preset_of(config.model)
    reduction = None if model.global_pool else model.reductions[-1]
    common: dict[str, Any] = {"task": config.task, "size": config.image_size, "objects": config.objects}
    train = Scenes(split="train", seed=config.seed, length=config.scenes_per_epoch, copies=config.copies, **common)
    held_out = SceneImages(Scenes(split="held_out", **common), reduction=reduction, on_objects=0.0)
    return SceneImages(train, fresh=True, reduction=reduction), held_out


def _image_paths(root: Path) -> dict[str, list[Path]]:
    """Return the pictures of each class; complain of what is no picture, and of classes without any."""
    if not root.is_dir():
        raise ConfigError(f"{root}: expected a folder with a folder for each class, and there is none")
    folders = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not folders:
        raise ConfigError(f"{root}: expected a folder for each class, and it has no folders")
    found: dict[str, list[Path]] = {}
    skipped: list[str] = []
    for folder in folders:
        files = sorted(each for each in folder.rglob("*") if each.is_file() and not each.name.startswith("."))
        found[folder.name] = [each for each in files if each.suffix.lower() in SUFFIXES]
        skipped += [str(each.relative_to(root)) for each in files if each.suffix.lower() not in SUFFIXES]
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise ConfigError(
            f"{root}: no pictures in {_list_some(empty, 'class', 'classes')}; expected {', '.join(SUFFIXES)}"
        )
    if skipped:
        warnings.warn(f"{root}: left out {_list_some(skipped, 'file', 'files')} with other endings", stacklevel=4)
    return found


def _check_readable(paths: Iterable[Path]) -> None:
    """Read the first bytes of every picture, and complain of all that are none."""
    with ThreadPoolExecutor(16) as pool:
        wrong = [f"{path} ({reason})" for path, reason in pool.map(_read_error, paths) if reason]
    if wrong:
        raise ConfigError(f"cannot read {_list_some(wrong, 'picture', 'pictures')}")


def _read_error(path: Path) -> tuple[Path, str]:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return path, "" if min(opened.size) > 0 else "it is empty"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return path, "it is empty" if path.stat().st_size == 0 else type(error).__name__


def _list_some(names: Sequence[str], one: str, many: str) -> str:
    """Name some and count all.

    >>> _list_some(["a", "b"], "class", "classes")
    '2 classes: a, b'
    """
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{len(names)} {one if len(names) == 1 else many}: {', '.join(names[:MAX_LISTED])}{rest}"


# ------------------------------------------------------------------------------------------------ pictures


def _read(path: Path) -> Any:
    """Return a picture as a person sees it: upright and in colour."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def _center_crop(pil_image: Any, size: int) -> Array:
    """Return the middle of a picture, WHOLE of its shorter side, as (size, size, 3) uint8."""
    side = CROP_FRACTION * min(pil_image.size)
    left, top = ((length - side) / 2 for length in pil_image.size)
    return _resize_box(pil_image, (left, top, left + side, top + side), size)


def _random_resized_crop(pil_image: Any, size: int, generator: np.random.Generator) -> Array:
    """Return a part of a picture of random area, shape and place, mirrored half of the time: (size, size, 3) uint8."""
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
    """Return kornia's RandAugment with the strength of the released recipe, and random erasing."""
    try:
        from kornia import augmentation as kornia
    except ImportError as error:
        raise ConfigError("kornia is needed to alter pictures: pip install 'dat-ref[train]'") from error
    return torch.nn.Sequential(kornia.auto.RandAugment(n=2, m=9), kornia.RandomErasing(p=0.25))
