"""Table of the resources of all Triton kernels, compiled ahead of time.

    python -m helpers.gpu_resources [PATH]        # with PYTHONPATH=tests; without PATH the table of the repository

writes what `tests/test_kernels_triton.py` compares with: registers, local memory, spilled registers, shared memory and
the instructions of the matrix products, for each kernel, GPU architecture, dtype and head dimension.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .gpu_compile import compile_kernels, resources

PATH = Path(__file__).parents[2] / "docs" / "performance" / "triton" / "resources.json"
CAPABILITIES = (80, 89, 90, 100)
DEPTHS = {torch.bfloat16: (32, 64, 128), torch.float16: (32, 64, 128), torch.float32: (32, 64)}
STEPS = {"unit": (1.0, 1.0), "other": (13 / 14, 14 / 15)}
VARIANTS = {  # kernels of a variant → options of `compile_kernels`
    "neighborhood": ({"attention": "neighborhood"}, ("_forward", "_grad_queries", "_grad_keys")),
    **{
        f"deformable, step {name}": (
            {"attention": "deformable", "step": step},
            ("_forward", "_grad_queries", "_grad_keys", "_collect"),
        )
        for name, step in STEPS.items()
    },
    **{
        f"deformable, step {name}, atomic": (
            {"attention": "deformable", "step": step, "deterministic": False},
            ("_grad_queries",),
        )
        for name, step in STEPS.items()
    },
}


def dtype_name(dtype):
    """Return the name of a dtype without the module."""
    return str(dtype).removeprefix("torch.")


def measure_variant(variant, capability, dtype, depth):
    """Return the resources of the kernels of a variant: name → `Resources`."""
    options, names = VARIANTS[variant]
    compiled = compile_kernels(dtype=dtype, capability=capability, depth=depth, only=names, **options)
    assert set(compiled) == set(names), variant
    return {f"{variant}: {name.removeprefix('_')}": resources(compiled[name]) for name in names}


def measure(capability, dtype, depth):
    """Return the resources of all kernels: name → `Resources`."""
    rows = {}
    for variant in VARIANTS:
        rows |= measure_variant(variant, capability, dtype, depth)
    return rows


def write(path):
    """Measure everything and write it as JSON."""
    import triton

    rows = []
    for capability in CAPABILITIES:
        for dtype, depths in DEPTHS.items():
            for depth in depths:
                for kernel, measured in measure(capability, dtype, depth).items():
                    case = {"capability": capability, "dtype": dtype_name(dtype), "depth": depth, "kernel": kernel}
                    rows.append(case | asdict(measured))
                print(f"sm_{capability} {dtype_name(dtype)} d={depth}", flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else PATH)
