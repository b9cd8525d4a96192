"""Training in NumPy: loss and optimizer against torch, step by step, and a model that learns."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dat_ref
import dat_ref.torch
from dat_ref import train
from dat_ref._checks import ConfigError, ShapeError
from dat_ref.params import flatten, map_tree, unflatten

# ------------------------------------------------------------------------------------------------ the loss


@given(
    batch=st.integers(1, 5), classes=st.integers(1, 7), scale=st.sampled_from([0.1, 3.0, 1e4]), seed=st.integers(0, 99)
)
def test_cross_entropy_and_its_gradient_agree_with_torch(batch, classes, scale, seed):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((batch, classes))
    labels = rng.integers(0, classes, batch)
    tensor = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(tensor, torch.tensor(labels))
    (2.5 * expected).backward()
    np.testing.assert_allclose(train.cross_entropy(logits, labels), expected.item(), rtol=1e-12, atol=1e-12)
    grad = train.cross_entropy_vjp(2.5, logits, labels)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_cross_entropy_keeps_the_dtype():
    logits = np.zeros((2, 3), np.float32)
    assert train.cross_entropy(logits, np.array([0, 2])).dtype == np.float32
    assert train.cross_entropy_vjp(1.0, logits, np.array([0, 2])).dtype == np.float32


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros(3), np.array([0]), "logits: expected"),
        (np.zeros((2, 3)), np.array([0]), "labels: expected"),
        (np.zeros((0, 3)), np.array([], int), "B >= 1"),
        (np.zeros((2, 3)), np.array([0, 3]), r"\[0, 3\)"),
        (np.zeros((2, 3)), np.array([-1, 0]), r"\[0, 3\)"),
        (np.zeros((2, 3)), np.array([0.0, 1.0]), "integers"),
    ],
)
def test_cross_entropy_names_what_is_wrong(logits, labels, message):
    with pytest.raises(ShapeError, match=message):
        train.cross_entropy(logits, labels)


# ------------------------------------------------------------------------------------------------ the optimizer


def torch_adamw(leaves: dict[str, torch.Tensor], optimizer: train.AdamW) -> torch.optim.AdamW:
    """Return torch's optimizer with the same settings, with decay selected by `has_weight_decay`."""
    groups = [
        {
            "params": [leaf for name, leaf in leaves.items() if train.has_weight_decay(name, leaf) is decay],
            "weight_decay": rate,
        }
        for decay, rate in ((True, optimizer.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.epsilon)


@given(
    rates=st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=12),
    weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
    betas=st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)]),
    epsilon=st.sampled_from([1e-8, 1e-3]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_adamw_equals_torch_on_a_quadratic(rates, weight_decay, betas, epsilon, dtype, seed):
    """AdamW equals torch's on L = Σ c (θ - a)²/2, one step per drawn rate, up to rounding of fused multiply-adds."""
    rng = np.random.default_rng(seed)
    shapes = {"blocks.0.weight": (3, 5), "blocks.0.bias": (3,), "position_bias.table": (2, 3, 5)}
    drawn = {
        kind: {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        for kind in ("start", "curvature", "target")
    }
    leaves = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in drawn["start"].items()}
    params, curvature, target = (unflatten(drawn[kind]) for kind in ("start", "curvature", "target"))
    optimizer = train.AdamW(weight_decay, betas, epsilon)
    reference, state = torch_adamw(leaves, optimizer), optimizer.init(params)
    for rate in rates:
        grads = map_tree(lambda c, p, a: c * (p - a), curvature, params, target)
        for name, grad in flatten(grads).items():  # the same gradients, so that rounding errors do not accumulate
            leaves[name].grad = torch.tensor(grad)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        params, state = optimizer.step(params, grads, state, rate)
    assert state.steps == len(rates)
    budget = 8 * len(rates) * np.finfo(dtype).eps
    for name, leaf in flatten(params).items():
        assert leaf.dtype == dtype
        np.testing.assert_allclose(leaf, leaves[name].detach().numpy(), rtol=budget, atol=budget)


def test_adamw_leaves_its_arguments_alone():
    params, grads = {"weight": np.ones((2, 2))}, {"weight": np.full((2, 2), 3.0)}
    optimizer = train.AdamW()
    state = optimizer.init(params)
    optimizer.step(params, grads, state, 0.1)
    assert (params["weight"] == 1).all()
    assert (state.mean["weight"] == 0).all()


def test_only_weights_decay():
    params = dat_ref.init_params(train.digits_config(), seed=0)
    exempt = {
        name.rpartition(".")[2] for name, leaf in flatten(params).items() if not train.has_weight_decay(name, leaf)
    }
    decaying = {name for name, leaf in flatten(params).items() if train.has_weight_decay(name, leaf)}
    assert exempt == {"bias", "table", "weight"}  # one-dimensional weights belong to norms
    assert all(name.endswith(".weight") and "norm" not in name for name in decaying)
    assert "stages.1.blocks.0.attention.offset_network.pointwise.weight" in decaying


def test_rate_rises_then_falls():
    rates = [train.scheduled_rate(step, 50, 2.0, warmup_steps=10) for step in range(50)]
    assert rates[:10] == pytest.approx(np.linspace(0.2, 2.0, 10))
    assert (np.diff(rates[10:]) < 0).all()
    assert 0 < rates[-1] < 0.02


# ------------------------------------------------------------------------------------------------ the loop


@cache
def digits() -> train.Digits:
    pytest.importorskip("sklearn")
    return train.load_digits()


def fresh_model(seed: int = 0, dtype: type = np.float32) -> dat_ref.DAT:
    config = train.digits_config()
    return dat_ref.DAT(config, dat_ref.init_params(config, seed, dtype=dtype))


def test_digits_are_enlarged_and_split_once():
    data = digits()
    assert data.train_images.shape == (1347, 1, 32, 32)
    assert data.test_images.shape == (450, 1, 32, 32)
    assert data.train_images.dtype == np.float32
    assert data.train_images.min() == -1
    assert data.train_images.max() <= 1
    assert np.bincount(data.test_labels).min() >= 43
    assert all((ours == again).all() for ours, again in zip(data, train.load_digits(), strict=True))


def test_enlarging_agrees_with_torch():
    images = np.random.default_rng(0).standard_normal((2, 3, 5, 7))
    padded = torch.nn.functional.pad(torch.tensor(images), (1, 1, 1, 1))  # zero outside the image
    larger = torch.nn.functional.interpolate(padded, scale_factor=3, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(train.upsample(images, (15, 21)), larger[:, :, 3:-3, 3:-3], atol=1e-12)


def test_every_image_is_used_once_per_epoch_in_numpy():
    parts = list(train.batches(np.random.default_rng(3), 11, 4))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert sorted(np.concatenate(parts)) == list(range(11))


def test_the_loss_falls_on_one_batch():
    data = digits()
    images, labels = data.train_images[:16], data.train_labels[:16]
    steps = []
    model, history = train.fit(fresh_model(), images, labels, epochs=30, learning_rate=4e-3, on_step=steps.append)
    assert history.losses[0] == pytest.approx(np.log(10), abs=0.5)
    assert history.losses[-1] < 0.2 * history.losses[0]
    assert [step.loss for step in steps] == history.losses
    assert [step.learning_rate for step in steps] == history.learning_rates
    assert (steps[-1].epoch, steps[-1].step, steps[-1].steps) == (29, 29, 30)
    assert train.accuracy(model, images, labels) > 0.9


def test_one_seed_gives_one_run():
    data = digits()

    images, labels = data.train_images[:40], data.train_labels[:40]

    def run(seed):
        model, history = train.fit(fresh_model(), images, labels, epochs=2, batch_size=16, seed=seed)
        return flatten(model.params), history.losses

    (params, losses), (again, losses_again), (_, other) = run(0), run(0), run(1)
    assert losses == losses_again
    assert all((params[name] == again[name]).all() for name in params)
    assert losses != other


def test_training_keeps_float32_and_the_model_it_starts_from():
    data = digits()
    start = fresh_model()
    before = {name: leaf.copy() for name, leaf in flatten(start.params).items()}
    model, _ = train.fit(start, data.train_images[:8], data.train_labels[:8], epochs=2)
    assert {leaf.dtype for leaf in flatten(model.params).values()} == {np.dtype(np.float32)}
    assert all((before[name] == leaf).all() for name, leaf in flatten(start.params).items())


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"epochs": 1, "batch_size": 0}])
def test_fit_rejects_an_empty_run(wrong):
    with pytest.raises(ConfigError, match="expected at least one"):
        train.fit(fresh_model(), np.zeros((1, 1, 32, 32)), np.zeros(1, int), **wrong)


def test_the_key_bias_has_no_gradient():
    """The bias of the keys adds the same value to all logits of a query, which softmax ignores."""
    data = digits()
    _, grads = train.loss_and_gradient(fresh_model(dtype=np.float64), data.train_images[:4], data.train_labels[:4])
    of_keys = [np.abs(grad).max() for name, grad in flatten(grads).items() if name.endswith("key.bias")]
    of_values = [np.abs(grad).max() for name, grad in flatten(grads).items() if name.endswith("value.bias")]
    assert max(of_keys) < 1e-15
    assert min(of_values) > 1e-5


def test_offsets_learn():
    """Every parameter of every offset network gets a gradient, and points move from their initial positions."""
    data = digits()
    images, labels = data.train_images[:64], data.train_labels[:64]
    start = fresh_model()
    _, grads = train.loss_and_gradient(start, images, labels)
    networks = {name: grad for name, grad in flatten(grads).items() if "offset_network" in name}
    assert len(networks) == 4 * 5
    assert all(np.abs(grad).max() > 1e-7 for grad in networks.values())

    trained, _ = train.fit(start, images, labels, epochs=15, batch_size=32)
    for before, after in zip(start.walk(images[:8]), trained.walk(images[:8]), strict=True):
        displacement = np.abs(after.trace.attention.points_px - before.trace.attention.points_px)
        assert displacement.max() > 0.05  # pixels of the map
        reach = np.abs(after.trace.attention.points_px - after.trace.attention.reference_px)
        assert reach.max() <= before.trace.x.shape[2] / before.trace.attention.points.shape[2]  # one key cell


# ------------------------------------------------------------------------------------------------ the same run in torch


def train_in_torch(params, images, labels, indices, rates) -> list[float]:
    """Return the losses of the same steps in torch only: module, autograd and optimizer."""
    model = dat_ref.torch.DAT(train.digits_config()).to(getattr(torch, images.dtype.name)).train()
    model.load_numpy(params)
    reference = torch_adamw(dict(model.named_parameters()), train.AdamW())
    losses = []
    for batch, rate in zip(indices, rates, strict=True):
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(images[batch])), torch.tensor(labels[batch]))
        reference.zero_grad()
        loss.backward()
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_the_loss_curve_is_torchs(dtype, tolerance):
    """Twenty steps from the same weights agree; in float32 the steps amplify the different rounding of both runs."""
    data = digits()
    images, labels = data.train_images[:320].astype(dtype), data.train_labels[:320]
    start = fresh_model(dtype=dtype)
    _, history = train.fit(start, images, labels, epochs=2, batch_size=32, seed=5)
    rng = np.random.default_rng(5)
    indices = [batch for _ in range(2) for batch in train.batches(rng, len(images), 32)]
    losses = train_in_torch(start.params, images, labels, indices, history.learning_rates)
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(history.losses, losses, rtol=tolerance)


# ------------------------------------------------------------------------------------------------ digits


def test_a_few_epochs_already_read_most_digits():
    pytest.importorskip("sklearn")
    result = train.run_digits(epochs=3)
    assert result.test_accuracy > 0.85
    assert result.parameters == 112_374
    assert len(result.losses) == 3 * 22


@pytest.mark.slow
def test_digits_are_learned_from_scratch():
    pytest.importorskip("sklearn")
    result = train.run_digits()
    assert result.test_accuracy >= 0.96
    assert result.train_accuracy >= 0.99
