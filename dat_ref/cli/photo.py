"""From a photograph on disk to what a backbone is fed."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .._checks import Array, ConfigError
from ..data import PIXEL_DEVIATION, PIXEL_MEAN, photograph_path
from ..pictures import read_picture
from ..presets import PRESETS
from .weights import add_prefix_option

DEFAULT_MODEL = "dat_tiny"
MULTIPLE = 32  # the last stage has one pixel for 32 × 32 of the image
SCALED_ABOVE = 16_000_000  # pixels of a photograph


def load_photo(path: Path | None) -> Array:
    """Read a photograph by the rules of `dat_ref.pictures`: upright, on white, in color.

    A photograph of more than `SCALED_ABOVE` pixels is scaled down, with a warning.

    Args:
        path: image file in any format that Pillow reads; None: the default photograph of the package.

    Returns:
        (H, W, 3) in [0, 1].

    Raises:
        ConfigError: if the file does not exist, is not a picture, or is too large.
    """
    file = photograph_path() if path is None else path
    if not file.is_file():
        raise ConfigError(f"PHOTO: expected an image file, and there is none at {file}")
    try:
        picture = read_picture(file, scaled_above=SCALED_ABOVE)
    except ConfigError as error:
        raise ConfigError(f"PHOTO: {error}") from error
    values = np.array(picture, dtype=np.float64)
    values /= 255
    return values


def input_size(photo_size: tuple[int, int], target: tuple[int, int] | int) -> tuple[int, int]:
    """Return the input size of an image: (H, W) exactly, or a short side and the aspect ratio of the photograph.

    Sides are rounded to multiples of 32; a long side is never more than three short ones.

    >>> input_size((300, 451), 224)
    (224, 352)
    """
    if not isinstance(target, int):
        return target
    short, long = sorted(photo_size)
    long_side = round(min(long / short, 3.0) * target / MULTIPLE) * MULTIPLE
    short_side = max(round(target / MULTIPLE), 1) * MULTIPLE
    return (short_side, long_side) if photo_size[0] <= photo_size[1] else (long_side, short_side)


def resize(photo: Array, size: tuple[int, int]) -> Array:
    """Return a photograph (H, W, 3) in [0, 1] at another size, bicubic with the area taken into account."""
    from PIL import Image

    picture = Image.fromarray(np.round(photo * 255).astype(np.uint8))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float64) / 255


def normalise(photo: Array) -> Array:
    """Return a photograph (H, W, 3) in [0, 1] as a backbone takes it: (1, 3, H, W), float32, ImageNet's statistics."""
    standardized = (photo - PIXEL_MEAN) / PIXEL_DEVIATION
    return np.ascontiguousarray(standardized.transpose(2, 0, 1)[None], dtype=np.float32)


def prepare(photo: Array, target: tuple[int, int] | int) -> Array:
    """Return a photograph as a backbone takes it, at the size of `input_size`."""
    return normalise(resize(photo, input_size(photo.shape[:2], target)))


def parse_size(text: str) -> tuple[int, int] | int:
    """Parse ``224`` (the short side) or ``224x352`` (height and width)."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a short side such as 224 or height x width such as 224x352, got {text!r}"
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def parse_seed(text: str) -> int:
    """Parse a seed, a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def add_photo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command that runs a model on a photograph takes."""
    parser.add_argument("photo", nargs="?", type=Path, metavar="PHOTO", help="image file (default: one that ships)")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        choices=PRESETS,
        metavar="NAME",
        help=f"model name, such as dat_tiny or dat_pp_tiny (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights (default: random, untrained ones)")
    add_prefix_option(parser, "--checkpoint")
    parser.add_argument(
        "--size",
        type=parse_size,
        default=224,
        metavar="S",
        help="input size in pixels: the short side, or HxW (default: 224)",
    )
    parser.add_argument(
        "--seed", type=parse_seed, default=0, metavar="N", help="random seed of untrained weights (default: 0)"
    )
