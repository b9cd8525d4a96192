"""Neighborhood attention by every backend: outputs and gradients against the spec, compilation, autocast, memory."""

from dataclasses import dataclass

import numpy as np
import pytest
from helpers.agreement import assert_agree, assert_within_budget
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import map_sizes, numbers, seeds

torch = pytest.importorskip("torch")
from helpers.tensors import assert_close, assert_trees_close, pull_back, rejects, tensor  # noqa: E402
from helpers.torch_peers import CONFIGS, ScaledGradient, build_peer  # noqa: E402

from dat_ref import NeighborhoodAttentionConfig, ShapeError  # noqa: E402
from dat_ref.complexity.torch_counter import saved_bytes, torch_macs, torch_peak_bytes  # noqa: E402
from dat_ref.ops.attention import attend, attend_vjp  # noqa: E402
from dat_ref.peers import ATTENTIONS  # noqa: E402
from dat_ref.peers.neighborhood import neighbor_index  # noqa: E402
from dat_ref.torch import functional, kernels  # noqa: E402
from dat_ref.torch.functional import BackendWarning, neighborhood_tiles  # noqa: E402

needs_numba = pytest.mark.skipif(bool(kernels.missing("cpu")), reason=kernels.missing("cpu"))
FUSED = ["blockwise", pytest.param("cpu", marks=needs_numba)]  # Triton kernels are tested in `test_kernels_triton`
each_backend = pytest.mark.parametrize("backend", ["eager", "matmul", *FUSED])
each_fused = pytest.mark.parametrize("backend", FUSED)


# ------------------------------------------------------------------------------------------------ the spec


@dataclass(frozen=True)
class Case:
    """Arguments of a call: a projected map, a table and a cotangent, drawn by seed."""

    size: tuple[int, int] = (5, 9)
    kernel: int = 3
    dilation: int = 1
    heads: int = 2
    depth: int = 3
    batch: int = 2
    seed: int = 0

    @property
    def scale(self):
        return 0.7 * self.depth**-0.5

    def arrays(self, dtype=np.float64):
        """Return qkv (B, H, W, 3C), table (heads, 2K-1, 2K-1) and a cotangent (B, H, W, C)."""
        channels, side = self.heads * self.depth, 2 * self.kernel - 1
        shapes = (self.batch, *self.size, 3 * channels), (self.heads, side, side), (self.batch, *self.size, channels)
        return [numbers(self.seed + place, *shape, dtype=dtype) for place, shape in enumerate(shapes)]


def spec(qkv, table, cotangent, case):
    """Return output and gradients of qkv and table, computed by the spec."""
    batch, height, width, channels = qkv.shape
    neighbors, places = neighbor_index((height, width), case.kernel, case.dilation)
    heads = qkv.reshape(batch, height * width, 3, case.heads, case.depth).transpose(2, 0, 3, 1, 4)
    q, k, v = heads[0][:, :, :, None], heads[1][:, :, neighbors], heads[2][:, :, neighbors]
    bias = table.reshape(case.heads, -1)[:, places][:, :, None]
    attended, weights = attend(q, k, v, bias, case.scale)
    pulled = cotangent.reshape(batch, height * width, case.heads, case.depth).transpose(0, 2, 1, 3)
    grads = attend_vjp(pulled[:, :, :, None], q, k, v, weights, case.scale)
    grad_heads, grad_table = np.zeros_like(heads), np.zeros((case.heads, table[0].size), table.dtype)
    grad_heads[0] = grads.q[:, :, :, 0]
    for part, grad in ((1, grads.k), (2, grads.v)):
        np.add.at(grad_heads[part], (slice(None), slice(None), neighbors), grad)
    np.add.at(grad_table, (slice(None), places), grads.bias.sum(axis=0)[:, :, 0])
    y = attended[:, :, :, 0].transpose(0, 2, 1, 3).reshape(batch, height, width, channels // 3)
    return y, grad_heads.transpose(1, 3, 0, 2, 4).reshape(qkv.shape), grad_table.reshape(table.shape)


def run(function, case, dtype=torch.float64, backend="eager", layout=lambda qkv: qkv):
    """Return output and gradients of a function with the operation's signature."""
    qkv, table, cotangent = case.arrays()
    leaves = [tensor(array, dtype).detach().requires_grad_() for array in (qkv, table)]
    y, weights = function(layout(leaves[0]), leaves[1], scale=case.scale, dilation=case.dilation, backend=backend)
    assert weights == {}
    return y, *pull_back(y, cotangent, leaves)


def check(backend, case, function=functional.neighborhood_attention, **options):
    """Compare with the spec in float64, up to rounding."""
    for name, actual, expected in zip(
        ("y", "qkv", "table"), run(function, case, backend=backend, **options), spec(*case.arrays(), case)
    ):
        assert_agree(actual.detach().numpy(), expected, 1e-11, name)


LAYOUTS = {
    "contiguous": lambda qkv: qkv,
    "map first": lambda qkv: qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),  # large channel stride
    "a part": lambda qkv: torch.cat([qkv.flip(3), qkv, qkv], dim=2)[:, :, qkv.shape[2] : 2 * qkv.shape[2]],
}
cases = st.builds(
    Case,
    size=st.one_of(map_sizes(), st.sampled_from([(19, 4), (3, 21), (9, 10)])),
    kernel=st.sampled_from([3, 5, 7, 1, 9]),
    dilation=st.sampled_from([1, 1, 2, 3, 5]),
    heads=st.sampled_from([1, 2, 3]),
    depth=st.sampled_from([3, 1, 5, 16, 33]),
    batch=st.sampled_from([1, 2, 0]),
    seed=seeds,
)


@each_backend
@settings(max_examples=20)
@given(case=cases, layout=st.sampled_from(list(LAYOUTS)))
@example(case=Case((14, 13), 7, heads=3, depth=32), layout="contiguous")
@example(case=Case((1, 1), 1, batch=1), layout="contiguous")
@example(case=Case((2, 3), 31, batch=1), layout="contiguous")  # a table far larger than the map
@example(case=Case((5, 4), 3, dilation=9), layout="contiguous")  # sub-maps of one pixel
@example(case=Case((33, 5), 3, depth=1), layout="contiguous")  # several bands
def test_backend_equals_the_spec(backend, case, layout):
    check(backend, case, layout=LAYOUTS[layout])


@each_fused
def test_float32_is_as_accurate_as_the_written_out_form(backend):
    for case in (Case((14, 11), 7, depth=32), Case((6, 7), 5, dilation=2, depth=9)):
        plain, actual = run_plain(case), run(functional.neighborhood_attention, case, torch.float32, backend)
        for name, one, yardstick, truth in zip(("y", "qkv", "table"), actual, plain, spec(*case.arrays(), case)):
            assert_within_budget(one.detach().numpy(), truth, yardstick, what=name)


def run_plain(case):
    return spec(*(array.astype(np.float32) for array in case.arrays()), case)


@each_fused
def test_result_does_not_depend_on_tiling(backend, monkeypatch):
    """The result does not depend on logits per tile, rows per band or the number of threads."""
    monkeypatch.setattr(neighborhood_tiles, "_MAX_LOGITS", {"cpu": 1})
    check(backend, Case((19, 13), 5, batch=3))
    case = Case((40, 6), 7, heads=1, depth=4)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(functional.neighborhood_attention, case, torch.float32, backend))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpu":
        assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("name", ["dilated_2", "dilated_3"])
@each_backend
def test_layer_equals_the_spec(name, backend):
    """The module equals the spec under both rules for small maps."""
    config = CONFIGS[name]
    for size in ((7, 10), (4, 5)):
        module, params = build_peer(config)
        module.backend = backend
        x, cotangent = numbers(1, 2, config.dim, *size), numbers(2, 2, config.dim, *size)
        y, trace = ATTENTIONS[type(config)].forward(x, params, config)
        grad_x, grad_params = ATTENTIONS[type(config)].vjp(cotangent, trace, params, config)
        leaf = tensor(x)
        actual = module(leaf)
        actual.backward(torch.from_numpy(cotangent))
        assert_close(actual, y, what="y")
        assert_close(leaf.grad, grad_x, what="x")
        assert_trees_close(module.to_numpy(grad=True), grad_params)


# ------------------------------------------------------------------------------------------------ autograd, compilers


def operands(case, dtype=torch.float64, requires_grad=True):
    """Return q, k, v (B, heads, H·W, d) as views of one map, and the table."""
    qkv, table, _ = (torch.from_numpy(array).to(dtype) for array in case.arrays())
    parts = qkv.unflatten(3, (3, case.heads, case.depth)).flatten(1, 2).permute(2, 0, 3, 1, 4)
    return [leaf.detach().requires_grad_(requires_grad) for leaf in (*parts, table)]


def geometry(case):
    return {"size": case.size, "kernel": case.kernel, "dilation": case.dilation, "scale": case.scale}


def fused(tensors, case, backend):
    operation = torch.ops.dat_ref.neighborhood_attention
    return operation(*tensors, case.size, case.kernel, case.dilation, case.scale, backend, False)[0]


@each_fused
def test_opcheck_of_neighborhood_attention(backend):
    case = Case((4, 5), 3, depth=2)
    deterministic = False
    arguments = (case.size, case.kernel, case.dilation, case.scale, backend, deterministic)
    operation = torch.ops.dat_ref.neighborhood_attention.default
    torch.library.opcheck(operation, (*operands(case), *arguments))
    q, k, v, table = operands(case, requires_grad=False)
    out, lse = operation(q, k, v, table, *arguments)
    backward = torch.ops.dat_ref.neighborhood_attention_backward.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backward, (out, q, k, v, table, out, lse, *arguments), test_utils=tests)


@each_fused
def test_gradients_equal_finite_differences(backend):
    case = Case((3, 4), 3, batch=1, depth=2)

    def function(*leaves):
        return fused(leaves, case, backend)

    assert torch.autograd.gradcheck(function, operands(case))


@each_fused
def test_second_derivatives_come_from_plain_operations(backend):
    functional.registry._WARNED.clear()

    def second(name):
        qkv, table = (tensor(array) for array in Case().arrays()[:2])
        y, _ = functional.neighborhood_attention(qkv, table, scale=1.0, backend=name)
        (first,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (qkv, table))

    with pytest.warns(BackendWarning, match=f"'{backend}' have no second derivative"):
        actual = second(backend)
    for grad, expected in zip(actual, second("eager")):
        assert_close(grad, expected.numpy())


@each_fused
def test_only_requested_gradients_are_computed(backend):
    q, k, v, table = operands(Case())
    for leaf in (k, table):
        leaf.requires_grad_(False)
    y = fused((q, k, v, table), Case(), backend)
    y.sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert table.grad is None


@each_backend
def test_one_graph_forward_and_backward(backend):
    case = Case((6, 7), 3)
    compiled = torch.compile(functional.neighborhood_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    check(backend, case, compiled)
    torch.compiler.reset()


@each_fused
def test_compiled_once_for_all_sizes(backend):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    with torch.no_grad():
        compiled = torch.compile(functional.neighborhood_attention, fullgraph=True, backend=count, dynamic=True)
        for case in (Case((6, 7), batch=4), Case((5, 11), batch=3), Case((9, 8), batch=5)):
            qkv, table = (torch.from_numpy(array) for array in case.arrays()[:2])
            expected = functional.neighborhood_attention(qkv, table, scale=0.5)[0]
            assert_close(compiled(qkv, table, scale=0.5, backend=backend)[0], expected.numpy())
    torch.compiler.reset()
    assert len(graphs) == 1


@each_fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(backend, dtype):
    """With narrow values and wide sums, errors do not exceed those of the written-out form in the narrow type."""
    case = Case((7, 9), 5, depth=16)
    truth = spec(*case.arrays(), case)[0]
    qkv, table, _ = (torch.from_numpy(array) for array in case.arrays())
    plain = functional.neighborhood_attention(qkv.to(dtype), table, scale=case.scale, backend="eager")[0]
    error = (plain.double() - torch.from_numpy(truth)).abs().max()
    narrow = functional.neighborhood_attention(qkv.to(dtype), table, scale=case.scale, backend=backend)[0]
    with torch.autocast("cpu", dtype):
        cast = functional.neighborhood_attention(qkv.float(), table.float(), scale=case.scale, backend=backend)[0]
    for y in (narrow, cast):
        assert y.dtype is dtype
        assert (y.double() - torch.from_numpy(truth)).abs().max() <= 2 * error


@each_fused
def test_double_precision_is_kept_under_autocast(backend):
    with torch.autocast("cpu", torch.bfloat16):
        check(backend, Case())


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def poisoned():
    """Fill what `torch.empty` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@each_fused
def test_nothing_is_read_before_it_is_written(backend, poisoned):
    assert torch.empty(3).isnan().all()
    for case in (Case((19, 4), 5, depth=5), Case((7, 11), 3, dilation=3), Case((1, 3), 7, depth=32)):
        check(backend, case)


@each_fused
def test_nan_reaches_only_queries_that_see_it(backend):
    case = Case((20, 19), 5, batch=2)
    qkv, table, _ = (torch.from_numpy(array) for array in case.arrays())
    clean = functional.neighborhood_attention(qkv, table, scale=1.0, backend=backend)[0]
    qkv[1, 9, 8] = float("nan")
    y = functional.neighborhood_attention(qkv, table, scale=1.0, backend=backend)[0]
    assert y[1, 7:12, 6:11].isnan().all()  # queries whose neighborhood contains the pixel
    far = torch.ones(case.size, dtype=torch.bool)
    far[3:16, 2:15] = False  # the tiles of these queries
    assert torch.equal(y[1, far], clean[1, far])
    assert torch.equal(y[0], clean[0])
    table[0, 0, 0] = float("nan")  # a displacement that occurs only in the corner
    y = functional.neighborhood_attention(qkv, table, scale=1.0, backend=backend)[0]
    assert y[0, -1, -1, : case.depth].isnan().all()
    assert y[0, 5:-5, 5:-5].isfinite().all()


@each_fused
def test_hidden_keys_have_no_weight(backend):
    """Huge values outside the neighborhood of a query do not change its output by one bit."""
    case = Case((12, 13), 3, batch=1)
    qkv, table, _ = (torch.from_numpy(array) for array in case.arrays())
    clean = functional.neighborhood_attention(qkv, table, scale=1.0, backend=backend)[0]
    qkv[0, 5, 6, 2 * case.heads * case.depth :] = 1e30  # a value
    y = functional.neighborhood_attention(qkv, table, scale=1.0, backend=backend)[0]
    unseen = torch.ones(case.size, dtype=torch.bool)
    unseen[4:7, 5:8] = False
    assert torch.equal(y[0, unseen], clean[0, unseen])
    assert (y[0, 4:7, 5:8] != clean[0, 4:7, 5:8]).all()


@each_fused
def test_autograd_stores_the_output_and_one_element_per_query(backend):
    """Besides the projected map and the table, autograd stores the output and the log-sum-exp of each query."""
    for case in (Case((8, 9), 5, depth=4), Case((16, 9), 5, depth=4)):
        qkv, table = (tensor(array) for array in case.arrays()[:2])
        queries = case.batch * case.heads * case.size[0] * case.size[1]
        options = {"scale": case.scale, "backend": backend, "exclude": (qkv, table)}
        assert saved_bytes(functional.neighborhood_attention, qkv, table, **options) == 8 * queries * (case.depth + 1)


@each_fused
def test_memory_grows_with_the_map(backend):
    """Peak bytes of forward and backward grow at most fourfold with four times the rows, also inside the operation."""
    functions = neighborhood_tiles
    if backend == "cpu":
        from dat_ref.torch.kernels.cpu import neighborhood as functions

    def both(case):
        q, k, v, table = operands(case, torch.float32, False)
        out, lse = functions.neighborhood_forward(q, k, v, table, **geometry(case))
        functions.neighborhood_backward(out, q, k, v, table, out, lse, **geometry(case))

    peaks = [torch_peak_bytes(both, Case((rows, 40), 7, depth=32, batch=1)) for rows in (64, 256)]
    assert peaks[1] <= 4.01 * peaks[0], peaks
    written_out = 4 * 256 * 40 * 2 * 49 * 32  # the keys of each query, gathered
    assert peaks[1] < written_out


@each_fused
def test_counted_operations_are_those_of_the_neighborhoods(backend):
    case = Case((6, 9), 5, depth=4)
    qkv, table = (torch.from_numpy(array) for array in case.arrays()[:2])
    counted = torch_macs(functional.neighborhood_attention, qkv, table, scale=1.0, backend=backend)
    assert counted == 2 * case.batch * case.heads * case.depth * 6 * 9 * 25


# ------------------------------------------------------------------------------------------------ selection


def test_auto_selects_the_kernels_where_supported():
    qkv, table = (torch.from_numpy(array) for array in Case().arrays()[:2])

    def operations(**options):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            functional.neighborhood_attention(qkv, table, scale=1.0, **options)
        return {event.key for event in profile.key_averages()}

    assert "dat_ref::neighborhood_attention" in operations()
    assert "dat_ref::neighborhood_attention" not in operations(dropout=0.5)
    assert "dat_ref::neighborhood_attention" not in operations(backend="matmul")


@each_fused
def test_unsupported_backend_falls_back_with_the_reason(backend):
    qkv, table = (torch.from_numpy(array) for array in Case().arrays()[:2])
    functional.registry._WARNED.clear()
    with pytest.warns(BackendWarning, match=f"'{backend}' does not support.*: it has no dropout.*Using 'matmul'"):
        y, _ = functional.neighborhood_attention(qkv, table, scale=1.0, dropout=0.5, backend=backend)
    assert y.isfinite().all()


@each_fused
def test_functional_transforms_use_plain_operations(backend):
    """`torch.func` uses plain operations instead of the kernels."""
    qkv, table = (torch.from_numpy(array) for array in Case().arrays()[:2])
    expected = functional.neighborhood_attention(qkv, table, scale=1.0, backend="eager")[0]

    def of_table(table):
        return functional.neighborhood_attention(qkv, table, scale=1.0)[0]

    y, tangent = torch.func.jvp(of_table, (table,), (torch.ones_like(table),))
    assert_close(y, expected.numpy())
    assert tangent.abs().max() < 1e-12  # the same constant added to all logits


@pytest.mark.parametrize(
    ("qkv", "table", "message"),
    [
        ((2, 5, 6, 18), (3, 5, 7), r"table: expected \(heads, 2K-1, 2K-1\), got"),
        ((2, 5, 6, 18), (3, 4, 4), "table: expected"),
        ((2, 5, 6, 17), (3, 5, 5), r"qkv: expected .*C divisible by heads=3, got \(2, 5, 6, 17\)"),
        ((2, 5, 18), (3, 5, 5), "qkv: expected"),
        ((2, 0, 6, 18), (3, 5, 5), "qkv: expected"),
    ],
)
def test_bad_arguments_are_named(qkv, table, message):
    with pytest.raises(ShapeError, match=message):
        functional.neighborhood_attention(torch.zeros(qkv), torch.zeros(table), scale=1.0)
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of eager, matmul"):
        functional.neighborhood_attention(torch.zeros(1, 3, 3, 6), torch.zeros(1, 3, 3), scale=1.0, backend="dense")


def test_backends_are_those_of_the_core():
    named = set(functional.backends()) | set(functional.backends(missing=True))
    rows = functional.registry._BACKENDS
    assert {name for name, row in rows.items() if "neighborhood" in row.operations} == named


# ------------------------------------------------------------------------------------------------ machine code


@needs_numba
def test_products_are_vector_instructions():
    """The compiled inner loop contains vector multiply-adds and no scalar ones."""
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("reads x86 assembler")
    import numba

    from dat_ref.torch.kernels.cpu.lane_shuffles import LANES
    from dat_ref.torch.kernels.cpu.neighborhood_kernels import _dots
    from dat_ref.torch.kernels.cpu.vectors import broadcast, store

    @numba.njit(fastmath={"contract"})
    def probe(numbers, pixel):
        zero = broadcast(numbers[0] - numbers[0], LANES)
        store(numbers, 0, _dots(numbers, numbers, LANES, pixel, zero))

    array = np.ones(64 * LANES, np.float32)
    probe(array, 8)
    assert array[:LANES].tolist() == [8.0] * LANES
    code = next(iter(probe.inspect_asm().values()))
    assert "vfmadd" in code
    assert not any("vfmadd" in line and "ss" in line.split()[0] for line in code.splitlines())


@needs_numba
def test_cached_code_has_unique_identifiers():
    """The identifier of a cached compiled function is the same in every process and unique."""
    import subprocess
    import sys

    from dat_ref.torch.kernels.cpu import deformable, launch, neighborhood_kernels

    program = """
import torch
from dat_ref.torch.kernels.cpu import deformable, launch, neighborhood_kernels
for module in (neighborhood_kernels, deformable):
    for dtype in (torch.float64, torch.float32):
        print(launch.record_type(module.FIELDS, dtype)._code)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    records = [
        launch.record_type(module.FIELDS, dtype)
        for dtype in (torch.float32, torch.float64)
        for module in (deformable, neighborhood_kernels)
    ]
    assert {record._code for record in records} == {int(line) for line in printed.split()}
    assert len({str(record.mangling_args) for record in records}) == 4


# ------------------------------------------------------------------------------------------------ mutants


def by_pieces(change=lambda name, value: value, **changed):
    """Return a wrong operation: its inputs are changed by name, or its options."""

    def function(qkv, table, *, scale, dilation, backend):
        options = {"scale": scale, "dilation": dilation, "backend": backend} | changed
        y, weights = functional.neighborhood_attention(change("qkv", qkv), change("table", table), **options)
        return change("y", y), weights

    return function


WRONG = {
    "scale missing": by_pieces(scale=1.0),
    "no dilation": by_pieces(dilation=1),
    "table transposed": by_pieces(lambda name, value: value.transpose(1, 2) if name == "table" else value),
    "query minus key": by_pieces(lambda name, value: value.flip(1, 2) if name == "table" else value),
    "no bias": by_pieces(lambda name, value: 0 * value if name == "table" else value),
    "heads in another order": by_pieces(lambda name, value: value.flip(0) if name == "table" else value),
    "shifted by a pixel": by_pieces(lambda name, value: value.roll(1, 2) if name == "qkv" else value),
    "map transposed": by_pieces(lambda name, value: value.transpose(1, 2) if name != "table" else value),
    "gradient of qkv": by_pieces(lambda name, value: ScaledGradient.apply(value) if name == "qkv" else value),
    "gradient of table": by_pieces(lambda name, value: ScaledGradient.apply(value) if name == "table" else value),
}


@pytest.mark.parametrize("name", WRONG)
def test_checker_rejects_wrong_functions(name):
    case = Case((6, 7), 3, dilation=2)
    check("eager", case)
    assert rejects(lambda: check("eager", case, WRONG[name]))


def test_checker_rejects_a_window_that_does_not_slide(monkeypatch):
    """A window that does not slide would lose keys at the border."""
    right = neighborhood_tiles.first_key
    check("blockwise", Case())
    monkeypatch.setattr(neighborhood_tiles, "first_key", lambda query, length, keys: right(query + 1, length, keys))
    assert rejects(lambda: check("blockwise", Case()))


def test_presets_of_datpp_use_it():
    """The stages that the kernels are optimized for: K = 7, 32 channels per head, whole bands."""
    import dat_ref

    blocks = [block for stage in dat_ref.config("dat_pp_tiny").stages for block in stage]
    local = [block.attention for block in blocks if isinstance(block.attention, NeighborhoodAttentionConfig)]
    assert {(config.kernel_size, config.dim // config.heads) for config in local} == {(7, 32)}
