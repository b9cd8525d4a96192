"""Triton kernels: agreement with the spec, compilation without a GPU, quality of the machine code.

Importing Triton fixes whether a process interprets or compiles. This process compiles; the comparison with the spec,
`triton_kernels.py`, runs in a separate process.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

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


class Compiler:
    """Stand-in for a kernel that compiles each launch for a GPU that need not exist."""

    def __init__(self, kernel, capability, compiled):
        self.kernel, self.capability, self.compiled = kernel, capability, compiled

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps=4, num_stages=3, **named):
        """Compile the kernel for these arguments, specialised as a launch would."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.compiler import compile as compile_source

        values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
        assert set(values) == set(self.kernel.arg_names)
        signature, constants, attributes = {}, {}, {}
        for parameter in self.kernel.params:
            name, value = parameter.name, values[parameter.name]
            looked_at = not parameter.do_not_specialize and not isinstance(value, float)
            if parameter.is_constexpr or (looked_at and not torch.is_tensor(value) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = self.type_of(value)
            if looked_at and (value.data_ptr() if torch.is_tensor(value) else value) % 16 == 0:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        target = GPUTarget("cuda", self.capability, 32)
        self.compiled[self.kernel.__name__] = compile_source(source, target=target, options=options)

    @staticmethod
    def type_of(value):
        """Return Triton's name for the type of an argument."""
        if torch.is_tensor(value):
            names = {torch.int32: "i32", torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16"}
            return "*" + names.get(value.dtype, "fp32")
        return "fp32" if isinstance(value, float) else "i32"


def compile_kernels(attention, dtype, capability, *, depth=32, step=(1.0, 1.0), deterministic=True):
    """Return the compiled kernels of an attention, forward and backward, by name."""
    from dat_ref.torch.kernels.gpu import deformable, lookup, neighborhood, table_gradient

    size, heads = (14, 15), 4
    q, k, v, out, cotangent = (torch.zeros(2, heads, size[0] * size[1], depth, dtype=dtype) for _ in range(5))
    lse = torch.zeros(q.shape[:3])
    compiled = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (lookup, deformable, table_gradient, neighborhood):
            for name in ("_fill_cells", "_locate_keys", "_forward", "_grad_queries", "_collect", "_grad_keys"):
                if hasattr(module, name):
                    patch.setattr(module, name, Compiler(getattr(module, name), capability, compiled))
        if attention == "deformable":
            table, origin = torch.zeros(heads, 27, 29), torch.zeros(2, 2, q.shape[2], 2)
            geometry = {"query_size": size, "step": step, "scale": 0.2}
            deformable.deformable_forward(q, k, v, origin, table, **geometry)
            values = (cotangent, q, k, v, origin, table, out, lse)
            deformable.deformable_backward(*values, **geometry, deterministic=deterministic)
        else:
            geometry = {"size": size, "kernel": 7, "dilation": 1, "scale": 0.2}
            neighborhood.neighborhood_forward(q, k, v, torch.zeros(heads, 13, 13), **geometry)
            neighborhood.neighborhood_backward(cotangent, q, k, v, torch.zeros(heads, 13, 13), out, lse, **geometry)
    return compiled


@cache
def tool(name):
    """Return the path of a tool that is part of Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(kernel, folder):
    """Return the instructions of a compiled kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    return subprocess.run([tool("nvdisasm"), "-c", binary], capture_output=True, text=True, check=True).stdout


def assert_sound(compiled, dtype, capability, folder):
    """Assert products on tensor cores, limited shared memory, and almost no local memory."""
    instruction_in_line = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.M)
    for name, kernel in compiled.items():
        instructions = instruction_in_line.findall(disassemble(kernel, folder))
        assert len(instructions) > 50, name
        spilled = sum(instruction in ("LDL", "STL") for instruction in instructions)
        assert spilled <= 0.06 * len(instructions), f"{name}: {spilled} of {len(instructions)} access local memory"
        assert kernel.metadata.shared <= 99 * 1024, name
        if name in ("_forward", "_grad_queries", "_grad_keys"):
            products = kernel.asm["ptx"]
            assert ("wgmma.mma_async" if capability >= 90 else "mma.sync.aligned") in products, name
            kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[dtype]
            assert re.search(rf"mma\S*\.{kind}\.{kind}", products), name


@compiles
@pytest.mark.parametrize("attention", ["deformable", "neighborhood"])
def test_kernels_compile_for_hopper(attention, tmp_path, monkeypatch):
    """The kernels compile for sm_90 with heads of 32 in bfloat16, as in the models under autocast."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = compile_kernels(attention, torch.bfloat16, 90)
    only_there = {"_fill_cells", "_locate_keys", "_collect"} if attention == "deformable" else set()
    assert set(compiled) == {"_forward", "_grad_queries", "_grad_keys"} | only_there
    assert_sound(compiled, torch.bfloat16, 90, tmp_path)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_kernel_compiles(capability, dtype, tmp_path, monkeypatch):
    """All head depths, query spacings and forms of the table's gradient compile for Ampere and Hopper."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for depth in (32, 64) if dtype is torch.float32 else (32, 64, 128):
        assert_sound(compile_kernels("neighborhood", dtype, capability, depth=depth), dtype, capability, tmp_path)
        for step in ((1.0, 1.0), (13 / 14, 14 / 15)):
            for deterministic in (True, False):
                options = {"depth": depth, "step": step, "deterministic": deterministic}
                compiled = compile_kernels("deformable", dtype, capability, **options)
                assert_sound(compiled, dtype, capability, tmp_path)


class Poor:
    """A kernel that multiplies without tensor cores."""

    asm = {"ptx": "fma.rn.f32 %f1, %f2, %f3, %f4;", "cubin": b""}  # noqa: RUF012

    class metadata:
        """Metadata with the shared memory that a test sets."""

        shared = 0


@pytest.mark.parametrize(
    ("listing", "shared", "message"),
    [
        (90 * ["FFMA R1, R2, R3"] + 10 * ["@!P0 LDL.64 R4, [R1]"], 0, "access local memory"),
        (90 * ["FFMA R1, R2, R3"] + 10 * ["STL [R1+0x4], R4"], 0, "access local memory"),
        (90 * ["FFMA R1, R2, R3"], 100 * 1024, "_forward"),
        (90 * ["FFMA R1, R2, R3"], 0, "_forward"),
        ([], 0, "_forward"),
    ],
)
def test_the_check_rejects_poor_machine_code(listing, shared, message, monkeypatch, tmp_path):
    """The check rejects spilled registers, much shared memory, products without tensor cores, and empty code."""
    lines = "\n".join(f"        /*{16 * place:04x}*/                   {line} ;" for place, line in enumerate(listing))
    monkeypatch.setitem(globals(), "disassemble", lambda kernel, folder: lines)
    monkeypatch.setattr(Poor.metadata, "shared", shared)
    with pytest.raises(AssertionError, match=message):
        assert_sound({"_forward": Poor}, torch.bfloat16, 90, tmp_path)
