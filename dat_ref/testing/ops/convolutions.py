"""Cases of deformable convolution, and tests of its gradients and identities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ...ops.grid import Size
from ...peers.deform_conv import ConvGeometry
from ..context import CheckContext
from ..op_spec import Case, Mismatch, Setting
from ..strategies import integers, seeds

# Values from which offsets are drawn, in pixels.
NO_OFFSET, WHOLE_PIXELS, QUARTERS = (0.0,), (0.0, 1.0, -1.0), (0.25, -0.25, 0.5, 0.75, -0.75, 1.25)
FAR_OUTSIDE = (-9.0, 9.0, 0.0, 1e5)
ANYWHERE = (0.0, 0.25, -0.5, 1.0, -1.75, 2.0**-30, 3.0, -4.5, 9.0)


def conv_case(
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
    offsets: Sequence[float] = NO_OFFSET,
    with_mask: bool = False,
    with_bias: bool = False,
    zero_border: bool = False,
    diagonal: bool = False,
    seed: int = 0,
    name: str = "",
) -> Case:
    """Return a case.

    Args:
        size: (H, W).
        kernel: (k_y, k_x).
        images, inputs, outputs, groups, offset_groups: N, C, O, G and G_o.
        stride, padding, dilation: (y, x).
        offsets: values from which offsets are drawn, in pixels.
        with_mask, with_bias: whether there is a mask or a bias.
        zero_border: whether the outermost pixels are zero, so that values outside the map have no effect.
        diagonal: whether dy = dx.
        seed: seed of the values; the map's pixels are 1, 2, 3 … for 0.
        name: name of the case.
    """
    geometry = ConvGeometry(kernel, stride, padding, dilation)
    output_size = geometry.output_size(size)
    rng = np.random.default_rng(seed)
    x = integers(seed, images, inputs, *size)
    if zero_border:
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
            "weight": integers(seed, outputs, inputs // groups, *kernel),
            "bias": integers(seed, outputs) if with_bias else None,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            # Away from zero, so that a mutant can divide a gradient by the mask.
            "mask": rng.integers(1, 9, (images, points, *output_size)) / 4 if with_mask else None,
        },
        name,
    )


def conv_strategy(sizes: st.SearchStrategy[Size], kernels: Sequence[Size], **options: Any) -> Callable[[Setting], Any]:
    """Return the strategy of a check. An option may be a strategy."""
    option_strategies = {
        name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in options.items()
    }
    strategy = st.builds(conv_case, sizes, st.sampled_from(kernels), seed=seeds, **option_strategies)
    return lambda setting: strategy


# ------------------------------------------------------------------------------------------------ tests


def gradient_of(*names: str, one_sided: bool = False) -> Callable[[CheckContext, Case], None]:
    """Return the test of some gradients; the elements of the cotangent are 1, 2, 3 …."""

    def test(ctx: CheckContext, case: Case) -> None:
        cotangent = integers(0, *ctx.expected(case).shape)
        for name in names:
            ctx.compare_gradient(name, cotangent, case, one_sided=one_sided)

    return test


def unit_mask(ctx: CheckContext, case: Case) -> None:
    """Require the same result with a mask of ones."""
    offset = case.arguments["offset"]
    ones = np.ones((len(offset), offset.shape[1] // 2, *offset.shape[2:]))
    with_mask = Case({**case.arguments, "mask": ones})
    ctx.require_close(ctx.got(with_mask), ctx.got(case), case=with_mask)


def uniform_offset(ctx: CheckContext, case: Case) -> None:
    """Require the same result for a constant integer offset and for a shifted map."""
    x, offset = case.arguments["x"], case.arguments["offset"]
    shifted = np.zeros_like(x)
    shifted[:, :, :-1, :-2] = x[:, :, 1:, 2:]
    uniform = offset.reshape(len(offset), offset.shape[1] // 2, 2, *offset.shape[2:]).copy()
    uniform[:, :, 0], uniform[:, :, 1] = 1, 2
    by_offset = case.with_arrays({"offset": uniform.reshape(offset.shape)})
    by_map = case.with_arrays({"x": shifted, "offset": np.zeros_like(offset)})
    ctx.require_close(ctx.got(by_offset), ctx.got(by_map), case=by_offset)


def flips(ctx: CheckContext, case: Case) -> None:
    """Require that a flipped map, kernel, offset and mask give the flipped result."""
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
        ctx.require_close(ctx.got(flipped), np.flip(ctx.got(case), 2 + axis), case=flipped)


def nan_comes_out(ctx: CheckContext, case: Case) -> None:
    for channel in range(2):
        offset = case.arguments["offset"].copy()
        offset[0, channel, 1, 1] = np.nan
        with_nan = case.with_arrays({"offset": offset})
        got = ctx.got(with_nan)
        expected = np.zeros(got.shape, dtype=bool)
        expected[0, :, 1, 1] = True
        if not (np.isnan(got) == expected).all():
            raise Mismatch("expected NaN in the results of NaN offsets, and nowhere else", None, got, with_nan)
