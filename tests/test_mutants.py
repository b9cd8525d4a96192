"""Wrong implementations against the checkers outside the kit: scipy, scalar loops, traces, agreement of arrays.

`test_testing_mutants` tests the kit's own checks; here its mutants are compared with an independent reference.
"""

from functools import cache

import numpy as np
import pytest
from helpers import checks
from helpers.agreement import assert_agree, assert_within_budget
from helpers.layers import run_oracle
from strategies import numbers

import dat_ref.layer
import dat_ref.ops.bias
from dat_ref import Convention
from dat_ref.layer import deformable_layer
from dat_ref.ops import bias as bias_ops
from dat_ref.ops.grid import to_pixels
from dat_ref.ops.sampling import bilinear_sample
from dat_ref.params import unflatten
from dat_ref.testing import Setting
from dat_ref.testing.ops import LAYER, SAMPLER
from dat_ref.testing.ops.layer_cases import config_of

CELL_CENTER = Setting(Convention.CELL_CENTER)

# ------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize("check", checks.SAMPLER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("mutant", [each for each in SAMPLER.mutants if each.forward], ids=lambda mutant: mutant.name)
def test_wrong_samplers_are_rejected(mutant, check):
    """Scipy and the loops reject every sampling mutant of the kit, on the examples of the kit."""
    cases = SAMPLER.check(mutant.check).cases(CELL_CENTER)
    assert any(rejects(check, mutant.forward(bilinear_sample), case) for case in cases)
    assert not any(rejects(check, bilinear_sample, case) for case in cases)


def rejects(check, sampler, case):
    """Return whether a check rejects a sampler on a case."""
    try:
        check(sampler, *case.arguments.values())
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("check", checks.SAMPLER_CHECKS, ids=lambda check: check.__name__)
def test_a_sampler_of_nan_is_rejected(check):
    """A sampler that returns NaN is rejected."""
    with pytest.raises(AssertionError):
        check(lambda x, points_px: np.nan * bilinear_sample(x, points_px))


# ------------------------------------------------------------------------------------------------ layers, by the loops

LARGE = "fine_positions"  # too many pixels for scalar loops


@cache
def by_the_loops(name):
    """Return the kit's examples of a check of the layer, each with the result of the scalar loops."""
    found = []
    for case in LAYER.check(name).cases(CELL_CENTER):
        x, weights, options = case.arguments.values()
        config = config_of(x, weights, options, CELL_CENTER.convention)
        found.append((case, run_oracle(x, unflatten(weights), config).output))
    return found


@pytest.mark.parametrize("mutant", [each for each in LAYER.mutants if each.forward], ids=lambda mutant: mutant.name)
def test_wrong_layers_differ_from_the_loops(mutant):
    """On the kit's examples its reference equals the scalar loops, and the mutant does not."""
    if mutant.check == LARGE:
        pytest.skip("too many pixels for scalar loops")
    wrong, differs = mutant.apply(LAYER.reference).forward, []
    for case, truth in by_the_loops(mutant.check):
        arguments = case.arguments.values()
        assert_agree(LAYER.reference.forward(*arguments, convention=CELL_CENTER.convention)[0], truth, 1e-11)
        differs.append(np.abs(wrong(*arguments, convention=CELL_CENTER.convention) - truth).max() > 1e-6)
    assert any(differs)


# --------------------------------------------------------------------------------------------- layers, by traces


def replace_in(monkeypatch, module, name, wrong):
    """Replace a function in the module that calls it; `wrong` gets the original as its first argument."""
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: wrong(real, *args, **kwargs))


def points_swapped(mp):
    """Mutant: points are passed to the sampler as (x, y)."""
    replace_in(mp, dat_ref.layer, "bilinear_sample", lambda real, x, p: real(x, p[..., ::-1]))


def half_a_pixel_off(mp):
    """Mutant: coordinates are converted with the other meaning of ±1, half a pixel off."""
    replace_in(mp, dat_ref.layer, "to_pixels", lambda real, *a: real(*a) + 0.5)


def half_a_row_off(mp):
    """Mutant: the same in y only."""
    replace_in(mp, dat_ref.layer, "to_pixels", lambda real, *a: real(*a) + np.array([0.5, 0.0]))


def h_for_h_minus_one(mp):
    """Mutant: coordinates span H pixels instead of H - 1, and the reverse."""

    def wrong(real, points, size, convention):
        extent = np.asarray(size) - convention.align_corners
        other = np.asarray(size) - (not convention.align_corners)
        return real(points, size, convention) * other / extent

    replace_in(mp, dat_ref.layer, "to_pixels", wrong)


def groups_in_wrong_order(mp):
    """Mutant: each group samples at the points of another group."""
    replace_in(mp, dat_ref.layer, "_sample_groups", lambda real, x, p: real(x, p[:, ::-1]))


def heads_in_wrong_order(mp):
    """Mutant: heads are assigned to groups alternately instead of in blocks."""

    def wrong(real, table, points, **options):
        heads, groups = len(table), points.shape[1]
        order = np.arange(heads).reshape(-1, groups).T.ravel()
        read = real(table[order], points, **options)
        back = np.empty_like(read)
        back[:, order] = read
        return back

    replace_in(mp, dat_ref.layer, "table_bias", wrong)


def bias_sign(mp):
    """Mutant: the displacement points from the key to the query."""
    replace_in(mp, dat_ref.layer, "table_bias", lambda real, table, *a, **o: real(table[:, ::-1, ::-1], *a, **o))


def bias_subtracted(mp):
    """Mutant: the bias is subtracted from the logits."""
    replace_in(
        mp, dat_ref.layer, "_logit_bias", lambda real, *a: (None if real(*a)[0] is None else -real(*a)[0], real(*a)[1])
    )


def bias_transposed(mp):
    """Mutant: queries and keys of the bias are exchanged (possible for equally many of both)."""
    replace_in(mp, dat_ref.layer, "table_bias", lambda real, *a, **o: real(*a, **o).swapaxes(2, 3))


def table_off_by_one(mp):
    """Mutant: the center of the table is entry H instead of H - 1."""
    replace_in(mp, bias_ops, "table_positions", lambda real, *a: real(*a) + 1)


def table_axes_swapped(mp):
    """Mutant: the table is read with x and y exchanged."""
    replace_in(mp, bias_ops, "table_positions", lambda real, *a: real(*a)[..., ::-1])


def wrong_query_grid(mp):
    """Mutant: displacements are measured from a corner-to-corner query grid instead of the convention's."""

    def wrong(real, size, convention):
        return real(size, dat_ref.Convention.PAPER if not convention.align_corners else dat_ref.Convention.CVPR2022)

    replace_in(mp, bias_ops, "query_points", wrong)


LOOPS, IDENTITY, GATHER = (
    checks.layer_matches_loops,
    checks.zero_offset_is_the_identity,
    checks.zero_offset_bias_is_a_gather,
)
GROUPS, BEFORE, TURNED = (
    checks.groups_are_independent,
    checks.attention_follows_bias,
    checks.layer_commutes_with_transposition,
)

WRONG_LAYERS = {
    points_swapped: [LOOPS, IDENTITY],
    half_a_pixel_off: [LOOPS, IDENTITY],
    half_a_row_off: [LOOPS, IDENTITY, TURNED],
    h_for_h_minus_one: [LOOPS, IDENTITY],
    groups_in_wrong_order: [LOOPS, GROUPS],
    heads_in_wrong_order: [LOOPS, GROUPS],
    bias_sign: [LOOPS, GATHER, BEFORE],
    bias_subtracted: [LOOPS, GATHER, BEFORE],
    bias_transposed: [LOOPS, GATHER, BEFORE],
    table_off_by_one: [LOOPS, GATHER],
    table_axes_swapped: [LOOPS, GATHER, BEFORE],
    wrong_query_grid: [LOOPS, GATHER],
}


@pytest.mark.parametrize("mutant", WRONG_LAYERS, ids=lambda mutant: mutant.__name__)
def test_wrong_layers_are_rejected(mutant, monkeypatch):
    """Each wrong layer fails every check that is listed for it."""
    mutant(monkeypatch)
    for check in WRONG_LAYERS[mutant]:
        with pytest.raises(AssertionError):
            check(deformable_layer)


def test_transposition_does_not_detect_a_swap(monkeypatch):
    """Counter-example: swapped coordinates commute with transposition, so that check alone is not enough."""
    points_swapped(monkeypatch)
    checks.layer_commutes_with_transposition(deformable_layer)


def test_square_maps_do_not_detect_h_for_w():
    """Counter-example: exchanging height and width is undetectable on a square map, and detected on a rectangle."""
    points = numbers(0, 1, 4, 2)
    for size, visible in (((5, 5), False), ((5, 3), True)):
        wrong = to_pixels(points, size[::-1], dat_ref.Convention.PAPER)
        assert (np.abs(wrong - to_pixels(points, size, dat_ref.Convention.PAPER)).max() > 1e-9) == visible


# ------------------------------------------------------------------------------------------------ agreement, budget


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: right * (1 + 1e-9),
        lambda right: right + np.where(np.arange(right.size) == 3, np.nan, 0).reshape(right.shape),
        lambda right: right[..., None],
        lambda right: right[:1],
        lambda right: right.T,
    ],
)
def test_agreement_rejects(wrong):
    """Errors of 1e-9, a NaN, a shape that would broadcast and a transposed result do not agree to 1e-12."""
    right = 1 + np.arange(12.0).reshape(3, 4)
    assert_agree(right, right)
    with pytest.raises(AssertionError):
        assert_agree(wrong(right), right)


def test_two_nans_do_not_agree():
    """NaN never passes, not even against NaN."""
    with pytest.raises(AssertionError):
        assert_agree(np.full(3, np.nan), np.full(3, np.nan))


def budget_example():
    """Return (result, truth, yardstick) for sums in float32, forwards and backwards."""
    terms = numbers(0, 50, 40, dtype=np.float32)
    forwards = np.cumsum(terms, axis=0, dtype=np.float32)[-1]
    backwards = np.cumsum(terms[::-1], axis=0, dtype=np.float32)[-1]
    return backwards, terms.sum(axis=0, dtype=np.float64), forwards


def test_budget_accepts_another_order_of_summation():
    """Two correct float32 results are within each other's budget."""
    result, truth, yardstick = budget_example()
    assert_within_budget(result, truth, yardstick)
    assert_within_budget(yardstick, truth, result)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda result: (result * np.float32(1.0001)).astype(np.float32),
        lambda result: np.where(np.arange(40) == 7, np.float32("nan"), result),
        lambda result: result + np.where(np.arange(40) == 7, np.float32(1e-4), np.float32(0)),
        lambda result: result.astype(np.float16).astype(np.float32),
        lambda result: result[::-1],
        lambda result: result.astype(np.float64),
        lambda result: result[:39],
    ],
)
def test_budget_rejects(wrong):
    """Rejected: errors of 1e-4, a NaN, one wrong element, internal half precision, wrong order, dtype, shape."""
    result, truth, yardstick = budget_example()
    with pytest.raises(AssertionError):
        assert_within_budget(wrong(result), truth, yardstick)


def test_budget_needs_a_truth_in_double_precision():
    """A truth in float32 or with a NaN is an error."""
    result, truth, yardstick = budget_example()
    with pytest.raises(AssertionError, match="truth has float32"):
        assert_within_budget(result, truth.astype(np.float32), yardstick)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(result, np.where(truth == truth[0], np.nan, truth), yardstick)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(result, truth, np.where(truth == truth[0], np.float32("nan"), yardstick))


def test_half_precision_inside_the_layer_is_over_the_budget():
    """A layer with points in float16 exceeds the error budget; the original layer does not."""
    pytest.importorskip("torch")
    from helpers.layers import random_params
    from helpers.torch_layers import torch_layer

    config = checks.example_config(dat_ref.Convention.CELL_CENTER, size=(7, 5))
    x = numbers(0, 1, 8, 7, 5, dtype=np.float32)
    params = random_params(dat_ref.layer.deformable_shapes(config), np.random.default_rng(1), np.float32)
    exact = dat_ref.params.map_tree(lambda leaf: leaf.astype(np.float64), params)
    truth, yardstick = deformable_layer(x.astype(np.float64), exact, config)[0], torch_layer(x, params, config).numpy()
    assert_within_budget(deformable_layer(x, params, config)[0], truth, yardstick)
    with pytest.MonkeyPatch.context() as mp:
        replace_in(mp, dat_ref.layer, "to_pixels", lambda real, *a: real(*a).astype(np.float16).astype(np.float32))
        coarse = deformable_layer(x, params, config)[0]
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(coarse, truth, yardstick)
