"""Reader of picture files: one rule for `dat-ref explain`, for training and for evaluation.

| in the file                       | result                                                                      |
|-----------------------------------|-----------------------------------------------------------------------------|
| EXIF or XMP orientation           | the picture is upright; unreadable EXIF means no rotation, with a warning   |
| transparency                      | the picture on white                                                        |
| gray, palette, CMYK               | RGB                                                                         |
| gray, 16 bits                     | 0 is black, 65535 is white                                                  |
| gray, 32 bits: integers or floats | 0 is black; the largest value is white, or 1 if all are smaller             |
| NaN or infinity                   | an error                                                                    |
| several frames or pages           | the first one                                                               |
| more than `MAX_PIXELS` pixels     | an error, before any pixel is decoded                                       |

Values are rounded to 8 bits. Pillow is needed; it is imported on first use.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, BinaryIO

import numpy as np

from ._checks import ConfigError

MAX_PIXELS = 2**27  # 134 million: 0.5 GiB decoded

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSES = {  # EXIF orientation → member of PIL.Image.Transpose that makes the picture upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_picture(path: str | os.PathLike[str], scaled_above: int | None = None) -> Any:
    """Read a picture file upright, opaque and in color.

    Args:
        path: picture file in any format that Pillow reads.
        scaled_above: number of pixels above which both sides are divided by the smallest sufficient integer, before
            the conversion to RGB values; None: never.

    Returns:
        PIL image, mode RGB.

    Raises:
        ConfigError: if Pillow is missing, or the file is not a picture, is damaged, has values that are not finite or
            has more than `MAX_PIXELS` pixels.
        OSError: if the file cannot be opened.
    """
    image = import_pillow()
    with open(path, "rb") as file:
        try:
            with image.open(file) as opened:
                _check_size(opened.size)
                opened.load()
                turn = _TRANSPOSES.get(_orientation(opened, path))
                factor = 1 if scaled_above is None else math.ceil(math.sqrt(math.prod(opened.size) / scaled_above))
                picture = _in_color(opened, factor)
        except MemoryError:
            raise
        except image.DecompressionBombError as error:  # Pillow's own limit is larger
            raise ConfigError(f"cannot read {os.fspath(path)}: {_too_large('more')}") from error
        except Exception as error:  # a decoder fails on a damaged file with an exception of any kind
            unknown = type(error).__name__ == "UnidentifiedImageError"  # its text shows the file object
            reason = "it is not a picture in a known format" if unknown else str(error) or type(error).__name__
            raise ConfigError(f"cannot read {os.fspath(path)}: {reason}") from error
    if factor > 1:
        warnings.warn(
            f"{os.fspath(path)}: scaled down by {factor} to {picture.width} × {picture.height} pixels; positions in "
            "pixels refer to the smaller picture",
            stacklevel=2,
        )
    return picture if turn is None else picture.transpose(image.Transpose[turn])


def header_problem(file: BinaryIO) -> str:
    """Return the reason why a picture file cannot be read, as far as its header shows it; empty if there is none."""
    image = import_pillow()
    try:
        with image.open(file) as opened:
            _check_size(opened.size)
    except ConfigError as error:
        return str(error)
    except image.DecompressionBombError:
        return _too_large("more")
    except Exception as error:
        return "it is empty" if file.seek(0, os.SEEK_END) == 0 else type(error).__name__
    return ""


def import_pillow() -> Any:
    """Return Pillow's module ``PIL.Image``. Ignore its warning of large pictures: `MAX_PIXELS` is the limit here.

    Raises:
        ConfigError: if Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("pillow is needed to read pictures: pip install 'dat-ref[viz]'") from error
    # Not `warnings.catch_warnings`: it makes Python forget which warnings it has shown already.
    if not any(category is Image.DecompressionBombWarning for _, _, category, *_ in warnings.filters):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return Image


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ConfigError("it is empty")
    if width * height > MAX_PIXELS:
        raise ConfigError(_too_large(f"{width} × {height}"))


def _too_large(pixels: str) -> str:
    return f"it is too large: expected at most {MAX_PIXELS} pixels, got {pixels}; make a smaller copy"


def _orientation(opened: Any, path: str | os.PathLike[str]) -> int:
    """Return the EXIF orientation of a loaded picture; 1, upright, with a warning, if it cannot be read."""
    try:
        exif = opened.getexif()
        if "exif" in opened.info:  # again: errors of the first reading, while a JPEG file is opened, are lost
            exif = import_pillow().Exif()
            exif.load(opened.info["exif"])
        value = exif.get(_ORIENTATION, opened.getexif().get(_ORIENTATION, 1))  # the second one may be from XMP
        if isinstance(value, int):
            return int(value)
        reason = f"orientation: expected an integer, got {value!r:.40}"
    except Exception as error:  # EXIF of wrong types fails inside Pillow with an exception of any kind
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"{os.fspath(path)}: not rotated, its EXIF data cannot be read ({reason})", stacklevel=3)
    return 1


def _in_color(picture: Any, factor: int) -> Any:
    """Return a picture in mode RGB, on white, both sides divided by an integer factor."""
    image = import_pillow()
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _from_values(picture, factor)
    if picture.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in picture.info:
        opaque = picture.convert("RGB")
        return opaque if factor == 1 else opaque.reduce(factor)
    layered = picture.convert("RGBA")
    layered = layered if factor == 1 else layered.reduce(factor)
    return image.alpha_composite(image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def _from_values(picture: Any, factor: int) -> Any:
    """Return a gray picture of 16 or 32 bits in mode RGB. Pillow's own conversion would clip the values."""
    # Pillow opens 16-bit files of these formats in a 32-bit mode.
    has_16_bits = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if factor > 1:
        picture = (picture if picture.mode == "F" else picture.convert("I")).reduce(factor)
    values = np.asarray(picture, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ConfigError("it has values that are not finite (NaN or infinity)")
    white = 65535.0 if has_16_bits else max(float(values.max()), 1.0)
    bytes_ = np.rint(np.clip(values * np.float32(255 / white), 0, 255)).astype(np.uint8)
    return import_pillow().fromarray(bytes_).convert("RGB")
