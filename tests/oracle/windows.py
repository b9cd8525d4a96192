"""Window and shifted-window attention as a rule for visible keys; nothing is rolled, padded or partitioned.

Extend the map, H x W, at bottom and right to whole windows, Hp x Wp. Shift it up and left by s, cyclically, so that
pixel y moves to (y - s) mod Hp. Partition it into windows of w x w. A query sees a key if on both axes
    both are in the same window, (y_q - s) mod Hp // w = (y_k - s) mod Hp // w,
    both wrapped around the edge (y < s), or neither did,
    and the key is a real pixel (y_k < H).

    out(m) = sum_n softmax_n(q(m) . k(n) / sqrt(d) + table[(dy + w - 1)(2 w - 1) + dx + w - 1, head]) v(n)

over the keys n visible to m, (dy, dx) = shifted position of the query minus that of the key.
[q, k, v] = qkv(x), y = output(out).
params: {"qkv": {"weight" (3C, C), "bias"}, "output": {"weight" (C, C), "bias"}, "table" ((2w - 1)^2, heads)}
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .basic import Array, Tree, dot, linear, pixel, softmax

Position = tuple[int, int]
Sees = Callable[[Position, Position], bool]
Bias = Callable[[int, Position, Position], float]


class Result(NamedTuple):
    output: Array  # (B, C, H, W)
    attention: Array  # (B, heads, H W, H W), zero for hidden keys


def window_attention(x: Array, params: Tree, *, heads: int, window: int, shift: int = 0) -> Result:
    """Apply window attention to x (B, C, H, W), shifted if shift > 0 (releases: half a window, rounded up)."""
    size = (x.shape[2], x.shape[3])
    extended = [math.ceil(n / window) * window for n in size]
    table: list[list[float]] = np.asarray(params["table"]).tolist()

    def shifted(axis: int, y: int) -> int:
        return (y - shift) % int(extended[axis])

    def sees(q: Position, k: Position) -> bool:
        for axis in range(2):
            same_window = shifted(axis, q[axis]) // window == shifted(axis, k[axis]) // window
            same_side = (q[axis] < shift) == (k[axis] < shift)
            if not (same_window and same_side):
                return False
        return True

    def bias(head: int, q: Position, k: Position) -> float:
        dy, dx = shifted(0, q[0]) - shifted(0, k[0]), shifted(1, q[1]) - shifted(1, k[1])
        return table[(dy + window - 1) * (2 * window - 1) + dx + window - 1][head]

    return masked_attention(x, params, heads, sees, bias)


def shifted_window_attention(x: Array, params: Tree, *, heads: int, window: int) -> Result:
    """Apply window_attention with shift = ceil(window / 2)."""
    return window_attention(x, params, heads=heads, window=window, shift=math.ceil(window / 2))


def masked_attention(x: Array, params: Tree, heads: int, sees: Sees, bias: Bias) -> Result:
    """Compute self-attention of a map in which query pixel q attends to the pixels k with sees(q, k), with logits

    q . k / sqrt(d) + bias(head, q, k)
    """
    batch, channels, height, width = x.shape
    d = channels // heads
    qkv = linear(x, **params["qkv"])
    out, attention = np.zeros(x.shape), np.zeros((batch, heads, height * width, height * width))
    pixels = [(i, j) for i in range(height) for j in range(width)]
    seen = {q: [k for k in pixels if sees(q, k)] for q in pixels}
    for b in range(batch):
        vectors = {p: pixel(qkv, b, *p) for p in pixels}  # C queries, then C keys, then C values
        for h in range(heads):
            of_q = slice(h * d, (h + 1) * d)
            of_k = slice(channels + h * d, channels + (h + 1) * d)
            for q in pixels:
                logits = [dot(vectors[q][of_q], vectors[k][of_k]) * d**-0.5 + bias(h, q, k) for k in seen[q]]
                weights = softmax(logits)
                for k, weight in zip(seen[q], weights, strict=True):
                    attention[b, h, q[0] * width + q[1], k[0] * width + k[1]] = weight
                for c in range(h * d, (h + 1) * d):
                    out[b, c, q[0], q[1]] = dot(weights, [vectors[k][2 * channels + c] for k in seen[q]])
    return Result(linear(out, **params["output"]), attention)
