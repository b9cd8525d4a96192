"""Arrays and lists as inputs of torch modules and functions: an error that names the argument."""

import inspect

import numpy as np
import pytest
from helpers.backbones import tiny

torch = pytest.importorskip("torch")
from helpers.torch_peers import CONFIGS  # noqa: E402

import dat_ref.torch as dt  # noqa: E402
from dat_ref import BlockConfig, Convention, DeformableAttentionConfig, ShapeError  # noqa: E402
from dat_ref.torch import functional  # noqa: E402
from dat_ref.torch._checks import check_tensors  # noqa: E402
from dat_ref.torch.block import attention_module  # noqa: E402

# Functions that check shapes in the same step need arguments that fit.
FITTING = {
    "deformable_attention": {
        "q": (1, 2, 6, 4),
        "k": (1, 2, 5, 4),
        "v": (1, 2, 5, 4),
        "points": (1, 1, 5, 2),
        "bias_table": (2, 3, 5),
        "query_size": (2, 3),
    },
    "neighborhood_attention": {"qkv": (1, 4, 5, 12), "table": (2, 5, 5)},
    "multi_scale_deformable_attention": {
        "value": (1, 6, 2, 4),
        "value_spatial_shapes": [(2, 3)],
        "sampling_locations": (1, 5, 2, 1, 3, 2),
        "attention_weights": (1, 5, 2, 1, 3),
    },
}


def tensor_arguments():
    """Return (function, argument) for each argument of the public functions that must be a tensor."""
    pairs = []
    for name in functional.__all__:
        function = getattr(functional, name)
        if name in ("AffineIndex", "Backend", "Call") or (
            inspect.isclass(function) and issubclass(function, Exception)
        ):
            continue
        parameters = inspect.signature(function).parameters.values()
        pairs += [(name, each.name) for each in parameters if str(each.annotation) in ("Tensor", "Tensor | None")]
    return pairs


def assert_refused(call, name, value, shown):
    with pytest.raises(
        ShapeError, match=rf"^{name}: expected torch\.Tensor, got {shown}; convert it with torch\.as_te"
    ):
        call(value)


@pytest.mark.parametrize(("function", "argument"), tensor_arguments())
@pytest.mark.parametrize("kind", ["array", "list"])
def test_functions_refuse_what_is_not_a_tensor(function, argument, kind):
    fitting = FITTING.get(function, {})
    call = getattr(functional, function)
    arguments = {}
    for each in inspect.signature(call).parameters.values():
        given = fitting.get(each.name, (2, 2, 2, 2))
        if str(each.annotation) in ("Tensor", "Tensor | None"):
            arguments[each.name] = torch.ones(given)
        elif each.default is inspect.Parameter.empty:
            arguments[each.name] = Convention.PAPER if each.name == "convention" else fitting.get(each.name, 2)
    array = arguments[argument].numpy()
    value, shown = (array, "numpy.ndarray") if kind == "array" else (array.tolist(), "list")
    assert_refused(lambda given: call(**{**arguments, argument: given}), argument, value, shown)


def test_the_public_functions_are_covered():
    functions = {name for name, _ in tensor_arguments()}
    assert len(functions) >= 28
    assert functions >= {"attend", "bilinear_sample", "deformable_attention", "to_pixels", "window_attention"}


def modules():
    config = DeformableAttentionConfig(dim=6, heads=3, size=(4, 5))
    return {
        "deformable": dt.DeformableAttention(config),
        "block": dt.Block(BlockConfig(config)),
        **{name: attention_module(peer) for name, peer in CONFIGS.items()},
    }


@pytest.mark.parametrize("name", modules())
def test_layers_refuse_what_is_not_a_tensor(name):
    layer = modules()[name]
    array = np.ones((1, getattr(layer.config, "dim", 6), 4, 5), np.float32)
    assert_refused(layer, "x", array, "numpy.ndarray")
    assert_refused(lambda x: layer(x, return_trace=True), "x", array, "numpy.ndarray")
    assert_refused(layer, "x", array.tolist(), "list")


def test_backbones_refuse_what_is_not_a_tensor():
    model, images = dt.DAT(tiny("cvpr2022")), np.ones((1, 3, 64, 96), np.float32)
    for call in (model, model.forward_features, model.forward_intermediates, model.forward_head):
        assert_refused(call, "x", images, "numpy.ndarray")
    assert_refused(lambda x: model(x, return_trace=True), "x", images, "numpy.ndarray")
    features = dt.DATFeatures(tiny("cvpr2022"))
    features.keep_stages((0, 1))
    assert_refused(features, "x", images, "numpy.ndarray")


def test_proxies_of_symbolic_tracing_pass():
    graph = torch.fx.symbolic_trace(lambda x: functional.split_windows(x, 2)[0])
    x = torch.randn(1, 4, 12)
    assert torch.equal(graph(x), functional.split_windows(x, 2)[0])
    check_tensors(x=torch.nn.Parameter(x), none=None)
