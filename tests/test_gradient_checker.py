"""Gradient checker: it rejects every wrong gradient."""

import numpy as np
import pytest
from helpers.gradients import WrongGradient, check_vjp
from helpers.layer_gradients import check_layer, layer_example, off_lattice, rng_of, sample_vjp
from helpers.layers import kink_distance, random_params
from strategies import numbers

import dat_ref.layer
from dat_ref import BiasKind, Convention, DeformableAttentionConfig, OffsetBound
from dat_ref.layer import deformable_layer, deformable_layer_vjp, deformable_shapes
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.params import flatten, unflatten
from dat_ref.testing.ops import SAMPLER


def wrong_sample_vjps():
    """Return wrong gradients of sampling by name: those of the kit except on the lattice, and more."""

    def corner_outside_counted(g, x, points_px):  # as if the map were padded with its border pixels
        inside = np.clip(points_px, 0, np.asarray(x.shape[2:]) - 1.0)
        edge = bilinear_sample_vjp(g, np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge"), points_px + 1)
        return {"x": sample_vjp(g, x, inside)["x"], "points_px": edge.points_px}

    def one_corner_forgotten(g, x, points_px):
        grads = sample_vjp(g, x, points_px)
        return {**grads, "x": grads["x"] * (np.arange(x.shape[3]) < x.shape[3] - 1)}

    def missing(g, x, points_px):
        return {"x": sample_vjp(g, x, points_px)["x"]}

    def not_a_number(g, x, points_px):
        grads = sample_vjp(g, x, points_px)
        return {**grads, "x": grads["x"] * np.nan}

    mutants = [mutant for mutant in SAMPLER.mutants if mutant.vjp and mutant.check != "gradient_on_the_lattice"]
    wrong = [corner_outside_counted, one_corner_forgotten, missing, not_a_number]
    return {
        **{mutant.name: mutant.vjp(sample_vjp) for mutant in mutants},
        **{function.__name__: function for function in wrong},
    }


@pytest.mark.parametrize("name", wrong_sample_vjps())
@pytest.mark.parametrize("seed", range(3))
def test_checker_rejects_wrong_sampling_gradients(name, seed):
    """Rejected: × 1.001, y and x swapped, a border counted or dropped, an input forgotten, NaN."""
    points = off_lattice(seed, (2, 6, 2), -0.9, 4.9)
    points[:, 0], points[:, 1] = (-0.4, 1.3), (2.2, 3.6)  # one above the map, one to its right
    inputs = {"x": numbers(seed, 2, 3, 5, 4), "points_px": points}
    check_vjp(bilinear_sample, sample_vjp, inputs, rng_of(seed))
    with pytest.raises(WrongGradient):
        check_vjp(bilinear_sample, wrong_sample_vjps()[name], inputs, rng_of(seed))


WRONG_LAYERS = {
    "× 1.001": lambda real: lambda *args: (1.001 * real(*args)[0], real(*args)[1]),
    "parameters × 1.001": lambda real: (
        lambda *args: (
            real(*args)[0],
            unflatten({name: 1.001 * leaf for name, leaf in flatten(real(*args)[1]).items()}),
        )
    ),
}


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_checker_rejects_scaled_layer_gradients(name):
    """A layer gradient with a relative error of 0.001 is rejected."""
    case = layer_example()
    check_layer(case)
    with pytest.raises(WrongGradient):
        check_layer(case, vjp=WRONG_LAYERS[name](deformable_layer_vjp))


def forget_bias(module, monkeypatch):
    real = module._logit_bias_vjp

    def without_points(*args):
        grad_points, grads = real(*args)
        return np.zeros_like(grad_points), grads

    monkeypatch.setattr(module, "_logit_bias_vjp", without_points)


def swap_points(module, monkeypatch):
    real = module._sampling_vjp
    monkeypatch.setattr(module, "_sampling_vjp", lambda *a: (real(*a)[0], real(*a)[1][..., ::-1]))


def forget_sampling(module, monkeypatch):
    real = module._sampling_vjp
    monkeypatch.setattr(module, "_sampling_vjp", lambda *a: (real(*a)[0], 0 * real(*a)[1]))


def forget_pixel_scale(module, monkeypatch):
    monkeypatch.setattr(module, "to_pixels_vjp", lambda g, *_: g)


def forget_tanh(module, monkeypatch):
    monkeypatch.setattr(module, "bound_offsets_vjp", lambda g, *_, **__: g)


MISTAKES = [forget_bias, swap_points, forget_sampling, forget_pixel_scale, forget_tanh]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_checker_rejects_forgotten_paths(mistake, monkeypatch):
    """Rejected: a forgotten path through the bias or the samples, swapped points, a lost scale or slope."""
    case = layer_example()
    mistake(dat_ref.layer, monkeypatch)
    with pytest.raises(WrongGradient, match=r"offset_network|query|x:"):
        check_layer(case)


def test_checker_rejects_a_wrong_shape():
    """A gradient that would only broadcast to its input is rejected."""
    inputs = {"x": numbers(0, 2, 3), "weight": numbers(1, 3)}
    with pytest.raises(WrongGradient, match=r"weight: expected shape \(3,\), got \(1, 3\)"):
        check_vjp(
            lambda x, weight: x * weight,
            lambda g, x, weight: {"x": g * weight, "weight": (g * x).sum(axis=0, keepdims=True)},
            inputs,
            rng_of(0),
        )


def test_kink_distance_sees_the_lattice_and_the_clamp():
    """The kink distance is zero for points on the lattice or at the clamp's edge, and positive elsewhere."""
    config = DeformableAttentionConfig(4, 2, kernel_size=3, size=(3, 5), offset_bound=OffsetBound.CLAMP)
    params = random_params(deformable_shapes(config), np.random.default_rng(0))
    params["offset_network"]["pointwise"]["weight"][:] = 0
    _, trace = deformable_layer(numbers(0, 1, 4, 3, 5), params, config)
    assert kink_distance(trace, config, (5, 9)) < 1e-14
    held = DeformableAttentionConfig(
        4, 2, kernel_size=3, bias=BiasKind.NONE, offset_bound=OffsetBound.CLAMP, convention=Convention.DATPP2023,
        stride=3,
    )  # fmt: skip
    params = {name: leaf for name, leaf in params.items() if name != "position_bias"}
    _, trace = deformable_layer(numbers(0, 1, 4, 3, 3), params, held)
    assert kink_distance(trace, held) == np.inf
    case = layer_example()
    _, trace = deformable_layer(case.x(), case.params(), case.config)
    assert kink_distance(trace, case.config, (9, 5)) > 1e-4
