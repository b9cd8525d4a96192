"""The layers in torch's own operators: for autograd in float64 and as a yardstick in float32.

All of it is dense: `conv2d`, `layer_norm`, `gelu`, `grid_sample`, `scaled_dot_product_attention`. Maps are sampled with
a ring of zeros around them, so that a map of one pixel needs no special case.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracle import geometry

from dat_ref import BiasKind, DeformableAttentionConfig, OffsetBound

Tensor = torch.Tensor
Tree = Any


def as_tensors(tree: Tree) -> Tree:
    """Return a tree of tensors that share memory with a tree of arrays (copies where they cannot)."""
    if isinstance(tree, dict):
        return {name: as_tensors(branch) for name, branch in tree.items()}
    return tree if isinstance(tree, Tensor) else torch.from_numpy(np.array(tree))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a 1 × 1 convolution."""
    return F.conv2d(x, weight[:, :, None, None], bias)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply layer norm over the channels of every pixel."""
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5).permute(0, 3, 1, 2)


def sample(maps: Tensor, pixels: Tensor) -> Tensor:
    """Sample maps (N, C, H, W) at pixels (N, P, 2) with zeros outside: (N, C, P)."""
    padded = F.pad(maps, (1, 1, 1, 1))
    extent = torch.tensor([padded.shape[2] - 1, padded.shape[3] - 1], dtype=maps.dtype)
    grid = (2 * (pixels + 1) / extent - 1).flip(-1)[:, None]
    return F.grid_sample(padded, grid, mode="bilinear", padding_mode="zeros", align_corners=True)[:, :, 0]


def to_pixels(points: Tensor, size: tuple[int, int], convention: str) -> Tensor:
    """Convert normalized points to pixels, axis by axis."""
    extent = torch.tensor(size, dtype=points.dtype)
    if convention == "cell_center":
        return ((points + 1) * extent - 1) / 2
    return (points + 1) / 2 * (extent - 1)


def make_grid(formula: Any, convention: str, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the (rows, columns, 2) grid of a scalar formula of `oracle.geometry`."""
    rows = torch.tensor([formula(convention, i, size[0]) for i in range(size[0])], dtype=dtype)
    columns = torch.tensor([formula(convention, j, size[1]) for j in range(size[1])], dtype=dtype)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


def sampling_points(query: Tensor, params: Tree, config: DeformableAttentionConfig, keys: tuple[int, int]) -> Tensor:
    """Return the sampling points (B, G, Hk, Wk, 2), normalized."""
    name = config.convention.name.lower()
    reference = make_grid(geometry.reference, name, keys, query.dtype)
    batch, groups = query.shape[0], config.groups
    if config.offset_bound is OffsetBound.NONE:
        return reference.clamp(-1, 1).expand(batch, groups, *keys, 2)
    network = params["offset_network"]
    (top, bottom), (left, right) = geometry.padding_2d(name, query.shape[2:], config.kernel_size, config.stride)
    windows = F.pad(query.reshape(batch * groups, -1, *query.shape[2:]), (left, right, top, bottom))
    kernel = network["depthwise"]
    windows = F.conv2d(windows, kernel["weight"], kernel["bias"], config.stride, groups=config.group_dim)
    raw = pointwise(F.gelu(channel_norm(windows, **network["norm"])), network["pointwise"]["weight"])
    raw = raw.reshape(batch, groups, 2, *keys).permute(0, 1, 3, 4, 2)
    if config.offset_bound is OffsetBound.TANH_CELLS:
        limit = [geometry.offset_range(name, count, config.offset_range) for count in keys]
        return reference + torch.tanh(raw) * torch.tensor(limit, dtype=raw.dtype)
    points = reference + raw
    if config.offset_bound is OffsetBound.TANH_COORDINATES:
        return torch.tanh(points)
    return points.clamp(-1, 1) if config.offset_bound is OffsetBound.CLAMP else points


def logit_bias(points: Tensor, params: Tree, config: DeformableAttentionConfig, size: tuple[int, int]) -> Tensor | None:
    """Return the bias that is added to the logits, (B or 1, heads, H·W, Ns)."""
    name = config.convention.name.lower()
    batch, groups, samples = points.shape[0], config.groups, points.shape[2] * points.shape[3]
    queries = make_grid(geometry.query, name, size, points.dtype).reshape(-1, 2)
    flat = points.reshape(batch, groups, 1, samples, 2)
    if config.bias is BiasKind.FIXED:
        return params["position_bias"]["table"][None]
    if config.bias is BiasKind.LOG_CPB:
        distance = 4 * (queries[:, None] - flat)
        scaled = torch.sign(distance) * torch.log2(1 + distance.abs()) / 3
        hidden = F.relu(F.linear(scaled, **params["position_bias"]["hidden"]))
        bias = F.linear(hidden, params["position_bias"]["out"]["weight"])  # (B, G, H·W, Ns, heads/G)
        return bias.permute(0, 1, 4, 2, 3).reshape(batch, config.heads, -1, samples)
    if config.bias is not BiasKind.TABLE:
        return None
    table = params["position_bias"]["table"]
    table_map_size = torch.tensor([(length + 1) // 2 for length in table.shape[1:]], dtype=points.dtype)
    map_size = torch.tensor(size, dtype=points.dtype)
    if config.bias_resolution == "fractions":
        a = int(config.convention.align_corners)
        ratio = (table_map_size - a) / torch.clamp(map_size - a, min=1)
    else:
        ratio = torch.ones(2, dtype=points.dtype)
    displacement = to_pixels(queries, size, name)[:, None] - to_pixels(flat, size, name)
    positions = displacement * ratio + table_map_size - 1  # (B, G, H·W, Ns, 2)
    heads = table.reshape(1, groups, -1, *table.shape[1:]).expand(batch, -1, -1, -1, -1)
    values = sample(heads.flatten(0, 1), positions.reshape(batch * groups, -1, 2))
    return values.reshape(batch, config.heads, -1, samples)


def torch_layer(x: Any, params: Tree, config: DeformableAttentionConfig) -> Tensor:
    """Compute the deformable layer (B, C, H, W) -> (B, C, H, W); average pooling is left to the oracle."""
    x, params = as_tensors(x), as_tensors(params)
    batch, channels, height, width = x.shape
    name = config.convention.name.lower()
    keys = tuple(geometry.key_count(name, n, config.kernel_size, config.stride) for n in (height, width))
    query = pointwise(x, **params["query"])
    points = sampling_points(query, params, config, keys)
    pixels = to_pixels(points, (height, width), name).reshape(batch * config.groups, -1, 2)
    sampled = sample(x.reshape(batch * config.groups, -1, height, width), pixels).reshape(batch, channels, *keys)

    def split(maps: Tensor) -> Tensor:
        return maps.reshape(batch, config.heads, channels // config.heads, -1).transpose(2, 3)

    k, v = (split(pointwise(sampled, **params[part])) for part in ("key", "value"))
    bias = logit_bias(points, params, config, (height, width))
    out = F.scaled_dot_product_attention(split(query), k, v, bias)
    merged = out.transpose(2, 3).reshape(x.shape)
    if config.bias is BiasKind.DEPTHWISE:
        kernel = params["position_bias"]["depthwise"]
        merged = merged + F.conv2d(query, **kernel, padding=1, groups=channels)
    return pointwise(merged, **params["output"])


def masked_attention(x: Any, params: Tree, heads: int, bias: Tensor) -> Tensor:
    """Compute self-attention of a map with an additive (heads, H·W, H·W) bias, -inf for hidden keys."""
    batch, channels = x.shape[:2]
    qkv = pointwise(x, **params["qkv"]).reshape(batch, 3, heads, channels // heads, -1).transpose(3, 4)
    out = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], bias)
    return pointwise(out.transpose(2, 3).reshape(x.shape), **params["output"])
