"""Subject ``deform_conv``: deformable convolution, version 1 (no mask) and version 2 (with a mask)."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ..._checks import Array
from ...peers.deform_conv import Sliding, deform_conv2d, deform_conv2d_vjp, deform_points
from ..common import leaves_inputs_alone, runs, shape
from ..drawing import draw_map
from ..strategies import map_sizes, square_sizes
from ..subject import Argument, Case, Check, Implementation, Mismatch, Stage, Subject
from .convolutions import (
    ANYWHERE,
    FAR,
    QUARTERS,
    WHOLE,
    convolution,
    drawn,
    flips,
    gradient_of,
    mask_of_ones,
    moved_as_one,
    nan_comes_out,
)
from .deform_conv_mutants import MUTANTS

SINGLE, SMALL = [(1, 1)], [(2, 3), (3, 2), (1, 2), (2, 2)]
LARGE = st.sampled_from([(5, 7), (7, 5), (6, 5)])
PAIRS = st.sampled_from([(1, 2), (2, 1), (3, 2)])
ONE_OR_TWO = st.sampled_from([(1, 1), (2, 2)])

# ------------------------------------------------------------------------------------------------ checks

PLAIN = convolution(
    (5, 7), (3, 2), images=2, inputs=4, outputs=6, groups=2, offset_groups=2, stride=(2, 1), padding=(1, 2),
    dilation=(1, 2), offsets=ANYWHERE, masked=True, biased=True, seed=1, name="everything at once",
)  # fmt: skip
SLOPES = convolution(
    (4, 5), (2, 1), inputs=2, outputs=2, stride=(1, 2), offsets=QUARTERS, masked=True, biased=True, empty_rim=True,
    seed=2, name="two taps between pixels",
)  # fmt: skip

CHECKS = (
    Check(
        "runs", Stage.SMOKE, "It returns finite numbers, in the precision of what it is given.",
        "The function cannot be called as the protocol says, or loses precision on the way.",
        [convolution((3, 4), (2, 2), offsets=QUARTERS, name="version 1"), PLAIN], test=runs,
    ),
    Check(
        "leaves_inputs_alone", Stage.SMOKE, "Read-only and strided arrays are accepted, and not written to.",
        "It assumes contiguous memory or works in place.", [PLAIN], test=leaves_inputs_alone,
    ),
    Check(
        "shapes", Stage.SHAPES,
        "The result is (N, O, H', W') with H' = ⌊(H + 2 padding - dilation (k - 1) - 1)/stride⌋ + 1, for any number "
        "of images, none included.",
        "Axes are exchanged, or an empty batch is not thought of.",
        [convolution((3, 5), (2, 2), images=0, inputs=2, outputs=3, name="no images")],
        drawn(LARGE, SMALL, images=st.integers(0, 2), inputs=st.sampled_from([2, 4]), outputs=st.sampled_from([2, 6]),
              groups=st.sampled_from([1, 2]), stride=PAIRS, padding=PAIRS, dilation=PAIRS, masked=st.booleans()), shape,
    ),
    Check(
        "one_tap", Stage.VALUES, "A kernel of one tap without offsets multiplies the map by its weight.",
        "Positions are shifted, by half a pixel most likely, or stretched (H for H - 1).",
        [convolution((2, 2), (1, 1), name="a square of 2 × 2"), convolution((3, 3), (1, 1), seed=3, name="3 × 3")],
        drawn(square_sizes(), SINGLE),
    ),
    Check(
        "not_square", Stage.VALUES, "The same on a map that is not square: each axis has its own length.",
        "One axis is normalised by the length of the other: x by the height, say. Square maps hide it.",
        [convolution((2, 4), (1, 1), name="a map of 2 × 4")], drawn(map_sizes(smallest=2), SINGLE),
    ),
    Check(
        "single_row", Stage.VALUES, "A map of one row or one column is a map like any other.",
        "A division by H - 1 = 0.",
        [convolution((1, 4), (1, 1), name="a map of one row"), convolution((3, 1), (1, 1), name="one column")],
        drawn(st.sampled_from([(1, 4), (5, 1), (1, 1)]), SINGLE), degenerate=True,
    ),
    Check(
        "without_offsets", Stage.VALUES,
        "Without offsets it is the convolution of neural networks: tap (i, j) looks i rows below and j columns to the "
        "right, and the first tap of the first result looks at the first pixel.",
        "The kernel is flipped (as in mathematics), transposed, or centered.",
        [convolution((3, 4), (2, 2), name="2 × 2 taps"), convolution((4, 5), (3, 3), seed=1, name="3 × 3 taps")],
        drawn(LARGE, [(2, 2), (3, 3), (2, 3)]),
    ),
    Check(
        "padding", Stage.VALUES, "Padding moves the first tap up and to the left.",
        "The result grows, but every tap stands where it stood without padding.",
        [convolution((4, 5), (2, 2), padding=(1, 1), empty_rim=True, name="a pixel of padding")],
        drawn(LARGE, [(2, 2), (3, 3)], padding=(1, 1), empty_rim=True),
    ),
    Check(
        "stride", Stage.VALUES, "From one result to the next the taps move by the stride.",
        "The result shrinks, but taps move pixel by pixel.",
        [convolution((5, 6), (2, 2), stride=(2, 2), name="every second pixel")], drawn(LARGE, SMALL, stride=ONE_OR_TWO),
    ),
    Check(
        "dilation", Stage.VALUES, "With dilation the taps stand further apart, and the first one stays where it was.",
        "The dilation is ignored, or widens the kernel about its middle.",
        [convolution((5, 6), (3, 3), dilation=(2, 2), name="every second pixel")],
        drawn(LARGE, [(3, 2), (2, 3), (3, 3), (2, 2)], dilation=ONE_OR_TWO),
    ),
    Check(
        "pairs_are_y_x", Stage.VALUES, "Stride, padding and dilation are (y, x).", "They are taken as (x, y).",
        [convolution((5, 6), (2, 2), stride=(2, 1), name="stride"),
         convolution((5, 6), (2, 2), padding=(1, 0), empty_rim=True, name="padding"),
         convolution((5, 6), (2, 2), dilation=(1, 2), name="dilation")],
        drawn(LARGE, [(2, 2), (2, 3)], stride=PAIRS, padding=st.sampled_from([(0, 0), (1, 0)]), dilation=PAIRS,
              empty_rim=True),
    ),
    Check(
        "offset_direction", Stage.VALUES, "An offset of (1, 1) reads a pixel further down and to the right.",
        "Offsets are ignored, subtracted, or in another unit than pixels.",
        [convolution((4, 5), (1, 1), offsets=(1.0,), diagonal=True, empty_rim=True, name="all moved by (1, 1)")],
        drawn(map_sizes(smallest=3), SINGLE, offsets=WHOLE, diagonal=True, empty_rim=True),
    ),
    Check(
        "offset_is_y_x", Stage.VALUES, "An offset is (dy, dx): its first channel moves down.",
        "It is taken as (dx, dy).",
        [convolution((3, 4), (1, 1), offsets=WHOLE, empty_rim=True, seed=1, name="one tap")],
        drawn(map_sizes(smallest=3), SINGLE, offsets=WHOLE, empty_rim=True),
    ),
    Check(
        "offset_channels", Stage.VALUES,
        "The offset's channels are dy, dx of the first tap, dy, dx of the second, and so on, row by row of the kernel, "
        "in pixels whatever the dilation.",
        "They are taken for all dy, then all dx; taps are numbered column by column; all taps move alike; or offsets "
        "are multiplied by the dilation.",
        [convolution((5, 6), (2, 3), offsets=WHOLE, empty_rim=True, seed=1, name="2 × 3 taps"),
         convolution((6, 7), (2, 2), offsets=WHOLE, dilation=(2, 3), empty_rim=True, seed=2, name="with dilation")],
        drawn(LARGE, SMALL, offsets=WHOLE, empty_rim=True, dilation=ONE_OR_TWO),
    ),
    Check(
        "between_pixels", Stage.VALUES, "Between pixels the four around are mixed by distance.",
        "Another interpolation (nearest, cubic), or weights that belong to other corners.",
        [convolution((4, 5), (2, 2), offsets=(0.25, 0.5, 0.75), empty_rim=True, seed=1, name="2 × 2 taps")],
        drawn(LARGE, SMALL, offsets=(0.25, 0.5, 0.75, 0.0), empty_rim=True),
    ),
    Check(
        "zeros_outside", Stage.VALUES, "One pixel outside the map and further, taps find zeros.",
        "The border is repeated or wrapped around.",
        [convolution((3, 4), (2, 2), padding=(1, 1), name="a pixel of padding"),
         convolution((3, 4), (1, 1), offsets=FAR, seed=1, name="far away")],
        drawn(map_sizes(smallest=2), [(1, 1), (2, 2)], offsets=FAR, padding=st.sampled_from([(1, 1), (2, 1)])),
    ),
    Check(
        "border_fades", Stage.VALUES, "Between the last pixel and one pixel outside, the value fades to zero.",
        "Taps there are dropped, or rounded towards zero instead of down.",
        [convolution((2, 3), (1, 1), offsets=(-0.25, -0.5, 0.75), seed=1, name="within a pixel of the border")],
        drawn(map_sizes(smallest=2, largest=4), SINGLE, offsets=QUARTERS),
    ),
    Check(
        "modulation", Stage.VALUES, "Version 2: what a tap finds is multiplied by its mask, as it is.",
        "The mask is ignored, belongs to other taps, or a sigmoid or softmax is taken of it, which is the caller's.",
        [convolution((4, 5), (2, 2), masked=True, seed=1, name="2 × 2 taps"),
         convolution((3, 4), (1, 1), masked=True, seed=2, name="one tap")],
        drawn(LARGE, SMALL, masked=True),
    ),
    Check(
        "bias", Stage.VALUES, "The bias is added once to each result.", "It is ignored.",
        [convolution((3, 4), (2, 2), outputs=3, biased=True, name="three output channels")],
        drawn(LARGE, SMALL, outputs=st.integers(1, 3), biased=True),
    ),
    Check(
        "channels", Stage.VALUES, "Weights are (O, C, k_y, k_x), and input channels are summed.",
        "Input and output channels are exchanged, or averaged.",
        [convolution((3, 4), (2, 2), inputs=3, outputs=3, name="three channels each"),
         convolution((3, 4), (2, 2), inputs=2, outputs=3, name="two channels in, three out")],
        drawn(LARGE, SMALL, inputs=st.integers(1, 3), outputs=st.integers(1, 3)),
    ),
    Check(
        "weight_groups", Stage.VALUES,
        "With G groups of weights (O, C/G, …) the first O/G outputs see the first C/G channels, and so on.",
        "Groups are taken in another order, or channels are dealt to them in turn.",
        [convolution((3, 4), (2, 2), inputs=4, outputs=6, groups=2, name="two groups")],
        drawn(LARGE, SMALL, inputs=st.sampled_from([4, 8]), outputs=st.sampled_from([2, 6]), groups=2),
    ),
    Check(
        "offset_groups", Stage.VALUES,
        "With G_o offset groups the first C/G_o channels move by the first 2·k_y·k_x channels of the offset, etc.",
        "Groups are taken in another order, or all move by the first one's offsets.",
        [convolution((5, 6), (2, 2), inputs=4, outputs=2, offset_groups=2, offsets=WHOLE, masked=True, seed=1,
                     name="two offset groups"),
         convolution((4, 5), (1, 2), inputs=6, offset_groups=3, offsets=WHOLE, seed=2, name="three offset groups")],
        drawn(LARGE, SMALL, inputs=st.sampled_from([4, 8]), offset_groups=st.sampled_from([2, 4]), offsets=WHOLE),
    ),
    Check(
        "images", Stage.VALUES, "Each image has offsets of its own.", "All images use the first image's.",
        [convolution((4, 5), (2, 2), images=3, offsets=WHOLE, seed=1, name="three images")],
        drawn(LARGE, SMALL, images=st.integers(2, 3), offsets=WHOLE),
    ),
    Check(
        "fine_positions", Stage.VALUES, "Positions keep their fractions on a large map.",
        "Positions are kept in half precision: bfloat16 has 8 bits, so that beyond pixel 256 halves are lost.",
        [convolution((2, 301), (1, 1), stride=(1, 290), offsets=(0.75,), name="far along a map of 2 × 301")],
        drawn(st.just((2, 301)), SINGLE, stride=st.sampled_from([(1, 290), (1, 260)]), offsets=(0.25, 0.75)),
    ),
    Check(
        "anywhere", Stage.VALUES, "The reference's result for any offsets, groups, stride, padding, dilation and mask.",
        "A mistake that none of the checks above isolates.", [PLAIN],
        drawn(LARGE, SMALL, images=st.integers(1, 2), inputs=4, outputs=st.sampled_from([2, 4]),
              groups=st.sampled_from([1, 2]), offset_groups=st.sampled_from([1, 2, 4]), stride=PAIRS, padding=PAIRS,
              dilation=PAIRS, offsets=ANYWHERE, masked=st.booleans(), biased=st.booleans()),
    ),
    Check(
        "gradient_of_the_map", Stage.GRADIENTS,
        "A pixel gains weight times interpolation times mask from every tap near it.",
        "A wrong factor, or taps that are forgotten.", [SLOPES],
        drawn(map_sizes(smallest=2, largest=3), [(2, 1), (1, 2)], offsets=QUARTERS, masked=True), gradient_of("x"),
    ),
    Check(
        "gradient_of_the_weights", Stage.GRADIENTS, "Those of weights and bias: what the taps found, and the sum.",
        "A wrong factor, or images that are forgotten.",
        [convolution((3, 4), (2, 1), images=2, inputs=2, outputs=2, offsets=QUARTERS, masked=True, biased=True, seed=2,
                     name="two images")],
        drawn(map_sizes(smallest=2, largest=3), [(2, 1), (1, 2)], offsets=QUARTERS, biased=True),
        gradient_of("weight", "bias"),
    ),
    Check(
        "gradient_of_the_mask", Stage.GRADIENTS, "That of the mask: weight times what the tap found.",
        "A wrong factor.", [SLOPES],
        drawn(map_sizes(smallest=2, largest=3), [(2, 1), (1, 2)], offsets=QUARTERS, masked=True), gradient_of("mask"),
    ),
    Check(
        "gradient_of_the_offset", Stage.GRADIENTS,
        "An offset's gradient is the slope of its sample, times weight and mask.",
        "A wrong factor, dy and dx exchanged, the mask forgotten, or no gradient at all.", [SLOPES],
        drawn(map_sizes(smallest=3, largest=4), SINGLE, offsets=(0.25, 0.5, 0.75), masked=st.booleans(),
              empty_rim=True),
        gradient_of("offset"),
    ),
    Check(
        "gradient_at_the_border", Stage.GRADIENTS, "Within a pixel outside the map an offset still has a gradient.",
        "The gradient is stopped at the border, where the value is not.",
        [convolution((2, 3), (1, 1), offsets=(-0.25, -0.75, 0.75), seed=1, name="around the border")],
        drawn(map_sizes(smallest=2, largest=3), SINGLE, offsets=QUARTERS), gradient_of("offset"),
    ),
    Check(
        "gradient_on_the_lattice", Stage.GRADIENTS,
        "On a pixel center, where the slope jumps, it is the one to the right and below.",
        "The slope is taken from the other side or from between. Any choice trains; this one is the choice of torch.",
        [convolution((3, 4), (1, 1), name="without offsets", seed=1)],
        drawn(map_sizes(smallest=2, largest=3), SINGLE, offsets=WHOLE), gradient_of("offset", one_sided=True),
    ),
    Check(
        "mask_of_ones", Stage.IDENTITIES, "A mask of ones changes nothing: version 2 contains version 1.",
        "The mask is used for more than a factor.",
        [convolution((4, 5), (2, 2), offsets=QUARTERS, seed=1, name="2 × 2 taps")],
        drawn(LARGE, SMALL, offsets=ANYWHERE), mask_of_ones,
    ),
    Check(
        "moved_as_one", Stage.IDENTITIES, "The same whole offset everywhere is the convolution of the moved map.",
        "Offsets are not what moves the taps.", [convolution((4, 5), (2, 2), name="2 × 2 taps")],
        drawn(LARGE, SMALL, inputs=st.integers(1, 2), stride=ONE_OR_TWO), moved_as_one,
    ),
    Check(
        "flips", Stage.IDENTITIES, "A mirrored map, kernel, offset and mask give a mirrored result.",
        "Left and right, or top and bottom, are treated differently.",
        [convolution((4, 5), (2, 3), offsets=QUARTERS, masked=True, seed=1, name="2 × 3 taps")],
        drawn(LARGE, SMALL, inputs=2, offset_groups=st.sampled_from([1, 2]), padding=ONE_OR_TWO, offsets=ANYWHERE,
              masked=True), flips,
    ),
    Check(
        "nan_comes_out", Stage.IDENTITIES, "An offset that is not a number gives NaN to its own results only.",
        "NaN is clamped to the border or skipped, which hides a diverged training run.",
        [convolution((3, 4), (1, 1), outputs=2, seed=1, name="a NaN among the offsets")], test=nan_comes_out,
    ),
)  # fmt: skip


def draw(case: Case, mismatch: Mismatch) -> str:
    """Draw the first channel of the map, and where the taps of the worst result look."""
    x, offset, weight = (case.arguments[name] for name in ("x", "offset", "weight"))
    sliding = Sliding(weight.shape[2:], *(case.arguments[name] for name in ("stride", "padding", "dilation")))
    told = f"taps {sliding.kernel}, stride {sliding.stride}, padding {sliding.padding}, dilation {sliding.dilation}"
    if not x.size:
        return f"maps {x.shape}; {told}"
    n, output, row, column = _worst(mismatch)
    points = deform_points(offset, sliding)[n, 0, :, row, column]
    mask = case.arguments["mask"]
    lines = [told, f"result {row, column} of image {n}, channel {output}: its taps on the first channel of the map"]
    lines.append(draw_map(x[n, 0], points))
    lines.append(f"weights {_plain(weight[output, 0])}")
    if mask is not None:
        lines.append(f"mask {_plain(mask[n, : len(points), row, column])}")
    return "\n".join(lines)


def _plain(array: Array) -> str:
    return " ".join(f"{value:.4g}" for value in array.ravel())


def _worst(mismatch: Mismatch) -> tuple[int, ...]:
    """Return (image, channel, row, column) where a result is furthest off."""
    expected, got = mismatch.expected, mismatch.got
    if expected is None or got is None or expected.shape != got.shape or expected.ndim != 4 or not expected.size:
        return 0, 0, 0, 0
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf)
    return tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))


DEFORM_CONV = Subject(
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
        Argument("mask", "NKhw", "K = G_o·k_y·k_x, or None: version 1", differentiable=True),
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
