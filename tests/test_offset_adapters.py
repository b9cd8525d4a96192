"""Offsets of layers of other kinds and packages, and the log of a training run: points by hand, verdicts, hooks."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from dat_ref import DeformableAttentionConfig  # noqa: E402
from dat_ref._checks import ConfigError  # noqa: E402
from dat_ref.peers.dat_dcn import DATDCNAttentionConfig  # noqa: E402
from dat_ref.peers.deform_conv import DeformableConvConfig  # noqa: E402
from dat_ref.peers.ms_deform_attn import MultiScaleDeformableConfig  # noqa: E402
from dat_ref.peers.per_query import PerQueryAttentionConfig  # noqa: E402
from dat_ref.torch import DeformableAttention, OffsetLog, create_model, functional, offset_report  # noqa: E402
from dat_ref.torch.offset_adapters import offset_layers  # noqa: E402
from dat_ref.torch.peers import (  # noqa: E402
    DATDCNAttention,
    DeformableConv,
    MultiScaleDeformableAttention,
    PerQueryAttention,
)

SIZE, KERNEL, GROUPS = (12, 16), (3, 5), 2


class DeformConv2d(nn.Module):
    """Module with the attributes and the call of torchvision's, for an environment without it."""

    def __init__(self, channels, stride=(1, 1), padding=(1, 2), dilation=(1, 1)):
        super().__init__()
        self.stride, self.padding, self.dilation, self.kernel_size = stride, padding, dilation, KERNEL
        self.weight = nn.Parameter(torch.ones(channels, channels, *KERNEL))

    def forward(self, input, offset, mask=None):  # noqa: A002 - torchvision's name
        geometry = (self.stride, self.padding, self.dilation)
        return functional.deform_conv2d(input, offset, self.weight, None, *geometry, mask=mask)


class ConvNet(nn.Module):
    """Deformable convolution with given offsets (N, GROUPS · taps · 2, H', W'), batch after batch, and a head."""

    def __init__(self, convolution, offsets):
        super().__init__()
        self.convolution, self.offsets, self.start = convolution, offsets, 0

    def forward(self, x):
        offset = self.offsets[self.start : self.start + len(x)]
        self.start = (self.start + len(x)) % len(self.offsets)
        return self.convolution(x, offset=offset).mean((2, 3))


class MSDeformAttn(nn.Module):
    """Module with the attributes and the call of Deformable DETR's; it computes offsets and nothing else."""

    def __init__(self, dim=8, heads=2, levels=2, points=3):
        super().__init__()
        self.n_heads, self.n_levels, self.n_points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)

    def forward(self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index):
        return self.sampling_offsets(query)


class Detector(nn.Module):
    """Multi-scale attention with two levels, whose queries are the pixels of the first."""

    LEVELS = ((6, 8), (3, 4))

    def __init__(self, boxes=False):
        super().__init__()
        self.attention, self.boxes = MSDeformAttn(), boxes

    def forward(self, x):
        query = x.flatten(2).transpose(1, 2)
        rows, columns = ((torch.arange(length) + 0.5) / length for length in self.LEVELS[0])
        centers = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).view(1, -1, 1, 2)
        references = centers.expand(len(x), -1, 2, -1)
        if self.boxes:
            references = torch.cat([references, torch.full_like(references, 0.5)], -1)
        shapes = torch.tensor(self.LEVELS)
        return self.attention(query, references, query, shapes, input_level_start_index=torch.tensor([0, 48]))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found_in(model, images, **options):
    (layer,) = offset_report(model, images, **options).layers
    return layer, [finding.name for finding in layer.findings]


CHANNELS = GROUPS * math.prod(KERNEL) * 2
CONV_ILLNESSES = {
    "not finite": torch.full((6, CHANNELS, *SIZE), torch.nan),
    "does nothing": 0.01 * random(6, CHANNELS, *SIZE),
    "outside the map": 100 * random(6, CHANNELS, *SIZE),
    "one shift": random(1, CHANNELS, 1, 1).expand(6, CHANNELS, *SIZE) + 0.01 * random(6, CHANNELS, *SIZE, seed=1),
    "fixed pattern": random(1, CHANNELS, *SIZE).expand(6, CHANNELS, *SIZE) + 0.01 * random(6, CHANNELS, *SIZE, seed=1),
    "healthy": random(6, CHANNELS, *SIZE),
}


@pytest.mark.parametrize("illness", CONV_ILLNESSES)
def test_deformable_convolution_gets_its_verdict(illness):
    model = ConvNet(DeformConv2d(4), CONV_ILLNESSES[illness])
    layer, names = found_in(model, random(6, 4, *SIZE), batch_size=3)
    assert (layer.name, layer.kind, names) == ("convolution", "deformable convolution", [illness])
    for finding in layer.findings:
        assert not any(word in finding.text for word in ("None", "zero_offset", "kernel_size", "offset_range"))


def test_taps_of_a_convolution_equal_loops_by_hand():
    """Points from stride, padding and dilation; a tap that the padding puts outside does not count as moved there."""
    stride, padding, dilation, output = (2, 3), (2, 1), (2, 1), (6, 5)
    offsets = 4 * random(2, CHANNELS, *output, seed=3)
    model = ConvNet(DeformConv2d(4, stride, padding, dilation), offsets)
    assert model(random(2, 4, *SIZE)).shape == (2, 4)
    layer, _ = found_in(model, random(2, 4, *SIZE))
    lengths, outside = [], []
    for image in offsets.double().view(2, GROUPS, *KERNEL, 2, *output).numpy():
        for group in image:
            for i, j in ((i, j) for i in range(KERNEL[0]) for j in range(KERNEL[1])):
                for row in range(output[0]):
                    for column in range(output[1]):
                        dy, dx = group[i, j, :, row, column]
                        y, x = row * 2 - 2 + i * 2, column * 3 - 1 + j
                        lengths.append(math.hypot(dy, dx))
                        away = [not (-1 < a < SIZE[0] and -1 < b < SIZE[1]) for a, b in ((y, x), (y + dy, x + dx))]
                        outside.append(away == [False, True])
    assert layer.mean == pytest.approx(sum(lengths) / len(lengths))
    assert layer.max == pytest.approx(max(lengths))
    assert layer.outside == pytest.approx(sum(outside) / len(outside))
    assert 0.1 < layer.outside < 0.9
    assert (layer.size, layer.key_size, layer.stride, layer.coverage) == (SIZE, output, None, None)


def test_offsets_of_a_convolution_are_replaced():
    """Accuracies with other offsets equal the accuracies of convolutions that get these offsets."""
    torch.manual_seed(0)
    offsets = 2 * random(8, CHANNELS, *SIZE, seed=1)
    model, images = ConvNet(DeformConv2d(4), offsets), random(8, 4, *SIZE, seed=2)
    nn.init.normal_(model.convolution.weight)
    labels = model(images).argmax(1)
    plain = ConvNet(model.convolution, torch.zeros_like(offsets))(images).argmax(1)
    other = ConvNet(model.convolution, offsets.roll(1, 0))(images).argmax(1)
    report = offset_report(model, images, labels)
    expected = {"own": 1.0, "zero": float((plain == labels).double().mean())}
    expected["other"] = float((other == labels).double().mean())
    assert {kind: report.accuracies[kind] for kind in expected} == pytest.approx(expected)
    assert expected["zero"] < 1
    assert expected["other"] < 1


def test_convolutions_of_the_peers_are_found():
    layer = DeformableConv(DeformableConvConfig(dim=8, offset_groups=2))
    assert list(offset_layers(layer)) == ["convolution"]
    assert found_in(layer, random(3, 8, *SIZE))[1] == ["does nothing"]  # offsets are initialized with zero
    nn.init.normal_(layer.offset.weight, std=0.1)
    found, names = found_in(layer, random(3, 8, *SIZE))
    assert names == ["healthy"]
    _, trace = layer(random(3, 8, *SIZE), return_trace=True)
    lengths = trace.offset.detach().double().unflatten(1, (-1, 2)).square().sum(2).sqrt()
    assert found.mean == pytest.approx(float(lengths.mean()))


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        ("deform_conv", "deformable convolution"),
        ("ms_deform", "multi-scale deformable attention"),
        ("per_query", "attention with keys of each query"),
        ("dat_dcn", "DAT-DCN attention"),
    ],
)
def test_backbones_with_a_peer_in_the_place_of_deformable_attention(attention, kind):
    """The measures are those of each layer, and all offsets are replaced together."""
    torch.manual_seed(0)
    model = create_model("dat_nano", num_classes=4, attention=attention)
    images = random(4, 3, 64, 64)
    labels = model.eval()(images).argmax(1)
    report = offset_report(model, images, labels, batch_size=2)
    assert [layer.kind for layer in report.layers] == [kind] * 3
    assert [layer.size for layer in report.layers] == [(8, 8), (8, 8), (4, 4)]
    assert set(report.accuracies) == {"own", "zero", "shift", "other"}
    assert report.accuracies["own"] == 1
    assert " -  " in str(report).splitlines()[3]  # neither stride nor coverage


# ------------------------------------------------------------------------------------------------ multi-scale


def set_offsets(linear, weight, bias):
    with torch.no_grad():
        nn.init.normal_(linear.weight, std=weight) if weight else nn.init.zeros_(linear.weight)
        nn.init.normal_(linear.bias, std=bias) if bias else nn.init.zeros_(linear.bias)


MULTI_SCALE_ILLNESSES = {
    "does nothing": (0.001, 0.001),
    "outside the map": (100.0, 0.0),
    "one shift": (0.0, 1.0),
    "healthy": (0.2, 0.1),
}


@pytest.mark.parametrize("illness", MULTI_SCALE_ILLNESSES)
@pytest.mark.parametrize("own", [False, True])
def test_multi_scale_attention_gets_its_verdict(illness, own):
    torch.manual_seed(0)
    model = MultiScaleDeformableAttention(MultiScaleDeformableConfig(dim=8, heads=2)) if own else Detector()
    set_offsets(model.offset if own else model.attention.sampling_offsets, *MULTI_SCALE_ILLNESSES[illness])
    layer, names = found_in(model, random(6, 8, 6, 8, seed=4), batch_size=3)
    assert (layer.kind, names) == ("multi-scale deformable attention", [illness])


def test_fixed_pattern_of_queries():
    """Queries that depend on the position only have a fixed pattern of offsets."""
    torch.manual_seed(0)
    model, images = Detector(), random(1, 8, 6, 8, seed=4).expand(4, -1, -1, -1) + 0.01 * random(4, 8, 6, 8)
    set_offsets(model.attention.sampling_offsets, 0.2, 0.0)
    assert found_in(model, images)[1] == ["fixed pattern"]


@pytest.mark.parametrize("boxes", [False, True])
def test_points_of_multi_scale_attention_equal_loops_by_hand(boxes):
    torch.manual_seed(0)
    model, images = Detector(boxes), random(2, 8, 6, 8, seed=5)
    set_offsets(model.attention.sampling_offsets, 0.5, 1.0)
    raw = model(images).detach().double().view(2, 48, 2, 2, 3, 2).numpy()
    layer, _ = found_in(model, images)
    lengths, outside = [], []
    for image in raw:
        for query in range(48):
            center = ((query % 8 + 0.5) / 8, (query // 8 + 0.5) / 6)  # (x, y)
            for head in range(2):
                for level, (height, width) in enumerate(Detector.LEVELS):
                    for dx, dy in image[query, head, level]:
                        if boxes:  # half a side of the box, which is half a map, for an offset of 3 points
                            dx, dy = dx / 3 * 0.25 * width, dy / 3 * 0.25 * height
                        x, y = center[0] * width - 0.5 + dx, center[1] * height - 0.5 + dy
                        lengths.append(math.hypot(dx, dy))
                        outside.append(not (-1 < x < width and -1 < y < height))
    assert layer.mean == pytest.approx(sum(lengths) / len(lengths))
    assert layer.outside == pytest.approx(sum(outside) / len(outside))
    assert 0 < layer.outside < 1


def points_of(layer, images):
    """Return the points of a call, and the points in the layer's trace."""
    found, (adapter,) = [], offset_layers(layer).values()
    with torch.no_grad(), adapter.intercepted(lambda raw, call: found.append(adapter.points(raw, call))):
        _, trace = layer(images, return_trace=True)
    return found[0], trace.points_px.double()


def test_points_of_our_layers_are_those_of_their_traces():
    """Multi-scale attention, DAT-DCN, keys of each query; offsets are measured from the points with zero offsets."""
    torch.manual_seed(0)
    images = random(2, 8, *SIZE)
    layer = MultiScaleDeformableAttention(MultiScaleDeformableConfig(dim=8, heads=2))
    set_offsets(layer.offset, 0.5, 1.0)
    found, expected = points_of(layer, images)
    torch.testing.assert_close(found.points, expected.flatten(2, 4).transpose(1, 2)[:, :, :, None], rtol=0, atol=1e-5)
    layer = DATDCNAttention(DATDCNAttentionConfig(dim=8, heads=2))
    set_offsets(layer.offset, 0.1, 0.1)
    found, expected = points_of(layer, images)
    torch.testing.assert_close(found.points, expected.flatten(2, 4).transpose(1, 2)[:, :, :, None], rtol=0, atol=1e-5)
    set_offsets(layer.offset, 0, 0)
    torch.testing.assert_close(found.points - found.moved, points_of(layer, images)[0].points, rtol=0, atol=1e-5)
    layer = PerQueryAttention(PerQueryAttentionConfig(dim=8, heads=4, groups=2))
    found, expected = points_of(layer, images)  # (B, G, H·W, N, 2)
    torch.testing.assert_close(
        found.points, expected.transpose(2, 3).flatten(1, 2).unflatten(2, SIZE), rtol=0, atol=1e-5
    )
    nn.init.zeros_(layer.offset_network.pointwise.weight)
    torch.testing.assert_close(found.points - found.moved, points_of(layer, images)[0].points, rtol=0, atol=1e-5)


def test_offsets_of_multi_scale_attention_are_replaced():
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(MultiScaleDeformableConfig(dim=8, heads=2))
    set_offsets(layer.offset, 0.5, 1.0)
    images = random(3, 8, *SIZE)
    (adapter,) = offset_layers(layer).values()
    with torch.no_grad(), adapter.intercepted(lambda raw, _: raw.roll(1, 0)):
        _, trace = layer(images, return_trace=True)
    with torch.no_grad():
        _, before = layer(images, return_trace=True)
    torch.testing.assert_close(trace.offsets, before.offsets.roll(1, 0), rtol=0, atol=0)


def test_calls_that_cannot_be_measured_are_refused():
    class Other(MSDeformAttn):
        def forward(self, query):
            return self.sampling_offsets(query)

    with pytest.raises(ConfigError, match="expected layer '' to get reference_points and spatial_shapes, got query"):
        offset_report(Other(), random(2, 5, 8, 1).flatten(2).transpose(1, 2)[..., None].permute(0, 2, 1, 3))
    layer = MultiScaleDeformableAttention(MultiScaleDeformableConfig(dim=8, heads=2))
    with offset_layers(layer)[""].intercepted(lambda raw, _: None), pytest.raises(ConfigError, match="another method"):
        layer.attend(random(1, 4, 8), random(1, 4, 8), torch.rand(1, 4, 1, 2), [(2, 2)])


def test_torchvisions_module():
    ops = pytest.importorskip("torchvision.ops")
    convolution = ops.DeformConv2d(4, 4, KERNEL, padding=(1, 2))
    for illness, offsets in CONV_ILLNESSES.items():
        if illness != "not finite":  # its CPU code reads outside the map then
            assert found_in(ConvNet(convolution, offsets), random(6, 4, *SIZE))[1] == [illness]


def test_module_of_transformers():
    models = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    from transformers import DeformableDetrConfig

    torch.manual_seed(0)
    attention = models.DeformableDetrMultiscaleDeformableAttention(
        DeformableDetrConfig(d_model=8, num_feature_levels=2), num_heads=2, n_points=3
    ).eval()
    set_offsets(attention.sampling_offsets, 0.5, 0.1)
    (adapter,) = offset_layers(attention).values()
    seen = []
    shapes = Detector.LEVELS
    with torch.no_grad(), adapter.intercepted(lambda raw, call: seen.append(adapter.points(raw, call))):
        attention(
            random(2, 60, 8),
            encoder_hidden_states=random(2, 60, 8),
            reference_points=torch.rand(2, 60, 2, 2),
            spatial_shapes=torch.tensor(shapes),
            spatial_shapes_list=list(shapes),
            level_start_index=torch.tensor([0, 48]),
        )
    assert seen[0].moved.shape == (2, 12, 60, 1, 2)
    assert seen[0].sizes[:, 0, 0].tolist() == [[6, 8]] * 3 + [[3, 4]] * 3 + [[6, 8]] * 3 + [[3, 4]] * 3


# ------------------------------------------------------------------------------------------------ log

CONFIG = DeformableAttentionConfig(8, 2, groups=2, stride=4, kernel_size=5, bias="none")


def train_step(model, images):
    model.train()(images).square().mean().backward()


@pytest.mark.parametrize(("illness", "weight"), [("does nothing", 0.0), ("healthy", 0.3), ("at the bound", 100.0)])
def test_log_gives_the_verdict_of_the_report(illness, weight):
    torch.manual_seed(0)
    layer, images = DeformableAttention(CONFIG, init="zero_offset"), random(4, 8, *SIZE)
    nn.init.normal_(layer.offset_network.pointwise.weight, std=weight)
    with OffsetLog(layer) as log:
        assert log.scalars() == {}
        train_step(layer, images)
    (found,) = log.report().layers
    assert illness in [finding.name for finding in found.findings]
    expected = offset_report(layer, images)
    assert log.report() == expected
    names = ("mean", "at_bound", "outside", "image")
    assert log.scalars() == {f"offsets/layer/{name}": getattr(expected.layers[0], name) for name in names}


@pytest.mark.parametrize("illness", CONV_ILLNESSES)
def test_log_of_a_convolution(illness):
    model = ConvNet(DeformConv2d(4), CONV_ILLNESSES[illness])
    with OffsetLog(model) as log:
        train_step(model, random(6, 4, *SIZE))
    assert [finding.name for finding in log.report().layers[0].findings] == [illness]
    assert set(log.scalars()) == {f"offsets/convolution/{name}" for name in ("mean", "at_bound", "outside", "image")}


def test_log_keeps_the_last_pass_in_training_mode():
    layer = DeformableAttention(CONFIG, init="zero_offset")
    nn.init.normal_(layer.offset_network.pointwise.weight)
    log = OffsetLog(layer)
    train_step(layer, random(2, 8, *SIZE))
    first = log.scalars()
    layer.eval()(random(3, 8, *SIZE, seed=1))
    assert log.scalars() == first
    train_step(layer, random(3, 8, *SIZE, seed=1))
    second = log.scalars()
    assert second != first
    log.close()
    train_step(layer, random(2, 8, *SIZE))
    assert log.scalars() == second
    assert not layer.offset_network._forward_hooks


def test_log_of_one_image_has_no_part_that_depends_on_the_image():
    layer = DeformableAttention(CONFIG, init="zero_offset")
    with OffsetLog(layer) as log:
        train_step(layer, random(1, 8, *SIZE))
    assert set(log.scalars()) == {"offsets/layer/mean", "offsets/layer/at_bound", "offsets/layer/outside"}


def test_log_changes_no_step():
    """Gradients and random numbers with the log equal those without it, also with checkpointed activations."""
    gradients = []
    for logged in (False, True):
        torch.manual_seed(0)
        model = create_model("dat_nano", num_classes=4, drop_path_rate=0.3)
        model.set_grad_checkpointing()
        log = OffsetLog(model) if logged else None
        train_step(model, random(2, 3, 64, 64))
        if log is not None:
            assert len(log.scalars()) == 3 * 4
        gradients.append([leaf.grad for leaf in model.parameters()] + [torch.rand(1)])
    for without, with_log in zip(*gradients, strict=True):
        assert without is with_log is None or torch.equal(without, with_log)


def test_log_of_a_compiled_layer():
    """No graph break, and the same scalars as without compilation."""
    torch.manual_seed(0)
    layer, images = DeformableAttention(CONFIG, init="zero_offset"), random(2, 8, *SIZE)
    nn.init.normal_(layer.offset_network.pointwise.weight)
    with OffsetLog(layer) as log:
        train_step(layer, images)
        expected = log.scalars()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        train_step(compiled, random(2, 8, *SIZE, seed=1))
        assert log.scalars() != expected
        train_step(compiled, images)
        assert log.scalars() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of the depthwise convolution, with or without the log
def test_log_in_distributed_data_parallel(tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer, images = DeformableAttention(CONFIG, init="zero_offset"), random(2, 8, *SIZE)
        model = DistributedDataParallel(layer)
        with OffsetLog(model) as log:
            train_step(model, images)
        assert set(log.scalars()) == {f"offsets/module/{name}" for name in ("mean", "at_bound", "outside", "image")}
    finally:
        torch.distributed.destroy_process_group()


def test_log_needs_a_deformable_layer():
    with pytest.raises(ConfigError, match="model: expected a DAT or another module"):
        OffsetLog(nn.Linear(2, 2))
