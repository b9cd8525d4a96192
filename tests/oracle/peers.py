"""Peers that move points or see the whole map, one query, one head, one sample at a time.

Parameters have the package's names; arrays are containers only.
"""

import math

import numpy as np

from .basic import Array, Tree, conv2d, dot, gelu, layer_norm, linear, pixel, softmax
from .bias import table_bias
from .geometry import query, reference, to_pixel
from .sampling import bilinear
from .windows import Position, masked_attention


def multi_head(x: Array, params: Tree, *, heads: int) -> Array:
    """out(m) = sum_n softmax_n(q(m) . k(n) / sqrt(d) + bias(m, n)) v(n) over all pixels n; bias 0 without a table."""
    size = (x.shape[2], x.shape[3])
    tables = np.asarray(params["position_bias"]["table"]).tolist() if "position_bias" in params else None

    def bias(head: int, q: Position, k: Position) -> float:
        if tables is None:
            return 0.0
        q_n, k_n = (tuple(query("cell_center", p[axis], size[axis]) for axis in range(2)) for p in (q, k))
        return table_bias(tables[head], q_n, k_n, convention="cell_center", size=size)

    return masked_attention(x, params, heads, lambda q, k: True, bias).output


def dilated_neighborhood(x: Array, params: Tree, *, heads: int, kernel_size: int, dilation: int) -> Array:
    """Apply a separate neighborhood attention to each interleaved sub-map.

    A key is visible if it is in the query's sub-map and, counted there, in the query's window. A window is as long as
    the shortest sub-map allows.
    """
    size = (x.shape[2], x.shape[3])
    tables = np.asarray(params["neighborhood_bias"]["table"]).tolist()

    def window(axis: int, i: int) -> range:
        submaps = [range(first, size[axis], dilation) for first in range(min(dilation, size[axis]))]
        length = min(kernel_size, min(len(submap) for submap in submaps if len(submap) >= size[axis] // dilation))
        submap = submaps[i % dilation]
        start = min(max(submap.index(i) - length // 2, 0), len(submap) - length)
        return submap[start : start + length]

    def sees(q: Position, k: Position) -> bool:
        return all(k[axis] in window(axis, q[axis]) for axis in range(2))

    def bias(head: int, q: Position, k: Position) -> float:
        dy, dx = ((k[axis] - q[axis]) // dilation for axis in range(2))
        return tables[head][dy + kernel_size - 1][dx + kernel_size - 1]

    return masked_attention(x, params, heads, sees, bias).output


def pyramid(x: Array, params: Tree, *, heads: int, reduction: int) -> Array:
    """Attend to keys and values of a map whose pixels are r x r cells of x; the last cells are completed by zeros."""
    batch, channels, height, width = x.shape
    d = channels // heads
    coarse = x
    if reduction > 1:
        filling = ((0, -height % reduction), (0, -width % reduction))
        coarse = layer_norm(conv2d(x, **params["reduction"], stride=reduction, padding=filling), **params["norm"])
    q, kv = linear(x, **params["query"]), linear(coarse, **params["key_value"])
    out = np.zeros(x.shape)
    for b in range(batch):
        keys = [pixel(kv, b, *cell) for cell in np.ndindex(*coarse.shape[2:])]
        for i, j in np.ndindex(height, width):
            query_vector = pixel(q, b, i, j)
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                weights = softmax([dot(query_vector[part], key[part]) * d**-0.5 for key in keys])
                for c in range(h * d, (h + 1) * d):
                    out[b, c, i, j] = dot(weights, [key[channels + c] for key in keys])
    return linear(out, **params["output"])


def deform_conv2d(
    x: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Array | None = None,
) -> Array:
    """y[o, i, j] = bias[o] + sum over channels c of o's group and taps (u, v) of

    weight[o, c, u, v] mask[tap, i, j] x[c](i r - pad + u dil + dy, j r - pad + v dil + dx)

    with (dy, dx) = offset[2 tap, i, j], offset[2 tap + 1, i, j] and tap = (group of c) K + u k_x + v.
    """
    batch, channels, height, width = x.shape
    out_channels, per_group, k_y, k_x = weight.shape
    groups, taps = channels // per_group, k_y * k_x
    per_offset_group = channels // (offset.shape[1] // (2 * taps))
    out_h = (height + 2 * padding[0] - dilation[0] * (k_y - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (k_x - 1) - 1) // stride[1] + 1
    y = np.zeros((batch, out_channels, out_h, out_w))
    for b, o, i, j in np.ndindex(*y.shape):
        total = 0.0 if bias is None else float(bias[o])
        for c_in, u, v in np.ndindex(per_group, k_y, k_x):
            c = o // (out_channels // groups) * per_group + c_in
            tap = c // per_offset_group * taps + u * k_x + v
            row = i * stride[0] - padding[0] + u * dilation[0] + float(offset[b, 2 * tap, i, j])
            column = j * stride[1] - padding[1] + v * dilation[1] + float(offset[b, 2 * tap + 1, i, j])
            weighed = 1.0 if mask is None else float(mask[b, tap, i, j])
            total += float(weight[o, c_in, u, v]) * weighed * bilinear(x[b, c].tolist(), row, column)
        y[b, o, i, j] = total
    return y


def multi_scale(value: Array, shapes: list[tuple[int, int]], locations: Array, weights: Array) -> Array:
    """y[q, h] = sum over levels l and points p of weights[q, h, l, p] map_l(y, x), (y, x) the location in pixels."""
    batch, _, heads, d = value.shape
    y = np.zeros((batch, locations.shape[1], heads * d))
    for b, m, h, c in np.ndindex(batch, locations.shape[1], heads, d):
        start = 0
        for level, (height, width) in enumerate(shapes):
            plane = value[b, start : start + height * width, h, c].reshape(height, width).tolist()
            start += height * width
            for p in range(locations.shape[4]):
                across, down = locations[b, m, h, level, p].tolist()
                read = bilinear(plane, down * height - 0.5, across * width - 0.5)
                y[b, m, h * d + c] += float(weights[b, m, h, level, p]) * read
    return y


def per_query(x: Array, params: Tree, *, heads: int, groups: int, kernel_size: int) -> Array:
    """Sample, project every sample, then attend: the order of the equations, not of the package."""
    batch, channels, height, width = x.shape
    part, d, count = channels // groups, channels // heads, kernel_size**2
    network = params["offset_network"]
    kernel = np.asarray(network["depthwise"]["weight"])
    half = kernel.shape[-1] // 2
    q = linear(x, **params["query"])
    out = np.zeros(x.shape)
    moves = []
    for g in range(groups):
        q_g = q[:, g * part : (g + 1) * part]
        windows = conv2d(q_g, kernel, network["depthwise"]["bias"], padding=((half, half), (half, half)), groups=part)
        moves.append(linear(gelu(layer_norm(windows, **network["norm"])), **network["pointwise"]))
    for b, i, j in np.ndindex(batch, height, width):
        samples = []
        for n in range(count):
            sample: list[float] = []
            for g in range(groups):
                row = i + n // kernel_size - kernel_size // 2 + float(moves[g][b, 2 * n, i, j])
                column = j + n % kernel_size - kernel_size // 2 + float(moves[g][b, 2 * n + 1, i, j])
                sample += [bilinear(x[b, c].tolist(), row, column) for c in range(g * part, (g + 1) * part)]
            samples.append(sample)
        as_map = np.array(samples).T[None, :, :, None]  # (1, C, N, 1)
        keys, values = linear(as_map, **params["key"]), linear(as_map, **params["value"])
        for h in range(heads):
            of_head = slice(h * d, (h + 1) * d)
            logits = [dot(pixel(q, b, i, j)[of_head], pixel(keys, 0, n, 0)[of_head]) * d**-0.5 for n in range(count)]
            weights = softmax(logits)
            for c in range(h * d, (h + 1) * d):
                out[b, c, i, j] = dot(weights, [float(values[0, c, n, 0]) for n in range(count)])
    return linear(out, **params["output"])


def dat_dcn(x: Array, params: Tree, *, heads: int, points: int, convention: str) -> Array:
    """Attend with points and weights of every pixel and head from the pixel's features; (y, x), normalized."""
    batch, channels, height, width = x.shape
    d, size = channels // heads, (height, width)
    values = linear(x, **params["value"])
    offsets, logits = linear(x, **params["offset"]), linear(x, **params["weights"])
    out = np.zeros(x.shape)
    for b, h, i, j in np.ndindex(batch, heads, height, width):
        weights = softmax([float(logits[b, h * points + p, i, j]) for p in range(points)])
        for c in range(h * d, (h + 1) * d):
            for p in range(points):
                place = []
                for axis, index in enumerate((i, j)):
                    move = float(offsets[b, (h * points + p) * 2 + axis, i, j])
                    place.append(to_pixel(convention, reference(convention, index, size[axis]) + move, size[axis]))
                out[b, c, i, j] += weights[p] * bilinear(values[b, c].tolist(), place[0], place[1])
    return linear(out, **params["output"])


def ms_deform(x: Array, params: Tree, *, heads: int, points: int, dot_product: bool) -> Array:
    """Apply Deformable DETR's attention of a map to itself: offsets in pixels, (x, y), from each pixel's center."""
    batch, channels, height, width = x.shape
    d = channels // heads
    values, offsets = linear(x, **params["value"]), linear(x, **params["offset"])
    out = np.zeros(x.shape)

    def read(plane: Array, h: int, p: int, b: int, i: int, j: int) -> float:
        first = (h * points + p) * 2
        return bilinear(plane.tolist(), i + float(offsets[b, first + 1, i, j]), j + float(offsets[b, first, i, j]))

    if dot_product:
        q, k = linear(x, **params["query"]), linear(x, **params["key"])
    else:
        scores = linear(x, **params["weights"])
    for b, h, i, j in np.ndindex(batch, heads, height, width):
        head_channels = range(h * d, (h + 1) * d)
        if dot_product:
            logits = [
                sum(float(q[b, c, i, j]) * read(k[b, c], h, p, b, i, j) for c in head_channels) / math.sqrt(d)
                for p in range(points)
            ]
        else:
            logits = [float(scores[b, h * points + p, i, j]) for p in range(points)]
        weights = softmax(logits)
        for c in head_channels:
            out[b, c, i, j] = dot(weights, [read(values[b, c], h, p, b, i, j) for p in range(points)])
    return linear(out, **params["output"])
