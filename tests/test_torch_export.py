"""Export: `torch.export`, ONNX, and the operators and memory layouts that devices require."""

import io
import shutil

import pytest

torch = pytest.importorskip("torch")
from helpers.backbones import RELEASES, tiny  # noqa: E402
from torch.export import Dim, export  # noqa: E402

import dat_ref.torch as dt  # noqa: E402
from dat_ref import (  # noqa: E402
    BiasKind,
    Convention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    WindowAttentionConfig,
)
from dat_ref.peers import MultiHeadAttentionConfig  # noqa: E402
from dat_ref.torch.peers import MultiHeadAttention  # noqa: E402

# Export runs third-party code that may warn. torch's own use of a deprecated class is not reported.
pytestmark = pytest.mark.filterwarnings("default", "ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")
ROUNDING = 1e-5  # relative to the largest output
ANY_SIZE = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
symbolic = pytest.mark.skipif(torch.__version__ < "2.8", reason="strict export, the default, specializes before 2.8")
SIZES = [(2, 16, 24), (3, 13, 17), (2, 33, 20)]  # the first one is exported


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def slow(names, *some):
    """Return parameters of a test, of which some are left to `make deep`."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in some)) for name in names]


def assert_same(actual, expected):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= ROUNDING, f"differs by {error:.1e} of the largest output"


def deformable(convention=Convention.CELL_CENTER, **options):
    config = DeformableAttentionConfig(dim=12, heads=4, groups=2, stride=2, size=(6, 9), convention=convention)
    return dt.DeformableAttention(config, init="released", **options).eval()


LAYERS = {
    "window": lambda: dt.WindowAttention(WindowAttentionConfig(dim=12, heads=3, window_size=4, shift=2)),
    "shrinking": lambda: dt.NeighborhoodAttention(NeighborhoodAttentionConfig(dim=12, heads=3, kernel_size=3)),
    "padding": lambda: dt.NeighborhoodAttention(
        NeighborhoodAttentionConfig(dim=12, heads=3, kernel_size=3, small_map="pad")
    ),
    "CELL_CENTER": deformable,
    "DATPP2023": lambda: deformable(Convention.DATPP2023),
}


def biased(kind):
    config = DeformableAttentionConfig(dim=12, heads=4, groups=2, stride=2, size=(16, 24), bias=kind)
    return dt.DeformableAttention(config, init="released").eval()


# Every other attention whose mask is learned, for maps of 16 × 24.
MASKED = {
    "fixed": lambda: biased(BiasKind.FIXED),
    "log_cpb": lambda: biased(BiasKind.LOG_CPB),
    "mhsa": lambda: MultiHeadAttention(MultiHeadAttentionConfig(dim=12, heads=3, size=(16, 24))).eval(),
}

# ------------------------------------------------------------------------------------------------ torch.export


@pytest.fixture(scope="module", params=RELEASES)
def backbone(request):
    """Return a small backbone, an image of its size and the exported program."""
    model = dt.DAT(tiny(request.param)).eval()
    x = torch.randn(2, 3, 67, 98)
    return model, x, export(model, (x,))


def test_exported_backbone_agrees_and_survives_a_file(backbone):
    model, x, program = backbone
    assert_same(program.module()(x), model(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(x), model(x))


@symbolic
@pytest.mark.parametrize("name", slow(LAYERS, "padding", "DATPP2023"))
def test_exported_layer_takes_any_size(name):
    layer = LAYERS[name]().eval()
    batch, height, width = SIZES[0]
    exported = export(layer, (torch.randn(batch, 12, height, width),), dynamic_shapes=ANY_SIZE).module()
    for batch, height, width in SIZES:
        x = torch.randn(batch, 12, height, width)
        assert_same(exported(x), layer(x))


@pytest.mark.parametrize("name", ["window", "padding", "CELL_CENTER", *MASKED])
def test_exported_layer_has_the_layers_gradients(name):
    """Gradients of the input and of every parameter, including the learned mask."""
    if name == "mhsa" and torch.__version__ < "2.8":
        pytest.skip("strict export before torch 2.8 cannot trace the conventions of this peer")
    layer = (LAYERS | MASKED)[name]().eval()
    x = torch.randn(2, 12, 16, 24)
    exported = export(layer, (x,)).module()
    cotangent = torch.randn(2, 12, 16, 24)
    grads = []
    for module in (exported, layer):
        leaf, parameters = x.clone().requires_grad_(), dict(module.named_parameters())
        names = sorted(parameters)
        outputs = torch.autograd.grad(module(leaf), [leaf, *(parameters[each] for each in names)], cotangent)
        grads.append(dict(zip(["x", *names], outputs, strict=True)))
    assert grads[0].keys() == grads[1].keys()
    # One scale for all: some gradients, for example that of the key bias, are zero except for rounding.
    scale = max(grad.abs().max() for grad in grads[1].values())
    for each, grad in grads[1].items():
        assert (grads[0][each] - grad).abs().max() <= ROUNDING * scale, each


@symbolic
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_exported_backbone_takes_any_size(release):
    """The exported program accepts maps larger than a window and rejects smaller ones."""
    model = dt.DAT(tiny(release)).eval()
    exported = export(model, (torch.randn(2, 3, 130, 197),), dynamic_shapes=ANY_SIZE).module()
    for size in [(2, 3, 130, 197), (3, 3, 224, 160), (1, 3, 97, 130)]:
        x = torch.randn(size)
        assert_same(exported(x), model(x))
    with pytest.raises(AssertionError, match="Guard failed"):
        exported(torch.randn(2, 3, 32, 32))


@pytest.mark.slow  # a C++ compiler takes about a minute for each program
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ["layer", "any size", "cvpr2022"])
def test_ahead_of_time_compilation_agrees(name, tmp_path):
    """AOTInductor: a shared library from an exported program."""
    if name in RELEASES:
        model, x = dt.DAT(tiny(name)).eval(), torch.randn(2, 3, 67, 98)
    else:
        model, x = deformable(), torch.randn(2, 12, 16, 24)
    with torch.no_grad():
        program = export(model, (x,), dynamic_shapes=ANY_SIZE if name == "any size" else None)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        assert_same(compiled(x), model(x))
        if name == "any size":
            x = torch.randn(3, 12, 13, 17)
            assert_same(compiled(x), model(x))


# ------------------------------------------------------------------------------------------------ ONNX


def onnx_session(model, x, dynamic_shapes=None):
    """Export with torch's default exporter; return a function of an image and the names of the operators."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes)
    proto = program.model_proto
    onnx.checker.check_model(proto)
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    operators = {node.op_type for node in proto.graph.node}
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0]), operators


@pytest.mark.parametrize(
    ("sampler", "backend"), [("gather", "auto"), ("grid_sample", "auto"), ("grid_sample", "eager"), ("gather", "eager")]
)
def test_onnx_layer_agrees(sampler, backend):
    """The default graph contains no GridSample, which older opsets and some runtimes lack."""
    layer = deformable(sampler=sampler, backend=backend)
    x = torch.randn(2, 12, 16, 24)
    run, operators = onnx_session(layer, x)
    assert_same(run(x), layer(x))
    assert ("GridSample" in operators) == ((sampler, backend) != ("gather", "auto"))


@pytest.mark.slow  # 10 to 30 seconds each
@pytest.mark.parametrize("name", LAYERS)
def test_onnx_layer_takes_any_size(name):
    layer = LAYERS[name]().eval()
    batch, height, width = SIZES[0]
    run, _ = onnx_session(layer, torch.randn(batch, 12, height, width), ANY_SIZE)
    for batch, height, width in SIZES:
        x = torch.randn(batch, 12, height, width)
        assert_same(run(x), layer(x))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MASKED)
def test_onnx_layer_with_a_learned_mask_agrees(name, gradients):
    """With gradients and without: torch then takes another kernel for the attention."""
    layer = MASKED[name]()
    x = torch.randn(2, 12, 16, 24)
    with torch.set_grad_enabled(gradients):
        run, _ = onnx_session(layer, x)
    assert_same(run(x), layer(x))


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("release", RELEASES)
def test_onnx_backbone_agrees(release):
    model = dt.DAT(tiny(release)).eval()
    x = torch.randn(2, 3, 67, 98)
    run, _ = onnx_session(model, x)
    assert_same(run(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
def test_onnx_preset_agrees(name):
    model = dt.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    run, _ = onnx_session(model, x)
    assert_same(run(x), model(x))


# ------------------------------------------------------------------------------------------------ devices and layouts

# Plain operators of every backend of PyTorch, including MPS. Excluded: grid_sampler (MPS lacks some of its modes, ONNX
# lacks it before opset 16), data-dependent shapes, sorting, complex numbers.
# fmt: off
PLAIN = {
    "__and__", "__or__", "_assert_tensor_metadata", "add", "alias", "arange", "bitwise_not", "bmm", "cat",
    "clamp", "clone", "contiguous", "conv2d", "detach", "div", "dropout", "embedding", "eq", "expand",
    "flatten", "floor", "floor_divide", "full", "ge", "gelu", "getitem", "index_select", "layer_norm", "linear",
    "log2", "lt", "masked_fill", "matmul", "mean", "minimum", "movedim", "mul", "nan_to_num", "neg", "pad",
    "permute", "promote_types", "relu", "remainder", "repeat", "reshape", "roll", "rsub",
    "scaled_dot_product_attention", "scatter", "select", "slice", "softmax", "split", "split_with_sizes", "stack",
    "sub", "tanh", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "where", "zeros",
}
# fmt: on


def operators_and_dtypes(program):
    """Return the operators of an exported program, by name without overloads, and their dtypes."""
    names, dtypes = set(), set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        names.add(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "").split(".")[0])
        values = node.meta.get("val")
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, torch.Tensor):
                dtypes.add(value.dtype)
    return names, dtypes


def test_only_plain_operators_and_no_float64(backbone):
    _, _, program = backbone
    names, dtypes = operators_and_dtypes(program)
    assert names - PLAIN == set()
    assert dtypes <= {torch.float32, torch.int64, torch.bool}


def test_an_operator_that_is_not_plain_is_detected():
    names, _ = operators_and_dtypes(export(deformable(sampler="grid_sample"), (torch.randn(2, 12, 16, 24),)))
    assert names - PLAIN == {"grid_sampler"}
    _, dtypes = operators_and_dtypes(export(deformable().double(), (torch.randn(2, 12, 16, 24).double(),)))
    assert torch.float64 in dtypes


@pytest.mark.parametrize("release", RELEASES)
def test_channels_last_gives_the_same(release):
    """The channels_last memory format gives the same results."""
    model = dt.DAT(tiny(release)).eval()
    x = torch.randn(2, 3, 67, 98)
    expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
    model = model.to(memory_format=torch.channels_last)
    rows = x.to(memory_format=torch.channels_last)
    assert_same(model(rows), expected)
    for ours, theirs in zip(model.forward_intermediates(rows, intermediates_only=True), maps, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_channels_last_stays_channels_last(name):
    layer = LAYERS[name]().eval()
    x = torch.randn(2, 12, 13, 17)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(y, layer(x))
