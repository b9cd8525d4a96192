"""Training: the loss decreases, states can be saved, activation checkpointing is exact, points stay in float32."""

import io
from contextlib import nullcontext
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from helpers.backbones import RELEASES, tiny  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import dat_ref.torch as dt  # noqa: E402
from dat_ref.torch.functional import _dtypes  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ steps


def losses_of(model, images, labels, steps):
    """Train on one batch; return the loss before each step and after the last one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, cross_entropy(model(images), labels).item()]


@pytest.mark.parametrize(
    ("name", "side", "batch"),
    [("dat_tiny", 64, 4), ("dat_pp_tiny", 64, 4), ("dat_tiny", 224, 2)],
)
def test_a_few_steps_lower_the_loss(name, side, batch):
    model = dt.create_model(name, num_classes=10, drop_path_rate=0.0).train()
    losses = losses_of(model, torch.randn(batch, 3, side, side), torch.arange(batch), 4)
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("release", RELEASES)
def test_every_parameter_gets_a_gradient(release):
    model = dt.DAT(tiny(release)).double().train()
    cross_entropy(model(torch.randn(2, 3, 67, 98, dtype=torch.float64)), torch.tensor([0, 1])).backward()
    for name, leaf in model.named_parameters():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        # The gradient of the keys' bias is zero: it shifts all logits of a query equally.
        assert name.endswith("key.bias") or leaf.grad.abs().max() > 0, name


@pytest.mark.parametrize("release", RELEASES)
def test_recomputing_gives_the_same_gradients(release):
    """Recomputed activations give the same gradients, also with stochastic depth and dropout."""
    config = replace(tiny(release, drop_path_rate=0.5), dropout=0.1)
    model, x = dt.DAT(config).train(), torch.randn(2, 3, 64, 96)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        found.append({name: leaf.grad.clone() for name, leaf in model.named_parameters() if leaf.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


# ------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
def test_a_saved_state_gives_bit_equal_outputs(name):
    model, x = dt.create_model(name, num_classes=10).eval(), torch.randn(2, 3, 64, 96)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = dt.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), model(x))


# ------------------------------------------------------------------------------------------------ half precision

# Largest error of a point, in pixels of its stage's map, as stated in docs/torch.md for an image of 224².
POINT_ERROR = {
    ("dat_tiny", torch.bfloat16): 0.02,
    ("dat_tiny", torch.float16): 0.002,
    ("dat_pp_tiny", torch.bfloat16): 0.3,
    ("dat_pp_tiny", torch.float16): 0.04,
}


def points_of(model, x):
    """Return logits, the points of every deformable block in pixels, and the narrowest dtype of their geometry."""
    with torch.no_grad():
        logits, trace = model(x, return_trace=True)
    traces = [block.attention for stage in trace.stages for block in stage.blocks]
    traces = [each for each in traces if hasattr(each, "points_px")]
    geometry = [part for each in traces for part in (each.raw_offsets, each.offsets, each.points, each.points_px)]
    narrowest = min((part.dtype for part in geometry), key=lambda dtype: dtype.itemsize)
    return logits, [each.points_px for each in traces], narrowest


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
def test_points_under_autocast(name):
    """Geometry is computed in float32; the remaining error comes from the queries, which determine the offsets."""
    model = dt.create_model(name, num_classes=10).eval()
    x = torch.randn(1, 3, 224, 224)
    exact, truth, _ = points_of(model, x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            logits, points, narrowest = points_of(model, x)
        assert logits.dtype == dtype
        assert narrowest is torch.float32
        error = max(float((ours - theirs).abs().max()) for ours, theirs in zip(points, truth, strict=True))
        assert 0 < error <= POINT_ERROR[name, dtype], error
        assert (logits - exact).abs().max() <= 0.05 * exact.abs().max()


def test_narrow_geometry_is_detected(monkeypatch):
    monkeypatch.setattr(_dtypes, "autocast_disabled", lambda tensor: nullcontext())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, narrowest = points_of(dt.DAT(tiny("cvpr2022")).eval(), torch.randn(1, 3, 67, 98))
    assert narrowest is torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", "blockwise", "matmul", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("release", RELEASES)
def test_a_step_under_autocast_is_finite(release, dtype, backend):
    model = dt.DAT(tiny(release), backend=backend).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = cross_entropy(model(torch.randn(2, 3, 67, 98)), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    for name, leaf in model.named_parameters():
        assert leaf.dtype is torch.float32
        assert leaf.grad is None or leaf.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("release", RELEASES)
def test_a_model_of_half_precision_keeps_its_points_in_float32(release, dtype):
    model, x = dt.DAT(tiny(release)).eval(), torch.randn(2, 3, 67, 98)
    logits, points, narrowest = points_of(model.to(dtype), x.to(dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert narrowest is torch.float32
    assert all(each.isfinite().all() for each in points)
