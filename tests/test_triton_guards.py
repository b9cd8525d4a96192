"""Selection of the Triton kernels: what they cannot compute, on which device they run, and their self-check."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from dat_ref.bench import implementations  # noqa: E402
from dat_ref.bench.cases import NeighborhoodCase  # noqa: E402
from dat_ref.torch import functional, kernels  # noqa: E402
from dat_ref.torch.functional import neighborhood, registry  # noqa: E402
from dat_ref.torch.kernels import triton_support  # noqa: E402

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(registry, "_WARNED", set())


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
    monkeypatch.setattr(kernels, "missing", lambda name: "")
    for candidates in (registry._BACKENDS, neighborhood._BACKENDS):
        forged = {**candidates, "triton": with_no_reason_to_miss(candidates["triton"])}
        monkeypatch.setattr(registry if candidates is registry._BACKENDS else neighborhood, "_BACKENDS", forged)

    def set_capability(*capability):
        monkeypatch.setattr(triton_support, "capability", lambda device: capability)

    set_capability(9, 0)
    return set_capability


def with_no_reason_to_miss(backend):
    return replace(backend, missing=lambda: "")


def chosen(dtype, depth=32, *, name="auto", k_dtype=None, table=True, neighborhoods=False):
    """Return the name of the backend for tensors on a CUDA device that need not exist."""
    with FakeTensorMode():
        q, k = (torch.empty(1, 2, 12, depth, dtype=each, device="cuda") for each in (dtype, k_dtype or dtype))
        points, bias = torch.empty(1, 1, 12, 2, device="cuda"), torch.empty(2, 5, 7, device="cuda")
    call = registry.Call(q, k, q, None if neighborhoods else points, bias if table else None, 0.0)
    return registry.choose_backend(name, call, (neighborhood if neighborhoods else registry)._BACKENDS).name


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
