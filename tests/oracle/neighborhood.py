"""Neighborhood attention: a pixel attends to the K x K pixels around it, shifted inwards at a border.

On an axis of length L the neighbors of pixel i are the K pixels from clip(i - K // 2, 0, L - K) on.

    out(m) = sum_n softmax_n(q(m) . k(n) / sqrt(d) + rpb[head, n_y - m_y + K - 1, n_x - m_x + K - 1]) v(n)

over the neighbors n of m; [q, k, v] = qkv(x), y = output(out).
params: {"qkv": {"weight" (3C, C), "bias"}, "output": {"weight" (C, C), "bias"},
         "rpb" (heads, 2K - 1, 2K - 1)}

Two rules for a map that is shorter than K on an axis, where K neighbors do not exist:
    "pad"     the input is extended with zeros at bottom or right to K; the added pixels are keys like any
              other (their key and value are the projection's bias), and the output is cropped
    "shrink"  on that axis the neighbors are all L pixels; rpb is indexed by displacement, as above
"""

import numpy as np

from .basic import Array, Tree
from .windows import Position, Result, masked_attention


def neighborhood_attention(x: Array, params: Tree, *, heads: int, kernel_size: int, small_map: str = "pad") -> Result:
    """Apply neighborhood attention to x (B, C, H, W). With "pad" the attention covers the padded map."""
    if small_map not in ("pad", "shrink"):
        raise ValueError(f"small_map: expected 'pad' or 'shrink', got {small_map!r}")
    height, width = x.shape[2:]
    if small_map == "pad":
        x = extend(x, max(height, kernel_size), max(width, kernel_size))
    size = (x.shape[2], x.shape[3])
    table: list[list[list[float]]] = np.asarray(params["rpb"]).tolist()

    def sees(q: Position, k: Position) -> bool:
        return all(k[axis] in neighbors(q[axis], size[axis], kernel_size) for axis in range(2))

    def bias(head: int, q: Position, k: Position) -> float:
        return table[head][k[0] - q[0] + kernel_size - 1][k[1] - q[1] + kernel_size - 1]

    result = masked_attention(x, params, heads, sees, bias)
    return Result(result.output[:, :, :height, :width], result.attention)


def neighbors(i: int, length: int, kernel_size: int) -> range:
    """Return the neighbors of pixel i on an axis: K of them, or all pixels if there are fewer than K."""
    count = min(kernel_size, length)
    start = min(max(i - count // 2, 0), length - count)
    return range(start, start + count)


def extend(x: Array, height: int, width: int) -> Array:
    """Return x with zeros added at bottom and right."""
    y = np.zeros((*x.shape[:2], height, width))
    for index in np.ndindex(*x.shape):
        y[index] = x[index]
    return y
