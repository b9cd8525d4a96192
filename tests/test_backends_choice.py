"""The core as a PyTorch operation, and the selection of its backend."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from helpers.cores import one_core, run_core  # noqa: E402
from helpers.tensors import assert_close  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from dat_ref import Convention  # noqa: E402
from dat_ref.complexity.torch_counter import torch_macs  # noqa: E402
from dat_ref.ops import attention as np_attention  # noqa: E402
from dat_ref.torch import functional, kernels  # noqa: E402
from dat_ref.torch.functional import registry  # noqa: E402
from dat_ref.torch.functional.attention import DEFORMABLE  # noqa: E402

needs_numba = pytest.mark.skipif(bool(kernels.missing("cpu")), reason=kernels.missing("cpu"))
FUSED = ["blockwise", pytest.param("cpu", marks=needs_numba)]
SIZE = (4, 5)


@pytest.fixture(autouse=True)
def restore_backends(monkeypatch):
    """Restore the registered backends and the record of emitted warnings after each test."""
    before = dict(registry._BACKENDS)
    monkeypatch.setattr(registry, "_WARNED", set())
    yield
    registry._BACKENDS.clear()
    registry._BACKENDS.update(before)


def leaves(dtype=torch.float64, **changes):
    inputs, _ = one_core(**changes)
    return [torch.from_numpy(leaf).to(dtype).requires_grad_() for leaf in inputs.values()]


def small_leaves():
    """Return inputs small enough for fast numerical derivatives."""
    rng = np.random.default_rng(0)
    shapes = ((1, 2, 6, 2), (1, 2, 3, 2), (1, 2, 3, 2), (1, 1, 3, 2), (2, 3, 5))
    return [torch.from_numpy(rng.uniform(-1, 1, shape)).requires_grad_() for shape in shapes]


def attend(*args, backend="auto", convention=Convention.CVPR2022, **options):
    return functional.deformable_attention(*args, query_size=SIZE, convention=convention, backend=backend, **options)


# ------------------------------------------------------------------------------------------------ the operation


def arguments(kernels_name, dtype=torch.float64):
    q, k, v, points, table = leaves(dtype)
    origin, step = functional.table_index(points, (7, 9), SIZE, Convention.CVPR2022)
    return q, k, v, origin.detach().requires_grad_(), table, SIZE, *step, 0.5, kernels_name, False


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FUSED)
def test_opcheck(name):
    """Schema, fake tensors, registered gradients and AOT autograd pass `torch.library.opcheck`."""
    args = arguments(name)
    torch.library.opcheck(DEFORMABLE.forward, args)
    out, lse = DEFORMABLE.forward(*args)
    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in args]
    given = (torch.randn_like(out), *plain[:5], out.detach(), lse, *plain[5:])
    torch.library.opcheck(DEFORMABLE.backward, given)


@pytest.mark.parametrize("backend", ["eager", "matmul", *FUSED])
def test_gradcheck(backend):
    run = partial(functional.deformable_attention, query_size=(2, 3), convention=Convention.CVPR2022, backend=backend)
    assert torch.autograd.gradcheck(run, small_leaves(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_leaves_geometry_alone(backend, monkeypatch):
    """Autocast narrows the values; points, table and their gradients keep their precision."""
    seen = {}
    row = registry._BACKENDS[backend]
    functions = registry.kernel_module("deformable", backend)

    class Spy:
        def deformable_forward(self, *tensors, **geometry):
            seen.update(zip(("q", "k", "v", "origin", "table"), (each.dtype for each in tensors), strict=True))
            return functions.deformable_forward(*tensors, **geometry)

        deformable_backward = staticmethod(functions.deformable_backward)

    spied = replace(row.operations["deformable"], kernels=Spy)
    monkeypatch.setitem(registry._BACKENDS, backend, replace(row, operations={"deformable": spied}))
    args = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend(*args, backend=backend)
    assert output.dtype is torch.bfloat16
    narrow = dict.fromkeys(("q", "k", "v"), torch.bfloat16)
    assert seen == narrow | dict.fromkeys(("origin", "table"), torch.float32)
    output.float().sum().backward()
    assert {each.grad.dtype for each in args} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(*leaves(torch.float64), backend=backend).dtype is torch.float64


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(backend, reentrant):
    args = leaves()
    expected = torch.autograd.grad(attend(*args, backend=backend).square().sum(), args)
    again = checkpoint(partial(attend, backend=backend), *args, use_reentrant=reentrant)
    again.square().sum().backward()
    for leaf, grad in zip(args, expected, strict=True):
        assert_close(leaf.grad, grad.numpy())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["auto", *FUSED])
@pytest.mark.parametrize("convention", [Convention.CVPR2022, Convention.PAPER])
def test_one_graph_for_every_size_with_gradients(backend, convention, monkeypatch):
    """The spacing of queries depends on the size (a fraction in the 2022 release) and stays symbolic."""

    def run(*args):
        size = args[5:]
        return functional.deformable_attention(*args[:5], query_size=size, convention=convention, backend=backend)

    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # otherwise pytest records every step
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The axes of the first call differ, otherwise the compiler assumes that they are equal.
        for height, width in ((8, 11), (7, 5), (10, 12)):
            shapes = ((2, 6, height * width, 5), (2, 6, 9, 5), (2, 6, 9, 5), (2, 3, 9, 2))
            args = [torch.randn(shape, requires_grad=True) for shape in shapes]
            args.append(torch.randn(6, 2 * height - 1, 2 * width - 1, requires_grad=True))
            actual, expected = (each(*args, height, width) for each in (compiled, run))
            assert_close(actual, expected.detach().numpy(), 1e-5)
            ours, theirs = (torch.autograd.grad(each.square().sum(), args) for each in (actual, expected))
            for one, other in zip(ours, theirs, strict=True):
                assert_close(one, other.numpy(), 1e-4)


@pytest.mark.filterwarnings("default")
def test_compiled_graphs_hold_the_operation_and_exported_ones_do_not():
    class Core(torch.nn.Module):
        def forward(self, *args):
            return attend(*args)

    args = tuple(each.detach() for each in leaves(torch.float32))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Core(), fullgraph=True, backend=keep)(*args)
    assert DEFORMABLE.forward in {node.target for node in graphs[0].graph.nodes}
    exported = torch.export.export(Core(), args)
    assert not any("dat_ref" in str(node.target) for node in exported.graph.nodes)
    assert_close(exported.module()(*args), attend(*args).numpy(), 1e-5)


def test_products_are_counted_and_shapes_suffice():
    args = [each.detach() for each in leaves(torch.float32)]
    expected = np_attention.attend_macs(2, 20, 7, 6 * 3)
    assert torch_macs(attend, *args, backend="blockwise") == expected
    assert attend(*(each.to("meta") for each in args)).shape == (2, 6, 20, 3)


# ------------------------------------------------------------------------------------------------ transforms


def test_second_derivatives_come_from_plain_operations():
    run = partial(functional.deformable_attention, query_size=(2, 3), convention=Convention.CVPR2022)
    with pytest.warns(functional.BackendWarning, match="have no second derivative"):
        assert torch.autograd.gradgradcheck(run, small_leaves())


def test_transforms_and_forward_mode_use_plain_operations():
    args = [each.detach() for each in leaves(batch=1)]
    along = [torch.randn_like(each) for each in args]
    run = partial(attend, backend="blockwise")
    with pytest.warns(functional.BackendWarning, match="torch.func"):
        _, tangent = torch.func.jvp(run, tuple(args), tuple(along))
    step = 1e-6
    ahead, back = (run(*(x + sign * step * a for x, a in zip(args, along, strict=True))) for sign in (1, -1))
    assert_close(tangent, ((ahead - back) / (2 * step)).numpy(), 1e-6)
    stacked = [torch.stack((each, 2 * each)) for each in args]
    assert_close(torch.func.vmap(attend)(*stacked)[1], attend(*(2 * each for each in args)).numpy())
    grads = torch.func.grad(lambda *x: attend(*x).square().sum(), argnums=(0, 3, 4))(*args)
    leaf = [each.requires_grad_() for each in args]
    expected = torch.autograd.grad(attend(*leaf).square().sum(), [leaf[0], leaf[3], leaf[4]])
    for ours, theirs in zip(grads, expected, strict=True):
        assert_close(ours, theirs.numpy())


# ------------------------------------------------------------------------------------------------ selection


def chosen(name="auto", dropout=0.0, device="cpu"):
    q, k, v, points, table = (each.detach().to(device) for each in leaves())
    return registry.choose_backend(name, registry.Call(q, k, v, points, table, dropout)).name


def test_auto_selects_the_best_backend_silently():
    assert chosen() == ("blockwise" if kernels.missing("cpu") else "cpu")
    assert chosen(dropout=0.1) == "matmul"
    assert chosen(device="meta") == "blockwise"
    with torch.autograd.set_detect_anomaly(False):
        assert chosen("eager") == "eager"


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("blockwise", {"dropout": 0.1}, "it has no dropout of attention weights"),
        ("cpu", {"device": "meta"}, "it runs on CPUs, and the tensors are on 'meta'"),
        ("triton", {}, "it runs on CUDA devices, and the tensors are on 'cpu'"),
        ("absent", {}, "it is not here"),
    ],
)
def test_fallback_warns_once_with_the_reason(name, options, why):
    absent = replace(registry._BACKENDS["blockwise"], name="absent", missing=lambda: "it is not here")
    registry._BACKENDS["absent"] = absent
    with pytest.warns(functional.BackendWarning, match=f"backend='{name}' does not support this call: {why}") as caught:
        instead = chosen(name, **options)
    assert instead not in ("absent", "triton")
    assert caught[0].message.args[0].endswith(f"Using '{instead}'.")
    assert chosen(name, **options) == instead


def test_a_warning_points_at_the_call():
    with pytest.warns(functional.BackendWarning) as caught:
        functional.deformable_attention(*leaves(), query_size=SIZE, convention=Convention.PAPER, backend="triton")
    assert caught[0].filename == __file__


def test_kernels_that_cannot_be_imported_are_missing(monkeypatch):
    def fail(name):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(kernels, "load", fail)
    kernels.missing.cache_clear()
    try:
        assert kernels.missing("cpu") == "No module named 'numba'; pip install 'dat-ref[cpu]'"
        assert chosen() == "blockwise"
        assert functional.backends(missing=True)["cpu"].startswith("No module named 'numba'")
        assert "cpu" not in functional.backends()
    finally:
        kernels.missing.cache_clear()


def test_list_of_available_backends():
    here, missing = functional.backends(), functional.backends(missing=True)
    assert {"eager", "matmul", "blockwise"} <= set(here)
    assert not set(here) & set(missing)
    assert set(here) | set(missing) == set(registry._BACKENDS)
    if not torch.cuda.is_available():
        assert missing["triton"] == "no CUDA device"


def test_a_registered_backend_is_chosen_by_its_priority():
    calls = []

    def double(q, *args, **kwargs):
        calls.append(kwargs["scale"])
        return 2 * q

    def refuses(call):
        return "" if call.q.dtype is torch.float64 else "it takes float64"

    functional.register_backend("double", double, "twice q", priority=99, refuses=refuses)
    functional.register_backend("absent", double, "never", priority=100, missing=lambda: "not here")
    inputs, geometry = one_core()
    given, actual = run_core(inputs, geometry, "auto")
    assert torch.equal(actual, 2 * given["q"])
    assert calls == [3**-0.5]
    given, actual = run_core({name: leaf.astype(np.float32) for name, leaf in inputs.items()}, geometry, "auto")
    assert not torch.equal(actual, 2 * given["q"])
    assert functional.backends()["double"] == "twice q"
    assert functional.backends(missing=True)["absent"] == "not here"
    with pytest.raises(ValueError, match="name: expected any name but 'auto'"):
        functional.register_backend("auto", double, "")


def test_a_replaced_backend_keeps_its_other_operations():
    before = registry._BACKENDS["blockwise"].operations["neighborhood"]
    functional.register_backend("blockwise", lambda q, *args, **kwargs: 2 * q, "twice q", priority=99)
    args = leaves()
    assert torch.equal(attend(*args), 2 * args[0])
    assert registry._BACKENDS["blockwise"].operations["neighborhood"] is before
