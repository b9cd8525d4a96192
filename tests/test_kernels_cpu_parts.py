"""Parts of the Numba kernels: vectors, tiles, bfloat16, bias, tiling and machine code."""

import re

import numpy as np
import pytest

pytest.importorskip("numba")
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.torch.kernels.cpu import bias, deformable, launch, tiles, tiling, vectors
from dat_ref.torch.kernels.cpu.bias import GENERAL, NEAR_UNIT, UNIT, Step, Table, Tile
from dat_ref.torch.kernels.cpu.strided_io import StridedTensor, load_rows, store_rows
from dat_ref.torch.kernels.cpu.tiles import BLOCK_M, TILE_STRIDE
from dat_ref.torch.kernels.cpu.vectors import NARROW, PAIR, WIDE, broadcast, load, store

DTYPES = (np.float32, np.float64)

# ------------------------------------------------------------------------------------------------ vectors


@njit
def _on_vectors(out, a, b):
    like = broadcast(a[0], NARROW)
    x, y = load(a, 0, like), load(b, 0, like)
    store(out, 0, x * y + 2)
    store(out, NARROW, vectors.maximum(x, y))
    store(out, 2 * NARROW, vectors.mask_lanes(x, 2, 5))
    store(out, 3 * NARROW, vectors.where_not_negative(x, y, 1 - y))
    store(out, 4 * NARROW, vectors.lane_indices(x) * vectors.load_broadcast(b, 1, x))
    return vectors.lane_sum(y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_compute_lane_by_lane(dtype):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, NARROW)).astype(dtype)
    a[3], a[5] = np.inf, np.nan
    out = np.empty(5 * NARROW, dtype)
    total = _on_vectors(out, a, b)
    product, largest, kept, chosen, numbers = out.reshape(5, NARROW)
    np.testing.assert_allclose(product, a * b + 2, rtol=4 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(largest, np.where(a > b, a, b))  # b where a is NaN
    np.testing.assert_array_equal(kept, [a[lane] if 2 <= lane < 5 else 0 for lane in range(NARROW)])
    np.testing.assert_array_equal(chosen, np.where(a >= 0, b, 1 - b))
    np.testing.assert_array_equal(numbers, np.arange(NARROW, dtype=dtype) * b[1])
    np.testing.assert_allclose(total, b.sum(), rtol=1e-5)


@njit
def _exponentials(x, out):
    for at in range(0, len(x), NARROW):
        store(out, at, vectors.exp2(load(x, at, broadcast(x[0], NARROW))))


@njit
def _logarithms(x, out):
    for at in range(0, len(x), NARROW):
        store(out, at, vectors.log2(load(x, at, broadcast(x[0], NARROW))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp2_is_right_to_the_last_digits_and_keeps_nan(dtype):
    x = np.concatenate((np.linspace(-126, 0, 1000), np.linspace(0, 100, 1000))).astype(dtype)
    out = np.empty_like(x)
    _exponentials(x, out)
    np.testing.assert_allclose(out, np.exp2(x.astype(np.float64)), rtol=2 * np.finfo(dtype).eps)
    x = np.resize(np.array([-1000, -np.inf, np.nan, 0], dtype), NARROW)
    _exponentials(x, out)
    np.testing.assert_array_equal(out[:4], [2.0**-126, 2.0**-126, np.nan, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_log2_is_right_to_the_last_digits_and_keeps_nan(dtype):
    x = np.exp2(np.linspace(-20, 20, 1600)).astype(dtype)
    out = np.empty_like(x)
    _logarithms(x, out)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(out, np.log2(x.astype(np.float64)), rtol=4 * eps, atol=2 * eps)
    _logarithms(np.resize(np.array([np.nan, np.inf, 1], dtype), NARROW), out)
    assert np.isnan(out[:2]).all()
    assert out[2] == 0


# ------------------------------------------------------------------------------------------------ tiles


@njit
def _products(out, keys, row, queries, count, depth, channels, weights, rows):
    tiles.add_product(out, broadcast(out[0], WIDE) * 0 + 0.5, keys, row, 1, queries, count, depth, 0)
    tiles.add_product(out, broadcast(out[0], NARROW) * 0 + 0.5, keys, row, 1, queries, count, depth, WIDE)
    tiles.add_outer(channels, 0, weights, rows, row, count, WIDE - 3, 0, broadcast(out[0], PAIR))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_on_strips_are_matrix_products(dtype):
    rng = np.random.default_rng(1)
    count, depth, row = 8, 11, PAIR
    keys, queries, out = (
        rng.standard_normal(shape).astype(dtype) for shape in ((8, row), (16, TILE_STRIDE), (8, TILE_STRIDE))
    )
    weights, rows, channels = (
        rng.standard_normal(shape).astype(dtype) for shape in ((8, TILE_STRIDE), (WIDE, row), (8, row))
    )
    after, grads = out.copy(), channels.copy()
    _products(after.ravel(), keys.ravel(), row, queries.ravel(), count, depth, grads.ravel(), weights.ravel(),
              rows.ravel())  # fmt: skip
    strips = WIDE + NARROW
    expected = out / 2 + keys[:, :depth].astype(np.float64) @ queries[:depth]
    tolerance = {"rtol": 40 * np.finfo(dtype).eps, "atol": 40 * np.finfo(dtype).eps}
    np.testing.assert_allclose(after[:, :strips], expected[:, :strips], **tolerance)
    np.testing.assert_array_equal(after[:, strips:], out[:, strips:])
    used = slice(WIDE - 3)
    np.testing.assert_allclose(grads, channels + weights[:, used].astype(np.float64) @ rows[used], **tolerance)


@njit
def _copy_and_transpose(source, start, stride, rows, length, copied, turned):
    tiles.copy_rows(copied, 0, WIDE, source, start, stride, rows, length, 2.0)
    tiles.transpose(turned, TILE_STRIDE, copied, WIDE, rows, length)


def test_copies_and_transposes_of_any_length():
    source = np.arange(5000, dtype=np.float32)
    for rows, length in ((1, 1), (3, NARROW), (NARROW, 3), (NARROW + 5, NARROW + 1), (2 * NARROW, WIDE)):
        copied, turned = np.full((64, WIDE), np.nan, np.float32), np.zeros((WIDE, TILE_STRIDE), np.float32)
        _copy_and_transpose(source, 7, 71, rows, length, copied.ravel(), turned.ravel())
        expected = 2 * np.lib.stride_tricks.as_strided(source[7:], (rows, length), (71 * 4, 4))
        np.testing.assert_array_equal(copied[:rows, :length], expected)
        np.testing.assert_array_equal(turned[:length, :rows], expected.T)
        assert np.isnan(copied[rows:]).all()


# ------------------------------------------------------------------------------------------------ bfloat16


@njit
def _widen(numbers, bits, target, count):
    load_rows(target, 0, WIDE, StridedTensor(numbers, 0, 0, WIDE, bits, 1), 0, WIDE, count // WIDE, WIDE - 3, 2.0)


@njit
def _narrow(numbers, bits, source, count):
    store_rows(StridedTensor(numbers, 0, 0, WIDE, bits, 1), 0, WIDE, source, 0, WIDE, count // WIDE, WIDE - 3, 0.5)


def all_bfloat16():
    """Return all bfloat16 numbers."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bfloat16_is_read_exactly(dtype):
    given = all_bfloat16()
    read = np.full(len(given), 7, dtype)
    _widen(np.empty(0, dtype), given.view(torch.int16).numpy().view(np.uint16), read, len(given))
    columns = np.arange(len(given)) % WIDE < WIDE - 3
    with np.errstate(all="ignore"):  # twice the largest ones are infinite; NaN
        np.testing.assert_array_equal(read[columns], dtype(2) * given.float().numpy().astype(dtype)[columns])
    assert (read[~columns] == 7).all()  # after the end of a row


def between_bfloat16():
    """Return float32 numbers next to and halfway between all bfloat16 numbers; ties round to even, or to infinity."""
    each = all_bfloat16().view(torch.int16).int() << 16
    return torch.cat([each | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)


def narrowed(given, dtype):
    """Return twice some numbers as written in bfloat16, and whether they are written at the right column of a row."""
    source = (2 * given.double()).to(dtype).numpy()
    bits = np.full(len(source), 7, np.uint16)
    _narrow(np.empty(0, source.dtype), bits, source, len(source))
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), np.arange(len(source)) % WIDE < WIDE - 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_is_rounded_as_torch_rounds_it(dtype):
    given = between_bfloat16()
    if dtype == torch.float32:
        given = given[(given.abs() < 1e38) | ~given.isfinite()]  # twice the others is infinite
    given = torch.cat((given, given[: -len(given) % WIDE]))
    written, columns = narrowed(given, dtype)
    expected = given.to(torch.bfloat16)
    torch.testing.assert_close(written[columns], expected[columns], rtol=0, atol=0, equal_nan=True)
    assert (written.view(torch.int16)[~columns] == 7).all()
    cut_off = (given.view(torch.int32) & ~0xFFFF).view(torch.float32)  # rounding towards 0 is detected
    assert (written.float() != cut_off)[columns & given.isfinite().numpy()].any()


# ------------------------------------------------------------------------------------------------ the bias


@njit
def _bias(logits, grads, cells, start, stride, table, grad_cells, points, grad_points, tile, step):
    padded = Table(cells, start, stride, *table.shape)
    bias.fill_table(padded, table.ravel(), 0, 1.0)
    count = len(points) // 2
    bias.write_bias(logits, padded, points, 0, count, Tile(*tile), Step(*step))
    grad_table = Table(grad_cells, start, stride, *table.shape)
    bias.add_bias_gradients(grads[2:], padded, grad_table, points, 0, grad_points, 0, count, Tile(*tile), Step(*step))


KINDS = {UNIT: (1.0, 1.0), NEAR_UNIT: (0.7, 1 - 1 / 23), GENERAL: (1.3, 0.4)}
TILES = ((0, 0, 3, 23), (2, 0, 1, 23), (2, 5, 1, 9))  # whole rows, one row, and a part of it
POINTS = np.array([[1.3, 2.6], [0, 0], [-1.25, 21.5], [3, -11.75], [-30, 4], [2, 1e30], [-np.inf, 1], [np.nan, 1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", TILES)
def test_bias_and_its_gradients_are_those_of_bilinear_samples(kind, tile):
    """The table may have any size, independent of the map."""
    rng = np.random.default_rng(2)
    table, step = rng.standard_normal((5, 27)), KINDS[kind]
    tiled = tiling.make_tiling(1, 1, (3, 23), table.shape, 1)
    cells = np.full(((5 + 2 * bias.table_padding(3, 23)[0]) * tiled.table_stride, 2), np.nan).T.copy()
    cells[1] = 0
    logits, grads = np.zeros((len(POINTS), TILE_STRIDE)), rng.standard_normal((len(POINTS), TILE_STRIDE))
    before = np.concatenate((np.full(2, np.nan), grads.ravel()))
    grad_points = np.zeros(POINTS.size)
    _bias(logits.ravel(), before, cells[0], tiled.table_start, tiled.table_stride, table, cells[1], POINTS.ravel(),
          grad_points, tile, (kind, *step))  # fmt: skip
    row, column, rows, columns = tile
    i, j = np.indices((rows, columns)).reshape(2, 1, -1)
    places = np.stack((POINTS[:, :1] + (row + i) * step[0], POINTS[:, 1:] + (column + j) * step[1]), axis=-1)
    lanes = rows * columns
    expected = bilinear_sample(table[None, None], places.reshape(1, -1, 2)).reshape(len(POINTS), lanes)
    np.testing.assert_allclose(logits[:, :lanes], expected, atol=1e-12)
    finite = slice(0, -1)  # the last point is no number
    cotangent = grads[finite, :lanes].reshape(1, 1, -1)
    vjp = bilinear_sample_vjp(cotangent, table[None, None], places[finite].reshape(1, -1, 2))
    by_point = vjp.points_px.reshape(len(POINTS) - 1, lanes, 2).sum(axis=1)
    np.testing.assert_allclose(grad_points.reshape(-1, 2)[finite], by_point, atol=1e-12)
    assert np.isnan(grad_points[-2:]).any()


# ------------------------------------------------------------------------------------------------ machine code


@njit
def _wide_product(out, a, b):
    tiles.add_product(out, broadcast(out[0], WIDE), a, WIDE, 1, b, 8, len(b) // TILE_STRIDE, 0)


@njit
def _outer_product(out, a, b):
    tiles.add_outer(out, 0, a, b, WIDE, 8, len(b) // WIDE, 0, broadcast(out[0], PAIR))


@njit(error_model="numpy", fastmath={"contract"})
def _scalar_product(out, a, b):
    for i in range(8):
        for j in range(len(b) // TILE_STRIDE):
            for lane in range(WIDE):
                out[i * TILE_STRIDE + lane] += a[i * WIDE + j] * b[j * TILE_STRIDE + lane]


def machine_code(function):
    """Return the instructions of a function of three float32 arrays."""
    arrays = [np.zeros(16 * TILE_STRIDE, np.float32) for _ in range(3)]
    function(*arrays)
    (code,) = function.inspect_asm().values()
    return code


def objections(code, sums):
    """Return the reasons why a product does not run at full speed, in packed multiply-adds on registers only.

    Args:
        sums: number of sums accumulated at the same time.
    """
    registers, lanes = ("zmm", 16) if vectors._HAS_AVX512 else ("ymm", 8)
    fused = re.compile(rf"\tvfn?madd\d+ps\t.*%{registers}")
    loop = max(re.split(r"^\S+:", code, flags=re.MULTILINE), key=lambda block: len(fused.findall(block)))
    packed = fused.findall(loop)
    single = re.findall(r"\tvfn?madd\d+ss\t", code)
    spilled = re.findall(rf"\tvmov\w+\t%{registers}\d+, -?\d*\(%r[sb]p", loop)
    found = []
    if len(packed) < sums // lanes:
        found.append(f"{len(packed)} packed multiply-adds on {registers}, expected {sums // lanes} or more")
    if len(single) > 0:
        found.append(f"{len(single)} multiply-adds of single numbers")
    if spilled:
        found.append(f"{len(spilled)} registers put aside")
    return found


@pytest.mark.skipif("+avx2" not in vectors.cpu_target.target_context.codegen().magic_tuple()[2], reason="not AVX2")
def test_products_run_on_whole_registers():
    """The counter-example is the same product as loops over scalars, ten times slower."""
    assert objections(machine_code(_wide_product), 4 * WIDE) == []
    assert objections(machine_code(_outer_product), 4 * PAIR) == []
    assert objections(machine_code(_scalar_product), 4 * WIDE) != []


# ------------------------------------------------------------------------------------------------ tiling


@given(st.integers(1, 70), st.integers(1, 1000), st.integers(1, 64), st.integers(1, 64))
def test_tiles_fit_into_scratch_memory_and_threads_get_equal_parts(height, width, batch_heads, threads):
    tiled = tiling.make_tiling(batch_heads, 8, (height, width), (2 * height - 1, 2 * width - 1), threads)
    assert 1 <= tiled.tile_rows * tiled.tile_columns <= BLOCK_M
    assert tiled.tile_columns == width or tiled.tile_rows == 1
    assert tiled.tiles == -(-height // tiled.tile_rows) * -(-width // tiled.tile_columns)
    assert 1 <= tiled.splits <= tiled.tiles
    equal = batch_heads * tiled.splits % threads == 0
    assert equal or batch_heads * tiled.splits >= 4 * threads or tiled.splits == tiled.tiles


# ------------------------------------------------------------------------------------------------ scratch memory


def test_scratch_arrays_are_found_by_name():
    """Sizes by name become offsets, and the compiled reader cuts the memory into arrays of at least these sizes."""
    sizes = tiling.Forward(table=70, keys=5, values=64, logits=1, queries=2, acc=3, query_rows=4, m=130, l=6)
    packed = launch.pack_arguments(deformable.FIELDS, torch.float32, {}, sizes, 1)
    record = np.frombuffer(packed.record, deformable.FIELDS.record_dtype(torch.float32))[0]
    read = launch.array_reader(tiling.Forward)

    @njit
    def cut(memory, offsets):
        return read(memory, offsets)

    memory = np.arange(packed.scratch_elements)
    arrays = cut(memory, record["array_offsets"])
    assert type(arrays).__name__ == "Forward"
    for size, array in zip(sizes, arrays, strict=True):
        assert size <= len(array) < size + 64
        assert array[0] % 64 == 0
    assert np.array_equal(np.concatenate(arrays), memory)  # in this order, without a gap
    assert arrays.m[0] == 128 + 64 * 6
    assert record["scratch_size"] == 4 * len(memory)
