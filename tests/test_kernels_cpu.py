"""Numba kernels as a whole: results, memory, threads, dtypes; see also `test_kernels_cpu_parts`.

Agreement with the spec on drawn cases is tested with the other backends, in `test_backends`.
"""

import inspect

import numpy as np
import pytest

pytest.importorskip("numba")
import torch

from dat_ref import Convention
from dat_ref.ops.attention import deformable_attention, deformable_attention_vjp
from dat_ref.torch.functional.bias import table_index
from dat_ref.torch.kernels import cpu
from dat_ref.torch.kernels.cpu import bias, deformable, launch, neighborhood, tiles, tiling, vectors
from dat_ref.torch.kernels.cpu.tiles import BLOCK_M, TILE_STRIDE
from dat_ref.torch.kernels.cpu.vectors import NARROW, PAIR


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
    data["origin"], step = table_index(data["points"], table_size, size, convention)
    return data, {"query_size": size, "step": step, "scale": depth**-0.5}, convention


def results(data, how):
    inputs = [data[name] for name in ("q", "k", "v", "origin", "table")]
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
    {"size": (2, BLOCK_M + 9), "samples": 5, "depth": 20},
    {"size": (19, 17), "samples": tiling.BLOCK_N + 1, "depth": PAIR + 1, "heads": 1},
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
    origin, _ = table_index(points, data["table"].shape[1:], *geometry.values())
    origin.backward(grads[3])
    np.testing.assert_allclose(points.grad, expected.points, atol=1e-10)
    assert lse.shape == out.shape[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_uninitialized_memory_is_harmless(dtype):
    """Results and scratch memory may contain NaN, with which PyTorch fills new memory in deterministic mode."""
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
    """Return the guard elements around each piece of scratch memory, which were set to 7."""
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
    """Points anywhere, also NaN, cause no access outside the scratch memory."""
    data, how, _ = example(**case, dtype=torch.float32)
    for place in (-1e30, float("inf"), float("nan"), -2.0 * BLOCK_M, 2.0 * BLOCK_M):
        data["origin"][..., ::2, :] = place
        for step in ((1.0, 1.0), (0.9, 1 - 1 / how["query_size"][1]), (1.6, 0.3)):
            results(data, how | {"step": step})
    assert untouched(guards)


def test_too_little_scratch_memory_is_detected(guards, monkeypatch):
    run = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, fields, dtype, packed, *rest: run(
            kernel, fields, dtype, packed._replace(scratch_elements=packed.scratch_elements - TILE_STRIDE), *rest
        )
    )  # fmt: skip
    results(*example(dtype=torch.float32)[:2])
    assert not untouched(guards)


def test_far_points_have_no_bias_and_no_gradient_and_nan_stays_nan():
    data, how, _ = example(dtype=torch.float32)
    data["origin"][:] = 1e30
    out, _, *grads = results(data, how)
    plain = torch.nn.functional.scaled_dot_product_attention(data["q"], data["k"], data["v"])
    torch.testing.assert_close(out, plain)
    assert not grads[3].any()
    assert not grads[4].any()
    data["origin"][0, 0, 3, 1] = float("nan")
    out, lse, *grads = results(data, how)
    assert all(each.isnan().all() for each in (out, lse, grads[0]))


def test_any_strides_and_results_with_the_strides_of_the_inputs():
    """Inputs with interleaved heads (the output of a linear layer), a transposed last axis, an expanded cotangent."""
    data, how, _ = example(batch=2, dtype=torch.float32)
    usual = results(data, how)
    for name in ("q", "k", "v"):
        data[name] = data[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert not data["q"].is_contiguous()
    strided = results(data, how)
    assert same(usual, strided)
    assert strided[0].stride() == data["q"].stride()
    assert strided[3].stride() == data["k"].stride()
    for name in ("q", "k", "v", "origin", "table"):
        data[name] = data[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert same(usual, results(data, how))
    data["grad"] = torch.ones(()).expand(data["grad"].shape)
    expanded = results(data, how)
    data["grad"] = data["grad"].contiguous()
    assert same(expanded, results(data, how))


def test_half_precision_is_computed_in_single():
    data, how, _ = example(dtype=torch.bfloat16)
    data["origin"] = data["origin"].float()
    narrow = results(data, how)
    wide = results({name: each.float() for name, each in data.items()}, how)
    assert narrow[0].dtype == torch.bfloat16
    assert narrow[1].dtype == torch.float32
    assert [each.dtype for each in narrow[2:]] == [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16]
    torch.testing.assert_close(narrow[0].float(), wide[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", [*CASES, {"size": (40, 23), "samples": 30, "heads": 1}])
def test_bfloat16_is_computed_as_if_it_had_been_converted(case, threads):
    """Results agree up to the last digit, for any strides, also if two threads sum over splits."""
    threads(2)
    data, how, _ = example(**case, dtype=torch.bfloat16)
    data |= {name: data[name].float() for name in ("origin", "table")}
    data["q"] = data["q"].transpose(1, 2).contiguous().transpose(1, 2)
    data["v"] = data["v"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs = [data[name] for name in ("q", "k", "v", "origin", "table")]
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


def test_empty_batch_launches_no_work():
    data, how, _ = example(batch=0)
    out, lse, *grads = results(data, how)
    assert (out.shape, lse.shape) == ((0, 2, 35, 6), (0, 2, 35))
    assert [grad.shape for grad in grads] == [data[name].shape for name in ("q", "k", "v", "origin", "table")]
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
    misses = launch.compile_kernel.cache_info().misses
    for case in CASES:
        results(*example(**case, dtype=torch.float32)[:2])
    assert launch.compile_kernel.cache_info().misses == misses


def test_a_change_to_any_file_of_a_kernel_recompiles_it(monkeypatch):
    usual, source = launch._source_digest(deformable.__name__), inspect.getsource
    for module in (deformable, bias, tiles, vectors, tiling):
        changed = {module: source(module) + "\n"}
        monkeypatch.setattr(inspect, "getsource", lambda each, changed=changed: changed.get(each) or source(each))
        assert launch._source_digest.__wrapped__(deformable.__name__) != usual
    monkeypatch.setattr(inspect, "getsource", source)
    assert launch._source_digest.__wrapped__(deformable.__name__) == usual
