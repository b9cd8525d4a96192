"""Cost: counts of a run equal the closed forms as integers."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.costs import EXACT, PEERS, any_case, count_case, peer_cases, saved_bytes
from helpers.layers import random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, layer_cases, neighborhood_cases, window_cases

import dat_ref
from dat_ref import (
    DAT,
    BiasKind,
    BlockConfig,
    ConfigError,
    DATConfig,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
    params,
)
from dat_ref.backbone import dat_macs, dat_shapes
from dat_ref.block import ATTENTIONS, block, block_macs, block_shapes
from dat_ref.complexity import (
    PUBLISHED,
    attention_terms,
    backbone_cost,
    block_cost,
    curves,
    doubling,
    growth,
    retained_bytes,
    total,
)
from dat_ref.complexity import count as count_run
from dat_ref.complexity.curves import SAME_COST_AS, compared_systems
from dat_ref.peers import (
    REPLACEMENTS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
    replace_attention,
)

# ------------------------------------------------------------------------------------------------ attentions


@settings(max_examples=150)
@given(any_case)
def test_multiply_adds_and_gathers_that_run_are_those_of_the_formula(case):
    cost = total(attention_terms(case.batch, case.size, case.config))
    found = count_case(case)
    assert found.macs == cost.macs == ATTENTIONS[type(case.config)].macs(case.batch, case.size, case.config)
    assert found.gathers == cost.gathers


@settings(max_examples=150)
@given(any_case, st.sampled_from([np.float32, np.float64]))
def test_bytes_that_a_pass_leaves_behind_are_those_of_the_formula(case, dtype):
    terms = attention_terms(case.batch, case.size, case.config, itemsize=np.dtype(dtype).itemsize)
    assert saved_bytes(case, dtype) == total(terms).saved_bytes


@given(any_case)
def test_parameters_are_those_of_the_shapes(case):
    shapes = ATTENTIONS[type(case.config)].shapes(case.config)
    assert total(attention_terms(1, case.size, case.config)).parameters == params.count(shapes)


@given(layer_cases())
def test_each_term_of_the_deformable_layer_runs_where_it_says(case):
    """Each term, not only the sum, equals the count of the functions of that name."""
    terms, found = attention_terms(case.batch, case.size, case.config), count_case(case)
    macs = {name: term.macs for name, term in terms.items()}
    bias = {"_logit_bias"} if case.config.bias is not BiasKind.DEPTHWISE else {"depthwise_conv2d"}
    outside = [path for path in found.macs_by_path if "offset_network" in path]
    in_bias = sum(amount for path, amount in found.macs_by_path.items() if bias & set(path) and path not in outside)
    assert in_bias == macs.get("bias", 0)
    assert found.within("attend").macs == macs["attention"]
    assert found.within("offset_network").macs == macs.get("offset network", 0)
    assert found.within("_sample_groups").macs == macs.get("sampling", 0)
    projections = sum(
        amount for path, amount in found.macs_by_path.items() if path[-2:] == ("deformable_layer", "linear")
    )
    assert projections == macs["query and output"] + macs["key and value"]


@given(st.one_of(window_cases(), neighborhood_cases(), peer_cases()))
def test_attention_that_reads_at_fixed_places_gathers_nothing(case):
    moves = isinstance(
        case.config,
        (DeformableConvConfig, MultiScaleDeformableConfig, PerQueryAttentionConfig, DATDCNAttentionConfig),
    )
    assert bool(count_case(case).gathers) == moves


def test_points_that_no_network_moves_are_looked_up_not_gathered():
    config = DeformableAttentionConfig(6, 2, stride=2, size=(7, 5), offset_bound=OffsetBound.NONE)
    case = Case(config, (7, 5), 1, 0)
    assert (count_case(case).gathers, count_case(case).lookups) == (0, 4 * 4 * 3 * 6 + 4 * 2 * 35 * 4 * 3)
    moved = Case(replace(config, offset_bound=OffsetBound.RAW), (7, 5), 1, 0)
    assert (count_case(moved).gathers, count_case(moved).lookups) == (count_case(case).lookups, 0)


def test_every_attention_has_a_case():
    drawn = {DeformableAttentionConfig, WindowAttentionConfig, NeighborhoodAttentionConfig, *map(type, PEERS)}
    assert set(ATTENTIONS) == drawn


def test_unknown_attention_is_refused():
    with pytest.raises(ConfigError, match=r"config: expected one of DeformableAttentionConfig, .*, got object"):
        attention_terms(1, (3, 3), object())


# ------------------------------------------------------------------------------------------------ blocks, backbones


@settings(max_examples=50)
@given(
    st.one_of(layer_cases(), window_cases(), neighborhood_cases(), peer_cases()),
    st.sampled_from(["linear", "depthwise", "depthwise_residual"]),
    st.booleans(),
    st.sampled_from([None, 0.1]),
)
def test_block_runs_and_keeps_what_the_formula_says(case, mlp, perception, scale):
    config = BlockConfig(case.config, mlp, 3, perception, scale)
    cost = block_cost(case.batch, case.size, config, itemsize=8)
    shapes = block_shapes(config)
    parameters = random_params(shapes, np.random.default_rng(case.seed))
    found = count_run(block, case.x(), parameters, config)
    assert found.macs == cost.total.macs == block_macs(case.batch, case.size, config)
    assert found.gathers == cost.total.gathers
    assert cost.total.parameters == params.count(shapes)
    x = case.x()
    assert retained_bytes(block(x, parameters, config), exclude=[x, parameters]) == cost.total.saved_bytes


def small(embedding: str) -> DATConfig:
    """Return a backbone of three stages with every kind of block of the releases."""

    def deformable(dim, stride, size):
        return DeformableAttentionConfig(dim, dim // 3, dim // 6, stride, 3, size=size)

    return DATConfig(
        stages=(
            (BlockConfig(WindowAttentionConfig(6, 2, 3)), BlockConfig(WindowAttentionConfig(6, 2, 3, 2))),
            (
                BlockConfig(NeighborhoodAttentionConfig(12, 2, 3), "depthwise", 2),
                BlockConfig(deformable(12, 2, (4, 6))),
            ),
            (BlockConfig(deformable(18, 1, (2, 3)), "depthwise_residual", 2, True, 0.1),),
        ),
        patch_embedding=embedding,
        image_size=(32, 48),
        num_classes=5 if embedding == "conv" else 0,
    )


@pytest.mark.parametrize("embedding", ["patch", "conv"])
@pytest.mark.parametrize("global_pool", ["avg", ""])
@pytest.mark.parametrize("size", [(32, 48), (45, 31)])
def test_backbone_runs_and_keeps_what_the_formula_says(embedding, global_pool, size):
    config = replace(small(embedding), global_pool=global_pool)
    cost = backbone_cost(2, size, config, itemsize=8)
    parameters = random_params(dat_shapes(config), np.random.default_rng(0))
    image = np.random.default_rng(1).standard_normal((2, 3, *size))
    found = count_run(lambda x, tree: DAT(config, tree)(x), image, parameters)
    assert found.macs == cost.total.macs == dat_macs(2, size, config)
    assert found.gathers == cost.total.gathers
    assert cost.total.parameters == params.count(parameters)
    result = DAT(config, parameters)(image, return_trace=True)
    assert retained_bytes(result, exclude=[image, parameters]) == cost.total.saved_bytes


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny", "dat_spot"])
def test_preset_runs_what_the_formula_says(name):
    config = dat_ref.config(name)
    cost = backbone_cost(1, (75, 101), config)
    parameters = dat_ref.init_params(config, 0)
    found = count_run(lambda x, tree: DAT(config, tree)(x), np.ones((1, 3, 75, 101), np.float32), parameters)
    assert (found.macs, found.gathers) == (cost.total.macs, cost.total.gathers)


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_backbone_with_a_peer_in_the_deformable_place(kind):
    config = replace_attention(small("patch"), kind)
    cost = backbone_cost(1, (32, 48), config, itemsize=8)
    parameters = random_params(dat_shapes(config), np.random.default_rng(0))
    image = np.random.default_rng(1).standard_normal((1, 3, 32, 48))
    found = count_run(lambda x, tree: DAT(config, tree)(x), image, parameters)
    assert (found.macs, found.gathers) == (cost.total.macs, cost.total.gathers)
    result = DAT(config, parameters)(image, return_trace=True)
    assert retained_bytes(result, exclude=[image, parameters]) == cost.total.saved_bytes


# ------------------------------------------------------------------------------------------------ the articles


def test_worked_example_of_the_article():
    """For H = W = 14, Ns = 49, C = 384, k = 5 the article's sum holds; the offset network is 0.64 %, not 6 %."""
    config = DeformableAttentionConfig(384, heads=12, groups=3, stride=2, kernel_size=5, size=(14, 14))
    macs = {name: term.macs for name, term in attention_terms(1, (14, 14), config).items()}
    assert macs["attention"] == 2 * 196 * 49 * 384 == 7_375_872
    assert macs["query and output"] == 2 * 196 * 384**2 == 57_802_752
    assert macs["key and value"] == 2 * 49 * 384**2 == 14_450_688
    assert macs["attention"] + macs["query and output"] + macs["key and value"] == 79_629_312
    assert macs["offset network"] == (5**2 + 2) * 49 * 384 == 508_032
    assert (macs["sampling"], macs["bias"]) == (4 * 49 * 384, 4 * 196 * 49 * 12)  # terms that the article leaves out
    found = count_case(Case(config, (14, 14), 1, 0))
    assert found.macs == sum(macs.values())
    assert found.within("offset_network").macs == 508_032


@pytest.mark.parametrize("name", EXACT)
def test_totals_of_the_eight_models(name):
    """Totals are fixed integers, within the article's rounding or the difference of counting rules (under 1.2 %)."""
    side, millions, billions = PUBLISHED[name]
    cost = backbone_cost(1, (side, side), dat_ref.config(name)).total
    assert (cost.parameters, cost.products) == EXACT[name]
    assert abs(cost.parameters / 1e6 - millions) < 0.8
    assert cost.products / 1e9 == pytest.approx(billions, rel=0.012)


def test_article_total_needs_the_released_stride_one():
    config = dat_ref.config("dat_tiny")

    def coarser(item):
        deformable = isinstance(item.attention, DeformableAttentionConfig)
        return replace(item, attention=replace(item.attention, stride=2)) if deformable else item

    stages = tuple(tuple(map(coarser, blocks)) if index == 2 else blocks for index, blocks in enumerate(config.stages))
    cost = backbone_cost(1, (224, 224), replace(config, stages=stages)).total
    assert cost.products / 1e9 == pytest.approx(4.362, abs=5e-4)


# ------------------------------------------------------------------------------------------------ growth


def deformable(stride: int, size: int | None = None) -> DeformableAttentionConfig:
    return DeformableAttentionConfig(12, 4, 2, stride, 3, size=(size, size) if size else (7, 7))


def grown(term: str | None, config_at, sides=None):
    """Return the growth of a term's multiply-adds (all terms if None), with one configuration per side length."""

    def macs(side):
        terms = attention_terms(1, (side, side), config_at(side))
        return terms[term].macs if term else total(terms).macs

    return growth(macs, sides or doubling(14, 5))


EXPONENTS = [
    ("multi-head", lambda side: MultiHeadAttentionConfig(12, 4), 4),
    ("spatial reduction", lambda side: PyramidAttentionConfig(12, 4, 2), 4),
    ("deformable, fixed stride", lambda side: deformable(2), 4),
    ("deformable, fixed key grid", lambda side: deformable(side // 7), 2),
    ("windows", lambda side: WindowAttentionConfig(12, 4, 7), 2),
    ("shifted windows", lambda side: WindowAttentionConfig(12, 4, 7, 4), 2),
    ("neighborhood", lambda side: NeighborhoodAttentionConfig(12, 4, 7), 2),
    ("Deformable DETR", lambda side: MultiScaleDeformableConfig(12, 4), 2),
    ("DAT-DCN", lambda side: DATDCNAttentionConfig(12, 4), 2),
    ("keys of each query", lambda side: PerQueryAttentionConfig(12, 4), 2),
]


@pytest.mark.parametrize(("name", "config_at", "exponent"), EXPONENTS, ids=[row[0] for row in EXPONENTS])
def test_attention_term_grows_with_a_whole_exponent(name, config_at, exponent):
    assert grown("attention", config_at).exponent == pytest.approx(exponent, abs=1e-9)


@pytest.mark.parametrize(("name", "config_at", "exponent"), EXPONENTS, ids=[row[0] for row in EXPONENTS])
def test_whole_layer_approaches_the_exponent_of_its_attention(name, config_at, exponent):
    """The exponent of a sum of side² and side⁴ terms rises from 2 to 4 and stays below 4."""
    steps = grown(None, config_at, doubling(14, 8)).steps
    assert steps[-1] == pytest.approx(exponent, abs=0.01)
    assert max(steps) <= exponent + 1e-9
    assert list(steps) == pytest.approx(sorted(steps), abs=1e-9)


def test_as_many_keys_for_each_query_as_pixels_grow_with_the_fourth_power():
    """The naive form with dense keys costs Nq·Nk·C, side⁴, in multiply-adds, sampling and memory."""

    def config_at(side):
        return PerQueryAttentionConfig(6, 2, kernel_size=side - 1, offset_kernel_size=3)

    found = [attention_terms(1, (side, side), config_at(side)) for side in (64, 128)]
    for term, amount in (("attention", "macs"), ("sampling", "gathers"), ("sampling", "saved_bytes")):
        before, after = (getattr(terms[term], amount) for terms in found)
        assert np.log2(after / before) == pytest.approx(4, abs=0.05)


@pytest.mark.parametrize(
    ("config_at", "exponent"),
    [
        (lambda side: MultiHeadAttentionConfig(4, 2), 4),
        (lambda side: DeformableAttentionConfig(4, 2, stride=2, kernel_size=3, size=(4, 4)), 4),
        (lambda side: DeformableAttentionConfig(4, 2, stride=side // 2, kernel_size=3, size=(4, 4)), 2),
        (lambda side: WindowAttentionConfig(4, 2, 4), 2),
        (lambda side: PerQueryAttentionConfig(4, 2), 2),
    ],
)
def test_exponents_hold_for_what_runs(config_at, exponent):
    """The exponents hold for counted products of `attend` on maps that double, not only for the formulas."""
    counts = {
        side: count_case(Case(config_at(side), (side, side), 1, 0)).within("attend").macs for side in doubling(4, 3)
    }
    assert growth(counts).exponent == pytest.approx(exponent, abs=1e-9)


def test_memory_grows_with_the_attention_matrix_or_with_the_map():
    layer = deformable(2)
    drawn = {curve.kind: growth(dict(zip(curve.sides, curve.saved_bytes))) for curve in curves(layer, doubling(14, 6))}
    assert set(drawn) == {"deformable", "deformable_fixed", *REPLACEMENTS} - set(SAME_COST_AS)
    for kind, found in drawn.items():
        steep = kind in ("multi_head", "pyramid", "deformable")
        assert found.steps[-1] == pytest.approx(4 if steep else 2, abs=0.05), kind


def test_compared_systems_have_as_many_keys_as_the_layer():
    """Systems with a variable number of keys have equally many; multi-head attention always sees all keys."""
    configs = compared_systems(DeformableAttentionConfig(12, 4, stride=2, kernel_size=3, size=(14, 14)), 14)
    assert configs["window"].window_size == configs["neighborhood"].kernel_size == 7
    assert configs["pyramid"].reduction == 2
    assert configs["per_query"].keys == configs["deform_conv"].taps == configs["ms_deform"].points == 49


@pytest.mark.parametrize(
    ("sides", "counts", "message"),
    [((7,), (1,), "at least two sides"), ((7, 13), (1, 2), "twice the one before"), ((7, 14), (0, 2), "positive")],
)
def test_growth_rejects_costs_without_an_exponent(sides, counts, message):
    with pytest.raises(ValueError, match=message):
        growth(dict(zip(sides, counts)))
