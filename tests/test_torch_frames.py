"""Length of the way through the code: Python frames from a public function to the kernel."""

import sys
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import dat_ref  # noqa: E402
from dat_ref import Convention  # noqa: E402
from dat_ref.torch import functional, kernels  # noqa: E402
from dat_ref.torch.functional import attention, blockwise, neighborhood_tiles  # noqa: E402
from dat_ref.torch.functional.registry import kernel_module  # noqa: E402

ROOT = str(Path(dat_ref.__file__).parent)
MAX_FRAMES = 5
needs_numba = pytest.mark.skipif(bool(kernels.missing("cpu")), reason=kernels.missing("cpu"))
BACKENDS = ["blockwise", pytest.param("cpu", marks=needs_numba)]


def deformable(backend, gradients=False):
    shapes = ((1, 2, 12, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 1, 5, 2), (2, 5, 7))
    tensors = [torch.zeros(shape, requires_grad=gradients) for shape in shapes]
    options = {"query_size": (3, 4), "convention": Convention.PAPER, "backend": backend}
    return functional.deformable_attention(*tensors, **options)


def neighborhood(backend, gradients=False):
    tensors = [torch.zeros(shape, requires_grad=gradients) for shape in ((1, 3, 4, 24), (2, 3, 3))]
    return functional.neighborhood_attention(*tensors, scale=1.0, backend=backend)[0]


def frames(call, public, kernel):
    """Return the names of our functions on the stack when the kernel is entered, from the public function on."""
    found = []

    def record(frame, event, argument):
        if event == "call" and frame.f_code is kernel.__code__ and not found:
            while frame is not None:
                if frame.f_code.co_filename.startswith(ROOT):
                    found.append(frame.f_code.co_name)
                frame = frame.f_back

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(before)
    names = found[::-1]
    return names[names.index(public) :]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_few_frames_from_the_public_function_to_the_kernel(backend, gradients):
    """At most five, both ends included. Frames of PyTorch's dispatcher and of its autograd are not counted."""
    kernel = kernel_module("deformable", backend).deformable_forward
    names = frames(partial(deformable, backend, gradients), "deformable_attention", kernel)
    assert names[-1] == "deformable_forward"
    assert len(names) <= MAX_FRAMES, names
    kernel = kernel_module("neighborhood", backend).neighborhood_forward
    names = frames(partial(neighborhood, backend, gradients), "neighborhood_attention", kernel)
    assert names[-1] == "neighborhood_forward"
    assert len(names) <= MAX_FRAMES, names


@needs_numba
def test_inference_launches_machine_code_in_the_fifth_frame():
    from dat_ref.torch.kernels.cpu import launch

    deformable("cpu")  # compile
    names = frames(partial(deformable, "cpu"), "deformable_attention", launch.run)
    assert names[-1] == "run"
    assert len(names) <= MAX_FRAMES, names


def test_a_longer_way_is_seen(monkeypatch):
    """Two functions in between are too many."""
    operation, source = attention.DEFORMABLE, "def through(*tensors, **options):\n    return inner(*tensors, **options)"
    for _ in range(2):
        namespace = {"inner": operation}
        exec(compile(source, f"{ROOT}/detour.py", "exec"), namespace)
        operation = namespace["through"]
    monkeypatch.setattr(attention, "DEFORMABLE", operation)
    names = frames(partial(deformable, "blockwise", True), "deformable_attention", blockwise.deformable_forward)
    assert names.count("through") == 2
    assert len(names) > MAX_FRAMES


def test_the_kernel_is_entered():
    """Without the kernel there is nothing to count: the counter fails instead of passing."""
    with pytest.raises(ValueError, match="is not in list"):
        frames(partial(deformable, "matmul"), "deformable_attention", blockwise.deformable_forward)
    with pytest.raises(ValueError, match="is not in list"):
        frames(partial(neighborhood, "matmul"), "neighborhood_attention", neighborhood_tiles.neighborhood_forward)
