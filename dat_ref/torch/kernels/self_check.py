"""Self-check of the Triton kernels at first use, and the hand-over to plain PyTorch where they fail.

The kernels depend on a driver, a compiler and a device that no test of this package has seen. Therefore the first call
for each device and dtype runs them on small inputs, forward and backward, and compares all results with `blockwise`. A
kernel that fails later, e.g. because a tile does not fit on the device, is replaced in the middle of the step:
`blockwise` takes the same arguments, also those of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Largest error of each result, relative to its largest element. Wrong indices or masks give errors of order one.
BUDGET = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

CAPTURING = "the self-check cannot run during the capture of a CUDA graph; call the layer once before"

Key = tuple[str, torch.device, torch.dtype, bool]
_FAILURES: dict[Key, str] = {}  # cause of the failure, or "" if the kernels passed


@dataclass
class Checked:
    """Kernels of an operation, and what they are compared with."""

    name: str  # of the operation: the functions are {name}_forward and {name}_backward
    load: Callable[[], Any]  # imports the kernel module
    plain: Any  # kernel module in plain PyTorch
    draw: Callable[[], list[Example]]
    gradients: tuple[str, ...]  # names of the tensors


@dataclass(frozen=True)
class Example:
    """Small call of an operation, on the CPU in float32."""

    tensors: list[Tensor]  # q, k and v, which get the dtype under test, then others
    grad_out: Tensor
    geometry: dict[str, Any]


def failure(checked: Checked, device: torch.device, dtype: torch.dtype) -> str:
    """Return the cause why the kernels fail on a device, or ``""``. The first call runs the self-check.

    During the capture of a CUDA graph no self-check can run: without an earlier one the answer is `CAPTURING`.

    The result depends on whether deterministic algorithms are required, because those are other kernels.
    """
    key = _key(checked, device, dtype)
    if key not in _FAILURES:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return CAPTURING
        _FAILURES[key] = _check(checked, device, dtype)
    return _FAILURES[key]


def report(checked: Checked, device: torch.device, dtype: torch.dtype, cause: str) -> str:
    """Return the warning for the hand-over, with all facts of a bug report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {name}"
    return (
        f"The Triton kernels of {checked.name} attention fail in {dtype}: {cause}. backend='auto' uses plain PyTorch "
        f"instead for the rest of this process. Please report this message as a bug ({versions})."
    )


def with_fallback(checked: Checked, warn: Callable[[str], None]) -> SimpleNamespace:
    """Return a kernel module that runs the kernels until they fail, and plain PyTorch from then on.

    Args:
        checked: the operation.
        warn: called with the message of `report`.
    """

    def run(function: str, first: Tensor, *tensors: Tensor, **options: Any) -> Any:
        key = _key(checked, first.device, first.dtype)
        if not _FAILURES.get(key):
            try:
                return getattr(checked.load(), function)(first, *tensors, **options)
            except torch.OutOfMemoryError:
                raise  # no fault of the kernels
            except Exception as error:  # of Triton, the compiler, the driver, …
                if first.is_cuda and torch.are_deterministic_algorithms_enabled():
                    raise  # plain PyTorch has no deterministic sum there
                _FAILURES[key] = _describe(error)
            warn(report(checked, first.device, first.dtype, _FAILURES[key]))
        return getattr(checked.plain, function)(first, *tensors, **options)

    functions = (f"{checked.name}_forward", f"{checked.name}_backward")
    return SimpleNamespace(**{function: partial(run, function) for function in functions})


def _key(checked: Checked, device: torch.device, dtype: torch.dtype) -> Key:
    return checked.name, device, dtype, torch.are_deterministic_algorithms_enabled()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------------------------------------ the comparison


def _check(checked: Checked, device: torch.device, dtype: torch.dtype) -> str:
    """Run the comparison and return the cause of a failure, or ``""``.

    `torch.compile` calls this while it traces, so all modes of tracing are suspended: the kernels run.
    """
    try:
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            kernels = checked.load()
            causes = (_disagreement(checked, kernels, example, device, dtype) for example in checked.draw())
            return next(filter(None, causes), "")
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:  # of the import, Triton, the compiler, the driver, …
        return _describe(error)


def _disagreement(checked: Checked, kernels: Any, example: Example, device: torch.device, dtype: torch.dtype) -> str:
    """Return the first result that is out of the budget, or ``""``."""
    values = [each.to(dtype) if place < 3 else each for place, each in enumerate(example.tensors)]
    grad_out = example.grad_out.to(dtype)
    ours = _results(checked.name, kernels, example, [each.to(device) for each in values], grad_out.to(device))
    # In float64 on the CPU: settings such as TF32, or a fault of the device, do not affect it.
    truth = _results(checked.name, checked.plain, example, [each.double() for each in values], grad_out.double())
    names = ("the output", "lse", *(f"grad_{name}" for name in checked.gradients))
    for name, one, other in zip(names, ours, truth, strict=True):
        error = float((one.cpu().double() - other).abs().max() / other.abs().max())
        if not error <= BUDGET[dtype]:  # NaN is not <= anything
            return f"the self-check found {name} wrong by {error:.1e} of its largest element, {BUDGET[dtype]} allowed"
    return ""


def _results(name: str, module: Any, example: Example, values: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    """Return the output, the log-sum-exp, on which a hand-over in the middle of a step relies, and all gradients."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    out, lse = getattr(module, f"{name}_forward")(*values, **example.geometry)
    backward = getattr(module, f"{name}_backward")
    return [out, lse, *backward(grad_out, *values, out, lse, **example.geometry, deterministic=deterministic)]


# ------------------------------------------------------------------------------------------------ small calls

_HEADS, _DEPTH, _SIZE = 2, 32, (9, 11)  # more than one tile of queries, the last one partial


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def deformable_examples() -> list[Example]:
    """Draw calls with query steps of 1 and below: the kernels compile to different code."""
    generator = torch.Generator("cpu").manual_seed(0)
    queries, samples = _SIZE[0] * _SIZE[1], 37
    q, k, v, grad_out = (_draw(generator, 1, _HEADS, n, _DEPTH) for n in (queries, samples, samples, queries))
    origin = 4 + 4 * _draw(generator, 1, 1, samples, 2)  # some keys read outside the table
    table = _draw(generator, _HEADS, 2 * _SIZE[0] - 1, 2 * _SIZE[1] - 1)
    steps = ((1.0, 1.0), ((_SIZE[0] - 1) / _SIZE[0], (_SIZE[1] - 1) / _SIZE[1]))
    geometries = [{"query_size": _SIZE, "step": step, "scale": _DEPTH**-0.5} for step in steps]
    return [Example([q, k, v, origin, table], grad_out, geometry) for geometry in geometries]


def neighborhood_examples() -> list[Example]:
    """Draw a call with neighborhoods of 5 × 5 keys, dilated."""
    generator = torch.Generator("cpu").manual_seed(0)
    kernel = 5
    q, k, v, grad_out = (_draw(generator, 1, _HEADS, _SIZE[0] * _SIZE[1], _DEPTH) for _ in range(4))
    table = _draw(generator, _HEADS, 2 * kernel - 1, 2 * kernel - 1)
    geometry = {"size": _SIZE, "kernel": kernel, "dilation": 2, "scale": _DEPTH**-0.5}
    return [Example([q, k, v, table], grad_out, geometry)]
