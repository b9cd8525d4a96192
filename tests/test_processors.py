"""The same results on processors with fewer instructions, which the limits of the libraries simulate."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__  # public only through `numpy.show_config`

ROOT = Path(__file__).parents[1]
# Tests whose results depend on the kernels that a processor gets: packed layers, bfloat16, compiled kernels, BLAS.
TESTS = ("tests/test_bench.py", "tests/test_inference.py", "tests/test_kernels_cpu.py", "tests/test_agree_convert.py")

# NumPy's own names, which change with its version; it warns of unknown ones.
NO_AVX512 = " ".join(name for name in __cpu_dispatch__ if name.startswith(("AVX512", "X86_V4")))
AVX512_FEATURES = "+avx512f,+avx512cd,+avx512bw,+avx512dq,+avx512vl,+avx2,+fma,+f16c"
AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx512",
    "OPENBLAS_CORETYPE": "SkylakeX",
    "NUMBA_CPU_NAME": "skylake-avx512",
    "NUMBA_CPU_FEATURES": AVX512_FEATURES,
}
PROCESSORS = {
    "AVX-512 and bfloat16 without AMX": AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "AVX-512 without bfloat16": AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2, as Zen 3": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": NO_AVX512,
        "OPENBLAS_CORETYPE": "Zen",
        "NUMBA_CPU_NAME": "znver3",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
    },
}


def instructions():
    """Return the instruction sets of this processor."""
    path = Path("/proc/cpuinfo")
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the limits are those of x86-64")
@pytest.mark.parametrize(("processor", "threads"), [*((name, 1) for name in PROCESSORS), ("AVX2, as Zen 3", 2)])
def test_the_tests_pass_with_the_instructions_of(processor, threads):
    limits = PROCESSORS[processor]
    needed = {"avx512": "avx512f", "avx2": "avx2"}[limits["ATEN_CPU_CAPABILITY"]]
    if needed not in instructions():
        pytest.skip(f"this processor has no {needed}")
    threading = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS],
        cwd=ROOT,
        env={**inherited, "HYPOTHESIS_PROFILE": "ci", **limits, **threading},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
