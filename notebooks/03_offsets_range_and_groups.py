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
# # Offsets, their range and groups
#
# A small network says where each point should go. How far may it go? The article puts every point on a leash, $s$.
# DAT++ takes the leash off. Both work, and the article's own experiment hardly sees a difference between $s = 1$ and
# $s = 12$, until at $s = 14$ the accuracy drops. Why is it so flat, and why does it then fall?
#
# This notebook looks at the leash, at what happens beyond it, and at the other dial: how many grids of points there
# are.
#
# Each section makes a claim, names the function of `dat_ref` that it is about, draws it, and ends with an assertion.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection, PolyCollection

import dat_ref
from dat_ref import Convention, DeformableAttentionConfig, OffsetBound, viz
from dat_ref.cli.photo import load_photo, normalise, resize
from dat_ref.complexity import attention_terms, total
from dat_ref.data import photograph_path
from dat_ref.layer import LayerTrace, deformable_layer, deformable_layer_vjp, deformable_shapes
from dat_ref.ops.attention import split_heads
from dat_ref.ops.basic import linear
from dat_ref.ops.bias import table_bias
from dat_ref.ops.grid import reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets, offset_network
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.params import count
from dat_ref.train import AdamW, scheduled_rate
from dat_ref.viz import style
from dat_ref.viz.artists import dim

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]

HEIGHT, WIDTH = SIZE = (28, 42)
photo = load_photo(photograph_path("rocket"))
CONVENTION = Convention.CELL_CENTER


def on_photo(axes, title="", margin=0.0):
    """Show the photograph in pixels of the map, with some room around it."""
    axes.imshow(photo, extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    axes.set(xticks=[], yticks=[], title=title, facecolor=style.MARGIN)
    axes.set(xlim=(-0.5 - margin, WIDTH - 0.5 + margin), ylim=(HEIGHT - 0.5 + margin, -0.5 - margin))
    axes.spines[:].set_visible(False)


def bounded_px(raw, bound, s=2.0):
    """Return where raw offsets (B, 1, Hk, Wk, 2) move their points to, in pixels of the map."""
    reference = reference_points(raw.shape[2:4], CONVENTION)
    _, points = bound_offsets(raw, reference, bound, offset_range=s, convention=CONVENTION)
    return to_pixels(points, SIZE, CONVENTION)


# %% [markdown]
# ## 1. Four ways to bound a point
#
# Let the network of one point ask for every direction, harder and harder: circles of raw offsets $\Delta$ around it.
# What becomes of the circles is the bound.
#
# | bound | point | used by |
# |---|---|---|
# | `TANH_CELLS` | $\tilde p = p + \tfrac s2 \cdot \text{pitch} \cdot \tanh \Delta$ | the article; DAT with $s = 2$ |
# | `CLAMP` | $\tilde p = \min(1, \max(-1,\ p + \Delta))$ | DAT++ |
# | `TANH_COORDINATES` | $\tilde p = \tanh(p + \Delta)$ | 2022 code, an option |
# | `RAW` | $\tilde p = p + \Delta$ | 2022 code, an option |
#
# **Claim** (`dat_ref.ops.offsets.bound_offsets`). The first keeps a point near its reference, the next two on the map,
# the last nowhere. And the third moves a point that did not ask: $\tanh p \neq p$.

# %%
STRENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
KEYS = (2, 3)
angle = np.linspace(0, 2 * np.pi, 241)
circles = np.stack([np.sin(angle), np.cos(angle)], axis=-1)  # (241, 2), (Δy, Δx)
fans = {}
BOUNDS = (OffsetBound.TANH_CELLS, OffsetBound.CLAMP, OffsetBound.TANH_COORDINATES, OffsetBound.RAW)
figure, panels = plt.subplots(2, 2, figsize=(8.2, 6.0))
for axes, bound in zip(panels.ravel(), BOUNDS):
    raw = np.stack([strength * circles for strength in (0.0, *STRENGTHS)]).reshape(-1, 1, 1, 1, 2)
    fan = bounded_px(np.broadcast_to(raw, (len(raw), 1, *KEYS, 2)), bound)
    fans[bound] = fan.reshape(len(STRENGTHS) + 1, len(angle), 6, 2)
    on_photo(axes, bound.name, margin=6)
    for key, color in enumerate((BLUE, ORANGE, GREEN, PINK, *style.GROUP_COLORS[4:6])):
        for strength in range(1, len(STRENGTHS) + 1):
            axes.plot(*fans[bound][strength, :, key].T[::-1], color=color, lw=1.1)
        axes.plot(*fans[bound][0, 0, key][::-1], "o", color="white", mec=color, ms=4)
plt.show()

# %%
reference_px = to_pixels(reference_points(KEYS, CONVENTION), SIZE, CONVENTION).reshape(6, 2)
pitch = np.array([HEIGHT / 2, WIDTH / 3])
assert (np.abs(fans[OffsetBound.TANH_CELLS] - reference_px) < pitch).all()  # s = 2: one cell each way
for bound in (OffsetBound.CLAMP, OffsetBound.TANH_COORDINATES):
    assert ((fans[bound] >= -0.5) & (fans[bound] <= np.array(SIZE) - 0.5)).all()
assert (fans[OffsetBound.RAW] < -0.5).any()
for bound, fan in fans.items():
    unmoved = np.allclose(fan[0], reference_px)  # asked for nothing
    assert unmoved == (bound is not OffsetBound.TANH_COORDINATES)

# %% [markdown]
# ## 2. With a leash longer than a cell, points can pass each other
#
# The grid is a net of knots. While each knot stays in its own cell, the net is stretched here and compressed there,
# but a knot that began above another stays above it. Once squares overlap, the net can fold.
#
# **Claim.** For $s \le 1$ no offsets whatever change the order of two points. For $s > 1$ they can: filled are the
# meshes that random offsets have folded.

# %%
rng = np.random.default_rng(3)
GRID = (8, 12)
raw = rng.normal(scale=1.2, size=(1, 1, *GRID, 2))


def meshes(points):
    """Return the four corners of every mesh of a net (Hk, Wk, 2): (N, 4, 2), going around."""
    corners = [points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]]
    return np.stack(corners, axis=2).reshape(-1, 4, 2)


def is_folded(mesh):
    """Whether two neighbors of a mesh (N, 4, 2) have changed their order: upper and lower, or left and right."""
    upper_left, upper_right, lower_right, lower_left = mesh.swapaxes(0, 1)
    columns = (upper_left[:, 0] > lower_left[:, 0]) | (upper_right[:, 0] > lower_right[:, 0])
    rows = (upper_left[:, 1] > upper_right[:, 1]) | (lower_left[:, 1] > lower_right[:, 1])
    return columns | rows


figure, panels = plt.subplots(2, 2, figsize=(8.2, 5.7))
folded = {}
for axes, s in zip(panels.ravel(), (0.5, 1.0, 2.0, 4.0)):
    net = bounded_px(raw, OffsetBound.TANH_CELLS, s)[0, 0]
    folded[s] = is_folded(meshes(net))
    on_photo(axes, f"s = {s:g}: {folded[s].sum()} of {folded[s].size} folded")
    lines = [*net, *net.swapaxes(0, 1)]
    axes.add_collection(PolyCollection(list(meshes(net)[folded[s]][..., ::-1]), fc=ORANGE, alpha=0.5, lw=0))
    axes.add_collection(LineCollection([line[:, ::-1] for line in lines], colors="white", linewidths=0.7))
    axes.plot(*net.reshape(-1, 2).T[::-1], ".", color="white", ms=3)
plt.show()

# %%
hardest = 50 * rng.choice([-1.0, 1.0], size=(400, 1, *GRID, 2))  # tanh Δ = ±1
for s in (0.5, 1.0):
    net = bounded_px(hardest, OffsetBound.TANH_CELLS, s)[:, 0]
    above, below = net[:, :-1, :, 0].max(axis=2), net[:, 1:, :, 0].min(axis=2)  # of two rows of points
    left, right = net[:, :, :-1, 1].max(axis=1), net[:, :, 1:, 1].min(axis=1)  # of two columns
    assert (above <= below + 1e-9).all()
    assert (left <= right + 1e-9).all()
    assert not folded[s].any()
assert 0 < folded[2.0].sum() < folded[4.0].sum()

# %% [markdown]
# Folding is no harm: keys are a set, and softmax does not ask for their order. It only says that from there on "the
# upper left point" is a name and not a place.
#
# ## 3. What the network does where there is nothing to see
#
# The last layer of the offset network, $W_2$, has no bias, "to avoid a compulsory shift": without evidence a point
# should stay. Look at a blank map, then: the same color everywhere. There is no evidence.
#
# But before $W_2$ comes a layer norm, and it scales whatever it gets to variance one. A blank window gives 16 numbers,
# not all equal, and after the norm they are as large as any. So the points move, and since all windows are alike, all
# move alike.
#
# **Claim.** On a blank map all points make the same step, and it is as long as those on a photograph. No bias at the
# end does not prevent a compulsory shift; only first values of zero do (`init_params(..., offsets="zero_offset")`).

# %%
small = resize(photo, SIZE).transpose(2, 0, 1)[None]
DIM = 16
config = DeformableAttentionConfig(dim=DIM, heads=1, stride=7, kernel_size=7, size=SIZE)
spread = np.random.default_rng(0).normal(size=(DIM, 3))
scenes = {"a blank map": np.full_like(small, 0.3), "the photograph": small}


def first_steps(colors, seed, offsets="released"):
    """Return the steps of untrained points, in pixels: (4, 6, 2)."""
    params = dat_ref.init_params(config, seed, offsets=offsets, dtype=np.float64)
    _, trace = deformable_layer(linear(colors, spread), params, config)
    return (trace.points_px - trace.reference_px)[0, 0]


figure, panels = plt.subplots(1, 3, figsize=(8.8, 2.3), width_ratios=[1, 1, 0.8])
centers = to_pixels(reference_points((4, 6), CONVENTION), SIZE, CONVENTION)
for axes, (name, colors) in zip(panels, scenes.items()):
    steps = 3 * first_steps(colors, seed=1)
    axes.imshow(np.clip(colors[0].transpose(1, 2, 0), 0, 1), extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    axes.quiver(
        centers[..., 1], centers[..., 0], steps[..., 1], steps[..., 0], color="white", angles="xy", scale_units="xy",
        scale=1, width=0.007,
    )  # fmt: skip
    axes.set(xticks=[], yticks=[], title=name, xlabel="steps three times as long")
lengths = {
    name: np.array([np.linalg.norm(first_steps(colors, seed), axis=-1).mean() for seed in range(20)])
    for name, colors in scenes.items()
}
for place, (lengths_of, color) in enumerate(zip(lengths.values(), (ORANGE, BLUE))):
    panels[2].scatter(place + np.linspace(-0.25, 0.25, 20), lengths_of, s=12, color=color, lw=0)
panels[2].set(xlim=(-0.6, 1.6), ylim=(0, None), title="mean step, 20 seeds, pixels")
panels[2].set_xticks([0, 1], scenes)
plt.show()

# %%
for seed in range(20):
    steps = first_steps(scenes["a blank map"], seed).reshape(-1, 2)
    np.testing.assert_allclose(
        steps, steps[:1].repeat(24, axis=0), atol=1e-12
    )  # windows of 7 × 7 never touch the border
    assert np.linalg.norm(steps[0]) > 0.1
    assert not first_steps(scenes["a blank map"], seed, "zero_offset").any()
ratio = lengths["a blank map"].mean() / lengths["the photograph"].mean()
print(f"steps on the blank map are {ratio:.2f} times as long as on the photograph")
assert 0.7 < ratio < 1.5

# %% [markdown]
# ## 4. How long should the leash be?
#
# The [first notebook](../01_one_tensor_through_a_layer/) trained an offset network to paint a photograph from 24
# readings. Here is the same painter before a night sky, with six leashes and three seeds. Most of the 24 cells are
# blank blue.
#
# **Claim.** Short leashes do equally well: to find a better color one need not go far. The longest ones do worse than
# no offsets at all, and not because the points find nothing: they *leave*. All blank cells move alike, so a step that
# helps one of them takes all along; and outside the map every reading is zero, and so is what the features send back.
# The bias still pulls, but it knows nothing of the picture.


# %%
def painter(s, seed=0, beta=60.0, near=21.0):
    """Return a layer that compares colors, as in the first notebook, with a leash of s; and its input."""
    layer = replace(config, offset_range=s)
    params = dat_ref.init_params(layer, seed, offsets="zero_offset", dtype=np.float64)
    query = {"weight": np.zeros((DIM, DIM)), "bias": np.zeros(DIM)}
    sharpness = beta / layer.scale
    query["weight"][:3, :3], query["bias"][3] = 2 * sharpness * np.eye(3), -sharpness
    query["weight"][4:, :3] = sharpness * np.random.default_rng(seed).standard_normal((DIM - 4, 3))
    passing = {"weight": np.diag([1.0] * 4 + [0.0] * (DIM - 4)), "bias": np.zeros(DIM)}
    dy, dx = np.meshgrid(np.arange(1 - HEIGHT, HEIGHT), np.arange(1 - WIDTH, WIDTH), indexing="ij")
    params |= {"query": query, "key": passing, "value": passing, "output": passing}
    return layer, params | {"position_bias": {"table": -(dy**2 + dx**2)[None] / (2 * near**2)}}


def paint(s, seed, steps=60, rate=0.03):
    """Train the offset network; return the last error as a share of the first, and where the points came to lie."""
    layer, params = painter(s, seed)
    centered = small - 0.5
    x = np.concatenate(
        [centered, np.square(centered).sum(axis=1, keepdims=True), np.zeros((1, DIM - 4, *SIZE))], axis=1
    )
    optimizer = AdamW(weight_decay=0.0)
    state, errors = optimizer.init(params["offset_network"]), []
    for step in range(steps + 1):
        y, trace = deformable_layer(x, params, layer)
        difference = np.where(np.arange(DIM)[:, None, None] < 3, y - x, 0.0)
        errors.append(np.square(difference).sum() / (HEIGHT * WIDTH))
        if step < steps:
            _, grads = deformable_layer_vjp(2 * difference / (HEIGHT * WIDTH), trace, params, layer)
            now = scheduled_rate(step, steps, rate, warmup_steps=10)
            network, state = optimizer.step(params["offset_network"], grads["offset_network"], state, now)
            params = {**params, "offset_network": network}
    return errors[-1] / errors[0], trace.points_px[0, 0].reshape(-1, 2)


LEASHES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
runs = {s: [paint(s, seed) for seed in range(3)] for s in LEASHES}
error = {s: np.array([left for left, _ in runs[s]]) for s in LEASHES}


def share_outside(points):
    return np.any((points < -0.5) | (points > np.array(SIZE) - 0.5), axis=1).mean()


lost = {s: np.array([share_outside(points) for _, points in runs[s]]) for s in LEASHES}

figure, panels = plt.subplots(2, 2, figsize=(8.2, 5.8))
*panels, axes = panels.ravel()
for panel, s in zip(panels, (1.0, 8.0, 16.0)):
    points = runs[s][1][1]
    on_photo(panel, f"s = {s:g}: {lost[s][1]:.0%} have left", margin=13)
    walks = np.stack([centers.reshape(-1, 2), points], axis=1)[..., ::-1]
    panel.add_collection(LineCollection(walks, colors=[(0.65, 0.65, 0.65, 0.9)], linewidths=0.7))
    panel.scatter(*points.T[::-1], s=11, color=ORANGE, lw=0, zorder=3)
axes.axhline(1, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.text(0.5, 1.1, "points stay on the grid", size=7.5, color=style.QUIET)
for s in LEASHES:
    axes.scatter([s] * 3, error[s], s=16 + 90 * lost[s], color=BLUE, alpha=0.8, lw=0)
axes.set(xscale="log", yscale="log", xticks=LEASHES, xticklabels=[f"{s:g}" for s in LEASHES], xlabel="s")
axes.set(yticks=[0.5, 1, 2, 5], yticklabels=["½", "1", "2", "5"], title="error left, three seeds each")
axes.minorticks_off()
plt.show()

# %%
for s in LEASHES:
    print(f"s = {s:4g}: error left {error[s].min():.2f} to {error[s].max():5.2f}, points outside {lost[s].mean():4.0%}")
assert all(error[s].max() < 0.9 for s in (0.5, 1.0, 2.0))  # moving helps, whatever the short leash
assert lost[0.5].max() == lost[1.0].max() == 0  # s ≤ 1 cannot leave the map
assert np.median(error[16.0]) > 1  # worse than not moving at all
assert lost[16.0].mean() > lost[8.0].mean() / 2 > lost[2.0].mean()
beyond = np.array([[[-1.0, 9.0], [12.5, WIDTH + 3.0]]])  # a pixel outside the map, or more
assert not bilinear_sample(small, beyond).any()
assert not bilinear_sample_vjp(np.ones((1, 3, 2)), small, beyond + [-1e-9, 0]).points_px.any()
assert all((lost[s][error[s] > 1] > 0).all() for s in LEASHES)  # who does worse than the grid has lost points

# %% [markdown]
# It is one photograph and one small layer, and a long leash also means long steps, since the network's output is
# multiplied by $s$. But the shape is that of the article's own curve: flat, flat, flat, and then down.
#
# DAT++ has no leash. What keeps its points from leaving is the clamp, and a held point [has no gradient along the held
# axis](../04_gradients_by_hand/).
#
# ## 5. Where the released models start
#
# Neither release starts its points on the grid: the offset network begins with ordinary random weights. On a leash of
# one cell that is a small disorder. Without a leash it is a large one.
#
# **Claim** (`dat_ref.init_params`). At the first step DAT's points are less than half a key cell off on average, those
# of DAT++ more than a whole cell. With `offsets="zero_offset"` DAT's points start where their references are.

# %%
portrait = load_photo(photograph_path("astronaut"))
image = normalise(resize(portrait, (224, 224)))


def starts(name, seed=0, offsets="released"):
    """Run an untrained backbone on the photograph; return the first deformable layer's trace of each stage."""
    backbone = dat_ref.config(name)
    model = dat_ref.DAT(backbone, dat_ref.init_params(backbone, seed, offsets=offsets))
    traces = {}
    for step in model.walk(image):
        if isinstance(step.trace.attention, LayerTrace):
            traces.setdefault(step.stage + 1, step.trace.attention)
    return traces


def mean_step(trace):
    """Return the mean length of an offset, in key cells."""
    cell = trace.x.shape[2] / trace.points.shape[2]
    return float(np.linalg.norm(trace.points_px - trace.reference_px, axis=-1).mean() / cell)


begun = {name: starts(name) for name in ("dat_tiny", "dat_pp_tiny")}
figure, (*panels, bars) = plt.subplots(1, 3, figsize=(8.8, 2.9), width_ratios=[1, 1, 0.9])
for axes, (name, traces), color in zip(panels, begun.items(), (BLUE, ORANGE)):
    trace = traces[3]
    axes.imshow(dim(portrait), extent=(-0.5, 13.5, 13.5, -0.5))
    before, updated = (part[0, 0].reshape(-1, 2) for part in (trace.reference_px, trace.points_px))
    axes.add_collection(LineCollection(np.stack([before, updated], axis=1)[..., ::-1], colors="white", linewidths=0.7))
    axes.scatter(*before.T[::-1], s=6, color="white", lw=0, zorder=3)
    axes.scatter(*updated.T[::-1], s=14, color=color, ec="white", lw=0.4, zorder=4, clip_on=False)
    axes.set(xticks=[], yticks=[], title=f"{name}, stage 3, group 1", xlim=(-0.5, 13.5), ylim=(13.5, -0.5))
    axes.spines[:].set_visible(False)
    stages = list(traces)
    shift = 0.2 if name == "dat_pp_tiny" else -0.2
    bars.bar(
        np.array(stages) + shift, [mean_step(traces[stage]) for stage in stages], width=0.36, color=color, label=name
    )
bars.axhline(1, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
bars.set(xticks=[1, 2, 3, 4], xlabel="stage", title="mean offset at the start, key cells")
bars.legend(loc="upper left")
bars.set_ylim(0, 2.1)
plt.show()

# %%
assert all(mean_step(trace) < 0.5 for trace in begun["dat_tiny"].values())
assert all(mean_step(trace) > 1 for trace in begun["dat_pp_tiny"].values())
assert all(mean_step(trace) == 0 for trace in starts("dat_tiny", offsets="zero_offset").values())

# %% [markdown]
# ## 6. Groups: several grids at once
#
# One grid for all heads is rigid: two queries cannot send the same point to different places, and neither can two
# heads. So the channels are cut into $G$ groups. Each moves a grid of its own, decided by its own channels, and reads
# its own channels there. The network is the same for all, only what it looks at differs.
#
# **Claim** (`dat_ref.ops.offsets.offset_network`). Change the queries of one group, and its points move while those of
# the other groups stay. Below the three grids of a layer of dat_tiny, with seeded weights: geometry, nothing learned.

# %%
layer = next(block.attention for block in dat_ref.config("dat_tiny").stages[2] if block.attention.kind == "deformable")
layer = replace(layer, stride=2)  # 7 × 7 points, to see them
params = dat_ref.init_params(layer, seed=0, dtype=np.float64)
features = begun["dat_tiny"][3].x.astype(np.float64)  # what the layer gets: (1, 384, 14, 14)
_, trace = deformable_layer(features, params, layer)
viz.draw_points(portrait, trace, label=f"G = {layer.groups}")


# %%
def steps_of(query):
    in_groups = query.reshape(layer.groups, layer.group_dim, *query.shape[2:])
    steps, _ = offset_network(in_groups, params["offset_network"], stride=2, padding=((4, 4), (4, 4)))
    return steps  # (G, 2, Hk, Wk)


changed = trace.query.copy()
changed[:, layer.group_dim : 2 * layer.group_dim] += np.random.default_rng(0).normal(size=(1, layer.group_dim, 14, 14))
difference = np.abs(steps_of(changed) - steps_of(trace.query)).max(axis=(1, 2, 3))
assert (difference > 0.01).tolist() == [False, True, False]
assert difference[0] == difference[2] == 0

# %% [markdown]
# ## 7. What a group does not keep to itself
#
# "A group's heads see its own points", the article says. The code reads $C / G$ channels at each group's points, and
# then multiplies *all* channels by one dense $W_k$ and one $W_v$. So every head's keys are a mixture of what all
# groups have read, at three places of the photograph at once. Only the bias stays with its group.
#
# **Claim.** Move one group's points, and the keys of all heads change. Were $W_k$ cut into blocks, one a group, only
# its own heads' would. The position bias changes in its own heads alone, either way.


# %%
def keys_and_bias(key, points):
    """Return k (heads, Ns, d) and the bias (heads, H·W, Ns) for a key projection and points (1, G, Hk, Wk, 2)."""
    groups, flat = layer.groups, points.reshape(1, layer.groups, -1, 2)
    maps = features.reshape(groups, layer.group_dim, 14, 14)
    sampled = bilinear_sample(maps, to_pixels(flat, (14, 14), layer.convention)[0]).reshape(1, layer.dim, -1)
    table = params["position_bias"]["table"]
    bias = table_bias(table, flat, query_size=(14, 14), convention=layer.convention)
    return split_heads(linear(sampled, **key), layer.heads)[0], bias[0]


def changes(key):
    """Return how much the keys and the bias of each head change when one group's points move: (G, heads) each."""
    found = []
    for group in range(layer.groups):
        updated = trace.points.copy()
        updated[:, group] += 0.1
        pairs = zip(keys_and_bias(key, updated), keys_and_bias(key, trace.points))
        found.append([np.linalg.norm(new - old, axis=(1, 2)) / np.linalg.norm(old, axis=(1, 2)) for new, old in pairs])
    return np.array(found).swapaxes(0, 1)


blocks = np.kron(np.eye(layer.groups), np.ones((layer.group_dim, layer.group_dim)))
dense, bias_changes = changes(params["key"])
cut, _ = changes({"weight": params["key"]["weight"] * blocks, "bias": params["key"]["bias"]})

figure, panels = plt.subplots(1, 3, figsize=(8.8, 1.7), sharey=True)
titles = ("keys, as released", "keys, with $W_k$ cut into blocks", "position bias")
for axes, found, title in zip(panels, (dense, cut, bias_changes), titles):
    axes.imshow(found / found.max(), cmap=style.FIELD, vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=[1.5, 5.5, 9.5], xticklabels=["heads 1-4", "5-8", "9-12"], yticks=range(3), title=title)
    axes.set_yticklabels([f"group {group + 1}" for group in range(3)])
    axes.tick_params(length=0)
    axes.vlines([3.5, 7.5], -0.5, 2.5, color="white", lw=2)
    axes.hlines([0.5, 1.5], -0.5, 11.5, color="white", lw=2)
    axes.spines[:].set_visible(False)
panels[0].set_ylabel("moved")
plt.show()

# %%
own = np.kron(np.eye(3), np.ones((1, 4))).astype(bool)  # (G, heads): the heads of each group
assert dense.min() > 0.01  # every head notices every group
for found in (cut, bias_changes):
    assert found[own].min() > 0.01
    assert found[~own].max() == 0

# %% [markdown]
# ## 8. What groups cost
#
# Nothing. The points multiply, but each reads fewer channels.
#
# **Claim** (`dat_ref.complexity.attention_terms`). Multiply-adds and gathers do not depend on $G$, to the unit. Places
# read grow as $G$; parameters fall a little, since one small network serves all.

# %%
GROUPS = (1, 2, 3, 4, 6, 12)
grouped = {groups: replace(layer, groups=groups) for groups in GROUPS}
costs = {groups: total(attention_terms(1, (14, 14), config)) for groups, config in grouped.items()}
sizes = {groups: count(deformable_shapes(config)) for groups, config in grouped.items()}

figure, panels = plt.subplots(1, 3, figsize=(8.8, 1.9))
shown = {
    "multiply-adds, millions": [costs[groups].macs / 1e6 for groups in GROUPS],
    "places read": [49 * groups for groups in GROUPS],
    "parameters, thousands": [sizes[groups] / 1e3 for groups in GROUPS],
}
for axes, (title, values), color in zip(panels, shown.items(), (BLUE, ORANGE, GREEN)):
    axes.plot(GROUPS, values, color=color, lw=1.6, marker="o", ms=4)
    axes.set(xticks=GROUPS, xlabel="groups", ylim=(0, 1.15 * max(values)), title=title)
plt.show()

# %%
assert len({(cost.macs, cost.gathers) for cost in costs.values()}) == 1
assert sizes[1] > sizes[12] > 0.95 * sizes[1]
network = layer.kernel_size**2 + 3 + 2  # weights, three biases and norms, two outputs: for each channel of a group
assert sizes[1] - sizes[12] == (layer.dim - layer.dim // 12) * network

# %% [markdown]
# ## What to remember
#
# - $s$ is a leash, counted in cells. Up to one, points keep their order; beyond, the net may fold.
# - What a short leash costs is little. What a long one risks is that blank places send their points off the map
#   together, whence the picture cannot call them back.
# - "No last bias" does not keep points still where there is nothing to see; starting from zero does.
# - Groups are several grids for the price of one. Their readings meet again in $W_k$ and $W_v$.
#
# Next: [the gradient that moves them](../04_gradients_by_hand/).
