"""Parameter initialization.

Weights and biases are uniform in ±1/√fan_in. This is PyTorch's default, which the released models use: their own
``reset_parameters`` has no effect. Norms have weight one and bias zero. Bias tables are normal with σ = 0.01 (0.02 in
neighborhood attention), truncated at ±2. In the releases the offset network is initialized like any other layer, so the
initial offsets are not zero. With ``offsets="zero_offset"`` they are zero, as in deformable convolution. Deformable
convolution and Deformable DETR's attention have their own rules, in `dat_ref.peers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import truncnorm

from ._checks import Array, Tree
from .backbone import dat_shapes
from .config import CHECK_INIT, AttentionConfig, DATConfig, Init
from .peers.registry import row_of


def init_params(
    config: DATConfig | AttentionConfig,
    seed: int | np.random.Generator,
    *,
    offsets: Init = "released",
    dtype: Any = np.float32,
) -> Tree:
    """Return seeded initial parameters for a backbone or for one attention layer.

    Args:
        config: configuration of the backbone or the layer.
        seed: random seed, or a generator.
        offsets: ``"released"``, or ``"zero_offset"`` to set the last layer of every offset network to zero.
        dtype: dtype of the parameters.

    Raises:
        ConfigError: if `offsets` is unknown.

    >>> from dat_ref import DeformableAttentionConfig
    >>> config = DeformableAttentionConfig(dim=4, heads=2, size=(3, 5))
    >>> {name: leaf.shape for name, leaf in init_params(config, seed=0)["position_bias"].items()}
    {'table': (2, 5, 9)}
    """
    CHECK_INIT("offsets", offsets)
    rng = np.random.default_rng(seed)
    if not isinstance(config, DATConfig):
        params = _init_tree(rng, row_of(config).shapes(config), (), offsets, dtype)
        _init_special(params, config, rng)
        return params
    params = _init_tree(rng, dat_shapes(config), (), offsets, dtype)
    for blocks, stage in zip(config.stages, params["stages"], strict=True):
        for block, block_params in zip(blocks, stage["blocks"], strict=True):
            _init_special(block_params["attention"], block.attention, rng)
            for name in ("layer_scale1", "layer_scale2"):
                if name in block_params:
                    block_params[name]["weight"][:] = block.layer_scale
    return params


def _init_special(params: Tree, config: AttentionConfig, rng: np.random.Generator) -> None:
    """Apply the attention's own initialization rule in place, if it has one."""
    init = row_of(config).init
    if init is not None:
        init(params, config, rng)


def _init_tree(rng: np.random.Generator, tree: Tree, path: tuple[str, ...], offsets: Init, dtype: Any) -> Tree:
    if isinstance(tree, list):
        return [_init_tree(rng, branch, path, offsets, dtype) for branch in tree]
    fan_in = int(np.prod(tree["weight"][1:])) if "weight" in tree else 0
    return {
        name: (
            _init_tree(rng, leaf, (*path, name), offsets, dtype)
            if isinstance(leaf, (Mapping, list))
            else _init_leaf(rng, leaf, name, path, fan_in, offsets).astype(dtype)
        )
        for name, leaf in tree.items()
    }


def _init_leaf(
    rng: np.random.Generator, shape: tuple[int, ...], name: str, path: tuple[str, ...], fan_in: int, offsets: Init
) -> Array:
    module = path[-1] if path else ""
    if name == "table":
        sigma = 0.02 if module == "neighborhood_bias" else 0.01
        return sigma * np.asarray(truncnorm.rvs(-2 / sigma, 2 / sigma, size=shape, random_state=rng))
    if module.startswith("norm"):
        return np.full(shape, float(name == "weight"))
    if module.startswith("layer_scale"):
        return np.ones(shape)  # `init_params` sets the configured value
    if module == "pointwise" and offsets == "zero_offset":
        return np.zeros(shape)
    return rng.uniform(-1, 1, shape) / np.sqrt(fan_in)
