"""Deformable attention kernels with a relative position bias: FlashAttention-style forward and backward.

    S[n] = k[n]·q / √d + B[n],    O = Σ_n e^S[n] v[n] / Σ_n e^S[n]            for each query

The forward kernel processes one block of keys at a time for a tile of queries. It writes the bias into the tile of
logits, adds the product k qᵀ, and updates the online softmax: running maximum m, running sum l and accumulator acc. So
the full logit matrix never exists. The backward kernel recomputes the logits. With the log-sum-exp L from the forward
pass, the weights are P = e^(S - L), and the gradients are

    ∂V = P ∂O,    ∂S = P (V ∂O - ∂O·O),    ∂Q = ∂Sᵀ K / √d,    ∂K = ∂S Q / √d,    ∂B = ∂S.

The kernels compute powers of 2: queries and table are multiplied by log₂ e on load.
"""

from __future__ import annotations

import math
from typing import Any

from numba import carray

from .bias import Step, Table, Tile, add_bias_gradients, fill_table, write_bias
from .launch import ArgumentLayout, array_reader
from .strided_io import StridedTensor, load_rows, store_rows, strided_tensor
from .tiles import TILE_STRIDE, add_outer, add_product, copy_rows, transpose
from .tiling import BLOCK_N, Backward, Forward, Tiling
from .vectors import (
    NARROW,
    PAIR,
    WIDE,
    array_at,
    broadcast,
    compiled,
    exp2,
    fetch_add,
    lane_sum,
    load,
    log2,
    maximum,
    store,
)

LOG2_E = math.log2(math.e)
M_INIT = -1e30  # below any logit, but finite, so that differences are not NaN

FIELDS = ArgumentLayout(
    module=__name__,
    integers=(
        *("batch", "heads", "groups", "height", "width", "samples", "depth", "table_rows", "table_columns"),
        *(*Tiling._fields, "step_kind"),
    ),
    floats=("step_y", "step_x", "scale"),
    operands=("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"),
    addresses=("origin", "table", "lse", "grad_origin", "grad_table"),
)


_forward_arrays, _backward_arrays = array_reader(Forward), array_reader(Backward)


# ------------------------------------------------------------------------------------------------ rows and tiles


@compiled
def _load(
    target: Any, call: Any, source: StridedTensor, image: int, head: int, row: int, rows: int, factor: float
) -> None:
    """Copy rows of channels from a tensor to scratch memory, multiplied by a factor."""
    start = image * source.image_stride + head * source.head_stride + row * source.row_stride
    load_rows(target, 0, call.padded_depth, source, start, source.row_stride, rows, call.depth, factor)


@compiled
def _store(
    target: StridedTensor, image: int, head: int, row: int, rows: int, call: Any, source: Any, factor: float
) -> None:
    """Copy rows of channels from scratch memory to a tensor, multiplied by a factor."""
    start = image * target.image_stride + head * target.head_stride + row * target.row_stride
    store_rows(target, start, target.row_stride, source, 0, call.padded_depth, rows, call.depth, factor)


@compiled
def _tile(call: Any, index: int) -> Any:
    """Return the tile with this index, the index of its first query, and its number of queries."""
    across = -(-call.width // call.tile_columns)
    row, column = index // across * call.tile_rows, index % across * call.tile_columns
    tile = Tile(row, column, min(call.tile_rows, call.height - row), min(call.tile_columns, call.width - column))
    return tile, row * call.width + column, tile.rows * tile.columns


@compiled
def _table(call: Any, cells: Any) -> Table:
    return Table(cells, call.table_start, call.table_stride, call.table_rows, call.table_columns)


@compiled
def _fill_table(call: Any, cells: Any, head: int) -> None:
    """Copy the table of a head to scratch memory."""
    entries = array_at(call.table, call.zero)
    fill_table(_table(call, cells), entries, head * call.table_rows * call.table_columns, LOG2_E)


@compiled
def _step(call: Any) -> Step:
    return Step(call.step_kind, call.step_y, call.step_x)


@compiled
def _scratch(call: Any) -> Any:
    """Return the scratch memory of this thread."""
    return array_at(call.scratch + fetch_add(call, 1) * call.scratch_size, call.zero)


@compiled
def _is_wide(lanes: int) -> bool:
    """Return whether the next strip of the remaining lanes should be wide. Narrow strips run at half the speed."""
    return lanes > WIDE // 2


# ------------------------------------------------------------------------------------------------ forward


def forward(pointer: Any) -> None:
    """Forward kernel, see `launch`. A work item is a range of the tiles of all heads and images."""
    call = carray(pointer, 1)[0]
    memory = _forward_arrays(_scratch(call), call.array_offsets)
    num_tiles = call.heads * call.batch * call.tiles
    head = -1
    work_item = fetch_add(call, 0)
    while work_item < call.work_items:
        first = num_tiles * work_item // call.work_items
        for tile_index in range(first, num_tiles * (work_item + 1) // call.work_items):
            if head != tile_index // (call.batch * call.tiles):
                head = tile_index // (call.batch * call.tiles)
                _fill_table(call, memory.table, head)
            _forward_tile(call, memory, tile_index // call.tiles % call.batch, head, tile_index % call.tiles)
        work_item = fetch_add(call, 0)


@compiled
def _forward_tile(call: Any, memory: Forward, image: int, head: int, tile_index: int) -> None:
    tile, first, num_queries = _tile(call, tile_index)
    _load(memory.query_rows, call, strided_tensor(call, call.q), image, head, first, num_queries, call.scale * LOG2_E)
    transpose(memory.queries, TILE_STRIDE, memory.query_rows, call.padded_depth, num_queries, call.depth)
    memory.m[:] = M_INIT
    memory.l[:] = 0
    memory.acc[: call.depth * TILE_STRIDE] = 0
    k, v = strided_tensor(call, call.k), strided_tensor(call, call.v)
    origin, step, table = array_at(call.origin, call.zero), _step(call), _table(call, memory.table)
    first_point = (image * call.groups + head * call.groups // call.heads) * call.samples
    for key in range(0, call.samples, BLOCK_N):
        num_keys = min(BLOCK_N, call.samples - key)
        _load(memory.keys, call, k, image, head, key, num_keys, 1.0)
        _load(memory.values, call, v, image, head, key, num_keys, 1.0)
        write_bias(memory.logits, table, origin, 2 * (first_point + key), num_keys, tile, step)
        lane = 0
        while lane < num_queries:
            if _is_wide(num_queries - lane):
                _attend(call, memory, num_keys, lane, broadcast(call.zero, WIDE))
                lane += WIDE
            else:
                _attend(call, memory, num_keys, lane, broadcast(call.zero, NARROW))
                lane += NARROW
    _normalize(call, memory, num_queries)
    _store(strided_tensor(call, call.out), image, head, first, num_queries, call, memory.query_rows, 1.0)
    first_query = (image * call.heads + head) * call.height * call.width + first
    copy_rows(array_at(call.lse, call.zero), first_query, 0, memory.m, 0, 0, 1, num_queries, 1.0)


@compiled
def _attend(call: Any, memory: Forward, num_keys: int, lane: int, like: Any) -> None:
    """Update m, l and acc of a strip of queries with one block of keys."""
    padded_depth, logits, depth = call.padded_depth, memory.logits, call.depth
    one = like * 0 + 1
    add_product(logits, one, memory.keys, padded_depth, 1, memory.queries, num_keys, depth, lane)
    m_old = load(memory.m, lane, like)
    m_new = m_old
    for n in range(num_keys):
        m_new = maximum(load(logits, n * TILE_STRIDE + lane, like), m_new)
    alpha = exp2(m_old - m_new)
    l = load(memory.l, lane, like) * alpha
    for n in range(num_keys):
        weight = exp2(load(logits, n * TILE_STRIDE + lane, like) - m_new)
        store(logits, n * TILE_STRIDE + lane, weight)
        l += weight
    store(memory.m, lane, m_new)
    store(memory.l, lane, l)
    add_product(memory.acc, alpha, memory.values, 1, padded_depth, logits, depth, num_keys, lane)


@compiled
def _normalize(call: Any, memory: Forward, num_queries: int) -> None:
    """Write acc / l to `query_rows`, and replace m by the log-sum-exp."""
    for lane in range(0, num_queries, NARROW):
        l = load(memory.l, lane, broadcast(call.zero, NARROW))
        inv_l = 1 / l
        for c in range(call.depth):
            store(memory.acc, c * TILE_STRIDE + lane, load(memory.acc, c * TILE_STRIDE + lane, inv_l) * inv_l)
        store(memory.m, lane, (load(memory.m, lane, l) + log2(l)) * (1 / LOG2_E))
    transpose(memory.query_rows, call.padded_depth, memory.acc, TILE_STRIDE, call.depth, num_queries)


# ------------------------------------------------------------------------------------------------ backward


def backward(pointer: Any) -> None:
    """Backward kernel, see `launch`. A work item is one split of the queries of one image and head."""
    call = carray(pointer, 1)[0]
    memory = _backward_arrays(_scratch(call), call.array_offsets)
    head = -1
    work_item = fetch_add(call, 0)
    while work_item < call.work_items:
        if head != work_item // (call.batch * call.splits):
            head = work_item // (call.batch * call.splits)
            _fill_table(call, memory.table, head)
        _backward_split(call, memory, work_item // call.splits % call.batch, head, work_item % call.splits)
        work_item = fetch_add(call, 0)


@compiled
def _backward_split(call: Any, memory: Backward, image: int, head: int, split: int) -> None:
    """Compute the gradients of a split's queries, and its contributions to keys, values, points and table."""
    memory.grad_table[:] = 0
    memory.grad_keys[:] = 0
    memory.grad_values[:] = 0
    row = (head * call.batch + image) * call.splits + split
    grad_points = array_at(call.grad_origin, call.zero)[2 * row * call.samples : 2 * (row + 1) * call.samples]
    grad_points[:] = 0
    for tile_index in range(call.tiles * split // call.splits, call.tiles * (split + 1) // call.splits):
        _backward_tile(call, memory, grad_points, image, head, tile_index)
    # The gradients of keys and points contain the factor log₂ e of queries and table; remove it.
    split_image = image * call.splits + split
    _store(strided_tensor(call, call.grad_k), split_image, head, 0, call.samples, call, memory.grad_keys, 1 / LOG2_E)
    _store(strided_tensor(call, call.grad_v), split_image, head, 0, call.samples, call, memory.grad_values, 1.0)
    for n in range(2 * call.samples):
        grad_points[n] *= 1 / LOG2_E
    grad_table, cells = _table(call, memory.grad_table), array_at(call.grad_table, call.zero)
    copy_rows(
        cells, row * grad_table.rows * grad_table.columns, grad_table.columns, grad_table.cells, grad_table.start,
        grad_table.stride, grad_table.rows, grad_table.columns, 1.0,
    )  # fmt: skip


@compiled
def _backward_tile(call: Any, memory: Backward, grad_points: Any, image: int, head: int, tile_index: int) -> None:
    tile, first, num_queries = _tile(call, tile_index)
    _load_tile(call, memory, image, head, first, num_queries)
    k, v = strided_tensor(call, call.k), strided_tensor(call, call.v)
    origin, step, table = array_at(call.origin, call.zero), _step(call), _table(call, memory.table)
    first_point = (image * call.groups + head * call.groups // call.heads) * call.samples
    for key in range(0, call.samples, BLOCK_N):
        num_keys = min(BLOCK_N, call.samples - key)
        _load(memory.keys, call, k, image, head, key, num_keys, 1.0)
        _load(memory.values, call, v, image, head, key, num_keys, 1.0)
        write_bias(memory.logits, table, origin, 2 * (first_point + key), num_keys, tile, step)
        lane = 0
        while lane < num_queries:
            if _is_wide(num_queries - lane):
                _attend_backward(call, memory, num_keys, lane, broadcast(call.zero, WIDE))
                lane += WIDE
            else:
                _attend_backward(call, memory, num_keys, lane, broadcast(call.zero, NARROW))
                lane += NARROW
        _add_key_gradients(call, memory, key, num_keys, num_queries)
        add_bias_gradients(
            memory.grad_logits, table, _table(call, memory.grad_table), origin, 2 * (first_point + key), grad_points,
            2 * key, num_keys, tile, step,
        )  # fmt: skip
    transpose(memory.query_rows, call.padded_depth, memory.grad_queries, TILE_STRIDE, call.depth, num_queries)
    _store(strided_tensor(call, call.grad_q), image, head, first, num_queries, call, memory.query_rows, call.scale)


@compiled
def _load_tile(call: Any, memory: Backward, image: int, head: int, first: int, num_queries: int) -> None:
    """Load queries, grad_out and lse of a tile, compute delta, and zero the gradient of the queries."""
    padded_depth, depth = call.padded_depth, call.depth
    _load(memory.query_rows, call, strided_tensor(call, call.q), image, head, first, num_queries, call.scale * LOG2_E)
    transpose(memory.queries, TILE_STRIDE, memory.query_rows, padded_depth, num_queries, depth)
    _load(memory.grad_out_rows, call, strided_tensor(call, call.grad_out), image, head, first, num_queries, 1.0)
    transpose(memory.grad_out, TILE_STRIDE, memory.grad_out_rows, padded_depth, num_queries, depth)
    first_query = (image * call.heads + head) * call.height * call.width + first
    copy_rows(memory.lse, 0, 0, array_at(call.lse, call.zero), first_query, 0, 1, num_queries, LOG2_E)
    # `grad_queries` is still unused; it serves as a buffer for the output.
    _load(memory.grad_queries, call, strided_tensor(call, call.out), image, head, first, num_queries, 1.0)
    for query in range(num_queries):
        memory.delta[query] = _dot(memory.grad_out_rows, memory.grad_queries, query * padded_depth, depth)
    memory.grad_queries[: depth * TILE_STRIDE] = 0


@compiled
def _dot(a: Any, b: Any, start: int, length: int) -> float:
    zero = broadcast(a[0], NARROW) * 0
    total = zero
    vectorized = length - length % NARROW
    for j in range(0, vectorized, NARROW):
        total += load(a, start + j, zero) * load(b, start + j, zero)
    result = lane_sum(total)
    for j in range(vectorized, length):
        result += a[start + j] * b[start + j]
    return result


@compiled
def _attend_backward(call: Any, memory: Backward, num_keys: int, lane: int, like: Any) -> None:
    """Compute weights and logit gradients of a strip of queries and a block of keys; accumulate grad_queries."""
    padded_depth, depth, logits, grad_logits = call.padded_depth, call.depth, memory.logits, memory.grad_logits
    one = like * 0 + 1
    add_product(logits, one, memory.keys, padded_depth, 1, memory.queries, num_keys, depth, lane)
    lse, delta = load(memory.lse, lane, like), load(memory.delta, lane, like)
    for n in range(num_keys):
        offset = n * TILE_STRIDE + lane
        store(logits, offset, exp2(load(logits, offset, like) - lse))
        store(grad_logits, offset, 0 - delta)
    add_product(grad_logits, one, memory.values, padded_depth, 1, memory.grad_out, num_keys, depth, lane)
    for n in range(num_keys):
        offset = n * TILE_STRIDE + lane
        store(grad_logits, offset, load(grad_logits, offset, like) * load(logits, offset, like))
    add_product(memory.grad_queries, one, memory.keys, 1, padded_depth, grad_logits, depth, num_keys, lane)


@compiled
def _add_key_gradients(call: Any, memory: Backward, key: int, num_keys: int, num_queries: int) -> None:
    padded_depth, like = call.padded_depth, broadcast(call.zero, PAIR)
    for channel in range(0, call.depth, PAIR):
        add_outer(
            memory.grad_values, key * padded_depth, memory.logits, memory.grad_out_rows, padded_depth, num_keys,
            num_queries, channel, like,
        )  # fmt: skip
        add_outer(
            memory.grad_keys, key * padded_depth, memory.grad_logits, memory.query_rows, padded_depth, num_keys,
            num_queries, channel, like,
        )  # fmt: skip
