"""Operation ``deform_conv``: deformable convolution, version 1 (without mask) and version 2 (with mask)."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...peers.deform_conv import ConvGeometry, deform_conv2d, deform_conv2d_vjp, deform_points
from ..common import leaves_inputs_alone, runs, shape
from ..drawing import draw_map
from ..op_spec import Argument, Case, Check, Implementation, Mismatch, OpSpec, Stage
from ..strategies import map_sizes, square_sizes
from .convolutions import (
    ANYWHERE,
    FAR_OUTSIDE,
    QUARTERS,
    WHOLE_PIXELS,
    conv_case,
    conv_strategy,
    flips,
    gradient_of,
    nan_comes_out,
    uniform_offset,
    unit_mask,
)
from .deform_conv_mutants import MUTANTS

ONE_TAP, SMALL_KERNELS = [(1, 1)], [(2, 3), (3, 2), (1, 2), (2, 2)]
LARGE_MAPS = st.sampled_from([(5, 7), (7, 5), (6, 5)])
PAIRS = st.sampled_from([(1, 2), (2, 1), (3, 2)])
ONE_OR_TWO = st.sampled_from([(1, 1), (2, 2)])

# ------------------------------------------------------------------------------------------------ checks

TYPICAL = conv_case(
    (5, 7), (3, 2), images=2, inputs=4, outputs=6, groups=2, offset_groups=2, stride=(2, 1), padding=(1, 2),
    dilation=(1, 2), offsets=ANYWHERE, with_mask=True, with_bias=True, seed=1, name="everything at once",
)  # fmt: skip
SLOPES = conv_case(
    (4, 5), (2, 1), inputs=2, outputs=2, stride=(1, 2), offsets=QUARTERS, with_mask=True, with_bias=True,
    zero_border=True, seed=2, name="two taps between pixels",
)  # fmt: skip

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "The result is finite and has the dtype of the inputs.",
        "The function raised an error, returned another dtype, or returned NaN or infinity.",
        [conv_case((3, 4), (2, 2), offsets=QUARTERS, name="version 1"), TYPICAL], test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and inputs are not modified.",
        "The function assumes contiguous memory, writes to its inputs, or is not deterministic.", [TYPICAL],
        test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "The result is (N, O, H', W') with H' = ⌊(H + 2 padding - dilation (k - 1) - 1)/stride⌋ + 1; N may be 0.",
        "Axes are swapped, or an empty batch is not handled.",
        [conv_case((3, 5), (2, 2), images=0, inputs=2, outputs=3, name="no images")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, images=st.integers(0, 2), inputs=st.sampled_from([2, 4]),
                      outputs=st.sampled_from([2, 6]), groups=st.sampled_from([1, 2]), stride=PAIRS, padding=PAIRS,
                      dilation=PAIRS, with_mask=st.booleans()), shape,
    ),
    Check(
        "one_tap", Stage.VALUES, "A kernel with one tap and zero offsets multiplies the map by its weight.",
        "Positions are shifted, most likely by half a pixel, or stretched (H instead of H - 1).",
        [conv_case((2, 2), (1, 1), name="a square of 2 × 2"), conv_case((3, 3), (1, 1), seed=3, name="3 × 3")],
        conv_strategy(square_sizes(), ONE_TAP),
    ),
    Check(
        "not_square", Stage.VALUES, "On a non-square map, each axis uses its own length.",
        "One axis is normalized by the length of the other, e.g. x by the height. Square maps hide this mistake.",
        [conv_case((2, 4), (1, 1), name="a map of 2 × 4")], conv_strategy(map_sizes(smallest=2), ONE_TAP),
    ),
    Check(
        "single_row", Stage.VALUES, "A map with a single row or column is handled like any other.",
        "The function divides by H - 1 = 0.",
        [conv_case((1, 4), (1, 1), name="a map of one row"), conv_case((3, 1), (1, 1), name="one column")],
        conv_strategy(st.sampled_from([(1, 4), (5, 1), (1, 1)]), ONE_TAP), degenerate=True,
    ),
    Check(
        "without_offsets", Stage.VALUES,
        "With zero offsets, the result is the cross-correlation of neural networks: tap (i, j) reads i rows below and "
        "j "
        "columns to the right of the first tap, and the first tap of the first result reads the first pixel.",
        "The kernel is flipped (as in a mathematical convolution), transposed, or centered.",
        [conv_case((3, 4), (2, 2), name="2 × 2 taps"), conv_case((4, 5), (3, 3), seed=1, name="3 × 3 taps")],
        conv_strategy(LARGE_MAPS, [(2, 2), (3, 3), (2, 3)]),
    ),
    Check(
        "padding", Stage.VALUES, "Padding moves the taps up and to the left.",
        "The size of the result includes the padding, but the positions of the taps do not.",
        [conv_case((4, 5), (2, 2), padding=(1, 1), zero_border=True, name="a pixel of padding")],
        conv_strategy(LARGE_MAPS, [(2, 2), (3, 3)], padding=(1, 1), zero_border=True),
    ),
    Check(
        "stride", Stage.VALUES, "From one result to the next, the taps move by the stride.",
        "The size of the result includes the stride, but the taps move by one pixel.",
        [conv_case((5, 6), (2, 2), stride=(2, 2), name="every second pixel")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, stride=ONE_OR_TWO),
    ),
    Check(
        "dilation", Stage.VALUES, "The distance between taps is the dilation, and the first tap does not move.",
        "The dilation is ignored, or expands the kernel around its center.",
        [conv_case((5, 6), (3, 3), dilation=(2, 2), name="every second pixel")],
        conv_strategy(LARGE_MAPS, [(3, 2), (2, 3), (3, 3), (2, 2)], dilation=ONE_OR_TWO),
    ),
    Check(
        "pairs_are_y_x", Stage.VALUES, "Stride, padding and dilation are (y, x).", "They are taken as (x, y).",
        [conv_case((5, 6), (2, 2), stride=(2, 1), name="stride"),
         conv_case((5, 6), (2, 2), padding=(1, 0), zero_border=True, name="padding"),
         conv_case((5, 6), (2, 2), dilation=(1, 2), name="dilation")],
        conv_strategy(LARGE_MAPS, [(2, 2), (2, 3)], stride=PAIRS, padding=st.sampled_from([(0, 0), (1, 0)]),
                      dilation=PAIRS, zero_border=True),
    ),
    Check(
        "offset_direction", Stage.VALUES,
        "An offset of (1, 1) reads the pixel one row below and one column to the right.",
        "Offsets are ignored, subtracted, or in another unit than pixels.",
        [conv_case((4, 5), (1, 1), offsets=(1.0,), diagonal=True, zero_border=True, name="all taps move by (1, 1)")],
        conv_strategy(map_sizes(smallest=3), ONE_TAP, offsets=WHOLE_PIXELS, diagonal=True, zero_border=True),
    ),
    Check(
        "offset_is_y_x", Stage.VALUES, "An offset is (dy, dx).", "It is taken as (dx, dy).",
        [conv_case((3, 4), (1, 1), offsets=WHOLE_PIXELS, zero_border=True, seed=1, name="one tap")],
        conv_strategy(map_sizes(smallest=3), ONE_TAP, offsets=WHOLE_PIXELS, zero_border=True),
    ),
    Check(
        "offset_channels", Stage.VALUES,
        "The offset's channels are dy, dx of the first tap, dy, dx of the second tap, and so on, row by row of the "
        "kernel. Their unit is pixels for any dilation.",
        "Channels are ordered as all dy, then all dx; taps are numbered column by column; all taps have the same "
        "offset; "
        "or offsets are multiplied by the dilation.",
        [conv_case((5, 6), (2, 3), offsets=WHOLE_PIXELS, zero_border=True, seed=1, name="2 × 3 taps"),
         conv_case((6, 7), (2, 2), offsets=WHOLE_PIXELS, dilation=(2, 3), zero_border=True, seed=2,
                   name="with dilation")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, offsets=WHOLE_PIXELS, zero_border=True, dilation=ONE_OR_TWO),
    ),
    Check(
        "between_pixels", Stage.VALUES, "Between pixels, interpolation is bilinear.",
        "Another interpolation is used (nearest, bicubic), or weights are assigned to the wrong neighbors.",
        [conv_case((4, 5), (2, 2), offsets=(0.25, 0.5, 0.75), zero_border=True, seed=1, name="2 × 2 taps")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, offsets=(0.25, 0.5, 0.75, 0.0), zero_border=True),
    ),
    Check(
        "zeros_outside", Stage.VALUES, "A tap one pixel or more outside the map reads zero.",
        "The border is replicated or wrapped around.",
        [conv_case((3, 4), (2, 2), padding=(1, 1), name="a pixel of padding"),
         conv_case((3, 4), (1, 1), offsets=FAR_OUTSIDE, seed=1, name="far away")],
        conv_strategy(map_sizes(smallest=2), [(1, 1), (2, 2)], offsets=FAR_OUTSIDE,
                      padding=st.sampled_from([(1, 1), (2, 1)])),
    ),
    Check(
        "border_fades", Stage.VALUES,
        "From the outermost pixel center to one pixel outside it, the sample decreases linearly to zero.",
        "Taps in this strip read zero, or positions are truncated instead of floored.",
        [conv_case((2, 3), (1, 1), offsets=(-0.25, -0.5, 0.75), seed=1, name="within a pixel of the border")],
        conv_strategy(map_sizes(smallest=2, largest=4), ONE_TAP, offsets=QUARTERS),
    ),
    Check(
        "modulation", Stage.VALUES, "Version 2: the sample of each tap is multiplied by its mask.",
        "The mask is ignored, assigned to other taps, or passed through another sigmoid or softmax.",
        [conv_case((4, 5), (2, 2), with_mask=True, seed=1, name="2 × 2 taps"),
         conv_case((3, 4), (1, 1), with_mask=True, seed=2, name="one tap")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, with_mask=True),
    ),
    Check(
        "bias", Stage.VALUES, "The bias is added once to each result.", "The bias is ignored.",
        [conv_case((3, 4), (2, 2), outputs=3, with_bias=True, name="three output channels")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, outputs=st.integers(1, 3), with_bias=True),
    ),
    Check(
        "channels", Stage.VALUES, "Weights are (O, C, k_y, k_x), and the result is a sum over input channels.",
        "Input and output channels are swapped, or input channels are averaged.",
        [conv_case((3, 4), (2, 2), inputs=3, outputs=3, name="three channels each"),
         conv_case((3, 4), (2, 2), inputs=2, outputs=3, name="two channels in, three out")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, inputs=st.integers(1, 3), outputs=st.integers(1, 3)),
    ),
    Check(
        "weight_groups", Stage.VALUES,
        "With G weight groups, the first O/G outputs use the first C/G input channels, and so on.",
        "Groups are in another order, or channels are interleaved across the groups.",
        [conv_case((3, 4), (2, 2), inputs=4, outputs=6, groups=2, name="two groups")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, inputs=st.sampled_from([4, 8]), outputs=st.sampled_from([2, 6]),
                      groups=2),
    ),
    Check(
        "offset_groups", Stage.VALUES,
        "With G_o offset groups, the first C/G_o channels use the first 2·k_y·k_x channels of the offset, and so on.",
        "Groups are in another order, or all groups use the first group's offsets.",
        [conv_case((5, 6), (2, 2), inputs=4, outputs=2, offset_groups=2, offsets=WHOLE_PIXELS, with_mask=True, seed=1,
                   name="two offset groups"),
         conv_case((4, 5), (1, 2), inputs=6, offset_groups=3, offsets=WHOLE_PIXELS, seed=2,
                   name="three offset groups")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, inputs=st.sampled_from([4, 8]), offset_groups=st.sampled_from([2, 4]),
                      offsets=WHOLE_PIXELS),
    ),
    Check(
        "images", Stage.VALUES, "Each image has its own offsets.", "All images use the first image's offsets.",
        [conv_case((4, 5), (2, 2), images=3, offsets=WHOLE_PIXELS, seed=1, name="three images")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, images=st.integers(2, 3), offsets=WHOLE_PIXELS),
    ),
    Check(
        "fine_positions", Stage.VALUES, "On a large map, positions keep their fractional part.",
        "Positions are stored in half precision. bfloat16 has 8 significant bits and loses half pixels above 128.",
        [conv_case((2, 301), (1, 1), stride=(1, 290), offsets=(0.75,), name="far along a map of 2 × 301")],
        conv_strategy(st.just((2, 301)), ONE_TAP, stride=st.sampled_from([(1, 290), (1, 260)]), offsets=(0.25, 0.75)),
    ),
    Check(
        "anywhere", Stage.VALUES,
        "Results equal the reference for any offsets, groups, stride, padding, dilation and mask.",
        "A mistake that no earlier check isolates.", [TYPICAL],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, images=st.integers(1, 2), inputs=4, outputs=st.sampled_from([2, 4]),
                      groups=st.sampled_from([1, 2]), offset_groups=st.sampled_from([1, 2, 4]), stride=PAIRS,
                      padding=PAIRS, dilation=PAIRS, offsets=ANYWHERE, with_mask=st.booleans(),
                      with_bias=st.booleans()),
    ),
    Check(
        "gradient_of_the_map", Stage.GRADIENTS,
        "A pixel receives the gradient of each tap that reads it, times weight, interpolation weight and mask.",
        "A factor is wrong, or contributions of taps are missing.", [SLOPES],
        conv_strategy(map_sizes(smallest=2, largest=3), [(2, 1), (1, 2)], offsets=QUARTERS, with_mask=True),
        gradient_of("x"),
    ),
    Check(
        "gradient_of_the_weights", Stage.GRADIENTS,
        "Gradients of weights and bias are sums over pixels and images: of samples times mask, and of ones.",
        "A factor is wrong, or contributions of images are missing.",
        [conv_case((3, 4), (2, 1), images=2, inputs=2, outputs=2, offsets=QUARTERS, with_mask=True, with_bias=True,
                   seed=2, name="two images")],
        conv_strategy(map_sizes(smallest=2, largest=3), [(2, 1), (1, 2)], offsets=QUARTERS, with_bias=True),
        gradient_of("weight", "bias"),
    ),
    Check(
        "gradient_of_the_mask", Stage.GRADIENTS, "The gradient of the mask is the weight times the sample of the tap.",
        "A factor is wrong.", [SLOPES],
        conv_strategy(map_sizes(smallest=2, largest=3), [(2, 1), (1, 2)], offsets=QUARTERS, with_mask=True),
        gradient_of("mask"),
    ),
    Check(
        "gradient_of_the_offset", Stage.GRADIENTS,
        "The gradient of an offset is the derivative of its sample, times weight and mask.",
        "A factor is wrong, dy and dx are swapped, the mask is missing, or the gradient is missing.", [SLOPES],
        conv_strategy(map_sizes(smallest=3, largest=4), ONE_TAP, offsets=(0.25, 0.5, 0.75), with_mask=st.booleans(),
                      zero_border=True),
        gradient_of("offset"),
    ),
    Check(
        "gradient_at_the_border", Stage.GRADIENTS,
        "A tap less than one pixel outside the map still has a gradient, because its sample decreases there.",
        "The gradient is set to zero outside the outermost pixel centers, although the sample is not zero.",
        [conv_case((2, 3), (1, 1), offsets=(-0.25, -0.75, 0.75), seed=1, name="around the border")],
        conv_strategy(map_sizes(smallest=2, largest=3), ONE_TAP, offsets=QUARTERS), gradient_of("offset"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "At a pixel center, where the derivative jumps, it is the right-sided one.",
        "The left-sided or a central derivative is used. Any choice works for training; torch uses this one.",
        [conv_case((3, 4), (1, 1), name="without offsets", seed=1)],
        conv_strategy(map_sizes(smallest=2, largest=3), ONE_TAP, offsets=WHOLE_PIXELS),
        gradient_of("offset", one_sided=True),
    ),
    Check(
        "mask_of_ones", Stage.IDENTITIES, "A mask of ones has no effect: version 2 includes version 1.",
        "The mask is not only a factor.",
        [conv_case((4, 5), (2, 2), offsets=QUARTERS, seed=1, name="2 × 2 taps")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, offsets=ANYWHERE), unit_mask,
    ),
    Check(
        "moved_as_one", Stage.IDENTITIES, "A constant integer offset gives the result for the shifted map.",
        "Offsets do not move the taps.", [conv_case((4, 5), (2, 2), name="2 × 2 taps")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, inputs=st.integers(1, 2), stride=ONE_OR_TWO), uniform_offset,
    ),
    Check(
        "flips", Stage.IDENTITIES, "A flipped map, kernel, offset and mask give the flipped result.",
        "Left and right, or top and bottom, are treated differently.",
        [conv_case((4, 5), (2, 3), offsets=QUARTERS, with_mask=True, seed=1, name="2 × 3 taps")],
        conv_strategy(LARGE_MAPS, SMALL_KERNELS, inputs=2, offset_groups=st.sampled_from([1, 2]), padding=ONE_OR_TWO,
                      offsets=ANYWHERE, with_mask=True), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "A NaN offset gives NaN in its own results only.",
        "NaN is clamped to the border or replaced, which hides a diverged training run.",
        [conv_case((3, 4), (1, 1), outputs=2, seed=1, name="one NaN offset")], test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch) -> str:
    """Draw the first channel of the map, and the taps of the result with the largest error."""
    x, offset, weight = (case.arguments[name] for name in ("x", "offset", "weight"))
    geometry = ConvGeometry(weight.shape[2:], *(case.arguments[name] for name in ("stride", "padding", "dilation")))
    caption = (
        f"taps {geometry.kernel}, stride {geometry.stride}, padding {geometry.padding}, dilation {geometry.dilation}"
    )
    if not x.size:
        return f"maps {x.shape}; {caption}"
    n, output, row, column = _worst(mismatch)
    points = deform_points(offset, geometry)[n, 0, :, row, column]
    mask = case.arguments["mask"]
    lines = [caption, f"result {row, column} of image {n}, channel {output}; taps on channel 0 of the map"]
    lines.append(draw_map(x[n, 0], points))
    lines.append(f"weights {_format_row(weight[output, 0])}")
    if mask is not None:
        lines.append(f"mask {_format_row(mask[n, : len(points), row, column])}")
    return "\n".join(lines)


def _format_row(array: Array) -> str:
    return " ".join(f"{value:.4g}" for value in array.ravel())


def _worst(mismatch: Mismatch) -> tuple[int, ...]:
    """Return the (image, channel, row, column) with the largest error."""
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.shape != got.shape or expected.ndim != 4 or not expected.size:
        return 0, 0, 0, 0
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf)
    return tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))


DEFORM_CONV = OpSpec(
    name="deform_conv",
    title="deformable convolution, version 1 and 2",
    function="deform_conv2d",
    arguments=(
        Argument("x", "NCHW", "maps", differentiable=True),
        Argument(
            "offset",
            "NFhw",
            "F = 2·G_o·k_y·k_x: (dy, dx) of every tap, in pixels",
            differentiable=True,
            extent=lambda arguments: max(arguments["x"].shape[2:]),
        ),
        Argument("weight", "OJYX", "J = C/G channels of k_y × k_x taps", differentiable=True),
        Argument("bias", "O", "or None", differentiable=True),
        Argument("stride", "", "(y, x)"),
        Argument("padding", "", "(y, x)"),
        Argument("dilation", "", "(y, x)"),
        Argument("mask", "NKhw", "K = G_o·k_y·k_x, or None for version 1", differentiable=True),
    ),
    returns="NOhw",
    reference=Implementation(
        "dat_ref.peers.deform_conv:deform_conv2d",
        deform_conv2d,
        lambda *arguments: deform_conv2d_vjp(*arguments)._asdict(),
    ),
    draw=draw,
    checks=CHECKS,
    mutants=MUTANTS,
)
