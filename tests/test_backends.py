"""Every backend of the core against the spec: outputs and all five gradients, for points inside and outside the map."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from helpers.cores import (  # noqa: E402
    assert_core,
    assert_core_within_budget,
    cores,
    exact_cores,
    gradients_of,
    lattice_distance,
    one_core,
    run_core,
)
from helpers.tensors import assert_close, assert_within_budget, rejects, tensor  # noqa: E402

from dat_ref import Convention, ShapeError  # noqa: E402
from dat_ref.complexity.torch_counter import torch_peak_bytes  # noqa: E402
from dat_ref.ops import attention as np_attention  # noqa: E402
from dat_ref.torch import functional, kernels  # noqa: E402
from dat_ref.torch.functional import attention as torch_attention  # noqa: E402
from dat_ref.torch.functional import blockwise, registry  # noqa: E402

PLAIN = ["eager", "matmul", "blockwise", "auto"]
needs_numba = pytest.mark.skipif(bool(kernels.missing("cpu")), reason=kernels.missing("cpu"))
BACKENDS = [*PLAIN, pytest.param("cpu", marks=needs_numba)]
FUSED = [each for each in BACKENDS if each not in ("eager", "matmul", "auto")]


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("backend", BACKENDS)
@given(core=exact_cores(), scale=st.sampled_from([None, 0.7]))
def test_on_and_off_the_lattice(backend, core, scale):
    """All backends use the right-hand slope where the table is read exactly at its entries."""
    inputs, geometry = core
    # The releases' sampler takes normalised coordinates, whose rounding selects the side of the slope.
    if backend == "eager" and lattice_distance(inputs, geometry) < 1e-6:
        _, actual = run_core(inputs, geometry, backend, scale=scale)
        assert_close(actual, np_attention.deformable_attention(**inputs, **geometry, scale=scale))
    else:
        assert_core(inputs, geometry, backend, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@given(core=cores())
def test_on_maps_of_any_size(backend, core):
    inputs, geometry = core
    assume(lattice_distance(inputs, geometry) > 1e-6)  # closer points depend on the rounding in the spec
    assert_core(inputs, geometry, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(core=exact_cores(smallest_batch=1, fewest_samples=2))
def test_float32_is_within_the_budget(backend, core):
    inputs, geometry = core
    if backend != "eager" or lattice_distance(inputs, geometry) > 1e-3:
        assert_core_within_budget(inputs, geometry, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "eager"])
def test_half_precision_is_within_the_budget(dtype, backend):
    """With half-precision values and float32 geometry, errors do not exceed those of the released formulation."""
    inputs, geometry = one_core()
    truth = np_attention.deformable_attention(**inputs, **geometry)
    points = torch.from_numpy(inputs["points"]).float()
    values = {name: torch.from_numpy(leaf).to(dtype) for name, leaf in inputs.items()} | {"points": points}
    yardstick = functional.deformable_attention(*values.values(), **geometry, backend="eager")
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            actual = functional.deformable_attention(*values.values(), **geometry, backend=backend)
        assert actual.dtype is dtype
        assert_within_budget(actual, yardstick, truth, factor=3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bias(backend):
    inputs, geometry = one_core()
    assert_core(inputs | {"bias_table": None}, geometry, backend)


@given(core=exact_cores(), budget=st.sampled_from([1, 7, 60, 500]))
def test_tiles_of_any_size_make_the_same(core, budget):
    """Tile sizes from parts of a row, single keys, heads or groups up to several images give the same result."""
    inputs, geometry = core
    with pytest.MonkeyPatch.context() as patch:
        for tiles in (blockwise.FORWARD_MAX_LOGITS, blockwise.BACKWARD_MAX_LOGITS, torch_attention._MAX_LOGITS):
            patch.setitem(tiles, "cpu", budget)
        for backend in ("blockwise", "matmul"):
            assert_core(inputs, geometry, backend)


@pytest.mark.parametrize("built", [(2, 9), (9, 2), (31, 40)])
@pytest.mark.parametrize("convention", Convention)
def test_a_table_for_a_map_of_another_size(convention, built):
    """Query spacings below half a table cell and above two cells."""
    inputs, geometry = one_core(convention=convention)
    rng = np.random.default_rng(0)
    inputs["bias_table"] = rng.standard_normal((6, 2 * built[0] - 1, 2 * built[1] - 1))
    for backend in ("matmul", "blockwise", *(["cpu"] if not kernels.missing("cpu") else [])):
        assert_core(inputs, geometry, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_images_read_the_table_from_slabs(backend):
    """With small maps and many keys, windows are slices of a wider copy of the table."""
    rng = np.random.default_rng(0)
    for convention in Convention:
        inputs, geometry = one_core(convention=convention, batch=19)
        samples = rng.uniform(-1.5, 1.5, (19, 3, 7, 2))
        assert_core(inputs | {"points": samples}, geometry, backend)


# ------------------------------------------------------------------------------------------------ unusual input


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_points_affect_only_their_group(backend, dtype):
    """A key at infinity has no bias and no gradient from it; one at NaN makes its group's queries NaN, no others."""
    inputs, geometry = one_core()
    for far in (np.inf, -np.inf, 1e30, 3e38):
        beyond, outside = (inputs | {"points": inputs["points"].copy()} for _ in range(2))
        beyond["points"][:, :, 2], outside["points"][:, :, 2] = far, 50.0
        results = []
        for case in (beyond, outside):
            leaves, output = run_core(
                {name: leaf.astype(str(dtype)[6:]) for name, leaf in case.items()}, geometry, backend
            )
            results.append([output.detach(), *gradients_of(leaves, output, np.ones(output.shape)).values()])
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs.double().numpy(), 1e-6)
    unknown = inputs | {"points": inputs["points"].copy()}
    unknown["points"][1, 2, 3, 0] = np.nan
    _, output = run_core(unknown, geometry, backend)
    assert output[1, 4:6].isnan().all()  # the heads of group 2
    output = output.detach().clone()
    output[1, 4:6] = 0
    assert output.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_empty_batches(backend):
    inputs, geometry = one_core()
    cotangent = np.random.default_rng(1).standard_normal((2, 6, 20, 3))
    leaves, output = run_core(inputs, geometry, backend)
    expected = [output, *gradients_of(leaves, output, cotangent).values()]
    views = {
        "q": tensor(inputs["q"].transpose(0, 2, 1, 3)).transpose(1, 2),
        "k": tensor(inputs["k"].transpose(0, 1, 3, 2)).transpose(2, 3),  # the last axis is not contiguous
        "v": tensor(np.concatenate([inputs["v"]] * 2, axis=3))[..., :3],
        "points": tensor(inputs["points"].transpose(3, 1, 2, 0)).permute(3, 1, 2, 0),
        "bias_table": tensor(inputs["bias_table"].transpose(0, 2, 1)).transpose(1, 2),
    }
    output = functional.deformable_attention(*views.values(), **geometry, backend=backend)
    actual = [output, *gradients_of(views, output, cotangent).values()]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs.detach().numpy())
    (everywhere,) = torch.autograd.grad(run_core(inputs, geometry, backend)[1].sum(), output, allow_unused=True)
    assert everywhere is None
    empty = {name: leaf if name == "bias_table" else leaf[:0] for name, leaf in inputs.items()}
    assert_core(empty, geometry, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_cotangent(backend):
    """The cotangent of a sum has strides of zero and is accepted."""
    inputs, geometry = one_core()
    leaves, output = run_core(inputs, geometry, backend)
    grads = torch.autograd.grad(output.sum(), list(leaves.values()))
    expected = np_attention.deformable_attention_vjp(np.ones(output.shape), **inputs, **geometry)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(grad, getattr(expected, name), what=name)


@pytest.mark.parametrize("backend", FUSED)
def test_results_are_reproducible_bit_for_bit(backend):
    inputs, geometry = one_core(batch=5)
    cotangent = np.random.default_rng(1).standard_normal((5, 6, 20, 3))
    runs = []
    for _ in range(2):
        leaves, output = run_core(inputs, geometry, backend)
        runs.append([output, *gradients_of(leaves, output, cotangent).values()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_requested_gradients_are_computed(backend):
    inputs, geometry = one_core()
    leaves = {name: torch.from_numpy(leaf) for name, leaf in inputs.items()}
    for name, leaf in leaves.items():
        output = functional.deformable_attention(
            **(leaves | {name: leaf.clone().requires_grad_()}), **geometry, backend=backend
        )
        assert output.requires_grad
        assert output.grad_fn is not None
    assert not functional.deformable_attention(**leaves, **geometry, backend=backend).requires_grad


@pytest.mark.parametrize(
    "change",
    [
        {"q": (2, 6, 19, 3)},
        {"k": (2, 6, 7, 4)},
        {"v": (2, 5, 7, 3)},
        {"points": (2, 4, 7, 2)},
        {"points": (2, 3, 7, 3)},
        {"bias_table": (6, 7, 8)},
        {"bias_table": (5, 7, 9)},
        {"k": (2, 6, 0, 3), "v": (2, 6, 0, 3), "points": (2, 3, 0, 2)},
    ],
)
def test_errors_equal_those_of_the_spec(change):
    inputs, geometry = one_core()
    inputs = inputs | {name: np.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match="expected") as expected:
        np_attention.deformable_attention(**inputs, **geometry)
    with pytest.raises(type(expected.value)) as caught:
        run_core(inputs, geometry, "auto")
    assert str(caught.value) == str(expected.value)


def test_integers_and_unknown_backends_are_refused():
    inputs, geometry = one_core()
    with pytest.raises(ShapeError, match=r"q: expected floating-point numbers .*, got torch.int64"):
        functional.deformable_attention(
            torch.zeros(2, 6, 20, 3, dtype=torch.long), *map(torch.from_numpy, list(inputs.values())[1:]), **geometry
        )
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of eager, matmul, blockwise.*, got 'cuda'"):
        run_core(inputs, geometry, "cuda")


# ------------------------------------------------------------------------------------------------ mutants


def wrong_kernels():
    """Return sets of kernels with one mistake each; gradients are derivatives of the wrong output unless named."""

    def of_table(change):
        def forward(q, k, v, origin, table, **geometry):
            return blockwise.deformable_forward(q, k, v, origin, change(table), **geometry)

        def backward(grad_out, q, k, v, origin, table, out, lse, **geometry):
            grads = blockwise.deformable_backward(grad_out, q, k, v, origin, change(table), out, lse, **geometry)
            return (*grads[:4], change(grads[4]))

        return SimpleNamespace(deformable_forward=forward, deformable_backward=backward)

    def of_gradient(index, change):
        def backward(*args, **geometry):
            grads = list(blockwise.deformable_backward(*args, **geometry))
            grads[index] = change(grads[index])
            return tuple(grads)

        return SimpleNamespace(deformable_forward=blockwise.deformable_forward, deformable_backward=backward)

    def unfinished(q, k, v, origin, table, **geometry):
        out, lse = blockwise.deformable_forward(q, k, v, origin, table, **geometry)
        left = torch.empty_like(out)
        left[:, :, :-1] = out[:, :, :-1]
        return left, lse

    found = {
        "sign of the bias": of_table(torch.neg),
        "table upside down": of_table(lambda table: table.flip(1).contiguous()),
        "x and y swapped": of_table(lambda table: table.transpose(1, 2).reshape(table.shape)),
        "no gradient to the points": of_gradient(3, torch.zeros_like),
        "last query not written": SimpleNamespace(
            deformable_forward=unfinished, deformable_backward=blockwise.deformable_backward
        ),
    }
    return found | {f"gradient {index} too large": of_gradient(index, lambda grad: grad * 1.001) for index in range(5)}


@pytest.mark.parametrize("name", wrong_kernels())
def test_wrong_kernels_are_rejected(name, monkeypatch):
    row = registry._BACKENDS["blockwise"]
    kernels = replace(row.operations["deformable"], kernels=lambda: wrong_kernels()[name])
    wrong = replace(row, name="wrong", operations={"deformable": kernels})
    monkeypatch.setitem(registry._BACKENDS, "wrong", wrong)
    inputs, geometry = one_core()
    assert_core(inputs, geometry, "blockwise")
    assert rejects(lambda: assert_core(inputs, geometry, "wrong"))


def swapped_groups(inputs):
    return inputs | {"points": inputs["points"][:, ::-1].copy()}


WRONG_CORES = {
    "x and y swapped": lambda inputs: inputs | {"points": inputs["points"][..., ::-1].copy()},
    "groups in the wrong order": swapped_groups,
    "half a pixel": lambda inputs: inputs | {"points": inputs["points"] + 0.5 / 2},
    "bias dropped": lambda inputs: inputs | {"bias_table": np.zeros_like(inputs["bias_table"])},
}


@pytest.mark.parametrize("name", WRONG_CORES)
def test_a_wrong_core_is_rejected(name):
    inputs, geometry = one_core()
    _, wrong = run_core(WRONG_CORES[name](inputs), geometry, "blockwise")
    assert rejects(lambda: assert_close(wrong, np_attention.deformable_attention(**inputs, **geometry)))


# ------------------------------------------------------------------------------------------------ memory


def peak_bytes(backend, size, monkeypatch):
    """Return the peak bytes of tensors in forward and backward, in addition to the input."""
    queries, samples = size[0] * size[1], size[0] * size[1] // 2
    q, k, v = (torch.randn(1, 2, count, 4) for count in (queries, samples, samples))
    points, table = torch.rand(1, 1, samples, 2), torch.randn(2, 2 * size[0] - 1, 2 * size[1] - 1)
    geometry = {"query_size": size, "convention": Convention.CVPR2022}
    leaves = [each.requires_grad_() for each in (q, k, v, points, table)]
    if backend in ("eager", "matmul"):
        run = lambda: functional.deformable_attention(*leaves, **geometry, backend=backend).sum().backward()  # noqa: E731
        return torch_peak_bytes(run)
    # The counter does not see inside our registered operations, so the kernels are called directly.
    functions = blockwise if backend == "blockwise" else kernels.load(backend)
    origin, step = functional.table_index(points.detach(), tuple(table.shape[1:]), **geometry)
    where = {"query_size": size, "step": step, "scale": 0.5}

    def run_kernels():
        with torch.no_grad():
            out, lse = functions.deformable_forward(q, k, v, origin, table, **where)
            functions.deformable_backward(out, q, k, v, origin, table, out, lse, **where, deterministic=False)

    return torch_peak_bytes(run_kernels)


@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_memory_grows_with_the_queries_and_not_with_their_square(backend, monkeypatch):
    """Four times the queries and keys take four times the bytes, not sixteen times."""
    for tiles in (blockwise.FORWARD_MAX_LOGITS, blockwise.BACKWARD_MAX_LOGITS):
        monkeypatch.setitem(tiles, "cpu", 1 << 14)
    small, large = (peak_bytes(backend, size, monkeypatch) for size in ((20, 26), (40, 52)))
    growth = large / small
    if backend == "eager":
        assert 14 < growth < 16.5
    else:
        assert growth < 4.5


# ------------------------------------------------------------------------------------------------ Triton


def test_triton_in_its_interpreter():
    """Triton runs in a separate process, because importing it fixes whether it compiles or interprets.

    `triton_kernels.py` has the other conventions.
    """
    pytest.importorskip("triton")
    script = """
from helpers.cores import assert_core_within_budget, one_core
from dat_ref import Convention
inputs, geometry = one_core(convention=Convention.CVPR2022)
assert_core_within_budget(inputs, geometry, "triton")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_imports_no_kernels():
    # Triton itself is not checked: if installed, torch imports it when it registers operations.
    script = """
import sys, dat_ref.torch
print({'numba', 'torch._dynamo', 'dat_ref.torch.kernels.cpu', 'dat_ref.torch.kernels.gpu'} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
