"""The Triton kernels against the NumPy spec, in Triton's interpreter or on a CUDA device.

Importing Triton fixes the choice, so `test_kernels_triton` runs this file in a separate process; because of its name
pytest does not collect it. To run it by hand:

    TRITON_INTERPRET=1 pytest tests/triton_kernels.py
"""

import contextlib
import os
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from helpers.tensors import lattice_points, rejects, seeds  # noqa: E402

from dat_ref import Convention  # noqa: E402
from dat_ref.ops.attention import attend, attend_vjp, deformable_attention, deformable_attention_vjp  # noqa: E402
from dat_ref.ops.basic import scatter_add  # noqa: E402
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp  # noqa: E402
from dat_ref.peers.neighborhood import neighbor_index, scatter_neighbors  # noqa: E402
from dat_ref.torch.functional.bias import table_index  # noqa: E402
from dat_ref.torch.functional.builtin_backends import TRITON  # noqa: E402
from dat_ref.torch.kernels import gpu, self_check  # noqa: E402
from dat_ref.torch.kernels.gpu import common, deformable, lookup, neighborhood, table_gradient, tile_config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
FEW = settings(max_examples=max(settings().max_examples // 3, 1))  # the interpreter needs half a second per case
NAMES = ("out", "q", "k", "v", "origin", "table")

# ------------------------------------------------------------------------------------------------ cases and truth


@dataclass
class Case:
    """Arguments of the kernels in canonical form, and a cotangent."""

    q: np.ndarray  # (B, heads, H·W, d)
    k: np.ndarray  # (B, heads, Ns, d)
    v: np.ndarray
    origin: np.ndarray  # (B, G, Ns, 2)
    table: np.ndarray  # (heads, T_y, T_x)
    cotangent: np.ndarray  # (B, heads, H·W, d)
    size: tuple[int, int]
    step: tuple[float, float]

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5

    @property
    def geometry(self):
        return {"query_size": self.size, "step": self.step, "scale": self.scale}


def draw_case(seed, size, samples, *, batch=1, heads=(1, 2), depth=5, table=None, step=(1.0, 1.0), origin=None):
    """Draw arguments; `heads` is (groups, heads per group). Keys read on, near and off the lattice, and outside."""
    rng = np.random.default_rng(seed)
    groups, each = heads
    table = table or (2 * size[0] - 1, 2 * size[1] - 1)
    if origin is None:
        # Query (0, 0) of a key inside the map reads the table's first half.
        origin = lattice_points(rng, (batch, groups, samples), ((table[0] + 1) // 2, (table[1] + 1) // 2))
        origin[:, :, samples // 2 :: 3] = origin[:, :, :1]  # some keys coincide
    q, k, v, cotangent = (
        rng.standard_normal((batch, groups * each, count, depth))
        for count in (size[0] * size[1], samples, samples, size[0] * size[1])
    )
    origin = np.broadcast_to(np.float32(origin), (batch, groups, samples, 2)).astype(np.float64)
    return Case(q, k, v, origin, rng.standard_normal((groups * each, *table)), cotangent, size, step)


def truth(case, dtype=np.float64):
    """Return the output and the five gradients, computed with functions of the spec."""
    q, k, v, origin, table, cotangent = (
        part.astype(dtype) for part in (case.q, case.k, case.v, case.origin, case.table, case.cotangent)
    )
    batch, groups, samples, _ = origin.shape
    query = np.stack(np.divmod(np.arange(q.shape[2]), case.size[1]), axis=-1)
    positions = origin[:, :, None] + (query * np.array(case.step)).astype(dtype)[:, None]  # (B, G, H·W, Ns, 2)
    positions = positions.swapaxes(0, 1).reshape(groups, -1, 2)
    grouped = table.reshape(groups, -1, *table.shape[1:])
    read = bilinear_sample(grouped, positions).reshape(len(table), batch, -1, samples)  # (heads, B, H·W, Ns)
    out, weights = attend(q, k, v, read.swapaxes(0, 1), case.scale)
    grads = attend_vjp(cotangent, q, k, v, weights, case.scale)
    of_read = grads.bias.swapaxes(0, 1).reshape(groups, len(table) // groups, -1)
    of_sample = bilinear_sample_vjp(of_read, grouped, positions)
    of_origin = of_sample.points_px.reshape(groups, batch, -1, samples, 2).sum(2).swapaxes(0, 1)
    return out, grads.q, grads.k, grads.v, of_origin, of_sample.x.reshape(table.shape)


def tensors(case, dtype=torch.float32):
    """Return q, k, v, origin and table on the device; origin is always float32."""
    q, k, v, table = (torch.from_numpy(part).to(DEVICE, dtype) for part in (case.q, case.k, case.v, case.table))
    return [q, k, v, torch.from_numpy(case.origin).to(DEVICE, torch.float32), table]


def run(case, *, deterministic, dtype=torch.float32):
    """Return the output and the five gradients of the kernels."""
    inputs = tensors(case, dtype)
    out, lse = gpu.deformable_forward(*inputs, **case.geometry)
    cotangent = torch.from_numpy(case.cotangent).to(DEVICE, dtype)
    grads = gpu.deformable_backward(cotangent, *inputs, out, lse, **case.geometry, deterministic=deterministic)
    return [part.double().cpu().numpy() for part in (out, *grads)]


def assert_agrees(case, **options):
    """Compare everything with the spec in float64; the yardstick is the spec in float32."""
    assert_all_within_budget(run(case, **options), truth(case, np.float32), truth(case))


def assert_all_within_budget(actual, yardsticks, truths, factor=8.0):
    """Raise unless each error is within a factor of the yardstick's.

    For a query with a single key all gradients except that of v cancel: sums of about fifty elements of order one.
    """
    for number, (ours, yardstick, theirs) in enumerate(zip(actual, yardsticks, truths, strict=True)):
        assert ours.shape == theirs.shape, number
        largest = float(np.abs(theirs).max())
        rounding = 2.0**-22 * (largest if largest > 1e-12 else 7 * 4)
        allowed = factor * max(float(np.abs(yardstick - theirs).max()), rounding)
        error = float(np.abs(ours - theirs).max())
        assert error <= allowed, f"{number}: error {error:.1e}, allowed {allowed:.1e}"  # NaN is not <= anything


def assert_agrees_narrowly(case, dtype, tolerance, **options):
    """Compare with the spec on the rounded inputs; errors are relative to the largest element."""
    for name in ("q", "k", "v", "table", "cotangent"):
        setattr(case, name, torch.from_numpy(getattr(case, name)).to(dtype).double().numpy())
    actual = run(case, dtype=dtype, **options)
    for name, ours, theirs in zip(NAMES, actual, truth(case), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Use tiles of 16 × 16, so that tiny cases have several tiles, full and partial ones."""
    for module in (tile_config, deformable, neighborhood):
        monkeypatch.setattr(module, "default_config", lambda *arguments: tile_config.TileConfig(16, 16))


@contextlib.contextmanager
def poisoned_memory():
    """Fill results of `torch.empty` with NaN, or with an invalid integer."""

    def poisoned(function):
        def empty(*arguments, **options):
            fresh = function(*arguments, **options)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else 2**30 + 1)

        return empty

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        yield


# ------------------------------------------------------------------------------------------------ deformable attention


@FEW
@given(
    seed=seeds,
    size=st.sampled_from([(3, 5), (5, 4), (1, 7), (6, 1), (2, 9)]),
    samples=st.integers(1, 19),
    heads=st.sampled_from([(1, 2), (2, 1), (3, 1), (2, 2)]),
    depth=st.sampled_from([3, 16, 5, 17]),
    step=st.sampled_from(["unit", "released", (0.45, 1.7), (1.0, 0.3), (2.0, 0.5)]),
    deterministic=st.booleans(),
)
@example(0, (3, 5), 19, (1, 2), 3, "unit", True)
@example(0, (3, 5), 19, (1, 2), 3, "released", True)
@example(0, (3, 5), 19, (1, 2), 3, (0.45, 1.7), False)
def test_agrees_with_the_spec(seed, size, samples, heads, depth, step, deterministic):
    """Output and gradients agree for several query spacings, with memory that initially contains NaN."""
    if step == "unit":
        step = (1.0, 1.0)
    elif step == "released":
        step = (max(size[0] - 1, 1) / size[0], max(size[1] - 1, 1) / size[1])
    case = draw_case(seed, size, samples, heads=heads, depth=depth, step=step)
    with poisoned_memory():
        assert_agrees(case, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("convention", list(Convention))
def test_agrees_in_every_convention(convention, deterministic):
    """Results from points through `table_index` agree, also for a table that was built for another map."""
    rng = np.random.default_rng(7)
    size, samples, groups, heads, depth = (4, 5), 6, 2, 4, 3
    for table_size in [(7, 9), (3, 13)][: 1 + deterministic]:
        points = rng.uniform(-1.4, 1.4, (2, groups, samples, 2))
        case = draw_case(8, size, samples, batch=2, heads=(groups, heads // groups), depth=depth, table=table_size)
        geometry = {"query_size": size, "convention": convention}
        expected = deformable_attention(case.q, case.k, case.v, points, case.table, **geometry)
        grads = deformable_attention_vjp(case.cotangent, case.q, case.k, case.v, points, case.table, **geometry)
        leaf = torch.from_numpy(points).requires_grad_()
        lookup = table_index(leaf, table_size, size, convention)
        case.origin, case.step = lookup.origin.detach().numpy(), lookup.step
        out, grad_q, grad_k, grad_v, grad_origin, grad_table = run(case, deterministic=deterministic)
        (grad_points,) = torch.autograd.grad(lookup.origin, leaf, torch.from_numpy(grad_origin))
        ours = (out, grad_q, grad_k, grad_v, grad_points.numpy(), grad_table)
        for name, one, other in zip(NAMES, ours, (expected, *grads), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * max(1, np.abs(other).max()), err_msg=name)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("step", [(1.0, 1.0), (0.8, 6 / 7)])
def test_many_tiles(step, deterministic):
    """35 queries and 37 keys in tiles of 16 have full and partial tiles."""
    assert_agrees(draw_case(3, (5, 7), 37, step=step), deterministic=deterministic)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("step", [(1.0, 1.0), (0.8, 6 / 7)])
def test_runs_of_keys(step, monkeypatch):
    """The workspace fits one tile of keys, and the gradient of a table of several tiles is summed in parts."""
    monkeypatch.setattr(table_gradient, "_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(table_gradient, "_ROWS", 4)
    monkeypatch.setattr(table_gradient, "_COLUMNS", 8)
    case = draw_case(4, (3, 5), 37, heads=(1, 1), batch=2, step=step)
    with poisoned_memory():
        assert_agrees(case, deterministic=True)


def test_half_precision_keeps_what_the_points_need():
    """For float16 values, coefficients are in half precision; geometry, softmax and sums are in float32."""
    case = draw_case(5, (4, 7), 21, heads=(1, 2))
    case.table += 20  # differences of neighbors are small compared with the entries, and must stay accurate
    assert_agrees_narrowly(case, torch.float16, 4e-3, deterministic=True)


@pytest.mark.parametrize("deterministic", [True, False])
def test_far_keys_read_nothing(deterministic):
    """A key outside the table for all queries has zero bias and gradient, near, far or at infinity."""
    size = (3, 4)
    far = np.array([[-5.0, 1], [0.5, 9], [1e9, 2], [1, -1e9], [np.inf, 0.5], [-np.inf, 1], [2, np.inf], [1.5, 2]])
    case = draw_case(6, size, len(far), origin=far)
    assert_agrees(case, deterministic=deterministic)
    assert np.all(run(case, deterministic=deterministic)[4][:, :, :-1] == 0)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("where", [(np.nan, 1.0), (1.0, np.nan), (np.nan, 1e9), (np.nan, np.inf)])
def test_nan_comes_out_as_nan(where, deterministic):
    """A key that reads the table at NaN makes the output of its map NaN, and no other."""
    case = draw_case(9, (3, 4), 5, batch=2)
    case.origin[1, 0, 3] = where
    with np.errstate(invalid="ignore"):
        actual, expected = run(case, deterministic=deterministic), truth(case)
    for name, ours, theirs in zip(NAMES[:-1], actual, expected, strict=False):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=name)
        assert np.isnan(ours[1]).any()
    assert np.isnan(actual[-1]).any()


def test_no_maps():
    """For batch 0 nothing is launched, and the gradients have the right shapes."""
    case = draw_case(1, (3, 4), 5, batch=0)
    out, *grads = run(case, deterministic=True)
    assert out.shape == (0, 2, 12, 5)
    assert [grad.shape for grad in grads[:4]] == [(0, 2, 12, 5), (0, 2, 5, 5), (0, 2, 5, 5), (0, 1, 5, 2)]
    assert np.array_equal(grads[4], np.zeros((2, 5, 7)))


def test_any_strides():
    """Strides of linear layers and expanded cotangents are accepted; results have the strides of the inputs."""
    case = draw_case(2, (3, 4), 5, batch=2)
    inputs = tensors(case)
    plain, lse = gpu.deformable_forward(*inputs, **case.geometry)
    cotangent = torch.full((), 0.5, device=DEVICE).expand(plain.shape)
    expected = gpu.deformable_backward(cotangent, *inputs, plain, lse, **case.geometry, deterministic=True)
    strided = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in inputs[:3]]
    strided[1] = torch.cat((strided[1], strided[1]), -1)[..., : strided[1].shape[-1]]  # larger row stride
    strided[2] = strided[2].mT.contiguous().mT  # channel stride not 1
    out, lse = gpu.deformable_forward(*strided, *inputs[3:], **case.geometry)
    assert out.stride() == strided[0].stride()
    assert torch.equal(out, plain)
    grads = gpu.deformable_backward(cotangent, *strided, *inputs[3:], out, lse, **case.geometry, deterministic=True)
    for ours, theirs, argument in zip(grads, expected, (*strided, *inputs[3:]), strict=True):
        assert ours.stride() == torch.empty_like(argument).stride()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    strided[0] = strided[2][:, :, :1].expand(strided[0].shape).mT.contiguous().mT
    out, lse = gpu.deformable_forward(*strided, *inputs[3:], **case.geometry)
    assert out.stride() == strided[0].stride()
    grads = gpu.deformable_backward(cotangent, *strided, *inputs[3:], out, lse, **case.geometry, deterministic=True)
    assert grads[0].stride() == strided[0].stride()


def test_invalid_arguments_are_rejected():
    """Rejected: unsupported dtypes, mixed dtypes, and heads too deep for a tile."""
    case = draw_case(1, (2, 3), 4)
    with pytest.raises(TypeError, match="float64"):
        run(case, deterministic=True, dtype=torch.float64)
    q, k, *others = tensors(case)
    with pytest.raises(TypeError, match="for all three"):
        gpu.deformable_forward(q, k.half(), *others, **case.geometry)
    with pytest.raises(ValueError, match=r"d <= 64 in torch\.float32"):
        run(draw_case(1, (2, 3), 4, depth=65), deterministic=True)


@pytest.mark.parametrize("name", ["step", "size", "table", "origin", "scale"])
def test_the_check_rejects_a_wrong_kernel(name, monkeypatch):
    """The comparison rejects a wrong step, map, table, position and scale."""
    case = draw_case(2, (3, 5), 7)
    right = gpu.deformable_forward

    def wrong(q, k, v, origin, table, *, query_size, step, scale):
        if name == "step":
            step = (step[0] * 1.001, step[1])
        elif name == "size":
            query_size = query_size[::-1]
        elif name == "table":
            table = table.flip(0)
        elif name == "origin":
            origin = origin.flip(-1)
        else:
            scale *= 1.001
        return right(q, k, v, origin, table, query_size=query_size, step=step, scale=scale)

    monkeypatch.setattr(gpu, "deformable_forward", wrong)
    assert rejects(lambda: assert_agrees(case, deterministic=True))


# ------------------------------------------------------------------------------------------------ tuning


def test_the_fastest_tiles_are_autotuned_once(monkeypatch):
    """Autotuning runs only with cudnn.benchmark, on a CUDA device, without deterministic algorithms."""

    class Elsewhere:
        device, dtype, shape, is_cuda = torch.device("cuda", 0), torch.bfloat16, (2, 3, 196, 32), True

    measured = []

    def milliseconds(launch, tried):
        measured.append(tried)
        return -tried.block_m * tried.num_warps

    monkeypatch.setattr(tile_config, "_AUTOTUNED", {})
    monkeypatch.setattr(tile_config, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    usual = tile_config.default_config("grad_queries", Elsewhere)
    search = ("grad_queries", Elsewhere, 196, True, None)
    assert tile_config.autotune(*search) == usual
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert tile_config.autotune(*search) == tile_config.TileConfig(128, 32, 8)
    assert tile_config.autotune(*search) == tile_config.TileConfig(128, 32, 8)
    assert measured == [usual, tile_config.TileConfig(128, 32), tile_config.TileConfig(128, 32, 8)]
    # Timing would end the capture of a CUDA graph.
    monkeypatch.setattr(tile_config, "_AUTOTUNED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tile_config.autotune(*search) == usual
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tile_config.autotune(*search) == tile_config.TileConfig(128, 32, 8)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert tile_config.autotune(*search) == usual


def test_tiles_follow_the_generation_of_the_device(monkeypatch):
    """Devices before 9.0 have other tiles where those of newer ones would spill registers."""
    q = torch.zeros(1, 1, 4, 128, dtype=torch.bfloat16)
    assert tile_config.default_config("forward", q) == tile_config.TileConfig(32, 32)
    monkeypatch.setattr(tile_config, "has_wgmma", lambda q: True)
    assert tile_config.default_config("forward", q) == tile_config.TileConfig(64, 32)


# ------------------------------------------------------------------------------------------------ device


class Recorder:
    """Stand-in for a kernel that records its launches, and whether the device guard was active."""

    def __init__(self, kernel, guards, launches):
        self.kernel, self.guards, self.launches = kernel, guards, launches

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.launches.append((self.kernel.__name__, list(self.guards)))
            return self.kernel[grid](*arguments, **named)

        return launch


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_launch_is_on_the_device_of_the_tensors(deterministic, monkeypatch):
    """Triton launches on the current device: forward and backward of both attentions make it the tensors' device."""
    guards, launches = [], []

    @contextlib.contextmanager
    def guard(tensor):
        guards.append(tensor.device)
        yield
        guards.pop()

    monkeypatch.setattr(common, "device_guard", guard)
    for module in (lookup, deformable, table_gradient, neighborhood):
        for name in ("_fill_cells", "_locate_keys", "_forward", "_grad_queries", "_collect", "_grad_keys"):
            if name in vars(module):
                monkeypatch.setattr(module, name, Recorder(getattr(module, name), guards, launches))
    case = draw_case(1, (3, 4), 5)
    device = tensors(case)[0].device
    run(case, deterministic=deterministic)
    collected = {"_collect"} if deterministic else set()
    kernels = {"_fill_cells", "_locate_keys", "_forward", "_grad_queries", "_grad_keys"} | collected
    assert {name for name, _ in launches} == kernels
    *inputs, cotangent = (torch.from_numpy(part).float().to(DEVICE) for part in draw_neighborhood(0, (3, 4), 3))
    geometry = {"size": (3, 4), "kernel": 3, "dilation": 1, "scale": 1.0}
    out, lse = neighborhood.neighborhood_forward(*inputs, **geometry)
    neighborhood.neighborhood_backward(cotangent, *inputs, out, lse, **geometry)
    assert [name for name, _ in launches[-3:]] == ["_forward", "_grad_queries", "_grad_keys"]
    assert all(active == [device] for _, active in launches)


def test_the_device_guard_is_that_of_torch():
    """The guard selects the tensor's device, and none for a CPU tensor."""

    class Elsewhere:
        is_cuda = True

        def get_device(self):
            return 3

    assert common.device_guard(Elsewhere()).idx == 3
    with common.device_guard(torch.zeros(1)) as nothing:
        assert nothing is None


# ------------------------------------------------------------------------------------------------ self-check


@pytest.fixture
def no_verdict(monkeypatch):
    """Forget the self-checks of this process."""
    monkeypatch.setattr(self_check, "_FAILURES", {})


CHECKED = list(TRITON.values())


@pytest.mark.usefixtures("no_verdict")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("checked", CHECKED, ids=lambda checked: checked.name)
def test_the_kernels_pass_their_self_check(checked, dtype, monkeypatch):
    """The errors are within the budget, with room: a fourth of it is enough here."""
    monkeypatch.setattr(self_check, "BUDGET", {each: limit / 4 for each, limit in self_check.BUDGET.items()})
    device = tensors(draw_case(0, (1, 1), 1))[0].device
    assert self_check.failure(checked, device, getattr(torch, dtype)) == ""


@pytest.mark.usefixtures("no_verdict")
def test_the_self_check_covers_the_deterministic_kernels():
    """Under deterministic algorithms the self-check runs the kernels of that mode."""
    torch.use_deterministic_algorithms(True)
    try:
        assert self_check.failure(CHECKED[0], tensors(draw_case(0, (1, 1), 1))[0].device, torch.float32) == ""
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("no_verdict")
def test_the_self_check_finds_a_wrong_launch(monkeypatch):
    """A kernel that reads a table of a neighboring row fails the self-check."""
    right = deformable.prepare_lookup

    def wrong(origin, *arguments, **options):
        return right(origin + 1, *arguments, **options)

    monkeypatch.setattr(deformable, "prepare_lookup", wrong)
    found = self_check.failure(CHECKED[0], tensors(draw_case(0, (1, 1), 1))[0].device, torch.float32)
    assert "the output wrong by" in found


# ------------------------------------------------------------------------------------------------ neighborhood


def draw_neighborhood(seed, size, kernel, batch=1, heads=1, depth=5):
    """Draw q, k, v, the table and a cotangent."""
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal((batch, heads, size[0] * size[1], depth)) for _ in range(4)]
    return *values[:3], rng.standard_normal((heads, 2 * kernel - 1, 2 * kernel - 1)), values[3]


def neighborhood_truth(q, k, v, table, cotangent, size, kernel, dilation):
    """Return the output and the four gradients, computed by gathering the keys of every query."""
    heads, scale = len(table), q.shape[-1] ** -0.5
    neighbors, places = neighbor_index(size, kernel, dilation)
    gathered = q[:, :, :, None], k[:, :, neighbors], v[:, :, neighbors]
    out, weights = attend(*gathered, table.reshape(heads, -1)[:, places][:, :, None], scale)
    grads = attend_vjp(cotangent[:, :, :, None], *gathered, weights, scale)
    of_table = scatter_add(grads.bias.sum(0).reshape(heads, -1).T, places.ravel(), table[0].size).T
    of_keys = (scatter_neighbors(grad, neighbors) for grad in (grads.k, grads.v))
    return out[:, :, :, 0], grads.q[:, :, :, 0], *of_keys, of_table.reshape(table.shape)


def assert_neighborhood_agrees(seed, size, kernel, dilation, dtype=torch.float32, factor=8.0, **options):
    """Compare output and gradients with the truth in float64; the yardstick is the same in float32."""
    arrays = draw_neighborhood(seed, size, kernel, **options)
    geometry = {"size": size, "kernel": kernel, "dilation": dilation, "scale": arrays[0].shape[-1] ** -0.5}
    *inputs, cotangent = (torch.from_numpy(part).to(DEVICE, dtype) for part in arrays)
    out, lse = gpu.neighborhood_forward(*inputs, **geometry)
    grads = gpu.neighborhood_backward(cotangent, *inputs, out, lse, **geometry, deterministic=True)
    expected = neighborhood_truth(*arrays, size, kernel, dilation)
    yardsticks = neighborhood_truth(*(np.float32(part) for part in arrays), size, kernel, dilation)
    actual = [part.double().cpu().numpy() for part in (out, *grads)]
    assert_all_within_budget(actual, yardsticks, expected, factor)


@FEW
@given(
    seed=seeds,
    size=st.sampled_from([(5, 9), (9, 4), (1, 7), (6, 1), (2, 3), (10, 3)]),
    kernel=st.sampled_from([3, 5, 1, 7]),
    dilation=st.sampled_from([1, 2, 3]),
    depth=st.sampled_from([3, 17]),
)
@example(0, (9, 5), 3, 1, 5)
@example(0, (7, 12), 5, 2, 5)
def test_neighborhood_agrees_with_the_spec(seed, size, kernel, dilation, depth):
    """Results agree for maps larger and smaller than the neighborhood, dilation, and memory that contains NaN."""
    with poisoned_memory():
        assert_neighborhood_agrees(seed, size, kernel, dilation, depth=depth)


@pytest.mark.usefixtures("small_tiles")
def test_neighborhood_in_small_tiles():
    """Results agree for tiles of 4 × 4 over two maps."""
    assert_neighborhood_agrees(1, (5, 7), 3, 1, batch=2, heads=2)


def test_no_neighborhood():
    """Batch 0 gives empty results."""
    *inputs, cotangent = (torch.from_numpy(part).float() for part in draw_neighborhood(0, (3, 4), 3, batch=0))
    geometry = {"size": (3, 4), "kernel": 3, "dilation": 1, "scale": 1.0}
    out, lse = gpu.neighborhood_forward(*inputs, **geometry)
    grads = gpu.neighborhood_backward(cotangent, *inputs, out, lse, **geometry)
    assert (out.shape, lse.shape) == ((0, 1, 12, 5), (0, 1, 12))
    assert torch.equal(grads[3], torch.zeros(1, 5, 5))


def test_neighborhood_rejects_large_windows():
    """A neighborhood whose table is larger than a tile is rejected."""
    *inputs, _ = (torch.from_numpy(part).float() for part in draw_neighborhood(0, (3, 4), 33))
    with pytest.raises(ValueError, match="at most 32, got 33"):
        gpu.neighborhood_forward(*inputs, size=(3, 4), kernel=33, dilation=1, scale=1.0)


def test_the_check_rejects_a_wrong_neighborhood(monkeypatch):
    """The comparison rejects a table that is read in reverse."""
    right = gpu.neighborhood_forward

    def wrong(q, k, v, table, **geometry):
        return right(q, k, v, table.mT, **geometry)

    monkeypatch.setattr(gpu, "neighborhood_forward", wrong)
    assert rejects(lambda: assert_neighborhood_agrees(0, (4, 6), 3, 1))


# ------------------------------------------------------------------------------------------------ on a device


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("step", [(1.0, 1.0), (0.95, 0.96)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 4e-3), ("float32", 2e-5)])
def test_tensor_cores_are_within_the_budget(dtype, tolerance, step, deterministic):
    """For many tiles and heads of 32 and 64, errors relative to the largest element are within the dtype's rounding."""
    for depth in (32, 64):
        case = draw_case(11, (20, 25), 333, batch=2, heads=(2, 2), depth=depth, step=step)
        assert_agrees_narrowly(case, getattr(torch, dtype), tolerance, deterministic=deterministic)


@pytest.mark.gpu
def test_deterministic_gradients_repeat():
    """Deterministic gradients are equal bit for bit in two runs."""
    case = draw_case(12, (20, 25), 333, batch=2, heads=(2, 2), depth=32)
    first, second = (run(case, deterministic=True, dtype=torch.bfloat16) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 2.0**18), ("float16", 2.0**15), ("float32", 32.0)])
def test_neighborhood_on_tensor_cores(dtype, factor):
    """The budget is the float32 budget times the ratio of the machine epsilons."""
    assert_neighborhood_agrees(13, (30, 41), 7, 1, dtype=getattr(torch, dtype), factor=factor, batch=2, depth=32)
    assert_neighborhood_agrees(14, (30, 41), 5, 3, dtype=getattr(torch, dtype), factor=factor, batch=2, depth=32)
