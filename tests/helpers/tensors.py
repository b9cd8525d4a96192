"""Shared by the torch tests: arrays drawn by seed, tensors of them, and measures of agreement."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from dat_ref import Convention
from dat_ref.params import flatten

AGREEMENT = 1e-9

seeds = st.integers(0, 2**32 - 1)
conventions = st.sampled_from(list(Convention))
resolutions = st.sampled_from(["fractions", "pixels"])


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a copy as a tensor that requires gradients."""
    return torch.from_numpy(np.array(array)).to(dtype).requires_grad_()


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = AGREEMENT, what: str = "") -> None:
    """Raise unless every element agrees, relative to the largest expected one; NaN agrees with nothing.

    An expected array below 0.01 counts as 0.01: it is a sum of terms that cancel, such as the gradient of a layer norm
    over one channel.
    """
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().double().numpy()
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if expected.size:
        assert np.isfinite(actual).all(), f"{what}: not finite"
        scale = max(float(np.abs(expected).max()), 1e-2)
        error = float(np.abs(actual - expected).max())
        assert error <= tolerance * scale, f"{what}: error {error:.2e} at scale {scale:.2e}"


def assert_trees_close(actual: Any, expected: Any, tolerance: float = AGREEMENT) -> None:
    """Apply `assert_close` to every leaf of two parameter trees with the same names."""
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        assert_close(actual[name], leaf, tolerance, name)


def assert_within_budget(actual: Any, yardstick: Any, truth: np.ndarray, factor: float = 8.0) -> None:
    """Raise unless the error against a float64 truth is within a factor of a yardstick of the same precision."""
    actual, yardstick = (
        part.detach().double().numpy() if isinstance(part, torch.Tensor) else np.asarray(part, np.float64)
        for part in (actual, yardstick)
    )
    assert np.isfinite(actual).all()
    floor = 2.0**-22 * max(float(np.abs(truth).max()), 1e-3)
    allowed = factor * max(float(np.abs(yardstick - truth).max()), floor)
    assert float(np.abs(actual - truth).max()) <= allowed


def pull_back(output: torch.Tensor, cotangent: np.ndarray, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return autograd's gradients; zeros for an input that the output does not depend on."""
    grads = torch.autograd.grad(output, list(inputs), torch.from_numpy(cotangent).to(output.dtype), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, inputs, strict=True)]


def lattice_points(rng: np.random.Generator, shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Return points (*shape, 2) in pixels: on the lattice, near it, between, and outside the map."""
    length = np.asarray(size)
    between = rng.uniform(-1.6, length + 0.6, (*shape, 2))
    near = np.round(between) + rng.choice([-1e-5, 1e-5], (*shape, 2))
    far = rng.choice([-50.0, 50.0], (*shape, 2))
    kind = rng.choice(4, size=(*shape, 1), p=[0.3, 0.2, 0.45, 0.05])
    return np.select([kind == 0, kind == 1, kind == 2], [np.round(between), near, between], far)


def rejects(check: Callable[[], None]) -> bool:
    """Return whether a check fails, as it must for a wrong implementation."""
    try:
        check()
    except AssertionError:
        return True
    return False
