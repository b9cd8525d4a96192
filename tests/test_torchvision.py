"""torchvision: feature pyramids, detectors and extractors on DAT, with a stand-in where it cannot be imported."""

from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")
from helpers.backbones import RELEASES, tiny  # noqa: E402
from torch import fx, nn  # noqa: E402

import dat_ref.torch as dt  # noqa: E402
from dat_ref.torch.backbone import Embed, Stage  # noqa: E402

LEAVES = {"leaf_modules": [Embed, Stage]}


class IntermediateLayerGetter(nn.ModuleDict):
    """Stand-in for torchvision's class: runs the children of a model in order, up to the last one that is returned."""

    def __init__(self, model, return_layers):
        names = [name for name, _ in model.named_children()]
        assert set(return_layers) <= set(names)
        last = max(names.index(name) for name in return_layers)
        super().__init__({name: model.get_submodule(name) for name in names[: last + 1]})
        self.return_layers = return_layers

    def forward(self, x):
        out = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out


class Tracer(fx.Tracer):
    """Tracer with leaf modules, as torchvision's ``tracer_kwargs`` makes one."""

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, tuple(LEAVES["leaf_modules"])) or super().is_leaf_module(m, module_qualified_name)


def create_feature_extractor(model, return_nodes, tracer_kwargs):
    """Stand-in for torchvision's function, for nodes that are calls of modules."""
    assert tracer_kwargs == LEAVES
    graph = Tracer().trace(model)
    nodes = {node.target: node for node in graph.nodes if node.op == "call_module"}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ({name: nodes[target] for target, name in return_nodes.items()},)
    return fx.GraphModule(model, graph)


@pytest.fixture(params=["stand-in", "torchvision"])
def vision(request):
    """Return the layer getter and the feature extractor."""
    if request.param == "stand-in":
        return IntermediateLayerGetter, create_feature_extractor
    utils = pytest.importorskip("torchvision.models._utils", exc_type=ImportError)
    extraction = pytest.importorskip("torchvision.models.feature_extraction", exc_type=ImportError)
    return utils.IntermediateLayerGetter, extraction.create_feature_extractor


@pytest.fixture(params=RELEASES)
def model(request):
    torch.manual_seed(0)
    return dt.DAT(tiny(request.param)).eval()


@pytest.mark.parametrize("size", [(97, 130), (64, 96)])
def test_layers_by_name(vision, model, size):
    layers, _ = vision
    x = torch.randn(2, 3, *size)
    maps = model.forward_intermediates(x, intermediates_only=True)
    found = layers(model.sequential(), {"stage1": "fine", "stage3": "coarse"})(x)
    assert list(found) == ["fine", "coarse"]
    assert torch.equal(found["fine"], maps[1])
    assert torch.equal(found["coarse"], maps[3])


def test_feature_extractor(vision, model):
    """The extractor agrees at the traced size and at others, in both modes, and has the gradients."""
    _, extract = vision
    extractor = extract(model, {"stages.0": "fine", "stages.3": "coarse", "head": "logits"}, tracer_kwargs=LEAVES)
    for size in [(97, 130), (64, 96)]:
        x = torch.randn(2, 3, *size)
        maps = model.forward_intermediates(x, intermediates_only=True)
        found = extractor(x)
        assert torch.equal(found["fine"], maps[0])
        assert torch.equal(found["coarse"], maps[3])
        assert torch.equal(found["logits"], model(x))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).sum(), parameters)
    names = dict(model.named_parameters())
    own = [extractor.get_parameter(name) for name in names]
    for actual, each in zip(torch.autograd.grad(extractor(x)["logits"].sum(), own), expected, strict=True):
        torch.testing.assert_close(actual, each, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"global_pool": ""}, {"global_pool": "catavgmax"}])
def test_symbolic_trace_of_every_head(options):
    model = dt.create_model("dat_nano", **options).eval()
    traced = fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(traced(x), model(x))


def test_detectors_and_segmentation():
    """One step of training and one prediction of each network of torchvision that takes feature maps."""
    vision = pytest.importorskip("torchvision", exc_type=ImportError)
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    torch.manual_seed(0)
    model = dt.create_model("dat_nano")
    channels = [entry["num_chs"] for entry in model.feature_info]
    pyramid = BackboneWithFPN(model.sequential(), {f"stage{i}": str(i) for i in range(3)}, channels, out_channels=32)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    one = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    sizes = {"num_classes": 3, "min_size": 96, "max_size": 160}
    pool = vision.ops.MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    image, target = torch.rand(3, 97, 130), {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
    for network in (
        FasterRCNN(pyramid, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes),
        RetinaNet(pyramid, anchor_generator=anchors, **sizes),
        FCOS(pyramid, anchor_generator=one, **sizes),
    ):
        network.zero_grad()
        sum(network([image], [target]).values()).backward()
        assert all(leaf.grad is not None for leaf in pyramid.body.parameters())
        assert network.eval()([image])[0]["boxes"].shape[1] == 4
    dense = DeepLabV3(IntermediateLayerGetter(model.sequential(), {"stage2": "out"}), DeepLabHead(channels[2], 5))
    assert dense.eval()(image[None])["out"].shape == (1, 5, 97, 130)
