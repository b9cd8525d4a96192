"""Neighborhood attention kernels, forward and backward, with a relative position bias.

    S = q·k / √d + B,    O = Σ e^S v / Σ e^S            sums over the K × K keys around each query

A tile has 2 × 2 queries. Its logits fit into a few vectors, so the softmax needs no running maximum, and no key is
copied per query. The backward pass recomputes the logits. With the log-sum-exp L from the forward pass, the weights are
P = e^(S - L), and the gradients are

    ∂V = P ∂O,    ∂S = P (∂O·V - ∂O·O),    ∂Q = ∂S K / √d,    ∂K = ∂S Q / √d,    ∂B = ∂S.

A key belongs to the windows of several bands. Bands without a common key run in parallel, and the gradient of a key is
accumulated band by band in a fixed order. So the result does not depend on the number of threads.

The kernels compute powers of 2: queries and table are multiplied by log₂ e on load.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import carray

from .lane_shuffles import (
    LANES,
    QUAD,
    broadcast_quads,
    inlined,
    interleave,
    load_broadcast_quad,
    quad_maximum,
    quad_sum,
    quad_sums,
)
from .launch import ArgumentLayout, array_reader
from .neighborhood_packing import (
    LOG2_E,
    NO_WINDOW,
    Map,
    Shape,
    Tile,
    add_packed,
    bias_offset,
    column_windows,
    fill_bias,
    fill_masks,
    fold_bias,
    load_shape,
    make_map,
    make_tile,
    mask_index,
    pack,
    query_index,
    unpack,
)
from .strided_io import strided_tensor
from .vectors import (
    array_at,
    broadcast,
    compiled,
    exp2,
    fetch_add,
    lane_sum,
    load,
    load_broadcast,
    log2,
    maximum,
    store,
    where_not_negative,
)

CHANNELS = 2 * LANES  # channels per vector of an accumulator
M_INIT = -1e38  # below any logit, but finite: a missing query of a tile has all keys masked
MIN_EXPONENT = 126.0  # weights of 2^-126 or less become exactly 0, so masked keys contribute nothing

FIELDS = ArgumentLayout(
    module=__name__,
    integers=(*Shape._fields, "group"),
    floats=("scale",),
    operands=("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"),
    addresses=("table", "lse", "grad_bias", "grad_table"),
)


# ------------------------------------------------------------------------------------------------ products


@inlined
def _interleave_queries(target: Any, source: Any, tile: Tile, shape: Shape, factor: float, like: Any) -> None:
    """Write the four queries of a tile in the layout of `_dots`: four channels of each query per vector."""
    start = tile.queries
    for channel in range(0, shape.pixel_stride, LANES):
        interleave(
            target, QUAD * channel, factor * load(source, start, like), factor * load(source, start + tile.right, like),
            factor * load(source, start + tile.below, like),
            factor * load(source, start + tile.below + tile.right, like),
        )  # fmt: skip
        start += LANES


@inlined
def _dots(queries: Any, keys: Any, start: int, pixel_stride: int, zero: Any) -> Any:
    """Return the dot products of four queries with a block of four keys, in lane 4·query + key."""
    dots0, dots1, dots2, dots3 = zero, zero, zero, zero
    for channel in range(0, pixel_stride, QUAD):
        quad_queries = load(queries, QUAD * channel, zero)
        key = start + channel
        dots0 += load_broadcast_quad(keys, key, zero) * quad_queries
        dots1 += load_broadcast_quad(keys, key + pixel_stride, zero) * quad_queries
        dots2 += load_broadcast_quad(keys, key + 2 * pixel_stride, zero) * quad_queries
        dots3 += load_broadcast_quad(keys, key + 3 * pixel_stride, zero) * quad_queries
    return quad_sums(dots0, dots1, dots2, dots3)


@inlined
def _exp2_masked(logits: Any, zero: Any) -> Any:
    """Return 2^logits, and exactly 0 for masked keys (logits of -MIN_EXPONENT or less)."""
    return where_not_negative(-MIN_EXPONENT - logits, zero, exp2(logits))


@inlined
def _weighted_sum(target: Any, tile: Tile, weights: Any, rows: Any, factors: Any, shape: Shape, zero: Any) -> None:
    """target[query] = factor · Σ_key weight[query, key] · row[key]"""
    for channel in range(0, shape.pixel_stride, CHANNELS):
        sum0, sum1, sum2, sum3 = zero, zero, zero, zero
        weight = 0
        for row in range(tile.rows):
            offset = tile.keys + row * shape.row_stride + channel
            for _ in range(tile.blocks):
                for _ in range(QUAD):
                    key = load(rows, offset, zero)
                    sum0 += load_broadcast(weights, weight, zero) * key
                    sum1 += load_broadcast(weights, weight + QUAD, zero) * key
                    sum2 += load_broadcast(weights, weight + 2 * QUAD, zero) * key
                    sum3 += load_broadcast(weights, weight + 3 * QUAD, zero) * key
                    offset += shape.pixel_stride
                    weight += 1
                weight += LANES - QUAD
        # Store the first query last: a missing neighbor is stored at the same address.
        target_start = tile.queries + channel
        store(target, target_start + tile.below + tile.right, sum3 * load_broadcast(factors, 3 * QUAD, zero))
        store(target, target_start + tile.below, sum2 * load_broadcast(factors, 2 * QUAD, zero))
        store(target, target_start + tile.right, sum1 * load_broadcast(factors, QUAD, zero))
        store(target, target_start, sum0 * load_broadcast(factors, 0, zero))


@inlined
def _add_outer(target: Any, tile: Tile, weights: Any, rows: Any, shape: Shape, zero: Any) -> None:
    """target[key] += Σ_query weight[query, key] · row[query]"""
    for channel in range(0, shape.pixel_stride, CHANNELS):
        first = tile.queries + channel
        query0, query1 = load(rows, first, zero), load(rows, first + tile.right, zero)
        query2, query3 = load(rows, first + tile.below, zero), load(rows, first + tile.below + tile.right, zero)
        weight = 0
        for row in range(tile.rows):
            offset = tile.keys + row * shape.row_stride + channel
            for _ in range(tile.blocks):
                for _ in range(QUAD):
                    acc = load(target, offset, zero)
                    acc += load_broadcast(weights, weight, zero) * query0
                    acc += load_broadcast(weights, weight + QUAD, zero) * query1
                    acc += load_broadcast(weights, weight + 2 * QUAD, zero) * query2
                    acc += load_broadcast(weights, weight + 3 * QUAD, zero) * query3
                    store(target, offset, acc)
                    offset += shape.pixel_stride
                    weight += 1
                weight += LANES - QUAD


# ------------------------------------------------------------------------------------------------ forward


class Forward(NamedTuple):
    """Scratch arrays of a thread in the forward kernel."""

    bias: Any
    padded_table: Any
    keys: Any  # packed rows of pixels
    values: Any
    queries: Any
    out: Any
    masks: Any
    quad_queries: Any  # interleaved queries of a tile
    logits: Any  # logits of a tile, then weights
    factors: Any  # 1 / l, one query per quad


_forward_arrays = array_reader(Forward)


@compiled
def _zeroed_scratch(call: Any) -> Any:
    """Return the scratch memory of this thread, zeroed, because packed pixels may have padding channels."""
    memory = array_at(call.scratch + fetch_add(call, 1) * call.scratch_size, call.zero)
    memory = memory[: call.scratch_size // memory.itemsize]
    memory[:] = 0
    return memory


def forward(call: Any) -> None:
    """Forward kernel. Each thread processes one band of a map after the other until no work item is left."""
    call = carray(call, 1)[0]
    memory, shape = _forward_arrays(_zeroed_scratch(call), call.array_offsets), load_shape(call)
    head, work_item = -1, fetch_add(call, 0)
    while work_item < call.work_items:
        for column in range(min(shape.dilation, shape.width)):
            map_ = make_map(work_item // shape.num_bands, column, work_item % shape.num_bands, shape)
            if head != map_.head:
                head = map_.head
                fill_bias(memory.bias, memory.padded_table, array_at(call.table, call.zero), head, shape)
            if map_.first_row < map_.stop_row:  # false for the last band of a shorter sub-map
                _forward_band(call, memory, map_, shape)
        work_item = fetch_add(call, 0)


@compiled
def _forward_band(call: Any, memory: Forward, map_: Map, shape: Shape) -> None:
    pack(memory.queries, strided_tensor(call, call.q), map_, map_.first_row, map_.stop_row, shape)
    pack(memory.keys, strided_tensor(call, call.k), map_, map_.first_key_row, map_.stop_key_row, shape)
    pack(memory.values, strided_tensor(call, call.v), map_, map_.first_key_row, map_.stop_key_row, shape)
    lse = array_at(call.lse, call.zero)
    masks_for = (NO_WINDOW, NO_WINDOW)
    for column in range(0, map_.width, 2):
        windows = column_windows(map_, column, shape)
        for row in range(map_.first_row, map_.stop_row, 2):
            tile = make_tile(map_, row, column, shape)
            if masks_for != windows:
                fill_masks(memory.masks, map_, column, tile.blocks, shape)
                masks_for = windows
            store(memory.factors, 0, _attend(memory, tile, shape, call.scale * LOG2_E))
            for slot in range(QUAD - 1, -1, -1):  # store the first query last, as in _weighted_sum
                lse[query_index(map_, row, column, tile, slot, shape)] = memory.factors[QUAD * slot]
    unpack(strided_tensor(call, call.out), memory.out, map_, map_.first_row, map_.stop_row, shape, 1.0)


@inlined
def _attend(memory: Forward, tile: Tile, shape: Shape, factor: float) -> Any:
    """Compute the output of a tile. Return the log-sum-exp, one query per quad."""
    zero = broadcast(memory.out.dtype.type(0), LANES)
    _interleave_queries(memory.quad_queries, memory.queries, tile, shape, factor, zero)
    m, offset = zero + M_INIT, 0
    for row in range(tile.rows):
        key, bias = tile.keys + row * shape.row_stride, tile.bias + bias_offset(row, 0, shape.phases)
        mask = mask_index(row, tile, shape) * tile.blocks * LANES
        for _ in range(tile.blocks):
            logit = _dots(memory.quad_queries, memory.keys, key, shape.pixel_stride, zero)
            logit += load(memory.bias, bias, zero) + load(memory.masks, mask, zero)
            store(memory.logits, offset, logit)
            m = maximum(logit, m)
            key, bias, mask, offset = key + QUAD * shape.pixel_stride, bias + LANES, mask + LANES, offset + LANES
    m = quad_maximum(m)
    l = zero
    for logit_offset in range(0, offset, LANES):
        weight = _exp2_masked(load(memory.logits, logit_offset, zero) - m, zero)
        store(memory.logits, logit_offset, weight)
        l += weight
    l = quad_sum(l)
    store(memory.factors, 0, 1 / l)
    channels = broadcast(memory.out.dtype.type(0), CHANNELS)
    _weighted_sum(memory.out, tile, memory.logits, memory.values, memory.factors, shape, channels)
    return (m + log2(l)) * (1 / LOG2_E)


# ------------------------------------------------------------------------------------------------ backward


class Backward(NamedTuple):
    """Scratch arrays of a thread in the backward kernel, as in `Forward`."""

    bias: Any
    padded_table: Any
    keys: Any
    values: Any
    grad_keys: Any
    grad_values: Any
    queries: Any
    grad_out: Any
    grad_queries: Any
    masks: Any
    quad_queries: Any
    quad_grad_out: Any  # interleaved grad_out of a tile
    weights: Any  # weights of a tile
    grad_logits: Any
    factors: Any  # scale in every lane
    delta: Any  # ∂O·O for each query of a band


_backward_arrays = array_reader(Backward)


def backward(call: Any) -> None:
    """Backward kernel for one group of bands. The bands of a group have no key in common."""
    call = carray(call, 1)[0]
    memory, shape = _backward_arrays(_zeroed_scratch(call), call.array_offsets), load_shape(call)
    group_bands = -(-(shape.num_bands - call.group) // shape.band_groups)  # bands of this group per sub-map
    head, work_item = -1, fetch_add(call, 0)
    while work_item < call.work_items:
        band = call.group + work_item % group_bands * shape.band_groups
        first = (work_item // group_bands * shape.num_bands + band) * shape.bias_size
        grad_bias = array_at(call.grad_bias, call.zero)[first : first + shape.bias_size]
        grad_bias[:] = 0
        for column in range(min(shape.dilation, shape.width)):
            map_ = make_map(work_item // group_bands, column, band, shape)
            if head != map_.head:
                head = map_.head
                fill_bias(memory.bias, memory.padded_table, array_at(call.table, call.zero), head, shape)
            if map_.first_row < map_.stop_row:
                _backward_band(call, memory, map_, grad_bias, shape)
        work_item = fetch_add(call, 0)


def add_bias_gradients(call: Any) -> None:
    """Sum the bias gradients that `backward` wrote for each band, and write the table gradient of each head."""
    call = carray(call, 1)[0]
    shape = load_shape(call)
    bands = shape.batch * min(shape.dilation, shape.height) * shape.num_bands
    zero = broadcast(call.zero, LANES)
    head = fetch_add(call, 0)
    while head < shape.heads:
        first = head * bands * shape.bias_size
        grad_bias = array_at(call.grad_bias, call.zero)[first : first + bands * shape.bias_size]
        for offset in range(0, shape.bias_size, LANES):
            total = zero
            for band in range(bands):
                total += load(grad_bias, band * shape.bias_size + offset, zero)
            store(grad_bias, offset, total)
        fold_bias(array_at(call.grad_table, call.zero), head, grad_bias, shape)
        head = fetch_add(call, 0)


@compiled
def _backward_band(call: Any, memory: Backward, map_: Map, grad_bias: Any, shape: Shape) -> None:
    pack(memory.keys, strided_tensor(call, call.k), map_, map_.first_key_row, map_.stop_key_row, shape)
    pack(memory.values, strided_tensor(call, call.v), map_, map_.first_key_row, map_.stop_key_row, shape)
    pack(memory.queries, strided_tensor(call, call.q), map_, map_.first_row, map_.stop_row, shape)
    pack(memory.grad_out, strided_tensor(call, call.grad_out), map_, map_.first_row, map_.stop_row, shape)
    pack(memory.grad_queries, strided_tensor(call, call.out), map_, map_.first_row, map_.stop_row, shape)
    _compute_delta(memory, map_, shape)
    memory.grad_keys[:] = 0
    memory.grad_values[:] = 0
    _attend_band_backward(memory, map_, array_at(call.lse, call.zero), grad_bias, shape, call.scale)
    unpack(strided_tensor(call, call.grad_q), memory.grad_queries, map_, map_.first_row, map_.stop_row, shape, 1.0)
    grad_k, grad_v = strided_tensor(call, call.grad_k), strided_tensor(call, call.grad_v)
    add_packed(grad_k, memory.grad_keys, map_, map_.first_key_row, map_.stop_key_row, shape, call.scale)
    add_packed(grad_v, memory.grad_values, map_, map_.first_key_row, map_.stop_key_row, shape, 1.0)


@compiled
def _compute_delta(memory: Backward, map_: Map, shape: Shape) -> None:
    """Write ∂O·O for each query. At this point `memory.grad_queries` contains the packed output O."""
    zero = broadcast(memory.delta.dtype.type(0), LANES)
    for row in range(map_.stop_row - map_.first_row):
        for column in range(map_.width):
            offset, total = row * shape.row_stride + column * shape.pixel_stride, zero
            for channel in range(0, shape.pixel_stride, LANES):
                out = load(memory.grad_queries, offset + channel, zero)
                total += load(memory.grad_out, offset + channel, zero) * out
            memory.delta[offset // shape.pixel_stride] = lane_sum(total)


@compiled
def _attend_band_backward(memory: Backward, map_: Map, lse: Any, grad_bias: Any, shape: Shape, scale: float) -> None:
    zero = broadcast(memory.keys.dtype.type(0), LANES)
    channels = broadcast(memory.keys.dtype.type(0), CHANNELS)
    store(memory.factors, 0, zero + scale)
    masks_for = (NO_WINDOW, NO_WINDOW)
    for column in range(0, map_.width, 2):
        windows = column_windows(map_, column, shape)
        for row in range(map_.first_row, map_.stop_row, 2):
            tile = make_tile(map_, row, column, shape)
            if masks_for != windows:
                fill_masks(memory.masks, map_, column, tile.blocks, shape)
                masks_for = windows
            lse_quads = broadcast_quads(
                zero, lse[query_index(map_, row, column, tile, 0, shape)],
                lse[query_index(map_, row, column, tile, 1, shape)],
                lse[query_index(map_, row, column, tile, 2, shape)],
                lse[query_index(map_, row, column, tile, 3, shape)],
            )  # fmt: skip
            _interleave_queries(memory.quad_queries, memory.queries, tile, shape, scale * LOG2_E, zero)
            _interleave_queries(memory.quad_grad_out, memory.grad_out, tile, shape, 1.0, zero)
            _compute_grad_logits(memory, tile, lse_quads * LOG2_E, grad_bias, shape)
            _weighted_sum(memory.grad_queries, tile, memory.grad_logits, memory.keys, memory.factors, shape, channels)
            _add_outer(memory.grad_keys, tile, memory.grad_logits, memory.queries, shape, channels)
            _add_outer(memory.grad_values, tile, memory.weights, memory.grad_out, shape, channels)


@inlined
def _compute_grad_logits(memory: Backward, tile: Tile, lse_quads: Any, grad_bias: Any, shape: Shape) -> None:
    """Recompute the weights of a tile, compute the gradients of its logits, and add them to the bias gradients."""
    query = tile.queries // shape.pixel_stride
    right, below = tile.right // shape.pixel_stride, tile.below // shape.pixel_stride
    delta_quads = broadcast_quads(
        lse_quads, memory.delta[query], memory.delta[query + right], memory.delta[query + below],
        memory.delta[query + below + right],
    )  # fmt: skip
    zero, offset = broadcast(memory.keys.dtype.type(0), LANES), 0
    for row in range(tile.rows):
        key, bias = tile.keys + row * shape.row_stride, tile.bias + bias_offset(row, 0, shape.phases)
        mask = mask_index(row, tile, shape) * tile.blocks * LANES
        for _ in range(tile.blocks):
            logit = _dots(memory.quad_queries, memory.keys, key, shape.pixel_stride, zero)
            logit += load(memory.bias, bias, zero) + load(memory.masks, mask, zero)
            weight = _exp2_masked(logit - lse_quads, zero)
            grad_weight = _dots(memory.quad_grad_out, memory.values, key, shape.pixel_stride, zero)
            grad_logit = weight * (grad_weight - delta_quads)
            store(memory.weights, offset, weight)
            store(memory.grad_logits, offset, grad_logit)
            store(grad_bias, bias, load(grad_bias, bias, zero) + grad_logit)
            key, bias, mask, offset = key + QUAD * shape.pixel_stride, bias + LANES, mask + LANES, offset + LANES
