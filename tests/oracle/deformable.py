"""The deformable attention layer, one query, one head, one sample at a time.

    q = W_q x,   o_g = W_2 gelu(norm(depthwise(q_g))),   p = bound(reference + o)
    s_g(n) = bilinear(x_g, p_n),   k = W_k s,   v = W_v s
    out(m) = sum_n softmax_n(q(m) . k(n) / sqrt(d) + bias(m, n)) v(n),   y = W_o out

g runs over groups of channels; heads of one group share its points; keys and values mix all groups.

config: a dict with these keys (others are not read)
    heads, groups (1), stride (1), kernel_size (5), convention ("cell_center"), average_pool (False),
    offset_bound ("tanh_cells" | "tanh_coordinates" | "clamp" | "raw" | "none"), offset_range (2.0),
    bias ("table" | "fixed" | "log_cpb" | "depthwise" | "none"), bias_resolution ("fractions" | "pixels")
params: {"query" | "key" | "value" | "output": {"weight" (C, C), "bias" (C,)},
         "offset_network": {"depthwise": {"weight" (C/G, 1, k, k), "bias"}, "norm": {"weight", "bias"},
                            "pointwise": {"weight" (2, C/G)}},
         "position_bias": {"table" (heads, 2 H0 - 1, 2 W0 - 1)} | {"table" (heads, H W, Ns)}
                          | {"hidden": {"weight" (32, 2), "bias"}, "out": {"weight" (heads/G, 32)}}
                          | {"depthwise": {"weight" (C, 1, 3, 3), "bias"}}}
"""

import math
from typing import NamedTuple

import numpy as np

from .basic import Array, Tree, average_pool, conv2d, dot, gelu, layer_norm, linear, pixel, softmax
from .bias import depthwise_bias, fixed_bias, log_cpb_bias, table_bias
from .geometry import key_count, offset_range, padding_2d, query, reference, to_pixel
from .sampling import bilinear_channels

DEFAULTS: Tree = {
    "groups": 1,
    "stride": 1,
    "kernel_size": 5,
    "convention": "cell_center",
    "average_pool": False,
    "offset_bound": "tanh_cells",
    "offset_range": 2.0,
    "bias": "table",
    "bias_resolution": "fractions",
}


class Result(NamedTuple):
    output: Array  # (B, C, H, W)
    points: Array  # (B, G, Hk, Wk, 2), (y, x), normalized
    reference: Array  # like points
    points_px: Array  # like points, in pixels of the map
    sampled: Array  # (B, C, Hk, Wk)
    bias: Array  # (B, heads, H W, Ns), zeros for bias "none"
    attention: Array  # (B, heads, H W, Ns)


def deformable_attention(x: Array, config: Tree, params: Tree) -> Result:
    """Apply the layer to x (B, C, H, W)."""
    c = {**DEFAULTS, **config}
    size = (x.shape[2], x.shape[3])
    q = linear(x, **params["query"])
    rows, columns = (key_count(c["convention"], n, c["kernel_size"], c["stride"]) for n in size)
    keys = (rows, columns)
    references, points = place_points(q, keys, c, params)
    points_px = in_pixels(points, size, c["convention"])
    sampled = sample_features(x, points_px, keys, c)
    k, v = linear(sampled, **params["key"]), linear(sampled, **params["value"])
    bias = logit_bias(points, size, c, params)
    out, attention = attend(q, k, v, bias, c["heads"])
    if c["bias"] == "depthwise":
        extra = depthwise_bias(q, params["position_bias"])
        for index in np.ndindex(*out.shape):
            out[index] = float(out[index]) + float(extra[index])
    y = linear(out, **params["output"])
    return Result(y, points, references, points_px, sampled, bias, attention)


def raw_offsets(q: Array, config: Tree, params: Tree) -> Array:
    """o[b, 2 g + axis, i, j]: the offset network, shared by the groups, run on each group's queries."""
    groups = config["groups"]
    per_group = q.shape[1] // groups
    rows = []
    for g in range(groups):
        q_g = q[:, g * per_group : (g + 1) * per_group]
        rows.append(offset_network(q_g, config, params["offset_network"]))
    return np.concatenate(rows, axis=1)


def offset_network(q_g: Array, config: Tree, params: Tree) -> Array:
    """pointwise(gelu(norm(depthwise(q_g)))): (B, C/G, H, W) -> (B, 2, Hk, Wk)"""
    size, stride = (q_g.shape[2], q_g.shape[3]), config["stride"]
    padding = padding_2d(config["convention"], size, config["kernel_size"], stride)
    hidden = conv2d(q_g, **params["depthwise"], stride=stride, padding=padding, groups=q_g.shape[1])
    return linear(gelu(layer_norm(hidden, **params["norm"])), **params["pointwise"])


def place_points(q: Array, keys: tuple[int, int], config: Tree, params: Tree) -> tuple[Array, Array]:
    """(references, points), both (B, G, Hk, Wk, 2)."""
    shape = (q.shape[0], config["groups"], *keys, 2)
    references, points = np.zeros(shape), np.zeros(shape)
    moves = None if config["offset_bound"] == "none" else raw_offsets(q, config, params)
    for b, g, i, j, axis in np.ndindex(*shape):
        ref = reference(config["convention"], (i, j)[axis], keys[axis])
        raw = 0.0 if moves is None else float(moves[b, 2 * g + axis, i, j])
        references[b, g, i, j, axis] = ref
        points[b, g, i, j, axis] = bound(ref, raw, keys[axis], config)
    return references, points


def bound(ref: float, raw: float, n_keys: int, config: Tree) -> float:
    """Return the normalized coordinate of a key's point from its reference and the network's raw offset."""
    kind, convention = config["offset_bound"], config["convention"]
    if kind == "tanh_coordinates":
        return math.tanh(ref + raw)
    if kind == "clamp" or (kind == "none" and convention == "datpp2023"):
        return min(max(ref + raw, -1.0), 1.0)
    if math.isinf(ref):
        raise ValueError("a single key's 2023 reference is infinite; only a clamp or tanh makes it finite")
    if kind == "tanh_cells":
        return ref + math.tanh(raw) * offset_range(convention, n_keys, config["offset_range"])
    if kind in ("raw", "none"):
        return ref + raw
    raise ValueError(f"offset_bound: unknown kind {kind!r}")


def in_pixels(points: Array, size: tuple[int, int], convention: str) -> Array:
    """Apply to_pixel to every coordinate."""
    pixels = np.zeros(points.shape)
    for index in np.ndindex(*points.shape):
        pixels[index] = to_pixel(convention, float(points[index]), size[index[-1]])
    return pixels


def sample_features(x: Array, points_px: Array, keys: tuple[int, int], config: Tree) -> Array:
    """s[b, c, i, j] = map c of x[b] at point (i, j) of the group of channel c."""
    if config["average_pool"]:
        pooled = average_pool(x, config["stride"])
        if pooled.shape[2:] != keys:
            raise ValueError(f"average pooling gives {pooled.shape[2:]} cells for {keys} keys")
        return pooled
    batch, channels = x.shape[:2]
    groups = config["groups"]
    sampled = np.zeros((batch, channels, *keys))
    for b, g, i, j in np.ndindex(batch, groups, *keys):
        mine = range(g * (channels // groups), (g + 1) * (channels // groups))
        y_px, x_px = float(points_px[b, g, i, j, 0]), float(points_px[b, g, i, j, 1])
        for c, value in zip(mine, bilinear_channels(x, b, mine, y_px, x_px), strict=True):
            sampled[b, c, i, j] = value
    return sampled


def logit_bias(points: Array, size: tuple[int, int], config: Tree, params: Tree) -> Array:
    """bias[b, h, m, n], added to the logits; m = i W + j, n = i_k Wk + j_k; h is in group h // (heads/G)."""
    batch, groups, keys_y, keys_x, _ = points.shape
    heads, convention, kind = config["heads"], config["convention"], config["bias"]
    per_group = heads // groups
    bias = np.zeros((batch, heads, size[0] * size[1], keys_y * keys_x))
    if kind in ("none", "depthwise"):
        return bias
    tables = np.asarray(params["position_bias"]["table"]).tolist() if kind == "table" else []
    reading: Tree = {"convention": convention, "size": size, "resolution": config["bias_resolution"]}
    for b, g, i, j, ik, jk in np.ndindex(batch, groups, *size, keys_y, keys_x):
        q_n = query(convention, i, size[0]), query(convention, j, size[1])
        p_n = float(points[b, g, ik, jk, 0]), float(points[b, g, ik, jk, 1])
        m, n = i * size[1] + j, ik * keys_x + jk
        mine = range(g * per_group, (g + 1) * per_group)
        if kind == "table":
            values = [table_bias(tables[h], q_n, p_n, **reading) for h in mine]
        elif kind == "fixed":
            values = [fixed_bias(params["position_bias"]["table"], h, m, n) for h in mine]
        elif kind == "log_cpb":
            values = log_cpb_bias(params["position_bias"], q_n, p_n)
        else:
            raise ValueError(f"bias: unknown kind {kind!r}")
        for h, value in zip(mine, values, strict=True):
            bias[b, h, m, n] = value
    return bias


def attend(q: Array, k: Array, v: Array, bias: Array, heads: int) -> tuple[Array, Array]:
    """out[b, h d + c, m] = sum_n a[b, h, m, n] v[b, h d + c, n],  a = softmax_n(q(m) . k(n) / sqrt(d) + bias)

    q (B, C, H, W); k and v (B, C, Hk, Wk); bias (B, heads, H W, Ns); d = C / heads. Returns (out, a).
    """
    batch, channels, height, width = q.shape
    keys = [(i, j) for i in range(k.shape[2]) for j in range(k.shape[3])]
    d = channels // heads
    out, attention = np.zeros(q.shape), np.zeros(bias.shape)
    for b in range(batch):
        all_k, all_v = [pixel(k, b, i, j) for i, j in keys], [pixel(v, b, i, j) for i, j in keys]
        for h, i, j in np.ndindex(heads, height, width):
            m, mine = i * width + j, slice(h * d, (h + 1) * d)
            q_m = pixel(q, b, i, j)[mine]
            logits = []
            for n, k_n in enumerate(all_k):
                logits.append(dot(q_m, k_n[mine]) / math.sqrt(d) + float(bias[b, h, m, n]))
            weights = softmax(logits)
            for n, weight in enumerate(weights):
                attention[b, h, m, n] = weight
            for c in range(h * d, (h + 1) * d):
                out[b, c, i, j] = dot(weights, [v_n[c] for v_n in all_v])
    return out, attention


def deformable_core(
    q: Array,
    k: Array,
    v: Array,
    points: Array,
    bias_table: Array | None,
    *,
    query_size: tuple[int, int],
    convention: str,
    scale: float | None = None,
    bias_resolution: str = "fractions",
) -> Array:
    """Compute the core alone: q (B, heads, H W, d), k, v (B, heads, Ns, d), points (B, G, Ns, 2) -> like q.

    out[b, h, m] = sum_n softmax_n(scale q[b, h, m] . k[b, h, n] + table bias of head h at (m, n)) v[b, h, n]
    """
    batch, heads, queries, d = q.shape
    n_keys, per_group, (height, width) = k.shape[2], heads // points.shape[1], query_size
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    tables = None if bias_table is None else bias_table.tolist()
    reading: Tree = {"convention": convention, "size": query_size, "resolution": bias_resolution}
    out = np.zeros(q.shape)
    for b, h, m in np.ndindex(batch, heads, queries):
        q_n = query(convention, m // width, height), query(convention, m % width, width)
        logits = []
        for n in range(n_keys):
            logit = scale * dot(q[b, h, m].tolist(), k[b, h, n].tolist())
            if tables is not None:
                p_n = float(points[b, h // per_group, n, 0]), float(points[b, h // per_group, n, 1])
                logit += table_bias(tables[h], q_n, p_n, **reading)
            logits.append(logit)
        weights = softmax(logits)
        for c in range(d):
            out[b, h, m, c] = dot(weights, v[b, h, :, c].tolist())
    return out
