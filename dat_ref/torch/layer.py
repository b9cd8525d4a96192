"""The deformable-attention layer as a module: `dat_ref.layer` in PyTorch.

The layer works on channels-last maps, so that every 1 × 1 projection is one matrix product over all pixels. A map in
``torch.channels_last`` layout is read and returned without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import official
from .._checks import HyperparameterWarning, ShapeError
from .._deprecation import warn_caller
from ..config import (
    CHECK_INIT,
    LOG_CPB_HIDDEN,
    BiasKind,
    DeformableAttentionConfig,
    Init,
    OffsetBound,
    default_kernel_size,
)
from ..layer import BIAS_KERNEL, LayerTrace
from ..ops.bias import LogBiasTrace
from ..ops.coverage import share_of_cell
from ..ops.offsets import OffsetNetworkTrace
from . import functional
from ._checks import check_map
from .bridge import SpecModule, state_dtype
from .functional._dtypes import wide_dtype
from .functional._sdpa import masked_attention
from .functional._symbolic import statically_zero
from .functional.bias import predict_log_bias
from .functional.grid import Padding, Size
from .functional.offsets import predict_offsets
from .functional.registry import check_backend
from .functional.sampling import Sampler, check_sampler
from .initialization import init_offsets, init_table
from .wide_layers import WideLayerNorm, WideLinear


class OffsetNetwork(nn.Module):
    """Offset network θ, shared by all groups: depthwise convolution, norm, GELU, projection to (y, x) without bias."""

    def __init__(self, config: DeformableAttentionConfig, init: Init = "released") -> None:
        super().__init__()
        channels, geometry = config.group_dim, (config.kernel_size, config.stride)
        self.config = config
        # The releases pad every map by the same amount. Other padding depends on the size of the map.
        self.pads = config.convention.value.offset_padding != "half"
        constant = 0 if self.pads else functional.offset_padding((1, 1), *geometry, config.convention)[0][0]
        self.depthwise = nn.Conv2d(channels, channels, *geometry, padding=constant, groups=channels)
        self.norm = WideLayerNorm(channels)
        self.pointwise = WideLinear(channels, 2, bias=False)
        init_offsets(self.pointwise, init)

    def forward(self, query: Tensor, padding: Padding) -> tuple[Tensor, dict[str, Tensor]]:
        """Return raw offsets (B·G, 2, Hk, Wk) for a query map (B, C, H, W), and the intermediates."""
        (top, bottom), (left, right) = padding

        def convolve(x: Tensor) -> Tensor:
            if self.pads and not statically_zero(top, bottom, left, right):
                x = F.pad(x, (left, right, top, bottom))
            return self.depthwise(x)

        return predict_offsets(query, convolve, self.norm, self.pointwise, groups=self.config.groups)


class TableBias(nn.Module):
    """Bias table per head: relative (2H-1 × 2W-1), or fixed (H·W × Ns)."""

    def __init__(self, config: DeformableAttentionConfig) -> None:
        super().__init__()
        assert config.size is not None  # checked by the config
        height, width = config.size
        shape = (2 * height - 1, 2 * width - 1)
        if config.bias is BiasKind.FIXED:
            rows, columns = functional.key_grid_size(config.size, config.kernel_size, config.stride, config.convention)
            shape = (height * width, rows * columns)
        self.table = nn.Parameter(torch.empty(config.heads, *shape))
        init_table(self.table, 0.01)

    def forward(self) -> Tensor:
        """Return the table."""
        return self.table


class LogBias(nn.Module):
    """Bias network: an MLP on the log-scaled displacement between query and point."""

    def __init__(self, config: DeformableAttentionConfig) -> None:
        super().__init__()
        self.convention = config.convention
        self.hidden = WideLinear(2, LOG_CPB_HIDDEN)
        self.out = WideLinear(LOG_CPB_HIDDEN, config.heads // config.groups, bias=False)

    def forward(self, points: Tensor, query_size: Size) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the bias (B, heads, H·W, Ns) of points (B, G, Ns, 2), and the intermediates."""
        return predict_log_bias(points, self.hidden, self.out, query_size=query_size, convention=self.convention)


class DepthwiseBias(nn.Module):
    """A 3 × 3 depthwise convolution of the queries, which is added to the output of the attention."""

    def __init__(self, config: DeformableAttentionConfig) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(config.dim, config.dim, BIAS_KERNEL, padding=BIAS_KERNEL // 2, groups=config.dim)

    def forward(self, query: Tensor) -> Tensor:
        """Convolve the queries, channels last: (B, H, W, C) → (B, H, W, C)."""
        return self.depthwise(query.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


_BIASES = {
    BiasKind.TABLE: TableBias,
    BiasKind.FIXED: TableBias,
    BiasKind.LOG_CPB: LogBias,
    BiasKind.DEPTHWISE: DepthwiseBias,
}


class DeformableAttention(SpecModule):
    """Deformable attention on a map: (B, C, H, W) → (B, C, H, W), for any H and W per call.

    Build it from a configuration, ``DeformableAttention(config)``, or from the fields of one,
    ``DeformableAttention(dim=64, heads=4, stride=2)``.

    Args:
        config: layer configuration, or None if its fields are given as keywords.
        backend: backend that computes the attention core, one of `dat_ref.torch.backends()`, or ``"auto"``.
        sampler: sampling method, ``"gather"`` or ``"grid_sample"``, see `functional.bilinear_sample`.
        init: ``"released"``, or ``"zero_offset"`` to start with every point on its reference. None: released, with a
            warning if it can move points by more than one pixel.
        options: fields of `DeformableAttentionConfig`: `dim` and `heads`, and those that differ from their defaults.

    Raises:
        ConfigError: if both or neither of `config` and `options` are given, or a field is unknown or invalid.

    Without `size` the layer has a depthwise bias. With `size` it has a bias table, which can hold most of its
    parameters (84 % for ``dim=64, heads=4, size=(80, 80)``; the representation of the layer shows the share).
    Alternatives: ``bias="log_cpb"`` (a small network of the displacement, more memory), ``bias="depthwise"`` (a
    convolution of the queries) and ``bias="none"``; or a table for a smaller `size`, which is read in fractions of the
    map.

    A `HyperparameterWarning` points to settings with which offsets are hard to learn: a kernel smaller than the stride,
    and the released initialization where it moves points by more than one pixel and `init` is not given. Models of
    `create_model` do not warn.

    If the size of the map differs from ``config.size``, ``config.bias_resolution`` sets the unit of displacements in
    the bias table: ``"fractions"`` of the map, or ``"pixels"``.

    >>> layer = DeformableAttention(dim=12, heads=4, groups=2, size=(5, 7))
    >>> y, trace = layer(torch.ones(2, 12, 9, 6), return_trace=True)
    >>> y.shape, trace.points.shape
    (torch.Size([2, 12, 9, 6]), torch.Size([2, 2, 9, 6, 2]))
    """

    def __init__(
        self,
        config: DeformableAttentionConfig | None = None,
        *,
        backend: str = "auto",
        sampler: Sampler = "gather",
        init: Init | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        config = DeformableAttentionConfig.from_keywords(config, options)
        check_backend(backend)
        check_sampler(sampler)
        CHECK_INIT("init", "released" if init is None else init)
        if config.offset_bound is not OffsetBound.NONE:
            _warn_hyperparameters(config, init)
        self.config = config
        self.backend = backend
        self.sampler: Sampler = sampler
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.output = nn.Linear(config.dim, config.dim)
        self.offset_network = None
        if config.offset_bound is not OffsetBound.NONE:
            self.offset_network = OffsetNetwork(config, init or "released")
        self.position_bias = _BIASES[config.bias](config) if config.bias in _BIASES else None
        self.projection_dropout = nn.Dropout(config.projection_dropout)

    def extra_repr(self) -> str:
        """Return the main options, the keys, the largest offset in pixels, and the number of parameters."""
        config = self.config
        parts = [f"dim={config.dim}, heads={config.heads}, groups={config.groups}, bias={config.bias.value}"]
        keys = f"one per {config.stride}×{config.stride} pixels"
        if config.size is not None:
            rows, columns = functional.key_grid_size(config.size, config.kernel_size, config.stride, config.convention)
            keys += f" ({rows * columns:,} on a map of {config.size[0]}×{config.size[1]})"
        parts.append(f"keys: {keys}")
        limit = config.max_offset_px
        parts.append(f"largest offset: {'no limit in pixels' if limit is None else f'{limit:g} pixels on each axis'}")
        count = sum(each.numel() for each in self.parameters())
        share = ""
        if isinstance(self.position_bias, TableBias):
            share = f" ({self.position_bias.table.numel() / count:.0%} in the bias table)".replace("%", " %")
        parts.append(f"parameters: {count:,}{share}")
        return "\n".join(parts)

    # -------------------------------------------------------------------------------------------- forward

    @overload
    def forward(self, x: Tensor, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_trace: Literal[True]) -> tuple[Tensor, LayerTrace]: ...

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor | tuple[Tensor, LayerTrace]:
        """Return y (B, C, H, W), and the trace of all intermediates if requested.

        Attention dropout is not applied when a trace is requested.

        Raises:
            ShapeError: if `x` does not have the configured number of channels, or the size of a fixed bias table.
            ConfigError: if a map smaller than the offset network's kernel has no padding, see `key_grid_size`.
        """
        config = self.config
        check_map("x", x, config.dim)
        batch, channels, height, width = x.shape
        size = (height, width)
        key_size = functional.key_grid_size(size, config.kernel_size, config.stride, config.convention)
        tokens = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        query = self.query(tokens)

        raw, network = self._raw_offsets(query, size, key_size)
        reference = functional.reference_points(key_size, config.convention, dtype=raw.dtype, device=raw.device)
        bounding: dict[str, Any] = {"offset_range": config.offset_range, "convention": config.convention}
        offsets, points = functional.bound_offsets(raw, reference, config.offset_bound, **bounding)
        points_px = functional.to_pixels(points, size, config.convention)
        sampled = self._features(tokens, points_px, key_size).to(tokens.dtype)  # (B, Hk·Wk, C)

        q = _tokens_to_heads(query.flatten(1, 2), config.heads)
        k = _tokens_to_heads(self.key(sampled), config.heads)
        v = _tokens_to_heads(self.value(sampled), config.heads)
        bias, log_bias, attention = None, None, None
        if return_trace:
            bias, log_bias = self._bias(points, size)
            attended, attention = functional.attend(q, k, v, bias, config.scale)
        else:
            attended = self._core(q, k, v, points, size)
        merged = attended.transpose(1, 2).reshape(batch, height, width, channels)
        if isinstance(self.position_bias, DepthwiseBias):
            merged = merged + self.position_bias(query)
        y = self.projection_dropout(self.output(merged)).permute(0, 3, 1, 2)
        if not return_trace:
            return y
        fields: dict[str, Any] = {
            "x": x,
            "query": query.permute(0, 3, 1, 2),
            "offset_network": OffsetNetworkTrace(**network) if network else None,  # type: ignore[arg-type]
            "raw_offsets": raw,
            "offsets": offsets,
            "reference": reference.expand(points.shape),
            "points": points,
            "reference_px": functional.to_pixels(reference, size, config.convention).expand(points.shape),
            "points_px": points_px,
            "sampled": sampled.transpose(1, 2).unflatten(2, key_size),
            "q": q,
            "k": k,
            "v": v,
            "bias": bias,
            "log_bias": log_bias,
            "attention": attention,
            "merged": merged.permute(0, 3, 1, 2),
        }
        return y, LayerTrace(**fields)

    def _raw_offsets(self, query: Tensor, size: Size, key_size: Size) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the raw offsets Δ (B, G, Hk, Wk, 2), float32 or wider, and the intermediates of the network."""
        config = self.config
        batch, (rows, columns) = query.shape[0], key_size
        if self.offset_network is None:
            shape = (batch, config.groups, rows, columns, 2)
            return torch.zeros(shape, dtype=wide_dtype(query), device=query.device), {}
        padding = functional.offset_padding(size, config.kernel_size, config.stride, config.convention)
        raw, network = self.offset_network(query.permute(0, 3, 1, 2), padding)
        return raw.view(batch, config.groups, 2, rows, columns).permute(0, 1, 3, 4, 2), network

    def _features(self, tokens: Tensor, points_px: Tensor, key_size: Size) -> Tensor:
        """Return the features that are projected to keys and values, (B, Hk·Wk, C)."""
        config = self.config
        batch, height, width, channels = tokens.shape
        rows, columns = key_size
        if config.average_pool:
            return self._pool(tokens, key_size)
        flat = points_px.flatten(2, 3)  # (B, G, Hk·Wk, 2)
        grouped = tokens.reshape(batch, height, width, config.groups, config.group_dim)
        sampled = functional.sample_tokens(grouped, flat, sampler=self.sampler)  # (B, G, Hk·Wk, C/G)
        return sampled.transpose(1, 2).reshape(batch, rows * columns, channels)

    def _pool(self, tokens: Tensor, key_size: Size) -> Tensor:
        """Average over r × r cells: (B, H, W, C) → (B, Hk·Wk, C)."""
        batch, height, width, channels = tokens.shape
        (rows, columns), stride = key_size, self.config.stride
        if not torch.compiler.is_compiling() and (height, width) != (rows * stride, columns * stride):
            raise ShapeError(
                f"x: expected (B, C, H={rows * stride}, W={columns * stride}) with H and W multiples of "
                f"stride={stride}, which average pooling needs, got {(batch, channels, height, width)}"
            )
        cells = tokens.reshape(batch, rows, stride, columns, stride, channels)
        return cells.mean(dim=(2, 4)).flatten(1, 2)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, points: Tensor, size: Size) -> Tensor:
        config = self.config
        dropout = config.attention_dropout if self.training else 0.0
        if config.bias in (BiasKind.FIXED, BiasKind.LOG_CPB):
            bias, _ = self._bias(points, size)
            assert bias is not None
            mask = bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
            return masked_attention(q, k, v, mask, scale=config.scale, dropout=dropout)
        return functional.deformable_attention(
            q,
            k,
            v,
            points.flatten(2, 3),
            self.position_bias() if isinstance(self.position_bias, TableBias) else None,
            query_size=size,
            convention=config.convention,
            scale=config.scale,
            resolution=config.bias_resolution,
            backend=self.backend,
            dropout=dropout,
        )

    def _bias(self, points: Tensor, size: Size) -> tuple[Tensor | None, LogBiasTrace | None]:
        """Return the bias that is added to the logits, (B or 1, heads, H·W, Ns), and the trace of a log-scaled bias.

        Each is None if this kind of bias has none.
        """
        config, flat = self.config, points.flatten(2, 3)
        if isinstance(self.position_bias, LogBias):
            bias, fields = self.position_bias(flat, size)
            return bias, LogBiasTrace(**fields)
        if not isinstance(self.position_bias, TableBias):
            return None, None
        table = self.position_bias()
        if config.bias is BiasKind.FIXED:
            return functional.fixed_bias(table, query_size=size, samples=flat.shape[2]), None
        options: dict[str, Any] = {"convention": config.convention, "resolution": config.bias_resolution}
        return functional.table_bias(table, flat, query_size=size, **options), None

    # -------------------------------------------------------------------------------------------- names

    def official_names(self) -> official.NameMapping:
        """Return the released name and layout of each parameter."""
        return official.attention_names(self.config)

    @classmethod
    def from_official(
        cls, mapping: Mapping[str, Any], state: Mapping[str, Any], *, release: str, **options: Any
    ) -> DeformableAttention:
        """Build a layer from a released module's arguments and state dict, in the dtype of the state dict.

        Args:
            mapping: arguments of the released ``DAttentionBaseline`` class, by name.
            state: released state dict, tensors or arrays.
            release: ``"cvpr2022"`` or ``"datpp2023"``.
            options: further arguments of this class: `backend`, `sampler`.

        Raises:
            CheckpointError: if the state dict does not fit; with a report of missing, unexpected and mis-shaped keys.
        """
        config = DeformableAttentionConfig.from_official(mapping, release=release)
        layer = cls(config, **{"init": "released", **options}).to(state_dtype(state))
        layer.load_official(state)
        return layer


def _warn_hyperparameters(config: DeformableAttentionConfig, init: Init | None) -> None:
    """Warn the caller of hyperparameters with which offsets are hard to learn."""
    kernel, stride, limit = config.kernel_size, config.stride, config.max_offset_px
    if kernel < stride:
        warn_caller(
            f"DeformableAttention: kernel_size={kernel} is smaller than stride={stride}, so the offset network sees "
            f"{share_of_cell(kernel, stride):.0%} of the cell that its point should search; use "
            f"kernel_size={default_kernel_size(stride)}, the default",
            HyperparameterWarning,
        )
    if init is None and (limit is None or limit > 1):
        distance = "without a limit in pixels" if limit is None else f"by up to {limit:g} pixels"
        warn_caller(
            f"DeformableAttention: the released initialization moves points {distance} at random, further than a "
            'small target can pull them back; use init="zero_offset", or init="released" to keep it',
            HyperparameterWarning,
        )


def _tokens_to_heads(tokens: Tensor, heads: int) -> Tensor:
    """Split channels into heads without a copy: (B, N, C) → (B, heads, N, d)."""
    return tokens.unflatten(2, (heads, tokens.shape[2] // heads)).transpose(1, 2)
