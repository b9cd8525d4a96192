"""Tracing: `torch.jit.trace`, the older ONNX exporter that uses it, and `torch.fx`."""

import io
import warnings

import pytest

torch = pytest.importorskip("torch")
from helpers.backbones import RELEASES, tiny  # noqa: E402
from torch import fx, nn  # noqa: E402

import dat_ref.torch as dt  # noqa: E402
from dat_ref import NeighborhoodAttentionConfig, WindowAttentionConfig  # noqa: E402
from dat_ref.peers import (  # noqa: E402
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
)
from dat_ref.torch.block import attention_module  # noqa: E402
from dat_ref.torch.functional import attention as core  # noqa: E402

# A trace holds for one size. torch says so for every Python number that follows from a size, and has deprecated the
# tracer in favor of `torch.export`.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Constant folding:UserWarning"),
]
ROUNDING = 1e-5  # relative to the largest output
SIZE = (13, 17)


def deformable(**options):
    return dt.DeformableAttention(**{"dim": 12, "heads": 4, "groups": 2, "stride": 2, **options})


ATTENTIONS = {
    "table": lambda: deformable(size=(6, 9)),
    "depthwise": deformable,
    "log_cpb": lambda: deformable(bias="log_cpb"),
    "fixed": lambda: deformable(bias="fixed", size=SIZE),
    "DATPP2023": lambda: deformable(convention="datpp2023", offset_bound="clamp", size=(6, 9)),
    "no offsets": lambda: deformable(offset_bound="none", bias="none"),
    **{
        type(config).__name__ + suffix: lambda config=config: attention_module(config)
        for suffix, config in [
            ("", WindowAttentionConfig(12, 3, window_size=4, shift=2)),
            (" shrink", NeighborhoodAttentionConfig(12, 3, kernel_size=3)),
            (" pad", NeighborhoodAttentionConfig(12, 3, kernel_size=3, small_map="pad")),
            (" dilated", NeighborhoodAttentionConfig(12, 3, kernel_size=3, dilation=2)),
            ("", MultiHeadAttentionConfig(12, 3, size=SIZE)),
            ("", PyramidAttentionConfig(12, 3, 2)),
            ("", DeformableConvConfig(12)),
            ("", MultiScaleDeformableConfig(12, 3)),
            ("", PerQueryAttentionConfig(12, 3)),
            ("", DATDCNAttentionConfig(12, 3)),
        ]
    },
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_same(actual, expected):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= ROUNDING, f"differs by {error:.1e} of the largest output"


# ------------------------------------------------------------------------------------------------ torch.jit.trace


def assert_traced(module, channels, size):
    """Trace on one map; compare on another one, and after a round trip through a file. Return the operators."""
    traced = torch.jit.trace(module, (torch.randn(2, channels, *size),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = torch.randn(2, channels, *size)
    assert_same(traced(x), module(x))
    assert_same(torch.jit.load(file)(x), module(x))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any(kind.startswith("dat_ref::") for kind in kinds)  # plain operations: it runs without this package


@pytest.mark.parametrize("name", ATTENTIONS)
def test_traced_attention_agrees_on_other_maps(name):
    assert_traced(ATTENTIONS[name]().eval(), 12, SIZE)


@pytest.mark.parametrize("release", RELEASES)
def test_traced_backbone_agrees_on_other_images(release):
    assert_traced(dt.DAT(tiny(release)).eval(), 3, (67, 98))


def test_traced_layer_computes_rows_in_chunks(monkeypatch):
    """A map too large for one block of logits is traced as several."""
    monkeypatch.setitem(core._MAX_LOGITS, "cpu", 4000)
    assert_traced(deformable(size=(6, 9)).eval(), 12, SIZE)


def test_traced_layer_has_the_layers_gradients():
    layer = deformable(size=(6, 9)).eval()
    traced = torch.jit.trace(layer, (torch.randn(2, 12, *SIZE),))
    x, cotangent = torch.randn(2, 12, *SIZE, requires_grad=True), torch.randn(2, 12, *SIZE)
    parameters = dict(layer.named_parameters())
    expected = torch.autograd.grad(layer(x), [x, *parameters.values()], cotangent)
    scale = max(each.abs().max() for each in expected)
    for name, actual, each in zip(
        ["x", *parameters], torch.autograd.grad(traced(x), [x, *parameters.values()], cotangent), expected, strict=True
    ):
        assert (actual - each).abs().max() <= ROUNDING * scale, name


def test_a_requested_kernel_gives_way_with_a_warning():
    layer = deformable(size=(6, 9), backend="blockwise").eval()
    x = torch.randn(2, 12, *SIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(layer, (x,))
    reasons = [str(each.message) for each in caught if isinstance(each.message, dt.functional.BackendWarning)]
    assert all("an exported or traced program has plain operations only" in each for each in reasons)
    assert_same(traced(x), layer(x))


# ------------------------------------------------------------------------------------------------ older ONNX exporter


@pytest.mark.parametrize("name", ["table", "depthwise", "DATPP2023", "NeighborhoodAttentionConfig pad", *RELEASES])
def test_onnx_from_a_trace_agrees(name):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    backbone = name in RELEASES
    module = (dt.DAT(tiny(name)) if backbone else ATTENTIONS[name]()).eval()
    shape = (2, 3, 67, 98) if backbone else (2, 12, *SIZE)
    file = io.BytesIO()
    torch.onnx.export(module, (torch.randn(shape),), file, dynamo=False, opset_version=17)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = torch.randn(shape)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(y), module(x))


# ------------------------------------------------------------------------------------------------ torch.fx


class Net(nn.Module):
    """A network with a deformable-attention layer between convolutions."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 3, padding=1)
        self.attend = deformable()
        self.leave = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.leave(torch.relu(self.attend(self.enter(x))))


class WithLeaves(fx.Tracer):
    """Tracer with leaf modules, as torchvision's ``tracer_kwargs={"leaf_modules": [...]}`` makes one."""

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, dt.DeformableAttention) or super().is_leaf_module(m, module_qualified_name)


def test_symbolic_tracing_needs_the_layer_as_a_leaf():
    net = Net().eval()
    with pytest.raises((fx.proxy.TraceError, TypeError)):
        fx.symbolic_trace(net)
    traced = fx.GraphModule(net, WithLeaves().trace(net))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["enter", "attend", "leave"]
    for size in [(13, 17), (8, 5)]:
        x = torch.randn(2, 3, *size)
        assert_same(traced(x), net(x))


def test_a_leaf_is_a_node_whose_map_can_be_returned():
    """The map after the layer, as `create_feature_extractor` returns it."""
    net = Net().eval()
    traced = fx.GraphModule(net, WithLeaves().trace(net))
    graph = traced.graph
    node = next(each for each in graph.nodes if each.target == "attend")
    output = next(each for each in graph.nodes if each.op == "output")
    output.args = (node,)
    graph.eliminate_dead_code()
    traced.recompile()
    x = torch.randn(2, 3, *SIZE)
    assert_same(traced(x), net.attend(net.enter(x)))
