"""The hand-written gradients against torch's autograd in float64, through torch's own operators."""

from itertools import product

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.layer_gradients import affine, away_from_kinks, sample_vjp
from helpers.layers import random_params
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import windows as window_loops
from oracle.neighborhood import neighbors
from strategies import layer_cases, map_sizes, neighborhood_cases, numbers, seeds, window_cases

from dat_ref import BiasKind, WindowAttentionConfig
from dat_ref.block import ATTENTIONS
from dat_ref.layer import deformable_layer, deformable_layer_vjp
from dat_ref.ops import basic
from dat_ref.ops.sampling import bilinear_sample
from dat_ref.params import flatten, unflatten

torch = pytest.importorskip("torch")
from helpers.torch_layers import masked_attention, torch_layer  # noqa: E402

functional = torch.nn.functional


def autograd(function, tensors, cotangent):
    """Return the gradients of torch's autograd, by name."""
    leaves = {name: torch.from_numpy(np.array(a)).requires_grad_() for name, a in tensors.items()}
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), torch.from_numpy(cotangent), allow_unused=True)
    zeros = (np.zeros(tensor.shape) for tensor in leaves.values())
    return y.detach().numpy(), {n: z if g is None else g.numpy() for n, g, z in zip(leaves, grads, zeros, strict=True)}


@given(map_sizes(largest=5), st.integers(1, 3), seeds)
def test_basic_operations_against_autograd(size, stride, seed):
    """conv2d, depthwise_conv2d, layer_norm and gelu have torch's gradients."""
    x, weight, shift = numbers(seed, 2, 3, *size), numbers(seed + 1, 4, 3, 3, 3), numbers(seed + 2, 4)
    options = {"stride": stride, "padding": ((1, 1), (1, 1))}
    y = basic.conv2d(x, weight, shift, **options)
    g = numbers(seed + 3, *y.shape)
    inputs = {"x": x, "weight": weight, "bias": shift}
    expected, grads = autograd(lambda x, weight, bias: functional.conv2d(x, weight, bias, stride, 1), inputs, g)
    assert_agree(y, expected, 1e-12)
    compare(affine(basic.conv2d_vjp(g, **inputs, **options)), grads)

    inputs = {"x": x, "weight": weight[:3, :1], "bias": shift[:3]}
    g = g[:, :3]
    _, grads = autograd(lambda x, weight, bias: functional.conv2d(x, weight, bias, stride, 1, groups=3), inputs, g)
    compare(affine(basic.depthwise_conv2d_vjp(g, **inputs, **options)), grads)

    inputs, g = {"x": x, "weight": shift[:3], "bias": shift[1:]}, numbers(seed + 4, *x.shape)
    _, grads = autograd(
        lambda x, weight, bias: functional.layer_norm(x.permute(0, 2, 3, 1), (3,), weight, bias).permute(0, 3, 1, 2),
        inputs,
        g,
    )
    compare(affine(basic.layer_norm_vjp(g, **inputs)), grads, 1e-10)
    _, grads = autograd(functional.gelu, {"input": x}, g)
    compare({"input": basic.gelu_vjp(g, x)}, grads)


def compare(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_agree(found[name], grad, tolerance, name)


@given(seeds)
def test_sampling_against_grid_sample_on_the_lattice(seed):
    """Values and both gradients equal grid_sample's; also on the lattice for sizes that make its arithmetic exact."""
    height, width = 5, 3  # H - 1 powers of two
    rng = np.random.default_rng(seed)
    whole = rng.integers(-1, [height + 1, width + 1], (1, 8, 2)).astype(np.float64)
    points = np.concatenate([whole, rng.uniform(-1.5, 4.5, (1, 4, 2))], axis=1)
    x, g = numbers(seed, 1, 2, height, width), numbers(seed + 1, 1, 2, 12)

    def read(x, points_px):
        sizes = points_px.new_tensor([height - 1, width - 1])
        grid = (2 * points_px / sizes - 1).flip(-1)[:, None]
        return functional.grid_sample(x, grid, align_corners=True)[:, :, 0]

    y, grads = autograd(read, {"x": x, "points_px": points}, g)
    assert_agree(bilinear_sample(x, points), y, 1e-12)
    compare(sample_vjp(g, x, points), grads)


@pytest.mark.parametrize("bias_kind", list(BiasKind), ids=lambda kind: kind.name)
@given(data=st.data())
def test_layer_against_autograd(bias_kind, data):
    """The layer's output and every gradient equal autograd through torch's own operators."""

    case = data.draw(layer_cases(biases=[bias_kind], batches=(1, 2), largest=5))
    assume(not case.config.average_pool)
    case = away_from_kinks(case, 1e-7)
    assume(case is not None)
    x, params = case.x(), case.params()
    y, trace = deformable_layer(x, params, case.config)
    cotangent = numbers(case.seed + 5, *y.shape)
    grad_x, grads = deformable_layer_vjp(cotangent, trace, params, case.config)

    def run(x, **leaves):
        return torch_layer(x, unflatten(leaves), case.config)

    expected, expected_grads = autograd(run, {"x": x, **flatten(params)}, cotangent)
    assert_agree(y, expected, 1e-10)
    compare({"x": grad_x, **flatten(grads)}, expected_grads, 1e-8)


@given(window_cases(batches=(1, 2), largest=5))
def test_windows_against_autograd(case):
    """Gradients of window attention equal autograd through dense attention with the mask of the scalar rule."""

    config, (height, width), window = case.config, case.size, case.config.window_size
    pixels = list(np.ndindex(height, width))
    extended = [-(-length // window) * window for length in case.size]

    def stands(pixel):
        return [(pixel[axis] - config.shift) % extended[axis] for axis in range(2)]

    index, hidden = np.zeros((2, len(pixels), len(pixels)), dtype=int), np.zeros((len(pixels),) * 2)
    for (m, q), (n, k) in product(enumerate(pixels), repeat=2):
        places = list(zip(stands(q), stands(k), q, k, strict=True))
        seen = all(a // window == b // window and (c < config.shift) == (d < config.shift) for a, b, c, d in places)
        hidden[m, n] = 0 if seen else -np.inf
        index[:, m, n] = [a - b + window - 1 if seen else 0 for a, b, _, _ in places]
    rows, columns = torch.from_numpy(index[0]), torch.from_numpy(index[1])

    def run(x, **leaves):
        params = unflatten(leaves)
        bias = params["window_bias"]["table"][:, rows, columns] + torch.from_numpy(hidden)
        return masked_attention(x, params, config.heads, bias)

    compare_attention(case, run)


@given(neighborhood_cases(batches=(1, 2), largest=5))
def test_neighborhoods_against_autograd(case):
    """Gradients of neighborhood attention equal autograd through dense attention on the (padded) map."""

    config, kernel = case.config, case.config.kernel_size
    small = [max(kernel - length, 0) if config.small_map == "pad" else 0 for length in case.size]
    size = [length + more for length, more in zip(case.size, small, strict=True)]
    pixels = list(np.ndindex(*size))
    index, hidden = np.zeros((2, len(pixels), len(pixels)), dtype=int), np.zeros((len(pixels),) * 2)
    for (m, q), (n, k) in product(enumerate(pixels), repeat=2):
        seen = all(k[axis] in neighbors(q[axis], size[axis], kernel) for axis in range(2))
        hidden[m, n] = 0 if seen else -np.inf
        index[:, m, n] = [k[axis] - q[axis] + kernel - 1 if seen else 0 for axis in range(2)]
    rows, columns = torch.from_numpy(index[0]), torch.from_numpy(index[1])

    def run(x, **leaves):
        params = unflatten(leaves)
        padded = functional.pad(x, (0, small[1], 0, small[0]))
        bias = params["neighborhood_bias"]["table"][:, rows, columns] + torch.from_numpy(hidden)
        return masked_attention(padded, params, config.heads, bias)[:, :, : case.size[0], : case.size[1]]

    compare_attention(case, run)


def compare_attention(case, run):
    """Compare output and gradients of an attention with a torch function of the same leaves."""
    methods, x, params = ATTENTIONS[type(case.config)], case.x(), case.params()
    y, trace = methods.forward(x, params, case.config)
    cotangent = numbers(case.seed + 5, *y.shape)
    grad_x, grads = methods.vjp(cotangent, trace, params, case.config)
    expected, expected_grads = autograd(run, {"x": x, **flatten(params)}, cotangent)
    assert_agree(y, expected, 1e-11)
    compare({"x": grad_x, **flatten(grads)}, expected_grads, 1e-10)


def test_window_rule_of_the_autograd_test_is_the_oracles():
    """The dense mask above equals the oracle's windows; the released shift is half a window, rounded up."""
    x = numbers(0, 1, 4, 5, 7)
    config = WindowAttentionConfig(4, 2, 3, shift=2)
    params = random_params(ATTENTIONS[WindowAttentionConfig].shapes(config), np.random.default_rng(0))
    table = params["window_bias"]["table"]
    theirs = {**params, "table": table.reshape(2, -1).T}
    expected = window_loops.shifted_window_attention(x, theirs, heads=2, window=3).output
    assert_agree(ATTENTIONS[WindowAttentionConfig].forward(x, params, config)[0], expected, 1e-12)
