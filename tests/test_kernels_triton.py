"""Triton kernels: agreement with the spec, compilation without a GPU, quality of the machine code.

Importing Triton fixes whether a process interprets or compiles. This process compiles; the comparison with the spec,
`triton_kernels.py`, runs in a separate process.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
from helpers import gpu_compile, gpu_resources  # noqa: E402
from helpers.tensors import rejects  # noqa: E402

CHECKS = Path(__file__).with_name("triton_kernels.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="needs compilation, but TRITON_INTERPRET is set")


def run_checks(**environment):
    """Run the comparison with the spec; unless all tests pass, raise with its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    options = {"cwd": CHECKS.parents[1], "env": {**os.environ, **environment}, "timeout": 1200}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_kernels_agree_with_the_spec_in_the_interpreter():
    """Tiny shapes in float32, step by step in NumPy."""
    run_checks(TRITON_INTERPRET="1")


@compiles
@pytest.mark.gpu
def test_kernels_agree_with_the_spec_on_a_device():
    """Compiled kernels agree on a device, also for larger shapes in half precision."""
    run_checks()


# ------------------------------------------------------------------------------------------------ compilation

TABLE = json.loads(gpu_resources.PATH.read_text())
ROWS = {
    (row.pop("capability"), row.pop("dtype"), row.pop("depth"), row.pop("kernel")): gpu_compile.Resources(**row)
    for row in TABLE["rows"]
}
FAMILIES = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}  # "mma" also for tiles of fewer than 64 rows
MAX_SHARED = 99 * 1024  # what every device since sm_80 has
MAX_SPILLS_OF_MODELS = 0.005  # share of the instructions in half precision with at most 64 channels per head
MAX_SPILLS = {80: 0.06, 89: 0.06, 90: 0.06, 100: 0.09}  # of all others


def assert_sound(measured, capability, dtype, depth, kernel):
    """Assert products on tensor cores, limited shared memory, few spilled registers, and fewer where models run."""
    case = f"sm_{capability} {dtype} d={depth} {kernel}"
    assert measured.instructions > 50, case
    share = MAX_SPILLS_OF_MODELS if dtype != "float32" and depth <= 64 else MAX_SPILLS[capability]
    assert measured.spills <= share * measured.instructions, f"{case}: {measured.spills} access local memory"
    assert measured.shared <= MAX_SHARED, f"{case}: {measured.shared} bytes of shared memory"
    if not kernel.endswith("collect"):
        narrow = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}[dtype]
        fitting = {f"mma {narrow}", f"{FAMILIES[capability]} {narrow}", *(["tcgen05 f16"] if narrow == "bf16" else [])}
        assert any(each in measured.products for each in fitting), f"{case}: products by {measured.products!r}"


def assert_no_worse(measured, recorded, case):
    """Assert that a kernel needs no more than the table says."""
    for name in ("spills", "stack", "shared"):
        found, allowed = getattr(measured, name), getattr(recorded, name)
        assert found <= allowed, f"{case}: {name} is {found}, and {allowed} in {gpu_resources.PATH.name}"
    assert measured.products == recorded.products, case


@pytest.mark.parametrize("case", ROWS, ids=lambda case: "-".join(map(str, case)))
def test_the_recorded_kernels_are_sound(case):
    """Almost no kernel spills registers in half precision with at most 64 channels, and the others few."""
    assert_sound(ROWS[case], *case)


def test_the_table_is_complete():
    """The table has every kernel, architecture, dtype and head dimension."""
    kernels = {kernel for _, _, _, kernel in ROWS}
    cases = [(dtype, depth) for dtype, depths in gpu_resources.DEPTHS.items() for depth in depths]
    assert len(kernels) == 13
    assert len(ROWS) == len(TABLE["rows"]) == 13 * len(gpu_resources.CAPABILITIES) * len(cases)


same_compiler = pytest.mark.skipif(
    triton.__version__ != TABLE["triton"], reason=f"the table is of Triton {TABLE['triton']}"
)


@compiles
@same_compiler
@pytest.mark.parametrize("variant", ["neighborhood", "deformable, step unit"])
def test_kernels_compile_for_hopper(variant, tmp_path, monkeypatch):
    """The kernels compile for sm_90 with heads of 32 in bfloat16, as in the models under autocast."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for kernel, measured in gpu_resources.measure_variant(variant, 90, torch.bfloat16, 32).items():
        case = (90, "bfloat16", 32, kernel)
        assert_no_worse(measured, ROWS[case], case)


@compiles
@same_compiler
@pytest.mark.slow  # 416 compilations
@pytest.mark.parametrize("dtype", gpu_resources.DEPTHS, ids=gpu_resources.dtype_name)
@pytest.mark.parametrize("capability", gpu_resources.CAPABILITIES)
def test_no_kernel_needs_more_than_recorded(capability, dtype, tmp_path, monkeypatch):
    """All kernels compile for every architecture, and none spills more registers than the table says."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for depth in gpu_resources.DEPTHS[dtype]:
        for kernel, measured in gpu_resources.measure(capability, dtype, depth).items():
            case = (capability, gpu_resources.dtype_name(dtype), depth, kernel)
            assert_no_worse(measured, ROWS[case], case)


GOOD = gpu_compile.Resources(128, 0, 0, 1000, 12.5, 1024, "mma bf16")


@pytest.mark.parametrize(
    ("poor", "message"),
    [
        ({"spills": 6}, "6 access local memory"),
        ({"shared": 100 * 1024}, "102400 bytes of shared memory"),
        ({"products": ""}, "products by ''"),
        ({"products": "mma tf32"}, "products by 'mma tf32'"),
        ({"instructions": 0}, "d=64 forward"),
    ],
)
def test_the_check_rejects_poor_machine_code(poor, message):
    """The check rejects spilled registers, much shared memory, products without tensor cores, and empty code."""
    case = (80, "bfloat16", 64, "forward")
    assert_sound(GOOD, *case)
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_sound(replace(GOOD, **poor), *case)
    assert_sound(replace(GOOD, spills=60), 80, "bfloat16", 128, "forward")
    assert rejects(lambda: assert_sound(replace(GOOD, spills=61), 80, "bfloat16", 128, "forward"))


@pytest.mark.parametrize("worse", [{"spills": 3}, {"stack": 8}, {"shared": 2048}, {"products": "mma f16"}])
def test_the_comparison_rejects_more_than_recorded(worse):
    """More spills, local memory or shared memory than recorded, or other products, are rejected."""
    assert_no_worse(replace(GOOD, registers=255, instructions=999, per_pair=99.0), GOOD, "case")
    assert rejects(lambda: assert_no_worse(replace(GOOD, **worse), GOOD, "case"))


def test_the_machine_code_is_read():
    """Spills are counted with and without predicates; the products' family and dtype are found."""
    lines = [*(90 * ["FFMA R1, R2, R3"]), "@!P0 LDL.64 R4, [R1]", "STL [R1+0x4], R4", "@UP1 STL [R1], R4"]
    listing = "\n".join(f"        /*{16 * place:04x}*/                   {line} ;" for place, line in enumerate(lines))
    assert gpu_compile.count_spills(listing) == (3, 93)
    assert gpu_compile.count_spills("") == (0, 0)
    loop = "before:", "FADD", ".L_x_1:", "FMUL", ".L_x_2:", "FFMA", "@P1 BRA `(.L_x_2)", "@P0 BRA `(.L_x_1)", "EXIT"
    listing = "\n".join(
        line if line.endswith(":") else f"        /*{16 * place:04x}*/                   {line} ;"
        for place, line in enumerate(loop)
    )
    assert gpu_compile.longest_loop(listing) == 4
    assert gpu_compile.longest_loop("") == 0
    assert gpu_compile.products("fma.rn.f32 %f1, %f2, %f3, %f4;") == ""
    ampere = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }"
    hopper = "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 { %r1 }"
    blackwell = "@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd1;"
    assert gpu_compile.products(ampere) == "mma bf16"
    assert gpu_compile.products(hopper) == "wgmma tf32"
    assert gpu_compile.products(blackwell) == "tcgen05 f16"
