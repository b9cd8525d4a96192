"""Neighborhood attention for CPUs: tensors in and out; the work is done by `neighbors`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from . import _computed_in, _empty_like, _kept_in, _ready, launch, neighbors
from .neighbors import CHANNELS
from .patches import SPARE, Shape
from .quads import LANES, QUAD

Size = tuple[int, int]

_BANDS = 64  # of all maps, so that many threads find work
_ROWS = 8  # in a band, at least: bands share keys with their neighbors
_PIXELS = 4096  # in a band, at most, but for that


def warm(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Compile all there is for these dtypes, or load it from disk."""
    for dtype in dtypes:
        q, table = torch.ones(1, 1, 6, 2, dtype=dtype), torch.ones(1, 5, 5, dtype=dtype)
        how = {"size": (2, 3), "kernel": 3, "dilation": 1, "scale": 1.0}
        out, lse = neighborhood_forward(q, q, q, table, **how)  # type: ignore[arg-type]
        neighborhood_backward(q, q, q, q, table, out, lse, **how)  # type: ignore[arg-type]


def neighborhood_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    size: Size,
    kernel: int,
    dilation: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the K × K keys around each query.

        z = softmax(scale · q kᵀ + B̂[d + K - 1]) v        with d = key - query, in steps of δ

    Args:
        q, k, v: (B, heads, H·W, d), of any strides.
        table: B̂, (heads, 2K-1, 2K-1).
        size: (H, W).
        kernel: K.
        dilation: δ.

    Returns:
        z (B, heads, H·W, d) in the dtype of v, in memory as q is; and the logarithm of the sum of the exponentials of
        each query's logits, (B, heads, H·W). Half precision is computed in float32. A pixel that is NaN makes NaN of
        all queries that see it, and of their next neighbors.
    """
    dtype, threads = _computed_in(q, k, v), torch.get_num_threads()
    out = _empty_like(q, _kept_in(v.dtype, dtype))
    lse = torch.empty(q.shape[:3], dtype=dtype)
    if q.numel():
        planned = _plan(dtype, False, 0, *q.shape[:2], q.shape[3], *size, kernel, dilation, scale)
        tensors = {**_ready(dtype, q=q, k=k, v=v, table=table), "out": out, "lse": lse}
        launch.run(neighbors.forward, neighbors.FIELDS, dtype, planned, tensors, threads)
    return out.to(v.dtype), lse


def neighborhood_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    size: Size,
    kernel: int,
    dilation: int,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `neighborhood_forward` with respect to q, k, v and table.

    Args:
        grad_out: (B, heads, H·W, d).
        out, lse: what the forward pass returned; the other arguments are those that it got.
        deterministic: has no effect: sums are always taken in the same order, whatever the number of threads.
    """
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(table)
    dtype, threads = _computed_in(q, k, v), torch.get_num_threads()
    sizes = (*q.shape[:2], q.shape[3], *size, kernel, dilation)
    shape = make_shape(*sizes)
    grads = [_empty_like(q, _kept_in(q.dtype, dtype)), *(_empty_like(x, dtype) for x in (k, v))]
    for grad in grads[1:]:
        grad.zero_()
    grad_table = torch.empty(table.shape, dtype=dtype)
    tensors = _ready(dtype, q=q, k=k, v=v, table=table, out=out, lse=lse, grad_out=grad_out)
    tensors |= {"grad_q": grads[0], "grad_k": grads[1], "grad_v": grads[2], "grad_table": grad_table}
    tensors["grad_bias"] = torch.empty(_items(shape, shape.bands) * shape.blocks, dtype=dtype)
    for group in range(shape.apart):
        planned = _plan(dtype, True, group, *sizes, scale)
        launch.run(neighbors.backward, neighbors.FIELDS, dtype, planned, tensors, threads)
    planned = _plan(dtype, False, 0, *sizes, scale)
    launch.run(neighbors.add_bias_gradients, neighbors.FIELDS, dtype, planned, tensors, threads)
    of_q, of_k, of_v = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v)))
    return of_q, of_k, of_v, grad_table.to(table.dtype)


# ------------------------------------------------------------------------------------------------ sizes


@lru_cache(maxsize=256)
def _plan(
    dtype: torch.dtype,
    backward: bool,
    group: int,
    batch: int,
    heads: int,
    depth: int,
    height: int,
    width: int,
    kernel: int,
    dilation: int,
    scale: float,
) -> launch.Plan:
    """Return what a kernel is told but the addresses; `group` is one of `Shape.apart` groups of bands."""
    shape = make_shape(batch, heads, depth, height, width, kernel, dilation)
    bands = len(range(group, shape.bands, shape.apart)) if backward else shape.bands
    values = {**shape._asdict(), "group": group, "scale": scale}
    return launch.plan(neighbors.FIELDS, dtype, values, tuple(_places(shape, backward)), _items(shape, bands))


def _items(shape: Shape, bands: int) -> int:
    """Return how many bands there are of all heads and images, sub-maps below each other counted apart."""
    return shape.heads * shape.batch * min(shape.dilation, shape.height) * bands


@lru_cache(maxsize=256)
def make_shape(batch: int, heads: int, depth: int, height: int, width: int, kernel: int, dilation: int) -> Shape:
    """Cut a call into bands, and size what they are packed into.

    >>> make_shape(1, 2, 32, 56, 56, 7, 1)[7:12]  # keys that a query sees down and across, rows, bands, groups
    (7, 7, 8, 7, 2)
    """
    down, across = (min(kernel, max(length // dilation, 1)) for length in (height, width))
    rows, columns = -(-height // dilation), -(-width // dilation)  # of the largest sub-map
    wanted = -(-_BANDS // (batch * heads * dilation))
    band = max(min(-(-rows // wanted), _PIXELS // columns), _ROWS)
    band += band % 2
    apart = max(_bands_apart(length, band, down) for length in {rows, max(height // dilation, 1)})
    pixel = -(-depth // CHANNELS) * CHANNELS
    phases = -(-2 * kernel // LANES) * QUAD
    return Shape(
        batch, heads, height, width, depth, kernel, dilation, down, across, band, -(-rows // band), apart, pixel,
        (columns + SPARE) * pixel, 2 * kernel * QUAD * phases * LANES, phases, phases * QUAD + LANES,
    )  # fmt: skip


def _bands_apart(length: int, band: int, seen: int) -> int:
    """Return how far apart bands of a sub-map of so many rows must be to have no key in common."""
    bands = list(_keys_of_bands(length, band, seen))
    apart = 1
    for number, (_, stop) in enumerate(bands):
        while number + apart < len(bands) and bands[number + apart][0] < stop:
            apart += 1
    return apart


def _keys_of_bands(length: int, band: int, seen: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, band):
        last = min(first + band, length) - 1
        start, end = (max(min(query - seen // 2, length - seen), 0) for query in (first, last))
        yield start, end + seen


def _places(shape: Shape, backward: bool) -> Iterator[int]:
    """Return where each array of `neighbors.Forward` or `Backward` begins, and the end: whole cache lines apart."""
    keys, queries = (shape.band + shape.down) * shape.line, shape.band * shape.line
    window = -(-(shape.across + 1) // QUAD) * LANES  # scores of a row of keys
    scores, four, margined = (shape.down + 1) * window, QUAD * shape.pixel, (2 * shape.kernel + 1) * shape.margined
    if backward:
        deltas = queries // shape.pixel
        sizes: tuple[int, ...] = (*4 * (keys,), *3 * (queries,), 3 * window, 2 * four, scores, scores, LANES, deltas)
    else:
        sizes = (keys, keys, queries, queries, 3 * window, four, scores, LANES)
    return accumulate((-(-size // 64) * 64 for size in (shape.blocks, margined, *sizes)), initial=0)
