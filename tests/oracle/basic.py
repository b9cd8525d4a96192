"""Elementary layers on (B, C, H, W) maps, one output element at a time."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tree = dict[str, Any]
Padding = tuple[tuple[int, int], tuple[int, int]]

NO_PADDING: Padding = ((0, 0), (0, 0))


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """sum_c a[c] b[c]"""
    if len(a) != len(b):
        raise ValueError(f"dot: lengths differ, {len(a)} and {len(b)}")
    total = 0.0
    for left, right in zip(a, b, strict=True):
        total += left * right
    return total


def affine(values: Sequence[float], weight: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> list[float]:
    """y[o] = bias[o] + sum_c weight[o, c] values[c], for one vector."""
    rows = np.asarray(weight).tolist()
    shifts = [0.0] * len(rows) if bias is None else np.asarray(bias).tolist()
    return [shift + dot(row, values) for row, shift in zip(rows, shifts, strict=True)]


def pixel(x: Array, b: int, i: int, j: int) -> list[float]:
    """The channels of one pixel: [x[b, c, i, j] for every c]."""
    return [float(x[b, c, i, j]) for c in range(x.shape[1])]


def linear(x: Array, weight: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> Array:
    """y[b, o, i, j] = bias[o] + sum_c weight[o, c] x[b, c, i, j], weight (O, C)."""
    batch, _, height, width = x.shape
    y = np.zeros((batch, np.shape(weight)[0], height, width))
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for o, value in enumerate(affine(pixel(x, b, i, j), weight, bias)):
                    y[b, o, i, j] = value
    return y


def conv2d(
    x: Array,
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None = None,
    *,
    stride: int = 1,
    padding: Padding = NO_PADDING,
    groups: int = 1,
) -> Array:
    """y[b, o, i, j] = bias[o] + sum_{c,u,v} weight[o, c, u, v] x[b, g C/G + c, i r + u - top, j r + v - left]

    g = o // (O / G) is the group of output channel o; x counts as zero outside the map; weight is
    (O, C/G, kh, kw); output height (H + top + bottom - kh) // r + 1, width likewise.
    """
    batch, _, height, width = x.shape
    out_channels, in_per_group, kernel_h, kernel_w = np.shape(weight)
    out_per_group = out_channels // groups
    (top, bottom), (left, right) = padding
    out_h = (height + top + bottom - kernel_h) // stride + 1
    out_w = (width + left + right - kernel_w) // stride + 1
    y = np.zeros((batch, out_channels, out_h, out_w))
    taps = np.asarray(weight).tolist()
    shifts = [0.0] * out_channels if bias is None else np.asarray(bias).tolist()

    def window_sum(image: list[list[list[float]]], o: int, i: int, j: int) -> float:
        first = o // out_per_group * in_per_group
        total = shifts[o]
        for c in range(in_per_group):
            for u in range(kernel_h):
                for v in range(kernel_w):
                    row, column = i * stride + u - top, j * stride + v - left
                    if 0 <= row < height and 0 <= column < width:
                        total += taps[o][c][u][v] * image[first + c][row][column]
        return total

    for b in range(batch):
        image = x[b].tolist()
        for o in range(out_channels):
            for i in range(out_h):
                for j in range(out_w):
                    y[b, o, i, j] = window_sum(image, o, i, j)
    return y


def layer_norm(x: Array, weight: npt.ArrayLike, bias: npt.ArrayLike, eps: float = 1e-5) -> Array:
    """y[b, c, i, j] = weight[c] (x[b, c, i, j] - m) / sqrt(v + eps) + bias[c]

    m and v are the mean and the (biased) variance of the channels of the one pixel (b, i, j).
    """
    scales, shifts = np.asarray(weight).tolist(), np.asarray(bias).tolist()
    batch, channels, height, width = x.shape
    y = np.zeros(x.shape)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                values = pixel(x, b, i, j)
                mean = sum(values) / channels
                variance = sum((value - mean) ** 2 for value in values) / channels
                for c, value in enumerate(values):
                    y[b, c, i, j] = scales[c] * (value - mean) / math.sqrt(variance + eps) + shifts[c]
    return y


def gelu_scalar(value: float) -> float:
    """t Phi(t), Phi the distribution function of the standard normal: t (1 + erf(t / sqrt 2)) / 2."""
    return 0.5 * value * (1.0 + math.erf(value / math.sqrt(2.0)))


def gelu(x: Array) -> Array:
    """gelu_scalar of every element of (B, C, H, W)."""
    y = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        y[index] = gelu_scalar(float(x[index]))
    return y


def softmax(logits: Sequence[float]) -> list[float]:
    """exp(l_n) / sum_m exp(l_m); the largest logit is subtracted first, to avoid overflow."""
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def average_pool(x: Array, size: int) -> Array:
    """y[b, c, i, j] = mean of the size x size block at (i size, j size); an incomplete block is dropped."""
    batch, channels, height, width = x.shape
    y = np.zeros((batch, channels, height // size, width // size))
    for b, c, i, j in np.ndindex(*y.shape):
        total = 0.0
        for u in range(size):
            for v in range(size):
                total += float(x[b, c, i * size + u, j * size + v])
        y[b, c, i, j] = total / (size * size)
    return y
