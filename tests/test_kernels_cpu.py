"""The Numba kernels from the inside: their building blocks, memory, threads, and the machine code that comes out.

That the kernels agree with the spec on drawn cases is tested with the other backends, in `test_backends`.
"""

import inspect
import re

import numpy as np
import pytest

pytest.importorskip("numba")
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from dat_ref import Convention
from dat_ref.ops.attention import deformable_attention, deformable_attention_vjp
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.torch.functional.bias import table_lookup
from dat_ref.torch.kernels import cpu
from dat_ref.torch.kernels.cpu import bias, deformable, launch, neighborhood, plan, tiles, vectors
from dat_ref.torch.kernels.cpu.bias import GENERAL, NEAR_UNIT, UNIT, Step, Table, Tile
from dat_ref.torch.kernels.cpu.rows import Rows, read_rows, write_rows
from dat_ref.torch.kernels.cpu.tiles import LANES, ROW
from dat_ref.torch.kernels.cpu.vectors import NARROW, PAIR, WIDE, filled, load, store

DTYPES = (np.float32, np.float64)

# ------------------------------------------------------------------------------------------------ vectors


@njit
def _on_vectors(out, a, b):
    like = filled(a[0], NARROW)
    x, y = load(a, 0, like), load(b, 0, like)
    store(out, 0, x * y + 2)
    store(out, NARROW, vectors.maximum(x, y))
    store(out, 2 * NARROW, vectors.keep_lanes(x, 2, 5))
    store(out, 3 * NARROW, vectors.where_not_negative(x, y, 1 - y))
    store(out, 4 * NARROW, vectors.lane_numbers(x) * vectors.spread(b, 1, x))
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
        store(out, at, vectors.exp2(load(x, at, filled(x[0], NARROW))))


@njit
def _logarithms(x, out):
    for at in range(0, len(x), NARROW):
        store(out, at, vectors.log2(load(x, at, filled(x[0], NARROW))))


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
def test_log2_is_right_to_the_last_digits_and_makes_no_number_of_what_is_none(dtype):
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
    tiles.add_product(out, filled(out[0], WIDE) * 0 + 0.5, keys, row, 1, queries, count, depth, 0)
    tiles.add_product(out, filled(out[0], NARROW) * 0 + 0.5, keys, row, 1, queries, count, depth, WIDE)
    tiles.add_outer(channels, 0, weights, rows, row, count, WIDE - 3, 0, filled(out[0], PAIR))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_on_strips_are_matrix_products(dtype):
    rng = np.random.default_rng(1)
    count, depth, row = 8, 11, PAIR
    keys, queries, out = (rng.standard_normal(shape).astype(dtype) for shape in ((8, row), (16, ROW), (8, ROW)))
    weights, rows, channels = (rng.standard_normal(shape).astype(dtype) for shape in ((8, ROW), (WIDE, row), (8, row)))
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
    tiles.transpose(turned, ROW, copied, WIDE, rows, length)


def test_copies_and_transposes_of_any_length():
    source = np.arange(5000, dtype=np.float32)
    for rows, length in ((1, 1), (3, NARROW), (NARROW, 3), (NARROW + 5, NARROW + 1), (2 * NARROW, WIDE)):
        copied, turned = np.full((64, WIDE), np.nan, np.float32), np.zeros((WIDE, ROW), np.float32)
        _copy_and_transpose(source, 7, 71, rows, length, copied.ravel(), turned.ravel())
        expected = 2 * np.lib.stride_tricks.as_strided(source[7:], (rows, length), (71 * 4, 4))
        np.testing.assert_array_equal(copied[:rows, :length], expected)
        np.testing.assert_array_equal(turned[:length, :rows], expected.T)
        assert np.isnan(copied[rows:]).all()


# ------------------------------------------------------------------------------------------------ bfloat16


@njit
def _widen(numbers, bits, target, count):
    read_rows(target, 0, WIDE, Rows(numbers, 0, 0, WIDE, bits, 1), 0, WIDE, count // WIDE, WIDE - 3, 2.0)


@njit
def _narrow(numbers, bits, source, count):
    write_rows(Rows(numbers, 0, 0, WIDE, bits, 1), 0, WIDE, source, 0, WIDE, count // WIDE, WIDE - 3, 0.5)


def all_bfloat16():
    """Return every number that there is."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bfloat16_is_read_as_what_it_is(dtype):
    given = all_bfloat16()
    read = np.full(len(given), 7, dtype)
    _widen(np.empty(0, dtype), given.view(torch.int16).numpy().view(np.uint16), read, len(given))
    columns = np.arange(len(given)) % WIDE < WIDE - 3
    with np.errstate(all="ignore"):  # the largest ones, doubled; NaN
        np.testing.assert_array_equal(read[columns], dtype(2) * given.float().numpy().astype(dtype)[columns])
    assert (read[~columns] == 7).all()  # behind the end of a row


def between_bfloat16():
    """Return numbers beside and between all there are: a tie goes to the even one, or to infinity."""
    each = all_bfloat16().view(torch.int16).int() << 16
    return torch.cat([each | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)


def narrowed(given, dtype):
    """Return what is written of twice some numbers, and whether it is that at a column of a row."""
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
    cut_off = (given.view(torch.int32) & ~0xFFFF).view(torch.float32)  # what rounds towards 0 is noticed
    assert (written.float() != cut_off)[columns & given.isfinite().numpy()].any()


# ------------------------------------------------------------------------------------------------ the bias


@njit
def _bias(scores, grads, cells, origin, stride, table, grad_cells, points, grad_points, tile, step):
    padded = Table(cells, origin, stride, *table.shape)
    bias.fill_table(padded, table.ravel(), 0, 1.0)
    count = len(points) // 2
    bias.write_bias(scores, padded, points, 0, count, Tile(*tile), Step(*step))
    grad_table = Table(grad_cells, origin, stride, *table.shape)
    bias.add_bias_gradients(grads[2:], padded, grad_table, points, 0, grad_points, 0, count, Tile(*tile), Step(*step))


KINDS = {UNIT: (1.0, 1.0), NEAR_UNIT: (0.7, 1 - 1 / 23), GENERAL: (1.3, 0.4)}
TILES = ((0, 0, 3, 23), (2, 0, 1, 23), (2, 5, 1, 9))  # whole rows, one row, and a part of it
POINTS = np.array([[1.3, 2.6], [0, 0], [-1.25, 21.5], [3, -11.75], [-30, 4], [2, 1e30], [-np.inf, 1], [np.nan, 1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", TILES)
def test_bias_and_its_gradients_are_those_of_bilinear_samples(kind, tile):
    """Of a table that has nothing to do with the size of the map."""
    rng = np.random.default_rng(2)
    table, step = rng.standard_normal((5, 27)), KINDS[kind]
    sizes = plan.cut(1, 1, (3, 23), table.shape, 1)
    cells = np.full(((5 + 2 * bias.padding(3, 23)[0]) * sizes.table_stride, 2), np.nan).T.copy()
    cells[1] = 0
    scores, grads = np.zeros((len(POINTS), ROW)), rng.standard_normal((len(POINTS), ROW))
    before = np.concatenate((np.full(2, np.nan), grads.ravel()))
    grad_points = np.zeros(POINTS.size)
    _bias(scores.ravel(), before, cells[0], sizes.table_origin, sizes.table_stride, table, cells[1], POINTS.ravel(),
          grad_points, tile, (kind, *step))  # fmt: skip
    row, column, rows, columns = tile
    i, j = np.indices((rows, columns)).reshape(2, 1, -1)
    places = np.stack((POINTS[:, :1] + (row + i) * step[0], POINTS[:, 1:] + (column + j) * step[1]), axis=-1)
    lanes = rows * columns
    expected = bilinear_sample(table[None, None], places.reshape(1, -1, 2)).reshape(len(POINTS), lanes)
    np.testing.assert_allclose(scores[:, :lanes], expected, atol=1e-12)
    finite = slice(0, -1)  # the last point is no number
    cotangent = grads[finite, :lanes].reshape(1, 1, -1)
    vjp = bilinear_sample_vjp(cotangent, table[None, None], places[finite].reshape(1, -1, 2))
    by_point = vjp.points_px.reshape(len(POINTS) - 1, lanes, 2).sum(axis=1)
    np.testing.assert_allclose(grad_points.reshape(-1, 2)[finite], by_point, atol=1e-12)
    assert np.isnan(grad_points[-2:]).any()


# ------------------------------------------------------------------------------------------------ machine code


@njit
def _wide_product(out, a, b):
    tiles.add_product(out, filled(out[0], WIDE), a, WIDE, 1, b, 8, len(b) // ROW, 0)


@njit
def _outer_product(out, a, b):
    tiles.add_outer(out, 0, a, b, WIDE, 8, len(b) // WIDE, 0, filled(out[0], PAIR))


@njit(error_model="numpy", fastmath={"contract"})
def _scalar_product(out, a, b):
    for i in range(8):
        for j in range(len(b) // ROW):
            for lane in range(WIDE):
                out[i * ROW + lane] += a[i * WIDE + j] * b[j * ROW + lane]


def machine_code(function):
    """Return the instructions of a function of three float32 arrays."""
    arrays = [np.zeros(16 * ROW, np.float32) for _ in range(3)]
    function(*arrays)
    (code,) = function.inspect_asm().values()
    return code


def objections(code, sums):
    """Return what keeps a product from running at full speed: packed multiply-adds, in registers, and no others.

    Args:
        sums: numbers that are summed at the same time.
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
    """As loops over scalars, which look innocent, the same product runs ten times slower: it must be objected to."""
    assert objections(machine_code(_wide_product), 4 * WIDE) == []
    assert objections(machine_code(_outer_product), 4 * PAIR) == []
    assert objections(machine_code(_scalar_product), 4 * WIDE) != []


# ------------------------------------------------------------------------------------------------ whole calls


def example(batch=1, heads=2, groups=1, size=(5, 7), samples=9, depth=6, dtype=torch.float64, convention=None, seed=0):
    """Return the arguments of the kernels, and the spec's."""
    convention = convention or Convention.DATPP2023
    rng = torch.Generator().manual_seed(seed)
    queries = size[0] * size[1]
    shapes = {"q": (queries, depth), "k": (samples, depth), "v": (samples, depth), "grad": (queries, depth)}
    data = {
        name: torch.randn(batch, heads, *shape, generator=rng, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    data["points"] = (1.2 * torch.randn(batch, groups, samples, 2, generator=rng, dtype=torch.float64)).to(dtype)
    table_size = (2 * size[0] - 1, 2 * size[1] - 1)
    data["table"] = torch.randn(heads, *table_size, generator=rng, dtype=torch.float64).to(dtype)
    data["base"], step = table_lookup(data["points"], table_size, size, convention)
    return data, {"query_size": size, "step": step, "scale": depth**-0.5}, convention


def results(data, how):
    inputs = [data[name] for name in ("q", "k", "v", "base", "table")]
    out, lse = cpu.deformable_forward(*inputs, **how)
    return [out, lse, *cpu.deformable_backward(data["grad"], *inputs, out, lse, **how)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


CASES = (
    {"size": (1, 1), "samples": 1, "depth": 1},
    {"batch": 2, "heads": 6, "groups": 3, "size": (5, 7), "samples": 13, "depth": 3},
    {"size": (2, LANES + 9), "samples": 5, "depth": 20},
    {"size": (19, 17), "samples": plan.KEYS + 1, "depth": PAIR + 1, "heads": 1},
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("convention", [Convention.DATPP2023, Convention.CVPR2022])
def test_results_are_the_specs(case, convention):
    data, how, convention = example(**case, convention=convention)
    out, lse, *grads = results(data, how)
    arrays = [data[name].numpy() for name in ("q", "k", "v", "points", "table")]
    geometry = {"query_size": how["query_size"], "convention": convention}
    np.testing.assert_allclose(out, deformable_attention(*arrays, **geometry), atol=1e-12)
    expected = deformable_attention_vjp(data["grad"].numpy(), *arrays, **geometry)
    for grad, name in ((grads[0], "q"), (grads[1], "k"), (grads[2], "v"), (grads[4], "bias_table")):
        np.testing.assert_allclose(grad, getattr(expected, name), atol=1e-11, err_msg=name)
    points = data["points"].requires_grad_()
    base, _ = table_lookup(points, data["table"].shape[1:], *geometry.values())
    base.backward(grads[3])
    np.testing.assert_allclose(points.grad, expected.points, atol=1e-10)
    assert lse.shape == out.shape[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_that_comes_with_nan_in_it_does_no_harm(dtype):
    """PyTorch fills new memory with NaN when it is told to be deterministic: results and scratch memory alike."""
    for case in CASES:
        data, how, _ = example(**case, dtype=dtype)
        usual = results(data, how)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            poisoned = results(data, how)
        finally:
            torch.use_deterministic_algorithms(False)
        assert same(usual, poisoned)
        assert all(each.isfinite().all() for each in poisoned)


@pytest.fixture
def guards(monkeypatch):
    """What lies around each piece of scratch memory, which was sevens."""
    pieces, margin = [], 4096

    def guarded(size, **options):
        whole = torch.full((size + 2 * margin,), 7.0, **options)
        pieces.append((whole[:margin], whole[-margin:]))
        return whole[margin:-margin]

    monkeypatch.setattr(launch, "empty", guarded)
    return pieces


def untouched(guards):
    return len(guards) > 0 and all((guard == 7).all() for pair in guards for guard in pair)


@pytest.mark.parametrize("case", [*CASES, {"size": (40, 1)}, {"size": (1, 33)}])
def test_no_memory_beyond_the_scratch_is_touched(guards, case):
    """Wherever the points are, and be they no numbers."""
    data, how, _ = example(**case, dtype=torch.float32)
    for place in (-1e30, float("inf"), float("nan"), -2.0 * LANES, 2.0 * LANES):
        data["base"][..., ::2, :] = place
        for step in ((1.0, 1.0), (0.9, 1 - 1 / how["query_size"][1]), (1.6, 0.3)):
            results(data, how | {"step": step})
    assert untouched(guards)


def test_less_scratch_memory_than_a_kernel_needs_is_noticed(guards, monkeypatch):
    run = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, fields, dtype, planned, *rest: run(
            kernel, fields, dtype, planned._replace(room=planned.room - ROW), *rest
        )
    )  # fmt: skip
    results(*example(dtype=torch.float32)[:2])
    assert not untouched(guards)


def test_far_points_have_no_bias_and_no_gradient_and_nan_stays_nan():
    data, how, _ = example(dtype=torch.float32)
    data["base"][:] = 1e30
    out, _, *grads = results(data, how)
    plain = torch.nn.functional.scaled_dot_product_attention(data["q"], data["k"], data["v"])
    torch.testing.assert_close(out, plain)
    assert not grads[3].any()
    assert not grads[4].any()
    data["base"][0, 0, 3, 1] = float("nan")
    out, lse, *grads = results(data, how)
    assert all(each.isnan().all() for each in (out, lse, grads[0]))


def test_any_strides_and_results_that_lie_as_the_inputs_do():
    """Heads inside of rows, as a linear layer leaves them; a transposed last axis; an expanded cotangent."""
    data, how, _ = example(batch=2, dtype=torch.float32)
    usual = results(data, how)
    for name in ("q", "k", "v"):
        data[name] = data[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert not data["q"].is_contiguous()
    strided = results(data, how)
    assert same(usual, strided)
    assert strided[0].stride() == data["q"].stride()
    assert strided[3].stride() == data["k"].stride()
    for name in ("q", "k", "v", "base", "table"):
        data[name] = data[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert same(usual, results(data, how))
    data["grad"] = torch.ones(()).expand(data["grad"].shape)
    expanded = results(data, how)
    data["grad"] = data["grad"].contiguous()
    assert same(expanded, results(data, how))


def test_half_precision_is_computed_in_single():
    data, how, _ = example(dtype=torch.bfloat16)
    data["base"] = data["base"].float()
    narrow = results(data, how)
    wide = results({name: each.float() for name, each in data.items()}, how)
    assert narrow[0].dtype == torch.bfloat16
    assert narrow[1].dtype == torch.float32
    assert [each.dtype for each in narrow[2:]] == [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16]
    torch.testing.assert_close(narrow[0].float(), wide[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", [*CASES, {"size": (40, 23), "samples": 30, "heads": 1}])
def test_bfloat16_is_computed_as_if_it_had_been_converted(case, threads):
    """Results but for their last digit; from tensors of any strides, also those summed over parts by two threads."""
    threads(2)
    data, how, _ = example(**case, dtype=torch.bfloat16)
    data |= {name: data[name].float() for name in ("base", "table")}
    data["q"] = data["q"].transpose(1, 2).contiguous().transpose(1, 2)
    data["v"] = data["v"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs = [data[name] for name in ("q", "k", "v", "base", "table")]
    out, lse = cpu.deformable_forward(*inputs, **how)
    grads = cpu.deformable_backward(data["grad"], *inputs, out, lse, **how)
    wide = [each.float() for each in inputs]
    expected, expected_lse = cpu.deformable_forward(*wide, **how)
    expected_grads = cpu.deformable_backward(data["grad"].float(), *wide, out.float(), lse, **how)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        digit = 2**-8 if ours.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(ours.float(), theirs, rtol=digit, atol=1e-6 * float(theirs.abs().max() + 1))
    assert [grad.stride() for grad in grads[:2]] == [torch.empty_like(each).stride() for each in inputs[:2]]
    data["k"][0, 0, 0] = float("nan")
    assert results(data, how)[0][0, 0].isnan().all()


@pytest.mark.parametrize(("size", "kernel", "dilation", "depth"), [((9, 7), 5, 1, 3), ((11, 13), 3, 2, NARROW + 1)])
def test_neighborhoods_in_bfloat16_are_computed_as_if_they_had_been_converted(size, kernel, dilation, depth):
    rng = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 3, size[0] * size[1], depth, generator=rng).to(torch.bfloat16)
    table = torch.randn(3, 2 * kernel - 1, 2 * kernel - 1, generator=rng)
    how = {"size": size, "kernel": kernel, "dilation": dilation, "scale": depth**-0.5}
    out, lse = neighborhood.neighborhood_forward(q, k, v, table, **how)
    grads = neighborhood.neighborhood_backward(grad, q, k, v, table, out, lse, **how)
    wide = (q.float(), k.float(), v.float(), table)
    expected = neighborhood.neighborhood_forward(*wide, **how)[0]
    expected_grads = neighborhood.neighborhood_backward(grad.float(), *wide, out.float(), lse, **how)
    assert [each.dtype for each in (out, *grads)] == [torch.bfloat16] * 4 + [torch.float32]
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        digit = 2**-8 if ours.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(ours.float(), theirs, rtol=digit, atol=1e-6 * float(theirs.abs().max() + 1))


def test_no_images_no_work():
    data, how, _ = example(batch=0)
    out, lse, *grads = results(data, how)
    assert (out.shape, lse.shape) == ((0, 2, 35, 6), (0, 2, 35))
    assert [grad.shape for grad in grads] == [data[name].shape for name in ("q", "k", "v", "base", "table")]
    assert not grads[4].any()


def test_the_number_and_the_kind_of_threads_do_not_matter(monkeypatch, threads):
    data, how, _ = example(size=(40, 23), samples=30, heads=1)
    threads(1)
    alone = results(data, how)
    for count in (2, 3):
        threads(count)
        together = results(data, how)
        assert same(together, results(data, how))
        for one, other in zip(alone, together):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_openmp", lambda: None)  # as where torch has no OpenMP
            assert same(together, results(data, how))


def test_code_is_compiled_once_for_all_sizes(monkeypatch):
    results(*example(dtype=torch.float32)[:2])
    misses = launch.compiled.cache_info().misses
    for case in CASES:
        results(*example(**case, dtype=torch.float32)[:2])
    assert launch.compiled.cache_info().misses == misses


def test_a_change_to_any_file_that_a_kernel_uses_compiles_it_anew(monkeypatch):
    usual, source = launch._sources(deformable.__name__), inspect.getsource
    for module in (deformable, bias, tiles, vectors, plan):
        changed = {module: source(module) + "\n"}
        monkeypatch.setattr(inspect, "getsource", lambda each, changed=changed: changed.get(each) or source(each))
        assert launch._sources.__wrapped__(deformable.__name__) != usual
    monkeypatch.setattr(inspect, "getsource", source)
    assert launch._sources.__wrapped__(deformable.__name__) == usual


# ------------------------------------------------------------------------------------------------ plans


@given(st.integers(1, 70), st.integers(1, 1000), st.integers(1, 64), st.integers(1, 64))
def test_tiles_fit_into_scratch_memory_and_threads_get_equal_parts(height, width, pairs, threads):
    sizes = plan.cut(pairs, 8, (height, width), (2 * height - 1, 2 * width - 1), threads)
    assert 1 <= sizes.tile_rows * sizes.tile_columns <= LANES
    assert sizes.tile_columns == width or sizes.tile_rows == 1
    assert sizes.tiles == -(-height // sizes.tile_rows) * -(-width // sizes.tile_columns)
    assert 1 <= sizes.parts <= sizes.tiles
    equal = pairs * sizes.parts % threads == 0
    assert equal or pairs * sizes.parts >= 4 * threads or sizes.parts == sizes.tiles
