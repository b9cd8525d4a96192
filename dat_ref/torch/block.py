"""The Transformer block as a module: `dat_ref.block` in PyTorch, with stochastic depth."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..block import BlockTrace, MLPTrace
from ..checkpoints import resize_table
from ..config import CHECK_INIT, AttentionConfig, BlockConfig, Init
from ..peers.registry import row_of
from ._checks import check_tensors
from .bridge import as_numpy
from .functional.registry import check_backend
from .functional.sampling import Sampler, check_sampler
from .peers.registry import attentions_with as attentions_with  # re-exported
from .peers.registry import module_class, module_options


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a map (B, C, H, W). The channels_last layout is preserved."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply a map (B, C, H, W) by the factors."""
        return x * self.weight[:, None, None]


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for random images and scale it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled branch (B, C, H, W), zero for the images where it is dropped."""
        if not self.training or self.rate == 0:
            return x
        keep_prob = 1 - self.rate
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep_prob)
        return x * (mask / keep_prob) if keep_prob > 0 else x * mask

    def extra_repr(self) -> str:
        """Return the drop rate for the module's ``repr``."""
        return f"rate={self.rate:.3f}"


class MLP(nn.Module):
    """Two linear layers with a GELU between them, and an optional 3 × 3 depthwise convolution before the GELU."""

    def __init__(self, dim: int, ratio: int, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = dim * ratio
        self.kind = kind
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        if kind != "linear":
            self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor | tuple[Tensor, MLPTrace]:
        """Return y (B, C, H, W), and the trace if requested."""
        hidden = self.linear1(x.permute(0, 2, 3, 1))  # (B, H, W, ratio·C)
        pre_activation = hidden
        if self.kind != "linear":
            pre_activation = self.depthwise(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.kind == "depthwise_residual":
            pre_activation = hidden + pre_activation
        activated = F.gelu(pre_activation)
        y = self.dropout(self.linear2(self.dropout(activated))).permute(0, 3, 1, 2)
        if not return_trace:
            return y
        maps: Any = (part.permute(0, 3, 1, 2) for part in (hidden, pre_activation, activated))
        inputs: Any = x
        return y, MLPTrace(inputs, *maps)


def attention_module(config: AttentionConfig, **options: Any) -> nn.Module:
    """Build the attention module for a configuration.

    Args:
        options: `backend`, `sampler` and `init`. A module receives only the options that it has.

    Raises:
        ConfigError: if the value of an option is unknown, or there is no row for this type of configuration.
    """
    check_backend(options.get("backend", "auto"))
    check_sampler(options.get("sampler", "gather"))
    CHECK_INIT("init", options.get("init", "released"))
    row = row_of(config)
    known = module_options(row)
    return module_class(row)(config, **{name: value for name, value in options.items() if name in known})


class Block(nn.Module):
    """Transformer block: (B, C, H, W) → (B, C, H, W).

    Args:
        config: block configuration.
        drop_path: drop rate of stochastic depth, for both residual branches.
        dropout: dropout rate in the MLP.
        backend, sampler, init: options of the attention module, see `DeformableAttention`. Modules without an option
            ignore it.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        backend: str = "auto",
        sampler: Sampler = "gather",
        init: Init = "released",
    ) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.local_perception = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if config.local_perception else None
        self.norm1 = ChannelNorm(dim)
        self.attention = attention_module(config.attention, backend=backend, sampler=sampler, init=init)
        self.norm2 = ChannelNorm(dim)
        self.mlp = MLP(dim, config.mlp_ratio, config.mlp, dropout)
        scale = config.layer_scale
        self.layer_scale1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.layer_scale2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)

    @overload
    def forward(self, x: Tensor, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_trace: Literal[True]) -> tuple[Tensor, BlockTrace]: ...

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor | tuple[Tensor, BlockTrace]:
        """Return y (B, C, H, W), and the trace if requested."""
        check_tensors(x=x)
        if return_trace:
            return self._traced(x)
        if self.local_perception is not None:
            x = x + self.local_perception(x)
        x = x + self.drop_path(self.layer_scale1(self.attention(self.norm1(x))))
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))

    def resize(self, config: BlockConfig) -> None:
        """Take over a configuration that differs in the map size of the position bias, and resize its table."""
        self.config = config
        self.attention.config = config.attention  # type: ignore[assignment]
        bias: Any = getattr(self.attention, "position_bias", None)
        if hasattr(bias, "table"):
            rows, columns = (2 * side - 1 for side in config.attention.size)  # type: ignore[union-attr]
            resized = torch.from_numpy(resize_table(as_numpy(bias.table), (rows, columns)))
            bias.table = nn.Parameter(resized.to(bias.table), requires_grad=bias.table.requires_grad)

    def _traced(self, x: Tensor) -> tuple[Tensor, BlockTrace]:
        lpu_out = x if self.local_perception is None else x + self.local_perception(x)
        attn_out, attention = self.attention(self.norm1(lpu_out), return_trace=True)
        residual1 = lpu_out + self.drop_path(self.layer_scale1(attn_out))
        mlp_out, mlp = self.mlp(self.norm2(residual1), return_trace=True)
        y = residual1 + self.drop_path(self.layer_scale2(mlp_out))
        fields: dict[str, Any] = {
            "x": x,
            "lpu_out": lpu_out,
            "attention": attention,
            "attn_out": attn_out,
            "residual1": residual1,
            "mlp": mlp,
            "mlp_out": mlp_out,
        }
        return y, BlockTrace(**fields)
