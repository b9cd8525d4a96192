"""Ahead-of-time compilation of the Triton kernels, for GPUs that need not exist, and resources of the machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = ("_fill_cells", "_locate_keys", "_forward", "_grad_queries", "_collect", "_grad_keys")


class Compiler:
    """Stand-in for a kernel that compiles each launch instead of running it."""

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
            signature[name] = type_name(value)
            if looked_at and (value.data_ptr() if torch.is_tensor(value) else value) % 16 == 0:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        target = GPUTarget("cuda", self.capability, 32)
        compiled = compile_source(source, target=target, options=options)
        self.compiled[self.kernel.__name__] = Compiled(
            compiled, num_warps, values.get("BLOCK_M"), values.get("BLOCK_N")
        )


@dataclass(frozen=True)
class Compiled:
    """Compiled kernel and its tile."""

    kernel: Any
    num_warps: int
    block_m: int | None  # queries; None for a kernel without pairs of queries and keys
    block_n: int | None  # keys


def type_name(value):
    """Return Triton's name for the type of an argument."""
    if torch.is_tensor(value):
        names = {torch.int32: "i32", torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16"}
        return "*" + names.get(value.dtype, "fp32")
    return "fp32" if isinstance(value, float) else "i32"


def compile_kernels(attention, dtype, capability, *, depth=32, step=(1.0, 1.0), deterministic=True, only=KERNELS):
    """Return the compiled kernels of an attention, forward and backward, by name.

    Args:
        attention: ``"deformable"`` or ``"neighborhood"``.
        only: the kernels to compile; the others are skipped.
    """
    from dat_ref.torch.kernels.gpu import deformable, lookup, neighborhood, table_gradient, tile_config

    size, heads = (14, 15), 4
    q, k, v, out, cotangent = (torch.zeros(2, heads, size[0] * size[1], depth, dtype=dtype) for _ in range(5))
    lse = torch.zeros(q.shape[:3])
    compiled = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_config, "has_wgmma", lambda q: capability >= 90)
        for module in (lookup, deformable, table_gradient, neighborhood):
            for name in KERNELS:
                if hasattr(module, name):
                    stand_in = Compiler(getattr(module, name), capability, compiled) if name in only else Skipped()
                    patch.setattr(module, name, stand_in)
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


class Skipped:
    """Stand-in for a kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **named: None


# ------------------------------------------------------------------------------------------------ machine code


@cache
def tool(name):
    """Return the path of a tool that is part of Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run_tool(name, kernel, *options):
    """Return what a tool prints about a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool(name), *options, binary], capture_output=True, text=True, check=True).stdout


def disassemble(kernel):
    """Return the listing of a compiled kernel."""
    return run_tool("nvdisasm", kernel, "-c")


_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.M)
_PRODUCT = re.compile(r"\b(wgmma|tcgen05|mma)\.\S*?(?:\.(bf16|f16|tf32)\.\2|kind::(f16|tf32))")


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel."""

    registers: int  # per thread
    stack: int  # bytes of local memory per thread
    spills: int  # instructions that access local memory
    instructions: int
    per_pair: float  # instructions of the longest loop for each pair of a query and a key, 0 without pairs
    shared: int  # bytes per program
    products: str  # instruction family and dtype of the matrix products on tensor cores, or ""


def resources(compiled):
    """Return the resources of a compiled kernel."""
    kernel = compiled.kernel
    usage = run_tool("cuobjdump", kernel, "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    listing = disassemble(kernel)
    pairs = (compiled.block_m or 0) * (compiled.block_n or 0)
    per_pair = round(32 * compiled.num_warps * longest_loop(listing) / pairs, 1) if pairs else 0.0
    counted = (*count_spills(listing), per_pair)
    return Resources(registers, stack, *counted, kernel.metadata.shared, products(kernel.asm["ptx"]))


def count_spills(listing):
    """Return the number of instructions that access local memory, and of all instructions."""
    opcodes = _OPCODE.findall(listing)
    return sum(opcode in ("LDL", "STL") for opcode in opcodes), len(opcodes)


def longest_loop(listing):
    """Return the number of instructions of the longest loop: from a label to a jump back to it."""
    labels, jumps, count = {}, [], 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = count
        elif _OPCODE.match(line):
            count += 1
            if jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line):
                jumps.append((count, jump.group(1)))
    return max((end - labels[target] for end, target in jumps if target in labels and end > labels[target]), default=0)


def products(ptx):
    """Return the instruction family and dtype of the products on tensor cores, or an empty string."""
    return " ".join(sorted({" ".join(filter(None, match.groups())) for match in _PRODUCT.finditer(ptx)}))
