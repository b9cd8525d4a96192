"""The layer from keywords: the fields of its configuration, their defaults, errors, and its representation."""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import dat_ref  # noqa: E402
import dat_ref.torch as dt  # noqa: E402
from dat_ref import BiasKind, ConfigError, DeformableAttentionConfig  # noqa: E402
from dat_ref.config import default_kernel_size  # noqa: E402


def test_keywords_build_the_configured_layer():
    fields = {"dim": 12, "heads": 4, "groups": 2, "stride": 2, "size": (5, 7), "bias_resolution": "pixels"}
    layer = dt.DeformableAttention(**fields, backend="eager", sampler="grid_sample", init="zero_offset")
    assert layer.config == DeformableAttentionConfig(**fields)
    assert (layer.backend, layer.sampler) == ("eager", "grid_sample")
    same = dt.DeformableAttention(layer.config)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, 6, 9)
    torch.testing.assert_close(same(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, r"dim: expected an integer, got no value"),
        ((), {"dim": 12}, r"heads: expected an integer, got no value"),
        ((12,), {}, r"config: expected a DeformableAttentionConfig, or its fields by name, got 12"),
        ((DeformableAttentionConfig(12, 4),), {"stride": 2}, r"config: .* got both \(fields: stride\)"),
        ((), {"dim": 12, "heads": 4, "head": 1}, r"head: expected a field of .* one of dim, heads, groups, stride"),
        ((), {"dim": 12, "heads": 5}, r"heads: expected a divisor of dim=12, got 5"),
        ((), {"dim": 12, "heads": 4, "bias": "table"}, r"size: expected \(H, W\) of the map for bias='table'"),
        ((), {"dim": 12, "heads": 4, "stride": 0}, r"stride: expected an integer >= 1, got 0"),
        ((), {"dim": 12, "heads": 4, "kernel_size": None}, r"kernel_size: expected an integer >= 1, got None"),
        ((), {"dim": 12, "heads": 4, "bias": None}, r"bias: expected BiasKind, .* got None"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        dt.DeformableAttention(*arguments, **options)


@pytest.mark.parametrize("stride", range(1, 33))
def test_default_kernel_follows_the_stride(stride):
    """The kernel is odd, larger than the stride, at least 5, and never larger than these rules require."""
    kernel = DeformableAttentionConfig(12, 4, stride=stride).kernel_size
    assert (
        kernel
        == default_kernel_size(stride)
        == dt.DeformableAttention(dim=4, heads=2, stride=stride).config.kernel_size
    )
    assert kernel % 2 == 1
    assert kernel > stride
    assert kernel >= 5
    assert kernel == 5 or kernel - 2 <= stride


def test_default_bias_follows_the_size():
    assert DeformableAttentionConfig(12, 4, size=(3, 5)).bias is BiasKind.TABLE
    assert DeformableAttentionConfig(12, 4).bias is BiasKind.DEPTHWISE
    assert DeformableAttentionConfig(12, 4, size=(3, 5), bias="none").bias is BiasKind.NONE


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_layer_without_a_size_takes_any_map_as_the_specification_does(stride):
    layer = dt.DeformableAttention(dim=12, heads=4, groups=2, stride=stride).double()
    spec = dat_ref.DeformableAttention(layer.config, layer.to_numpy())
    for size in [(8, 11), (17, 9)]:
        x = np.random.default_rng(0).standard_normal((2, 12, *size))
        np.testing.assert_allclose(layer(torch.from_numpy(x)).detach().numpy(), spec(x), atol=1e-12)


def test_signature_shows_that_a_default_is_derived():
    parameter = inspect.signature(DeformableAttentionConfig).parameters["kernel_size"]
    assert repr(parameter.default) == "<follows from other fields>"


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"dim": 64, "heads": 4, "stride": 2, "size": (80, 80)},
            [
                "dim=64, heads=4, groups=1, bias=table",
                "keys: one per 2×2 pixels (1,600 on a map of 80×80)",
                "largest offset: 2 pixels on each axis",
                "parameters: 119,684 (84 % in the bias table)",
            ],
        ),
        (
            {"dim": 12, "heads": 4, "groups": 2, "stride": 5, "offset_range": 3},
            [
                "dim=12, heads=4, groups=2, bias=depthwise",
                "keys: one per 5×5 pixels",
                "largest offset: 7.5 pixels on each axis",
                "parameters: 1,068",
            ],
        ),
        ({"dim": 12, "heads": 4, "offset_bound": "clamp"}, ["largest offset: no limit in pixels"]),
        ({"dim": 12, "heads": 4, "offset_bound": "none"}, ["largest offset: 0 pixels on each axis"]),
    ],
)
def test_representation(options, lines):
    layer = dt.DeformableAttention(**options)
    shown = layer.extra_repr().splitlines()
    assert set(lines) <= set(shown)
    assert all(line in repr(layer) for line in shown)


@pytest.mark.parametrize("size", [(8, 12), (6, 10)])
def test_points_move_by_the_stated_largest_offset(size):
    """Saturated offsets reach the stated number of pixels where the stride divides the map."""
    layer = dt.DeformableAttention(dim=4, heads=2, stride=2, offset_range=3)
    with torch.no_grad():
        layer.offset_network.pointwise.weight.mul_(1e6)
    _, trace = layer(torch.randn(2, 4, *size), return_trace=True)
    moved = (trace.points_px - trace.reference_px).abs().max().item()
    assert moved == pytest.approx(layer.config.max_offset_px) == pytest.approx(3.0)
