"""Attention over sampled keys: against scalar loops and torch, and its invariances."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from hypothesis import given
from hypothesis import strategies as st
from oracle import deformable as loops
from strategies import conventions, map_sizes, non_contiguous, numbers, seeds

from dat_ref import ConfigError, Convention, ShapeError, deformable_attention
from dat_ref.ops.attention import attend, deformable_attention_vjp, merge_heads, split_heads
from dat_ref.ops.basic import softmax


def core(seed, size, samples, heads=4, groups=2, depth=3, batch=2, built=None, dtype=np.float64):
    """Return the arguments of deformable_attention."""
    built = built or size
    return {
        "q": numbers(seed, batch, heads, size[0] * size[1], depth, dtype=dtype),
        "k": numbers(seed + 1, batch, heads, samples, depth, dtype=dtype),
        "v": numbers(seed + 2, batch, heads, samples, depth, dtype=dtype),
        "points": 0.8 * numbers(seed + 3, batch, groups, samples, 2, dtype=dtype),
        "bias_table": numbers(seed + 4, heads, 2 * built[0] - 1, 2 * built[1] - 1, dtype=dtype),
    }


@given(
    conventions, map_sizes(smallest=2, largest=5), map_sizes(largest=5), st.sampled_from(["fractions", "pixels"]), seeds
)
def test_core_equals_scalar_loops(convention, size, built, resolution, seed):
    """deformable_attention equals the oracle's core, for tables of this and of other sizes, with and without a bias."""
    arguments = core(seed, size, 3, heads=2, groups=2, depth=2, batch=1, built=built)
    name = convention.name.lower()
    for table in (arguments["bias_table"], None):
        arguments["bias_table"] = table
        result = deformable_attention(**arguments, query_size=size, convention=convention, resolution=resolution)
        expected = loops.deformable_core(**arguments, query_size=size, convention=name, bias_resolution=resolution)
        assert_agree(result, expected, 1e-11)


@given(seeds, st.sampled_from([None, 0.25, 2.0]))
def test_attend_equals_torch(seed, scale):
    """`attend` equals torch's scaled_dot_product_attention with an additive mask."""
    torch = pytest.importorskip("torch")
    q, k, v = (numbers(seed + i, 2, 3, count, 5) for i, count in enumerate((7, 4, 4)))
    bias = numbers(seed + 3, 3, 7, 4)
    bias[:, :, 1] = -np.inf
    tensors = [torch.from_numpy(array) for array in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, torch.from_numpy(bias), scale=scale)
    result, weights = attend(q, k, v, bias, 5**-0.5 if scale is None else scale)
    assert_agree(result, expected.numpy(), 1e-12)
    assert not weights[..., 1].any()


@given(map_sizes(), st.integers(1, 5), seeds)
def test_weights_are_a_distribution(size, samples, seed):
    """Attention weights lie in [0, 1] and their rows sum to one."""
    arguments = core(seed, size, samples)
    _, weights = attend(10 * arguments["q"], arguments["k"], arguments["v"], None, 1.0)
    assert_agree(weights.sum(axis=-1), np.ones(weights.shape[:-1]), 1e-14)
    assert ((weights >= 0) & (weights <= 1 + 1e-15)).all()


@given(conventions, map_sizes(), seeds)
def test_keys_may_come_in_any_order(convention, size, seed):
    """Permuting keys, values and points together changes nothing."""
    arguments = core(seed, size, 5)
    options = {"query_size": size, "convention": convention}
    order = np.random.default_rng(seed).permutation(5)
    shuffled = {name: arguments[name][:, :, order] for name in ("k", "v", "points")}
    expected = deformable_attention(**arguments, **options)
    assert_agree(deformable_attention(**{**arguments, **shuffled}, **options), expected, 1e-12)


@given(map_sizes(), seeds)
def test_queries_do_not_see_each_other(size, seed):
    """Permuting queries (with their rows of the bias) permutes the output, and changes nothing else."""
    arguments = core(seed, size, 4)
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    bias = numbers(seed, 2, 4, q.shape[2], 4)
    order = np.random.default_rng(seed).permutation(q.shape[2])
    output, weights = attend(q, k, v, bias, 0.5)
    shuffled, shuffled_weights = attend(q[:, :, order], k, v, bias[:, :, order], 0.5)
    assert_agree(shuffled, output[:, :, order], 1e-13)
    assert_agree(shuffled_weights, weights[:, :, order], 1e-13)


@given(seeds)
def test_queries_know_their_place_through_the_bias_alone(seed):
    """Without a table the core is equivariant to permuting queries; with one it is not."""
    size, order = (3, 5), np.random.default_rng(seed).permutation(15)
    arguments = core(seed, size, 4)
    options = {"query_size": size, "convention": Convention.CELL_CENTER}
    for table in (None, arguments["bias_table"]):
        arguments["bias_table"] = table
        output = deformable_attention(**arguments, **options)
        shuffled = deformable_attention(**{**arguments, "q": arguments["q"][:, :, order]}, **options)
        same = np.abs(shuffled - output[:, :, order]).max() < 1e-12
        assert same == (table is None or (order == np.arange(15)).all())


@given(conventions, map_sizes(), seeds)
def test_one_key_takes_all_the_attention(convention, size, seed):
    """With a single key the output is its value, for every query."""
    arguments = core(seed, size, 1)
    output = deformable_attention(**arguments, query_size=size, convention=convention)
    assert_agree(output, np.broadcast_to(arguments["v"], output.shape), 1e-13)


@given(seeds)
def test_a_constant_added_to_a_query_s_logits_changes_nothing(seed):
    """Softmax depends on differences only, also for a large constant."""
    arguments = core(seed, (3, 5), 4)
    constant = 1e3 * numbers(seed, 2, 4, 15, 1)
    plain, _ = attend(arguments["q"], arguments["k"], arguments["v"], None, 0.5)
    shifted, _ = attend(arguments["q"], arguments["k"], arguments["v"], constant, 0.5)
    assert_agree(shifted, plain, 1e-11)


def test_softmax_of_large_and_hidden_logits():
    """Logits of 1000 do not overflow; -inf gets weight zero."""
    weights = softmax(np.array([1000.0, 1000.0, -np.inf, -1000.0]))
    np.testing.assert_array_equal(weights, [0.5, 0.5, 0.0, 0.0])


@given(seeds, st.sampled_from([(2, 3, 5), (1, 7, 1), (3, 1, 4)]))
def test_heads_are_split_and_merged(seed, shape):
    """merge_heads undoes split_heads; head m holds channels [m d, (m + 1) d)."""
    batch, height, width = shape
    x = numbers(seed, batch, 6, height, width)
    heads = split_heads(x, 3)
    np.testing.assert_array_equal(heads[:, 1, 0, :], x[:, 2:4, 0, 0])
    np.testing.assert_array_equal(merge_heads(heads, (height, width)), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_and_non_contiguous_inputs(dtype):
    """Read-only and strided inputs are accepted and not modified; outputs and gradients have the input's precision."""
    arguments = core(0, (3, 5), 4, dtype=dtype)
    odd = {name: non_contiguous(array) for name, array in arguments.items()}
    options = {"query_size": (3, 5), "convention": Convention.CVPR2022}
    output = deformable_attention(**odd, **options)
    assert output.dtype == dtype
    assert_agree(output, deformable_attention(**arguments, **options), 1e-6)
    grads = deformable_attention_vjp(non_contiguous(output), **odd, **options)
    for name, grad in grads._asdict().items():
        assert grad.dtype == dtype, name
        assert grad.shape == arguments[name].shape
        np.testing.assert_array_equal(odd[name], arguments[name])


def test_nan_is_never_dropped():
    """A NaN in one key reaches every query of its head, and no other head; a NaN point reaches its group's heads."""
    arguments = core(0, (3, 5), 4)
    arguments["k"][0, 1, 2, 0] = np.nan
    arguments["points"][1, 1, 0, 1] = np.nan
    output = deformable_attention(**arguments, query_size=(3, 5), convention=Convention.PAPER)
    assert np.isnan(output).all(axis=(2, 3)).tolist() == [[False, True, False, False], [False, False, True, True]]
    assert np.isnan(output).any(axis=(2, 3)).tolist() == [[False, True, False, False], [False, False, True, True]]


def test_empty_batch():
    """No images: an empty output, zero gradients for the table."""
    arguments = core(0, (3, 5), 4, batch=0)
    options = {"query_size": (3, 5), "convention": Convention.CELL_CENTER}
    output = deformable_attention(**arguments, **options)
    assert output.shape == (0, 4, 15, 3)
    assert not deformable_attention_vjp(output, **arguments, **options).bias_table.any()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", np.zeros((2, 4, 14, 3)), ShapeError, r"q: expected \(B, heads, H·W=15, d\), got \(2, 4, 14, 3\)"),
        ("k", np.zeros((2, 3, 4, 3)), ShapeError, r"k: expected \(B=2, heads=4, Ns, d=3\), got \(2, 3, 4, 3\)"),
        ("v", np.zeros((2, 4, 5, 3)), ShapeError, r"v: expected \(B=2, heads=4, Ns=4, d=3\), got \(2, 4, 5, 3\)"),
        ("points", np.zeros((2, 2, 4, 3)), ShapeError, r"points: expected \(B=2, groups, Ns=4, \(y, x\)=2\), got"),
        (
            "points",
            np.zeros((2, 3, 4, 2)),
            ConfigError,
            r"points: expected groups that divide heads=4, got \(2, 3, 4, 2\)",
        ),
        (
            "bias_table",
            np.zeros((2, 5, 9)),
            ShapeError,
            r"bias_table: expected \(heads=4, 2H-1, 2W-1\), got \(2, 5, 9\)",
        ),
        ("bias_table", np.zeros((4, 6, 9)), ShapeError, r"bias_table: expected .*odd on both axes, got \(4, 6, 9\)"),
        ("q", np.zeros((2, 4, 15, 3), dtype=int), ShapeError, r"q: expected floating-point numbers .* got int64"),
    ],
)
def test_wrong_arguments_are_named(name, value, error, message):
    """The error names the argument, the expected pattern and the actual value."""
    arguments = {**core(0, (3, 5), 4), name: value}
    with pytest.raises(error, match=message):
        deformable_attention(**arguments, query_size=(3, 5), convention=Convention.CELL_CENTER)


def test_no_keys_are_refused():
    """Softmax over no keys is undefined, so it raises an error."""
    arguments = core(0, (3, 5), 0)
    with pytest.raises(ShapeError, match=r"k: expected .* with Ns >= 1, got \(2, 4, 0, 3\)"):
        deformable_attention(**arguments, query_size=(3, 5), convention=Convention.CELL_CENTER)
