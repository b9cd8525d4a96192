"""Training in NumPy: loss, optimizer, training loop, and a small DAT that learns to read digits from scratch.

    L(θ) = -1/B Σ_b log softmax(model(x_b; θ))[label_b]           `cross_entropy`
    θ ← AdamW(θ, ∂L/∂θ)                                           `AdamW`, the gradient by `DAT.vjp`

All functions are pure: a step takes a model and returns a new one, and one seed determines a whole run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ._checks import Array, ConfigError, ShapeError, Tree, check_array
from ._deprecation import deprecated_names
from .backbone import DAT
from .config import BlockConfig, DATConfig, DeformableAttentionConfig, OffsetBound
from .conventions import Convention
from .initialization import init_params
from .ops.basic import softmax
from .ops.grid import reference_points, to_pixels
from .ops.sampling import bilinear_sample
from .params import count, flatten, map_tree, unflatten

__getattr__ = deprecated_names(__name__, {"decays": "has_weight_decay", "enlarge": "upsample"})

# ------------------------------------------------------------------------------------------------ the loss


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Return the batch mean of -log softmax(logits)[label], a scalar of the logits' dtype.

    Args:
        logits: (B, classes), B >= 1.
        labels: (B,), integers in [0, classes).

    Raises:
        ShapeError: if the shapes do not match, or a label is not a class index.

    >>> float(cross_entropy(np.zeros((2, 4)), np.array([0, 3])))  # log 4
    1.3862943611198906
    """
    labels = _check_labels(logits, labels)
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp() cannot overflow
    log_total = np.log(np.exp(shifted).sum(axis=1))
    return (log_total - shifted[np.arange(len(labels)), labels]).mean()


def cross_entropy_vjp(cotangent: float, logits: Array, labels: Array) -> Array:
    """∂L/∂logits = (softmax(logits) - onehot(label)) / B, (B, classes)."""
    labels = _check_labels(logits, labels)
    grad = softmax(logits)
    grad[np.arange(len(labels)), labels] -= 1
    return grad * (cotangent / len(labels))


def _check_labels(logits: Array, labels: Array) -> Array:
    check_array("logits", logits, {"B": None, "classes": None})
    labels, classes = np.asarray(labels), logits.shape[1]
    if len(logits) == 0 or labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"labels: expected (B,) with B >= 1, one for each row of logits {logits.shape}, got {labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ShapeError(f"labels: expected integers in [0, {classes}), got {labels.dtype} with {labels!r}")
    return labels


# ------------------------------------------------------------------------------------------------ the optimizer


def has_weight_decay(name: str, leaf: Array) -> bool:
    """Return True for weights; False for biases, norms, layer scales and bias tables, which have no weight decay."""
    return leaf.ndim > 1 and not name.endswith(".table")


class AdamWState(NamedTuple):
    """State of `AdamW`: running means of the gradient and of its square."""

    steps: int
    mean: Tree
    square: Tree


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay. With g the gradient, t the number of the step from 1, elementwise:

        θ ← θ (1 - η λ)                            only if `has_weight_decay`
        m ← m + (1 - β₁)(g - m)
        v ← β₂ v + (1 - β₂) g²
        θ ← θ - η/(1 - β₁ᵗ) · m / (√v/√(1 - β₂ᵗ) + ε)

    The operations have the order of ``torch.optim.AdamW``, so that rounding errors agree.

    Args:
        weight_decay: λ ≥ 0.
        betas: β₁ and β₂, in [0, 1).
        epsilon: ε > 0.
    """

    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def init(self, params: Tree) -> AdamWState:
        """Return the state before the first step."""
        return AdamWState(0, map_tree(np.zeros_like, params), map_tree(np.zeros_like, params))

    def step(self, params: Tree, grads: Tree, state: AdamWState, learning_rate: float) -> tuple[Tree, AdamWState]:
        """Return new parameters and the new state; the arguments are not modified.

        Args:
            params, grads: trees of the same structure.
            state: state from `init` or from the step before.
            learning_rate: η of this step.
        """
        beta1, beta2 = self.betas
        steps = state.steps + 1
        mean = map_tree(lambda m, g: m + (1 - beta1) * (g - m), state.mean, grads)
        square = map_tree(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.square, grads)
        step_size, root = learning_rate / (1 - beta1**steps), (1 - beta2**steps) ** 0.5
        decay = 1 - learning_rate * self.weight_decay
        means, squares = flatten(mean), flatten(square)
        updated = {}
        for name, leaf in flatten(params).items():
            decayed = leaf * decay if has_weight_decay(name, leaf) else leaf
            updated[name] = decayed - step_size * means[name] / (np.sqrt(squares[name]) / root + self.epsilon)
        return unflatten(updated), AdamWState(steps, mean, square)


def scheduled_rate(step: int, steps: int, peak: float, warmup_steps: int, min_rate: float = 0.0) -> float:
    """Return the learning rate of step 0 … steps-1: linear warmup to `peak`, then cosine decay to `min_rate`.

    >>> [round(scheduled_rate(step, 6, 1.0, 2), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return min_rate + (peak - min_rate) * 0.5 * (
        1 + float(np.cos(np.pi * (step - warmup_steps) / (steps - warmup_steps)))
    )


# ------------------------------------------------------------------------------------------------ the loop


def loss_and_gradient(model: DAT, images: Array, labels: Array) -> tuple[float, Tree]:
    """Return the mean cross-entropy of a batch and its gradient, a tree with the structure of the parameters."""
    logits, pullback = model.vjp(images)
    _, grads = pullback(cross_entropy_vjp(1.0, logits, labels))
    return float(cross_entropy(logits, labels)), grads


def batches(rng: np.random.Generator, count: int, batch_size: int) -> Iterator[Array]:
    """Yield the indices of one epoch's batches: every image once, in random order; the last batch may be smaller."""
    order = rng.permutation(count)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


class Step(NamedTuple):
    """Training step, the argument of `on_step` of `fit`."""

    epoch: int
    step: int  # from 0, over all epochs
    steps: int  # total number of steps
    loss: float  # loss of the batch before the update
    learning_rate: float


@dataclass
class History:
    """Record of `fit`, one entry per step."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)


def fit(
    model: DAT,
    images: Array,
    labels: Array,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    optimizer: AdamW | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[DAT, History]:
    """Train a model; return the trained model and the losses of all steps.

    The learning rate rises linearly over the first epoch, then falls to zero along a cosine. Runs with the same seed on
    the same machine are equal bit for bit.

    Args:
        model: initial model; it is not modified.
        images: (N, channels, H, W), in the dtype of the training.
        labels: (N,), integers.
        epochs: number of epochs.
        batch_size: images per step.
        learning_rate: peak learning rate.
        seed: random seed of the order of the images.
        optimizer: optimizer; None: ``AdamW()``.
        on_step: called after every step.

    Raises:
        ConfigError: if there are no images, epochs or images per batch.
    """
    if len(images) == 0 or epochs < 1 or batch_size < 1:
        raise ConfigError(
            f"epochs, batch_size, images: expected at least one of each, got {epochs}, {batch_size}, {len(images)}"
        )
    rng, optimizer = np.random.default_rng(seed), optimizer or AdamW()
    state, history = optimizer.init(model.params), History()
    steps_per_epoch = -(-len(images) // batch_size)
    for epoch in range(epochs):
        for indices in batches(rng, len(images), batch_size):
            rate = scheduled_rate(state.steps, epochs * steps_per_epoch, learning_rate, warmup_steps=steps_per_epoch)
            loss, grads = loss_and_gradient(model, images[indices], labels[indices])
            params, state = optimizer.step(model.params, grads, state, rate)
            model = DAT(model.config, params)
            history.losses.append(loss)
            history.learning_rates.append(rate)
            if on_step:
                on_step(Step(epoch, state.steps - 1, epochs * steps_per_epoch, loss, rate))
    return model, history


def accuracy(model: DAT, images: Array, labels: Array, *, batch_size: int = 128) -> float:
    """Return the share of images whose largest logit belongs to their label."""
    parts = range(0, len(images), batch_size)
    predictions = [model(images[start : start + batch_size]).argmax(axis=1) for start in parts]
    return float((np.concatenate(predictions) == labels).mean())


# ------------------------------------------------------------------------------------------------ digits


class Digits(NamedTuple):
    """Scikit-learn's handwritten digits, upsampled and split."""

    train_images: Array  # (1347, 1, 32, 32), float32 in [-1, 1]
    train_labels: Array  # (1347,)
    test_images: Array  # (450, 1, 32, 32)
    test_labels: Array


def load_digits() -> Digits:
    """Return the 1797 digits of scikit-learn, upsampled from 8×8 to 32×32 pixels; a quarter of each class is held out.

    The split is the same in every run. Needs scikit-learn.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images = upsample(digits.images[:, None].astype(np.float32), (32, 32)) / 8 - 1  # from 0 … 16
    train, test = train_test_split(np.arange(len(images)), test_size=0.25, random_state=0, stratify=digits.target)
    return Digits(images[train], digits.target[train], images[test], digits.target[test])


def upsample(images: Array, size: tuple[int, int]) -> Array:
    """Resize images bilinearly, (B, C, H, W) → (B, C, *size), by sampling at the centers of the new cells."""
    config = DeformableAttentionConfig(dim=1, heads=1, size=size)
    centers = to_pixels(
        reference_points(size, config.convention).astype(images.dtype), images.shape[2:], config.convention
    )
    points = np.broadcast_to(centers.reshape(1, -1, 2), (len(images), size[0] * size[1], 2))
    return bilinear_sample(images, points).reshape(*images.shape[:2], *size)


def digits_config() -> DATConfig:
    """Return a small DAT for 32×32 gray digits: two stages (8×8 and 4×4 pixels) of two deformable blocks each.

    Every point stays within one key cell of its reference point on each axis.
    """
    first = DeformableAttentionConfig(
        dim=32,
        heads=2,
        groups=1,
        stride=2,
        kernel_size=5,
        offset_bound=OffsetBound.TANH_CELLS,
        offset_range=2.0,
        size=(8, 8),
        convention=Convention.CELL_CENTER,
    )
    second = replace(first, dim=64, heads=4, groups=2, stride=1, kernel_size=3, size=(4, 4))
    return DATConfig(
        stages=tuple((BlockConfig(attention, mlp_ratio=2),) * 2 for attention in (first, second)),
        patch_embedding="conv",
        image_size=(32, 32),
        in_channels=1,
        num_classes=10,
    )


@dataclass(frozen=True)
class DigitsResult:
    """Model trained on digits, with its accuracies."""

    model: DAT
    losses: list[float]
    train_accuracy: float
    test_accuracy: float
    parameters: int
    seconds: float  # training time, without loading and testing


def run_digits(epochs: int = 12, seed: int = 0, progress: Callable[[Step], None] | None = None) -> DigitsResult:
    """Train `digits_config` from scratch: with the defaults, about 97 % accuracy on held-out digits in half a minute.

    Needs scikit-learn for the data. Runs on one core: the matrices are too small for several threads, and threads that
    wait for each other are many times slower if other programs use the machine.

    Args:
        epochs: number of epochs.
        seed: random seed of the initialization and of the order of the images.
        progress: called after every step.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    data = load_digits()
    model = DAT(digits_config(), init_params(digits_config(), seed))
    start = time.perf_counter()
    with threadpool_limits(1):
        model, history = fit(model, data.train_images, data.train_labels, epochs=epochs, seed=seed, on_step=progress)
    seconds = time.perf_counter() - start
    return DigitsResult(
        model=model,
        losses=history.losses,
        train_accuracy=accuracy(model, data.train_images, data.train_labels),
        test_accuracy=accuracy(model, data.test_images, data.test_labels),
        parameters=count(model.params),
        seconds=seconds,
    )
