"""The peers' torch modules for the tests: one configuration of each, and the check of a module against the spec."""

from dataclasses import fields

import numpy as np
import torch
from strategies import numbers

from dat_ref import Convention, NeighborhoodAttentionConfig, WindowAttentionConfig
from dat_ref.peers import (
    ATTENTIONS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
)
from dat_ref.torch.block import attention_module

from .layers import random_params
from .tensors import assert_close, assert_trees_close, tensor

CONFIGS = {
    "multi_head": MultiHeadAttentionConfig(6, 3, (4, 5)),
    "multi_head_without_bias": MultiHeadAttentionConfig(6, 2),
    "pyramid": PyramidAttentionConfig(6, 3, 2),
    "pyramid_1": PyramidAttentionConfig(6, 2),
    "deform_conv": DeformableConvConfig(6, groups=3, offset_groups=2),
    "deform_conv_v1": DeformableConvConfig(6, 5, groups=2, offset_groups=3, modulated=False),
    "ms_deform": MultiScaleDeformableConfig(6, 3, 4),
    "ms_deform_dot": MultiScaleDeformableConfig(6, 2, 3, scoring="dot_product"),
    "per_query": PerQueryAttentionConfig(12, 6, groups=3, offset_kernel_size=3),
    "dat_dcn": DATDCNAttentionConfig(6, 3, 3),
    "dat_dcn_cell_center": DATDCNAttentionConfig(6, 2, 2, Convention.CELL_CENTER),
    "dilated_2": NeighborhoodAttentionConfig(6, 3, 3, dilation=2),
    "dilated_3": NeighborhoodAttentionConfig(6, 2, 5, small_map="pad", dilation=3),
    "window": WindowAttentionConfig(6, 3, 3, shift=1),
}


def build_peer(config, seed=0, dtype=torch.float64, **options):
    """Return a module with random parameters, and the parameters as a tree."""
    params = random_params(ATTENTIONS[type(config)].shapes(config), np.random.default_rng(seed))
    module = attention_module(config, **options).to(dtype)
    module.load_numpy(params)
    return module, params


def assert_trace(ours, theirs):
    """Check every array of a trace against the spec's array of the same name."""
    assert type(ours) is type(theirs)
    for field in fields(theirs):
        actual, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(expected, np.ndarray):
            assert_close(actual, expected, what=field.name)
        elif hasattr(expected, "__dataclass_fields__"):
            assert_trace(actual, expected)
        else:
            assert actual == expected, field.name


def assert_peer(config, size, batch=2, seed=0, **options):
    """Check output, trace and all gradients of a module against the spec's, in float64."""
    spec = ATTENTIONS[type(config)]
    module, params = build_peer(config, seed, **options)
    x, cotangent = numbers(seed + 1, batch, config.dim, *size), numbers(seed + 2, batch, config.dim, *size)
    y, trace = spec.forward(x, params, config)
    grad_x, grad_params = spec.vjp(cotangent, trace, params, config)
    leaf = tensor(x)
    actual = module(leaf)
    assert_close(actual, y, what="y")
    actual.backward(torch.from_numpy(cotangent))
    assert_close(leaf.grad, grad_x, what="x")
    assert_trees_close(module.to_numpy(grad=True), grad_params)
    again, traced = module(leaf, return_trace=True)
    assert_close(again, y, what="y of the trace")
    assert_trace(traced, trace)


class ScaledGradient(torch.autograd.Function):
    """Identity with a gradient that is 0.1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001
