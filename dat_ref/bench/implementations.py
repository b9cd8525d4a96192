"""Implementations of a case: attention by each backend, and torch's attention without bias for comparison."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch import functional
from ..torch.functional.registry import Backend, BackendError, Call, choose_backend
from .agreement import Results
from .cases import CoreCase, NeighborhoodCase

EAGER = "eager"  # the reference
SDPA = "sdpa"  # torch's attention without bias: a different function, so its results are not compared
FORWARD, BACKWARD = "forward", "forward+backward"

OFF_LATTICE = 1e-4  # minimum distance from the lattice in table cells, much larger than float32 rounding

AttentionCase = CoreCase | NeighborhoodCase


@dataclass(frozen=True)
class Implementation:
    """Implementation of a case."""

    name: str
    dtype: torch.dtype
    forward: Callable[[], Tensor]
    backward: Callable[[], Results] | None  # forward and backward pass: output and gradients, by name
    comparable: bool = True

    def run(self, kind: str) -> Callable[[], object]:
        """Return the function to time."""
        if kind == FORWARD:
            return self.forward
        assert self.backward is not None
        return self.backward

    def results(self, kinds: tuple[str, ...] = (FORWARD, BACKWARD)) -> Results:
        """Return all outputs and gradients, for the comparison with the reference."""
        results = {"forward": self.forward()}
        return {**results, **self.backward()} if BACKWARD in kinds and self.backward is not None else results


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Inputs:
    """Random inputs in the memory layout of a layer: the heads of a token are contiguous."""

    values: dict[str, Tensor]  # dtype under test
    geometry: dict[str, Tensor]  # always float32
    cotangent: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.cotangent.dtype

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All tensors that get a gradient."""
        return {**self.values, **self.geometry}

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the same values in another dtype."""
        values = {name: value.to(dtype) for name, value in self.values.items()}
        return Inputs(values, self.geometry, self.cotangent.to(dtype))


def draw_inputs(case: AttentionCase, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Draw the inputs of a case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heads(tokens: int) -> Tensor:
        tokens_by_head = normal(case.batch, tokens, case.heads * case.depth).to(device, dtype)
        return tokens_by_head.view(case.batch, tokens, case.heads, case.depth).transpose(1, 2)  # (B, heads, N, d)

    height, width = case.size
    if isinstance(case, NeighborhoodCase):
        side, channels = 2 * case.kernel - 1, case.heads * case.depth
        values = {"qkv": normal(case.batch, height, width, 3 * channels).to(device, dtype)}
        cotangent = normal(case.batch, height, width, channels).to(device, dtype)
        return Inputs(values, {"table": 0.5 * normal(case.heads, side, side).to(device)}, cotangent)
    samples = case.keys[0] * case.keys[1]
    points = _points(case, generator)
    table = 0.5 * normal(case.heads, 2 * height - 1, 2 * width - 1)
    values = {"q": heads(height * width), "k": heads(samples), "v": heads(samples)}
    return Inputs(values, {"points": points.to(device), "table": table.to(device)}, heads(height * width))


def _points(case: CoreCase, generator: torch.Generator) -> Tensor:
    """Draw points (B, G, Ns, 2) around a key grid. Some are outside the map; none is on the lattice for any query."""
    shape = (case.batch, case.groups, case.keys[0] * case.keys[1], 2)
    reference = functional.reference_points(case.keys, case.convention, dtype=torch.float32).view(1, 1, -1, 2)
    points = torch.full(shape, float("nan"))
    while (redraw := _on_lattice(points, case)).any():
        points = torch.where(redraw, reference + 0.1 * torch.randn(shape, generator=generator), points)
    return points


def _on_lattice(points: Tensor, case: CoreCase) -> Tensor:
    """Return a mask of the coordinates that are too close to the lattice for some query. NaN counts as too close."""
    table_size = (2 * case.size[0] - 1, 2 * case.size[1] - 1)
    origin, step = functional.table_index(points, table_size, case.size, case.convention)
    off_lattice = []
    for start, increment, length in zip(origin.unbind(-1), step, case.size, strict=True):
        positions = start[..., None] + increment * torch.arange(length)
        off_lattice.append((positions - positions.round()).abs().amin(-1) > OFF_LATTICE)
    return ~torch.stack(off_lattice, dim=-1)


# ------------------------------------------------------------------------------------------------ implementations


def make_implementation(name: str, case: AttentionCase, data: Inputs) -> Implementation:
    """Return the implementation of a case by a backend, or by torch's attention without bias."""
    attend = _neighborhood(name, case) if isinstance(case, NeighborhoodCase) else _core(name, case)
    inputs = data.values if name == SDPA else data.inputs

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(**inputs)

    def backward() -> Results:
        leaves = {part: tensor.detach().requires_grad_() for part, tensor in inputs.items()}
        out = attend(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), data.cotangent)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    return Implementation(name, data.dtype, forward, backward, comparable=name != SDPA)


def _core(name: str, case: CoreCase) -> Callable[..., Tensor]:
    def without_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def attend(q: Tensor, k: Tensor, v: Tensor, points: Tensor, table: Tensor) -> Tensor:
        return functional.deformable_attention(
            q, k, v, points, table, query_size=case.size, convention=case.convention, backend=name
        )

    return without_bias if name == SDPA else attend


def _neighborhood(name: str, case: NeighborhoodCase) -> Callable[..., Tensor]:
    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        return functional.neighborhood_attention(qkv, table, scale=case.depth**-0.5, backend=name)[0]

    return attend


def unsupported_reason(name: str, case: AttentionCase, data: Inputs) -> str:
    """Return the reason why an implementation cannot run a case, or ``""``. A fallback to another backend counts."""
    if name == SDPA:
        return ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            backend = _chosen_backend(name, case, data)
        except BackendError as error:
            return str(error)
    if backend.name == name:
        return ""
    return str(caught[0].message) if caught else f"falls back to {backend.name}"


def _chosen_backend(name: str, case: AttentionCase, data: Inputs) -> Backend:
    if isinstance(case, NeighborhoodCase):
        qkv, table = data.inputs.values()
        q = qkv[..., : case.depth]  # only its dtype, device and depth matter
        return choose_backend(name, Call(q, q, q, None, table, 0.0, "neighborhood"))
    q, k, v, points, table = data.inputs.values()
    return choose_backend(name, Call(q, k, v, points, table, 0.0))


# ------------------------------------------------------------------------------------------------ memory limits


def eager_bytes(case: AttentionCase, backward: bool) -> int:
    """Estimate the peak memory of the eager formulation, in bytes: several matrices of float32 logits."""
    height, width = case.size
    pairs = case.batch * case.heads * height * width
    if isinstance(case, NeighborhoodCase):
        gathered_bytes = 2 * pairs * case.kernel**2 * case.depth * 4  # keys and values of every query
        return gathered_bytes * (3 if backward else 2)
    return pairs * case.keys[0] * case.keys[1] * 4 * (6 if backward else 4)


def free_bytes(device: str) -> int:
    """Return the free memory in bytes."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 33
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def warmup_case(case: AttentionCase) -> Any:
    """Return a small case of the same kind that triggers all one-time work, such as compilation."""
    if isinstance(case, NeighborhoodCase):
        return replace(case, batch=1, size=(case.kernel + 2, case.kernel + 1))
    return replace(case, batch=1, size=(6, 7), keys=(2, 3))
