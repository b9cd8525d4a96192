"""Wrong implementations, each of which a named check must reject; and the checkers of numbers, shown wrong ones."""

import numpy as np
import pytest
from helpers import checks
from helpers.agreement import assert_agree, assert_within_budget
from strategies import numbers

import dat_ref.layer
import dat_ref.ops.bias
from dat_ref.layer import deformable_layer
from dat_ref.ops import bias as bias_ops
from dat_ref.ops.grid import to_pixels
from dat_ref.ops.sampling import bilinear_sample

# ------------------------------------------------------------------------------------------------ samplers


def inside(x, points_px):
    """Return whether each point lies on the map, (N, 1, P)."""
    return ((points_px >= 0) & (points_px <= np.asarray(x.shape[2:]) - 1)).all(axis=-1)[:, None]


def clamped(x, points_px):
    return bilinear_sample(x, np.clip(points_px, 0, np.asarray(x.shape[2:]) - 1.0))


MAPS = checks.sampling_is_map_coordinates
LOOPS = checks.sampling_is_the_loops
WEIGHTS = checks.sampling_has_unit_weights
BORDER = checks.sampling_fades_at_the_border

WRONG_SAMPLERS = {
    "x and y swapped": (lambda x, p: bilinear_sample(x, p[..., ::-1]), [MAPS, LOOPS, WEIGHTS, BORDER]),
    "half a pixel off": (lambda x, p: bilinear_sample(x, p + 0.5), [MAPS, LOOPS, WEIGHTS, BORDER]),
    "H for H - 1": (
        lambda x, p: bilinear_sample(x, p * np.asarray(x.shape[2:]) / (np.asarray(x.shape[2:]) - 1)),
        [MAPS, LOOPS, WEIGHTS, BORDER],
    ),
    "nearest instead of linear": (lambda x, p: bilinear_sample(x, np.round(p)), [MAPS, LOOPS, BORDER]),
    "border dropped": (lambda x, p: bilinear_sample(x, p) * inside(x, p), [MAPS, LOOPS, BORDER]),
    "border repeated": (clamped, [MAPS, LOOPS, BORDER]),
    "last row lost": (
        lambda x, p: bilinear_sample(np.where(np.arange(x.shape[2])[:, None] < x.shape[2] - 1, x, 0), p),
        [MAPS, LOOPS, WEIGHTS, BORDER],
    ),
    "map transposed": (
        lambda x, p: bilinear_sample(x.swapaxes(2, 3).reshape(x.shape), p),
        [MAPS, LOOPS],
    ),
    "NaN": (lambda x, p: bilinear_sample(x, p) * np.nan, [MAPS, LOOPS, WEIGHTS, BORDER]),
    "channels reversed": (lambda x, p: bilinear_sample(x[:, ::-1], p), [MAPS, LOOPS]),
}


@pytest.mark.parametrize("name", WRONG_SAMPLERS)
def test_wrong_samplers_are_rejected(name):
    """Each wrong sampler fails every check that is meant to see it."""
    sampler, must_reject = WRONG_SAMPLERS[name]
    for check in must_reject:
        with pytest.raises(AssertionError):
            check(sampler)


# ------------------------------------------------------------------------------------------------ layers


def replace_in(monkeypatch, module, name, wrong):
    """Replace a function in the module that calls it; `wrong` gets the real one first."""
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: wrong(real, *args, **kwargs))


def offsets_swapped(mp):
    """The network's two channels are taken for (x, y)."""
    replace_in(mp, dat_ref.layer, "_raw_offsets", lambda real, *a: (real(*a)[0][..., ::-1], real(*a)[1]))


def points_swapped(mp):
    """Points are handed to the sampler as (x, y)."""
    replace_in(mp, dat_ref.layer, "bilinear_sample", lambda real, x, p: real(x, p[..., ::-1]))


def half_a_pixel_off(mp):
    """Coordinates are converted with the other meaning of ±1, half a pixel off."""
    replace_in(mp, dat_ref.layer, "to_pixels", lambda real, *a: real(*a) + 0.5)


def h_for_h_minus_one(mp):
    """Coordinates span H pixels where they should span H - 1, and the reverse."""

    def wrong(real, points, size, convention):
        extent = np.asarray(size) - convention.align_corners
        other = np.asarray(size) - (not convention.align_corners)
        return real(points, size, convention) * other / extent

    replace_in(mp, dat_ref.layer, "to_pixels", wrong)


def scale_missing(mp):
    """The logits are not divided by √d."""
    replace_in(mp, dat_ref.layer, "attend", lambda real, q, k, v, bias, scale: real(q, k, v, bias, 1.0))


def groups_in_wrong_order(mp):
    """Each group samples at another group's points."""
    replace_in(mp, dat_ref.layer, "_sample_groups", lambda real, x, p: real(x, p[:, ::-1]))


def heads_in_wrong_order(mp):
    """Heads are dealt to the groups in turn, instead of in blocks."""

    def wrong(real, table, points, **options):
        heads, groups = len(table), points.shape[1]
        order = np.arange(heads).reshape(-1, groups).T.ravel()
        read = real(table[order], points, **options)
        back = np.empty_like(read)
        back[:, order] = read
        return back

    replace_in(mp, dat_ref.layer, "table_bias", wrong)


def border_dropped(mp):
    """Points between the last pixel and the outside read nothing."""
    replace_in(mp, dat_ref.layer, "bilinear_sample", lambda real, x, p: real(x, p) * inside(x, p))


def border_repeated(mp):
    """Points outside read the border's pixels."""
    replace_in(mp, dat_ref.layer, "bilinear_sample", lambda real, x, p: clamped(x, p))


def bias_sign(mp):
    """The displacement is taken from the key to the query."""
    replace_in(mp, dat_ref.layer, "table_bias", lambda real, table, *a, **o: real(table[:, ::-1, ::-1], *a, **o))


def bias_subtracted(mp):
    """The bias is subtracted from the logits."""
    replace_in(
        mp, dat_ref.layer, "_logit_bias", lambda real, *a: (None if real(*a)[0] is None else -real(*a)[0], real(*a)[1])
    )


def bias_transposed(mp):
    """Queries and keys of the bias are exchanged (which a square key grid permits)."""
    replace_in(mp, dat_ref.layer, "table_bias", lambda real, *a, **o: real(*a, **o).swapaxes(2, 3))


def table_off_by_one(mp):
    """The table's middle is taken for entry H, not H - 1."""
    replace_in(mp, bias_ops, "table_positions", lambda real, *a: real(*a) + 1)


def table_axes_swapped(mp):
    """The table is read with x for y."""
    replace_in(mp, bias_ops, "table_positions", lambda real, *a: real(*a)[..., ::-1])


def wrong_query_grid(mp):
    """Displacements are measured from the corners instead of the convention's own queries."""

    def wrong(real, size, convention):
        return real(size, dat_ref.Convention.PAPER if not convention.align_corners else dat_ref.Convention.CVPR2022)

    replace_in(mp, bias_ops, "query_points", wrong)


def tanh_forgotten(mp):
    """Offsets are scaled, not bounded."""

    def wrong(real, raw, reference, bound, **options):
        if bound is not dat_ref.OffsetBound.TANH_PIXELS:
            return real(raw, reference, bound, **options)
        return real(np.arctanh(np.clip(raw, -0.99, 0.99)), reference, bound, **options)

    replace_in(mp, dat_ref.layer, "bound_offsets", wrong)


ORACLE, IDENTITY, GATHER = (
    checks.layer_is_the_loops,
    checks.zero_offset_is_the_identity,
    checks.zero_offset_bias_is_a_gather,
)
FLIPS, GROUPS, BEFORE = (
    checks.layer_commutes_with_flips,
    checks.groups_keep_to_themselves,
    checks.bias_rewards_what_lies_before,
)

WRONG_LAYERS = {
    offsets_swapped: [ORACLE, FLIPS],
    points_swapped: [ORACLE, IDENTITY],
    half_a_pixel_off: [ORACLE, IDENTITY, FLIPS],
    h_for_h_minus_one: [ORACLE, IDENTITY],
    scale_missing: [ORACLE],
    groups_in_wrong_order: [ORACLE, GROUPS],
    heads_in_wrong_order: [ORACLE, GROUPS],
    border_dropped: [ORACLE],
    border_repeated: [ORACLE],
    bias_sign: [ORACLE, GATHER, BEFORE],
    bias_subtracted: [ORACLE, GATHER, BEFORE],
    bias_transposed: [ORACLE, GATHER, BEFORE],
    table_off_by_one: [ORACLE, GATHER, FLIPS],
    table_axes_swapped: [ORACLE, GATHER, BEFORE],
    wrong_query_grid: [ORACLE, GATHER],
    tanh_forgotten: [ORACLE],
}


@pytest.mark.parametrize("mutant", WRONG_LAYERS, ids=lambda mutant: mutant.__name__)
def test_wrong_layers_are_rejected(mutant, monkeypatch):
    """Each wrong layer fails every check that is meant to see it."""
    mutant(monkeypatch)
    for check in WRONG_LAYERS[mutant]:
        with pytest.raises(AssertionError):
            check(deformable_layer)


def test_transposition_cannot_see_a_swap(monkeypatch):
    """Why the checks are many: swapped coordinates commute with transposing everything, so that check is blind."""
    offsets_swapped(monkeypatch)
    checks.layer_commutes_with_transposition(deformable_layer)


def test_square_maps_cannot_see_h_for_w():
    """Why maps are never square here: the height for the width is invisible on a square, and plain on a rectangle."""
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
    """A billionth, a NaN, a shape that would broadcast, a transposed result: none of them agree to 1e-12."""
    right = 1 + np.arange(12.0).reshape(3, 4)
    assert_agree(right, right)
    with pytest.raises(AssertionError):
        assert_agree(wrong(right), right)


def test_agreement_of_two_nans_is_none():
    """NaN never passes, not even against NaN."""
    with pytest.raises(AssertionError):
        assert_agree(np.full(3, np.nan), np.full(3, np.nan))


def budget_example():
    """Return (result, truth, yardstick): a sum in float32, forwards and backwards."""
    terms = numbers(0, 50, 40, dtype=np.float32)
    forwards = np.cumsum(terms, axis=0, dtype=np.float32)[-1]
    backwards = np.cumsum(terms[::-1], axis=0, dtype=np.float32)[-1]
    return backwards, terms.sum(axis=0, dtype=np.float64), forwards


def test_budget_accepts_another_order_of_summation():
    """Two honest float32 results are within each other's budget."""
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
    """A ten-thousandth too much, one NaN, one element off, half precision inside, the wrong order, dtype or shape."""
    result, truth, yardstick = budget_example()
    with pytest.raises(AssertionError):
        assert_within_budget(wrong(result), truth, yardstick)


def test_budget_needs_a_truth_in_double_precision():
    """A truth in float32 or with a NaN is no truth."""
    result, truth, yardstick = budget_example()
    with pytest.raises(AssertionError, match="truth in float32"):
        assert_within_budget(result, truth.astype(np.float32), yardstick)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(result, np.where(truth == truth[0], np.nan, truth), yardstick)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(result, truth, np.where(truth == truth[0], np.float32("nan"), yardstick))


def test_half_precision_inside_the_layer_is_over_the_budget():
    """A layer that keeps its points in float16 is rejected by the budget that the layer itself passes."""
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
