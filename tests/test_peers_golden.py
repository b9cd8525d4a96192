"""Peers against recorded outputs and gradients of the released modules, to 1e-9."""

import numpy as np
import pytest
from helpers.agreement import assert_agree
from helpers.golden import load_golden, under

from dat_ref import official
from dat_ref.params import flatten
from dat_ref.peers import MultiScaleDeformableConfig, PyramidAttentionConfig
from dat_ref.peers.deform_conv import deform_conv2d, deform_conv2d_vjp
from dat_ref.peers.ms_deform_attn import (
    multi_scale_deformable,
    multi_scale_deformable_names,
    multi_scale_deformable_shapes,
    multi_scale_deformable_vjp,
)
from dat_ref.peers.pyramid import pyramid_attention, pyramid_attention_vjp, pyramid_names, pyramid_shapes

TOLERANCE = 1e-9


@pytest.mark.parametrize("name", ["peer_dcn_v1", "peer_dcn_v2"])
def test_deformable_convolution_is_torchvisions(name):
    """Output and gradients of map, offsets, weights, bias and mask equal torchvision's."""
    meta, arrays = load_golden(name)
    inputs = {key: arrays[key] for key in ("x", "offset", "weight", "bias", "mask") if key in arrays}
    geometry = {key: meta[key] for key in ("stride", "padding", "dilation")}
    assert_agree(deform_conv2d(**inputs, **geometry), arrays["y"], TOLERANCE, "y")
    grads = deform_conv2d_vjp(arrays["cot"], **inputs, **geometry)._asdict()
    for key in inputs:
        assert_agree(grads[key], arrays[f"grad.{key}"], TOLERANCE, key)
    assert (grads["mask"] is None) == (name == "peer_dcn_v1")


@pytest.mark.parametrize("name", ["single", "multi", "boxes"])
def test_multi_scale_deformable_attention_is_deformable_detrs(name):
    """Output and gradients of queries, maps, references and parameters equal Deformable DETR's."""
    meta, arrays = load_golden(f"peer_ms_deform_attn_{name}")
    config = MultiScaleDeformableConfig(
        dim=arrays["query"].shape[2], heads=meta["n_heads"], points=meta["n_points"], levels=len(meta["shapes"])
    )
    names, shapes = multi_scale_deformable_names(config), multi_scale_deformable_shapes(config)
    params = official.to_ours(under("state", arrays), names, shapes)
    inputs = [arrays[key] for key in ("query", "value", "reference_points")]
    y, trace = multi_scale_deformable(*inputs, meta["shapes"], params, config)
    assert_agree(y, arrays["y"], TOLERANCE, "y")
    grads = multi_scale_deformable_vjp(arrays["cot"], trace, params, config)
    found = {**official.to_official(grads.params, names), **grads._asdict()}
    expected = under("grad", arrays)
    assert expected.keys() == found.keys() - {"params"}
    for key, value in expected.items():
        assert_agree(found[key], value, TOLERANCE, key)


def test_spatial_reduction_attention_is_the_released_one():
    """Output and all gradients equal those of the released module."""
    meta, arrays = load_golden("peer_pyramid")
    config = PyramidAttentionConfig(arrays["x"].shape[1], meta["heads"], meta["sr_ratio"])
    names = pyramid_names(config)
    assert names.keys() == flatten(pyramid_shapes(config)).keys()
    params = official.to_ours(under("state", arrays), names, pyramid_shapes(config))
    y, trace = pyramid_attention(arrays["x"], params, config)
    assert_agree(y, arrays["y"], TOLERANCE, "y")
    grad_x, grads = pyramid_attention_vjp(arrays["cot"], trace, params, config)
    found = {**official.to_official(grads, names), "x": grad_x}
    for key, value in under("grad", arrays).items():
        assert_agree(found[key], value, TOLERANCE, key)


def test_wrong_offset_order_is_noticed():
    """Offsets in (dx, dy) order, or with taps before groups, are rejected."""
    _, arrays = load_golden("peer_dcn_v2")
    inputs = {key: arrays[key] for key in ("x", "weight", "bias", "mask")}
    groups = arrays["offset"].reshape(1, 2, 9, 2, 4, 3)
    for wrong in (groups[:, :, :, ::-1], groups.swapaxes(1, 2)):
        offset = np.ascontiguousarray(wrong).reshape(arrays["offset"].shape)
        y = deform_conv2d(offset=offset, **inputs, stride=2, padding=1)
        assert np.abs(y - arrays["y"]).max() > 0.1
