"""Attention over sampled keys with a relative position bias, forward and backward, in one pass over tiles.

    S[n] = k[n]·q / √d + B[n],    O = Σ_n e^S[n] v[n] / Σ_n e^S[n]            for each query

For a tile of queries, a block of keys at a time: the scores start as the bias, the product k qᵀ is added, and the
softmax goes on from what the blocks before have left (maximum, sum and output so far), so that no matrix of all scores
is ever there. The backward pass computes the scores again; the logarithm of the sum, L, which the forward pass keeps,
gives the weights P = e^(S - L), and then

    ∂V = P ∂O,    ∂S = P (V ∂O - ∂O·O),    ∂Q = ∂Sᵀ K / √d,    ∂K = ∂S Q / √d,    ∂B = ∂S.

Exponentials are powers of 2 inside: queries and table come multiplied by log₂ e.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import carray

from .bias import Step, Table, Tile, add_bias_gradients, fill_table, write_bias
from .launch import Fields
from .plan import KEYS, Cut
from .rows import Rows, read_rows, rows_of, write_rows
from .tiles import ROW, add_outer, add_product, copy_rows, transpose
from .vectors import NARROW, PAIR, WIDE, compiled, exp2, filled, lane_sum, load, log2, maximum, numbers_at, store
from .vectors import take_ticket as take

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # below any score, and finite, so that differences are numbers

FIELDS = Fields(
    module=__name__,
    integers=(
        *("batch", "heads", "groups", "height", "width", "samples", "depth", "table_rows", "table_columns"),
        *(*Cut._fields, "step_kind"),
    ),
    floats=("step_y", "step_x", "scale"),
    operands=("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"),
    addresses=("base", "table", "lse", "grad_base", "grad_table"),
)


# ------------------------------------------------------------------------------------------------ rows and tiles


@compiled
def _read(target: Any, call: Any, source: Rows, image: int, head: int, row: int, rows: int, factor: float) -> None:
    """Copy rows of channels to scratch memory."""
    at = image * source.image + head * source.head + row * source.row
    read_rows(target, 0, call.channel_row, source, at, source.row, rows, call.depth, factor)


@compiled
def _write(target: Rows, image: int, head: int, row: int, rows: int, call: Any, source: Any, factor: float) -> None:
    """Copy rows of channels from scratch memory."""
    at = image * target.image + head * target.head + row * target.row
    write_rows(target, at, target.row, source, 0, call.channel_row, rows, call.depth, factor)


@compiled
def _tile(call: Any, number: int) -> Any:
    """Return a tile, its first query, and how many it has."""
    across = -(-call.width // call.tile_columns)
    row, column = number // across * call.tile_rows, number % across * call.tile_columns
    tile = Tile(row, column, min(call.tile_rows, call.height - row), min(call.tile_columns, call.width - column))
    return tile, row * call.width + column, tile.rows * tile.columns


@compiled
def _table(call: Any, cells: Any) -> Table:
    return Table(cells, call.table_origin, call.table_stride, call.table_rows, call.table_columns)


@compiled
def _step(call: Any) -> Step:
    return Step(call.step_kind, call.step_y, call.step_x)


@compiled
def _scratch(call: Any) -> Any:
    """Return a part of the scratch memory that no other thread has."""
    return numbers_at(call.scratch + take(call, 1) * call.room, call.number)


@compiled
def _is_wide(lanes: int) -> bool:
    """Return whether the next strip of so many remaining lanes is to be wide; narrow ones run at half the speed."""
    return lanes > WIDE // 2


# ------------------------------------------------------------------------------------------------ forward


class Forward(NamedTuple):
    """Scratch memory of a thread. A tile has queries along its lanes."""

    table: Table
    keys: Any  # rows of channels
    values: Any
    scores: Any  # tile with a key each row
    queries: Any  # tile with a channel each row
    sums: Any  # likewise: the output before it is divided
    query_rows: Any  # rows of channels
    peaks: Any  # highest score so far, of each query
    totals: Any  # Σ 2^(score - peak)


@compiled
def _forward_memory(call: Any) -> Forward:
    m, p = _scratch(call), call.places
    return Forward(
        _table(call, m[: p[1]]), m[p[1] : p[2]], m[p[2] : p[3]], m[p[3] : p[4]], m[p[4] : p[5]], m[p[5] : p[6]],
        m[p[6] : p[7]], m[p[7] : p[8]], m[p[8] : p[9]],
    )  # fmt: skip


def forward(pointer: Any) -> None:
    """Compute shares of the work, all tiles of all images and heads: a kernel, see `launch`."""
    call = carray(pointer, 1)[0]
    memory = _forward_memory(call)
    work = call.heads * call.batch * call.tiles
    head = -1
    share = take(call, 0)
    while share < call.shares:
        for item in range(work * share // call.shares, work * (share + 1) // call.shares):
            if head != item // (call.batch * call.tiles):
                head = item // (call.batch * call.tiles)
                table = numbers_at(call.table, call.number)
                fill_table(memory.table, table, head * call.table_rows * call.table_columns, LOG2_E)
            _forward_tile(call, memory, item // call.tiles % call.batch, head, item % call.tiles)
        share = take(call, 0)


@compiled
def _forward_tile(call: Any, memory: Forward, image: int, head: int, number: int) -> None:
    tile, first, lanes = _tile(call, number)
    _read(memory.query_rows, call, rows_of(call, call.q), image, head, first, lanes, call.scale * LOG2_E)
    transpose(memory.queries, ROW, memory.query_rows, call.channel_row, lanes, call.depth)
    memory.peaks[:] = LOWEST
    memory.totals[:] = 0
    memory.sums[: call.depth * ROW] = 0
    k, v, base, step = rows_of(call, call.k), rows_of(call, call.v), numbers_at(call.base, call.number), _step(call)
    points = (image * call.groups + head * call.groups // call.heads) * call.samples
    for key in range(0, call.samples, KEYS):
        count = min(KEYS, call.samples - key)
        _read(memory.keys, call, k, image, head, key, count, 1.0)
        _read(memory.values, call, v, image, head, key, count, 1.0)
        write_bias(memory.scores, memory.table, base, 2 * (points + key), count, tile, step)
        lane = 0
        while lane < lanes:
            if _is_wide(lanes - lane):
                _attend(call, memory, count, lane, filled(call.number, WIDE))
                lane += WIDE
            else:
                _attend(call, memory, count, lane, filled(call.number, NARROW))
                lane += NARROW
    _finish(call, memory, lanes)
    _write(rows_of(call, call.out), image, head, first, lanes, call, memory.query_rows, 1.0)
    query = (image * call.heads + head) * call.height * call.width + first
    copy_rows(numbers_at(call.lse, call.number), query, 0, memory.peaks, 0, 0, 1, lanes, 1.0)


@compiled
def _attend(call: Any, memory: Forward, count: int, lane: int, like: Any) -> None:
    """Let a strip of queries attend to one more block of keys."""
    row, scores, depth = call.channel_row, memory.scores, call.depth
    one = like * 0 + 1
    add_product(scores, one, memory.keys, row, 1, memory.queries, count, depth, lane)
    before = load(memory.peaks, lane, like)
    peak = before
    for n in range(count):
        peak = maximum(load(scores, n * ROW + lane, like), peak)
    fade = exp2(before - peak)
    total = load(memory.totals, lane, like) * fade
    for n in range(count):
        weight = exp2(load(scores, n * ROW + lane, like) - peak)
        store(scores, n * ROW + lane, weight)
        total += weight
    store(memory.peaks, lane, peak)
    store(memory.totals, lane, total)
    add_product(memory.sums, fade, memory.values, 1, row, scores, depth, count, lane)


@compiled
def _finish(call: Any, memory: Forward, lanes: int) -> None:
    """Divide the sums, as rows of channels, and turn the peaks into logarithms of the sum."""
    for lane in range(0, lanes, NARROW):
        total = load(memory.totals, lane, filled(call.number, NARROW))
        factor = 1 / total
        for c in range(call.depth):
            store(memory.sums, c * ROW + lane, load(memory.sums, c * ROW + lane, factor) * factor)
        store(memory.peaks, lane, (load(memory.peaks, lane, total) + log2(total)) * (1 / LOG2_E))
    transpose(memory.query_rows, call.channel_row, memory.sums, ROW, call.depth, lanes)


# ------------------------------------------------------------------------------------------------ backward


class Backward(NamedTuple):
    """Scratch memory of a thread, as in `Forward`."""

    table: Table
    grad_table: Table
    keys: Any  # rows of channels
    values: Any
    scores: Any  # tile with a key each row: scores, then weights
    grad_scores: Any
    queries: Any  # tile with a channel each row
    grad_out: Any
    grad_queries: Any
    query_rows: Any  # rows of channels
    grad_out_rows: Any
    lse: Any  # of base 2, of each query
    deltas: Any  # ∂O·O
    grad_keys: Any  # rows of channels, of all keys
    grad_values: Any


@compiled
def _backward_memory(call: Any) -> Backward:
    m, p = _scratch(call), call.places
    return Backward(
        _table(call, m[: p[1]]), _table(call, m[p[1] : p[2]]), m[p[2] : p[3]], m[p[3] : p[4]], m[p[4] : p[5]],
        m[p[5] : p[6]], m[p[6] : p[7]], m[p[7] : p[8]], m[p[8] : p[9]], m[p[9] : p[10]], m[p[10] : p[11]],
        m[p[11] : p[12]], m[p[12] : p[13]], m[p[13] : p[14]], m[p[14] : p[15]],
    )  # fmt: skip


def backward(pointer: Any) -> None:
    """Compute shares of the work, all parts of all images and heads: a kernel, see `launch`."""
    call = carray(pointer, 1)[0]
    memory = _backward_memory(call)
    head = -1
    share = take(call, 0)
    while share < call.shares:
        if head != share // (call.batch * call.parts):
            head = share // (call.batch * call.parts)
            table = numbers_at(call.table, call.number)
            fill_table(memory.table, table, head * call.table_rows * call.table_columns, LOG2_E)
        _backward_part(call, memory, share // call.parts % call.batch, head, share % call.parts)
        share = take(call, 0)


@compiled
def _backward_part(call: Any, memory: Backward, image: int, head: int, part: int) -> None:
    """Fill the gradients of a part of the queries, and what these give to keys, values, points and table."""
    memory.grad_table.cells[:] = 0
    memory.grad_keys[:] = 0
    memory.grad_values[:] = 0
    item = (head * call.batch + image) * call.parts + part
    grad_points = numbers_at(call.grad_base, call.number)[2 * item * call.samples : 2 * (item + 1) * call.samples]
    grad_points[:] = 0
    for number in range(call.tiles * part // call.parts, call.tiles * (part + 1) // call.parts):
        _backward_tile(call, memory, grad_points, image, head, number)
    # Queries and table came with a factor of log₂ e, and the keys' and the points' gradients have it from them.
    into = image * call.parts + part
    _write(rows_of(call, call.grad_k), into, head, 0, call.samples, call, memory.grad_keys, 1 / LOG2_E)
    _write(rows_of(call, call.grad_v), into, head, 0, call.samples, call, memory.grad_values, 1.0)
    for n in range(2 * call.samples):
        grad_points[n] *= 1 / LOG2_E
    grads, cells = memory.grad_table, numbers_at(call.grad_table, call.number)
    copy_rows(
        cells, item * grads.rows * grads.columns, grads.columns, grads.cells, grads.origin, grads.stride, grads.rows,
        grads.columns, 1.0,
    )  # fmt: skip


@compiled
def _backward_tile(call: Any, memory: Backward, grad_points: Any, image: int, head: int, number: int) -> None:
    tile, first, lanes = _tile(call, number)
    _read_tile(call, memory, image, head, first, lanes)
    k, v, base, step = rows_of(call, call.k), rows_of(call, call.v), numbers_at(call.base, call.number), _step(call)
    points = (image * call.groups + head * call.groups // call.heads) * call.samples
    for key in range(0, call.samples, KEYS):
        count = min(KEYS, call.samples - key)
        _read(memory.keys, call, k, image, head, key, count, 1.0)
        _read(memory.values, call, v, image, head, key, count, 1.0)
        write_bias(memory.scores, memory.table, base, 2 * (points + key), count, tile, step)
        lane = 0
        while lane < lanes:
            if _is_wide(lanes - lane):
                _attend_back(call, memory, count, lane, filled(call.number, WIDE))
                lane += WIDE
            else:
                _attend_back(call, memory, count, lane, filled(call.number, NARROW))
                lane += NARROW
        _add_key_gradients(call, memory, key, count, lanes)
        add_bias_gradients(
            memory.grad_scores, memory.table, memory.grad_table, base, 2 * (points + key), grad_points, 2 * key, count,
            tile, step,
        )  # fmt: skip
    transpose(memory.query_rows, call.channel_row, memory.grad_queries, ROW, call.depth, lanes)
    _write(rows_of(call, call.grad_q), image, head, first, lanes, call, memory.query_rows, call.scale)


@compiled
def _read_tile(call: Any, memory: Backward, image: int, head: int, first: int, lanes: int) -> None:
    """Fill everything that a tile of queries has, and start its gradient."""
    row, depth = call.channel_row, call.depth
    _read(memory.query_rows, call, rows_of(call, call.q), image, head, first, lanes, call.scale * LOG2_E)
    transpose(memory.queries, ROW, memory.query_rows, row, lanes, depth)
    _read(memory.grad_out_rows, call, rows_of(call, call.grad_out), image, head, first, lanes, 1.0)
    transpose(memory.grad_out, ROW, memory.grad_out_rows, row, lanes, depth)
    query = (image * call.heads + head) * call.height * call.width + first
    copy_rows(memory.lse, 0, 0, numbers_at(call.lse, call.number), query, 0, 1, lanes, LOG2_E)
    _read(memory.grad_queries, call, rows_of(call, call.out), image, head, first, lanes, 1.0)  # where there is room
    for lane in range(lanes):
        memory.deltas[lane] = _dot(memory.grad_out_rows, memory.grad_queries, lane * row, depth)
    memory.grad_queries[: depth * ROW] = 0


@compiled
def _dot(a: Any, b: Any, at: int, length: int) -> float:
    zero = filled(a[0], NARROW) * 0
    total = zero
    whole = length - length % NARROW
    for j in range(0, whole, NARROW):
        total += load(a, at + j, zero) * load(b, at + j, zero)
    result = lane_sum(total)
    for j in range(whole, length):
        result += a[at + j] * b[at + j]
    return result


@compiled
def _attend_back(call: Any, memory: Backward, count: int, lane: int, like: Any) -> None:
    """For a strip of queries and a block of keys: weights, gradients of the scores, and what they give the queries."""
    row, depth, scores, grad_scores = call.channel_row, call.depth, memory.scores, memory.grad_scores
    one = like * 0 + 1
    add_product(scores, one, memory.keys, row, 1, memory.queries, count, depth, lane)
    lse, delta = load(memory.lse, lane, like), load(memory.deltas, lane, like)
    for n in range(count):
        at = n * ROW + lane
        store(scores, at, exp2(load(scores, at, like) - lse))
        store(grad_scores, at, 0 - delta)
    add_product(grad_scores, one, memory.values, row, 1, memory.grad_out, count, depth, lane)
    for n in range(count):
        at = n * ROW + lane
        store(grad_scores, at, load(grad_scores, at, like) * load(scores, at, like))
    add_product(memory.grad_queries, one, memory.keys, 1, row, grad_scores, depth, count, lane)


@compiled
def _add_key_gradients(call: Any, memory: Backward, key: int, count: int, lanes: int) -> None:
    row, like = call.channel_row, filled(call.number, PAIR)
    for channel in range(0, call.depth, PAIR):
        add_outer(memory.grad_values, key * row, memory.scores, memory.grad_out_rows, row, count, lanes, channel, like)
        add_outer(memory.grad_keys, key * row, memory.grad_scores, memory.query_rows, row, count, lanes, channel, like)
