"""Arguments of the core, drawn by Hypothesis, and the check of a backend against the spec."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from strategies import shown_by_shape

from dat_ref import Convention
from dat_ref.ops import attention as np_attention
from dat_ref.ops import bias as np_bias
from dat_ref.ops import grid as np_grid
from dat_ref.ops import sampling as np_sampling
from dat_ref.torch import functional

from .agreement import assert_within_budget
from .tensors import assert_close, conventions, lattice_points, pull_back, resolutions, seeds, tensor

Inputs = dict[str, Any]
Geometry = dict[str, Any]


def _values(
    rng: np.random.Generator, points: np.ndarray, heads: int, queries: int, depth: int, bias_size: Any
) -> Inputs:
    batch, _, samples, _ = points.shape
    return {
        "q": rng.standard_normal((batch, heads, queries, depth)),
        "k": rng.standard_normal((batch, heads, samples, depth)),
        "v": rng.standard_normal((batch, heads, samples, depth)),
        "points": points,
        "bias_table": rng.standard_normal((heads, 2 * bias_size[0] - 1, 2 * bias_size[1] - 1)),
    }


@shown_by_shape
@st.composite
def cores(draw):
    """Draw the arguments of the core: (inputs by name, geometry); all sizes different, tables of any size."""
    rng = np.random.default_rng(draw(seeds))
    size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    convention = draw(conventions)
    batch, groups, heads_per_group = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    samples, depth = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    bias_size = size if draw(st.booleans()) else (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    if draw(st.booleans()):
        points_px = lattice_points(rng, (batch, groups, samples), size)
        points = np_grid.from_pixels(points_px, size, convention)
    else:
        points = rng.uniform(-1.3, 1.3, (batch, groups, samples, 2))
    inputs = _values(rng, points, groups * heads_per_group, size[0] * size[1], depth, bias_size)
    return inputs, {"query_size": size, "convention": convention, "resolution": draw(resolutions)}


# Lengths whose geometry has no rounding: points hit the lattice exactly, in every precision and with every formula.
_EXACT_LENGTHS = {
    Convention.CELL_CENTER: [1, 2, 4, 8],
    Convention.PAPER: [1, 2, 3, 5, 9],
    Convention.CVPR2022: [1, 2, 4, 8],
    Convention.DATPP2023: [1, 2, 3, 5, 9],
}


@shown_by_shape
@st.composite
def exact_cores(draw, smallest_batch=0, fewest_samples=1):
    """Draw cores whose points are on the lattice of the table, between its cells, outside, and coincident."""
    rng = np.random.default_rng(draw(seeds))
    convention = draw(conventions)
    lengths = st.sampled_from(_EXACT_LENGTHS[convention])
    size = draw(st.tuples(lengths, lengths))
    resolution = draw(resolutions)
    bias_size = size if draw(st.booleans()) else draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    batch, groups = draw(st.integers(smallest_batch, 3)), draw(st.integers(1, 3))
    heads_per_group, depth = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    samples = draw(st.integers(fewest_samples, 7))
    sixteenths = rng.integers(-24, 25, (batch, groups, samples, 2))
    spacing = rng.choice([1, 4, 80], (batch, groups, samples, 1), p=[0.5, 0.4, 0.1])  # between, more often whole, far
    points = sixteenths // spacing * spacing / 16 * np.where(spacing == 80, 5, 1)
    points[:, :, -1] = points[:, :, 0]
    inputs = _values(rng, points, groups * heads_per_group, size[0] * size[1], depth, bias_size)
    geometry = {"query_size": size, "convention": convention, "resolution": resolution}
    assume(_is_exact(points, inputs["bias_table"].shape[1:], geometry))
    return inputs, geometry


def _is_exact(points: np.ndarray, table_size: Any, geometry: Geometry) -> bool:
    """Return whether both precisions and both formulas give the same table positions."""
    positions = np_bias.table_positions(points, table_size, *geometry.values())
    float32_positions = np_bias.table_positions(points.astype(np.float32), table_size, *geometry.values())
    ours = functional.table_positions(torch.from_numpy(points).float(), table_size, *geometry.values())
    return np.array_equal(positions, float32_positions) and np.array_equal(positions, ours.numpy())


def one_core(seed: int = 5, convention: Convention = Convention.DATPP2023, batch: int = 2) -> tuple[Inputs, Geometry]:
    """Return a core on a map of 4 × 5, with 7 keys in 3 groups and 6 heads of width 3."""
    rng = np.random.default_rng(seed)
    inputs = _values(rng, rng.uniform(-1, 1, (batch, 3, 7, 2)), 6, 20, 3, (4, 5))
    return inputs, {"query_size": (4, 5), "convention": convention, "resolution": "fractions"}


def lattice_distance(inputs: Inputs, geometry: Geometry) -> float:
    """Return the distance of the table positions from the lattice: the smallest one to an integer."""
    positions = np_bias.table_positions(inputs["points"], inputs["bias_table"].shape[1:], *geometry.values())
    return float(np.abs(positions - np.round(positions)).min(initial=1.0))


# ------------------------------------------------------------------------------------------------ checks


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the memory that torch allocates uninitialized with NaN; use deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_core(inputs: Inputs, geometry: Geometry, backend: str, **options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the inputs as tensors that require gradients, and the output."""
    leaves = {name: None if leaf is None else tensor(leaf) for name, leaf in inputs.items()}
    with poisoned():
        return leaves, functional.deformable_attention(*leaves.values(), **geometry, backend=backend, **options)


def gradients_of(leaves: dict[str, Any], output: torch.Tensor, cotangent: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the gradients by the names of the inputs."""
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    with poisoned():
        return dict(zip(present, pull_back(output, cotangent, list(present.values())), strict=True))


def assert_core(
    inputs: Inputs,
    geometry: Geometry,
    backend: str,
    tolerance: float = 1e-10,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda grads: grads,
    **options: Any,
) -> None:
    """Check output and all gradients of a backend against the spec in float64."""
    leaves, actual = run_core(inputs, geometry, backend, **options)
    assert_close(actual, np_attention.deformable_attention(**inputs, **geometry, **options), tolerance)
    cotangent = np.random.default_rng(1).standard_normal(actual.shape)
    expected = np_attention.deformable_attention_vjp(cotangent, **inputs, **geometry, **options)
    for name, grad in change(gradients_of(leaves, actual, cotangent)).items():
        assert_close(grad, getattr(expected, name), tolerance, what=name)


def assert_core_within_budget(inputs: Inputs, geometry: Geometry, backend: str) -> None:
    """Check output and all gradients of a backend in float32, within the error of the same mathematics in float32."""
    cotangent = np.random.default_rng(1).standard_normal(inputs["q"].shape)
    truths, magnitudes = attention_and_gradients(inputs, geometry, cotangent)
    float32_inputs = {name: leaf.astype(np.float32) for name, leaf in inputs.items()}
    yardsticks, _ = attention_and_gradients(float32_inputs, geometry, cotangent.astype(np.float32))
    leaves, output = run_core(float32_inputs, geometry, backend)
    results = {"output": output.detach(), **gradients_of(leaves, output, cotangent)}
    for name, result in results.items():
        # Terms that cancel leave rounding errors, even if those of the yardstick happen to cancel as well.
        error = np.maximum(np.abs(yardsticks[name] - truths[name]), np.finfo(np.float32).eps * magnitudes[name])
        yardstick = (truths[name] + error).astype(np.float32)
        assert_within_budget(result.numpy(), truths[name], yardstick, what=name)


def attention_and_gradients(inputs: Inputs, geometry: Geometry, cotangent: np.ndarray) -> tuple[Inputs, Inputs]:
    """Return output and gradients by the formulas of fused kernels, from P and ∂S = P (∂P - z·∂z).

    Also return, by the same names, the magnitudes of the terms that are added up in each.
    """
    q, k, v, points, table = inputs.values()
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    bias = np_bias.table_bias(table, points, **geometry)
    output, weights = np_attention.attend(q, k, v, bias, scale)
    transposed = weights.swapaxes(-1, -2)
    grad_logits = weights * (cotangent @ v.swapaxes(-1, -2) - (output * cotangent).sum(-1, keepdims=True))
    terms = weights * (
        np.abs(cotangent) @ np.abs(v).swapaxes(-1, -2) + np.abs(output * cotangent).sum(-1, keepdims=True)
    )
    bias_grads = np_bias.table_bias_vjp(grad_logits, table, points, **geometry)
    results = {
        "output": output,
        "q": grad_logits @ k * scale,
        "k": grad_logits.swapaxes(-1, -2) @ q * scale,
        "v": transposed @ cotangent,
        "points": bias_grads.points,
        "bias_table": bias_grads.table,
    }
    magnitudes = {
        "output": weights @ np.abs(v),
        "q": terms @ np.abs(k) * scale,
        "k": terms.swapaxes(-1, -2) @ np.abs(q) * scale,
        "v": transposed @ np.abs(cotangent),
        "points": _slope_magnitudes(terms, table, points, geometry),
        "bias_table": np_bias.table_bias_vjp(terms, table, points, **geometry).table,
    }
    return results, magnitudes


def _slope_magnitudes(terms: np.ndarray, table: np.ndarray, points: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return Σ |∂B/∂p̃| |∂S| over the queries and the heads of a group: (B, G, Ns, 2)."""
    size, convention, _ = geometry.values()
    positions = np_bias.table_positions(points, table.shape[1:], *geometry.values())  # (B, G, M, Ns, 2)
    per_unit = np.asarray(np_grid.pixels_per_unit(size, convention)) * np_bias.table_scale(
        table.shape[1:], size, convention, geometry["resolution"]
    )
    groups, total = points.shape[1], np.zeros_like(points)
    for head, cells in enumerate(table):
        group = head // (len(table) // groups)
        flat = positions[:, group].reshape(1, -1, 2)
        slopes = np_sampling.bilinear_sample_vjp(np.ones((1, 1, flat.shape[1])), cells[None, None], flat).points_px
        slopes = np.abs(slopes.reshape(*positions[:, group].shape)) * per_unit
        total[:, group] += (slopes * terms[:, head, :, :, None]).sum(1)
    return total
