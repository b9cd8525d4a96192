"""Optimization of models for inference on a CPU: `optimize_for_inference`.

Optimizations:

- Linear layers store their weights in oneDNN's packed layout, and the GELU is fused into the matrix product.
- Layer scale is folded into the weights of the projection before it. The identity of ``x + conv(x)`` is folded into the
  center of the kernel.
- Residual branches are added in place.
- Stages with large maps process a few images at a time, so that memory is reused instead of allocated again.
- Complete windows without shift are computed by the CPU kernels of deformable attention, if these are available. The
  masks of other windows are cached between calls.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..conventions import Convention
from ..peers.registry import ATTENTIONS
from . import functional
from .backbone import Stage
from .block import MLP, Block, LayerScale
from .functional.grid import Size
from .peers import WindowAttention
from .peers.registry import module_class

M = TypeVar("M", bound=nn.Module)

_OPERATORS = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")  # not public in torch
# Bytes of a stage's widest map for the images that are processed together. With far less, matrix products have too few
# rows to be fast. With far more, the allocator returns the memory to the system after each use, and every page faults
# again.
_HIDDEN_BYTES = 1 << 24


def optimize_for_inference(model: M) -> M:
    """Return a copy of a model that is optimized for inference on a CPU.

    The copy accepts any H, W and batch size, as the model does, and its outputs are the same up to rounding. It can be
    copied and pickled. It cannot be trained, traced, exported, moved or cast, and it has no state dict; use the
    original model for that. For half precision, cast the model first:
    ``optimize_for_inference(copy.deepcopy(model).to(torch.bfloat16))``.

    Args:
        model: `DAT`, `DeformableAttention`, or any module that contains them, in eval mode.

    Returns:
        the optimized copy. If the device, the dtype, the CPU or this build of torch does not support packed linear
        layers: a plain copy, with a warning that gives the reason.

    Raises:
        ValueError: if the model is in training mode.

    >>> import dat_ref.torch
    >>> model = dat_ref.torch.create_model("dat_tiny", num_classes=10).eval()
    >>> fast = optimize_for_inference(model)
    >>> images = torch.ones(1, 3, 64, 96)
    >>> bool(torch.allclose(fast(images), model(images), atol=1e-5))
    True
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected eval mode, got a model in training mode: call model.eval() first")
    fast = copy.deepcopy(model).requires_grad_(False)
    reason = unsupported_reason(model)
    if reason:
        warnings.warn(f"optimize_for_inference: {reason}; returning an unoptimized copy", stacklevel=2)
        return fast
    for module in fast.modules():
        if type(module) is Block:
            _fold_block(module)
        elif type(module) is MLP and module.kind == "depthwise_residual":
            _fold_identity(module.depthwise)
    return _replace(fast, {})


def unsupported_reason(model: nn.Module) -> str:
    """Return the reason why `optimize_for_inference` cannot pack the weights on this machine, or an empty string."""
    weights = list(model.parameters())
    devices = {weight.device.type for weight in weights}
    if devices - {"cpu"}:
        return f"weights are on {', '.join(sorted(devices))}, but only a CPU is supported (use torch.compile)"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return f"torch {torch.__version__} has no packed linear layers"
    dtypes = {str(weight.dtype) for weight in weights if not _supports_packing(weight.dtype)}
    return f"this CPU has no packed linear layers in {', '.join(sorted(dtypes))}" if dtypes else ""


@cache
def _supports_packing(dtype: torch.dtype) -> bool:
    try:
        _pack(torch.zeros(2, 2, dtype=dtype))
    except RuntimeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ folding


def _packed_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's linear layers that are packed; none if it is not the module of an attention."""
    row = ATTENTIONS.get(type(getattr(module, "config", None)))
    return row.packed_layers if row is not None and type(module) is module_class(row) else ()


def _fold_block(block: Block) -> None:
    if block.local_perception is not None:
        _fold_identity(block.local_perception)
    _fold_scale(block.layer_scale2, block.mlp.linear2)
    block.layer_scale2 = nn.Identity()
    if _packed_layers(block.attention):
        _fold_scale(block.layer_scale1, block.attention.output)  # type: ignore[arg-type]
        block.layer_scale1 = nn.Identity()


def _fold_identity(depthwise: nn.Conv2d) -> None:
    """Change the weights so that ``conv(x)`` returns what ``x + conv(x)`` returned."""
    rows, columns = depthwise.kernel_size
    depthwise.weight[:, :, rows // 2, columns // 2].add_(1)


def _fold_scale(scale: nn.Module, linear: nn.Linear) -> None:
    if isinstance(scale, LayerScale):
        linear.weight.mul_(scale.weight[:, None])
        linear.bias.mul_(scale.weight)


# ------------------------------------------------------------------------------------------------ modules


class InferenceModule(nn.Module):
    """Base class of optimized modules: raises an error for operations that they do not support."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> Any:
        """Raise an error for training mode."""
        if mode:
            raise RuntimeError(f"{_OPTIMIZED} and cannot be trained: train the original model")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        raise RuntimeError(f"{_OPTIMIZED}: move or cast the original model, then optimize it again")

    def _save_to_state_dict(self, *args: Any) -> None:
        raise RuntimeError(f"{_OPTIMIZED}: save the original model")


_OPTIMIZED = "this model is optimized for inference"


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


class PackedLinear(InferenceModule):
    """Linear layer with its weight in oneDNN's packed layout, and optionally a fused GELU."""

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.dtype = layer.weight.dtype
        self.weight = _pack(layer.weight)  # opaque layout: only the operator can read it
        self.bias = layer.bias.detach().clone()
        self.activation = "gelu" if gelu else "none"

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (…, C) → (…, C')."""
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{_OPTIMIZED}: compile or export the original model")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"{_OPTIMIZED} and has no gradients: differentiate the original model")
        x = x.to(self.dtype)  # autocast does not cast the inputs of this operator
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "none")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "weight": _pack(state["weight"])})


class ConvGELU(InferenceModule):
    """Convolution with a fused GELU."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.shape = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map (B, C, H, W)."""
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.shape, "gelu", [], "none")


class FastMLP(InferenceModule):
    """`MLP` with the GELU fused into the first linear layer or into the convolution."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        # The identity is already folded in.
        self.depthwise = None if mlp.kind == "linear" else ConvGELU(mlp.depthwise)
        self.linear1 = PackedLinear(mlp.linear1, gelu=mlp.kind == "linear")
        self.linear2 = PackedLinear(mlp.linear2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP: (B, C, H, W) → (B, C, H, W)."""
        hidden = self.linear1(x.permute(0, 2, 3, 1))
        if self.depthwise is not None:
            hidden = self.depthwise(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.linear2(hidden).permute(0, 3, 1, 2)


class FastWindowAttention(InferenceModule, WindowAttention):
    """`WindowAttention` with a cached mask, or without one where the kernels of deformable attention apply.

    A complete window without shift is deformable attention whose points are the window's pixels: it needs no mask.
    """

    def __init__(self, attention: WindowAttention) -> None:
        WindowAttention.__init__(self, attention.config)
        self.qkv, self.window_bias, self.output = attention.qkv, attention.window_bias, attention.output
        side = (attention.config.window_size,) * 2
        self.pixels = functional.reference_points(side, Convention.CELL_CENTER, dtype=torch.float32).view(1, 1, -1, 2)
        self.kernels = "cpu" in functional.backends()
        self.cached_mask: Any = None  # ((size, dtype), mask) of the last call
        self.eval()

    def attend_in_windows(self, qkv: Tensor, size: Size) -> Tensor:
        """Attend within the windows of a map of this size: (B, nW, w², 3C) → (B, nW, w², C)."""
        config, side = self.config, self.config.window_size
        if config.shift or size[0] % side or size[1] % side or not self.kernels:
            return super().attend_in_windows(qkv, size)
        q, k, v = functional.split_windows(qkv.flatten(0, 1), config.heads)
        attended = functional.deformable_attention(
            q,
            k,
            v,
            self.pixels.expand(len(q), -1, -1, -1),
            self.window_bias(),
            query_size=(side, side),
            convention=Convention.CELL_CENTER,
            scale=config.scale,
            backend="cpu",
        )
        return attended.transpose(1, 2).flatten(2).unflatten(0, qkv.shape[:2])

    def mask(self, size: Size, dtype: torch.dtype) -> Tensor:
        """Return the term that is added to the logits on a map of this size: (nW or 1, heads, w², w²)."""
        key = (size, dtype)
        if self.cached_mask is None or self.cached_mask[0] != key:
            self.cached_mask = key, super().mask(size, dtype)
        return self.cached_mask[1]


class FastBlock(InferenceModule):
    """`Block` that adds its residual branches in place."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.local_perception = block.local_perception  # the identity is already folded in
        self.norm1, self.attention, self.layer_scale1 = block.norm1, block.attention, block.layer_scale1
        self.norm2, self.mlp = block.norm2, block.mlp

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor:
        """Apply the block: (B, C, H, W) → (B, C, H, W)."""
        if return_trace:
            raise RuntimeError(f"{_OPTIMIZED} and has no trace: trace the original model")
        if self.local_perception is not None:
            x = self.local_perception(x)
        x = self.layer_scale1(self.attention(self.norm1(x))).add_(x)
        return self.mlp(self.norm2(x)).add_(x)


class FastStage(InferenceModule):
    """`Stage` that processes a few images at a time."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.hidden_channels = max(block.mlp.linear1.bias.shape[0] for block in stage.blocks)  # type: ignore[index, operator, union-attr]
        self.blocks = stage.blocks

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks: (B, C, H, W) → (B, C, H, W)."""
        image_bytes = x.shape[2] * x.shape[3] * self.hidden_channels * x.element_size()
        parts = [self._run(part) for part in x.split(max(_HIDDEN_BYTES // max(image_bytes, 1), 1))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


_FAST: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    MLP: FastMLP,
    WindowAttention: FastWindowAttention,
    Block: FastBlock,
    Stage: FastStage,
}


def _replace(module: nn.Module, replaced: dict[nn.Module, nn.Module]) -> Any:
    """Return the optimized form of a module, after optimizing its children. A shared module remains shared."""
    if module not in replaced:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _replace(child, replaced)
        for name in _packed_layers(module):
            setattr(module, name, PackedLinear(getattr(module, name)))
        fast = _FAST.get(type(module))
        replaced[module] = module if fast is None else fast(module)
    return replaced[module]
