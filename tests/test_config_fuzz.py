"""Configurations: an invalid value of any field is refused at construction, and a valid configuration is hashable."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dat_ref
from dat_ref import (
    BiasKind,
    BlockConfig,
    ConfigError,
    Convention,
    DATConfig,
    DeformableAttention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    OffsetBound,
    WindowAttentionConfig,
    init_params,
)
from dat_ref.config import PeerConfig
from dat_ref.ops.attention import deformable_attention, deformable_attention_vjp
from dat_ref.peers import (
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
)

LAYER = DeformableAttentionConfig(12, 6, 3, size=(5, 7))
BLOCK = BlockConfig(LAYER)

# ------------------------------------------------------------------------------------------------ values by kind

NEITHER = ["10", None, True, float("nan"), float("inf"), -float("inf"), 1j, [1], np.zeros(2), object()]
NO_NUMBER = [*NEITHER, 10**400]
NO_INTEGER = [*NEITHER, 12.0, 1.5, np.float64(3)]
NO_STRING = [None, 0, 1, True, 1.0, ["table"], "", "junk", "TABLE ", np.zeros(2)]

POSITIVE = ([1, np.int64(2), np.uint8(3)], [0, -12, *NO_INTEGER])
ODD = ([1, 3, np.int32(5)], [0, 2, -1, *NO_INTEGER])
RATE = ([0, 0.0, 0.25, np.float32(0.5)], [-1, 2, 5, 1.0, -1e-9, *NO_NUMBER])
FLAG = ([True, False, np.bool_(True)], [0, 1, None, "yes", "", 1.0, [True]])
SIZE = (
    [(1, 1), [5, 7], np.array([3, 4]), (np.int64(2), 9)],
    [224, 7.0, "57", (), (7,), (0, 0), (-1, 7), (5, 7, 9), (5.0, 7.0), (True, 7), ("5", "7"), {5, 7}, np.zeros((2, 2))],
)
CONVENTION = (
    [*Convention, "cell_center", "PAPER", "cvpr2022", "DATpp2023"],
    ["cell center", "", None, 0, Convention.PAPER.value, "dat++", ["paper"]],
)


def strings(*known: str) -> tuple[list[Any], list[Any]]:
    """Return the valid and invalid values of an option with a fixed set of strings."""
    return list(known), [value for value in NO_STRING if not isinstance(value, str) or value not in known]


def or_none(values: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
    """Return the values of an optional field."""
    good, bad = values
    return [None, *good], [value for value in bad if value is not None]


# Base configuration, and for each field (valid values, invalid values). Values of coupled fields suit the base.
HEADS = ([1, 2, np.int64(6)], [0, -1, 5, 24, *NO_INTEGER])
DIM = ([12, 24, np.int64(36)], [0, -12, 5, *NO_INTEGER])
DROPOUT = {"attention_dropout": RATE, "projection_dropout": RATE}
FIELDS: list[tuple[Any, dict[str, tuple[list[Any], list[Any]]]]] = [
    (
        LAYER,
        {
            "dim": DIM,
            "heads": ([3, 6, np.int64(12)], HEADS[1]),
            "groups": ([1, 2, np.int64(6)], [0, -1, 4, 12, *NO_INTEGER]),
            "stride": POSITIVE,
            "kernel_size": POSITIVE,
            "offset_bound": (
                [*OffsetBound, "tanh_cells", "tanh_coordinates", "clamp", "raw", "none"],
                ["tanh", "TANH_CELLS", "", None, 0, BiasKind.NONE, ["none"]],
            ),
            "offset_range": ([0, 2, 3.5, np.float32(1.5)], [-1, -1e-9, *NO_NUMBER]),
            "bias": (
                [*BiasKind, "table", "fixed", "log_cpb", "depthwise", "none"],
                ["junk", "", None, 0, False, OffsetBound.NONE, "Table"],
            ),
            "size": (SIZE[0], [*SIZE[1], None]),
            "convention": CONVENTION,
            "bias_resolution": strings("fractions", "pixels"),
            "average_pool": ([False, np.bool_(False)], [*FLAG[1], True]),
            **DROPOUT,
        },
    ),
    (
        WindowAttentionConfig(12, 6, 7, shift=2),
        {
            "dim": DIM,
            "heads": HEADS,
            "window_size": ([3, 7, np.int64(5)], [0, -1, 2, *NO_INTEGER]),
            "shift": ([0, 1, np.int64(6)], [-1, 7, 0.5, *NO_INTEGER]),
            **DROPOUT,
        },
    ),
    (
        NeighborhoodAttentionConfig(12, 6),
        {
            "dim": DIM,
            "heads": HEADS,
            "kernel_size": ODD,
            "small_map": strings("shrink", "pad"),
            "dilation": POSITIVE,
            **DROPOUT,
        },
    ),
    (
        BLOCK,
        {
            "attention": (
                [LAYER, WindowAttentionConfig(4, 2, 3), PerQueryAttentionConfig(6, 3)],
                [None, "deformable", 12, BLOCK, DeformableAttentionConfig, {"dim": 12}],
            ),
            "mlp": strings("linear", "depthwise", "depthwise_residual"),
            "mlp_ratio": POSITIVE,
            "local_perception": FLAG,
            "layer_scale": or_none(([0.0, 1e-5, 1, np.float32(0.5)], NO_NUMBER)),
        },
    ),
    (
        DATConfig(((BLOCK,),)),
        {
            "stages": (
                [((BLOCK,),), [[BLOCK, BLOCK], (BLOCK,)]],
                [
                    (), ((),), None, BLOCK, (BLOCK,), ((LAYER,),), "", "stages", ["ab"], 3,
                    ((BLOCK, BlockConfig(WindowAttentionConfig(8, 2, 3))),),
                ],
            ),
            "patch_embedding": strings("patch", "conv"),
            "image_size": (SIZE[0], [*SIZE[1], None]),
            "in_channels": POSITIVE,
            "num_classes": ([0, 10, np.int64(5)], [-1, *NO_INTEGER]),
            "drop_path_rate": RATE,
            "dropout": RATE,
            "global_pool": (["avg", ""], ["max", None, 0, False, ["avg"]]),
        },
    ),
    (
        MultiHeadAttentionConfig(12, 6),
        {"dim": DIM, "heads": HEADS, "size": or_none(SIZE), **DROPOUT},
    ),
    (PyramidAttentionConfig(12, 6), {"dim": DIM, "heads": HEADS, "reduction": POSITIVE, **DROPOUT}),
    (
        DeformableConvConfig(12),
        {"dim": ([1, 12], [0, -12, *NO_INTEGER]), "kernel_size": ODD, "groups": HEADS, "offset_groups": HEADS,
         "modulated": FLAG},
    ),
    (
        MultiScaleDeformableConfig(12, 6),
        {
            "dim": DIM,
            "heads": HEADS,
            "points": POSITIVE,
            "levels": POSITIVE,
            "scoring": strings("query", "dot_product"),
        },
    ),
    (
        PerQueryAttentionConfig(12, 6),
        {
            "dim": DIM,
            "heads": HEADS,
            "groups": ([1, 2, np.int64(6)], [0, 4, 12, *NO_INTEGER]),
            "kernel_size": ODD,
            "offset_kernel_size": ODD,
        },
    ),
    (DATDCNAttentionConfig(12, 6), {"dim": DIM, "heads": HEADS, "points": POSITIVE, "convention": CONVENTION}),
    (PeerConfig(12), {"dim": ([1, 12], [0, -12, *NO_INTEGER])}),
]  # fmt: skip
BASES = [pytest.param(base, values, id=type(base).__name__) for base, values in FIELDS]
# An invalid dim or groups can also break a rule of another field. The message then names that field.
COUPLED = {"dim": "(dim|heads|groups|offset_groups)", "heads": "(heads|groups)", "window_size": "(window_size|shift)"}


@pytest.mark.parametrize(("base", "values"), BASES)
def test_every_field_has_values(base, values):
    """A new field of a configuration needs a row in this file."""
    assert set(values) == {field.name for field in dataclasses.fields(base)}


def test_every_configuration_is_tested():
    """A new peer needs rows in this file."""
    tested = {type(base) for base, _ in FIELDS}
    assert set(dat_ref.peers.registry.ATTENTIONS) <= tested


@pytest.mark.parametrize(("base", "values"), BASES)
def test_each_invalid_value_is_refused(base, values):
    """Each invalid value raises `ConfigError`; the message names the field, the rule and the value."""
    for name, (_, invalid) in values.items():
        for value in invalid:
            with pytest.raises(ConfigError, match=rf"^{COUPLED.get(name, name)}: expected ") as error:
                dataclasses.replace(base, **{name: value})
            if str(error.value).startswith(f"{name}:") and name not in ("average_pool", "stages"):
                assert repr(value) in str(error.value)


@pytest.mark.parametrize(("base", "values"), BASES)
def test_each_valid_value_is_accepted(base, values):
    """Each valid value alone is accepted and stored in its plain form: built-in numbers, tuples, members."""
    for name, (valid, _) in values.items():
        for value in valid:
            config = dataclasses.replace(base, **{name: value})
            stored = getattr(config, name)
            assert isinstance(stored, (int, float, str, tuple, type(None), OffsetBound, BiasKind, Convention)) or (
                dataclasses.is_dataclass(stored)
            )
            assert not isinstance(stored, np.generic)
            hash(config)
            assert dataclasses.replace(config) == config == pickle.loads(pickle.dumps(config))


# ------------------------------------------------------------------------------------------------ drawn


@st.composite
def arguments(draw: st.DrawFn, mistakes: int) -> tuple[type, dict[str, Any], list[str]]:
    """Draw a configuration class, values of its fields, and the names of the fields with an invalid value.

    The fields that depend on each other keep the values of the base, except for the mistakes.
    """
    base, values = draw(st.sampled_from(FIELDS))
    chosen = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    independent = set(values) - {"dim", "heads", "groups", "offset_groups", "window_size", "shift", "average_pool"}
    for name in sorted(independent):
        chosen[name] = draw(st.sampled_from(values[name][0]))
    names = draw(st.lists(st.sampled_from(sorted(values)), min_size=mistakes, max_size=mistakes, unique=True))
    for name in names:
        chosen[name] = draw(st.sampled_from(values[name][1]))
    return type(base), chosen, names


@given(arguments(mistakes=0))
def test_valid_configurations_are_built(drawn):
    """Valid values together are accepted. The configuration is hashable and equal to its copy."""
    kind, chosen, _ = drawn
    config = kind(**chosen)
    assert config == kind(**chosen)
    assert hash(config) == hash(kind(**chosen))
    assert {config: 1}[dataclasses.replace(config)] == 1


@given(arguments(mistakes=1))
def test_one_invalid_value_is_named(drawn):
    """One invalid value among valid ones raises `ConfigError` with the name of its field."""
    kind, chosen, (name,) = drawn
    with pytest.raises(ConfigError, match=rf"^{COUPLED.get(name, name)}: expected "):
        kind(**chosen)


# ------------------------------------------------------------------------------------------------ strings


def test_strings_give_the_same_configuration_as_members():
    """Values of enumerations, and names of conventions, are converted."""
    by_string = DeformableAttentionConfig(
        12, 4, groups=2, size=[5, 7], offset_bound="clamp", bias="log_cpb", convention="datpp2023"
    )
    assert by_string == DeformableAttentionConfig(
        12, 4, groups=2, size=(5, 7), offset_bound=OffsetBound.CLAMP, bias=BiasKind.LOG_CPB,
        convention=Convention.DATPP2023,
    )  # fmt: skip
    assert by_string.size == (5, 7)


def test_deprecated_string_warns_at_the_caller():
    """The old value is converted; the warning points to the line that builds the configuration."""
    message = "'tanh_pixels' is deprecated, use 'tanh_cells'"
    with pytest.warns(DeprecationWarning, match=message) as built:
        config = DeformableAttentionConfig(12, 4, groups=2, size=(5, 7), offset_bound="tanh_pixels", bias="table")
    with pytest.warns(DeprecationWarning, match=message) as replaced:
        dataclasses.replace(LAYER, offset_bound="tanh_pixels")
    assert config.offset_bound is OffsetBound.TANH_CELLS
    assert {warning[0].filename for warning in (built, replaced)} == {__file__}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bias": "junk"},
            "bias: expected BiasKind, or one of 'table', 'fixed', 'log_cpb', 'depthwise' or 'none'",
        ),
        ({"convention": "dat"}, "convention: expected Convention, or one of 'cell_center', 'paper', 'cvpr2022' or"),
        ({"stride": 1.5}, "stride: expected an integer >= 1, got 1.5"),
        ({"attention_dropout": 2}, "attention_dropout: expected a finite number >= 0 and < 1, got 2"),
        ({"size": 224}, r"size: expected \(H, W\), two integers >= 1, got 224"),
    ],
)
def test_messages(changes, message):
    """The message gives the field, the choices or the rule, and the value."""
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LAYER, **changes)


def test_sizes_of_resized_backbones():
    """A resized backbone refuses a size that is no pair, or that leaves a stage with an empty map."""
    backbone = dat_ref.config("dat_tiny")
    assert backbone.resized([256, 320]).image_size == (256, 320)
    with pytest.raises(ConfigError, match=r"image_size: expected \(H, W\), two integers >= 1, got 224"):
        backbone.resized(224)
    with pytest.raises(ConfigError, match=r"image_size: expected at least 32 .*, got \(31, 64\)"):
        backbone.resized((31, 64))


@pytest.mark.parametrize("kind", [DATConfig, DeformableAttentionConfig])
def test_released_sizes(kind):
    """A released size may be one integer, the side of a square; other values are refused by their released name."""
    name = "img_size" if kind is DATConfig else "q_size"
    with pytest.raises(ConfigError, match=rf"{name}: expected \(H, W\), two integers >= 1, got"):
        kind.from_official(_released(kind, 7.5), release="cvpr2022")
    square = kind.from_official(_released(kind, 64), release="cvpr2022")
    assert (square.image_size if kind is DATConfig else square.size) == (64, 64)


def _released(kind: type, size: Any) -> dict[str, Any]:
    if kind is DATConfig:
        from helpers.backbones import TINY_2022

        return {**TINY_2022, "img_size": size}
    return {
        "q_size": size, "n_heads": 6, "n_head_channels": 2, "n_groups": 3, "stride": 1, "offset_range_factor": 2,
        "use_pe": True, "dwc_pe": False, "no_off": False, "fixed_pe": False, "stage_idx": 2,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ both backends


@pytest.mark.parametrize(
    "options",
    [
        {"offset_bound": "tanh_cells", "bias": "table", "size": [5, 7]},
        {"offset_bound": "none", "bias": "fixed", "size": (5, 7), "convention": "paper"},
        {"offset_bound": "clamp", "bias": "log_cpb", "convention": "datpp2023"},
        {"offset_bound": "raw", "bias": "depthwise", "convention": "CVPR2022"},
    ],
)
def test_numpy_and_torch_build_the_same_layer(options):
    """A layer built from strings has the same parameters and the same output in NumPy and in torch."""
    torch = pytest.importorskip("torch")
    import dat_ref.torch as dt

    config = DeformableAttentionConfig(12, 4, groups=2, **options)
    module = dt.DeformableAttention(config).double()
    params = {name: value.detach().numpy() for name, value in module.named_parameters()}
    spec = init_params(config, 0, dtype=np.float64)
    assert {name: leaf.shape for name, leaf in dat_ref.params.flatten(spec).items()} == {
        name: value.shape for name, value in params.items()
    }
    x = np.random.default_rng(0).standard_normal((2, 12, 5, 7))
    expected, trace = DeformableAttention(config, dat_ref.params.unflatten(params))(x, return_trace=True)
    with torch.no_grad():
        actual = module(torch.from_numpy(x))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-9)
    assert (np.abs(trace.offsets).max() > 0) == (config.offset_bound is not OffsetBound.NONE)


@pytest.mark.parametrize("name", ["backend", "sampler", "init"])
def test_torch_options_are_checked_at_construction(name):
    """A wrong name of a backend, a sampler or an initialization is refused before any call."""
    pytest.importorskip("torch")
    import dat_ref.torch as dt
    from dat_ref.torch.block import attention_module

    backbone = DATConfig(((BlockConfig(WindowAttentionConfig(8, 2, 3)),),), num_classes=3)
    builders = [
        lambda **options: dt.DeformableAttention(LAYER, **options),
        lambda **options: attention_module(NeighborhoodAttentionConfig(12, 6), **options),
        lambda **options: attention_module(WindowAttentionConfig(12, 6, 3), **options),
        lambda **options: dt.DAT(backbone, **options),
        lambda **options: dt.create_model("dat_nano", **options),
    ]
    for build in builders:
        with pytest.raises(ConfigError, match=rf"^{name}: expected .*, got 'typo'$"):
            build(**{name: "typo"})


def test_torch_modules_check_their_own_options():
    """The modules of the peers, and `set_backend`, refuse wrong names too."""
    pytest.importorskip("torch")
    import dat_ref.torch as dt
    from dat_ref.torch.peers import PEER_MODULES

    with pytest.raises(ConfigError, match=r"backend: expected .*, got 'typo'"):
        PEER_MODULES[NeighborhoodAttentionConfig](NeighborhoodAttentionConfig(12, 6), backend="typo")
    for config in (DeformableConvConfig(12), MultiScaleDeformableConfig(12, 6), PerQueryAttentionConfig(12, 6),
                   DATDCNAttentionConfig(12, 6)):  # fmt: skip
        with pytest.raises(ConfigError, match=r"sampler: expected .*, got 'typo'"):
            PEER_MODULES[type(config)](config, sampler="typo")
    model = dt.DAT(DATConfig(((BLOCK,),), num_classes=3))
    with pytest.raises(ConfigError, match="backend: expected"):
        model.set_backend("typo")
    with pytest.raises(ConfigError, match="sampler: expected"):
        model.set_backend("auto", sampler="typo")
    assert model.stages[0].blocks[0].attention.backend == "auto"


def test_initialization_of_the_offsets_is_checked():
    """`init_params` refuses an unknown initialization."""
    with pytest.raises(ConfigError, match="offsets: expected 'released' or 'zero_offset', got 'zero'"):
        init_params(LAYER, 0, offsets="zero")


def test_options_of_the_core():
    """The core refuses an unknown resolution or convention, in NumPy and in torch."""
    q, k = np.ones((1, 2, 6, 3)), np.ones((1, 2, 4, 3))
    points, table = np.zeros((1, 1, 4, 2)), np.ones((2, 3, 5))
    good: dict[str, Any] = {"query_size": (2, 3), "convention": Convention.PAPER, "resolution": "fractions"}
    for name, value in (("resolution", "x"), ("convention", "paper"), ("query_size", 6)):
        options = {**good, name: value}
        with pytest.raises(ConfigError, match=rf"^{name}: expected"):
            deformable_attention(q, k, k, points, table, **options)
        with pytest.raises(ConfigError, match=rf"^{name}: expected"):
            deformable_attention_vjp(q, q, k, k, points, table, **options)
    torch = pytest.importorskip("torch")
    from dat_ref.torch import functional

    tensors = [torch.from_numpy(each) for each in (q, k, k, points, table)]
    for name, value in (("resolution", "x"), ("convention", "paper")):
        with pytest.raises(ConfigError, match=rf"^{name}: expected"):
            functional.deformable_attention(*tensors, **{**good, name: value})
    with pytest.raises(ConfigError, match="bound: expected OffsetBound, got 'raw'"):
        functional.bound_offsets(torch.zeros(1, 1, 2, 2, 2), torch.zeros(2, 2, 2), "raw", offset_range=2.0,
                                 convention=Convention.PAPER)  # fmt: skip
