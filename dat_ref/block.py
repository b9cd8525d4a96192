"""Transformer block with one of the attention layers: residual branches on a map.

    x ← x + DWConv₃ₓ₃(x)                       local perception unit, in DAT++
    x ← x + γ₁ · attention(LayerNorm(x))
    x ← x + γ₂ · MLP(LayerNorm(x))             γ: learned per-channel layer scale, optional

The MLP is linear → GELU → linear. Two variants have a depthwise convolution before the GELU: ``"depthwise"`` (2022
code) is GELU(DWConv(h)), ``"depthwise_residual"`` (2023 code) is GELU(h + DWConv(h)).
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
from .peers.registry import ATTENTIONS as ATTENTIONS  # re-exported
from .peers.registry import row_of

SAME_3X3 = ((1, 1), (1, 1))


def block_shapes(config: BlockConfig) -> Tree:
    """Return the tree of parameter shapes."""
    dim, hidden = config.dim, config.dim * config.mlp_ratio
    shapes: dict[str, Tree] = {}
    if config.local_perception:
        shapes["local_perception"] = {"weight": (dim, 1, 3, 3), "bias": (dim,)}
    shapes["norm1"] = {"weight": (dim,), "bias": (dim,)}
    shapes["attention"] = row_of(config.attention).shapes(config.attention)
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
    """Intermediates of `mlp`, (B, ratio·C, H, W) except for the input."""

    x: Array  # (B, C, H, W)
    hidden: Array
    pre_activation: Array  # after the depthwise convolution; equal to `hidden` without one
    activated: Array


def mlp(x: Array, params: Tree, kind: str) -> tuple[Array, MLPTrace]:
    """Compute the MLP (B, C, H, W) → (B, C, H, W); see the equations of the module. Return the output and the trace."""
    hidden = linear(x, **params["linear1"])
    pre_activation = hidden
    if kind != "linear":
        pre_activation = depthwise_conv2d(hidden, **params["depthwise"], padding=SAME_3X3)
    if kind == "depthwise_residual":
        pre_activation = hidden + pre_activation
    activated = gelu(pre_activation)
    return linear(activated, **params["linear2"]), MLPTrace(x, hidden, pre_activation, activated)


def mlp_vjp(cotangent: Array, trace: MLPTrace, params: Tree, kind: str) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params)."""
    linear2 = linear_vjp(cotangent, trace.activated, **params["linear2"])
    grad_pre_activation = gelu_vjp(linear2.x, trace.pre_activation)
    grads: dict[str, Tree] = {"linear2": linear2.params}
    grad_hidden = grad_pre_activation
    if kind != "linear":
        depthwise = depthwise_conv2d_vjp(grad_pre_activation, trace.hidden, **params["depthwise"], padding=SAME_3X3)
        grads["depthwise"] = depthwise.params
        grad_hidden = depthwise.x + grad_pre_activation if kind == "depthwise_residual" else depthwise.x
    linear1 = linear_vjp(grad_hidden, trace.x, **params["linear1"])
    return linear1.x, {**grads, "linear1": linear1.params}


def mlp_macs(pixels: int, dim: int, ratio: int, kind: str) -> int:
    """Multiply-adds of `mlp` for `pixels` = B·H·W."""
    depthwise = 0 if kind == "linear" else depthwise_conv2d_macs(pixels, ratio * dim, 3)
    return 2 * linear_macs(pixels, dim, ratio * dim) + depthwise


# ------------------------------------------------------------------------------------------------ layer scale


def layer_scale(x: Array, weight: Array) -> Array:
    """Scale each channel: y[c] = γ[c] x[c]."""
    return x * weight[:, None, None]


def layer_scale_vjp(cotangent: Array, x: Array, weight: Array) -> tuple[Array, Tree]:
    """Compute ∂L/∂x = γ ∂L/∂y and ∂L/∂γ = Σ x ∂L/∂y, with the sum over batch and pixels."""
    return cotangent * weight[:, None, None], {"weight": (cotangent * x).sum(axis=(0, 2, 3))}


# ------------------------------------------------------------------------------------------------ block


@dataclass(frozen=True)
class BlockTrace:
    """Intermediates of `block`, all (B, C, H, W) except for the traces."""

    x: Array
    lpu_out: Array  # after the local perception unit; equal to `x` without one
    attention: object  # the trace of its attention, such as `LayerTrace`
    attn_out: Array  # output of the attention, before layer scale and residual
    residual1: Array  # after the attention branch
    mlp: MLPTrace
    mlp_out: Array  # output of the MLP, before layer scale and residual


def block(x: Array, params: Tree, config: BlockConfig) -> tuple[Array, BlockTrace]:
    """Run one block, (B, C, H, W) → (B, C, H, W). Return the output and the trace."""
    lpu_out = x
    if config.local_perception:
        lpu_out = x + depthwise_conv2d(x, **params["local_perception"], padding=SAME_3X3)
    attention_forward = row_of(config.attention).forward
    attn_out, attention_trace = attention_forward(
        layer_norm(lpu_out, **params["norm1"]), params["attention"], config.attention
    )
    residual1 = lpu_out + _scaled(attn_out, params, "layer_scale1")
    mlp_out, mlp_trace = mlp(layer_norm(residual1, **params["norm2"]), params["mlp"], config.mlp)
    y = residual1 + _scaled(mlp_out, params, "layer_scale2")
    return y, BlockTrace(x, lpu_out, attention_trace, attn_out, residual1, mlp_trace, mlp_out)


def _scaled(branch: Array, params: Tree, name: str) -> Array:
    return layer_scale(branch, **params[name]) if name in params else branch


def block_vjp(cotangent: Array, trace: BlockTrace, params: Tree, config: BlockConfig) -> tuple[Array, Tree]:
    """Return (∂L/∂x, ∂L/∂params). The gradient of a residual branch is added to the gradient of the identity."""
    grads: dict[str, Tree] = {}

    grad_mlp_out = _scaled_vjp(cotangent, trace.mlp_out, params, grads, "layer_scale2")
    grad_normed, grads["mlp"] = mlp_vjp(grad_mlp_out, trace.mlp, params["mlp"], config.mlp)
    norm2 = layer_norm_vjp(grad_normed, trace.residual1, **params["norm2"])
    grad_residual1 = cotangent + norm2.x

    grad_attn_out = _scaled_vjp(grad_residual1, trace.attn_out, params, grads, "layer_scale1")
    attention_vjp = row_of(config.attention).vjp
    grad_normed, grads["attention"] = attention_vjp(
        grad_attn_out, trace.attention, params["attention"], config.attention
    )
    norm1 = layer_norm_vjp(grad_normed, trace.lpu_out, **params["norm1"])
    grad_x = grad_residual1 + norm1.x
    grads["norm1"], grads["norm2"] = norm1.params, norm2.params

    if config.local_perception:
        lpu = depthwise_conv2d_vjp(grad_x, trace.x, **params["local_perception"], padding=SAME_3X3)
        grad_x, grads["local_perception"] = grad_x + lpu.x, lpu.params
    return grad_x, grads


def _scaled_vjp(cotangent: Array, branch: Array, params: Tree, grads: dict[str, Tree], name: str) -> Array:
    if name not in params:
        return cotangent
    grad_branch, grads[name] = layer_scale_vjp(cotangent, branch, **params[name])
    return grad_branch


def block_macs(batch: int, size: Size, config: BlockConfig) -> int:
    """Multiply-adds of one block on a map of `size`."""
    pixels = batch * size[0] * size[1]
    attention = row_of(config.attention).macs(batch, size, config.attention)
    perception = depthwise_conv2d_macs(pixels, config.dim, 3) if config.local_perception else 0
    return perception + attention + mlp_macs(pixels, config.dim, config.mlp_ratio, config.mlp)
