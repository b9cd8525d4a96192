"""A scene from its number: the same for whoever asks, in whatever order, in whatever process.

    generator = (seed, split, number)  →  background, objects, label
    pixel     = (1 - α) · background + α · colour · shade,      α = the object's share in the pixel

Kinds differ in shape alone: size, place, turn and colour are drawn in the same way for all, so colour tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .._checks import Array, ConfigError
from .backgrounds import background
from .shapes import KINDS, depth

SPLITS = ("train", "held_out")
TASKS = {
    "which": "the kind of the one object",
    "which_all": "the kinds of one to four objects, no two alike",
    "where": "the cell of a 4 × 4 grid with the middle of the one object",
    "count": "how many objects there are, none to four",
}
LENGTHS = {"train": 16384, "held_out": 2048}
GRID = 4  # cells along each side, of "where"
MOST = 4  # objects on a scene
SEVERAL = ("which_all", "count")  # the tasks whose scenes can have more than one
RADIUS = (0.09, 0.17)  # of an object, in sides of the image
CONTRAST = 0.25  # of an object's colour to what it covers, at least, in mean absolute difference


class Placed(NamedTuple):
    """An object on a scene."""

    kind: str
    center: tuple[float, float]  # (y, x) in pixels; the middle of pixel i is at i
    radius: float  # pixels
    turn: float  # radians, clockwise


class Scene(NamedTuple):
    """An image, what is asked about it, and what is on it."""

    image: Array  # (H, W, 3) uint8
    label: int | Array  # a class, or for "which_all" float32 (classes,) of zeros and ones
    objects: tuple[Placed, ...]
    masks: Array  # bool (objects, H, W): the pixels that are at least half the object's


class Scenes:
    """Scenes for one task, by number.

    Args:
        task: one of `TASKS`.
        split: ``"train"`` or ``"held_out"``, which have no scene and no part of a photograph in common.
        size: side of the images in pixels, 16 or more.
        seed: other scenes with another one.
        length: how many there are; 16384 to train on, 2048 held out, if None.
        radius: of the objects, in sides of the image: the least and the largest. Where several objects must find room
            no larger than `RADIUS` has it.

    Raises:
        ConfigError: for an unknown task or split, or a size, length or radius that cannot be.

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
        radius: tuple[float, float] = RADIUS,
    ) -> None:
        if task not in TASKS:
            raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        if split not in SPLITS:
            raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if size < 16:
            raise ConfigError(f"size: expected 16 pixels or more, got {size}")
        self.task, self.split, self.size, self.seed = task, split, size, seed
        self.length = LENGTHS[split] if length is None else length
        if self.length < 0 or seed < 0:
            raise ConfigError(f"length, seed: expected no negative numbers, got {self.length} and {seed}")
        most = RADIUS[1] if task in SEVERAL else 0.4
        if not 0 < radius[0] <= radius[1] <= most:
            raise ConfigError(f"radius: expected 0 < least ≤ largest ≤ {most} for task {task!r}, got {radius}")
        self.radius = radius

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the answers."""
        if self.task == "where":
            return tuple(f"row {row}, column {column}" for row in range(GRID) for column in range(GRID))
        return tuple(map(str, range(MOST + 1))) if self.task == "count" else KINDS

    @property
    def multi(self) -> bool:
        """Whether several answers can be right at once."""
        return self.task == "which_all"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Scene:
        if not 0 <= number < self.length:  # so that a loop over all of them ends
            raise IndexError(f"number: expected 0 ≤ number < {self.length}, got {number}")
        return self.scene(number)

    def __iter__(self) -> Iterator[Scene]:
        return map(self.scene, range(self.length))

    def scene(self, number: int) -> Scene:
        """Return a scene, also one beyond `length`: there is no end to them."""
        generator = np.random.default_rng([self.seed, SPLITS.index(self.split), number])
        canvas = background(generator, self.split, self.size)
        objects = self._place(generator)
        masks = np.zeros((len(objects), self.size, self.size), bool)
        for placed, mask in zip(objects, masks):
            _paint(canvas, mask, placed, generator)
        image = np.round(255 * canvas).astype(np.uint8)
        return Scene(image, self._label(objects), objects, masks)

    def _place(self, generator: np.random.Generator) -> tuple[Placed, ...]:
        """Draw objects that do not touch each other and are wholly on the image."""
        number = {"which_all": generator.integers(1, MOST + 1), "count": generator.integers(MOST + 1)}.get(self.task, 1)
        kinds = generator.permutation(KINDS)[:number]
        placed: list[Placed] = []
        while len(placed) < number:
            radius = generator.uniform(*self.radius) * self.size
            y, x = generator.uniform(radius, self.size - 1 - radius, size=2)
            if all(np.hypot(y - each.center[0], x - each.center[1]) > 1.1 * (radius + each.radius) for each in placed):
                turn = generator.uniform(-np.pi, np.pi)
                placed.append(Placed(str(kinds[len(placed)]), (float(y), float(x)), float(radius), float(turn)))
        return tuple(placed)

    def _label(self, objects: tuple[Placed, ...]) -> int | Array:
        if self.task == "which_all":
            return np.isin(KINDS, [each.kind for each in objects]).astype(np.float32)
        if self.task == "count":
            return len(objects)
        if self.task == "which":
            return KINDS.index(objects[0].kind)
        row, column = (min(int((place + 0.5) * GRID / self.size), GRID - 1) for place in objects[0].center)
        return row * GRID + column


# ------------------------------------------------------------------------------------------------ painting


def _paint(canvas: Array, mask: Array, placed: Placed, generator: np.random.Generator) -> None:
    """Paint an object on (H, W, 3) in [0, 1], and set its mask (H, W)."""
    (y, x), reach = placed.center, 1.1 * placed.radius + 1
    top, left = max(int(y - reach), 0), max(int(x - reach), 0)
    rows, columns = np.ogrid[top : min(int(y + reach) + 2, len(canvas)), left : min(int(x + reach) + 2, len(canvas))]
    along, down = (columns - x) / placed.radius, (rows - y) / placed.radius
    cosine, sine = np.cos(placed.turn), np.sin(placed.turn)
    inside = depth(placed.kind, cosine * along + sine * down, cosine * down - sine * along)
    share = np.clip(inside * placed.radius + 0.5, 0, 1)[..., None]  # in each pixel
    part = canvas[top : top + share.shape[0], left : left + share.shape[1]]
    colour = _colour(part[share[..., 0] > 0].mean(0), generator)
    # Light from one side, and grain.
    light = generator.uniform(-np.pi, np.pi)
    shade = 1 + 0.18 * (np.cos(light) * along + np.sin(light) * down)[..., None]
    grain = generator.normal(0, 0.03, part.shape)
    part[:] = (1 - share) * part + share * np.clip(colour * shade + grain, 0, 1)
    mask[top : top + share.shape[0], left : left + share.shape[1]] = share[..., 0] >= 0.5


def _colour(covered: Array, generator: np.random.Generator) -> Array:
    """Draw a colour that stands out from the mean of what it covers."""
    while True:
        colour: Array = generator.uniform(0.05, 0.95, size=3)
        if np.abs(colour - covered).mean() > CONTRAST:
            return colour
