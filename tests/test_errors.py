"""Bad input: a ValueError that names the argument, the expected pattern, what was found, and the rule."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.backbones import RELEASES, TINY_2022, TINY_2023, tiny
from strategies import numbers

import dat_ref
from dat_ref import (
    DAT,
    BiasKind,
    BlockConfig,
    CheckpointError,
    ConfigError,
    Convention,
    DATConfig,
    DeformableAttention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    ShapeError,
    WindowAttentionConfig,
    init_params,
)
from dat_ref.layer import deformable_layer
from dat_ref.params import flatten, unflatten
from dat_ref.peers.neighborhood import neighborhood_attention, neighborhood_shapes
from dat_ref.peers.window import window_attention, window_shapes

LAYER = DeformableAttentionConfig(12, 6, 3, size=(5, 7))
MODULE = {
    "q_size": (5, 7), "n_heads": 6, "n_head_channels": 2, "n_groups": 3, "stride": 1, "offset_range_factor": 2,
    "use_pe": True, "dwc_pe": False, "no_off": False, "fixed_pe": False, "stage_idx": 2, "ksize": 5, "log_cpb": False,
}  # fmt: skip


def test_all_errors_are_value_errors():
    """Whoever catches ValueError catches them all; they are told apart by class."""
    for error in (ShapeError, ConfigError, CheckpointError):
        assert issubclass(error, ValueError)


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, r"heads: expected a divisor of dim=12, got 5"),
        ({"heads": 0}, r"heads: expected a divisor of dim=12, got 0"),
        ({"groups": 4}, r"groups: expected a divisor of heads=6, got 4"),
        ({"groups": -1}, r"groups: expected a divisor of heads=6, got -1"),
        ({"stride": 0}, r"stride, kernel_size: expected >= 1, got 0, 5"),
        ({"kernel_size": 0}, r"stride, kernel_size: expected >= 1, got 1, 0"),
        ({"offset_range": -1.0}, r"offset_range: expected >= 0 .*, got -1.0"),
        ({"size": None}, r"size: expected \(H, W\) of the map for bias='table', got None"),
        ({"size": None, "bias": BiasKind.FIXED}, r"size: expected \(H, W\) of the map for bias='fixed', got None"),
        ({"bias_resolution": "metres"}, r"bias_resolution: expected 'fractions' or 'pixels', got 'metres'"),
        ({"average_pool": True}, r"average_pool: expected offset_bound=OffsetBound.NONE"),
    ],
)
def test_layer_configuration(changes, message):
    """Options that do not go together are named, with the rule."""
    with pytest.raises(ConfigError, match=message):
        replace(LAYER, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowAttentionConfig(12, 5, 7), r"heads: expected a divisor of dim=12, got 5"),
        (lambda: WindowAttentionConfig(12, 6, 7, shift=7), r"shift: expected 0 <= shift < window_size=7, got 7"),
        (lambda: WindowAttentionConfig(12, 6, 7, shift=-1), r"shift: expected 0 <= shift < window_size=7, got -1"),
        (lambda: NeighborhoodAttentionConfig(12, 5), r"heads: expected a divisor of dim=12, got 5"),
        (lambda: NeighborhoodAttentionConfig(12, 6, 4), r"kernel_size: expected an odd number .*, got 4"),
        (lambda: NeighborhoodAttentionConfig(12, 6, 3, "grow"), r"small_map: expected 'shrink' or 'pad', got 'grow'"),
        (
            lambda: BlockConfig(LAYER, "mixer"),
            r"mlp: expected 'linear', 'depthwise' or 'depthwise_residual', got 'mixer'",
        ),
        (lambda: DATConfig(()), r"stages: expected at least one stage, each with at least one block"),
        (lambda: DATConfig(((),)), r"stages: expected at least one stage, each with at least one block"),
        (
            lambda: DATConfig(((BlockConfig(LAYER), BlockConfig(WindowAttentionConfig(8, 2, 3))),)),
            r"stages: expected one dim in stage 1, got \[12, 8\]",
        ),
        (
            lambda: DATConfig(((BlockConfig(LAYER),),), patch_embedding="pixels"),
            r"patch_embedding: expected 'patch' or 'conv', got 'pixels'",
        ),
        (lambda: dat_ref.config("dat_huge"), r"name: expected one of dat_tiny, dat_small.*, got 'dat_huge'"),
    ],
)
def test_other_configurations(make, message):
    """The other configurations say what is wrong in the same way."""
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("release", ["cvpr2022", "datpp2023"])
@pytest.mark.parametrize("name", ["q_size", "n_groups", "no_off"])
def test_missing_released_arguments_are_named(release, name):
    """A released argument that is not there is named, for the layer and for the backbone."""
    arguments = {key: value for key, value in MODULE.items() if key != name}
    with pytest.raises(
        ConfigError, match=rf"mapping: expected the released arguments of DAttentionBaseline, missing {name}$"
    ):
        DeformableAttentionConfig.from_official(arguments, release=release)


@pytest.mark.parametrize(
    ("release", "changes", "message"),
    [
        ("cvpr2022", {"heads": None}, r"expected the released arguments of DAT, missing heads"),
        ("datpp2023", {"nat_ksizes": None}, r"expected the released arguments of DAT, missing nat_ksizes"),
        (
            "cvpr2022",
            {"stage_spec": [["L", "S"], ["S"], ["L", "X"], ["D"]]},
            r"stage_spec: .*L, S, N or D, got 'X' in stage 3",
        ),
        ("cvpr2022", {"depths": [2, 2, 2, 1]}, r"stage_spec: expected depths=\[2, 2, 2, 1\] letters"),
        ("cvpr2022", {"patch_size": 8}, r"patch_size, dim_stem: expected 4 and dims\[0\]"),
        ("cvpr2022", {"heads": [3, 3, 4, 6]}, r"heads: expected a divisor of dim=4, got 3"),
        ("datpp2023", {"groups": [1, 3, 3, 3]}, r"groups: expected a divisor of heads=4, got 3"),
    ],
)
def test_released_backbone_arguments(release, changes, message):
    """Released backbone arguments that are missing or do not fit are named."""
    arguments = {**RELEASES[release], **changes}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        DATConfig.from_official(arguments, release=release)


@pytest.mark.parametrize("build", [DeformableAttentionConfig, DATConfig])
def test_unknown_release(build):
    """An unknown release is refused, naming the two that exist."""
    arguments = MODULE if build is DeformableAttentionConfig else TINY_2023
    with pytest.raises(ValueError, match=r"release: expected 'cvpr2022' or 'datpp2023', got 'dat\+\+'"):
        build.from_official(arguments, release="dat++")


# ------------------------------------------------------------------------------------------------ maps


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (numbers(0, 2, 64, 5, 7), ShapeError, r"x: expected \(B, C=12, H, W\), got \(2, 64, 5, 7\)"),
        (numbers(0, 12, 5, 7), ShapeError, r"x: expected \(B, C=12, H, W\), got \(12, 5, 7\)"),
        (
            numbers(0, 2, 12, 0, 7),
            ShapeError,
            r"x: expected \(B, C=12, H, W\) with H >= 1 and W >= 1, got \(2, 12, 0, 7\)",
        ),
        (np.zeros((2, 12, 5, 7), int), ShapeError, r"x: expected floating-point numbers \(B, C=12, H, W\), got int64"),
        (
            np.zeros((2, 12, 5, 7), complex),
            ShapeError,
            r"x: expected floating-point numbers \(B, C=12, H, W\), got complex128",
        ),
    ],
)
def test_maps(x, error, message):
    """Every attention names a wrong map in the same words, before any work."""
    window, around = WindowAttentionConfig(12, 6, 3), NeighborhoodAttentionConfig(12, 6, 3)
    for forward, shapes, config in (
        (lambda *a: DeformableAttention(a[2], a[1])(a[0]), dat_ref.layer.deformable_shapes, LAYER),
        (window_attention, window_shapes, window),
        (neighborhood_attention, neighborhood_shapes, around),
    ):
        params = init_params(config, 0, dtype=np.float64)
        assert set(flatten(params)) == set(flatten(shapes(config)))
        with pytest.raises(error, match=message):
            forward(x, params, config)


def test_images():
    """The backbone names a wrong image."""
    backbone = tiny("cvpr2022")
    model = DAT(backbone, init_params(backbone, 0))
    with pytest.raises(ShapeError, match=r"x: expected \(B, C=3, H, W\), got \(1, 4, 64, 64\)"):
        model(numbers(0, 1, 4, 64, 64))
    with pytest.raises(ShapeError, match=r"x: expected floating-point numbers .*, got uint8"):
        model(np.zeros((1, 3, 64, 64), np.uint8))


def test_stride_larger_than_the_map():
    """A stride that no key fits is refused, with the way out; a backbone on too small an image says the same."""
    layer = replace(LAYER, stride=6)
    with pytest.raises(
        ConfigError, match=r"stride: expected at most the map's height and width, got stride=6 on a map of 5×7"
    ):
        deformable_layer(numbers(0, 1, 12, 5, 7), init_params(layer, 0, dtype=np.float64), layer)
    backbone = DATConfig.from_official({**TINY_2023, "strides": [8, 4, 2, 1]}, release="datpp2023")
    with pytest.raises(ConfigError, match=r"stride=8 on a map of 5×25 \(feed a larger input"):
        DAT(backbone, init_params(backbone, 0))(numbers(0, 1, 3, 20, 100, dtype=np.float32))


def test_average_pooling_needs_whole_cells():
    """The 2023 code asserts; here the rule is said."""
    layer = replace(
        LAYER, stride=2, kernel_size=3, offset_bound=OffsetBound.NONE, average_pool=True, bias=BiasKind.NONE,
        convention=Convention.DATPP2023,
    )  # fmt: skip
    with pytest.raises(
        ShapeError, match=r"x: expected \(B, C, H=6, W=8\) with H and W multiples of stride=2.*got \(1, 12, 5, 7\)"
    ):
        deformable_layer(numbers(0, 1, 12, 5, 7), init_params(layer, 0, dtype=np.float64), layer)


def test_fixed_table_fits_one_map():
    """A fixed bias on another map names both sizes."""
    layer = replace(LAYER, bias=BiasKind.FIXED)
    with pytest.raises(
        ShapeError, match=r"x: expected the map that the fixed bias table was built for, 35 queries × 35 keys"
    ):
        deformable_layer(numbers(0, 1, 12, 5, 8), init_params(layer, 0, dtype=np.float64), layer)


def test_cotangents():
    """A cotangent of another shape than the output is named, for the layer and for the backbone."""
    layer = DeformableAttention(LAYER, init_params(LAYER, 0, dtype=np.float64))
    _, pullback = layer.vjp(numbers(0, 2, 12, 5, 7))
    with pytest.raises(ShapeError, match=r"cotangent: expected \(B=2, C=12, H=5, W=7\), got \(2, 12, 7, 5\)"):
        pullback(numbers(1, 2, 12, 7, 5))
    with pytest.raises(ShapeError, match=r"cotangent: expected floating-point numbers"):
        pullback(np.ones((2, 12, 5, 7), int))
    backbone = tiny("cvpr2022")
    _, pullback = DAT(backbone, init_params(backbone, 0)).vjp(numbers(0, 1, 3, 64, 64, dtype=np.float32))
    with pytest.raises(ShapeError, match=r"cotangent: expected \(B=1, classes=5\), got \(1, 4\)"):
        pullback(np.ones((1, 4)))


# ------------------------------------------------------------------------------------------------ parameters


def broken(change):
    """Return the layer's parameters after a change to their flat form."""
    leaves = flatten(init_params(LAYER, 0))
    change(leaves)
    return unflatten(leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaves: leaves.pop("key.bias"), r"missing: key.bias \(12,\)"),
        (lambda leaves: leaves.update({"key.scale": np.ones(3)}), r"unexpected: key.scale \(3,\)"),
        (
            lambda leaves: leaves.update({"position_bias.table": np.ones((6, 13, 9))}),
            r"mis-shaped: position_bias.table: expected \(6, 9, 13\), got \(6, 13, 9\)",
        ),
        (
            lambda leaves: leaves.update({"query.weight": np.full((12, 12), np.nan)}),
            r"params: expected finite numbers, got 144 NaN or inf of 144 in query.weight",
        ),
        (
            lambda leaves: leaves["output.bias"].__setitem__(3, np.inf),
            r"params: expected finite numbers, got 1 NaN or inf of 12 in output.bias",
        ),
        (
            lambda leaves: leaves.update({"key.bias": np.ones(12, int)}),
            r"params: expected floating-point numbers, got int64 in key.bias",
        ),
    ],
)
def test_parameters(change, message):
    """Missing, unexpected, mis-shaped, not finite, not floating: the report names each."""
    with pytest.raises(CheckpointError, match=message):
        DeformableAttention(LAYER, broken(change))


def test_nan_anywhere_in_a_backbone_is_named_by_its_place():
    """The report gives the full name of the array that is not finite."""
    backbone = tiny("cvpr2022")
    params = init_params(backbone, 0)
    params["stages"][2]["blocks"][1]["attention"]["position_bias"]["table"][0, 0, 0] = np.nan
    with pytest.raises(
        CheckpointError, match=r"got 1 NaN or inf of \d+ in stages.2.blocks.1.attention.position_bias.table"
    ):
        DAT(backbone, params)


def test_checkpoint_of_another_model():
    """The state of one release in the other's model gets a report in released names, not a crash."""
    other = tiny("datpp2023")
    state = DAT(other, init_params(other, 0)).to_official(init_params(other, 0))
    with pytest.raises(
        CheckpointError, match=r"(?s)state: expected the released.*missing \(\d+\):\n +.*stages.0.attns.0.proj_qkv.*more$"
    ):
        DAT.from_official(TINY_2022, state, release="cvpr2022")
    with pytest.raises(CheckpointError, match=r"missing \(\d+\):\n +proj_q.weight"):
        DeformableAttention.from_official(MODULE, {}, release="cvpr2022")
