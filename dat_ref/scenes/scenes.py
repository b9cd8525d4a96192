"""Scenes: photographs with objects placed on them. A scene is determined by its number alone.

    generator = (seed, split, number)  →  background, objects, label
    pixel     = (1 - α) · background + α · colour,      α = the object's share of the pixel

The same number gives the same scene in any order, in any process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .._checks import Array, ConfigError
from .backgrounds import background
from .objects import OBJECTS, Placed, paint

SPLITS = ("train", "held_out")
TASKS = {
    "which": "the kind of the one object",
    "which_all": "the kinds of one to four objects, no two alike",
    "where": "the cell of a 4 × 4 grid that contains the center of the one object",
    "count": "the number of objects, none to four",
    "find": "the kind of the objects, all of one kind, or nothing",
    "find_all": "the kinds of none to six objects, no two alike; nothing is a class of its own",
}
LENGTHS = {"train": 16384, "held_out": 2048}
GRID = 4  # cells along each side, for "where"
MOST = {"which_all": 4, "count": 4, "find_all": 6}  # objects on a scene; one for the other tasks
RADIUS_OF_MANY = 0.17  # largest radius, in sides of the image, at which several objects find room
NOTHING = "nothing"  # class of a scene without objects


class Scene(NamedTuple):
    """An image, its label, and the objects on it."""

    image: Array  # (H, W, 3) uint8
    label: int | Array  # class index, or float32 (classes,) of zeros and ones where several classes can be right
    objects: tuple[Placed, ...]
    masks: Array  # bool (objects, H, W): the pixels of which the object covers at least half


class Scenes:
    """Scenes for one task, by number.

    Args:
        task: one of `TASKS`.
        split: ``"train"`` or ``"held_out"``; they share no scene and no part of a photograph.
        size: side of the images in pixels, at least 16.
        seed: selects another set of scenes.
        length: number of scenes; 16384 for training, 2048 held out, if None.
        radius: smallest and largest radius of the objects, in sides of the image; the default of `objects` if None.
        objects: one of `OBJECTS`: ``"shapes"`` (flat, of any colour), ``"discs"`` (of six colours) or ``"pictures"``.
        copies: for ``"find"``, the largest number of objects on a scene, all of one kind.

    Raises:
        ConfigError: for an unknown task, split or set of objects, or a size, length or radius out of range.

    >>> scenes = Scenes("which", "held_out", size=64)
    >>> scene = scenes[7]
    >>> scene.image.shape, scene.masks.shape, scenes.classes[scene.label] == scene.objects[0].kind
    ((64, 64, 3), (1, 64, 64), True)
    """

    def __init__(
        self,
        task: str = "which",
        split: str = "train",
        size: int = 96,
        seed: int = 0,
        length: int | None = None,
        radius: tuple[float, float] | None = None,
        objects: str = "shapes",
        copies: int = 1,
    ) -> None:
        for name, value, known in (
            ("task", task, TASKS),
            ("split", split, SPLITS),
            ("objects", objects, OBJECTS),
        ):
            if value not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if size < 16:
            raise ConfigError(f"size: expected 16 pixels or more, got {size}")
        self.task, self.split, self.size, self.seed, self.objects = task, split, size, seed, objects
        self.kinds = OBJECTS[objects].kinds
        self.length = LENGTHS[split] if length is None else length
        if self.length < 0 or seed < 0:
            raise ConfigError(f"length, seed: expected no negative numbers, got {self.length} and {seed}")
        self.radius = OBJECTS[objects].radius if radius is None else radius
        if copies < 1 or (copies > 1 and task != "find") or copies > max(MOST.values()):
            raise ConfigError(f"copies: expected 1, or up to {max(MOST.values())} with task 'find', got {copies}")
        self.copies = copies
        largest = RADIUS_OF_MANY if task in MOST or copies > 1 else 0.4
        if not 0 < self.radius[0] <= self.radius[1] <= largest:
            raise ConfigError(f"radius: expected 0 < smallest ≤ largest ≤ {largest} for task {task!r}, got {radius}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        if self.task == "where":
            return tuple(f"row {row}, column {column}" for row in range(GRID) for column in range(GRID))
        if self.task == "count":
            return tuple(map(str, range(MOST["count"] + 1)))
        return (*self.kinds, NOTHING) if self.task.startswith("find") else self.kinds

    @property
    def multi(self) -> bool:
        """True if several classes can be correct at once."""
        return self.task.endswith("_all")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Scene:
        if not 0 <= number < self.length:  # ends a loop over all of them
            raise IndexError(f"number: expected 0 ≤ number < {self.length}, got {number}")
        return self.scene(number)

    def __iter__(self) -> Iterator[Scene]:
        return map(self.scene, range(self.length))

    def scene(self, number: int) -> Scene:
        """Return a scene; numbers beyond `length` give further scenes without end."""
        generator = np.random.default_rng([self.seed, SPLITS.index(self.split), number])
        canvas = background(generator, self.split, self.size)
        placed = self._place(generator)
        masks = np.zeros((len(placed), self.size, self.size), bool)
        for each, mask in zip(placed, masks):
            paint(canvas, mask, each, self.objects, generator)
        image = np.round(255 * canvas).astype(np.uint8)
        return Scene(image, self._label(placed), placed, masks)

    def _place(self, generator: np.random.Generator) -> tuple[Placed, ...]:
        """Draw objects that do not touch each other and lie wholly on the image."""
        count = self._count(generator)
        kinds = generator.permutation(self.kinds)
        if self.task == "find":
            kinds = kinds[:1].repeat(count)
        placed: list[Placed] = []
        while len(placed) < count:
            radius = generator.uniform(*self.radius) * self.size
            y, x = generator.uniform(radius, self.size - 1 - radius, size=2)
            if all(np.hypot(y - each.center[0], x - each.center[1]) > 1.1 * (radius + each.radius) for each in placed):
                turn = generator.uniform(-np.pi, np.pi)
                placed.append(Placed(str(kinds[len(placed)]), (float(y), float(x)), float(radius), float(turn)))
        return tuple(placed)

    def _count(self, generator: np.random.Generator) -> int:
        """Draw the number of objects; nothing is as frequent as each kind."""
        if self.task == "which_all":
            return int(generator.integers(1, MOST[self.task] + 1))
        if self.task in MOST:
            return int(generator.integers(MOST[self.task] + 1))
        if self.task == "find":
            return int(generator.integers(len(self.kinds) + 1) > 0) * int(generator.integers(1, self.copies + 1))
        return 1

    def _label(self, placed: Sequence[Placed]) -> int | Array:
        kinds = [each.kind for each in placed] or [NOTHING]
        if self.multi:
            return np.isin(self.classes, kinds).astype(np.float32)
        if self.task == "count":
            return len(placed)
        if self.task in ("which", "find"):
            return self.classes.index(kinds[0])
        row, column = (min(int((at + 0.5) * GRID / self.size), GRID - 1) for at in placed[0].center)
        return row * GRID + column
