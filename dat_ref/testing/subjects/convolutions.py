"""Deformable convolutions as cases, and the tests of their gradients and identities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ...ops.grid import Size
from ...peers.deform_conv import Sliding
from ..strategies import numbers, seeds
from ..subject import Case, Mismatch, Setting
from ..trial import Trial

# What offsets are drawn from, in pixels.
NONE, WHOLE, QUARTERS = (0.0,), (0.0, 1.0, -1.0), (0.25, -0.25, 0.5, 0.75, -0.75, 1.25)
FAR = (-9.0, 9.0, 0.0, 1e5)
ANYWHERE = (0.0, 0.25, -0.5, 1.0, -1.75, 2.0**-30, 3.0, -4.5, 9.0)


def convolution(
    size: Size,
    kernel: Size,
    *,
    images: int = 1,
    inputs: int = 1,
    outputs: int = 1,
    groups: int = 1,
    offset_groups: int = 1,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    offsets: Sequence[float] = NONE,
    masked: bool = False,
    biased: bool = False,
    empty_rim: bool = False,
    diagonal: bool = False,
    seed: int = 0,
    name: str = "",
) -> Case:
    """Return a case.

    Args:
        offsets: what the offsets are chosen from.
        empty_rim: whether the outermost pixels are zero, so that it does not matter what lies beyond them.
        diagonal: whether dy = dx.
        seed: of the numbers; the map's pixels are 1, 2, 3 … for 0.
    """
    sliding = Sliding(kernel, stride, padding, dilation)
    output_size = sliding.output_size(size)
    rng = np.random.default_rng(seed)
    x = numbers(seed, images, inputs, *size)
    if empty_rim:
        x[:, :, [0, -1]] = 0
        x[:, :, :, [0, -1]] = 0
    points = offset_groups * kernel[0] * kernel[1]
    offset = rng.choice(offsets, (images, points, 2, *output_size))
    if diagonal:
        offset[:, :, 1] = offset[:, :, 0]
    return Case(
        {
            "x": x,
            "offset": offset.reshape(images, 2 * points, *output_size),
            "weight": numbers(seed, outputs, inputs // groups, *kernel),
            "bias": numbers(seed, outputs) if biased else None,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            # Away from zero, so that a mask that is forgotten in a gradient can be divided out.
            "mask": rng.integers(1, 9, (images, points, *output_size)) / 4 if masked else None,
        },
        name,
    )


def drawn(sizes: st.SearchStrategy[Size], kernels: Sequence[Size], **options: Any) -> Callable[[Setting], Any]:
    """Return a strategy for a check; an option may be a strategy."""
    each = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in options.items()}
    built = st.builds(convolution, sizes, st.sampled_from(kernels), seed=seeds, **each)
    return lambda setting: built


# ------------------------------------------------------------------------------------------------ tests


def gradient_of(*names: str, one_sided: bool = False) -> Callable[[Trial, Case], None]:
    """Return the test of some gradients; the cotangent numbers the results."""

    def test(trial: Trial, case: Case) -> None:
        cotangent = numbers(0, *trial.expected(case).shape)
        for name in names:
            trial.compare_gradient(name, cotangent, case, one_sided=one_sided)

    return test


def mask_of_ones(trial: Trial, case: Case) -> None:
    """A mask of ones changes nothing."""
    offset = case.arguments["offset"]
    ones = np.ones((len(offset), offset.shape[1] // 2, *offset.shape[2:]))
    masked = Case({**case.arguments, "mask": ones})
    trial.agree(trial.got(masked), trial.got(case), case=masked)


def moved_as_one(trial: Trial, case: Case) -> None:
    """The same whole offset everywhere is the convolution of the moved map."""
    x, offset = case.arguments["x"], case.arguments["offset"]
    moved = np.zeros_like(x)
    moved[:, :, :-1, :-2] = x[:, :, 1:, 2:]
    everywhere = offset.reshape(len(offset), offset.shape[1] // 2, 2, *offset.shape[2:]).copy()
    everywhere[:, :, 0], everywhere[:, :, 1] = 1, 2
    by_offset = case.with_arrays({"offset": everywhere.reshape(offset.shape)})
    by_map = case.with_arrays({"x": moved, "offset": np.zeros_like(offset)})
    trial.agree(trial.got(by_offset), trial.got(by_map), case=by_offset)


def flips(trial: Trial, case: Case) -> None:
    """A mirrored map, kernel and offset give a mirrored result."""
    weight, offset, mask = (case.arguments[name] for name in ("weight", "offset", "mask"))
    kernel = weight.shape[2:]
    for axis in range(2):
        by_tap = offset.reshape(len(offset), -1, *kernel, 2, *offset.shape[2:])
        sign = np.where(np.arange(2) == axis, -1.0, 1.0)[:, None, None]
        mirrored = np.flip(by_tap, (2 + axis, 5 + axis)) * sign
        taps = mask.reshape(len(mask), -1, *kernel, *mask.shape[2:])
        flipped = case.with_arrays(
            {
                "x": np.flip(case.arguments["x"], 2 + axis).copy(),
                "weight": np.flip(weight, 2 + axis).copy(),
                "offset": mirrored.reshape(offset.shape),
                "mask": np.flip(taps, (2 + axis, 4 + axis)).reshape(mask.shape),
            }
        )
        trial.agree(trial.got(flipped), np.flip(trial.got(case), 2 + axis), case=flipped)


def nan_comes_out(trial: Trial, case: Case) -> None:
    for channel in range(2):
        offset = case.arguments["offset"].copy()
        offset[0, channel, 1, 1] = np.nan
        unknown = case.with_arrays({"offset": offset})
        got = trial.got(unknown)
        expected = np.zeros(got.shape, dtype=bool)
        expected[0, :, 1, 1] = True
        if not (np.isnan(got) == expected).all():
            raise Mismatch("NaN must come out where an offset is NaN, and nowhere else", None, got, unknown)
