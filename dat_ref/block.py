"""The Transformer block around any of the attentions: residual branches over a map.

    x ← x + DWConv₃ₓ₃(x)                       local perception unit, in DAT++
    x ← x + γ₁ · attention(LayerNorm(x))
    x ← x + γ₂ · MLP(LayerNorm(x))             γ: learned per-channel layer scale, where there is one

The MLP is linear → GELU → linear. With a depthwise convolution between its layers: ``"depthwise"`` (2022 code)
GELU(DWConv(h)), ``"depthwise_residual"`` (2023 code) GELU(h + DWConv(h)).
"""

from __future__ import annotations

from dataclasses import dataclass

from ._checks import Array, Tree
from .config import BlockConfig
from .ops.basic import (
    depthwise_conv2d,
    depthwise_conv2d_macs,
    depthwise_conv2d_vjp,
    gelu,
    gelu_vjp,
    layer_norm,
    layer_norm_vjp,
    linear,
    linear_macs,
    linear_vjp,
)
from .ops.grid import Size
from .peers.registry import ATTENTIONS as ATTENTIONS  # part of this module's names too
from .peers.registry import AttentionTrace

SAME_3X3 = ((1, 1), (1, 1))


def block_shapes(config: BlockConfig) -> Tree:
    """Return the block's parameter tree of shapes."""
    dim, hidden = config.dim, config.dim * config.mlp_ratio
    shapes: dict[str, Tree] = {}
    if config.local_perception:
        shapes["local_perception"] = {"weight": (dim, 1, 3, 3), "bias": (dim,)}
    shapes["norm1"] = {"weight": (dim,), "bias": (dim,)}
    shapes["attention"] = ATTENTIONS[type(config.attention)].shapes(config.attention)
    shapes["norm2"] = {"weight": (dim,), "bias": (dim,)}
    shapes["mlp"] = {
        "linear1": {"weight": (hidden, dim), "bias": (hidden,)},
        "linear2": {"weight": (dim, hidden), "bias": (dim,)},
    }
    if config.mlp != "linear":
        shapes["mlp"]["depthwise"] = {"weight": (hidden, 1, 3, 3), "bias": (hidden,)}
    if config.layer_scale is not None:
        shapes["layer_scale1"] = {"weight": (dim,)}
        shapes["layer_scale2"] = {"weight": (dim,)}
    return shapes


# ------------------------------------------------------------------------------------------------ MLP


@dataclass(frozen=True)
class MLPTrace:
    """Intermediates of `mlp`, (B, ratio·C, H, W) but for the input."""

    x: Array  # (B, C, H, W)
    hidden: Array
    mixed: Array  # after the depthwise convolution; the same as `hidden` without one
    activated: Array


def mlp(x: Array, params: Tree, kind: str) -> tuple[Array, MLPTrace]:
    """Two linear layers with a GELU between, and perhaps a depthwise convolution: see the module's equations."""
    hidden = linear(x, **params["linear1"])
    mixed = hidden
    if kind != "linear":
        mixed = depthwise_conv2d(hidden, **params["depthwise"], padding=SAME_3X3)
    if kind == "depthwise_residual":
        mixed = hidden + mixed
    activated = gelu(mixed)
    return linear(activated, **params["linear2"]), MLPTrace(x, hidden, mixed, activated)


def mlp_vjp(cotangent: Array, trace: MLPTrace, params: Tree, kind: str) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params)."""
    linear2 = linear_vjp(cotangent, trace.activated, **params["linear2"])
    grad_mixed = gelu_vjp(linear2.x, trace.mixed)
    grads: dict[str, Tree] = {"linear2": linear2.params}
    grad_hidden = grad_mixed
    if kind != "linear":
        depthwise = depthwise_conv2d_vjp(grad_mixed, trace.hidden, **params["depthwise"], padding=SAME_3X3)
        grads["depthwise"] = depthwise.params
        grad_hidden = depthwise.x + grad_mixed if kind == "depthwise_residual" else depthwise.x
    linear1 = linear_vjp(grad_hidden, trace.x, **params["linear1"])
    return linear1.x, {**grads, "linear1": linear1.params}


def mlp_macs(pixels: int, dim: int, ratio: int, kind: str) -> int:
    """Multiply-adds over `pixels` = B·H·W."""
    depthwise = 0 if kind == "linear" else depthwise_conv2d_macs(pixels, ratio * dim, 3)
    return 2 * linear_macs(pixels, dim, ratio * dim) + depthwise


# ------------------------------------------------------------------------------------------------ layer scale


def layer_scale(x: Array, weight: Array) -> Array:
    """Scale each channel: y[c] = γ[c] x[c]."""
    return x * weight[:, None, None]


def layer_scale_vjp(cotangent: Array, x: Array, weight: Array) -> tuple[Array, Tree]:
    """∂L/∂x = γ ∂L/∂y, ∂L/∂γ = Σ x ∂L/∂y over batch and pixels."""
    return cotangent * weight[:, None, None], {"weight": (cotangent * x).sum(axis=(0, 2, 3))}


# ------------------------------------------------------------------------------------------------ the block


@dataclass(frozen=True)
class BlockTrace:
    """Intermediates of `block`, each (B, C, H, W) but for the traces."""

    x: Array
    perceived: Array  # after the local perception unit; the same as `x` without one
    attention: AttentionTrace
    attended: Array  # the attention's output, before layer scale and residual
    middle: Array  # after the attention branch
    mlp: MLPTrace
    mixed: Array  # the MLP's output, before layer scale and residual


def block(x: Array, params: Tree, config: BlockConfig) -> tuple[Array, BlockTrace]:
    """Run one block: (B, C, H, W) → (B, C, H, W), and the trace."""
    perceived = x
    if config.local_perception:
        perceived = x + depthwise_conv2d(x, **params["local_perception"], padding=SAME_3X3)
    attend_to = ATTENTIONS[type(config.attention)].forward
    attended, attention_trace = attend_to(
        layer_norm(perceived, **params["norm1"]), params["attention"], config.attention
    )
    middle = perceived + _scaled(attended, params, "layer_scale1")
    mixed, mlp_trace = mlp(layer_norm(middle, **params["norm2"]), params["mlp"], config.mlp)
    y = middle + _scaled(mixed, params, "layer_scale2")
    return y, BlockTrace(x, perceived, attention_trace, attended, middle, mlp_trace, mixed)


def _scaled(branch: Array, params: Tree, name: str) -> Array:
    return layer_scale(branch, **params[name]) if name in params else branch


def block_vjp(cotangent: Array, trace: BlockTrace, params: Tree, config: BlockConfig) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params). A residual branch adds its gradient to the one that goes straight through."""
    grads: dict[str, Tree] = {}

    grad_mixed = _scaled_vjp(cotangent, trace.mixed, params, grads, "layer_scale2")
    grad_normed, grads["mlp"] = mlp_vjp(grad_mixed, trace.mlp, params["mlp"], config.mlp)
    norm2 = layer_norm_vjp(grad_normed, trace.middle, **params["norm2"])
    grad_middle = cotangent + norm2.x

    grad_attended = _scaled_vjp(grad_middle, trace.attended, params, grads, "layer_scale1")
    attention_vjp = ATTENTIONS[type(config.attention)].vjp
    grad_normed, grads["attention"] = attention_vjp(
        grad_attended, trace.attention, params["attention"], config.attention
    )
    norm1 = layer_norm_vjp(grad_normed, trace.perceived, **params["norm1"])
    grad_x = grad_middle + norm1.x
    grads["norm1"], grads["norm2"] = norm1.params, norm2.params

    if config.local_perception:
        unit = depthwise_conv2d_vjp(grad_x, trace.x, **params["local_perception"], padding=SAME_3X3)
        grad_x, grads["local_perception"] = grad_x + unit.x, unit.params
    return grad_x, grads


def _scaled_vjp(cotangent: Array, branch: Array, params: Tree, grads: dict[str, Tree], name: str) -> Array:
    if name not in params:
        return cotangent
    grad_branch, grads[name] = layer_scale_vjp(cotangent, branch, **params[name])
    return grad_branch


def block_macs(batch: int, size: Size, config: BlockConfig) -> int:
    """Multiply-adds of one block on a map of `size`."""
    pixels = batch * size[0] * size[1]
    attention = ATTENTIONS[type(config.attention)].macs(batch, size, config.attention)
    perception = depthwise_conv2d_macs(pixels, config.dim, 3) if config.local_perception else 0
    return perception + attention + mlp_macs(pixels, config.dim, config.mlp_ratio, config.mlp)
