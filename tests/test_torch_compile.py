"""`torch.compile` captures every model as one graph, and with symbolic sizes one graph serves many sizes."""

import logging
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from helpers.backbones import RELEASES, tiny  # noqa: E402
from torch import nn  # noqa: E402

import dat_ref  # noqa: E402
import dat_ref.torch as dt  # noqa: E402
from dat_ref import (  # noqa: E402
    Convention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    WindowAttentionConfig,
)

# Compilation runs third-party code that may warn.
pytestmark = pytest.mark.filterwarnings("default", "ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")
ROUNDING = 1e-5  # relative to the largest output
TINY = ("dat_tiny", "dat_pp_tiny")
symbolic = pytest.mark.skipif(torch.__version__ < "2.8", reason="before torch 2.8 a graph holds for one branch")


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Clear the compiled graphs before and after each test."""
    # Otherwise pytest records the compiler's log of every step, which takes longer than compilation.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """Compiler backend that runs captured graphs unchanged and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def assert_same(actual, expected):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= ROUNDING, f"differs by {error:.1e} of the largest output"


def layers() -> dict[str, nn.Module]:
    """Return one layer of each kind, over maps of 12 channels."""
    found: dict[str, nn.Module] = {
        "window": dt.WindowAttention(WindowAttentionConfig(dim=12, heads=3, window_size=4)),
        "shifted": dt.WindowAttention(WindowAttentionConfig(dim=12, heads=3, window_size=4, shift=2)),
        "shrinking": dt.NeighborhoodAttention(NeighborhoodAttentionConfig(dim=12, heads=3, kernel_size=3)),
        "padding": dt.NeighborhoodAttention(
            NeighborhoodAttentionConfig(dim=12, heads=3, kernel_size=3, small_map="pad")
        ),
    }
    return found | {each.name: deformable(each) for each in Convention}


def deformable(convention: Convention, **changes) -> dt.DeformableAttention:
    config = {"dim": 12, "heads": 4, "groups": 2, "stride": 2, "size": (6, 9)}
    layer = DeformableAttentionConfig(**config, convention=convention, **changes)
    return dt.DeformableAttention(layer, init="released")


# ------------------------------------------------------------------------------------------------ one size


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", dt.list_models())
def test_preset_is_one_graph(name, whole):
    """``fullgraph=True`` raises at a graph break. Equal blocks of a stage have one graph: the short test keeps one."""
    config = dat_ref.config(name, num_classes=5)
    if not whole:
        config = replace(config, stages=tuple(tuple(dict.fromkeys(blocks)) for blocks in config.stages))
    model = dt.DAT(config).eval()
    x = torch.randn(1, 3, 64, 96)
    counter = Counter()
    with torch.no_grad():
        actual = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)(x)
        assert_same(actual, model(x))
    assert counter.graphs == 1


@pytest.mark.parametrize("backend", ["matmul", "blockwise", "eager"])
@pytest.mark.parametrize("sampler", ["gather", "grid_sample"])
def test_every_backend_is_one_graph(backend, sampler):
    config = DeformableAttentionConfig(dim=12, heads=4, groups=2, size=(6, 9))
    layer = dt.DeformableAttention(config, backend=backend, sampler=sampler).eval()
    x = torch.randn(2, 12, 6, 9)
    assert_same(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_a_graph_break_is_detected():
    class Broken(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Broken(), fullgraph=True, backend="eager")(torch.ones(1))


@pytest.mark.parametrize("name", ["DATPP2023", "shrinking"])
def test_compiled_gradients_are_the_eager_ones(name):
    layer = layers()[name]
    x = torch.randn(2, 12, 6, 9, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(x).square().sum(), inputs)
    # One scale for all gradients, because some, such as that of the keys' bias, are zero up to rounding.
    scale = max(each.abs().max() for each in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() <= ROUNDING * scale


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_inductor_agrees(release):
    """The default backend, which generates code for every operation, agrees with eager execution."""
    model = dt.DAT(tiny(release)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True, dynamic=False)(x), model(x))


# ------------------------------------------------------------------------------------------------ many sizes

SIZES = [(2, 16, 24), (3, 13, 17), (2, 33, 20), (5, 12, 21)]


@symbolic
@pytest.mark.parametrize("name", list(layers()))
def test_one_graph_serves_every_size(name):
    """One graph serves sizes that are multiples of windows, tiles and key cells, and sizes that are not."""
    layer, counter = layers()[name].eval(), Counter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, height, width in SIZES:
            x = torch.randn(batch, 12, height, width)
            assert_same(compiled(x), layer(x))
    assert counter.graphs == 1


@symbolic
@pytest.mark.parametrize("name", [pytest.param("window", marks=pytest.mark.slow), "CVPR2022"])
def test_one_traced_graph_serves_every_size(name):
    """The same with AOTAutograd, which adds its own guards."""
    layer = layers()[name].eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in SIZES:
            x = torch.randn(batch, 12, height, width)
            assert_same(compiled(x), layer(x))


@symbolic
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_one_graph_of_a_backbone_serves_every_size(release):
    model, counter = dt.DAT(tiny(release)).eval(), Counter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, height, width in [(2, 130, 197), (3, 224, 160), (2, 97, 130)]:
            x = torch.randn(batch, 3, height, width)
            assert_same(compiled(x), model(x))
    assert counter.graphs == 1


@symbolic
@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_one_graph_of_a_preset_serves_every_size(name):
    """One graph serves all maps larger than a window; a single window or pixel needs a separate graph."""
    model, counter = dt.create_model(name, num_classes=5).eval(), Counter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, height, width in [(2, 240, 288), (3, 257, 300)]:
            x = torch.randn(batch, 3, height, width)
            assert_same(compiled(x), model(x))
    assert counter.graphs == 1
