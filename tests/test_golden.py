"""Golden fixtures of the released code: outputs, points, stage features and all gradients agree to 1e-9."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.golden import golden_names, load_golden, official_state_dicts, under

from dat_ref import (
    DAT,
    DATConfig,
    DeformableAttention,
    NeighborhoodAttentionConfig,
    WindowAttentionConfig,
    config,
    official,
)
from dat_ref.backbone import dat_shapes
from dat_ref.block import ATTENTIONS
from dat_ref.params import count, flatten

AGREEMENT = 1e-9
PEERS = ["peer_window", "peer_shifted_window", "peer_neighborhood", "peer_neighborhood_small_map"]
BUFFERS = ("relative_position_index", "attn_mask")


@pytest.mark.parametrize("name", golden_names("module"))
def test_layer_is_the_released_one(name):
    """Output, points and reference of the layer equal those of the released module."""
    meta, arrays = load_golden(name)
    layer = DeformableAttention.from_official(meta["ctor"], under("state", arrays), release=meta["release"])
    y, trace = layer(arrays["x"], return_trace=True)
    assert_agree(y, arrays["y"], AGREEMENT, "y")
    assert_agree(trace.points, arrays["pos"], AGREEMENT, "points")
    assert_agree(trace.reference, arrays["ref"], AGREEMENT, "reference")


@pytest.mark.parametrize("name", golden_names("module"))
def test_layer_has_the_released_gradients(name):
    """Gradients of the input and of all parameters equal those of the released module."""
    meta, arrays = load_golden(name)
    layer = DeformableAttention.from_official(meta["ctor"], under("state", arrays), release=meta["release"])
    _, pullback = layer.vjp(arrays["x"])
    grad_x, grad_params = pullback(arrays["cot"])
    expected = under("grad", arrays)
    assert_agree(grad_x, expected.pop("x"), AGREEMENT, "x")
    found = layer.to_official(grad_params)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert_agree(found[key], grad, AGREEMENT, key)


def peer_config(meta, dim):
    """Return the configuration of a peer's fixture."""
    if meta["kind"] == "neighborhood":
        return NeighborhoodAttentionConfig(dim, meta["heads"], meta["kernel_size"], small_map="pad")
    return WindowAttentionConfig(dim, meta["heads"], meta["window"], meta.get("shift", 0))


@pytest.mark.parametrize("name", PEERS)
def test_peer_is_the_released_one(name):
    """Window and neighborhood attention equal the released ones, with every gradient."""
    meta, arrays = load_golden(name)
    peer = peer_config(meta, arrays["x"].shape[1])
    attention, names = ATTENTIONS[type(peer)], official.attention_names(peer)
    params = official.to_ours(under("state", arrays), names, attention.shapes(peer))
    y, trace = attention.forward(arrays["x"], params, peer)
    assert_agree(y, arrays["y"], AGREEMENT, "y")
    grad_x, grad_params = attention.vjp(arrays["cot"], trace, params, peer)
    expected = under("grad", arrays)
    assert_agree(grad_x, expected.pop("x"), AGREEMENT, "x")
    found = official.to_official(grad_params, names)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert_agree(found[key], grad, AGREEMENT, key)


@pytest.mark.parametrize("name", ["model22_mini", "model23_mini"])
def test_backbone_is_the_released_one(name):
    """Logits, stage features and the points of every deformable block equal those of the released backbone."""
    meta, arrays = load_golden(name)
    model = DAT.from_official(meta["cfg"], under("state", arrays), release=meta["release"])
    logits, trace = model(arrays["x"], return_trace=True)
    assert_agree(logits, arrays["logits"], AGREEMENT, "logits")
    for index, stage in enumerate(trace.stages):
        assert_agree(stage.output, arrays[f"stage{index}"], AGREEMENT, f"stage{index}")
    positions = [key for key in arrays if key.startswith("pos.")]
    assert len(positions) == {"model22_mini": 2, "model23_mini": 5}[name]
    for key in positions:
        _, stage, block = key.split(".")
        assert_agree(trace.stages[int(stage)].blocks[int(block)].attention.points, arrays[key], AGREEMENT, key)
    for feature, stage in zip(model.forward_intermediates(arrays["x"]), trace.stages, strict=True):
        np.testing.assert_array_equal(feature, stage.output)


@pytest.mark.parametrize("name", ["model22_mini", "model23_mini"])
def test_released_state_survives_the_round_trip(name):
    """to_official returns the released state dict that was passed to from_official."""
    meta, arrays = load_golden(name)
    state = under("state", arrays)
    model = DAT.from_official(meta["cfg"], state, release=meta["release"])
    back = model.to_official(model.params)
    assert back.keys() == {key for key in state if not key.endswith(BUFFERS)}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key])


# ------------------------------------------------------------------------------------------------ the eight presets


def our_name(released_key):
    """Return the preset's name for a key such as ``datpp2023/dat_tiny``."""
    release, name = released_key.split("/")
    return name.replace("dat_", "dat_pp_") if release == "datpp2023" else name


@pytest.mark.parametrize("released_key", official_state_dicts())
def test_preset_has_exactly_the_released_parameters(released_key):
    """Mapped names, shapes and totals equal those of the released model; buffers are not parameters."""
    released = official_state_dicts()[released_key]
    preset = config(our_name(released_key))
    shapes = dat_shapes(preset)
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in flatten(shapes).items()}
    found = {
        name: list(leaf.shape) for name, leaf in official.to_official(empty, official.backbone_names(preset)).items()
    }
    assert found == {name: shape for name, shape in released["state"].items() if not name.endswith(BUFFERS)}
    assert count(shapes) == released["parameters"]


@pytest.mark.parametrize("released_key", official_state_dicts())
def test_preset_is_the_released_configuration(released_key):
    """A preset equals what from_official builds from the released arguments."""
    release = released_key.split("/")[0]
    released = official_state_dicts()[released_key]["config"]
    assert DATConfig.from_official(released, release=release) == config(our_name(released_key))


def test_totals_written_in_the_papers_tables():
    """dat_tiny has 28 319 138 parameters, dat_pp_tiny 23 962 876."""
    assert count(dat_shapes(config("dat_tiny"))) == 28_319_138
    assert count(dat_shapes(config("dat_pp_tiny"))) == 23_962_876
