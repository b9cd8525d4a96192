"""Bad input: a ValueError that names the argument, the expected pattern, the actual value, and the rule."""

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
from dat_ref.ops import attention, basic, bias, coverage, grid, offsets, sampling
from dat_ref.params import flatten, unflatten
from dat_ref.peers.neighborhood import neighborhood_attention, neighborhood_shapes
from dat_ref.peers.window import window_attention, window_shapes

LAYER = DeformableAttentionConfig(12, 6, 3, size=(5, 7))
MODULE = {
    "q_size": (5, 7), "n_heads": 6, "n_head_channels": 2, "n_groups": 3, "stride": 1, "offset_range_factor": 2,
    "use_pe": True, "dwc_pe": False, "no_off": False, "fixed_pe": False, "stage_idx": 2, "ksize": 5, "log_cpb": False,
}  # fmt: skip


def test_all_errors_are_value_errors():
    """All errors are subclasses of ValueError."""
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
        ({"stride": 0}, r"stride: expected an integer >= 1, got 0"),
        ({"kernel_size": 0}, r"kernel_size: expected an integer >= 1, got 0"),
        ({"offset_range": -1.0}, r"offset_range: expected a finite number >= 0 .*, got -1.0"),
        ({"size": None}, r"size: expected \(H, W\) of the map for bias='table', got None"),
        ({"size": None, "bias": BiasKind.FIXED}, r"size: expected \(H, W\) of the map for bias='fixed', got None"),
        ({"bias_resolution": "metres"}, r"bias_resolution: expected 'fractions' or 'pixels', got 'metres'"),
        ({"average_pool": True}, r"average_pool: expected offset_bound=OffsetBound.NONE"),
    ],
)
def test_layer_configuration(changes, message):
    """The error names incompatible options and the rule."""
    with pytest.raises(ConfigError, match=message):
        replace(LAYER, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowAttentionConfig(12, 5, 7), r"heads: expected a divisor of dim=12, got 5"),
        (lambda: WindowAttentionConfig(12, 6, 7, shift=7), r"shift: expected 0 <= shift < window_size=7, got 7"),
        (lambda: WindowAttentionConfig(12, 6, 7, shift=-1), r"shift: expected 0 <= shift < window_size=7, got -1"),
        (lambda: NeighborhoodAttentionConfig(12, 5), r"heads: expected a divisor of dim=12, got 5"),
        (lambda: NeighborhoodAttentionConfig(12, 6, 4), r"kernel_size: expected an odd integer >= 1 .*, got 4"),
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
    """Errors of the other configurations have the same form."""
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("release", ["cvpr2022", "datpp2023"])
@pytest.mark.parametrize("name", ["q_size", "n_groups", "no_off"])
def test_missing_released_arguments_are_named(release, name):
    """The error names a missing released argument, for the layer and for the backbone."""
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
        ("cvpr2022", {"dims": 64}, r"dims: expected a list with one entry per stage, got 64"),
        ("cvpr2022", {"patch_size": 8}, r"patch_size, dim_stem: expected 4 and dims\[0\]"),
        ("cvpr2022", {"heads": [3, 3, 4, 6]}, r"heads: expected a divisor of dim=4, got 3"),
        ("datpp2023", {"groups": [1, 3, 3, 3]}, r"groups: expected a divisor of heads=4, got 3"),
    ],
)
def test_released_backbone_arguments(release, changes, message):
    """The error names released backbone arguments that are missing or invalid."""
    arguments = {**RELEASES[release], **changes}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        DATConfig.from_official(arguments, release=release)


@pytest.mark.parametrize("release", ["cvpr2022", "datpp2023"])
def test_lists_of_a_released_backbone_have_one_entry_per_stage(release):
    """A list that is too short or too long is refused by its name."""
    lists = [
        name
        for name, value in RELEASES[release].items()
        if isinstance(value, list) and name not in ("dims", "img_size")
    ]
    assert {"heads", "strides", "use_pes", "depths"} <= set(lists)
    for name in lists:
        for value in (RELEASES[release][name][:-1], RELEASES[release][name] * 2):
            with pytest.raises(ConfigError, match=rf"^{name}: expected 4 entries, as many as dims, got"):
                DATConfig.from_official({**RELEASES[release], name: value}, release=release)


@pytest.mark.parametrize("build", [DeformableAttentionConfig, DATConfig])
def test_unknown_release(build):
    """For an unknown release the error names the two known ones."""
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
    """Every attention rejects a wrong map with the same message, before any work."""
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
    """The backbone rejects a wrong image by name."""
    backbone = tiny("cvpr2022")
    model = DAT(backbone, init_params(backbone, 0))
    with pytest.raises(ShapeError, match=r"x: expected \(B, C=3, H, W\), got \(1, 4, 64, 64\)"):
        model(numbers(0, 1, 4, 64, 64))
    with pytest.raises(ShapeError, match=r"x: expected floating-point numbers .*, got uint8"):
        model(np.zeros((1, 3, 64, 64), np.uint8))


def test_kernel_larger_than_an_unpadded_map():
    """The 2023 code with kernel = stride has no padding; the error names the smallest map."""
    layer = replace(LAYER, stride=6, kernel_size=6, convention="datpp2023", offset_bound="clamp")
    message = r"kernel_size: expected at most the padded map, got 6 on a map of 5×7; .* the smallest map is 6×6"
    with pytest.raises(ConfigError, match=message):
        deformable_layer(numbers(0, 1, 12, 5, 7), init_params(layer, 0, dtype=np.float64), layer)
    y, _ = deformable_layer(numbers(0, 1, 12, 6, 6), init_params(layer, 0, dtype=np.float64), layer)
    assert np.isfinite(y).all()


def test_average_pooling_needs_whole_cells():
    """The error states the rule; the 2023 code has a bare assertion."""
    layer = replace(
        LAYER, stride=2, kernel_size=3, offset_bound=OffsetBound.NONE, average_pool=True, bias=BiasKind.NONE,
        convention=Convention.DATPP2023,
    )  # fmt: skip
    with pytest.raises(
        ShapeError, match=r"x: expected \(B, C, H=6, W=8\) with H and W multiples of stride=2.*got \(1, 12, 5, 7\)"
    ):
        deformable_layer(numbers(0, 1, 12, 5, 7), init_params(layer, 0, dtype=np.float64), layer)


def test_fixed_table_fits_one_map():
    """For a fixed bias on another map the error names both sizes."""
    layer = replace(LAYER, bias=BiasKind.FIXED)
    with pytest.raises(
        ShapeError, match=r"x: expected the map that the fixed bias table was built for, 35 queries × 35 keys"
    ):
        deformable_layer(numbers(0, 1, 12, 5, 8), init_params(layer, 0, dtype=np.float64), layer)


def test_cotangents():
    """The error names a cotangent whose shape differs from the output, for the layer and for the backbone."""
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


# ------------------------------------------------------------------------------------------------ operations

X, POINTS = numbers(0, 2, 3, 4, 5), numbers(1, 2, 7, 2)
KERNEL, DEPTHWISE, WEIGHT = numbers(2, 6, 3, 3, 3), numbers(3, 3, 1, 3, 3), numbers(4, 6, 3)
Q, K, TABLE, NORMALIZED = numbers(5, 2, 7, 4), numbers(6, 2, 5, 4), numbers(7, 2, 3, 5), numbers(8, 1, 2, 4, 2)
RAW, REFERENCE = numbers(9, 1, 1, 2, 3, 2), numbers(10, 2, 3, 2)
CELLS = Convention.CELL_CENTER
GEOMETRY = {"query_size": (2, 3), "convention": CELLS}
BOUND = {"offset_range": 2.0, "convention": CELLS}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sampling.bilinear_sample(X, POINTS[0]),
            ShapeError,
            r"points_px: expected \(N=2, P, \(y, x\)=2\), got",
        ),
        (lambda: sampling.bilinear_sample(X[0], POINTS), ShapeError, r"x: expected \(N, C, H, W\), got \(3, 4, 5\)"),
        (lambda: sampling.bilinear_sample(X[:, :, :0], POINTS), ShapeError, r"x: expected .* with H >= 1 and W >= 1"),
        (lambda: sampling.bilinear_sample(X, POINTS > 0), ShapeError, r"points_px: expected real numbers .*, got bool"),
        (lambda: sampling.bilinear_sample_vjp(X, X, POINTS), ShapeError, r"cotangent: expected \(N=2, C=3, P=7\)"),
        (lambda: basic.linear(X, WEIGHT.T), ShapeError, r"x: expected \(B, C=6, H, W\) or \(B, C=6, N\), got"),
        (lambda: basic.linear(X, WEIGHT, np.ones(5)), ShapeError, r"bias: expected \(O=6\), got \(5,\)"),
        (
            lambda: basic.linear_vjp(X, X, WEIGHT),
            ShapeError,
            r"cotangent: expected the shape of the output, \(2, 6, 4, 5\)",
        ),
        (lambda: basic.conv2d(X, KERNEL[:, :2]), ShapeError, r"weight: expected \(O, C=3, k, k\), got \(6, 2, 3, 3\)"),
        (lambda: basic.conv2d(X, KERNEL[..., :2]), ShapeError, r"weight: expected .* a square kernel"),
        (lambda: basic.conv2d(X[:, :, :2], KERNEL), ShapeError, r"x: expected .* a padded map of 3 × 3 or more"),
        (lambda: basic.conv2d(X, KERNEL, stride=0), ConfigError, r"stride: expected an integer >= 1, got 0"),
        (
            lambda: basic.conv2d(X, KERNEL, padding=((1, 1), (1, -1))),
            ConfigError,
            r"padding: expected \(\(top, bottom\)",
        ),
        (lambda: basic.conv2d_vjp(X, X, KERNEL), ShapeError, r"cotangent: expected the shape of the output"),
        (lambda: basic.depthwise_conv2d(X, KERNEL), ShapeError, r"weight: expected \(C=3, 1, k, k\), got"),
        (
            lambda: basic.depthwise_conv2d_vjp(X, X, DEPTHWISE),
            ShapeError,
            r"cotangent: expected the shape of the output",
        ),
        (lambda: basic.layer_norm(X, np.ones(4), np.ones(3)), ShapeError, r"weight: expected \(C=3\), got \(4,\)"),
        (
            lambda: basic.layer_norm_vjp(X[:1], X, np.ones(3), np.ones(3)),
            ShapeError,
            r"cotangent: expected the shape of x",
        ),
        (lambda: basic.gelu(np.arange(3)), ShapeError, r"x: expected floating-point numbers, got int64"),
        (lambda: basic.gelu_vjp(X[:1], X), ShapeError, r"cotangent: expected the shape of x"),
        (lambda: basic.softmax(np.float64(1)), ShapeError, r"logits: expected \(\.\.\., N\), got \(\)"),
        (lambda: basic.softmax_vjp(Q, K), ShapeError, r"cotangent: expected the shape of weights"),
        (
            lambda: basic.scatter_add(WEIGHT, np.arange(6), 5),
            ShapeError,
            r"rows: expected indices in \[0, 5\), got 0 to 5",
        ),
        (lambda: basic.scatter_add(WEIGHT, np.ones(6), 5), ShapeError, r"rows: expected \(N=6,\) integers"),
        (lambda: grid.reference_points((0, 3), CELLS), ConfigError, r"key_size: expected \(H, W\), two integers >= 1"),
        (lambda: grid.query_points((2, 3), "paper"), ConfigError, r"convention: expected a Convention .*, got 'paper'"),
        (lambda: grid.to_pixels(X, (4, 5), CELLS), ShapeError, r"points: expected \(\.\.\., 2\), order \(y, x\), got"),
        (lambda: grid.from_pixels(POINTS, 4, CELLS), ConfigError, r"size: expected \(H, W\), two integers >= 1, got 4"),
        (lambda: grid.key_grid_size((5, 5), 3, 1.5, CELLS), ConfigError, r"stride: expected an integer >= 1, got 1.5"),
        (lambda: attention.split_heads(X, 2), ConfigError, r"heads: expected a divisor of C=3, got 2"),
        (lambda: attention.merge_heads(X, (3, 2)), ShapeError, r"x: expected \(B, heads, H·W=6, d\), got"),
        (lambda: attention.attend(Q, K[..., :3], K, None, 1.0), ShapeError, r"k: expected \(\.\.\., N, d=4\), got"),
        (lambda: attention.attend(Q, K, K[:, :3], None, 1.0), ShapeError, r"v: expected \(\.\.\., N=5, d\), got"),
        (
            lambda: attention.attend(Q, K[:1], K, None, 1.0),
            ShapeError,
            r"k: expected at least two axes and the leading",
        ),
        (lambda: attention.attend(Q, K, K, Q, 1.0), ShapeError, r"bias: expected a shape that broadcasts to"),
        (lambda: attention.attend_vjp(Q, Q, K, K, Q, 1.0), ShapeError, r"weights: expected the shape of the logits"),
        (lambda: bias.table_bias(TABLE, POINTS, **GEOMETRY), ShapeError, r"points: expected \(B, G, Ns, \(y, x\)=2\)"),
        (lambda: bias.table_bias(TABLE[:, :2], NORMALIZED, **GEOMETRY), ShapeError, r"table_size: expected .* odd"),
        (
            lambda: bias.table_bias(TABLE[:1], NORMALIZED, **GEOMETRY),
            ConfigError,
            r"points: expected groups that divide",
        ),
        (
            lambda: bias.table_bias_vjp(Q, TABLE, NORMALIZED, **GEOMETRY),
            ShapeError,
            r"cotangent: expected \(B=1, heads=2",
        ),
        (
            lambda: bias.table_bias(TABLE, NORMALIZED, **GEOMETRY, resolution="cells"),
            ConfigError,
            r"resolution: expected 'fractions' or 'pixels', got 'cells'",
        ),
        (lambda: bias.log_bias(POINTS, {}, **GEOMETRY), ShapeError, r"points: expected \(B, G, Ns, \(y, x\)=2\)"),
        (
            lambda: bias.fixed_bias(WEIGHT, query_size=(2, 3), samples=4),
            ShapeError,
            r"table: expected \(heads, H·W, Ns\)",
        ),
        (
            lambda: offsets.offset_network(
                X[0], {"depthwise": {"weight": DEPTHWISE}}, stride=1, padding=((1, 1), (1, 1))
            ),
            ShapeError,
            r"queries: expected \(B·G, C/G=3, H, W\), got \(3, 4, 5\)",
        ),
        (
            lambda: offsets.bound_offsets(RAW, REFERENCE[:1], OffsetBound.RAW, **BOUND),
            ShapeError,
            r"raw: expected \(B, G, Hk=1, Wk=3, \(y, x\)=2\), got \(1, 1, 2, 3, 2\)",
        ),
        (
            lambda: offsets.bound_offsets(RAW, REFERENCE, "tanh", **BOUND),
            ConfigError,
            r"bound: expected OffsetBound, or",
        ),
        (
            lambda: offsets.bound_offsets_vjp(RAW[0], RAW, REFERENCE, OffsetBound.RAW, **BOUND),
            ShapeError,
            r"cotangent: expected the shape of raw",
        ),
        (lambda: offsets.offset_limit(-1, (2, 3), CELLS), ConfigError, r"offset_range: expected a finite number >= 0"),
        (lambda: coverage.coverage((5,), 2), ConfigError, r"size: expected \(H, W\), two integers >= 1, got \(5,\)"),
        (lambda: coverage.hit_rate((5, 5), 2, (1.5, 1)), ConfigError, r"target: expected an integer, got 1.5"),
        (lambda: coverage.capture_radius("3"), ConfigError, r"target: expected a finite number, got '3'"),
    ],
)
def test_operations(call, error, message):
    """Each operation names a wrong argument before any computation."""
    with pytest.raises(error, match=message):
        call()


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
    """The report names each missing, unexpected, mis-shaped, non-finite or non-float array."""
    with pytest.raises(CheckpointError, match=message):
        DeformableAttention(LAYER, broken(change))


def test_nan_anywhere_in_a_backbone_is_named_by_its_place():
    """The report gives the full name of a non-finite array."""
    backbone = tiny("cvpr2022")
    params = init_params(backbone, 0)
    params["stages"][2]["blocks"][1]["attention"]["position_bias"]["table"][0, 0, 0] = np.nan
    with pytest.raises(
        CheckpointError, match=r"got 1 NaN or inf of \d+ in stages.2.blocks.1.attention.position_bias.table"
    ):
        DAT(backbone, params)


def test_checkpoint_of_another_model():
    """Loading the state of one release into the other's model gives a report in released names."""
    other = tiny("datpp2023")
    state = DAT(other, init_params(other, 0)).to_official(init_params(other, 0))
    with pytest.raises(
        CheckpointError,
        match=r"(?s)state: expected the parameters.*missing \(\d+\):\n +.*stages.0.attns.0.proj_qkv.*more$",
    ):
        DAT.from_official(TINY_2022, state, release="cvpr2022")
    with pytest.raises(CheckpointError, match=r"missing \(\d+\):\n +proj_q.weight"):
        DeformableAttention.from_official(MODULE, {}, release="cvpr2022")
