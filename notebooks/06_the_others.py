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
# # The others
#
# "Deformable" is said of a convolution, of an encoder for detection and of a backbone's attention. "Local" is said of
# windows and of neighborhoods. Names do not tell what a system does with a picture. Three questions do:
#
# - Which pixels can a query reach?
# - Who decides that: the architecture, the image, or the query itself?
# - And who decides what counts: the thing that is found, or the one who asks?
#
# This notebook asks ten systems, and measures each answer. Then it ties them together: pushed to a limit, most of them
# *are* one another, and a mistake in one would break a line of that web. Their equations and code: [the systems it is
# compared with](../../peers/).
#
# Each section makes a claim, names the function of `dat_ref` that it is about, draws it, and ends with an assertion.

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

# Nine keys a query wherever a system can choose, counted over all heads.
SYSTEMS = {
    "plain attention": MultiHeadAttentionConfig(DIM, HEADS),
    "spatial reduction": PyramidAttentionConfig(DIM, HEADS, reduction=4),
    "window": WindowAttentionConfig(DIM, HEADS, window_size=3),
    "shifted window": WindowAttentionConfig(DIM, HEADS, window_size=3, shift=1),
    "neighborhood": NeighborhoodAttentionConfig(DIM, HEADS, kernel_size=3),
    "deformable attention": DeformableAttentionConfig(DIM, HEADS, stride=4, kernel_size=5, size=SIZE),
    "deformable convolution": DeformableConvConfig(DIM, kernel_size=3),
    "Deformable DETR": MultiScaleDeformableConfig(DIM, HEADS, points=3),
    "keys of each query": PerQueryAttentionConfig(DIM, HEADS, kernel_size=3),
    "DAT-DCN": DATDCNAttentionConfig(DIM, HEADS, points=3),
}


def run(config, params, x=x):
    """Run one layer: (y, trace)."""
    return ATTENTIONS[type(config)].forward(x, params, config)


def lively(config, seed=2):
    """Return seeded parameters whose offsets are some pixels long, which first values alone would not give."""
    rng = np.random.default_rng(seed)
    params = init_params(config, seed, dtype=np.float64)
    unit = SIDE / 2 if isinstance(config, DATDCNAttentionConfig) else 1  # its offsets count in half maps, not in pixels
    for part in (params.get("offset", {}), params.get("offset_network", {}).get("pointwise", {})):
        if part:
            fan_in = part["weight"][0, 0].size
            part["weight"][:] = rng.normal(scale=0.4 / unit, size=part["weight"].shape) / fan_in**0.5
    return params


# %% [markdown]
# ## 1. What a query can reach
#
# Put two queries on the photograph, one on the face and one on the helmet, and mark what each can reach: the pixels
# that enter its output as a key or a value, with any weight.
#
# **Claim** (`dat_ref.peers.receptive_field`). Three of ten systems show all queries the same pixels: plain attention,
# spatial reduction, and deformable attention. The first two show the whole map, and pay for it or blur it. **Only
# deformable attention shows everybody the same few pixels, chosen for this image.**

# %%
QUERIES = {"face": (2, 5), "helmet": (9, 9)}
seen = {}
figure, panels = plt.subplots(2, 5, figsize=(8.8, 4.6))
for axes, (name, config) in zip(panels.ravel(), SYSTEMS.items()):
    _, trace = run(config, lively(config))
    seen[name] = [receptive_field(query, SIZE, config, trace) for query in QUERIES.values()]
    axes.imshow(dim(photo), extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
    one, other = seen[name]
    for pixels, color in ((one & ~other, BLUE), (other & ~one, ORANGE), (one & other, GREEN)):
        axes.imshow(np.where(pixels, 1.0, np.nan), cmap=ListedColormap([color]), alpha=0.6)
    for query, color in zip(QUERIES.values(), (BLUE, ORANGE)):
        axes.scatter(query[1], query[0], marker="*", s=120, color=color, ec="white", lw=0.9, zorder=4)
    axes.set(xticks=[], yticks=[], xlabel=f"{seen[name][0].sum()} and {seen[name][1].sum()} pixels")
    axes.set_title(name, size=9)
    axes.spines[:].set_visible(False)
figure.supxlabel("blue: reached from the face, orange: from the helmet, green: from both", size=8.5, color=style.QUIET)
plt.show()

# %%
shared = {name for name, (one, other) in seen.items() if np.array_equal(one, other)}
assert shared == {"plain attention", "spatial reduction", "deformable attention"}
assert seen["plain attention"][0].all()
assert seen["spatial reduction"][0].all()
assert seen["deformable attention"][0].sum() <= 4 * 9  # nine points, four pixels each

# %% [markdown]
# ## 2. Is that what the output depends on?
#
# A picture of receptive fields is only as good as its definition. So test it. Put noise on all pixels that a query does
# *not* reach: its output must not change by a single bit. Put noise on those it does: it must.
#
# One thing has to be held still: places and queries also depend on the map. So whatever *decides* gets weights of zero
# here, and keeps its biases. What is left of the dependence goes through keys and values.
#
# **Claim.** For all ten systems and both queries, the receptive field is exactly what the output depends on.

# %%
DECIDERS = ("query", "offset", "modulation", "weights", "offset_network")


def decided(config):
    """Return parameters under which queries, places and predicted weights do not depend on the map."""
    params = flatten(init_params(config, 2, dtype=np.float64))
    for name, leaf in params.items():
        part, last = name.split(".")[0], name.split(".")[-1]
        if part in DECIDERS and last == "weight" and "pointwise" not in name and "norm" not in name:
            leaf[:] = 0
        if part == "qkv" and last == "weight":
            leaf[:DIM] = 0
    return unflatten(params)


def influence(config, query):
    """Return how much the query's output changes for noise outside of its receptive field, and for noise inside."""
    params = decided(config)
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
axes.set_title("change of the query's output")
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
# ## 3. Who decides?
#
# The same experiment, other questions. Show another photograph: do the places change? Change all that is found, but
# nothing of what the query decides by (its own pixel; for the convolution its window): do the weights change?
#
# **Claim.** Of the seven systems that weigh by looking at what they find, only two can move: deformable attention and
# its costly relative with keys of each query. The other movers weigh a point before they have seen what is there.


# %%
def weights_of(config, trace, query):
    """Return the weights that a query gives its keys or taps, flat."""
    number = query[0] * SIDE + query[1]
    if isinstance(config, WindowAttentionConfig):
        return viz.window_query_attention(trace, query).weights
    if isinstance(config, DeformableConvConfig):
        return trace.mask[0, :, query[0], query[1]]
    queries = 0 if trace.attention.shape[1] == SIDE**2 else 1  # (Q, heads, …) or (heads, Q, …)
    return np.take(trace.attention[0], number, axis=queries).ravel()


def places_held(config):
    """Return parameters with places that do not depend on the map, and weights that may."""
    params = init_params(config, 2, offsets="zero_offset", dtype=np.float64)
    for name in ("modulation", "weights"):  # they start at zero
        if name in params:
            params[name]["weight"][:] = np.random.default_rng(1).normal(size=params[name]["weight"].shape)
    if isinstance(config, DeformableConvConfig):
        params["offset"]["bias"][:] = -4  # its taps lie outside of its window
    return params


def ask(config, query=QUERIES["helmet"]):
    """Return whether places depend on the image, and whether weights depend on what is found there."""
    other = as_map(load_photo(photograph_path("coffee")))
    lying = [receptive_field(query, SIZE, config, run(config, lively(config), picture)[1]) for picture in (x, other)]
    around = 1 if isinstance(config, DeformableConvConfig) else 0
    kept = np.s_[:, :, query[0] - around : query[0] + around + 1, query[1] - around : query[1] + around + 1]
    other[kept] = x[kept]
    weights = [weights_of(config, run(config, places_held(config), picture)[1], query) for picture in (x, other)]
    return not np.array_equal(*lying), np.abs(weights[0] - weights[1]).max() > 1e-6


answers = {name: (name in shared, *ask(config)) for name, config in SYSTEMS.items()}

figure, axes = plt.subplots(figsize=(7.6, 3.2))
for row, of_system in enumerate(answers.values()):
    for column, (yes, color) in enumerate(zip(of_system, (BLUE, ORANGE, GREEN))):
        axes.scatter(column, row, s=95, fc=color if yes else "white", ec=color if yes else style.HAIRLINE, lw=1.2)
axes.set(xlim=(-0.5, 2.5), ylim=(9.6, -0.6), yticks=range(10), yticklabels=SYSTEMS)
axes.set_xticks(
    range(3),
    ["all queries see\nthe same places", "the image moves\nthe places", "what is found there\ndecides its weight"],
)
axes.xaxis.tick_top()
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
plt.show()

# %%
assert [name for name, (_, moves, _) in answers.items() if moves] == list(SYSTEMS)[5:]
looking = {name for name, (_, _, looks) in answers.items() if looks}
assert looking == set(SYSTEMS) - {"deformable convolution", "Deformable DETR", "DAT-DCN"}
assert len(looking) == 7
assert {name for name, answer in answers.items() if all(answer)} == {"deformable attention"}

# %% [markdown]
# ## 4. Two layers, four layers
#
# A backbone stacks layers, and what one layer cannot reach the next one may. How fast does the receptive field grow?
# Keep each pixel's own (the residual branch), and chain: a query sees what is seen by what it sees.
#
# The surprise is deformable attention. Every query sees the points of the last layer, those saw the points of the
# layer before, and so on: **points see points**. However deep the stack, most of the map is never read. What is
# missing is somebody who carries a point's surroundings to the point.
#
# **Claim.** On a map of 28 × 28, four deformable layers of 16 points reach a quarter of the map. With a neighborhood
# of 7 × 7 before each, one such pair reaches four fifths, and two layers of windows or of neighborhoods a fifth. The
# released models alternate: local, deformable, local, deformable.

# %%
WIDE = 28
wide = as_map(photo, WIDE)
STACKS = {
    "window, shifted": [WindowAttentionConfig(DIM, HEADS, 7), WindowAttentionConfig(DIM, HEADS, 7, shift=4)],
    "neighborhood": [NeighborhoodAttentionConfig(DIM, HEADS, 7)],
    "deformable": [DeformableAttentionConfig(DIM, HEADS, stride=7, kernel_size=7, size=(WIDE, WIDE))],
}
STACKS["neighborhood, deformable"] = STACKS["neighborhood"] + STACKS["deformable"]


def receptive_fields(config, seed):
    """Return which pixels each query reaches in one layer, its own included: (784, 784) of booleans."""
    _, trace = run(config, lively(config, seed), wide)
    queries = [(0, 0)] if isinstance(config, DeformableAttentionConfig) else list(np.ndindex(WIDE, WIDE))
    rows = np.array([receptive_field(query, (WIDE, WIDE), config, trace).ravel() for query in queries])
    return np.broadcast_to(rows, (WIDE**2, WIDE**2)) | np.eye(WIDE**2, dtype=bool)


single = {config: receptive_fields(config, 0) for stack in STACKS.values() for config in stack}
reached, pictures = {}, {}
for name, stack in STACKS.items():
    chained, reached[name] = np.eye(WIDE**2, dtype=np.float32), []
    for depth in range(4):
        config = stack[depth % len(stack)]
        moves = isinstance(config, DeformableAttentionConfig)
        layer = receptive_fields(config, depth) if moves else single[config]  # points of its own in each layer
        chained = (layer.astype(np.float32) @ chained > 0).astype(np.float32)
        reached[name].append(chained.mean())
        if depth == 1:
            pictures[name] = chained[10 * WIDE + 11].reshape(WIDE, WIDE) > 0

figure, (axes, *panels) = plt.subplots(1, 5, figsize=(8.8, 2.4), width_ratios=[1.3, 1, 1, 1, 1])
for shares, color in zip(reached.values(), (GREEN, PINK, BLUE, ORANGE)):
    axes.plot(range(1, 5), shares, color=color, lw=1.8, marker="o", ms=4)
axes.set(xticks=range(1, 5), xlabel="layers", ylim=(0, 1.03), yticks=[0, 0.5, 1], title="share of the map reached")
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
for name, shares in reached.items():
    print(f"{name:25} " + "  ".join(f"{share:4.0%}" for share in shares))
assert reached["deformable"][-1] < 0.3
assert reached["neighborhood, deformable"][1] > 0.75
assert max(reached["window, shifted"][1], reached["neighborhood"][1]) < 0.25

# %% [markdown]
# ## 5. The web of identities
#
# Push a system to its limit, and it becomes another: a window as large as the map is plain attention; a deformable
# layer of stride 1 that moves nothing is plain attention too, if its coordinates are right. Each such limit is a test
# that needs no expected numbers, and together they hold all systems in one web.
#
# **Claim.** Eleven pairs agree to the last digits when the condition holds (blue), and clearly do not when it is
# missed by a little (orange): a window one pixel smaller, offsets of a hundredth of a pixel, a mask of 0.99.

# %%
rng = np.random.default_rng(0)
z = rng.normal(size=(1, 6, 5, 5))
THIRDS = {"query": slice(0, 6), "key": slice(6, 12), "value": slice(12, 18)}
plain = MultiHeadAttentionConfig(6, 2, size=(5, 5))
params = init_params(plain, seed=0, dtype=np.float64)
params["position_bias"]["table"][:] = rng.normal(size=(2, 9, 9))
qkv, output, table = params["qkv"], params["output"], params["position_bias"]["table"]
y = run(plain, params, z)[0]


def apart(one, other):
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
    "window = plain": (apart(window(5), y), apart(window(4), y)),
    "neighborhood = plain": (apart(neighborhood(table[:, ::-1, ::-1]), y), apart(neighborhood(table), y)),
    "deformable = plain": (apart(deformable(Convention.CELL_CENTER), y), apart(deformable(Convention.CVPR2022), y)),
}

bare = run(MultiHeadAttentionConfig(6, 2), {"qkv": qkv, "output": output}, z)[0]


def pyramid(reduction):
    config = PyramidAttentionConfig(6, 2, reduction)
    tree = init_params(config, seed=1, dtype=np.float64)
    tree |= {"query": {leaf: qkv[leaf][:6] for leaf in qkv}, "key_value": {leaf: qkv[leaf][6:] for leaf in qkv}}
    return run(config, tree | {"output": output}, z)[0]


IDENTITIES["spatial reduction = plain"] = apart(pyramid(1), bare), apart(pyramid(2), bare)

# %% [markdown]
# Now keys of each query: hand every query a copy of the points that a deformable layer found, or take their offsets
# away (a neighborhood, but for the border). And a dilated neighborhood, which is one on every second pixel.

# %%
config = DeformableAttentionConfig(6, 2, stride=2, kernel_size=3, bias=BiasKind.NONE)
tree = init_params(config, seed=0, dtype=np.float64)
_, trace = run(config, tree, z)
own = np.repeat(trace.points_px.reshape(1, 1, 1, -1, 2), 25, axis=2)  # each query a copy of the shared points
copied, moved = (
    attend_at_points(trace.query.reshape(1, 6, 25), z, points, tree, heads=2)[0] for points in (own, own + 0.01)
)
IDENTITIES["keys of each query = deformable"] = (
    apart(copied.reshape(z.shape), trace.merged),
    apart(moved.reshape(z.shape), trace.merged),
)

config = PerQueryAttentionConfig(6, 2, kernel_size=3)
tree = init_params(config, seed=0, offsets="zero_offset", dtype=np.float64)
stacked = {leaf: np.concatenate([tree[name][leaf] for name in THIRDS]) for leaf in ("weight", "bias")}
around = {"qkv": stacked, "output": tree["output"], "neighborhood_bias": {"table": np.zeros((2, 5, 5))}}
one, other = run(config, tree, z)[0], run(NeighborhoodAttentionConfig(6, 2, 3), around, z)[0]
inside = np.s_[:, :, 1:-1, 1:-1]
IDENTITIES["keys of each query = neighborhood"] = (
    apart(one[inside], other[inside]),
    apart(one, other),
)  # and at the border

dilated = run(NeighborhoodAttentionConfig(6, 2, 3, dilation=2), around, wide[:, :6, :8, :8])[0][:, :, ::2, ::2]
parts = [
    run(NeighborhoodAttentionConfig(6, 2, 3), around, wide[:, :6, :8, start:8:2][:, :, ::2])[0] for start in (0, 1)
]
IDENTITIES["dilated = neighborhood of a sub-map"] = (
    apart(dilated, parts[0]),
    apart(dilated, parts[1]),
)  # and of another one

# %% [markdown]
# Convolutions, and what ties them to Deformable DETR: a sigmoid in place of its softmax, a tap for each point, one
# matrix for all taps. Last, the DAT-DCN layer, whose offsets are (y, x) in half maps where the original's are (x, y) in
# pixels.

# %%
kernel = rng.normal(size=(6, 6, 3, 3))
still, ones = np.zeros((1, 18, 5, 5)), np.ones((1, 9, 5, 5))
convolved = conv2d(z, kernel, padding=((1, 1), (1, 1)))
by_v2 = [deform_conv2d(z, still + shift, kernel, padding=1, mask=ones) for shift in (0, 0.01)]
IDENTITIES["deformable conv. v2 = convolution"] = tuple(apart(each, convolved) for each in by_v2)
wild = rng.uniform(-2, 2, size=still.shape)
by_v1 = deform_conv2d(z, wild, kernel, padding=1)
IDENTITIES["deformable conv. v1 = v2"] = tuple(
    apart(by_v1, deform_conv2d(z, wild, kernel, padding=1, mask=level * ones)) for level in (1, 0.99)
)

moves, scores = rng.uniform(-2, 2, size=(1, 25, 2, 1, 3, 2)), rng.normal(size=(1, 25, 2, 1, 3))
sigmoid, softmax = 1 / (1 + np.exp(-scores)), np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
centers = (np.stack(np.divmod(np.arange(25), 5)[::-1], axis=-1) + 0.5) / 5
tokens = z.reshape(1, 2, 3, 25).transpose(0, 3, 1, 2)
detr = [
    multi_scale_deformable_attention(tokens, [(5, 5)], centers[:, None, None, None] + moves / 5, weights)
    for weights in (sigmoid, softmax)
]
taps = np.stack([np.zeros(3), np.arange(3) - 1], axis=-1)  # of a kernel of 1 × 3
offset = (moves[:, :, :, 0, :, ::-1] - taps).transpose(0, 2, 3, 4, 1).reshape(1, -1, 5, 5)
one_matrix = np.repeat(np.eye(6)[:, :, None, None], 3, axis=3)
modulated = deform_conv2d(
    z, offset, one_matrix, padding=(0, 1), mask=sigmoid[:, :, :, 0].transpose(0, 2, 3, 1).reshape(1, -1, 5, 5)
)
as_maps = [each.swapaxes(1, 2).reshape(z.shape) for each in detr]
IDENTITIES["DETR with a sigmoid = deformable conv. v2"] = tuple(apart(each, modulated) for each in as_maps)


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
IDENTITIES["DAT-DCN = Deformable DETR"] = apart(halves, in_pixels), apart(dat_dcn(Convention.DATPP2023)[0], in_pixels)

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
    title="largest difference of two outputs",
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
# - Deformable attention shows all queries the same few places, moved by the image, and lets each query weigh what is
#   found there. No other of the ten does all three.
# - Points alone never see the whole map, however many layers. They need somebody who gathers their surroundings.
# - Systems that look different are limits of one another, which is the best test they can have:
#   [the web](../../peers/identities/), drawn, with a property test for each line.
#
# Next: [where it looks](../07_where_it_looks/).
