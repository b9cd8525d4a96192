"""Neighborhood attention on CPUs: tensor interface of `neighborhood_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from . import _compute_dtype, _empty_like, _prepare, _storage_dtype, launch, neighborhood_kernels
from .lane_shuffles import LANES, QUAD
from .neighborhood_kernels import CHANNELS, Backward, Forward
from .neighborhood_packing import PAD_PIXELS, Shape

Size = tuple[int, int]

_TARGET_BANDS = 64  # bands of all maps together, enough work items for many threads
_MIN_BAND_ROWS = 8  # rows of a band, at least: neighboring bands share keys, which are packed twice
_MAX_BAND_PIXELS = 4096  # pixels of a band, at most; _MIN_BAND_ROWS has priority


def warm(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Compile all kernels for the given dtypes, or load them from the on-disk cache."""
    for dtype in dtypes:
        q, table = torch.ones(1, 1, 6, 2, dtype=dtype), torch.ones(1, 5, 5, dtype=dtype)
        options = {"size": (2, 3), "kernel": 3, "dilation": 1, "scale": 1.0}
        out, lse = neighborhood_forward(q, q, q, table, **options)  # type: ignore[arg-type]
        neighborhood_backward(q, q, q, q, table, out, lse, **options)  # type: ignore[arg-type]


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
        q, k, v: (B, heads, H·W, d), any strides.
        table: B̂, (heads, 2K-1, 2K-1).
        size: (H, W).
        kernel: K, keys per axis.
        dilation: δ, distance in pixels between neighboring keys.
        scale: factor of the dot products.

    Returns:
        z (B, heads, H·W, d), in the dtype of v and the memory layout of q; and lse (B, heads, H·W), the log-sum-exp of
        each query's logits. Half precision is computed in float32. A NaN pixel gives NaN in all queries that attend to
        it, and in queries next to those.
    """
    dtype, threads = _compute_dtype(q, k, v), torch.get_num_threads()
    out = _empty_like(q, _storage_dtype(v.dtype, dtype))
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    if q.numel():
        packed = _pack_arguments(dtype, False, 0, *q.shape[:2], q.shape[3], *size, kernel, dilation, scale)
        tensors = {**_prepare(dtype, q=q, k=k, v=v, table=table), "out": out, "lse": lse}
        launch.run(neighborhood_kernels.forward, neighborhood_kernels.FIELDS, dtype, packed, tensors, threads)
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
        out, lse: outputs of `neighborhood_forward`. All other arguments are the same as in the forward call.
        deterministic: no effect; the order of summation is fixed and does not depend on the number of threads.
    """
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(table)
    dtype, threads = _compute_dtype(q, k, v), torch.get_num_threads()
    sizes = (*q.shape[:2], q.shape[3], *size, kernel, dilation)
    shape = make_shape(*sizes)
    grads = [_empty_like(q, _storage_dtype(q.dtype, dtype)), *(_empty_like(x, dtype) for x in (k, v))]
    for grad in grads[1:]:
        grad.zero_()
    grad_table = torch.empty(table.shape, dtype=dtype)
    tensors = _prepare(dtype, q=q, k=k, v=v, table=table, out=out, lse=lse, grad_out=grad_out)
    tensors |= {"grad_q": grads[0], "grad_k": grads[1], "grad_v": grads[2], "grad_table": grad_table}
    tensors["grad_bias"] = torch.empty(_work_items(shape, shape.num_bands) * shape.bias_size, dtype=dtype)
    for group in range(shape.band_groups):
        packed = _pack_arguments(dtype, True, group, *sizes, scale)
        launch.run(neighborhood_kernels.backward, neighborhood_kernels.FIELDS, dtype, packed, tensors, threads)
    packed = _pack_arguments(dtype, False, 0, *sizes, scale)
    launch.run(neighborhood_kernels.add_bias_gradients, neighborhood_kernels.FIELDS, dtype, packed, tensors, threads)
    grad_q, grad_k, grad_v = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v)))
    return grad_q, grad_k, grad_v, grad_table.to(table.dtype)


# ------------------------------------------------------------------------------------------------ sizes


@lru_cache(maxsize=256)
def _pack_arguments(
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
) -> launch.PackedArguments:
    """Return the kernel arguments without the addresses.

    Args:
        group: index of the group of bands, less than `Shape.band_groups`; used only by the backward kernel.
    """
    shape = make_shape(batch, heads, depth, height, width, kernel, dilation)
    bands = len(range(group, shape.num_bands, shape.band_groups)) if backward else shape.num_bands
    values = {**shape._asdict(), "group": group, "scale": scale}
    return launch.pack_arguments(
        neighborhood_kernels.FIELDS, dtype, values, _scratch_sizes(shape, backward), _work_items(shape, bands)
    )


def _work_items(shape: Shape, bands: int) -> int:
    """Return the number of work items: bands of all heads, images and first rows of sub-maps.

    The sub-maps that start in the same row are one work item.
    """
    return shape.heads * shape.batch * min(shape.dilation, shape.height) * bands


@lru_cache(maxsize=256)
def make_shape(batch: int, heads: int, depth: int, height: int, width: int, kernel: int, dilation: int) -> Shape:
    """Return the band sizes and the packed memory layout of a call.

    >>> make_shape(1, 2, 32, 56, 56, 7, 1)[7:12]  # keys_y, keys_x, band_rows, num_bands, band_groups
    (7, 7, 8, 7, 2)
    """
    keys_y, keys_x = (min(kernel, max(length // dilation, 1)) for length in (height, width))
    rows, columns = -(-height // dilation), -(-width // dilation)  # size of the largest sub-map
    bands_per_map = -(-_TARGET_BANDS // (batch * heads * dilation))
    band_rows = max(min(-(-rows // bands_per_map), _MAX_BAND_PIXELS // columns), _MIN_BAND_ROWS)
    band_rows += band_rows % 2
    band_groups = max(_num_band_groups(length, band_rows, keys_y) for length in {rows, max(height // dilation, 1)})
    pixel_stride = -(-depth // CHANNELS) * CHANNELS
    phases = -(-2 * kernel // LANES) * QUAD
    return Shape(
        batch=batch, heads=heads, height=height, width=width, depth=depth, kernel=kernel, dilation=dilation,
        keys_y=keys_y, keys_x=keys_x, band_rows=band_rows, num_bands=-(-rows // band_rows), band_groups=band_groups,
        pixel_stride=pixel_stride, row_stride=(columns + PAD_PIXELS) * pixel_stride,
        bias_size=2 * kernel * QUAD * phases * LANES, phases=phases, table_row_stride=phases * QUAD + LANES,
    )  # fmt: skip


def _num_band_groups(length: int, band: int, num_keys: int) -> int:
    """Return the smallest n for which bands i and i + n of a sub-map have no key in common.

    Args:
        length: rows of the sub-map.
        band: rows of a band.
        num_keys: keys per query on this axis.
    """
    bands = list(_band_key_ranges(length, band, num_keys))
    band_groups = 1
    for index, (_, stop) in enumerate(bands):
        while index + band_groups < len(bands) and bands[index + band_groups][0] < stop:
            band_groups += 1
    return band_groups


def _band_key_ranges(length: int, band: int, num_keys: int) -> Iterator[tuple[int, int]]:
    """Yield the range of key rows, [start, stop), of each band of a sub-map."""
    for first in range(0, length, band):
        last = min(first + band, length) - 1
        start, end = (max(min(query - num_keys // 2, length - num_keys), 0) for query in (first, last))
        yield start, end + num_keys


def _scratch_sizes(shape: Shape, backward: bool) -> Forward | Backward:
    """Return the elements of each scratch array."""
    keys, queries = (shape.band_rows + shape.keys_y) * shape.row_stride, shape.band_rows * shape.row_stride
    window = -(-(shape.keys_x + 1) // QUAD) * LANES  # logits per row of keys
    logits, quads = (shape.keys_y + 1) * window, QUAD * shape.pixel_stride
    bias, padded_table = shape.bias_size, (2 * shape.kernel + 1) * shape.table_row_stride
    if not backward:
        return Forward(
            bias=bias, padded_table=padded_table, keys=keys, values=keys, queries=queries, out=queries,
            masks=3 * window, quad_queries=quads, logits=logits, factors=LANES,
        )  # fmt: skip
    return Backward(
        bias=bias, padded_table=padded_table, keys=keys, values=keys, grad_keys=keys, grad_values=keys,
        queries=queries, grad_out=queries, grad_queries=queries, masks=3 * window, quad_queries=quads,
        quad_grad_out=quads, weights=logits, grad_logits=logits, factors=LANES, delta=queries // shape.pixel_stride,
    )  # fmt: skip
