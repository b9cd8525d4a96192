"""Our implementations pass every check of the kit: the NumPy spec, PyTorch in each backend, the torch layer.

Each check draws a few cases, many in the profile "deep".
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import settings
from torch.func import functional_call

from dat_ref import Convention, OffsetBound
from dat_ref.testing import Stage, check, format_report, from_torch
from dat_ref.testing.ops.layer_cases import config_of
from dat_ref.testing.pytest import conformance_tests
from dat_ref.torch import DeformableAttention, functional
from dat_ref.torch.functional import backends

FEW = max(settings.default.max_examples // 8, 1)  # cases per check: 3 in the profile "ci", 50 in "deep"
DTYPES = ["float64", "float32"]


def holds(target, op, *, besides="", **options):
    """Assert that every supported check passes, including the gradients."""
    reports = check(target, [op], **{"max_examples": FEW, **options})
    for report in reports:
        assert {result.check.name for result in report.failed()} <= {besides}, format_report(report)
        gradients = [result for result in report.results if result.check.stage is Stage.GRADIENTS]
        assert not any("the implementation has no gradient" in result.skipped for result in gradients)
    return reports


# ------------------------------------------------------------------------------------------------ NumPy

SPEC = {
    "sampler": "dat_ref.ops.sampling",
    "reference_grid": "dat_ref.testing.ops.reference_grid",
    "offset_bound": "dat_ref.testing.ops.offset_bound",
    "bias": "dat_ref.ops.bias",
    "attention": "dat_ref.ops.attention",
    "layer": "dat_ref.testing.ops.layer",
    "multi_scale": "dat_ref.peers.multi_scale",
    "deform_conv": "dat_ref.peers.deform_conv",
    "neighborhood": "dat_ref.testing.ops.neighborhood",
}
FOR_EACH_CONVENTION = {"reference_grid", "offset_bound", "bias", "attention", "layer"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", SPEC)
def test_the_spec(op, dtype):
    """The NumPy spec passes, under every convention where that matters, with its memory check."""
    reports = holds(SPEC[op], op, dtype=dtype)
    assert len(reports) == (len(Convention) if op in FOR_EACH_CONVENTION else 1)
    assert all(
        result.status == "pass" for report in reports for result in report.results if result.check.name == "memory"
    )


# ------------------------------------------------------------------------------------------------ torch, the operations


def bounded_offsets(raw, offset_range, convention):
    """Adapt `functional.bound_offsets` to the protocol."""
    reference = functional.reference_points(raw.shape[1:3], convention)
    options = {"offset_range": offset_range, "convention": convention}
    if convention.reference.gap and 1 in raw.shape[1:3]:
        raise NotImplementedError("a single key")
    return functional.bound_offsets(raw[:, None], reference, OffsetBound.TANH_CELLS, **options)[0][:, 0]


def reference_pixels(key_size, size, convention):
    """Adapt `functional.reference_points` to the protocol."""
    return functional.to_pixels(
        functional.reference_points(key_size, convention, dtype=torch.float64), size, convention
    )


def by_gather(x, points_px):
    return functional.bilinear_sample(x, points_px, sampler="gather")


def by_grid_sample(x, points_px):
    return functional.bilinear_sample(x, points_px, sampler="grid_sample")


# torch's grid_sample takes normalised coordinates, so rounding determines the side of a pixel for a point on it.
NOT_PROMISED = "gradient_on_the_lattice"

OPERATIONS = [
    ("sampler", by_gather, ""),
    ("sampler", by_grid_sample, NOT_PROMISED),
    ("bias", functional.table_bias, ""),
    ("bias", functional.sampled_table_bias, NOT_PROMISED),
    ("offset_bound", bounded_offsets, ""),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "function", "besides"), OPERATIONS)
def test_operations_in_torch(op, function, besides, dtype):
    """The functions of `dat_ref.torch.functional` pass."""
    holds(from_torch(function), op, dtype=dtype, besides=besides)


def test_reference_grid_in_torch():
    """The reference grid takes no arrays, so it has no dtype option and no gradient."""
    for report in check(from_torch(reference_pixels), ["reference_grid"], max_examples=FEW):
        assert report.passed, format_report(report)


# ------------------------------------------------------------------------------------------------ torch, the core


def attention_by(backend):
    """Return the core in one of its backends, adapted to the protocol."""

    def attention(q, k, v, points, bias_table, query_size, convention):
        return functional.deformable_attention(
            q, k, v, points, bias_table, query_size=query_size, convention=convention, backend=backend
        )

    return from_torch(attention)


# The query grids of the releases have a spacing different from one pixel, which kernels treat separately.
BACKENDS = [
    (backend, convention)
    for backend in ("eager", "matmul", "blockwise", "cpu")
    for convention in (Convention.CELL_CENTER, Convention.CVPR2022)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "convention"), BACKENDS)
def test_backends(backend, convention, dtype):
    """Every backend of the core passes."""
    if backend not in backends():
        pytest.skip(backends(missing=True)[backend])
    besides = NOT_PROMISED if backend == "eager" else ""
    holds(attention_by(backend), "attention", convention=convention, dtype=dtype, besides=besides)


INTERPRETED = """
from test_testing_ours import attention_by, holds
from dat_ref import Convention

holds(attention_by("triton"), "attention", convention=Convention["{}"], dtype="float32", max_examples=1)
print("passed")
"""


@pytest.mark.slow  # half a minute each
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("convention", ["CELL_CENTER", "CVPR2022"])
def test_triton_in_its_interpreter(convention):
    """The CUDA kernels pass in the interpreter on tiny cases; it must be selected before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(convention)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("passed\n"), run.stdout + run.stderr


# ------------------------------------------------------------------------------------------------ torch, the layer


def deformable_attention_layer(x, weights, options, convention):
    """Run the module with the weights of the protocol."""
    config = config_of(x, weights, options, convention)
    with torch.device("meta"):
        module = DeformableAttention(config)
    y, trace = functional_call(module, weights, (x,), {"return_trace": True})
    return y, trace.points


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", [Convention.CELL_CENTER, Convention.DATPP2023])
def test_the_layer_in_torch(convention, dtype):
    """`dat_ref.torch.DeformableAttention` passes, with gradients by autograd."""
    holds(from_torch(deformable_attention_layer), "layer", convention=convention, dtype=dtype)


# ------------------------------------------------------------------------------------------------ torch, the peers


def neighborhood_by(backend):
    """Return neighborhood attention in one of its backends, adapted to the protocol."""

    def attend_neighborhood(q, k, v, bias_table, query_size, kernel_size, dilation):
        rows = [each.transpose(1, 2).flatten(2).unflatten(1, query_size) for each in (q, k, v)]  # (N, H, W, C)
        options = {"scale": q.shape[3] ** -0.5, "dilation": dilation, "backend": backend}
        mixed, _ = functional.neighborhood_attention(torch.cat(rows, dim=3), bias_table, **options)
        return mixed.flatten(1, 2).unflatten(2, q.shape[1::2]).transpose(1, 2)

    return from_torch(attend_neighborhood)


PEERS = {
    "multi_scale": from_torch(functional.multi_scale_deformable_attention),
    "deform_conv": from_torch(functional.deform_conv2d),
    "neighborhood, eager": neighborhood_by("eager"),
    "neighborhood, cpu": neighborhood_by("cpu"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PEERS)
def test_the_peers_in_torch(name, dtype):
    """The functions of the peers' modules pass."""
    op, _, backend = name.partition(", ")
    if backend and backend not in backends():
        pytest.skip(backends(missing=True)[backend])
    holds(PEERS[name], op, dtype=dtype)


# ------------------------------------------------------------------------------------------------ as other people do

test_sampler_by_the_plugin = conformance_tests(from_torch(by_gather), ["sampler"], max_examples=FEW)
