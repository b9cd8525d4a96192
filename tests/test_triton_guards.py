"""Selection of the Triton kernels: what they cannot compute, on which device they run, and their self-check."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from dat_ref import Convention  # noqa: E402
from dat_ref.bench import implementations  # noqa: E402
from dat_ref.bench.cases import NeighborhoodCase  # noqa: E402
from dat_ref.torch import functional, kernels  # noqa: E402
from dat_ref.torch.functional import blockwise, neighborhood_tiles, registry  # noqa: E402
from dat_ref.torch.functional.builtin_backends import TRITON  # noqa: E402
from dat_ref.torch.kernels import self_check, triton_support  # noqa: E402

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(registry, "_WARNED", set())
    monkeypatch.setattr(self_check, "_FAILURES", {})


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((F32, 64, (9, 0), None, "3.7.1"), ""),
        ((BF16, 128, (8, 0), None, "3.3.0"), ""),
        ((F16, 128, (12, 0), None, "4.0.0+git1"), ""),
        ((F16, 32, None, None, "3.7.1"), ""),  # the interpreter
        ((F16, 32, (9, 0), None, None), ""),  # an unknown version
        ((F16, 32, (9, 4), "6.3", "3.3.0"), ""),
        ((F16, 32, (3, 0), "6.3", "3.3.0"), ""),  # not a CUDA capability
        ((F64, 32, (9, 0), None, "3.7.1"), "no torch.float64"),
        ((torch.int32, 32, (9, 0), None, "3.7.1"), "no torch.int32"),
        ((F32, 65, (9, 0), None, "3.7.1"), "at most 64 channels in torch.float32, and these have 65"),
        ((BF16, 129, (9, 0), None, "3.7.1"), "at most 128 channels in torch.bfloat16"),
        ((F16, 129, None, None, "3.7.1"), "at most 128 channels in torch.float16"),
        ((F16, 32, (7, 5), None, "3.7.1"), "compute capability 8.0 or newer, and this one has 7.5"),
        ((F32, 32, (9, 4), "6.3", "3.3.0"), "on ROCm"),
        ((F32, 32, (9, 0), None, "3.2.0"), "Triton 3.3 or newer, and 3.2.0 is installed"),
        ((F64, 32, (9, 0), None, "2.3.1+git"), "Triton 3.3 or newer, and 2.3.1"),
    ],
)
def test_refusals(arguments, reason):
    """Table of dtype, depth, capability, ROCm and version of Triton."""
    found = triton_support.unsupported_reason(*arguments)
    assert reason in found
    assert bool(reason) == bool(found)


def test_neighborhoods_have_float32_products_for_every_dtype():
    arguments = (BF16, 32, (9, 4), "6.3", "3.3.0")
    assert "on ROCm" in triton_support.unsupported_reason(*arguments, always_float32=True)


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that this machine has a CUDA device with the given capability, and return the setter."""
    monkeypatch.setattr(triton_support, "absent_reason", lambda: "")
    monkeypatch.setattr(triton_support, "installed_version", lambda: "3.7.1")
    monkeypatch.setattr(self_check, "failure", lambda *arguments: "")
    present = replace(registry._BACKENDS["triton"], missing=lambda: "")
    monkeypatch.setitem(registry._BACKENDS, "triton", present)

    def set_capability(*capability):
        monkeypatch.setattr(triton_support, "capability", lambda device: capability)

    set_capability(9, 0)
    return set_capability


def chosen(dtype, depth=32, *, name="auto", k_dtype=None, table=True, neighborhoods=False):
    """Return the name of the backend for tensors on a CUDA device that need not exist."""
    with FakeTensorMode():
        q, k = (torch.empty(1, 2, 12, depth, dtype=each, device="cuda") for each in (dtype, k_dtype or dtype))
        points, bias = torch.empty(1, 1, 12, 2, device="cuda"), torch.empty(2, 5, 7, device="cuda")
    points, operation = (None, "neighborhood") if neighborhoods else (points, "deformable")
    return registry.choose_backend(name, registry.Call(q, k, q, points, bias if table else None, 0.0, operation)).name


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("neighborhoods", [False, True])
def test_auto_takes_the_next_backend_where_the_kernels_cannot(neighborhoods):
    for dtype, depth in ((F32, 64), (BF16, 128), (F16, 128)):
        assert chosen(dtype, depth, neighborhoods=neighborhoods) == "triton"
    for dtype, depth in ((F64, 32), (F32, 65), (BF16, 129)):
        assert chosen(dtype, depth, neighborhoods=neighborhoods) == "blockwise"
    assert chosen(F32, k_dtype=F16, neighborhoods=neighborhoods) == "blockwise"


@pytest.mark.usefixtures("cuda")
def test_autocast_decides_the_dtype(monkeypatch):
    assert chosen(F32, 128) == "blockwise"
    # Without a device `torch.autocast` turns itself off.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: BF16)
    assert chosen(F32, 128) == "triton"
    assert chosen(F32, k_dtype=BF16) == "triton"
    assert chosen(F64) == "blockwise"


@pytest.mark.usefixtures("cuda")
def test_without_a_table_no_kernel_runs():
    assert chosen(F64, table=False) == "triton"


def test_auto_avoids_old_devices(cuda):
    cuda(7, 5)
    assert chosen(F16) == chosen(F16, neighborhoods=True) == "blockwise"


def test_auto_avoids_rocm_in_float32(cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert chosen(F32) == "blockwise"
    assert chosen(BF16) == "triton"
    assert chosen(BF16, neighborhoods=True) == "blockwise"


def test_a_request_by_name_raises_the_reason(cuda):
    with pytest.raises(functional.BackendError, match=r"backend='triton' cannot compute this call: .*no torch.float64"):
        chosen(F64, name="triton")
    with pytest.raises(functional.BackendError, match="q, k and v have different dtypes"):
        chosen(F32, name="triton", k_dtype=F16)
    cuda(7, 0)
    with pytest.raises(functional.BackendError, match=r"this one has 7\.0"):
        chosen(F32, name="triton", neighborhoods=True)


def test_bench_reports_the_reason(monkeypatch):
    """A case that a requested backend cannot compute is reported, not an error of the benchmark."""

    def fail(*arguments):
        raise functional.BackendError("backend='triton' cannot compute this call: too deep")

    monkeypatch.setattr(implementations, "choose_backend", fail)
    case = NeighborhoodCase("case", 1, (4, 4), 2, 3)
    data = implementations.draw_inputs(case, F32, "cpu", 0)
    assert implementations.unsupported_reason("triton", case, data).endswith("too deep")


def test_old_versions_are_missing_with_the_reason(monkeypatch):
    monkeypatch.setattr(triton_support, "absent_reason", lambda: "")
    monkeypatch.setattr(triton_support, "installed_version", lambda: "3.2.0")
    kernels.missing.cache_clear()
    try:
        assert "Triton 3.3 or newer, and 3.2.0 is installed" in functional.backends(missing=True)["triton"]
    finally:
        kernels.missing.cache_clear()


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
def test_a_broken_installation_is_listed_as_missing(error, monkeypatch):
    def fail(*names):
        raise error("broken installation")

    monkeypatch.setattr(triton_support, "absent_reason", lambda: "")
    monkeypatch.setattr(triton_support.importlib, "import_module", fail)
    kernels.missing.cache_clear()
    kernels.load.cache_clear()
    triton_support.installed_version.cache_clear()
    try:
        assert functional.backends(missing=True)["triton"].startswith("broken installation")
    finally:
        for each in (kernels.missing, kernels.load, triton_support.installed_version):
            each.cache_clear()


# ------------------------------------------------------------------------------------------------ self-check

SIZE = (4, 5)


class Kernels:
    """Stand-in for the Triton kernels: plain PyTorch, with a fault that a test sets.

    Args:
        name: of the operation.
        plain: its kernels in plain PyTorch.
    """

    def __init__(self, name, plain):
        self.name, self.plain, self.calls, self.fault = name, plain, [], None
        setattr(self, f"{name}_forward", self.forward)
        setattr(self, f"{name}_backward", self.backward)

    def forward(self, *tensors, **geometry):
        self.calls.append("forward")
        out, lse = getattr(self.plain, f"{self.name}_forward")(*tensors, **geometry)
        return self.faulty("forward", [out, lse])

    def backward(self, *tensors, **geometry):
        self.calls.append("backward")
        return self.faulty("backward", list(getattr(self.plain, f"{self.name}_backward")(*tensors, **geometry)))

    def faulty(self, where, results):
        """Apply the fault: (pass, exception) or (pass, number of the wrong result, factor)."""
        if self.fault and self.fault[0] == where:
            if isinstance(self.fault[1], BaseException):
                raise self.fault[1]
            results[self.fault[1]] = results[self.fault[1]] * self.fault[2]
        return tuple(results)


@pytest.fixture(params=["deformable", "neighborhood"])
def faulty(request, monkeypatch):
    """Let plain PyTorch stand in for the Triton kernels, on the CPU, and return it with a function that runs it."""
    stand_in = Kernels(request.param, blockwise if request.param == "deformable" else neighborhood_tiles)
    monkeypatch.setattr(TRITON[request.param], "load", lambda: stand_in)
    monkeypatch.setattr(triton_support, "absent_reason", lambda: "")
    monkeypatch.setattr(triton_support, "installed_version", lambda: "3.7.1")
    monkeypatch.setattr(kernels, "triton_is_interpreted", lambda: True)
    monkeypatch.setitem(registry._BACKENDS, "triton", replace(registry._BACKENDS["triton"], missing=lambda: ""))
    absent = replace(registry._BACKENDS["cpu"], missing=lambda: "not in this test")
    monkeypatch.setitem(registry._BACKENDS, "cpu", absent)
    stand_in.step = step if request.param == "deformable" else neighborhood_step
    stand_in.checked = TRITON[request.param]
    return stand_in


def step(backend, compiled=False):
    """Take the forward and the backward pass of a training step and return the output and the gradients."""
    torch.manual_seed(0)
    shapes = ((1, 2, 20, 4), (1, 2, 6, 4), (1, 2, 6, 4), (1, 1, 6, 2), (2, 7, 9))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def attend(*leaves):
        return functional.deformable_attention(
            *leaves, query_size=SIZE, convention=Convention.DATPP2023, backend=backend
        )

    return gradients(attend, leaves, compiled)


def neighborhood_step(backend, compiled=False):
    torch.manual_seed(0)
    leaves = [torch.randn(1, *SIZE, 24, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)]

    def attend(*leaves):
        return functional.neighborhood_attention(*leaves, scale=0.5, backend=backend)[0]

    return gradients(attend, leaves, compiled)


def gradients(attend, leaves, compiled):
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def assert_right(stand_in, results):
    """Compare with a backend that was requested by name."""
    for one, other in zip(results, stand_in.step("matmul"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class OutOfResources(Exception):
    """Stand-in for an exception of Triton's own."""


FAULTS = [
    *(
        (where, error("no way"))
        for where in ("forward", "backward")
        for error in (ImportError, RuntimeError, OSError, AssertionError, OutOfResources)
    ),
    ("forward", 0, 1.01),
    ("forward", 0, float("nan")),
    ("forward", 1, 1.01),
    *(("backward", number, 1.01) for number in range(-1, 4)),
]


def test_sound_kernels_are_checked_once(faulty):
    assert_right(faulty, faulty.step("auto"))
    checks = len(faulty.checked.draw())
    assert faulty.calls == ["forward", "backward"] * (checks + 1)
    assert_right(faulty, faulty.step("triton"))
    assert len(faulty.calls) == 2 * checks + 4


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_auto_hands_over_with_one_warning(faulty, fault):
    """Every kind of failure, and wrong results, are found before the first call, and remembered."""
    faulty.fault = fault
    with pytest.warns(
        RuntimeWarning, match=f"The Triton kernels of {faulty.name} attention fail in torch.float32"
    ) as told:
        results = faulty.step("auto")
    assert len(told) == 1
    assert "Please report" in str(told[0].message)
    assert ("no way" if isinstance(fault[1], Exception) else "the self-check found") in str(told[0].message)
    assert_right(faulty, results)
    calls = len(faulty.calls)
    assert_right(faulty, faulty.step("auto"))  # a second warning would be an error
    assert len(faulty.calls) == calls
    with pytest.raises(functional.BackendError, match="backend='triton' cannot compute this call"):
        faulty.step("triton")


@pytest.mark.parametrize("fault", FAULTS[::5], ids=str)
def test_a_request_by_name_raises_the_cause(faulty, fault):
    faulty.fault = fault
    with pytest.raises(functional.BackendError, match=r"no way|the self-check found"):
        faulty.step("triton")


def test_kernels_that_cannot_be_imported(faulty, monkeypatch):
    def fail():
        raise OSError("libcuda.so: cannot open")

    monkeypatch.setattr(faulty.checked, "load", fail)
    with pytest.warns(RuntimeWarning, match=r"OSError: libcuda\.so: cannot open"):
        assert_right(faulty, faulty.step("auto"))
    with pytest.raises(functional.BackendError, match="libcuda"):
        faulty.step("triton")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, OSError, OutOfResources])
def test_a_failure_in_the_middle_of_a_training_step(faulty, where, error):
    """After a passed self-check, a launch that fails, also in the backward pass, is replaced in the same step."""
    faulty.step("auto")
    faulty.fault = (where, error("later"))
    with pytest.warns(RuntimeWarning, match=f"{error.__name__}: later") as told:
        results = faulty.step("auto")
    assert len(told) == 1
    assert_right(faulty, results)
    calls = len(faulty.calls)
    assert_right(faulty, faulty.step("auto"))
    assert len(faulty.calls) == calls
    with pytest.raises(functional.BackendError, match="later"):
        faulty.step("triton")


def test_a_later_failure_of_a_request_by_name_is_raised(faulty):
    faulty.step("triton")
    faulty.fault = ("backward", OutOfResources("later"))
    with pytest.raises(OutOfResources, match="later"):
        faulty.step("triton")


def test_exhausted_memory_is_no_failure(faulty):
    faulty.fault = ("forward", torch.OutOfMemoryError("full"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            faulty.step("auto")
    faulty.fault = None
    faulty.step("auto")
    faulty.fault = ("backward", torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        faulty.step("auto")
    faulty.fault = None
    calls = len(faulty.calls)
    faulty.step("auto")
    assert len(faulty.calls) == calls + 2


def test_the_check_leaves_modes_and_random_numbers_alone(faulty):
    """Autocast, deterministic algorithms, inference mode and the random state neither change nor disturb the check."""
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    with torch.autocast("cpu", dtype=BF16), torch.inference_mode():
        assert self_check.failure(faulty.checked, torch.device("cpu"), F32) == ""
    assert torch.equal(torch.get_rng_state(), expected)
    with FakeTensorMode():
        assert self_check.failure(faulty.checked, torch.device("cpu"), BF16) == ""
    torch.use_deterministic_algorithms(True)
    try:
        calls = len(faulty.calls)
        assert self_check.failure(faulty.checked, torch.device("cpu"), F32) == ""
        assert len(faulty.calls) > calls  # other kernels
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_check_during_the_capture_of_a_graph(faulty, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    assert self_check.failure(faulty.checked, device, F32) is self_check.CAPTURING
    self_check._FAILURES[faulty.name, device, F32, False] = ""
    assert self_check.failure(faulty.checked, device, F32) == ""


@pytest.mark.parametrize("fault", [None, ("backward", 0, 1.1)], ids=str)
def test_a_compiler_runs_the_check_while_it_traces(faulty, fault):
    """The first use may be under `torch.compile`: the verdict is a constant of the graph, which stays whole."""
    faulty.fault = fault
    if fault is None:
        assert_right(faulty, faulty.step("auto", compiled=True))
        faulty.fault = ("backward", RuntimeError("later"))
        with pytest.warns(RuntimeWarning, match="later"):
            assert_right(faulty, faulty.step("auto", compiled=True))
    else:
        with pytest.warns(RuntimeWarning, match="the self-check found"):
            assert_right(faulty, faulty.step("auto", compiled=True))
    assert next(iter(self_check._FAILURES))[:3] == (faulty.name, torch.device("cpu"), F32)
