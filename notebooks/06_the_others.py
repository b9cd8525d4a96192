# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Other attention systems
#
# A convolution, an encoder for detection and the attention of a backbone are all called "deformable". Windows and
# neighborhoods are both called "local". Three properties distinguish such systems better than their names:
#
# - Receptive field: the pixels that a query can read.
# - Choice of positions: fixed by the architecture, or predicted from the image or from the query.
# - Choice of weights: computed from the features at the positions, or from the query alone.
#
# This notebook measures these properties for ten systems. Then it shows how the systems are related: in limiting cases
# most of them are equal, and an error in one of them breaks an identity. Equations and code: [the systems it is
# compared with](../../peers/).
#
# Each section makes a claim, names the function of `dat_ref` that it concerns, draws a figure, and ends with
# assertions.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from dat_ref import (
    BiasKind,
    Convention,
    DeformableAttentionConfig,
    NeighborhoodAttentionConfig,
    WindowAttentionConfig,
    init_params,
    viz,
)
from dat_ref.cli.photo import load_photo, resize
from dat_ref.data import photograph_path
from dat_ref.ops.basic import conv2d, linear
from dat_ref.params import flatten, unflatten
from dat_ref.peers import (
    ATTENTIONS,
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
    deform_conv2d,
    multi_scale_deformable_attention,
    receptive_field,
)
from dat_ref.peers.per_query import attend_at_points
from dat_ref.viz import style
from dat_ref.viz.artists import dim

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]

photo = load_photo(photograph_path("astronaut"))
SIDE, DIM, HEADS = 12, 12, 3
SIZE = (SIDE, SIDE)
mixtures = np.random.default_rng(0).normal(size=(DIM, 3))


def as_map(picture, side=SIDE):
    """Return a photograph as features (1, 12, side, side): random mixtures of its colors."""
    return linear(resize(picture, (side, side)).transpose(2, 0, 1)[None] - 0.5, 2 * mixtures)


x = as_map(photo)

# Nine keys per query, over all heads, where the system allows it.
SYSTEMS = {
    "plain attention": MultiHeadAttentionConfig(DIM, HEADS),
    "spatial reduction": PyramidAttentionConfig(DIM, HEADS, reduction=4),
    "window": WindowAttentionConfig(DIM, HEADS, window_size=3),
    "shifted window": WindowAttentionConfig(DIM, HEADS, window_size=3, shift=1),
    "neighborhood": NeighborhoodAttentionConfig(DIM, HEADS, kernel_size=3),
    "deformable attention": DeformableAttentionConfig(DIM, HEADS, stride=4, kernel_size=5, size=SIZE),
    "deformable convolution": DeformableConvConfig(DIM, kernel_size=3),
    "Deformable DETR": MultiScaleDeformableConfig(DIM, HEADS, points=3),
    "per-query keys": PerQueryAttentionConfig(DIM, HEADS, kernel_size=3),
    "DAT-DCN": DATDCNAttentionConfig(DIM, HEADS, points=3),
}


def run(config, params, x=x):
    """Run one layer; return (y, trace)."""
    return ATTENTIONS[type(config)].forward(x, params, config)


def moving_params(config, seed=2):
    """Return random parameters with offsets of some pixels, larger than those of the initialization."""
    rng = np.random.default_rng(seed)
    params = init_params(config, seed, dtype=np.float64)
    unit = SIDE / 2 if isinstance(config, DATDCNAttentionConfig) else 1  # offsets in half maps, not in pixels
    for part in (params.get("offset", {}), params.get("offset_network", {}).get("pointwise", {})):
        if part:
            fan_in = part["weight"][0, 0].size
            part["weight"][:] = rng.normal(scale=0.4 / unit, size=part["weight"].shape) / fan_in**0.5
    return params


# %% [markdown]
# ## 1. The receptive field of a query
#
# Select two queries on the photograph, one on the face and one on the helmet. Mark the receptive field of each: the
# pixels that enter its output as key or value, with any weight.
#
# **Claim** (`dat_ref.peers.receptive_field`). In three of the ten systems all queries have the same receptive field:
# plain attention, spatial reduction, and deformable attention. In the first two it is the whole map, at quadratic cost
# or at reduced resolution. **Only in deformable attention all queries read the same few pixels, chosen for this
# image.**

# %% alt="The pixels that two queries can read in ten systems: squares, everything, or points" live="receptive_field"
QUERIES = {"face": (2, 5), "helmet": (9, 9)}
fields = {}
figure, panels = plt.subplots(2, 5, figsize=(8.8, 4.6))
for axes, (name, config) in zip(panels.ravel(), SYSTEMS.items()):
    _, trace = run(config, moving_params(config))
    fields[name] = [receptive_field(query, SIZE, config, trace) for query in QUERIES.values()]
    axes.imshow(dim(photo), extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
    one, other = fields[name]
    for pixels, color in ((one & ~other, BLUE), (other & ~one, ORANGE), (one & other, GREEN)):
        axes.imshow(np.where(pixels, 1.0, np.nan), cmap=ListedColormap([color]), alpha=0.6)
    for query, color in zip(QUERIES.values(), (BLUE, ORANGE)):
        axes.scatter(query[1], query[0], marker="*", s=120, color=color, ec="white", lw=0.9, zorder=4)
    axes.set(xticks=[], yticks=[], xlabel=f"{fields[name][0].sum()} and {fields[name][1].sum()} pixels")
    axes.set_title(name, size=9)
    axes.spines[:].set_visible(False)
figure.supxlabel(
    "read by the query on the face (blue), on the helmet (orange), by both (green)", size=8.5, color=style.QUIET
)
plt.show()

# %%
shared = {name for name, (one, other) in fields.items() if np.array_equal(one, other)}
assert shared == {"plain attention", "spatial reduction", "deformable attention"}
assert fields["plain attention"][0].all()
assert fields["spatial reduction"][0].all()
assert fields["deformable attention"][0].sum() <= 4 * 9  # nine points, four pixels each

# %% [markdown]
# ## 2. The receptive field and the output
#
# A receptive field is only useful if it describes the dependence of the output correctly. This can be tested. Add
# noise to all pixels *outside* the receptive field of a query: its output must not change at all. Add noise inside: it
# must change.
#
# One dependence must be removed first: positions and queries also depend on the map. Therefore the weights of all
# layers that compute positions and queries are set to zero here, and their biases are kept. The remaining dependence
# is through keys and values.
#
# **Claim.** For all ten systems and both queries, the output depends on exactly the pixels of the receptive field.

# %% alt="Ten systems: noise inside the receptive field changes the output, noise outside does not" plot=true
PREDICTORS = ("query", "offset", "modulation", "weights", "offset_network")


def fixed_predictions(config):
    """Return parameters whose queries, positions and predicted weights do not depend on the map."""
    params = flatten(init_params(config, 2, dtype=np.float64))
    for name, leaf in params.items():
        part, last = name.split(".")[0], name.split(".")[-1]
        if part in PREDICTORS and last == "weight" and "pointwise" not in name and "norm" not in name:
            leaf[:] = 0
        if part == "qkv" and last == "weight":
            leaf[:DIM] = 0
    return unflatten(params)


def influence(config, query):
    """Return the change of the query's output for noise outside its receptive field, and for noise inside."""
    params = fixed_predictions(config)
    y, trace = run(config, params)
    pixels = receptive_field(query, SIZE, config, trace)
    noise = np.random.default_rng(0).normal(size=x.shape)
    changed = [run(config, params, x + noise * where)[0] for where in (~pixels, pixels)]
    return [np.abs(other - y)[0, :, query[0], query[1]].max() for other in changed]


effects = {name: [influence(config, query) for query in QUERIES.values()] for name, config in SYSTEMS.items()}

figure, axes = plt.subplots(figsize=(8.2, 2.9))
for row, both in enumerate(effects.values()):
    outside, inside = np.max(both, axis=0)
    axes.scatter(inside, row, s=50, color=BLUE, lw=0, zorder=3)
    axes.scatter(max(outside, 1e-3), row, s=50, fc="white", ec=ORANGE, lw=1.4, zorder=3)
    axes.plot([1e-3, inside], [row, row], color=style.HAIRLINE, lw=0.8, zorder=1)
axes.scatter([], [], s=50, fc="white", ec=ORANGE, lw=1.4, label="noise outside the receptive field")
axes.scatter([], [], s=50, color=BLUE, lw=0, label="noise inside")
axes.set(xscale="log", xlim=(7e-4, 9), xticks=[1e-3, 1e-2, 0.1, 1], yticks=range(10), yticklabels=SYSTEMS)
axes.set_xticklabels(["none", "0.01", "0.1", "1"])
axes.set_title("change of the output")
axes.minorticks_off()
axes.invert_yaxis()
axes.tick_params(axis="y", length=0)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
for both in effects.values():
    for outside, inside in both:
        assert outside == 0
        assert inside > 1e-3

# %% [markdown]
# ## 3. Positions and weights
#
# Two more tests. First, show another photograph and check whether the positions change. Second, change all features
# except those from which the query is computed (its own pixel; for the convolution its window), and check whether the
# weights change.
#
# **Claim.** Seven systems compute the weights from the features at the positions. Only two of these seven can move the
# positions: deformable attention, and the more expensive per-query keys. The other systems with moving positions
# predict the weight of a point without its features.


# %% alt="Ten systems by three properties, filled dots for yes: only deformable attention has all three" plot=true
def weights_of(config, trace, query):
    """Return the weights of a query for its keys or taps, flat."""
    number = query[0] * SIDE + query[1]
    if isinstance(config, WindowAttentionConfig):
        return viz.window_query_attention(trace, query).weights
    if isinstance(config, DeformableConvConfig):
        return trace.mask[0, :, query[0], query[1]]
    queries = 0 if trace.attention.shape[1] == SIDE**2 else 1  # (Q, heads, …) or (heads, Q, …)
    return np.take(trace.attention[0], number, axis=queries).ravel()


def fixed_positions(config):
    """Return parameters whose positions do not depend on the map; weights may."""
    params = init_params(config, 2, offsets="zero_offset", dtype=np.float64)
    for name in ("modulation", "weights"):  # initialized to zero
        if name in params:
            params[name]["weight"][:] = np.random.default_rng(1).normal(size=params[name]["weight"].shape)
    if isinstance(config, DeformableConvConfig):
        params["offset"]["bias"][:] = -4  # moves the taps out of the window
    return params


def dependences(config, query=QUERIES["helmet"]):
    """Return two booleans: positions depend on the image; weights depend on the features at the positions."""
    other = as_map(load_photo(photograph_path("coffee")))
    pixels = [
        receptive_field(query, SIZE, config, run(config, moving_params(config), picture)[1]) for picture in (x, other)
    ]
    around = 1 if isinstance(config, DeformableConvConfig) else 0
    kept = np.s_[:, :, query[0] - around : query[0] + around + 1, query[1] - around : query[1] + around + 1]
    other[kept] = x[kept]
    weights = [weights_of(config, run(config, fixed_positions(config), picture)[1], query) for picture in (x, other)]
    return not np.array_equal(*pixels), np.abs(weights[0] - weights[1]).max() > 1e-6


answers = {name: (name in shared, *dependences(config)) for name, config in SYSTEMS.items()}

figure, axes = plt.subplots(figsize=(7.6, 3.2))
for row, of_system in enumerate(answers.values()):
    for column, (yes, color) in enumerate(zip(of_system, (BLUE, ORANGE, GREEN))):
        axes.scatter(column, row, s=95, fc=color if yes else "white", ec=color if yes else style.HAIRLINE, lw=1.2)
axes.set(xlim=(-0.5, 2.5), ylim=(9.6, -0.6), yticks=range(10), yticklabels=SYSTEMS)
axes.set_xticks(
    range(3),
    ["all queries read\nthe same positions", "positions depend\non the image", "features there\ndecide the weights"],
)
axes.xaxis.tick_top()
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
plt.show()

# %%
assert [name for name, (_, moves, _) in answers.items() if moves] == list(SYSTEMS)[5:]
by_features = {name for name, (_, _, depends) in answers.items() if depends}
assert by_features == set(SYSTEMS) - {"deformable convolution", "Deformable DETR", "DAT-DCN"}
assert len(by_features) == 7
assert {name for name, answer in answers.items() if all(answer)} == {"deformable attention"}

# %% [markdown]
# ## 4. The receptive field of several layers
#
# A backbone stacks layers. To compute the receptive field of a stack, we include each pixel's own position (the
# residual branch) and chain the receptive fields of the layers.
#
# For deformable attention the result may surprise. Every query reads the points of the last layer, these points read
# the points of the layer before, and so on: **points read only points**. Even in a deep stack, most of the map is
# never read. A local layer is needed, which carries the surroundings of a point to the point.
#
# The stride is 7 here. At stride 1 or 2, undeformed points would read the whole map in one layer.
#
# **Claim.** On a map of 28 × 28, the receptive field of four deformable layers of 16 points is a quarter of the map.
# That of one neighborhood layer of 7 × 7 and one deformable layer is four fifths. That of two window layers, or of two
# neighborhood layers, is a fifth. The released models alternate local and deformable layers.

# %% alt="The share of the map seen after one to four layers of four stacks; two layers on a photograph"
WIDE = 28
wide = as_map(photo, WIDE)
STACKS = {
    "window, shifted": [WindowAttentionConfig(DIM, HEADS, 7), WindowAttentionConfig(DIM, HEADS, 7, shift=4)],
    "neighborhood": [NeighborhoodAttentionConfig(DIM, HEADS, 7)],
    "deformable": [DeformableAttentionConfig(DIM, HEADS, stride=7, kernel_size=7, size=(WIDE, WIDE))],
}
STACKS["neighborhood, deformable"] = STACKS["neighborhood"] + STACKS["deformable"]


def receptive_fields(config, seed):
    """Return the receptive fields of all queries in one layer, own pixel included: (784, 784) bool."""
    _, trace = run(config, moving_params(config, seed), wide)
    queries = [(0, 0)] if isinstance(config, DeformableAttentionConfig) else list(np.ndindex(WIDE, WIDE))
    rows = np.array([receptive_field(query, (WIDE, WIDE), config, trace).ravel() for query in queries])
    return np.broadcast_to(rows, (WIDE**2, WIDE**2)) | np.eye(WIDE**2, dtype=bool)


single = {config: receptive_fields(config, 0) for stack in STACKS.values() for config in stack}
covered, pictures = {}, {}
for name, stack in STACKS.items():
    chained, covered[name] = np.eye(WIDE**2, dtype=np.float32), []
    for depth in range(4):
        config = stack[depth % len(stack)]
        moves = isinstance(config, DeformableAttentionConfig)
        layer = receptive_fields(config, depth) if moves else single[config]  # other points in each layer
        chained = (layer.astype(np.float32) @ chained > 0).astype(np.float32)
        covered[name].append(chained.mean())
        if depth == 1:
            pictures[name] = chained[10 * WIDE + 11].reshape(WIDE, WIDE) > 0

figure, (axes, *panels) = plt.subplots(1, 5, figsize=(8.8, 2.4), width_ratios=[1.3, 1, 1, 1, 1])
for shares, color in zip(covered.values(), (GREEN, PINK, BLUE, ORANGE)):
    axes.plot(range(1, 5), shares, color=color, lw=1.8, marker="o", ms=4)
axes.set(xticks=range(1, 5), xlabel="layers", ylim=(0, 1.03), yticks=[0, 0.5, 1], title="receptive field / map")
axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
for panel, (name, pixels), color in zip(panels, pictures.items(), (GREEN, PINK, BLUE, ORANGE)):
    panel.imshow(dim(photo), extent=(-0.5, WIDE - 0.5, WIDE - 0.5, -0.5))
    panel.imshow(np.where(pixels, 1.0, np.nan), cmap=ListedColormap([color]), alpha=0.55)
    panel.scatter(11, 10, marker="*", s=90, color=style.QUERY, ec="white", lw=0.8)
    panel.set(xticks=[], yticks=[])
    panel.set_title(name.replace(", def", ",\ndef").replace(", shi", ",\nshi"), size=8.5, color=color)
    panel.spines[:].set_visible(False)
plt.show()

# %%
for name, shares in covered.items():
    print(f"{name:25} " + "  ".join(f"{share:4.0%}" for share in shares))
assert covered["deformable"][-1] < 0.3
assert covered["neighborhood, deformable"][1] > 0.75
assert max(covered["window, shifted"][1], covered["neighborhood"][1]) < 0.25

# %% [markdown]
# ## 5. Identities between the systems
#
# In limiting cases the systems become equal. A window as large as the map is plain attention. A deformable layer of
# stride 1 with zero offsets is plain attention too, if its coordinates are consistent. Each such identity is a test
# that needs no stored reference values, and together the identities connect all systems.
#
# **Claim.** Eleven pairs agree to the last digits when the condition holds (blue), and clearly differ when it is
# slightly violated (orange): a window that is one pixel smaller, offsets of a hundredth of a pixel, a mask of 0.99.

# %%
rng = np.random.default_rng(0)
z = rng.normal(size=(1, 6, 5, 5))
THIRDS = {"query": slice(0, 6), "key": slice(6, 12), "value": slice(12, 18)}
plain = MultiHeadAttentionConfig(6, 2, size=(5, 5))
params = init_params(plain, seed=0, dtype=np.float64)
params["position_bias"]["table"][:] = rng.normal(size=(2, 9, 9))
qkv, output, table = params["qkv"], params["output"], params["position_bias"]["table"]
y = run(plain, params, z)[0]


def gap(one, other):
    return np.abs(one - other).max()


def window(side):
    edge = 5 - side
    cut = table[:, edge : 9 - edge, edge : 9 - edge]
    return run(WindowAttentionConfig(6, 2, side), {"qkv": qkv, "output": output, "window_bias": {"table": cut}}, z)[0]


def neighborhood(turned):
    tree = {"qkv": qkv, "output": output, "neighborhood_bias": {"table": turned}}
    return run(NeighborhoodAttentionConfig(6, 2, 5), tree, z)[0]


def deformable(convention):
    config = DeformableAttentionConfig(6, 2, size=(5, 5), convention=convention)
    tree = init_params(config, seed=1, offsets="zero_offset", dtype=np.float64)
    tree |= {name: {leaf: qkv[leaf][rows] for leaf in qkv} for name, rows in THIRDS.items()}
    return run(config, tree | {"output": output, "position_bias": {"table": table}}, z)[0]


IDENTITIES = {
    "window = plain": (gap(window(5), y), gap(window(4), y)),
    "neighborhood = plain": (gap(neighborhood(table[:, ::-1, ::-1]), y), gap(neighborhood(table), y)),
    "deformable = plain": (gap(deformable(Convention.CELL_CENTER), y), gap(deformable(Convention.CVPR2022), y)),
}

bare = run(MultiHeadAttentionConfig(6, 2), {"qkv": qkv, "output": output}, z)[0]


def pyramid(reduction):
    config = PyramidAttentionConfig(6, 2, reduction)
    tree = init_params(config, seed=1, dtype=np.float64)
    tree |= {"query": {leaf: qkv[leaf][:6] for leaf in qkv}, "key_value": {leaf: qkv[leaf][6:] for leaf in qkv}}
    return run(config, tree | {"output": output}, z)[0]


IDENTITIES["spatial reduction = plain"] = gap(pyramid(1), bare), gap(pyramid(2), bare)

# %% [markdown]
# Next, per-query keys. If every query gets a copy of the points of a deformable layer, the two are equal. With zero
# offsets they are equal to neighborhood attention, except at the border. A dilated neighborhood equals a neighborhood
# on every second pixel.

# %%
config = DeformableAttentionConfig(6, 2, stride=2, kernel_size=3, bias=BiasKind.NONE)
tree = init_params(config, seed=0, dtype=np.float64)
_, trace = run(config, tree, z)
own = np.repeat(trace.points_px.reshape(1, 1, 1, -1, 2), 25, axis=2)  # a copy of the shared points for each query
copied, moved = (
    attend_at_points(trace.query.reshape(1, 6, 25), z, points, tree, heads=2)[0] for points in (own, own + 0.01)
)
IDENTITIES["per-query keys = deformable"] = (
    gap(copied.reshape(z.shape), trace.merged),
    gap(moved.reshape(z.shape), trace.merged),
)

config = PerQueryAttentionConfig(6, 2, kernel_size=3)
tree = init_params(config, seed=0, offsets="zero_offset", dtype=np.float64)
stacked = {leaf: np.concatenate([tree[name][leaf] for name in THIRDS]) for leaf in ("weight", "bias")}
around = {"qkv": stacked, "output": tree["output"], "neighborhood_bias": {"table": np.zeros((2, 5, 5))}}
one, other = run(config, tree, z)[0], run(NeighborhoodAttentionConfig(6, 2, 3), around, z)[0]
inside = np.s_[:, :, 1:-1, 1:-1]
IDENTITIES["per-query keys = neighborhood"] = (
    gap(one[inside], other[inside]),
    gap(one, other),
)  # second: including the border

dilated = run(NeighborhoodAttentionConfig(6, 2, 3, dilation=2), around, wide[:, :6, :8, :8])[0][:, :, ::2, ::2]
parts = [
    run(NeighborhoodAttentionConfig(6, 2, 3), around, wide[:, :6, :8, start:8:2][:, :, ::2])[0] for start in (0, 1)
]
IDENTITIES["dilated = neighborhood of a sub-map"] = (
    gap(dilated, parts[0]),
    gap(dilated, parts[1]),
)  # second: another sub-map

# %% [markdown]
# Convolutions, and their relation to Deformable DETR: a sigmoid instead of its softmax, one tap for each point, and
# one matrix for all taps. Last, the DAT-DCN layer. Its offsets are (y, x) in half maps, where Deformable DETR has (x,
# y) in pixels.

# %% alt="Difference of two outputs for each identity: rounding where it holds, large where it fails" plot=true
kernel = rng.normal(size=(6, 6, 3, 3))
zero_offsets, ones = np.zeros((1, 18, 5, 5)), np.ones((1, 9, 5, 5))
convolved = conv2d(z, kernel, padding=((1, 1), (1, 1)))
by_v2 = [deform_conv2d(z, zero_offsets + shift, kernel, padding=1, mask=ones) for shift in (0, 0.01)]
IDENTITIES["deformable conv. v2 = convolution"] = tuple(gap(each, convolved) for each in by_v2)
offsets = rng.uniform(-2, 2, size=zero_offsets.shape)
by_v1 = deform_conv2d(z, offsets, kernel, padding=1)
IDENTITIES["deformable conv. v1 = v2"] = tuple(
    gap(by_v1, deform_conv2d(z, offsets, kernel, padding=1, mask=level * ones)) for level in (1, 0.99)
)

moves, scores = rng.uniform(-2, 2, size=(1, 25, 2, 1, 3, 2)), rng.normal(size=(1, 25, 2, 1, 3))
sigmoid, softmax = 1 / (1 + np.exp(-scores)), np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
centers = (np.stack(np.divmod(np.arange(25), 5)[::-1], axis=-1) + 0.5) / 5
tokens = z.reshape(1, 2, 3, 25).transpose(0, 3, 1, 2)
detr = [
    multi_scale_deformable_attention(tokens, [(5, 5)], centers[:, None, None, None] + moves / 5, weights)
    for weights in (sigmoid, softmax)
]
taps = np.stack([np.zeros(3), np.arange(3) - 1], axis=-1)  # kernel of 1 × 3
offset = (moves[:, :, :, 0, :, ::-1] - taps).transpose(0, 2, 3, 4, 1).reshape(1, -1, 5, 5)
one_matrix = np.repeat(np.eye(6)[:, :, None, None], 3, axis=3)
modulated = deform_conv2d(
    z, offset, one_matrix, padding=(0, 1), mask=sigmoid[:, :, :, 0].transpose(0, 2, 3, 1).reshape(1, -1, 5, 5)
)
as_maps = [each.swapaxes(1, 2).reshape(z.shape) for each in detr]
IDENTITIES["DETR with a sigmoid = deformable conv. v2"] = tuple(gap(each, modulated) for each in as_maps)


def dat_dcn(convention):
    config = DATDCNAttentionConfig(6, 2, points=2, convention=convention)
    tree = init_params(config, seed=0, dtype=np.float64)
    tree["offset"]["weight"][:] = np.random.default_rng(1).normal(size=(8, 6)) / 5
    return run(config, tree, z)[0], tree


halves, tree = dat_dcn(Convention.CELL_CENTER)
exchanged = {
    leaf: array.reshape(4, 2, -1)[:, ::-1].reshape(array.shape) * 5 / 2 for leaf, array in tree["offset"].items()
}
in_pixels = run(MultiScaleDeformableConfig(6, 2, points=2), {**tree, "offset": exchanged}, z)[0]
IDENTITIES["DAT-DCN = Deformable DETR"] = gap(halves, in_pixels), gap(dat_dcn(Convention.DATPP2023)[0], in_pixels)

figure, axes = plt.subplots(figsize=(8.6, 3.6))
for row, (holds, broken) in enumerate(IDENTITIES.values()):
    axes.plot([max(holds, 1e-17), broken], [row, row], color=style.HAIRLINE, lw=0.8, zorder=1)
    axes.scatter(max(holds, 1e-17), row, s=45, color=BLUE, lw=0)
    axes.scatter(broken, row, s=45, color=ORANGE, lw=0)
axes.axvline(1e-12, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.set(
    xscale="log",
    xlim=(4e-18, 20),
    yticks=range(len(IDENTITIES)),
    yticklabels=IDENTITIES,
    title="largest difference of the two outputs",
)
axes.set_xticks([1e-17, 1e-12, 1e-6, 1], ["0", "$10^{-12}$", "$10^{-6}$", "1"])
axes.minorticks_off()
axes.invert_yaxis()
axes.tick_params(axis="y", length=0)
plt.show()

# %%
assert len(IDENTITIES) == 11
for holds, broken in IDENTITIES.values():
    assert holds < 1e-12
    assert broken > 1e-3

# %% [markdown]
# ## What to remember
#
# - In deformable attention all queries read the same few positions, these depend on the image, and the weights depend
#   on the features at the positions. No other of the ten systems has all three properties.
# - A stack of deformable layers alone with few points never reads the whole map. Local layers must carry the
#   surroundings to the points.
# - Different systems are equal in limiting cases. These identities are strong tests: [the
#   identities](../../peers/identities/), as a graph, with a property test for each edge.
#
# Next: [what attention figures show](../07_where_it_looks/).
