"""Operation counters: bytes of a run, counting rules, rejected wrong counts, comparison with torch's counter."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.costs import EXACT, count_case, forward, saved_bytes
from helpers.layers import random_params
from strategies import Case

import dat_ref
from dat_ref import (
    DAT,
    BiasKind,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
)
from dat_ref.block import ATTENTIONS
from dat_ref.complexity import (
    PUBLISHED,
    Counts,
    Term,
    attention_terms,
    backbone_cost,
    counter,
    counting,
    growth,
    mark_as_data,
    measure_allocation,
    retained_bytes,
    total,
)
from dat_ref.ops import basic
from dat_ref.peers import (
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
)
from dat_ref.peers.memory import Tape

# ------------------------------------------------------------------------------------------------ memory in a run

LARGE = [
    DeformableAttentionConfig(96, 12, 3, 1, size=(21, 28)),
    DeformableAttentionConfig(96, 12, 12, 2, size=(21, 28)),
    DeformableAttentionConfig(96, 6, 3, 2, bias=BiasKind.LOG_CPB),
    DeformableAttentionConfig(96, 6, 3, 1, bias=BiasKind.DEPTHWISE, offset_bound=OffsetBound.NONE),
    WindowAttentionConfig(96, 3, 7, 3),
    NeighborhoodAttentionConfig(96, 3, 7, small_map="pad"),
    MultiHeadAttentionConfig(96, 6, size=(21, 28)),
    PyramidAttentionConfig(96, 6, 2),
    DeformableConvConfig(96, 3, offset_groups=4),
    MultiScaleDeformableConfig(96, 6, scoring="dot_product"),
    PerQueryAttentionConfig(96, 6, 2),
    DATDCNAttentionConfig(96, 6),
]


@pytest.mark.parametrize("config", LARGE, ids=lambda config: config.kind)
@pytest.mark.parametrize(("batch", "dtype"), [(1, np.float32), (2, np.float64)])
def test_peak_memory_is_within_three_percent_of_the_formula(config, batch, dtype):
    """The 3 % are grids, indices and Python objects, which tracemalloc also counts."""
    size = (21, 28)
    shapes = ATTENTIONS[type(config)].shapes(config)
    parameters = random_params(shapes, np.random.default_rng(0), dtype)
    x = np.random.default_rng(1).standard_normal((batch, 96, *size)).astype(dtype)
    run = ATTENTIONS[type(config)].forward
    run(x, parameters, config)  # the first run imports and compiles
    found, tape = measure_allocation(run, x, parameters, config), Tape(np.dtype(dtype).itemsize)
    ATTENTIONS[type(config)].memory(tape, batch, size, config)
    assert 0.97 < found.peak / tape.peak < 1.03
    assert tape.live == sum(tape.saved_bytes.values()) == retained_bytes(found.result, exclude=[x, parameters])
    assert found.retained == pytest.approx(tape.live, rel=0.01)


def test_peak_memory_of_a_backbone_without_a_trace():
    config = dat_ref.config("dat_pp_tiny", num_classes=10)
    model = DAT(config, dat_ref.init_params(config, 0))
    image = np.ones((1, 3, 160, 96), np.float32)
    model(image)
    cost = backbone_cost(1, (160, 96), config)
    assert 0.97 < measure_allocation(model, image).peak / cost.peak < 1.03


def test_views_of_one_array_are_held_once():
    x = np.zeros((4, 6))
    tree = {"views": [x[1:], x.T, np.broadcast_to(x[0], (9, 6))], "own": (np.zeros(5, np.float32),)}
    assert retained_bytes(tree) == x.nbytes + 20
    assert retained_bytes(tree, exclude=x[:1]) == 20


# ------------------------------------------------------------------------------------------------ the rules of counting


def rule(function, *arrays) -> Counts:
    """Return the counts of a function of arrays."""
    with counting() as counts:
        function(*map(mark_as_data, arrays))
    return counts


A, B, C = np.ones((2, 3, 5)), np.ones((2, 5, 7)), np.ones((2, 3, 5))


@pytest.mark.parametrize(
    ("function", "arrays", "macs"),
    [
        (lambda a, b: a @ b, (A, B), 2 * 3 * 5 * 7),
        (lambda a, b: a @ b, (A[0], B), 2 * 3 * 5 * 7),
        (lambda a, b: a @ b, (A, B[0, :, 0]), 2 * 3 * 5),
        (lambda a, b: np.matmul(a, b), (A[:0], B[:0]), 0),
        (lambda a, b: np.einsum("bij,bjk->bik", a, b), (A, B), 2 * 3 * 5 * 7),
        (lambda a, b: np.einsum("bij,bij->b", a, b), (A, C), 2 * 3 * 5),
        (lambda a, b: np.tensordot(a, b, axes=([0, 2], [0, 1])), (A, B), 3 * 7 * 2 * 5),
        (lambda a, b: np.tensordot(a, b, axes=1), (A[0], B[0]), 3 * 7 * 5),
        (lambda a, b: (a * b).sum(axis=1), (A, C), 2 * 3 * 5),
        (lambda a, b: a * b, (A, C), 0),
        (lambda a, b: a * b + a, (A, C), 0),  # an affine map, as in a norm
        (lambda a, b: (a + b).sum(), (A, C), 0),
        (lambda a, b: np.square(a).mean(), (A, C), 0),
    ],
)
def test_definition_of_a_multiply_add(function, arrays, macs):
    assert rule(function, *arrays).macs == macs


def test_product_added_in_place_is_counted_once():
    def add(a, b):
        y, product = a + 0, a * b
        y += product  # 30
        y += product  # no longer a product
        y += b
        y -= a * b

    assert rule(add, A, C).macs == 30


@pytest.mark.parametrize(
    "function", [lambda a, b: np.dot(a[0], b[0]), lambda a, b: a[0].dot(b[0]), lambda a, b: np.linalg.norm(a)]
)
def test_what_no_rule_covers_is_refused(function):
    with pytest.raises(NotImplementedError, match="no rule"):
        rule(function, A, B)


def test_gathers_depend_on_the_data_and_lookups_do_not():
    def read(table, numbers):
        fixed = np.arange(4)
        table[fixed]  # 4 · 6 lookups
        table[1:3], table[0], table[:, None]  # slices: neither
        table[numbers.astype(np.intp)]  # 2 · 6 gathers
        np.take(table, numbers.astype(np.intp), axis=1)  # 4 · 2 gathers
        table[np.argmax(table, axis=0)]  # 6 · 6 gathers

    counts = rule(read, np.arange(24.0).reshape(4, 6), np.array([1.0, 0.0]))
    assert (counts.lookups, counts.gathers) == (24, 12 + 8 + 36)


def test_counting_changes_no_number_and_leaves_the_spec_as_it_was():
    case = Case(DeformableAttentionConfig(6, 2, stride=2, size=(5, 7)), (5, 7), 2, 3)
    x, parameters = case.x(), case.params()
    plain, _ = forward(case)(x, parameters, case.config)
    with counting():
        seen, _ = forward(case)(mark_as_data(x), mark_as_data(parameters), case.config)
    np.testing.assert_array_equal(plain, np.asarray(seen))
    with pytest.raises(RuntimeError, match="stop"), counting():
        raise RuntimeError("stop")
    assert basic.np is np


def test_counts_tell_which_function_ran():
    case = Case(WindowAttentionConfig(6, 2, 2), (4, 2), 1, 0)
    found = count_case(case)
    assert found.within("attend").macs + found.within("linear").macs == found.macs
    assert found.within("window_attention").macs == found.macs
    assert found.within("depthwise_conv2d").macs == 0


# ------------------------------------------------------------------------------------------------ mutants

WITNESS = Case(DeformableAttentionConfig(12, 4, 2, 2, 3, size=(5, 7)), (5, 7), 2, 0)
NUMBERS = {"macs": lambda: count_case(WITNESS).macs, "gathers": lambda: count_case(WITNESS).gathers}


def agrees(terms, number) -> bool:
    return getattr(total(terms), number) == NUMBERS[number]()


def test_right_formula_passes_the_check_that_the_wrong_ones_fail():
    assert all(agrees(attention_terms(2, (5, 7), WITNESS.config), number) for number in NUMBERS)


@pytest.mark.parametrize("dropped", attention_terms(2, (5, 7), WITNESS.config))
def test_formula_without_one_of_its_terms_is_rejected(dropped):
    terms = attention_terms(2, (5, 7), WITNESS.config)
    changed = {name: Term() if name == dropped else term for name, term in terms.items()}
    assert not agrees(changed, "macs")
    assert agrees(changed, "gathers") == (terms[dropped].gathers == 0)
    assert total(changed).saved_bytes != saved_bytes(WITNESS, np.float32)


@pytest.mark.parametrize("size", [(7, 5), (5, 5), (6, 7)])
def test_formula_for_another_map_is_rejected(size):
    """The drawn maps are not square, because swapped axes change the key grid only if they differ."""
    config = replace(WITNESS.config, stride=3, size=(4, 7))
    found = count_case(Case(config, (4, 7), 1, 0))
    assert found.macs != total(attention_terms(1, size, config)).macs


@pytest.mark.parametrize(
    ("rule_name", "wrong"),
    [
        ("_contraction", lambda ufunc, inputs: 0),
        ("_contraction", lambda ufunc, inputs: inputs[0].size),
        ("_summed_products", lambda method, inputs, out: 0),
        ("_summed_products", lambda method, inputs, out: inputs[0].size if method == "reduce" else 0),
        ("_is_data_dependent", lambda value: False),
        ("_is_data_dependent", lambda value: True),
    ],
)
def test_counter_with_a_broken_rule_is_rejected(monkeypatch, rule_name, wrong):
    case = Case(replace(WITNESS.config, offset_bound=OffsetBound.NONE), (5, 7), 2, 0)
    monkeypatch.setattr(counter, rule_name, wrong)
    found = [(count_case(each).macs, count_case(each).gathers) for each in (WITNESS, case)]
    costs = [total(attention_terms(2, (5, 7), each.config)) for each in (WITNESS, case)]
    assert found != [(cost.macs, cost.gathers) for cost in costs]


# ------------------------------------------------------------------------------------------------ torch


@pytest.fixture(scope="module")
def torch_counter():
    pytest.importorskip("torch")
    pytest.importorskip("dat_ref.torch")
    from dat_ref.complexity import torch_counter

    return torch_counter


def torch_model(name):
    """Return a preset on the meta device, with attention computed as in the releases."""
    import torch

    from dat_ref.torch import DAT as TorchDAT
    from dat_ref.torch.peers.neighborhood import NeighborhoodAttention

    with torch.device("meta"):
        model = TorchDAT(dat_ref.config(name), backend="eager").eval()
    for module in model.modules():
        if isinstance(module, NeighborhoodAttention):  # without a trace, tiles of queries share keys and mask some
            module.forward = lambda x, traced=module.forward: traced(x, return_trace=True)[0]
    return model


def published_and_odd_sizes():
    """Yield each preset with its published size, and with an odd one: of the larger models only in the slow tests."""
    for name in EXACT:
        yield name, (PUBLISHED[name].side,) * 2
        yield pytest.param(name, (187, 250), marks=[pytest.mark.slow] * (not name.endswith("tiny")))


@pytest.mark.parametrize(("name", "size"), list(published_and_odd_sizes()))
def test_matrix_products_and_convolutions_are_those_that_torch_counts(torch_counter, name, size):
    cost = backbone_cost(1, size, dat_ref.config(name)).total
    assert torch_counter.torch_macs_of_shapes(torch_model(name), (1, 3, *size)) == cost.products


def test_torch_saves_the_attention_matrices_that_the_spec_keeps(torch_counter):
    """With explicit attention matrices, the tensors that autograd saves grow like the spec's trace."""
    import torch

    from dat_ref.torch import DeformableAttention

    config = DeformableAttentionConfig(12, 4, 2, size=(8, 8))
    layer = DeformableAttention(config, backend="eager")
    saved = {}
    for side in (32, 64):
        x = torch.randn(1, 12, side, side, requires_grad=True)
        saved[side] = torch_counter.saved_bytes(layer, x, exclude=[x, *layer.parameters()])
        assert saved[side] >= attention_terms(1, (side, side), config)["attention"].saved_bytes
    assert growth(saved).exponent == pytest.approx(4, abs=0.2)


def test_torch_bytes_by_hand(torch_counter):
    import torch

    weight = torch.ones(1000, requires_grad=True)
    assert torch_counter.saved_bytes(lambda: (weight * 2).exp().sum(), exclude=[weight]) == 4000  # the exponentials
    assert torch_counter.torch_peak_bytes(lambda x: ((x + 1) * 2 + 3).sum(), torch.ones(1000)) == 8000  # two at once
    assert torch_counter.torch_peak_bytes(lambda x: x.view(10, 100).T, torch.ones(1000)) == 0  # views
