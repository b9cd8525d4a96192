"""Backbone: patch embedding, four stages with downsampling between them, norm, average pooling, head.

    image ─ embed /4 ─ stage 1 ─ /2 ─ stage 2 ─ /2 ─ stage 3 ─ /2 ─ stage 4 ─ LayerNorm ─ mean ─ linear ─ logits

There are two kinds of embedding, one per release. ``"patch"`` is a 4×4 convolution of stride 4; the downsampling is
2×2 of stride 2. ``"conv"`` is two overlapping 3×3 convolutions of stride 2 with a GELU between them; the downsampling
is one such convolution. If the sides of an image are not multiples of the patch, zeros are added at the bottom and
right. With both kinds the maps have ⌈H/4⌉, ⌈H/8⌉, … rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from . import official
from ._checks import Array, Tree, check_array, check_map
from .block import BlockTrace, block, block_macs, block_shapes, block_vjp
from .config import DATConfig
from .ops.basic import (
    Padding,
    conv2d,
    conv2d_macs,
    conv2d_vjp,
    conv_size,
    gelu,
    gelu_vjp,
    layer_norm,
    layer_norm_vjp,
    linear,
    linear_macs,
    linear_vjp,
)
from .ops.grid import Size
from .params import check_params

# ------------------------------------------------------------------------------------------------ embeddings


@dataclass(frozen=True)
class EmbedTrace:
    """Intermediates of one strided convolution and its norm."""

    x: Array
    projected: Array
    output: Array


def _embed_geometry(size: Size, kernel: int) -> tuple[int, Padding]:
    """Return stride and padding: 3×3 convolutions overlap (stride 2), other kernels tile (stride = kernel size)."""
    if kernel == 3:
        return 2, ((1, 1), (1, 1))
    bottom, right = (-length % kernel for length in size)
    return kernel, ((0, bottom), (0, right))


def embed(x: Array, projection: Tree, norm: Tree) -> tuple[Array, EmbedTrace]:
    """Apply a strided convolution and a layer norm: (B, C, H, W) → (B, C', ⌈H/r⌉, ⌈W/r⌉)."""
    stride, padding = _embed_geometry(x.shape[2:], projection["weight"].shape[-1])
    projected = conv2d(x, **projection, stride=stride, padding=padding)
    output = layer_norm(projected, **norm)
    return output, EmbedTrace(x, projected, output)


def embed_vjp(cotangent: Array, trace: EmbedTrace, projection: Tree, norm: Tree) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params)."""
    stride, padding = _embed_geometry(trace.x.shape[2:], projection["weight"].shape[-1])
    normed = layer_norm_vjp(cotangent, trace.projected, **norm)
    convolved = conv2d_vjp(normed.x, trace.x, **projection, stride=stride, padding=padding)
    return convolved.x, {"projection": convolved.params, "norm": normed.params}


def embed_macs(batch: int, size: Size, channels_in: int, channels_out: int, kernel: int) -> tuple[int, Size]:
    """Return the multiply-adds of `embed` and the size of its output map."""
    stride, padding = _embed_geometry(size, kernel)
    height, width = conv_size(size, kernel, stride, padding)
    return conv2d_macs(batch * height * width, channels_in, channels_out, kernel), (height, width)


def embed_image(x: Array, params: list[Tree]) -> tuple[Array, list[EmbedTrace]]:
    """Run the patch embedding: one `embed` for ``"patch"``, two with a GELU between them for ``"conv"``."""
    traces: list[EmbedTrace] = []
    for part in params:
        x, trace = embed(gelu(x) if traces else x, **part)
        traces.append(trace)
    return x, traces


def embed_image_vjp(cotangent: Array, traces: list[EmbedTrace], params: list[Tree]) -> tuple[Array, list[Tree]]:
    """Return (∂L/∂x, ∂L/∂params)."""
    grads: list[Tree] = []
    for index in reversed(range(len(params))):
        cotangent, grad = embed_vjp(cotangent, traces[index], **params[index])
        if index:
            cotangent = gelu_vjp(cotangent, traces[index - 1].output)
        grads.insert(0, grad)
    return cotangent, grads


# ------------------------------------------------------------------------------------------------ shapes


def dat_shapes(config: DATConfig) -> Tree:
    """Return the tree of parameter shapes of the backbone."""
    dims = config.dims
    if config.patch_embedding == "patch":
        embedding = [_embed_shapes(config.in_channels, dims[0], kernel=4, bias=True)]
    else:
        widths = (config.in_channels, dims[0] // 2, dims[0])
        embedding = [_embed_shapes(widths[i], widths[i + 1], kernel=3, bias=True) for i in range(2)]
    downsample_kernel = 2 if config.patch_embedding == "patch" else 3
    shapes: dict[str, Tree] = {
        "patch_embedding": embedding,
        "stages": [{"blocks": [block_shapes(block) for block in blocks]} for blocks in config.stages],
        "downsamples": [
            _embed_shapes(dims[i], dims[i + 1], downsample_kernel, bias=False) for i in range(len(dims) - 1)
        ],
        "norm": _affine_shapes(dims[-1]),
    }
    if config.num_classes:
        shapes["head"] = {"weight": (config.num_classes, dims[-1]), "bias": (config.num_classes,)}
    return shapes


def _embed_shapes(channels_in: int, channels_out: int, kernel: int, bias: bool) -> Tree:
    projection: dict[str, tuple[int, ...]] = {"weight": (channels_out, channels_in, kernel, kernel)}
    if bias:
        projection["bias"] = (channels_out,)
    return {"projection": projection, "norm": _affine_shapes(channels_out)}


def _affine_shapes(dim: int) -> Tree:
    return {"weight": (dim,), "bias": (dim,)}


# ------------------------------------------------------------------------------------------------ traces


class Step(NamedTuple):
    """One block of a forward pass, as `DAT.walk` yields it."""

    stage: int
    block: int
    embeddings: list[EmbedTrace]  # embedding or downsampling before the stage; empty except for its first block
    trace: BlockTrace
    output: Array  # (B, C, H, W)


@dataclass(frozen=True)
class StageTrace:
    """Intermediates of one stage: the embedding or downsampling before it, its blocks, its output map."""

    embeddings: list[EmbedTrace]
    blocks: list[BlockTrace]
    output: Array  # (B, C, H, W)


@dataclass(frozen=True)
class DATTrace:
    """All intermediates of one forward pass."""

    stages: list[StageTrace]
    normed: Array  # (B, C, H, W), the last map after the final norm
    pooled: Array  # (B, C); with ``global_pool=""`` equal to `normed`


# ------------------------------------------------------------------------------------------------ class


class DAT:
    """DAT or DAT++ backbone.

    Args:
        config: backbone configuration; ``dat_ref.config("dat_tiny")`` returns a preset.
        params: parameter tree with the shapes of `dat_shapes`; ``dat_ref.init_params(config, seed)`` returns one.

    Raises:
        CheckpointError: if the names or shapes of `params` do not fit the configuration, or a value is not finite.
    """

    def __init__(self, config: DATConfig, params: Tree) -> None:
        self.config = config
        self.params = check_params(params, dat_shapes(config))

    # -------------------------------------------------------------------------------------------- forward

    def walk(self, x: Array) -> Iterator[Step]:
        """Run the blocks one by one. A trace is freed before the next block, unless the caller stores it.

        Args:
            x: images (B, channels, H, W). Each map must be at least as large as the stride of its attention layers.

        Raises:
            ShapeError, ConfigError: if the images do not fit; raised at the block where this is found.
        """
        x = check_map("x", x, self.config.in_channels)
        y, embeddings = embed_image(x, self.params["patch_embedding"])
        for stage, blocks in enumerate(self.config.stages):
            if stage:
                y, trace = embed(y, **self.params["downsamples"][stage - 1])
                embeddings = [trace]
            for index, block_config in enumerate(blocks):
                y, block_trace = block(y, self.params["stages"][stage]["blocks"][index], block_config)
                yield Step(stage, index, embeddings if index == 0 else [], block_trace, y)

    @overload
    def __call__(self, x: Array, return_trace: Literal[False] = ...) -> Array: ...

    @overload
    def __call__(self, x: Array, return_trace: Literal[True]) -> tuple[Array, DATTrace]: ...

    def __call__(self, x: Array, return_trace: bool = False) -> Array | tuple[Array, DATTrace]:
        """Return logits (B, classes) of images (B, channels, H, W), and the trace if requested.

        With ``global_pool=""``: logits of every position of the last map, (B, classes, Hs, Ws).
        Without a head (``num_classes=0``): the features instead of the logits.
        """
        if return_trace:
            trace = self._trace(x)
            return self.classify(trace.pooled), trace
        return self.classify(self.pool(self.forward_intermediates(x)[-1]))

    def forward_intermediates(self, x: Array) -> list[Array]:
        """Return one feature map per stage, (B, dims[i], ⌈H/4⌉, …), before the final norm."""
        outputs: dict[int, Array] = {}
        for step in self.walk(x):
            outputs[step.stage] = step.output
        return list(outputs.values())

    def pool(self, features: Array) -> Array:
        """Normalize the last feature map (B, C, H, W) and average its pixels: (B, C).

        With ``global_pool=""`` without the average: (B, C, H, W).
        """
        return self._average(layer_norm(features, **self.params["norm"]))

    def _average(self, normed: Array) -> Array:
        return normed if self.config.global_pool == "" else normed.mean(axis=(2, 3))

    def classify(self, pooled: Array) -> Array:
        """Return logits (B, classes) of pooled features (B, C), or (B, classes, H, W) of a map (B, C, H, W)."""
        if not self.config.num_classes:
            return pooled
        logits = linear(_flatten_map(pooled), **self.params["head"])
        return logits.reshape(*logits.shape[:2], *pooled.shape[2:])

    def _trace(self, x: Array) -> DATTrace:
        steps = list(self.walk(x))
        stages = []
        for stage in range(len(self.config.stages)):
            stage_steps = [step for step in steps if step.stage == stage]
            blocks = [step.trace for step in stage_steps]
            stages.append(StageTrace(stage_steps[0].embeddings, blocks, stage_steps[-1].output))
        normed = layer_norm(stages[-1].output, **self.params["norm"])
        return DATTrace(stages, normed, self._average(normed))

    # -------------------------------------------------------------------------------------------- gradient

    def vjp(self, x: Array) -> tuple[Array, Callable[[Array], tuple[Array, Tree]]]:
        """Return logits and the pullback: ``pullback(∂L/∂logits)`` returns (∂L/∂x, ∂L/∂params).

        The pullback refers to `x` and to the parameters, without copies: change neither before its last call.
        """
        logits, trace = self(x, return_trace=True)

        def pullback(cotangent: Array) -> tuple[Array, Tree]:
            axes = dict(zip(("B", "classes", "H", "W"), logits.shape))
            return self._pull_back(check_array("cotangent", cotangent, axes), trace)

        return logits, pullback

    def _pull_back(self, cotangent: Array, trace: DATTrace) -> tuple[Array, Tree]:
        params = self.params
        grads: dict[str, Tree] = {}
        if self.config.num_classes:
            tokens = _flatten_map(trace.pooled)
            head = linear_vjp(_flatten_map(cotangent), tokens, **params["head"])
            cotangent, grads["head"] = head.x.reshape(trace.pooled.shape), head.params
        if self.config.global_pool == "avg":
            height, width = trace.normed.shape[2:]
            cotangent = np.broadcast_to(cotangent[:, :, None, None] / (height * width), trace.normed.shape)
        norm = layer_norm_vjp(cotangent, trace.stages[-1].output, **params["norm"])
        grad, grads["norm"] = norm.x, norm.params
        grads["stages"] = [{"blocks": [None] * len(blocks)} for blocks in self.config.stages]
        grads["downsamples"] = [None] * (len(self.config.stages) - 1)
        for stage in reversed(range(len(self.config.stages))):
            grad = self._pull_back_stage(grad, stage, trace.stages[stage], grads)
        return grad, grads

    def _pull_back_stage(self, grad: Array, stage: int, trace: StageTrace, grads: Tree) -> Array:
        """Store the gradients of one stage and of the embedding before it; return ∂L/∂input of the embedding."""
        params = self.params["stages"][stage]["blocks"]
        for index in reversed(range(len(params))):
            config = self.config.stages[stage][index]
            grad, block_grads = block_vjp(grad, trace.blocks[index], params[index], config)
            grads["stages"][stage]["blocks"][index] = block_grads
        if stage == 0:
            grad, grads["patch_embedding"] = embed_image_vjp(grad, trace.embeddings, self.params["patch_embedding"])
            return grad
        downsample = self.params["downsamples"][stage - 1]
        grad, grads["downsamples"][stage - 1] = embed_vjp(grad, trace.embeddings[0], **downsample)
        return grad

    # -------------------------------------------------------------------------------------------- released names

    @classmethod
    def from_official(cls, mapping: Mapping[str, Any], state: Mapping[str, Any], *, release: str) -> DAT:
        """Build from the arguments and the state dict of the released model.

        Raises:
            CheckpointError: with a report of missing, unexpected and mis-shaped keys.
        """
        config = DATConfig.from_official(mapping, release=release)
        return cls(config, official.to_ours(state, official.backbone_names(config), dat_shapes(config)))

    def to_official(self, params_or_grads: Tree) -> dict[str, Array]:
        """Return parameters or gradients under their released names and shapes."""
        return official.to_official(params_or_grads, official.backbone_names(self.config))


def _flatten_map(x: Array) -> Array:
    """Flatten the spatial axes: (B, C) → (B, C, 1); (B, C, H, W) → (B, C, H·W)."""
    return x.reshape(*x.shape[:2], int(np.prod(x.shape[2:])))


# ------------------------------------------------------------------------------------------------ cost


def dat_macs(batch: int, size: Size, config: DATConfig) -> int:
    """Multiply-adds of the whole backbone on images of `size`."""
    stem = dat_shapes(config)["patch_embedding"]
    total, downsample_kernel = 0, 2 if config.patch_embedding == "patch" else 3
    for part in stem:
        channels_out, channels_in, kernel, _ = part["projection"]["weight"]
        macs, size = embed_macs(batch, size, channels_in, channels_out, kernel)
        total += macs
    for stage, blocks in enumerate(config.stages):
        if stage:
            macs, size = embed_macs(batch, size, config.dims[stage - 1], config.dims[stage], downsample_kernel)
            total += macs
        total += sum(block_macs(batch, size, block_config) for block_config in blocks)
    positions = size[0] * size[1] if config.global_pool == "" else 1
    return total + linear_macs(batch * positions, config.dims[-1], config.num_classes)
