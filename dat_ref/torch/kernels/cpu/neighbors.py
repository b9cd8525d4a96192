"""Attention to the K × K keys around each query with a relative bias, forward and backward.

    S = q·k / √d + B,    O = Σ e^S v / Σ e^S            over the keys of each query

A tile of 2 × 2 queries at a time: all its scores are a few vectors, so that the softmax is the plain one and nothing
is copied per query. The backward pass computes them again; the logarithm of the sum, L, which the forward pass keeps,
gives the weights P = e^(S - L), and then

    ∂V = P ∂O,    ∂S = P (∂O·V - ∂O·O),    ∂Q = ∂S K / √d,    ∂K = ∂S Q / √d,    ∂B = ∂S.

A key takes part in tiles of several bands. Its gradient is added up band by band, bands without a common key at the
same time, always in the same order: the result does not depend on the number of threads.

Exponentials are powers of 2 inside: queries and table come multiplied by log₂ e.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import carray

from .launch import Fields
from .patches import (
    LOG2_E,
    NO_WINDOW,
    Map,
    Shape,
    Tile,
    add_packed,
    bias_place,
    column_windows,
    fill_bias,
    fill_masks,
    fold_bias,
    make_map,
    make_tile,
    pack,
    query_number,
    rows_seen,
    shape_of,
    unpack,
)
from .quads import (
    LANES,
    QUAD,
    inlined,
    interleave,
    quad_maximum,
    quad_sum,
    quad_sums,
    quads_of,
    spread_quad,
)
from .rows import rows_of
from .vectors import (
    compiled,
    exp2,
    filled,
    lane_sum,
    load,
    log2,
    maximum,
    numbers_at,
    spread,
    store,
    where_not_negative,
)
from .vectors import take_ticket as take

CHANNELS = 2 * LANES  # summed at once
LOWEST = -1e38  # below any score, and finite: a tile may have a query that is none, for which every key is hidden
NO_WEIGHT = 126.0  # 2^-126 and less is none at all: what is hidden must not count, not even a little

FIELDS = Fields(
    module=__name__,
    integers=(*Shape._fields, "group"),
    floats=("scale",),
    operands=("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"),
    addresses=("table", "lse", "grad_bias", "grad_table"),
)


# ------------------------------------------------------------------------------------------------ products


@inlined
def _interleave_queries(target: Any, source: Any, tile: Tile, shape: Shape, factor: float, like: Any) -> None:
    """Lay out four queries for `_dots`: four channels of each, side by side."""
    at = tile.queries
    for channel in range(0, shape.pixel, LANES):
        interleave(
            target, QUAD * channel, factor * load(source, at, like), factor * load(source, at + tile.right, like),
            factor * load(source, at + tile.below, like), factor * load(source, at + tile.below + tile.right, like),
        )  # fmt: skip
        at += LANES


@inlined
def _dots(queries: Any, keys: Any, at: int, pixel: int, zero: Any) -> Any:
    """Return the products of four queries with a block of four keys."""
    dots0, dots1, dots2, dots3 = zero, zero, zero, zero
    for channel in range(0, pixel, QUAD):
        four = load(queries, QUAD * channel, zero)
        key = at + channel
        dots0 += spread_quad(keys, key, zero) * four
        dots1 += spread_quad(keys, key + pixel, zero) * four
        dots2 += spread_quad(keys, key + 2 * pixel, zero) * four
        dots3 += spread_quad(keys, key + 3 * pixel, zero) * four
    return quad_sums(dots0, dots1, dots2, dots3)


@inlined
def _power(scores: Any, zero: Any) -> Any:
    """Return 2^scores, and no weight at all for what is hidden."""
    return where_not_negative(-NO_WEIGHT - scores, zero, exp2(scores))


@inlined
def _mix(target: Any, tile: Tile, weights: Any, rows: Any, factors: Any, shape: Shape, zero: Any) -> None:
    """target[query] = factor · Σ_key weight[query, key] · row[key]"""
    for channel in range(0, shape.pixel, CHANNELS):
        sum0, sum1, sum2, sum3 = zero, zero, zero, zero
        weight = 0
        for row in range(tile.rows):
            at = tile.keys + row * shape.line + channel
            for _ in range(tile.blocks):
                for _ in range(QUAD):
                    key = load(rows, at, zero)
                    sum0 += spread(weights, weight, zero) * key
                    sum1 += spread(weights, weight + QUAD, zero) * key
                    sum2 += spread(weights, weight + 2 * QUAD, zero) * key
                    sum3 += spread(weights, weight + 3 * QUAD, zero) * key
                    at += shape.pixel
                    weight += 1
                weight += LANES - QUAD
        # The first query last: where a neighbor is missing, what was computed for it goes the same place.
        to = tile.queries + channel
        store(target, to + tile.below + tile.right, sum3 * spread(factors, 3 * QUAD, zero))
        store(target, to + tile.below, sum2 * spread(factors, 2 * QUAD, zero))
        store(target, to + tile.right, sum1 * spread(factors, QUAD, zero))
        store(target, to, sum0 * spread(factors, 0, zero))


@inlined
def _add_outer(target: Any, tile: Tile, weights: Any, rows: Any, shape: Shape, zero: Any) -> None:
    """target[key] += Σ_query weight[query, key] · row[query]"""
    for channel in range(0, shape.pixel, CHANNELS):
        first = tile.queries + channel
        query0, query1 = load(rows, first, zero), load(rows, first + tile.right, zero)
        query2, query3 = load(rows, first + tile.below, zero), load(rows, first + tile.below + tile.right, zero)
        weight = 0
        for row in range(tile.rows):
            at = tile.keys + row * shape.line + channel
            for _ in range(tile.blocks):
                for _ in range(QUAD):
                    total = load(target, at, zero)
                    total += spread(weights, weight, zero) * query0
                    total += spread(weights, weight + QUAD, zero) * query1
                    total += spread(weights, weight + 2 * QUAD, zero) * query2
                    total += spread(weights, weight + 3 * QUAD, zero) * query3
                    store(target, at, total)
                    at += shape.pixel
                    weight += 1
                weight += LANES - QUAD


# ------------------------------------------------------------------------------------------------ forward


class Forward(NamedTuple):
    """Scratch memory of a thread, in the order of `neighborhood.make_plan`."""

    bias: Any
    margined: Any
    keys: Any  # packed
    values: Any
    queries: Any
    out: Any
    masks: Any
    four: Any  # the queries of a tile, interleaved
    scores: Any  # of a tile, then weights
    factors: Any  # a query in each quad


@compiled
def _forward_memory(call: Any) -> Forward:
    m, p = _cleared(call, 10), call.places
    return Forward(
        m[p[0] : p[1]], m[p[1] : p[2]], m[p[2] : p[3]], m[p[3] : p[4]], m[p[4] : p[5]], m[p[5] : p[6]],
        m[p[6] : p[7]], m[p[7] : p[8]], m[p[8] : p[9]], m[p[9] : p[10]],
    )  # fmt: skip


@compiled
def _cleared(call: Any, arrays: int) -> Any:
    """Return a part of the scratch memory that no other thread has, zeros: channels may be fewer than a pixel holds."""
    memory = numbers_at(call.scratch + take(call, 1) * call.room, call.number)[: call.places[arrays]]
    memory[:] = 0
    return memory


def forward(call: Any) -> None:
    """Compute bands of maps until none is left: what each thread does."""
    call = carray(call, 1)[0]
    memory, shape = _forward_memory(call), shape_of(call)
    head, item = -1, take(call, 0)
    while item < call.shares:
        for column in range(min(shape.dilation, shape.width)):
            map_ = make_map(item // shape.bands, column, item % shape.bands, shape)
            if head != map_.head:
                head = map_.head
                fill_bias(memory.bias, memory.margined, numbers_at(call.table, call.number), head, shape)
            if map_.first < map_.stop:  # not all sub-maps are of one height
                _forward_band(call, memory, map_, shape)
        item = take(call, 0)


@compiled
def _forward_band(call: Any, memory: Forward, map_: Map, shape: Shape) -> None:
    pack(memory.queries, rows_of(call, call.q), map_, map_.first, map_.stop, shape)
    pack(memory.keys, rows_of(call, call.k), map_, map_.first_key, map_.stop_key, shape)
    pack(memory.values, rows_of(call, call.v), map_, map_.first_key, map_.stop_key, shape)
    lse = numbers_at(call.lse, call.number)
    masked = (NO_WINDOW, NO_WINDOW)
    for column in range(0, map_.width, 2):
        windows = column_windows(map_, column, shape)
        for row in range(map_.first, map_.stop, 2):
            tile = make_tile(map_, row, column, shape)
            if masked != windows:
                fill_masks(memory.masks, map_, column, tile.blocks, shape)
                masked = windows
            store(memory.factors, 0, _attend(memory, tile, shape, call.scale * LOG2_E))
            for place in range(QUAD - 1, -1, -1):  # the first query last, as in _mix
                lse[query_number(map_, row, column, tile, place, shape)] = memory.factors[QUAD * place]
    unpack(rows_of(call, call.out), memory.out, map_, map_.first, map_.stop, shape, 1.0)


@inlined
def _attend(memory: Forward, tile: Tile, shape: Shape, factor: float) -> Any:
    """Compute the output of a tile; return the logarithm of the sum of the exponentials, of a query in each quad."""
    zero = filled(memory.out.dtype.type(0), LANES)
    _interleave_queries(memory.four, memory.queries, tile, shape, factor, zero)
    peak, place = zero + LOWEST, 0
    for row in range(tile.rows):
        key, bias = tile.keys + row * shape.line, tile.bias + bias_place(row, 0, shape.phases)
        mask = rows_seen(row, tile, shape) * tile.blocks * LANES
        for _ in range(tile.blocks):
            score = _dots(memory.four, memory.keys, key, shape.pixel, zero)
            score += load(memory.bias, bias, zero) + load(memory.masks, mask, zero)
            store(memory.scores, place, score)
            peak = maximum(score, peak)
            key, bias, mask, place = key + QUAD * shape.pixel, bias + LANES, mask + LANES, place + LANES
    peak = quad_maximum(peak)
    total = zero
    for at in range(0, place, LANES):
        weight = _power(load(memory.scores, at, zero) - peak, zero)
        store(memory.scores, at, weight)
        total += weight
    total = quad_sum(total)
    store(memory.factors, 0, 1 / total)
    channels = filled(memory.out.dtype.type(0), CHANNELS)
    _mix(memory.out, tile, memory.scores, memory.values, memory.factors, shape, channels)
    return (peak + log2(total)) * (1 / LOG2_E)


# ------------------------------------------------------------------------------------------------ backward


class Backward(NamedTuple):
    """Scratch memory of a thread, as in `Forward`."""

    bias: Any
    margined: Any
    keys: Any
    values: Any
    grad_keys: Any
    grad_values: Any
    queries: Any
    grad_out: Any
    grad_queries: Any
    masks: Any
    four: Any
    four_grads: Any  # the queries' part of grad_out, interleaved
    weights: Any  # of a tile
    grad_scores: Any
    factors: Any
    deltas: Any  # ∂O·O of each query of a band


@compiled
def _backward_memory(call: Any) -> Backward:
    m, p = _cleared(call, 15), call.places
    four = m[p[10] : p[11]]
    return Backward(
        m[p[0] : p[1]], m[p[1] : p[2]], m[p[2] : p[3]], m[p[3] : p[4]], m[p[4] : p[5]], m[p[5] : p[6]],
        m[p[6] : p[7]], m[p[7] : p[8]], m[p[8] : p[9]], m[p[9] : p[10]], four, four[QUAD * call.pixel :],
        m[p[11] : p[12]], m[p[12] : p[13]], m[p[13] : p[14]], m[p[14] : p[15]],
    )  # fmt: skip


def backward(call: Any) -> None:
    """Compute bands of maps, of one group: those that have no key in common."""
    call = carray(call, 1)[0]
    memory, shape = _backward_memory(call), shape_of(call)
    bands = -(-(shape.bands - call.group) // shape.apart)  # of a map, in this group
    head, item = -1, take(call, 0)
    while item < call.shares:
        band = call.group + item % bands * shape.apart
        first = (item // bands * shape.bands + band) * shape.blocks
        blocks = numbers_at(call.grad_bias, call.number)[first : first + shape.blocks]
        blocks[:] = 0
        for column in range(min(shape.dilation, shape.width)):
            map_ = make_map(item // bands, column, band, shape)
            if head != map_.head:
                head = map_.head
                fill_bias(memory.bias, memory.margined, numbers_at(call.table, call.number), head, shape)
            if map_.first < map_.stop:
                _backward_band(call, memory, map_, blocks, shape)
        item = take(call, 0)


def add_bias_gradients(call: Any) -> None:
    """Add up the gradients of bias that `backward` has left for each band of each map, head by head."""
    call = carray(call, 1)[0]
    shape = shape_of(call)
    bands = shape.batch * min(shape.dilation, shape.height) * shape.bands
    zero = filled(call.number, LANES)
    head = take(call, 0)
    while head < shape.heads:
        first = head * bands * shape.blocks
        blocks = numbers_at(call.grad_bias, call.number)[first : first + bands * shape.blocks]
        for at in range(0, shape.blocks, LANES):
            total = zero
            for band in range(bands):
                total += load(blocks, band * shape.blocks + at, zero)
            store(blocks, at, total)
        fold_bias(numbers_at(call.grad_table, call.number), head, blocks, shape)
        head = take(call, 0)


@compiled
def _backward_band(call: Any, memory: Backward, map_: Map, blocks: Any, shape: Shape) -> None:
    pack(memory.keys, rows_of(call, call.k), map_, map_.first_key, map_.stop_key, shape)
    pack(memory.values, rows_of(call, call.v), map_, map_.first_key, map_.stop_key, shape)
    pack(memory.queries, rows_of(call, call.q), map_, map_.first, map_.stop, shape)
    pack(memory.grad_out, rows_of(call, call.grad_out), map_, map_.first, map_.stop, shape)
    pack(memory.grad_queries, rows_of(call, call.out), map_, map_.first, map_.stop, shape)
    _fill_deltas(memory, map_, shape)
    memory.grad_keys[:] = 0
    memory.grad_values[:] = 0
    _attend_band_back(memory, map_, numbers_at(call.lse, call.number), blocks, shape, call.scale)
    unpack(rows_of(call, call.grad_q), memory.grad_queries, map_, map_.first, map_.stop, shape, 1.0)
    add_packed(rows_of(call, call.grad_k), memory.grad_keys, map_, map_.first_key, map_.stop_key, shape, call.scale)
    add_packed(rows_of(call, call.grad_v), memory.grad_values, map_, map_.first_key, map_.stop_key, shape, 1.0)


@compiled
def _fill_deltas(memory: Backward, map_: Map, shape: Shape) -> None:
    """Write ∂O·O of each query, where the output has been packed in place of the queries' gradients."""
    zero = filled(memory.deltas.dtype.type(0), LANES)
    for row in range(map_.stop - map_.first):
        for column in range(map_.width):
            at, total = row * shape.line + column * shape.pixel, zero
            for channel in range(0, shape.pixel, LANES):
                total += load(memory.grad_out, at + channel, zero) * load(memory.grad_queries, at + channel, zero)
            memory.deltas[at // shape.pixel] = lane_sum(total)


@compiled
def _attend_band_back(memory: Backward, map_: Map, lse: Any, blocks: Any, shape: Shape, scale: float) -> None:
    zero = filled(memory.keys.dtype.type(0), LANES)
    channels = filled(memory.keys.dtype.type(0), CHANNELS)
    store(memory.factors, 0, zero + scale)
    masked = (NO_WINDOW, NO_WINDOW)
    for column in range(0, map_.width, 2):
        windows = column_windows(map_, column, shape)
        for row in range(map_.first, map_.stop, 2):
            tile = make_tile(map_, row, column, shape)
            if masked != windows:
                fill_masks(memory.masks, map_, column, tile.blocks, shape)
                masked = windows
            logs = quads_of(
                zero, lse[query_number(map_, row, column, tile, 0, shape)],
                lse[query_number(map_, row, column, tile, 1, shape)],
                lse[query_number(map_, row, column, tile, 2, shape)],
                lse[query_number(map_, row, column, tile, 3, shape)],
            )  # fmt: skip
            _interleave_queries(memory.four, memory.queries, tile, shape, scale * LOG2_E, zero)
            _interleave_queries(memory.four_grads, memory.grad_out, tile, shape, 1.0, zero)
            _fill_grad_scores(memory, tile, logs * LOG2_E, blocks, shape)
            _mix(memory.grad_queries, tile, memory.grad_scores, memory.keys, memory.factors, shape, channels)
            _add_outer(memory.grad_keys, tile, memory.grad_scores, memory.queries, shape, channels)
            _add_outer(memory.grad_values, tile, memory.weights, memory.grad_out, shape, channels)


@inlined
def _fill_grad_scores(memory: Backward, tile: Tile, logs: Any, blocks: Any, shape: Shape) -> None:
    """Compute the weights of a tile again, the gradients of its scores, and add these to those of the bias."""
    query = tile.queries // shape.pixel
    right, below = tile.right // shape.pixel, tile.below // shape.pixel
    deltas = quads_of(
        logs, memory.deltas[query], memory.deltas[query + right], memory.deltas[query + below],
        memory.deltas[query + below + right],
    )  # fmt: skip
    zero, place = filled(memory.keys.dtype.type(0), LANES), 0
    for row in range(tile.rows):
        key, bias = tile.keys + row * shape.line, tile.bias + bias_place(row, 0, shape.phases)
        mask = rows_seen(row, tile, shape) * tile.blocks * LANES
        for _ in range(tile.blocks):
            score = _dots(memory.four, memory.keys, key, shape.pixel, zero)
            score += load(memory.bias, bias, zero) + load(memory.masks, mask, zero)
            weight = _power(score - logs, zero)
            grad = weight * (_dots(memory.four_grads, memory.values, key, shape.pixel, zero) - deltas)
            store(memory.weights, place, weight)
            store(memory.grad_scores, place, grad)
            store(blocks, bias, load(blocks, bias, zero) + grad)
            key, bias, mask, place = key + QUAD * shape.pixel, bias + LANES, mask + LANES, place + LANES
